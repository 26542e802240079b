"""What a framework's detector can be told to do, and what it always does: whether a config of ours is one of its own.

Weights that load but score lower are worse than a refusal, so `check` names the first key that does not fit.
"""

from collections.abc import Collection, Mapping
from typing import Any

from fpn_jax.errors import UserError
from fpn_jax.models.backbones.resnet import BLOCKS

# Dotted key of `config.model` -> the value of the paper's detector, which no framework has a switch for.
_PAPER = {
    "neck.name": "fpn",
    "neck.lateral": True,
    "neck.top_down": True,
    "neck.smooth": True,
    "neck.upsampling": "nearest",
    "neck.merge": "sum",
    "neck.activation": "none",
    "image_pyramid.scales": (),
    "rpn_head.shared": True,
    "box.pooling": "align",
    "box_head.name": "fc",
    "box_head.separate_levels": (),
}
# The same of what one framework has built in.
FIXED = {
    "torchvision": {
        **_PAPER,
        "pixels.order": "rgb",
        "pixels.white": 1.0,
        "backbone.stride_in_1x1": False,
        "neck.extra_level": True,
        "rpn.anchor_rounding": True,
        "rpn.anchor_order": "ratio_major",
        "rpn.anchor_stride": "image",
        "rpn.delta_weights": (1.0, 1.0, 1.0, 1.0),
        "rpn.min_size": 1e-3,
        "box.background": "first",
        "box.aligned": False,
        "box.level_eps": 1e-6,
        "box.min_size": 1e-2,
    },
    "detectron2": {
        **_PAPER,
        "pixels.white": 255.0,
        "rpn.anchor_rounding": False,
        "rpn.anchor_order": "size_major",
        "rpn.anchor_stride": "level",
        "box.background": "last",
        "box.level_eps": 0.0,
    },
    "fpn_jax": {},
}
_WIDTH = 64  # of the first stage of every torchvision ResNet
_ALL = 10**9  # more boxes than there are; to torchvision 0 means none


# Keys of a part of the model -> the parts of the weights that they matter to.
_MATTERS = {
    "pixels": "backbone",
    "backbone": "backbone",
    "image_pyramid": "neck",
    "neck": "neck",
    "rpn": "rpn_head",
    "rpn_head": "rpn_head",
    "box": "box_head",
    "box_head": "box_head",
}


def differences(model: Mapping[str, Any], framework: str, parts: Collection[str]) -> list[str]:
    """One line for each key of `config.model` in which the framework's detectors differ, as far as parts tell."""
    lines = []
    for key, wanted in FIXED[framework].items():
        part, _, name = key.partition(".")
        value = plain(model.get(part, {}).get(name, wanted))
        if value != wanted and _MATTERS[part] in parts:
            lines.append(f"model.{key} is {value!r}, and {framework} has {wanted!r}")
    return lines


def check(model: Mapping[str, Any], framework: str) -> None:
    """Raise a `UserError` naming the key of `config.model` in which the framework's detectors differ."""
    kind = model.get("detector", "faster_rcnn")
    if framework == "torchvision" and kind != "faster_rcnn":
        raise UserError(f"model.detector is {kind!r}: torchvision has no such detector; export with other --names")
    if found := differences(model, framework, set(_MATTERS.values())):
        raise UserError(
            f"{found[0]}: its detector would score otherwise with these weights; train with that value, or export "
            "with other --names"
        )


def _check_structure(model: Mapping[str, Any]) -> None:
    """Raise a `UserError` naming the first key that torchvision's classes have no argument for."""
    neck, head, rpn, box = model["neck"], model["box_head"], model["rpn"], model["box"]
    levels = plain(rpn["levels"])
    plain_head = (head.get("convs", 0), head.get("fcs", 2)) == (0, 2)
    demands = {
        "backbone.norm": ((model["backbone"]["norm"] in ("frozen_bn", "bn")), "'frozen_bn' or 'bn'"),
        "neck.norm": (neck.get("norm", "none") in ("none", "bn"), "'none' or 'bn'"),
        "neck.norm_eps": (neck.get("norm", "none") == "none" or neck["norm_eps"] == 1e-5, "1e-5"),
        "box_head.convs": (plain_head or (head["convs"], head["fcs"]) == (4, 1), "0 with fcs 2, or 4 with fcs 1"),
        "box_head.norm": (plain_head or (head["norm"], head["norm_eps"]) == ("bn", 1e-5), "'bn' with norm_eps 1e-5"),
        "rpn_head.channels": (
            model["rpn_head"].get("channels", 0) in (0, neck["channels"]),
            f"0, the neck's {neck['channels']}",
        ),
        "rpn.levels": (levels in ((2, 3, 4, 5, 6), (5, 6, 7)), "all levels of the neck"),
        "box.levels": (plain(box["levels"]) == levels[: len(box["levels"])], "levels from the finest on"),
    }
    for key, (is_met, wanted) in demands.items():
        if not is_met:
            part, _, name = key.partition(".")
            raise UserError(f"model.{key} is {plain(model[part][name])!r}: torchvision's detectors have {wanted}")


def torchvision_code(config: Mapping[str, Any], num_slots: int, file: str) -> str:
    """Python that builds torchvision's detector of this config and loads `file` into it, strictly.

    num_slots: classes with the background. Raises `UserError` if its builders have no such backbone.
    """
    model, data = config["model"], config["data"]
    _check_structure(model)
    rpn, box, backbone = model["rpn"], model["box"], model["backbone"]
    norm = "FrozenBatchNorm2d" if backbone["norm"] == "frozen_bn" else "torch.nn.BatchNorm2d"
    body, extractor = _mobilenet(backbone, norm) if backbone["name"] == "mobilenet_v3" else _resnet(backbone, norm)
    neck_norm = "" if model["neck"].get("norm", "none") == "none" else ", norm_layer=torch.nn.BatchNorm2d"
    maps = [str(i) for i in range(len(box["levels"]))]
    channels, size = model["neck"]["channels"], box["pooled_size"]
    head = model["box_head"]
    if head.get("convs"):
        convs, fcs = [head["conv_channels"]] * head["convs"], [head["channels"]] * head["fcs"]
        box_head = f"FastRCNNConvFCHead(({channels}, {size}, {size}), {convs}, {fcs}, norm_layer=torch.nn.BatchNorm2d)"
    else:
        box_head = f"TwoMLPHead({channels * size**2}, {head['channels']})"
    library, reading = "", f"torch.load({file!r}, weights_only=True)"
    if file.endswith(".safetensors"):
        library = "import safetensors.torch\n"
        reading = f"safetensors.torch.load_file({file!r})"
    sizes, anchors = plain(rpn["sizes"]), len(rpn["sizes"][0]) * len(rpn["ratios"])
    return f"""{library}import torch
from torchvision.models import mobilenet_v3_large
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

body = {body}
model = FasterRCNN(
    BackboneWithFPN(body, {extractor}, {channels}{neck_norm}),
    min_size={data["shorter"][-1]}, max_size={data["longest"]},
    image_mean={list(model["pixels"]["mean"])}, image_std={list(model["pixels"]["std"])},
    rpn_anchor_generator=AnchorGenerator({sizes}, ({plain(rpn["ratios"])},) * {len(sizes)}),
    rpn_head=RPNHead({channels}, {anchors}, conv_depth={model["rpn_head"]["convs"]}),
    rpn_pre_nms_top_n_train={rpn["pre_nms_train"] or _ALL}, rpn_pre_nms_top_n_test={rpn["pre_nms_test"] or _ALL},
    rpn_post_nms_top_n_train={rpn["post_nms_train"]}, rpn_post_nms_top_n_test={rpn["post_nms_test"]},
    rpn_nms_thresh={rpn["nms_iou"]}, rpn_score_thresh={rpn["score_threshold"]},
    box_roi_pool=MultiScaleRoIAlign(
        {maps}, {size}, {box["sampling_ratio"] or -1},
        canonical_scale={box["canonical_size"]}, canonical_level={box["k0"]},
    ),
    box_head={box_head},
    box_predictor=FastRCNNPredictor({head["channels"]}, {num_slots}),
    box_score_thresh={box["score_threshold"]}, box_nms_thresh={box["nms_iou"]},
    box_detections_per_img={box["detections"]}, bbox_reg_weights={plain(box["delta_weights"])},
)
for module in model.backbone.body.modules():
    if isinstance(module, (FrozenBatchNorm2d, torch.nn.BatchNorm2d)):
        module.eps = {backbone["norm_eps"]}
model.load_state_dict({reading}, strict=True)
model.eval()
"""


def _resnet(backbone: Mapping[str, Any], norm: str) -> tuple[str, str]:
    if backbone["width"] != _WIDTH:
        raise UserError(
            f"model.backbone.width is {backbone['width']}: torchvision's ResNet has {_WIDTH} and no other; train with "
            f"model.backbone.width={_WIDTH}, or write our own names with --names=fpn_jax"
        )
    deep = backbone["depth"] >= 50
    block, growth = ("Bottleneck", 4) if deep else ("BasicBlock", 1)
    blocks = list(backbone.get("blocks") or BLOCKS[backbone["depth"]])
    groups = ""
    if backbone.get("groups", 1) > 1:
        groups = f", groups={backbone['groups']}, width_per_group={backbone['width_per_group']}"
    layers = {f"layer{i}": str(i - 1) for i in range(1, 5)}
    channels = [_WIDTH * growth * 2**i for i in range(4)]
    return f"ResNet({block}, {blocks}{groups}, norm_layer={norm})", f"{layers}, {channels}"


def _mobilenet(backbone: Mapping[str, Any], norm: str) -> tuple[str, str]:
    if tuple(backbone["levels"]) != (5, 6):
        raise UserError(f"model.backbone.levels is {backbone['levels']}: torchvision's detector takes (5, 6)")
    layers = {"13": "0", "16": "1"}
    return f"mobilenet_v3_large(norm_layer={norm}).features", f"{layers}, [160, 960]"


def plain(value: Any) -> Any:
    """Lists as tuples, at all depths."""
    return tuple(plain(v) for v in value) if isinstance(value, list | tuple) else value
