"""LoRA, rsLoRA, DoRA and PiSSA against their formulas in float64; where they start, merging, and whom they touch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import UserError
from jaxllm.layout.scope import joined, map_leaves
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.adapters import chosen_targets
from jaxllm.model.lora_trees import merged, started, unmerged
from jaxllm.model.spec import model_spec
from tests.layout.runs import GPT2, LLAMA, MOE, packed_batch

LORA = AdapterConfig(kind="lora", rank=4, alpha=4.0)
KINDS = {
    "lora": LORA,
    "rslora": dataclasses.replace(LORA, rank_stabilized=True, init="gaussian"),
    "dora": dataclasses.replace(LORA, dora=True),
    "pissa": dataclasses.replace(LORA, init="pissa"),
    "dora_pissa": dataclasses.replace(LORA, init="pissa", dora=True),
}
MODELS = {name: dataclasses.replace(m, dropout=0.0, attention_dropout=0.0) for name, m in
          {"llama": LLAMA, "gpt2": GPT2, "moe": MOE}.items()}  # fmt: skip


@functools.cache
def made(model: str, kind: str):
    """The spec, the parameters of a base, all at the start, and all after what stands for training."""
    spec = model_spec(MODELS[model], KINDS[kind])
    base = jax.jit(lambda: jax.tree.map(lambda w: 5 * w, spec.base(spec.init(0))))()
    first = jax.jit(lambda base: started(spec, base, 1))(base)
    noise = lambda w: w + 0.1 * jax.random.normal(jax.random.key(w.size), w.shape)  # noqa: E731
    return spec, base, first, joined(first, {}) | _replaced(first, jax.tree.map(noise, spec.trained(first)))


def _replaced(tree, part):
    return {
        key: _replaced(tree[key], part[key]) if isinstance(value, dict) and key in part else part.get(key, value)
        for key, value in tree.items()
    }


@functools.cache
def outputs(spec_of: tuple[str, str], adapted: bool):
    spec = made(*spec_of)[0] if adapted else model_spec(MODELS[spec_of[0]])
    batch = packed_batch(spec, 0)
    return jax.jit(lambda params: spec.merge(params)(batch.tokens[:4], batch.positions[:4], batch.segment_ids[:4]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_merged_is_unmerged(model, kind):
    """The formula for whole matrices, in numpy, put into the model without an adapter."""
    spec, base, first, trained = made(model, kind)
    plain, adapted = outputs((model, kind), False), outputs((model, kind), True)
    start = plain(base)
    assert _difference(adapted(first), start) < 1e-5, "an adapter starts by changing nothing"
    by_hand = _by_hand(spec, trained)
    expected = plain(by_hand)
    assert _difference(expected, start) > 0.05
    assert _difference(adapted(trained), expected) < 3e-5
    for found, wanted in zip(jax.tree.leaves(merged(spec, trained)), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def _difference(a, b) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def _by_hand(spec, params):
    """W' = W + s (A B - A0 B0), and for DoRA m W' / |W'| by column; in float64, matrix by matrix."""
    leaves = map_leaves(lambda w, _: np.asarray(w, np.float64), params, spec.axes)
    config = spec.adapter
    scale = config.alpha / (math.sqrt(config.rank) if config.rank_stabilized else config.rank)

    def change(path, w):
        node = path.removesuffix("kernel") + "lora."
        if not path.endswith("kernel") or node + "a" not in leaves:
            return w
        a, b = leaves[node + "a"], leaves[node + "b"]
        stack = sum(axis in ("layers", "experts") for axis in spec.parameters[node + "a"].axes)
        matrix = np.empty_like(leaves[path])
        for index in np.ndindex(w.shape[:stack]):
            shape = w[index].shape
            rows = int(np.prod(a[index].shape[:-1]))
            product = lambda a, b: a[index].reshape(rows, -1) @ b[index].reshape(config.rank, -1)  # noqa: B023, E731
            total = leaves[path][index].reshape(rows, -1) + scale * product(a, b)
            if config.init == "pissa":
                total -= scale * product(leaves[node + "start_a"], leaves[node + "start_b"])
            if config.dora:
                total *= leaves[node + "magnitude"][index].reshape(-1) / np.linalg.norm(total, axis=0)
            matrix[index] = total.reshape(shape)
        return jnp.asarray(matrix, jnp.float32)

    base = spec.base(params)
    by_path = {path: change(path, w) for path, w in map_leaves(lambda w, _: w, base, spec.base(spec.axes)).items()}
    paths, tree = jax.tree_util.tree_flatten_with_path(base)
    return tree.unflatten([by_path[".".join(key.key for key in path)] for path, _ in paths])


def test_unmerged():
    spec, base, _, trained = made("llama", "pissa")
    back = unmerged(spec, merged(spec, trained), spec.own(trained))
    for found, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(base), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)
    with pytest.raises(ValueError, match="keep the base"):
        unmerged(made("llama", "dora")[0], {}, {})


def test_pissa_takes_the_largest_directions():
    """s A B is the best approximation of its rank (Eckart and Young), and both matrices carry half of it."""
    spec, base, first, _ = made("gpt2", "pissa")
    w = np.asarray(base["layers"]["mlp"]["up"]["kernel"], np.float64)
    lora = first["layers"]["mlp"]["up"]["lora"]
    for layer in range(w.shape[0]):
        u, values, v = np.linalg.svd(w[layer], full_matrices=False)
        a, b = np.asarray(lora["a"][layer]), np.asarray(lora["b"][layer])
        np.testing.assert_allclose(spec.adapter.scale * a @ b, (u[:, :4] * values[:4]) @ v[:4], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-5)
    assert all(np.array_equal(lora[name], lora[f"start_{name}"]) for name in "ab")


def test_where_a_starts():
    for kind, spread in {"lora": 1 / math.sqrt(3 * 32), "rslora": 1 / 4}.items():
        spec = model_spec(MODELS["llama"], dataclasses.replace(KINDS[kind], rank=256))
        lora = spec.init(0)["layers"]["attention"]["query"]["lora"]
        scale = spread if kind == "lora" else 1 / 256
        assert np.std(lora["a"]) == pytest.approx(scale, rel=0.02) and not np.any(lora["b"])
    assert np.abs(model_spec(MODELS["llama"], LORA).init(0)["layers"]["mlp"]["up"]["lora"]["a"]).max() <= 1 / math.sqrt(
        32
    )


def test_an_adapter_changes_nothing_of_what_a_model_starts_from():
    base, adapted = model_spec(LLAMA).init(3), model_spec(LLAMA, LORA)
    for one, other in zip(jax.tree.leaves(base), jax.tree.leaves(adapted.base(adapted.init(3))), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("model", MODELS)
def test_how_many_are_trained(model):
    """rank (inputs + outputs) a matrix; with DoRA as many more as it has outputs."""
    m = MODELS[model]
    embed, queries, keys = m.embed_dim, m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    widen = [(embed, m.mlp_dim)] * (2 if m.gated_mlp else 1) * (m.num_experts or 1)
    attention = [(embed, queries), (embed, keys), (embed, keys), (queries, embed)]
    matrices = attention + widen + [(m.mlp_dim, embed)] * (m.num_experts or 1)
    count = m.num_layers * sum(LORA.rank * (inputs + outputs) for inputs, outputs in matrices)
    assert model_spec(m, LORA).num_trained_parameters == count
    lengths = m.num_layers * sum(outputs for _, outputs in matrices)
    assert model_spec(m, KINDS["dora"]).num_trained_parameters == count + lengths
    assert model_spec(m, KINDS["pissa"]).num_trained_parameters == count


def test_targets():
    names = ["attention.query", "attention.key", "attention.out", "mlp.up"]
    assert chosen_targets("all-linear", names) == names
    assert chosen_targets("key,query", names) == ["attention.query", "attention.key"]
    assert chosen_targets(r"attention\.(query|out),mlp.up", names) == ["attention.query", "attention.out", "mlp.up"]
    for wrong, nearest in {"quer": "Did you mean 'query'?", "mlp.uo": "Did you mean 'mlp.up'?"}.items():
        with pytest.raises(UserError, match="fits no linear layer") as raised:
            chosen_targets(f"key,{wrong}", names)
        assert nearest.replace("?", "") in str(raised.value) and "attention.out" in str(raised.value)
    with pytest.raises(UserError, match="names no layer"):
        chosen_targets(" , ", names)


def test_a_rank_above_a_matrix_for_pissa():
    with pytest.raises(UserError, match="rank=33: init='pissa'"):
        model_spec(LLAMA, dataclasses.replace(KINDS["pissa"], rank=33))
