"""Small squares of a pyramid's maps around chosen cells: what a head's convolutions read to answer for these alone."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.ops.platforms import by_platform
from fpn_jax.ops.tiles import Windows, add_windows


class Cells(NamedTuple):
    """Cells of a pyramid's maps, int32 [...] each."""

    position: jax.Array  # of the level among the pyramid's, in its order
    row: jax.Array
    column: jax.Array


class Patches(NamedTuple):
    """What lies around cells, k = 2 radius + 1 rows and columns of it."""

    values: jax.Array  # [b n k k c], 0 outside the map
    inside: jax.Array  # bool [b n k k], whether it is of the map


def take_patches(pyramid: Mapping[int, jax.Array], cells: Cells, radius: int) -> tuple[Patches, dict[int, jax.Array]]:
    """(the squares of maps {l: [b h w c]} that reach `radius` cells beyond `cells` [b n] on every side, the maps).

    The cells must lie in the maps. Gradients flow to the maps. Whoever reads them next should read the returned ones:
    the few rows of the squares' gradient are then added to the gradient of what was read later, in its own memory.
    Otherwise they become maps of zeros but for these rows, which are added to the others as a whole.
    """
    return _take(dict(pyramid), cells, radius)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take(pyramid: dict[int, jax.Array], cells: Cells, radius: int) -> tuple[Patches, dict[int, jax.Array]]:
    values, inside = jnp.zeros((), next(iter(pyramid.values())).dtype), jnp.array(False)
    for position, x in enumerate(pyramid.values()):
        here, at = _places(x.shape, position, cells, radius)
        table = jnp.asarray(x).reshape(-1, x.shape[-1])
        values = jnp.where(here[..., None], table.at[at].get(mode="promise_in_bounds"), values)
        inside |= here
    return Patches(_cells_first(values), _cells_first(inside)), pyramid


def _places(shape: tuple[int, ...], position: int, cells: Cells, radius: int) -> tuple[jax.Array, jax.Array]:
    """[k k b n] each: whether a cell of a patch is of the map of `shape`, and its row of the table, else any row.

    In this order, as a TPU fills its lanes with the last axis.
    """
    _, h, w, _ = shape
    steps = np.arange(-radius, radius + 1)[:, None, None]
    image = np.arange(cells.row.shape[0])[:, None]
    row, column = (cells.row + steps)[:, None], cells.column + steps
    here = (row >= 0) & (row < h) & (column >= 0) & (column < w) & (cells.position == position)
    return here, (image * h + jnp.where(here, row, 0)) * w + jnp.where(here, column, 0)


def _cells_first(x: jax.Array) -> jax.Array:
    """[k k b n ...] -> [b n k k ...]."""
    return jnp.moveaxis(x, (0, 1), (2, 3))


def _take_forward(
    pyramid: dict[int, jax.Array], cells: Cells, radius: int
) -> tuple[tuple[Patches, dict[int, jax.Array]], Cells]:
    return _take(pyramid, cells, radius), cells


def _take_backward(
    radius: int, cells: Cells, gradients: tuple[Patches, dict[int, jax.Array]]
) -> tuple[dict[int, jax.Array], None]:
    of_patches, of_maps = gradients
    forms = {
        "tpu": functools.partial(_add_by_tiles, radius=radius),
        "default": functools.partial(_add_rows, radius=radius),
    }
    return by_platform(of_maps, of_patches.values, cells, **forms), None


def _add_rows(maps: dict[int, jax.Array], values: jax.Array, cells: Cells, radius: int) -> dict[int, jax.Array]:
    """Maps {l: [b h w c]} with the patches `values` [b n k k c] added to them."""
    totals = {}
    for position, (level, x) in enumerate(maps.items()):
        here, at = map(_cells_first, _places(x.shape, position, cells, radius))
        added = jnp.where(here[..., None], values, jnp.zeros_like(values))
        rows = x.reshape(-1, x.shape[-1]).at[at].add(added, mode="promise_in_bounds")
        totals[level] = rows.reshape(x.shape)
    return totals


def _add_by_tiles(maps: dict[int, jax.Array], values: jax.Array, cells: Cells, radius: int) -> dict[int, jax.Array]:
    """As `_add_rows`: a patch is a window whose bins are cells."""
    (b, n, k), c = values.shape[:3], values.shape[-1]
    inside = [_places(x.shape, position, cells, radius)[0] for position, x in enumerate(maps.values())]
    inside = _cells_first(functools.reduce(jnp.logical_or, inside))
    values = jnp.where(inside[..., None], values, jnp.zeros_like(values)).reshape(b, n, k * k, c)
    row, column = (x.astype(jnp.float32) - radius - 0.5 for x in (cells.row, cells.column))
    places = jnp.stack([row, jnp.ones_like(row), column, jnp.ones_like(row)], -1)
    windows = Windows(k, 1, k * k)
    return {
        level: add_windows(values, places, cells.position == position, windows, x.shape[1:3], x)
        for position, (level, x) in enumerate(maps.items())
    }


_take.defvjp(_take_forward, _take_backward)
