"""torchvision's fasterrcnn_resnet50_fpn_v2: batch norm in the pyramid and the box head, and deeper heads.

    python -m fpn_jax.convert --from=torchvision://fasterrcnn_resnet50_fpn_v2/COCO_V1 --workdir=runs/tv_r50_v2
    python -m fpn_jax.evaluate --workdir=runs/tv_r50_v2
    python -m fpn_jax.train --config=experiments/torchvision/fasterrcnn_resnet50_fpn_v2.py --workdir=runs/r50_v2

Score to expect of COCO_V1: 46.7 AP on val2017 (published by torchvision; not measured by us). Its training used
augmentations that are not here (large scale jitter), so the last command will not reach that.
Hardware: as for fasterrcnn_resnet50_fpn. Source of the architecture: Li et al., arXiv 2111.11429.
"""

import ml_collections

from experiments.torchvision.fasterrcnn_resnet50_fpn import get_config as base


def get_config() -> ml_collections.ConfigDict:
    """Batch norms are live, in the frozen stages they stay as they are."""
    config = base()
    config.model.backbone.update(norm="bn", norm_eps=1e-5)
    config.model.neck.norm = "bn"
    config.model.rpn_head.convs = 2
    config.model.box_head.update(convs=4, fcs=1, norm="bn")
    return config
