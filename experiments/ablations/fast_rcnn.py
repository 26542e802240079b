"""Table 2 of the FPN paper: what Fast R-CNN gains from a pyramid when the proposals are the same for all rows.

    python -m fpn_jax.sweep --config=experiments/ablations/fast_rcnn.py --workdir=runs/fast          # as published
    python -m fpn_jax.sweep --config=experiments/ablations/fast_rcnn.py:scenes --workdir=runs/fast   # on two CPU cores
    python -m fpn_jax.report --workdir=runs/fast

The proposals are those of an RPN on FPN, row (c) of Table 1, which is trained first; to take others, name a file or an
RPN's workdir in --config.base.data.proposals_train= and --config.base.data.proposals_eval=, and leave out `rpn` with
--only=. RoIs are pooled by RoIAlign; --config.base.model.box.pooling=pool takes the paper's maximum.
"""

from typing import Any

from experiments.ablations.bases import BOX_METRICS, ablation, base, c4_conv5, finest_only, row, single_map


def get_config(size: str = "coco") -> Any:
    """Rows (a) to (f)."""
    config = base("fast_rcnn", size)
    config.data.proposals_train = config.data.proposals_eval = "row:rpn"
    if size == "scenes":
        config.data.max_proposals = (300, 200)
    rpn = base("rpn", size)
    train_rpn = {
        "model.detector": "rpn",
        "num_steps": rpn.num_steps,
        "model.rpn.pre_nms_test": rpn.model.rpn.pre_nms_test,
        "model.rpn.post_nms_test": rpn.model.rpn.post_nms_test,
        "data.proposals_train": "",
        "data.proposals_eval": "",
    }
    bottom_up, no_lateral = {"model.neck.top_down": False}, {"model.neck.lateral": False}
    return ablation(
        "Table 2: Fast R-CNN on the same proposals",
        config,
        "fpn",
        {"name": "rpn", "note": "the proposals of all rows", "changes": train_rpn, "in_table": False},
        row("c4", "(a) C4, conv5 as head", c4_conv5(config), BOX_METRICS, 54.7, 31.9, 15.7, 36.5, 45.5),
        row("c5", "(b) C5, two fc layers", single_map(config, 5), BOX_METRICS, 52.9, 28.8, 11.9, 32.4, 43.4),
        row("fpn", "(c) FPN, two fc layers", {}, BOX_METRICS, 56.9, 33.9, 17.8, 37.7, 45.8),
        row("bottom_up", "(d) no top-down pathway", bottom_up, BOX_METRICS, 44.9, 24.9, 10.9, 24.4, 38.5),
        row("no_lateral", "(e) no lateral connections", no_lateral, BOX_METRICS, 54.0, 31.3, 13.3, 35.2, 45.3),
        row("finest", "(f) P2 alone", finest_only(config), BOX_METRICS, 56.3, 33.4, 17.3, 37.3, 45.6),
    )
