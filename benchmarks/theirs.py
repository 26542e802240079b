"""torchvision's sides of the benchmarks, as a user runs it: on a GPU with bf16 autocast, channels last and, asked for,
torch.compile; on a CPU in float32. Needs torch and torchvision."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torchvision import ops
from torchvision.models.detection import FasterRCNN, _utils
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from benchmarks import inputs
from benchmarks.parity import weights
from benchmarks.parity.theirs import in_index_order, load
from benchmarks.timing import Made, Program
from fpn_jax.models.heads.rpn import boxes_of

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LEARNING_RATE = 1e-6  # as ours


def training(count: int, height: int, width: int, channels_last: bool, compiled: bool = False) -> Made:
    """ "step": a training step of `count` images; "losses": those of the first anchors and RoIs, in float32."""
    model = _model(height, width, trained_stages=3, channels_last=channels_last)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4
    )
    model.train()
    forward = torch.compile(model) if compiled else model

    def prepare(seed: int) -> Any:
        host = inputs.batch(seed, count, height, width)
        targets = [
            {"boxes": _tensor(host["boxes"][i][valid]), "labels": _tensor(host["labels"][i][valid] + 1).long()}
            for i, valid in enumerate(host["valid"])
        ]
        return _images(host, channels_last), targets

    def run(given: Any) -> Any:
        optimizer.zero_grad(set_to_none=True)
        with _autocast():
            losses = forward(*given)
            total = sum(losses.values())
        total.backward()
        optimizer.step()
        return _finished({"loss": total.detach()})

    @torch.no_grad()
    def run_losses(given: Any) -> Any:
        with in_index_order(), _exactly():
            return _finished({f"loss/{name}": value for name, value in model(*given).items()})

    return Made(
        {"step": Program(prepare, run, _numpy), "losses": Program(prepare, run_losses, _numpy)}, _facts(), _peak
    )


def inference(count: int, height: int, width: int, channels_last: bool, compiled: bool = False) -> Made:
    """ "detect": `count` images of height x width, padded to multiples of 32; "exact": the same in float32."""
    model = _model(height, width, trained_stages=0, channels_last=channels_last).eval()
    forward = torch.compile(model) if compiled else model

    def prepare(seed: int) -> Any:
        return _images(inputs.batch(seed, count, height, width), channels_last)

    @torch.inference_mode()
    def run(images: Any) -> Any:
        with _autocast():
            return _finished(forward(images))

    @torch.inference_mode()
    def run_exact(images: Any) -> Any:
        with _exactly():
            return _finished(model(images))

    def outputs(found: list[dict[str, torch.Tensor]]) -> dict[str, np.ndarray]:
        return _numpy({f"{key}{i}": x for i, image in enumerate(found) for key, x in image.items()})

    return Made(
        {"detect": Program(prepare, run, outputs), "exact": Program(prepare, run_exact, outputs)}, _facts(), _peak
    )


def operations(height: int, width: int, channels: int, sizes: Mapping[str, int]) -> Made:
    """The operations alone; `sizes`: how many boxes each has."""
    align = ops.MultiScaleRoIAlign(["2", "3", "4", "5"], output_size=7, sampling_ratio=2)
    matcher = _utils.Matcher(*inputs.MATCHING_IOU, allow_low_quality_matches=True)

    def keep(boxes, scores, labels):
        return ops.nms(boxes, scores, inputs.RPN_IOU)

    def top(boxes, scores, labels):
        return ops.batched_nms(boxes, scores, labels, inputs.CLASS_IOU)[: inputs.DETECTIONS]

    @torch.no_grad()
    def pooled(maps, rois, gradient):
        return align(maps, [rois], [(height, width)])

    def both_ways(maps, rois, gradient):
        leaves = {name: x.requires_grad_() for name, x in maps.items()}
        out = align(leaves, [rois], [(height, width)])
        return out.detach(), torch.autograd.grad(out, list(leaves.values()), gradient)

    def matched(boxes, anchors):
        return matcher(ops.box_iou(boxes, anchors))

    def program(function: Callable, make: Callable, count: int, outputs: Callable) -> Program:
        return Program(lambda seed: make(seed, count), lambda given: _finished(function(*given)), outputs)

    def crowd(seed: int, count: int) -> Any:
        return tuple(map(_tensor, inputs.crowded_boxes(seed, count, height, width)))

    def pyramid(seed: int, count: int) -> Any:
        maps, rois, gradient = inputs.pyramid(seed, count, height, width, channels)
        planes = {str(level): _tensor(x.transpose(2, 0, 1)[None].copy()) for level, x in maps.items()}
        return planes, _tensor(rois), _tensor(gradient.transpose(0, 3, 1, 2).copy())

    def anchors(seed: int, count: int) -> Any:
        given = inputs.objects(seed, count, height, width), np.asarray(boxes_of(inputs.anchors(height, width)))
        return tuple(map(_tensor, given))

    def kept(index: torch.Tensor) -> dict[str, np.ndarray]:
        return {"kept": np.sort(_numpy({"": index})[""])}

    def gradients(found: Any) -> dict[str, np.ndarray]:
        maps = {f"P{level}": x[0].permute(1, 2, 0) for level, x in zip((2, 3, 4, 5), found[1], strict=True)}
        return _numpy({"pooled": found[0].permute(0, 2, 3, 1)} | maps)

    programs = {
        "nms": program(keep, crowd, sizes["nms"], kept),
        "nms of classes": program(top, crowd, sizes["nms of classes"], kept),
        "RoIAlign": program(
            pooled, pyramid, sizes["RoIAlign"], lambda out: _numpy({"pooled": out.permute(0, 2, 3, 1)})
        ),
        "RoIAlign with gradient": program(both_ways, pyramid, sizes["RoIAlign with gradient"], gradients),
        "matching": program(matched, anchors, sizes["matching"], lambda found: _numpy({"matched": found})),
    }
    return Made(programs, _facts())


def _model(height: int, width: int, trained_stages: int, channels_last: bool) -> torch.nn.Module:
    """fasterrcnn_resnet50_fpn with the weights by rule, which takes images of height x width as they are."""
    body = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=trained_stages)
    model = FasterRCNN(body, inputs.CLASSES + 1)
    load(model, weights.state_dict(inputs.case()))
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    mean, std = model.transform.image_mean, model.transform.image_std
    model.transform = GeneralizedRCNNTransform(min(height, width), max(height, width), mean, std, _skip_resize=True)
    return model.to(DEVICE, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _images(host: Mapping[str, np.ndarray], channels_last: bool) -> list[torch.Tensor]:
    """What torchvision's detectors take, on the device: a list of float [3 h w] of 0 .. 1."""
    planes = torch.from_numpy(host["image"]).permute(0, 3, 1, 2).to(DEVICE).float() / 255
    planes = planes.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return list(planes)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


def _autocast() -> Any:
    return torch.autocast("cuda", torch.bfloat16) if CUDA else contextlib.nullcontext()


@contextlib.contextmanager
def _exactly() -> Any:
    """float32 without TensorFloat-32, which cuDNN's convolutions take otherwise."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def _finished(result: Any) -> Any:
    if CUDA:
        torch.cuda.synchronize()
    return result


def _numpy(found: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {key: x.detach().float().cpu().numpy() for key, x in found.items()}


def _facts() -> dict[str, Any]:
    return {"device": torch.cuda.get_device_name() if CUDA else "CPU", "threads": torch.get_num_threads()}


def _peak() -> int | None:
    """Bytes of the device since the process began, as ours; None on a CPU."""
    return torch.cuda.max_memory_allocated() if CUDA else None
