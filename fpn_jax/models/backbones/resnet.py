"""ResNet (He et al., arXiv 1512.03385) and ResNeXt (Xie et al., 1611.05431): the last map of a stage is an output."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fpn_jax.errors import UserError
from fpn_jax.models.layers import conv_norm, relu

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Block(nn.Module):
    """A residual block: two 3x3 convolutions (basic) or 1x1, 3x3, 1x1 with four times the width at its end.

    `inner` are the channels of a bottleneck's 3x3, which works in `groups`.
    """

    width: int
    inner: int
    groups: int
    stride: int
    bottleneck: bool
    stride_in_1x1: bool
    norm: str
    norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def layer(x: jax.Array, name: str, features: int, kernel: int, stride: int = 1, groups: int = 1) -> jax.Array:
            names = f"conv{name}", f"norm{name}"
            how = {"norm": self.norm, "eps": self.norm_eps, "dtype": self.dtype}
            return conv_norm(x, names, features, kernel, train, stride=stride, groups=groups, **how)

        if self.bottleneck:
            first, second = (self.stride, 1) if self.stride_in_1x1 else (1, self.stride)
            y = relu(layer(x, "1", self.inner, 1, first))
            y = relu(layer(y, "2", self.inner, 3, second, self.groups))
            y = layer(y, "3", 4 * self.width, 1)
        else:
            y = relu(layer(x, "1", self.width, 3, self.stride))
            y = layer(y, "2", self.width, 3)
        if x.shape != y.shape:
            x = layer(x, "_shortcut", y.shape[-1], 1, self.stride)
        return relu(x + y)


def recomputed(block: type[nn.Module]) -> type[nn.Module]:
    """The block, called as (x, train), whose activations are computed again in the backward pass; names stay."""
    return nn.remat(block, static_argnums=(2,))


def check_remat(remat: tuple[int, ...], there: tuple[int, ...]) -> None:
    """Raise a `UserError` if a stage is to be computed again that is not there."""
    if not set(remat) <= set(there):
        raise UserError(f"model.backbone.remat is {remat}; choose some of the stages {', '.join(map(str, there))}")


def stage(
    net: nn.Module, x: jax.Array, level: int, blocks: int, stride: int, train: bool, block: type[nn.Module] = Block
) -> jax.Array:
    """The blocks of one stage, submodules of `net`, which has `ResNet`'s attributes: x [b h w c] -> [b h' w' c']."""
    width = net.width * 2 ** (level - 2)
    for i in range(blocks):
        x = block(
            width=width,
            inner=width * net.width_per_group // 64 * net.groups,
            groups=net.groups,
            stride=stride if i == 0 else 1,
            bottleneck=net.depth >= 50,
            stride_in_1x1=net.stride_in_1x1,
            norm=net.norm,
            norm_eps=net.norm_eps,
            dtype=net.dtype,
            name=f"stage{level}_block{i}",
        )(x, train)
    return x


class ResNet(nn.Module):
    """x [b h w 3] -> {2: C2, 3: C3, 4: C4, 5: C5}, where C_l has stride 2**l.

    Attributes:
        depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        blocks: blocks per stage, to build other sizes; None takes the depth's.
        last_level: 5; 4 stops at C4, for detectors that read no more.
        width: channels of the stem and of the first stage; each stage doubles them.
        groups, width_per_group: of a bottleneck's 3x3: 1 and 64 are ResNet, 32 and 8 are ResNeXt "32x8d", which has
            32 groups of 8 channels each in its first stage (at width 64).
        norm: "frozen_bn", "bn" or "gn".
        stride_in_1x1: where a bottleneck strides: False, the 3x3 (torchvision); True, the first 1x1 (the original).
        frozen_stages: how many of stem, stage 2, stage 3 ... are not trained. Detectors that start from ImageNet
            weights freeze 2; training from nothing needs 0.
        remat: levels of the stages of which only the blocks' inputs are kept for the backward pass, which computes the
            rest again (Chen et al., arXiv 1604.06174): the same results for less memory and another forward pass. No
            effect on CPUs, whose compiler notices that the two computations are the same.
    """

    depth: int = 50
    blocks: tuple[int, ...] | None = None
    last_level: int = 5
    width: int = 64
    groups: int = 1
    width_per_group: int = 64
    norm: str = "frozen_bn"
    norm_eps: float = 1e-5
    stride_in_1x1: bool = False
    frozen_stages: int = 2
    remat: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> dict[int, jax.Array]:
        def freeze(x: jax.Array, level: int) -> jax.Array:
            return jax.lax.stop_gradient(x) if level == self.frozen_stages else x

        def live(level: int) -> bool:
            return train and level > self.frozen_stages  # a frozen stage's batch norms stay as they are, too

        how = {"norm": self.norm, "eps": self.norm_eps, "dtype": self.dtype}
        x = freeze(conv_norm(x, ("stem_conv", "stem_norm"), self.width, 7, live(1), stride=2, pool=True, **how), 1)
        features = {}
        for level, blocks in zip(self.output_levels(), self.blocks or BLOCKS[self.depth], strict=False):
            # A frozen stage has no backward pass, and keeps nothing for one.
            block = recomputed(Block) if level in self.remat and level > self.frozen_stages else Block
            x = stage(self, x, level, blocks, 2 if level > 2 else 1, live(level), block)
            x = features[level] = freeze(x, level)
        return features

    def output_levels(self) -> tuple[int, ...]:
        """The levels of the outputs. Raises `UserError` naming the key of `config.model.backbone` that does not fit."""
        if self.depth not in BLOCKS:
            raise UserError(f"model.backbone.depth is {self.depth}; choose one of {', '.join(map(str, BLOCKS))}")
        if self.groups > 1 and self.depth < 50:
            raise UserError("model.backbone.groups needs bottlenecks; set model.backbone.depth to 50, 101 or 152")
        if not 2 <= self.last_level <= 5:
            raise UserError(f"model.backbone.last_level is {self.last_level}; choose 2 to 5")
        levels = tuple(range(2, 2 + len((self.blocks or BLOCKS[self.depth])[: self.last_level - 1])))
        if not 0 <= self.frozen_stages <= levels[-1]:
            raise UserError(f"model.backbone.frozen_stages is {self.frozen_stages}; choose 0 to {levels[-1]}")
        check_remat(self.remat, levels)
        return levels

    @property
    def frozen_prefixes(self) -> tuple[str, ...]:
        """Beginnings of the names of the parameters that are not trained."""
        return ("stem_", *(f"stage{level}_" for level in range(2, self.frozen_stages + 1)))[: self.frozen_stages]
