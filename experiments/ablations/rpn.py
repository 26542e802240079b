"""Table 1 of the FPN paper: what proposals gain from a pyramid, and from each of its parts.

    python -m fpn_jax.sweep --config=experiments/ablations/rpn.py --workdir=runs/rpn          # as published, on COCO
    python -m fpn_jax.sweep --config=experiments/ablations/rpn.py:scenes --workdir=runs/rpn   # small, on two CPU cores
    python -m fpn_jax.report --workdir=runs/rpn

What came out on scenes is in experiments/ablations/RESULTS.md; a run takes about two and a half minutes there.
"""

from typing import Any

from experiments.ablations.bases import PROPOSAL_METRICS, ablation, base, finest_only, row, single_map


def get_config(size: str = "coco") -> Any:
    """Rows (a) to (f); the metric is average recall of 100 and of 1000 proposals."""
    config = base("rpn", size)
    bottom_up, no_lateral = {"model.neck.top_down": False}, {"model.neck.lateral": False}
    return ablation(
        "Table 1: region proposals",
        config,
        "fpn",
        row("c4", "(a) one map, C4", single_map(config, 4), PROPOSAL_METRICS, 36.1, 48.3, 32.0, 58.7, 62.2),
        row("c5", "(b) one map, C5", single_map(config, 5), PROPOSAL_METRICS, 36.3, 44.9, 25.3, 55.5, 64.2),
        row("fpn", "(c) FPN", {}, PROPOSAL_METRICS, 44.0, 56.3, 44.9, 63.4, 66.2),
        row("bottom_up", "(d) no top-down pathway", bottom_up, PROPOSAL_METRICS, 37.4, 49.5, 30.5, 59.9, 68.0),
        row("no_lateral", "(e) no lateral connections", no_lateral, PROPOSAL_METRICS, 34.5, 46.1, 26.5, 57.4, 64.7),
        row("finest", "(f) P2 alone", finest_only(config), PROPOSAL_METRICS, 38.4, 51.3, 35.1, 59.7, 67.6),
    )
