"""A run that is killed at many random moments ends as if it never had been: same losses bit for bit, same scores.

Where it was killed is printed: `python -m pytest -m slow -s tests/test_kills.py`.
"""

import collections
import json
import random
import re
import time

import pytest
from launching import finish, losses, rows, start

STEPS, KILLS, LIMIT = 40, 50, 900
CHANGES = [f"--config.num_steps={STEPS}", "--config.checkpoint_every=1", "--config.eval_every=8"]


def finished(folder):
    """Steps of the checkpoints there that orbax has finished."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def being_written(folder):
    return folder.exists() and any("tmp" in p.name for p in folder.iterdir())


def moments(workdir, chance):
    """Kinds of moments, each a function that tells whether to kill now; called anew for every start."""
    begin, before, delay = time.monotonic(), len(rows(workdir)), chance.random()
    more = before + chance.randrange(1, 6)
    return {
        "any second": lambda: time.monotonic() - begin > 20 * delay,
        "start-up": lambda: time.monotonic() - begin > 5 * delay,
        "soon after some steps": lambda: len(rows(workdir)) >= more,
        "checkpoint being written": lambda: len(rows(workdir)) >= more and being_written(workdir / "checkpoints"),
        "best being written": lambda: being_written(workdir / "best"),
        "after the last step": lambda: STEPS in [row["step"] for row in rows(workdir)],
    }


def place_of(workdir, before):
    """Where the kill struck, as far as the workdir tells."""
    steps = [row["step"] for row in rows(workdir) if "loss" in row]
    if len(steps) == before:
        return "before a new step"
    return "during the last evaluation" if steps[-1] == STEPS else "in the middle"


@pytest.mark.slow
def test_fifty_kills_lose_nothing(tmp_path, tiny_experiment, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))  # empty at first: a compile is killed, too
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    chance, seed_time = random.Random(0), time.monotonic()
    kills, struck, runs = 0, collections.Counter(), []
    while kills < KILLS:
        workdir = tmp_path / f"run{len(runs)}"
        runs.append(workdir)
        process = None
        while process is None or process.returncode != 0:
            newest, before = max(finished(workdir / "checkpoints"), default=0), len(losses(workdir))
            (process,) = start(tiny_experiment, workdir, 1, *CHANGES)
            kind = chance.choice(list(moments(workdir, chance)))
            now, extra = moments(workdir, chance)[kind], chance.choice([0, 0, 0.02, 0.2, 1.0]) * chance.random()
            while kills < KILLS and process.poll() is None and not now():
                time.sleep(0.002)
            if kills < KILLS and process.poll() is None:
                time.sleep(extra)
                process.kill()
            _, errors = process.communicate(timeout=LIMIT)
            assert process.returncode in (0, -9), errors
            if process.returncode == -9:
                kills += 1
                struck[kind] += 1
                struck[place_of(workdir, before)] += 1
            # A failed save never costs the one before, and the next start goes on from there.
            assert max(finished(workdir / "checkpoints"), default=0) >= newest
            continued = re.search(r"continuing at step (\d+)", errors)
            assert not newest or not re.search("starting from step", errors)
            assert continued is None or int(continued[1]) >= newest
    whole = tmp_path / "whole"
    finish(start(tiny_experiment, whole, 1, *CHANGES))
    print(f"\n{kills} kills in {len(runs)} runs, {time.monotonic() - seed_time:.0f} s: {dict(struck)}")
    for workdir in runs:
        assert losses(workdir) == losses(whole)
        assert sorted(losses(workdir)) == list(range(1, STEPS + 1))
        assert scores(workdir) == scores(whole)
        assert finished(workdir / "best") == finished(whole / "best")
        assert finished(workdir / "checkpoints") == finished(whole / "checkpoints")
        for name in ("metrics.json", "classes.json", "eval/val/detections.json"):
            assert json.loads((workdir / name).read_text()) == json.loads((whole / name).read_text())
        assert plain_files(workdir) == plain_files(whole), "a kill left something lying about"


def plain_files(workdir):
    """Names of what is there besides checkpoints and TensorBoard's files, which are named by chance or by start."""
    own = [path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()]
    return {str(path) for path in own if path.parts[0] not in ("checkpoints", "best", "tensorboard")}


def scores(workdir):
    """Every evaluation in the order of the log, without what is only a time."""
    return [{k: v for k, v in row.items() if k != "time"} for row in rows(workdir) if "eval/AP" in row]
