import jax
import jax.numpy as jnp


def kl_estimate(a, b, kind):
    d = a - b
    return d if kind == "k1" else d * d / 2 if kind == "k2" else jnp.exp(-d) - 1 + d


def token_rewards(scores, log_p, ref, mask, w, estimator):
    last = mask & ~jnp.roll(mask, -1, 1).at[:, -1].set(False)
    return jnp.where(mask, -w * kl_estimate(log_p, ref, estimator), 0) + jnp.where(last, scores[:, None], 0)


def gae(rewards, values, mask, discount, lam):
    def back(carry, x):
        nv, na = carry
        r, v, m = x
        a = r + discount * nv - v + discount * lam * na
        return (jnp.where(m, v, nv), jnp.where(m, a, na)), jnp.where(m, a, 0)

    z = jnp.zeros(rewards.shape[0])
    _, adv = jax.lax.scan(back, (z, z), (rewards.T, values.T, mask.T), reverse=True)
    adv = adv.T
    return adv, jnp.where(mask, adv + values, 0)


def whiten(x, mask, shift_mean=True):
    n = jnp.maximum(mask.sum(), 1)
    mean = jnp.where(mask, x, 0).sum() / n
    var = jnp.where(mask, (x - mean) ** 2, 0).sum() / n
    y = (x - mean) * jax.lax.rsqrt(var + 1e-8)
    return jnp.where(mask, y if shift_mean else y + mean, 0)


def group_advantages(rewards, scale, epsilon=1e-4):
    a = rewards - rewards.mean(1, keepdims=True)
    return a / (rewards.std(1, ddof=1, keepdims=True) + epsilon) if scale == "group" else a


def next_kl_weight(w, kl, target, horizon, n):
    return w * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) * n / horizon)
