"""Table 2 of the FPN paper: what Fast R-CNN gains from a pyramid when the proposals are the same for all rows.

    python -m fpn_jax.sweep --config=experiments/ablations/fast_rcnn.py --workdir=runs/fast          # as published
    python -m fpn_jax.sweep --config=experiments/ablations/fast_rcnn.py:scenes --workdir=runs/fast   # on two CPU cores
    python -m fpn_jax.report --workdir=runs/fast

The proposals are those of an RPN on FPN, row (c) of Table 1, which is trained first; to take others, name a file or an
RPN's workdir in --config.base.data.proposals_train= and --config.base.data.proposals_eval=, and leave out `rpn` with
--only=. RoIs are pooled by RoIAlign; --config.base.model.box.pooling=pool takes the paper's maximum.
"""

from typing import Any

from experiments.ablations.bases import ablation, base, finest_only, single_map


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
    # The paper's baseline pools 14 x 14 cells of C4 for conv5; the small backbone's conv5 is one block.
    conv5 = {"name": "conv5", "blocks": len_of_conv5(config), "stride": 2}
    c4 = single_map(config, 4) | {"model.box_head": conv5, "model.box.pooled_size": 14}
    bottom_up = {"model.neck.top_down": False}
    return ablation(
        "Table 2: Fast R-CNN on the same proposals",
        config,
        "fpn",
        {"name": "rpn", "note": "the proposals of all rows", "changes": train_rpn, "in_table": False},
        row("c4", "(a) C4, conv5 as head", c4, 54.7, 31.9, 15.7, 36.5, 45.5),
        row("c5", "(b) C5, two fc layers", single_map(config, 5), 52.9, 28.8, 11.9, 32.4, 43.4),
        row("fpn", "(c) FPN, two fc layers", {}, 56.9, 33.9, 17.8, 37.7, 45.8),
        row("bottom_up", "(d) no top-down pathway", bottom_up, 44.9, 24.9, 10.9, 24.4, 38.5),
        row("no_lateral", "(e) no lateral connections", {"model.neck.lateral": False}, 54.0, 31.3, 13.3, 35.2, 45.3),
        row("finest", "(f) P2 alone", finest_only(config), 56.3, 33.4, 17.3, 37.3, 45.6),
    )


def len_of_conv5(config: Any) -> int:
    """Blocks of the last stage."""
    return config.model.backbone.blocks[3] if config.model.backbone.blocks else 3


def row(name: str, note: str, changes: dict[str, Any], *published: float) -> dict[str, Any]:
    """A row with the paper's figures for it."""
    metrics = ("AP50", "AP", "AP_small", "AP_medium", "AP_large")
    return {"name": name, "note": note, "changes": changes, "published": dict(zip(metrics, published, strict=True))}
