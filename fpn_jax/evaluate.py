"""Score a workdir's detector on a split: COCO AP and AR, written to WORKDIR/eval/SPLIT/.

What differs from the training's own evaluations has a folder of its own beside it, such as SPLIT_step300_tight.

python -m fpn_jax.evaluate --workdir=runs/demo [--split=val] [--dataset=scenes] [--checkpoint=best] [--pictures=8]
"""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from fpn_jax import analysis, cli, common
from fpn_jax.data.datasets import Split
from fpn_jax.errors import UserError
from fpn_jax.propose import open_proposals
from fpn_jax.scoring import Evaluator, metrics_table
from fpn_jax.storage import paths
from fpn_jax.training import checkpoint, sharding
from fpn_jax.training.logs import last_evaluation

_WORKDIR = cli.flag("workdir", str, None, "Folder of the training run.")
_SPLIT = cli.flag("split", str, None, "Split to score; by default the config's data.eval_split.")
_CHECKPOINT = cli.flag("checkpoint", str, "best", "Which weights: best (of the evaluations) or latest.")
_PICTURES = cli.flag("pictures", int, 8, "How many images to draw, ground truth beside predictions.")
_TIGHT = cli.flag("tight", bool, False, "Pad images no further than torchvision does; each size is compiled anew.")
_PROPOSALS = cli.flag("proposals", str, None, "Regions of a Fast R-CNN, by default the config's data.proposals_eval.")
_DATASET = cli.flag("dataset", str, None, "Data set to score on; by default the config's data.dataset.")
_DATA_DIR = cli.flag("data_dir", str, None, "Where the prepared data lies, if not where the training found it.")


def evaluate(
    workdir: str,
    split_name: str | None,
    which: str,
    pictures: int,
    data_dir: str | None,
    dataset: str | None = None,
    tight: bool = False,
    proposals: str | None = None,
) -> dict[str, Any]:
    """Metrics of a workdir's detector on a split, also written and, by process 0, drawn and printed.

    which: "best" or "latest" weights. tight: see `common.pad_tightly`. None stands for what the config says.
    """
    config = ml_collections.ConfigDict(checkpoint.read_config(workdir).to_dict())  # one of before a key may lack it
    config.data.data_dir = data_dir or config.data.data_dir
    config.data.dataset = dataset or config.data.dataset
    with common.together(config, workdir):
        return _evaluate(config, workdir, split_name or config.data.eval_split, which, pictures, tight, proposals)


def _evaluate(
    config: ml_collections.ConfigDict,
    workdir: str,
    split_name: str,
    which: str,
    pictures: int,
    tight: bool,
    proposals: str | None,
) -> dict[str, Any]:
    common.set_up_jax()
    mesh_options = sharding.fitting(common.mesh_options(config))
    mesh = sharding.make_mesh(options=mesh_options)
    sharding.check_batch_size(mesh, config.eval_batch_size, "eval_batch_size")
    classes = common.Classes.read(workdir)
    split = common.open_data(config, split_name, "--split")
    common.check_classes(classes, split, workdir)
    options = common.pipeline_options(config)
    if tight:
        options = common.pad_tightly(options, split.image_sizes)
    detector = common.make_detector(config, classes)
    sharding.check_buckets(mesh, options.buckets, common.STRIDE, detector.coarsest_stride)
    like = common.abstract_variables(detector, options.buckets[0], mesh, mesh_options.shard_params)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        variables, step = checkpoints.restore_weights(like, which)
    regions = None
    if proposals and not detector.needs_proposals:
        raise UserError(f"--proposals={proposals}: {workdir} has a detector that proposes itself; leave it out")
    if detector.needs_proposals:
        given, cache_dir = proposals or config.data.proposals_eval, config.data.get("cache_dir", "")
        regions = open_proposals(given, split, options.max_proposals[1], cache_dir)
    as_trained = last_evaluation(workdir) in (step, None)
    name = folder_name(checkpoint.read_config(workdir), split, None if as_trained else step, tight, proposals)
    evaluator = Evaluator(detector, mesh, split, options, config.eval_batch_size, regions, name)
    folder, first = evaluator.folder(workdir), sharding.process()[0] == 0
    if first:
        paths.check_writable(folder)
    found = evaluator.detect(variables)
    metrics = evaluator.score(found)
    if first:
        print(metrics_table(metrics), flush=True)  # before anything that can fail
    evaluator.write(workdir, found, metrics)
    known = evaluator.analyse(workdir, variables, found)
    if first:
        evaluator.draw(workdir, found, pictures)
        print(analysis.octave_table(known["octaves"]))
        if "errors" in known:
            print(analysis.error_table(known["errors"]))
        print(f"step {step}, {len(split)} images; written to {folder}/")
    return metrics


def folder_name(
    trained: ml_collections.ConfigDict, split: Split, step: int | None, tight: bool, proposals: str | None
) -> str:
    """The split's, and what is otherwise than in the scores that a training leaves in a folder of that name.

    trained: the run's own config. step: of the weights, None of those that the training has scored last.
    """
    parts = [split.split]
    if split.name != trained.data.dataset:
        parts.insert(0, split.name)
    if step is not None:
        parts.append(f"step{step}")
    if tight:
        parts.append("tight")
    if proposals and _place(proposals) != _place(trained.data.get("proposals_eval", "")):
        parts.append(f"on_{Path(proposals).stem}_{zlib.crc32(_place(proposals).encode()):08x}")
    return re.sub(r"[^\w.-]+", "_", "_".join(parts))


def _place(address: str) -> str:
    """The same for all spellings of a path."""
    return address.rstrip("/") if paths.is_remote(address) else str(Path(address).resolve())


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    cli.check_required(workdir=_WORKDIR.value)
    if _PICTURES.value < 0:
        raise UserError(f"--pictures={_PICTURES.value}: give how many to draw, 0 for none")
    where = _DATA_DIR.value, _DATASET.value
    evaluate(_WORKDIR.value, _SPLIT.value, _CHECKPOINT.value, _PICTURES.value, *where, _TIGHT.value, _PROPOSALS.value)


if __name__ == "__main__":
    cli.run(main)
