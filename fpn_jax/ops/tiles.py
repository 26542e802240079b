"""Windows of a map, read and added to by tiles of the map: kernels for TPUs.

A TPU reads single rows of a table by a transfer each, and adds to them by reading and writing back the eight rows
around each, sixteen at a time: RoIAlign's 784 rows a RoI would take longer than all convolutions of a step
(benchmarks/LOG.md). Here a map is cut into tiles, and a kernel is given the pairs of a window and a tile that share
cells. What a window has of a tile is then one product, [bins cells] @ [cells channels], and its gradient is
[cells bins] @ [bins channels]. The pairs come window after window to read, so that the bins stay on the chip until they
are complete, and tile after tile to add, where the same holds for the cells.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE = (16, 32)  # rows and columns of cells, powers of two; a RoI is about 20 x 20 cells large
MOST_NUMBERS = 190_000  # that a call is given: one for each pair, four for each window; scalar memory has 1 MiB
_SUBLANES, _LANES = 16, 128  # of a register, of bfloat16


class Windows(NamedTuple):
    """What is the same for all windows: size x size bins, in each the mean of ratio x ratio points."""

    size: int
    ratio: int
    area: float  # of the largest, in cells; inf: any


class _Grid(NamedTuple):
    """How a map is cut."""

    size: tuple[int, int]  # height, width in cells
    shape: tuple[int, int]  # rows and columns of tiles
    most: int  # tiles that share cells with one window, at most

    @property
    def tiles(self) -> int:
        return self.shape[0] * self.shape[1]


def calls(b: int, r: int, sizes: Sequence[tuple[int, int]], windows: Sequence[Windows]) -> list[tuple[slice, slice]]:
    """The (images, windows of each) of b and r that a call has room for, in all of the maps of (height, width)."""
    grids = [_cut(size, x) for size, x in zip(sizes, windows, strict=True)]
    fit = max(min((MOST_NUMBERS - grid.tiles) // (4 + grid.most) for grid in grids), 1)
    images = 1 if fit < r else min(MOST_NUMBERS // (grid.tiles + r * (4 + grid.most)) for grid in grids)
    return [(slice(i, i + images), slice(j, j + fit)) for i in range(0, b, images) for j in range(0, r, fit)]


def read_windows(
    feature: jax.Array, places: jax.Array, mine: jax.Array, windows: Windows, before: jax.Array | None
) -> jax.Array:
    """Bins of those windows that are `mine` bool [b r], from `feature` [b h w c]: [b*r size*size c], as `before`.

    places float32 [b r 4]: (y of the upper edge, height of a bin, x of the left edge, width of a bin), in cells, the
    middle of the first cell at 0. A point more than a cell outside the map counts as 0, as in `roi_align`. The bins
    are row after row; those of other windows are as in `before`, or anything if it is None.
    """
    (b, r), c, n = mine.shape, feature.shape[-1], mine.size
    grid = _cut(feature.shape[1:3], windows)
    bins = _round_up(windows.size**2, _SUBLANES)  # in whole registers
    row, column, there = _pairs(places.reshape(n, 4), mine.reshape(n), grid, windows.size)
    image, window = jnp.divmod(jnp.arange(n, dtype=jnp.int32)[:, None], r)
    lengths = b + 1, r, *grid.shape
    ids = jnp.where(there, _pack((image, window, row, column), lengths), _pack((b, 0, 0, 0), lengths))

    def number_of(step, ids):
        image, window, _, _ = _unpack(ids[step], lengths)
        return jnp.minimum(image * r + window, n - 1)

    def tile_of(step, ids, places):
        image, _, row, column = _unpack(ids[step], lengths)
        return jnp.minimum(image, b - 1), row, column, 0

    def kernel(ids, places, cells, *refs):
        out, total, arrived = refs[-3:]
        step = pl.program_id(0)
        first, last = _ends(ids, step, grid.shape)
        image, _, *tile = _unpack(ids[step], lengths)
        of_window = image < b

        @pl.when(first)
        def _():
            total[...] = jnp.zeros_like(total)

        matrix, of_map = _matrix(places, number_of(step, ids), tile, grid, windows, bins)
        # What a tile has beyond the map can be anything, even no number.
        values = jnp.where(of_map, cells[0].reshape(-1, c), jnp.zeros((), cells.dtype))
        total[...] += _times(matrix, values)

        @pl.when(last & of_window)
        def _():
            out[0] = total[: windows.size**2].astype(out.dtype)

        if before is not None:

            @pl.when(~of_window)  # the only step then: its block is the last row, which may be of another map
            def _():
                copy = pltpu.make_async_copy(refs[0].at[n - 1], out.at[0], arrived)
                copy.start()
                copy.wait()

    given, specs = [feature], [pl.BlockSpec((1, *TILE, c), tile_of)]
    if before is not None:
        given, specs = [*given, before], [*specs, pl.BlockSpec(memory_space=pl.ANY)]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(jnp.maximum(there.sum(dtype=jnp.int32), 1),),  # at least one, which may be of no window
            in_specs=specs,
            out_specs=pl.BlockSpec((1, windows.size**2, c), lambda step, ids, places: (number_of(step, ids), 0, 0)),
            scratch_shapes=[pltpu.VMEM((bins, c), jnp.float32), pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct((n, windows.size**2, c), feature.dtype),
        input_output_aliases={} if before is None else {3: 0},
        name="read_windows",
    )(_in_order(ids), places.reshape(-1), *given)


def add_windows(
    gradient: jax.Array,
    places: jax.Array,
    mine: jax.Array,
    windows: Windows,
    size: tuple[int, int],
    before: jax.Array | None,
) -> jax.Array:
    """What `read_windows` passes back to its map of `size` (height, width): [b h w c], on top of `before`.

    gradient [b r size*size c].
    """
    (b, r), c = mine.shape, gradient.shape[-1]
    if mine.size == 0:
        return jnp.zeros((b, *size, c), gradient.dtype) if before is None else before
    found = {}
    for images, some in calls(b, r, [size], [windows]):
        total = found.get(images.start, None if before is None else before[images])
        given = gradient[images, some], places[images, some], mine[images, some]
        found[images.start] = _add(*given, windows, size, total)
    return jnp.concatenate(list(found.values()))


def _add(
    gradient: jax.Array,
    places: jax.Array,
    mine: jax.Array,
    windows: Windows,
    size: tuple[int, int],
    before: jax.Array | None,
) -> jax.Array:
    """`add_windows` in one call."""
    (b, r), c, n = mine.shape, gradient.shape[-1], mine.size
    grid = _cut(size, windows)
    bins = _round_up(windows.size**2, _SUBLANES)
    gradient = gradient.reshape(n, -1, c)
    row, column, there = _pairs(places.reshape(n, 4), mine.reshape(n), grid, windows.size)
    image, window = jnp.divmod(jnp.arange(n, dtype=jnp.int32)[:, None], r)
    lengths = b + 1, *grid.shape, r + 1  # r: no window
    ids = jnp.where(there, _pack((image, row, column, window), lengths), _pack((b, 0, 0, r), lengths))
    count = there.sum(dtype=jnp.int32)
    if before is None:  # all tiles are written, also those without a window
        image, row, column = (x.reshape(-1, 1) for x in np.indices((b, *grid.shape), np.int32))
        ids = jnp.concatenate([ids.reshape(-1, 1), _pack((image, row, column, r), lengths)])
        count += len(image)

    def tile_of(step, ids, places):
        image, row, column, _ = _unpack(ids[step], lengths)
        return jnp.minimum(image, b - 1), row, column, 0

    def number_of(step, ids):
        image, _, _, window = _unpack(ids[step], lengths)
        return jnp.minimum(image, b - 1) * r + jnp.minimum(window, r - 1)

    def kernel(ids, places, own, *refs):
        out, total = refs[-2:]
        step = pl.program_id(0)
        _, *tile, window = _unpack(ids[step], lengths)
        first, last = _ends(ids, step, (r + 1,))

        @pl.when(first)
        def _():
            total[...] = (
                jnp.zeros_like(total) if before is None else refs[0][0].reshape(total.shape).astype(total.dtype)
            )

        @pl.when(window < r)
        def _():
            matrix, _ = _matrix(places, number_of(step, ids), tile, grid, windows, bins)
            more = jnp.zeros((bins - own.shape[1], c), own.dtype)
            total[...] += _times_transposed(matrix, jnp.concatenate([own[0], more]))

        @pl.when(last)
        def _():
            out[0] = total[...].astype(out.dtype).reshape(out.shape[1:])

    of_window = pl.BlockSpec((1, *gradient.shape[1:]), lambda step, ids, places: (number_of(step, ids), 0, 0))
    given, specs = [gradient], [of_window]
    if before is not None:
        given, specs = [*given, before], [*specs, pl.BlockSpec((1, *TILE, c), tile_of)]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(jnp.maximum(count, 1),),
            in_specs=specs,
            out_specs=pl.BlockSpec((1, *TILE, c), tile_of),
            scratch_shapes=[pltpu.VMEM((TILE[0] * TILE[1], c), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((b, *size, c), gradient.dtype),
        input_output_aliases={} if before is None else {3: 0},
        name="add_windows",
    )(_in_order(ids), places.reshape(-1), *given)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _in_order(ids: jax.Array) -> jax.Array:
    """Ids of any shape, the lowest first, and one more."""
    ids = jax.lax.sort(ids.reshape(-1), is_stable=False)  # stable, a TPU would sort their numbers along with them
    return jnp.pad(ids, (0, 1))


def _pack(values: Sequence[Any], lengths: Sequence[int]) -> Any:
    """One number that is in order as the `values` are, the first first; each is at least 0 and below its length.

    In bits: a TPU's scalar unit has no division.
    """
    packed = 0
    for value, bits in zip(values, _bits(lengths), strict=True):
        packed = (packed << bits) + value
    return packed


def _unpack(packed: Any, lengths: Sequence[int]) -> tuple[Any, ...]:
    """The values of a number that `_pack` made."""
    values = []
    for bits in reversed(_bits(lengths)):
        values.append(packed & ((1 << bits) - 1))
        packed >>= bits
    return tuple(reversed(values))


def _bits(lengths: Sequence[int]) -> list[int]:
    bits = [(length - 1).bit_length() for length in lengths]
    if sum(bits) > 31:
        raise ValueError(f"{' x '.join(map(str, lengths))} pairs are too many to be numbered")
    return bits


def _cut(size: tuple[int, int], windows: Windows) -> _Grid:
    shape = -(-size[0] // TILE[0]), -(-size[1] // TILE[1])
    return _Grid(size, shape, _most_tiles(shape, windows.area))


def _most_tiles(shape: tuple[int, int], area: float) -> int:
    """Tiles of `shape` that a window of up to `area` cells, of any sides of at least 0, shares cells with.

    It touches fewer than `side + 3` cells along an axis: those that its ends lie in and the next one. Such that reach
    into n tiles of length t fill n - 2 of them and have a cell in two more.
    """
    most = 0
    for rows in range(1, shape[0] + 1):
        height = (rows - 2) * TILE[0] + 2 - 3  # more than that
        columns = shape[1]
        if height > 0 and np.isfinite(area):  # a hundredth more, as areas and sides are rounded
            columns = min(columns, int((1.01 * area / height + 3 - 2) // TILE[1]) + 2)
        most = max(most, rows * columns)
    return most


def _pairs(places: jax.Array, mine: jax.Array, grid: _Grid, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(row of tiles, column of tiles int32, there bool), [n most] each: the tiles of windows in `places` [n 4].

    Windows that are not `mine` [n] have none, the others one at least.
    """
    first, number = [], []
    for axis, length in enumerate(grid.size):
        start, side = places[:, 2 * axis], places[:, 2 * axis + 1]
        ends = [jnp.where(jnp.isfinite(x), x, 0) for x in (start, start + size * side)]
        low, high = jnp.floor(jnp.minimum(*ends)), jnp.floor(jnp.maximum(*ends)) + 1
        low, high = (jnp.clip(x, 0, length - 1).astype(jnp.int32) // TILE[axis] for x in (low, high))
        first.append(low[:, None])
        number.append((high - low + 1)[:, None])
    k = jnp.arange(grid.most, dtype=jnp.int32)
    row, column = jnp.divmod(k, number[1])
    there = (row < number[0]) & mine[:, None]
    return first[0] + row, first[1] + column, there


def _ends(ids: Any, step: jax.Array, lengths: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Whether a step is the first, and the last, of those whose ids differ in the last values alone, of `lengths`."""

    def of(at):
        return ids[at] >> sum(_bits(lengths))

    first = (step == 0) | (of(jnp.maximum(step - 1, 0)) != of(step))
    return first, (step == pl.num_programs(0) - 1) | (of(step + 1) != of(step))


def _matrix(
    places: jax.Array,
    window: jax.Array,
    tile: tuple[jax.Array, jax.Array],
    grid: _Grid,
    windows: Windows,
    bins: int,
) -> tuple[jax.Array, jax.Array]:
    """(weights float32 [bins cells] of a tile's cells in a window's bins, which of the cells the map has [cells 1]).

    Bins from size * size on mean nothing.
    places: those of all windows, one after another, in scalar memory; tile: its row and column.
    """
    (rows, columns), cells = TILE, TILE[0] * TILE[1]

    def cell(shape, axis):
        row, column = _unpack(jax.lax.broadcasted_iota(jnp.int32, shape, axis), TILE)
        return row + tile[0] * rows, column + tile[1] * columns

    number = jax.lax.broadcasted_iota(jnp.int32, (bins, 1), 0).astype(jnp.float32)
    bin_y = jnp.floor((number + 0.5) / windows.size)
    bin_x = number - windows.size * bin_y
    y, x = ((places[4 * window + i], places[4 * window + i + 1]) for i in (0, 2))
    weights_y = _weights(*y, grid.size[0], bin_y, cell((1, cells), 1)[0], windows.ratio)
    part = max(columns, _LANES)  # columns repeat in every row of the tile
    weights_x = _weights(*x, grid.size[1], bin_x, cell((1, part), 1)[1], windows.ratio)
    row, column = cell((cells, 1), 0)
    of_map = (row < grid.size[0]) & (column < grid.size[1])
    return weights_y * jnp.concatenate([weights_x] * (cells // part), 1), of_map


def _weights(
    start: jax.Array, side: jax.Array, length: int, number: jax.Array, cell: jax.Array, ratio: int
) -> jax.Array:
    """What cells [1 n] along an axis weigh in bins of `number` [m 1], of side `side` from `start` on: float32 [m n].

    As of `roi_points.neighbours`: what a cell weighs in a point falls from the point's place to 0 over one cell.
    """
    total, cell = 0.0, cell.astype(jnp.float32)
    for point in range(ratio):
        at = start + number * side + (point + 0.5) / ratio * side
        counts = (at >= -1) & (at <= length)
        at = jnp.where(counts, jnp.clip(at, 0, length - 1), 0)
        total += jnp.where(counts, 1 / ratio, 0) * jnp.maximum(1 - jnp.abs(cell - at), 0)
    return total


def _times(matrix: jax.Array, values: jax.Array) -> jax.Array:
    """matrix float32 [bins cells] @ values [cells c] -> float32 [bins c]."""
    parts = _parts(matrix, values.dtype)
    out = _product(parts, values, ((1,), (0,)))
    return out.reshape(-1, *matrix.shape[:1], out.shape[-1]).sum(0)


def _times_transposed(matrix: jax.Array, values: jax.Array) -> jax.Array:
    """(matrix float32 [bins cells]).T @ values [bins c] -> float32 [cells c]."""
    parts = _parts(matrix, values.dtype)
    return _product(parts, jnp.concatenate([values] * (len(parts) // len(matrix))), ((0,), (0,)))


def _parts(matrix: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A matrix in `dtype`, or of bfloat16 two below each other, rounded and what the rounding took."""
    if dtype == jnp.float32:
        return matrix
    rounded = matrix.astype(dtype)
    return jnp.concatenate([rounded, (matrix - rounded.astype(jnp.float32)).astype(dtype)])


def _product(a: jax.Array, b: jax.Array, axes: tuple[tuple[int], tuple[int]]) -> jax.Array:
    precision = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)
