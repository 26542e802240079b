"""Faster R-CNN on a feature pyramid: how the backbone, the neck, the RPN and the box head make one detector."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fpn_jax.models.heads import box, rpn
from fpn_jax.models.layers import Pixels, normalize_pixels
from fpn_jax.types import Batch, Detections


class FasterRCNN(nn.Module):
    """Two-stage detector. `losses` is what training differentiates, `detect` what inference returns.

    Attributes:
        backbone: image -> {l: C_l}; neck: {l: C_l} -> {l: P_l}; rpn_head: {l: P_l} -> logits and deltas per anchor;
        box_head: RoI features -> class logits and deltas per RoI.
        rpn_settings, box_settings: named differences between published implementations.
        pixels: what the backbone's weights expect of its input.
    """

    backbone: nn.Module
    neck: nn.Module
    rpn_head: nn.Module
    box_head: nn.Module
    rpn_settings: rpn.RPNSettings = rpn.RPNSettings()
    box_settings: box.BoxSettings = box.BoxSettings()
    pixels: Pixels = Pixels()
    dtype: Any = jnp.float32

    def features(self, image: jax.Array, size: jax.Array, train: bool = False) -> dict[int, jax.Array]:
        """RGB image [b h w 3], size [b 2] -> the pyramid {l: P_l}. h and w are multiples of the coarsest C's stride."""
        x = normalize_pixels(image, size, self.pixels, self.dtype)
        with jax.named_scope("backbone"):
            bottom_up = self.backbone(x, train)
        with jax.named_scope("neck"):
            return self.neck(bottom_up, train)

    def propose(
        self, pyramid: dict[int, jax.Array], image_size: tuple[int, int], size: jax.Array, train: bool
    ) -> tuple[rpn.Proposals, jax.Array, jax.Array, jax.Array]:
        """The RPN: (proposals, logits [b r], deltas [b r 4], anchors [r 4]), r over all levels one after another."""
        pyramid = {level: pyramid[level] for level in self.rpn_settings.levels}
        with jax.named_scope("rpn_head"):
            logits, deltas = self.rpn_head(pyramid)
        grids = {level: x.shape[1:3] for level, x in pyramid.items()}
        anchors = rpn.make_anchors(self.rpn_settings, grids, image_size)
        with jax.named_scope("proposals"):
            proposals = rpn.propose(self.rpn_settings, logits, deltas, anchors, size, train)
        flat_logits, flat_deltas = (jnp.concatenate(list(x.values()), axis=1) for x in (logits, deltas))
        return (
            proposals,
            flat_logits,
            flat_deltas,
            jnp.concatenate([jnp.asarray(a) for a in anchors.values()]),
        )

    def losses(
        self, batch: Batch, key: jax.Array, train: bool = True
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """(losses, statistics) of a batch, scalars; the loss of the detector is the plain sum of the losses.

        key seeds the sampling of anchors and RoIs; each image has its own stream, so that the numbers do not depend
        on how the batch is spread over devices.
        """
        pyramid = self.features(batch.image, batch.size, train)
        keys = jax.random.split(key, 2 * batch.image.shape[0]).reshape(2, -1)
        proposals, logits, deltas, anchors = self.propose(pyramid, batch.image.shape[1:3], batch.size, True)
        with jax.named_scope("rpn_losses"):
            rpn_losses, rpn_statistics = rpn.rpn_losses(
                self.rpn_settings, logits, deltas, anchors, batch.boxes, batch.valid, keys[0]
            )
        with jax.named_scope("roi_sampling"):
            rois = box.sample_rois(
                self.box_settings,
                self.box_head.num_classes,
                proposals.boxes,
                proposals.valid,
                batch.boxes,
                batch.labels,
                batch.valid,
                keys[1],
            )
        with jax.named_scope("roi_align"):
            pooled = box.roi_features(self.box_settings, pyramid, rois.boxes)
        with jax.named_scope("box_head"):
            class_logits, box_deltas = self.box_head(pooled, train)
        with jax.named_scope("box_losses"):
            box_losses, box_statistics = box.box_losses(self.box_settings, class_logits, box_deltas, rois)
        return rpn_losses | box_losses, rpn_statistics | box_statistics

    def detect(self, image: jax.Array, size: jax.Array) -> Detections:
        """RGB image [b h w 3], size [b 2] -> detections in pixels of the resized image."""
        pyramid = self.features(image, size)
        proposals, *_ = self.propose(pyramid, image.shape[1:3], size, False)
        with jax.named_scope("roi_align"):
            pooled = box.roi_features(self.box_settings, pyramid, proposals.boxes)
        with jax.named_scope("box_head"):
            class_logits, box_deltas = self.box_head(pooled)
        with jax.named_scope("detect"):
            return box.detect(self.box_settings, class_logits, box_deltas, proposals.boxes, proposals.valid, size)

    @property
    def frozen(self) -> tuple[tuple[str, ...], ...]:
        """Beginnings of parameter paths that are not trained, such as ("backbone", "stem_")."""
        return tuple(("backbone", prefix) for prefix in self.backbone.frozen_prefixes)
