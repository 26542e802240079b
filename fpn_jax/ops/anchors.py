"""Anchors: the reference boxes of a pyramid's cells."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def cell_anchors(
    sizes: Sequence[float], ratios: Sequence[float], rounded: bool = True, order: str = "ratio_major"
) -> np.ndarray:
    """Anchors float32 [a 4] of one cell, in pixels around the origin: one per size and ratio, of area size**2.

    ratios are height / width. rounded rounds the corners to integers, halves to even, as torchvision does; detectron2
    keeps them exact. order "ratio_major" (torchvision) runs through all sizes before the next ratio, "size_major"
    (detectron2) the other way round. Raises ValueError for another order. Source: Faster R-CNN (arXiv 1506.01497),
    section 3.1.1.
    """
    if order not in ("ratio_major", "size_major"):
        raise ValueError(f"order is {order!r}, should be 'ratio_major' or 'size_major'")
    sizes, ratios = np.asarray(sizes, np.float32), np.sqrt(np.asarray(ratios, np.float32))
    h, w = ratios[:, None] * sizes, (1 / ratios)[:, None] * sizes
    if order == "size_major":
        h, w = h.T, w.T
    anchors = np.stack([-w, -h, w, h], axis=-1).reshape(-1, 4) / np.float32(2)
    return np.round(anchors) if rounded else anchors


def grid_anchors(
    grids: Mapping[int, tuple[int, int]],
    cells: Mapping[int, np.ndarray],
    strides: Mapping[int, tuple[int, int]],
) -> dict[int, jax.Array]:
    """Anchors {l: float32 [r 4]} of whole maps, in pixels; r = h * w * a, in the order row, column, anchor of the cell.

    grids {l: (h, w)} in cells, cells {l: [a 4]}, strides {l: (vertical, horizontal)} in pixels. The anchors of cell
    (i, j) are centred on (j * horizontal, i * vertical), the cell's top left corner. Anchors that stick out of the
    image are kept (FPN, section 5.1).
    """
    return {level: _of_map(grids[level], cells[level], strides[level]) for level in grids}


def _of_map(grid: tuple[int, int], of_cell: np.ndarray, stride: tuple[int, int]) -> jax.Array:
    """Anchors [r 4] of a map. The device computes them from their row's number: as constants they would be stored in
    the program several times, in a TPU's with 4 of 128 lanes used."""
    cell, anchor = jnp.divmod(jnp.arange(grid[0] * grid[1] * len(of_cell), dtype=jnp.int32), len(of_cell))
    i, j = jnp.divmod(cell, grid[1])
    y, x = ((index * side).astype(jnp.float32) for index, side in zip((i, j), stride, strict=True))
    own = [anchor == which for which in range(1, len(of_cell))]
    columns = []
    for corners, shift in zip(of_cell.T, (x, y, x, y), strict=True):
        corner = jnp.float32(corners[0])
        for is_own, value in zip(own, corners[1:], strict=True):  # without a gather
            corner = jnp.where(is_own, value, corner)
        columns.append(shift + corner)
    return jnp.stack(columns, axis=-1)
