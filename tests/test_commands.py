"""The commands one after another, as a user gives them, on tiny data: what they write and how they refuse."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from launching import environment
from ml_collections import ConfigDict

from fpn_jax.data.datasets import open_split
from fpn_jax.evaluate import folder_name
from fpn_jax.predict import find_images, picture_names

ROOT = Path(__file__).parent.parent


def run(module, *arguments):
    command = [sys.executable, "-m", f"fpn_jax.{module}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def fails_in_one_line(done):
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return errors[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes_dir):
    """A workdir after three steps, and what the command printed."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    overrides = {
        "num_steps": 3,
        "batch_size": 2,
        "eval_batch_size": 2,
        "checkpoint_every": 2,
        "pictures": 2,
        "data.data_dir": scenes_dir,
        "data.shorter": "(64,)",
        "data.longest": 64,
        "data.buckets": "((64, 64),)",
        "model.backbone.width": 4,
        "model.neck.channels": 8,
        "model.box_head.channels": 16,
        "model.box.score_threshold": 0.0,
    }
    arguments = [f"--config.{key}={value}" for key, value in overrides.items()]
    done = run("train", "--config=experiments/demo.py", f"--workdir={workdir}", *arguments)
    assert done.returncode == 0, done.stderr
    return workdir, arguments, done


def test_train_leaves_scores_pictures_and_a_curve(trained):
    workdir, _, done = trained
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert {"AP", "AP50", "AP75", "AP_small", "AR100", "per_class"} <= metrics.keys()
    assert metrics["num_images"] == 5  # the third batch of two is half padding
    assert metrics == json.loads((workdir / "eval/val/metrics.json").read_text())
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == [1, 2, 3]
    assert cv2.imread(str(workdir / "curves.png")) is not None
    assert cv2.imread(str(workdir / "eval/val/overview.jpg")) is not None
    assert len(list((workdir / "eval/val/pictures").glob("*.jpg"))) == 2
    assert str(workdir) in done.stdout


def test_a_finished_run_is_not_trained_again(trained):
    workdir, arguments, first = trained
    before = (workdir / "metrics.jsonl").read_text()
    again = run("train", "--config=experiments/demo.py", f"--workdir={workdir}", *arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert (workdir / "metrics.jsonl").read_text() == before


def test_evaluate_scores_as_the_training_did(trained, scenes_dir):
    workdir, *_ = trained
    expected = json.loads((workdir / "metrics.json").read_text())
    done = run("evaluate", f"--workdir={workdir}", "--pictures=1")
    assert done.returncode == 0, done.stderr
    assert json.loads((workdir / "eval/val/metrics.json").read_text()) == expected
    results = json.loads((workdir / "eval/val/detections.json").read_text())
    split = open_split(scenes_dir, "scenes", "val")
    assert {r["image_id"] for r in results} <= set(split.index.image_id.tolist())
    assert {r["category_id"] for r in results} <= set(split.category_ids)
    train = run("evaluate", f"--workdir={workdir}", "--split=train", "--checkpoint=latest", "--pictures=0")
    assert train.returncode == 0, train.stderr
    assert json.loads((workdir / "eval/train/metrics.json").read_text())["num_images"] == 16


def test_predict_draws_what_it_can_read_and_names_the_rest(trained, tmp_path):
    workdir, *_ = trained
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    cv2.imwrite(str(folder / "wide.png"), rng.integers(0, 256, (30, 90, 3), np.uint8))
    cv2.imwrite(str(folder.parent / "grey.jpg"), rng.integers(0, 256, (50, 40), np.uint8))
    (folder / "broken.jpg").write_text("not a picture")
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "folder.jpg").mkdir()
    done = run("predict", f"--workdir={workdir}", f"--output={tmp_path}/out", "--threshold=0", tmp_path / "in")
    error = fails_in_one_line(done)
    assert all(name in error for name in ("broken.jpg: ", "gone.jpg: cannot be read (No such file"))
    assert error.endswith("the others are done")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["detections.json", "grey.jpg", "wide.jpg"]
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {Path(r["file_name"]).name for r in results} == {"grey.jpg", "wide.png"}
    for row in results:
        x, y, w, h = row["bbox"]
        width, height = (90, 30) if "wide" in row["file_name"] else (40, 50)
        assert x >= 0 and y >= 0 and x + w <= width + 1e-3 and y + h <= height + 1e-3
        assert 1 <= row["category_id"] <= 8


def test_predict_writes_over_no_picture_that_it_was_given(trained, tmp_path):
    workdir, *_ = trained
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((40, 50, 3), np.uint8))
    before = (tmp_path / "a.jpg").read_bytes()
    done = run("predict", f"--workdir={workdir}", f"--output={tmp_path}", tmp_path / "a.jpg")
    assert f"--output={tmp_path}: a.jpg there is one of the pictures given" in fails_in_one_line(done)
    assert (tmp_path / "a.jpg").read_bytes() == before


def test_pictures_have_names_of_their_own():
    paths = ["b.jpg", "in/a.jpg", "in/a.png", "/x/c.jpg", "/y/c.jpg", "x_c.jpg", "b/d.png", "b/d.png"]
    names = picture_names(list(map(Path, paths)))
    assert names[:5] == ["b.jpg", "in_a.jpg.jpg", "in_a.png.jpg", "x_c.jpg_4.jpg", "y_c.jpg"]
    assert len(set(names)) == len(paths)


def test_a_finished_run_that_goes_on_has_no_scores_until_it_is_scored_again(trained, tmp_path):
    """Killed before its last evaluation it would show those of the shorter run."""
    workdir, arguments, _ = trained
    longer = tmp_path / "longer"
    shutil.copytree(workdir, longer)
    demo = ["train", "--config=experiments/demo.py", f"--workdir={longer}", *arguments, "--config.num_steps=4"]
    demo += ["--config.data.eval_split=train"]
    (longer / "eval").rename(tmp_path / "aside")
    (longer / "eval").write_text("in the way")  # of the evaluation, after step 4 is saved
    assert run(*demo).returncode != 0
    assert (longer / "checkpoints" / "4").exists() and not (longer / "metrics.json").exists()
    (longer / "eval").unlink()
    done = run(*demo)
    assert done.returncode == 0, done.stderr
    assert (longer / "metrics.json").exists() and "eval/AP" in (longer / "metrics.jsonl").read_text().splitlines()[-1]
    # The best on other images says nothing of these.
    assert [folder.name for folder in (longer / "best").iterdir()] == ["4"]


def test_a_change_between_two_starts_is_told(trained, tmp_path):
    workdir, arguments, _ = trained
    changed = tmp_path / "changed"
    shutil.copytree(workdir, changed)
    demo = ["train", "--config=experiments/demo.py", f"--workdir={changed}", *arguments]
    refused = fails_in_one_line(run(*demo, "--config.optim.name=sgd"))
    assert "another architecture" in refused and refused.endswith("(changed: optim.name is 'sgd', was 'adamw')")
    asked = ("num_steps=2", "optim.learning_rate=0.25", "pictures=3", "data.eval_split=train")
    done = run(*demo, *(f"--config.{value}" for value in asked))
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith(("changed: ", "warning: "))]
    assert "changed: data.eval_split is 'train', was 'val'" in told
    assert "changed: num_steps is 2, was 3" in told
    assert any(line.startswith("changed: optim.learning_rate is 0.25, was ") for line in told)
    assert told[-1] == "warning: the run was finished at step 3, num_steps=2: nothing is done"
    assert (changed / "config.json").read_bytes() == (workdir / "config.json").read_bytes()
    assert f"{changed}/eval/val/overview.jpg" in done.stdout  # and not of the split that nothing was scored on
    (changed / "metrics.json").unlink()  # as if it had been killed before: the best of this step is of other images
    done = run(*demo, "--config.data.eval_split=train")
    assert done.returncode == 0, done.stderr
    assert json.loads((changed / "metrics.json").read_text())["num_images"] == 16


def test_a_run_goes_on_with_its_own_classes_and_objects_alone(trained, tmp_path):
    workdir, arguments, _ = trained
    copied = tmp_path / "copied"
    shutil.copytree(workdir, copied)
    demo = ["train", "--config=experiments/demo.py", f"--workdir={copied}", *arguments, "--config.num_steps=4"]
    known = json.loads((copied / "classes.json").read_text())
    (copied / "classes.json").write_text(json.dumps(known | {"names": ["other", *known["names"][1:]]}))
    (copied / "metrics.json").unlink()  # as if it had been killed
    data = copied / "checkpoints/3/data/metadata"
    saved = json.loads(data.read_text())
    assert re.fullmatch("[0-9a-f]{8}", saved["objects (checksum)"])
    data.write_text(json.dumps(saved | {"objects (checksum)": "12345678"}))
    done = run(*demo)
    assert "was trained with objects (checksum) '12345678', now" in fails_in_one_line(done)
    assert "warning: scenes has other names for the categories of" in done.stderr and "there 'other'" in done.stderr
    (copied / "classes.json").write_text(json.dumps({"names": ["a"], "category_ids": [7]}))
    refused = fails_in_one_line(run(*demo))
    assert "was trained on 1 classes with ids [7]" in refused
    assert f"--config.init_from={copied} --config.init_reset_classes=True takes all other weights" in refused


def test_a_picture_that_fits_no_bucket_is_told_beside_the_others(trained, tmp_path):
    workdir, *_ = trained
    copied = tmp_path / "copied"
    shutil.copytree(workdir, copied)
    config = json.loads((copied / "config.json").read_text())
    config["data"]["buckets"] = [[32, 64]]
    (copied / "config.json").write_text(json.dumps(config))
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in/tall.png"), np.zeros((90, 30, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "in/wide.png"), np.zeros((30, 90, 3), np.uint8))
    error = fails_in_one_line(run("predict", f"--workdir={copied}", f"--output={tmp_path}/out", tmp_path / "in"))
    assert "in/tall.png: the image: 90 x 30 pixels" in error and error.endswith("the others are done")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["detections.json", "wide.jpg"]


def test_other_scores_than_the_trainings_have_folders_of_their_own(trained, tmp_path):
    workdir, *_ = trained
    kept = (workdir / "eval/val/metrics.json").read_bytes(), (workdir / "eval/val/analysis.json").stat().st_mtime
    done = run("evaluate", f"--workdir={workdir}", "--tight", "--pictures=0")
    assert done.returncode == 0, done.stderr
    assert f"written to {workdir}/eval/val_tight/" in done.stdout and (workdir / "eval/val_tight/metrics.json").exists()
    assert kept == (
        (workdir / "eval/val/metrics.json").read_bytes(),
        (workdir / "eval/val/analysis.json").stat().st_mtime,
    )

    config = ConfigDict({"data": {"dataset": "scenes"}})
    scenes, coco = SimpleNamespace(name="scenes", split="val"), SimpleNamespace(name="coco/2017", split="test")
    assert folder_name(config, scenes, None, False, None) == "val"
    assert re.fullmatch(r"val_step0_on_rpn_[0-9a-f]{8}", folder_name(config, scenes, 0, False, "runs/rpn"))
    assert folder_name(config, coco, 300, True, None) == "coco_2017_test_step300_tight"
    config.data.proposals_eval = "runs/rpn"
    assert folder_name(config, scenes, None, False, f"{Path.cwd()}/runs/rpn/") == "val"


def test_scores_are_told_before_anything_that_can_fail(trained, tmp_path):
    workdir, *_ = trained
    copied = tmp_path / "copied"
    shutil.copytree(workdir, copied)
    older = copied / "eval/val_step2/metrics.json"
    older.mkdir(parents=True)
    shutil.rmtree(copied / "best")
    shutil.copytree(copied / "checkpoints/2", copied / "best/2")
    done = run("evaluate", f"--workdir={copied}")
    assert f"{older}: cannot be written" in fails_in_one_line(done) and "AP50" in done.stdout
    (copied / "eval/val/metrics.json").unlink()
    (copied / "eval/val/metrics.json").mkdir()
    done = run("evaluate", f"--workdir={copied}", "--checkpoint=latest")
    assert "eval/val/metrics.json: cannot be written" in fails_in_one_line(done) and "AP50" in done.stdout
    shutil.rmtree(copied / "eval")
    (copied / "eval").write_text("in the way")
    done = run("evaluate", f"--workdir={copied}")
    assert (
        "eval/val_step2: cannot be written (Not a directory); move what is in the way" in fails_in_one_line(done)
        and not done.stdout
    )


def test_mistakes_are_one_line(trained, tmp_path):
    workdir, arguments, _ = trained
    demo = ["train", "--config=experiments/demo.py", f"--workdir={workdir}", *arguments]
    assert "another architecture" in fails_in_one_line(run(*demo, "--config.model.neck.channels=16"))
    assert "batch_size" in fails_in_one_line(run(*demo, "--config.batch_size=4"))
    assert "images by bucket" in fails_in_one_line(run(*demo, "--config.data.buckets=((64, 64), (32, 64))"))
    idle = fails_in_one_line(run(*demo, "--config.data.proposals_train=x.npz"))
    assert "data.proposals_train is 'x.npz', but faster_rcnn makes its own" in idle
    refused = fails_in_one_line(run("evaluate", f"--workdir={workdir}", "--split=nothere"))
    assert "'nothere'" in refused and "set --split to one of them" in refused
    assert "train there first" in fails_in_one_line(run("predict", f"--workdir={tmp_path}", "--output=x", ROOT))
    assert "--output" in fails_in_one_line(run("predict", f"--workdir={workdir}", "x.jpg"))
    predict = ["predict", f"--workdir={workdir}", f"--output={tmp_path}/out", ROOT / "README.md"]
    assert "no picture is done" in fails_in_one_line(run(*predict))
    assert "--threshold=50.0" in fails_in_one_line(run(*predict, "--threshold=50"))
    assert "there is a file" in fails_in_one_line(run(*predict, f"--output={ROOT}/README.md"))
    assert "--pictures=-1" in fails_in_one_line(run("evaluate", f"--workdir={workdir}", "--pictures=-1"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(trained, tmp_path, scenes_dir):
    _, arguments, _ = trained
    changes = ["--config.optim.learning_rate=1e30", "--config.optim.clip_norm=0", "--config.checkpoint_every=1"]
    changes += ["--config.optim.warmup_steps=0", "--config.optim.name=sgd", "--config.num_steps=8"]
    done = run("train", "--config=experiments/demo.py", f"--workdir={tmp_path}/run", *arguments, *changes)
    error = fails_in_one_line(done)
    step = int(error.split("step ")[1].split(":")[0])
    assert "not finite on the images with ids [" in error
    ids = json.loads(error.split("ids ")[1].split(";")[0])
    assert len(ids) == 2
    assert set(ids) <= set(open_split(scenes_dir, "scenes", "train").index.image_id.tolist())
    # No checkpoint holds what the broken step made, and the one that is named is there.
    saved = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1] == step - 1
    assert f"checkpoints/{saved[-1]}" in error


def test_find_images_goes_into_folders_and_refuses_what_is_not_there(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("b.JPG", "a/c.png", "notes.txt"):
        (tmp_path / name).touch()
    assert find_images([str(tmp_path)]) == [tmp_path / "a" / "c.png", tmp_path / "b.JPG"]
    assert find_images([str(tmp_path / "notes.txt")]) == [tmp_path / "notes.txt"]
    with pytest.raises(Exception, match=r"nowhere: no such file or folder"):
        find_images([str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(Exception, match="no pictures in this folder"):
        find_images([str(tmp_path / "empty")])
