"""Virtual tokens before frozen text: prompt tuning, P-tuning and prefix tuning, which is P-tuning v2.

Every document begins with *places*: the tokens at its positions 0 to `num_virtual_tokens` - 1, whichever those are, are
replaced by what is learned.

- Prompt tuning (Lester et al. 2021): the embeddings there.
- P-tuning (Liu et al. 2021): those too, and they are what an MLP or an LSTM makes of other embeddings.
- Prefix tuning (Li & Liang 2021), P-tuning v2 (Liu et al. 2022): in every layer the keys there, after their rotation,
  and the values; they themselves, or what an MLP makes of embeddings.

A place is a token like any other to packing, masks, caches and layouts. What a layer makes of the places of a prefix is
never seen, since the next one has keys and values of its own there.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layout.layout import constrain
from jaxllm.layout.scope import tensor_scope
from jaxllm.layout.weights import small_weight, weight_einsums
from jaxllm.model.adapter_config import AdapterConfig
from jaxllm.model.adapters import AdapterParam
from jaxllm.model.config import ModelConfig
from jaxllm.model.names import name_of

Virtual = Float[Array, "virtual width"]


def filled(
    x: Float[Array, "batch length *width"],
    number: int,
    make: Callable[[], Float[Array, "virtual *width"]],
    positions: Int[Array, "batch length"],
) -> Float[Array, "batch length *width"]:
    """x with the `number` virtual tokens that `make` makes, float32, in their places."""

    def fill() -> Array:
        # A product in float32, not a lookup: the gradient, a sum over all documents, is summed in float32 too.
        at = (positions[..., None] == jnp.arange(number)).astype(jnp.float32)
        rows = jnp.tensordot(at, make(), 1, precision=jax.lax.Precision.HIGHEST)
        is_place = (positions < number).reshape(*positions.shape, *[1] * (x.ndim - 2))
        return jnp.where(is_place, rows.astype(x.dtype), x)

    if positions.shape[1] > 1:
        return fill()
    # A model that writes token by token has the places behind it: nothing need be made.
    return jax.lax.cond((positions < number).any(), fill, lambda: x)


def _whole(parameter: nnx.Param) -> Float[Array, "..."]:
    with tensor_scope(name_of(parameter), parameter.axes):
        return small_weight(parameter[...], parameter.axes)


def _uniform(bound: float, shape: tuple[int, ...], rngs: nnx.Rngs) -> Float[Array, "..."]:
    return jax.random.uniform(rngs.adapter(), shape, jnp.float32, -bound, bound)


class Projection(nnx.Module):
    """x W + b, of a few rows. Both start uniform within 1 / sqrt(inputs), as PyTorch's linear layers do."""

    def __init__(self, axes: tuple[str | None, ...], shape: tuple[int, ...], *, rngs: nnx.Rngs):
        """`axes` and `shape` are those of the kernel: inputs, then outputs."""
        bound = 1 / math.sqrt(shape[0])
        self.kernel = AdapterParam(_uniform(bound, shape, rngs), axes=axes)
        self.bias = AdapterParam(_uniform(bound, shape[1:], rngs), axes=axes[1:])

    def __call__(self, x: Float[Array, "rows inputs"]) -> Float[Array, "rows *outputs"]:
        outputs = "nh"[: len(self.kernel.shape) - 1]
        equation = f"btd,d{outputs}->bt{outputs}"
        (y,) = weight_einsums([equation], x[None], [self.kernel[...]], [self.kernel.axes], [name_of(self.kernel)])
        return constrain(y[0] + _whole(self.bias), "virtual", *self.kernel.axes[1:])


class MLP(nnx.Module):
    """Three linear maps with ReLU between them."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.first = Projection(("embed", "encoder"), (width, hidden), rngs=rngs)
        self.second = Projection(("encoder", None), (hidden, hidden), rngs=rngs)
        self.third = Projection(("encoder", "embed"), (hidden, width), rngs=rngs)

    def __call__(self, x: Virtual) -> Virtual:
        return self.third(jax.nn.relu(self.second(jax.nn.relu(self.first(x)))))


class LSTMDirection(nnx.Module):
    """One layer of an LSTM, read in one direction (Hochreiter & Schmidhuber 1997).

    The gates are input, forget, cell and output, with two biases each, as PyTorch has them.
    """

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs):
        def make(axes: tuple[str | None, ...], *shape: int) -> AdapterParam:
            return AdapterParam(_uniform(1 / math.sqrt(hidden), shape, rngs), axes=axes)

        self.input_kernel = make((None, None, "encoder"), inputs, 4, hidden)
        self.recurrent_kernel = make((None, None, "encoder"), hidden, 4, hidden)
        self.input_bias = make((None, "encoder"), 4, hidden)
        self.recurrent_bias = make((None, "encoder"), 4, hidden)

    def __call__(self, x: Float[Array, "rows inputs"], *, backward: bool) -> Float[Array, "rows hidden"]:
        recurrent, bias = _whole(self.recurrent_kernel), _whole(self.input_bias) + _whole(self.recurrent_bias)
        gates = jnp.einsum("ti,igh->tgh", x, _whole(self.input_kernel)) + bias
        gates = constrain(gates, "virtual", None, "encoder")

        def step(carry: tuple[Array, Array], gate: Float[Array, "gates hidden"]) -> tuple[tuple[Array, Array], Array]:
            h, cell = carry
            i, f, g, o = gate + jnp.einsum("i,igh->gh", h, recurrent)
            cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(cell)
            return (h, cell), h

        zeros = jnp.zeros(recurrent.shape[0], jnp.float32)
        return constrain(jax.lax.scan(step, (zeros, zeros), gates, reverse=backward)[1], "virtual", "encoder")


class LSTM(nnx.Module):
    """Layers that read the virtual tokens forwards and backwards, then two linear maps with ReLU between them."""

    def __init__(self, width: int, hidden: int, num_layers: int, *, rngs: nnx.Rngs):
        self.num_layers = num_layers
        for number in range(num_layers):
            inputs = 2 * hidden if number else width
            setattr(self, f"forward_{number}", LSTMDirection(inputs, hidden, rngs=rngs))
            setattr(self, f"backward_{number}", LSTMDirection(inputs, hidden, rngs=rngs))
        self.first = Projection(("encoder", None), (2 * hidden, 2 * hidden), rngs=rngs)
        self.second = Projection(("encoder", "embed"), (2 * hidden, width), rngs=rngs)

    def __call__(self, x: Virtual) -> Virtual:
        for number in range(self.num_layers):
            forwards = getattr(self, f"forward_{number}")(x, backward=False)
            backwards = getattr(self, f"backward_{number}")(x, backward=True)
            x = jnp.concatenate([forwards, backwards], -1)
        return self.second(jax.nn.relu(self.first(x)))


class TanhLayer(nnx.Module):
    """A linear map and tanh: what the projections of a prefix start from."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.first = Projection((None, "encoder"), (width, hidden), rngs=rngs)

    def __call__(self, x: Virtual) -> Float[Array, "virtual encoder"]:
        return jnp.tanh(self.first(x))


class VirtualTokens(nnx.Module):
    """Embeddings of virtual tokens, and what makes of them what is used."""

    def __init__(
        self, axes: tuple[str, str | None], shape: tuple[int, int], encoder: nnx.Module | None, *, rngs: nnx.Rngs
    ):
        self.embedding = AdapterParam(jax.random.normal(rngs.adapter(), shape, jnp.float32), axes=axes)
        self.encoder = nnx.data(encoder)

    def __call__(self) -> Virtual:
        """In float32."""
        virtual = _whole(self.embedding)
        return virtual if self.encoder is None else self.encoder(virtual)

    def filled(
        self, x: Float[Array, "batch length embed"], positions: Int[Array, "batch length"]
    ) -> Float[Array, "batch length embed"]:
        """Embeddings with these in their places."""
        return filled(x, self.embedding.shape[0], self, positions)


def virtual_tokens(model: ModelConfig, adapter: AdapterConfig, *, rngs: nnx.Rngs) -> VirtualTokens | None:
    """What an adapter holds beside the layers of a model."""
    number, hidden = adapter.num_virtual_tokens, encoder_dim(model, adapter)
    if adapter.kind == "prefix":
        if not adapter.prefix_projection:
            return None
        width = model.num_kv_heads * model.head_dim
        return VirtualTokens(("virtual", None), (number, width), TanhLayer(width, hidden, rngs=rngs), rngs=rngs)
    encoder = None
    if adapter.kind == "p_tuning" and adapter.encoder == "lstm":
        encoder = LSTM(model.embed_dim, hidden, adapter.encoder_layers, rngs=rngs)
    elif adapter.kind == "p_tuning":
        encoder = MLP(model.embed_dim, hidden, rngs=rngs)
    return VirtualTokens(("virtual", "embed"), (number, model.embed_dim), encoder, rngs=rngs)


def encoder_dim(model: ModelConfig, adapter: AdapterConfig) -> int:
    """Hidden units of an encoder."""
    return adapter.encoder_dim or model.embed_dim


class Prefixed(NamedTuple):
    """What the layers share of a prefix."""

    positions: Int[Array, "batch length"]
    segment_ids: Int[Array, "batch length"]  # 0 in the places too: layers need to make nothing of those
    hidden: Float[Array, "virtual encoder"] | None  # of which each layer projects its own


def prefixed(
    adapter: AdapterConfig,
    positions: Int[Array, "batch length"],
    segment_ids: Int[Array, "batch length"] | None,
    virtual: VirtualTokens | None,
) -> Prefixed | None:
    """What the layers are given where there is a prefix."""
    if adapter.kind != "prefix":
        return None
    segment_ids = jnp.ones_like(positions) if segment_ids is None else segment_ids
    segment_ids = jnp.where(positions < adapter.places, 0, segment_ids)
    return Prefixed(positions, segment_ids, None if virtual is None else virtual())


class Prefix(nnx.Module):
    """The keys and values in the places of one layer."""

    def __init__(self, model: ModelConfig, adapter: AdapterConfig, *, rngs: nnx.Rngs):
        heads, head_axes = (model.num_kv_heads, model.head_dim), ("kv_heads", "head_dim")
        self.number, self.is_projected = adapter.num_virtual_tokens, adapter.prefix_projection

        def make() -> Projection | AdapterParam:
            if self.is_projected:
                return Projection(("encoder", *head_axes), (encoder_dim(model, adapter), *heads), rngs=rngs)
            start = jax.random.normal(rngs.adapter(), (adapter.num_virtual_tokens, *heads), jnp.float32)
            return AdapterParam(start, axes=("virtual", *head_axes))

        self.key, self.value = make(), make()

    def __call__(
        self,
        key: Float[Array, "batch length kv_heads head_dim"],
        value: Float[Array, "batch length kv_heads head_dim"],
        prefixed: Prefixed,
    ) -> tuple[Float[Array, "batch length kv_heads head_dim"], Float[Array, "batch length kv_heads head_dim"]]:
        """Keys and values with those of the prefix in their places."""

        def with_own(x: Array, own: Projection | AdapterParam) -> Array:
            make = (lambda: own(prefixed.hidden)) if self.is_projected else (lambda: _whole(own))
            return filled(x, self.number, make, prefixed.positions)

        return with_own(key, self.key), with_own(value, self.value)
