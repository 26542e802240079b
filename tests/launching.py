"""Commands as a user would start them: one process, or several on this machine that find each other."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment(devices=1):
    """This process's, with so many CPU devices: what commands compile is compiled as quickly as in the tests."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])}


def start(config, workdir, processes=1, *changes, devices=1, each=None, program=("-m", "fpn_jax.train")):
    """The training command in that many processes; each[rank] are further arguments of one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    given = [f"--config={config}"] * (config is not None)
    command = [sys.executable, *program, *given, f"--workdir={workdir}", *changes]
    running = []
    for rank in range(processes):
        place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": f"{processes}", "JAX_PROCESS_ID": f"{rank}"}
        its_own = environment(devices) | (place if processes > 1 else {})
        arguments = command + (each or {}).get(rank, [])
        running.append(subprocess.Popen(arguments, cwd=ROOT, env=its_own, stdout=-1, stderr=-1, text=True))
    return running


def finish(running, status=0, timeout=300):
    """Wait for all; their stderr, after making sure of their exit status."""
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [status] * len(running), "\n---\n".join(errors)
    return errors


def rows(workdir):
    """The lines of metrics.jsonl that are there so far."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(workdir):
    """{step: loss}; no step may be there twice."""
    pairs = [(row["step"], row["loss"]) for row in rows(workdir) if "loss" in row]
    assert len(dict(pairs)) == len(pairs), f"a step is there twice: {[step for step, _ in pairs]}"
    return dict(pairs)


def wait_until(condition, running, timeout=300):
    """Until condition() holds, as long as all processes run."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        for process in running:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
