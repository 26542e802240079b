"""RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3) on one map and on a pyramid.

Both read their RoIs from one table of cells, so that a RoI costs the same whatever the number of levels; on a CPU the
largest level stays beside it, and on a TPU the pyramid's levels are read in tiles, see `roi_tiles`. Gradients flow to
the features only, as in torchvision and detectron2: the RoIs are constants.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.ops.boxes import area
from fpn_jax.ops.platforms import apart, by_platform
from fpn_jax.ops.roi_points import corner_and_sides, neighbours
from fpn_jax.ops.roi_tiles import align_by_tiles
from fpn_jax.ops.rounds import IMAGES, PIECES, Pieces, Table, in_pieces, map_table, pyramid_table, sort_into_pieces
from fpn_jax.ops.tiles import Windows


def roi_levels(
    boxes: jax.Array, levels: Sequence[int], k0: int = 4, canonical: float = 224.0, eps: float = 1e-6
) -> jax.Array:
    """The level of `levels` (ascending) that each box [... 4] (pixels) is read from, int32 [...].

    floor(k0 + log2(sqrt(area) / canonical) + eps), clamped to `levels`. Empty boxes belong to the lowest.
    Source: FPN, equation 1; eps as in torchvision.
    """
    # Compared with the area where each level begins: a logarithm is not exact at the boundaries on all devices.
    begins = np.float32([_begin(level, k0, canonical, eps) for level in levels[1:]])
    position = (area(boxes.astype(jnp.float32))[..., None] >= begins).sum(-1, dtype=jnp.int32)
    return jnp.asarray(levels, jnp.int32)[position]


def _begin(level: int, k0: int, canonical: float, eps: float) -> float:
    """Pixels of the smallest RoI that is read from `level`, unless that is the lowest."""
    return (canonical * 2.0 ** (level - k0 - eps)) ** 2


def roi_align(
    feature: jax.Array,
    rois: jax.Array,
    scale: float,
    size: int = 7,
    sampling_ratio: int = 2,
    aligned: bool = False,
) -> jax.Array:
    """Features of RoIs, [r size size c], from one map `feature` [h w c].

    rois [r 4] in pixels; scale: cells per pixel. Each RoI is cut into size x size bins; a bin's value is the mean of
    sampling_ratio x sampling_ratio points on a regular grid in it, bilinearly interpolated. A point more than one
    cell outside the map counts as 0, one nearer takes the border's value. sampling_ratio 0 (or below) is adaptive:
    ceil(side of the bin in cells) points along each axis, different for each RoI; RoIs must then be finite.
    aligned False (torchvision's models) stretches RoIs to at least one cell; True (detectron2's) shifts them by half a
    cell, so that a cell's value sits at its centre.
    """
    cells, table = map_table(feature, rois.shape[0], scale)
    return _align_images((cells,), rois[None], table, size, sampling_ratio, aligned)[0]


def multilevel_roi_align(
    pyramid: Mapping[int, jax.Array],
    rois: jax.Array,
    size: int = 7,
    sampling_ratio: int = 2,
    aligned: bool = False,
    k0: int = 4,
    canonical: float = 224.0,
    eps: float = 1e-6,
) -> jax.Array:
    """Features of RoIs, [b r size size c], each from the level of the pyramid {l: [b h w c]} that `roi_levels` names.

    rois [b r 4] in pixels; a cell of level l is 2**l pixels wide. The rest as for `roi_align` and `roi_levels`. Of a
    batch on several TPUs call it inside of `shard_map`: its kernels are not split up by themselves.
    """
    levels = sorted(pyramid)

    def by_cells(pyramid, rois, level):
        parts, table = pyramid_table(pyramid, level)
        return _align_images((jnp.concatenate(parts, axis=1),), rois, table, size, sampling_ratio, aligned, pieces=1)

    def by_levels(pyramid, rois, level):  # the gradient of each level is an array of its own from the first
        parts, table = pyramid_table(pyramid, level)
        return _align_images(parts, rois, table, size, sampling_ratio, aligned)

    def by_tiles(pyramid, rois, level):
        position = jnp.searchsorted(np.int32(levels), level, method="compare_all")
        ends = [*(_begin(x, k0, canonical, eps) for x in levels[1:]), np.inf]
        areas = [end / 4.0**x for x, end in zip(levels, ends, strict=True)]
        if aligned:
            areas[0] = np.inf  # where those are read whose sides are below 0, of any length
        windows = [Windows(size, sampling_ratio, x) for x in areas]
        scales = [2.0**-x for x in levels]
        return align_by_tiles([pyramid[x] for x in levels], rois, position, scales, windows, aligned)

    given = pyramid, rois, roi_levels(rois, levels, k0, canonical, eps)
    if sampling_ratio <= 0:
        return by_cells(*given)
    return by_platform(*given, cpu=by_levels, tpu=by_tiles, default=by_cells)


def _align_images(
    parts: tuple[jax.Array, ...],
    rois: jax.Array,
    table: Table,
    size: int,
    sampling_ratio: int,
    aligned: bool,
    pieces: int = PIECES,
) -> jax.Array:
    """Parts of the table [b n c], rois [b r 4] in pixels -> [b r size size c].

    pieces: in which the gradient of a fixed number of points is scattered.
    """
    axes = jax.vmap(lambda rois, table: _points(rois, table, size, sampling_ratio, aligned))(rois, table)
    if sampling_ratio > 0:
        return jax.vmap(lambda parts, axes: _align(parts, axes, size, sampling_ratio, pieces))(parts, axes)
    return _align_adaptive(jnp.concatenate(parts, axis=1), axes, size)


class _Axis(NamedTuple):
    """The sampling points of each RoI along one axis, in cells; all [r]."""

    start: jax.Array  # float32
    bin: jax.Array  # float32, side of a bin
    points: jax.Array  # float32, points per bin
    length: jax.Array  # int32, of the map
    stride: jax.Array  # int32, rows of the table from one cell to the next
    offset: jax.Array  # int32, row of the table of cell 0


def _points(rois: jax.Array, table: Table, size: int, sampling_ratio: int, aligned: bool) -> tuple[_Axis, _Axis]:
    """The (vertical, horizontal) sampling points of rois [r 4], table of [r]."""
    corner, sides = corner_and_sides(rois, table.scale, aligned)
    bins = sides / size
    points = jnp.full_like(bins, sampling_ratio)
    if sampling_ratio <= 0:  # compilers divide by multiplying with 1 / size, which may end just above a whole number
        points = jnp.ceil(bins)
        points = jnp.where(points > 0, points - ((points - 1) * size >= sides), 0)
    y = _Axis(corner[:, 1], bins[:, 1], points[:, 1], table.height, table.width, table.start)
    x = _Axis(corner[:, 0], bins[:, 0], points[:, 0], table.width, jnp.ones_like(table.width), 0 * table.start)
    return y, x


def _neighbours(axis: _Axis, point: int | jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The two cells beside the point-th point of each bin: rows of the table int32 [r size 2], weights [r size 2].

    point: one number for all RoIs, or one of each [r].
    """
    start, side, points, length, stride, offset = (x[:, None] for x in axis)
    point = jnp.reshape(point, (-1, 1))
    both = neighbours(start, side, points, length, jnp.arange(size, dtype=jnp.float32), point)
    cells, weights = (jnp.stack(x, axis=-1) for x in both)
    return offset[..., None] + cells * stride[..., None], weights


def _taps(axes: tuple[_Axis, _Axis], y: int | jax.Array, x: int | jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The four cells around point (y, x) of each bin: rows of the table int32 [4 r size size], weights likewise."""
    rows, row_weights = _neighbours(axes[0], y, size)
    columns, column_weights = _neighbours(axes[1], x, size)
    cells = rows[:, :, None, :, None] + columns[:, None, :, None, :]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    r = cells.shape[0]
    return tuple(jnp.moveaxis(v.reshape(r, size, size, 4), -1, 0) for v in (cells, weights))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _align(
    parts: tuple[jax.Array, ...], axes: tuple[_Axis, _Axis], size: int, sampling_ratio: int, pieces: int
) -> jax.Array:
    """Parts of the table [n c], points of r RoIs -> [r size size c], summed in float32."""

    def plain(parts: tuple[jax.Array, ...], axes: tuple[_Axis, _Axis]) -> jax.Array:
        return _sum_points(parts, axes, size, sampling_ratio)

    def on_cpu(parts: tuple[jax.Array, ...], axes: tuple[_Axis, _Axis]) -> jax.Array:
        # RoIs are read from the largest part and from all others: to copy that into a table with these takes longer.
        two = parts if len(parts) < 3 else (parts[0], jnp.concatenate(parts[1:]))
        return _sum_points_apart(two, axes, size, sampling_ratio)

    return by_platform(parts, axes, cpu=on_cpu, default=plain)


def _sum_points(parts: tuple[jax.Array, ...], axes: tuple[_Axis, _Axis], size: int, sampling_ratio: int) -> jax.Array:
    """Each part is read for all RoIs, and what it has for those of other parts is not taken."""
    out = 0
    for start, cells in zip(_starts(parts), parts, strict=True):
        mine = (axes[0].offset >= start) & (axes[0].offset < start + len(cells))
        own = _sum_points_of(cells, _in_part(axes, mine, start), size, sampling_ratio)
        out = jnp.where(mine[:, None, None, None], own, out)
    return out


def _in_part(axes: tuple[_Axis, _Axis], mine: jax.Array, start: int) -> tuple[_Axis, _Axis]:
    """The points of RoIs that are `mine` bool [r] in the table's part that begins at row `start`.

    The others are sent to a map of a single cell, the part's first.
    """
    y, x = (axis._replace(length=jnp.where(mine, axis.length, 1)) for axis in axes)
    return y._replace(offset=jnp.where(mine, y.offset - start, 0)), x


def _starts(parts: Sequence[jax.Array]) -> list[int]:
    """The row of the table that each part begins at."""
    return [0, *np.cumsum([len(part) for part in parts[:-1]], dtype=np.int32)]


def _sum_points_of(cells: jax.Array, axes: tuple[_Axis, _Axis], size: int, sampling_ratio: int) -> jax.Array:
    out = jnp.zeros((axes[0].start.shape[0], size, size, cells.shape[1]), jnp.float32)
    for y, x in product(range(sampling_ratio), repeat=2):
        out = _add_point(out, cells, axes, y, x)
    return out.astype(cells.dtype)


_sum_points_apart = apart(_sum_points, (2, 3))


def _add_point(out: jax.Array, cells: jax.Array, axes: tuple[_Axis, _Axis], y: Any, x: Any) -> jax.Array:
    for index, weight in zip(*_taps(axes, y, x, out.shape[1]), strict=True):
        out += weight[..., None] * cells[index].astype(jnp.float32)
    return out


def _scatter_point(
    totals: tuple[jax.Array, ...], gradient: jax.Array, axes: tuple[_Axis, _Axis], y: Any, x: Any
) -> tuple[jax.Array, ...]:
    """Add what point (y, x) of each bin passes back, gradient [r size size c], to totals, each [n c] of a part."""
    index, weight = _taps(axes, y, x, gradient.shape[1])
    own = weight[..., None] * gradient
    if len(totals) == 1:
        return (totals[0].at[index].add(own, mode="promise_in_bounds"),)
    # Unsigned, so that cells of parts before lie beyond the end as well, and are dropped.
    places = ((index - start).astype(jnp.uint32) for start in _starts(totals))
    return tuple(total.at[place].add(own, mode="drop") for total, place in zip(totals, places, strict=True))


def _align_forward(parts, axes, size, sampling_ratio, pieces):
    return _align(parts, axes, size, sampling_ratio, pieces), (parts, axes)


def _align_backward(size, sampling_ratio, pieces, residual, gradient):
    parts, axes = residual

    def scatter_piece(totals, inputs):
        axes, gradient = inputs
        for y, x in product(range(sampling_ratio), repeat=2):
            totals = _scatter_point(totals, gradient, axes, y, x)
        return totals, None

    given = axes, gradient.astype(jnp.float32)
    inputs = jax.tree.map(lambda x: in_pieces(x, pieces=pieces), given)  # where no RoI is, no gradient either
    totals, _ = jax.lax.scan(scatter_piece, tuple(jnp.zeros(x.shape, jnp.float32) for x in parts), inputs)
    return tuple(total.astype(x.dtype) for total, x in zip(totals, parts, strict=True)), None


_align.defvjp(_align_forward, _align_backward)


def _align_adaptive(cells: jax.Array, axes: tuple[_Axis, _Axis], size: int) -> jax.Array:
    """cells [b n c], points of r RoIs in each image, different ones for each -> [b r size size c]."""
    b, r = axes[0].start.shape
    if r == 0:
        return jnp.zeros((b, 0, size, size, cells.shape[-1]), cells.dtype)
    pieces, place = sort_into_pieces(axes, axes[0].points, axes[1].points)
    align = jax.vmap(lambda cells, pieces, place: _align_pieces(cells, pieces, place, size), in_axes=(0, IMAGES, 0))
    return align(cells, pieces, place)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _align_pieces(cells: jax.Array, pieces: Pieces, place: jax.Array, size: int) -> jax.Array:
    """As `_align`, for RoIs in pieces."""

    def align_piece(piece):
        def add(t, out):
            return _add_point(out, cells, piece.rois, *piece.point(t))

        out = jnp.zeros((*piece.source.shape, size, size, cells.shape[1]), jnp.float32)
        return jax.lax.fori_loop(0, piece.rounds, add, out)

    out = jax.lax.map(align_piece, pieces)
    return out.reshape(-1, *out.shape[2:])[place].astype(cells.dtype)


def _pieces_forward(cells, pieces, place, size):
    return _align_pieces(cells, pieces, place, size), (cells, pieces)


def _pieces_backward(size, residual, gradient):
    cells, pieces = residual
    gradient = jnp.pad(gradient.astype(jnp.float32), ((0, 1), (0, 0), (0, 0), (0, 0)))  # no RoI, no gradient

    def scatter_piece(total, piece):
        own = gradient[piece.source]

        def scatter(t, total):
            return _scatter_point((total,), own, piece.rois, *piece.point(t))[0]

        return jax.lax.fori_loop(0, piece.rounds, scatter, total), None

    total, _ = jax.lax.scan(scatter_piece, jnp.zeros(cells.shape, jnp.float32), pieces)
    return total.astype(cells.dtype), None, None


_align_pieces.defvjp(_pieces_forward, _pieces_backward)
