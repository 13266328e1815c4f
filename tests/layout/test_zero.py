"""ZeRO's table, in bytes: at rest as the paper says, and a peak that falls from stage to stage."""

import dataclasses

import jax
import pytest

from jaxllm.layout import zero
from jaxllm.train.state import abstract_state, bytes_per_device
from tests.layout.runs import GPT2, LLAMA, Shape, lowered, parts

WIDE = dataclasses.replace(
    LLAMA, num_layers=4, embed_dim=64, mlp_dim=256, num_kv_heads=8, dropout=0.0, attention_dropout=0.0
)
SCALARS = 64  # bytes allowed for the counters, which every device holds


@pytest.mark.parametrize("model", [1, 2])
@pytest.mark.parametrize("data", [2, 4])
def test_bytes_at_rest_are_those_of_the_table(data, model):
    spec, optimizer, _, first = parts(WIDE)
    split = {
        "model": sum(
            leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(spec.shapes) if _is_split(spec, path)
        )
    }
    psi = (split["model"] / model) + (spec.num_parameters - split["model"])  # parameters on one model shard
    for stage, expected in {0: 12 * psi, 1: 12 * psi / data, 2: 12 * psi / data, 3: 12 * psi / data}.items():
        layout = Shape(1, data, model, stage).layout()
        abstract = abstract_state(spec, optimizer, layout)
        assert bytes_per_device(abstract) == pytest.approx(expected, rel=0.02, abs=SCALARS)
        state = jax.device_put(first, jax.tree.map(lambda leaf: leaf.sharding, abstract))
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
        assert held == bytes_per_device(abstract)


def _is_split(spec, path) -> bool:
    axes = spec.axes
    for key in path:
        axes = axes[key.key]
    return bool({"heads", "kv_heads", "mlp", "vocab"} & set(axes))


def test_peak_falls_from_stage_to_stage(monkeypatch):
    monkeypatch.setattr(zero, "SMALL", 256)
    peaks = []
    for stage in range(4):
        memory = lowered(WIDE, Shape(1, 8, 1, stage, num_microbatches=4).layout()).compile().memory_analysis()
        peaks.append(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4, peaks


def test_a_vocabulary_that_does_not_divide_is_split_along_embed_at_rest():
    """37 rows cannot be split over model=4, but their 32 columns can be, over data and model."""
    layout = Shape(1, 2, 4, 1).layout()
    spec = zero.state_spec(layout, ("vocab", "embed"), (GPT2.vocab_size, GPT2.embed_dim))
    assert spec[0] is None and sorted(spec[1]) == ["data", "model"]


def test_small_weights_are_gathered_once_a_step_at_stage_3():
    layout = Shape(1, 8, 1, 3).layout()
    assert not zero.is_gathered_at_use(layout, ("layers", "embed"), (96, 8192))
    assert zero.is_gathered_at_use(layout, ("layers", "embed", "mlp"), (96, 8192, 8192))
