"""What all benchmarks share: sides in processes of their own that take turns, statistics, and the record of a run.

A side (ours, torchvision's) lives in a process of its own, so that neither meets the other's threads, allocator or
memory. While one is timed the others wait. Every repetition has inputs of its own, made before the clock starts.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import multiprocessing
import os
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fpn_jax.errors import UserError

# With these glibc keeps what it has instead of giving it back after every large array, which is what makes an eager
# framework slow on a CPU: every new page is cleared by the kernel.
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "500000000",
}
WARM_UP = 2  # untimed repetitions


class Program(NamedTuple):
    """Something to time. `run` returns when the work is done, on the device, too."""

    prepare: Callable[[int], Any]  # seed -> the inputs of a repetition
    run: Callable[[Any], Any]
    outputs: Callable[[Any], dict[str, np.ndarray]] = lambda result: result  # of a run's result, to compare sides by


@dataclasses.dataclass(frozen=True)
class Made:
    """What a side's function makes in the side's process."""

    programs: Mapping[str, Program]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the record: device, FLOPs, ...
    device_peak: Callable[[], int | None] = lambda: None  # bytes; None: the device's memory is the process's


@dataclasses.dataclass(frozen=True)
class Side:
    """make is "module:function", called as function(**options) -> `Made` in a process with this environment."""

    make: str
    options: Mapping[str, Any]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Times(NamedTuple):
    """Of one repetition, in seconds."""

    wall: float
    cpu: float  # user and system, of all threads


class SideFailed(Exception):
    """What went wrong in a side's process: its traceback."""


class Running:
    """A side that has been started; `stop` ends its process."""

    def __init__(self, side: Side):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, side))
        with _environment(side.environment):
            self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._answer()

    def outputs(self, program: str, seed: int) -> dict[str, np.ndarray]:
        """What one untimed repetition gives."""
        return self._ask("outputs", program, seed)

    def times(self, program: str, seed: int) -> Times:
        """How long one repetition takes."""
        return self._ask("times", program, seed)

    def peak_memory(self, program: str, seed: int) -> int:
        """Bytes that one repetition needs at most: the device's, or what the process has beyond its libraries."""
        return self._ask("peak_memory", program, seed)

    def stop(self) -> None:
        """End the process and wait for that."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join()

    def _ask(self, *question: Any) -> Any:
        self._pipe.send(question)
        return self._answer()

    def _answer(self) -> Any:
        try:
            good, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise SideFailed(f"the process ended with status {self._process.exitcode}") from None
        if not good:
            raise SideFailed(answer)
        return answer


@contextlib.contextmanager
def started(sides: Mapping[str, Side]) -> Iterator[dict[str, Running]]:
    """The sides in processes of their own, ended afterwards. Raises `UserError` if one cannot start."""
    running: dict[str, Running] = {}
    try:
        for name, side in sides.items():
            try:
                running[name] = Running(side)
            except SideFailed as error:
                raise UserError(f"{name} does not start: {last_line(error)}; run benchmarks without it") from error
        yield running
    finally:
        for side in running.values():
            side.stop()


def take_turns(
    sides: Mapping[str, Running], program: str, repeats: int, warm_up: int = WARM_UP
) -> dict[str, list[Times]]:
    """The times of `repeats` repetitions of each side, A B A B ..., after some that are not counted."""
    times: dict[str, list[Times]] = {name: [] for name in sides}
    for seed in range(warm_up + repeats):
        for name, side in sides.items():
            times[name].append(side.times(program, seed))
    return {name: values[warm_up:] for name, values in times.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and spread, as the JSON has them; at least one value."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def rates(count: float, seconds: Sequence[float]) -> dict[str, float]:
    """As `summary`, of `count` things in each of these times."""
    return summary([count / value for value in seconds])


def per_item(function: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """Seconds of this thread's CPU time that the function takes for one of the items: the median, each taken twice."""
    seconds = []
    for item in [*items, *items]:
        start = time.thread_time()
        function(item)
        seconds.append(time.thread_time() - start)
    return statistics.median(seconds)


def last_line(error: Exception) -> str:
    """The line of a traceback that says what happened."""
    return str(error).strip().splitlines()[-1]


def _serve(pipe: Any, side: Side) -> None:
    """The life of a side's process."""
    module, _, function = side.make.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
        libraries = _memory("VmRSS")
        made: Made = make(**side.options)
        pipe.send((True, dict(made.facts)))
    except Exception:
        pipe.send((False, traceback.format_exc()))
        return
    answers = {"outputs": _outputs, "times": _times, "peak_memory": lambda *args: _peak(*args, libraries)}
    with contextlib.suppress(EOFError):  # who asks has gone
        for question, program, seed in iter(pipe.recv, None):
            try:
                pipe.send((True, answers[question](made, program, seed)))
            except Exception:
                pipe.send((False, traceback.format_exc()))


def _outputs(made: Made, name: str, seed: int) -> dict[str, np.ndarray]:
    program = made.programs[name]
    return {key: np.asarray(value) for key, value in program.outputs(program.run(program.prepare(seed))).items()}


def _times(made: Made, name: str, seed: int) -> Times:
    program = made.programs[name]
    inputs = program.prepare(seed)
    wall, cpu = time.perf_counter(), _cpu_seconds()
    result = program.run(inputs)
    times = Times(time.perf_counter() - wall, _cpu_seconds() - cpu)
    del result  # after the clock: the next repetition need not find it in memory
    return times


def _peak(made: Made, name: str, seed: int, libraries: int) -> int:
    """Of a repetition after one that warms up. On a CPU what compiling left behind is given back before."""
    _outputs(made, name, seed)
    if (of_device := made.device_peak()) is not None:
        return of_device
    with contextlib.suppress(OSError, AttributeError):  # other than glibc, Linux
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    _times(made, name, seed)
    return _memory("VmHWM") - libraries


def _memory(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in used)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
