"""Which objects the positive anchors of an ablation's rows belong to: the share of each octave of object size.

    python -m benchmarks.positive_anchors --config=experiments/ablations/rpn.py:scenes

No training: anchors and objects of the evaluation split decide. Where one row's positives are nearly all of large
objects, the loss hardly sees the small ones.
"""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from fpn_jax import cli, common
from fpn_jax.data.pipeline import eval_batches
from fpn_jax.models import build_detector
from fpn_jax.models.heads import rpn
from fpn_jax.models.rpn import RPN
from fpn_jax.sweep import check_rows
from fpn_jax.variants import changed

_CONFIG = cli.config_flag()
EDGES = (8, 16, 32, 64, 128)  # pixels of sqrt(area) in the resized image; open below and above


def positives(settings: rpn.RPNSettings, batches: Sequence[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(objects, positive anchors) by octave, both [len(EDGES) + 1], over batches of one image each."""
    objects, anchors_of = np.zeros(len(EDGES) + 1), np.zeros(len(EDGES) + 1)

    @functools.partial(jax.jit, static_argnums=0)
    def matched(image_size, boxes, valid):
        grids = {level: tuple(-(-side // 2**level) for side in image_size) for level in settings.levels}
        return rpn.match_anchors(settings, rpn.anchor_grids(settings, grids, image_size), boxes, valid)

    for batch in batches:
        boxes, valid = batch["boxes"][0], batch["valid"][0]
        found = np.asarray(matched(batch["image"].shape[1:3], boxes, valid))
        count = np.bincount(found[found >= 0], minlength=len(boxes))[valid]
        sides = np.sqrt(np.prod(boxes[valid, 2:] - boxes[valid, :2], axis=1))
        octave = np.searchsorted(EDGES, sides, side="right")
        np.add.at(objects, octave, 1)
        np.add.at(anchors_of, octave, count)
    return objects, anchors_of


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    del argv
    config = _CONFIG.value
    split, options = common.open_data(config.base, config.base.data.eval_split), common.pipeline_options(config.base)
    batches = list(eval_batches(split, options, 1))
    heads = [f"..{EDGES[0]}", *(f"{a}..{2 * a}" for a in EDGES[:-1]), f"{EDGES[-1]}.."]
    print(f"{'share, percent':<18}" + "".join(f"{head:>9}" for head in heads) + "   positives an image")
    for name, row in check_rows(config).items():
        detector = build_detector(changed(config.base, row["changes"], name).model, len(split.class_names))
        if not isinstance(detector, RPN):
            continue
        objects, anchors_of = positives(detector.rpn_settings, batches)
        shares = "".join(f"{share:>9.1f}" for share in 100 * anchors_of / anchors_of.sum())
        print(f"{name:<18}{shares}{anchors_of.sum() / len(batches):>15.1f}")
    print(f"{'(objects)':<18}" + "".join(f"{share:>9.1f}" for share in 100 * objects / objects.sum()))


if __name__ == "__main__":
    cli.run(main)
