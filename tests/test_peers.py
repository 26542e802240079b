"""No process waits for ever for one that died, hangs, fails or does something else: all end, and say why."""

import signal
import subprocess
import time

import pytest
from launching import finish, losses, rows, start, wait_until

LONG = ("--config.num_steps=5000", "--config.checkpoint_every=5000", "--config.dead_after=3")


def start_and_reach_step(config, workdir, step, *changes, **options):
    running = start(config, workdir, 2, *LONG, *changes, **options)
    wait_until(lambda: len(rows(workdir)) >= step, running)
    return running


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_dead_process_is_named_by_the_other(tmp_path, tiny_experiment, victim, number):
    running = start_and_reach_step(tiny_experiment, tmp_path / "run", 3)
    running[victim].send_signal(number)
    start_time = time.monotonic()
    (error,) = finish([running[1 - victim]], 76, timeout=60)
    seconds = time.monotonic() - start_time
    running[victim].kill()
    running[victim].communicate()
    line = error.splitlines()[-1]
    print(seconds, error)
    assert line.startswith(f"error: rank {victim} of 2 (host "), error
    assert "at step" in line and f"this is rank {1 - victim}, at step" in line, line
    assert "Traceback" not in error
    assert seconds < 15
