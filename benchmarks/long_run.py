"""What a run costs beside its steps: the time that logging and checkpoints take from them, and memory that grows.

    python -m benchmarks.long_run --config=experiments/demo.py --workdir=/tmp/long [--every=100] [--config.KEY=...]

Trains as `fpn_jax.train` does. Time is the main thread's inside `MetricLog.write` and `Checkpoints.save`, after what
they wait for (the step itself) is done; the threads behind them cost a step only where they need the same cores.
Memory is this process's resident set, every so many steps; its slope is that of a line through the second half.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fpn_jax import cli, train
from fpn_jax.training import checkpoint, logs

_CONFIG = cli.config_flag()
_WORKDIR = cli.flag("workdir", str, None, "Folder for checkpoints, metrics and scores; a new one.")
_EVERY = cli.flag("every", int, 100, "Steps between two looks at the memory.")

_SKIPPED = 20  # steps before the clock starts: they compile


class Meter:
    """Seconds by what they went to, and the resident set by step."""

    def __init__(self) -> None:
        self.seconds = {"logging": 0.0, "checkpoints": 0.0}
        self.saves = 0
        self.memory: list[tuple[int, float]] = []  # step, MiB
        self.first: tuple[int, float] | None = None  # step and time
        self.last = (0, 0.0)

    def add(self, what: str, start: float) -> None:
        """Count the time since start if the clock runs."""
        if self.first:
            self.seconds[what] += time.perf_counter() - start

    def step(self, step: int) -> None:
        """Call it once a step."""
        self.last = step, time.perf_counter()
        if step == _SKIPPED:
            self.first = self.last
        if step % _EVERY.value == 0:
            self.memory.append((step, resident_mib()))


METER = Meter()


class _Log(logs.MetricLog):
    def write(self, step: int, metrics: Any) -> Any:
        if self._pending:
            jax.block_until_ready(self._pending[1])
        start = time.perf_counter()
        written = super().write(step, metrics)
        METER.add("logging", start)
        METER.step(step)
        return written


class _Checkpoints(checkpoint.Checkpoints):
    def save(self, state: Any, data: Any) -> None:
        jax.block_until_ready(state)
        start = time.perf_counter()
        super().save(state, data)
        METER.add("checkpoints", start)
        METER.saves += 1


def resident_mib() -> float:
    """Of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    cli.check_required(workdir=_WORKDIR.value, config=_CONFIG.value)
    train.MetricLog, checkpoint.Checkpoints = _Log, _Checkpoints
    train.train(_CONFIG.value, _WORKDIR.value)
    steps, elapsed = (b - a for a, b in zip(METER.first, METER.last, strict=True))
    print(
        f"{steps} steps of {elapsed / steps:.3f} s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the end"
    )
    for what, seconds in METER.seconds.items():
        print(f"{what:<12} {1e3 * seconds / steps:8.2f} ms a step  {100 * seconds / elapsed:6.2f} % of the time")
    print(f"{METER.saves} checkpoints, every {_CONFIG.value.checkpoint_every} steps")
    print("step    resident MiB")
    for step, mib in METER.memory:
        print(f"{step:>6}  {mib:9.1f}")
    later = np.array(METER.memory[len(METER.memory) // 2 :])
    if len(later) > 1:
        slope = np.polyfit(later[:, 0], later[:, 1], 1)[0] * 1024
        print(f"slope over the second half: {slope:+.2f} KiB a step")


if __name__ == "__main__":
    cli.run(main)
