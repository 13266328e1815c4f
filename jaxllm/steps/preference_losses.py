import jax
import jax.numpy as jnp

from jaxllm.model.head import Loss, Mean


def preference_loss(c, r, rc, rr, nc, nr, is_pair, options):
    if rc is None:
        rc = rr = jnp.zeros_like(c)
    h = options.beta * ((c - rc) - (r - rr))
    n = is_pair.sum().astype(jnp.float32)
    return Loss(
        jnp.where(is_pair, -jax.nn.log_sigmoid(h), 0).sum(),
        n,
        None,
        {"reward_accuracy": Mean(jnp.where(is_pair, h > 0, 0).sum().astype(jnp.float32), n)},
    )


def bradley_terry(c, r, margins, is_pair, options):
    h = c - r - margins
    n = is_pair.sum().astype(jnp.float32)
    return Loss(
        jnp.where(is_pair, -jax.nn.log_sigmoid(h), 0).sum(),
        n,
        None,
        {"accuracy": Mean(jnp.where(is_pair, h > 0, 0).sum().astype(jnp.float32), n)},
    )
