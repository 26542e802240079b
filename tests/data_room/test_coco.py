"""Every fault of a COCO file is one line that names the file and the thing."""

import json

import numpy as np
import pytest
from tiny_coco import box, content, picture, write_folder, write_images, write_json

from fpn_jax.data import coco
from fpn_jax.data.datasets import open_split
from fpn_jax.data.preparation import prepare
from fpn_jax.errors import UserError


def _spoil(**changes):
    """A function that changes a list element's key, e.g. images=(0, "width", 0); value ... removes the key."""

    def spoil(value):
        for name, (position, key, new) in changes.items():
            if new is ...:
                del value[name][position][key]
            else:
                value[name][position][key] = new

    return spoil


FAULTS = {
    "no images": (lambda c: c.pop("images"), "no list 'images'"),
    "no annotations": (lambda c: c.pop("annotations"), "no list 'annotations'"),
    "categories of a wrong type": (lambda c: c.update(categories={}), "no list 'categories'"),
    "empty split": (lambda c: c.update(images=[], annotations=[]), "images is empty"),
    "no classes": (lambda c: c.update(categories=[], annotations=[]), "categories is empty"),
    "image twice": (_spoil(images=(1, "id", 3)), "image id 3 occurs twice"),
    "image id of a wrong type": (_spoil(images=(1, "id", "7")), "images[1] needs an id, an integer from 0 on"),
    "image id beyond 64 bits": (_spoil(images=(1, "id", 2**63)), "images[1] needs an id, an integer from 0 on"),
    "image id below 0": (_spoil(images=(1, "id", -5)), "images[1] needs an id, an integer from 0 on"),
    "no file name": (_spoil(images=(1, "file_name", ...)), "image id 7 has no file_name"),
    "no height": (_spoil(images=(1, "height", ...)), "image id 7 (007.jpg) needs a height > 0"),
    "no width": (_spoil(images=(1, "width", 0)), "image id 7 (007.jpg) needs a width > 0"),
    "category twice": (_spoil(categories=(1, "id", 90)), "category id 90 occurs twice"),
    "category name twice": (_spoil(categories=(1, "name", "fish")), "category name 'fish' occurs twice"),
    "category without name": (_spoil(categories=(1, "name", ...)), "categories[1] needs an id, an integer from 0"),
    "annotation without id": (_spoil(annotations=(2, "id", ...)), "annotations[2] needs an id, an integer from 0 on"),
    "annotation twice": (_spoil(annotations=(2, "id", 11)), "annotation id 11 occurs twice"),
    "image that is not there": (_spoil(annotations=(2, "image_id", 99)), "annotation id 13 points to image_id 99"),
    "no image": (_spoil(annotations=(2, "image_id", ...)), "annotation id 13 points to image_id None"),
    "class that is not there": (_spoil(annotations=(2, "category_id", 5)), "annotation id 13 points to category_id 5"),
    "unhashable class": (_spoil(annotations=(2, "category_id", [4])), "annotation id 13 points to category_id [4]"),
    "no box": (_spoil(annotations=(2, "bbox", ...)), "annotation id 13 needs a bbox of four numbers"),
    "three numbers": (_spoil(annotations=(2, "bbox", [1, 2, 3])), "annotation id 13 needs a bbox of four numbers"),
    "no number": (_spoil(annotations=(2, "bbox", [1, 2, 3, "4"])), "annotation id 13 needs a bbox of four numbers"),
    "not finite": (_spoil(annotations=(2, "bbox", [1, 2, 3, float("nan")])), "annotation id 13 needs a bbox of four"),
    "area": (_spoil(annotations=(2, "area", "big")), "annotation id 13: area is 'big'"),
    "area below 0": (_spoil(annotations=(2, "area", -5)), "annotation id 13: area is -5; give a number of at least 0"),
    "crowd": (_spoil(annotations=(2, "iscrowd", "0")), "annotation id 13: iscrowd is '0'; give 0 or 1"),
    "fractions": (lambda c: [a.update(bbox=[0.1, 0.2, 0.3, 0.4]) for a in c["annotations"]], "bbox is in pixels"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_annotations_is_named(fault):
    spoil, message = FAULTS[fault]
    value = content()
    spoil(value)
    with pytest.raises(UserError) as caught:
        coco.parse(json.dumps(value).encode(), "some/instances_train.json")
    assert str(caught.value).startswith("some/instances_train.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[1, 2]", b"3", b'{"images": 3}', b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_not_coco_json_is_named(data):
    with pytest.raises(UserError, match=r"^x\.json: "):
        coco.parse(data, "x.json")


def test_sound_annotations_pass_and_keep_what_is_optional_optional():
    value = content()
    for item in value["annotations"]:
        item.pop("iscrowd")
    value["annotations"][0]["area"] = None
    parsed = coco.parse(json.dumps(value).encode(), "x.json")
    assert list(parsed.categories) == [4, 90]
    assert [len(parsed.objects[i]) for i in (3, 7, 5)] == [3, 3, 0]


def test_boxes_are_clipped_dropped_and_counted(tmp_path):
    prepared = prepare(str(write_folder(tmp_path / "fish")), tmp_path / "data")
    counts = prepared.counts["train"]
    assert (counts.images, counts.objects, counts.crowds) == (3, 4, 1)
    assert (counts.max_objects, counts.empty, counts.clipped, counts.dropped) == (2, 1, 1, 2)
    split = open_split(tmp_path / "data", "fish", "train")
    i = split.index.image_id.tolist().index(3)
    np.testing.assert_array_equal(split.objects(i)["boxes"], [[10, 5, 30, 35], [50.5, 30.25, 60, 40]])
    assert split.objects(i)["labels"].tolist() == [1, 0]  # by category id, not by place in the file


def test_original_ids_boxes_and_areas_come_back(tmp_path):
    prepare(str(write_folder(tmp_path / "fish")), tmp_path / "data")
    truth = open_split(tmp_path / "data", "fish", "train").ground_truth()
    assert truth["categories"] == [{"id": 4, "name": "crab"}, {"id": 90, "name": "fish"}]
    images = {item["id"]: item for item in truth["images"]}
    assert images == {item["id"]: item for item in content()["images"]}
    expected = {item["id"]: item for item in content()["annotations"] if item["id"] in (11, 12, 15, 16)}
    assert {item["id"] for item in truth["annotations"]} == set(expected)
    for item in truth["annotations"]:
        original = expected[item["id"]]
        for key in ("image_id", "category_id", "bbox", "iscrowd"):
            assert item[key] == original[key]
        assert item["area"] == original.get("area", original["bbox"][2] * original["bbox"][3])


def test_files_are_kept_byte_for_byte_with_their_segmentations(tmp_path):
    prepare(str(write_folder(tmp_path / "fish")), tmp_path / "data")
    split = open_split(tmp_path / "data", "fish", "train")
    for i in range(len(split)):
        item = split.source[i]
        assert item["image"] == picture(item["image_id"])
        if item["image_id"] == 7:
            assert item["objects"]["segmentation"] == [b"[[2,4,10,4,10,20]]", b""]
            # tfds' own box: normalised, ymin xmin ymax xmax
            np.testing.assert_allclose(item["objects"]["bbox"][0], np.array([4 / 50, 2 / 30, 20.25 / 50, 10.5 / 30]))


def test_splits_must_agree_about_the_classes(tmp_path):
    root = write_folder(tmp_path / "fish", ("train", "val"))
    value = content()
    value["categories"][0]["name"] = "whale"
    write_json(root / "annotations" / "instances_val.json", value)
    with pytest.raises(UserError, match=r"instances_val.json: category id 90 is 'whale' here and 'fish' in .*train"):
        prepare(str(root), tmp_path / "data")
    value["categories"] = [{"id": 4, "name": "crab"}, {"id": 90, "name": "fish"}, {"id": 91, "name": "crab "}]
    write_json(root / "annotations" / "instances_val.json", value)
    assert open_split(tmp_path / "data", prepare(str(root), tmp_path / "data").dataset, "train").category_ids == [
        4, 90, 91,
    ]  # fmt: skip


def test_missing_images_are_counted_and_named(tmp_path):
    root = write_folder(tmp_path / "fish")
    (root / "images" / "train" / "007.jpg").unlink()
    (root / "images" / "train" / "005.jpg").unlink()
    missing = (
        r"instances_train.json: 2 of 3 images are missing: 007.jpg, 005.jpg; looked in .*; copy them there or remove"
    )
    with pytest.raises(UserError, match=missing):
        prepare(str(root), tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], r"007\.jpg"),
        (lambda data: b"this is no image", r"007\.jpg"),
        (lambda data: b"", r"007\.jpg"),
        (lambda data: picture(5), r"007\.jpg.*50.*30"),
    ],
    ids=["truncated", "text", "empty", "another size"],
)
def test_bad_images_are_named_and_leave_nothing_behind(tmp_path, spoil, message):
    root = write_folder(tmp_path / "fish")
    path = root / "images" / "train" / "007.jpg"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        prepare(str(root), tmp_path / "data")
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)) and "remove its entry from" in message
    assert [p for p in (tmp_path / "data").rglob("*") if p.is_file()] == []
    path.write_bytes(picture(7))  # mended: the same command works
    assert prepare(str(root), tmp_path / "data").written


def test_all_bad_images_are_named_with_their_paths(tmp_path):
    root = write_folder(tmp_path / "fish")
    for name in ("003.jpg", "005.jpg"):
        (root / "images" / "train" / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"instances_train.json: 2 images are bad: /.*003\.jpg: .* \| /.*005\.jpg: "):
        prepare(str(root), tmp_path / "data")


def test_a_split_with_no_object_at_all_is_prepared(tmp_path):
    root = tmp_path / "sea"
    write_images(root)
    write_json(root / "instances.json", content() | {"annotations": []})
    prepare(str(root), tmp_path / "data")
    split = open_split(tmp_path / "data", "sea", "train")
    assert split.num_objects.tolist() == [0, 0, 0] and split.max_objects == 0
    assert split.objects(1)["boxes"].shape == (0, 4)
    assert split.ground_truth()["annotations"] == []


def test_file_names_may_contain_folders_and_many_images_stay_in_order(tmp_path):
    root = tmp_path / "fish"
    value = content()
    value["images"] = [
        {"id": 1000 - i, "file_name": f"deep/er/{3:03d}.jpg", "height": 40, "width": 60} for i in range(50)
    ]
    value["annotations"] = [box(i, 1000 - i, 4, [i, 0, 2, 2]) for i in range(50)]
    write_images(root / "images" / "deep" / "er")
    write_json(root / "instances.json", value)
    prepare(str(root), tmp_path / "data")
    split = open_split(tmp_path / "data", "fish", "train")
    assert split.index.image_id.tolist() == list(range(1000, 950, -1))
    np.testing.assert_array_equal(split.index.xywh[:, 0], 1000 - split.index.image_id)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("a/aquarium", "aquarium"), ("My Fish-2.0", "My_Fish_2_0"), ("2017", "data_2017"), ("/", "data")],
)
def test_names_of_data_sets_are_ones_that_tfds_takes(folder, name):
    assert coco.default_name(folder) == name
