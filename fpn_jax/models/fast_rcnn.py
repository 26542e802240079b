"""Fast R-CNN (Girshick, arXiv 1504.08083) on a feature pyramid, with proposals that come with the images."""

from typing import ClassVar

import flax.linen as nn
import jax

from fpn_jax.models.detector import Detector, Scalars, count_levels, image_keys
from fpn_jax.models.heads import box
from fpn_jax.types import Batch, Detections


class FastRCNN(Detector, kw_only=True):
    """Classifies and refines given regions: `batch.proposals` [b r 4] with `batch.proposals_valid` [b r].

    Attributes:
        box_head: RoI features -> class logits and deltas per RoI.
        box_settings: named differences between published implementations.
    """

    box_head: nn.Module
    box_settings: box.BoxSettings = box.BoxSettings()

    needs_proposals: ClassVar[bool] = True

    @property
    def counted_levels(self) -> dict[str, tuple[int, ...]]:
        """The levels that `level_counts` counts."""
        return {"box": self.box_settings.levels}

    def roi_losses(
        self,
        pyramid: dict[int, jax.Array],
        proposals: jax.Array,
        proposals_valid: jax.Array,
        batch: Batch,
        keys: jax.Array,
        train: bool,
    ) -> tuple[Scalars, Scalars]:
        """(losses, statistics) of RoIs drawn from proposals [b r 4] by keys [b]."""
        with jax.named_scope("roi_sampling"):
            rois = box.sample_rois(
                self.box_settings,
                self.box_head.num_classes,
                proposals,
                proposals_valid,
                batch.boxes,
                batch.labels,
                batch.valid,
                keys,
                self.per_device,
            )
        with jax.named_scope("roi_align"):
            pooled = box.roi_features(self.box_settings, pyramid, rois.boxes, self.per_device)
        with jax.named_scope("box_head"):
            levels = box.levels_of(self.box_settings, rois.boxes)
            logits, deltas = self.box_head(pooled, train and "box_head" not in self.frozen_parts, levels)
        with jax.named_scope("box_losses"):
            return box.box_losses(self.box_settings, logits, deltas, rois)

    def detect_in(
        self, pyramid: dict[int, jax.Array], proposals: jax.Array, proposals_valid: jax.Array, size: jax.Array
    ) -> Detections:
        """Detections made of proposals [b r 4]; size [b 2]."""
        with jax.named_scope("roi_align"):
            pooled = box.roi_features(self.box_settings, pyramid, proposals, self.per_device)
        with jax.named_scope("box_head"):
            logits, deltas = self.box_head(pooled, False, box.levels_of(self.box_settings, proposals))
        with jax.named_scope("detect"):
            given = proposals, proposals_valid, size
            return box.detect(self.box_settings, logits, deltas, *given, self.per_device)

    def losses(self, batch: Batch, key: jax.Array, train: bool = True) -> tuple[Scalars, Scalars]:
        """(losses, statistics) of a batch, scalars; the loss of the detector is the plain sum of the losses."""
        pyramid = self.features(batch.image, batch.size, train)
        keys = image_keys(key, len(batch.image), 1)[0]
        return self.roi_losses(pyramid, batch.proposals, batch.proposals_valid, batch, keys, train)

    def detect(self, batch: Batch) -> Detections:
        """Detections in pixels of the resized image."""
        pyramid = self.features(batch.image, batch.size)
        return self.detect_in(pyramid, batch.proposals, batch.proposals_valid, batch.size)

    def level_counts(self, batch: Batch) -> dict[str, dict[str, jax.Array]]:
        """{"box": {"objects", "rois"}}, int32 [b l]: the levels that objects' boxes and proposals are read from."""
        return {"box": self.roi_counts(batch.proposals, batch.proposals_valid, batch)}

    def roi_counts(self, proposals: jax.Array, proposals_valid: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """As `level_counts`, of proposals [b r 4]."""

        def count(boxes: jax.Array, valid: jax.Array) -> jax.Array:
            return count_levels(self.box_settings.levels, box.levels_of(self.box_settings, boxes), valid)

        return {"objects": count(batch.boxes, batch.valid), "rois": count(proposals, proposals_valid)}
