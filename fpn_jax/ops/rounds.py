"""What RoIAlign and RoI pooling share: one table with the cells of all levels, and the pieces in which RoIs of
different sizes are worked through, one point of a bin a round."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# RoIs of unlike sizes are sorted into so many pieces, and on a CPU a gradient is scattered in so many: a piece then
# stays in the cache (four times as fast as all at once, and one piece for each RoI is no faster).
PIECES = 32


class Table(NamedTuple):
    """Where the map of each RoI lies in the table of cells; all [b r]."""

    start: jax.Array  # int32, row of the map's first cell
    height: jax.Array  # int32
    width: jax.Array  # int32
    scale: jax.Array  # float32, cells per pixel


def map_table(feature: jax.Array, r: int, scale: float) -> tuple[jax.Array, Table]:
    """(cells [1 n c], where r RoIs find theirs [1 r]) of one map `feature` [h w c] as the only image."""
    h, w, c = feature.shape
    table = Table(*(jnp.full((1, r), x, jnp.int32) for x in (0, h, w)), jnp.full((1, r), scale, jnp.float32))
    return jnp.asarray(feature).reshape(1, h * w, c), table


def pyramid_table(pyramid: Mapping[int, jax.Array], level: jax.Array) -> tuple[tuple[jax.Array, ...], Table]:
    """(cells, where each RoI finds its own [b r]) of a pyramid {l: [b h w c]} and each RoI's level int32 [b r].

    With all levels in one table a RoI costs the same whatever their number. The cells are the parts of the table, one
    [b h*w c] for each level, which follow each other. A cell of level l is 2**l pixels wide.
    """
    levels = sorted(pyramid)
    heights, widths = (np.int32([pyramid[x].shape[axis] for x in levels]) for axis in (1, 2))
    starts = np.cumsum(heights * widths, dtype=np.int32) - heights * widths
    scales = np.float32([2.0**-x for x in levels])
    cells = tuple(x.reshape(x.shape[0], -1, x.shape[-1]) for x in map(pyramid.get, levels))
    position = jnp.searchsorted(np.int32(levels), level, method="compare_all")
    return cells, Table(*(jnp.asarray(x)[position] for x in (starts, heights, widths, scales)))


def in_pieces(x: jax.Array, fill: Any = 0, pieces: int = PIECES) -> jax.Array:
    """x [r ...] -> [pieces piece ...], or fewer pieces if r is less; `fill` where there is no RoI."""
    r = x.shape[0]
    piece = max(-(-r // pieces), 1)
    pieces = -(-r // piece)
    padding = [(0, pieces * piece - r)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding, constant_values=fill).reshape(pieces, piece, *x.shape[1:])


class Pieces(NamedTuple):
    """RoIs in pieces [b pieces piece ...], to be worked through piece after piece, one point of all its bins a round.

    A piece holds RoIs of about equally many points, so that few of them wait for others. All images take the same
    rounds: under `vmap` a loop with a bound of each image's own would copy all that it carries in every round.
    """

    rois: Any  # arrays that describe the RoIs, zeros where there is none
    columns: jax.Array  # int32, points in a row of a bin, at least 1
    source: jax.Array  # int32, the RoI at each place; r where there is none
    rounds: jax.Array  # int32 [pieces]

    def point(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """For one piece of one image: row and column int32 [piece] of what each RoI does in round t.

        A RoI with fewer points than others is sent to rows beyond its own, where it must do nothing.
        """
        return t // self.columns, t % self.columns


# The axes of `Pieces` for a `vmap` over the images.
IMAGES = Pieces(rois=0, columns=0, source=0, rounds=None)


def sort_into_pieces(rois: Any, rows: jax.Array, columns: jax.Array) -> tuple[Pieces, jax.Array]:
    """(pieces, place int32 [b r] of each RoI counted through them) for r > 0 RoIs of each image.

    rois: arrays [b r ...]; each bin of a RoI has rows x columns [b r] points.
    """
    b, r = rows.shape
    order = jnp.argsort(-rows * columns, axis=1, stable=True).astype(jnp.int32)

    def sort(x):
        return jax.vmap(in_pieces)(jnp.take_along_axis(x, order.reshape(b, r, *[1] * (x.ndim - 2)), axis=1))

    source = jax.vmap(lambda x: in_pieces(x, fill=r))(order)
    rounds = sort(rows * columns).max((0, 2)).astype(jnp.int32)
    pieces = Pieces(jax.tree.map(sort, rois), jnp.maximum(sort(columns), 1).astype(jnp.int32), source, rounds)
    return pieces, jnp.argsort(order, axis=1).astype(jnp.int32)
