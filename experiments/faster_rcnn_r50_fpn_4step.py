"""Faster R-CNN, ResNet-50-FPN, by the four-step alternating training of Ren et al. (arXiv 1506.01497, section 3.2).

    python -m fpn_jax.train --config=experiments/faster_rcnn_r50_fpn_4step.py --workdir=runs/4step

1. An RPN is trained, from ImageNet weights. 2. A Fast R-CNN is trained on its proposals, from ImageNet weights again.
3. An RPN's head is trained on the Fast R-CNN's features, which stay as they are. 4. The head of
step 2 is trained on, with these features and the proposals of step 3. Steps 3 and 4 share backbone and neck, so that
their heads make one Faster R-CNN: the run ends with its weights and its scores. Stopped or killed, the same command
continues.

Score to expect: 34.3 AP on minival by the paper's Table 5 (33.9 without sharing). Not measured by us on COCO; on scenes
see experiments/ablations/RESULTS.md.
"""

from typing import Any

import ml_collections

from experiments.faster_rcnn_r50_fpn import get_config as base


def stages(rpn_steps: int, box_steps: int, max_proposals: tuple[int, int]) -> tuple[dict[str, Any], ...]:
    """The four steps, as changes to the config of the whole; "stage:NAME" is the workdir of an earlier one."""
    shared = {"init_from": "stage:2_fast_rcnn", "model.frozen_parts": ("backbone", "neck")}

    def rpn(name: str, **changes: Any) -> dict[str, Any]:
        return {"name": name, "changes": {"model.detector": "rpn", "num_steps": rpn_steps, **changes}}

    def fast_rcnn(name: str, proposals: str, **changes: Any) -> dict[str, Any]:
        regions = {f"data.proposals_{which}": f"stage:{proposals}" for which in ("train", "eval")}
        regions["data.max_proposals"] = max_proposals
        return {"name": name, "changes": {"model.detector": "fast_rcnn", "num_steps": box_steps, **regions, **changes}}

    return (
        rpn("1_rpn"),
        fast_rcnn("2_fast_rcnn", "1_rpn"),
        rpn("3_rpn", **shared, init_part="backbone,neck"),
        fast_rcnn("4_fast_rcnn", "3_rpn", **shared, init_part="backbone,neck,box_head"),
    )


def get_config() -> ml_collections.ConfigDict:
    """The base, trained in four stages of the paper's lengths."""
    config = base()
    config.init_from, config.init_part = "torchvision://resnet50/IMAGENET1K_V2", "backbone"
    config.optim.step_at = (0.75,)
    config.stages = stages(40_000, 80_000, (2000, 1000))
    return config
