"""Legal layouts: counted by another road, no program twice, and what they keep at rest."""

import dataclasses
import itertools

import jax
import pytest

from jaxllm.data.config import DataConfig
from jaxllm.errors import UserError
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout
from jaxllm.layout.mesh import AXES
from jaxllm.layout.rules import RULE_SETS
from jaxllm.layout.schedules import SCHEDULES
from jaxllm.model.spec import model_spec
from jaxllm.plan.layouts import (
    bytes_at_rest,
    candidates,
    flags,
    illegal_layouts,
    legal_layouts,
    variations,
)
from jaxllm.train.checks import check
from jaxllm.train.config import Config
from jaxllm.train.optimizer import make_optimizer
from jaxllm.train.state import bytes_per_device, init_state
from tests.layout.runs import GPT2, LLAMA

EIGHT_LAYERS = dataclasses.replace(LLAMA, num_layers=8, num_kv_heads=8)
BASE = Config(model=EIGHT_LAYERS, data=DataConfig(batch_size=32))


def sizes(config):
    return tuple(getattr(config.mesh, axis) for axis in AXES)


def vary(*fields, base=BASE, devices=8):
    return variations(base, devices, fields)


def test_meshes_are_all_factorisations():
    meshes = [sizes(c) for c in candidates(BASE, 8, vary("mesh"))]
    cubes = [s for s in itertools.product((1, 2, 4, 8), repeat=6) if s[AXES.index("expert")] == 1]
    assert set(meshes) == {s for s in cubes if s[0] * s[1] * s[2] * s[4] * s[5] == 8}
    assert len(meshes) == len(set(meshes)) == 35  # three factors 2 on five axes


def test_devices_are_dealt_to_experts_where_there_are_some():
    base = dataclasses.replace(BASE, model=dataclasses.replace(EIGHT_LAYERS, num_experts=4))
    found = [sizes(c) for c in candidates(base, 8, vary("mesh", base=base))]
    assert len(found) == len(set(found)) == 56  # three factors 2 on six axes
    legal = {c.mesh.expert for c in legal_layouts(base, 8, vary("mesh", base=base))}
    assert legal == {1, 2, 4}  # and not 8


def test_without_experts_their_axis_stays_as_it_is():
    base = dataclasses.replace(BASE, mesh=MeshConfig(expert=2))
    assert {c.mesh.expert for c in candidates(base, 8, vary("mesh", base=base))} == {2}
    assert all("config.mesh.expert=2" in reason for _, reason in illegal_layouts(base, 8))


@pytest.mark.parametrize(
    ("mesh", "fields", "expected"),
    [
        # A stage of ZeRO where `data` has nothing to spread, sequence parallelism without `model`, …: one program.
        ({"replica": 8, "data": 1}, ("zero_stage", "sequence_parallel", "schedule", "context_attention"), 1),
        # Stages 2 and 3 differ in tensors of 32,768 elements, which this model has none of.
        ({"data": 8}, ("zero_stage", "sequence_parallel", "schedule"), 3),
        ({"data": 4, "model": 2}, ("zero_stage", "sequence_parallel"), 3 * 2),
        # The embedding and the head are spread over the stages from ZeRO 1 on.
        ({"pipeline": 8, "data": 1}, ("zero_stage",), 2),
        ({"pipeline": 8, "data": 1}, ("schedule",), len(SCHEDULES)),
        ({"data": 1, "model": 8}, ("rules",), len(RULE_SETS)),
        # megatron and megatron_whole_vocab with it and without, which is megatron_sp; 2d; fsdp.
        ({"data": 1, "model": 8}, ("rules", "sequence_parallel"), 6),
        ({"data": 8}, ("rules",), 1),
        ({"data": 8}, ("remat", "num_microbatches"), 3 * 6),
    ],
)
def test_what_makes_the_same_program_is_there_once(mesh, fields, expected):
    base = dataclasses.replace(BASE, mesh=MeshConfig(**mesh))
    assert len(list(candidates(base, 8, vary(*fields, base=base)))) == expected


def test_large_tensors_are_gathered_at_use_by_stage_3():
    base = dataclasses.replace(BASE, model=dataclasses.replace(EIGHT_LAYERS, mlp_dim=4096))
    assert len(list(candidates(base, 8, vary("zero_stage", base=base)))) == 4


def test_a_configs_own_values_are_kept_where_they_make_no_difference():
    base = dataclasses.replace(BASE, layout=LayoutConfig(zero_stage=3, sequence_parallel=True, schedule="gpipe"))
    for candidate in candidates(base, 8):
        if candidate.mesh.data == candidate.mesh.pipeline == candidate.mesh.model == 1:
            assert candidate.layout == base.layout, flags(candidate, base)


def test_legal_is_what_check_accepts():
    everything = list(candidates(BASE, 8))
    legal, illegal = legal_layouts(BASE, 8), illegal_layouts(BASE, 8)
    assert len(legal) + len(illegal) == len(everything) and legal and illegal
    for candidate in legal:
        check(candidate, 8)
    for candidate, reason in illegal:
        with pytest.raises(UserError) as error:
            check(candidate, 8)
        assert str(error.value) == reason
    # One microbatch cannot be interleaved; four can, on stages that divide four.
    assert not any(c.layout.schedule == "interleaved" for c in legal)
    four = dataclasses.replace(BASE, layout=LayoutConfig(num_microbatches=4))
    interleaved = {c.mesh.pipeline for c in legal_layouts(four, 8) if c.layout.schedule == "interleaved"}
    assert interleaved == {2, 4}
    assert {c.layout.virtual_stages for c in legal_layouts(four, 8) if c.layout.schedule == "interleaved"} == {2}


def test_something_of_the_users_own_is_among_the_choices(tmp_path):
    (tmp_path / "mine.py").write_text("from jaxllm.layout.rules import Rules\ntable = Rules(vocab=None)\n")
    base = dataclasses.replace(BASE, layout=LayoutConfig(rules=f"{tmp_path}/mine.py:table"))
    rules = [c.layout.rules for c in candidates(base, 8, vary("mesh", "rules", base=base)) if c.mesh.model == 8]
    assert rules[0] == base.layout.rules and "megatron" in rules
    assert "megatron_whole_vocab" not in rules  # the same program


def test_virtual_stages_vary_by_themselves():
    base = dataclasses.replace(
        BASE, mesh=MeshConfig(pipeline=2), layout=LayoutConfig(schedule="interleaved", num_microbatches=4)
    )
    legal = legal_layouts(base, 8, vary("virtual_stages", base=base))
    assert [c.layout.virtual_stages for c in legal] == [2, 4]
    assert [c.layout.num_microbatches for c in legal_layouts(base, 8, vary("num_microbatches", base=base))] == []
    both = vary("virtual_stages", "num_microbatches", base=base)
    assert {c.layout.num_microbatches for c in legal_layouts(base, 8, both)} == {2, 4, 8}


def test_flags_are_what_makes_the_layout():
    base = dataclasses.replace(BASE, layout=LayoutConfig(sequence_parallel=True, zero_stage=2))
    for candidate in candidates(base, 8):
        made = {"mesh": dataclasses.asdict(base.mesh), "layout": dataclasses.asdict(base.layout)}
        for flag in flags(candidate, base):
            name, _, value = flag.removeprefix("--config.").partition("=")
            group, _, field = name.partition(".")
            before = made[group][field]
            assert str(before).lower() != value
            made[group][field] = value == "true" if isinstance(before, bool) else type(before)(value)
        assert LayoutConfig(**made["layout"]) == candidate.layout
        mesh = MeshConfig(**made["mesh"])
        rest = 8 // (mesh.pipeline * mesh.replica * mesh.context * mesh.model)
        assert dataclasses.replace(mesh, data=rest if mesh.data == -1 else mesh.data) == candidate.mesh


@pytest.mark.parametrize("model", [GPT2, EIGHT_LAYERS], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    "mesh", [{"data": 8}, {"pipeline": 2, "data": 2, "model": 2}, {"replica": 2, "data": 1, "model": 4}], ids=str
)
def test_bytes_at_rest_are_those_of_the_arrays(model, mesh):
    """Against the shards of a state that was made."""
    config = Config(model=model, mesh=MeshConfig(**mesh), layout=LayoutConfig(zero_stage=1))
    spec = model_spec(model)
    optimizer = make_optimizer(config.optimizer, config.train.steps, spec.axes)
    state = init_state(spec, optimizer, make_layout(config.mesh, config.layout), seed=0)
    first = jax.devices()[0]
    held = sum(s.data.nbytes for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards if s.device == first)
    assert bytes_at_rest(config, 8) == held == bytes_per_device(state)


def test_an_unknown_field():
    with pytest.raises(UserError, match=r"--vary zero: not a field that varies. Did you mean 'zero_stage'\?"):
        variations(BASE, 8, ["mesh", "zero"])
