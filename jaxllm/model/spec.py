"""A model without numbers: its graph, its parameters' shapes and their logical axes."""

import math
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.layout.nf4 import NF4
from jaxllm.layout.scope import Tensor, joined, map_leaves, matching
from jaxllm.model.adapter_config import NO_ADAPTER, AdapterConfig
from jaxllm.model.adapters import AdapterConstant, AdapterParam, AddedParam
from jaxllm.model.attention_backends import KEY_AXES, QUERY_AXES
from jaxllm.model.config import ModelConfig
from jaxllm.model.frozen import CODES, SCALES, freeze, held_axes
from jaxllm.model.transformer import RESIDUAL, WHOLE, Transformer

Tree = dict[str, Any]  # nested by attribute name, e.g. tree["layers"]["attention"]["query"]["kernel"]

# The activations that a layout places, by the name that a message gives them.
ACTIVATIONS = {
    "the residual stream": RESIDUAL,
    "the input of attention and mlp": WHOLE,
    "the queries": QUERY_AXES,
    "the keys and values": KEY_AXES,
    "the hidden units of the mlp": ("batch", "length", "mlp"),
    "the logits": ("batch", "length", "vocab"),
}


class _Fields(NamedTuple):
    config: ModelConfig
    graph: nnx.GraphDef
    shapes: Tree  # jax.ShapeDtypeStruct, float32
    axes: Tree  # tuples of logical axes; those of the layers begin with "layers"
    adapter: AdapterConfig
    kinds: dict[str, type[nnx.Variable]]  # path of each parameter: nnx.Param, or one of an adapter


class ModelSpec(_Fields):
    """What everything outside the model needs to know of it.

    Where there is an adapter its parameters are trained (and those of a scalar head) and all others frozen, else all
    are trained. Trees of parameters are nested dicts; `trained`, `base`, `constants` and `own` take their part of one.
    """

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """Each parameter by its path: "layers.attention.query.kernel"."""
        return map_leaves(lambda shape, axes: Tensor(axes, shape.shape), self.shapes, self.axes)

    @property
    def is_adapted(self) -> bool:
        """Whether there is an adapter, and the rest is frozen."""
        return self.adapter.kind != "none"

    @property
    def context(self) -> int:
        """The most tokens of a text: the model's `max_length` without the virtual ones of an adapter."""
        return self.config.max_length - self.adapter.places

    def trained(self, tree: Tree) -> Tree:
        """What is trained: all, or the adapter without its constants."""
        return self._of_kind(tree, AdapterParam, AddedParam) if self.is_adapted else tree

    def added(self, tree: Tree) -> Tree:
        """What is neither the language model's nor an adapter's: a scalar head."""
        return self._of_kind(tree, AddedParam)

    def base(self, tree: Tree) -> Tree:
        """The language model, without an adapter and without a scalar head."""
        return self._of_kind(tree, nnx.Param)

    def constants(self, tree: Tree) -> Tree:
        """An adapter's parameters that are not trained."""
        return self._of_kind(tree, AdapterConstant)

    def own(self, tree: Tree) -> Tree:
        """What a checkpoint holds: what is trained, and an adapter's constants."""
        return joined(self.trained(tree), self.constants(tree))

    def _of_kind(self, tree: Tree, *kinds: type[nnx.Variable]) -> Tree:
        return matching(tree, lambda path: self.kinds[path] in kinds)

    @cached_property
    def trained_axes(self) -> Tree:
        """The logical axes of what is trained."""
        return self.trained(self.axes)

    def frozen(self, params: Tree, compute: jnp.dtype) -> Tree:
        """The base as it is held while an adapter is trained, of float32 parameters; else nothing. Traceable."""
        return freeze(self.base(params), self.base(self.axes), self.adapter, compute) if self.is_adapted else {}

    def held_axes(self, compute: jnp.dtype) -> Tree:
        """The logical axes of what is not trained: of `frozen`, and of an adapter's constants."""
        shapes = jax.eval_shape(lambda params: self.frozen(params, compute), self.shapes)
        return joined(held_axes(shapes, self.base(self.axes)), self.constants(self.axes)) if self.is_adapted else {}

    @cached_property
    def num_parameters(self) -> int:
        """Parameters, counted from the tree; an adapter's too."""
        return _count(self.shapes)

    @cached_property
    def num_trained_parameters(self) -> int:
        """Those that have gradients."""
        return _count(self.trained(self.shapes))

    @cached_property
    def num_active_parameters(self) -> int:
        """Those that a token meets: of the experts as many as it is sent to."""
        experts = sum(math.prod(w.shape) for w in self.parameters.values() if "experts" in w.axes)
        if not experts:
            return self.num_parameters
        share = self.config.experts_per_token / self.config.num_experts
        return self.num_parameters - experts + round(experts * share)

    @cached_property
    def num_embedding_parameters(self) -> int:
        """Those of lookup tables, which nothing is multiplied with: positions, and tokens where the head is untied."""
        tables = [self.shapes.get(name) for name in ("position_embedding", "type_embedding")]
        tables += [] if self.config.tied_head else [self.shapes["embedding"]["table"]]
        return sum(leaf.size for leaf in tables if leaf is not None)

    def init(self, seed: int) -> Tree:
        """Fresh float32 parameters, a function of the seed alone. Trace it under `jit` with the shardings wanted."""
        model = Transformer(self.config, self.adapter, rngs=_rngs(seed))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def merge(self, params: Tree) -> Transformer:
        """The model with these parameters, in any dtype, or in 4 bits as `frozen` has them."""
        state = jax.tree.map(lambda leaf: leaf, self.graph_state)
        nnx.replace_by_pure_dict(state, _unpacked(params, self.axes))
        return nnx.merge(self.graph, state)

    @cached_property
    def graph_state(self) -> nnx.State:
        return nnx.state(_abstract(self.config, self.adapter), nnx.Param)


def _rngs(seed: int) -> nnx.Rngs:
    """An adapter and a scalar head draw from streams of their own: they change nothing of what a model starts from."""
    key = jax.random.key(seed)
    return nnx.Rngs(seed, adapter=jax.random.fold_in(key, 1), score=jax.random.fold_in(key, 2))


def _count(shapes: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _unpacked(params: Tree, axes: Tree) -> Tree:
    """Codes and scales as one weight."""
    if set(params) == {CODES, SCALES}:
        return NF4(params[CODES], params[SCALES], axes.index("embed") - len(axes))
    return {key: _unpacked(p, axes[key]) if isinstance(p, dict) else p for key, p in params.items()}


def _abstract(config: ModelConfig, adapter: AdapterConfig) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, adapter, rngs=_rngs(0)))


@lru_cache(maxsize=32)  # a run asks for a few, several times
def model_spec(config: ModelConfig, adapter: AdapterConfig = NO_ADAPTER) -> ModelSpec:
    """The spec of a model; `config` must be `resolved`.

    Raises:
      UserError: an adapter for layers that the model does not have.
    """
    graph, state = nnx.split(_abstract(config, adapter), nnx.Param)
    is_param = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    axes = _plain(jax.tree_util.tree_map_with_path(_axes, state, is_leaf=is_param))
    types = _plain(jax.tree_util.tree_map_with_path(lambda _, param: (type(param),), state, is_leaf=is_param))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), nnx.to_pure_dict(state))
    kinds = map_leaves(lambda _, found: found[0], shapes, types)
    return ModelSpec(config, graph, shapes, axes, adapter, kinds)


def _axes(path, param: nnx.Variable) -> tuple[str, ...]:
    return ("layers", *param.axes) if path[0].key == "layers" else param.axes


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if hasattr(tree, "items") else tree
