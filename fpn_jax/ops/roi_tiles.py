"""RoIAlign by tiles of the maps, the way of TPUs: the same as `roi_align` does elsewhere, up to rounding."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from fpn_jax.ops.roi_points import corner_and_sides
from fpn_jax.ops.tiles import Windows, add_windows, calls, read_windows


def align_by_tiles(
    maps: Sequence[jax.Array],
    rois: jax.Array,
    position: jax.Array,
    scales: Sequence[float],
    windows: Sequence[Windows],
    aligned: bool,
) -> jax.Array:
    """Features of RoIs, [b r size size c], each from one of the maps [b h w c]: position int32 [b r] tells which.

    rois [b r 4] in pixels; of each map: scales, cells per pixel, and windows, all with as many bins. The sums are in
    float32; gradients flow to the maps only. What is no number reaches further than elsewhere: a cell all RoIs of its
    tile, see `ops.tiles`, and a RoI's gradient all cells of its tiles.
    """
    size = windows[0].size
    if position.size == 0:
        return jnp.zeros((*position.shape, size, size, maps[0].shape[-1]), maps[0].dtype)
    places = tuple(_places(rois, scale, size, aligned) for scale in scales)
    return _align(tuple(maps), places, position, tuple(windows))


def _places(rois: jax.Array, scale: float, size: int, aligned: bool) -> jax.Array:
    """Rois [b r 4] as windows of a map, see `read_windows`: float32 [b r 4]."""
    corner, sides = corner_and_sides(rois, jnp.float32(scale), aligned)
    sides /= size
    return jnp.stack([corner[..., 1], sides[..., 1], corner[..., 0], sides[..., 0]], -1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _align(
    maps: tuple[jax.Array, ...], places: tuple[jax.Array, ...], position: jax.Array, windows: tuple[Windows, ...]
) -> jax.Array:
    (b, r), c, size = position.shape, maps[0].shape[-1], windows[0].size
    found = {}
    for images, some in calls(b, r, [x.shape[1:3] for x in maps], windows):
        out = None  # each RoI is of one map, so that all of it is written in the end
        for i, (x, place, window) in enumerate(zip(maps, places, windows, strict=True)):
            out = read_windows(x[images], place[images, some], position[images, some] == i, window, out)
        found.setdefault(images.start, []).append(out.reshape(-1, *position[images, some].shape[1:], size**2, c))
    out = jnp.concatenate([jnp.concatenate(x, axis=1) for x in found.values()])
    return out.reshape(b, r, size, size, c)


def _align_forward(maps, places, position, windows):
    return _align(maps, places, position, windows), (maps, places, position)


def _align_backward(windows, residual, gradient):
    maps, places, position = residual
    (b, r), c = position.shape, gradient.shape[-1]
    gradient = gradient.reshape(b, r, -1, c)

    given = enumerate(zip(maps, places, windows, strict=True))
    return tuple(add_windows(gradient, at, position == i, x, m.shape[1:3], None) for i, (m, at, x) in given), None, None


_align.defvjp(_align_forward, _align_backward)
