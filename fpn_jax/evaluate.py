"""Score a workdir's detector on a split: COCO AP and AR, written to WORKDIR/eval/SPLIT/.

python -m fpn_jax.evaluate --workdir=runs/demo [--split=val] [--checkpoint=best] [--pictures=8]
"""

from collections.abc import Sequence

from absl import flags

from fpn_jax import cli, common, evaluation
from fpn_jax.scoring import detect_split, draw_split, score_split
from fpn_jax.training import checkpoint, sharding
from fpn_jax.training.step import make_detect

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the training run.")
_SPLIT = flags.DEFINE_string("split", None, "Split to score; by default the config's data.eval_split.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "Which weights: best (of the evaluations) or latest.")
_PICTURES = flags.DEFINE_integer("pictures", 8, "How many images to draw, ground truth beside predictions.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Where the prepared data lies, if not where the training found it.")


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    cli.check_required(workdir=_WORKDIR.value)
    workdir = _WORKDIR.value
    sharding.start_processes()
    config = checkpoint.read_config(workdir)
    if _DATA_DIR.value:
        config.data.data_dir = _DATA_DIR.value
    common.set_up_jax()
    mesh = sharding.make_mesh()
    sharding.check_batch_size(mesh, config.eval_batch_size, "eval_batch_size")
    classes = common.Classes.read(workdir)
    split = common.open_data(config, _SPLIT.value or config.data.eval_split)
    common.check_classes(classes, split, workdir)
    options = common.pipeline_options(config)
    detector = common.make_detector(config, classes)
    like = common.abstract_variables(detector, options.buckets[0], sharding.replicated(mesh))
    with checkpoint.Checkpoints(workdir) as checkpoints:
        variables, step = checkpoints.restore_weights(like, _CHECKPOINT.value)
    results = detect_split(make_detect(detector), variables, mesh, split, options, config.eval_batch_size)
    metrics = score_split(workdir, split, results)
    if sharding.process()[0] == 0:
        draw_split(workdir, split, results, _PICTURES.value)
        print(evaluation.metrics_table(metrics))
        print(f"step {step}, {len(split)} images; written to {workdir}/eval/{split.split}/")


if __name__ == "__main__":
    cli.run(main)
