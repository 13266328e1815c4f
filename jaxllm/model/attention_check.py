"""At the start of a run the attention backend is compared with the formula, on a packed batch: never a silent fallback.

A backend that ignored segment ids would train all the same, on documents that see one another.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.errors import UserError
from jaxllm.layout.layout import CONTEXT_ATTENTION, Layout, as_dtype, constrain, use_layout
from jaxllm.layout.mesh import platform_of
from jaxllm.layout.sequence import to_device_order, to_text_order
from jaxllm.model.attention_backends import BACKENDS, KEY_AXES, QUERY_AXES, attend, choose_backend
from jaxllm.model.attention_pattern import CAUSAL, Pattern, pattern_of
from jaxllm.model.config import ModelConfig

LENGTH = 128  # tokens a row: two blocks of queries
WINDOW = 24  # a longer sliding window would show all of a document: this one is compared in its place
# Largest difference allowed, as a part of the largest number: some 10 roundings of the compute dtype.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
# Accelerators multiply float32 with the mantissa of TF32 or less unless told otherwise.
TF32_TOLERANCE = 1e-2


def check_backend(layout: Layout, config: ModelConfig, compute: str) -> str:
    """Compares the backends in use with the formula, on a small packed batch with the model's own heads.

    Forward and backward, on the devices of the layout. Where dropout keeps training from the fused kernel, evaluation
    may use another backend than training: then both are compared.

    Args:
      config: resolved.
      compute: the dtype of compute, by name.

    Returns:
      The line to print, as "attention: xla, checked on a packed batch (largest difference 3e-07)", or, where the
      sequence is split, "attention: xla, ring over context=4, checked …".

    Raises:
      UserError: a backend that cannot run here, or whose output or gradients differ: its name, the difference, what to
        use instead.
    """
    platform = platform_of(layout.mesh.devices.flat[0])
    rates = (config.attention_dropout, 0.0)
    setting = {"compute": compute, "context": layout.size("length"), "pattern": pattern_of(config)}
    in_use = [choose_backend(layout.attention, platform, dropout=rate, **setting) for rate in rates]
    split = " x ".join(f"{axis}={layout.mesh.shape[axis]}" for axis in layout.mesh_axes("length"))
    over = f", {layout.context_attention} over {split}" if split else ""
    parts = []
    for name in dict.fromkeys(in_use):
        difference = _checked(dataclasses.replace(layout, attention=name), config, compute, platform)
        where = " without dropout" if name != in_use[0] else ""
        parts.append(f"{name}{over}{where}, checked on a packed batch (largest difference {difference:.0e})")
    return "attention: " + "; ".join(parts)


def _checked(layout: Layout, config: ModelConfig, compute: str, platform: str) -> float:
    name, others = layout.attention, [f"attention={other}" for other in BACKENDS if other != layout.attention]
    if layout.size("length") > 1:
        name = f"{name}, {layout.context_attention}"
        others = [f"context_attention={other}" for other in CONTEXT_ATTENTION if other != layout.context_attention]
    others = " or ".join(f"--config.layout.{other}" for other in others)
    try:
        output, gradients = jax.device_get(
            _differences(layout, _shown(config), config.num_heads, config.num_kv_heads, config.head_dim, compute)
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(
                f"config.model: the attention of {config.num_heads} heads of {config.head_dim} does not fit into a "
                f"device's memory, be it of {LENGTH} tokens a row. Use fewer heads, or split them: config.mesh.model."
            ) from error
        if layout.attention == "xla":
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"attention backend '{name}' does not run here: {reason}\nUse {others}.") from error
    allowed = TOLERANCE[compute] if platform == "cpu" else max(TOLERANCE[compute], TF32_TOLERANCE)
    worst = max(float(output), float(gradients))
    if not (output <= allowed and gradients <= allowed):  # a NaN is refused too
        raise UserError(
            f"attention backend '{name}' differs from the reference on a packed batch: output by {output:.1e}, "
            f"gradients by {gradients:.1e} of their largest value, {allowed:.0e} allowed in {compute}. Use {others}."
        )
    return worst


def _shown(config: ModelConfig) -> Pattern:
    pattern = pattern_of(config)
    return dataclasses.replace(pattern, window=min(pattern.window, WINDOW))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _differences(
    layout: Layout, pattern: Pattern, num_heads: int, num_kv_heads: int, head_dim: int, compute: str
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Largest difference of the outputs and of the gradients, each as a part of its largest number."""
    with use_layout(layout):
        length = math.lcm(LENGTH, 2 * layout.size("length"))
        batch = layout.size("batch")
        segments = constrain(packed_segments(batch, length), "batch", "length")
        placed_segments = to_device_order(segments)
        axes = (QUERY_AXES, KEY_AXES, KEY_AXES, QUERY_AXES)
        heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
        query, key, value, d_output = (
            constrain(jax.random.normal(jax.random.key(i), (batch, length, n, head_dim), as_dtype(compute)), *names)
            for i, (n, names) in enumerate(zip(heads, axes, strict=True))
        )

        def backend(*arguments: Array) -> Array:  # in text order, like the formula
            return to_text_order(attend(*map(to_device_order, arguments), placed_segments, pattern))

        output, pull = jax.vjp(backend, query, key, value)
        computed = (output, *pull(d_output))
        with jax.default_matmul_precision("highest"):
            exact = [a.astype(jnp.float32) for a in (query, key, value)]
            expected, pull = jax.vjp(functools.partial(reference, segment_ids=segments, pattern=pattern), *exact)
            expected = (expected, *pull(d_output.astype(jnp.float32)))
        apart = [
            jnp.abs(a.astype(jnp.float32) - e).max() / jnp.abs(e).max() for a, e in zip(computed, expected, strict=True)
        ]
        return apart[0], jnp.stack(apart[1:]).max()


def packed_segments(batch: int, length: int) -> Int[Array, "batch length"]:
    """Three documents and padding in every row, their ends others in every row, within and across query blocks."""
    column = jnp.arange(length)
    shift = jnp.arange(batch)[:, None] % (length // 8)
    first, second, third = length // 5 + shift, length * 9 // 16 + shift, length - length // 8
    return jnp.where(column < first, 1, jnp.where(column < second, 2, jnp.where(column < third, 3, 0)))


def reference(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segment_ids: Int[Array, "batch length"],
    pattern: Pattern = CAUSAL,
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim) + bias) value as the formula says, all `[length, length]` of it."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (constrain(jnp.repeat(a, repeats, axis=2), *QUERY_AXES) for a in (key, value))
    logits = jnp.einsum("bthd,bshd->bhts", query, key) / math.sqrt(query.shape[-1])
    places = jnp.arange(query.shape[1])
    visible = segment_ids[:, :, None] == segment_ids[:, None, :]
    if (shown := pattern.visible(places, places)) is not None:
        visible = visible & shown
    if (bias := pattern.bias(jnp.arange(query.shape[2]), places, places)) is not None:
        logits += bias
    weights = jax.nn.softmax(jnp.where(visible[:, None], logits, -jnp.inf), axis=-1)
    return constrain(jnp.einsum("bhts,bshd->bthd", weights, value), *QUERY_AXES)
