"""What is watched while a run goes on: a request to stop, the wait for data, and programs compiled anew."""

import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from fpn_jax.training import peers, sharding


class StopRequest:
    """Whether the machine is to be taken away: SIGTERM here, or what the platform tells one of several processes.

    As a context manager it catches SIGTERM, so that the run can save first; a second SIGTERM ends it at once.
    """

    def __init__(self) -> None:
        self._came = threading.Event()
        self._former: Any = None
        self._catches = False

    def __enter__(self) -> "StopRequest":
        # With several processes jax listens itself, so that all of them learn of it and stop at the same step.
        self._catches = sharding.process()[1] == 1 and threading.current_thread() is threading.main_thread()
        if self._catches:
            self._former = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._catches:
            signal.signal(signal.SIGTERM, self._former)

    def came(self, step: int) -> bool:
        """Whether to save and stop after this step; all processes get the same answer."""
        return self._came.is_set() or sharding.preempted(step)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._came.set()
        signal.signal(number, self._former)


class TimedBatches:
    """The batches of an iterator, and what part of each step was spent waiting for its batch."""

    def __init__(self, batches: Iterator[dict[str, np.ndarray]]):
        self._batches = batches
        self._last = time.perf_counter()
        self.waited = 0.0  # 0 .. 1, of the time from the batch before to this one

    def __iter__(self) -> "TimedBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        peers.at("waiting for data")
        batch = next(self._batches)
        now = time.perf_counter()
        self.waited = (now - start) / max(now - self._last, 1e-9)
        self._last = now
        return batch


class Compilations:
    """Tells of a step that was compiled for anything but a new bucket: minutes that nobody asked for."""

    def __init__(self, step: Any):
        self._step = step
        self._buckets: set[tuple[int, ...]] = set()
        self._told = 0

    def knows(self, host: dict[str, np.ndarray]) -> bool:
        """Whether the step has run on batches of this bucket before, so that it need not be compiled for it."""
        return host["image"].shape in self._buckets

    def check(self, host: dict[str, np.ndarray]) -> str | None:
        """Call it after each step with its batch; a line to print if there are more programs than buckets so far."""
        self._buckets.add(host["image"].shape)
        surplus = self._step._cache_size() - len(self._buckets)
        if surplus <= self._told:
            return None
        self._told = surplus
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in host.items() if name in ("image", "boxes"))
        return (
            f"warning: the step was compiled once more than there are buckets, at a batch of {shapes}; all else about "
            "batches should be of one shape"
        )
