"""torchvision's fasterrcnn_mobilenet_v3_large_fpn: two maps of stride 32 and one of 64, fifteen anchors a cell.

    python -m fpn_jax.convert --from=torchvision://fasterrcnn_mobilenet_v3_large_fpn/COCO_V1 --workdir=runs/tv_mobile
    python -m fpn_jax.evaluate --workdir=runs/tv_mobile
    python -m fpn_jax.train --config=experiments/torchvision/fasterrcnn_mobilenet_v3_large_fpn.py \
        --workdir=runs/mobile --config.init_from=torchvision://mobilenet_v3_large/IMAGENET1K_V1

Score to expect of COCO_V1: 32.8 AP on val2017 (published by torchvision; not measured by us). Hardware: as for
fasterrcnn_resnet50_fpn.
"""

import ml_collections

from experiments.torchvision.fasterrcnn_resnet50_fpn import get_config as base


def get_config() -> ml_collections.ConfigDict:
    """Level 6 has the stride of level 5 and level 7 subsamples it; all RoIs are read from level 5."""
    config = base()
    config.model.backbone = ml_collections.ConfigDict(
        {"name": "mobilenet_v3", "levels": (5, 6), "norm": "frozen_bn", "norm_eps": 1e-5, "frozen_stages": 3}
    )
    config.model.rpn.levels = (5, 6, 7)
    config.model.rpn.sizes = ((32.0, 64.0, 128.0, 256.0, 512.0),) * 3
    config.model.rpn.score_threshold = 0.05
    config.model.box.levels = (5,)
    return config
