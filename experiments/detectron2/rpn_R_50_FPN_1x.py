"""detectron2's COCO-Detection/rpn_R_50_FPN_1x: proposals alone, Table 1 (c) of the FPN paper.

    python -m fpn_jax.convert --workdir=runs/d2_rpn --from=detectron2://COCO-Detection/rpn_R_50_FPN_1x
    python -m fpn_jax.evaluate --workdir=runs/d2_rpn
    python -m fpn_jax.propose --workdir=runs/d2_rpn --split=validation --output=proposals.npz
    python -m fpn_jax.train --config=experiments/detectron2/rpn_R_50_FPN_1x.py --workdir=runs/rpn \
        --config.init_from=detectron2://ImageNetPretrained/MSRA/R-50.pkl

Score to expect: AR1000 58.0 on val2017 (published in detectron2's model zoo; not measured by us). 8 V100 with 2 images
each there.
"""

import ml_collections

from experiments.detectron2.faster_rcnn_R_50_FPN_1x import get_config as faster_rcnn


def get_config() -> ml_collections.ConfigDict:
    """The Faster R-CNN's first stage alone."""
    config = faster_rcnn()
    config.model.detector = "rpn"
    return config
