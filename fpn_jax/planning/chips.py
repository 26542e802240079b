"""TPU chips and the slices they come in: what the vendor's data sheets say.

Sources: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}, read in November 2026. Memory is what the compiler itself calls
the limit when a program does not fit, a little below the nominal size.
"""

import math
from dataclasses import dataclass

from fpn_jax.errors import UserError

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One TPU chip, as one device of jax."""

    name: str
    peak_flops: float  # bfloat16, per second, dense
    memory: float  # bytes that a program can use
    memory_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second of one link to one neighbour, one way; links work both ways at once
    clock: float  # Hz: peak_flops over what the matrix units do in a cycle
    torus_from: int  # an axis of a slice closes to a ring from this length on
    accelerator_type: str  # the name of a slice of n chips, with {n} or {cores}

    def __post_init__(self):
        if min(self.peak_flops, self.memory, self.link_bandwidth, self.clock) <= 0:
            raise ValueError(f"{self} has no speed or no memory")


def _clock(peak_flops: float, units: int, side: int) -> float:
    """A unit of side x side multiplies and adds side**2 pairs a cycle."""
    return peak_flops / (2 * units * side**2)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 15.75 * _GIB, 819e9, 50e9, _clock(197e12, 4, 128), 16, "v5litepod-{n}"),
        Chip("v5p", 459e12, 95.0 * _GIB, 2765e9, 100e9, _clock(459e12, 8, 128), 4, "v5p-{cores}"),
        # The data sheet has said four matrix units and two; two would need a clock of 3.5 GHz.
        Chip("v6e", 918e12, 31.25 * _GIB, 1638e9, 100e9, _clock(918e12, 4, 256), 16, "v6e-{n}"),
    )
}


@dataclass(frozen=True)
class Slice:
    """Chips in a grid, such as v5e:16x16."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Chips."""
        return math.prod(self.shape)

    @property
    def accelerator_type(self) -> str:
        """What Cloud TPU calls it."""
        return self.chip.accelerator_type.format(n=self.size, cores=2 * self.size)

    @property
    def memory(self) -> float:
        """Bytes of a chip that a program can use."""
        return self.chip.memory

    @property
    def description(self) -> str:
        """For people."""
        return f"{self} ({self.size} chips, {self.accelerator_type})"

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a chip can send in an all-reduce over the whole slice, over all its links.

        An axis that is a ring uses both directions at once; on a line, what goes round must come back the same way.
        """
        links = sum(2 if side >= self.chip.torus_from else 1 for side in self.shape if side > 1)
        return links * self.chip.link_bandwidth

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_slice(topology: str) -> Slice:
    """`v5e:16x16` -> the slice. Raises `UserError` for what is none."""
    name, _, sides = topology.partition(":")
    if name not in CHIPS:
        raise UserError(f"--topology={topology}: {name!r} is not one of {', '.join(CHIPS)}; say v5e:16x16 or local:8")
    shape = sides.split("x")
    dimensions = 3 if name == "v5p" else 2
    if len(shape) != dimensions or not all(side.isdecimal() and int(side) > 0 for side in shape):
        example = "4x4x4" if dimensions == 3 else "16x16"
        raise UserError(f"--topology={topology}: give {name}'s {dimensions} sides in chips, such as {name}:{example}")
    return Slice(CHIPS[name], tuple(map(int, shape)))
