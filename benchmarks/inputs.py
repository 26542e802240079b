"""What both sides are given, from a seed alone: images with objects, boxes as NMS meets them, RoIs."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fpn_jax.models.heads.rpn import RPNSettings, anchor_grids
from fpn_jax.ops.anchors import AnchorGrid

RPN_IOU, CLASS_IOU, MATCHING_IOU, DETECTIONS = 0.7, 0.5, (0.7, 0.3), 100  # what the detectors have
CLASSES = 90  # of torchvision's COCO detectors, background not counted
OBJECTS = 16  # rows of an image's boxes; 4 to 16 of them are there
_STORED = Path(__file__).parent.parent / "tests" / "data" / "parity" / "fasterrcnn_resnet50_fpn.json"


def case() -> dict[str, Any]:
    """Of fasterrcnn_resnet50_fpn: what `benchmarks.parity.weights.state_dict` makes weights of by rule."""
    return json.loads(_STORED.read_text())


def blobs(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture uint8 [height width 3] with structure at all scales: noise alone is all alike for a network."""
    total = np.zeros((height, width, 3), np.float32)
    for cells in (2, 4, 8, 16, 32, 64):
        coarse = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        rows, columns = (np.arange(n) * cells // n for n in (height, width))
        total += coarse[rows][:, columns]
    return np.clip(128 + 40 * total, 0, 255).astype(np.uint8)


def boxes_in(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Boxes float32 [count 4] inside the image, 16 to 400 pixels wide and high, small ones as often as large ones."""
    sides = np.exp(rng.uniform(np.log(16), np.log([min(400, width), min(400, height)]), (count, 2)))
    corners = rng.uniform(size=(count, 2)) * (np.array([width, height]) - sides)
    return np.concatenate([corners, corners + sides], -1).astype(np.float32)


def batch(seed: int, count: int, height: int, width: int, padded: tuple[int, int] | None = None) -> dict:
    """A host batch of `count` images of one size, with 4 to 16 objects each, padded below and right with zeros."""
    rng = np.random.default_rng(seed)
    image = np.zeros((count, *(padded or (height, width)), 3), np.uint8)
    for canvas in image:
        canvas[:height, :width] = blobs(rng, height, width)
    valid = np.arange(OBJECTS) < rng.integers(4, OBJECTS + 1, (count, 1))
    boxes = np.stack([boxes_in(rng, OBJECTS, height, width) for _ in range(count)])
    return {
        "image": image,
        "size": np.tile(np.array([[height, width]], np.int32), (count, 1)),
        "boxes": boxes * valid[..., None],
        "labels": (rng.integers(0, CLASSES, (count, OBJECTS)) * valid).astype(np.int32),
        "valid": valid,
    }


def crowded_boxes(seed: int, count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes [count 4] in heaps, as an RPN or a box head finds them, with scores [count] and labels [count].

    Each heap is around one of 40 places, of one class, its corners a tenth of its size apart; scores have no ties.
    """
    rng = np.random.default_rng(seed)
    centres, labels = boxes_in(rng, 40, height, width), rng.integers(0, CLASSES, 40)
    heap = rng.integers(0, 40, count)
    sides = np.tile(centres[heap, 2:] - centres[heap, :2], 2)
    boxes = centres[heap] + rng.normal(0, 0.1, (count, 4)) * sides
    boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], 1)
    scores = rng.permutation(count) / count
    boxes = np.clip(boxes, 0, (width, height) * 2).astype(np.float32)
    return boxes, scores.astype(np.float32), labels[heap].astype(np.int32)


def pyramid(
    seed: int, count: int, height: int, width: int, channels: int
) -> tuple[dict[int, np.ndarray], np.ndarray, np.ndarray]:
    """(maps P2 to P5 {l: [h w c]}, `count` RoIs [r 4], a gradient of what is pooled of them [r 7 7 c])."""
    rng = np.random.default_rng(seed)
    shapes = {level: (height >> level, width >> level, channels) for level in (2, 3, 4, 5)}
    maps = {level: rng.standard_normal(shape, np.float32) for level, shape in shapes.items()}
    gradient = rng.standard_normal((count, 7, 7, channels), np.float32)
    return maps, rois(rng, count, height, width), gradient


def objects(seed: int, count: int, height: int, width: int) -> np.ndarray:
    """`count` boxes [m 4]."""
    return boxes_in(np.random.default_rng(seed), count, height, width)


def anchors(height: int, width: int) -> dict[int, AnchorGrid]:
    """Those of P2 to P6."""
    settings = RPNSettings()
    grids = {level: (-(-height // 2**level), -(-width // 2**level)) for level in settings.levels}
    return anchor_grids(settings, grids, (height, width))


def rois(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """RoIs float32 [count 4] of the sizes that proposals have, cut to the image as proposals are.

    The square root of the area is log-normal around 90 pixels (a third between 55 and 145), the ratio of the sides
    around 1 (two thirds between 0.6 and 1.65). Made up, not measured: proposals spread over all levels, mostly P2.
    """
    size, ratio = np.exp(rng.normal(np.log(90), 1.0, count)), np.exp(rng.normal(0, 0.5, count))
    sides = np.stack([size / np.sqrt(ratio), size * np.sqrt(ratio)], -1)
    centres = rng.uniform(size=(count, 2)) * (width, height)
    corners = np.concatenate([centres - sides / 2, centres + sides / 2], -1)
    return np.clip(corners, 0, (width, height, width, height)).astype(np.float32)
