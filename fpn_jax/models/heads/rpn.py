"""The region proposal network on a pyramid (Ren et al., arXiv 1506.01497; on FPN: arXiv 1612.03144, section 4.1)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.models.layers import Affine, Conv, affine_maps, relu
from fpn_jax.ops import anchors as anchor_ops
from fpn_jax.ops import boxes as box_ops
from fpn_jax.ops.losses import sigmoid_bce, smooth_l1
from fpn_jax.ops.matching import BELOW, match_boxes
from fpn_jax.ops.nms import nms, nms_top
from fpn_jax.ops.sampling import sample
from fpn_jax.types import PerDevice, together


@flax.struct.dataclass
class RPNSettings:
    """What the published implementations do differently; the defaults are torchvision's (0.28)."""

    levels: tuple[int, ...] = (2, 3, 4, 5, 6)
    sizes: tuple[tuple[float, ...], ...] = (
        (32,),
        (64,),
        (128,),
        (256,),
        (512,),
    )  # anchor sides of each level
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    anchor_rounding: bool = True  # corners rounded to integers; detectron2 keeps them exact
    anchor_order: str = "ratio_major"  # detectron2: size_major
    anchor_stride: str = "image"  # image size // map size; detectron2: "level", always 2**l
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    low_quality_matches: bool = True  # an object's best anchors are positive whatever their IoU
    samples: int = 256  # anchors per image that enter the loss
    positive_fraction: float = 0.5
    sampling: str = "random"  # "first": the first in index order, to compare implementations
    beta: float = 1 / 9  # of smooth L1; detectron2: 0
    normalizer: str = "sampled"  # both losses are divided by the anchors drawn; detectron2: "nominal", b * samples
    delta_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    pre_nms_train: int = 2000  # per level; 0: all, which NMS then goes through until enough are kept
    pre_nms_test: int = 1000
    post_nms_train: int = 2000  # per image, all levels together
    post_nms_test: int = 1000
    nms_iou: float = 0.7
    min_size: float = 1e-3  # pixels; detectron2: larger than 0
    score_threshold: float = 0.0  # of proposals; torchvision's MobileNet detectors: 0.05

    def anchors_per_cell(self, level: int) -> int:
        """How many anchors a cell of the map of `level` has."""
        return len(self.sizes[self.levels.index(level)]) * len(self.ratios)


class Proposals(NamedTuple):
    """Regions that may hold an object, best first."""

    boxes: jax.Array  # float32 [b r 4]
    scores: jax.Array  # float32 [b r], probabilities
    valid: jax.Array  # bool [b r]
    levels: jax.Array  # int32 [b r], whose anchors they come from


class RPNHead(nn.Module):
    """{l: P_l} -> {l: logits [b r]}, {l: deltas [b r 4]}, in `dtype`: `convs` 3x3 convolutions and two 1x1.

    r runs over rows, columns, anchors of the cell.

    Attributes:
        anchors: per cell.
        convs: 1 in the paper, 2 in torchvision's v2 models.
        channels: of the convolutions; 0 takes as many as the level has.
        shared: whether all levels have the same weights, as in the paper, which found it no worse than False.
    """

    anchors: int
    convs: int = 1
    channels: int = 0
    shared: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pyramid: Mapping[int, jax.Array]) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
        def layers(width: int, suffix: str = "") -> tuple[list[Conv], Affine, Affine]:
            def layer(kind: type[nn.Module], features: int, name: str) -> Any:
                init = nn.initializers.normal(0.01)
                return kind(features, kernel_init=init, dtype=self.dtype, name=f"{name}{suffix}")

            names = ["conv", *(f"conv{i}" for i in range(2, self.convs + 1))]
            convs = [layer(Conv, self.channels or width, name) for name in names]
            return convs, layer(Affine, self.anchors, "objectness"), layer(Affine, 4 * self.anchors, "deltas")

        if self.shared:
            for_all = layers(next(iter(pyramid.values())).shape[-1])
        all_logits, all_deltas = {}, {}
        for level, x in pyramid.items():
            convs, objectness, deltas = for_all if self.shared else layers(x.shape[-1], f"_level{level}")
            for conv in convs:
                x = relu(conv(x))
            b = x.shape[0]
            logits, offsets = affine_maps(x, objectness, deltas)
            all_logits[level], all_deltas[level] = logits.reshape(b, -1), offsets.reshape(b, -1, 4)
        return all_logits, all_deltas


def make_anchors(
    settings: RPNSettings, grids: Mapping[int, tuple[int, int]], image_size: tuple[int, int]
) -> dict[int, np.ndarray]:
    """Anchors {l: float32 [r 4]} in pixels for maps of `grids` {l: (h, w)} of an image of `image_size`."""
    cells = {
        level: anchor_ops.cell_anchors(sizes, settings.ratios, settings.anchor_rounding, settings.anchor_order)
        for level, sizes in zip(settings.levels, settings.sizes, strict=True)
    }
    strides = {}
    for level, (h, w) in grids.items():
        of_image = (image_size[0] // h, image_size[1] // w)
        strides[level] = of_image if settings.anchor_stride == "image" else (2**level, 2**level)
    return anchor_ops.grid_anchors(grids, cells, strides)


def label_anchors(
    settings: RPNSettings, anchors: jax.Array, boxes: jax.Array, valid: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One image's targets: (match [r], index [n], positive [n], sampled [n]) with n = settings.samples.

    anchors [r 4], boxes [m 4], valid [m]; `match` as `fpn_jax.ops.matching.match` gives it, `index` the anchors that
    were drawn. key None draws the first candidates.
    """
    matched = match_boxes(
        boxes,
        anchors,
        valid,
        settings.positive_iou,
        settings.negative_iou,
        settings.low_quality_matches,
    )
    drawn = sample(key, matched >= 0, matched == BELOW, settings.samples, settings.positive_fraction)
    return matched, drawn.index, drawn.positive, drawn.valid


def take_anchors(values: jax.Array, index: jax.Array, per_cell: int) -> jax.Array:
    """values[index] in float32, of one image's `values` [r ...], whose `per_cell` anchors of a cell are neighbours.

    Reads whole cells and then picks from them: so a convolution leaves its output. For anchors alone a TPU would
    copy all `values`, and their gradient, to where an anchor's four lie in a row of 128.
    """
    cells = values.reshape(values.shape[0] // per_cell, -1)[index // per_cell]
    of_cell = cells.reshape(*index.shape, per_cell, *values.shape[1:])
    own = jnp.arange(per_cell) == index[:, None] % per_cell
    return jnp.where(own.reshape(*own.shape, *[1] * (values.ndim - 1)), of_cell, 0).sum(1).astype(jnp.float32)


def rpn_losses(
    settings: RPNSettings,
    logits: Mapping[int, jax.Array],
    deltas: Mapping[int, jax.Array],
    anchors: Mapping[int, np.ndarray],
    boxes: jax.Array,
    valid: jax.Array,
    keys: jax.Array,
    per_device: PerDevice = together,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Objectness and box losses over the sampled anchors of the whole batch, both sums divided by their number (see
    `RPNSettings.normalizer`).

    logits {l: [b r]}, deltas {l: [b r 4]}, anchors {l: [r 4]}, boxes [b m 4], valid [b m], keys [b]. Returns (losses,
    statistics). Source: Faster R-CNN, equation 1; normalisers as torchvision's.
    """
    images = boxes.shape[0]
    flat_anchors = jnp.concatenate([jnp.asarray(x) for x in anchors.values()])
    ends = np.cumsum([len(x) for x in anchors.values()])

    def of_drawn(values, index):
        """Of all levels' values {l: [r ...]} those of the anchors `index`, which counts through all levels."""
        found = 0
        for (level, x), end in zip(values.items(), ends, strict=True):
            here = (index >= end - len(x)) & (index < end)
            taken = take_anchors(x, jnp.where(here, index - (end - len(x)), 0), settings.anchors_per_cell(level))
            found += jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), taken, 0)
        return found

    def image_terms(logits, deltas, boxes, valid, key):
        key = key if settings.sampling == "random" else None
        matched, index, positive, drawn = label_anchors(settings, flat_anchors, boxes, valid, key)
        drawn_anchors = flat_anchors[index]
        target = box_ops.encode(boxes[jnp.maximum(matched[index], 0)], drawn_anchors, settings.delta_weights)
        box_loss = smooth_l1(of_drawn(deltas, index), target, settings.beta).sum(-1)
        bce = sigmoid_bce(of_drawn(logits, index), positive.astype(jnp.float32))
        return (
            jnp.where(drawn, bce, 0).sum(),
            jnp.where(positive & drawn, box_loss, 0).sum(),
            drawn.sum(),
            (positive & drawn).sum(),
        )

    terms = per_device(jax.vmap(image_terms))(dict(logits), dict(deltas), boxes, valid, keys)
    bce, box, drawn, positive = (x.sum() for x in terms)
    count = {"sampled": jnp.maximum(drawn, 1), "nominal": images * settings.samples}[settings.normalizer]
    losses = {"rpn_objectness": bce / count, "rpn_box": box / count}
    return losses, {"rpn_positives": positive / images}


def propose(
    settings: RPNSettings,
    logits: Mapping[int, jax.Array],
    deltas: Mapping[int, jax.Array],
    anchors: Mapping[int, np.ndarray],
    size: jax.Array,
    train: bool,
    per_device: PerDevice = together,
) -> Proposals:
    """Decode, clip, suppress per level and keep the best of all levels.

    logits {l: [b r]}, deltas {l: [b r 4]}, anchors {l: [r 4]}, size [b 2]. No gradient flows through proposals.
    The number of rows is min(post_nms, sum over levels of min(pre_nms, r)), whatever the image; a pre_nms of 0 sets no
    limit.
    """
    before = settings.pre_nms_train if train else settings.pre_nms_test
    after = settings.post_nms_train if train else settings.post_nms_test

    def level_candidates(level, logits, deltas, anchors, size):
        logits, anchors = logits.astype(jnp.float32), jnp.asarray(anchors)
        if before:
            logits, best = jax.lax.top_k(logits, min(before, logits.shape[0]))
            deltas, anchors = take_anchors(deltas, best, settings.anchors_per_cell(level)), anchors[best]
        boxes = box_ops.clip(box_ops.decode(deltas.astype(jnp.float32), anchors, settings.delta_weights), size)
        good = box_ops.is_larger(boxes, settings.min_size) & (jax.nn.sigmoid(logits) >= settings.score_threshold)
        if before:
            return boxes, jnp.where(nms(boxes, None, good, settings.nms_iou), logits, -jnp.inf)
        index, keep = nms_top(boxes, logits, good, settings.nms_iou, min(after, logits.shape[0]))
        return boxes[index], jnp.where(keep, logits[index], -jnp.inf)

    def image_proposals(logits, deltas, size):
        boxes, kept = zip(*(level_candidates(x, logits[x], deltas[x], anchors[x], size) for x in logits), strict=True)
        levels = np.repeat(np.int32(list(logits)), [len(x) for x in kept])
        boxes, kept = jnp.concatenate(boxes), jnp.concatenate(kept)
        kept, best = jax.lax.top_k(kept, min(after, kept.shape[0]))
        valid = kept > -jnp.inf
        boxes = jnp.where(valid[:, None], boxes[best], 0)
        return Proposals(boxes, jax.nn.sigmoid(kept), valid, jnp.asarray(levels)[best])

    return jax.lax.stop_gradient(per_device(jax.vmap(image_proposals))(dict(logits), dict(deltas), size))
