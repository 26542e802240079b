"""RoIAlign as products of matrices, the way of TPUs: the same as `roi_align` does elsewhere, up to rounding.

A bin is a weighted sum of 4 * sampling_ratio**2 cells, its taps. A TPU's vector units take long for such sums over many
arrays in memory; its matrix units take no time to speak of for [bins taps] @ [taps channels] for each RoI, though
nearly all of the first matrix is zeros (benchmarks/LOG.md).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.ops.roi_points import corner_and_sides, neighbours

# RoIs worked through at a time. What they read, and what they add to the gradient, then stays on a v5e's chip: 25 and
# 51 MB of its 128 at 256 channels and 784 taps.
PIECE = 64
_SUBLANES = 8  # rows of a tile of float32


class Sampling(NamedTuple):
    """What is the same for all RoIs."""

    scales: tuple[float, ...]  # cells per pixel of each map
    size: int
    ratio: int  # points along each side of a bin, > 0
    aligned: bool


class _Pieces(NamedTuple):
    """RoIs in pieces, the RoIs of one piece being read from the same map."""

    source: jax.Array  # int32 [pieces piece], the RoI at each place; n where there is none
    place: jax.Array  # int32 [n], where each RoI is, counted through the pieces
    begins: jax.Array  # int32 [maps], first piece of each map
    ends: jax.Array  # int32 [maps], the piece after its last


def align_by_products(maps: Sequence[jax.Array], rois: jax.Array, position: jax.Array, sampling: Sampling) -> jax.Array:
    """Features of RoIs, [b r size size c], each from one of the maps [b h w c]: position int32 [b r] tells which.

    rois [b r 4] in pixels. The sums are in float32; gradients flow to the maps only.
    """
    if position.size == 0:
        return jnp.zeros((*position.shape, sampling.size, sampling.size, maps[0].shape[-1]), maps[0].dtype)
    return _align(tuple(maps), rois, position, sampling)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _align(maps: tuple[jax.Array, ...], rois: jax.Array, position: jax.Array, sampling: Sampling) -> jax.Array:
    shapes, c, dtype = [x.shape for x in maps], maps[0].shape[-1], maps[0].dtype
    rows = [_rows(x) for x in maps]
    pieces = _pieces(position.reshape(-1), len(maps))

    def align_piece(_, piece):
        index, source = piece
        source = jnp.minimum(source, position.size - 1)  # where there is none, any: nobody reads what becomes of it
        cells, weights = _taps(shapes, index, source, rois, sampling)
        read = [lambda at, x=x: x.at[at].get(mode="promise_in_bounds") for x in rows]
        values = jax.lax.switch(index, read, cells.reshape(-1)).reshape(*cells.shape, c)
        parts, bins = _parts(weights, dtype), sampling.size**2
        apart = -(-bins // _SUBLANES) * _SUBLANES
        # One product reads the values once. The sum of its parts is cheap if they begin with whole tiles.
        out = _product("pot,ptc->poc", _matrix(parts, sampling.size, apart), values)
        out = sum(out[:, i * apart : i * apart + bins] for i in range(len(parts)))
        return None, out.astype(dtype).reshape(len(source), -1)

    index = (jnp.arange(len(pieces.source))[:, None] >= pieces.ends[:-1]).sum(1, dtype=jnp.int32)
    _, out = jax.lax.scan(align_piece, None, (index, pieces.source))
    return out.reshape(-1, out.shape[-1])[pieces.place].reshape(*position.shape, sampling.size, sampling.size, c)


def _align_forward(maps, rois, position, sampling):
    return _align(maps, rois, position, sampling), (maps, rois, position)


def _align_backward(sampling, residual, gradient):
    maps, rois, position = residual
    shapes, c, dtype = [x.shape for x in maps], gradient.shape[-1], gradient.dtype
    pieces = _pieces(position.reshape(-1), len(maps))
    gradient = gradient.reshape(position.size, -1)

    def add_piece(index, total, k):
        source = pieces.source[k]
        there, source = source < position.size, jnp.minimum(source, position.size - 1)
        cells, weights = _taps(shapes, index, source, rois, sampling)
        parts = _parts(weights * there[:, None], dtype)
        own = jnp.concatenate([gradient[source].reshape(len(source), -1, c)] * len(parts), 1)
        added = _product("pot,poc->ptc", _matrix(parts, sampling.size, sampling.size**2), own).reshape(-1, c)
        rows = total.reshape(-1, c).at[cells.reshape(-1)].add(added, mode="promise_in_bounds")
        return rows.reshape(total.shape)

    # A loop for each map: a `switch` in one over all pieces would copy the totals of the maps that it leaves alone.
    gradients = []
    for i, (x, begin, end) in enumerate(zip(maps, pieces.begins, pieces.ends, strict=True)):
        b, h, w, _ = x.shape
        # In the order of `_rows`, but with all axes: only so is it rounded by what reads it.
        total = jnp.zeros((h, w, b, c), jnp.float32)
        total = jax.lax.fori_loop(begin, end, lambda k, total, i=i: add_piece(i, total, k), total)
        gradients.append(total.transpose(2, 0, 1, 3).astype(x.dtype))
    return tuple(gradients), None, None


_align.defvjp(_align_forward, _align_backward)


def _rows(x: jax.Array) -> jax.Array:
    """x [b h w c] -> [h*w*b c]: a TPU keeps maps with the images next to the channels, so that nothing is moved."""
    return x.transpose(1, 2, 0, 3).reshape(-1, x.shape[-1])


def _pieces(position: jax.Array, maps: int) -> _Pieces:
    """position int32 [n] of each RoI's map -> its pieces, of which there are enough however the RoIs are spread."""
    n = len(position)
    pieces = -(-n // PIECE) + maps - 1
    mine = position == jnp.arange(maps, dtype=jnp.int32)[:, None]
    rank = jnp.cumsum(mine, axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(-(-rank[:, -1] // PIECE), dtype=jnp.int32)
    begins = jnp.pad(ends, (1, 0))[:-1]
    place = jnp.where(mine, begins[:, None] * PIECE + rank - 1, 0).sum(0, dtype=jnp.int32)
    source = jnp.full(pieces * PIECE, n, jnp.int32).at[place].set(jnp.arange(n, dtype=jnp.int32))
    return _Pieces(source.reshape(pieces, PIECE), place, begins, ends)


def _taps(
    shapes: Sequence[tuple[int, ...]], index: jax.Array, source: jax.Array, rois: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Taps of the RoIs `source` [p] in the index-th map: rows of it uint32 [p taps], weights float32 [p taps].

    The taps of a bin follow each other, bins in the order of their rows.
    """
    b, r, _ = rois.shape
    height, width = (jnp.asarray(np.int32([shape[axis] for shape in shapes]))[index] for axis in (1, 2))
    scale = jnp.asarray(np.float32(sampling.scales))[index]
    corner, sides = corner_and_sides(rois.reshape(-1, 4)[source], scale, sampling.aligned)
    bins, ratio = range(sampling.size), range(sampling.ratio)
    grid = np.meshgrid(bins, bins, ratio, range(2), ratio, range(2), indexing="ij")
    bin_y, bin_x, point_y, high_y, point_x, high_x = (x.reshape(-1) for x in grid)

    def along(axis, length, bin, point, high):
        start, side = (x[:, axis, None] for x in (corner, sides / sampling.size))
        cells, weights = neighbours(start, side, sampling.ratio, length, np.float32(bin), np.float32(point))
        return (jnp.where(high, *reversed(x)) for x in (cells, weights))

    y, weights_y = along(1, height, bin_y, point_y, high_y == 1)
    x, weights_x = along(0, width, bin_x, point_x, high_x == 1)
    cells = (y * width + x) * b + jax.lax.div(source, jnp.int32(r))[:, None]
    return cells.astype(jnp.uint32), weights_y * weights_x  # unsigned: nothing looks for indices from the end


def _parts(weights: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """Float32 weights as a sum of arrays of `dtype`: in itself, or rounded and what the rounding took."""
    rounded = weights.astype(dtype)
    return [rounded] if dtype == jnp.float32 else [rounded, (weights - rounded.astype(jnp.float32)).astype(dtype)]


def _matrix(parts: Sequence[jax.Array], size: int, apart: int) -> jax.Array:
    """Parts of the weights, each [p taps] -> [p parts*apart taps], which are 0 but for the taps of the row's bin.

    apart: rows from one part to the next, at least size * size, of which each part uses the first.
    """
    bins, taps = size**2, parts[0].shape[1]
    matrix = jnp.zeros((), parts[0].dtype)
    for i, part in enumerate(parts):
        own = i * apart + np.arange(taps) // (taps // bins) == np.arange(len(parts) * apart)[:, None]
        matrix = jnp.where(own, part[:, None], matrix)
    return matrix


def _product(axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(axes, a, b, precision="highest", preferred_element_type=jnp.float32)
