"""Elementwise losses, float32. Callers mask, sum and divide: a mean is only right if its count is known."""

import jax
import jax.numpy as jnp


def smooth_l1(pred: jax.Array, target: jax.Array, beta: float) -> jax.Array:
    """Smooth L1 of pred - target, elementwise: quadratic below `beta`, linear above; beta 0 is plain L1.

    beta >= 0, in the units of pred. The gradient at pred == target is 0. Source: Fast R-CNN (arXiv 1504.08083),
    equation 3, which has beta = 1.
    """
    x = pred - target
    size = x * jnp.sign(x)  # jnp.abs has the derivative 1 at 0
    if beta == 0:
        return size
    quadratic = jnp.minimum(size, beta)
    return 0.5 * quadratic * quadratic / beta + (size - quadratic)


def sigmoid_bce(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross entropy of sigmoid(logits) with targets in [0, 1], elementwise; finite for any finite logit."""
    return targets * jax.nn.softplus(-logits) + (1 - targets) * jax.nn.softplus(logits)


def softmax_ce(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy [...] of softmax(logits [... k]) with labels [...] in 0 .. k-1; finite for finite logits."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
