"""The neck's switches, one at a time, as region proposal networks.

    python -m fpn_jax.sweep --config=experiments/ablations/neck.py:scenes --workdir=runs/neck [--only=fpn,bilinear]
    python -m fpn_jax.report --workdir=runs/neck

The paper states the choices of section 3 with few figures: no non-linearity in the extra layers and shared heads cost
nothing (sections 3 and 4.1).
"""

from typing import Any

from experiments.ablations.bases import ablation, base


def get_config(size: str = "coco") -> Any:
    """The base and what one switch does to it."""
    config = base("rpn", size)
    channels, rpn = config.model.neck.channels, config.model.rpn
    # Four levels for the five sizes: each has its own and the next, so that the smallest is not lost with its level.
    without_p2 = {
        "model.neck.levels": (3, 4, 5),
        "model.rpn.levels": rpn.levels[1:],
        "model.rpn.sizes": tuple((*rpn.sizes[i], *rpn.sizes[i + 1]) for i in range(len(rpn.sizes) - 1)),
    }
    switches = {
        "bilinear": {"model.neck.upsampling": "bilinear"},
        "transposed": {"model.neck.upsampling": "transposed"},
        "concat": {"model.neck.merge": "concat"},
        "no_smoothing": {"model.neck.smooth": False},
        "relu": {"model.neck.activation": "relu"},
        "group_norm": {"model.neck.norm": "gn"},
        "narrow": {"model.neck.channels": channels // 2, "model.rpn_head.channels": channels},
        "wide": {"model.neck.channels": channels * 2, "model.rpn_head.channels": channels},
        "without_p2": without_p2,
        "separate_heads": {"model.rpn_head.shared": False},
    }
    rows = [{"name": name, "changes": changes} for name, changes in switches.items()]
    return ablation("Switches of the neck", config, "fpn", {"name": "fpn", "changes": {}}, *rows)
