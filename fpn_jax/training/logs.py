"""What a run tells: WORKDIR/metrics.jsonl, TensorBoard events in WORKDIR/tensorboard, and the progress bar."""

import collections
import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from fpn_jax.errors import UserError, remedy
from fpn_jax.storage import paths
from fpn_jax.storage.spool import Spool

_WINDOW = 50  # steps that the rate is measured over
_PLAIN_SECONDS = 30.0  # between two lines of progress where stderr is no terminal
_FLUSH_SECONDS = 20.0  # between two flushes of the TensorBoard file


class MetricLog:
    """Writes the metrics of each step one step late, so that reading them from the device never holds up the next step.

    metrics.jsonl has one object per line, {"step", "time" (seconds since 1970), name: number or null (not finite)}.
    A run that continues after `first_step` drops the lines of later steps (and a last line that a kill cut short), so
    that no step is there twice; with evaluates_again also the line of that step's evaluation. With enabled=False
    (processes other than 0) nothing is written or shown, but the values still come back, as every process must stop at
    a loss that is not finite. Methods raise `UserError` where a file cannot be written.

    Of a workdir on gs:// the files grow in a `Spool`. `flush` and `write_now` wait until they are there: else a run
    that is killed after a checkpoint would lack the lines of the steps before it.
    """

    def __init__(
        self,
        workdir: str | Path,
        total_steps: int,
        first_step: int = 0,
        *,
        enabled: bool = True,
        evaluates_again: bool = False,
        stream: TextIO | None = None,
    ):
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._progress = _Progress(total_steps, first_step, stream or sys.stderr) if enabled else None
        self._jsonl: TextIO | None = None
        self._events: EventsWriter | None = None
        self._spool: Spool | None = None
        if enabled and paths.is_remote(workdir):
            self._spool = Spool(os.fspath(workdir))
            self._spool.fetch("metrics.jsonl")
        self._path = (self._spool.folder if self._spool else Path(workdir)) / "metrics.jsonl"
        if not enabled:
            return
        with _Writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(self._path, first_step, evaluates_again)
            self._jsonl = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - close() closes it
        with _Writing(self._path.parent / "tensorboard"):
            self._events = _open_events(self._path.parent / "tensorboard", first_step)
        self._flushed = time.monotonic()

    def write(self, step: int, metrics: Mapping[str, Any]) -> tuple[int, dict[str, float]] | None:
        """Keep the metrics of `step` and write those of the call before; returns what it wrote: (step, values).

        Values are scalars: numbers, NumPy or device arrays of shape [].
        """
        for value in metrics.values():
            if hasattr(value, "copy_to_host_async"):  # on its way while the device works on the next step
                value.copy_to_host_async()
        written = self._write_pending()
        self._pending = step, metrics
        if self._progress:
            self._progress.tick(step)
        return written

    def flush(self) -> tuple[int, dict[str, float]] | None:
        """Wait for the step kept back and write it; returns (step, values), or None if there is none."""
        written = self._write_pending()
        with _Writing(self._path):
            if self._events:
                self._events.flush()
        self._settle()
        return written

    def write_now(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write metrics at once, those of an evaluation for instance; None (no meaning) becomes null."""
        self._record(step, {name: None if v is None else _scalar(v) for name, v in metrics.items()})
        self._settle()

    def _settle(self) -> None:
        """Where steps pause: what is written is where it shall stay."""
        if self._spool:
            self._spool.copy()
        if self._progress:
            self._progress.pause()

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._progress:
            self._progress.message(text)

    def close(self) -> None:
        """Write what is left and close the files; does nothing the second time."""
        try:
            self._write_pending()
        finally:
            jsonl, events, progress = self._jsonl, self._events, self._progress
            spool, self._spool = self._spool, None
            self._jsonl = self._events = self._progress = None
            if progress:
                progress.close()
            with _Writing(self._path):
                try:
                    if jsonl:
                        jsonl.close()
                finally:
                    if events:
                        events.close()
                    if spool:
                        spool.close()

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _write_pending(self) -> tuple[int, dict[str, float]] | None:
        if self._pending is None:
            return None
        (step, metrics), self._pending = self._pending, None
        values = {name: _scalar(value) for name, value in metrics.items()}
        self._record(step, values)
        if self._progress:
            self._progress.show(step, values.get("loss"))
        return step, values

    def _record(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._jsonl is None or self._events is None:
            return
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        scalars = [Summary.Value(tag=k, simple_value=v) for k, v in values.items() if v is not None]
        with _Writing(self._path):
            self._jsonl.write(json.dumps({"step": step, "time": round(time.time(), 2)} | finite) + "\n")
            self._jsonl.flush()
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._events.flush()
                self._flushed = time.monotonic()


class _Writing:
    """Turns what the operating system says about a file into one line for the user."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError):
            raise UserError(f"{self._path}: {error.strerror}; {remedy(error)} or choose another --workdir") from None


def _scalar(value: Any) -> float:
    """With the fewest digits that give the same float32 (or whatever it was) again: 0.43, not 0.4300000071525574."""
    return float(str(np.asarray(value)[()]))


def last_evaluation(workdir: str) -> int | None:
    """The step that WORKDIR/metrics.jsonl has the newest scores of, None without any."""
    path, step = paths.path(workdir) / "metrics.jsonl", None
    if path.exists():
        for line in path.read_bytes().decode(errors="replace").splitlines():  # etils reads text its own way
            if '"eval/' in line:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off by a kill
                    step = json.loads(line)["step"]
    return step


def _drop_lines_after(path: Path, last_step: int, but_evaluations: bool) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _is_line_until(line, last_step, but_evaluations)]
    if kept == lines:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _is_line_until(line: str, last_step: int, but_evaluations: bool) -> bool:
    if not line.endswith("\n"):
        return False
    try:
        row = json.loads(line)
        again = but_evaluations and any(name.startswith("eval/") for name in row)
        return row["step"] < last_step + (not again)
    except (ValueError, KeyError, TypeError):  # no JSON, or none of ours
        return False


def _open_events(folder: Path, first_step: int) -> EventsWriter:
    """A TensorBoard event file; on continuing, TensorBoard hides what earlier files say about later steps.

    Not tensorboardX.SummaryWriter: a full disk ends its writing thread, and the run then hangs on the thread's queue.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # One name per process and start, or two starts within a second would write into one file.
    events = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.time_ns()}")
    if first_step:
        start = SessionLog(status=SessionLog.START)
        events.write_event(Event(wall_time=time.time(), step=first_step + 1, session_log=start))
    return events


class _Progress:
    """A bar on a terminal, else one plain line now and then: rate over the last steps, loss, remaining time."""

    def __init__(self, total_steps: int, first_step: int, stream: TextIO):
        self._total, self._stream = total_steps, stream
        self._seconds: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._last: tuple[int, float] | None = None  # step and time of the last tick
        self._printed = -math.inf
        self._bar = None
        if stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                file=stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}",
            )

    def tick(self, step: int) -> None:
        """A step was handed to the device."""
        now = time.perf_counter()
        if self._last and step > self._last[0]:
            self._seconds.append((now - self._last[1]) / (step - self._last[0]))
        self._last = step, now

    def pause(self) -> None:
        """What happens until the next tick (an evaluation, a checkpoint) is no part of the rate."""
        self._last = None

    def show(self, step: int, loss: float | None) -> None:
        """Step is done."""
        parts = [] if loss is None else [f"loss {loss:.4g}"]
        if seconds := self._step_seconds():
            parts.insert(0, f"{1 / seconds:.1f} step/s" if seconds < 1 else f"{seconds:.1f} s/step")
            parts.append(f"{tqdm.format_interval(round((self._total - step) * seconds))} left")
        now = time.monotonic()
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix_str("  ".join(parts), refresh=now - self._printed > 0.1 or step == self._total)
            self._printed = now if now - self._printed > 0.1 else self._printed
        elif now - self._printed > _PLAIN_SECONDS or step == self._total:
            self._printed = now
            self.message("  ".join([f"step {step}/{self._total}", *parts]))

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _step_seconds(self) -> float | None:
        """Mean over the window without compilations: steps that took ten times the median."""
        if not self._seconds:
            return None
        limit = 10 * statistics.median(self._seconds)
        return max(statistics.fmean(s for s in self._seconds if s <= limit), 1e-9)
