import jax.numpy as jnp

from jaxllm.model.head import Loss, Mean


def _m(x, mask):
    return Mean(jnp.where(mask, x, 0).sum(), mask.sum().astype(jnp.float32))


def policy_loss(log_p, old, adv, mask, entropy, options):
    r = jnp.exp(jnp.where(mask, log_p - old, 0))
    l = jnp.maximum(-adv * r, -adv * jnp.clip(r, 1 - options.clip, 1 + options.clip)) - options.entropy_weight * entropy
    d = jnp.where(mask, log_p - old, 0)
    return Loss(
        jnp.where(mask, l, 0).sum(),
        mask.sum().astype(jnp.float32),
        None,
        {
            "policy_kl": _m(jnp.exp(d) - 1 - d, mask),
            "entropy": _m(entropy, mask),
            "clip_fraction": _m((abs(r - 1) > options.clip) * 1.0, mask),
            "ratio": _m(r, mask),
        },
    )


def value_loss(values, old, returns, mask, options):
    c = jnp.clip(values, old - options.value_clip, old + options.value_clip)
    l = 0.5 * jnp.maximum((values - returns) ** 2, (c - returns) ** 2)
    return Loss(
        jnp.where(mask, l, 0).sum(), mask.sum().astype(jnp.float32), None, {"error": _m(values - returns, mask)}
    )


def explained_variance(metrics):
    return metrics


def grpo_loss(log_p, old, ref, adv, mask, entropy, max_new_tokens, options):
    d = jnp.where(mask, log_p - old, 0)
    r = jnp.exp(d)
    l = jnp.maximum(-adv * r, -adv * jnp.clip(r, 1 - options.clip_low, 1 + options.clip_high))
    return Loss(
        jnp.where(mask, l, 0).sum(),
        mask.sum().astype(jnp.float32),
        None,
        {"policy_kl": _m(jnp.exp(d) - 1 - d, mask), "entropy": _m(entropy, mask)},
    )
