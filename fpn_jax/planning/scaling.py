"""Weak scaling on paper: what a slice of each size would make of it that every chip keeps its number of images."""

from collections.abc import Iterable
from typing import NamedTuple

from fpn_jax.planning.chips import Chip, Slice

_HOP = 1e-6  # seconds from chip to chip: an assumption, the data sheets do not say


class Scaling(NamedTuple):
    """One size of slice."""

    slice: Slice
    step: float  # seconds that a chip computes
    exchange: float  # seconds of the all-reduce of the gradients
    efficiency: float  # of what as many single chips would do, if nothing is sent while there is something to compute

    @property
    def efficiency_overlapped(self) -> float:
        """The same if everything is sent while the backward pass computes, as far as that is long enough."""
        backward = 2 / 3 * self.step  # as many operations twice as forward: the usual rule
        return self.step / (self.step + max(0.0, self.exchange - backward))


def weak_scaling(step: float, gradient_bytes: int, slices: Iterable[Slice]) -> list[Scaling]:
    """Each slice with `step` seconds of computing a chip and gradients of so many bytes.

    An all-reduce over n chips needs each of them to send 2 (n - 1) / n times the gradients (a reduce-scatter and an
    all-gather, Patarasuk and Yuan 2009), here at the links' full bandwidth, and takes one hop after another along each
    axis there and back.
    """
    found = []
    for one in slices:
        n = one.size
        sent = 2 * (n - 1) / n * gradient_bytes
        hops = 2 * sum(side - 1 if side < one.chip.torus_from else side // 2 for side in one.shape)
        exchange = sent / one.bandwidth + hops * _HOP if n > 1 else 0.0
        found.append(Scaling(one, step, exchange, step / (step + exchange)))
    return found


def usual_slices(chip: Chip) -> list[Slice]:
    """The slices from 8 to 256 chips that a chip of a flat torus comes in."""
    shapes = ((2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
    return [Slice(chip, shape) for shape in shapes]
