"""A small COCO-format folder to spoil, one fault at a time."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

SIZES = {3: (40, 60), 7: (50, 30), 5: (32, 32)}  # image id -> height, width


def content() -> dict[str, Any]:
    """Two classes with gaps between their ids, three images out of order, the last one without objects."""
    return {
        "images": [
            {"id": image, "file_name": f"{image:03d}.jpg", "height": h, "width": w} for image, (h, w) in SIZES.items()
        ],
        "categories": [{"id": 90, "name": "fish"}, {"id": 4, "name": "crab"}],
        "annotations": [
            box(11, 3, 90, [10, 5, 20, 30]),
            box(12, 3, 4, [50.5, 30.25, 20, 20]),  # over the right and the lower edge
            box(13, 3, 4, [70, 5, 10, 10]),  # outside
            box(14, 7, 4, [3, 3, 0, 8]),  # no area
            box(15, 7, 90, [2, 4, 8.5, 16.25], area=77.5, segmentation=[[2, 4, 10, 4, 10, 20]]),
            box(16, 7, 4, [0, 0, 30, 50], iscrowd=1, area=900.0),
        ],
    }


def box(annotation: int, image: int, category: int, xywh: list[float], **more: Any) -> dict[str, Any]:
    return {"id": annotation, "image_id": image, "category_id": category, "bbox": xywh, "iscrowd": 0, **more}


def picture(image: int) -> bytes:
    """The JPEG of an image id: noise of its own, so that no two are alike."""
    pixels = np.random.default_rng(image).integers(0, 256, (*SIZES[image], 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in SIZES:
        (folder / f"{image:03d}.jpg").write_bytes(picture(image))


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_folder(root: Path, splits: tuple[str, ...] = ("train",)) -> Path:
    """annotations/instances_SPLIT.json and images/SPLIT/ for every split."""
    for split in splits:
        write_images(root / "images" / split)
        write_json(root / "annotations" / f"instances_{split}.json", content())
    return root
