"""The box head of the C4 baseline: ResNet's last stage on every RoI (He et al., arXiv 1512.03385, appendix A)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fpn_jax.models.backbones.resnet import BLOCKS, stage
from fpn_jax.models.heads.box import class_layers


class Conv5Head(nn.Module):
    """RoI features of C4 [b r h w c] -> (class logits [b r k+1], deltas [b r s 4]), as `BoxHead`.

    The blocks of stage 5, the mean over what is left of h and w, and the two last layers. The blocks bear the names
    that they have in the backbone, whose pretrained weights they take.

    Attributes:
        blocks: of the stage; 0 takes the depth's.
        stride: of the first block: 2 for 14 x 14 bins (detectron2), 1 for 7 x 7.
        depth, width, groups, width_per_group, stride_in_1x1, norm, norm_eps: the backbone's own.
    """

    num_classes: int
    background: str = "first"
    blocks: int = 0
    stride: int = 2
    depth: int = 50
    width: int = 64
    groups: int = 1
    width_per_group: int = 64
    stride_in_1x1: bool = False
    norm: str = "frozen_bn"
    norm_eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, train: bool = False, levels: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        b, r = x.shape[:2]
        x = stage(self, x.reshape(b * r, *x.shape[2:]), 5, self.blocks or BLOCKS[self.depth][3], self.stride, train)
        x = x.mean((1, 2)).reshape(b, r, -1)
        return class_layers(x, self.num_classes, self.background, self.dtype)
