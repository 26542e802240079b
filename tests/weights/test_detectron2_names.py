"""The names and shapes of detectron2's weights, written down a second time from the modules of its configs."""

import functools
import math

import jax
import numpy as np
import pytest

from experiments.detectron2 import faster_rcnn_R_50_FPN_1x as r50
from experiments.detectron2 import faster_rcnn_R_101_FPN_3x as r101
from experiments.detectron2 import faster_rcnn_X_101_32x8d_FPN_3x as x101
from fpn_jax import cli
from fpn_jax.errors import UserError
from fpn_jax.models import build_detector
from fpn_jax.models.layers import FrozenBatchNorm
from fpn_jax.training.state import init_variables
from fpn_jax.weights import guess, loader

# Names and shapes.

# What get_config says of a ResNet -> blocks per stage, groups and width of each.
RESNETS = {"R-50": (r50, (3, 4, 6, 3), 1, 64), "R-101": (r101, (3, 4, 23, 3), 1, 64)}
RESNETS["X-101-32x8d"] = (x101, (3, 4, 23, 3), 32, 8)
CONSTANTS = {"pixel_mean", "pixel_std", *(f"proposal_generator.anchor_generator.cell_anchors.{i}" for i in range(5))}


def below(prefix, shapes):
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def layer(*shape):
    return {"weight": shape, "bias": shape[:1]}


def conv_norm(out, of, kernel):
    """A convolution without a bias, and its FrozenBatchNorm2d."""
    norm = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (out,))
    return {"weight": (out, of, kernel, kernel)} | below("norm", norm)


def resnet_shapes(blocks, groups, width_per_group, width=64):
    shapes = below("stem.conv1", conv_norm(width, 3, 7))
    of, inner, out = width, groups * width_per_group * width // 64, 4 * width
    for stage, count in enumerate(blocks, start=2):
        for i in range(count):
            block = below("shortcut", conv_norm(out, of, 1)) if of != out else {}
            block |= below("conv1", conv_norm(inner, of, 1)) | below("conv2", conv_norm(inner, inner // groups, 3))
            shapes |= below(f"res{stage}.{i}", block | below("conv3", conv_norm(out, inner, 1)))
            of = out
        inner, out = 2 * inner, 2 * out
    return shapes


def detector_shapes(name):
    neck = {}
    for level, channels in zip((2, 3, 4, 5), (256, 512, 1024, 2048), strict=True):
        neck |= below(f"fpn_lateral{level}", layer(256, channels, 1, 1))
        neck |= below(f"fpn_output{level}", layer(256, 256, 3, 3))
    rpn_head = below("conv", layer(256, 256, 3, 3)) | below("objectness_logits", layer(3, 256, 1, 1))
    rpn_head |= below("anchor_deltas", layer(12, 256, 1, 1))
    heads = below("box_head.fc1", layer(1024, 256 * 7 * 7)) | below("box_head.fc2", layer(1024, 1024))
    heads |= below("box_predictor.cls_score", layer(81, 1024)) | below("box_predictor.bbox_pred", layer(320, 1024))
    return (
        {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)}
        | below("backbone", neck | below("bottom_up", resnet_shapes(*RESNETS[name][1:])))
        | below("proposal_generator.rpn_head", rpn_head)
        | below("proposal_generator.anchor_generator", {f"cell_anchors.{i}": (3, 4) for i in range(5)})
        | below("roi_heads", heads)
    )


@functools.cache
def noise():
    return np.random.default_rng(0).random(2**24, np.float32) - np.float32(0.5)


def random_weights(shapes):
    """Pieces of the same noise, no two alike: a hundred million numbers would take their time."""
    starts = (997 * i for i in range(len(shapes)))
    return {
        name: noise()[start : start + math.prod(shape)].reshape(shape)
        for start, (name, shape) in zip(starts, shapes.items(), strict=True)
    }


def zero_weights(shapes):
    """Their shapes, without the memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def variables_for(name, width=64, config=None):
    config = config or RESNETS[name][0].get_config()
    config.model.backbone.width = width
    detector = build_detector(config.model, 80)
    return jax.eval_shape(lambda: init_variables(detector, (64, 64), 0))


@pytest.mark.parametrize("name", RESNETS)
def test_a_detector_goes_in_and_comes_back_bit_for_bit(name):
    arrays = random_weights(detector_shapes(name))
    loaded = loader.load(variables_for(name), arrays, name, 7)
    assert loaded.fresh == [] and set(loaded.ignored) == CONSTANTS
    assert loaded.count == len(arrays) - len(CONSTANTS)
    back = loader.export(loaded.variables, "detectron2", 7)
    assert set(back) == set(arrays) - CONSTANTS
    for key, array in back.items():
        assert array.dtype == np.float32 and array.shape == arrays[key].shape, key
        assert array.tobytes() == arrays[key].tobytes(), key
    # Where names and shapes would also fit elsewhere.
    params, stats = loaded.variables["params"], loaded.variables["batch_stats"]["backbone"]
    block = "backbone.bottom_up.res3.1"
    for ours, theirs in {
        "stage3_block1/conv1": f"{block}.conv1",
        "stage3_block1/conv2": f"{block}.conv2",
        "stage3_block1/conv3": f"{block}.conv3",
    }.items():
        module, conv = ours.split("/")
        np.testing.assert_array_equal(
            params["backbone"][module][conv]["kernel"], arrays[f"{theirs}.weight"].transpose(2, 3, 1, 0)
        )
    for ours, theirs in {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}.items():
        np.testing.assert_array_equal(stats["stage3_block1"]["norm2"][ours], arrays[f"{block}.conv2.norm.{theirs}"])
    np.testing.assert_array_equal(params["neck"]["smooth4"]["bias"], arrays["backbone.fpn_output4.bias"])


@pytest.mark.parametrize("name", RESNETS)
def test_the_file_tells_its_experiment(name):
    experiment, changes, _ = guess.experiment(zero_weights(detector_shapes(name)), f"{name}.pkl")
    assert experiment == "detectron2/faster_rcnn_R_50_FPN_1x.py"
    config, expected = r50.get_config(), RESNETS[name][0].get_config()
    config.update_from_flattened_dict(changes)
    assert config.model.to_dict() == expected.model.to_dict()


@pytest.mark.parametrize(
    ("absent", "parts", "missing"),
    [
        ("roi_heads", ("backbone", "neck", "rpn_head"), r"roi_heads\.box_\S+ is missing; .* and 4 more"),
        (
            "proposal_generator",
            ("backbone", "neck", "box_head"),
            r"proposal_generator\.rpn_head\.\S+ is missing; .* 2 more",
        ),
    ],
    ids=["rpn_R_50_FPN_1x", "fast_rcnn_R_50_FPN_1x"],
)
def test_half_a_detector_from_the_zoo(absent, parts, missing):
    shapes = {name: shape for name, shape in detector_shapes("R-50").items() if not name.startswith(absent)}
    arrays, variables = zero_weights(shapes), variables_for("R-50")
    with pytest.raises(UserError, match=missing):
        loader.load(variables, arrays, "x.pkl", 7)
    loaded = loader.load(variables, arrays, "x.pkl", 7, parts=parts)
    assert loaded.count == len(set(arrays) - CONSTANTS)
    (rest,) = {"rpn_head", "box_head"} - set(parts)
    assert {path.split("/")[1] for path in loaded.fresh} == {rest}
    # Of the detector that the file is of, every weight is there.
    experiment, changes, _ = guess.experiment(arrays, "x.pkl")
    assert experiment == f"detectron2/{'rpn' if absent == 'roi_heads' else 'fast_rcnn'}_R_50_FPN_1x.py"
    config = cli.load_config(f"experiments/{experiment}")
    config.update_from_flattened_dict(changes)
    whole = loader.load(variables_for("R-50", config=config), arrays, "x.pkl", 7)
    assert whole.fresh == [] and whole.count == loaded.count


# ImageNet's weights.

# How the files for Caffe2 call what checkpoint/c2_model_loading.py calls weight, bias, running_mean and running_var.
AFFINE = {"weight": "s", "bias": "b"}
CAFFE2 = AFFINE | {"running_mean": "rm", "running_var": "riv"}
LONG = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}
BRANCHES = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}


def caffe2_names(shapes, leaves, biases=False):
    """{name in the file: (name in detectron2's module, shape)}; with `biases`, convolutions have some of their own."""
    names = {}
    for name, shape in shapes.items():
        *module, leaf = name.split(".")
        conv = "conv1" if module[0] == "stem" else f"{module[0]}_{module[1]}_{BRANCHES[module[2]]}"
        if module[-1] != "norm":
            names[f"{conv}_w"] = name, shape
            if biases:
                names[f"{conv}_b"] = None, shape[:1]
        elif leaf in leaves:
            names[f"{'res_' if module[0] == 'stem' else ''}{conv}_bn_{leaves[leaf]}"] = name, shape
    return names


def torchvision_names(shapes, extra=()):
    """As tools/convert-torchvision-to-d2.py writes them."""
    names = {name: (name, shape) for name, shape in shapes.items()}
    return names | {
        f"{name.rpartition('.')[0]}.{x}": (None, ()) for name in shapes if "norm.bias" in name for x in extra
    }


def classifier(name):
    return {f"{name}{leaf}": (None, shape) for leaf, shape in zip("wb", ((1000, 256), (1000,)), strict=True)}


R50, X101 = (resnet_shapes(*RESNETS[name][1:], width=8) for name in ("R-50", "X-101-32x8d"))  # thin, to be quick
FC1000, CONV1_B = classifier("fc1000_"), {"conv1_b": (None, (8,))}


@pytest.mark.parametrize(
    ("name", "names"),
    [
        pytest.param("R-50", caffe2_names(R50, AFFINE) | FC1000 | CONV1_B, id="affine R-50"),
        pytest.param("X-101-32x8d", caffe2_names(X101, AFFINE) | FC1000, id="affine X-101-32x8d"),
        pytest.param("R-50", torchvision_names(R50) | {"stem.fc.weight": (None, (1000, 256))}, id="torchvision"),
        # detectron2's own copy, in the logs of its issues 195, 1698, 2267: https://dl.fbaipublicfiles.com/detectron2/...
        pytest.param("R-50", caffe2_names(R50, LONG) | FC1000 | CONV1_B, id="detectron2 MSRA R-50"),
        # Detectron's copy: tools/pickle_caffe_blobs.py gives every convolution a bias of zeros, which nobody reads.
        pytest.param("R-50", caffe2_names(R50, AFFINE, True) | FC1000, id="Detectron MSRA R-50"),
        pytest.param("R-50", caffe2_names(R50, CAFFE2) | classifier("pred_"), id="Caffe2"),
        pytest.param("R-50", torchvision_names(R50, ["num_batches_tracked"]), id="torchvision, counted"),
    ],
)
def test_an_imagenet_resnet_fills_the_backbone_alone(name, names):
    arrays = random_weights({theirs: shape for theirs, (_, shape) in names.items()})
    loaded = loader.load(variables_for(name, 8), arrays, f"{name}.pkl", 7)
    assert set(loaded.ignored) == {theirs for theirs, (module, _) in names.items() if module is None}
    assert {path.split("/")[1] for path in loaded.fresh} == {"neck", "rpn_head", "box_head"}
    back = loader.export({part: {"backbone": x["backbone"]} for part, x in loaded.variables.items()}, "detectron2", 7)
    stored = {f"backbone.bottom_up.{module}": arrays[theirs] for theirs, (module, _) in names.items() if module}
    assert stored.keys() <= back.keys()
    for key, array in back.items():
        expected = stored.get(key, np.float32(0 if key.endswith("mean") else 1 - 1e-5))
        np.testing.assert_array_equal(array, np.broadcast_to(expected, array.shape), key)


def test_folded_norms_are_their_scale_and_shift_alone():
    arrays = random_weights({theirs: shape for theirs, (_, shape) in caffe2_names(R50, AFFINE).items()})
    stats = loader.load(variables_for("R-50", 8), arrays, "R-50.pkl", 7).variables["batch_stats"]["backbone"]
    norm = FrozenBatchNorm(r50.get_config().model.backbone.norm_eps)
    gain, shift = norm.apply({"batch_stats": stats["stage5_block1"]["norm2"]}, 64)
    np.testing.assert_allclose(gain, arrays["res5_1_branch2b_bn_s"], rtol=1e-6)
    np.testing.assert_allclose(shift, arrays["res5_1_branch2b_bn_b"], rtol=1e-6, atol=1e-6)
