"""torchvision's fasterrcnn_mobilenet_v3_large_320_fpn: the same detector on small images with few proposals.

    python -m fpn_jax.convert --from=torchvision://fasterrcnn_mobilenet_v3_large_320_fpn/COCO_V1 --workdir=runs/tv_320
    python -m fpn_jax.evaluate --workdir=runs/tv_320
    python -m fpn_jax.train --config=experiments/torchvision/fasterrcnn_mobilenet_v3_large_320_fpn.py \
        --workdir=runs/mobile_320 --config.init_from=torchvision://mobilenet_v3_large/IMAGENET1K_V1

Score to expect of COCO_V1: 22.8 AP on val2017 (published by torchvision; not measured by us). Hardware: as for
fasterrcnn_resnet50_fpn.
"""

import ml_collections

from experiments.torchvision.fasterrcnn_mobilenet_v3_large_fpn import get_config as base


def get_config() -> ml_collections.ConfigDict:
    """320 pixels and 150 proposals."""
    config = base()
    config.data.shorter = (320,)
    config.data.longest = 640
    config.model.rpn.pre_nms_test = 150
    config.model.rpn.post_nms_test = 150
    return config
