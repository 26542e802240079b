"""What detectron2 does otherwise than torchvision, each difference against a slow statement of it.

detectron2 cannot be installed here; the statements follow its source (0.6: detectron2/modeling, layers), one box at a
time, in float64.
"""

import functools
import math
from itertools import product

import jax
import numpy as np
import pytest

from experiments.detectron2 import faster_rcnn_R_50_FPN_1x as r50
from experiments.detectron2 import faster_rcnn_X_101_32x8d_FPN_3x as x101
from fpn_jax.models import build_detector
from fpn_jax.models.backbones.resnet import Block
from fpn_jax.models.heads import box, rpn
from fpn_jax.models.pixels import normalize_pixels
from fpn_jax.ops.roi_align import roi_levels

DETECTOR = build_detector(r50.get_config().model, 80)
RPN, BOX = DETECTOR.rpn_settings, DETECTOR.box_settings

# Ours -> configs/Base-RCNN-FPN.yaml over config/defaults.py.
ZOO = {
    "data.shorter": (640, 672, 704, 736, 768, 800),  # INPUT.MIN_SIZE_TRAIN; the last is MIN_SIZE_TEST
    "data.longest": 1333,
    "data.flip": 0.5,
    "data.skip_empty": True,  # DATALOADER.FILTER_EMPTY_ANNOTATIONS
    "model.backbone.frozen_stages": 2,
    "model.backbone.norm_eps": 1e-5,
    "model.rpn.sizes": ((32,), (64,), (128,), (256,), (512,)),
    "model.rpn.ratios": (0.5, 1.0, 2.0),
    "model.rpn.positive_iou": 0.7,
    "model.rpn.negative_iou": 0.3,
    "model.rpn.samples": 256,
    "model.rpn.positive_fraction": 0.5,
    "model.rpn.pre_nms_train": 2000,
    "model.rpn.pre_nms_test": 1000,
    "model.rpn.post_nms_train": 1000,
    "model.rpn.post_nms_test": 1000,
    "model.rpn.nms_iou": 0.7,
    "model.rpn.score_threshold": 0.0,
    "model.box.pooled_size": 7,
    "model.box.positive_iou": 0.5,
    "model.box.samples": 512,
    "model.box.positive_fraction": 0.25,
    "model.box.add_ground_truth": True,
    "model.box.delta_weights": (10.0, 10.0, 5.0, 5.0),
    "model.box.score_threshold": 0.05,
    "model.box.nms_iou": 0.5,
    "model.box.detections": 100,
    "batch_size": 16,
    "num_steps": 90_000,
    "optim.learning_rate": 0.02,
    "optim.step_at": (60 / 90, 80 / 90),
    "optim.step_factor": 0.1,
    "optim.momentum": 0.9,
    "optim.weight_decay": 1e-4,
    "optim.warmup_steps": 1000,
    "optim.warmup_factor": 1 / 1000,
}


def value_of(key):
    value = r50.get_config()
    for part in key.split("."):
        value = value[part]
    return value


@pytest.mark.parametrize("key", ZOO)
def test_the_experiment_has_the_zoo_configs_values(key):
    assert value_of(key) == ZOO[key]


def test_biases_decay_like_weights():
    assert value_of("optim.decay_norms_and_biases")  # SOLVER.WEIGHT_DECAY_BIAS; there are no trained norms


def test_pixels_are_bgr_and_divided_by_the_deviations():
    image = np.random.default_rng(0).integers(0, 256, (1, 4, 5, 3), np.uint8)
    pixels = build_detector(x101.get_config().model, 80).pixels
    out = np.asarray(normalize_pixels(image, np.array([[3, 4]]), pixels))[0]
    mean, std = (103.53, 116.28, 123.675), (57.375, 57.120, 58.395)
    for y, x, c in product(range(4), range(5), range(3)):
        inside = y < 3 and x < 4
        expected = (float(image[0, y, x, 2 - c]) - mean[c]) / std[c] if inside else 0
        assert out[y, x, c] == pytest.approx(expected, abs=1e-5)


def slow_conv(x, kernel, stride, groups=1):
    """x [h w c], kernel [n n c/groups out], padded by n // 2."""
    n, (h, w, c) = kernel.shape[0], x.shape
    x = np.pad(x.astype(np.float64), ((n // 2, n // 2), (n // 2, n // 2), (0, 0)))
    rows, columns, of = range(0, h, stride), range(0, w, stride), c // groups
    out = np.zeros((len(rows), len(columns), kernel.shape[3]))
    for (i, y), (j, x0), o in product(enumerate(rows), enumerate(columns), range(kernel.shape[3])):
        first = o * groups // kernel.shape[3] * of
        out[i, j, o] = (x[y : y + n, x0 : x0 + n, first : first + of] * kernel[..., o]).sum()
    return out


@pytest.mark.parametrize(("experiment", "strides", "groups"), [(r50, (2, 1), 1), (x101, (1, 2), 2)], ids=["R", "X"])
def test_where_a_bottleneck_strides(experiment, strides, groups):
    backbone = experiment.get_config().model.backbone
    block = Block(4, 8, groups, 2, True, backbone.stride_in_1x1, backbone.norm, backbone.norm_eps, np.float32)
    x = np.random.default_rng(0).normal(size=(6, 8, 3)).astype(np.float32)
    y, variables = jax.jit(block.init_with_output, static_argnums=2)(jax.random.key(0), x[None], False)
    kernels = {name: np.asarray(module["kernel"], np.float64) for name, module in variables["params"].items()}
    gain = 1 / math.sqrt(1 + 1e-5)
    z = np.maximum(gain * slow_conv(x, kernels["conv1"], strides[0]), 0)
    z = np.maximum(gain * slow_conv(z, kernels["conv2"], strides[1], groups), 0)
    z = gain * slow_conv(z, kernels["conv3"], 1) + gain * slow_conv(x, kernels["conv_shortcut"], 2)
    np.testing.assert_allclose(y[0], np.maximum(z, 0), atol=1e-5)


def test_anchors_are_exact_size_by_size_on_the_levels_stride():
    """An image whose maps do not divide it, several sizes per level."""
    sizes = tuple((16.0 * 2**i, 25.3 * 2**i) for i in range(5))
    grids = {level: (-(-100 // 2**level), -(-140 // 2**level)) for level in RPN.levels}
    found = rpn.anchor_grids(RPN.replace(sizes=sizes), grids, (100, 140))
    for level, of_level in zip(grids, sizes, strict=True):
        expected, stride = [], 2**level
        for i, j, size, ratio in product(range(grids[level][0]), range(grids[level][1]), of_level, (0.5, 1.0, 2.0)):
            w = math.sqrt(size**2 / ratio)
            h = ratio * w
            cell = np.float32([-w / 2, -h / 2, w / 2, h / 2])
            expected.append(cell + np.float32([j * stride, i * stride, j * stride, i * stride]))
        np.testing.assert_array_equal(found[level].boxes(), expected)


def slow_level(roi):
    size = math.sqrt(max(roi[2] - roi[0], 0) * max(roi[3] - roi[1], 0))
    return min(max(math.floor(4 + math.log2(size / 224 + 1e-8)), 2), 5)


def test_levels_around_the_boundaries():
    """On them exactly and from a millionth beside them; nearer than that detectron2's float32 logarithm rounds up."""
    areas = np.array([side**2 * (1 + d) for side in (112, 224, 448) for d in (-1e-2, -1e-4, -2e-6, 2e-6, 1e-4, 1e-2)])
    widths = np.array([7, 50, 112, 300, 1333])
    random = [(0, 0, w, area / w) for area, w in product(areas, widths)]
    exact = [(8, 16, 8 + w, 16 + s * s / w) for s in (112, 224, 448) for w in (s / 4, s / 2, s, 2 * s, 4 * s)]
    rois = np.float32([*random, *exact, (5, 5, 5, 5), (0, 0, 0, 900), (0, 0, 1, 1), (-900, -900, 900, 900)])
    found = jax.jit(roi_levels, static_argnums=(1, 2, 3, 4))(
        rois, BOX.levels, BOX.k0, BOX.canonical_size, BOX.level_eps
    )
    np.testing.assert_array_equal(found, [slow_level(roi) for roi in rois.astype(np.float64)])
    assert set(np.asarray(found)) == {2, 3, 4, 5}


ROIS = np.float32(
    [
        [20, 30, 70, 75],  # P2
        [40.3, 50.7, 180.2, 190.9],  # P3
        [10, 5, 250.5, 245.1],  # P4
        [-100, -80, 420, 400],  # P5, partly outside
        [-700, -900, 1500, 1300],  # P5, far beyond
        [100.2, 100.4, 100.9, 101.3],  # less than a cell
        [0, 100, 320, 104],  # long and thin on the lowest level
        [316.5, -40, 319.9, 290],
        [4, 4, 60, 60],  # exactly two points in a bin
        [16, 16, 128, 128],  # exactly on the boundaries of levels
        [16, 16, 240, 240],
        [300, 240, 330, 270],  # over the corner
        [-300, -300, -200, -200],  # wholly outside
        [50, 50, 50, 50],
        [60, 20, 60, 90],  # without width
        [0, 0, 0, 0],
    ]
)


def slow_taps(roi, height, width, scale):
    """(row and column of the bin, row and column of the cell, weight) of every cell that an adaptive RoIAlign reads."""
    x1, y1, x2, y2 = np.asarray(roi, np.float64) * scale - 0.5
    h, w = (y2 - y1) / 7, (x2 - x1) / 7
    rows, columns = math.ceil(h), math.ceil(w)
    for i, j, p, q in product(range(7), range(7), range(rows), range(columns)):
        y, x = y1 + (i + (p + 0.5) / rows) * h, x1 + (j + (q + 0.5) / columns) * w
        if y < -1 or y > height or x < -1 or x > width:
            continue
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(y), int(x)
        for row, column in product((top, top + 1), (left, left + 1)):
            weight = (1 - abs(y - row)) * (1 - abs(x - column))
            if weight > 0:
                yield i, j, row, column, weight / (rows * columns)


def test_roi_features_and_their_gradient():
    rng = np.random.default_rng(0)
    pyramid = {level: rng.normal(size=(2, 256 >> level, 320 >> level, 3)).astype(np.float32) for level in (2, 3, 4, 5)}
    rois = np.stack([ROIS, rng.permutation(ROIS)])
    weight = rng.normal(size=(2, len(ROIS), 7, 7, 3)).astype(np.float32)

    @jax.jit
    def features_and_gradient(pyramid, rois, weight):
        out, pull = jax.vjp(lambda p: box.roi_features(BOX, p, rois), pyramid)
        return out, pull(weight)[0]

    out, gradient = features_and_gradient(pyramid, rois, weight)
    expected = np.zeros(out.shape)
    expected_gradient = {level: np.zeros(x.shape) for level, x in pyramid.items()}
    for b, r in np.ndindex(rois.shape[:2]):
        level = slow_level(rois[b, r].astype(np.float64))
        for i, j, row, column, tap in slow_taps(rois[b, r], 256 >> level, 320 >> level, 2.0**-level):
            expected[b, r, i, j] += tap * pyramid[level][b, row, column]
            expected_gradient[level][b, row, column] += tap * weight[b, r, i, j]
    np.testing.assert_allclose(out, expected, atol=3e-5)
    assert not out[0, -4:].any()
    for level, x in expected_gradient.items():
        assert x.any()
        np.testing.assert_allclose(gradient[level], x, atol=1e-4)


def test_predictions_are_laid_out_anchor_by_anchor_and_class_by_class():
    """By their biases: detectron2 views [A * 4] channels and [80 * 4] outputs with the coordinates last."""
    heads = {
        DETECTOR.rpn_head: {2: np.zeros((1, 2, 2, 4), np.float32)},
        box.BoxHead(80, "last", 8): np.zeros((1, 2, 7, 7, 4)),
    }
    found = []
    for head, x in heads.items():
        shapes = jax.eval_shape(head.init, jax.random.key(0), x)
        variables = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
        bias = variables["params"]["deltas"]["bias"]
        variables["params"]["deltas"]["bias"] = np.arange(len(bias), dtype=np.float32)
        found.append(jax.jit(head.apply)(variables, x)[1])
    np.testing.assert_array_equal(found[0][2][0], np.tile(np.arange(12).reshape(3, 4), (4, 1)))
    np.testing.assert_array_equal(found[1][0, 1], np.arange(320).reshape(80, 4))


def slow_iou(a, b):
    w, h = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter) if inter > 0 else 0.0


def slow_deltas(source, target, weights):
    (x1, y1, x2, y2), (u1, v1, u2, v2) = source, target
    w, h = x2 - x1, y2 - y1
    dx, dy = ((u1 + u2) / 2 - (x1 + x2) / 2) / w, ((v1 + v2) / 2 - (y1 + y2) / 2) / h
    return np.array(weights) * (dx, dy, math.log((u2 - u1) / w), math.log((v2 - v1) / h))


def slow_box(deltas, source, weights, size):
    """Decoded, dw and dh clamped from above, and clipped to (height, width)."""
    dx, dy, dw, dh = np.asarray(deltas, np.float64) / weights
    w, h = source[2] - source[0], source[3] - source[1]
    x, y = (source[0] + source[2]) / 2 + dx * w, (source[1] + source[3]) / 2 + dy * h
    w, h = w * math.exp(min(dw, math.log(1000 / 16))), h * math.exp(min(dh, math.log(1000 / 16)))
    return np.clip((x - w / 2, y - h / 2, x + w / 2, y + h / 2), 0, (size[1], size[0], size[1], size[0]))


def slow_nms(candidates, threshold):
    """Of (score, box, ...) those that greedy suppression keeps, best first."""
    kept = []
    for candidate in sorted(candidates, key=lambda c: -c[0]):
        if all(slow_iou(candidate[1], other[1]) <= threshold for other in kept):
            kept.append(candidate)
    return kept


def is_empty(box):
    return box[2] <= box[0] or box[3] <= box[1]


def slow_proposals(logits, deltas, anchors, size, before, after):
    found = []
    for level in logits:
        best = np.argsort(-logits[level], kind="stable")[:before]
        boxes = [(logits[level][i], slow_box(deltas[level][i], anchors[level][i], (1, 1, 1, 1), size)) for i in best]
        found += slow_nms([c for c in boxes if not is_empty(c[1])], 0.7)
    return sorted(found, key=lambda c: -c[0])[:after]


def test_proposals():
    """Some far outside, so that nothing is left of them, some of 5e-4 pixels, some beyond the clamp."""
    rng = np.random.default_rng(0)
    grids = {2: (16, 20), 3: (8, 10), 4: (4, 5), 5: (2, 3), 6: (1, 2)}
    anchors = {level: grid.boxes() for level, grid in rpn.anchor_grids(RPN, grids, (64, 80)).items()}
    logits = {level: rng.normal(size=(2, len(a))).astype(np.float32) for level, a in anchors.items()}
    deltas = {level: rng.normal(0, 0.4, (2, len(a), 4)).astype(np.float32) for level, a in anchors.items()}
    for level, d in deltas.items():
        d[:, ::7, 0] += 30
        d[:, 1::7, 2:] = math.log(5e-4 / 2 ** (level + 3))
        d[:, 2::7, 3] = 9
    size = np.int32([[64, 80], [50, 61]])
    settings = RPN.replace(pre_nms_train=90, post_nms_train=60)
    found = jax.jit(rpn.propose, static_argnums=(0, 5))(settings, logits, deltas, anchors, size, True)
    for i in range(2):
        one = ({level: x[i] for level, x in values.items()} for values in (logits, deltas))
        expected = slow_proposals(*one, anchors, size[i], 90, 60)
        assert found.valid[i].sum() == len(expected) == 60
        assert any(0 < b[2] - b[0] < 1e-3 for _, b in expected) and any(b[3] - b[1] == size[i][0] for _, b in expected)
        np.testing.assert_allclose(found.boxes[i], [b for _, b in expected], atol=1e-3)
        np.testing.assert_allclose(found.scores[i], [1 / (1 + math.exp(-s)) for s, _ in expected], atol=1e-6)


def slow_matches(objects, boxes, high, low, low_quality):
    """(index of the object or -1 for background or None for neither) of each box."""
    if not len(objects):
        return [-1] * len(boxes)
    iou = np.array([[slow_iou(o, b) for b in boxes] for o in objects])
    best = iou.argmax(0)
    matches = [i if q >= high else -1 if q < low else None for i, q in zip(best, iou.max(0), strict=True)]
    if low_quality:
        for j in np.unique(np.nonzero(iou == iou.max(1, keepdims=True))[1]):
            matches[j] = best[j]
    return matches


def random_objects(rng, n, height=100, width=140):
    corners = rng.uniform(0, 0.6, (n, 2)) * (width, height)
    return np.concatenate([corners, corners + rng.uniform(8, 50, (n, 2))], -1).astype(np.float32)


def test_rpn_losses_are_divided_by_the_nominal_number():
    """All anchors are drawn: there are fewer than 256. The second image has no objects."""
    rng = np.random.default_rng(0)
    grids = {2: (4, 5), 3: (2, 3), 4: (1, 2), 5: (1, 1), 6: (1, 1)}
    by_level = rpn.anchor_grids(RPN, grids, (16, 20))
    anchors = np.asarray(rpn.boxes_of(by_level))
    objects = np.float32([[[-10, -8, 14, 15], [3, 1, 40, 50], [0, 0, 7, 6]], np.zeros((3, 4))])
    valid = np.array([[True] * 3, [False] * 3])
    logits = rng.normal(size=(2, len(anchors))).astype(np.float32)
    deltas = rng.normal(size=(2, len(anchors), 4)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = jax.jit(functools.partial(rpn.draw_anchors, RPN, by_level))(objects, valid, keys)
    rows = np.arange(2)[:, None], drawn.index
    losses, _ = jax.jit(rpn.rpn_losses, static_argnums=0)(RPN, logits[rows], deltas[rows], drawn)
    bce = l1 = positives = 0
    for i in range(2):
        for j, match in enumerate(slow_matches(objects[i][valid[i]], anchors, 0.7, 0.3, True)):
            if match is not None:
                bce += math.log1p(math.exp(-logits[i, j] if match >= 0 else logits[i, j]))
            if match is not None and match >= 0:
                positives += 1
                l1 += np.abs(deltas[i, j] - slow_deltas(anchors[j], objects[i, match], (1, 1, 1, 1))).sum()
    assert positives >= 4
    assert losses["rpn_objectness"] == pytest.approx(bce / (256 * 2), rel=1e-5)
    assert losses["rpn_box"] == pytest.approx(l1 / (256 * 2), rel=1e-5)


def test_box_losses_have_background_last_and_four_deltas_per_class():
    """All RoIs are drawn: there are fewer than 512. The second image has no objects."""
    rng = np.random.default_rng(0)
    objects, labels = np.stack([random_objects(rng, 3)] * 2), np.int32([[0, 79, 17]] * 2)
    valid = np.array([[True] * 3, [False] * 3])
    near = objects[:, rng.integers(0, 3, 30)] + rng.normal(0, 3, (2, 30, 4)).astype(np.float32)
    proposals, usable = np.concatenate([near, objects + 70], 1), np.ones((2, 33), bool)
    keys = jax.random.split(jax.random.key(0), 2)
    sample = jax.jit(box.sample_rois, static_argnums=(0, 1))
    rois = sample(BOX, 80, proposals, usable, objects, labels, valid, keys)
    n = rois.boxes.shape[1]
    logits = rng.normal(size=(2, n, 81)).astype(np.float32)
    deltas = rng.normal(size=(2, n, 320)).astype(np.float32)
    losses, _ = jax.jit(box.box_losses, static_argnums=0)(BOX, logits, deltas.reshape(2, n, 80, 4), rois)
    cross_entropy = l1 = count = 0
    for i in range(2):
        of_image = objects[i][valid[i]]
        pool = np.concatenate([proposals[i], of_image])
        matches = slow_matches(of_image, pool, 0.5, 0.5, False)
        rows = [int(np.flatnonzero((pool == b).all(1))[0]) for b in rois.boxes[i][rois.valid[i]]]
        assert sorted(rows) == list(range(len(pool)))
        count += len(rows)
        for j, row in enumerate(rows):
            match, z = matches[row], logits[i, j].astype(np.float64)
            label = 80 if match < 0 else labels[i, match]
            cross_entropy += math.log(np.exp(z).sum()) - z[label]
            if match >= 0:
                own = deltas[i, j, 4 * label : 4 * label + 4]
                l1 += np.abs(own - slow_deltas(pool[row], of_image[match], (10, 10, 5, 5))).sum()
    assert count == 36 + 33 and rois.positive.sum() > 10
    assert losses["class"] == pytest.approx(cross_entropy / count, rel=1e-5)
    assert losses["box"] == pytest.approx(l1 / count, rel=1e-5)


def slow_detections(logits, deltas, proposals, size):
    """(score, box, class): above .05, suppressed class by class, the best 100; then without empty ones."""
    kept = []
    for k in range(80):
        scores = [math.exp(z[k]) / np.exp(z.astype(np.float64)).sum() for z in logits]
        candidates = [
            (s, slow_box(d[4 * k : 4 * k + 4], p, (10, 10, 5, 5), size), k)
            for s, d, p in zip(scores, deltas, proposals, strict=True)
            if s > 0.05
        ]
        kept += slow_nms(candidates, 0.5)
    return [c for c in sorted(kept, key=lambda c: -c[0])[:100] if not is_empty(c[1])]


SIZES = np.int32([[100, 140], [90, 120], [100, 140]])


@pytest.fixture(scope="module")
def detections():
    """(ours, expected) of three images: over 100; few, with empty, tiny and clamped ones; as the first and an empty."""
    rng = np.random.default_rng(0)
    n = 120
    proposals = np.stack([random_objects(rng, n) for _ in range(3)])
    proposals[:, ::2] = proposals[:, 1::2] + rng.normal(0, 1, (3, n // 2, 4)).astype(np.float32)
    logits = rng.normal(0, 1, (3, n, 81)).astype(np.float32)
    for _ in range(4):  # a few likely classes, of all slots
        logits[np.arange(3)[:, None], np.arange(n), rng.choice([0, 3, 78, 79, 80], (3, n))] += 4
    logits[1, 20:, 80] += 9
    deltas = rng.normal(0, 0.5, (3, n, 320)).astype(np.float32)
    logits[2], deltas[2], proposals[2] = logits[0], deltas[0], proposals[0]
    logits[2, 9, 3], deltas[2, 9, 12] = 20, 500
    logits[1, 7:14, 3], deltas[1, 7:12, 12] = 20, 500
    proposals[1, 12:14] = [[60, 40, 61, 41], [20, 20, 30, 30]]
    deltas[1, 12:14, 12:16] = [[0, 0, 30, 30], [0, 0, 5 * math.log(5e-4), 5 * math.log(5e-4)]]
    usable = np.ones((3, n), bool)
    found = jax.jit(box.detect, static_argnums=0)(BOX, logits, deltas.reshape(3, n, 80, 4), proposals, usable, SIZES)
    return found, [slow_detections(logits[i], deltas[i], proposals[i], SIZES[i]) for i in range(3)]


def check_detections(found, i, expected):
    valid = np.asarray(found.valid[i])
    assert valid.sum() == len(expected)
    for mine, theirs, atol in ((found.scores, 0, 1e-6), (found.boxes, 1, 2e-3), (found.labels, 2, 0)):
        np.testing.assert_allclose(mine[i][valid], [c[theirs] for c in expected], atol=atol)


def test_detections(detections):
    found, expected = detections
    assert len(expected[0]) == 100 and 10 < len(expected[1]) < 95
    assert {0, 79} <= {k for _, _, k in expected[0]}
    sides = [x2 - x1 for _, (x1, _, x2, _), _ in expected[1]]
    assert min(sides) < 1e-2 and any(abs(side - 62.5) < 1e-3 for side in sides)
    for i in range(2):
        check_detections(found, i, expected[i])


def test_an_empty_detection_takes_up_one_of_the_hundred(detections):
    found, expected = detections
    assert len(expected[2]) == 99
    check_detections(found, 2, expected[2])
