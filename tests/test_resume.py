"""A run that is killed in the middle continues as if nothing had happened: the losses are equal bit for bit."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from launching import environment

ROOT = Path(__file__).parent.parent
STEPS = 48


def command(config_path, workdir):
    changes = [f"--config.num_steps={STEPS}", "--config.checkpoint_every=6"]
    return [sys.executable, "-m", "fpn_jax.train", f"--config={config_path}", f"--workdir={workdir}", *changes]


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def finished_checkpoints(workdir):
    folder = workdir / "checkpoints"
    return [p for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []


def being_written(workdir):
    return any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())


def test_a_killed_run_continues_with_the_same_losses(tmp_path, tiny_experiment):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    whole = subprocess.run(
        command(tiny_experiment, unbroken), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    expected = losses(unbroken)
    assert sorted(expected) == list(range(1, STEPS + 1))

    victim = subprocess.Popen(command(tiny_experiment, broken), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (finished_checkpoints(broken) and being_written(broken)) and time.monotonic() < deadline:
        time.sleep(0.001)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    before = sorted(losses(broken))
    assert before[-1] < STEPS, "the run ended before it could be killed"
    assert being_written(broken), "the save was done before it could be cut short"

    again = subprocess.run(
        command(tiny_experiment, broken), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "continuing at step" in again.stderr
    assert losses(broken) == expected
    assert json.loads((broken / "metrics.json").read_text()) == json.loads((unbroken / "metrics.json").read_text())


def test_a_run_told_to_stop_saves_first_and_says_so(tmp_path, tiny_experiment):
    """SIGTERM: the next step is saved, the status is one of its own, and nothing is lost or done twice."""
    workdir = tmp_path / "run"
    changes = [f"--config.num_steps={STEPS}", "--config.checkpoint_every=1000"]
    arguments = [sys.executable, "-m", "fpn_jax.train", f"--config={tiny_experiment}", f"--workdir={workdir}", *changes]
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (workdir / "metrics.jsonl").exists():
        time.sleep(0.01)
    while time.monotonic() < deadline and len(losses(workdir)) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    (saved,) = finished_checkpoints(workdir)
    assert f"stopped after step {saved.name} as told, which is saved; the same command continues" in errors
    assert sorted(losses(workdir)) == list(range(1, int(saved.name) + 1))
    again = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"continuing at step {saved.name}" in again.stderr
    assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
    assert "compiled once more" not in again.stderr + errors
    waits = [json.loads(line).get("data_wait") for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert (
        all(0 <= wait <= 1 for wait in waits if wait is not None) and sum(wait is not None for wait in waits) == STEPS
    )
