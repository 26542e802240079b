"""Recall of region proposals whatever their class, as COCO computes it with useCats = 0. NumPy and hotcoco only.

A split has millions of proposals, too many for a dict each, so they travel as one float64 array [n 6] with the columns
image_id, x, y, width, height, score: the data set's own ids (below 2**53) and pixels of the original image. A list of
COCO results does as well.
"""

from collections.abc import Sequence
from typing import Any

import hotcoco
import numpy as np

from fpn_jax.errors import UserError
from fpn_jax.evaluation import number

# COCO's areas of objects in square pixels, both ends included: an object of 32 x 32 is small and medium.
AREAS = {"": (0.0, 1e10), "_small": (0.0, 32.0**2), "_medium": (32.0**2, 96.0**2), "_large": (96.0**2, 1e10)}
LIMITS = (100, 1000)
# Images that hotcoco sees at once: it takes 470 bytes for a proposal, 5000 images with 1000 each would be 2.4 GB.
CHUNK = 100


def proposal_metrics(ground_truth: dict[str, Any], results: np.ndarray | Sequence[dict[str, Any]]) -> dict[str, Any]:
    """COCO's average recall over IoU .50 : .05 : .95 with the best 100 and the best 1000 proposals of each image.

    ground_truth is a COCO dict; results are the rows or dicts of this module's head, in any order. Keys: AR100,
    AR100_small, AR100_medium, AR100_large and the same of AR1000, each 0 .. 1, or None where there is no such object;
    num_images, num_objects (crowds not counted), num_proposals (all that were given).

    Raises `UserError` for a proposal whose image the ground truth does not have, or that is not finite, and ValueError
    for an array of another type or shape.
    """
    recalls = area_recalls(ground_truth, results, list(AREAS.values()), LIMITS)
    metrics: dict[str, Any] = {
        f"AR{limit}{area}": recalls[i][j] for j, limit in enumerate(LIMITS) for i, area in enumerate(AREAS)
    }
    metrics["num_images"] = len(ground_truth["images"])
    metrics["num_objects"] = sum(not a.get("iscrowd") for a in ground_truth["annotations"])
    metrics["num_proposals"] = len(results)
    return metrics


def area_recalls(
    ground_truth: dict[str, Any],
    results: np.ndarray | Sequence[dict[str, Any]],
    areas: Sequence[tuple[float, float]],
    limits: Sequence[int],
) -> list[list[float | None]]:
    """Average recall for each area (lowest, highest; both included, square pixels) and each limit, given ascending.

    What `proposal_metrics` says of its arguments and errors holds here. To the last bit what pycocotools gives with
    useCats = 0, and so are ties: of equal scores the first in the order given is better, of dicts the one with the
    lower category first.
    """
    rows = _rows(results)
    images = np.unique(np.array([image["id"] for image in ground_truth["images"]], np.int64))
    _check(rows, images)
    objects: dict[int, list[dict[str, Any]]] = {}
    for annotation in sorted(ground_truth["annotations"], key=lambda a: a["category_id"]):
        objects.setdefault(annotation["image_id"], []).append(annotation)

    order = np.argsort(rows[:, 0], kind="stable")
    ends = np.searchsorted(rows[order, 0], images, "right")
    found, total = np.zeros((1, len(areas), len(limits))), np.zeros(len(areas))
    start = 0
    for first in range(0, len(images), CHUNK):
        chunk = images[first : first + CHUNK].tolist()
        end = ends[first + len(chunk) - 1]
        present = [annotation for image in chunk for annotation in objects.get(image, [])]
        count = np.array([count_objects(present, area) for area in areas])
        if count.any():
            recall = _recall(chunk, present, rows[order[start:end]], areas, limits)
            # A recall is a count over a count, so the counts come back exactly, and may be added up.
            found = found + np.rint(np.maximum(recall, 0) * count[:, None])
            total += count
        start = end
    return [
        [float((of_limit / n).mean()) if n else None for of_limit in of_area.T]
        for of_area, n in zip(found.swapaxes(0, 1), total, strict=True)
    ]


def count_objects(annotations: Sequence[dict[str, Any]], area: tuple[float, float]) -> int:
    """Objects (no crowds) whose `area` lies in the range, both ends included."""
    return sum(not a.get("iscrowd") and area[0] <= a["area"] <= area[1] for a in annotations)


def _rows(results: np.ndarray | Sequence[dict[str, Any]]) -> np.ndarray:
    if isinstance(results, np.ndarray):
        if results.dtype != np.float64 or results.ndim != 2 or results.shape[1] != 6:
            raise ValueError(
                f"proposals: {results.dtype} {list(results.shape)}; need float64 [n 6] (float32 cannot hold image ids)"
            )
        return results
    by_category = sorted(results, key=lambda result: result.get("category_id", 0))
    rows = [(result["image_id"], *result["bbox"], result["score"]) for result in by_category]
    return np.array(rows, np.float64).reshape(-1, 6)


def _check(rows: np.ndarray, images: np.ndarray) -> None:
    broken = ~np.isfinite(rows).all(1)
    if broken.any():
        raise UserError(
            f"proposals: image_id {rows[broken.argmax(), 0]:.0f} has a box or score that is not finite; "
            "the weights are broken, use an earlier checkpoint"
        )
    unknown = np.setdiff1d(rows[:, 0], images)
    if unknown.size:
        raise UserError(
            f"proposals: image_id {unknown[0]:.0f} ({unknown.size} such ids) is not among the images of the ground "
            "truth; score them with the data set and split that they were made from"
        )


def _recall(
    images: list[int],
    annotations: list[dict[str, Any]],
    rows: np.ndarray,
    areas: Sequence[tuple[float, float]],
    limits: Sequence[int],
) -> np.ndarray:
    """Recall [T A M] over IoU thresholds, areas and limits; -1 where there is no object.

    hotcoco gives rows without a class the class 1, and if the data set has no such class, they match nothing, even with
    use_cats off. So all objects become class 1 here, which is the same as no classes.
    """
    keys = ("image_id", "bbox", "area")
    objects = [
        {key: a[key] for key in keys} | {"id": i, "category_id": 1, "iscrowd": int(a.get("iscrowd", 0))}
        for i, a in enumerate(annotations, 1)
    ]
    categories = [{"id": 1, "name": "object"}]
    truth = hotcoco.COCO({"images": [{"id": i} for i in images], "annotations": objects, "categories": categories})
    evaluator = hotcoco.COCOeval(truth, truth.load_res(rows), "bbox")
    evaluator.params.area_rng = [list(area) for area in areas]
    evaluator.params.area_rng_lbl = [str(i) for i in range(len(areas))]
    evaluator.params.max_dets = list(limits)
    evaluator.params.rec_thrs = [0.0]  # of the precisions, which nobody reads
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator.eval["recall"][:, 0]


def proposal_table(metrics: dict[str, Any]) -> str:
    """The result of `proposal_metrics` for the terminal."""
    lines = [f"{metrics['num_images']} images, {metrics['num_objects']} objects, {metrics['num_proposals']} proposals"]
    for limit in LIMITS:
        keys = [f"AR{limit}{area}" for area in AREAS]
        lines += ["", "".join(f"{key:>15}" for key in keys), "".join(f"{number(metrics[key]):>15}" for key in keys)]
    return "\n".join(lines)
