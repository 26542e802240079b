"""A run that is killed in the middle continues as if nothing had happened: the losses are equal bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(config_path, workdir):
    changes = ["--config.num_steps=100", "--config.checkpoint_every=10"]
    return [sys.executable, "-m", "fpn_jax.train", f"--config={config_path}", f"--workdir={workdir}", *changes]


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def finished_checkpoints(workdir):
    folder = workdir / "checkpoints"
    return [p for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []


def environment():
    return os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def test_a_killed_run_continues_with_the_same_losses(tmp_path, tiny_experiment):
    steps = 100
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    whole = subprocess.run(
        command(tiny_experiment, unbroken), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert whole.returncode == 0, whole.stderr
    expected = losses(unbroken)
    assert sorted(expected) == list(range(1, steps + 1))

    victim = subprocess.Popen(command(tiny_experiment, broken), cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not finished_checkpoints(broken) and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    before = sorted(losses(broken))
    assert before[-1] < steps, "the run ended before it could be killed"

    again = subprocess.run(
        command(tiny_experiment, broken), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "continuing at step" in again.stderr
    assert losses(broken) == expected
    assert json.loads((broken / "metrics.json").read_text()) == json.loads((unbroken / "metrics.json").read_text())
