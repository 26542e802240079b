"""Every torchvision model that is supported goes in and comes back bit for bit; whatever does not fit is named."""

import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.ablations.faster_rcnn import get_config as faster_rcnn_table
from fpn_jax import cli
from fpn_jax.errors import UserError
from fpn_jax.models import build_detector
from fpn_jax.models.heads.box import BoxHead
from fpn_jax.training.state import init_variables
from fpn_jax.variants import changed
from fpn_jax.weights import guess, loader, names

ROOT = Path(__file__).parents[2]
# Names and shapes that torchvision 0.28's builders have.
SHAPES = json.loads(gzip.decompress((ROOT / "tests/data/weights/torchvision_names.json.gz").read_bytes()))
DETECTORS = [name for name in SHAPES if name.startswith("fasterrcnn")]


def random_weights(shapes):
    rng = np.random.default_rng(0)
    return {
        name: np.zeros((), np.int64)
        if name.endswith("num_batches_tracked")
        else rng.random(shape, np.float32) - np.float32(0.5)
        for name, shape in shapes.items()
    }


def variables_for(config, num_classes=90):
    detector = build_detector(config.model, num_classes)
    return jax.eval_shape(lambda: init_variables(detector, (64, 64), 0))


def config_for(arrays, name):
    experiment, changes, _ = guess.experiment(arrays, name)
    config = cli.load_config(str(ROOT / "experiments" / experiment))
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_goes_in_and_comes_back_bit_for_bit(name):
    arrays = random_weights(SHAPES[name])
    config = config_for(arrays, name)
    loaded = loader.load(variables_for(config), arrays, name, 7)
    assert loaded.fresh == []
    counters = [key for key in arrays if key.endswith("num_batches_tracked")]
    assert loaded.ignored == counters
    assert loaded.count == len(arrays) - len(counters)
    back = loader.export(loaded.variables, "torchvision", 7)
    live = name.endswith("v2")  # only live norms count batches
    assert sorted(back) == sorted(key for key in arrays if live or key not in counters)
    for key, array in back.items():
        assert array.dtype == arrays[key].dtype and array.shape == arrays[key].shape, key
        assert array.tobytes() == arrays[key].tobytes(), key


def test_the_experiment_is_read_off_the_weights():
    for depth in (18, 34, 50, 101, 152):
        name = f"fasterrcnn_resnet{depth}_fpn"
        config = config_for(shaped(name), name)
        assert config.model.backbone.depth == depth
        assert config.model.backbone.norm_eps == 1e-5
    for published in ("a/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", "torchvision://fasterrcnn_resnet50_fpn/COCO_V1"):
        assert config_for(shaped("fasterrcnn_resnet50_fpn"), published).model.backbone.norm_eps == 0.0
    for file, pixels in (
        ("x/fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth", 320),
        ("torchvision://fasterrcnn_mobilenet_v3_large_320_fpn/COCO_V1", 320),
        ("torchvision://fasterrcnn_mobilenet_v3_large_fpn/COCO_V1", 800),
        ("my_epoch320.pth", 800),
    ):
        assert config_for(shaped("fasterrcnn_mobilenet_v3_large_320_fpn"), file).data.shorter == (pixels,)
    with pytest.raises(
        UserError, match=r"resnet50: a torchvision or timm ResNet is no whole detector; say with --config="
    ):
        guess.experiment(shaped("resnet50"), "resnet50")
    with pytest.raises(UserError, match=r"x\.pth: our own names do not tell the experiment; say with --config="):
        guess.experiment({"params/backbone/stem_conv/kernel": np.zeros(1)}, "x.pth")


@pytest.mark.parametrize("lost", ["layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3", "layer4.2.conv1"])
def test_a_missing_tensor_does_not_hide_which_experiment_it_is(lost):
    arrays = shaped("fasterrcnn_resnet50_fpn")
    del arrays[f"backbone.body.{lost}.weight"]
    config = config_for(arrays, "x.pth")
    assert config.model.backbone.depth == 50
    with pytest.raises(UserError, match=rf"does not fit: backbone\.body\.{lost}\.weight is missing\. Nothing"):
        loader.load(variables_for(config), arrays, "x.pth", 7)


def shaped(name):
    """A file's shapes without its weights."""
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in SHAPES[name].items()}


def test_the_c4_baselines_head_takes_the_last_stage_of_a_backbones_file():
    table = faster_rcnn_table()
    rows = {row["name"]: row["changes"] for row in table.rows}
    variables, arrays = variables_for(changed(table.base, rows["c4"], "c4")), random_weights(SHAPES["resnet50"])
    loaded = loader.load(variables, arrays, "resnet50.pth", 14, parts=("backbone",))
    ours = loaded.variables["params"]["box_head"]["stage5_block2"]["conv2"]["kernel"]
    np.testing.assert_array_equal(ours, arrays["layer4.2.conv2.weight"].transpose(2, 3, 1, 0))
    assert "stage5_block0" not in loaded.variables["params"]["backbone"]
    assert {path.split("/")[1] for path in loaded.fresh} == {"rpn_head", "box_head"}
    assert not any("stage" in path for path in loaded.fresh)


def test_names_from_before_the_layers_were_wrapped():
    arrays = random_weights(SHAPES["fasterrcnn_resnet18_fpn"])
    config = config_for(arrays, "x")
    today = loader.load(variables_for(config), arrays, "x", 7).variables
    old = {
        key.replace("rpn.head.conv.0.0.", "rpn.head.conv.").replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        if key.startswith(("rpn.head.conv", "backbone.fpn"))
        else key: array
        for key, array in arrays.items()
    }
    assert "backbone.fpn.inner_blocks.3.weight" in old and "rpn.head.conv.bias" in old
    jax.tree.map(np.testing.assert_array_equal, loader.load(variables_for(config), old, "x", 7).variables, today)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet50", {}),
        ("resnext50_32x4d", {"groups": 32, "width_per_group": 4}),
        ("resnext101_32x8d", {"groups": 32, "width_per_group": 8, "depth": 101}),
    ],
)
def test_an_imagenet_resnet_fills_the_backbone_alone(name, changes):
    from experiments.faster_rcnn_r50_fpn import get_config

    config = get_config()
    config.model.backbone.update(changes)
    arrays = random_weights(SHAPES[name])
    loaded = loader.load(variables_for(config), arrays, name, 7)
    assert {key for key in loaded.ignored if "num_batches" not in key} == {"fc.weight", "fc.bias"}
    assert {path.split("/")[1] for path in loaded.fresh} == {"neck", "rpn_head", "box_head"}
    assert loaded.describe().endswith("; new, with random values: box_head, neck, rpn_head")
    stem = loaded.variables["params"]["backbone"]["stem_conv"]["kernel"]
    np.testing.assert_array_equal(stem, arrays["conv1.weight"].transpose(2, 3, 1, 0))
    variance = loaded.variables["batch_stats"]["backbone"]["stage5_block0"]["norm_shortcut"]["var"]
    np.testing.assert_array_equal(variance, arrays["layer4.0.downsample.1.running_var"])


def test_an_imagenet_mobilenet_fills_the_backbone_alone():
    from experiments.torchvision.fasterrcnn_mobilenet_v3_large_fpn import get_config

    arrays = random_weights(SHAPES["mobilenet_v3_large"])
    loaded = loader.load(variables_for(get_config()), arrays, "x", 7)
    assert all(key.startswith("classifier.") or "num_batches" in key for key in loaded.ignored)
    squeeze = loaded.variables["params"]["backbone"]["block04"]["squeeze"]["kernel"][0, 0]
    np.testing.assert_array_equal(squeeze, arrays["features.4.block.2.fc1.weight"][:, :, 0, 0].T)


def test_the_first_layer_behind_the_roi_features_reads_them_in_our_order():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1, 2, 7, 7, 6)).astype(np.float32)
    theirs = rng.normal(size=(8, 6 * 7 * 7)).astype(np.float32)
    format = names.formats("torchvision")[1]
    path = ("params", "box_head", "fc1", "kernel")
    kernel = names.to_ours(path, theirs, format, 7)
    expected = np.maximum(features[0].transpose(0, 3, 1, 2).reshape(2, -1) @ theirs.T, 0)  # torch flattens c, h, w
    head = BoxHead(3, channels=8, fcs=1)
    variables = head.init(jax.random.key(0), features)
    variables["params"]["fc1"]["kernel"] = kernel
    _, state = head.apply(variables, features, capture_intermediates=True)
    ours = np.maximum(state["intermediates"]["fc1"]["__call__"][0][0], 0)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def small():
    """(variables, weights) of torchvision's ResNet-18 detector."""
    arrays = random_weights(SHAPES["fasterrcnn_resnet18_fpn"])
    return variables_for(config_for(arrays, "x")), arrays


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a.pop("backbone.body.layer2.0.bn1.weight"),
            r"x\.pth: .*layer2\.0\.bn1\.weight is missing\. Nothing",
        ),
        (lambda a: a.update({"extra.weight": np.zeros(3, np.float32)}), r"extra\.weight is not in the detector"),
        (
            lambda a: a.update({"backbone.body.conv1.weight": np.zeros((64, 3, 3, 3), np.float32)}),
            r"conv1\.weight is \[64, 3, 3, 3\], the detector's \[64, 3, 7, 7\]",
        ),
        (
            lambda a: a.update({"backbone.body.bn1.bias": np.zeros(64, np.int64)}),
            r"bn1\.bias is of type int64, not of floating point numbers",
        ),
        (lambda a: a.update({"roi_heads.box_head.fc6.weight": np.zeros(7, np.float32)}), r"fc6\.weight is \[7\]"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(small, change, message):
    variables, arrays = small
    arrays = dict(arrays)
    change(arrays)
    with pytest.raises(UserError, match=message) as caught:
        loader.load(variables, arrays, "x.pth", 7)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused_by_name(small):
    variables, _ = small
    with pytest.raises(UserError, match=r"Nothing was loaded; give the --config that it was trained with"):
        loader.load(variables, shaped("fasterrcnn_resnet50_fpn"), "x.pth", 7)
    with pytest.raises(UserError, match=r"x\.pth: not the weights of a detector or backbone known here \(it has a, b"):
        loader.load(variables, {"a": np.zeros(1), "b": np.zeros(1)}, "x.pth", 7)


def test_another_number_of_classes_needs_the_option_that_says_so(small):
    _, arrays = small
    config = config_for(arrays, "x")
    initial = jax.tree.map(lambda x: np.full(x.shape, 0.25, x.dtype), variables_for(config, 7))
    with pytest.raises(UserError, match=r"cls_score\.weight is \[91, 512.*\], the detector's \[8, .*--reset_classes"):
        loader.load(
            initial, arrays | {"roi_heads.box_predictor.cls_score.weight": np.zeros((91, 512), np.float32)}, "x", 7
        )
    with pytest.raises(UserError, match=r"--reset_classes"):
        loader.load(initial, arrays, "x", 7)
    loaded = loader.load(initial, arrays, "x", 7, reset_classes=True)
    assert {path.rpartition("/")[0] for path in loaded.fresh} == {"params/box_head/classes", "params/box_head/deltas"}
    assert "new, with random values: box_head/classes, box_head/deltas" in loaded.describe()
    kernel = loaded.variables["params"]["box_head"]["classes"]["kernel"]
    np.testing.assert_array_equal(kernel, initial["params"]["box_head"]["classes"]["kernel"])
    np.testing.assert_array_equal(
        loaded.variables["params"]["box_head"]["fc2"]["bias"], arrays["roi_heads.box_head.fc7.bias"]
    )
    assert loader.class_slots(arrays, "x") == 91
    assert loader.class_slots(shaped("resnet50"), "x") is None


def test_parts_of_a_detector(small):
    variables, arrays = small
    loaded = loader.load(variables, arrays, "x", 7, parts=("backbone", "neck"))
    assert {path.split("/")[1] for path in loaded.fresh} == {"rpn_head", "box_head"}
    with pytest.raises(UserError, match=r"there is no part 'head' of a detector; choose some of backbone, neck"):
        loader.load(variables, arrays, "x", 7, parts=("head",))
    with pytest.raises(UserError, match=r"has no box_head; choose other parts"):
        loader.load(
            variables_for(config_for(shaped("fasterrcnn_resnet50_fpn"), "x")), shaped("resnet50"), "x", 7, ("box_head",)
        )
    # A weight that no detector of this kind has is refused even so.
    with pytest.raises(UserError, match=r"odd\.weight is not in the detector"):
        loader.load(variables, arrays | {"odd.weight": np.zeros(1, np.float32)}, "x", 7, parts=("backbone",))


def test_our_own_names_go_out_and_come_back(small):
    variables, arrays = small
    loaded = loader.load(variables, arrays, "x", 7).variables
    out = loader.export(loaded, "fpn_jax", 7)
    assert out["params/neck/lateral2/kernel"].shape == (1, 1, 64, 256)
    jax.tree.map(np.testing.assert_array_equal, loader.load(variables, out, "x", 7).variables, loaded)


def test_only_what_a_framework_has_is_exported(small):
    variables, arrays = small
    loaded = loader.load(variables, arrays, "x", 7).variables
    loaded["params"]["neck"]["odd"] = {"kernel": np.zeros((1, 1, 2, 2), np.float32)}
    with pytest.raises(
        UserError, match=r"no torchvision format has a place for params/neck/odd/kernel; known are torch"
    ):
        loader.export(loaded, "torchvision", 7)
    with pytest.raises(
        UserError, match=r"there are no names of 'mmdet'; choose one of fpn_jax, torchvision, detectron2"
    ):
        loader.export(loaded, "mmdet", 7)
