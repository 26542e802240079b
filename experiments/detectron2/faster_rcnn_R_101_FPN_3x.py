"""detectron2's COCO-Detection/faster_rcnn_R_101_FPN_3x: as R_50_FPN_1x, with three times the steps.

    python -m fpn_jax.convert --workdir=runs/d2_r101 \
        --from=detectron2://COCO-Detection/faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl
    python -m fpn_jax.evaluate --workdir=runs/d2_r101
    python -m fpn_jax.train --config=experiments/detectron2/faster_rcnn_R_101_FPN_3x.py --workdir=runs/r101 \
        --config.init_from=detectron2://ImageNetPretrained/MSRA/R-101.pkl

Score to expect: 42.0 AP on val2017 (published in detectron2's model zoo; not measured by us). Hardware: as for the 1x.
"""

import ml_collections

from experiments.detectron2.faster_rcnn_R_50_FPN_3x import get_config as base


def get_config() -> ml_collections.ConfigDict:
    """101 layers."""
    config = base()
    config.model.backbone.depth = 101
    return config
