"""The Fast R-CNN head (Girshick, arXiv 1504.08083) on a pyramid (arXiv 1612.03144, section 4.2)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from fpn_jax.models.layers import conv_norm, lecun_uniform, relu
from fpn_jax.ops import boxes as box_ops
from fpn_jax.ops.losses import smooth_l1, softmax_ce
from fpn_jax.ops.matching import BELOW, match_boxes
from fpn_jax.ops.nms import nms_top
from fpn_jax.ops.roi_align import multilevel_roi_align, roi_levels
from fpn_jax.ops.roi_pool import multilevel_roi_pool
from fpn_jax.ops.sampling import sample
from fpn_jax.types import Detections, PerDevice, together


@flax.struct.dataclass
class BoxSettings:
    """What the published implementations do differently; the defaults are torchvision's (0.28)."""

    levels: tuple[int, ...] = (2, 3, 4, 5)  # of the pyramid that RoIs are read from
    k0: int = 4  # level of an RoI whose area is canonical_size**2 (paper, equation 1)
    canonical_size: float = 224.0
    level_eps: float = 1e-6  # added before rounding down to the level; detectron2: 0
    pooling: str = "align"  # RoIAlign; "pool": the maximum of the bin's cells, as in the paper
    pooled_size: int = 7
    sampling_ratio: int = 2  # points per bin and axis
    aligned: bool = False  # True shifts by half a pixel, as detectron2 does
    background: str = "first"  # class slot 0; detectron2: "last"
    positive_iou: float = 0.5
    samples: int = 512  # RoIs per image that enter the loss
    positive_fraction: float = 0.25
    sampling: str = "random"  # "first": the first in index order, to compare implementations
    add_ground_truth: bool = True  # objects join the proposals in training
    beta: float = 1 / 9  # of smooth L1; detectron2: 0
    delta_weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    detections: int = 100
    min_size: float = 1e-2  # pixels, before the best are chosen; detectron2: 0

    @property
    def first_class(self) -> int:
        """Slot of label 0 in the class logits."""
        return 1 if self.background == "first" else 0


class SampledRoIs(NamedTuple):
    """RoIs for training with their targets; n rows per image."""

    boxes: jax.Array  # float32 [b n 4]
    labels: jax.Array  # int32 [b n]: class slot, that of background included
    gt_boxes: jax.Array  # float32 [b n 4]: the matched object
    positive: jax.Array  # bool [b n]
    valid: jax.Array  # bool [b n]


class BoxHead(nn.Module):
    """RoI features [b r h w c] of levels [b r] -> (class logits [b r k+1], deltas [b r s 4]), both float32.

    `convs` 3x3 convolutions, then `fcs` fully connected layers, each with ReLU: 0 and 2 in the paper, 4 and 1 in
    torchvision's v2 models. With background first s is k + 1 (slot 0 is never used, but torchvision's weights have
    it); with background last s is k.

    Attributes:
        channels: of the fully connected layers; conv_channels: of the convolutions.
        norm: of the convolutions: "none" (then they have a bias), "frozen_bn", "bn" or "gn".
        separate_levels: levels of the pyramid that have weights of their own; () for one head that serves all, as in
            the paper. Every RoI goes through all of them, and the output of its own level's is taken.
    """

    num_classes: int
    background: str = "first"
    channels: int = 1024
    fcs: int = 2
    convs: int = 0
    conv_channels: int = 256
    norm: str = "none"
    norm_eps: float = 1e-5
    separate_levels: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, levels: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        if self.separate_levels:
            heads = {l: self.clone(separate_levels=(), name=f"level{l}", parent=self) for l in self.separate_levels}
            outputs = [head(x, train) for head in heads.values()]
            mine = [levels == level for level in heads]
            return tuple(
                sum(jnp.where(m.reshape(m.shape + (1,) * (y.ndim - 2)), y, 0) for m, y in zip(mine, ys, strict=True))
                for ys in zip(*outputs, strict=True)
            )
        b, r = x.shape[:2]
        x = x.reshape(b * r, *x.shape[2:])
        how = {"norm": self.norm, "eps": self.norm_eps, "dtype": self.dtype}
        for i in range(1, self.convs + 1):
            x = relu(conv_norm(x, (f"conv{i}", f"norm{i}"), self.conv_channels, 3, train, **how))
        x = x.reshape(b, r, -1)
        for i in range(1, self.fcs + 1):
            x = relu(nn.Dense(self.channels, dtype=self.dtype, kernel_init=lecun_uniform, name=f"fc{i}")(x))
        return class_layers(x, self.num_classes, self.background, self.dtype)


def class_layers(x: jax.Array, num_classes: int, background: str, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The last two layers of a box head, of the calling module: x [b r c] -> logits [b r k+1], deltas [b r s 4]."""
    slots = num_classes + (background == "first")
    small = nn.initializers.normal
    logits = nn.Dense(num_classes + 1, dtype=dtype, kernel_init=small(0.01), name="classes")(x)
    deltas = nn.Dense(4 * slots, dtype=dtype, kernel_init=small(0.001), name="deltas")(x)
    return logits.astype(jnp.float32), deltas.reshape(*x.shape[:2], slots, 4).astype(jnp.float32)


def levels_of(settings: BoxSettings, boxes: jax.Array) -> jax.Array:
    """The level that fits each box's size: boxes [... 4] in pixels -> int32 [...]."""
    return roi_levels(boxes, sorted(settings.levels), settings.k0, settings.canonical_size, settings.level_eps)


def roi_features(
    settings: BoxSettings, pyramid: Mapping[int, jax.Array], boxes: jax.Array, per_device: PerDevice = together
) -> jax.Array:
    """RoIAlign, or RoI pooling, from the level that fits each box's size: boxes [b r 4] -> [b r h w c]."""

    def pooled(pyramid: dict[int, jax.Array], boxes: jax.Array) -> jax.Array:
        where = {"k0": settings.k0, "canonical": settings.canonical_size, "eps": settings.level_eps}
        if settings.pooling == "pool":
            return multilevel_roi_pool(pyramid, boxes, settings.pooled_size, **where)
        how = settings.pooled_size, settings.sampling_ratio, settings.aligned
        return multilevel_roi_align(pyramid, boxes, *how, **where)

    return per_device(pooled)({level: pyramid[level] for level in settings.levels}, boxes)


def sample_rois(
    settings: BoxSettings,
    num_classes: int,
    proposals: jax.Array,
    proposals_valid: jax.Array,
    boxes: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    keys: jax.Array,
    per_device: PerDevice = together,
) -> SampledRoIs:
    """Draw settings.samples RoIs per image, a quarter of them on objects, and give each its target.

    proposals [b r 4] with proposals_valid [b r]; boxes [b m 4], labels [b m], valid [b m]; keys [b]. An RoI is
    positive from IoU settings.positive_iou, background below it. Source: Fast R-CNN, section 2.3.
    """
    background = 0 if settings.background == "first" else num_classes

    def one(proposals, usable, boxes, labels, valid, key):
        if settings.add_ground_truth:
            proposals, usable = jnp.concatenate([proposals, boxes]), jnp.concatenate([usable, valid])
        matched = match_boxes(boxes, proposals, valid, settings.positive_iou, settings.positive_iou)
        key = key if settings.sampling == "random" else None
        drawn = sample(
            key,
            (matched >= 0) & usable,
            (matched == BELOW) & usable,
            settings.samples,
            settings.positive_fraction,
        )
        positive = drawn.positive & drawn.valid
        gt = jnp.maximum(matched[drawn.index], 0)
        slot = jnp.where(positive, labels[gt] + settings.first_class, background)
        rois = jnp.where(drawn.valid[:, None], proposals[drawn.index], 0)
        return SampledRoIs(rois, slot, boxes[gt], positive, drawn.valid)

    return jax.lax.stop_gradient(per_device(jax.vmap(one))(proposals, proposals_valid, boxes, labels, valid, keys))


def box_losses(
    settings: BoxSettings, logits: jax.Array, deltas: jax.Array, rois: SampledRoIs
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Cross entropy over the sampled RoIs and smooth L1 over the positive ones, both divided by the number of RoIs.

    logits [b n k+1], deltas [b n s 4]. Returns (losses, statistics). Source: Fast R-CNN, equations 1 to 3.
    """
    count = jnp.maximum(rois.valid.sum(), 1)
    cross_entropy = softmax_ce(logits, rois.labels)
    # Picked by a mask, whose gradient is a mask again, where that of an index would be added row by row.
    own = jnp.arange(deltas.shape[2]) == jnp.where(rois.positive, rois.labels, 0)[..., None]
    pred = jnp.where(own[..., None], deltas, 0).sum(2)
    target = box_ops.encode(rois.gt_boxes, rois.boxes, settings.delta_weights)
    box_loss = smooth_l1(pred, target, settings.beta).sum(-1)
    losses = {
        "class": jnp.where(rois.valid, cross_entropy, 0).sum() / count,
        "box": jnp.where(rois.positive, box_loss, 0).sum() / count,
    }
    right = (logits.argmax(-1) == rois.labels) & rois.positive
    positives = rois.positive.sum()
    return losses, {
        "roi_positives": positives / logits.shape[0],
        "roi_accuracy": right.sum() / jnp.maximum(positives, 1),
    }


def detect(
    settings: BoxSettings,
    logits: jax.Array,
    deltas: jax.Array,
    proposals: jax.Array,
    proposals_valid: jax.Array,
    size: jax.Array,
    per_device: PerDevice = together,
) -> Detections:
    """Scores above the threshold, NMS per class, the best settings.detections of each image.

    logits [b r k+1], deltas [b r s 4], proposals [b r 4] with proposals_valid [b r], size [b 2]. Boxes are clipped to
    `size`.
    """
    num_classes = logits.shape[-1] - 1
    first = settings.first_class

    def one(logits, deltas, proposals, usable, size):
        scores = jax.nn.softmax(logits)[:, first : first + num_classes]
        boxes = box_ops.decode(deltas[:, first:], proposals[:, None], settings.delta_weights)
        boxes = box_ops.clip(boxes, size)
        good = (scores > settings.score_threshold) & usable[:, None] & box_ops.is_larger(boxes, settings.min_size)
        classes = jnp.broadcast_to(jnp.arange(num_classes, dtype=jnp.int32), scores.shape)
        boxes, scores, classes, good = boxes.reshape(-1, 4), scores.ravel(), classes.ravel(), good.ravel()
        index, valid = nms_top(boxes, scores, good, settings.nms_iou, settings.detections, classes)
        valid &= box_ops.area(boxes[index]) > 0  # with min_size 0 empty ones take places, as detectron2 has it
        return Detections(
            boxes=jnp.where(valid[:, None], boxes[index], 0),
            scores=jnp.where(valid, scores[index], 0),
            labels=jnp.where(valid, classes[index], 0),
            valid=valid,
        )

    return per_device(jax.vmap(one))(logits, deltas, proposals, proposals_valid, size)
