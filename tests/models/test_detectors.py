"""The three detectors agree where they are the same thing; frozen parts stay as they are; levels counted slowly."""

import jax
import numpy as np
import pytest

from fpn_jax.models import build_detector
from fpn_jax.training import sharding
from fpn_jax.training.optim import make_optimizer, make_schedule
from fpn_jax.training.state import init_variables, make_state
from fpn_jax.training.step import make_level_counts, make_train_step

CLASSES = 3
DETECTORS = ("rpn", "fast_rcnn", "faster_rcnn")


@pytest.fixture
def config(tinier_config):
    """Sampling without chance, since each detector has its own dice."""
    tinier_config.model.rpn.update(sizes=((6.0,), (13.0,), (28.0,)), sampling="first", samples=64)
    tinier_config.model.box.update(canonical_size=40.0, sampling="first", samples=16, score_threshold=0.0)
    return tinier_config


def build(config, detector, **changes):
    model = config.model.copy_and_resolve_references()
    model.update(detector=detector, **changes)
    return build_detector(model, CLASSES)


def lively(variables, seed=0):
    """The variables with larger random weights in the heads' last layers, whose predictions would all be alike."""
    rng = np.random.default_rng(seed)

    def enliven(path, x):
        last = {"objectness", "deltas", "classes"} & {key.key for key in path}
        return np.float32(rng.normal(size=x.shape) * 0.3) if last else np.asarray(x)

    return jax.tree_util.tree_map_with_path(enliven, variables)


def leaves(tree, kind=list):
    return kind((tuple(key.key for key in path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree))


def of_part(variables, *parts):
    return {kind: {part: tree for part, tree in of.items() if part in parts} for kind, of in variables.items()}


def test_the_detectors_agree_where_they_are_the_same(config, make_batch):
    config.model.rpn.update(pre_nms_test=20, post_nms_test=10)
    rpn, fast, faster = (build(config, name) for name in DETECTORS)
    rpn_in_training = rpn.clone(rpn_settings=rpn.rpn_settings.replace(pre_nms_test=32, post_nms_test=32))
    variables = lively(init_variables(faster, (64, 64), 0))
    for detector, parts in ((rpn, {"rpn_head"}), (fast, {"box_head"})):
        shapes = jax.eval_shape(lambda d=detector: init_variables(d, (64, 64), 0))
        mine = of_part(variables, "backbone", "neck", *parts)
        assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, mine)
    batch = make_batch(3)

    @jax.jit
    def run(variables, batch):
        key = jax.random.key(0)
        without_box, without_rpn = (of_part(variables, "backbone", "neck", x) for x in ("rpn_head", "box_head"))
        found, for_training = (x.apply(without_box, batch, method="detect") for x in (rpn, rpn_in_training))
        to_test, to_train = (batch.replace(proposals=x.boxes, proposals_valid=x.valid) for x in (found, for_training))
        return {
            "rpn": (found, rpn.apply(without_box, batch, key, method="losses")),
            "fast": (
                fast.apply(without_rpn, to_test, method="detect"),
                fast.apply(without_rpn, to_train, key, method="losses"),
            ),
            "faster": (
                faster.apply(variables, batch, method="detect"),
                faster.apply(variables, batch, key, method="losses"),
            ),
        }

    out = jax.tree.map(np.asarray, run(variables, batch))
    (proposals, of_rpn), (of_fast, fast_losses), (of_faster, faster_losses) = (
        out[x] for x in ("rpn", "fast", "faster")
    )
    # A Faster R-CNN's losses are the RPN's and those of a Fast R-CNN on the RPN's detections; statistics likewise.
    for rpn_part, fast_part, whole in zip(of_rpn, fast_losses, faster_losses, strict=True):
        assert not set(rpn_part) & set(fast_part)
        assert set(whole) == set(rpn_part) | set(fast_part)
        for name, value in (rpn_part | fast_part).items():
            assert whole[name] == pytest.approx(value, rel=1e-5), name
    assert set(of_rpn[0]) == {"rpn_objectness", "rpn_box"}
    assert all(value > 0 for value in faster_losses[0].values())
    # And so are its detections.
    assert of_faster.valid.sum() > 3 * len(batch.image)
    for name in ("boxes", "scores", "labels", "valid"):
        np.testing.assert_allclose(getattr(of_fast, name), getattr(of_faster, name), atol=1e-4, err_msg=name)
    # The RPN's are of one class, best first, cut to the picture.
    assert proposals.labels.dtype == np.int32
    assert not proposals.labels.any()
    for boxes, scores, valid in zip(proposals.boxes, proposals.scores, proposals.valid, strict=True):
        assert valid.sum() > 3
        assert (np.diff(scores[valid]) <= 0).all()
        assert (boxes[valid] >= 0).all() and (boxes[valid] <= [56, 64, 56, 64]).all()
    assert (rpn.class_agnostic, fast.class_agnostic, faster.class_agnostic) == (True, False, False)


def slow_iou(box, anchors):
    sides = np.minimum(box[2:], anchors[:, 2:]) - np.maximum(box[:2], anchors[:, :2])
    inter = np.maximum(sides, 0).prod(1)
    return inter / ((box[2:] - box[:2]).prod() + (anchors[:, 2:] - anchors[:, :2]).prod(1) - inter)


def slow_roi_level(settings, box):
    side = np.sqrt(np.prod(np.float64(box[2:] - box[:2])))
    level = np.floor(settings.k0 + np.log2(side / settings.canonical_size)) if side > 0 else -np.inf
    return int(np.clip(level, min(settings.levels), max(settings.levels)))


def slow_count(levels, found):
    return [sum(level == x for x in found) for level in levels]


def test_levels_are_counted_as_by_hand(config, make_batch):
    config.model.box.levels = (3, 2)  # counted in the order of the config
    config.model.rpn.update(pre_nms_test=12, post_nms_test=30, nms_iou=0.2)  # all levels have some, and rows are left
    rpn, fast, faster = (build(config, name) for name in DETECTORS)
    variables = lively(init_variables(faster, (64, 64), 0))
    for x in ("kernel", "bias"):  # proposals are then anchors, cut to the image
        variables["params"]["rpn_head"]["deltas"][x] *= 0
    batch = make_batch(4, 3)
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 63, (4, 9, 2, 2)), axis=2).reshape(4, 9, 4).astype(np.float32)
    valid = rng.random((4, 9)) < 0.6
    valid[3] = False
    batch = batch.replace(proposals=corners, proposals_valid=valid)
    batch.boxes[1, 0] = [10, 12, 17, 18]  # one for the finest level
    batch.boxes[~batch.valid] = [3, 3, 30, 40]  # what is no object must not count, whatever is written there

    parts = {"rpn": of_part(variables, "backbone", "neck", "rpn_head"), "faster_rcnn": variables}
    parts["fast_rcnn"] = of_part(variables, "backbone", "neck", "box_head")
    detectors = dict(zip(DETECTORS, (rpn, fast, faster), strict=True))
    counts = {name: jax.device_get(make_level_counts(d)(parts[name], batch)) for name, d in detectors.items()}
    found = jax.device_get(jax.jit(lambda v, b: rpn.apply(v, b, method="detect"))(parts["rpn"], batch))
    grids = {2: (16, 16), 3: (8, 8), 4: (4, 4)}
    anchors = {}
    for level, (h, w) in grids.items():  # centred on the cells' corners, ratios 1:2, 1:1, 2:1, corners rounded
        sides = [config.model.rpn.sizes[level - 2][0] * np.array([r**-0.5, r**0.5]) for r in (0.5, 1, 2)]
        at = [np.array([j, i]) * 2.0**level for i in range(h) for j in range(w)]
        anchors[level] = np.array([[*(c - np.round(s / 2)), *(c + np.round(s / 2))] for c in at for s in sides])

    def level_of_best(box):
        return max(anchors, key=lambda level: slow_iou(np.float64(box), anchors[level]).max())

    def level_of_proposal(box):
        cut = {level: np.clip(x, 0, np.array([56, 64, 56, 64])) for level, x in anchors.items()}
        (level,) = (level for level, x in cut.items() if (abs(x - box) < 1e-3).all(1).any())  # exactly one
        return level

    for i in range(4):
        objects, proposals = batch.boxes[i][batch.valid[i]], found.boxes[i][found.valid[i]]
        given = batch.proposals[i][batch.proposals_valid[i]]
        rpn_expected = {
            "objects": slow_count((2, 3, 4), [level_of_best(x) for x in objects]),
            "proposals": slow_count((2, 3, 4), [level_of_proposal(x) for x in proposals]),
        }
        of_boxes = {
            name: slow_count((3, 2), [slow_roi_level(faster.box_settings, box) for box in boxes])
            for name, boxes in (("objects", objects), ("proposals", proposals), ("given", given))
        }
        expected = {
            "rpn": {"rpn": rpn_expected},
            "fast_rcnn": {"box": {"objects": of_boxes["objects"], "rois": of_boxes["given"]}},
            "faster_rcnn": {
                "rpn": rpn_expected,
                "box": {"objects": of_boxes["objects"], "rois": of_boxes["proposals"]},
            },
        }
        assert jax.tree.map(lambda x, i=i: x[i].tolist(), counts) == expected
    totals = jax.tree.map(lambda x: x.sum(0), counts["faster_rcnn"])
    assert all((x > 0).all() for x in jax.tree.leaves(totals)), totals  # every level has a say in this test
    assert not counts["fast_rcnn"]["box"]["rois"][3].any()
    assert not found.valid.all(1).any()
    assert {name: d.counted_levels for name, d in detectors.items()} == {
        "rpn": {"rpn": (2, 3, 4)},
        "fast_rcnn": {"box": (3, 2)},
        "faster_rcnn": {"rpn": (2, 3, 4), "box": (3, 2)},
    }


def test_frozen_stages_are_frozen_besides_frozen_parts(config):
    config.model.backbone.frozen_stages = 1
    config.model.image_pyramid.update(scales=(1.0, 0.5, 0.25), level=2)
    detector = build(config, "rpn", frozen_parts=["rpn_head", "neck"])
    assert detector.frozen == (("rpn_head",), ("neck",), ("backbone", "stem_"))


def test_no_gradient_goes_through_a_frozen_backbone_nor_a_frozen_neck_on_top(config, make_batch):
    batch = make_batch(2)
    detectors = [build(config, "rpn", frozen_parts=x) for x in (("backbone",), ("neck",), ("backbone", "neck"))]
    variables = init_variables(detectors[0], (64, 64), 0)

    def loss(params, detector):
        pyramid = detector.apply(variables | {"params": params}, batch.image, batch.size, method="features")
        return sum((x**2).sum() for x in pyramid.values())

    gradients = jax.jit(lambda params: [jax.grad(loss)(params, detector) for detector in detectors])(
        variables["params"]
    )
    reached = [{part for part, tree in g.items() if any(map(np.any, jax.tree.leaves(tree)))} for g in gradients]
    # Alone, a neck must pass on what the backbone is to learn; the optimizer keeps its weights.
    assert reached == [{"neck"}, {"backbone", "neck"}, set()]


def test_anchors_are_predicted_without_a_gradient_as_with_one(config, make_batch):
    """The same numbers; neither the head's weights nor the pyramid get anything back."""
    detector, batch = build(config, "faster_rcnn"), make_batch(1)
    variables = lively(init_variables(detector, (64, 64), 0))
    pyramid = detector.apply(variables, batch.image, batch.size, method="features")

    def predicted(method, params, pyramid):
        return detector.apply(variables | {"params": params}, pyramid, (64, 64), method=method)[:2]

    expected = predicted("predict_anchors", variables["params"], pyramid)
    found, pull = jax.vjp(lambda *x: predicted("predict_without_gradient", *x), variables["params"], pyramid)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not any(map(np.any, jax.tree.leaves(pull(found))))


@pytest.mark.parametrize("parts", [("backbone", "box_head"), ("neck", "rpn_head")])
def test_frozen_parts_keep_their_weights_and_statistics_in_training(config, make_batch, parts):
    config.model.backbone.norm = config.model.neck.norm = "bn"
    config.model.box_head.update(convs=1, conv_channels=8, norm="bn")
    config.optim.update(name="sgd", learning_rate=0.1, weight_decay=0.1, warmup_steps=0, schedule="constant")
    config.optim.decay_norms_and_biases = True  # so that nothing stays but what is frozen
    detector = build(config, "faster_rcnn", frozen_parts=parts)
    assert detector.frozen == tuple((part,) for part in parts)
    variables = lively(init_variables(detector, (64, 64), 0))
    for x in ("params", "batch_stats"):  # nothing at 0, where decay does nothing
        variables[x] = jax.tree.map(lambda x: np.where(x == 0, np.float32(0.01), x), variables[x])
    schedule = make_schedule(config.optim, 2, 10)
    optimizer = make_optimizer(config.optim, schedule, variables["params"], detector.frozen)
    mesh = sharding.make_mesh(sharding.first_device())
    state = sharding.put_replicated(mesh, make_state(variables, optimizer, 0.0))
    host = vars(make_batch(2, 1))
    state, metrics = make_train_step(detector, optimizer, schedule, 0)(state, sharding.put_batch(mesh, host))
    state = jax.device_get(state)
    assert metrics["loss"] > 0
    jax.eval_shape(lambda v, b: detector.apply(v, b, method="detect"), variables, make_batch(2))  # moves no statistics
    for before, after in ((variables["params"], state.params), (variables["batch_stats"], state.batch_stats)):
        after = leaves(after, dict)
        for path, x in leaves(before):
            assert (x == after[path]).all() == (path[0] in parts), path
    assert {path[0] for path, _ in leaves(variables["batch_stats"])} == {"backbone", "neck", "box_head"}
