"""COCO metrics of the detections of 5000 images against pycocotools: seconds.

    python -m benchmarks.evaluation [--quick]

Made-up ground truth and detections of COCO's proportions: 80 classes, 7 objects an image on average, up to 100
detections an image, most of them near an object. Metrics alone: from a COCO dict and a list of results, which both
sides are given, to the twelve numbers; the per-class numbers, which pycocotools does not give, are made within our
time. The twelve numbers must be equal to 1e-6, which is seen before anything is timed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import record, sides, timing
from benchmarks.sides import CHECKED, OURS
from benchmarks.timing import Made, Program, Side
from fpn_jax import cli
from fpn_jax.evaluation import coco_metrics

PEER = "pycocotools"
TARGET, TOLERANCE = 20.0, 1e-6
KEYS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
KEYS += ("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")  # in the order of pycocotools' stats


def made_up(seed: int, images: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(COCO ground truth, COCO results)."""
    rng = np.random.default_rng(seed)
    categories = [{"id": i + 1, "name": f"class {i}"} for i in range(80)]
    rows = [{"id": i + 1, "height": 480, "width": 640, "file_name": f"{i}.jpg"} for i in range(images)]
    annotations, results = [], []
    for image in rows:
        count = rng.poisson(7.3)
        sides_of = np.exp(rng.uniform(np.log(8), np.log(320), (count, 2)))
        boxes = np.concatenate([rng.uniform(0, (640, 480), (count, 2)), sides_of], 1)
        classes, crowd = rng.integers(1, 81, count), rng.random(count) < 0.01
        annotations += [
            {"image_id": image["id"], "category_id": c, "bbox": b, "area": 0.6 * b[2] * b[3], "iscrowd": int(k)}
            for c, b, k in zip(classes.tolist(), boxes.tolist(), crowd.tolist(), strict=True)
        ]
        found = rng.integers(0, 101)
        near = rng.integers(0, max(count, 1), found)
        if count:
            moved = boxes[near] + rng.normal(0, 0.15, (found, 4)) * np.tile(sides_of[near], 2)
            of_class = np.where(rng.random(found) < 0.7, classes[near], rng.integers(1, 81, found))
        else:
            moved, of_class = rng.uniform(10, 300, (found, 4)), rng.integers(1, 81, found)
        moved[:, 2:] = np.abs(moved[:, 2:])
        results += [
            {"image_id": image["id"], "category_id": c, "bbox": b, "score": s}
            for c, b, s in zip(of_class.tolist(), moved.round(3).tolist(), rng.random(found).tolist(), strict=True)
        ]
    for i, annotation in enumerate(annotations):
        annotation["id"] = i + 1
    return {"images": rows, "annotations": annotations, "categories": categories}, results


def ours(images: int) -> Made:
    """Our side."""
    return Made({"metrics": Program(lambda seed: made_up(seed, images), lambda given: coco_metrics(*given), _numbers)})


def theirs(images: int) -> Made:
    """pycocotools' side, as its own demo runs it."""
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def run(given: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = given[0]
            truth.createIndex()
            evaluator = COCOeval(truth, truth.loadRes(given[1]), "bbox")
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return dict(zip(KEYS, evaluator.stats.tolist(), strict=True))

    return Made({"metrics": Program(lambda seed: made_up(seed, images), run, _numbers)})


def _numbers(metrics: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {key: np.float64(-1 if metrics[key] is None else metrics[key]) for key in KEYS}


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    recorder, images = record.Recorder("evaluation"), 200 if sides.QUICK.value else 5000
    every = {OURS: Side("benchmarks.evaluation:ours", {"images": images})}
    if record.have(PEER):
        every[PEER] = Side("benchmarks.evaluation:theirs", {"images": images})
    with timing.started(every) as running:
        if PEER in running:
            found, expected = (running[name].outputs("metrics", CHECKED) for name in (OURS, PEER))
            for key, value in expected.items():
                np.testing.assert_allclose(found[key], value, rtol=0, atol=TOLERANCE, err_msg=key)
        times = timing.take_turns(running, "metrics", sides.repeats(2), warm_up=0)  # what was compared warmed up
    what = f"{images} images, {len(made_up(CHECKED, images)[1])} detections"
    seconds = {name: timing.summary([x.wall for x in values]) for name, values in times.items()}
    notes = [] if PEER in seconds else ["pycocotools is not installed: ours alone. `make test` installs it"]
    lines = [record.faster(what, "s", seconds[OURS], seconds.get(PEER), PEER, TARGET)]
    recorder.finish("cpu", lines, {}, sides.folder(), notes)


if __name__ == "__main__":
    cli.run(main)
