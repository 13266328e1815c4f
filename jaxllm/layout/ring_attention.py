"""Attention over a sequence that is split over devices: exact, the keys and values come to the queries.

`ring` (Liu et al. 2023): the devices pass their keys and values on around a ring, and each folds what arrives into its
result by the online softmax (Milakov & Gimelshein 2018). The backward pass goes around once more, and the gradients of
keys and values travel with them until they are home. `all_gather` (Llama 3, section 3.3.2): all keys and values are
gathered before, and their gradients reduce-scattered after. With the zigzag order (layout/sequence.py) a device's work
is the same for each other device: what comes from an earlier one, all its queries see the first half of; what comes
from a later one, the second half of its queries sees all of.

What is done to a block of queries and keys is not known here: `BlockAttention`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt32

from jaxllm.layout import zero
from jaxllm.layout.layout import Layout, on_each_device, platform
from jaxllm.layout.sequence import text_indices


class Queries(NamedTuple):
    """Some queries of each row's text."""

    query: Float[Array, "batch queries heads head_dim"]
    indices: Int[Array, " queries"]  # of the tokens in the text, increasing
    segment_ids: Int[Array, "batch queries"] | None
    heads: Int[Array, " heads"]  # their numbers in the whole model
    streams: UInt32[Array, " batch"] | None  # of random bits, where there is dropout

    def part(self, start: int, end: int) -> "Queries":
        return self._replace(
            query=self.query[:, start:end],
            indices=self.indices[start:end],
            segment_ids=None if self.segment_ids is None else self.segment_ids[:, start:end],
        )


class Keys(NamedTuple):
    """Some keys of each row's text, and their values."""

    key: Float[Array, "batch keys kv_heads head_dim"]
    value: Float[Array, "batch keys kv_heads head_dim"]
    indices: Int[Array, " keys"]
    segment_ids: Int[Array, "batch keys"] | None

    def part(self, start: int, end: int) -> "Keys":
        return Keys(
            self.key[:, start:end],
            self.value[:, start:end],
            self.indices[start:end],
            None if self.segment_ids is None else self.segment_ids[:, start:end],
        )


class Attended(NamedTuple):
    """What queries make of the keys they have seen so far, in float32."""

    output: Float[Array, "batch queries heads head_dim"]
    log_z: Float[Array, "batch queries heads"]  # logarithm of the softmax's denominator


class OutputGradient(NamedTuple):
    """What the backward pass knows of queries: of all their keys, not only those of a block."""

    d_output: Float[Array, "batch queries heads head_dim"]
    log_z: Float[Array, "batch queries heads"]
    delta: Float[Array, "batch queries heads"]  # output times d_output, summed over head_dim; float32

    def part(self, start: int, end: int) -> "OutputGradient":
        return OutputGradient(*(a[:, start:end] for a in self))


class BlockAttention(Protocol):
    """Attention of some queries to some keys, those that the mask lets them see. Hashable.

    `aligned` says that queries and keys are the same tokens, so that those out of sight need not be looked at.
    """

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key."""
        ...

    def forward(self, queries: Queries, keys: Keys, *, aligned: bool) -> Attended: ...

    def backward(
        self, queries: Queries, keys: Keys, gradient: OutputGradient, *, aligned: bool
    ) -> tuple[Array, tuple[Array, Array]]:
        """Float32 gradients of the query, and of (key, value): this block's part."""
        ...


def context_attention(
    layout: Layout,
    block: BlockAttention,
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"] | None,
    streams: UInt32[Array, " batch"] | None,
) -> Float[Array, "batch length heads head_dim"]:
    """Attention with all arguments in device order (layout/sequence.py), by `layout.context_attention`.

    Whatever splits the heads must divide the number of kv_heads.
    """
    return _attention(layout, block, query, key, value, segment_ids, streams)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(layout, block, query, key, value, segment_ids, streams):
    return _attention_forward(layout, block, query, key, value, segment_ids, streams)[0]


def _attention_forward(layout, block, query, key, value, segment_ids, streams):
    place = _Place(layout, block)
    specs = (place.heads_spec,) * 3 + place.rest_specs
    run = on_each_device(layout, place.forward, specs, Attended(place.heads_spec, place.log_z_spec))
    output, log_z = run(query, key, value, segment_ids, streams)
    output = checkpoint_name(output, "attention")
    log_z = checkpoint_name(log_z, "attention_statistics")
    return output, (query, key, value, segment_ids, streams, output, log_z)


def _attention_backward(layout, block, residuals, d_output):
    place = _Place(layout, block)
    # What the forward pass was sent is sent again, not kept. (On CPU, XLA merges the two where layers are unrolled.)
    residuals, d_output = zero.barrier(residuals, d_output)
    specs = (place.heads_spec,) * 3 + place.rest_specs + (place.heads_spec, place.log_z_spec, place.heads_spec)
    run = on_each_device(layout, place.backward, specs, (place.heads_spec,) * 3)
    return *run(*residuals, d_output), None, None


_attention.defvjp(_attention_forward, _attention_backward)


class _Place:
    """One device's part of the work. Its methods run inside `shard_map`."""

    def __init__(self, layout: Layout, block: BlockAttention):
        self.layout, self.block = layout, block
        self.axes, self.parts = layout.mesh_axes("length"), layout.size("length")
        self.gathers = layout.context_attention == "all_gather"
        self.heads_spec = layout.spec(("batch", "length", "heads", None))  # of keys too: theirs must be where they are
        self.log_z_spec = layout.spec(("batch", "length", "heads"))
        self.rest_specs = (layout.spec(("batch", "length")), layout.spec(("batch",)))

    # Both passes begin with the device's own block and go on with those of the device before, the one before that, …

    def forward(self, query, key, value, segment_ids, streams) -> Attended:
        queries, own = self._queries(query, segment_ids, streams), (key, value, segment_ids)
        attended = self.block.forward(queries, self._keys(own, self._me()), aligned=True)
        fold = functools.partial(self._fold, queries)
        if self.gathers:
            gathered = self._gather(own)
            step = lambda attended, origin: (fold(attended, _pick(gathered, origin), origin), None)  # noqa: E731
            attended, _ = jax.lax.scan(step, attended, self._others())
        else:

            def step(carry, origin):
                attended, held = carry
                arriving = self._pass_on(held)  # while `held` is worked on
                return (fold(attended, held, origin), arriving), None

            others = self._others()
            (attended, held), _ = jax.lax.scan(step, (attended, self._pass_on(own)), others[:-1])
            attended = fold(attended, held, others[-1])
        return Attended(attended.output.astype(query.dtype), attended.log_z)

    def backward(self, query, key, value, segment_ids, streams, output, log_z, d_output):
        queries, own = self._queries(query, segment_ids, streams), (key, value, segment_ids)
        delta = jnp.sum(d_output.astype(jnp.float32) * output.astype(jnp.float32), -1)
        gradient = OutputGradient(d_output, log_z, delta)
        d_query, d_own = self.block.backward(queries, self._keys(own, self._me()), gradient, aligned=True)
        fold = functools.partial(self._fold_gradients, queries, gradient)
        go_around = self._gathered_gradients if self.gathers else self._ring_gradients
        d_query, d_own = go_around(fold, own, d_query, d_own)
        return d_query.astype(query.dtype), *(d.astype(key.dtype) for d in d_own)

    def _ring_gradients(self, fold: Callable, own, d_query, d_own):
        def step(carry, origin):
            d_query, d_held, held = carry
            arriving, d_arriving = self._pass_on(held), self._pass_on(d_held)  # while `held` is worked on
            d_query, d_new = fold(d_query, held, origin)
            return (d_query, _add(d_arriving, d_new), arriving), None

        others = self._others()
        (d_query, d_held, held), _ = jax.lax.scan(step, (d_query, d_own, self._pass_on(own)), others[:-1])
        d_arriving = self._pass_on(d_held)
        d_query, d_new = fold(d_query, held, others[-1])
        return d_query, self._pass_on(_add(d_arriving, d_new))  # to the next device, whose keys these were

    def _gathered_gradients(self, fold: Callable, own, d_query, d_own):
        gathered = self._gather(own)
        zeros = lambda d: jnp.zeros((self.parts, *d.shape), d.dtype)  # noqa: E731

        def step(carry, origin):
            d_query, d_all = carry
            d_query, d_new = fold(d_query, _pick(gathered, origin), origin)
            return (d_query, _put(d_all, d_new, origin)), None

        d_all = _put(jax.tree.map(zeros, d_own), d_own, self._me())
        (d_query, d_all), _ = jax.lax.scan(step, (d_query, d_all), self._others())
        return d_query, jax.tree.map(lambda d: jax.lax.psum_scatter(d, self.axes, scatter_dimension=0), d_all)

    def _fold(self, queries: Queries, attended: Attended, held: Any, origin: Array) -> Attended:
        """`attended` with what the queries make of the keys and values of device `origin`."""
        keys = self._keys(held, origin)
        if not self.block.causal:
            return _merged(attended, self.block.forward(queries, keys, aligned=False))
        half, length = queries.query.shape[1] // 2, queries.query.shape[1]

        def earlier(attended: Attended) -> Attended:
            return _merged(attended, self.block.forward(queries, keys.part(0, half), aligned=False))

        def later(attended: Attended) -> Attended:
            new = self.block.forward(queries.part(half, length), keys, aligned=False)
            merged = _merged(Attended(*(a[:, half:] for a in attended)), new)
            return Attended(*(jnp.concatenate([a[:, :half], m], 1) for a, m in zip(attended, merged, strict=True)))

        return jax.lax.cond(origin < self._me(), earlier, later, attended)

    def _fold_gradients(self, queries: Queries, gradient: OutputGradient, d_query: Array, held: Any, origin: Array):
        """`d_query` with the part of it that comes from device `origin`, and the gradients of what that one holds."""
        keys = self._keys(held, origin)
        if not self.block.causal:
            new, d_held = self.block.backward(queries, keys, gradient, aligned=False)
            return d_query + new, d_held
        half, length = queries.query.shape[1] // 2, queries.query.shape[1]

        def earlier(d_query):
            new, d_held = self.block.backward(queries, keys.part(0, half), gradient, aligned=False)
            return d_query + new, jax.tree.map(lambda d: jnp.concatenate([d, jnp.zeros_like(d)], 1), d_held)

        def later(d_query):
            seeing = queries.part(half, length), keys, gradient.part(half, length)
            new, d_held = self.block.backward(*seeing, aligned=False)
            return jnp.concatenate([d_query[:, :half], d_query[:, half:] + new], 1), d_held

        return jax.lax.cond(origin < self._me(), earlier, later, d_query)

    def _queries(self, query: Array, segment_ids: Array | None, streams: Array | None) -> Queries:
        heads = jnp.arange(query.shape[2])
        if split := self.layout.mesh_axes("heads"):
            heads += jax.lax.axis_index(split) * query.shape[2]
        return Queries(query, text_indices(self._me(), self.parts, query.shape[1]), segment_ids, heads, streams)

    def _keys(self, held: Any, origin: Array) -> Keys:
        key, value, segment_ids = held
        return Keys(key, value, text_indices(origin, self.parts, key.shape[1]), segment_ids)

    def _me(self) -> Int[Array, ""]:
        return jax.lax.axis_index(self.axes)

    def _others(self) -> Int[Array, " parts-1"]:
        """The other devices, in the order in which their keys and values arrive."""
        return (self._me() - jnp.arange(1, self.parts)) % self.parts

    def _gather(self, held: Any) -> Any:
        return jax.tree.map(lambda a: jax.lax.all_gather(a, self.axes), held)

    def _pass_on(self, held: Any) -> Any:
        """What the device before holds; the next one gets what this one holds."""
        if "pipeline" in self.layout.manual and platform() == "cpu":
            # Stages of a pipeline that idle skip this code. XLA's CPU backend has all devices of the program meet at a
            # collective-permute, so it would wait for those for ever; at a gather only the ring's own devices meet.
            return _pick(self._gather(held), (self._me() - 1) % self.parts)
        ring = [(i, (i + 1) % self.parts) for i in range(self.parts)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axes, ring), held)


def _merged(one: Attended, other: Attended) -> Attended:
    """What queries make of two sets of keys, from what they make of each."""
    log_z = jnp.logaddexp(one.log_z, other.log_z)
    share = lambda part: part.output * jnp.exp(part.log_z - log_z)[..., None]  # noqa: E731
    return Attended(share(one) + share(other), log_z)


def _add(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def _pick(gathered: Any, origin: Array) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, origin, keepdims=False), gathered)


def _put(all_parts: Any, part: Any, origin: Array) -> Any:
    put = lambda a, p: jax.lax.dynamic_update_index_in_dim(a, p, origin, 0)  # noqa: E731
    return jax.tree.map(put, all_parts, part)
