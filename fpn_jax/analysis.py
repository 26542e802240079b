"""What kinds of errors a detector makes, and how good it is at objects of each size. NumPy and hotcoco only."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import hotcoco
import numpy as np

from fpn_jax import evaluation
from fpn_jax.recall import area_recalls, count_objects

# TIDE's kinds of errors (Bolya et al., arXiv 2008.08115): those of false detections, the first that fits; then all.
FALSE_KINDS = ("Loc", "Cls", "Dupe", "Bkg", "Both")
ERRORS = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FP", "FN")
FOREGROUND, BACKGROUND = 0.5, 0.1  # TIDE's IoUs of a hit and of a near miss
EDGES = (8, 16, 32, 64, 128, 256, 512)  # of the octaves, in pixels


class _Matched(NamedTuple):
    """Detections [d], ordered by image and within it by falling score, and objects [m] as COCO matches them at 0.5."""

    category: np.ndarray  # int64 [d]
    score: np.ndarray  # float64 [d]
    counted: np.ndarray  # bool [d], False for what COCO ignores: on a crowd, or beyond 100 of its class in the image
    hit: np.ndarray  # bool [d], has found an object
    object_category: np.ndarray  # int64 [m]
    is_object: np.ndarray  # bool [m], False for crowds
    found: np.ndarray  # bool [m]


def error_types(ground_truth: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """TIDE: what each kind of error costs. {"AP50", "dAP": {kind: ...}, "count": {kind: ...}}.

    A detection that finds nothing at IoU 0.5 is Loc if its best IoU with an object of its class is 0.1 .. 0.5, else Cls
    if an object of another class overlaps it by 0.5 or more, else Dupe if the object that it is on was found already,
    else Bkg if no object overlaps it by more than 0.1, else Both. Miss is an object not found that would not be found
    either if every Loc and Cls were put right. FP are all false detections, FN all objects not found.

    dAP (0 .. 1) is what AP50 would gain if a kind were put right: for each object not found, the best scored of the Loc
    and Cls that aim at it becomes a hit of its class; other Loc and Cls vanish, as do Both, Dupe, Bkg and FP; objects
    of Miss and FN are no longer asked for. AP50 is that of `coco_metrics`. Classes without objects do not count, nor
    do those of which nothing is left to find and nothing is detected; a number is None if no class counts.

    Why not hotcoco's own `tide_errors`: it takes what lies by 0.1 .. 0.5 inside a crowd for Loc, and lets a class
    without any detection add nothing to Miss and FN. Else they agree. Raises `UserError` as `coco_metrics` does.
    """
    evaluation.check_results(ground_truth, results)
    results = sorted(results, key=lambda r: (r["image_id"], -r["score"]))  # so COCO ranks equal scores
    matched = _match(ground_truth, results)
    kind, target = _classify(ground_truth, results, matched)
    missed = matched.is_object & ~matched.found
    unreachable = missed.copy()
    unreachable[target[target >= 0]] = False

    classes, counts = np.unique(matched.object_category[matched.is_object], return_counts=True)
    wanted = dict(zip(classes.tolist(), counts.tolist(), strict=True))
    base = _mean_ap(matched, wanted)
    after = {name: _mean_ap(_mend(matched, kind, target, name), wanted) for name in FALSE_KINDS}
    after["FP"] = _mean_ap(matched._replace(counted=matched.hit), wanted)
    for name, lost in (("Miss", unreachable), ("FN", missed)):
        left = {category: n - int(lost[matched.object_category == category].sum()) for category, n in wanted.items()}
        after[name] = _mean_ap(matched, left)

    count = {name: int((kind == name).sum()) for name in FALSE_KINDS}
    count |= {"Miss": int(unreachable.sum()), "FP": sum(count.values()), "FN": int(missed.sum())}
    gains = {name: None if base is None or after[name] is None else after[name] - base for name in ERRORS}
    return {"AP50": base, "dAP": gains, "count": {name: count[name] for name in ERRORS}}


def _match(ground_truth: dict[str, Any], results: Sequence[dict[str, Any]]) -> _Matched:
    """COCO's matching at FOREGROUND, of results as they are ordered."""
    objects = [annotation | {"id": i} for i, annotation in enumerate(ground_truth["annotations"], 1)]
    truth = hotcoco.COCO(ground_truth | {"annotations": objects})
    evaluator = hotcoco.COCOeval(truth, truth.load_res(list(results)), "bbox")
    evaluator.params.iou_thrs = [FOREGROUND]
    evaluator.params.area_rng, evaluator.params.area_rng_lbl = [[0.0, math.inf]], ["all"]
    evaluator.evaluate()
    counted, hit, found = np.zeros(len(results), bool), np.zeros(len(results), bool), np.zeros(len(objects), bool)
    for cell in filter(None, evaluator.eval_imgs):  # of an image and a class; its ids count from 1
        rows = np.array(cell["dtIds"], np.int64) - 1
        counted[rows] = np.logical_not(cell["dtIgnore"][0])
        hit[rows] = cell["dtMatched"][0]
        found[np.array(cell["gtIds"], np.int64) - 1] = cell["gtMatched"][0]
    return _Matched(
        category=np.array([result["category_id"] for result in results], np.int64),
        score=np.array([result["score"] for result in results], np.float64),
        counted=counted,
        hit=hit & counted,
        object_category=np.array([annotation["category_id"] for annotation in objects], np.int64),
        is_object=np.array([not annotation.get("iscrowd") for annotation in objects], bool),
        found=found,
    )


def _classify(
    ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], matched: _Matched
) -> tuple[np.ndarray, np.ndarray]:
    """kind [d], "" for what is not false; target int64 [d], the object (0 .. m-1) not found that it aims at, or -1."""
    kind, target = np.full(len(results), "", "<U4"), np.full(len(results), -1)
    boxes = np.array([result["bbox"] for result in results], np.float64).reshape(-1, 4)
    object_boxes = np.array([a["bbox"] for a in ground_truth["annotations"]], np.float64).reshape(-1, 4)
    objects_of: dict[int, list[int]] = {}
    for i in np.flatnonzero(matched.is_object).tolist():
        objects_of.setdefault(ground_truth["annotations"][i]["image_id"], []).append(i)
    false_of: dict[int, list[int]] = {}
    for i in np.flatnonzero(matched.counted & ~matched.hit).tolist():
        false_of.setdefault(results[i]["image_id"], []).append(i)

    for image, false in false_of.items():
        objects = np.array(objects_of.get(image, []), np.int64)
        if not objects.size:
            kind[false] = "Bkg"
            continue
        iou = hotcoco.primitives.bbox_iou(boxes[false], object_boxes[objects], [False] * len(objects))
        same = matched.category[false][:, None] == matched.object_category[objects]
        own, other = iou * same, iou * ~same
        conditions = (
            (own.max(1) >= BACKGROUND) & (own.max(1) <= FOREGROUND),
            other.max(1) >= FOREGROUND,
            (own * matched.found[objects]).max(1) >= FOREGROUND,
            iou.max(1) <= BACKGROUND,
        )
        kind[false] = np.select(conditions, FALSE_KINDS[:-1], FALSE_KINDS[-1])
        nearest = np.select(conditions[:2], (objects[own.argmax(1)], objects[other.argmax(1)]), -1)
        target[false] = np.where(matched.found[nearest], -1, nearest)
    return kind, target


def _mend(matched: _Matched, kind: np.ndarray, target: np.ndarray, name: str) -> _Matched:
    """Errors of the kind `name` put right: each object gets the best scored detection that aims at it, others vanish.

    The best of all kinds, as an object can be found only once, whichever kind is mended.
    """
    best = np.zeros(len(kind), bool)
    by_score = np.argsort(-matched.score, kind="stable")
    targets, first = np.unique(target[by_score], return_index=True)
    best[by_score[first[targets >= 0]]] = True
    mended = (kind == name) & best
    category = matched.category.copy()
    category[mended] = matched.object_category[target[mended]]
    counted = matched.counted & ((kind != name) | mended)
    return matched._replace(category=category, counted=counted, hit=matched.hit | mended)


def _mean_ap(matched: _Matched, wanted: dict[int, int]) -> float | None:
    """AP at FOREGROUND over the classes of `wanted`, the number of objects of each; None if no class has anything."""
    precisions = []
    for category, objects in wanted.items():
        rows = matched.counted & (matched.category == category)
        if objects or rows.any():
            precisions.append(hotcoco.metrics.average_precision(matched.score[rows], matched.hit[rows], objects))
    return float(np.mean(precisions)) if precisions else None


def by_octave(
    ground_truth: dict[str, Any], results: np.ndarray | Sequence[dict[str, Any]], proposals: bool
) -> list[dict[str, Any]]:
    """Scores of objects by size: a row for each octave of the root of their `area` that has any, in pixels.

    The octaves are 0 .. 8, 8 .. 16, ... 256 .. 512 and 512 upwards; the lower end belongs to an octave, the upper one
    to the next. Rows are {"from", "to" (None: no end), "num_objects"} and, of detections, AP, AP50 and AR100 over
    classes; of proposals AR100 and AR1000 whatever their class (`fpn_jax.recall`, which says how they may come). The
    scores are COCO's for such a range of areas: other objects are ignored, and so are detections that find nothing and
    whose box is of another size. Raises `UserError` as `coco_metrics` and `proposal_metrics` do.
    """
    ends = [0, *EDGES, None]
    rows, areas = [], []
    for low, high in pairwise(ends):
        # COCO's ranges include both ends: the upper one is the last number below the next octave.
        area = (float(low**2), math.inf if high is None else math.nextafter(high**2, 0))
        objects = count_objects(ground_truth["annotations"], area)
        if objects:
            rows.append({"from": low, "to": high, "num_objects": objects})
            areas.append(area)
    if proposals:
        recalls = area_recalls(ground_truth, results, areas, (100, 1000))
        return [row | {"AR100": few, "AR1000": many} for row, (few, many) in zip(rows, recalls, strict=True)]
    return [row | scores for row, scores in zip(rows, _area_scores(ground_truth, results, areas), strict=True)]


def _area_scores(
    ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], areas: list[tuple[float, float]]
) -> list[dict[str, float | None]]:
    evaluation.check_results(ground_truth, results)
    if not areas:
        return []
    truth = hotcoco.COCO(ground_truth)
    evaluator = hotcoco.COCOeval(truth, truth.load_res(list(results)), "bbox")
    evaluator.params.area_rng = [list(area) for area in areas]
    evaluator.params.area_rng_lbl = [str(i) for i in range(len(areas))]
    evaluator.params.max_dets = [100]
    evaluator.evaluate()
    evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    return [
        {
            "AP": evaluation.known_mean(precision[:, :, :, i, 0]),
            "AP50": evaluation.known_mean(precision[0, :, :, i, 0]),
            "AR100": evaluation.known_mean(recall[:, :, i, 0]),
        }
        for i in range(len(areas))
    ]


def error_table(errors: dict[str, Any]) -> str:
    """The result of `error_types` for the terminal."""
    lines = [f"AP50 {evaluation.number(errors['AP50'])}, and what it would gain without each kind of error (TIDE)", ""]
    lines += [" " * 5 + "".join(f"{name:>9}" for name in ERRORS)]
    lines += ["dAP  " + "".join(f"{evaluation.number(errors['dAP'][name]):>9}" for name in ERRORS)]
    lines += ["count" + "".join(f"{errors['count'][name]:>9}" for name in ERRORS)]
    return "\n".join(lines)


def octave_table(octaves: Sequence[dict[str, Any]]) -> str:
    """The result of `by_octave` for the terminal, a line for each octave; empty without any."""
    if not octaves:
        return ""
    keys = [key for key in octaves[0] if key not in ("from", "to", "num_objects")]
    lines = [f"{'size, px':<10}{'objects':>9}" + "".join(f"{key:>9}" for key in keys)]
    for row in octaves:
        size = f"{row['from']} ..." if row["to"] is None else f"{row['from']} .. {row['to']}"
        scores = "".join(f"{evaluation.number(row[key]):>9}" for key in keys)
        lines.append(f"{size:<10}{row['num_objects']:>9}{scores}")
    return "\n".join(lines)
