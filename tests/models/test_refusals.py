"""Configs of models that cannot be: each is refused in one line that names its key. What is not refused can run."""

import random
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from experiments.demo import get_config
from fpn_jax import models
from fpn_jax.cost import abstract_batch
from fpn_jax.errors import UserError
from fpn_jax.models import build_detector
from fpn_jax.models.fast_rcnn import FastRCNN
from fpn_jax.models.necks.fpn import FPN
from fpn_jax.training.state import init_variables


def model(changes):
    """The demo's model with {dotted key: value}; a dict takes the place of its group, None takes the key away."""
    result = get_config().model.to_dict()
    for key, value in changes.items():
        group, _, name = key.partition(".")
        where, what = (result[group], name) if name else (result, group)
        where[what] = value
        if value is None:
            del where[what]
    return result


NONE = {"name": "none"}
CONV5 = {"name": "conv5", "blocks": 1}
MOBILE = {"name": "mobilenet_v3", "levels": (2, 3, 4, 5)}
FROM_C4 = {"rpn.levels": (4,), "rpn.sizes": ((8.0,),), "box.levels": (4,)}
SIZES = ((8.0,), (12.0,), (16.0,))

REFUSED = [  # beginning of the message, changes
    # Levels that are not there, or not enough, or twice.
    ("model.neck.levels is (2, 3, 7): the backbone gives (2, 3, 4, 5), no level 7", {"neck.levels": (2, 3, 7)}),
    (
        "model.neck.levels is (4,): the backbone gives (2, 3), no level 4",
        {"neck.levels": (4,), "backbone.blocks": (1, 1)},
    ),
    ("model.neck.levels is (6,): the backbone gives (2, 3, 4, 5), no level 6", {"neck": NONE | {"levels": (6,)}}),
    ("model.neck.levels is (2, 2); name each level once", {"neck.levels": (2, 2)}),
    ("model.neck.outputs is (6,): model.neck.levels has (2, 3, 4, 5), no level 6", {"neck.outputs": (6,)}),
    (
        "model.neck.outputs is (2, 3): model.neck.levels has (3, 4), no level 2",
        {"neck.levels": (3, 4), "neck.outputs": (2, 3)},
    ),
    ("model.neck.outputs is (3, 3); name each level once", {"neck.outputs": (3, 3)}),
    (
        "model.rpn.levels is (2, 3, 4, 5, 7): model.neck gives levels (2, 3, 4, 5, 6), no level 7",
        {"rpn.levels": (2, 3, 4, 5, 7)},
    ),
    (
        "model.rpn.levels is (2, 3, 4, 5, 6): model.neck gives levels (2, 3, 4, 5), no level 6; set it to "
        "(2, 3, 4, 5), and model.rpn.sizes to a row for each",
        {"neck": NONE},
    ),
    (
        "model.rpn.levels is (2, 3, 4, 5, 6): model.neck gives levels (2, 3, 4, 5), no level 6",
        {"neck.extra_level": False},
    ),
    ("model.rpn.levels is (2, 3, 4, 5, 6): model.neck gives levels (4, 5, 6), no level 2", {"neck.outputs": (4, 5)}),
    ("model.rpn.levels is empty; give at least one of (2, 3, 4, 5, 6)", {"rpn.levels": (), "rpn.sizes": ()}),
    ("model.rpn.levels is (2, 2, 3, 4, 5); name each level once", {"rpn.levels": (2, 2, 3, 4, 5)}),
    ("model.box.levels is (1, 2): model.neck gives levels (2, 3, 4, 5, 6), no level 1", {"box.levels": (1, 2)}),
    (
        "model.box.levels is (2, 3, 4, 5): model.neck gives levels (2,), no level 3; set it to (2,)",
        {"detector": "fast_rcnn", "neck.outputs": (2,), "neck.extra_level": False},
    ),
    ("model.box.levels is empty; give at least one of (2, 3, 4, 5, 6)", {"box.levels": ()}),
    ("model.box.levels is (2, 2); name each level once", {"box.levels": (2, 2)}),
    ("model.backbone.levels is (5, 7); choose some of 1, 2, 3, 4, 5, 6", {"backbone": MOBILE | {"levels": (5, 7)}}),
    ("model.backbone.levels is (); choose some of 1, 2, 3, 4, 5, 6", {"backbone": MOBILE | {"levels": ()}}),
    ("model.backbone.depth is 20; choose one of 18, 34, 50, 101, 152", {"backbone.depth": 20}),
    ("model.backbone.groups needs bottlenecks", {"backbone.groups": 2}),
    # Switches of the neck that contradict each other.
    ("model.neck.lateral and model.neck.top_down are both False", {"neck.lateral": False, "neck.top_down": False}),
    ("model.neck.levels is (2, 4, 5) without level 3, and top_down only doubles the size", {"neck.levels": (2, 4, 5)}),
    (
        "model.neck.upsampling is 'bilinear', which model.neck.top_down=False has no use for",
        {"neck.top_down": False, "neck.upsampling": "bilinear"},
    ),
    (
        "model.neck.merge is 'concat', which model.neck.top_down=False has no use for",
        {"neck.top_down": False, "neck.merge": "concat"},
    ),
    (
        "model.neck.merge is 'concat', and model.neck.lateral=False leaves nothing to join",
        {"neck.lateral": False, "neck.merge": "concat"},
    ),
    (
        "model.neck.upsampling is 'transposed', which doubles the size, but levels 5 and 6 of mobilenet_v3 are",
        {"backbone": MOBILE | {"levels": (5, 6)}, "neck.upsampling": "transposed"},
    ),
    (
        "model.box.levels is (5, 6), but levels 6 and above of mobilenet_v3 have half the stride of their number",
        {"backbone": MOBILE | {"levels": (5, 6)}, "rpn.levels": (5,), "rpn.sizes": ((8.0,),), "box.levels": (5, 6)},
    ),
    (
        "model.rpn.anchor_stride is 'level', but levels 6 and above of mobilenet_v3",
        {"backbone": MOBILE | {"levels": (5, 6)}, "rpn.levels": (5, 6), "rpn.sizes": SIZES[:2], "box.levels": (5,)}
        | {"rpn.anchor_stride": "level"},
    ),
    # Anchors.
    ("model.rpn.sizes has 3 rows for 5 levels; give one per level", {"rpn.sizes": SIZES}),
    (
        "model.rpn.sizes has 1 and 2 sizes in a row; give each level as many",
        {"rpn.levels": (2, 3), "rpn.sizes": ((8.0,), (12.0, 16.0))},
    ),
    (
        "model.rpn.sizes is (8.0, 12.0); give a row of sizes for each level",
        {"rpn.levels": (2, 3), "rpn.sizes": (8.0, 12.0)},
    ),
    ("model.rpn.sizes is ((), ()); give a row of sizes for each level", {"rpn.levels": (2, 3), "rpn.sizes": ((), ())}),
    ("model.rpn.ratios is empty", {"rpn.ratios": ()}),
    # Heads that cannot read the maps.
    (
        "model.rpn_head.shared is True, but model.neck.name=none gives levels of different channels",
        {"detector": "rpn", "neck": NONE, "rpn.levels": (2, 3, 4), "rpn.sizes": SIZES},
    ),
    (
        "model.box.levels is (3, 4), but model.neck.name=none gives levels of different channels",
        {"detector": "fast_rcnn", "neck": NONE, "box.levels": (3, 4)},
    ),
    (
        "model.box_head.separate_levels is (2, 3), model.box.levels is (2, 3, 4, 5): RoIs of a level without a head",
        {"box_head.separate_levels": (2, 3)},
    ),
    (
        "model.box_head.name is 'conv5', the last stage of a ResNet; set model.backbone.name=resnet",
        {"backbone": MOBILE, "box_head": CONV5},
    ),
    (
        "model.box.levels is (4, 5): the head conv5 goes on from C4; set it to (4,)",
        {"box_head": CONV5, "box.levels": (4, 5)},
    ),
    ("model.box.aligned is True: RoI pooling has no such", {"box.pooling": "pool", "box.aligned": True}),
    # The image pyramid.
    ("model.image_pyramid.scales is (3.0,): 3.0 is not a power of two", {"image_pyramid.scales": (3.0,)}),
    ("model.image_pyramid.scales is (1.0, 0.0): 0.0 is not a power of two", {"image_pyramid.scales": (1.0, 0.0)}),
    ("model.image_pyramid.scales is (-2.0,): -2.0 is not a power of two", {"image_pyramid.scales": (-2.0,)}),
    ("model.image_pyramid.scales is (inf,): inf is not a power of two", {"image_pyramid.scales": (float("inf"),)}),
    (
        "model.image_pyramid.scales is (64.0,): level 5 at scale 64.0 would be level -1",
        {"image_pyramid.scales": (64.0,)},
    ),
    ("model.image_pyramid.scales is (1.0, 1.0); name each scale once", {"image_pyramid.scales": (1.0, 1.0)}),
    (
        "model.image_pyramid.level is 6: the backbone gives (2, 3, 4, 5)",
        {"image_pyramid.scales": (1.0,), "image_pyramid.level": 6},
    ),
    # Names.
    ("model.detector is 'yolo'; choose one of rpn, fast_rcnn, faster_rcnn", {"detector": "yolo"}),
    ("model.backbone.name is 'vgg'; choose one of resnet, mobilenet_v3", {"backbone.name": "vgg"}),
    ("model.neck.name is 'pan'; choose one of fpn, none", {"neck.name": "pan"}),
    ("model.neck.name is None; choose one of fpn, none", {"neck.name": None}),
    ("model.box_head.name is 'mlp'; choose one of fc, conv5", {"box_head.name": "mlp"}),
    (
        "model.frozen_parts is 'body'; choose one of backbone, neck, rpn_head, box_head",
        {"frozen_parts": ("neck", "body")},
    ),
    ("model.box.pooling is 'mean'; choose one of align, pool", {"box.pooling": "mean"}),
    ("model.neck.upsampling is 'cubic'; choose one of nearest, bilinear, transposed", {"neck.upsampling": "cubic"}),
    ("model.neck.merge is 'max'; choose one of sum, concat", {"neck.merge": "max"}),
    ("model.neck.activation is 'gelu'; choose one of none, relu", {"neck.activation": "gelu"}),
    ("model.neck.norm is 'ln'; choose one of none, frozen_bn, bn, gn", {"neck.norm": "ln"}),
    ("model.rpn.sampling is 'best'; choose one of random, first", {"rpn.sampling": "best"}),
    ("model.pixels.order is 'gbr'; choose one of rgb, bgr", {"pixels.order": "gbr"}),
    ("model.dtype is 'float64'; choose one of float32, bfloat16", {"dtype": "float64"}),
    # Keys that are none, or that say again what another has said.
    ("model.neck.chanels: Bare has no such attribute", {"neck": NONE | {"chanels": 8}}),
    # Numbers that would end as a traceback from within a layer.
    ("model.rpn_head.convs is 0", {"rpn_head.convs": 0}),
    ("model.rpn.samples is 0; it must be at least 1", {"rpn.samples": 0}),
    ("model.box.samples is -1; it must be at least 1", {"box.samples": -1}),
    ("model.rpn.positive_fraction is 2.0; it must be at least 0 and at most 1", {"rpn.positive_fraction": 2.0}),
    ("model.box.positive_fraction is -1.0; it must be at least 0", {"box.positive_fraction": -1.0}),
    ("model.rpn.pre_nms_train is -1; it must be at least 0", {"rpn.pre_nms_train": -1}),
    ("model.rpn.post_nms_test is 0; it must be at least 1", {"rpn.post_nms_test": 0}),
    ("model.rpn.beta is -1.0; it must be at least 0", {"rpn.beta": -1.0}),
    ("model.box.detections is -3; it must be at least 1", {"box.detections": -3}),
    ("model.box.pooled_size is 0; it must be at least 1", {"box.pooled_size": 0}),
    ("model.box.canonical_size is 0.0; it must be at least 1", {"box.canonical_size": 0.0}),
    ("model.rpn.ratios is (0.5, 0.0); each must be above 0", {"rpn.ratios": (0.5, 0.0)}),
    (
        f"model.rpn.sizes is {(*SIZES[:4], (0.0,))}; each must be above 0",
        {"rpn.sizes": (*SIZES[:4], (0.0,))},
    ),
    ("model.rpn.ratios is ('1',): '1' is not a number", {"rpn.ratios": ("1",)}),
    ("model.rpn.delta_weights is (1.0, 1.0); give 4 numbers", {"rpn.delta_weights": (1.0, 1.0)}),
    ("model.box.delta_weights is (1.0, 1.0, 0.0, 1.0); each must", {"box.delta_weights": (1.0, 1.0, 0.0, 1.0)}),
    ("model.pixels.std is (1.0, 0.0, 1.0); each must be above 0", {"pixels.std": (1.0, 0.0, 1.0)}),
    ("model.pixels.mean is (inf, 0.0, 0.0); each must be finite", {"pixels.mean": (float("inf"), 0.0, 0.0)}),
    ("model.rpn.ratios is ((1.0,), (2.0,)): (1.0,) is not a number", {"rpn.ratios": ((1.0,), (2.0,))}),
    ("model.box.score_threshold is 1.5; it must be at least 0", {"box.score_threshold": 1.5}),
    ("model.rpn.positive_iou is -0.5; it must be at least 0", {"rpn.positive_iou": -0.5}),
    ("model.rpn.min_size is -1.0; it must be at least 0", {"rpn.min_size": -1.0}),
    ("model.pixels.std is (1.0, 1.0); give 3 numbers", {"pixels.std": (1.0, 1.0)}),
    ("model.pixels.mean is (1.0,); give 3 numbers", {"pixels.mean": (1.0,)}),
    ("model.pixels.white is 0.0; it must be above 0", {"pixels.white": 0.0}),
    ("model.rpn.negative_iou is 0.8, above model.rpn.positive_iou 0.7", {"rpn.negative_iou": 0.8}),
    ("model.box.nms_iou is nan; it must be at least 0 and at most 1", {"box.nms_iou": float("nan")}),
    ("model.backbone.width is 0; it must be at least 1", {"backbone.width": 0}),
    ("model.neck.channels is 0; it must be at least 1", {"neck.channels": 0}),
    ("model.box_head.channels is 0; it must be at least 1", {"box_head.channels": 0}),
    ("model.backbone.frozen_stages is -1; choose 0 to 5", {"backbone.frozen_stages": -1}),
    ("model.backbone.frozen_stages is 7; choose 0 to 6", {"backbone": MOBILE | {"frozen_stages": 7}}),
    ("model.backbone.groups is 0; it must be at least 1", {"backbone.groups": 0}),
    ("model.backbone.blocks is (0, 1, 1, 1); each must be at least 1", {"backbone.blocks": (0, 1, 1, 1)}),
    ("model.backbone.norm_eps is -1; it must be at least 0", {"backbone.norm_eps": -1}),
    ("model.rpn_head.channels is -4; it must be at least 0", {"rpn_head.channels": -4}),
    ("model.rpn_head.conv: RPNHead has no such attribute", {"rpn_head.conv": 2}),
    (
        "model.image_pyramid.sizes: ImagePyramid has no such attribute",
        {"image_pyramid.scales": (1.0,), "image_pyramid.sizes": 2},
    ),
    ("model.box_head.depth follows from the rest of config.model", {"box_head": CONV5 | {"depth": 50}, **FROM_C4}),
    ("model.box_head.num_classes follows from the rest of config.model", {"box_head.num_classes": 3}),
    ("model.rpn_head.anchors follows from the rest of config.model", {"rpn_head.anchors": 3}),
    ("model.neck.dtype follows from the rest of config.model", {"neck.dtype": "bfloat16"}),
    (
        "model.image_pyramid.net follows from the rest of config.model",
        {"image_pyramid.scales": (1.0,), "image_pyramid.net": "resnet"},
    ),
]


@pytest.mark.parametrize(("beginning", "changes"), REFUSED, ids=[x for x, _ in REFUSED])
def test_what_cannot_be_is_refused_in_one_line_that_names_its_key(beginning, changes):
    with pytest.raises(UserError, match=rf"^{re.escape(beginning)}") as refused:
        build_detector(model(changes), 3)
    assert "\n" not in str(refused.value)
    there = model({})
    for group, name in re.findall(r"model\.(\w+)(?:\.(\w+))?", str(refused.value).removeprefix(beginning)):
        assert group in there  # what it advises exists
        assert not name or name in there[group]


ACCEPTED = {
    "coarsest level alone": {
        "neck.lateral": False,
        "neck.top_down": False,
        "neck.outputs": (5,),
        "rpn.levels": (5, 6),
        "rpn.sizes": SIZES[:2],
        "box.levels": (5,),
    },
    "gap without top_down, levels in any order": {
        "neck.top_down": False,
        "neck.levels": (5, 2),
        "rpn.levels": (6, 2, 5),
        "rpn.sizes": SIZES,
        "box.levels": (5, 2),
        "box_head.separate_levels": (2, 5),
    },
    "own heads read unlike levels": {
        "detector": "rpn",
        "neck": NONE,
        "rpn_head.shared": False,
        "rpn.levels": (2, 3, 4),
        "rpn.sizes": SIZES,
    },
    "levels of an image pyramid are alike": {
        "image_pyramid": {"scales": (2.0, 1.0), "level": 4},
        "neck": NONE,
        "rpn.levels": (3, 4),
        "rpn.sizes": SIZES[:2],
        "box.levels": (3, 4),
    },
    "one level of the backbone": {"neck": NONE, "box_head": CONV5, **FROM_C4},
    "levels of one size": {
        "backbone": MOBILE | {"levels": (5, 6)},
        "neck.upsampling": "bilinear",
        "rpn.levels": (5, 6, 7),
        "rpn.sizes": SIZES,
        "box.levels": (5,),
    },
    "only the name of the neck and the head is changed": {
        "neck.name": "none",
        "neck.levels": (4,),
        "box_head.name": "conv5",
        **{key: value for key, value in FROM_C4.items() if key != "neck"},
    },
    "what a detector lacks is not asked": {"detector": "rpn", "box.levels": (9,), "frozen_parts": ("box_head",)},
}


def check_it_runs(config):
    """By shapes: losses can be computed, objects found, levels counted."""
    detector = build_detector(config, 3)
    variables = jax.eval_shape(lambda: init_variables(detector, (64, 64), 0))
    methods = ("detect", "level_counts")
    found, counts = jax.eval_shape(
        lambda variables, batch: [detector.apply(variables, batch, method=method) for method in methods],
        variables,
        abstract_batch((64, 96), proposals=5),
    )
    assert found.boxes.shape[::2] == (1, 4)
    counted = {part: {x.shape for x in of_part.values()} for part, of_part in counts.items()}
    assert counted == {part: {(1, len(levels))} for part, levels in detector.counted_levels.items()}
    assert {x.dtype for x in jax.tree.leaves(counts)} == {jnp.dtype(jnp.int32)}


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_not_refused_runs(changes):
    check_it_runs(model(changes))


def test_configs_of_before_there_was_a_choice_build_what_they_did():
    of_then = model(dict.fromkeys(("image_pyramid", "rpn_head", "detector", "frozen_parts", "box_head.name")))
    assert build_detector(of_then, 3) == build_detector(model({}), 3)


def some_model(dice):
    """A model with every switch thrown at random, that mostly asks for levels that are there."""
    switches = {
        "detector": ("rpn", "fast_rcnn", "faster_rcnn"),
        "backbone.blocks": ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1)),
        "backbone.depth": (18, 50),
        "backbone.norm": ("bn", "gn", "frozen_bn", "none"),
        "image_pyramid.scales": ((), (), (1.0, 0.5), (2.0, 1.0)),
        "image_pyramid.level": (3, 4),
        "neck.levels": ((), (), (2, 3, 4), (4, 5), (3, 5)),
        "neck.outputs": ((), (), (2, 3), (5, 2), (4,)),
        "neck.lateral": (True, True, False),
        "neck.top_down": (True, True, False),
        "neck.smooth": (True, False),
        "neck.upsampling": ("nearest", "nearest", "bilinear", "transposed"),
        "neck.merge": ("sum", "sum", "concat"),
        "neck.activation": ("none", "relu"),
        "neck.extra_level": (True, False),
        "neck.norm": ("none", "gn", "bn", "frozen_bn"),
        "rpn_head.shared": (True, False),
        "rpn_head.convs": (1, 2),
        "rpn_head.channels": (0, 5),
        "box_head.convs": (0, 1),
        "box_head.fcs": (0, 2),
        "box.pooling": ("align", "pool"),
        "box.sampling_ratio": (0, 2),
        "frozen_parts": ((), ("backbone", "neck"), ("rpn_head",), ("box_head",)),
    }
    changes = {key: dice.choice(values) for key, values in switches.items()}
    there = changes["neck.levels"] or range(2, 2 + len(changes["backbone.blocks"]))
    given = list(changes["neck.outputs"] or there)
    if dice.random() < 0.25:
        changes = {key: value for key, value in changes.items() if not key.startswith("neck.")}
        changes["neck"], given = NONE, list(there)
    elif changes["neck.extra_level"]:
        given.append(max(given) + 1)
    for head in ("rpn", "box"):
        changes[f"{head}.levels"] = tuple(dice.sample(given, dice.randint(1, len(given))))
    changes["rpn.sizes"] = ((8.0, 12.0),) * len(changes["rpn.levels"])
    changes["box_head.separate_levels"] = dice.choice(((), changes["box.levels"]))
    if dice.random() < 0.25:
        changes = {key: value for key, value in changes.items() if not key.startswith("box_head.")}
        changes["box_head"] = CONV5 | {"stride": dice.choice((1, 2))}
    return model({"backbone.width": 4, "neck.channels": 8, "box_head.conv_channels": 8} | changes)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_thrown_together_is_refused_by_its_key_or_runs(seed):
    dice, ran = random.Random(seed), 0
    while ran < 2:
        config = some_model(dice)
        try:
            build_detector(config, 3)
        except UserError as error:
            assert re.fullmatch(r"model\.\w+\.\w+ [^\n]+", str(error))
        else:
            check_it_runs(config)
            ran += 1


class OwnNeck(FPN):
    activation: str = "silu"


class OwnBackbone(nn.Module):
    dtype: Any = jnp.float32

    def output_levels(self):
        return (2, 3, 4, 5)


class OwnDetector(FastRCNN):
    pass


def test_parts_of_ones_own_have_names_of_their_own(monkeypatch):
    """What the tables' docstring promises: an activation that ours do not know, nothing frozen, another detector."""
    monkeypatch.setitem(models.NECKS, "own", OwnNeck)
    monkeypatch.setitem(models.BACKBONES, "own", OwnBackbone)
    monkeypatch.setitem(models.DETECTORS, "own", OwnDetector)
    built = build_detector(model({"neck.name": "own", "neck.activation": "mish", "detector": "own"}), 3)
    assert built.neck.activation == "mish" and built.needs_proposals
    assert not build_detector(model({}), 3).needs_proposals
    assert build_detector(model({"backbone": {"name": "own"}}), 3).frozen == ()
    with pytest.raises(UserError, match=r"model\.neck\.activation is 'mish'; choose one of"):
        build_detector(model({"neck.activation": "mish"}), 3)
