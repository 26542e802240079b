"""Anchors: the reference boxes of a pyramid's cells. NumPy, since they are constants of the compiled program."""

from collections.abc import Mapping, Sequence

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
) -> dict[int, np.ndarray]:
    """Anchors {l: float32 [r 4]} of whole maps, in pixels; r = h * w * a, in the order row, column, anchor of the cell.

    grids {l: (h, w)} in cells, cells {l: [a 4]}, strides {l: (vertical, horizontal)} in pixels. The anchors of cell
    (i, j) are centred on (j * horizontal, i * vertical), the cell's top left corner. Anchors that stick out of the
    image are kept (FPN, section 5.1).
    """
    anchors = {}
    for level, (h, w) in grids.items():
        y, x = np.meshgrid(np.arange(h) * strides[level][0], np.arange(w) * strides[level][1], indexing="ij")
        shifts = np.stack([x, y, x, y], axis=-1).astype(np.float32)
        anchors[level] = (shifts[:, :, None] + cells[level]).reshape(-1, 4)
    return anchors
