"""detectron2's COCO-Detection/faster_rcnn_R_50_FPN_1x, exactly: its preprocessing, its semantics, its schedule.

    python -m fpn_jax.convert --workdir=runs/d2_r50 \
        --from=detectron2://COCO-Detection/faster_rcnn_R_50_FPN_1x/137257794/model_final_b275ba.pkl
    python -m fpn_jax.evaluate --workdir=runs/d2_r50
    python -m fpn_jax.train --config=experiments/detectron2/faster_rcnn_R_50_FPN_1x.py --workdir=runs/r50 \
        --config.init_from=detectron2://ImageNetPretrained/MSRA/R-50.pkl

Score to expect: 37.9 AP on val2017 (published in detectron2's model zoo; not measured by us: the weights and COCO are
not at hand here). Hardware and duration, as published there: 8 V100 with 2 images each.
"""

import ml_collections

from experiments.faster_rcnn_r50_fpn import get_config as base

POSITIVE = 1e-30  # pixels; detectron2 asks for sides larger than 0, here sides are at least the value


def get_config() -> ml_collections.ConfigDict:
    """Each line is a difference to torchvision; the comments of the settings say what it is."""
    config = base()
    config.data.classes = "coco_80"
    config.data.shorter = (640, 672, 704, 736, 768, 800)
    config.data.rounding = "round"
    config.data.interpolation = "antialias"  # Pillow's, on uint8
    config.model.pixels.update(order="bgr", white=255.0, mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0))
    config.model.backbone.stride_in_1x1 = True
    config.model.rpn.update(
        anchor_rounding=False,
        anchor_order="size_major",
        anchor_stride="level",
        beta=0.0,
        normalizer="nominal",
        post_nms_train=1000,
        min_size=POSITIVE,
    )
    config.model.box.update(background="last", aligned=True, sampling_ratio=0, level_eps=0.0, beta=0.0, min_size=0.0)
    config.optim.decay_norms_and_biases = True  # its norms are not trained, its biases are
    return config
