"""The two heads against torchvision's numbers and against what their sources say, on small made-up predictions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.models.heads import box, rpn
from fpn_jax.models.heads.box import BoxHead, BoxSettings
from fpn_jax.models.heads.rpn import RPNHead, RPNSettings
from fpn_jax.ops.anchors import AnchorGrid
from fpn_jax.ops.boxes import iou
from fpn_jax.ops.matching import match

SAMPLE = jax.jit(box.sample_rois, static_argnums=(0, 1))
SIZES = np.array([[60, 80], [50, 70]], np.int32)  # of the two images of the stored cases


@pytest.fixture(scope="module")
def golden():
    from pathlib import Path

    with np.load(Path(__file__).parent.parent / "data" / "ops.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize(("mode", "before", "after"), [("testing", 50, 40), ("training", 60, 50)])
def test_proposals_are_torchvisions(golden, mode, before, after):
    boxes, logits = golden["filter_proposals/boxes"], golden["filter_proposals/objectness"]
    cuts = np.cumsum([96, 36, 18])[:-1]
    levels = dict(enumerate(zip(np.split(boxes, cuts, 1), np.split(logits, cuts, 1), strict=True), start=2))
    key = "train" if mode == "training" else "test"
    propose = jax.jit(rpn.propose, static_argnums=(0, 5))
    settings = RPNSettings(**{f"pre_nms_{key}": before, f"post_nms_{key}": after})
    for i in range(2):
        # Zero deltas on anchors that are the decoded boxes.
        anchors = {level: b[i] for level, (b, _) in levels.items()}
        one = {level: s[i : i + 1] for level, (_, s) in levels.items()}
        deltas = {level: np.zeros((1, *a.shape), np.float32) for level, a in anchors.items()}
        found = propose(settings, one, deltas, anchors, SIZES[i : i + 1], mode == "training")
        valid = np.asarray(found.valid[0])
        expected = golden[f"filter_proposals/{mode}/boxes{i}"]
        assert valid.sum() == len(expected)
        np.testing.assert_allclose(found.boxes[0][valid], expected, atol=1e-4)
        np.testing.assert_allclose(found.scores[0][valid], golden[f"filter_proposals/{mode}/scores{i}"], atol=1e-6)


def pad(x, n):
    return np.concatenate([x, np.full((n - len(x), *x.shape[1:]), 9, x.dtype)])[None]


@pytest.mark.parametrize("background", ["first", "last"])
def test_detections_are_torchvisions(golden, background):
    settings = BoxSettings(detections=30, background=background)
    counts = [len(golden[f"postprocess/proposals{i}"]) for i in range(2)]
    starts = np.cumsum([0, *counts])
    for i in range(2):
        rows = slice(starts[i], starts[i + 1])
        logits = golden["postprocess/class_logits"][rows]
        deltas = golden["postprocess/box_deltas"][rows].reshape(counts[i], -1, 4)
        proposals = golden[f"postprocess/proposals{i}"]
        if background == "last":  # the same numbers in detectron2's order
            logits, deltas = np.roll(logits, -1, axis=1), deltas[:, 1:]
        # Padding proposals must not become detections, however sure the head is of them.
        padded = (pad(x, 70) for x in (logits, deltas, proposals))
        usable = (np.arange(70) < counts[i])[None]
        found = jax.jit(box.detect, static_argnums=0)(settings, *padded, usable, SIZES[i : i + 1])
        valid = np.asarray(found.valid[0])
        expected = golden[f"postprocess/boxes{i}"]
        assert valid.sum() == len(expected)
        np.testing.assert_allclose(found.boxes[0][valid], expected, atol=1e-3)
        np.testing.assert_allclose(found.scores[0][valid], golden[f"postprocess/scores{i}"], atol=1e-6)
        np.testing.assert_array_equal(found.labels[0][valid] + 1, golden[f"postprocess/labels{i}"])


def losses_of_all(settings, anchors, logits, deltas, boxes, valid, keys):
    """`rpn_losses` of anchors drawn from all [b r], which logits and deltas are of."""
    drawn = rpn.draw_anchors(settings, anchors, boxes, valid, keys)
    rows = jnp.arange(len(logits))[:, None], drawn.index
    return rpn.rpn_losses(settings, logits[rows], deltas[rows], drawn)


def test_rpn_losses_by_hand():
    anchors = np.float32([[0, 0, 10, 10], [0, 0, 10, 8.0], [50, 50, 60, 60], [0, 0, 5, 10]])
    boxes = jnp.array([[[0, 0, 10, 10.0], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    valid = jnp.array([[True, False], [False, False]])
    logits = jnp.array([[2.0, -1.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0]])
    deltas = jnp.zeros((2, 4, 4)).at[0, 0, 0].set(0.5).at[0, 1, 3].set(1.0)
    levels = {"levels": (2, 3), "sizes": ((8,), (16,)), "ratios": (0.5, 1.0)}
    settings = RPNSettings(samples=4, positive_fraction=0.5, sampling="first", beta=0.0, **levels)
    keys = jax.random.split(jax.random.key(0))
    grids = {2: AnchorGrid((1, 1), anchors[:2], (4, 4)), 3: AnchorGrid((1, 1), anchors[2:], (8, 8))}
    of_all = jax.jit(functools.partial(losses_of_all, settings, grids))
    losses, statistics = of_all(logits, deltas, boxes, valid, keys)
    # Image 0: IoU 1, 0.8, 0, 0.5: two positives, one negative, one left out. Image 1: four negatives, all at logit 0.
    bce = np.log1p(np.exp(-2)) + np.log1p(np.exp(1)) + np.log1p(np.exp(0.5)) + 4 * np.log(2)
    assert losses["rpn_objectness"] == pytest.approx(bce / 7, rel=1e-5)
    # Anchor 0 is off by 0.5 in x; anchor 1 should move by (5 - 4) / 8 down and grow by log(10 / 8), but grew by 1.
    assert losses["rpn_box"] == pytest.approx((0.5 + 1 / 8 + abs(1 - np.log(10 / 8))) / 7, rel=1e-5)
    assert statistics["rpn_positives"] == 1.0


@pytest.mark.parametrize("low_quality", [True, False])
def test_anchors_are_matched_over_all_levels(low_quality):
    """An object's best anchors may be of any level, and of several: two have the same anchors."""
    settings = RPNSettings(levels=(2, 3, 4), sizes=((16,), (16,), (40,)), low_quality_matches=low_quality)
    grids = rpn.anchor_grids(settings, {2: (8, 8), 3: (8, 8), 4: (2, 3)}, (64, 64))
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 50, (9, 2))
    boxes = jnp.asarray(np.concatenate([corners, corners + rng.uniform(3, 50, (9, 2))], -1), jnp.float32)
    valid = jnp.arange(9) < 7
    found = jax.jit(functools.partial(rpn.match_anchors, settings, grids))(boxes, valid)
    expected = jax.jit(lambda *x: match(iou(x[0], rpn.boxes_of(grids)), x[1], 0.7, 0.3, low_quality))(boxes, valid)
    np.testing.assert_array_equal(found, expected)
    assert len(found) == 2 * 8 * 8 * 3 + 2 * 3 * 3
    assert (len(np.unique(found)) > 5) == low_quality
    if low_quality:
        np.testing.assert_array_equal(found[:192], found[192:384])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("convs", [1, 2, 3])
def test_drawn_anchors_get_what_the_whole_pyramid_gets(convs, shared):
    """Logits, deltas and all gradients; also at the border, where later convolutions read zeros, and on a 1x1 map.

    The pyramid that is passed on is the given one, and what reads it adds its gradient.
    """
    rng, per_cell = np.random.default_rng(convs), 3
    grids = {2: (6, 7), 3: (3, 4), 6: (1, 1)}
    pyramid = {level: rng.normal(size=(2, *grid, 5)).astype(np.float32) for level, grid in grids.items()}
    index = rng.permuted(np.tile(np.arange(per_cell * (42 + 12 + 1)), (2, 1)), axis=1)[:, :120].astype(np.int32)
    weights = rng.normal(size=(2, 120, 5)).astype(np.float32)
    head = RPNHead(per_cell, convs, channels=4, shared=shared)
    shapes = jax.eval_shape(head.init, jax.random.key(0), pyramid)
    assert shapes == jax.eval_shape(lambda *x: head.init(*x, method="of_drawn"), jax.random.key(0), pyramid, index)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)  # biases, too

    def of_drawn(variables, pyramid):
        return head.apply(variables, pyramid, index, method="of_drawn")

    def of_all(variables, pyramid):
        found = (jnp.concatenate(list(x.values()), 1) for x in head.apply(variables, pyramid))
        return *(x[np.arange(2)[:, None], index] for x in found), pyramid

    later = {level: rng.normal(size=x.shape).astype(np.float32) for level, x in pyramid.items()}

    def both(of):
        def loss(variables, pyramid):
            logits, deltas, read_next = of(variables, pyramid)
            assert (of is of_all) == all(read_next[x] is pyramid[x] for x in pyramid)
            total = (jnp.concatenate([logits[..., None], deltas], -1) * weights).sum()
            return total + sum((read_next[x] * later[x]).sum() for x in later), (logits, deltas, read_next)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables, pyramid)

    for got, expected in zip(jax.tree.leaves(both(of_drawn)), jax.tree.leaves(both(of_all)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("last", [(), (4,)])
def test_anchors_taken_by_cells_are_those_of_the_index(last):
    """Also beside a NaN of the same cell, and with the gradient of plain indexing."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, *last)).astype(np.float32)
    index, weights = np.array([0, 4, 11, 5, 4]), rng.normal(size=(5, *last)).astype(np.float32)
    values[3] = np.nan
    taken, pull = jax.vjp(lambda x: rpn.take_anchors(x, index, 3), jnp.asarray(values))
    np.testing.assert_array_equal(taken, values[index])
    expected = np.zeros_like(values)
    np.add.at(expected, index, weights)
    np.testing.assert_array_equal(pull(jnp.asarray(weights))[0], expected)
    assert rpn.take_anchors(jnp.asarray(values, jnp.bfloat16), index, 3).dtype == jnp.float32


def test_rois_are_sampled_by_overlap_and_get_their_class_slot():
    settings = BoxSettings(samples=4, positive_fraction=0.5, sampling="first")
    proposals = jnp.array([[[0, 0, 10, 10.0], [0, 0, 10, 4], [40, 40, 50, 50], [0, 0, 10, 9]]])
    usable = jnp.array([[True, True, False, True]])
    boxes, labels, valid = (
        jnp.array([[[0, 0, 10, 10.0], [0, 0, 0, 0]]]),
        jnp.array([[2, 0]]),
        jnp.array([[True, False]]),
    )
    keys = jax.random.split(jax.random.key(0), 1)
    rois = SAMPLE(settings, 3, proposals, usable, boxes, labels, valid, keys)
    # Positives: 0 and 3 (IoU 1 and 0.9); the object itself would be the third. Negative: 1 (IoU 0.4); 2 is padding.
    np.testing.assert_array_equal(rois.valid[0], [True, True, True, False])
    np.testing.assert_array_equal(rois.positive[0], [True, True, False, False])
    np.testing.assert_array_equal(rois.boxes[0, :3], proposals[0, jnp.array([0, 3, 1])])
    np.testing.assert_array_equal(rois.labels[0, :3], [3, 3, 0])
    last = SAMPLE(
        BoxSettings(samples=4, background="last", sampling="first"), 3, proposals, usable, boxes, labels, valid, keys
    )
    np.testing.assert_array_equal(last.labels[0, :3], [2, 3, 3])  # a quarter of four is one positive; two negatives


def test_padding_is_never_drawn():
    """The first row lies on the object as well, but is no proposal."""
    settings = BoxSettings(samples=4, positive_fraction=0.5, add_ground_truth=False)
    proposals, usable = jnp.array([[[0, 0, 10, 10.0], [0, 0, 10, 9], [20, 0, 30, 9]]]), jnp.array([[False, True, True]])
    objects = jnp.array([[[0, 0, 10, 10.0]]]), jnp.array([[1]]), jnp.array([[True]])
    keys = jax.random.split(jax.random.key(0), 1)
    rois = SAMPLE(settings, 3, proposals, usable, *objects, keys).boxes
    assert rois[0, :3].tolist() == [[0, 0, 10, 9], [20, 0, 30, 9], [0, 0, 0, 0]]


def test_ground_truth_joins_the_proposals_only_if_asked():
    nothing = jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), bool)
    boxes, labels, valid = jnp.array([[[5, 5, 9, 9.0]]]), jnp.array([[1]]), jnp.array([[True]])
    keys = jax.random.split(jax.random.key(0), 1)
    for joins in (True, False):
        settings = BoxSettings(samples=4, add_ground_truth=joins)
        rois = SAMPLE(settings, 3, *nothing, boxes, labels, valid, keys)
        assert rois.positive.sum() == rois.valid.sum() == joins


def test_box_losses_use_the_deltas_of_the_own_class():
    rois = box.SampledRoIs(
        boxes=jnp.array([[[0, 0, 10, 10.0], [0, 0, 10, 10]]]),
        labels=jnp.array([[2, 0]]),
        gt_boxes=jnp.array([[[1, 0, 11, 10.0], [1, 0, 11, 10]]]),
        positive=jnp.array([[True, False]]),
        valid=jnp.array([[True, True]]),
    )
    deltas = jnp.zeros((1, 2, 4, 4)).at[0, 0, 2, 0].set(0.9).at[0, 0, 1, 0].set(7.0)
    logits = jnp.zeros((1, 2, 4)).at[0, 0, 2].set(1.0)
    losses, statistics = jax.jit(box.box_losses, static_argnums=0)(BoxSettings(beta=0.0), logits, deltas, rois)
    assert losses["box"] == pytest.approx(abs(0.9 - 0.1 * 10) / 2, abs=1e-5)
    expected = (np.log(3 + np.e) - 1 + np.log(4)) / 2
    assert losses["class"] == pytest.approx(expected, rel=1e-5)
    assert statistics["roi_accuracy"] == 1.0


def test_unused_rois_add_nothing_to_a_loss():
    """The second image has none; then no image has any."""
    rois = box.SampledRoIs(
        boxes=jnp.array([[[0, 0, 10, 10.0]] * 2] * 2),
        labels=jnp.array([[2, 0]] * 2),
        gt_boxes=jnp.array([[[1, 0, 11, 10.0]] * 2] * 2),
        positive=jnp.array([[True, False], [False, False]]),
        valid=jnp.array([[True, False], [False, False]]),
    )
    logits = jnp.zeros((2, 2, 4)).at[0, 0, 2].set(1.0).at[0, 1, 1].set(50.0).at[1, :, 3].set(50.0)
    box_losses = jax.jit(box.box_losses, static_argnums=0)
    losses, statistics = box_losses(BoxSettings(beta=0.0), logits, jnp.zeros((2, 2, 4, 4)), rois)
    assert losses == {"class": pytest.approx(np.log(3 + np.e) - 1, rel=1e-5), "box": pytest.approx(1.0, rel=1e-5)}
    assert statistics == {"roi_positives": 0.5, "roi_accuracy": 1.0}  # per image; of the positives
    nothing = rois._replace(positive=jnp.zeros((2, 2), bool), valid=jnp.zeros((2, 2), bool))
    assert not any(jax.tree.leaves(box_losses(BoxSettings(), logits, jnp.zeros((2, 2, 4, 4)), nothing)))


def test_what_is_detected_is_above_the_threshold_within_the_image_and_of_a_proposal_with_an_area():
    """Scores of 1/2, to the bit, of five proposals: one is padding, one lies outside, one is empty from the outset."""
    proposals = jnp.array([[[0, 0, 4, 4.0], [10, 10, 20, 30], [5, 5, 9, 9], [50, 0, 60, 9], [7, 0, 7, 3]]])
    usable, size = jnp.array([[True, True, False, True, True]]), jnp.array([[20, 40]])
    detect = jax.jit(box.detect, static_argnums=0)
    given = jnp.zeros((1, 5, 2)), jnp.zeros((1, 5, 2, 4)), proposals, usable, size
    for min_size in (1e-2, 0.0):
        found = detect(BoxSettings(score_threshold=0.49, detections=5, min_size=min_size), *given)
        assert found.boxes[found.valid].tolist() == [[0, 0, 4, 4], [10, 10, 20, 20]]
        assert found.scores[found.valid].tolist() == [0.5, 0.5] and not found.scores[~found.valid].any()
    assert not detect(BoxSettings(score_threshold=0.5), *given).valid.any()


@pytest.mark.parametrize("before", [0, 3])
def test_proposals_are_at_least_as_likely_as_asked(before):
    anchors = {2: jnp.array([[0, 0, 4, 4], [10, 0, 14, 4], [20, 0, 24, 4]], jnp.float32)}
    settings = rpn.RPNSettings(levels=(2,), sizes=((8,),), ratios=(1.0,), pre_nms_test=before, score_threshold=0.5)
    logits, deltas = {2: jnp.array([[-0.1, 1.0, 0.0]])}, {2: jnp.zeros((1, 3, 4))}
    found = jax.jit(rpn.propose, static_argnums=(0, 5))(settings, logits, deltas, anchors, jnp.array([[9, 40]]), False)
    assert found.boxes.tolist() == [[[10, 0, 14, 4], [20, 0, 24, 4], [0, 0, 0, 0]]]
    assert found.valid.tolist() == [[True, True, False]]


def test_no_drawn_anchor_is_no_loss():
    none = jnp.zeros((3, 8), bool)
    drawn = rpn.DrawnAnchors(jnp.zeros((3, 8), int), positive=none, valid=none, deltas=jnp.zeros((3, 8, 4)))
    given = jnp.full((3, 8), 9.0), jnp.ones((3, 8, 4)), drawn
    assert not any(jax.tree.leaves(rpn.rpn_losses(RPNSettings(), *given)))


def test_the_nominal_normalizer_counts_the_anchors_that_could_be_drawn():
    """Of two images with eight anchors each, three were drawn."""
    valid = jnp.zeros((2, 8), bool).at[0, :3].set(True)
    drawn = rpn.DrawnAnchors(jnp.zeros((2, 8), int), jnp.zeros((2, 8), bool), valid, jnp.zeros((2, 8, 4)))
    for normalizer, count in (("sampled", 3), ("nominal", 2 * 8)):
        settings = RPNSettings(samples=8, normalizer=normalizer)
        losses, _ = rpn.rpn_losses(settings, jnp.zeros((2, 8)), jnp.zeros((2, 8, 4)), drawn)
        assert losses["rpn_objectness"] == pytest.approx(3 * np.log(2) / count, rel=1e-6)


@pytest.mark.parametrize(("anchor_stride", "stride"), [("image", (10, 9)), ("level", (8, 8))])
def test_anchors_lie_as_far_apart_as_the_image_or_the_level_says(anchor_stride, stride):
    settings = RPNSettings(levels=(3,), sizes=((8,),), anchor_stride=anchor_stride)
    assert rpn.anchor_grids(settings, {3: (4, 5)}, (40, 48))[3].stride == stride


def test_the_last_layers_begin_small_and_the_others_as_wide_as_what_they_read():
    """0.01 and 0.001 as in Fast and Faster R-CNN; 1 / sqrt(fan in) of layers without a ReLU behind them."""

    def spread(module, *inputs):
        params = jax.jit(module.init)(jax.random.key(0), *inputs)["params"]
        return {name: float(layer["kernel"].std()) for name, layer in params.items()}

    of_rpn = spread(RPNHead(anchors=16), {2: jnp.ones((1, 4, 4, 64))})
    assert of_rpn == dict.fromkeys(("conv", "objectness", "deltas"), pytest.approx(0.01, rel=0.1))
    head = BoxHead(num_classes=20, channels=64, fcs=1, convs=1, conv_channels=16)
    assert spread(head, jnp.ones((1, 1, 4, 4, 16))) == {
        "conv1": pytest.approx((2 / (9 * 16)) ** 0.5, rel=0.1),  # He et al.: a ReLU follows
        "fc1": pytest.approx(1 / 16, rel=0.1),
        "classes": pytest.approx(0.01, rel=0.1),
        "deltas": pytest.approx(0.001, rel=0.1),
    }


def test_the_rpn_head_is_one_for_all_levels_and_orders_anchors_last():
    pyramid = {2: jnp.ones((1, 2, 3, 4)), 3: jnp.ones((1, 1, 2, 4))}
    head = RPNHead(anchors=3)
    variables = jax.jit(head.init)(jax.random.key(0), pyramid)
    assert set(variables["params"]) == {"conv", "objectness", "deltas"}
    variables["params"]["objectness"]["bias"] = jnp.array([1.0, 2, 3])
    variables["params"]["objectness"]["kernel"] *= 0
    logits, deltas = jax.jit(head.apply)(variables, pyramid)
    np.testing.assert_array_equal(logits[2][0], [1, 2, 3] * 6)
    np.testing.assert_array_equal(logits[3][0], [1, 2, 3] * 2)
    assert deltas[2].shape == (1, 18, 4)


@pytest.mark.parametrize(("background", "slots"), [("first", 6), ("last", 5)])
def test_the_box_head_has_the_slots_of_its_convention(background, slots):
    head = BoxHead(num_classes=5, background=background, channels=8)
    logits, deltas = jax.eval_shape(lambda: head.init_with_output(jax.random.key(0), jnp.ones((2, 3, 7, 7, 4)))[0])
    assert logits.shape == (2, 3, 6)
    assert deltas.shape == (2, 3, slots, 4)


def test_no_limit_before_nms_is_nms_over_all_anchors():
    """One map of all sizes: what NMS leaves of all, where a limit would leave fewer than are asked for."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 60, (300, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(4, 40, (300, 2))], 1)
    anchors = {2: jnp.asarray(boxes, jnp.float32)}
    logits = {2: jnp.asarray(rng.normal(size=(2, 300)).astype(np.float32))}
    deltas = {2: jnp.asarray(rng.normal(0, 0.1, (2, 300, 4)).astype(np.float32))}
    size = jnp.array([[100, 100], [60, 100]])

    def proposals(before):
        settings = rpn.RPNSettings(levels=(2,), sizes=((8,),), ratios=(1.0,), pre_nms_test=before, post_nms_test=100)
        return rpn.propose(settings, logits, deltas, anchors, size, False)

    all_of_them, none, few = proposals(300), proposals(0), proposals(60)
    assert all_of_them.valid.sum() > few.valid.sum()
    for one, other in zip(all_of_them, none, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
