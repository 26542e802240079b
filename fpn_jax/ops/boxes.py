"""Boxes `x1 y1 x2 y2` in pixels, float32, width x2 - x1 (no +1). A box whose sides are not positive is empty.

All functions are elementwise over the leading axes unless said. Neither they nor their gradients are NaN for finite
boxes whose sides are 1e-6 to 1e18 pixels or not positive, padding included: callers mask rows that mean nothing.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

DELTA_CLAMP = math.log(1000 / 16)  # of dw and dh: no box grows more than 62.5-fold
_LARGEST = 1e37  # square pixels, beyond any area of a box


def area(boxes: jax.Array) -> jax.Array:
    """Areas [...] of boxes [... 4], square pixels; 0 for empty ones."""
    x1, y1, x2, y2 = _columns(boxes)
    return jnp.maximum(x2 - x1, 0) * jnp.maximum(y2 - y1, 0)


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union [r m] of every box of a [r 4] with every one of b [m 4]; 0 wherever one is empty.

    The same bits wherever it is compiled, also where a compiler computes it several times for several uses: the only
    freedom it has is to fuse a product and a sum, which it rounds once then, and no sum here is of a bare product.
    """
    ax1, ay1, ax2, ay2 = (x[:, None] for x in _columns(a))
    bx1, by1, bx2, by2 = _columns(b)
    return iou_of_overlap(overlap_of(ax1, ax2, bx1, bx2), overlap_of(ay1, ay2, by1, by2), area(a)[:, None], area(b))


def overlap_of(a1: jax.Array, a2: jax.Array, b1: jax.Array, b2: jax.Array) -> jax.Array:
    """What intervals from a1 to a2 and from b1 to b2 have in common, at least 0; elementwise."""
    return jnp.maximum(jnp.minimum(a2, b2) - jnp.maximum(a1, b1), 0)


def iou_of_overlap(w: jax.Array, h: jax.Array, area_a: jax.Array, area_b: jax.Array) -> jax.Array:
    """IoU of boxes that have w x h pixels in common, elementwise. Where w or h grow it never falls, however rounded."""
    inter = jnp.minimum(w * h, _LARGEST)
    union = jnp.minimum(area_a, _LARGEST) + jnp.minimum(area_b, _LARGEST) - inter
    return inter / jnp.where(inter > 0, union, 1)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Boxes [... 4] cut to an image of `size` [2] (height, width); one wholly outside becomes empty, on the border."""
    height, width = size[0], size[1]
    return jnp.clip(boxes, 0, jnp.stack([width, height, width, height]).astype(boxes.dtype))


def is_larger(boxes: jax.Array, side: float) -> jax.Array:
    """bool [...]: both sides of boxes [... 4] are at least `side` pixels."""
    return jnp.all(boxes[..., 2:] - boxes[..., :2] >= side, axis=-1)


def encode(gt: jax.Array, anchors: jax.Array, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> jax.Array:
    """Deltas [... 4] (dx dy dw dh) that take `anchors` [... 4] to `gt` [... 4]; the two broadcast.

    weights multiply dx, dy, dw, dh. Sides that are not positive count as one pixel, so that the result is finite.
    Source: R-CNN (arXiv 1311.2524), equations 6 to 9 of its appendix C.
    """
    centre, sides = _centre_and_sides(anchors)
    gt_centre, gt_sides = _centre_and_sides(gt)
    sides, gt_sides = jnp.where(sides > 0, sides, 1), jnp.where(gt_sides > 0, gt_sides, 1)
    deltas = jnp.concatenate([(gt_centre - centre) / sides, jnp.log(gt_sides / sides)], axis=-1)
    return deltas * jnp.asarray(weights, deltas.dtype)


def decode(
    deltas: jax.Array,
    anchors: jax.Array,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    clamp: float = DELTA_CLAMP,
) -> jax.Array:
    """Boxes [... 4] that `deltas` [... 4] make of `anchors` [... 4]; the two broadcast. The inverse of `encode`.

    weights divide dx, dy, dw, dh; dw and dh are cut to `clamp` from above afterwards. Not clipped to the image.
    Source: R-CNN (arXiv 1311.2524), equations 1 to 4 of its appendix C.
    """
    deltas = deltas / jnp.asarray(weights, deltas.dtype)
    centre, sides = _centre_and_sides(anchors)
    centre = deltas[..., :2] * sides + centre
    half = 0.5 * (jnp.exp(jnp.minimum(deltas[..., 2:], clamp)) * sides)
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def _columns(boxes: jax.Array) -> tuple[jax.Array, ...]:
    return boxes[..., 0], boxes[..., 1], boxes[..., 2], boxes[..., 3]


def _centre_and_sides(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    sides = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * sides, sides
