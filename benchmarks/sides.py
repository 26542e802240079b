"""The two sides of a detector's benchmark, how they are measured, and the flags that all benchmarks take."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import record, timing
from benchmarks.timing import TUNED_ALLOCATOR, Running, Side
from fpn_jax import cli

QUICK = cli.flag("quick", bool, False, "Sizes that take seconds, to see that it works; nothing is kept.")
OUTPUT = cli.flag("output", str, None, "Folder for the JSON; by default benchmarks/results, none with --quick.")
REPEATS = cli.flag("repeats", int, 0, "Timed repetitions of each side; 0: the benchmark's own choice.")

OURS, THEIRS, TUNED = "ours", "torchvision", ", tuned allocator"
# Ours without `allocator.keep_memory`, which leaves glibc alone where the environment says anything of it.
AS_IS, _AS_IS = "ours, glibc as it is", {"MALLOC_PERTURB_": "0"}
ON_GPU = "torchvision, bf16, channels last"
COMPILED = ON_GPU + ", compiled"
CHECKED = 1000  # seed of the inputs that are compared; the repetitions' are 0, 1, ...
# Both sides share one GPU, most of which XLA would take beforehand.
_SHARED_DEVICE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# torchvision's have JAX make inputs at most, which is not to take the GPU from them.
WITHOUT_DEVICE = {"JAX_PLATFORMS": "cpu"}
# How torchvision is run: (options, environment) of a side.
_WAYS: dict[str, tuple[dict[str, Any], Mapping[str, str]]] = {
    THEIRS: ({"channels_last": False}, {}),
    THEIRS + TUNED: ({"channels_last": True}, TUNED_ALLOCATOR),
    ON_GPU: ({"channels_last": True}, {}),
    COMPILED: ({"channels_last": True, "compiled": True}, {}),
}


class Measured(NamedTuple):
    """What the benchmarks of detectors make their records of."""

    lines: list[dict[str, Any]]
    times: dict[str, list[timing.Times]]  # of every side
    memory: dict[str, list[int]]  # bytes, of every side that was asked
    facts: Mapping[str, Any]  # of ours
    notes: list[str]


def folder() -> Path | None:
    """Where the JSON goes."""
    if OUTPUT.value:
        return Path(OUTPUT.value)
    return None if QUICK.value else record.RESULTS


def repeats(usual: int, quick: int = 2) -> int:
    """Timed repetitions."""
    return REPEATS.value or (quick if QUICK.value else usual)


def ours(function: str, options: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Side:
    """The side that `benchmarks.ours` makes."""
    return Side(f"benchmarks.ours:{function}", options, _SHARED_DEVICE | dict(environment or {}))


def theirs(function: str, options: Mapping[str, Any], way: str) -> Side:
    """The side that `benchmarks.theirs` makes, run in one of its ways."""
    how, environment = _WAYS[way]
    return Side(f"benchmarks.theirs:{function}", {**options, **how}, WITHOUT_DEVICE | dict(environment))


def measure(
    kind: str,
    program: str,
    exact: str,
    check: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], None],
    size: Mapping[str, int],
    dtype: str,
    targets: Mapping[str, float],
    repeats: int,
    counts: str = "",
    memory_repeats: int = 0,
) -> Measured:
    """Compare the detector of size count x height x width on all sides that there are.

    kind: "training" or "inference"; program: what is timed; exact: what `check(ours, theirs)` compares before, which
    raises if the results differ. targets: how many times as fast as each of torchvision's ways ours is to be; none
    without torchvision. With "tuned allocator" among them ours is also run without `keep_memory`, against theirs as it
    is.
    counts: a program of ours whose outputs are facts, too. memory_repeats: how often memory is measured, each time in
    new processes, which have compared and counted nothing.
    """
    every = {OURS: ours(kind, {**size, "dtype": dtype})}
    if THEIRS + TUNED in targets:
        every[AS_IS] = ours(kind, {**size, "dtype": dtype}, _AS_IS)
    every |= {way: theirs(kind, size, way) for way in targets}
    what = f"{size['count']} x {size['height']}x{size['width']}, {dtype}"
    with timing.started(every) as running:
        if targets:
            check(running[OURS].outputs(exact, CHECKED), running[next(iter(targets))].outputs(exact, CHECKED))
        notes = _drop_what_fails(running, program)
        times = timing.take_turns(running, program, repeats)
        facts, names = dict(running[OURS].facts), [x for x in running if x != AS_IS and TUNED not in x]
        if counts:
            facts |= {name: x.item() for name, x in running[OURS].outputs(counts, CHECKED).items()}
    memory: dict[str, list[int]] = {}
    for _ in range(memory_repeats):
        for name in names:
            with timing.started({name: every[name]}) as alone:
                memory.setdefault(name, []).append(alone[name].peak_memory(program, CHECKED))
    rates = {name: timing.rates(size["count"], [x.wall for x in values]) for name, values in times.items()}
    lines = [
        record.faster(what, "images/s", rates[OURS], rates[way], way, target)
        for way, target in targets.items()
        if way in rates
    ]
    if AS_IS in rates and THEIRS in rates:
        both = rates[AS_IS], rates[THEIRS]
        lines.append(record.faster(f"{what}, glibc as it is for ours, too", "images/s", *both, THEIRS, None))
    return Measured(lines or [record.alone(what, "images/s", rates[OURS])], times, memory, facts, notes)


def _drop_what_fails(running: dict[str, Running], program: str) -> list[str]:
    """Run every side once. torch.compile need not work: without it the others are still compared, with a note."""
    notes = []
    for name, side in list(running.items()):
        try:
            side.outputs(program, CHECKED)
        except timing.SideFailed as error:
            if name != COMPILED:
                raise
            notes.append(f"{name}: does not run ({timing.last_line(error)})")
            running.pop(name).stop()
    return notes
