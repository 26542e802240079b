"""pycocotools, which the tests of `evaluation`, `recall` and `analysis` compare with, and random cases for it."""

import contextlib
import copy
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def pycocotools(ground_truth, results, **params):
    """A COCOeval that has evaluated and accumulated, its params changed as named."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        if len(results):
            found = truth.loadRes(copy.deepcopy(results))
        else:  # loadRes cannot do without
            found = COCO()
            found.dataset = copy.deepcopy(ground_truth) | {"annotations": []}
            found.createIndex()
        evaluator = COCOeval(truth, found, "bbox")
        for name, value in params.items():
            setattr(evaluator.params, name, value)
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def mean(values):
    """None for its -1."""
    return None if (values == -1).all() else values[values > -1].mean()


def random_case(rng, areas=(32.0**2, 96.0**2)):
    """Crowds, ties of scores, areas on borders, images without objects, a class without any."""
    categories = [{"id": 3 * i + 2, "name": f"class {i}"} for i in range(rng.integers(1, 5))]
    images = [
        {"id": 7 * i + 1, "height": 300, "width": 400, "file_name": f"{i}.jpg"} for i in range(rng.integers(1, 7))
    ]
    ids = [category["id"] for category in categories]
    annotations, results = [], []
    for image in images:
        for _ in range(rng.integers(0, 7)):
            box = np.array([*rng.uniform(0, 200, 2), *np.exp(rng.uniform(1, 5.3, 2))]).round(rng.integers(0, 3))
            area = float(rng.choice([box[2] * box[3], 0.6 * box[2] * box[3], *areas]))
            ours = {"image_id": image["id"], "category_id": int(rng.choice(ids[: max(1, len(ids) - 1)]))}
            annotations.append(ours | {"id": len(annotations) + 1, "bbox": box.tolist(), "area": area})
            annotations[-1]["iscrowd"] = int(rng.random() < 0.2)
            for _ in range(rng.integers(0, 4)):
                moved = box + rng.normal(0, 0.1, 4) * box[[2, 3, 2, 3]] * rng.integers(0, 2)
                category = ours["category_id"] if rng.random() < 0.8 else int(rng.choice(ids))
                score = round(rng.random(), 1)
                found = {"category_id": category, "bbox": [*moved[:2], *np.abs(moved[2:])], "score": score}
                results.append(ours | found)
        for _ in range(rng.integers(100, 130) if rng.random() < 0.2 else 0):  # more than COCO's 100 per image
            box, score = rng.uniform(0, 200, 4).tolist(), round(rng.random(), 2)
            results.append({"image_id": image["id"], "category_id": ids[0], "bbox": box, "score": score})
    rng.shuffle(results)
    return {"images": images, "annotations": annotations, "categories": categories}, results
