"""The feature pyramid network (Lin et al., arXiv 1612.03144, section 3)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fpn_jax.models.layers import conv_norm, lecun_uniform, upsample_nearest


class FPN(nn.Module):
    """{l: C_l [b h w c]} -> {l: P_l [b h w channels]} for the same levels and one coarser one.

    Top-down pathway: M_l = 1x1(C_l) + upsample(M_{l+1}); P_l = 3x3(M_l); the coarsest M has no second term. There is
    no non-linearity in these layers. The extra level subsamples the coarsest P by 2 (section 4.1).

    Attributes:
        channels: d of the paper, of every output.
        extra_level: whether to append the subsampled level (P6), which only the RPN reads.
        norm: "none" as in the paper, or "frozen_bn", "bn", "gn" behind every convolution, in place of its bias.
    """

    channels: int = 256
    extra_level: bool = True
    norm: str = "none"
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: dict[int, jax.Array], train: bool = False) -> dict[int, jax.Array]:
        def layer(x: jax.Array, name: str, level: int, kernel: int) -> jax.Array:
            names = f"{name}{level}", f"{name}_norm{level}"
            how = {"norm": self.norm, "eps": self.norm_eps, "dtype": self.dtype, "init": lecun_uniform}
            return conv_norm(x, names, self.channels, kernel, train, **how)

        merged: dict[int, jax.Array] = {}
        above = None
        for level in sorted(features, reverse=True):
            x = layer(features[level], "lateral", level, 1)
            if above is not None:
                x = x + upsample_nearest(above, x.shape[1:3])
            merged[level] = above = x
        pyramid = {level: layer(merged[level], "smooth", level, 3) for level in features}
        if self.extra_level:
            top = max(features)
            pyramid[top + 1] = pyramid[top][:, ::2, ::2]
        return pyramid
