import io
import json
import math
import os
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from fpn_jax.errors import UserError
from fpn_jax.training import logs
from fpn_jax.training.logs import MetricLog, last_evaluation


class OnDevice:
    """A scalar that notes when it is copied and read, as a device array could."""

    def __init__(self, value: float):
        self.value, self.copies, self.reads = value, 0, 0

    def copy_to_host_async(self):
        self.copies += 1

    def __array__(self, dtype=None, copy=None):
        self.reads += 1
        return np.asarray(self.value, dtype or np.float32)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """Every event of the run's TensorBoard files, oldest file first (records: length, crc, data, crc)."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.name.split(".")[-1]):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_metrics_are_read_one_step_late(tmp_path):
    first, second = OnDevice(0.43), OnDevice(0.25)
    log = MetricLog(tmp_path, 2, stream=io.StringIO())
    assert log.write(1, {"loss": first}) is None
    assert (first.copies, first.reads) == (1, 0)
    assert not lines(tmp_path)
    assert log.write(2, {"loss": second}) == (1, {"loss": 0.43})
    assert (first.reads, second.reads) == (1, 0)
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert log.flush() == (2, {"loss": 0.25})
    assert log.flush() is None
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 0.43), (2, 0.25)]


def test_jax_arrays_numbers_and_numpy_are_scalars(tmp_path):
    import jax.numpy as jnp

    third = np.float32(1) / np.float32(3)
    with MetricLog(tmp_path, 1, stream=io.StringIO()) as log:
        log.write(1, {"a": jnp.float32(third), "b": np.float64(0.1), "c": 2, "d": jnp.bfloat16(1.5), "e": third})
        _, values = log.flush()
    assert values == {"a": float(str(third)), "b": 0.1, "c": 2.0, "d": 1.5, "e": float(str(third))}
    assert np.float32(lines(tmp_path)[0]["a"]) == third  # bit for bit through the file


def test_close_writes_what_was_kept_back(tmp_path):
    with MetricLog(tmp_path, 5, stream=io.StringIO()) as log:
        log.write(1, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_what_is_not_finite_comes_back_and_is_null_in_the_file(tmp_path):
    with MetricLog(tmp_path, 1, stream=io.StringIO()) as log:
        log.write(1, {"loss": math.nan, "grad_norm": math.inf})
        _, values = log.flush()
        log.write_now(1, {"eval/AP": None, "eval/AP50": 0.5})
    assert math.isnan(values["loss"]) and values["grad_norm"] == math.inf
    training, evaluation = lines(tmp_path)
    assert (training["loss"], training["grad_norm"]) == (None, None)
    assert (evaluation["eval/AP"], evaluation["eval/AP50"]) == (None, 0.5)


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', '{"step": 2, "loss": 9.0}', "\x00\x00"])
def test_a_run_that_continues_has_every_step_once(tmp_path, torn):
    with MetricLog(tmp_path, 6, stream=io.StringIO()) as log:
        for step in range(1, 5):
            log.write(step, {"loss": step / 10})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    with MetricLog(tmp_path, 6, 2, stream=io.StringIO()) as log:
        for step in range(3, 7):
            log.write(step, {"loss": step / 100})
    assert [(x["step"], x["loss"]) for x in lines(tmp_path)] == [
        *[(1, 0.1), (2, 0.2)],
        *[(3, 0.03), (4, 0.04), (5, 0.05), (6, 0.06)],
    ]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]


def test_an_evaluation_that_is_done_again_is_there_once(tmp_path):
    with MetricLog(tmp_path, 9) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": step})
            log.flush()
            log.write_now(step, {"eval/AP": 0.1 * step})
    whole = lines(tmp_path)
    with MetricLog(tmp_path, 9, first_step=3):  # which goes on after its evaluation
        pass
    assert lines(tmp_path) == whole
    with MetricLog(tmp_path, 9, first_step=2, evaluates_again=True):
        pass
    left = [(row["step"], [name for name in row if name not in ("step", "time")]) for row in lines(tmp_path)]
    assert left == [(1, ["loss"]), (1, ["eval/AP"]), (2, ["loss"])]


def test_tensorboard_gets_the_same_and_hides_steps_done_twice(tmp_path):
    for first in (0, 1):
        with MetricLog(tmp_path, 3, first, stream=io.StringIO()) as log:
            log.write(first + 1, {"loss": 0.5 + first})
            log.write_now(first + 1, {"eval/AP": None, "eval/AP50": 0.25})
    scalars = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert sorted(scalars) == [(1, "eval/AP50", 0.25), (1, "loss", 0.5), (2, "eval/AP50", 0.25), (2, "loss", 1.5)]
    assert [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START] == [2]


def test_a_flush_reaches_tensorboard(tmp_path):
    """A run that is killed after a checkpoint has lost nothing of the steps before it."""
    with MetricLog(tmp_path, 3, stream=io.StringIO()) as log:
        log.write(1, {"loss": 0.5})
        log.flush()
        assert [(e.step, v.tag) for e in events(tmp_path) for v in e.summary.value] == [(1, "loss")]


def test_other_processes_write_nothing_and_get_the_values(tmp_path):
    stream = io.StringIO()
    log = MetricLog(tmp_path / "run", 2, enabled=False, stream=stream)
    log.message("hello")
    log.write(1, {"loss": 0.5})
    log.write_now(1, {"eval/AP": 0.5})
    assert log.write(2, {"loss": math.nan}) == (1, {"loss": 0.5})
    assert math.isnan(log.flush()[1]["loss"])
    log.close()
    assert not (tmp_path / "run").exists() and not stream.getvalue()


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run/metrics.jsonl: .*another --workdir"):
        MetricLog(tmp_path / "file" / "run", 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full to stand for a full disk")
@pytest.mark.parametrize("which", ["jsonl", "tensorboard"])
def test_a_full_disk_is_one_line(tmp_path, which):
    log = MetricLog(tmp_path, 2, stream=io.StringIO())
    log.write(1, {"loss": 1.0})
    full = open("/dev/full", "w") if which == "jsonl" else open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    if which == "jsonl":
        log._jsonl.close()
        log._jsonl = full
    else:
        log._events.close()
        log._events._py_recordio_writer._writer = full
    with pytest.raises(UserError, match=r"metrics.jsonl: No space left on device; free some space"):
        log.write(2, {"loss": 1.0})
    with pytest.raises(UserError):  # what the files still hold is lost, and close() says so
        log.close()
    log.close()
    full.close()


def test_the_bar_tells_rate_loss_and_remaining_time(tmp_path, monkeypatch):
    seconds = iter([*range(100, 104), 1000, *range(2000, 2100)])  # half a second per step, once a long compilation
    monkeypatch.setattr(logs.time, "perf_counter", lambda: next(seconds) / 2)
    stream = Terminal()
    with MetricLog(tmp_path, 100, stream=stream) as log:
        log.message("ResNet-18, 12 M parameters")
        for step in range(1, 41):
            log.write(step, {"loss": 0.5})
            if step == 20:
                log.flush()
    shown = stream.getvalue()
    assert "ResNet-18, 12 M parameters\n" in shown
    last = [part for part in shown.split("\r") if "step/s" in part][-1]
    assert "40/100" in last and "2.0 step/s" in last and "loss 0.5" in last and "00:30 left" in last


def test_the_rate_is_the_mean_over_steps_and_knows_of_no_pause(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    stream = Terminal()
    with MetricLog(tmp_path, 30, stream=stream) as log:
        for step, seconds in ((2, 2), (4, 6), (6, 2), (8, 8), (10, 6), (12, 8), (14, 0)):  # two steps at a time
            log.write(step, {})
            if step == 8:
                log.flush()  # a checkpoint
            if step == 12:
                log.write_now(step, {"eval/AP": 0.5})
            now[0] += seconds
    shown = [part for part in stream.getvalue().split("\r") if "s/step" in part][-1]
    assert "2.0 s/step" in shown and "00:32 left" in shown  # of 1, 3, 1 and 3 seconds a step


def test_steps_that_take_no_time_and_a_step_told_twice_have_a_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(logs.time, "perf_counter", lambda: 7.0)
    stream = Terminal()
    with MetricLog(tmp_path, 3, stream=stream) as log:
        for step in (1, 2, 2, 3):
            log.write(step, {"loss": 0.5})
    assert "00:00 left" in stream.getvalue()


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
    stream = io.StringIO()
    with MetricLog(tmp_path, 100, stream=stream) as log:
        for step in range(1, 101):
            log.write(step, {"loss": 0.5})
            now[0] += 2.0
    shown = stream.getvalue().splitlines()
    assert 3 < len(shown) < 12 and "\r" not in stream.getvalue()
    assert shown[-1] == "step 100/100  2.0 s/step  loss 0.5  00:00 left"


def test_the_last_evaluation_is_that_of_the_last_whole_line(tmp_path):
    assert last_evaluation(str(tmp_path)) is None
    lines = [{"step": 3, "eval/AP": 0.5}, {"step": 4, "loss": 1.0}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 5, "eval/AP"')
    assert last_evaluation(str(tmp_path)) == 3
