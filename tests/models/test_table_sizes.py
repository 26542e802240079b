"""The rows of the paper's tables at full size, by shapes alone: anchors as printed, parameters counted by hand."""

import importlib
import math

import jax
import pytest

from fpn_jax.cost import abstract_batch, count_anchors
from fpn_jax.models import build_detector
from fpn_jax.training.state import init_variables
from fpn_jax.variants import changed

IMAGE = (800, 1000)  # the paper's shorter side, and a longer one that gives the table's numbers of anchors


def conv(kernel, inputs, outputs, bias=True):
    return kernel * kernel * inputs * outputs + bias * outputs


def dense(inputs, outputs):
    return conv(1, inputs, outputs)


def stage(level):
    """ResNet-50's bottlenecks of a level, without batch norms (He et al., table 1)."""
    blocks, width = {2: (3, 64), 3: (4, 128), 4: (6, 256), 5: (3, 512)}[level]
    inputs = 64 if level == 2 else 2 * width
    rest = 4 * width
    inner = conv(3, width, width, False) + conv(1, width, rest, False)
    shortcut = conv(1, inputs, rest, False)
    return blocks * inner + conv(1, inputs, width, False) + (blocks - 1) * conv(1, rest, width, False) + shortcut


def body(last):
    """Up to C4 or C5."""
    return conv(7, 3, 64, False) + sum(stage(level) for level in range(2, last + 1))


LATERALS = sum(conv(1, inputs, 256) for inputs in (256, 512, 1024, 2048))
SMOOTH = conv(3, 256, 256)


def rpn(inputs, channels, anchors):
    return conv(3, inputs, channels) + conv(1, channels, anchors) + conv(1, channels, 4 * anchors)


def two_fc(cells, slots):
    return dense(cells, 1024) + dense(1024, 1024) + class_layers(1024, slots)


def class_layers(inputs, slots):
    return dense(inputs, slots) + dense(inputs, 4 * slots)


FPN_NECK = LATERALS + 4 * SMOOTH
RPN_ROWS = {  # anchors in thousands, as the paper prints them; exactly; parameters
    "c4": (47, (50 * 63) * 15, body(4) + rpn(1024, 512, 15)),
    "c5": (12, (25 * 32) * 15, body(5) + rpn(2048, 512, 15)),
    "fpn": (200, (200 * 250 + 100 * 125 + 50 * 63 + 25 * 32 + 13 * 16) * 3, body(5) + FPN_NECK + rpn(256, 256, 3)),
    "bottom_up": (200, 199_974, body(5) + FPN_NECK + rpn(256, 256, 3)),
    "no_lateral": (200, 199_974, body(5) + conv(1, 2048, 256) + 4 * SMOOTH + rpn(256, 256, 3)),
    "finest": (750, (200 * 250) * 15, body(5) + LATERALS + SMOOTH + rpn(256, 256, 15)),
}
POOLED = 7 * 7
SLOTS = 81  # COCO's classes and background
BOX_ROWS = {
    "c4": body(4) + stage(5) + class_layers(2048, SLOTS),
    "c5": body(5) + two_fc(POOLED * 2048, SLOTS),
    "fpn": body(5) + FPN_NECK + two_fc(POOLED * 256, SLOTS),
    "bottom_up": body(5) + FPN_NECK + two_fc(POOLED * 256, SLOTS),
    "no_lateral": body(5) + conv(1, 2048, 256) + 4 * SMOOTH + two_fc(POOLED * 256, SLOTS),
    "finest": body(5) + LATERALS + SMOOTH + two_fc(POOLED * 256, SLOTS),
}


def detector(table, name, num_classes=80):
    config = importlib.import_module(f"experiments.ablations.{table}").get_config("coco")
    changes = {row["name"]: row["changes"] for row in config.rows}[name]
    return build_detector(changed(config.base, changes, name).model, num_classes)


def shapes(detector):
    variables = jax.eval_shape(lambda: init_variables(detector, (64, 64), 0))
    return variables, sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"]))


def test_the_formula_has_the_published_numbers():
    assert body(5) == 23_454_912  # torchvision's resnet50 without batch norms and classifier
    assert FPN_NECK == 3_344_384


@pytest.mark.parametrize("name", RPN_ROWS)
def test_table_1_has_the_papers_anchors_and_the_parameters_of_its_parts(name):
    thousands, anchors, expected = RPN_ROWS[name]
    row = detector("rpn", name)
    variables, parameters = shapes(row)
    assert parameters == expected
    assert count_anchors(row, variables, abstract_batch(IMAGE)) == anchors
    assert round(anchors, -3) == 1000 * thousands


@pytest.mark.parametrize("name", BOX_ROWS)
def test_table_2_has_the_parameters_of_its_parts(name):
    assert shapes(detector("fast_rcnn", name))[1] == BOX_ROWS[name]


@pytest.mark.parametrize("name", ["c4", "c5", "fpn", "bottom_up"])
def test_table_3_adds_the_rpn_to_table_2(name):
    head = RPN_ROWS[name][2] - {"c4": body(4), "c5": body(5)}.get(name, body(5) + FPN_NECK)
    assert shapes(detector("faster_rcnn", name))[1] == BOX_ROWS[name] + head


def test_the_joint_detector_with_91_slots_is_torchvisions():
    expected = body(5) + FPN_NECK + rpn(256, 256, 3) + two_fc(POOLED * 256, 91)
    assert expected == 41_755_286
    assert shapes(detector("faster_rcnn", "fpn", 90))[1] == expected
