"""Slices of files against whole arrays: what a device reads is its part of what all would read."""

import numpy as np
import pytest

from jaxllm.interop.hf.families import FAMILIES
from jaxllm.interop.hf.tensors import Piece, Row, file_tensors, pieces_of
from jaxllm.layout.scope import Tensor
from jaxllm.model import presets
from jaxllm.model.config import ModelConfig
from jaxllm.model.spec import model_spec

SIZES = {"num_layers": 2, "embed_dim": 12, "num_heads": 4, "mlp_dim": 10, "max_length": 5, "vocab_size": 7}
PRESETS = (
    presets.gpt2,
    presets.llama3_8b,
    presets.mistral_7b,
    presets.qwen2_7b,
    presets.qwen3_8b,
    presets.bloom_560m,
    presets.bert_base,
    presets.mixtral_8x7b,
    presets.qwen3_235b_a22b,
)


def test_an_order_of_every_kind():
    """Written out by hand: query, key and value in one tensor, by heads (BLOOM) and by parts (GPT-2)."""
    heads, dim, embed = 2, 3, 4
    tensor = Tensor(("layers", "embed", "heads", "head_dim"), (1, embed, heads, dim))
    fused = np.arange(heads * 3 * dim * embed).reshape(heads, 3, dim, embed)
    by_heads = Piece(Row("", "w{layer}", "(heads part head_dim) embed", part=1, parts=3), tensor)
    read = lambda values: lambda name, slices: values[slices] if name == "w0" else None  # noqa: E731
    everything = (slice(None),) * 4
    found = by_heads.read(everything, read(fused.reshape(-1, embed)), np.dtype(int))
    np.testing.assert_array_equal(found[0], fused[:, 1].transpose(2, 0, 1))
    by_parts = Piece(Row("", "w{layer}", "embed (part heads head_dim)", part=2, parts=3), tensor)
    values = fused.transpose(3, 1, 0, 2)  # embed, part, heads, head_dim
    found = by_parts.read(everything, read(values.reshape(embed, -1)), np.dtype(int))
    np.testing.assert_array_equal(found[0], values[:, 2])


@pytest.mark.parametrize(
    ("family", "preset"), list(zip(FAMILIES, PRESETS, strict=True)), ids=lambda x: getattr(x, "model_type", "")
)
def test_any_slice_of_any_parameter(family, preset):
    few = {"num_kv_heads": 2, "num_experts": 3} if family.model_type in ("mixtral", "qwen3_moe") else {}
    model = ModelConfig(**preset(**SIZES, head_dim=3) | few).resolved()
    spec = model_spec(model)
    pieces = pieces_of(family.rows, spec)
    assert set(pieces) == set(spec.parameters)  # none without a name
    draw = np.random.default_rng(0)
    files = {name: draw.normal(size=tensor.shape) for name, tensor in file_tensors(pieces).items()}
    back = {name: np.full(values.shape, np.nan) for name, values in files.items()}

    def read(name: str, slices: tuple[slice, ...]) -> np.ndarray:
        assert all(0 <= s.start < s.stop <= size for s, size in zip(slices, files[name].shape, strict=True))
        return files[name][slices]

    for piece in pieces.values():
        whole = piece.read((slice(None),) * len(piece.shape), read, np.dtype(float))
        assert whole.shape == piece.shape
        for _ in range(10):
            bounds = [sorted(draw.choice(size + 1, 2, replace=False)) for size in piece.shape]
            slices = tuple(slice(int(low), int(high)) for low, high in bounds)
            np.testing.assert_array_equal(piece.read(slices, read, np.dtype(float)), whole[slices])
        for index, name in piece.names():
            half = piece.shape[-1] // 2
            for last in (slice(0, half), slice(half, piece.shape[-1])):
                inner = (*[slice(0, size) for size in piece.shape[len(index) : -1]], last)
                piece.write(back[name], inner, whole[index][inner])
    for name, values in files.items():
        np.testing.assert_array_equal(back[name], values)
