"""Faster R-CNN (Ren et al., arXiv 1506.01497) on a feature pyramid: the RPN's proposals are Fast R-CNN's regions."""

from typing import ClassVar

import jax

from fpn_jax.models.detector import Scalars, image_keys
from fpn_jax.models.fast_rcnn import FastRCNN
from fpn_jax.models.rpn import RPN
from fpn_jax.types import Batch, Detections


class FasterRCNN(RPN, FastRCNN, kw_only=True):
    """Two-stage detector: both heads read one pyramid and are trained together."""

    class_agnostic: ClassVar[bool] = False
    needs_proposals: ClassVar[bool] = False

    @property
    def counted_levels(self) -> dict[str, tuple[int, ...]]:
        """The levels that `level_counts` counts."""
        return {"rpn": self.rpn_settings.levels, "box": self.box_settings.levels}

    def losses(self, batch: Batch, key: jax.Array, train: bool = True) -> tuple[Scalars, Scalars]:
        """(losses, statistics) of a batch, scalars; the loss of the detector is the plain sum of the losses.

        key seeds the sampling of anchors and RoIs.
        """
        pyramid = self.features(batch.image, batch.size, train)
        keys = image_keys(key, len(batch.image), 2)
        # The RPN learns from the anchors that are drawn below: what is predicted of all is for the proposals alone.
        predicted = self.predict_without_gradient(pyramid, batch.image.shape[1:3])
        proposals = self.propose(*predicted, batch.size, True)
        rpn_losses, rpn_statistics, pyramid = self.anchor_losses(pyramid, batch, keys[0])
        box_losses, box_statistics = self.roi_losses(pyramid, proposals.boxes, proposals.valid, batch, keys[1], train)
        return rpn_losses | box_losses, rpn_statistics | box_statistics

    def detect(self, batch: Batch) -> Detections:
        """Detections in pixels of the resized image."""
        pyramid = self.features(batch.image, batch.size)
        found = self.propose(*self.predict_anchors(pyramid, batch.image.shape[1:3]), batch.size)
        return self.detect_in(pyramid, found.boxes, found.valid, batch.size)

    def level_counts(self, batch: Batch) -> dict[str, dict[str, jax.Array]]:
        """Those of `RPN` and of `FastRCNN`."""
        pyramid = self.features(batch.image, batch.size)
        logits, deltas, anchors = self.predict_anchors(pyramid, batch.image.shape[1:3])
        found = self.propose(logits, deltas, anchors, batch.size)
        return {
            "rpn": self.anchor_counts(anchors, found, batch),
            "box": self.roi_counts(found.boxes, found.valid, batch),
        }
