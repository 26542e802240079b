"""Matching against a loop that spells the rules out, and against torchvision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.ops import matching
from fpn_jax.ops.anchors import AnchorGrid, cell_anchors
from fpn_jax.ops.boxes import iou
from fpn_jax.ops.matching import BELOW, BETWEEN

match = jax.jit(matching.match, static_argnames=("high", "low", "low_quality"))


def with_highest(form):
    """form(objects, boxes, valid, highest, high, low), called as `match` is."""

    def matched(objects, boxes, valid, high, low, low_quality):
        highest = iou(objects, boxes).max(axis=1) if low_quality and len(boxes) else None
        return form(objects, boxes, valid, highest, high, low)

    return matched


FORMS = (
    lambda objects, boxes, *rest: matching.match(iou(objects, boxes), *rest),
    with_highest(matching.match_at_once),
    with_highest(matching.match_in_groups),
    with_highest(lambda *x: matching.match_boxes(*x[:3], *x[4:], x[3])),
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
    for form in (FORMS[0], FORMS[-1]):
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


@pytest.mark.parametrize("rounded", [True, False])
def test_every_object_keeps_its_best_anchors_of_a_grid(rounded):
    """What the grid says is highest must be the bits that the matching sees, in one program."""
    rng = np.random.default_rng(3)
    grid = AnchorGrid((40, 60), cell_anchors((24.7, 50.0), (0.5, 1.0, 2.0), rounded), (8, 8))
    corners = rng.uniform(0, 300, (8, 20, 2))
    objects = np.concatenate([corners, corners + rng.uniform(2, 90, (8, 20, 2))], -1).astype(np.float32)
    valid = rng.uniform(size=(8, 20)) < 0.8
    for form in (matching.match_at_once, matching.match_in_groups):

        def matched(objects, valid, form=form):
            return form(objects, grid.boxes(), valid, grid.highest_iou(objects), 0.99, 0.3)

        found = jax.jit(jax.vmap(matched))(objects, valid)
        expected = jax.jit(jax.vmap(lambda *x: match(iou(x[0], grid.boxes()), x[1], 0.99, 0.3, True)))(objects, valid)
        np.testing.assert_array_equal(found, expected)
        assert (np.asarray(found) >= 0).any(1).all()


def test_goldens(data_dir):
    golden = np.load(data_dir / "ops.npz")
    quality = golden["matcher/iou"]
    for high, low, low_quality in ((0.7, 0.3, True), (0.5, 0.4, True), (0.5, 0.5, False)):
        got = match(jnp.asarray(quality), jnp.ones(5, bool), high=high, low=low, low_quality=low_quality)
        np.testing.assert_array_equal(got, golden[f"matcher/match_{high}_{low}_low{int(low_quality)}"])
