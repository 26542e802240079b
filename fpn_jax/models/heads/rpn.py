"""The region proposal network on a pyramid (Ren et al., arXiv 1506.01497; on FPN: arXiv 1612.03144, section 4.1)."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.models.layers import Affine, Conv, affine_maps
from fpn_jax.ops import boxes as box_ops
from fpn_jax.ops.anchors import AnchorGrid, cell_anchors
from fpn_jax.ops.losses import sigmoid_bce, smooth_l1
from fpn_jax.ops.matching import BELOW, match_boxes
from fpn_jax.ops.nms import nms, nms_top
from fpn_jax.ops.patches import Cells, Patches, take_patches
from fpn_jax.ops.sampling import Sample, sample
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
    """Logits and deltas of anchors: `convs` 3x3 convolutions and two 1x1, in `dtype`.

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

    def __call__(self, pyramid: Mapping[int, jax.Array]) -> tuple[dict[int, jax.Array], dict[int, jax.Array]]:
        """{l: P_l} -> {l: logits [b r]}, {l: deltas [b r 4]}, r over rows, columns, anchors of the cell."""
        all_logits, all_deltas = {}, {}
        for (level, x), layers in zip(pyramid.items(), self._layers(pyramid), strict=True):
            for conv in layers.convs:
                x = conv(x, rectify=True)
            logits, deltas = affine_maps(x, layers.objectness, layers.deltas)
            all_logits[level] = logits.reshape(x.shape[0], -1)
            all_deltas[level] = deltas.reshape(x.shape[0], -1, 4)
        return all_logits, all_deltas

    def of_drawn(
        self, pyramid: Mapping[int, jax.Array], index: jax.Array, per_device: PerDevice = together
    ) -> tuple[jax.Array, jax.Array, dict[int, jax.Array]]:
        """Logits [b n] and deltas [b n 4], float32, of the anchors `index` [b n], which counts through all levels.

        What `__call__` gives for them, computed for their cells alone, and so is the gradient. Of a loss over 256
        anchors of an image the gradient is zero at all but 256 of its 90 000 cells. The third is the pyramid, for
        whoever reads it next, see `take_patches`.
        """
        cells, anchor = cells_of_anchors([x.shape[1:3] for x in pyramid.values()], self.anchors, index)
        take = per_device(functools.partial(take_patches, radius=self.convs))
        per_level = self._layers(pyramid)
        if self.shared:
            patches, pyramid = take(dict(pyramid), cells)
            found = _of_patches(per_level[0], patches)
        else:  # levels may differ in their channels
            ours = [
                take({level: x}, cells._replace(position=cells.position - i))
                for i, (level, x) in enumerate(pyramid.items())
            ]
            of_each = [_of_patches(layers, patches) for layers, (patches, _) in zip(per_level, ours, strict=True)]
            pyramid = {level: x for _, own in ours for level, x in own.items()}
            found = (
                jax.lax.select_n(jnp.broadcast_to(cells.position[..., None], x[0].shape), *x)
                for x in zip(*of_each, strict=True)
            )
        own = jnp.arange(self.anchors) == anchor[..., None]
        of_cells = (x.reshape(*own.shape, -1).astype(jnp.float32) for x in found)
        logits, deltas = (jnp.where(own[..., None], x, 0).sum(2) for x in of_cells)
        return logits[..., 0], deltas, pyramid

    @nn.compact
    def _layers(self, pyramid: Mapping[int, jax.Array]) -> list["_Layers"]:
        """Those of each level of the pyramid."""

        def layers(width: int, suffix: str = "") -> _Layers:
            def layer(kind: type[nn.Module], features: int, name: str) -> Any:
                init = nn.initializers.normal(0.01)
                return kind(features, kernel_init=init, dtype=self.dtype, name=f"{name}{suffix}")

            names = ["conv", *(f"conv{i}" for i in range(2, self.convs + 1))]
            convs = [layer(Conv, self.channels or width, name) for name in names]
            return _Layers(convs, layer(Affine, self.anchors, "objectness"), layer(Affine, 4 * self.anchors, "deltas"))

        if self.shared:
            return [layers(next(iter(pyramid.values())).shape[-1])] * len(pyramid)
        return [layers(x.shape[-1], f"_level{level}") for level, x in pyramid.items()]


class _Layers(NamedTuple):
    convs: list[Conv]
    objectness: Affine
    deltas: Affine


def _of_patches(layers: _Layers, patches: Patches) -> tuple[jax.Array, jax.Array]:
    """Patches [b n k k c], k = 2 len(convs) + 1 -> logits [b n a], deltas [b n 4*a] of the anchors of middle cells."""
    b, n = patches.inside.shape[:2]
    x, inside = (x.reshape(b * n, *x.shape[2:]) for x in patches)
    for conv in layers.convs:
        inside = inside[:, 1:-1, 1:-1]
        # Beyond the map the next convolution reads zeros, not what this one would make of them.
        x = jnp.where(inside[..., None], conv(x, pad=False, rectify=True), 0)
    return affine_maps(x.reshape(b, n, -1), layers.objectness, layers.deltas)


def cells_of_anchors(grids: Sequence[tuple[int, int]], per_cell: int, index: jax.Array) -> tuple[Cells, jax.Array]:
    """(cells, which of a cell's anchors) of anchors `index` [...], which counts through maps of `grids` (h, w)."""
    widths, counts = np.int32([w for _, w in grids]), np.int32([h * w * per_cell for h, w in grids])
    ends = np.cumsum(counts, dtype=np.int32)
    position = (index[..., None] >= ends[:-1]).sum(-1, dtype=jnp.int32)
    cell, anchor = jnp.divmod(index - jnp.asarray(ends - counts)[position], per_cell)
    return Cells(position, *jnp.divmod(cell, jnp.asarray(widths)[position])), anchor


def anchor_grids(
    settings: RPNSettings, grids: Mapping[int, tuple[int, int]], image_size: tuple[int, int]
) -> dict[int, AnchorGrid]:
    """The anchors of all `settings.levels`, whose maps are of `grids` {l: (h, w)}, of an image of `image_size`."""
    found = {}
    for level, sizes in zip(settings.levels, settings.sizes, strict=True):
        of_cell = cell_anchors(sizes, settings.ratios, settings.anchor_rounding, settings.anchor_order)
        h, w = grids[level]
        of_image = (image_size[0] // h, image_size[1] // w)
        found[level] = AnchorGrid((h, w), of_cell, of_image if settings.anchor_stride == "image" else (2**level,) * 2)
    return found


def boxes_of(anchors: Mapping[int, AnchorGrid]) -> jax.Array:
    """Those of all levels, float32 [r 4] in pixels."""
    return jnp.concatenate([grid.boxes() for grid in anchors.values()])


class DrawnAnchors(NamedTuple):
    """The anchors that enter the loss, n = settings.samples of each image, and what the head should say of them."""

    index: jax.Array  # int32 [b n], counted through all levels
    positive: jax.Array  # bool [b n]
    valid: jax.Array  # bool [b n], False in unused rows
    deltas: jax.Array  # float32 [b n 4], to the anchor's object; of positives alone they mean something


def draw_anchors(
    settings: RPNSettings,
    anchors: Mapping[int, AnchorGrid],
    boxes: jax.Array,
    valid: jax.Array,
    keys: jax.Array,
    per_device: PerDevice = together,
) -> DrawnAnchors:
    """Match anchors with objects, boxes [b m 4] and valid [b m], and draw some by keys [b]."""
    flat = boxes_of(anchors)

    def of_image(boxes, valid, key):
        matched = match_anchors(settings, anchors, boxes, valid)
        drawn = draw_matched(settings, matched, key if settings.sampling == "random" else None)
        objects = boxes[jnp.maximum(matched[drawn.index], 0)]
        return DrawnAnchors(*drawn, box_ops.encode(objects, flat[drawn.index], settings.delta_weights))

    return per_device(jax.vmap(of_image))(boxes, valid, keys)


def match_anchors(
    settings: RPNSettings, anchors: Mapping[int, AnchorGrid], boxes: jax.Array, valid: jax.Array
) -> jax.Array:
    """The object of each anchor [r], as `matching.match` gives it, of one image's boxes [m 4], valid [m]."""
    highest = None
    if settings.low_quality_matches:
        highest = functools.reduce(jnp.maximum, (grid.highest_iou(boxes) for grid in anchors.values()))
    return match_boxes(boxes, boxes_of(anchors), valid, settings.positive_iou, settings.negative_iou, highest)


def draw_matched(settings: RPNSettings, matched: jax.Array, key: jax.Array | None) -> Sample:
    """settings.samples of anchors that are `matched` [r]; key None draws the first candidates."""
    return sample(key, matched >= 0, matched == BELOW, settings.samples, settings.positive_fraction)


def rpn_losses(
    settings: RPNSettings, logits: jax.Array, deltas: jax.Array, drawn: DrawnAnchors
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Objectness and box losses over the drawn anchors of the whole batch, both sums divided by their number (see
    `RPNSettings.normalizer`).

    logits [b n] and deltas [b n 4] of the drawn anchors. Returns (losses, statistics). Source: Faster R-CNN, equation
    1; normalisers as torchvision's.
    """
    images, positive = len(logits), drawn.positive & drawn.valid
    bce = jnp.where(drawn.valid, sigmoid_bce(logits, drawn.positive.astype(jnp.float32)), 0).sum()
    box = jnp.where(positive, smooth_l1(deltas, drawn.deltas, settings.beta).sum(-1), 0).sum()
    count = {"sampled": jnp.maximum(drawn.valid.sum(), 1), "nominal": images * settings.samples}[settings.normalizer]
    return {"rpn_objectness": bce / count, "rpn_box": box / count}, {"rpn_positives": positive.sum() / images}


def take_anchors(values: jax.Array, index: jax.Array, per_cell: int) -> jax.Array:
    """values[index] in float32, of one image's `values` [r ...], whose `per_cell` anchors of a cell are neighbours.

    Reads whole cells and then picks from them: so a convolution leaves its output. For anchors alone a TPU would
    copy all `values`, and their gradient, to where an anchor's four lie in a row of 128.
    """
    cells = values.reshape(values.shape[0] // per_cell, -1)[index // per_cell]
    of_cell = cells.reshape(*index.shape, per_cell, *values.shape[1:])
    own = jnp.arange(per_cell) == index[:, None] % per_cell
    return jnp.where(own.reshape(*own.shape, *[1] * (values.ndim - 1)), of_cell, 0).sum(1).astype(jnp.float32)


def propose(
    settings: RPNSettings,
    logits: Mapping[int, jax.Array],
    deltas: Mapping[int, jax.Array],
    anchors: Mapping[int, jax.Array],
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

    def image_proposals(logits, deltas, size):
        logits = {level: x.astype(jnp.float32) for level, x in logits.items()}
        if before:
            candidates = _best_kept(settings, before, logits, deltas, anchors, size)
        else:
            candidates = _kept_of_all(settings, after, logits, deltas, anchors, size)
        boxes, kept = zip(*candidates, strict=True)
        levels = np.repeat(np.int32(list(logits)), [len(x) for x in kept])
        boxes, kept = jnp.concatenate(boxes), jnp.concatenate(kept)
        kept, best = jax.lax.top_k(kept, min(after, kept.shape[0]))
        valid = kept > -jnp.inf
        boxes = jnp.where(valid[:, None], boxes[best], 0)
        return Proposals(boxes, jax.nn.sigmoid(kept), valid, jnp.asarray(levels)[best])

    return jax.lax.stop_gradient(per_device(jax.vmap(image_proposals))(dict(logits), dict(deltas), size))


Levels = Mapping[int, jax.Array]
Candidates = Iterator[tuple[jax.Array, jax.Array]]  # of each level, boxes [n 4] and logits [n], -inf where suppressed


def _best_kept(
    settings: RPNSettings, most: int, logits: Levels, deltas: Levels, anchors: Levels, size: jax.Array
) -> Candidates:
    """NMS among the `most` best of each level of an image, all levels side by side: one loop, and not one for each."""
    counts = {level: min(most, len(x)) for level, x in logits.items()}

    def top(level, count):
        best_logits, best = jax.lax.top_k(logits[level], count)
        own = take_anchors(deltas[level], best, settings.anchors_per_cell(level)), anchors[level][best]
        # Filled up to the longest with boxes that have no sides, which touch none.
        more = max(counts.values()) - count
        return jnp.pad(best_logits, (0, more), constant_values=-jnp.inf), *(
            jnp.pad(x, ((0, more), (0, 0))) for x in own
        )

    of_levels = [jnp.stack(x) for x in zip(*(top(*x) for x in counts.items()), strict=True)]
    boxes, usable = _decoded(settings, *of_levels, size)
    kept = jax.vmap(lambda boxes, usable: nms(boxes, None, usable, settings.nms_iou))(boxes, usable)
    kept = jnp.where(kept, of_levels[0], -jnp.inf)
    return ((boxes[i, :count], kept[i, :count]) for i, count in enumerate(counts.values()))


def _kept_of_all(
    settings: RPNSettings, most: int, logits: Levels, deltas: Levels, anchors: Levels, size: jax.Array
) -> Candidates:
    """NMS among all of each level of an image until `most` are kept."""
    for level, own in logits.items():
        boxes, usable = _decoded(settings, own, deltas[level].astype(jnp.float32), anchors[level], size)
        index, keep = nms_top(boxes, own, usable, settings.nms_iou, min(most, len(own)))
        yield boxes[index], jnp.where(keep, own[index], -jnp.inf)


def _decoded(
    settings: RPNSettings, logits: jax.Array, deltas: jax.Array, anchors: jax.Array, size: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(boxes [... 4], whether they may be proposals [...])."""
    boxes = box_ops.clip(box_ops.decode(deltas, anchors, settings.delta_weights), size)
    likely = jax.nn.sigmoid(logits) >= settings.score_threshold
    return boxes, box_ops.is_larger(boxes, settings.min_size) & likely
