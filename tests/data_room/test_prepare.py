"""Preparing as a user does it, and what is left behind when it fails."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_coco import content, write_folder, write_images, write_json

from fpn_jax import cli
from fpn_jax.data import records, scenes
from fpn_jax.data.datasets import open_split
from fpn_jax.data.preparation import Prepared, prepare
from fpn_jax.data.records import Counts
from fpn_jax.errors import UserError
from fpn_jax.prepare import next_command

ROOT = Path(__file__).parents[2]


def _run(*flags):
    command = [sys.executable, "-m", "fpn_jax.prepare", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_command_reports_reuses_and_says_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    source, data = write_folder(tmp_path / "fish", ("train", "val")), tmp_path / "data"
    done = _run(f"--source={source}", f"--data_dir={data}")
    counts = (
        "3 images, 4 objects (at most 2 in an image; 1 of them crowds; 1 images without objects; "
        "1 boxes clipped to the image; 2 boxes dropped: no area or outside the image)"
    )
    folder = data / "fish" / "1.0.0"
    following = (
        f"next: {cli.interpreter()} -m fpn_jax.train --config=experiments/faster_rcnn_r18_fpn_cpu.py "
        f"--workdir=runs/fish --config.data.data_dir={data} --config.data.dataset=fish --config.data.train_split=train "
        "--config.data.eval_split=val"
    )
    assert done.stderr == "" and done.returncode == 0
    expected = [f"train: {counts}", f"val: {counts}", f"fish is now in {folder}", following]
    assert done.stdout.splitlines() == expected
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = _run(f"--source={source}", f"--data_dir={data}")
    assert again.stdout.splitlines() == [*expected[:2], f"fish is already in {folder}", following]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_only_coco_itself_is_told_to_train_on_a_frozen_backbone_and_with_weights(tmp_path):
    prepared = Prepared("coco/2017", tmp_path, True, {"train": Counts(), "validation": Counts()})
    command = next_command(prepared, "data")
    assert "--config=experiments/faster_rcnn_r50_fpn.py --workdir=runs/coco_2017 " in command
    assert "--config.init_from=torchvision://resnet50/IMAGENET1K_V1 --config.init_part=backbone" in command
    assert "init_from" not in next_command(Prepared("fish", tmp_path, True, {"train": Counts()}), "data")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "error: --source= is missing; --help lists the flags"),
        (["--source=/no"], "error: --source=/no: no such folder; give a COCO-format folder, coco/2017 or scenes"),
        (["--sauce=scenes"], "error: unknown flag --sauce; did you mean --source?"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_2(tmp_path, flags, message):
    done = _run(*flags, f"--data_dir={tmp_path / 'data'}")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message + "\n")
    assert not (tmp_path / "data").exists()


def test_a_changed_source_is_not_taken_for_the_old_one(tmp_path):
    source, data = write_folder(tmp_path / "fish"), tmp_path / "data"
    assert prepare(str(source), data).written
    value = content()
    value["annotations"][0]["bbox"][0] += 1
    write_json(source / "annotations" / "instances_train.json", value)
    with pytest.raises(UserError, match=r"fish/1.0.0 was prepared from .*fish, which has changed since: remove that"):
        prepare(str(source), data)
    assert prepare(str(source), data, name="fish_2").dataset == "fish_2"
    write_images(tmp_path / "other" / "fish")
    write_json(tmp_path / "other" / "fish" / "instances.json", value)
    with pytest.raises(UserError, match=r"was prepared from .*/fish, not from .*other/fish: remove .*another --name"):
        prepare(str(tmp_path / "other" / "fish"), data)


def test_another_size_of_scenes_is_another_source(tmp_path):
    records.write(scenes.builder(tmp_path, train=2, val=1))
    with pytest.raises(UserError, match=r"scenes/1.0.0 was prepared from scenes, which has changed since"):
        prepare("scenes", tmp_path)


def test_a_name_with_a_second_part(tmp_path):
    prepared = prepare(str(write_folder(tmp_path / "fish")), tmp_path / "data", name="sea/fish-1.5")
    assert prepared.folder == tmp_path / "data" / "sea" / "fish-1.5" / "1.0.0" and prepared.folder.is_dir()


@pytest.mark.parametrize("name", ["1fish", "fish-1", "../fish", "a/b/c", "fish/", "a b"])
def test_names_that_tfds_does_not_take(tmp_path, name):
    with pytest.raises(UserError, match=r"^--name=.*: a data set's name starts with a letter"):
        prepare(str(write_folder(tmp_path / "fish")), tmp_path / "data", name=name)
    assert not (tmp_path / "data").exists()


def test_a_failure_half_way_leaves_nothing_that_could_be_taken_for_the_whole(tmp_path):
    def fail_late(counts):
        yield from list(scenes.builder(tmp_path, train=3, val=1).splits["train"][1](counts))[:2]
        raise OSError(28, "No space left on device")

    builder = scenes.builder(tmp_path, train=3, val=1)
    builder.splits["val"] = (3, fail_late)
    with pytest.raises(OSError, match="No space left"):
        records.write(builder)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    records.write(scenes.builder(tmp_path, train=3, val=1))
    assert not (tmp_path / "downloads").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    source, data = write_folder(tmp_path / "fish"), tmp_path / "data"
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "from fpn_jax import cli, prepare\n"
        f"sys.argv = ['prepare', '--source={source}', '--data_dir={data}']\n"
        "cli.run(prepare.main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*: .*File too large; free some space or choose another --data_dir.*\n", done.stderr)
    assert [path for path in data.rglob("*") if path.is_file()] == []


def test_large_splits_are_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_SHARD_BYTES", 60_000)
    records.write(scenes.builder(tmp_path, train=7, val=1))
    names = sorted(path.name for path in (tmp_path / "scenes" / "1.0.0").glob("*train.array_record*"))
    assert len(names) > 2
    assert names == [f"scenes-train.array_record-{i:05d}-of-{len(names):05d}" for i in range(len(names))]
    split = open_split(tmp_path, "scenes", "train")
    assert split.index.image_id.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert [split.source[i]["image_id"] for i in (6, 0, 3)] == [7, 1, 4]
    assert not list((tmp_path / "scenes" / "1.0.0").glob("*.part"))


def test_what_a_killed_run_left_is_removed_once_it_is_old(tmp_path):
    old, live = (tmp_path / "scenes" / f"incomplete.{name}_1.0.0" for name in ("OLD111", "LIVE22"))
    for folder in (old, live):
        folder.mkdir(parents=True)
        (folder / "part").write_text("x")
    for path in (old / "part", old):
        os.utime(path, (time.time() - 7200,) * 2)
    records.write(scenes.builder(tmp_path, train=2, val=1))
    assert not old.exists() and live.exists()


@pytest.mark.parametrize(
    ("xywh", "expected"),
    [
        ([1, 2, 3, 4], (1, 2, 4, 6)),
        ([-5, -5, 10, 10], (0, 0, 5, 5)),
        ([95, 45, 10, 10], (95, 45, 100, 50)),
        ([-5, -5, 200, 200], (0, 0, 100, 50)),
        ([0, 0, 0, 5], None),
        ([0, 0, 5, 0], None),
        ([5, 5, -3, 3], None),
        ([100, 0, 5, 5], None),
        ([-5, 0, 5, 5], None),
        ([0, 50, 5, 5], None),
        ([0, -9, 5, 5], None),
        ([float("nan"), 0, 5, 5], None),
        ([0, 0, float("nan"), 5], None),
    ],
)
def test_clipping(xywh, expected):
    assert records.clip_xywh(xywh, 50, 100) == expected


def test_clipping_against_a_painted_mask():
    """Twin: paint the box on a canvas with margins, cut the image out, look where paint is left."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        x, y, w, h = rng.integers([-20, -20, 0, 0], [30, 30, 40, 40])
        canvas = np.zeros((100, 100), bool)
        canvas[y + 30 : y + 30 + h, x + 30 : x + 30 + w] = True
        rows, columns = np.nonzero(canvas[30:50, 30:55])
        expected = None
        if rows.size:
            expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert records.clip_xywh([x, y, w, h], 20, 25) == expected
