import contextlib
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from coco_oracle import mean, pycocotools, random_case

from fpn_jax import evaluation
from fpn_jax.errors import UserError

KEYS = [*evaluation._PRECISIONS, *evaluation._RECALLS]  # in the order of pycocotools' stats

IMAGE = {"id": 1, "height": 100, "width": 100, "file_name": "a.jpg"}
CLASSES = [{"id": 5, "name": "fish"}, {"id": 9, "name": "fish"}]
OBJECT = {"id": 1, "image_id": 1, "category_id": 5, "bbox": [10, 10, 50, 50], "area": 2500.0, "iscrowd": 0}
RESULT = {"image_id": 1, "category_id": 5, "bbox": [10, 10, 50, 50], "score": 0.5}


def by_pycocotools(ground_truth, results):
    """The oracle: (twelve numbers, per class [AP, AP50, AR100]), None for its -1."""
    evaluator = pycocotools(ground_truth, results)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.summarize()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    per_class = [
        [mean(precision[:, :, k, 0, 2]), mean(precision[0, :, k, 0, 2]), mean(recall[:, k, 0, 2])]
        for k in range(precision.shape[2])
    ]
    return [None if value == -1 else value for value in evaluator.stats], per_class


@pytest.fixture(scope="module")
def known():
    folder = Path(__file__).parent / "data" / "evaluator"
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("instances", "results", "expected")]


def test_known_answer(known):
    ground_truth, results, expected = known
    metrics = evaluation.coco_metrics(ground_truth, results)
    assert {key: round(metrics[key], 6) for key in KEYS} == expected
    assert (metrics["num_images"], metrics["num_objects"], metrics["num_detections"]) == (100, 830, 734)
    numbers, per_class = by_pycocotools(ground_truth, results)
    assert [metrics[key] for key in KEYS] == numbers  # to the last bit
    ours = metrics["per_class"]
    assert [[row["AP"], row["AP50"], row["AR100"]] for row in ours.values()] == per_class
    assert list(ours) == [c["name"] for c in sorted(ground_truth["categories"], key=lambda c: c["id"])]
    assert ours["person"]["num_objects"] == 250
    absent = {"category_id": 80, "num_objects": 0, "AP": None, "AP50": None, "AR100": None}
    assert ours["toaster"] == absent


@pytest.mark.parametrize("seed", range(60))
def test_as_pycocotools_on_random_cases(seed):
    ground_truth, results = random_case(np.random.default_rng(seed))
    metrics = evaluation.coco_metrics(ground_truth, results)
    numbers, per_class = by_pycocotools(ground_truth, results)
    assert [metrics[key] for key in KEYS] == numbers
    assert [[row["AP"], row["AP50"], row["AR100"]] for row in metrics["per_class"].values()] == per_class
    counts = {c["id"]: 0 for c in ground_truth["categories"]}
    for annotation in ground_truth["annotations"]:
        counts[annotation["category_id"]] += not annotation["iscrowd"]
    assert {row["category_id"]: row["num_objects"] for row in metrics["per_class"].values()} == counts


def truth(**changes):
    return {"images": [IMAGE], "annotations": [OBJECT], "categories": CLASSES} | changes


@pytest.mark.parametrize(
    ("ground_truth", "results", "ap", "ar"),
    [
        (truth(), [RESULT], 1.0, 1.0),
        (truth(), [], 0.0, 0.0),
        (truth(annotations=[]), [RESULT], None, None),
        (truth(annotations=[]), [], None, None),
        (truth(annotations=[OBJECT | {"iscrowd": 1}]), [RESULT], None, None),
        (truth(images=[], annotations=[]), [], None, None),
        (truth(annotations=[OBJECT | {"id": 0}]), [RESULT], 1.0, 1.0),  # pycocotools counts object 0 as never found
    ],
)
def test_nothing_found_or_nothing_there(ground_truth, results, ap, ar):
    metrics = evaluation.coco_metrics(ground_truth, results)
    assert (metrics["AP"], metrics["AR100"]) == (ap and pytest.approx(ap), ar and pytest.approx(ar))
    assert (metrics["AP_small"], metrics["per_class"]["fish (9)"]["AP"]) == (None, None)
    assert "fish (9)" in evaluation.metrics_table(metrics)
    json.dumps(metrics, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 2}, r"image_id 2 \(1 such ids\) is not among the images"),
        ({"category_id": 1}, r"category_id 1 \(1 such ids\) is not among the categories"),
        ({"score": float("nan")}, "image_id 1 has a box or score that is not finite"),
        ({"bbox": [0, float("inf"), 1, 1]}, "not finite"),
    ],
)
def test_results_that_do_not_belong_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        evaluation.coco_metrics(truth(), [RESULT, RESULT | change])


def test_results_keep_order_ids_and_digits():
    boxes = np.array([[1.23456, 2, 11.5, 22], [0, 0, 9, 9], [5, 6, 7, 8]], np.float32)
    scores = np.array([1 / 3, 0.9, 0.1], np.float32)
    valid = np.array([True, False, True])
    results = evaluation.coco_results(boxes, scores, np.array([1, 0, 0]), valid, np.int64(42), [5, 9])
    assert results == [
        {"image_id": 42, "category_id": 9, "bbox": [1.235, 2.0, 10.265, 20.0], "score": 0.33333334},
        {"image_id": 42, "category_id": 5, "bbox": [5.0, 6.0, 2.0, 2.0], "score": 0.1},
    ]
    assert np.float32(results[0]["score"]) == scores[0]
    json.dumps(results)
    assert evaluation.coco_results(np.zeros((0, 4)), [], [], [], 1, [5]) == []


def test_to_original_scales_each_axis_and_clips():
    boxes = [[0, 0, 1197, 799], [-5, 10, 2000, 20]]  # of a 334 x 500 image that became 799 x 1197
    back = evaluation.to_original(boxes, (799, 1197), (334, 500))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, [[0, 0, 500, 334], [0, 10 * 334 / 799, 500, 20 * 334 / 799]], rtol=1e-6)
    assert evaluation.to_original(np.zeros((0, 4)), (10, 10), (5, 5)).shape == (0, 4)


def make_metrics(classes):
    rows = {
        f"class {i:03d}": {"category_id": i, "num_objects": i, "AP": i / 100 or None, "AP50": 0.5, "AR100": 0.5}
        for i in range(classes)
    }
    numbers = dict.fromkeys(KEYS, 0.125) | {"AP_small": None}
    return numbers | {"num_images": 3, "num_objects": 5, "num_detections": 7, "per_class": rows}


@pytest.mark.parametrize("classes", [0, 1, 7, 20, 21, 80, 365])
def test_the_table_names_every_class_once_and_is_aligned(classes):
    metrics = make_metrics(classes)
    overall, *rest = evaluation.metrics_table(metrics).split("\n\n")
    assert overall == "3 images, 5 objects, 7 detections"
    assert [re.findall(r"\S+", line) for line in rest[0].splitlines()] == [
        ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"],
        ["0.125", "0.125", "0.125", "-", "0.125", "0.125"],
    ]
    lines = rest[2].splitlines() if classes else []
    names = re.findall(r"class \d+", "\n".join(lines))
    assert sorted(names) == list(metrics["per_class"])
    assert len({len(line) for line in lines[:-1]}) <= 2 and all(len(line) <= 110 for line in lines)
    assert classes < 80 or len(lines) < classes / 1.5


@pytest.mark.parametrize(("sort", "order"), [("AP", -1), ("name", 1)])
def test_the_table_is_sorted(sort, order):
    metrics = make_metrics(7)
    names = re.findall(r"^class \d+", evaluation.metrics_table(metrics, sort), re.M)
    assert names == list(metrics["per_class"])[::order]
    with pytest.raises(ValueError, match="sort='size'"):
        evaluation.metrics_table(metrics, "size")


def test_results_read_back_and_stay_if_others_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "eval" / "valid" / "detections.json"
    for results in ([RESULT, RESULT], [], [RESULT]):
        evaluation.write_results(path, results)
        assert json.loads(path.read_text()) == results

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(
        UserError, match=r"detections\.json: cannot be written \(No space left on device\); free some space"
    ):
        evaluation.write_results(path, [])
    assert json.loads(path.read_text()) == [RESULT]
    assert os.listdir(path.parent) == ["detections.json"]
