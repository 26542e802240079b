"""Our Faster R-CNN against what torchvision's computes for the same weights, stage by stage (tests/data/parity)."""

import hashlib
import json

import jax
import numpy as np
import pytest

from benchmarks.parity import compare, ours, weights
from experiments.faster_rcnn_r50_fpn import get_config
from fpn_jax.data.pipeline import PipelineOptions, image_batch
from fpn_jax.data.transforms import resize_boxes
from fpn_jax.evaluation import to_original
from fpn_jax.models import build_detector
from fpn_jax.models.heads import rpn
from fpn_jax.training.state import init_variables
from fpn_jax.weights import loader, names

MAPS = 5e-5  # relative, as the stored results' README advises; what was seen stands in the project's README


@pytest.fixture(scope="module")
def case():
    """(meta, stored arrays, inputs) of torchvision's fasterrcnn_resnet50_fpn at 256 pixels."""
    from pathlib import Path

    folder = Path(__file__).parent.parent / "data" / "parity"
    meta = json.loads((folder / "fasterrcnn_resnet50_fpn.json").read_text())
    with np.load(folder / "fasterrcnn_resnet50_fpn.npz") as stored, np.load(folder / "inputs.npz") as inputs:
        return meta, dict(stored), dict(inputs)


@pytest.fixture(scope="module")
def detector():
    config = get_config()
    config.model.backbone.frozen_stages = 0  # the stored gradients are of all layers
    config.model.rpn.sampling = config.model.box.sampling = "first"
    return build_detector(config.model, 90)


@pytest.fixture(scope="module")
def variables(case, detector):
    meta, *_ = case
    shapes = jax.eval_shape(lambda: init_variables(detector, (64, 64), 0))
    return loader.load(shapes, weights.state_dict(meta), "golden", 7).variables


@pytest.fixture(scope="module")
def host(case):
    """The two images through our preprocessing, in torchvision's padded size."""
    *_, inputs = case
    options = PipelineOptions(shorter=(256,), longest=426, buckets=((256, 352),), pixels="float32")
    return image_batch([inputs["image0"], inputs["image1"]], options)


@pytest.fixture(scope="module")
def found(case, detector, variables, host):
    *_, inputs = case
    rois = np.zeros((2, 6, 4), np.float32)
    for i in range(2):
        rois[i, : len(inputs[f"fixed_boxes{i}"])] = inputs[f"fixed_boxes{i}"]
    device = ours.inference(detector)(variables, host["image"], host["size"], rois)
    return ours.unpadded(detector, device)


@pytest.fixture(scope="module")
def trained(case, detector, variables, host):
    *_, inputs = case
    boxes = [
        resize_boxes(inputs[f"gt_boxes{i}"], tuple(host["original_size"][i]), tuple(host["size"][i])) for i in range(2)
    ]
    labels = [inputs[f"gt_labels{i}"] - 1 for i in range(2)]
    batch = ours.batch_of(host["image"], host["size"], boxes, labels)
    format = names.recognise(case[0]["shapes"], "golden")
    return ours.trained(detector, *ours.training(detector)(variables, batch), format)


def test_the_batch_is_torchvisions(case, found):
    *_, inputs = case
    assert np.abs(found["batch"][:, :, ::8, ::8] - inputs["batch_part"]).max() < 1e-4


def test_maps_and_head_outputs(case, found):
    meta, stored, _ = case
    keys = [
        k for k in stored if k.startswith(("body/", "fpn/", "rpn/obj", "rpn/delta")) and not k.endswith(("mean", "std"))
    ]
    assert len(keys) == 4 + 5 + 5 + 5
    for key in keys:
        assert list(found[key].shape) == meta["kept"].get(key, {"shape": list(stored[key].shape)})["shape"], key
        assert compare.relative(found[key][weights.kept(meta, key)], stored[key]) < MAPS, key
    for key in [k for k in stored if k.endswith((".mean", ".std")) and not k.startswith("head")]:
        name, _, statistic = key.rpartition(".")
        assert compare.relative(getattr(found[name], statistic)((2, 3)), stored[key]) < MAPS, key


def test_roi_features_and_predictions(case, found):
    meta, stored, inputs = case
    rows = [len(inputs[f"fixed_boxes{i}"]) for i in range(2)]
    for key in ("roi/align_fixed", "roi/class_logits_fixed", "roi/box_deltas_fixed"):
        both = np.concatenate([found[key][i, : rows[i]] for i in range(2)])
        assert compare.relative(both[weights.kept(meta, key)], stored[key]) < MAPS, key


def test_proposals(case, found):
    _, stored, _ = case
    for i in range(2):
        mine, theirs = ((x[f"rpn/proposals{i}"], x[f"rpn/scores{i}"]) for x in (found, stored))
        assert len(mine[0]) == len(theirs[0]) == 1000
        assert compare.match_boxes(mine, theirs).unmatched <= 2


def test_detections_of_the_original_images(case, found, host):
    _, stored, _ = case
    for i in range(2):
        boxes = to_original(found[f"out/boxes{i}"], host["size"][i], host["original_size"][i])
        mine = boxes, found[f"out/scores{i}"], found[f"out/labels{i}"]
        theirs = tuple(stored[f"out/{name}{i}"] for name in ("boxes", "scores", "labels"))
        matched = compare.match_boxes(mine, theirs, pixels=0.02, score=3e-4)
        assert matched.pairs == len(theirs[0]) == 100
        assert matched.unmatched == 0


def test_anchors_are_equal_bit_for_bit(case, detector):
    meta, *_ = case
    grids = {2: (64, 88), 3: (32, 44), 4: (16, 22), 5: (8, 11), 6: (4, 6)}
    anchors = np.asarray(rpn.boxes_of(rpn.anchor_grids(detector.rpn_settings, grids, (256, 352))))
    assert len(anchors) == meta["anchors"]["count"]
    assert hashlib.sha256(anchors.astype("<f4").tobytes()).hexdigest() == meta["anchors"]["sha256_float32"]


def test_training_targets(case, trained):
    _, stored, _ = case
    for i in range(2):
        for key in (f"train/rpn_labels{i}", f"train/rpn_pos{i}", f"train/rpn_neg{i}"):
            np.testing.assert_array_equal(trained[key], stored[key])
        for key in ("proposals", "roi_boxes"):
            mine, theirs = (x[f"train/{key}{i}"] for x in (trained, stored))
            scores = np.zeros(len(theirs))
            assert compare.match_boxes((mine, scores[: len(mine)]), (theirs, scores)).unmatched <= 2
        np.testing.assert_array_equal(
            np.bincount(trained[f"train/roi_labels{i}"]), np.bincount(stored[f"train/roi_labels{i}"])
        )


def test_losses(case, trained):
    _, stored, _ = case
    for key in ours.LOSSES.values():
        assert trained[key] == pytest.approx(stored[key], rel=1e-4), key


def test_gradients(case, trained):
    meta, stored, _ = case
    keys = [key for key in stored if key.startswith("grad/")]
    assert len(keys) > 50
    for key in keys:
        mine = trained[key][weights.kept(meta, key)]
        assert compare.relative(mine, stored[key]) < 5e-2, key
        assert np.linalg.norm(mine - stored[key]) <= 2e-2 * np.linalg.norm(stored[key]) + 1e-12, key
    for name, norm in meta["grad_norm"].items():
        assert np.linalg.norm(trained[f"grad/{name}"]) == pytest.approx(norm, rel=2e-2), name
