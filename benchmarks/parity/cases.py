"""What both sides compute on: two images with objects, and the config that a model's names lead to."""

from pathlib import Path
from typing import Any

import numpy as np

from fpn_jax import cli
from fpn_jax.weights import guess

SLOTS = 91  # class slots of torchvision's COCO detectors, background included


def images(seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Two images uint8 [h w 3] of blobs at all scales, with boxes [m 4] in pixels and labels [m] from 1."""
    rng = np.random.default_rng(seed)
    pictures, boxes, labels = [], [], []
    for height, width in ((240, 320), (220, 260)):
        total = np.zeros((height, width, 3))
        for cells in (2, 4, 8, 16, 32, 64):
            coarse = rng.normal(size=(cells, cells, 3))
            rows, columns = (np.arange(n) * cells // n for n in (height, width))
            total += coarse[rows][:, columns]
        pictures.append(np.clip(128 + 40 * total, 0, 255).astype(np.uint8))
        sides = np.exp(rng.uniform(np.log(12), np.log(160), (4, 2)))
        corners = rng.uniform(size=(4, 2)) * (np.array([width, height]) - sides)
        boxes.append(np.concatenate([corners, corners + sides], 1).astype(np.float32))
        labels.append(rng.integers(1, SLOTS, 4))
    return pictures, boxes, labels


def config_for(case: dict[str, Any], shorter: int, longest: int) -> Any:
    """The experiment that the names lead to, with the case's sizes, everything trained, samples in index order."""
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in case["shapes"].items()}
    experiment, changes, _ = guess.experiment(arrays, case["arch"])
    config = cli.load_config(str(Path(__file__).parents[2] / "experiments" / experiment))
    config.update_from_flattened_dict(changes)
    config.data.shorter, config.data.longest = (shorter,), longest
    config.model.backbone.frozen_stages = 0
    config.model.rpn.sampling = config.model.box.sampling = "first"
    return config
