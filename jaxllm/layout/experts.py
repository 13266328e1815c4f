"""Experts over the mesh: every token to the devices of its experts and back (Lepikhin et al. 2021, GShard).

A device sorts its (token, choice) pairs by expert and sends each device of the axis `expert` those of its experts, in
slots: an all-to-all there, and one back with what the experts made of them. The number of slots is fixed when the
program is compiled, the number of tokens is not. So:

- `dropless`: a round of exchange with `capacity_factor` times an even share of slots an expert, and then as many small
  ones as the fullest expert needs. While the router is balanced there are few; a token is never lost, and the work
  is that of the fullest expert, not of all experts for all tokens.
- `capacity`: one round with so many slots for every expert and row of the batch; what is over is dropped. Which tokens
  those are depends on their own row alone, so not on how the batch is split.

All experts of a device compute as many rows: plain batched matmuls. (XLA's `ragged_dot` multiplies every row with every
expert, on CPUs and on GPUs; so says the program that it compiles.)

What an expert computes is not known here: `Experts`. The exchange is written for one device, as the rest of a mixture
is left to the partitioner. The backward pass exchanges the tokens again, and keeps nothing but the arguments.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from jaxllm.errors import UserError
from jaxllm.layout import zero
from jaxllm.layout.layout import Axes, Layout, current_layout, on_each_device
from jaxllm.layout.scope import tensor_scope

TOKENS = ("batch", "length", None)
LATER_ROUNDS = 0.25  # slots an expert has in the rounds after the first, as a multiple of an even share


class Experts(Protocol):
    """What a device's experts compute. Hashable."""

    def __call__(
        self, rows: Float[Array, "experts rows embed"], weights: tuple[Array, ...]
    ) -> Float[Array, "experts rows embed"]:
        """Rows to rows. Where the hidden units are split over devices, this device's part of the sum.

        Args:
          weights: float32 [experts, …], so that their gradients are float32; matmuls are in the dtype of `rows`.
        """
        ...


@dataclass(frozen=True)
class Dispatch:
    """How tokens come to experts."""

    num_experts: int
    capacity_factor: float  # slots an expert has, as a multiple of an even share
    dropless: bool  # what is over is sent in further rounds, not dropped


def run_experts(
    dispatch: Dispatch,
    experts: Experts,
    x: Float[Array, "batch length embed"],
    choices: Int[Array, "batch length choice"],
    probabilities: Float[Array, "batch length choice"],
    weights: tuple[Float[Array, "experts ..."], ...],
    axes: tuple[Axes, ...],
    names: tuple[str, ...],
) -> tuple[Float[Array, "batch length embed"], Float[Array, " batch"]]:
    """The sum over a token's choices of probability * expert(token), and how many choices of each row were dropped.

    Args:
      choices: numbers of experts; `num_experts` for none (padding).
      axes, names: logical axes and paths of the weights. Those of the hidden units are called "mlp".

    Raises:
      UserError: rules that split experts over a mesh axis that does not split the batch.
    """
    with tensor_scope(names, *axes, TOKENS):
        return _run(current_layout(), dispatch, experts, axes, x, choices, probabilities, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _run(layout, dispatch, experts, axes, x, choices, probabilities, weights):
    place = _Place(layout, dispatch, experts, axes, [w.shape for w in weights])
    specs = (place.tokens, place.tokens, place.tokens, place.weights)
    run = on_each_device(layout, place.forward, specs, (place.tokens, place.rows))
    return run(x, choices, probabilities, place.whole(weights))


def _run_forward(layout, dispatch, experts, axes, x, choices, probabilities, weights):
    results = _run(layout, dispatch, experts, axes, x, choices, probabilities, weights)
    return results, (x, choices, probabilities, weights)


def _run_backward(layout, dispatch, experts, axes, residuals, gradients):
    # Tokens are sent and weights gathered again, not kept. (On CPU, XLA merges the two where layers are unrolled.)
    (x, choices, probabilities, weights), dy = zero.barrier(residuals, gradients[0])
    place = _Place(layout, dispatch, experts, axes, [w.shape for w in weights])
    specs = (place.tokens, place.tokens, place.tokens, place.weights, place.tokens)
    run = on_each_device(layout, place.backward, specs, (place.tokens, place.tokens, place.gradients))
    dx, d_probabilities, d_weights = run(x, choices, probabilities, place.whole(weights), dy)
    reduced = (zero.reduce_gradient(layout, *g) for g in zip(d_weights, axes, [w.dtype for w in weights], strict=True))
    return dx, None, d_probabilities, tuple(reduced)


_run.defvjp(_run_forward, _run_backward)


# What a device sends in one round: for every expert the numbers of (token, choice) pairs, the number of all pairs where
# a slot is empty.
_Slots = Int[Array, "experts slots"]


class _Place:
    """One device's part of the work; `forward` and `backward` run inside `shard_map`."""

    def __init__(self, layout: Layout | None, dispatch: Dispatch, experts: Experts, axes: tuple[Axes, ...], shapes):
        self.layout, self.dispatch, self.experts, self.axes = layout, dispatch, experts, axes
        self.expert_axes = self._axes("experts", dispatch.num_experts)
        self.inner_axes = self._axes("mlp", shapes[0][axes[0].index("mlp")])
        self.batch_axes, self.length_axes = self._axes("batch"), self._axes("length")
        if not set(self.expert_axes) <= set(self.batch_axes):
            raise UserError(
                f"layout rules split experts over {'+'.join(self.expert_axes)}, which must be among the mesh axes that "
                f"split the batch: {'+'.join(self.batch_axes) or 'none'}. Use --config.layout.rule_overrides="
                "experts=expert."
            )
        self.devices = math.prod(layout.mesh.shape[axis] for axis in self.expert_axes) if layout else 1
        self.local_experts = dispatch.num_experts // self.devices
        self.tokens = P(self.batch_axes or None, self.length_axes or None, None)
        self.rows = P(self.batch_axes or None)
        self.weights = tuple(P(*[self._split(axis) or None for axis in names]) for names in axes)
        self.gradients = self.weights
        if layout is not None:
            each = zip(axes, shapes, self.weights, strict=True)
            self.gradients = tuple(zero.scattered_spec(layout, *weight, self.token_axes) for weight in each)

    def _axes(self, logical: str, size: int = 0) -> tuple[str, ...]:
        if self.layout is None or size % self.layout.size(logical):
            return ()
        return self.layout.mesh_axes(logical)

    def _split(self, logical: str | None) -> tuple[str, ...]:
        return {"experts": self.expert_axes, "mlp": self.inner_axes}.get(logical, ())

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The mesh axes whose devices hold other tokens for the same experts."""
        return tuple(a for a in (*self.batch_axes, *self.length_axes) if a not in self.expert_axes)

    def whole(self, weights: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(zero.gather_for_use(self.layout, w, axes) for w, axes in zip(weights, self.axes, strict=True))

    def forward(self, x, choices, probabilities, weights):
        weights = tuple(w.astype(jnp.float32) for w in weights)
        rounds = self._rounds(choices)
        start = jnp.zeros(x.shape, jnp.float32)
        y = rounds.run(lambda slots, y: y + self._exchange(slots, x, probabilities, weights), start)
        return self._sum_inner(y.astype(x.dtype)), rounds.dropped

    def backward(self, x, choices, probabilities, weights, dy):
        arguments = (x, probabilities, tuple(w.astype(jnp.float32) for w in weights))
        dy = dy.astype(jnp.float32)

        def add(slots: _Slots, sums):
            _, pull = jax.vjp(functools.partial(self._exchange, slots), *arguments)
            return jax.tree.map(lambda total, d: total + d.astype(jnp.float32), sums, pull(dy))

        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), arguments)
        dx, d_probabilities, d_weights = self._rounds(choices).run(add, zeros)
        d_weights = tuple(self._sum_tokens(*each) for each in zip(d_weights, self.gradients, strict=True))
        return self._sum_inner(dx.astype(x.dtype)), self._sum_inner(d_probabilities), d_weights

    def _exchange(self, slots: _Slots, x, probabilities, weights) -> Float[Array, "batch length embed"]:
        """What the experts make of the tokens in the slots, added up by token, float32."""
        tokens, embed = slots // probabilities.shape[-1], x.shape[-1]
        fill = {"mode": "fill", "fill_value": 0}
        rows = x.reshape(-1, embed).at[tokens].get(**fill)
        shares = probabilities.reshape(-1).at[slots].get(**fill)
        rows, shares = self._send(rows), self._send(shares)
        made = self.experts(rows, weights) * shares[..., None].astype(x.dtype)
        made = self._send_back(made).reshape(-1, embed).astype(jnp.float32)
        zeros = jnp.zeros((x.shape[0] * x.shape[1], embed), jnp.float32)
        return zeros.at[tokens.reshape(-1)].add(made, mode="drop").reshape(x.shape)

    def _send(self, x: Shaped[Array, "experts slots *rest"]) -> Shaped[Array, "local_experts rows *rest"]:
        """To each expert's device what is in its slots, from all devices."""
        if not self.expert_axes:
            return x
        sent = jax.lax.all_to_all(x.reshape(self.devices, self.local_experts, *x.shape[1:]), self.expert_axes, 0, 0)
        return sent.swapaxes(0, 1).reshape(self.local_experts, -1, *x.shape[2:])

    def _send_back(self, x: Shaped[Array, "local_experts rows *rest"]) -> Shaped[Array, "experts slots *rest"]:
        if not self.expert_axes:
            return x
        apart = x.reshape(self.local_experts, self.devices, -1, *x.shape[2:]).swapaxes(0, 1)
        return jax.lax.all_to_all(apart, self.expert_axes, 0, 0).reshape(self.dispatch.num_experts, -1, *x.shape[2:])

    def _rounds(self, choices: Int[Array, "batch length choice"]) -> "_Rounds":
        return self._as_needed(choices) if self.dispatch.dropless else self._limited(choices)

    def _as_needed(self, choices) -> "_Rounds":
        chosen, number = choices.reshape(-1), self.dispatch.num_experts
        order = jnp.argsort(chosen, stable=True)
        sizes = jnp.bincount(chosen, length=number)
        starts = jnp.cumsum(sizes) - sizes
        share = chosen.size / number
        first = min(choices.shape[0] * choices.shape[1], math.ceil(share * self.dispatch.capacity_factor))
        width = math.ceil(share * LATER_ROUNDS)
        more = -(-jnp.maximum(sizes.max() - first, 0) // width)
        if self.expert_axes:
            more = jax.lax.pmax(more, self.expert_axes)

        def slots(offsets: Array) -> _Slots:
            pairs = order[jnp.minimum(starts[:, None] + offsets, chosen.size - 1)]
            return jnp.where(offsets < sizes[:, None], pairs, chosen.size)

        later = lambda index: slots(first + index * width + jnp.arange(width))  # noqa: E731
        return _Rounds(slots(jnp.arange(first)), more, later, jnp.zeros(choices.shape[0], jnp.float32))

    def _limited(self, choices) -> "_Rounds":
        batch, length, number = choices.shape
        share = length * number / self.dispatch.num_experts
        width = min(length, math.ceil(share * self.dispatch.capacity_factor))
        # First choices of all tokens come before second ones (Lepikhin et al. 2021, algorithm 1).
        chosen = choices.swapaxes(1, 2).reshape(batch, -1)
        order = jnp.argsort(chosen, axis=1, stable=True)
        sizes = jax.vmap(lambda row: jnp.bincount(row, length=self.dispatch.num_experts))(chosen)
        starts = jnp.cumsum(sizes, axis=1) - sizes
        offsets = jnp.arange(width)
        at = jnp.minimum(starts[..., None] + offsets, chosen.shape[1] - 1)  # [batch, experts, width]
        picked = jnp.take_along_axis(order, at.reshape(batch, -1), axis=1).reshape(at.shape)
        pairs = picked % length * number + picked // length + jnp.arange(batch)[:, None, None] * (length * number)
        pairs = jnp.where(offsets < sizes[..., None], pairs, choices.size).swapaxes(0, 1)
        dropped = jnp.maximum(sizes - width, 0).sum(1).astype(jnp.float32)
        return _Rounds(pairs.reshape(self.dispatch.num_experts, -1), 0, None, dropped)

    def _sum_inner(self, x: Array) -> Array:
        return jax.lax.psum(x, self.inner_axes) if self.inner_axes else x

    def _sum_tokens(self, g: Array, spec: P) -> Array:
        """A gradient summed over the devices with other tokens, in the dtype of reductions."""
        if self.layout is None:
            return g
        return zero.sum_scattered(g.astype(zero.sum_dtype(self.layout.reduce_dtype)), spec, self.token_axes)


class _Rounds(NamedTuple):
    """The rounds in which a device sends its pairs."""

    first: _Slots
    more: Array | int  # how many come after it
    later: Callable[[Array], _Slots] | None
    dropped: Float[Array, " batch"]

    def run(self, one: Callable, start):
        """`one(slots, sums)` for each round in turn."""
        sums = one(self.first, start)
        if self.later is None:
            return sums
        step = lambda state: (state[0] + 1, one(self.later(state[0]), state[1]))  # noqa: E731
        return jax.lax.while_loop(lambda state: state[0] < self.more, step, (jnp.int32(0), sums))[1]
