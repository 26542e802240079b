"""What the tables of ablations start from, at three sizes, and how a table is written down.

`FILE.py` or `FILE.py:coco` is the paper's setting, `:aquarium` one GPU's, `:scenes` two CPU cores'. A row is
{"name": ..., "changes": {dotted key of the base: value}}, with optionally "note", "published" (the paper's figures in
percent) and "in_table": False for a row that only makes the proposals of others. A value "row:NAME" is the workdir of
that row's run with the same seed.

Overrides such as --config.base.num_steps=100 change what all rows start from. They come after the rows are made: what a
row sets itself (the anchor sizes and head widths of other pyramids, say) they do not reach, see --diff.
"""

from typing import Any

import ml_collections

from experiments.demo import get_config as demo
from experiments.faster_rcnn_r50_fpn import get_config as faster_rcnn_r50_fpn

SIZES = ("coco", "aquarium", "scenes")


def base(detector: str, size: str) -> ml_collections.ConfigDict:
    """The config of a detector that every row of a table changes.

    Steps and learning rates of "coco" are the paper's (sections 5.1 and 5.2), from ImageNet weights: 40k steps of 16
    images for RPN, 80k for Fast R-CNN. Raises ValueError for another size.
    """
    if size not in SIZES:
        raise ValueError(f"there is no size {size!r}; choose one of {', '.join(SIZES)}")
    if size == "scenes":
        config = demo()
        config.num_steps = {"rpn": 600, "fast_rcnn": 600, "faster_rcnn": 750}[detector]
        config.eval_every = config.num_steps // 2
        config.pictures = 4
    else:
        config = faster_rcnn_r50_fpn()
        config.num_steps = {"rpn": 40_000}.get(detector, 80_000)
        config.optim.step_at = (0.75,)
        config.init_from, config.init_part = "torchvision://resnet50/IMAGENET1K_V2", "backbone"
    if size == "aquarium":
        config.data.dataset, config.data.eval_split = "aquarium", "valid"
        config.data.shorter, config.data.longest = (512,), 768
        config.batch_size, config.num_steps = 8, 4_000
        config.init_from, config.init_part = "", ""
        config.model.backbone.update(norm="gn", frozen_stages=0)
        config.eval_every = config.checkpoint_every = 1_000
        config.optim.clip_norm = 10.0
    config.model.detector = detector
    config.model.dtype = "float32" if size == "scenes" else "bfloat16"
    if detector == "rpn":
        config.model.rpn.post_nms_test = 1000  # recall is taken at 1000
        config.model.rpn.pre_nms_test = 600 if size == "scenes" else 1000
    return config


def all_sizes(config: ml_collections.ConfigDict) -> tuple[float, ...]:
    """The anchor sizes of all levels, for one map that has to serve them all."""
    return tuple(side for row in config.model.rpn.sizes for side in row)


def single_map(config: ml_collections.ConfigDict, level: int) -> dict[str, Any]:
    """The changes to predict from one map of the backbone, C4 or C5, with the anchors of all levels (figure 1b).

    The RPN's convolution has twice the pyramid's channels, as the published C4 detectors have 512. NMS goes through all
    anchors until it has kept enough: the best few thousand of one map of all sizes are so alike that it would keep
    hundreds of them only.
    """
    changes = {
        "model.backbone.last_level": level,
        "model.neck": {"name": "none", "levels": (level,)},
        "model.rpn_head.channels": 2 * config.model.neck.channels,
        "model.rpn.levels": (level,),
        "model.rpn.sizes": (all_sizes(config),),
        "model.rpn.pre_nms_train": 0,
        "model.rpn.pre_nms_test": 0,
        "model.box.levels": (level,),
    }
    return changes


def finest_only(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The changes to predict from P2 alone, with the anchors of all levels: row (f) of the paper's tables."""
    return {
        "model.neck.outputs": (2,),
        "model.neck.extra_level": False,
        "model.rpn.levels": (2,),
        "model.rpn.sizes": (all_sizes(config),),
        "model.rpn.pre_nms_train": 0,
        "model.rpn.pre_nms_test": 0,
        "model.box.levels": (2,),
    }


def c4_conv5(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The changes to detect from C4 with the backbone's last stage as box head, on 14 x 14 bins: row (a)."""
    blocks = config.model.backbone.blocks[3] if config.model.backbone.blocks else 3
    head = {"name": "conv5", "blocks": blocks, "stride": 2}
    return single_map(config, 4) | {"model.box_head": head, "model.box.pooled_size": 14}


PROPOSAL_METRICS = ("AR100", "AR1000", "AR1000_small", "AR1000_medium", "AR1000_large")
BOX_METRICS = ("AP50", "AP", "AP_small", "AP_medium", "AP_large")


def row(name: str, note: str, changes: dict[str, Any], metrics: tuple[str, ...], *published: float) -> dict[str, Any]:
    """A row with the paper's figures for it, in percent."""
    return {"name": name, "note": note, "changes": changes, "published": dict(zip(metrics, published, strict=True))}


def ablation(title: str, config: ml_collections.ConfigDict, baseline: str, *rows: dict[str, Any]) -> Any:
    """What `python -m fpn_jax.sweep` runs."""
    return ml_collections.ConfigDict({"title": title, "baseline": baseline, "base": config, "rows": tuple(rows)})
