"""Real processes on this machine train and score as one does, on any number of devices, from any to any."""

import json
import signal

import pytest
from launching import finish, losses, rows, start, wait_until


def train(config, workdir, processes, *changes, devices=1):
    """Run it to its end and return the losses and the final metrics."""
    finish(start(config, workdir, processes, *changes, devices=devices))
    return losses(workdir), json.loads((workdir / "metrics.json").read_text())


def detections(workdir):
    """What was found, image by image; an image that was counted twice would have twice as many."""
    found = json.loads((workdir / "eval" / "val" / "detections.json").read_text())
    return sorted((x["image_id"], x["category_id"], round(x["score"], 3)) for x in found)


def test_two_processes_give_the_losses_and_scores_of_one(tmp_path, tiny_experiment):
    one_losses, one_metrics = train(tiny_experiment, tmp_path / "one", 1)
    two_losses, two_metrics = train(tiny_experiment, tmp_path / "two", 2)
    assert two_losses == pytest.approx(one_losses, rel=1e-3)
    assert len(two_losses) == 12
    assert two_metrics["num_images"] == one_metrics["num_images"] == 5  # not even over two processes
    assert two_metrics["num_detections"] == pytest.approx(one_metrics["num_detections"], abs=2)


@pytest.mark.slow
def test_processes_whose_devices_share_images_and_state_give_the_losses_of_one_process(tmp_path, tiny_experiment):
    changes = "--config.mesh.space=2", "--config.mesh.shard_params=data"
    text = tiny_experiment.read_text()
    tiny_experiment.write_text(text.replace('"buckets": [[64, 64]]', '"buckets": [[320, 64]]'))
    assert tiny_experiment.read_text() != text
    # What the mesh itself changes is rounding, which Adam makes more of; tests/training/test_mesh.py is about that.
    one_losses, one_metrics = train(tiny_experiment, tmp_path / "one", 1, *changes, devices=4)
    two_losses, two_metrics = train(tiny_experiment, tmp_path / "two", 2, *changes, devices=2)
    assert two_losses == pytest.approx(one_losses, rel=1e-3)
    assert len(two_losses) == 12
    assert two_metrics["num_images"] == one_metrics["num_images"] == 5
    assert two_metrics["num_detections"] == pytest.approx(one_metrics["num_detections"], abs=2)


@pytest.mark.slow
def test_one_two_and_four_processes_are_one_run_and_three_score_it(tmp_path, tiny_experiment):
    """16 images to train on and 5 to score, neither a multiple of the batch of 12 that all of these divide."""
    changes = ["--config.batch_size=12", "--config.eval_batch_size=12", "--config.eval_every=6"]
    runs = {world: train(tiny_experiment, tmp_path / f"of{world}", world, *changes) for world in (1, 2, 4)}
    expected = detections(tmp_path / "of1")
    assert len({image_id for image_id, *_ in expected}) == 5
    for world, (its_losses, metrics) in runs.items():
        assert its_losses == pytest.approx(runs[1][0], rel=1e-3)
        assert metrics["num_images"] == 5
        assert len(detections(tmp_path / f"of{world}")) == pytest.approx(len(expected), abs=2)
        # Only process 0 keeps a log, and as many steps and evaluations as there were.
        assert len(list((tmp_path / f"of{world}" / "tensorboard").iterdir())) == 1
        assert [row["step"] for row in rows(tmp_path / f"of{world}") if "eval/AP" in row] == [6, 12]
    workdir = tmp_path / "of1"
    for world in (1, 2, 3, 4):
        found = workdir / "eval" / "val" / "detections.json"
        found.unlink()
        finish(start(None, workdir, world, "--pictures=0", program=("-m", "fpn_jax.evaluate")))
        assert len(detections(workdir)) == pytest.approx(len(expected), abs=2)
        assert {image_id for image_id, *_ in detections(workdir)} == {image_id for image_id, *_ in expected}


@pytest.mark.slow
def test_a_run_moves_between_numbers_of_devices_and_processes(tmp_path, tiny_experiment):
    """Each part of the run continues the checkpoint of the one before, with the same batches: (processes, devices)."""
    config = [tiny_experiment, tmp_path / "moved"]
    changes = ["--config.batch_size=8", "--config.eval_batch_size=8", "--config.eval_every=3"]
    expected, whole = train(tiny_experiment, tmp_path / "whole", 1, *changes)
    for until, (processes, devices) in zip((3, 5, 8, 12), ((2, 4), (1, 4), (1, 1), (2, 2)), strict=True):
        stop_at = [f"--stop_at={until}"] if until < 12 else []
        running = start(*config, processes, *changes, *stop_at, devices=devices, program=("-c", STOPPING))
        errors = finish(running, 75 if stop_at else 0)
        assert f"{processes * devices} device" in errors[0]
    assert "continuing at step 8" in errors[0]
    # The first part was stopped where an evaluation was due, which the second made up for.
    assert [row["step"] for row in rows(tmp_path / "moved") if "eval/AP" in row] == [3, 6, 9, 12]
    assert losses(tmp_path / "moved") == pytest.approx(expected, rel=1e-3)
    moved = json.loads((tmp_path / "moved" / "metrics.json").read_text())
    assert moved["num_images"] == whole["num_images"]
    assert moved["num_detections"] == pytest.approx(whole["num_detections"], abs=2)


# The training command, which is told to stop after a given step as the platform would tell it.
STOPPING = """
from fpn_jax import cli, train
from fpn_jax.training.watch import StopRequest
stop_at = cli.flag("stop_at", int, 0, "")
StopRequest.came = lambda self, step: step == stop_at.value
cli.run(train.main)
"""


@pytest.mark.slow
def test_all_processes_stop_when_one_is_told_to(tmp_path, tiny_experiment):
    """The platform takes one worker away: all save at the same step and leave with the status of a stopped run."""
    workdir = tmp_path / "run"
    running = start(tiny_experiment, workdir, 2, "--config.num_steps=5000", "--config.checkpoint_every=5000")
    wait_until(lambda: len(rows(workdir)) >= 3, running)
    running[1].send_signal(signal.SIGTERM)
    errors = finish(running, 75)
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
    finish(start(path, workdir, 2), timeout=600)
    before = json.loads((workdir / "metrics.json").read_text())
    finish(start(None, workdir, 1, "--pictures=0", program=("-m", "fpn_jax.evaluate")))
    after = json.loads((workdir / "eval" / "val" / "metrics.json").read_text())
    assert after["num_images"] == before["num_images"] == 5
    # Killed between the join and the scores, the same command ends the run.
    (workdir / "metrics.json").unlink()
    finish(start(path, workdir, 1), timeout=600)
    assert (workdir / "metrics.json").exists()
