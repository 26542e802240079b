"""A detector over a split: its detections, their score, and pictures of them. `train` and `evaluate` share this."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fpn_jax import evaluation, visualize
from fpn_jax.data.datasets import Split
from fpn_jax.data.decode import decode
from fpn_jax.data.pipeline import PipelineOptions, eval_batches
from fpn_jax.training import sharding


def detect_split(
    detect: Any, variables: dict[str, Any], mesh: Any, split: Split, options: PipelineOptions, batch_size: int
) -> list[dict[str, Any]]:
    """COCO results of every image of the split, on every process: each image once, padding rows never.

    Processes read their own rows and exchange the detections once, at the end.
    """
    rank, world = sharding.process()
    results: list[dict[str, Any]] = []
    pending = None  # detections are read one batch late, so that the device never waits for the host

    def collect(detections: Any, host: dict[str, Any]) -> None:
        found = sharding.local_rows(detections)
        for row in range(len(host["index"])):
            if host["index"][row] < 0:
                continue
            boxes = evaluation.to_original(found.boxes[row], host["size"][row], host["original_size"][row])
            results.extend(
                evaluation.coco_results(
                    boxes,
                    found.scores[row],
                    found.labels[row],
                    found.valid[row],
                    int(host["image_id"][row]),
                    split.category_ids,
                )
            )

    batches = eval_batches(split, options, batch_size, rank=rank, world=world)
    for host in tqdm(batches, f"{split.name} {split.split}", leave=False, disable=rank > 0 or not sys.stderr.isatty()):
        detections = detect(variables, sharding.put_batch(mesh, host))
        if pending:
            collect(*pending)
        pending = detections, host
    if pending:
        collect(*pending)
    gathered = sharding.gather_objects(pickle.dumps(results))
    return [result for part in gathered for result in pickle.loads(part)]


def score_split(workdir: str, split: Split, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of the results; process 0 writes both under WORKDIR/eval/SPLIT/."""
    metrics = evaluation.coco_metrics(split.ground_truth(), results)
    if sharding.process()[0] == 0:
        evaluation.write(workdir, split.split, metrics, results)
    return metrics


def draw_split(workdir: str, split: Split, results: list[dict[str, Any]], count: int) -> None:
    """Ground truth beside predictions for `count` images evenly over the split, and all of them on one page.

    Written to WORKDIR/eval/SPLIT/pictures/ and WORKDIR/eval/SPLIT/overview.jpg.
    """
    if count <= 0:
        return
    by_image = evaluation.detections_by_image(results, split.category_ids)
    none = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, np.int32)}
    folder = Path(workdir) / "eval" / split.split
    pages = []
    for i in np.unique(np.linspace(0, len(split) - 1, count).astype(int)):
        name = str(split.index.file_name[i])
        image = decode(split.source[i]["image"], name, tuple(split.image_sizes[i]))
        found = by_image.get(int(split.index.image_id[i]), none)
        page = visualize.side_by_side(image, split.objects(i), found, split.class_names, caption=name)
        visualize.save(folder / "pictures" / f"{Path(name).stem}.jpg", page)
        pages.append(page)
    visualize.save(folder / "overview.jpg", visualize.contact_sheet(pages, columns=2))
