"""Which object each anchor or proposal answers for."""

import jax
import jax.numpy as jnp

from fpn_jax.ops.boxes import iou as iou_of
from fpn_jax.ops.platforms import by_platform

BELOW = -1  # background
BETWEEN = -2  # neither object nor background: left out of the loss
GROUP = 8  # objects that are matched at a time on a CPU


def match(iou: jax.Array, valid: jax.Array, high: float, low: float, low_quality: bool) -> jax.Array:
    """The object of each box, int32 [r]: an index into m, or BELOW, or BETWEEN.

    iou [m r] of m objects (valid [m], False for padding) with r boxes. A box belongs to the object that it overlaps
    most (the first of equals) if that IoU is at least `high`; it is BELOW under `low` and BETWEEN otherwise.
    low <= high. With low_quality, all boxes that tie for the best IoU of some object also belong to the object which
    *they* overlap most, whatever the IoU. (As in torchvision, an object that overlaps no box at all ties with every
    box at 0; data preparation drops the empty objects that could do so.) Without objects all boxes are BELOW.
    Source: Faster R-CNN (arXiv 1506.01497), section 3.1.2.
    """
    if iou.size == 0:
        return jnp.full(iou.shape[1:], BELOW, jnp.int32)
    return _decide(*_best(iou, iou.max(axis=1), valid, 0, low_quality), valid, high, low)


def match_boxes(
    objects: jax.Array, boxes: jax.Array, valid: jax.Array, high: float, low: float, low_quality: bool
) -> jax.Array:
    """`match` of the IoU of objects [m 4] with boxes [r 4], without the matrix [m r] in memory."""
    rules = high, low, low_quality
    return by_platform(
        objects,
        boxes,
        valid,
        cpu=lambda *x: match_in_groups(*x, *rules),
        default=lambda *x: match_at_once(*x, *rules),
    )


def match_at_once(
    objects: jax.Array, boxes: jax.Array, valid: jax.Array, high: float, low: float, low_quality: bool
) -> jax.Array:
    """`match_boxes` by two reductions, each of which computes the IoU itself: a barrier keeps XLA's GPU compiler from
    making the second's matrix out of the first's, which it would write to memory (a TPU's does not)."""
    if not len(objects) or not len(boxes):
        return jnp.full(len(boxes), BELOW, jnp.int32)
    # The test for ties needs the very same bits from both, see `boxes.iou`.
    highest = iou_of(jax.lax.optimization_barrier(objects), boxes).max(axis=1)
    return _decide(*_best(iou_of(objects, boxes), highest, valid, 0, low_quality), valid, high, low)


def match_in_groups(
    objects: jax.Array, boxes: jax.Array, valid: jax.Array, high: float, low: float, low_quality: bool
) -> jax.Array:
    """`match_boxes` by `GROUP` objects at a time: of more, XLA's CPU backend writes the matrix and takes three times as
    long (benchmarks/LOG.md)."""
    m, r = len(objects), len(boxes)
    if not m or not r:
        return jnp.full(r, BELOW, jnp.int32)
    groups = -(-m // GROUP)
    padding = groups * GROUP - m

    def add(found, group):
        first, objects, valid = group
        iou = iou_of(objects, boxes)
        return _better(found, _best(iou, iou.max(axis=1), valid, first, low_quality)), None

    in_groups = (
        jnp.arange(groups, dtype=jnp.int32) * GROUP,
        jnp.pad(objects, ((0, padding), (0, 0))).reshape(groups, GROUP, 4),
        jnp.pad(valid, (0, padding)).reshape(groups, GROUP),
    )
    start = jnp.full(r, -jnp.inf), jnp.zeros(r, jnp.int32), jnp.zeros(r, bool)
    found, _ = jax.lax.scan(add, start, in_groups)
    return _decide(*found, valid, high, low)


def _best(
    iou: jax.Array, highest: jax.Array, valid: jax.Array, first: int | jax.Array, low_quality: bool
) -> tuple[jax.Array, ...]:
    """(IoU, object, whether it is some object's best) of each box, all [r].

    iou [m r], of which each object's highest is [m]; objects are counted from `first`.
    """
    ties = valid[:, None] & (iou == highest[:, None]) if low_quality else jnp.zeros(iou.shape, bool)
    iou = jnp.where(valid[:, None], iou, -1)
    index = first + jax.lax.broadcasted_iota(jnp.int32, iou.shape, 0)
    start = jnp.array(-jnp.inf, iou.dtype), jnp.int32(0), jnp.array(False)
    return jax.lax.reduce((iou, index, ties), start, _better, (0,))


def _better(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Of two (IoU, object, whether it ties): the higher IoU, the first of equals, a NaN before all; ties of both."""
    (a, i, a_ties), (b, j, b_ties) = one, other
    higher = (a > b) | (~(a < b) & (i < j))
    takes = jnp.where(jnp.isnan(a) == jnp.isnan(b), higher, jnp.isnan(a))
    return jnp.where(takes, a, b), jnp.where(takes, i, j), a_ties | b_ties


def _decide(best: jax.Array, index: jax.Array, ties: jax.Array, valid: jax.Array, high: float, low: float) -> jax.Array:
    matched = jnp.where(best >= high, index, jnp.where(best < low, BELOW, BETWEEN))
    return jnp.where(valid.any(), jnp.where(ties, index, matched), BELOW)
