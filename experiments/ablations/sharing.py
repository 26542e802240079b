"""Table 5 of the FPN paper: does it help to share the features between RPN and detector?

    python -m fpn_jax.sweep --config=experiments/ablations/sharing.py:scenes --workdir=runs/sharing
    python -m fpn_jax.report --workdir=runs/sharing

`alternating` is the paper's four-step training (Ren et al., arXiv 1506.01497, section 3.2), `separate` its first two
steps, a Fast R-CNN on the proposals of an RPN that shares nothing with it, `joint` trains both at once. The steps are
not the same for all: four runs make `alternating`, two `separate`, as in the paper, and `joint` is one.
"""

from typing import Any

from experiments.ablations.bases import ablation, base
from experiments.faster_rcnn_r50_fpn_4step import stages


def get_config(size: str = "coco") -> Any:
    """Without sharing, with sharing by alternating training, and by joint training."""
    config = base("faster_rcnn", size)
    rpn_steps, box_steps = base("rpn", size).num_steps, base("fast_rcnn", size).num_steps
    most = {"scenes": (300, 200)}.get(size, (2000, 1000))
    train_rpn = {"model.detector": "rpn", "num_steps": rpn_steps}
    on_rpn = {
        "model.detector": "fast_rcnn",
        "num_steps": box_steps,
        "data.proposals_train": "row:rpn",
        "data.proposals_eval": "row:rpn",
        "data.max_proposals": most,
    }
    alternating = {"stages": stages(rpn_steps, box_steps, most)}
    published = ({"AP50": 56.9, "AP": 33.9}, {"AP50": 57.2, "AP": 34.3})
    return ablation(
        "Table 5: sharing features",
        config,
        "separate",
        {"name": "rpn", "note": "the proposals of `separate`", "changes": train_rpn, "in_table": False},
        {"name": "separate", "note": "no sharing", "changes": on_rpn, "published": published[0]},
        {"name": "alternating", "note": "shared, four steps", "changes": alternating, "published": published[1]},
        {"name": "joint", "note": "shared, trained at once", "changes": {}},
    )
