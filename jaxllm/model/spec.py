"""A model without numbers: its graph, its parameters' shapes and their logical axes."""

import math
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.layout.scope import Tensor, map_leaves
from jaxllm.model.attention_backends import KEY_AXES, QUERY_AXES
from jaxllm.model.config import ModelConfig
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


class ModelSpec(_Fields):
    """What everything outside the model needs to know of it."""

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """Each parameter by its path: "layers.attention.query.kernel"."""
        return map_leaves(lambda shape, axes: Tensor(axes, shape.shape), self.shapes, self.axes)

    @cached_property
    def num_parameters(self) -> int:
        """Parameters, counted from the tree."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes))

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
        model = Transformer(self.config, rngs=nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def merge(self, params: Tree) -> Transformer:
        """The model with these parameters, in any dtype."""
        state = jax.tree.map(lambda leaf: leaf, self.graph_state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graph, state)

    @cached_property
    def graph_state(self) -> nnx.State:
        return nnx.state(_abstract(self.config), nnx.Param)


def _abstract(config: ModelConfig) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def model_spec(config: ModelConfig) -> ModelSpec:
    """The spec of a model; `config` must be `resolved`."""
    graph, state = nnx.split(_abstract(config), nnx.Param)
    is_param = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    axes = jax.tree_util.tree_map_with_path(_axes, state, is_leaf=is_param)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), nnx.to_pure_dict(state))
    return ModelSpec(config, graph, shapes, _plain(axes))


def _axes(path, param: nnx.Variable) -> tuple[str, ...]:
    return ("layers", *param.axes) if path[0].key == "layers" else param.axes


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if hasattr(tree, "items") else tree
