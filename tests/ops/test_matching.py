"""Matching against a loop that spells the rules out, and against torchvision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.ops import matching
from fpn_jax.ops.boxes import iou
from fpn_jax.ops.matching import BELOW, BETWEEN

match = jax.jit(matching.match, static_argnames=("high", "low", "low_quality"))

FORMS = (
    lambda objects, boxes, *rest: matching.match(iou(objects, boxes), *rest),
    matching.match_at_once,
    matching.match_in_groups,
    matching.match_boxes,
)
RULES = [(0.75, 0.25, True), (0.75, 0.25, False), (0.5, 0.5, False), (0.5, 0.5, True)]


def slow_match(iou, valid, high, low, low_quality):
    objects = [i for i in range(len(valid)) if valid[i]]
    result = []
    for j in range(iou.shape[1]):
        if not objects:
            result.append(BELOW)
            continue
        mine = max(objects, key=lambda i, j=j: iou[i, j])  # the first of equals
        tied = any(iou[i, j] == iou[i].max() for i in objects)
        if iou[mine, j] >= high or (low_quality and tied):
            result.append(mine)
        else:
            result.append(BELOW if iou[mine, j] < low else BETWEEN)
    return result


@pytest.mark.parametrize("rule", RULES)
def test_match_is_that_of_a_loop(rule):
    rng = np.random.default_rng(0)
    quality = rng.integers(0, 9, (60, 5, 30)).astype(np.float32) / 8  # many ties, many exactly at a threshold
    quality *= rng.uniform(size=quality.shape) < 0.3
    quality[:5, 0] = 0  # an object that overlaps nothing
    valid = rng.uniform(size=(60, 5)) < 0.6
    valid[0], valid[1] = False, True
    quality[~valid] = 1  # padding must not match however well it overlaps
    high, low, low_quality = rule
    got = jax.jit(jax.vmap(partial(match, high=high, low=low, low_quality=low_quality)))(quality, valid)
    assert got.dtype == jnp.int32
    expected = [slow_match(q, v, *rule) for q, v in zip(quality, valid, strict=True)]
    np.testing.assert_array_equal(got, expected)
    assert {BELOW, 0, 4} <= set(np.unique(got))


def test_no_objects_and_no_boxes():
    assert match(jnp.zeros((0, 3)), jnp.zeros(0, bool), high=0.5, low=0.5, low_quality=True).tolist() == [BELOW] * 3
    assert match(jnp.zeros((2, 3)), jnp.zeros(2, bool), high=0.5, low=0.5, low_quality=True).tolist() == [BELOW] * 3
    for form in FORMS:
        for m, r in ((0, 3), (2, 0), (0, 0)):
            found = form(jnp.zeros((m, 4)), jnp.zeros((r, 4)), jnp.ones(m, bool), 0.5, 0.5, True)
            assert found.tolist() == [BELOW] * r


def test_every_object_keeps_its_best_anchors_when_compiled_with_the_iou():
    """The compiler fuses the IoU into the test for ties; both sides must still see the same bits."""
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 200, (8, 400, 2))
    anchors = np.concatenate([corners, corners + rng.uniform(10, 90, (8, 400, 2))], -1).astype(np.float32)
    gt = (anchors[:, :6] + rng.uniform(-9, 9, (8, 6, 4))).astype(np.float32)
    valid = np.ones((8, 6), bool)
    for form in FORMS:
        got = jax.jit(jax.vmap(lambda *x, form=form: form(*x, 0.99, 0.3, True)))(gt, anchors, valid)
        for b in range(8):
            best = np.asarray(jax.jit(iou)(gt[b], anchors[b])).argmax(axis=1)
            assert (np.asarray(got[b])[best] >= 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_all_forms_match_boxes_alike(rule, monkeypatch):
    """Small whole numbers make ties, between objects and between boxes; some objects are not numbers."""
    monkeypatch.setattr(matching, "GROUP", 4)  # two groups, the second not full
    rng = np.random.default_rng(2)
    corners = rng.integers(0, 6, (20, 46, 2))
    boxes = np.concatenate([corners, corners + rng.integers(0, 4, (20, 46, 2))], -1).astype(np.float32)
    boxes[:10, :, 2:] += 1  # an empty object ties with every box: without any, it shows which do not
    objects, boxes = boxes[:, :6], boxes[:, 6:]
    objects[15:, 2] = np.nan
    valid = rng.uniform(size=(20, 6)) < 0.7
    valid[0] = False
    quality = np.asarray(jax.jit(jax.vmap(iou))(objects, boxes))
    expected = np.array([slow_match(q, v, *rule) for q, v in zip(quality[:15], valid[:15], strict=True)])
    assert (expected[1:10] < 0).any()
    first, *others = (np.asarray(jax.jit(jax.vmap(lambda *x, f=f: f(*x, *rule)))(objects, boxes, valid)) for f in FORMS)
    np.testing.assert_array_equal(first[:15], expected)
    for other in others:
        np.testing.assert_array_equal(other, first)
    # With such an object there is no best one: no box belongs to any, but for those that are some object's best.
    poisoned = valid[15:, 2]
    tied = (quality == quality.max(2, keepdims=True)) & valid[..., None]
    assert poisoned.any()
    np.testing.assert_array_equal(first[15:][poisoned], np.where(rule[2] & tied.any(1)[15:][poisoned], 2, BETWEEN))


@pytest.mark.parametrize(("platform", "barrier"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_the_barrier_that_keeps_the_matrix_out_of_memory_is_there(platform, barrier):
    """Without it the matches are the same, and a GPU writes all IoUs: `benchmarks/LOG.md`, "Compiled for an H100"."""
    matched = jax.jit(lambda *x: matching.match_boxes(*x, 0.7, 0.3, True))
    traced = matched.trace(jnp.zeros((3, 4)), jnp.zeros((5, 4)), jnp.ones(3, bool))
    assert ("optimization_barrier" in traced.lower(lowering_platforms=(platform,)).as_text()) == barrier


def test_goldens(data_dir):
    golden = np.load(data_dir / "ops.npz")
    quality = golden["matcher/iou"]
    for high, low, low_quality in ((0.7, 0.3, True), (0.5, 0.4, True), (0.5, 0.5, False)):
        got = match(jnp.asarray(quality), jnp.ones(5, bool), high=high, low=low, low_quality=low_quality)
        np.testing.assert_array_equal(got, golden[f"matcher/match_{high}_{low}_low{int(low_quality)}"])
