"""COCO average precision and recall of detections, as tables and files. NumPy and hotcoco only.

Detections travel as COCO results, `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`, with the data
set's own ids and in pixels of the original image, so that any other COCO tool can read what is written here.

A number that has no meaning (the AP of a class without objects, say) is None here and null in the JSON; COCO's own
tools write -1.
"""

import json
from collections.abc import Sequence
from typing import Any, TextIO

import hotcoco
import numpy as np

from fpn_jax.errors import UserError
from fpn_jax.storage import paths

# Places in hotcoco's precision [T R K A M] and recall [T K A M]: IoU .50 : .05 : .95, 101 recalls, classes, areas all
# small medium large, 1 10 100 detections (cocodataset.org/#detection-eval).
_AREAS = {"": 0, "_small": 1, "_medium": 2, "_large": 3}
_LIMITS = {1: 0, 10: 1, 100: 2}
_PRECISIONS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
_RECALLS = ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")


def to_original(boxes: np.ndarray, size: Sequence[int], original_size: Sequence[int]) -> np.ndarray:
    """Take boxes from the resized image back to the original one and clip them to it.

    boxes [d 4] xyxy in pixels of the resized image of `size` (height, width, without padding) -> float32 [d 4] in
    pixels of the image of `original_size`; each axis by its own ratio, as rounding makes them differ.
    """
    (h, w), (original_h, original_w) = np.asarray(size), np.asarray(original_size)
    ratio = np.array([original_w / w, original_h / h] * 2)
    limit = np.array([original_w, original_h] * 2)
    return np.clip(np.asarray(boxes, np.float64).reshape(-1, 4) * ratio, 0, limit).astype(np.float32)


def coco_results(
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    valid: np.ndarray,
    image_id: int,
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """The valid detections of one image as COCO results, in the order given.

    boxes [d 4] xyxy in original pixels, scores [d], labels [d] (0 .. k-1), valid bool [d]; category_ids: label -> the
    data set's id. Boxes keep a thousandth of a pixel, scores all digits of a float32, so that no ties arise.
    """
    keep = np.flatnonzero(np.asarray(valid))
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)[keep]
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).round(3).tolist()
    scores = [float(str(score)) for score in np.asarray(scores, np.float32)[keep]]
    labels = np.asarray(labels)[keep].tolist()
    return [
        {"image_id": int(image_id), "category_id": int(category_ids[label]), "bbox": box, "score": score}
        for box, score, label in zip(xywh, scores, labels, strict=True)
    ]


def coco_metrics(ground_truth: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """COCO's twelve numbers, each 0 .. 1 or None, over all classes; and per class.

    ground_truth is a COCO dict (images, annotations with xywh `bbox`, `area`, `iscrowd`, and categories); images
    without objects count, as their detections are false. Keys: AP, AP50, AP75, AP_small, AP_medium, AP_large, AR1,
    AR10, AR100, AR_small, AR_medium, AR_large, num_images, num_objects (crowds not counted), num_detections, and
    `per_class` {name: {category_id, num_objects, AP, AP50, AR100}} in the order of the ids.

    Raises `UserError` for a result whose image or category the ground truth does not have, or that is not finite.
    """
    check_results(ground_truth, results)
    truth = hotcoco.COCO(ground_truth)
    evaluator = hotcoco.COCOeval(truth, truth.load_res(list(results)), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    accumulated = evaluator.eval  # once: hotcoco makes the arrays anew whenever it is asked
    precision, recall = accumulated["precision"], accumulated["recall"]
    metrics: dict[str, Any] = {
        "AP": known_mean(precision[:, :, :, 0, 2]),
        "AP50": known_mean(precision[0, :, :, 0, 2]),
        "AP75": known_mean(precision[5, :, :, 0, 2]),
    }
    metrics |= {f"AP{area}": known_mean(precision[:, :, :, i, 2]) for area, i in _AREAS.items() if area}
    metrics |= {f"AR{limit}": known_mean(recall[:, :, 0, i]) for limit, i in _LIMITS.items()}
    metrics |= {f"AR{area}": known_mean(recall[:, :, i, 2]) for area, i in _AREAS.items() if area}

    objects = [a for a in ground_truth["annotations"] if not a.get("iscrowd")]
    metrics["num_images"] = len(ground_truth["images"])
    metrics["num_objects"] = len(objects)
    metrics["num_detections"] = len(results)
    counts = dict.fromkeys(evaluator.params.cat_ids, 0)
    for annotation in objects:
        counts[annotation["category_id"]] += 1
    names = _unique_names(ground_truth["categories"])
    metrics["per_class"] = {
        names[category]: {
            "category_id": category,
            "num_objects": counts[category],
            "AP": known_mean(precision[:, :, k, 0, 2]),
            "AP50": known_mean(precision[0, :, k, 0, 2]),
            "AR100": known_mean(recall[:, k, 0, 2]),
        }
        for k, category in enumerate(evaluator.params.cat_ids)
    }
    return metrics


def known_mean(values: np.ndarray) -> float | None:
    """The mean of any array of COCO's; it marks what has no ground truth with -1 and leaves it out of every mean."""
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def _unique_names(categories: Sequence[dict[str, Any]]) -> dict[int, str]:
    """id -> name, with the id added where two categories share a name."""
    names = [category["name"] for category in categories]
    return {c["id"]: c["name"] if names.count(c["name"]) == 1 else f"{c['name']} ({c['id']})" for c in categories}


def check_results(ground_truth: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Raise `UserError` for a result whose image or category the ground truth does not have, or that is not finite."""
    for key, table in (("image_id", "images"), ("category_id", "categories")):
        unknown = {result[key] for result in results} - {row["id"] for row in ground_truth[table]}
        if unknown:
            raise UserError(
                f"detections: {key} {min(unknown)} ({len(unknown)} such ids) is not among the {table} of the "
                "ground truth; score them with the data set and split that they were made from"
            )
    numbers = np.array([(*result["bbox"], result["score"]) for result in results], np.float64).reshape(-1, 5)
    finite = np.isfinite(numbers).all(1)
    if not finite.all():
        raise UserError(
            f"detections: image_id {results[int(finite.argmin())]['image_id']} has a box or score that is not finite; "
            "the weights are broken, use an earlier checkpoint"
        )


def metrics_table(metrics: dict[str, Any], sort: str = "AP", width: int = 110) -> str:
    """The result of `coco_metrics` for the terminal: overall, then per class, in several columns if they are many.

    sort is "AP" (best first, classes without objects last) or "name"; raises ValueError for anything else.
    """
    if sort not in ("AP", "name"):
        raise ValueError(f"sort={sort!r}; use 'AP' or 'name'")
    lines = [
        f"{metrics['num_images']} images, {metrics['num_objects']} objects, {metrics['num_detections']} detections"
    ]
    for keys in (_PRECISIONS, _RECALLS):
        lines += ["", "".join(f"{key:>11}" for key in keys), "".join(f"{number(metrics[key]):>11}" for key in keys)]
    rows = sorted(metrics["per_class"].items())
    if sort == "AP":
        rows.sort(key=lambda row: -1.0 if row[1]["AP"] is None else row[1]["AP"], reverse=True)
    return "\n".join([*lines, "", *_class_table(rows, width)])


def _class_table(rows: list[tuple[str, dict[str, Any]]], width: int) -> list[str]:
    name_width = min(max([5, *(len(name) for name, _ in rows)]), 28)

    def cell(name: str, *values: str) -> str:
        name = name if len(name) <= name_width else name[: name_width - 1] + "…"
        return f"{name:<{name_width}}" + "".join(f"{value:>8}" for value in values)

    head = cell("class", "objects", "AP", "AP50", "AR100")
    cells = [
        cell(name, str(row["num_objects"]), *(number(row[key]) for key in ("AP", "AP50", "AR100")))
        for name, row in rows
    ]
    gap = "   |   "
    most = max(1, (width + len(gap)) // (len(head) + len(gap)))
    columns = 1 if len(cells) <= 20 else min(most, -(-len(cells) // 10))
    height = -(-len(cells) // columns)
    lines = [gap.join([head] * columns)] if cells else []
    return lines + [gap.join(cells[i::height]) for i in range(height)]


def number(value: float | None) -> str:
    """A score as tables show it: three digits, or a dash where it has no meaning."""
    return "-" if value is None else f"{value:.3f}"


def write_results(path: Any, results: Sequence[dict[str, Any]]) -> None:
    """Write COCO results as JSON, see `paths.write_atomically`. Raises `UserError` if that fails."""
    paths.write_atomically(path, lambda file: _dump_results(results, file))


def _dump_results(results: Sequence[dict[str, Any]], file: TextIO) -> None:
    """One detection per line: half a million of them must neither be one line nor one string in memory."""
    file.write("[")
    for i, result in enumerate(results):
        file.write((",\n" if i else "\n") + json.dumps(result, allow_nan=False, separators=(",", ":")))
    file.write("\n]\n")
