"""The region proposal network as a detector of its own (section 4.1 of arXiv 1612.03144, Table 1)."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.models.detector import Detector, Scalars, count_levels, image_keys
from fpn_jax.models.heads import rpn
from fpn_jax.ops.anchors import AnchorGrid
from fpn_jax.ops.boxes import iou
from fpn_jax.types import Batch, Detections


class RPN(Detector, kw_only=True):
    """Class-agnostic detector: its detections are proposals, all with label 0.

    Attributes:
        rpn_head: {l: P_l} -> logits and deltas per anchor.
        rpn_settings: named differences between published implementations.
    """

    rpn_head: nn.Module
    rpn_settings: rpn.RPNSettings = rpn.RPNSettings()

    class_agnostic: ClassVar[bool] = True

    @property
    def counted_levels(self) -> dict[str, tuple[int, ...]]:
        """The levels that `level_counts` counts."""
        return {"rpn": self.rpn_settings.levels}

    def predict_anchors(
        self, pyramid: dict[int, jax.Array], image_size: tuple[int, int]
    ) -> tuple[dict[int, jax.Array], dict[int, jax.Array], dict[int, jax.Array]]:
        """(logits {l: [b r]}, deltas {l: [b r 4]}, anchors {l: [r 4]}), r over the anchors of each level.

        Logits and deltas are of the head's dtype.
        """
        with jax.named_scope("rpn_head"):
            return *self.rpn_head(self._read(pyramid)), self.anchors(pyramid, image_size)

    def predict_without_gradient(
        self, pyramid: dict[int, jax.Array], image_size: tuple[int, int]
    ) -> tuple[dict[int, jax.Array], dict[int, jax.Array], dict[int, jax.Array]]:
        """`predict_anchors` of boxes to learn from, and not through: nothing is kept of the head's maps."""
        if self.is_initializing():
            return self.predict_anchors(pyramid, image_size)
        head, variables = self.rpn_head.unbind()
        with jax.named_scope("rpn_head"):
            found = head.apply(jax.lax.stop_gradient(variables), jax.lax.stop_gradient(self._read(pyramid)))
            return *found, self.anchors(pyramid, image_size)

    def anchor_grids(self, pyramid: dict[int, jax.Array], image_size: tuple[int, int]) -> dict[int, AnchorGrid]:
        """How the anchors of an image of `image_size` (height, width) lie on each map."""
        grids = {level: x.shape[1:3] for level, x in self._read(pyramid).items()}
        return rpn.anchor_grids(self.rpn_settings, grids, image_size)

    def anchors(self, pyramid: dict[int, jax.Array], image_size: tuple[int, int]) -> dict[int, jax.Array]:
        """Anchors {l: [r 4]} of an image of `image_size` (height, width)."""
        return {level: grid.boxes() for level, grid in self.anchor_grids(pyramid, image_size).items()}

    def anchor_losses(
        self, pyramid: dict[int, jax.Array], batch: Batch, keys: jax.Array
    ) -> tuple[Scalars, Scalars, dict[int, jax.Array]]:
        """(losses, statistics, pyramid) of anchors drawn by keys [b], which the head looks at alone.

        The pyramid is for whoever reads it next, see `take_patches`.
        """
        anchors = self.anchor_grids(pyramid, batch.image.shape[1:3])
        with jax.named_scope("rpn_losses"):
            drawn = rpn.draw_anchors(self.rpn_settings, anchors, batch.boxes, batch.valid, keys, self.per_device)
            *predicted, read = self.rpn_head.of_drawn(self._read(pyramid), drawn.index, self.per_device)
            return *rpn.rpn_losses(self.rpn_settings, *predicted, drawn), pyramid | read

    def _read(self, pyramid: dict[int, jax.Array]) -> dict[int, jax.Array]:
        return {level: pyramid[level] for level in self.rpn_settings.levels}

    def propose(
        self,
        logits: dict[int, jax.Array],
        deltas: dict[int, jax.Array],
        anchors: dict[int, jax.Array],
        size: jax.Array,
        train: bool = False,
    ) -> rpn.Proposals:
        """Proposals of what `predict_anchors` gave; size [b 2]."""
        with jax.named_scope("proposals"):
            return rpn.propose(self.rpn_settings, logits, deltas, anchors, size, train, self.per_device)

    def losses(self, batch: Batch, key: jax.Array, train: bool = True) -> tuple[Scalars, Scalars]:
        """(losses, statistics) of a batch, scalars; the loss of the detector is the plain sum of the losses."""
        pyramid = self.features(batch.image, batch.size, train)
        losses, statistics, _ = self.anchor_losses(pyramid, batch, image_keys(key, len(batch.image), 1)[0])
        return losses, statistics

    def detect(self, batch: Batch) -> Detections:
        """Proposals in pixels of the resized image, scored by their probability to hold an object."""
        pyramid = self.features(batch.image, batch.size)
        found = self.propose(*self.predict_anchors(pyramid, batch.image.shape[1:3]), batch.size)
        return Detections(found.boxes, found.scores, jnp.zeros_like(found.levels), found.valid)

    def level_counts(self, batch: Batch) -> dict[str, dict[str, jax.Array]]:
        """{"rpn": {"objects", "proposals"}}, int32 [b l]: an object belongs to the level of its best anchor."""
        pyramid = self.features(batch.image, batch.size)
        logits, deltas, anchors = self.predict_anchors(pyramid, batch.image.shape[1:3])
        return {"rpn": self.anchor_counts(anchors, self.propose(logits, deltas, anchors, batch.size), batch)}

    def anchor_counts(
        self, anchors: dict[int, jax.Array], proposals: rpn.Proposals, batch: Batch
    ) -> dict[str, jax.Array]:
        """As `level_counts`, of the RPN alone."""
        levels = np.repeat(np.int32(list(anchors)), [len(a) for a in anchors.values()])
        flat = jnp.concatenate(list(anchors.values()))
        one_by_one = self.per_device(lambda images: jax.lax.map(lambda boxes: iou(boxes, flat).argmax(-1), images))
        best = one_by_one(batch.boxes)
        return {
            "objects": count_levels(self.rpn_settings.levels, jnp.asarray(levels)[best], batch.valid),
            "proposals": count_levels(self.rpn_settings.levels, proposals.levels, proposals.valid),
        }
