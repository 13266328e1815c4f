"""What the compiled step sends is what the theory says, and nothing else."""

import dataclasses
from collections import Counter

import pytest

from jaxllm.layout import zero
from jaxllm.layout.collectives import Collective, collectives
from jaxllm.layout.config import MeshConfig
from jaxllm.layout.mesh import make_mesh
from tests.layout.runs import BATCH, GPT2, LENGTH, LLAMA, Shape, lowered

LAYERS = 3
MODEL = dataclasses.replace(LLAMA, num_layers=LAYERS, dropout=0.0, attention_dropout=0.0, num_kv_heads=8)
MATRICES = 7  # query, key, value, out, gate, up, down
NEGLIGIBLE = 512  # bytes: norms, scalars, three numbers a token of the loss are looked at apart


@pytest.fixture(autouse=True)
def stage_3_gathers_even_tiny_weights(monkeypatch):
    monkeypatch.setattr(zero, "SMALL", 256)


def sent(shape: Shape) -> list[Collective]:
    layout = shape.layout()
    return collectives(lowered(MODEL, layout).compile().as_text(), layout.mesh)


def activations(found: list[Collective], shape: Shape) -> list[Collective]:
    rows = BATCH // (shape.replica * shape.data * shape.num_microbatches)
    return [c for c in found if c.shape == (rows, LENGTH, MODEL.embed_dim)]


def count(found: list[Collective]) -> Counter:
    runs = Counter()
    for c in found:
        runs[c.kind, c.mesh_axes] += c.runs
    return runs


@pytest.mark.parametrize("shape", [Shape(1, 1, 8, 0), Shape(1, 4, 2, 2, num_microbatches=4)], ids=str)
def test_tensor_parallelism_all_reduces_four_activations_a_layer_and_microbatch(shape):
    """Shoeybi et al. 2019: two forward, two backward; and one each way around the vocabulary."""
    seen = count(activations(sent(shape), shape))
    assert seen == {("all-reduce", ("model",)): (4 * LAYERS + 2) * shape.num_microbatches}


@pytest.mark.parametrize("shape", [Shape(1, 1, 8, 0, True), Shape(1, 2, 4, 3, True, 4)], ids=str)
def test_sequence_parallelism_makes_pairs_of_them(shape):
    """Korthikanti et al. 2022. XLA's CPU backend spells reduce-scatter as all-reduce of which a part is kept."""
    seen = count(activations(sent(shape), shape))
    once = shape.num_microbatches
    assert seen == {
        ("all-gather", ("model",)): (4 * LAYERS + 2) * once,
        ("all-reduce", ("model",)): (4 * LAYERS + 2) * once,
    }


def weights(found: list[Collective], kind: str) -> list[Collective]:
    return [c for c in found if c.kind == kind and c.mesh_axes == ("data",) and c.bytes >= NEGLIGIBLE]


def weight_bytes(embedding: bool = True) -> int:
    matrices = 4 * MODEL.embed_dim * MODEL.num_heads * MODEL.head_dim + 3 * MODEL.embed_dim * MODEL.mlp_dim
    return 4 * (LAYERS * matrices + 2 * embedding * MODEL.vocab_size * MODEL.embed_dim)


@pytest.mark.parametrize("stage", range(4))
def test_data_parallelism_sends_what_the_zero_table_says(stage):
    found = sent(Shape(1, 8, 1, stage))
    gathered = weights(found, "all-gather")
    reduced = weights(found, "all-reduce")
    scattered = weights(found, "reduce-scatter")
    total = lambda group: sum(c.bytes * c.runs for c in group)  # noqa: E731
    # Gradients: each weight once, whole; the tables' (written out by hand) scattered at stages 2 and 3.
    assert total(reduced) + 8 * total(scattered) == weight_bytes()
    assert bool(scattered) == (stage >= 2)
    if stage == 0:
        assert not gathered
    elif stage < 3:
        assert total(gathered) == weight_bytes() and all(c.runs == 1 for c in gathered)
    else:
        in_layers = [c for c in gathered if c.runs > 1]
        assert len(in_layers) == 2 * MATRICES and all(c.runs == LAYERS for c in in_layers)  # one a matrix and pass
        assert total(in_layers) == 2 * weight_bytes(embedding=False)


@pytest.mark.parametrize(
    "shape", [Shape(1, 8, 1, 3), Shape(2, 2, 2, 2, num_microbatches=4), Shape(1, 2, 4, 3, True)], ids=str
)
def test_nothing_is_sent_that_nobody_asked_for(shape):
    found = [c for c in sent(shape) if c.bytes >= NEGLIGIBLE]
    assert {c.kind for c in found} <= {"all-reduce", "all-gather", "reduce-scatter"}
    embed, heads, mlp, vocab = MODEL.embed_dim, MODEL.num_heads, MODEL.mlp_dim, MODEL.vocab_size
    rows = BATCH // (shape.replica * shape.data * shape.num_microbatches)
    local = {embed, heads // shape.model, mlp // shape.model, vocab // shape.model, MODEL.head_dim, LAYERS, 1}
    local |= {embed // shape.data, mlp // shape.model // shape.data, vocab // shape.model // shape.data}
    for c in found:
        is_activation = c.shape[:2] == (rows, LENGTH)
        assert is_activation or set(c.shape) <= local, c


@pytest.mark.parametrize("shape", [Shape(2, 2, 2, 2, num_microbatches=2), Shape(2, 2, 2, 3)], ids=str)
def test_small_weights_are_gathered_once_and_their_gradients_reduced_once(shape):
    """Biases, norms and a learned position table under HSDP: no array of whatever size takes another way."""
    model = dataclasses.replace(GPT2, num_layers=LAYERS, dropout=0.0, vocab_size=40)
    layout = shape.layout()
    found = collectives(lowered(model, layout).compile().as_text(), layout.mesh)
    assert {c.kind for c in found} <= {"all-reduce", "all-gather", "reduce-scatter"}
    embed, head = model.embed_dim, (model.num_heads // shape.model, model.head_dim)
    assert embed == model.mlp_dim // shape.model  # so biases of mlp and residual have one shape on a device
    a_layer = {(embed,): 7, head: 3}  # two norms, scale and bias; out, up, down; query, key, value
    once = {(embed,): 2, (LENGTH, embed): 1}  # the last norm; the positions
    gathers, reductions = Counter(), Counter()
    for c in found:
        gathers[c.shape] += c.runs * (c.kind == "all-gather" and c.mesh_axes == ("data",))
        reductions[c.shape] += c.runs * (c.kind == "all-reduce" and c.mesh_axes == ("data",))
    assert all(c.runs == 1 for c in found if "replica" in c.mesh_axes)  # their sums are added up after the microbatches
    for small, number in a_layer.items():
        assert gathers[LAYERS, *small] == number
        assert reductions[small] == (number * LAYERS + once.get(small, 0)) * shape.num_microbatches
    for small, number in once.items():
        assert gathers[small] == number
    # A position table's gradient is scattered as it is summed, and no activation is sent for it.
    scattered = [c.runs for c in found if c.kind == "reduce-scatter" and c.shape == (LENGTH, embed // shape.data)]
    assert scattered == [shape.num_microbatches]
    assert not [c for c in found if c.kind == "all-gather" and len(c.shape) == 3 and c.shape[1:] == (LENGTH, embed)]


def test_replica_groups_in_every_notation():
    mesh = make_mesh(MeshConfig(data=4, model=2))
    lines = {
        "replica_groups={{0,1},{2,3},{4,5},{6,7}}": ("model",),
        "replica_groups=[4,2]<=[8]": ("model",),
        "replica_groups=[2,4]<=[4,2]T(1,0)": ("data",),
        "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}": ("data",),
        "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}": ("data",),
        "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}": ("model",),
        "replica_groups={{0,1,2,3,4,5,6,7}}": ("data", "model"),
        "source_target_pairs={{0,0},{2,4},{4,2},{6,6}}": ("data",),
    }
    for groups, axes in lines.items():
        hlo = f"ENTRY %main () -> f32[] {{\n  %x = bf16[4,8]{{1,0}} all-reduce(%y), {groups}, metadata={{}}\n}}"
        assert collectives(hlo, mesh) == [Collective("all-reduce", (4, 8), 64, axes, 1, "")]


ASYNCHRONOUS = """\
ENTRY %main (p: f32[2]) -> f32[8] {
  %all-gather-start.1 = (bf16[2,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%a), replica_groups=[2,4]<=[8]
  %all-gather-start.2 = ((f32[2]{0}, f32[3]{0}), (f32[8]{0}, f32[12]{0})) all-gather-start(%a, %b)
  %reduce-scatter-start = ((f32[8,4]{1,0}), f32[2,4]{1,0}) reduce-scatter-start(%c), replica_groups=[2,4]<=[8]
  %all-reduce-start = bf16[5,7]{1,0} all-reduce-start(%d), replica_groups=[2,4]<=[8], to_apply=%add
  %all-reduce-start.1 = (f32[5]{0}, f32[6]{0}) all-reduce-start(%d, %e), replica_groups=[2,4]<=[8], to_apply=%add
  %collective-permute-start = (f32[9]{0}, f32[9]{0}) collective-permute-start(%f), source_target_pairs={{0,1},{1,0}}
}
"""


def test_the_start_of_an_asynchronous_operation_is_counted_by_its_results():
    """As the text of GPU programs has them: operands before results, of an all-reduce the results alone."""
    mesh = make_mesh(MeshConfig(data=2, model=4))
    found = [(c.kind, c.shape) for c in collectives(ASYNCHRONOUS, mesh)]
    assert found == [
        ("all-gather", (8, 16)),
        ("all-gather", (8,)),
        ("all-gather", (12,)),
        ("reduce-scatter", (2, 4)),
        ("all-reduce", (5, 7)),
        ("all-reduce", (5,)),
        ("all-reduce", (6,)),
        ("collective-permute", (9,)),
    ]
