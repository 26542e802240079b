"""torchvision and we side by side, in one process, on images that nobody stored. Needs torch and torchvision.

python -m pytest -m slow tests/weights/test_live.py
"""

import numpy as np
import pytest

pytest.importorskip("torch", reason="compares with torchvision live: pip install torch torchvision beside this project")
pytest.importorskip("torchvision", reason="compares with torchvision live: pip install torchvision beside this project")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch has warnings of its own


@pytest.mark.parametrize(
    "name", ["fasterrcnn_resnet18_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_320_fpn"]
)
def test_every_stage_is_torchvisions(name):
    from benchmarks.parity import run

    row = run.run(name, 128, train=True)
    assert row["maps"] < 5e-5 and row["rpn"] < 5e-5 and row["roi"] < 5e-5
    assert row["proposals"] <= 4 and row["proposals_of"] > 200
    assert row["detections"] <= row["themselves"] and row["detections_of"] > 50  # no more than float64 moves
    assert row["boxes"] < 0.02 and row["scores"] < 3e-4
    assert row["losses"] < 1e-4
    assert row["rois"] <= 4
    assert row["gradients"] < 2e-2


@pytest.mark.parametrize("seed", range(4))
def test_operations_on_random_boxes(seed):
    import torch
    import torchvision

    from fpn_jax.ops.nms import nms_top
    from fpn_jax.ops.roi_align import roi_align

    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 60, (300, 2)).round(1)
    boxes = np.concatenate([corners, corners + rng.uniform(0, 40, (300, 2)).round(1)], 1).astype(np.float32)
    scores = rng.uniform(size=300).round(2).astype(np.float32)  # with ties
    kept = torchvision.ops.nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.5).numpy()
    index, valid = nms_top(boxes, scores, np.ones(300, bool), 0.5, 300)
    np.testing.assert_array_equal(np.asarray(index)[np.asarray(valid)], kept)

    feature = rng.normal(size=(20, 24, 8)).astype(np.float32)
    for aligned, ratio in ((False, 2), (True, 0)):
        expected = torchvision.ops.roi_align(
            torch.from_numpy(feature).permute(2, 0, 1)[None], [torch.from_numpy(boxes)], 7, 0.25, ratio or -1, aligned
        )
        found = roi_align(feature, boxes, 0.25, 7, ratio, aligned)
        np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).numpy(), atol=1e-4)


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_what_is_exported_detects_the_same_in_torchvision(tmp_path, capsys, norm):
    import jax
    import torch

    from experiments.faster_rcnn_r50_fpn import get_config
    from fpn_jax.convert import convert_in, convert_out
    from fpn_jax.data.pipeline import PipelineOptions, image_batch
    from fpn_jax.evaluation import to_original
    from fpn_jax.models import build_detector
    from fpn_jax.training import checkpoint
    from fpn_jax.training.state import init_variables
    from fpn_jax.types import Batch
    from fpn_jax.weights import files, loader

    config = get_config()
    config.model.backbone.update(depth=18, blocks=(1, 1, 1, 1), norm=norm, frozen_stages=0)
    config.model.neck.channels = 32
    config.model.box_head.channels = 64
    config.model.rpn.sizes = ((16.0,), (32.0,), (64.0,), (128.0,), (256.0,))
    config.model.box.canonical_size = 112.0
    config.data.update(shorter=(128,), longest=200, dataset="nowhere")
    detector = build_detector(config.model, 5)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_variables(detector, (64, 64), 0))

    def weight(path, x):
        fan_in = max(np.prod(x.shape[:-1]), 1)
        if path[-1].key in ("kernel",):
            return (rng.normal(size=x.shape) * np.sqrt(1.5 / fan_in)).astype(np.float32)
        return rng.uniform(0.4, 1.0, x.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(weight, shapes)
    files.write_arrays(tmp_path / "ours.safetensors", loader.export(variables, "fpn_jax", 7))
    convert_in(config, str(tmp_path / "ours.safetensors"), str(tmp_path / "run"))
    out = str(tmp_path / "theirs.pth")
    code = "\n".join(convert_out(str(tmp_path / "run"), out, "torchvision", "best"))
    scope = {}
    exec(code, scope)

    image = rng.integers(0, 256, (120, 150, 3), np.uint8)
    with torch.no_grad():
        expected = scope["model"]([torch.from_numpy(image).permute(2, 0, 1).float() / 255])[0]
    options = PipelineOptions((128,), 200, ((128, 160),), pixels="float32")
    host = image_batch([image], options)
    with checkpoint.Checkpoints(str(tmp_path / "run")) as checkpoints:
        variables, _ = checkpoints.saved_weights("best")
    batch = Batch(**{name: host[name] for name in ("image", "size", "boxes", "labels", "valid")})
    found = jax.jit(lambda v: detector.apply(v, batch, method="detect"))(variables)
    valid = np.asarray(found.valid[0])
    boxes = to_original(np.asarray(found.boxes[0]), host["size"][0], host["original_size"][0])[valid]

    from benchmarks.parity.compare import match_boxes

    mine = boxes, np.asarray(found.scores[0])[valid], np.asarray(found.labels[0])[valid] + 1
    theirs = tuple(expected[key].numpy() for key in ("boxes", "scores", "labels"))
    assert len(theirs[0]) >= 20
    assert match_boxes(mine, theirs, score=3e-4).unmatched == 0
