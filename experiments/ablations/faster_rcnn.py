"""Table 3 of the FPN paper: Faster R-CNN, RPN and detector trained together on one backbone.

    python -m fpn_jax.sweep --config=experiments/ablations/faster_rcnn.py --workdir=runs/faster          # as published
    python -m fpn_jax.sweep --config=experiments/ablations/faster_rcnn.py:scenes --workdir=runs/faster   # on two cores
    python -m fpn_jax.report --workdir=runs/faster

The paper has rows (a) to (c); (d), without the top-down pathway, is added here. Ours share their features between RPN
and detector, since they are trained jointly; the paper's figures of this table are without sharing.
"""

from typing import Any

from experiments.ablations.bases import BOX_METRICS, ablation, base, c4_conv5, row, single_map


def get_config(size: str = "coco") -> Any:
    """Rows (a) to (c), and the bottom-up pyramid."""
    config = base("faster_rcnn", size)
    return ablation(
        "Table 3: Faster R-CNN",
        config,
        "fpn",
        row("c4", "(a) C4, conv5 as head", c4_conv5(config), BOX_METRICS, 53.1, 31.6, 13.2, 35.6, 47.1),
        row("c5", "(b) C5, two fc layers", single_map(config, 5), BOX_METRICS, 51.7, 28.0, 9.6, 31.9, 43.1),
        row("fpn", "(c) FPN, two fc layers", {}, BOX_METRICS, 56.9, 33.9, 17.8, 37.7, 45.8),
        {"name": "bottom_up", "note": "no top-down pathway", "changes": {"model.neck.top_down": False}},
    )
