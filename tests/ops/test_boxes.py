"""IoU, clipping and box coding against loops and torchvision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.ops import boxes as box_ops

area, iou, clip, is_larger = (jax.jit(f) for f in (box_ops.area, box_ops.iou, box_ops.clip, box_ops.is_larger))
encode, decode = jax.jit(box_ops.encode), jax.jit(box_ops.decode)


def random_boxes(rng, n, extent=100.0):
    corners = rng.uniform(-0.2, 1, (n, 2)) * extent
    return np.concatenate([corners, corners + rng.uniform(0.01, 0.6, (n, 2)) * extent], -1).astype(np.float32)


DEGENERATE = np.float32(
    [
        [0, 0, 0, 0],
        [10, 10, 10, 30],  # no width
        [10, 10, 30, 10],  # no height
        [30, 30, 10, 10],  # inverted
        [30, 10, 10, 40],  # inverted along x
        [10, 10, 30, 30],
        [10, 10, 30, 30],  # a duplicate
        [-1e9, -1e9, 1e9, 1e9],
        [5, 5, 5.001, 5.001],
        [30, 10, 50, 30],  # touches another
    ]
)


def slow_iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    inter = w * h
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def test_iou_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    a, b = np.concatenate([random_boxes(rng, 30), DEGENERATE]), np.concatenate([random_boxes(rng, 7), DEGENERATE])
    expected = [[slow_iou(x, y) for y in b.astype(np.float64)] for x in a.astype(np.float64)]
    got = iou(a, b)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert got[-5, -4] == got[-5, -5] == 1  # duplicates


@pytest.mark.parametrize("of", [lambda x: x, lambda x: x.max(0), lambda x: x.max(1)], ids=["all", "columns", "rows"])
def test_iou_has_the_same_bits_whatever_it_is_compiled_with(of):
    """Those of NumPy, which rounds every product; a compiler may fuse one with a sum here and not there."""
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 40), random_boxes(rng, 1000)
    x1, y1, x2, y2 = (a.T[i][:, None] for i in range(4))
    w, h = np.minimum(x2, b[:, 2]) - np.maximum(x1, b[:, 0]), np.minimum(y2, b[:, 3]) - np.maximum(y1, b[:, 1])
    inter = np.maximum(w, 0) * np.maximum(h, 0)
    union = (x2 - x1) * (y2 - y1) + (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) - inter
    assert union.dtype == np.float32
    as_in_use = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    compiled = jax.jit(lambda a, b: of(box_ops.iou(a, b))).lower(a, b).compile(as_in_use)
    np.testing.assert_array_equal(compiled(a, b), of(inter / union))


def test_iou_of_no_boxes():
    assert iou(jnp.zeros((0, 4)), jnp.zeros((3, 4))).shape == (0, 3)


def test_iou_has_finite_gradients_for_degenerate_boxes():
    gradient = jax.jit(jax.grad(lambda x: iou(x, DEGENERATE).sum()))(jnp.asarray(DEGENERATE))
    assert np.isfinite(gradient).all()


def test_area():
    assert area(DEGENERATE)[:6].tolist() == [0, 0, 0, 0, 0, 400]


def test_clip_and_is_larger():
    boxes = np.float32([[-5, -6, 500, 600], [10, 20, 30, 40], [100, 10, 120, 30]])
    clipped = clip(boxes, np.int32([70, 90]))
    assert clipped.tolist() == [[0, 0, 90, 70], [10, 20, 30, 40], [90, 10, 90, 30]]
    assert is_larger(clipped, 20).tolist() == [True, True, False]  # a side of exactly 20 is enough
    assert is_larger(np.float32([[30, 30, 10, 10]]), 0).tolist() == [False]


def slow_decode(delta, anchor, weights, clamp):
    w, h = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x = anchor[0] + w / 2 + delta[0] / weights[0] * w
    y = anchor[1] + h / 2 + delta[1] / weights[1] * h
    w *= math.exp(min(delta[2] / weights[2], clamp))
    h *= math.exp(min(delta[3] / weights[3], clamp))
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (10, 10, 5, 5), (1, 2, 3, 4)])
def test_coding_is_that_of_a_loop_and_its_own_inverse(weights):
    rng = np.random.default_rng(1)
    anchors, gt = random_boxes(rng, 50), random_boxes(rng, 50)
    deltas = encode(gt, anchors, weights)
    np.testing.assert_allclose(decode(deltas, anchors, weights), gt, atol=2e-3)
    wild = rng.normal(0, 5, (50, 4)).astype(np.float32) * np.float32(weights)
    expected = [slow_decode(*pair, weights, box_ops.DELTA_CLAMP) for pair in zip(wild, anchors, strict=True)]
    np.testing.assert_allclose(decode(wild, anchors, weights), expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(encode(decode(0.1 * wild, anchors, weights), anchors, weights), 0.1 * wild, atol=1e-2)


def test_decode_takes_many_deltas_for_each_anchor():
    rng = np.random.default_rng(2)
    anchors, deltas = random_boxes(rng, 5), rng.normal(size=(5, 3, 4)).astype(np.float32)
    together = decode(deltas, anchors[:, None])
    for k in range(3):
        np.testing.assert_allclose(together[:, k], decode(deltas[:, k], anchors), rtol=1e-6, atol=1e-4)


def test_coding_is_finite_for_padding_and_degenerate_boxes():
    a, b = (x.reshape(-1, 4) for x in np.broadcast_arrays(DEGENERATE[:, None], DEGENERATE[None]))
    for function in (encode, lambda x, y: decode(encode(x, y), y)):
        value, gradients = jax.jit(jax.value_and_grad(lambda x, y, f=function: f(x, y).sum(), (0, 1)))(a, b)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    huge = jnp.full((1, 4), 1e30)
    assert np.isfinite(clip(decode(huge, DEGENERATE), np.int32([70, 90]))).all()
    assert np.isfinite(jax.grad(lambda x: decode(x, DEGENERATE).sum())(huge)).all()


def test_goldens(data_dir):
    golden = np.load(data_dir / "ops.npz")
    np.testing.assert_allclose(iou(golden["iou/a"], golden["iou/b"]), golden["iou/box_iou"], rtol=1e-6)
    anchors = golden["box_coder/anchors"]
    for weights in ((1, 1, 1, 1), (10, 10, 5, 5)):
        name = "_".join(map(str, weights))
        encoded = encode(golden["box_coder/gt"], anchors, weights)
        np.testing.assert_allclose(encoded, golden[f"box_coder/encode_{name}"], rtol=1e-5, atol=1e-6)
        deltas = golden["box_coder/deltas"].reshape(40, 3, 4)
        decoded = decode(deltas, anchors[:, None], weights).reshape(40, 12)
        np.testing.assert_allclose(decoded, golden[f"box_coder/decode_{name}"], rtol=1e-5, atol=1e-3)
    clipped = clip(golden["clip/boxes"], np.int32([70, 90]))
    np.testing.assert_array_equal(clipped, golden["clip/out_70x90"])
    for side in (0.001, 0.01):
        kept = np.flatnonzero(is_larger(golden["remove_small/boxes"], side))
        np.testing.assert_array_equal(kept, golden[f"remove_small/keep_{side}"])
