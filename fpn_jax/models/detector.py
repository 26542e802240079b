"""What all detectors have: a backbone, a neck, and the pyramid that comes out."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fpn_jax.models.pixels import Pixels, normalize_pixels
from fpn_jax.types import PerDevice, SpreadMaps, as_they_are, together

Scalars = dict[str, jax.Array]


class Detector(nn.Module, kw_only=True):
    """`losses(batch, key)` is what training differentiates, `detect(batch)` what inference returns.

    Both are for the detectors that are made of this. So is `level_counts(batch)` -> {"rpn": {"objects": int32 [b l],
    ...}, ...}: how many objects, proposals and RoIs of each image are each level's. `counted_levels` are the levels, by
    part.

    Attributes:
        backbone: image -> {l: C_l}; neck: {l: C_l} -> {l: P_l}.
        pixels: what the backbone's weights expect of its input.
        frozen_parts: which of "backbone", "neck", "rpn_head" and "box_head" are not trained at all; their batch norms
            keep their statistics, too.
        per_device: what keeps the work on single images where they are; see `PerDevice`.
        spread_maps: what keeps the rows of one image's maps on several devices; see `SpreadMaps`.
    """

    backbone: nn.Module
    neck: nn.Module
    pixels: Pixels = Pixels()
    frozen_parts: tuple[str, ...] = ()
    per_device: PerDevice = together
    spread_maps: SpreadMaps = as_they_are
    dtype: Any = jnp.float32

    class_agnostic: ClassVar[bool] = False  # whether it only tells where objects are
    needs_proposals: ClassVar[bool] = False  # whether its batches must come with regions

    def features(self, image: jax.Array, size: jax.Array, train: bool = False) -> dict[int, jax.Array]:
        """RGB image [b h w 3], size [b 2] -> the pyramid {l: P_l}. h and w are multiples of the coarsest C's stride."""
        x = normalize_pixels(image, size, self.pixels, self.dtype)
        with jax.named_scope("backbone"):
            bottom_up = self.spread_maps(self.backbone(x, train and "backbone" not in self.frozen_parts))
            bottom_up = jax.lax.stop_gradient(bottom_up) if "backbone" in self.frozen_parts else bottom_up
        with jax.named_scope("neck"):
            pyramid = self.spread_maps(self.neck(bottom_up, train and "neck" not in self.frozen_parts))
            both = {"backbone", "neck"} <= set(self.frozen_parts)
            return jax.lax.stop_gradient(pyramid) if both else pyramid

    @property
    def coarsest_stride(self) -> int:
        """Of all maps, in pixels."""
        bottom_up = self.backbone.output_levels()
        return 2 ** max(*bottom_up, *self.neck.output_levels(bottom_up))

    @property
    def frozen(self) -> tuple[tuple[str, ...], ...]:
        """Beginnings of parameter paths that are not trained, such as ("backbone", "stem_")."""
        parts = tuple((part,) for part in self.frozen_parts)
        return (*parts, *(("backbone", prefix) for prefix in getattr(self.backbone, "frozen_prefixes", ())))


def image_keys(key: jax.Array, count: int, streams: int) -> jax.Array:
    """Keys [streams count]: one of each image, so that what is drawn does not depend on how the batch is spread."""
    return jax.random.split(key, streams * count).reshape(streams, -1)


def count_levels(levels: tuple[int, ...], of: jax.Array, valid: jax.Array) -> jax.Array:
    """How many of the valid rows belong to each level: of int32 [b r], valid bool [b r] -> int32 [b l]."""
    mine = (of[..., None] == jnp.asarray(levels)) & valid[..., None]
    return mine.sum(1, dtype=jnp.int32)
