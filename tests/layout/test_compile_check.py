"""Tensors that are whole by accident: each kind is provoked, and refused with its name, its line and the way out."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.errors import UserError
from jaxllm.layout import vocabulary, zero
from jaxllm.layout.compile_check import captured_stderr, compile_checked
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout, pin
from jaxllm.layout.scope import Tensor, tensor_scope
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import model_spec
from tests.layout.runs import GPT2, LLAMA, Shape, lowered

LAYOUT = make_layout(MeshConfig(replica=2, data=2, model=2), LayoutConfig())
W = {"layers.w.kernel": Tensor(("embed", "mlp"), (16, 16))}


ROWS, COLUMNS = P(("replica", "data", "model"), None), P(None, ("data", "model"))


def conflicting(of=lambda w: pin(jnp.sin(w), LAYOUT, ROWS)):
    """A tensor whose rows all mesh axes split, wanted with its columns split over two of them."""

    def step(params):
        with tensor_scope("layers.w.kernel", ("embed", "mlp")):
            return jnp.cos(pin(of(params["layers"]["w"]["kernel"]), LAYOUT, COLUMNS))

    kernel = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(LAYOUT.mesh, ROWS))
    return jax.jit(step).lower({"layers": {"w": {"kernel": kernel}}})


def test_a_way_that_the_partitioner_does_not_know():
    with pytest.raises(UserError) as error:
        compile_checked(conflicting(), LAYOUT, W)
    said = str(error.value)
    assert said.startswith("layers.w.kernel [embed, mlp] (")
    assert "is gathered whole on every device" in said and "from its sharding {devices=[8,1]<=[8]} to {" in said
    assert "leave 'mlp' whole (--config.layout.rule_overrides=mlp=none)" in said
    assert said.endswith("or accept it: --config.layout.allow_replication.") and len(said.splitlines()) == 2


def test_the_same_of_an_argument_of_the_program():
    """XLA names it after the argument."""
    with pytest.raises(UserError, match=r"^layers\.w\.kernel \[embed, mlp\]"):
        compile_checked(conflicting(lambda w: w), LAYOUT, W)


def test_accepted_it_is_a_warning():
    warned = []
    compiled = compile_checked(conflicting(), LAYOUT, W, allow_replication=True, warn=warned.append)
    assert isinstance(compiled, jax.stages.Compiled)
    assert len(warned) == 1 and warned[0].startswith("warning: layers.w.kernel [embed, mlp]")


def test_what_is_fine_passes_without_a_word():
    warned = []
    layout = Shape(1, 4, 2, zero_stage=1).layout()
    spec = model_spec(LLAMA)
    compile_checked(lowered(LLAMA, layout), layout, spec.parameters, allow_replication=True, warn=warned.append)
    assert not warned


def test_a_refused_program_is_not_kept_in_the_cache(tmp_path, monkeypatch):
    """Else the next run would take it from there, and the partitioner would have nothing to say."""
    from jax.experimental.compilation_cache import compilation_cache

    options = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    try:
        compilation_cache.reset_cache()
        for name, value in options.items():
            jax.config.update(name, value)
        compile_checked(jax.jit(lambda x: x + 1).lower(jnp.ones(8)), LAYOUT, {})
        kept = set(tmp_path.iterdir())
        assert kept  # what passes is kept
        for _ in range(2):
            with pytest.raises(UserError):
                compile_checked(conflicting(), LAYOUT, W)
        assert set(tmp_path.iterdir()) == kept
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_parameter_that_nothing_divides(monkeypatch):
    """No dimension of the mlp of this model is a multiple of data=4."""
    monkeypatch.setattr(zero, "SMALL", 256)
    model = ModelConfig(num_layers=1, embed_dim=30, num_heads=3, mlp_dim=50, vocab_size=40, max_length=16).resolved()
    layout = make_layout(MeshConfig(data=4), LayoutConfig(), devices=jax.devices()[:4])
    parameters = model_spec(model).parameters
    program = lowered(model, layout)
    with pytest.raises(UserError) as error:
        compile_checked(program, layout, parameters)
    said = str(error.value)
    found = re.match(
        r"(layers\.[\w.]+) \[layers=1, ([\w=, ]+)\] \(jaxllm/model/(attention|mlp)\.py:\d+\) is whole", said
    )
    assert found, said
    assert "every device of config.mesh.data=4, though config.layout.zero_stage=1 spreads the state" in said
    assert "Make one a multiple of 4" in said and "more like it" in said and len(said.splitlines()) == 2
    warned = []
    compile_checked(program, layout, parameters, allow_replication=True, warn=warned.append)
    assert {line.split(" ")[1] for line in warned} == {
        path for path, w in parameters.items() if zero.elements_a_layer(*w) >= 256 and all(n % 4 for n in w.shape)
    }
    assert compile_checked(program, make_layout(MeshConfig(data=8), LayoutConfig(zero_stage=0)), parameters)


@pytest.mark.parametrize("shape", [Shape(1, 4, 2, 3, True, 2), Shape(1, 2, 4, 3)], ids=str)
def test_a_vocabulary_that_model_does_not_divide_finds_its_way_at_stage_3(shape, monkeypatch):
    """GPT-2's 37 rows lie by columns at rest, over data and model; the lookup wants rows over model."""
    monkeypatch.setattr(zero, "SMALL", 256)
    layout = shape.layout()
    compile_checked(lowered(GPT2, layout), layout, model_spec(GPT2).parameters)


def test_the_train_step_without_that_way_is_refused(monkeypatch):
    """The tied table is named, with a line of the model, though XLA complains of an operation of its own making."""
    monkeypatch.setattr(zero, "SMALL", 256)
    shape = lambda place, shape: zero.state_spec(place.layout, vocabulary.TABLE, shape)  # noqa: E731
    monkeypatch.setattr(vocabulary.Place, "_split_columns", shape)
    layout = Shape(1, 4, 2, 3, True, 2).layout()
    with pytest.raises(
        UserError, match=r"^embedding\.table \[vocab, embed\] \(jaxllm/model/head\.py:\d+\) is gathered"
    ):
        compile_checked(lowered(GPT2, layout), layout, model_spec(GPT2).parameters)


STAGES = make_layout(MeshConfig(pipeline=2, data=2, model=2), LayoutConfig())


def permuted(in_branch: bool):
    """A weight passed around `model`, by all devices or by those of one stage alone."""

    def around(w):
        with tensor_scope("layers.w.kernel", ("embed", "mlp")):
            return jax.lax.ppermute(w, "model", [(0, 1), (1, 0)])

    def local(w):
        return jax.lax.cond(jax.lax.axis_index("pipeline") == 0, around, jnp.sin, w) if in_branch else around(w)

    place = P("pipeline", "model")
    step = jax.shard_map(local, mesh=STAGES.mesh, in_specs=place, out_specs=place, check_vma=False)
    return jax.jit(step).lower(jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(STAGES.mesh, place)))


def test_a_permute_inside_a_stage_is_refused_on_cpus():
    """There it waits for the devices of all stages, and aborts the process after 40 seconds."""
    compile_checked(permuted(in_branch=False), STAGES, W)
    compile_checked(permuted(in_branch=True), STAGES, W, runs_here=False)  # `jaxllm explain` for GPUs
    with pytest.raises(UserError, match=r"^layers\.w\.kernel: XLA sends it over model") as error:
        compile_checked(permuted(in_branch=True), STAGES, W, allow_replication=True)
    assert "leave 'mlp' whole (--config.layout.rule_overrides=mlp=none)" in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_the_pipelines_own_permutes_are_outside_the_stages(monkeypatch):
    """Ring attention and an odd vocabulary at stage 3, which would be permutes, are played by gathers there."""
    monkeypatch.setattr(zero, "SMALL", 256)
    fields = LayoutConfig(zero_stage=3, num_microbatches=4, sequence_parallel=True)
    layout = make_layout(MeshConfig(pipeline=2, data=1, context=2, model=2), fields)
    compile_checked(lowered(GPT2, layout), layout, model_spec(GPT2).parameters)


def test_stderr_is_read_and_shown(capfd):
    with captured_stderr() as said:
        os.write(2, b"from C++\n")
        print("from Python", file=sys.__stderr__)
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'from a child\\n')"], check=True)
    assert "from C++\n" in said() and "from a child\n" in said()
    assert "from C++\n" in capfd.readouterr().err
    os.write(2, b"after\n")
    assert "after" not in said()
