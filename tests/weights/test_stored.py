"""torchvision's other Faster R-CNNs, as stored by `python -m benchmarks.parity.run --store=tests/data/parity`."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.parity import cases, compare, ours, weights
from fpn_jax.data.pipeline import PipelineOptions, image_batch
from fpn_jax.evaluation import to_original
from fpn_jax.models import build_detector
from fpn_jax.training.state import init_variables
from fpn_jax.weights import loader

FOLDER = Path(__file__).parents[1] / "data" / "parity"


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_a_stored_detector(name):
    case = json.loads((FOLDER / f"{name}.json").read_text())
    with np.load(FOLDER / f"{name}.npz") as file:
        stored = dict(file)
    config = cases.config_for(case, case["shorter"], case["longest"])
    detector = build_detector(config.model, cases.SLOTS - 1)
    shapes = jax.eval_shape(lambda: init_variables(detector, (64, 64), 0))
    variables = loader.load(shapes, weights.state_dict(case), name, 7).variables
    pictures, _, _ = cases.images()
    bucket = tuple(stored["hw"].tolist())
    host = image_batch(pictures, PipelineOptions((case["shorter"],), case["longest"], (bucket,), pixels="float32"))
    device = ours.inference(detector)(variables, host["image"], host["size"], stored["rois"])
    found = ours.unpadded(detector, device)

    statistics = [key for key in stored if key.endswith((".mean", ".std"))]
    assert {key.split("/")[0] for key in statistics} == {"body", "fpn"}
    for key in statistics:
        level, _, statistic = key.rpartition(".")
        assert compare.relative(getattr(found[level], statistic)((2, 3)), stored[key]) < 5e-5, key
    for key in ("roi/class_logits_fixed", "roi/box_deltas_fixed"):
        assert compare.relative(np.concatenate(list(found[key])), stored[key]) < 5e-5, key
    for i in range(len(pictures)):
        mine, theirs = found[f"rpn/proposals{i}"], stored[f"rpn/proposals{i}"]
        assert compare.match_boxes((mine, np.zeros(len(mine))), (theirs, np.zeros(len(theirs)))).unmatched <= 2
        boxes = to_original(found[f"out/boxes{i}"], host["size"][i], host["original_size"][i])
        mine = boxes, found[f"out/scores{i}"], found[f"out/labels{i}"]
        theirs = tuple(stored[f"out/{key}{i}"] for key in ("boxes", "scores", "labels"))
        assert len(theirs[0]) > 50
        assert compare.match_boxes(mine, theirs, pixels=0.02, score=3e-4).unmatched == 0
