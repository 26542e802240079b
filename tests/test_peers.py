"""No process waits for ever for one that died, hangs, fails or does something else: all end, and say why."""

import json
import re
import signal
import threading
import time

import pytest
from launching import finish, rows, start, wait_until

from fpn_jax.errors import ProcessLost, UserError
from fpn_jax.training import peers, processes, roll_call

# To its peers like a training run, steps with a collective in each, but starts in seconds; does as told at step 20.
PROGRAM = """
import sys, time
from pathlib import Path
from fpn_jax import cli
from fpn_jax.errors import UserError
from fpn_jax.training import peers, processes, sharding
from absl import flags
workdir = cli.flag("workdir", str, None, "")
act = {name: cli.flag(name, bool, False, "") for name in ("hang", "fail", "break")}
dead_after, stall_after = cli.flag("dead_after", float, 2.0, ""), cli.flag("stall_after", float, 60.0, "")
def main(argv):
    processes.start_processes(30, dead_after.value)
    with peers.watched(dead_after.value, stall_after.value):
        for step in range(1, 10**6):
            peers.at("training", step)
            sharding.gather_objects(b"word")
            if step == 20:
                Path(workdir.value).touch()
                if act["hang"].value:
                    peers.at("waiting for data")
                    time.sleep(600)
                if act["fail"].value:
                    raise UserError("cat.jpg is no image")
                if act["break"].value:
                    raise KeyError("bug")
            time.sleep(0.02)
cli.run(main)
"""


def start_program(tmp_path, *changes, each=None):
    running = start(None, tmp_path / "there", 2, *changes, each=each, program=("-c", PROGRAM))
    wait_until((tmp_path / "there").exists, running, 100)
    return running


def last_line(error):
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_dead_process_is_named_by_the_other(tmp_path, victim, number):
    running = start_program(tmp_path)
    other = running[1 - victim]
    running[victim].send_signal(number)
    start = time.monotonic()
    (error,) = finish([other], 76, 30)
    seconds = time.monotonic() - start
    running[victim].kill()
    running[victim].communicate()
    line = last_line(error)
    place = re.search(
        rf"^error: rank {victim} of 2 \(host .*at step (\d+), training; this is rank {1 - victim}, at", line
    )
    assert place and int(place[1]) > 0, error
    assert seconds < 10


def test_a_process_that_hangs_is_named_by_all(tmp_path):
    running = start_program(tmp_path, "--stall_after=2", each={1: ["--hang"]})
    lines = [last_line(error) for error in finish(running, 76, 30)]
    assert any("is at step 20, waiting for data; rank 0 of 2" in line for line in lines), lines  # unless it has left
    for rank, line in enumerate(lines):
        assert line.startswith("error: nothing moved for 2 s (config.stall_after): rank 1 of 2 (host "), line
        assert "is at step 20, waiting for data" in line and f"this is rank {rank}, at step" in line, line


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_fails_alone_takes_the_others_along(tmp_path, victim):
    running = start_program(tmp_path, each={victim: ["--fail"]})
    (error,) = finish([running[1 - victim]], 76, 30)
    assert f"rank {victim} of 2 (host " in last_line(error)
    assert "failed at step 20, training: cat.jpg is no image" in last_line(error)
    assert finish([running[victim]], 2, 30)[0].splitlines()[-1] == "error: cat.jpg is no image"


def test_one_error_on_all_is_no_one_elses(tmp_path):
    for error in finish(start_program(tmp_path, "--fail"), 2, 30):
        assert last_line(error) == "error: cat.jpg is no image"


def test_a_bug_keeps_its_traceback(tmp_path):
    running = start_program(tmp_path, each={1: ["--break"]})
    (error,) = finish([running[0]], 76, 30)
    assert "failed at step 20, training: KeyError: 'bug'" in last_line(error)
    assert "Traceback" in finish([running[1]], 1, 30)[0]


JOIN = "import sys; from fpn_jax.training import processes; processes.start_processes(join_within=2)"


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_others_in_vain_says_so_and_ends(tmp_path, rank):
    running = start(None, tmp_path, 2, program=("-c", JOIN))
    running[1 - rank].send_signal(signal.SIGSTOP)  # before it gets so far
    try:
        (error,) = finish([running[rank]], 76, 30)
    finally:
        running[1 - rank].kill()
        running[1 - rank].communicate()
    told, ended = error.splitlines()
    assert told.startswith(f"rank {rank} of 2 waits ") and f"rank {1 - rank}" in told and told.endswith("at most 2 s")
    assert ended.startswith("error: ") and "have not come within 2 s (config.join_within)" in ended


def test_processes_of_different_configs_both_refuse_with_the_same_line(tmp_path, tiny_experiment):
    workdir = tmp_path / "run"
    changes = ["--config.optim.learning_rate=0.5", "--config.batch_size=4"]
    first, second = finish(start(tiny_experiment, workdir, 2, each={1: changes}), 2)
    assert first == second
    assert first.startswith("error: the processes of this job differ in config.batch_size: 2 on rank 0, 4 on rank 1; ")
    assert "config.optim.learning_rate: 0.005 on rank 0, 0.5 on rank 1: start all with the same command" in first
    assert not workdir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_training_run_names_the_process_that_was_killed_and_continues(tmp_path, tiny_experiment, victim):
    workdir = tmp_path / "run"
    changes = ["--config.checkpoint_every=2", "--config.dead_after=4"]
    running = start(tiny_experiment, workdir, 2, *changes, "--config.num_steps=5000")
    wait_until(lambda: len(rows(workdir)) >= 5, running)
    running[victim].kill()
    start_time = time.monotonic()
    (error,) = finish([running[1 - victim]], 76)
    assert time.monotonic() - start_time < 15
    running[victim].communicate()
    assert last_line(error).startswith(f"error: rank {victim} of 2 (host "), error
    # The tail of the loop is another schedule's: only that it goes on is of interest here.
    errors = finish(start(tiny_experiment, workdir, 2, *changes, "--config.num_steps=5000", "--config.num_steps=12"))
    assert "continuing at step" in errors[0]


class Store:
    """A store that all processes of a test share, and that can stop answering."""

    def __init__(self, values, rank, world):
        self.values, self.rank, self.world, self.address = values, rank, world, "nowhere:1"

    def write(self, key, value):
        self.values[key] = value

    def below(self, folder):
        return {key.removeprefix(f"{folder}/"): v for key, v in self.values.items() if key.startswith(f"{folder}/")}


def agree_on(monkeypatch, all_facts, within=5.0):
    """What each of several processes gets from agreeing: None or the exception."""
    values, results = {}, {}
    local = threading.local()
    monkeypatch.setattr(processes, "key_values", lambda: Store(values, local.rank, 3))
    monkeypatch.setattr(roll_call, "_calls", iter([0] * 9))

    def run(rank):
        local.rank = rank
        try:
            results[rank] = roll_call.agree("facts", all_facts[rank], within)
        except (UserError, ProcessLost) as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in all_facts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_equal_facts_pass(monkeypatch):
    assert agree_on(monkeypatch, {rank: {"jax": "1", "n": 2} for rank in range(3)}) == dict.fromkeys(range(3))


def test_facts_that_differ_are_told_with_rank_and_value(monkeypatch):
    facts = {0: {"jax": "1", "n": 2}, 1: {"jax": "2", "n": 2}, 2: {"jax": "1", "n": 2, "more": 3}}
    results = agree_on(monkeypatch, facts)
    assert len({str(error) for error in results.values()}) == 1
    assert "jax: 1 on ranks 0 2, 2 on rank 1; more: not there on ranks 0 1, 3 on rank 2: start" in str(results[0])
    assert isinstance(results[0], UserError)


def test_who_does_not_come_to_compare_is_named(monkeypatch):
    results = agree_on(monkeypatch, {0: {"jax": "1"}, 2: {"jax": "1"}}, within=0.3)
    assert all(
        isinstance(error, ProcessLost) and "rank 1 of 3 did not come" in str(error) for error in results.values()
    )


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:46474"), True),
        (RuntimeError("NCCL operation ncclAllReduce failed: remote process exited or there was a network error"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes"), False),
        (UserError("the checkpoint could not be written"), False),
        (ConnectionRefusedError("connection refused"), False),  # a download's
    ],
)
def test_an_error_of_a_collective_is_told_from_others(error, lost):
    assert peers.lost_connection(error) == lost
    wrapped = UserError("the checkpoint could not be written")
    wrapped.__cause__ = error
    assert peers.lost_connection(wrapped) == lost


def test_a_single_process_is_only_warned(capsys):
    with peers.watched(dead_after=1.2, stall_after=0.3):
        peers.at("training", 812)
        time.sleep(1.0)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: step 812 has not moved for ") and len(warning.splitlines()) == 1


def test_an_error_of_a_single_process_goes_its_way():
    with pytest.raises(UserError, match="mine"), peers.watched(60, 60):
        raise UserError("mine")


def test_the_line_of_each_process(capsys, monkeypatch):
    monkeypatch.setattr(roll_call, "_announcements", iter([0, 1]))
    roll_call.announce(16, "scenes train", 448)
    roll_call.announce(16, "scenes train", 448)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rank 0 of 1 on ") and ": 8 x cpu; rows 0 to 15 of each batch of 16 from 448 images" in line
    total, available = roll_call.host_memory()
    assert 0 < available < total
    assert json.dumps(roll_call.versions()).count(".") > 6
