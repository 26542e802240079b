"""Small squares of a pyramid's maps around chosen cells: what a head's convolutions read to answer for these alone."""

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


def take_patches(pyramid: Mapping[int, jax.Array], cells: Cells, radius: int) -> Patches:
    """The squares of maps {l: [b h w c]} that reach `radius` cells beyond `cells` [b n] on every side.

    Gradients flow to the maps. The cells must lie in them.
    """

    def by_images(pyramid: Mapping[int, jax.Array], cells: Cells) -> Patches:
        return _take(pyramid, cells, radius, (0, 1, 2))

    def by_cells(pyramid: Mapping[int, jax.Array], cells: Cells) -> Patches:
        return _take(pyramid, cells, radius, (1, 2, 0))

    # A TPU keeps maps with the images next to the channels.
    return by_platform(dict(pyramid), cells, tpu=by_cells, default=by_images)


def _take(pyramid: Mapping[int, jax.Array], cells: Cells, radius: int, order: tuple[int, int, int]) -> Patches:
    """`order`: of images, rows and columns in the table of cells that is read from; for speed alone."""
    steps = np.arange(-radius, radius + 1)
    image = np.arange(cells.row.shape[0])[:, None, None, None]
    row = (cells.row[..., None] + steps)[..., :, None]
    column = (cells.column[..., None] + steps)[..., None, :]
    values, inside = jnp.zeros((), next(iter(pyramid.values())).dtype), jnp.array(False)
    for position, x in enumerate(pyramid.values()):
        b, h, w, c = x.shape
        here = (row >= 0) & (row < h) & (column >= 0) & (column < w)
        here &= (cells.position == position)[..., None, None]
        places = ((image, b), (jnp.where(here, row, 0), h), (jnp.where(here, column, 0), w))
        at = jnp.int32(0)
        for axis in order:
            place, length = places[axis]
            at = at * length + place
        table = jnp.transpose(x, (*order, 3)).reshape(-1, c)
        values = jnp.where(here[..., None], table.at[at].get(mode="promise_in_bounds"), values)
        inside |= here
    return Patches(values, inside)
