"""torchvision's Faster R-CNNs, run live: the same stages as `ours`, under the same names. Needs torch and torchvision.

The weights are made by rule (`weights`), so that nothing is downloaded, and the output layers are scaled until scores
and boxes spread about as a trained detector's do: on noise as it comes, thresholds and NMS would decide nothing.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torchvision.models import mobilenet_v3_large
from torchvision.models.detection import FasterRCNN, backbone_utils, fasterrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.misc import FrozenBatchNorm2d

from benchmarks.parity import weights
from benchmarks.parity.cases import SLOTS

MODELS = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet18_fpn",
    "fasterrcnn_resnet34_fpn",
    "fasterrcnn_resnet101_fpn",
    "fasterrcnn_resnet152_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)
# Spread of the outputs after scaling: about what trained detectors show.
_SPREADS = {
    "rpn.head.cls_logits": 2.0,
    "rpn.head.bbox_pred": 0.3,
    "roi_heads.box_predictor.cls_score": 3.0,
    "roi_heads.box_predictor.bbox_pred": 0.7,
}
Arrays = dict[str, np.ndarray]


def build(name: str, shorter: int, longest: int, images: list[np.ndarray]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """(model in evaluation mode, the case's salt, shapes, kinds and scale: what `weights.state_dict` rebuilds it from).

    images: uint8 [h w 3], on which the output layers are calibrated.
    """
    kwargs = {"min_size": shorter, "max_size": longest}
    if match := re.fullmatch(r"fasterrcnn_resnet(\d+)_fpn", name):
        body = backbone_utils.resnet_fpn_backbone(backbone_name=f"resnet{match[1]}", weights=None, trainable_layers=5)
        model = FasterRCNN(body, SLOTS, **kwargs)
    elif name == "fasterrcnn_resnet50_fpn_v2":
        model = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, **kwargs)
    else:
        body = mobilenet_v3_large(weights=None, norm_layer=FrozenBatchNorm2d)
        body = backbone_utils._mobilenet_extractor(body, True, 6)
        anchors = AnchorGenerator(((32, 64, 128, 256, 512),) * 3, ((0.5, 1.0, 2.0),) * 3)
        if "320" in name:
            kwargs |= {"rpn_pre_nms_top_n_test": 150, "rpn_post_nms_top_n_test": 150}
        model = FasterRCNN(body, SLOTS, rpn_anchor_generator=anchors, rpn_score_thresh=0.05, **kwargs)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    case = {"arch": name, "salt": "", "shapes": shapes, "kinds": weights.kinds(shapes), "scale": {}}
    model.eval()
    for layer, spread in _SPREADS.items():
        load(model, weights.state_dict(case))
        seen = []
        hook = model.get_submodule(layer).register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out.flatten())
        )
        with torch.no_grad():
            model([_pixels(image) for image in images])
        hook.remove()
        bias = weights.state_dict(case)[f"{layer}.bias"]
        factor = 2.0 ** round(np.log2(spread / float(torch.cat(seen).std())))
        case["scale"][layer] = {"weight_factor": factor, "bias": (bias * (10 * spread)).tolist()}
    load(model, weights.state_dict(case))
    return model, case


def load(model: torch.nn.Module, arrays: Arrays) -> None:
    """Put a state dict of NumPy arrays into the model; every name must be there."""
    model.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}, strict=True)


@torch.no_grad()
def inference(model: torch.nn.Module, images: list[np.ndarray], rois: list[np.ndarray], levels: list[int]) -> Arrays:
    """Every stage for images uint8 [h w 3]; rois [r 4] of each in pixels of the resized image; levels: of the maps.

    The last of the levels is the subsampled one.
    """
    model.eval()
    dtype = next(model.parameters()).dtype
    tensors = [_pixels(image).to(dtype) for image in images]
    batch, _ = model.transform(tensors)
    bottom_up = model.backbone.body(batch.tensors)
    pyramid = model.backbone(batch.tensors)
    result = {"batch": batch.tensors, "sizes": torch.tensor(batch.image_sizes)}
    result |= {f"body/C{level}": x for level, x in zip(levels, bottom_up.values(), strict=False)}
    result |= {f"fpn/P{level}": x for level, x in zip(levels, pyramid.values(), strict=True)}
    logits, deltas = model.rpn.head(list(pyramid.values()))
    result |= {f"rpn/obj_P{level}": x for level, x in zip(levels, logits, strict=True)}
    result |= {f"rpn/delta_P{level}": x for level, x in zip(levels, deltas, strict=True)}
    for i, boxes in enumerate(model.rpn(batch, pyramid)[0]):
        result[f"rpn/proposals{i}"] = boxes
    pooled = model.roi_heads.box_roi_pool(pyramid, [torch.from_numpy(x).to(dtype) for x in rois], batch.image_sizes)
    class_logits, box_deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    result |= {"roi/align_fixed": pooled, "roi/class_logits_fixed": class_logits, "roi/box_deltas_fixed": box_deltas}
    for i, found in enumerate(model(tensors)):
        result |= {f"out/{key}{i}": found[key] for key in ("boxes", "scores", "labels")}
    return {key: x.numpy() for key, x in result.items()}


def training(
    model: torch.nn.Module, images: list[np.ndarray], boxes: list[np.ndarray], labels: list[np.ndarray]
) -> Arrays:
    """Losses, gradients and sampled RoIs with all layers trained and samples taken in index order.

    boxes [m 4] in pixels of the image as it is, labels [m] from 1.
    """
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    targets = [
        {"boxes": torch.from_numpy(b), "labels": torch.from_numpy(x)} for b, x in zip(boxes, labels, strict=True)
    ]
    result: Arrays = {}
    select = model.roi_heads.select_training_samples

    def watched(proposals: Any, targets: Any) -> Any:
        for i, x in enumerate(proposals):
            result[f"train/proposals{i}"] = x.numpy()
        sampled = select(proposals, targets)
        for i, (rois, slots) in enumerate(zip(sampled[0], sampled[2], strict=True)):
            result[f"train/roi_boxes{i}"], result[f"train/roi_labels{i}"] = rois.numpy(), slots.numpy()
        return sampled

    with in_index_order():
        model.roi_heads.select_training_samples = watched
        try:
            losses = model([_pixels(image) for image in images], targets)
        finally:
            del model.roi_heads.select_training_samples
    sum(losses.values()).backward()
    result |= {f"loss/{name}": value.detach().numpy() for name, value in losses.items()}
    result |= {f"grad/{name}": x.grad.numpy() for name, x in model.named_parameters()}
    model.eval()
    return result


@contextlib.contextmanager
def in_index_order() -> Iterator[None]:
    """Samples are the first candidates instead of random ones."""
    shuffled = torch.randperm
    torch.randperm = lambda n, **kwargs: torch.arange(n, device=kwargs.get("device"))
    try:
        yield
    finally:
        torch.randperm = shuffled


def _pixels(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255
