"""The weights of a train state where another layout computes with them: moved from device to device, in one program."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxllm.layout import zero
from jaxllm.layout.at_rest import fitted, shape_at_rest
from jaxllm.layout.layout import Layout, pin
from jaxllm.layout.mesh import one_at_a_time
from jaxllm.layout.scope import joined
from jaxllm.layout.stages import num_layers_of

Tree = Any


class Resharding:
    """From one layout to another on the same devices in the same order.

    Args:
      axes: logical axes of the trained parameters.
      compute: the dtype that they travel in.
    """

    def __init__(self, axes: Tree, frozen_axes: Tree, source: Layout, target: Layout, compute: jnp.dtype):
        self._axes, self._frozen_axes, self._source, self._target = axes, frozen_axes, source, target
        self._compute, self._run = compute, None

    def __call__(self, params: Tree, frozen: Tree) -> Tree:
        """All weights of a model, of its float32 parameters at rest and of what is held frozen."""
        leaves, tree = jax.tree.flatten(frozen)
        there = jax.tree.leaves(self._there(frozen, self._frozen_axes))
        # Frozen weights that lie right already stay: no copy of them is made at every rollout.
        moving = [i for i, w in enumerate(leaves) if not _lies(w, there[i])]
        if self._run is None:
            wanted = self._there(params, self._axes), [there[i] for i in moving]
            to = jax.tree.map(lambda leaf: leaf.sharding, wanted)
            self._run = one_at_a_time(jax.jit(lambda *held: fitted(self._cast(*held), wanted), out_shardings=to))
        cast, moved = self._run(params, [leaves[i] for i in moving])
        for i, w in zip(moving, moved, strict=True):
            leaves[i] = w
        return joined(cast, jax.tree.unflatten(tree, leaves))

    def _cast(self, params: Tree, frozen: list[jax.Array]) -> tuple[Tree, list[jax.Array]]:
        # Cast where they rest, so that what is sent is in the dtype of compute.
        cast = jax.tree.map(lambda w, axes: self._at_rest(w.astype(self._compute), axes), params, self._axes)
        return cast, frozen

    def _at_rest(self, w: jax.Array, axes: tuple) -> jax.Array:
        return pin(w, self._source, zero.state_spec(self._source, axes, w.shape))

    def _there(self, tree: Tree, axes: Tree) -> Tree:
        """The shapes and shardings in the other layout."""

        def place(w: jax.Array, axes: tuple) -> jax.ShapeDtypeStruct:
            shape = w.shape
            if axes[:1] == ("layers",):
                number = num_layers_of(shape[0], self._source.num_stages, self._source.stage_layers)
                shape = shape_at_rest(self._target, axes, (number, *shape[1:]))
            spec = zero.step_spec(self._target, axes, shape)
            return jax.ShapeDtypeStruct(shape, w.dtype, sharding=NamedSharding(self._target.mesh, spec))

        return jax.tree.map(place, tree, axes)


def _lies(w: jax.Array, there: jax.ShapeDtypeStruct) -> bool:
    return w.shape == there.shape and w.sharding.is_equivalent_to(there.sharding, w.ndim)
