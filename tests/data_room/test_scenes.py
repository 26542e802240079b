import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from fpn_jax.data import drawing, records, scenes
from fpn_jax.data.datasets import open_split

# pycocotools 2.0.11 with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    records.write(scenes.builder(root, train=12, val=5))
    return root


@pytest.mark.parametrize("split", ["train", "val"])
def test_records_hold_what_was_drawn(data_dir, split):
    opened = open_split(data_dir, "scenes", split)
    number = {"train": 0, "val": 1}[split]
    assert len(opened) == {"train": 12, "val": 5}[split]
    assert opened.class_names == list(drawing.CLASSES)
    for i in range(len(opened)):
        item = opened.source[i]
        image, objects = drawing.draw_scene(0, number, item["image_id"] - 1)
        stored = cv2.imdecode(np.frombuffer(item["image"], np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
        assert stored.shape == image.shape
        assert np.abs(stored.astype(int) - image).mean() < 3  # JPEG
        found = opened.objects(i)
        assert found["labels"].tolist() == [o.label for o in objects]
        for box, segmentation, area, drawn in zip(
            found["boxes"], item["objects"]["segmentation"], item["objects"]["area"], objects, strict=True
        ):
            code = json.loads(segmentation)
            compressed = coco_mask.frPyObjects(code, *code["size"])
            np.testing.assert_array_equal(coco_mask.decode(compressed), drawn.mask)
            x, y, w, h = coco_mask.toBbox(compressed)
            np.testing.assert_array_equal(box, [x, y, x + w, y + h])
            assert area == drawn.mask.sum() == coco_mask.area(compressed)


def test_preparing_twice_gives_the_same_bytes(data_dir, tmp_path):
    records.write(scenes.builder(tmp_path, train=12, val=5))
    name = "scenes/1.0.0/scenes-train.array_record-00000-of-00001"
    first, second = (open_split(root, "scenes", "train") for root in (data_dir, tmp_path))
    assert (data_dir / name).exists()
    assert [first.source[i]["image"] for i in range(12)] == [second.source[i]["image"] for i in range(12)]


def test_run_lengths_of_all_kinds_of_mask():
    rng = np.random.default_rng(0)
    masks = [np.zeros((4, 6), bool), np.ones((4, 6), bool), np.eye(5, dtype=bool), rng.random((9, 7)) < 0.5]
    for mask in masks:
        code = scenes.run_lengths(mask)
        assert sum(code["counts"]) == mask.size
        np.testing.assert_array_equal(coco_mask.decode(coco_mask.frPyObjects(code, *mask.shape)), mask)
