"""Anchors: the reference boxes of a pyramid's cells."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.ops.boxes import area, iou_of_overlap, overlap_of


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


@dataclasses.dataclass(frozen=True, eq=False)
class AnchorGrid:
    """Anchors of a whole map, r = h * w * a, in the order row, column, anchor of the cell.

    Those of cell (i, j) are centred on (j * horizontal, i * vertical), the cell's top left corner. Anchors that stick
    out of the image are kept (FPN, section 5.1).

    Attributes:
        size: (h, w) of the map in cells.
        of_cell: float32 [a 4], around the origin, in pixels.
        stride: (vertical, horizontal) in pixels.
    """

    size: tuple[int, int]
    of_cell: np.ndarray
    stride: tuple[int, int]

    def boxes(self) -> jax.Array:
        """The anchors, float32 [r 4] in pixels. The device computes them from their row's number: as constants they
        would be stored in the program several times, in a TPU's with 4 of 128 lanes used."""
        (h, w), a = self.size, len(self.of_cell)
        cell, anchor = jnp.divmod(jnp.arange(h * w * a, dtype=jnp.int32), a)
        i, j = jnp.divmod(cell, w)
        y, x = ((index * side).astype(jnp.float32) for index, side in zip((i, j), self.stride, strict=True))
        own = [anchor == which for which in range(1, a)]
        columns = []
        for corners, shift in zip(self.of_cell.T, (x, y, x, y), strict=True):
            corner = jnp.float32(corners[0])
            for is_own, value in zip(own, corners[1:], strict=True):  # without a gather
                corner = jnp.where(is_own, value, corner)
            columns.append(shift + corner)
        return jnp.stack(columns, axis=-1)

    def highest_iou(self, objects: jax.Array) -> jax.Array:
        """The highest IoU [m] of each of objects [m 4] with an anchor: `iou(objects, boxes()).max(1)`, to the bit.

        Of anchors with the same sides the one whose columns and whose rows overlap the object most is the best, and
        the grid has it, as it has every column in every row. So h + w overlaps are looked at for each of the a
        anchors, and not h * w. Sides of anchors that are no whole numbers are rounded, here so, there so: such columns,
        and rows, are looked at in stretches of the same, some tens each way at 800 pixels.
        """
        (heights, tall), (widths, wide) = (self._most_overlap(objects, axis) for axis in (1, 0))
        areas = tall[:, None] * wide
        found = iou_of_overlap(widths[:, None], heights[:, :, None], area(objects)[:, None, None, None], areas)
        return found.max(axis=(1, 2, 3))

    def _most_overlap(self, objects: jax.Array, axis: int) -> tuple[jax.Array, np.ndarray]:
        """(the most pixels [m s a] by which an object overlaps an anchor along an axis, 0 is x, anchors' sides [s a]),
        in each of s stretches of columns, or rows, whose anchors have the same sides."""
        shift = np.arange(self.size[1 - axis], dtype=np.float32)[:, None] * np.float32(self.stride[1 - axis])
        low, high = shift + self.of_cell[:, axis], shift + self.of_cell[:, axis + 2]
        sides = high - low
        starts = [0, *(np.flatnonzero((sides[1:] != sides[:-1]).any(1)) + 1)]
        overlap = overlap_of(objects[:, axis, None, None], objects[:, axis + 2, None, None], low, high)
        stretches = zip(starts, [*starts[1:], len(sides)], strict=True)
        return jnp.stack([overlap[:, start:end].max(1) for start, end in stretches], 1), sides[starts]
