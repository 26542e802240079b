"""A detector over a split: what it finds, its score, and pictures; `train`, `evaluate` and `propose` share this."""

import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from fpn_jax import analysis, evaluation, recall, visualize
from fpn_jax.data import proposals as proposal_files
from fpn_jax.data.datasets import Split
from fpn_jax.data.decode import decode
from fpn_jax.data.pipeline import PipelineOptions, eval_batches
from fpn_jax.data.proposals import ProposalTable
from fpn_jax.models.detector import Detector
from fpn_jax.storage import paths
from fpn_jax.training import peers, sharding
from fpn_jax.training.step import make_detect, make_level_counts

_COUNTED = 500  # images whose objects and proposals are counted by level: enough for shares, and soon done
_DRAWN = 20  # proposals of an image on a picture, the best


def metrics_table(metrics: dict[str, Any]) -> str:
    """Metrics of any detector for the terminal."""
    return recall.proposal_table(metrics) if "AR1000" in metrics else evaluation.metrics_table(metrics)


class Found(NamedTuple):
    """One image's detections, best first."""

    image_id: int
    boxes: np.ndarray  # float32 [d 4], xyxy in pixels of the original image
    scores: np.ndarray  # float32 [d]
    labels: np.ndarray  # int32 [d]


@dataclass(frozen=True)
class Evaluator:
    """A detector and a split to run it on; `proposals` are the regions of a Fast R-CNN.

    name: of the folder below WORKDIR/eval that everything is written to; by default the split's.
    """

    detector: Detector
    mesh: Any
    split: Split
    options: PipelineOptions
    batch_size: int
    proposals: ProposalTable | None = None
    name: str = ""

    def folder(self, workdir: str) -> Any:
        """WORKDIR/eval/NAME."""
        return paths.path(workdir) / "eval" / (self.name or self.split.split)

    @property
    def main_metric(self) -> str:
        """The number that tells which weights are best."""
        return "AR1000" if self.detector.class_agnostic else "AP"

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        """Those for a line of the log."""
        ar = ("AR100", "AR1000", "AR1000_small", "AR1000_medium", "AR1000_large")
        return ar if self.detector.class_agnostic else ("AP", "AP50", "AP75", "AR100")

    def detect(self, variables: dict[str, Any]) -> list[Found]:
        """What is found in every image of the split, on every process: each image once, padding rows never.

        Processes read their own rows and exchange the detections once, at the end.
        """
        mine: list[Found] = []
        pending = None  # detections are read one batch late, so that the device never waits for the host

        def collect(detections: Any, host: dict[str, Any]) -> None:
            rows = sharding.local_rows(detections)
            for row in np.flatnonzero(host["index"] >= 0):
                valid = rows.valid[row]
                boxes = evaluation.to_original(rows.boxes[row][valid], host["size"][row], host["original_size"][row])
                mine.append(Found(int(host["image_id"][row]), boxes, rows.scores[row][valid], rows.labels[row][valid]))

        for host in self._batches():
            detections = self._detect(variables, sharding.put_batch(self.mesh, host))
            if pending:
                collect(*pending)
            pending = detections, host
        if pending:
            collect(*pending)
        if sharding.process()[1] == 1:
            return mine
        return [found for part in sharding.gather_objects(pickle.dumps(mine)) for found in pickle.loads(part)]

    def score(self, found: list[Found]) -> dict[str, Any]:
        """Metrics of what was found."""
        truth, results = self.split.ground_truth(), self.results(found)
        if self.detector.class_agnostic:
            return recall.proposal_metrics(truth, results)
        return evaluation.coco_metrics(truth, results)

    def write(self, workdir: str, found: list[Found], metrics: dict[str, Any]) -> None:
        """Process 0 writes the metrics and what was found into `folder`."""
        if sharding.process()[0] != 0:
            return
        folder = self.folder(workdir)
        if self.detector.class_agnostic:
            self.write_proposals(folder / "proposals.npz", found)
        else:
            evaluation.write_results(folder / "detections.json", self.results(found))
        paths.write_json(folder / "metrics.json", metrics)

    def results(self, found: list[Found]) -> Any:
        """As COCO results; proposals as an array float64 [n 6], see `fpn_jax.recall`."""
        if self.detector.class_agnostic:
            rows = [np.zeros((0, 6))]
            for image in found:
                sides = image.boxes[:, 2:] - image.boxes[:, :2]
                ids = np.full((len(sides), 1), image.image_id, np.float64)
                rows.append(np.concatenate([ids, image.boxes[:, :2], sides, image.scores[:, None]], 1))
            return np.concatenate(rows)
        ids = self.split.category_ids
        return [
            result
            for x in found
            for result in evaluation.coco_results(x.boxes, x.scores, x.labels, x.scores >= 0, x.image_id, ids)
        ]

    def write_proposals(self, path: Path, found: list[Found]) -> None:
        """What was found as a compact file of proposals."""
        table = ProposalTable.from_lists(
            [x.image_id for x in found], [x.boxes for x in found], [x.scores for x in found], str(path)
        )
        sizes = dict(zip(self.split.index.image_id.tolist(), self.split.image_sizes.tolist(), strict=True))
        proposal_files.write(path, table, sizes)

    def analyse(self, workdir: str, variables: dict[str, Any], found: list[Found]) -> dict[str, Any]:
        """Errors by kind, scores by octave of size, counts by level; process 0 writes analysis.json into `folder`.

        Levels are counted on the first images of the split only.
        """
        levels = self.count_levels(variables)
        if sharding.process()[0] != 0:
            return {}
        truth, results = self.split.ground_truth(), self.results(found)
        agnostic = self.detector.class_agnostic
        known: dict[str, Any] = {} if agnostic else {"errors": analysis.error_types(truth, results)}
        known |= {"octaves": analysis.by_octave(truth, results, agnostic), "levels": levels}
        paths.write_json(self.folder(workdir) / "analysis.json", known)
        return known

    def count_levels(self, variables: dict[str, Any]) -> dict[str, Any]:
        """{"rpn": {"levels", "images", "objects", "proposals"}, "box": {"levels", "images", "objects", "rois"}}."""
        images, total = 0, None
        world = sharding.process()[1]
        for host in self._batches():
            counts = sharding.local_rows(self._counts(variables, sharding.put_batch(self.mesh, host)))
            real = host["index"] >= 0
            counts = {part: {name: x[real].sum(0) for name, x in of.items()} for part, of in counts.items()}
            images += int(real.sum())
            total = counts if total is None else _added(total, counts)
            if images * world >= _COUNTED:
                break
        parts = [pickle.loads(part) for part in sharding.gather_objects(pickle.dumps((images, total)))]
        for _, other in parts[1:]:
            parts[0] = (parts[0][0], _added(parts[0][1], other))
        images = sum(n for n, _ in parts)
        return {
            part: {"levels": list(self.detector.counted_levels[part]), "images": images}
            | {name: x.tolist() for name, x in of.items()}
            for part, of in parts[0][1].items()
        }

    def draw(self, workdir: str, found: list[Found], count: int) -> None:
        """Ground truth beside what was found for `count` images evenly over the split, and all of them on one page.

        Written into `folder`, as pictures/ and overview.jpg.
        """
        if count <= 0:
            return
        split = self.split
        by_image = {x.image_id: x for x in found}
        folder = self.folder(workdir)
        pages = []
        for i in np.unique(np.linspace(0, len(split) - 1, count).astype(int)):
            name = str(split.index.file_name[i])
            image = decode(split.source[i]["image"], name, tuple(split.image_sizes[i]))
            mine, objects, names = by_image[int(split.index.image_id[i])], split.objects(i), split.class_names
            most = len(mine.scores)
            if self.detector.class_agnostic:
                objects, names, most = objects | {"labels": 0 * objects["labels"]}, ["object"], _DRAWN
            shown = {"boxes": mine.boxes[:most], "scores": mine.scores[:most], "labels": mine.labels[:most]}
            page = visualize.side_by_side(image, objects, shown, names, caption=name)
            visualize.save(folder / "pictures" / f"{Path(name).stem}.jpg", page)
            pages.append(page)
        visualize.save(folder / "overview.jpg", visualize.contact_sheet(pages, columns=2))

    @cached_property
    def _detect(self) -> Any:
        return make_detect(self.detector, self.mesh)

    @cached_property
    def _counts(self) -> Any:
        return make_level_counts(self.detector, self.mesh)

    def _batches(self) -> Iterator[dict[str, Any]]:
        rank, world = sharding.process()
        split, size = self.split, self.batch_size
        batches = eval_batches(split, self.options, size, rank=rank, world=world, proposals=self.proposals)
        quiet = rank > 0 or not sys.stderr.isatty()
        for batch in tqdm(batches, f"{split.name} {split.split}", leave=False, disable=quiet):
            peers.at("evaluating")
            yield batch


def _added(one: dict[str, dict[str, np.ndarray]], other: dict[str, dict[str, np.ndarray]]) -> Any:
    return {part: {name: x + other[part][name] for name, x in of.items()} for part, of in one.items()}
