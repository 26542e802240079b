"""The feature pyramid network (Lin et al., arXiv 1612.03144, section 3)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fpn_jax.models.layers import Conv, upsample_nearest


class FPN(nn.Module):
    """{l: C_l [b h w c]} -> {l: P_l [b h w channels]} for the same levels and one coarser one.

    Top-down pathway: M_l = 1x1(C_l) + upsample(M_{l+1}); P_l = 3x3(M_l); the coarsest M has no second term. There is
    no non-linearity in these layers. The extra level subsamples the coarsest P by 2 (section 4.1).

    Attributes:
        channels: d of the paper, of every output.
        extra_level: whether to append the subsampled level (P6), which only the RPN reads.
    """

    channels: int = 256
    extra_level: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: dict[int, jax.Array], train: bool = False) -> dict[int, jax.Array]:
        merged: dict[int, jax.Array] = {}
        above = None
        for level in sorted(features, reverse=True):
            x = Conv(self.channels, 1, dtype=self.dtype, name=f"lateral{level}")(features[level])
            if above is not None:
                x = x + upsample_nearest(above, x.shape[1:3])
            merged[level] = above = x
        pyramid = {
            level: Conv(self.channels, 3, dtype=self.dtype, name=f"smooth{level}")(merged[level]) for level in features
        }
        if self.extra_level:
            top = max(features)
            pyramid[top + 1] = pyramid[top][:, ::2, ::2]
        return pyramid
