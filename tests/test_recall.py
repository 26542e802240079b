import json
import math
from pathlib import Path

import numpy as np
import pytest
from coco_oracle import mean, pycocotools, random_case

from fpn_jax import recall
from fpn_jax.errors import UserError

IMAGE = {"id": 1, "height": 100, "width": 100, "file_name": "a.jpg"}
OBJECT = {"id": 1, "image_id": 1, "category_id": 5, "bbox": [10, 10, 50, 50], "area": 2500.0, "iscrowd": 0}
RESULT = {"image_id": 1, "category_id": 5, "bbox": [10, 10, 50, 50], "score": 0.5}
KEYS = [f"AR{limit}{area}" for limit in (100, 1000) for area in ("", "_small", "_medium", "_large")]


def truth(**changes):
    """One object, and no class 1, which hotcoco gives to what has no class."""
    return {"images": [IMAGE], "annotations": [OBJECT], "categories": [{"id": 5, "name": "fish"}]} | changes


def as_array(results):
    rows = [[result["image_id"], *result["bbox"], result["score"]] for result in results]
    return np.array(rows, np.float64).reshape(-1, 6)


def by_pycocotools(ground_truth, results, limits=(100, 1000), **params):
    """The numbers in the order of KEYS."""
    found = pycocotools(ground_truth, results, useCats=0, maxDets=list(limits), **params).eval["recall"]
    return [mean(found[:, 0, area, limit]) for limit in range(len(limits)) for area in range(found.shape[2])]


def numbers(metrics):
    return [metrics[key] for key in KEYS]


def test_known_answer():
    folder = Path(__file__).parent / "data" / "evaluator"
    ground_truth, results = [json.loads((folder / f"{name}.json").read_text()) for name in ("instances", "results")]
    metrics = recall.proposal_metrics(ground_truth, results)
    assert numbers(metrics) == by_pycocotools(ground_truth, results)  # to the last bit
    assert list(metrics) == [*KEYS, "num_images", "num_objects", "num_proposals"]
    assert (metrics["num_images"], metrics["num_objects"], metrics["num_proposals"]) == (100, 830, 734)
    assert recall.proposal_metrics(ground_truth, as_array(results)) == metrics


@pytest.mark.parametrize("seed", range(40))
def test_as_pycocotools_on_random_cases(seed, monkeypatch):
    monkeypatch.setattr(recall, "CHUNK", 1 + seed % 3)
    ground_truth, results = random_case(np.random.default_rng(seed))
    assert numbers(recall.proposal_metrics(ground_truth, results)) == by_pycocotools(ground_truth, results)
    ours = recall.area_recalls(ground_truth, results, list(recall.AREAS.values()), (2, 5))  # where limits cut often
    theirs = by_pycocotools(ground_truth, results, (2, 5))
    assert [row[i] for i in range(2) for row in ours] == theirs


@pytest.mark.parametrize("seed", range(3))
def test_more_than_a_thousand_proposals_with_ties(seed):
    rng = np.random.default_rng(seed)
    images = [{"id": i} for i in (3, 9)]
    corners = rng.uniform(0, 300, (30, 2))
    boxes = np.concatenate([corners, rng.uniform(10, 150, (30, 2))], 1)
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd", "id")
    annotations = [
        dict(zip(keys, (3 + 6 * (i % 2), 5, box.tolist(), float(box[2] * box[3]), int(i == 7), i + 1), strict=True))
        for i, box in enumerate(boxes)
    ]
    ground_truth = truth(images=images, annotations=annotations)
    near = boxes[rng.integers(0, 30, 2600)] + rng.normal(0, 12, (2600, 4))
    near[:, 2:] = np.abs(near[:, 2:])
    results = [
        {"image_id": 3 if i < 1200 else 9, "category_id": 5, "bbox": box.tolist(), "score": round(i % 97 / 97, 1)}
        for i, box in enumerate(near)
    ]
    metrics = recall.proposal_metrics(ground_truth, as_array(results))
    assert numbers(metrics) == by_pycocotools(ground_truth, results)
    assert metrics["AR100"] < metrics["AR1000"] < 1
    assert metrics["num_proposals"] == 2600 and metrics["num_objects"] == 29


def test_the_class_of_a_proposal_does_not_matter():
    ground_truth = truth(categories=[{"id": 5, "name": "fish"}, {"id": 6, "name": "bird"}])
    for category in (5, 6):
        metrics = recall.proposal_metrics(ground_truth, [RESULT | {"category_id": category}])
        assert metrics["AR100"] == metrics["AR1000_medium"] == 1
    unnamed = {key: value for key, value in RESULT.items() if key != "category_id"}
    assert recall.proposal_metrics(truth(), [unnamed])["AR100"] == 1


@pytest.mark.parametrize(
    ("ground_truth", "results", "expected"),
    [
        (truth(), [RESULT], 1.0),
        (truth(), [], 0.0),
        (truth(annotations=[]), [RESULT], None),
        (truth(annotations=[OBJECT | {"iscrowd": 1}]), [RESULT], None),
        (truth(images=[], annotations=[]), [], None),
        (truth(annotations=[{k: v for k, v in OBJECT.items() if k != "iscrowd"} | {"id": 0}]), [RESULT], 1.0),
    ],
)
def test_nothing_found_or_nothing_there(ground_truth, results, expected):
    for given in (results, as_array(results)):
        metrics = recall.proposal_metrics(ground_truth, given)
        assert (metrics["AR100"], metrics["AR1000"], metrics["AR100_small"]) == (expected, expected, None)
        assert "AR1000_medium" in recall.proposal_table(metrics)
        json.dumps(metrics, allow_nan=False)


def test_an_object_on_a_border_counts_on_both_sides_as_in_coco():
    metrics = recall.proposal_metrics(truth(annotations=[OBJECT | {"area": 32.0**2}]), [RESULT])
    assert (metrics["AR100_small"], metrics["AR100_medium"], metrics["AR100_large"]) == (1, 1, None)
    assert recall.count_objects([OBJECT, OBJECT | {"iscrowd": 1}], (2500, math.inf)) == 1
    assert recall.count_objects([OBJECT], (0, math.nextafter(2500, 0))) == 0


@pytest.mark.parametrize("form", [list, as_array])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 2}, r"image_id 2 \(1 such ids\) is not among the images"),
        ({"score": float("nan")}, "image_id 1 has a box or score that is not finite"),
        ({"bbox": [0, float("inf"), 1, 1]}, "not finite"),
    ],
)
def test_proposals_that_do_not_belong_are_refused(form, change, message):
    with pytest.raises(UserError, match=message):
        recall.proposal_metrics(truth(), form([RESULT, RESULT | change]))


@pytest.mark.parametrize("rows", [np.zeros((3, 6), np.float32), np.zeros((3, 7)), np.zeros(6)])
def test_other_arrays_are_refused(rows):
    with pytest.raises(ValueError, match=r"need float64 \[n 6\]"):
        recall.proposal_metrics(truth(), rows)


def test_the_table_names_every_number():
    metrics = recall.proposal_metrics(truth(), [RESULT])
    counts, *blocks = recall.proposal_table(metrics).split("\n\n")
    assert counts == "1 images, 1 objects, 1 proposals"
    names, values = zip(*(block.splitlines() for block in blocks), strict=True)
    assert " ".join(names).split() == KEYS
    assert " ".join(values).split() == ["1.000", "-", "1.000", "-"] * 2
