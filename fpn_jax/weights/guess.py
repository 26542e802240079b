"""Which experiment a file of weights belongs to, read off its names and shapes."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fpn_jax.errors import UserError
from fpn_jax.models.backbones.resnet import BLOCKS
from fpn_jax.weights import names

# Format -> the experiment, below experiments/.
EXPERIMENTS = {
    "torchvision Faster R-CNN v2, ResNet-FPN": "torchvision/fasterrcnn_resnet50_fpn_v2.py",
    "torchvision Faster R-CNN, ResNet-FPN": "torchvision/fasterrcnn_resnet50_fpn.py",
    "torchvision Faster R-CNN, MobileNetV3-Large-FPN": "torchvision/fasterrcnn_mobilenet_v3_large_fpn.py",
    "detectron2 ResNet-FPN": "detectron2/faster_rcnn_R_50_FPN_1x.py",
}
SMALL_MOBILENET = "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn.py"  # the same weights' names
# What the weights do not tell: torchvision sets eps 0 for this one file, by its published name.
_EPS_ZERO = re.compile(r"fasterrcnn_resnet50_fpn(_coco-258fb6c6\.pth|/COCO_V1)$")


def experiment(arrays: Mapping[str, np.ndarray], file: str) -> tuple[str, dict[str, Any], list[str]]:
    """(experiment below experiments/, changes {dotted key: value} to it, remarks for the user) for a detector's file.

    Raises `UserError` for a backbone's file, which can be part of any detector.
    """
    format = names.recognise(arrays, file)
    if format.name not in EXPERIMENTS:
        if format.framework == "fpn_jax":
            raise UserError(f"{file}: our own names do not tell the experiment; say with --config= which one it is of")
        raise UserError(
            f"{file}: a {format.name} is no whole detector; say with --config= which one it is to be part of"
        )
    chosen, changes, remarks = EXPERIMENTS[format.name], {}, []
    if "MobileNet" in format.name:
        if "mobilenet_v3_large_320" in file:
            chosen = SMALL_MOBILENET
        remarks.append("the weights do not tell whether they are for 320 or 800 pixels: the name of the file does")
        return chosen, changes, remarks
    today = names.renamed(arrays, format)
    shapes = {name: arrays[stored].shape for name, stored in today.items()}
    prefix = "backbone.body.layer{}.{}" if format.framework == "torchvision" else "backbone.bottom_up.res{}.{}"
    if format.framework == "detectron2":
        chosen = _detectron2(shapes)
    first = 1 if format.framework == "torchvision" else 2
    changes |= _resnet(shapes, prefix, first, file)
    if chosen.endswith("fasterrcnn_resnet50_fpn.py") and not _EPS_ZERO.search(file):
        changes["model.backbone.norm_eps"] = 1e-5
    if "backbone.body.bn1.num_batches_tracked" in shapes and not chosen.endswith("v2.py"):
        remarks.append("the file's batch norms were live; here they are frozen unless model.backbone.norm is 'bn'")
    if format.framework == "detectron2":
        is_msra = changes.get("model.backbone.groups", 1) == 1
        changes["model.backbone.stride_in_1x1"] = is_msra
        if not is_msra:
            changes["model.pixels.std"] = (57.375, 57.120, 58.395)
        where = (
            "first 1x1 convolution, as with MSRA's weights" if is_msra else "3x3 convolution, as with FAIR's ResNeXt"
        )
        remarks.append(f"bottlenecks stride in the {where}; the file does not tell")
    return chosen, changes, remarks


def _detectron2(shapes: Mapping[str, Any]) -> str:
    """Which of its detectors, by the heads that there are."""
    heads = {
        head: any(name.startswith(head) for name in shapes) for head in ("proposal_generator.rpn_head", "roi_heads")
    }
    kind = {(True, False): "rpn", (False, True): "fast_rcnn"}.get(tuple(heads.values()), "faster_rcnn")
    return f"detectron2/{kind}_R_50_FPN_1x.py"


def _resnet(shapes: Mapping[str, tuple[int, ...]], prefix: str, first: int, file: str) -> dict[str, Any]:
    # One tensor is as good as all of a block's: what a file lacks is for the loader to name.
    stages = [[block for block in range(64) if _has(shapes, prefix.format(first + i, block))] for i in range(4)]
    blocks = tuple(max(stage, default=-1) + 1 for stage in stages)
    firsts = [prefix.format(first, block) for block in stages[0]]
    deep = any(_has(shapes, f"{block}.conv3") for block in firsts)
    depths = [depth for depth, known in BLOCKS.items() if known == blocks and (depth >= 50) == deep]
    if not depths:
        raise UserError(f"{file}: a ResNet with {blocks} blocks is none of the usual; say with --config= what it is")
    changes = {"model.backbone.depth": depths[0]}
    middle = next((shapes[f"{block}.conv2.weight"] for block in firsts if f"{block}.conv2.weight" in shapes), None)
    if deep and middle and middle[0] != middle[1]:
        out, of_group = middle[:2]
        changes |= {"model.backbone.groups": out // of_group, "model.backbone.width_per_group": of_group}
    return changes


def _has(shapes: Mapping[str, Any], module: str) -> bool:
    """Whether a module of this name has any tensor."""
    return any(name.startswith(f"{module}.") for name in shapes)
