"""detectron2's COCO-Detection/fast_rcnn_R_50_FPN_1x: Fast R-CNN on given proposals, Table 2 (c) of the FPN paper.

    python -m fpn_jax.convert --workdir=runs/d2_fast --from=detectron2://COCO-Detection/fast_rcnn_R_50_FPN_1x
    python -m fpn_jax.evaluate --workdir=runs/d2_fast --proposals=rpn_R_50_FPN_1x/coco_2017_val_box_proposals_21bc3a.pkl
    python -m fpn_jax.train --config=experiments/detectron2/fast_rcnn_R_50_FPN_1x.py --workdir=runs/fast \
        --config.data.proposals_train=coco_2017_train_box_proposals.pkl --config.data.proposals_eval=runs/d2_rpn

Proposals are a file (detectron2's .pkl, COCO results, .npz) or an RPN's workdir. Score to expect: 37.8 AP on val2017
(published in detectron2's model zoo; not measured by us). 8 V100 with 2 images each there.
"""

import ml_collections

from experiments.detectron2.faster_rcnn_R_50_FPN_1x import get_config as faster_rcnn


def get_config() -> ml_collections.ConfigDict:
    """The Faster R-CNN's second stage; detectron2 trains on 2000 proposals and tests on 1000."""
    config = faster_rcnn()
    config.model.detector = "fast_rcnn"
    config.data.max_proposals = (2000, 1000)
    return config
