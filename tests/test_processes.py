"""Two real processes on this machine train and score as one does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def start(config, workdir, processes, *changes, devices=1):
    """The training command in that many processes with that many devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "fpn_jax.train", f"--config={config}", f"--workdir={workdir}", *changes]
    running = []
    for rank in range(processes):
        flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"XLA_FLAGS": flags}
        if processes > 1:
            place = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(rank),
            }
            environment |= place
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True))
    return running


def train(config, workdir, processes, *changes, devices=1):
    """Run it to its end and return the losses and the final metrics."""
    for process in start(config, workdir, processes, *changes, devices=devices):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    return losses, json.loads((workdir / "metrics.json").read_text())


def test_two_processes_give_the_losses_and_scores_of_one(tmp_path, tiny_experiment):
    one_losses, one_metrics = train(tiny_experiment, tmp_path / "one", 1)
    two_losses, two_metrics = train(tiny_experiment, tmp_path / "two", 2)
    assert two_losses == pytest.approx(one_losses, rel=1e-3)
    assert len(two_losses) == 12
    assert two_metrics["num_images"] == one_metrics["num_images"] == 5  # not even over two processes
    assert two_metrics["num_detections"] == pytest.approx(one_metrics["num_detections"], abs=2)


@pytest.mark.slow
def test_processes_whose_devices_share_images_and_state_give_the_losses_of_one_process(tmp_path, tiny_experiment):
    changes = "--config.mesh.space=2", "--config.mesh.shard_params=data", "--config.data.buckets=((320, 64),)"
    # What the mesh itself changes is rounding, which Adam makes more of; tests/training/test_mesh.py is about that.
    one_losses, one_metrics = train(tiny_experiment, tmp_path / "one", 1, *changes, devices=4)
    two_losses, two_metrics = train(tiny_experiment, tmp_path / "two", 2, *changes, devices=2)
    assert two_losses == pytest.approx(one_losses, rel=1e-3)
    assert len(two_losses) == 12
    assert two_metrics["num_images"] == one_metrics["num_images"] == 5
    assert two_metrics["num_detections"] == pytest.approx(one_metrics["num_detections"], abs=2)


def test_all_processes_stop_when_one_is_told_to(tmp_path, tiny_experiment):
    """The platform takes one worker away: all save at the same step and leave with the status of a stopped run."""
    workdir = tmp_path / "run"
    running = start(tiny_experiment, workdir, 2, "--config.num_steps=5000", "--config.checkpoint_every=5000")
    log, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=200)[1] for process in running]
    assert [process.returncode for process in running] == [75, 75], errors
    (saved,) = [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert all(f"stopped after step {saved} as told" in error for error in errors)


@pytest.mark.slow
def test_four_stages_on_two_processes_are_read_by_one(tmp_path, tiny_config, scenes_dir):
    from experiments.faster_rcnn_r50_fpn_4step import stages

    tiny_config.update(num_steps=4, batch_size=2, eval_batch_size=2, checkpoint_every=4, eval_every=0, pictures=1)
    tiny_config.data.data_dir = str(scenes_dir)
    values = json.dumps(tiny_config.to_dict() | {"stages": []})
    path, workdir = tmp_path / "stages.py", tmp_path / "run"
    path.write_text(
        "import json, ml_collections\nfrom experiments.faster_rcnn_r50_fpn_4step import stages\n"
        f"def get_config():\n    config = ml_collections.ConfigDict(json.loads({values!r}))\n"
        "    config.stages = stages(4, 4, (32, 16))\n    return config\n"
    )
    assert len(stages(4, 4, (32, 16))) == 4
    for process in start(path, workdir, 2):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    before = json.loads((workdir / "metrics.json").read_text())
    command = [sys.executable, "-m", "fpn_jax.evaluate", f"--workdir={workdir}", "--pictures=0"]
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    alone = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    after = json.loads((workdir / "eval" / "val" / "metrics.json").read_text())
    assert after["num_images"] == before["num_images"] == 5
    # Killed between the join and the scores, the same command ends the run.
    (workdir / "metrics.json").unlink()
    again = start(path, workdir, 1)[0]
    _, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    assert (workdir / "metrics.json").exists()
