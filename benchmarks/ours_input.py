"""Our side of the input pipeline's benchmark, and the pictures that both sides read."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks import inputs
from benchmarks.timing import Made, Program, per_item
from fpn_jax.allocator import keep_memory
from fpn_jax.data.datasets import open_split
from fpn_jax.data.decode import decode
from fpn_jax.data.pipeline import PipelineOptions, default_buckets, eval_batches, train_batches
from fpn_jax.data.preparation import prepare
from fpn_jax.data.transforms import resize_into, resized_size

HEIGHT, WIDTH, OBJECTS = 480, 640, 7
SHORTER, LONGEST, BATCH = 800, 1333, 8


def write_pictures(folder: Path, count: int) -> None:
    """`count` JPEGs in folder/coco/train with annotations, and the same as records in folder/data."""
    rng = np.random.default_rng(0)
    files = folder / "coco" / "train"
    files.mkdir(parents=True)
    content: dict[str, list] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for i in range(count):
        grain = rng.normal(0, 4, (HEIGHT, WIDTH, 1))  # as much as makes the files as large as COCO's
        picture = np.clip(inputs.blobs(rng, HEIGHT, WIDTH) + grain, 0, 255).astype(np.uint8)
        cv2.imwrite(str(files / f"{i}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
        content["images"].append({"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH})
        for x1, y1, x2, y2 in inputs.boxes_in(rng, OBJECTS, HEIGHT, WIDTH).tolist():
            box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            content["annotations"].append({"id": len(content["annotations"]), "image_id": i, "category_id": 1} | box)
    (folder / "coco" / "instances_train.json").write_text(json.dumps(content))
    prepare(str(folder / "coco"), folder / "data", "pictures")


def pictures(folder: str, kind: str, batches: int, changes: dict[str, Any] | None = None) -> Made:
    """ "epoch": this many random batches, read and let go; "first": the first batch of those in order, unflipped;
    "parts": the seconds that each part takes for an image.

    kind: "uint8" or "float32"; changes: of the pipeline's options.
    """
    keep_memory()  # as the commands do
    split = open_split(Path(folder) / "data", "pictures", "train")
    buckets = default_buckets((SHORTER,), LONGEST, 32)
    options = PipelineOptions((SHORTER,), LONGEST, buckets, pixels=kind, **(changes or {}))

    def epoch(seed: int) -> None:
        for _ in train_batches(split, options, BATCH, seed, batches):
            pass

    def first(_: int) -> dict[str, np.ndarray]:
        return next(eval_batches(split, options, BATCH))

    def outputs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"image": batch["image"], "boxes": batch["boxes"][:, :OBJECTS]}

    def read(row: int) -> np.ndarray:
        return decode(split.source[row]["image"], "a picture", (HEIGHT, WIDTH))

    def parts(_: int) -> dict[str, np.ndarray]:
        rows, size = range(len(split)), resized_size(HEIGHT, WIDTH, SHORTER, LONGEST)
        images, canvases = [read(row) for row in rows], first(0)["image"]

        def resize(row: int) -> None:
            resize_into(canvases[row % BATCH], images[row], size, options.interpolation, flip=False)

        return {"read and decode": np.float64(per_item(read, rows)), "resize": np.float64(per_item(resize, rows))}

    programs = {
        "epoch": Program(lambda seed: seed, epoch),
        "first": Program(lambda seed: seed, first, outputs),
        "parts": Program(lambda seed: seed, parts),
    }
    return Made(programs)
