"""Which object each anchor or proposal answers for."""

import jax
import jax.numpy as jnp

BELOW = -1  # background
BETWEEN = -2  # neither object nor background: left out of the loss


def match(iou: jax.Array, valid: jax.Array, high: float, low: float, low_quality: bool) -> jax.Array:
    """The object of each box, int32 [r]: an index into m, or BELOW, or BETWEEN.

    iou [m r] of m objects (valid [m], False for padding) with r boxes. A box belongs to the object that it overlaps
    most (the first of equals) if that IoU is at least `high`; it is BELOW under `low` and BETWEEN otherwise.
    low <= high. With low_quality, all boxes that tie for the best IoU of some object also belong to the object which
    *they* overlap most, whatever the IoU. (As in torchvision, an object that overlaps no box at all ties with every
    box at 0; data preparation drops the empty objects that could do so.) Without objects all boxes are BELOW.
    Source: Faster R-CNN (arXiv 1506.01497), section 3.1.2.
    """
    if iou.shape[0] == 0:
        return jnp.full(iou.shape[1:], BELOW, jnp.int32)
    iou = jnp.where(valid[:, None], iou, -1)
    # The test for ties needs the very same bits: without the barrier the compiler may compute the IoU of the maximum
    # and that of the comparison separately and round them differently.
    iou = jax.lax.optimization_barrier(iou)
    best, index = iou.max(axis=0), iou.argmax(axis=0).astype(jnp.int32)
    matched = jnp.where(best >= high, index, jnp.where(best < low, BELOW, BETWEEN))
    if low_quality:
        ties = valid[:, None] & (iou == iou.max(axis=1, keepdims=True))
        matched = jnp.where(ties.any(axis=0), index, matched)
    return jnp.where(valid.any(), matched, BELOW)
