"""Which object each anchor or proposal answers for."""

import functools

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
    return _decide(*_best(iou, iou.max(axis=1) if low_quality else None, valid, 0), valid, high, low)


def match_boxes(
    objects: jax.Array,
    boxes: jax.Array,
    valid: jax.Array,
    high: float,
    low: float,
    highest: jax.Array | None = None,
) -> jax.Array:
    """`match` of the IoU of objects [m 4] with boxes [r 4], without the matrix [m r] in memory.

    highest [m]: each object's highest IoU with all boxes, the very bits of `boxes.iou`, for the ties of low_quality;
    None leaves those out. Anchors know it without the matrix, see `AnchorGrid.highest_iou`.
    """
    if not len(objects) or not len(boxes):
        return jnp.full(len(boxes), BELOW, jnp.int32)
    rules = {"high": high, "low": low}
    forms = {"cpu": functools.partial(match_in_groups, **rules), "default": functools.partial(match_at_once, **rules)}
    return by_platform(objects, boxes, valid, highest, **forms)


def match_at_once(
    objects: jax.Array, boxes: jax.Array, valid: jax.Array, highest: jax.Array | None, high: float, low: float
) -> jax.Array:
    """`match_boxes` by a reduction that computes the IoU itself."""
    return _decide(*_best(iou_of(objects, boxes), highest, valid, 0), valid, high, low)


def match_in_groups(
    objects: jax.Array, boxes: jax.Array, valid: jax.Array, highest: jax.Array | None, high: float, low: float
) -> jax.Array:
    """`match_boxes` by `GROUP` objects at a time: of more, XLA's CPU backend writes the matrix and takes three times as
    long (benchmarks/LOG.md)."""
    m, r = len(objects), len(boxes)
    groups = -(-m // GROUP)

    def grouped(x):
        padded = jnp.pad(x, [(0, groups * GROUP - m)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(groups, GROUP, *x.shape[1:])

    def add(found, group):
        first, objects, valid, highest = group
        return _better(found, _best(iou_of(objects, boxes), highest, valid, first)), None

    first = jnp.arange(groups, dtype=jnp.int32) * GROUP
    start = jnp.full(r, -jnp.inf), jnp.zeros(r, jnp.int32), jnp.zeros(r, bool)
    found, _ = jax.lax.scan(add, start, (first, *jax.tree.map(grouped, (objects, valid, highest))))
    return _decide(*found, valid, high, low)


def _best(iou: jax.Array, highest: jax.Array | None, valid: jax.Array, first: int | jax.Array) -> tuple[jax.Array, ...]:
    """(IoU, object, whether it is some object's best) of each box, all [r].

    iou [m r], of which each object's highest is [m], or None to look for no ties; objects are counted from `first`.
    """
    ties = jnp.zeros(iou.shape, bool) if highest is None else valid[:, None] & (iou == highest[:, None])
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
