"""Save an RPN's proposals for all images of a split, for a Fast R-CNN to be trained or tested on.

python -m fpn_jax.propose --workdir=runs/rpn --split=train --output=proposals_train.npz [--most=2000]

Training does this by itself where `config.data.proposals_train` names an RPN's workdir.
"""

import os
from collections.abc import Sequence
from typing import Any

import ml_collections

from fpn_jax import cli, common
from fpn_jax.data.datasets import Split
from fpn_jax.data.proposals import ProposalTable
from fpn_jax.errors import UserError
from fpn_jax.given_proposals import read_proposals
from fpn_jax.scoring import Evaluator
from fpn_jax.storage import mirror, paths
from fpn_jax.training import checkpoint, sharding

_WORKDIR = cli.flag("workdir", str, None, "Folder of an RPN's training run.")
_SPLIT = cli.flag("split", str, None, "Split to make proposals for; by default the config's data.eval_split.")
_DATASET = cli.flag("dataset", str, None, "Data set; by default the config's data.dataset.")
_DATA_DIR = cli.flag("data_dir", str, None, "Where the prepared data lies, if not where the training found it.")
_CHECKPOINT = cli.flag("checkpoint", str, "best", "Which weights: best (of the evaluations) or latest.")
_MOST = cli.flag("most", int, 1000, "Proposals of an image at most.")
_OUTPUT = cli.flag("output", str, None, "The file to write, .npz.")


def propose(workdir: str, split: Split, path: Any, most: int, which: str = "best") -> None:
    """Write the best `most` proposals of every image of the split by the workdir's RPN; process 0 does.

    NMS sees as many of each level, at least. Raises `UserError` if the workdir's detector proposes nothing.
    """
    config = ml_collections.ConfigDict(checkpoint.read_config(workdir).to_dict())
    if config.model.rpn.pre_nms_test:  # 0: all
        config.model.rpn.pre_nms_test = max(config.model.rpn.pre_nms_test, most)
    config.model.rpn.post_nms_test = most
    mesh_options = sharding.fitting(common.mesh_options(config))
    mesh = sharding.make_mesh(options=mesh_options)
    sharding.check_batch_size(mesh, config.eval_batch_size, f"eval_batch_size in {workdir}/config.json")
    options = common.pipeline_options(config)
    detector = common.make_detector(config, common.Classes.read(workdir))
    if not detector.class_agnostic:
        kind = config.model.get("detector", "faster_rcnn")
        raise UserError(f"{workdir} is no RPN but a {kind}: give the workdir of model.detector=rpn")
    sharding.check_buckets(mesh, options.buckets, common.STRIDE, detector.coarsest_stride)
    like = common.abstract_variables(detector, options.buckets[0], mesh, mesh_options.shard_params)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        variables, _ = checkpoints.restore_weights(like, which)
    evaluator = Evaluator(detector, mesh, split, options, config.eval_batch_size)
    found = evaluator.detect(variables)
    if sharding.process()[0] == 0:
        evaluator.write_proposals(path, found)
    sharding.wait_for_all(f"proposals of {split.name} {split.split}")


def open_proposals(address: str, split: Split, most: int, cache_dir: str = "") -> ProposalTable:
    """The proposals of a split that `config.data.proposals_train` or `_eval` names: a file's, or an RPN workdir's.

    A workdir's are computed once for each split, checkpoint and number, and kept in WORKDIR/proposals/. Those on gs://
    are copied below `cache_dir`, see `mirror`. Raises `UserError` if the address is empty, or what it names cannot give
    the split's proposals.
    """
    if not address:
        raise UserError(
            "data.proposals_train or data.proposals_eval is empty: model.detector=fast_rcnn needs regions; give a file "
            "of proposals or the workdir of an RPN"
        )
    if not paths.path(address).is_dir():
        return read_proposals(mirror.fetched(address, cache_dir))
    checkpoint.read_config(address)  # else it is no run at all
    with checkpoint.Checkpoints(address) as checkpoints:
        step = checkpoints.chosen_step("best")
    name = f"{split.name.replace('/', '_')}_{split.split}_step{step}_{most}.npz"
    path = paths.path(address) / "proposals" / name
    # A run that was made anew in its old place has newer weights of the same step.
    weights = max(paths.modified(paths.path(address) / folder) for folder in ("best", "checkpoints"))
    if not path.exists() or paths.modified(path) < weights:
        propose(address, split, path, most)
    return read_proposals(mirror.fetched(os.fspath(path), cache_dir))


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    cli.check_required(workdir=_WORKDIR.value, output=_OUTPUT.value)
    if not _OUTPUT.value.endswith(".npz") or _MOST.value < 1:
        raise UserError(f"--output={_OUTPUT.value} must end in .npz, and --most={_MOST.value} be at least 1")
    config = ml_collections.ConfigDict(checkpoint.read_config(_WORKDIR.value).to_dict())
    config.data.data_dir = _DATA_DIR.value or config.data.data_dir
    config.data.dataset = _DATASET.value or config.data.dataset
    with common.together(config, _WORKDIR.value):
        common.set_up_jax()
        split = common.open_data(config, _SPLIT.value or config.data.eval_split, "--split")
        propose(_WORKDIR.value, split, paths.path(_OUTPUT.value), _MOST.value, _CHECKPOINT.value)
    images = f"{len(split)} images of {split.name} {split.split}"
    print(f"proposals of {images}, at most {_MOST.value} each: {_OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
