"""RoI max pooling (Fast R-CNN, arXiv 1504.08083, section 2.1) on one map and on a pyramid, as torchvision computes it.

Gradients flow to the features only: the RoIs are constants.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fpn_jax.ops.roi_align import roi_levels
from fpn_jax.ops.rounds import IMAGES, Pieces, Table, in_pieces, map_table, pyramid_table, sort_into_pieces

# Corners are cut to so many cells from the origin, which keeps the arithmetic of `_edges` within 32 bits. No map is
# nearly as large, so only the bins of RoIs that exceed theirs a thousandfold are affected.
FAR = 2**22


def roi_pool(feature: jax.Array, rois: jax.Array, scale: float, size: int = 7) -> jax.Array:
    """Largest features in the bins of RoIs, [r size size c], of one map `feature` [h w c].

    rois [r 4] in pixels; scale: cells per pixel. Corners are rounded to whole cells, halves away from zero, and both
    corner cells belong to the RoI, which is at least one cell wide and high. It is cut into size x size bins (size: 1
    to 255), whose borders are rounded outwards, so that neighbours may share cells. What is outside the map does not
    count, nor do NaN features; a bin without any cell is 0, as are all of a RoI with a NaN. The gradient goes to the
    largest cell, of equal ones to the first, row by row. A RoI's time grows with the cells of its bins, and RoIs wait
    for the larger ones of their piece only (see `rounds.Pieces`).
    """
    cells, table = map_table(feature, rois.shape[0], scale)
    return _pool_images(cells, rois[None], table, size)[0]


def multilevel_roi_pool(
    pyramid: Mapping[int, jax.Array],
    rois: jax.Array,
    size: int = 7,
    k0: int = 4,
    canonical: float = 224.0,
    eps: float = 1e-6,
) -> jax.Array:
    """Largest features in the bins of RoIs, [b r size size c], each from the level of the pyramid {l: [b h w c]} that
    `roi_levels` names.

    rois [b r 4] in pixels; a cell of level l is 2**l pixels wide. The rest as for `roi_pool` and `roi_levels`.
    """
    parts, table = pyramid_table(pyramid, roi_levels(rois, sorted(pyramid), k0, canonical, eps))
    return _pool_images(jnp.concatenate(parts, axis=1), rois, table, size)


def _pool_images(cells: jax.Array, rois: jax.Array, table: Table, size: int) -> jax.Array:
    """cells [b n c], rois [b r 4] in pixels -> [b r size size c]."""
    if not 0 < size < 256:
        raise ValueError(f"size must be 1 to 255, not {size}")
    b, r = rois.shape[:2]
    if r == 0:
        return jnp.zeros((b, 0, size, size, cells.shape[-1]), cells.dtype)
    bins = jax.vmap(lambda rois, table: _bins(rois, table, size))(rois, table)
    pieces, place = sort_into_pieces(bins, *(x.count.max(-1) for x in bins))
    return jax.vmap(_pool, in_axes=(0, IMAGES, 0))(cells, pieces, place)


class _Bins(NamedTuple):
    """The cells of each bin along one axis."""

    first: jax.Array  # int32 [r size], row of the table of the first cell (the vertical and horizontal ones add up)
    count: jax.Array  # int32 [r size], number of cells
    step: jax.Array  # int32 [r], rows of the table from one cell to the next


def _bins(rois: jax.Array, table: Table, size: int) -> tuple[_Bins, _Bins]:
    """The (vertical, horizontal) bins of rois [r 4], table of [r]."""
    corners = jax.lax.round(rois.astype(jnp.float32) * table.scale[:, None], jax.lax.RoundingMethod.AWAY_FROM_ZERO)
    outside = jnp.isnan(corners).any(-1, keepdims=True)
    corners = jnp.where(outside, FAR, jnp.clip(corners, -FAR, FAR)).astype(jnp.int32)

    def along(axis, length, step, start):
        first, last = corners[:, axis, None], corners[:, axis + 2, None]
        begins, ends = _edges(jnp.maximum(last - first + 1, 1), size)
        begins, ends = (jnp.clip(first + x, 0, length[:, None]) for x in (begins, ends))
        return _Bins(start[:, None] + begins * step[:, None], jnp.maximum(ends - begins, 0), step)

    y = along(1, table.height, table.width, table.start)
    x = along(0, table.width, jnp.ones_like(table.width), jnp.zeros_like(table.start))
    return y, x


def _edges(sides: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """First cell of each bin and the one behind its last, int32 [r size], of `sides` int32 [r 1] < 2**24 cells.

    floor(i * side / size) and ceil((i + 1) * side / size) as torchvision has them, with every operation rounded to
    float32: 57 cells in 7 bins then end with the 58th. Done in whole numbers, since what compilers make of a division
    is not rounded the same everywhere.
    """
    one, n, parts = jnp.uint32(1), sides.astype(jnp.uint32), jnp.uint32(size)
    # The quotient is side * 2**shift / size, 2**23 to 2**24, times 2**-shift.
    shift = jax.lax.clz(n) - 8 + (size.bit_length() - 1)
    shift += n << shift < parts << 23
    quotient = _divide(n << shift, parts)
    # The product has up to 8 bits too many.
    product = jnp.arange(size + 1, dtype=jnp.uint32) * quotient
    excess = 8 - jnp.minimum(jax.lax.clz(product), 8)
    edge, shift = _divide(product, one << excess), shift - excess
    floor = edge >> shift
    ceil = floor + (floor << shift < edge)
    return floor[:, :-1].astype(jnp.int32), ceil[:, 1:].astype(jnp.int32)


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, rounded to the nearest whole number, halves to the even one; uint32, b < 2**31."""
    floor = a // b
    return floor + (2 * (a % b) + floor % 2 > b)


def _cell(bins: tuple[_Bins, _Bins], y: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cell (y, x) [r] of each bin: its row of the table int32 [r size size] and whether the bin has it."""

    def along(bins, point):
        return bins.first + (point * bins.step)[:, None], point[:, None] < bins.count

    rows, has_row = along(bins[0], y)
    columns, has_column = along(bins[1], x)
    has = has_row[:, :, None] & has_column[:, None, :]
    return jnp.where(has, rows[:, :, None] + columns[:, None, :], 0), has


@jax.custom_vjp
def _pool(cells: jax.Array, pieces: Pieces, place: jax.Array) -> jax.Array:
    """cells [n c], r RoIs in pieces -> [r size size c]."""
    return _pool_and_find(cells, pieces, place)[0]


def _pool_and_find(cells: jax.Array, pieces: Pieces, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(largest features [r size size c], rows of the table int32 that they are in, n where there is none)."""
    n, c = cells.shape

    def pool_piece(piece):
        def look(t, best):
            value, row = best
            index, has = _cell(piece.rois, *piece.point(t))
            better = has[..., None] & (cells[index] > value)
            return jnp.where(better, cells[index], value), jnp.where(better, index[..., None], row)

        y, x = piece.rois
        empty = (y.count == 0)[:, :, None, None] | (x.count == 0)[:, None, :, None]
        value = jnp.where(empty, 0, jnp.finfo(cells.dtype).min).astype(cells.dtype)
        value, row = (jnp.broadcast_to(v, (*empty.shape[:3], c)) for v in (value, jnp.int32(n)))
        return jax.lax.fori_loop(0, piece.rounds, look, (value, row))

    return tuple(v.reshape(-1, *v.shape[2:])[place] for v in jax.lax.map(pool_piece, pieces))


def _pool_forward(cells, pieces, place):
    value, row = _pool_and_find(cells, pieces, place)
    return value, (cells, row)


def _pool_backward(residual, gradient):
    cells, row = residual

    def scatter_piece(total, inputs):
        row, gradient = inputs
        return total.at[row, jnp.arange(cells.shape[1])].add(gradient, mode="drop"), None

    inputs = in_pieces(row, fill=cells.shape[0]), in_pieces(gradient.astype(jnp.float32))
    total, _ = jax.lax.scan(scatter_piece, jnp.zeros(cells.shape, jnp.float32), inputs)
    return total.astype(cells.dtype), None, None


_pool.defvjp(_pool_forward, _pool_backward)
