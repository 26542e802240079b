"""The featurized image pyramid (Lin et al., arXiv 1612.03144, figure 1a): one map of each of several image sizes."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fpn_jax.errors import UserError


class ImagePyramid(nn.Module):
    """x [b h w 3] -> {l: one map of the network run on the image at each scale}, in training and in testing.

    At scale s the map of stride 2**level has stride 2**level / s in the image: it becomes level `level - log2(s)`.
    The weights are the network's own, under its own names, and shared by all scales; the cost is the sum over scales.

    Attributes:
        net: a backbone.
        scales: powers of two that the image's sides are multiplied by, such as (2, 1, 0.5).
        level: which of the network's maps is taken.
    """

    net: nn.Module
    scales: tuple[float, ...]
    level: int = 5
    dtype: Any = jnp.float32

    def setup(self) -> None:
        nn.share_scope(self, self.net)

    def __call__(self, x: jax.Array, train: bool = False) -> dict[int, jax.Array]:
        features = {}
        for level, scale in sorted(zip(self.output_levels(), self.scales, strict=True)):
            b, h, w, c = x.shape
            resized = x
            if scale != 1:  # antialiased where it shrinks
                resized = jax.image.resize(x, (b, round(h * scale), round(w * scale), c), "linear").astype(x.dtype)
            features[level] = self.net(resized, train)[self.level]
        return features

    def output_levels(self) -> tuple[int, ...]:
        """The level of each scale's map, in the order of `scales`. Raises `UserError` for scales that have none."""
        if self.level not in self.net.output_levels():
            raise UserError(f"model.image_pyramid.level is {self.level}: the backbone gives {self.net.output_levels()}")
        for scale in self.scales:
            if scale <= 0 or not math.log2(scale).is_integer():
                raise UserError(f"model.image_pyramid.scales is {self.scales}: {scale} is not a power of two")
        levels = tuple(self.level - int(math.log2(scale)) for scale in self.scales)
        if min(levels) < 0:
            raise UserError(
                f"model.image_pyramid.scales is {self.scales}: level {self.level} at scale {max(self.scales)} would be "
                f"level {min(levels)}; take a smaller scale"
            )
        return levels

    @property
    def frozen_prefixes(self) -> tuple[str, ...]:
        """Those of the network."""
        return self.net.frozen_prefixes
