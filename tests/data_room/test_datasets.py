"""The index, and data sets that other tfds builders have prepared."""

import contextlib
import dataclasses
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tiny_coco import SIZES, picture, write_folder

from fpn_jax.data.datasets import list_datasets, list_splits, open_split
from fpn_jax.data.preparation import prepare
from fpn_jax.errors import UserError


@pytest.fixture(scope="module")
def fish(tmp_path_factory):
    """A data folder with the tiny data set `fish`, splits train and val."""
    root = tmp_path_factory.mktemp("fish")
    prepare(str(write_folder(root / "fish", ("train", "val"))), root / "data")
    return root / "data"


class _Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder like those of tfds itself; `objects` are yielded for each of three images."""

    VERSION = tfds.core.Version("2.3.0")
    code_path = None
    url_infos = None

    def __init__(self, name, features, examples, data_dir):
        self.name, self._features, self._given = name, features, examples
        super().__init__(data_dir=data_dir)

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self._features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(self._given)


def _prepare_foreign(data_dir, name, features, examples):
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        config = tfds.download.DownloadConfig(try_download_gcs=False, compute_stats=False)
        _Foreign(name, features, examples, data_dir).download_and_prepare(
            file_format="array_record", download_config=config
        )


COCO_FEATURES = {  # as in tensorflow_datasets/object_detection/coco.py
    "image": tfds.features.Image(encoding_format="jpeg"),
    "image/filename": tfds.features.Text(),
    "image/id": np.int64,
    "objects": tfds.features.Sequence(
        {
            "area": np.int64,
            "bbox": tfds.features.BBoxFeature(),
            "id": np.int64,
            "is_crowd": np.bool_,
            "label": tfds.features.ClassLabel(names=["person", "bicycle", "car"]),
        }
    ),
}
VOC_FEATURES = {  # as in tensorflow_datasets/object_detection/voc.py
    "image": tfds.features.Image(),
    "image/filename": tfds.features.Text(),
    "objects": tfds.features.Sequence(
        {
            "label": tfds.features.ClassLabel(names=["aeroplane", "bicycle"]),
            "bbox": tfds.features.BBoxFeature(),
            "pose": tfds.features.ClassLabel(names=["frontal", "rear"]),
            "is_truncated": np.bool_,
            "is_difficult": np.bool_,
        }
    ),
    "labels": tfds.features.Sequence(tfds.features.ClassLabel(num_classes=2)),
}


def _bbox(*yxyx):
    return tfds.features.BBox(*yxyx)


def _coco_examples():
    for image in SIZES:
        objects = [
            {"area": 7, "bbox": _bbox(0.1, 0.25, 0.5, 0.75), "id": 10 * image, "is_crowd": False, "label": 2},
            {"area": 9, "bbox": _bbox(0.0, 0.0, 1.0, 1.0), "id": 10 * image + 1, "is_crowd": True, "label": 0},
        ]
        yield {
            "image": picture(image),
            "image/filename": f"{image:012d}.jpg",
            "image/id": image,
            "objects": [] if image == 5 else objects,
        }


def _voc_examples():
    for image in SIZES:
        one = {"label": 1, "pose": 0, "is_truncated": False, "is_difficult": True}
        boxes = [_bbox(0.2, 0.4, 0.6, 0.8), _bbox(0.5, 0.5, 0.5, 0.9)]  # the second one has no height
        objects = [one | {"bbox": box} for box in boxes]
        yield {"image": picture(image), "image/filename": f"{image}.jpg", "objects": objects, "labels": [1]}


def test_a_data_set_like_tfds_coco(tmp_path):
    _prepare_foreign(tmp_path, "coco_like", COCO_FEATURES, list(_coco_examples()))
    split = open_split(tmp_path, "coco_like", "test")
    assert sorted(split.index.image_id.tolist()) == sorted(SIZES)
    assert split.class_names == ["person", "bicycle", "car"] and split.category_ids == [1, 2, 3]
    for i in range(len(split)):
        image = int(split.index.image_id[i])
        height, width = SIZES[image]
        assert split.image_sizes[i].tolist() == [height, width]  # read from the picture
        assert split.index.file_name[i] == f"{image:012d}.jpg"
        assert split.source[i]["image"] == picture(image)
        if image == 5:
            assert split.objects(i)["boxes"].shape == (0, 4)
            continue
        found = split.objects(i)
        expected = [[0.25 * width, 0.1 * height, 0.75 * width, 0.5 * height], [0, 0, width, height]]
        np.testing.assert_allclose(found["boxes"], expected, rtol=1e-6)
        assert found["labels"].tolist() == [2, 0] and found["crowd"].tolist() == [False, True]
    truth = {item["id"]: item for item in split.ground_truth()["annotations"]}
    assert sorted(truth) == [30, 31, 70, 71]
    assert (truth[30]["image_id"], truth[30]["category_id"], truth[30]["area"]) == (3, 3, 7)
    assert [truth[31]["iscrowd"], truth[30]["iscrowd"]] == [1, 0]


def test_a_data_set_like_tfds_voc(tmp_path):
    _prepare_foreign(tmp_path, "voc_like", VOC_FEATURES, list(_voc_examples()))
    split = open_split(tmp_path, "voc_like", "train")
    assert split.index.image_id.tolist() == [0, 1, 2]  # no ids of its own
    assert split.index.annotation_id.tolist() == [1, 2, 3]
    assert split.num_objects.tolist() == [1, 1, 1]  # that without a height is none
    height, width = split.image_sizes[0]
    expected = [[0.4 * width, 0.2 * height, 0.8 * width, 0.6 * height]]
    np.testing.assert_allclose(split.objects(0)["boxes"], expected, rtol=1e-6)
    area = split.ground_truth()["annotations"][0]["area"]
    assert area == pytest.approx(0.4 * width * 0.4 * height, rel=1e-5)


def test_ids_that_are_not_unique_are_replaced(tmp_path):
    examples = [example | {"image/id": 1} for example in _coco_examples()]
    _prepare_foreign(tmp_path, "same", COCO_FEATURES, examples)
    assert open_split(tmp_path, "same", "train").index.image_id.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("features", "example", "lacking"),
    [
        ({"label": np.int64}, {"label": 3}, "image, objects/bbox, objects/label"),
        (
            {"image": tfds.features.Image(), "objects": tfds.features.Sequence({"label": np.int64})},
            {"image": picture(3), "objects": [{"label": 1}]},
            "objects/bbox, objects/label",
        ),
        (
            {
                "image": tfds.features.Image(),
                "objects": tfds.features.Sequence(
                    {"bbox": tfds.features.BBoxFeature(bbox_format=None), "label": tfds.features.ClassLabel(names="a")}
                ),
            },
            {"image": picture(3), "objects": []},
            "objects/bbox",
        ),
    ],
)
def test_data_sets_for_other_tasks_are_refused(tmp_path, features, example, lacking):
    _prepare_foreign(tmp_path, "other", features, [example])
    with pytest.raises(UserError, match=f"other is no detection data set: it lacks {lacking} "):
        open_split(tmp_path, "other", "train")


def test_records_without_random_access_are_refused_and_give_way(tmp_path, fish):
    del fish
    _prepare_foreign(tmp_path, "coco_like", COCO_FEATURES, list(_coco_examples()))
    newer = tmp_path / "coco_like" / "10.0.0"
    newer.mkdir()
    info = json.loads((tmp_path / "coco_like" / "2.3.0" / "dataset_info.json").read_text())
    (newer / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord", "version": "10.0.0"}))
    (newer / "features.json").write_text((tmp_path / "coco_like" / "2.3.0" / "features.json").read_text())
    assert len(open_split(tmp_path, "coco_like", "train")) == 3  # 2.3.0 can be read
    (tmp_path / "coco_like" / "2.3.0" / "dataset_info.json").unlink()
    with pytest.raises(UserError, match=r'10\.0\.0: its records are of format tfrecord.*file_format="array_record"'):
        open_split(tmp_path, "coco_like", "train")


def test_what_is_not_there_is_named_with_what_is(fish, tmp_path):
    assert list_datasets(fish) == ["fish"]
    assert sorted(list_splits(fish, "fish")) == ["train", "val"]
    with pytest.raises(UserError, match=r"no split 'test' in data set fish; it has train, val"):
        open_split(fish, "fish", "test")
    with pytest.raises(UserError, match=r"no prepared data set 'whale'; it has fish\. Make it with: python -m fpn_jax"):
        open_split(fish, "whale", "train")
    with pytest.raises(UserError, match=r"no prepared data set 'fish'; it has none\."):
        list_splits(tmp_path, "fish")


def test_the_index_is_kept_read_again_and_mended(fish):
    first = open_split(fish, "fish", "train").index
    path = fish / "fish" / "1.0.0" / "index-train.npz"
    for spoil in (None, b"", path.read_bytes()[:300], b"PK nonsense"):
        if spoil is not None:
            path.write_bytes(spoil)
        again = open_split(fish, "fish", "train").index
        for field in dataclasses.fields(first):
            one, other = getattr(first, field.name), getattr(again, field.name)
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
    stamp = path.stat().st_mtime_ns
    open_split(fish, "fish", "train")
    assert path.stat().st_mtime_ns == stamp
    assert not list(path.parent.glob("*.tmp*"))


def test_the_types_are_those_that_the_docstrings_promise(fish):
    split = open_split(fish, "fish", "train")
    assert split.image_sizes.dtype == np.int32 and split.image_sizes.shape == (3, 2)
    assert split.num_objects.dtype == np.int32 and isinstance(split.max_objects, int)
    found = split.objects(0)
    assert found["boxes"].dtype == np.float32 and found["labels"].dtype == np.int32 and found["crowd"].dtype == bool
    json.dumps(split.ground_truth())  # plain numbers only


def test_a_split_without_index_in_a_folder_that_cannot_be_written(fish, monkeypatch):
    path = fish / "fish" / "1.0.0" / "index-val.npz"
    path.unlink(missing_ok=True)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # permissions do not hold back root, which tests may run as
        patch.setattr(np, "savez", refuse)
        assert len(open_split(fish, "fish", "val")) == 3
    assert not path.exists()


def test_records_can_be_read_in_other_processes(fish):
    """Grain's worker processes get the source by pickle."""
    source = open_split(fish, "fish", "train").source
    copy = pickle.loads(pickle.dumps(source))
    assert copy[2]["image"] == source[2]["image"]


def test_records_are_what_tfds_reads_and_an_image_is_read_alone(fish, monkeypatch):
    split = open_split(fish, "fish", "train")
    builder = tfds.builder_from_directory(next((fish / "fish").iterdir()))
    expected = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    for i, item in enumerate(expected):
        record = split.source[i]
        assert dict(record).keys() == item.keys() and len(record) == len(item)
        assert record["image"] == item["image"] and record["image_id"] == item["image_id"]
        np.testing.assert_array_equal(record["objects"]["bbox"], item["objects"]["bbox"])
        with pytest.raises(KeyError):
            record["no such"]

    def refuse(*args, **kwargs):
        raise AssertionError("parsed as a whole")

    monkeypatch.setattr(tfds.features.FeaturesDict, "deserialize_example_np", refuse)
    assert split.source[0]["image"].startswith(b"\xff\xd8")


def test_this_room_needs_neither_jax_nor_tensorflow(tmp_path):
    """Preparing and reading in a fresh process loads neither."""
    code = (
        "import sys\n"
        "from fpn_jax.data import scenes, records, datasets, preparation\n"
        f"records.write(scenes.builder({str(tmp_path)!r}, train=2, val=1))\n"
        f"datasets.open_split({str(tmp_path)!r}, 'scenes', 'train').source[0]\n"
        "print([name for name in ('jax', 'tensorflow', 'flax') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
