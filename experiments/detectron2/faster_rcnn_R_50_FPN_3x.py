"""detectron2's COCO-Detection/faster_rcnn_R_50_FPN_3x: as R_50_FPN_1x, with three times the steps.

    python -m fpn_jax.convert --workdir=runs/d2_r50 \
        --from=detectron2://COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl
    python -m fpn_jax.evaluate --workdir=runs/d2_r50
    python -m fpn_jax.train --config=experiments/detectron2/faster_rcnn_R_50_FPN_3x.py --workdir=runs/r50 \
        --config.init_from=detectron2://ImageNetPretrained/MSRA/R-50.pkl

Score to expect: 40.2 AP on val2017 (published in detectron2's model zoo; not measured by us). Hardware: as for the 1x.
"""

import ml_collections

from experiments.detectron2.faster_rcnn_R_50_FPN_1x import get_config as base


def get_config() -> ml_collections.ConfigDict:
    """The rate falls at 210k and 250k of 270k steps."""
    config = base()
    config.num_steps = 270_000
    config.optim.step_at = (210 / 270, 250 / 270)
    return config
