"""The transformer, written once. It names logical axes; where they live is the layout's affair."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxllm.layout import vocabulary
from jaxllm.layout.layers import LayerSums, run_layers
from jaxllm.layout.layout import current_layout, reshard
from jaxllm.layout.rules import RESIDUAL_AXES
from jaxllm.layout.scope import tensor_scope
from jaxllm.layout.sequence import to_device_order, token_order
from jaxllm.model.adapter_config import NO_ADAPTER, AdapterConfig
from jaxllm.model.adapters import chosen_targets
from jaxllm.model.attention import Attention, CacheSlots, LayerCache
from jaxllm.model.cache import KVCache
from jaxllm.model.config import ModelConfig
from jaxllm.model.dropout import DropoutKey, dropout, example_lengths, neftune
from jaxllm.model.head import Head, HeadBias, HeadTransform, Table
from jaxllm.model.linear import Linear
from jaxllm.model.mlp import MLP
from jaxllm.model.moe import Kernel, MoE
from jaxllm.model.names import name_of, name_parameters
from jaxllm.model.norms import Norm
from jaxllm.model.prompts import Prefixed, prefixed, virtual_tokens
from jaxllm.model.rope import Rotation, rotation
from jaxllm.model.row_cache import RowCache
from jaxllm.model.scalar_head import ScalarHead

# Between blocks the sequence or the width may be split; inside them each device sees both whole (`length`, `embed`).
RESIDUAL = RESIDUAL_AXES
WHOLE = ("batch", "length", "embed")


class Block(nnx.Module):
    """x + f(norm(x)) for f = attention, then mlp; where norms come after, norm(x + f(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.dropout_rate, self.is_pre_norm = config.dropout, config.norm_position == "pre"
        self.attention_norm = Norm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = Norm(config)
        self.mlp = MoE(config, rngs=rngs) if config.num_experts else MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch length embed"],
        segment_ids: Int[Array, "batch length"] | None,
        rotation: Rotation | None,
        *,
        stream: DropoutKey | None = None,
        cache: LayerCache | None = None,
        slots: CacheSlots | None = None,
        predicted: Float[Array, " batch"] | None = None,
        prefixed: Prefixed | None = None,
    ) -> tuple[Float[Array, "batch length embed"], LayerCache | None, LayerSums | None]:
        h = reshard(self._before(self.attention_norm, x), WHOLE, RESIDUAL)
        h, cache = self.attention(h, segment_ids, rotation, dropout=stream, cache=cache, slots=slots, prefixed=prefixed)
        x = x + _drop(reshard(h, RESIDUAL, WHOLE), self.dropout_rate, stream, "after_attention")
        x = self._after(self.attention_norm, x)
        h = reshard(self._before(self.mlp_norm, x), WHOLE, RESIDUAL)
        routed = segment_ids if prefixed is None else prefixed.segment_ids
        h, sums = self.mlp(h, routed, predicted) if isinstance(self.mlp, MoE) else (self.mlp(h, stream), None)
        x = x + _drop(reshard(h, RESIDUAL, WHOLE), self.dropout_rate, stream, "after_mlp")
        return self._after(self.mlp_norm, x), cache, sums

    def _before(self, norm: Norm, x: Array) -> Array:
        return norm(x) if self.is_pre_norm else x

    def _after(self, norm: Norm, x: Array) -> Array:
        return x if self.is_pre_norm else norm(x)


def _drop(x: Array, rate: float, stream: DropoutKey | None, place: str) -> Array:
    """Dropout that does not depend on where a token lies."""
    return dropout(x, rate, stream.fold(place), token_order(current_layout(), x.shape[1])) if stream else x


def _linear_layers(block: Block) -> dict[str, Linear | Kernel]:
    """The linear maps of a block that an adapter may stand beside, by path: all but routers."""
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(block)}
    is_linear = lambda path, module: isinstance(module, (Linear, Kernel)) and not path.endswith("router")  # noqa: E731
    return {path: module for path, module in modules.items() if is_linear(path, module)}


def _stacked_blocks(config: ModelConfig, adapter: AdapterConfig, rngs: nnx.Rngs) -> Block:
    """All layers as one Block whose parameters have a leading `layers` axis."""

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Block:
        block = Block(config, rngs=rngs)
        if adapter.kind == "lora":
            linear = _linear_layers(block)
            for path in chosen_targets(adapter.targets, list(linear)):
                linear[path].adapt(adapter, rngs)
        if adapter.kind == "prefix":
            block.attention.adapt(config, adapter, rngs)
        return block

    return stack(rngs)


class Transformer(nnx.Module):
    """Token ids to the last activations; `head` turns those into logits or a loss.

    Parameters are float32 and those of the layers stacked along a leading `layers` axis.
    """

    def __init__(self, config: ModelConfig, adapter: AdapterConfig = NO_ADAPTER, *, rngs: nnx.Rngs):
        self.config, self.adapter = config, adapter
        self.embedding = Table(config, rngs=rngs)
        self.position_embedding = nnx.data(None)
        if config.positions == "learned":
            shape = (config.max_length, config.embed_dim)
            table = config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
            self.position_embedding = nnx.Param(table, axes=("positions", "embed"))
        self.type_embedding = nnx.data(None)
        if config.token_types:
            shape = (config.token_types, config.embed_dim)
            table = config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
            self.type_embedding = nnx.Param(table, axes=(None, "embed"))
        self.embedding_norm = Norm(config) if config.embedding_norm else None
        self.layers = _stacked_blocks(config, adapter, rngs)
        self.virtual = nnx.data(virtual_tokens(config, adapter, rngs=rngs) if adapter.places else None)
        self.final_norm = Norm(config) if config.norm_position == "pre" else None
        self.output = None if config.tied_head else Table(config, rngs=rngs)
        self.head_transform = HeadTransform(config, rngs=rngs) if config.head_transform else None
        self.head_bias = HeadBias(config) if config.head_bias else None
        self.score = ScalarHead(config, rngs=rngs) if config.scalar_head else None
        name_parameters(self)

    @property
    def head(self) -> Head:
        bias = None if self.head_bias is None else self.head_bias.bias
        return Head((self.output or self.embedding).table, self.config.z_loss, bias)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        *,
        token_types: Int[Array, "batch length"] | None = None,
        dropout: DropoutKey | None = None,
    ) -> Float[Array, "batch length embed"]:
        """The first of what `with_sums` returns."""
        return self.with_sums(tokens, positions, segment_ids, token_types=token_types, dropout=dropout)[0]

    def with_sums(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        *,
        token_types: Int[Array, "batch length"] | None = None,
        loss_mask: Bool[Array, "batch length"] | None = None,
        dropout: DropoutKey | None = None,
    ) -> tuple[Float[Array, "batch length embed"], LayerSums | None]:
        """What `head` takes: the last activations, after the final norm, in device order (layout/sequence.py); and what
        the layers add to the loss (None where they add nothing).

        Args:
          tokens: in text order, like all arguments; the sequence is split here. With an adapter of virtual tokens the
            first of each document are only places for those (model/prompts.py).
          positions: from 0 in each document; default 0, 1, 2, …
          segment_ids: a number a document, 0 for padding; a token sees tokens of its own number only.
          token_types: where the model has those; default 0.
          loss_mask: true on the tokens that are to be predicted: what layers add to the loss is weighed by them.
          dropout: the random stream of each row, for training.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        noisy = None
        if self.config.neftune_alpha and dropout is not None:
            segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            noisy = to_device_order(example_lengths(positions, segments))
        tokens, positions = to_device_order(tokens), to_device_order(positions)
        segment_ids = None if segment_ids is None else to_device_order(segment_ids)
        types = None if token_types is None else to_device_order(token_types)
        predicted = None if loss_mask is None else loss_mask.astype(jnp.float32).sum(1)
        x, by = self._embed(tokens, positions, dropout, types, noisy=noisy)
        graph, weights = nnx.split(self.layers)
        prefix = prefixed(self.adapter, positions, segment_ids, self.virtual)

        def layer(x, number, weights):
            stream = dropout.fold("layer", number) if dropout else None
            x, _, sums = nnx.merge(graph, weights)(
                x, segment_ids, by, stream=stream, predicted=predicted, prefixed=prefix
            )
            return x, sums

        x, sums = run_layers(layer, x, weights, self.config.num_layers)
        return self._before_head(x), sums

    def extend(
        self,
        cache: KVCache,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        segment_ids: Int[Array, "batch length"],
        lengths: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch length embed"], KVCache]:
        """The last activations of tokens that follow those in `cache`, and the cache with these in it.

        Padding (segment 0) fills slots too and is never attended, so rows of unequal length can go together.

        Args:
          lengths: of the whole texts where these tokens are a part of what is known of them (model/rope.py: dynamic).
        """
        x, by = self._embed(tokens, positions, None, lengths=lengths)
        graph, weights = nnx.split(self.layers)
        known = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.filled, axis=1)
        slots = CacheSlots(known, cache.filled)
        prefix = prefixed(self.adapter, positions, segment_ids, self.virtual)

        def layer(x, number, inputs):
            weights, layer_cache = inputs
            return nnx.merge(graph, weights)(x, segment_ids, by, cache=layer_cache, slots=slots, prefixed=prefix)[:2]

        per_layer = (weights, LayerCache(cache.keys, cache.values))
        x, layer_caches = run_layers(layer, x, per_layer, self.config.num_layers)
        filled = cache.filled + tokens.shape[1]
        return self._before_head(x), KVCache(layer_caches.keys, layer_caches.values, known, filled)

    def layer_weights(self) -> list[nnx.State]:
        """The weights of each layer, apart: for `extend_rows`, outside a loop that calls it."""
        weights = nnx.split(self.layers)[1]
        return [jax.tree.map(lambda w, i=i: w[i], weights) for i in range(self.config.num_layers)]

    def extend_rows(
        self,
        cache: RowCache,
        layers: Sequence[nnx.State],
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        lengths: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch length embed"], RowCache]:
        """What `head` takes, of new tokens of rows that go their own ways, and the cache with them.

        Args:
          layers: `layer_weights`.
          positions: of the new tokens in their rows; each row's follow each other.
          lengths: as of `extend`; tokens beyond are padding.
        """
        x, by = self._embed(tokens, positions, None, lengths=lengths)
        segment_ids = jnp.ones_like(tokens) if lengths is None else (positions < lengths[:, None]).astype(jnp.int32)
        prefix = prefixed(self.adapter, positions, segment_ids, self.virtual)
        graph, extended = nnx.split(self.layers)[0], []
        for weights, layer_cache in zip(layers, cache, strict=True):
            block = nnx.merge(graph, weights)
            x, new, _ = block(x, segment_ids, by, cache=layer_cache, slots=positions, prefixed=prefix)
            extended.append(new)
        return self._before_head(x), tuple(extended)

    def _before_head(self, x: Array) -> Array:
        x = reshard(x if self.final_norm is None else self.final_norm(x), WHOLE, RESIDUAL)
        return x if self.head_transform is None else self.head_transform(x)

    def _embed(
        self, tokens, positions, stream, token_types=None, lengths=None, noisy=None
    ) -> tuple[Array, Rotation | None]:
        # The dtype of the weights is the dtype of compute: the step casts them before the model sees them.
        dtype = self.layers.attention_norm.scale.dtype
        x = self.embedding(tokens, dtype)
        if noisy is not None:
            order = token_order(current_layout(), x.shape[1])
            x = neftune(x, self.config.neftune_alpha, stream.fold("neftune"), noisy, order)
        if self.adapter.kind in ("prompt", "p_tuning"):
            x = self.virtual.filled(x, positions)
        for table, rows in ((self.position_embedding, positions), (self.type_embedding, token_types)):
            if table is not None:
                rows = jnp.zeros_like(tokens) if rows is None else rows
                with tensor_scope(name_of(table), table.axes):
                    x = x + vocabulary.lookup(table[...], rows, dtype, table.axes)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = _drop(reshard(x, RESIDUAL, WHOLE), self.config.dropout, stream, "embedding")
        return x, rotation(positions, self.config, lengths) if self.config.positions == "rope" else None
