"""Mesh, rules and the places that they give to tensors."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.errors import UserError
from jaxllm.layout import vocabulary
from jaxllm.layout.check_rules import check_rules
from jaxllm.layout.config import LayoutConfig, MeshConfig
from jaxllm.layout.layout import make_layout, use_layout
from jaxllm.layout.mesh import AXES, make_mesh, mesh_shape
from jaxllm.layout.rules import LOGICAL_AXES, RULE_SETS, Rules, make_rules, own_rows, parse_overrides
from jaxllm.model.spec import ACTIVATIONS, model_spec
from jaxllm.train.checks import check
from jaxllm.train.config import Config
from tests.layout.runs import GPT2, LLAMA


def shape(num_devices, **sizes):
    return {axis: n for axis, n in mesh_shape(MeshConfig(**sizes), num_devices).items() if n > 1}


def test_mesh_shape():
    assert shape(8) == {"data": 8}
    assert shape(1) == {}
    assert shape(8, model=2) == {"data": 4, "model": 2}
    assert shape(8, replica=2, data=2, model=2) == {"replica": 2, "data": 2, "model": 2}
    assert shape(8, data=1, model=-1) == {"model": 8}
    assert shape(384, pipeline=12, model=4) == {"pipeline": 12, "data": 8, "model": 4}
    assert tuple(mesh_shape(MeshConfig(), 8)) == AXES


MESHES = {
    "too many": (
        8,
        {"data": 16},
        "data=16 = 16 devices, but there are 8. Nearest mesh that fits: --config.mesh.data=8",
    ),
    "too few": (
        8,
        {"data": 2, "model": 2},
        "= 4 devices, but there are 8. .*--config.mesh.data=4 --config.mesh.model=2",
    ),
    "not divided": (
        8,
        {"model": 3},
        "model=3 = 3 does not divide the 8 devices, so data=-1 has no size. .*data=4 .*model=2",
    ),
    "several": (12, {"replica": 5, "model": 4}, "Nearest .*: --config.mesh.data=1 --config.mesh.replica=3 .*model=4"),
    "two rests": (
        8,
        {"model": -1},
        r"only one axis may be -1 \('the rest'\), not data and model. Give config.mesh.model",
    ),
    "zero": (8, {"model": 0}, "config.mesh.model=0 must be 1 or more, or -1"),
    "below -1": (8, {"data": -2}, "config.mesh.data=-2 must be 1 or more"),
}


@pytest.mark.parametrize(("num_devices", "sizes", "says"), MESHES.values(), ids=MESHES.keys())
def test_meshes_that_do_not_fit(num_devices, sizes, says):
    with pytest.raises(UserError, match=says) as error:
        mesh_shape(MeshConfig(**sizes), num_devices)
    if "Nearest" in str(error.value):  # the way out is one
        flags = [part.split("=") for part in str(error.value).split() if part.startswith("--config.mesh.")]
        offered = {flag.rpartition(".")[2]: int(size) for flag, size in flags}
        assert math.prod(mesh_shape(MeshConfig(**offered), num_devices).values()) == num_devices


def test_model_is_innermost():
    mesh = make_mesh(MeshConfig(replica=2, data=2, model=2))
    ids = [device.id for device in mesh.devices.flat]
    assert ids == sorted(ids)
    assert mesh.axis_names[-1] == "model"


class _Device:
    def __init__(self, number, node):
        self.id, self.process_index = number, node


def test_model_may_not_straddle_nodes_unevenly():
    devices = [_Device(i, i // 6) for i in range(12)]
    with pytest.raises(UserError, match=r"config.mesh.model=4 would straddle nodes of 6 devices unevenly"):
        make_mesh(MeshConfig(model=4), devices)


def test_parse_overrides():
    assert parse_overrides("") == {}
    assert parse_overrides("vocab=none") == {"vocab": ()}
    assert parse_overrides(" mlp = data , batch=replica + expert,") == {
        "mlp": ("data",),
        "batch": ("replica", "expert"),
    }
    for wrong in ("mlp", "mlp=", "mlp:data"):
        with pytest.raises(UserError, match=f"'{wrong}' is not of the form logical_axis=mesh_axis"):
            parse_overrides(wrong)


def test_make_rules():
    rules = make_rules("megatron", "vocab=none,batch=replica+data")
    assert rules.mesh_axes("vocab") == () and rules.mesh_axes("batch") == ("replica", "data")
    assert rules.mesh_axes("mlp") == ("model",)
    assert rules.mesh_axes(None) == ()
    assert make_rules("megatron", {"vocab": None}).mesh_axes("vocab") == ()
    parallel = make_rules("megatron", sequence_parallel=True)
    assert parallel.mesh_axes("residual_length") == ("context", "model") and parallel.mesh_axes("length") == (
        "context",
    )
    # Where `model` splits the batch, the sequence cannot be split over it too.
    assert make_rules("fsdp", sequence_parallel=True) == RULE_SETS["fsdp"]
    assert make_rules("2d", sequence_parallel=True) == RULE_SETS["2d"]
    assert make_rules("megatron_sp") == parallel == make_rules("megatron_sp", sequence_parallel=True)


ROWS = {
    "rule set": ("megatorn", "", "config.layout.rules='megatorn' is no rule set. Did you mean 'megatron'"),
    "logical axis": ("megatron", "mpl=model", "layout rule 'mpl': no such logical axis. Did you mean 'mlp'"),
    "mesh axis": ("megatron", "mlp=modle", "layout rule 'mlp=modle': no such mesh axis. Did you mean 'model'"),
    "twice": ("megatron", "mlp=model+model", r"layout rule 'mlp=model\+model' names a mesh axis twice"),
}


@pytest.mark.parametrize(("name", "overrides", "says"), ROWS.values(), ids=ROWS.keys())
def test_rules_that_are_none(name, overrides, says):
    with pytest.raises(UserError, match=says):
        make_rules(name, overrides)


@pytest.mark.parametrize("name", RULE_SETS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_named_rule_sets_fit_the_models(name, sequence_parallel):
    config = LayoutConfig(rules=name, sequence_parallel=sequence_parallel)
    layout = make_layout(MeshConfig(replica=2, data=2, model=2), config)
    for model in (GPT2, LLAMA):
        spec = model_spec(model)
        check_rules(layout, spec.axes, spec.shapes, (), ACTIVATIONS)
    used = {axis for activation in ACTIVATIONS.values() for axis in activation}
    assert used <= set(LOGICAL_AXES)


OWN_TABLES = """
from jaxllm.layout.rules import RULE_SETS, Rules

whole_vocab = Rules(vocab=None, positions=["model"])

def wide():
    return Rules(residual_embed="model")

number = Rules(mlp=3)
misspelt = Rules(mlp="modle")

def misspelt_row():
    return Rules(mpl="model")

def nothing():
    pass
"""


def test_a_table_of_the_users_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN_TABLES)
    rules = make_rules(f"{file}:whole_vocab", "kv_heads=none")
    assert rules.mesh_axes("vocab") == rules.mesh_axes("kv_heads") == () and rules.mesh_axes("positions") == ("model",)
    assert own_rows(f"{file}:whole_vocab") == ("vocab", "positions") and own_rows("2d") == ()
    hash(rules)  # lists are read as tuples
    parallel = make_rules(f"{file}:whole_vocab", sequence_parallel=True)
    assert parallel.mesh_axes("residual_length") == ("context", "model")
    assert make_rules(f"{file}:wide").mesh_axes("residual_embed") == ("model",)
    for name, says in {
        "number": "mine.py:number: layout rule 'mlp=3' must be a mesh axis, a tuple of them, or None",
        "misspelt": "mine.py:misspelt: layout rule 'mlp=modle': no such mesh axis. Did you mean 'model'",
        "misspelt_row": r"mine.py:13: TypeError: .* unexpected keyword argument 'mpl'",
        "nothing": r"mine.py:nothing returned None. It must return a Rules \(jaxllm.layout.rules\)",
        "RULE_SETS": r"has no Rules or function 'RULE_SETS'",
        "wholevocab": r"has no Rules or function 'wholevocab'. Did you mean 'whole_vocab'\?",
    }.items():
        with pytest.raises(UserError, match=f"config.layout.rules.*{says}"):
            make_rules(f"{file}:{name}")


@pytest.mark.parametrize(
    ("table", "mesh", "says"),
    [
        ("positions='model'", {"model": 2}, "no parameter of this model has the axis positions"),
        ("mlp='expert'", {"model": 2}, "'mlp=expert' shards nothing: config.mesh.expert=1"),
        ("mlp='data'", {"data": 4, "model": 2}, "the hidden units of the mlp: layout rules split both"),
        ("residual_embed='model', vocab=None", {"model": 2}, None),
        ("residual_embed='model', vocab='expert'", {"model": 2}, "'vocab=expert' shards nothing"),
    ],
)
def test_rows_of_a_users_table_are_checked_like_overrides(tmp_path, table, mesh, says):
    (tmp_path / "mine.py").write_text(f"from jaxllm.layout.rules import Rules\ntable = Rules({table})\n")
    name = f"{tmp_path}/mine.py:table"
    config = Config(model=LLAMA, mesh=MeshConfig(**mesh), layout=LayoutConfig(rules=name))
    if says is None:
        return check(config, 8)
    with pytest.raises(UserError, match=says) as error:
        check(config, 8)
    assert ("shards nothing" not in str(error.value)) or str(error.value).startswith(f"config.layout.rules={name}: ")
    # A row put over the table takes the place of the one in vain.
    row = table.rpartition(", ")[2].partition("=")[0]
    check(dataclasses.replace(config, layout=LayoutConfig(rules=name, rule_overrides=f"{row}=none")), 8)


def layout(overrides="", zero_stage=1, **sizes):
    return make_layout(MeshConfig(**sizes), LayoutConfig(rule_overrides=overrides, zero_stage=zero_stage))


def test_spec():
    split = layout(replica=2, data=2, model=2)
    assert split.spec(("embed", "heads", "head_dim")) == P(None, "model", None)
    assert split.spec(("batch", "length", "embed")) == P(("replica", "data"), None, None)
    assert split.spec(("layers", None, "mlp")) == P(None, None, "model")
    assert split.size("batch") == 4 and split.size("length") == 1
    # Sizes that do not divide stay whole; axes of size 1 are not named.
    assert split.spec(("embed", "kv_heads", "head_dim"), (8, 3, 4)) == P(None, None, None)
    assert layout(data=8).spec(("embed", "mlp")) == P(None, None)
    assert layout(data=8).sharding("batch").spec == P("data")
    with pytest.raises(
        UserError, match=r"both 'batch' and 'mlp' of a tensor \[batch, length, mlp\] over mesh axis 'data'"
    ):
        layout("mlp=data", data=4, model=2).spec(("batch", "length", "mlp"))


def checked(overrides, zero_stage=1, **sizes):
    spec = model_spec(LLAMA)
    made = layout(overrides, zero_stage, **sizes)
    check_rules(made, spec.axes, spec.shapes, parse_overrides(overrides), ACTIVATIONS)


@pytest.mark.parametrize(
    "overrides",
    [
        "vocab=none",
        "batch=replica+data,residual_length=model",
        "state=replica+data",
        "vocab=none,embed=model,heads=none,kv_heads=none,mlp=none",
        "batch=data+expert",
    ],
)
def test_rules_that_do_something(overrides):
    checked(overrides, replica=2, data=2, model=2)


DATA_AND_MODEL = {"data": 4, "model": 2}
IN_VAIN = {
    "no such axis in the model": (
        "positions=model",
        DATA_AND_MODEL,
        "'positions=model' shards nothing: no parameter of this model has the axis positions. Its axes are embed, ",
    ),
    "experts": ("experts=model", DATA_AND_MODEL, "no parameter of this model has the axis experts"),
    "mesh axis of size 1": (
        "kv_heads=model",
        {"data": 8},
        "'kv_heads=model' shards nothing: config.mesh.model=1, so "
        "layers.attention.key.kernel [layers=2, embed=32, kv_heads=4, head_dim=4] stays whole. "
        "Give --config.mesh.model more devices, or leave out the row",
    ),
    "several of size 1": (
        "vocab=replica+model",
        {"data": 8},
        "config.mesh.replica=1 and config.mesh.model=1, so embedding.table [vocab, embed=32] stays whole",
    ),
    "an activation over one of size 1": (
        "residual_length=context",
        DATA_AND_MODEL,
        "'residual_length=context' shards nothing: config.mesh.context=1, so the residual stream [batch, "
        "residual_length, residual_embed] stays whole. Give --config.mesh.context more devices, or leave out the row",
    ),
    "does not divide": (
        "kv_heads=model",
        {"data": 1, "model": 8},
        "'kv_heads=model' shards nothing: config.mesh.model=8 does not divide the axis kv_heads of "
        "layers.attention.key.kernel [layers=2, embed=32, kv_heads=4, head_dim=4]. Make it a multiple of 8",
    ),
    "state at stage 0": (
        "state=replica",
        {"zero_stage": 0, "replica": 8, "data": 1},
        "config.layout.zero_stage=0 keeps embedding.table [vocab, embed=32] whole. Set it to 1, 2 or 3",
    ),
    "twice in a parameter": (
        "embed=model",
        DATA_AND_MODEL,
        "embedding.table: layout rules split both 'vocab' and 'embed' of a tensor [vocab, embed] over mesh axis "
        "'model'. Give one of them another mesh axis, or none (--config.layout.rule_overrides=embed=none)",
    ),
    "twice in an activation": (
        "mlp=data",
        DATA_AND_MODEL,
        "the hidden units of the mlp: layout rules split both 'batch' and 'mlp'",
    ),
    "tokens and vocabulary": (
        "vocab=data",
        DATA_AND_MODEL,
        "the logits: layout rules split both 'batch' and 'vocab'",
    ),
}


@pytest.mark.parametrize(("overrides", "sizes", "says"), IN_VAIN.values(), ids=IN_VAIN.keys())
def test_rules_in_vain(overrides, sizes, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        checked(overrides, **sizes)
    assert len(str(error.value).splitlines()) <= 2


def test_a_state_that_nothing_can_be_split_over():
    axes, shapes = {"w": ("embed", "mlp")}, {"w": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    with pytest.raises(
        UserError, match=r"'state=data' shards nothing: no dimension of w \[embed=3, mlp=5\], nor of any"
    ):
        check_rules(layout("state=data", data=8), axes, shapes, ["state"])


def test_a_vocabulary_split_like_the_tokens_is_refused():
    """Each device would sum what others found for other tokens."""
    split = layout("vocab=data", data=8)
    with use_layout(split), pytest.raises(UserError, match="both 'batch' and 'vocab'"):
        jax.eval_shape(lambda: vocabulary.lookup(jnp.zeros((16, 4)), jnp.zeros((8, 4), jnp.int32), jnp.float32))


def test_defaults_name_what_there_is():
    rules = Rules()
    for axis in LOGICAL_AXES:
        assert set(rules.mesh_axes(axis)) <= set(AXES)
