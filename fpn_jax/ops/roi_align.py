"""RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3) on one map and on a pyramid.

Both read their RoIs from one table of cells, so that a RoI costs the same whatever the number of levels. Gradients
flow to the features only, as in torchvision and detectron2: the RoIs are constants.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.ops.boxes import area

# The gradient is scattered in so many pieces, and RoIs of unlike sizes are sorted into so many. On a CPU a piece then
# stays in the cache (four times as fast as all at once, and one piece for each RoI is no faster); on an accelerator the
# memory for a gigabyte of updates is saved.
PIECES = 32


def roi_levels(
    boxes: jax.Array, levels: Sequence[int], k0: int = 4, canonical: float = 224.0, eps: float = 1e-6
) -> jax.Array:
    """The level of `levels` (ascending) that each box [... 4] (pixels) is read from, int32 [...].

    floor(k0 + log2(sqrt(area) / canonical) + eps), clamped to `levels`. Empty boxes belong to the lowest.
    Source: FPN, equation 1; eps as in torchvision.
    """
    return jnp.asarray(levels, jnp.int32)[_position(boxes, levels, k0, canonical, eps)]


def _position(boxes: jax.Array, levels: Sequence[int], k0: int, canonical: float, eps: float) -> jax.Array:
    # Compared with the area where each level begins: a logarithm is not exact at the boundaries on all devices.
    begins = np.float32([(canonical * 2.0 ** (level - k0 - eps)) ** 2 for level in levels[1:]])
    return (area(boxes.astype(jnp.float32))[..., None] >= begins).sum(-1, dtype=jnp.int32)


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
    h, w, c = feature.shape
    table = _Table(*(jnp.full(rois.shape[0], x, jnp.int32) for x in (0, h, w)), jnp.float32(scale))
    axes = _points(rois, table, size, sampling_ratio, aligned)
    cells = jnp.asarray(feature).reshape(1, h * w, c)
    return _align_images(cells, jax.tree.map(lambda x: x[None], axes), size, sampling_ratio)[0]


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

    rois [b r 4] in pixels; a cell of level l is 2**l pixels wide. The rest as for `roi_align` and `roi_levels`.
    """
    levels = sorted(pyramid)
    heights, widths = (np.int32([pyramid[level].shape[axis] for level in levels]) for axis in (1, 2))
    starts = np.cumsum(heights * widths, dtype=np.int32) - heights * widths
    scales = np.float32([2.0**-level for level in levels])
    cells = jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in map(pyramid.get, levels)], axis=1)

    def points(rois):
        position = _position(rois, levels, k0, canonical, eps)
        table = _Table(*(jnp.asarray(x)[position] for x in (starts, heights, widths, scales)))
        return _points(rois, table, size, sampling_ratio, aligned)

    return _align_images(cells, jax.vmap(points)(rois), size, sampling_ratio)


def _align_images(cells: jax.Array, axes: "tuple[_Axis, _Axis]", size: int, sampling_ratio: int) -> jax.Array:
    """cells [b n c], points of r RoIs in each image -> [b r size size c]."""
    if sampling_ratio > 0:
        return jax.vmap(lambda cells, axes: _align(cells, axes, size, sampling_ratio))(cells, axes)
    return _align_adaptive(cells, axes, size)


class _Table(NamedTuple):
    """Where the map of each RoI lies in the table of cells."""

    start: jax.Array  # int32 [r], row of the map's first cell
    height: jax.Array  # int32 [r]
    width: jax.Array  # int32 [r]
    scale: jax.Array  # float32 [r] or [], cells per pixel


class _Axis(NamedTuple):
    """The sampling points of each RoI along one axis, in cells; all [r]."""

    start: jax.Array  # float32
    bin: jax.Array  # float32, side of a bin
    points: jax.Array  # float32, points per bin
    length: jax.Array  # int32, of the map
    stride: jax.Array  # int32, rows of the table from one cell to the next
    offset: jax.Array  # int32, row of the table of cell 0


def _points(rois: jax.Array, table: _Table, size: int, sampling_ratio: int, aligned: bool) -> tuple[_Axis, _Axis]:
    """The (vertical, horizontal) sampling points of rois [r 4]."""
    corners = rois.astype(jnp.float32) * table.scale[..., None] - (0.5 if aligned else 0.0)
    sides = corners[:, 2:] - corners[:, :2]
    if not aligned:
        sides = jnp.maximum(sides, 1)
    bins = sides / size
    points = jnp.full_like(bins, sampling_ratio)
    if sampling_ratio <= 0:  # compilers divide by multiplying with 1 / size, which may end just above a whole number
        points = jnp.ceil(bins)
        points = jnp.where(points > 0, points - ((points - 1) * size >= sides), 0)
    y = _Axis(corners[:, 1], bins[:, 1], points[:, 1], table.height, table.width, table.start)
    x = _Axis(corners[:, 0], bins[:, 0], points[:, 0], table.width, jnp.ones_like(table.width), 0 * table.start)
    return y, x


def _neighbours(axis: _Axis, point: int | jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The two cells beside the point-th point of each bin: rows of the table int32 [r size 2], weights [r size 2].

    point: one number for all RoIs, or one of each [r].
    """
    start, side, points, length, stride, offset = (x[:, None] for x in axis)
    point = jnp.reshape(point, (-1, 1))
    at = start + jnp.arange(size, dtype=jnp.float32) * side + (point + 0.5) * side / jnp.maximum(points, 1)
    counts = (at >= -1) & (at <= length) & (point < points)
    at = jnp.where(counts, jnp.clip(at, 0, length - 1), 0)  # also where `at` is NaN: the cells must be in the table
    low = jnp.floor(at)
    weights = jnp.stack([1 - (at - low), at - low], axis=-1) * (counts / jnp.maximum(points, 1))[..., None]
    low = low.astype(jnp.int32)
    cells = jnp.stack([low, jnp.minimum(low + 1, length - 1)], axis=-1)
    return offset[..., None] + cells * stride[..., None], weights


def _taps(axes: tuple[_Axis, _Axis], y: int | jax.Array, x: int | jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The four cells around point (y, x) of each bin: rows of the table int32 [4 r size size], weights likewise."""
    rows, row_weights = _neighbours(axes[0], y, size)
    columns, column_weights = _neighbours(axes[1], x, size)
    cells = rows[:, :, None, :, None] + columns[:, None, :, None, :]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    r = cells.shape[0]
    return tuple(jnp.moveaxis(v.reshape(r, size, size, 4), -1, 0) for v in (cells, weights))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _align(cells: jax.Array, axes: tuple[_Axis, _Axis], size: int, sampling_ratio: int) -> jax.Array:
    """cells [n c], points of r RoIs -> [r size size c], summed in float32."""
    out = jnp.zeros((axes[0].start.shape[0], size, size, cells.shape[1]), jnp.float32)
    for y, x in product(range(sampling_ratio), repeat=2):
        out = _add_point(out, cells, axes, y, x)
    return out.astype(cells.dtype)


def _add_point(out: jax.Array, cells: jax.Array, axes: tuple[_Axis, _Axis], y: Any, x: Any) -> jax.Array:
    for index, weight in zip(*_taps(axes, y, x, out.shape[1]), strict=True):
        out += weight[..., None] * cells[index].astype(jnp.float32)
    return out


def _scatter_point(total: jax.Array, gradient: jax.Array, axes: tuple[_Axis, _Axis], y: Any, x: Any) -> jax.Array:
    """Add what point (y, x) of each bin passes back, gradient [r size size c], to total [n c]."""
    index, weight = _taps(axes, y, x, gradient.shape[1])
    return total.at[index].add(weight[..., None] * gradient, mode="promise_in_bounds")


def _align_forward(cells, axes, size, sampling_ratio):
    return _align(cells, axes, size, sampling_ratio), (cells, axes)


def _align_backward(size, sampling_ratio, residual, gradient):
    cells, axes = residual
    pieces, piece = _cut(gradient.shape[0])

    def cut(x):  # padding RoIs have no gradient to scatter
        padding = [(0, pieces * piece - len(x))] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(pieces, piece, *x.shape[1:])

    def scatter_piece(total, inputs):
        axes, gradient = inputs
        for y, x in product(range(sampling_ratio), repeat=2):
            total = _scatter_point(total, gradient, axes, y, x)
        return total, None

    inputs = jax.tree.map(cut, (axes, gradient.astype(jnp.float32)))
    total, _ = jax.lax.scan(scatter_piece, jnp.zeros(cells.shape, jnp.float32), inputs)
    return total.astype(cells.dtype), None


_align.defvjp(_align_forward, _align_backward)


def _cut(r: int) -> tuple[int, int]:
    """(number of pieces, RoIs in each) for r RoIs."""
    piece = max(-(-r // PIECES), 1)
    return -(-r // piece), piece


class _Rounds(NamedTuple):
    """The order in which RoIs of different numbers of points are worked through, one point of one piece a round.

    A piece holds RoIs of about equally many points, so that few of them wait for others. All images take the same
    rounds: under `vmap` a loop with a bound of each image's own would copy all that it carries in every round.
    """

    axes: tuple[_Axis, _Axis]  # of the RoIs, in pieces [b pieces piece]
    source: jax.Array  # int32 [b pieces piece], the RoI at each place; r where there is none
    place: jax.Array  # int32 [b r], where each RoI is, counted through the pieces
    first: jax.Array  # int32 [pieces + 1], the round in which each piece begins, and the number of rounds


def _rounds(axes: tuple[_Axis, _Axis]) -> _Rounds:
    """axes: of [b r]."""
    b, r = axes[0].start.shape
    pieces, piece = _cut(r)
    order = jnp.argsort(-axes[0].points * axes[1].points, axis=1, stable=True).astype(jnp.int32)

    def cut(x, fill=0):
        padding = ((0, 0), (0, pieces * piece - r))
        return jnp.pad(x, padding, constant_values=fill).reshape(b, pieces, piece)

    axes = jax.tree.map(lambda x: cut(jnp.take_along_axis(x, order, 1)), axes)
    most = (axes[0].points * axes[1].points).max((0, 2)).astype(jnp.int32)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(most, dtype=jnp.int32)])
    return _Rounds(axes, cut(order, r), jnp.argsort(order, axis=1).astype(jnp.int32), first)


def _align_adaptive(cells: jax.Array, axes: tuple[_Axis, _Axis], size: int) -> jax.Array:
    """cells [b n c], points of r RoIs in each image, different ones for each -> [b r size size c]."""
    b, r = axes[0].start.shape
    if r == 0:
        return jnp.zeros((b, 0, size, size, cells.shape[-1]), cells.dtype)
    rounds = _rounds(axes)
    batched = _Rounds(axes=0, source=0, place=0, first=None)
    return jax.vmap(lambda cells, rounds: _align_rounds(cells, rounds, size), in_axes=(0, batched))(cells, rounds)


def _round(rounds: _Rounds, t: jax.Array) -> tuple[jax.Array, tuple[_Axis, _Axis], jax.Array, jax.Array]:
    """What round t does: (piece, its axes, row and column [piece] of the point in the bin of each RoI)."""
    piece = jnp.searchsorted(rounds.first, t, side="right") - 1
    axes = jax.tree.map(lambda x: x[piece], rounds.axes)
    columns = jnp.maximum(axes[1].points, 1).astype(jnp.int32)
    point = t - rounds.first[piece]
    return piece, axes, point // columns, point % columns  # a row beyond a RoI's own weighs nothing


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _align_rounds(cells: jax.Array, rounds: _Rounds, size: int) -> jax.Array:
    """As `_align`, for RoIs in pieces."""

    def add(t, out):
        piece, axes, y, x = _round(rounds, t)
        return out.at[piece].set(_add_point(out[piece], cells, axes, y, x))

    out = jnp.zeros((*rounds.source.shape, size, size, cells.shape[1]), jnp.float32)
    out = jax.lax.fori_loop(0, rounds.first[-1], add, out)
    return out.reshape(-1, *out.shape[2:])[rounds.place].astype(cells.dtype)


def _rounds_forward(cells, rounds, size):
    return _align_rounds(cells, rounds, size), (cells, rounds)


def _rounds_backward(size, residual, gradient):
    cells, rounds = residual
    gradient = jnp.pad(gradient.astype(jnp.float32), ((0, 1), (0, 0), (0, 0), (0, 0)))  # no RoI, no gradient

    def scatter(t, total):
        piece, axes, y, x = _round(rounds, t)
        return _scatter_point(total, gradient[rounds.source[piece]], axes, y, x)

    total = jax.lax.fori_loop(0, rounds.first[-1], scatter, jnp.zeros(cells.shape, jnp.float32))
    return total.astype(cells.dtype), None


_align_rounds.defvjp(_rounds_forward, _rounds_backward)
