"""Virtual tokens as trees of parameters: where a prompt starts, and the one array that PEFT keeps of each kind."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.model.prompts import Virtual, virtual_tokens
from jaxllm.model.spec import ModelSpec

Tree = dict[str, Any]


def started_prompt(spec: ModelSpec, params: Tree, seed: int, text: Sequence[int]) -> Tree:
    """`params` with the embeddings of a prompt as `config.adapter.prompt_init` says: those of tokens of the model.

    Args:
      text: the tokens of a text, which is repeated or cut to as many as there are virtual ones.
    """
    adapter, table = spec.adapter, params["embedding"]["table"]
    if adapter.kind != "prompt" or adapter.prompt_init == "random":
        return params
    if adapter.prompt_init == "vocabulary":
        rows = jax.random.randint(jax.random.key(seed), (adapter.places,), 0, spec.config.vocab_size)
    else:
        rows = jnp.resize(jnp.asarray(text), adapter.places)
    return params | {"virtual": {"embedding": table[rows].astype(jnp.float32)}}


def flattened(spec: ModelSpec, params: Tree) -> Float[Array, "virtual width"]:
    """PEFT's `prompt_embeddings`: what stands in the places, whatever made it.

    Of a prompt and of P-tuning the embeddings; of a prefix its keys and values, in one row [layers, key and value,
    kv_heads, head_dim] of each virtual token. `params` are an adapter's own, float32.
    """
    virtual = _virtual(spec, params)
    if spec.adapter.kind != "prefix":
        return virtual
    prefix = params["layers"]["attention"]["prefix"]
    sides = [_projected(virtual, prefix[side]) if virtual is not None else prefix[side] for side in ("key", "value")]
    return jnp.moveaxis(jnp.stack(sides, 1), 2, 0).reshape(spec.adapter.places, -1)


def unflattened(spec: ModelSpec, embeddings: Float[Array, "virtual width"]) -> Tree:
    """An adapter's parameters of which `flattened` is `embeddings`: a prompt's, or those of a prefix not projected.

    Raises:
      ValueError: an adapter that has an encoder, which no result tells; or another shape.
    """
    adapter, config = spec.adapter, spec.config
    if adapter.kind == "p_tuning" or adapter.prefix_projection:
        raise ValueError(f"{adapter.kind} with an encoder cannot be told from what its encoder makes")
    if adapter.kind == "prompt":
        return {"virtual": {"embedding": embeddings.reshape(adapter.places, config.embed_dim)}}
    shape = (adapter.places, config.num_layers, 2, config.num_kv_heads, config.head_dim)
    key, value = (jnp.moveaxis(side, 0, 1) for side in jnp.moveaxis(embeddings.reshape(shape), 2, 0))
    return {"layers": {"attention": {"prefix": {"key": key, "value": value}}}}


def _virtual(spec: ModelSpec, params: Tree) -> Virtual | None:
    """What the module of the virtual tokens makes, where the adapter has one."""
    if "virtual" not in params:
        return None
    make = lambda: virtual_tokens(spec.config, spec.adapter, rngs=nnx.Rngs(0, adapter=0))  # noqa: E731
    graph, state = nnx.split(nnx.eval_shape(make))
    nnx.replace_by_pure_dict(state, params["virtual"])
    return nnx.merge(graph, state)()


def _projected(hidden: Float[Array, "virtual encoder"], side: Tree) -> Float[Array, "layers virtual kv_heads head_dim"]:
    return jnp.einsum("vh,lhkd->lvkd", hidden, side["kernel"]) + side["bias"][:, None]
