"""The four pyramids of the FPN paper's figure 1, as region proposal networks.

    python -m fpn_jax.sweep --config=experiments/ablations/pyramids.py:scenes --workdir=runs/pyramids
    python -m fpn_jax.report --workdir=runs/pyramids

(a) takes C4 of the image at four sizes, from twice to a quarter of its own, as levels 3 to 6: level 2 would ask for
four times its sides. (a) and (c) have four levels for the five anchor sizes, and two sizes on each.
"""

from typing import Any

from experiments.ablations.bases import ablation, base, single_map


def get_config(size: str = "coco") -> Any:
    """Rows (a) to (d) of the figure."""
    config = base("rpn", size)
    sizes = config.model.rpn.sizes
    # Four levels for the five sizes of the pyramid: each has its own and the next, so that none is lost.
    two_each = tuple((*sizes[i], *sizes[i + 1]) for i in range(len(sizes) - 1))
    image_pyramid = {
        "model.backbone.last_level": 4,
        "model.image_pyramid.level": 4,
        "model.image_pyramid.scales": (2.0, 1.0, 0.5, 0.25),
        "model.neck": {"name": "none"},
        "model.rpn_head.channels": 2 * config.model.neck.channels,
        "model.rpn.levels": (3, 4, 5, 6),
        "model.rpn.sizes": two_each,
    }
    hierarchy = {
        "model.neck": {"name": "none"},
        "model.rpn_head.shared": False,  # the maps differ in channels
        "model.rpn_head.channels": config.model.neck.channels,
        "model.rpn.levels": (2, 3, 4, 5),
        "model.rpn.sizes": two_each,
    }
    return ablation(
        "Figure 1: four ways to a pyramid",
        config,
        "fpn",
        {"name": "image_pyramid", "note": "(a) C4 of the image at four sizes", "changes": image_pyramid},
        {"name": "single", "note": "(b) one map, C4", "changes": single_map(config, 4)},
        {"name": "hierarchy", "note": "(c) C2 to C5 as they are", "changes": hierarchy},
        {"name": "fpn", "note": "(d) FPN", "changes": {}},
    )
