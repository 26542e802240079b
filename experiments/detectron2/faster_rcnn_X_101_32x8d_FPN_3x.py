"""detectron2's COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x: ResNeXt-101, with its stride in the 3x3.

    python -m fpn_jax.convert --workdir=runs/d2_x101 \
        --from=detectron2://COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x/139173657/model_final_68b088.pkl
    python -m fpn_jax.evaluate --workdir=runs/d2_x101
    python -m fpn_jax.train --config=experiments/detectron2/faster_rcnn_X_101_32x8d_FPN_3x.py --workdir=runs/x101 \
        --config.init_from=detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl

Score to expect: 43.0 AP on val2017 (published in detectron2's model zoo; not measured by us). Hardware: as for the 1x.
"""

import ml_collections

from experiments.detectron2.faster_rcnn_R_101_FPN_3x import get_config as base


def get_config() -> ml_collections.ConfigDict:
    """32 groups of 8 channels; its ImageNet weights expect pixels divided by a standard deviation."""
    config = base()
    config.model.backbone.update(groups=32, width_per_group=8, stride_in_1x1=False)
    config.model.pixels.std = (57.375, 57.120, 58.395)
    return config
