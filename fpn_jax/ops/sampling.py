"""Drawing a fixed number of anchors or RoIs, some positive and the rest negative."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sample(NamedTuple):
    """What was drawn; the positives come first, then the negatives, then unused rows."""

    index: jax.Array  # int32 [num], 0 in unused rows
    positive: jax.Array  # bool [num]
    valid: jax.Array  # bool [num], False in unused rows


def sample(key: jax.Array | None, positive: jax.Array, negative: jax.Array, num: int, fraction: float) -> Sample:
    """Draw up to int(num * fraction) positives and negatives for the rest of `num`, uniformly without replacement.

    positive, negative bool [r], disjoint. If there are too few positives, more negatives are drawn; if there are too
    few negatives, rows stay unused. key None takes the first candidates in index order (r below 2**24).
    Source: Fast R-CNN (arXiv 1504.08083), section 2.3, as torchvision does it.
    """
    r = positive.shape[0]
    # Float32, for which top_k has a fast path on CPUs; whole numbers up to 2**24 are exact.
    priority = -jnp.arange(r, dtype=jnp.float32) if key is None else jax.random.uniform(key, (r,))
    most = int(num * fraction)
    num_positive = jnp.minimum(positive.sum(), most)
    num_negative = jnp.minimum(negative.sum(), num - num_positive)
    row = jnp.arange(num, dtype=jnp.int32)
    is_positive, valid = row < num_positive, row < num_positive + num_negative
    chosen = jnp.where(
        is_positive,
        _best(priority, positive, most, num),
        _best(priority, negative, num, num)[jnp.maximum(row - num_positive, 0)],
    )
    return Sample(jnp.where(valid, chosen, 0), is_positive, valid)


def _best(priority: jax.Array, candidates: jax.Array, count: int, num: int) -> jax.Array:
    """Indices int32 [num] of the candidates [r] with the highest priority; from the count-th on they mean nothing."""
    _, index = jax.lax.top_k(jnp.where(candidates, priority, -jnp.inf), min(count, priority.shape[0]))
    return jnp.pad(index.astype(jnp.int32), (0, num - index.shape[0]))
