"""Small squares of a pyramid's maps around chosen cells: what a head's convolutions read to answer for these alone."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.ops.platforms import by_platform


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

    def by_images(pyramid: dict[int, jax.Array], cells: Cells) -> tuple[Patches, dict[int, jax.Array]]:
        return _take(pyramid, cells, radius, (0, 1, 2))

    def by_cells(pyramid: dict[int, jax.Array], cells: Cells) -> tuple[Patches, dict[int, jax.Array]]:
        return _take(pyramid, cells, radius, (1, 2, 0))

    # A TPU keeps maps with the images next to the channels.
    return by_platform(dict(pyramid), cells, tpu=by_cells, default=by_images)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _take(
    pyramid: dict[int, jax.Array], cells: Cells, radius: int, order: tuple[int, int, int]
) -> tuple[Patches, dict[int, jax.Array]]:
    """`order`: of images, rows and columns in the table of cells that is read from; for speed alone."""
    values, inside = jnp.zeros((), next(iter(pyramid.values())).dtype), jnp.array(False)
    for position, x in enumerate(pyramid.values()):
        here, at = _places(x.shape, position, cells, radius, order)
        table = jnp.transpose(x, (*order, 3)).reshape(-1, x.shape[-1])
        values = jnp.where(here[..., None], table.at[at].get(mode="promise_in_bounds"), values)
        inside |= here
    return Patches(values, inside), pyramid


def _places(
    shape: tuple[int, ...], position: int, cells: Cells, radius: int, order: tuple[int, int, int]
) -> tuple[jax.Array, jax.Array]:
    """[b n k k] each: whether a cell of a patch is of the map of `shape`, and its row of the table, else any row."""
    b, h, w, _ = shape
    steps = np.arange(-radius, radius + 1)
    image = np.arange(cells.row.shape[0])[:, None, None, None]
    row = (cells.row[..., None] + steps)[..., :, None]
    column = (cells.column[..., None] + steps)[..., None, :]
    here = (row >= 0) & (row < h) & (column >= 0) & (column < w) & (cells.position == position)[..., None, None]
    places = ((image, b), (jnp.where(here, row, 0), h), (jnp.where(here, column, 0), w))
    at = jnp.int32(0)
    for axis in order:
        place, length = places[axis]
        at = at * length + place
    return here, at


def _take_forward(
    pyramid: dict[int, jax.Array], cells: Cells, radius: int, order: tuple[int, int, int]
) -> tuple[tuple[Patches, dict[int, jax.Array]], Cells]:
    return _take(pyramid, cells, radius, order), cells


def _take_backward(
    radius: int, order: tuple[int, int, int], cells: Cells, gradients: tuple[Patches, dict[int, jax.Array]]
) -> tuple[dict[int, jax.Array], None]:
    of_patches, of_maps = gradients
    totals = {}
    for position, (level, x) in enumerate(of_maps.items()):
        here, at = _places(x.shape, position, cells, radius, order)
        there = jnp.transpose(x, (*order, 3))
        added = jnp.where(here[..., None], of_patches.values, jnp.zeros_like(of_patches.values))
        rows = there.reshape(-1, x.shape[-1]).at[at].add(added, mode="promise_in_bounds")
        totals[level] = jnp.transpose(rows.reshape(there.shape), (*np.argsort(order).tolist(), 3))
    return totals, None


_take.defvjp(_take_forward, _take_backward)
