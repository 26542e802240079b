"""torchvision's fasterrcnn_resnet50_fpn: exactly its preprocessing, its semantics, its 91 class slots, its schedule.

    python -m fpn_jax.convert --from=torchvision://fasterrcnn_resnet50_fpn/COCO_V1 --workdir=runs/tv_r50
    python -m fpn_jax.evaluate --workdir=runs/tv_r50
    python -m fpn_jax.train --config=experiments/torchvision/fasterrcnn_resnet50_fpn.py --workdir=runs/r50 \
        --config.init_from=torchvision://resnet50/IMAGENET1K_V1 --config.model.backbone.norm_eps=1e-5

Score to expect of COCO_V1: 37.0 AP on val2017 (published by torchvision; not measured by us: the weights and COCO are
not at hand here). Batch norms have eps 0 because torchvision sets it so for these published weights; with weights of
your own, trained by torchvision's builder, say --config.model.backbone.norm_eps=1e-5.
Hardware and duration of training, as torchvision publishes the recipe: 8 GPUs with 2 images each, 26 epochs.
"""

import ml_collections

from experiments.faster_rcnn_r50_fpn import get_config as base

EPOCH = 117_266 / 16  # steps: training images with objects, by images per step


def get_config() -> ml_collections.ConfigDict:
    """The base has torchvision's semantics; what is left are its images, its classes and its schedule."""
    config = base()
    config.num_steps = round(26 * EPOCH)
    config.optim.step_at = (16 / 26, 22 / 26)
    config.data.classes = "coco_91"
    config.data.pixels = "float32"  # torchvision resizes floats
    config.model.backbone.norm_eps = 0.0
    return config
