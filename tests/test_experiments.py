"""Every experiment file builds a detector, and the base names every semantic value at its documented default."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import pytest

from experiments.faster_rcnn_r50_fpn import get_config
from fpn_jax import common, train
from fpn_jax.errors import UserError
from fpn_jax.models import build_detector
from fpn_jax.models.backbones.resnet import ResNet
from fpn_jax.models.heads.box import BoxHead, BoxSettings
from fpn_jax.models.heads.rpn import RPNHead, RPNSettings
from fpn_jax.models.necks.fpn import FPN
from fpn_jax.models.pixels import Pixels
from fpn_jax.training.state import init_variables

ROOT = Path(__file__).parent.parent
FILES = sorted(p for p in (ROOT / "experiments").rglob("*.py") if p.parent.name != "ablations")


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_experiment_builds_and_says_its_command(path):
    module = load(path)
    config = module.get_config()
    assert f"--config={path.relative_to(ROOT)}" in module.__doc__
    options = common.pipeline_options(config)
    detector = build_detector(config.model, 80)
    shapes = jax.eval_shape(lambda: init_variables(detector, options.buckets[0], 0))
    heads = {"rpn": {"rpn_head"}, "fast_rcnn": {"box_head"}}.get(config.model.detector, {"rpn_head", "box_head"})
    assert {"backbone", "neck", *heads} == set(shapes["params"])


def test_faster_rcnn_r50_fpn_has_torchvisions_number_of_parameters():
    detector = build_detector(get_config().model, 90)  # 91 slots with the background
    shapes = jax.eval_shape(lambda: init_variables(detector, (64, 64), 0))
    trained = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    assert trained == 41_755_286  # frozen batch norms have none, there as here


# What a module is given by the detector rather than by its own part of the config.
NOT_IN_CONFIG = {"parent", "name", "dtype", "anchors", "num_classes", "background"}


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("rpn", RPNSettings),
        ("box", BoxSettings),
        ("backbone", ResNet),
        ("neck", FPN),
        ("pixels", Pixels),
        ("rpn_head", RPNHead),
        ("box_head", BoxHead),
    ],
)
def test_the_base_config_names_every_value_at_its_default(key, settings):
    values = get_config().model[key].to_dict()
    values.pop("name", None)
    defaults = {f.name: f.default for f in dataclasses.fields(settings) if f.name not in NOT_IN_CONFIG}
    values = {name: value or None if name == "blocks" else value for name, value in values.items()}
    values = {name: value for name, value in values.items() if name not in NOT_IN_CONFIG}
    assert values == defaults


def test_the_base_config_has_the_pipelines_defaults():
    options = common.pipeline_options(get_config())
    for field in dataclasses.fields(options):
        if field.default is not dataclasses.MISSING and field.name != "prefetch":
            assert getattr(options, field.name) == field.default == (get_config().data[field.name] or field.default)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": {"name": "vgg"}}, r"model\.backbone\.name is 'vgg'; choose one of resnet"),
        ({"neck": {"name": "fpn", "chanels": 3}}, r"model\.neck\.chanels: FPN has no such attribute"),
        ({"dtype": "float16"}, r"model\.dtype is 'float16'; choose one of float32, bfloat16"),
        ({"rpn": {"sizes": ((32,),)}}, r"model\.rpn\.sizes has 1 rows for 5 levels"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(change, message):
    with pytest.raises(UserError, match=message):
        build_detector(get_config().model.to_dict() | change, 3)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_steps", -5, r"num_steps is -5; it must be at least 1"),
        ("optim.learning_rate", -1.0, r"optim\.learning_rate is -1\.0; it must be at least 0"),
        ("optim.learning_rate", float("nan"), r"optim\.learning_rate is nan; it must be at least 0"),
        ("ema_decay", 1.0, r"ema_decay is 1\.0; it must be at least 0 and below 1"),
        ("accumulate", 0, r"accumulate is 0; it must be at least 1"),
        ("accumulate", 3, r"batch_size is 16, which accumulate=3 does not divide"),
        ("eval_every", -1, r"eval_every is -1; it must be at least 0"),
        ("checkpoint_every", -1, r"checkpoint_every is -1; it must be at least 0"),
        ("pictures", -1, r"pictures is -1; it must be at least 0"),
        ("dead_after", 0.0, r"dead_after is 0\.0; it must be above 0"),
        ("optim.momentum", 1.5, r"optim\.momentum is 1\.5; it must be at least 0 and below 1"),
        ("optim.step_at", (60_000, 80_000), r"optim\.step_at is \(60000, 80000\); give fractions of num_steps"),
        ("optim.step_at", ("a",), r"optim\.step_at is \('a',\): 'a' is not a number; give numbers alone"),
        ("data.shorter", ("abc",), r"data\.shorter is \('abc',\): 'abc' is not a number"),
        ("data.max_objects", -1, r"data\.max_objects is -1; it must be at least 0"),
        ("model.backbone.blocks", (1, 1, "a", 1), r"model\.backbone\.blocks is .*: 'a' is not a number"),
        ("model.rpn.sizes", ((1.0,), ("x",)), r"model\.rpn\.sizes is .*: 'x' is not a number"),
        ("optim.step_at", ((0.5,),), r"optim\.step_at is .*: \(0\.5,\) is not a number"),
    ],
)
def test_numbers_beyond_their_bounds_are_refused_before_anything_starts(tmp_path, key, value, message):
    config = get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        train.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_numbers_of_an_experiment_lie_within_bounds(path):
    common.check_numbers(load(path).get_config())


def test_what_comes_every_0_steps_comes_only_at_the_end():
    assert [step for step in range(7) if train._is_due(3, step)] == [3, 6]
    assert not any(train._is_due(0, step) for step in range(7))


def test_a_pair_alone_is_no_list_of_buckets():
    config = get_config()
    config.data.buckets = (256, 320)
    with pytest.raises(UserError, match=r"data\.buckets is \(256, 320\); give .* pairs: \(\(256, 320\),\)$"):
        common.pipeline_options(config)


def test_buckets_must_suit_the_coarsest_stride():
    config = get_config()
    config.data.buckets = ((800, 1333),)
    with pytest.raises(UserError, match=r"data\.buckets: \(800, 1333\) is not .* multiples of 32"):
        common.pipeline_options(config)
