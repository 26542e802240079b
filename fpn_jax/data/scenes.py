"""`scenes`, the embedded data set: pictures drawn by `drawing.py`, with boxes and masks known exactly.

An object's box is the tight box of what can be seen of it, its area the number of pixels that can be seen, and its
`segmentation` COCO's uncompressed run-length code of them.
"""

import json
import os
from collections.abc import Iterator

import cv2
import numpy as np

from fpn_jax.data import drawing
from fpn_jax.data.records import Counts, RecordsBuilder, record

NAME = "scenes"
SPLITS = {"train": 800, "val": 100}  # images
_REVISION = 2  # raised whenever the drawings change, so that old data is not taken for new
_JPEG_QUALITY = 95
_SPLIT_NUMBERS = {"train": 0, "val": 1}


def builder(
    data_dir: str | os.PathLike,
    dataset: str = NAME,
    train: int = SPLITS["train"],
    val: int = SPLITS["val"],
    seed: int = 0,
) -> RecordsBuilder:
    """The tfds builder of `scenes` with this many images per split (both > 0)."""
    sizes = {"train": train, "val": val}

    def drawn(split: str):
        return lambda counts: _records(seed, split, sizes[split], counts)

    return RecordsBuilder(
        data_dir,
        dataset,
        drawing.CLASSES,
        range(1, len(drawing.CLASSES) + 1),
        {split: (sizes[split], drawn(split)) for split in sizes},
        source=NAME,
        fingerprint=f"revision {_REVISION} seed {seed} train {train} val {val}",
        description=(drawing.__doc__ or "").strip(),
    )


def _records(seed: int, split: str, number: int, counts: Counts) -> Iterator[dict]:
    annotation_id = 0
    for index in range(number):
        image, drawn = drawing.draw_scene(seed, _SPLIT_NUMBERS[split], index)
        objects = []
        for item in drawn:
            annotation_id += 1
            objects.append(_annotation(item, annotation_id))
        ok, data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        assert ok
        yield record(data.tobytes(), index + 1, f"{split}-{index:05d}.jpg", image.shape[:2], objects, counts)


def _annotation(item: drawing.SceneObject, annotation_id: int) -> dict:
    rows, columns = np.flatnonzero(item.mask.any(1)), np.flatnonzero(item.mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "xywh": (left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top),
        "label": item.label,
        "category_id": item.label + 1,
        "id": annotation_id,
        "area": float(np.count_nonzero(item.mask)),
        "is_crowd": False,
        "segmentation": json.dumps(run_lengths(item.mask), separators=(",", ":")),
    }


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run-length code of a bool [h w] mask: runs down the columns, the first one of zeros."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if flat[0] else runs}
