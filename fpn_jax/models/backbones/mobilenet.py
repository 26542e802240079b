"""MobileNetV3-Large (Howard et al., arXiv 1905.02244, table 1) as a bottom-up pathway, as torchvision builds it."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fpn_jax.errors import UserError
from fpn_jax.models.backbones.resnet import check_remat, recomputed
from fpn_jax.models.layers import Conv, conv_norm, relu


class Spec(NamedTuple):
    """One inverted residual."""

    kernel: int  # of the depthwise convolution
    expanded: int  # channels inside
    features: int  # channels of its output
    squeezes: bool  # whether squeeze-and-excitation weighs the channels inside
    activation: str
    stride: int


LARGE = (
    Spec(3, 16, 16, False, "relu", 1),
    Spec(3, 64, 24, False, "relu", 2),
    Spec(3, 72, 24, False, "relu", 1),
    Spec(5, 72, 40, True, "relu", 2),
    Spec(5, 120, 40, True, "relu", 1),
    Spec(5, 120, 40, True, "relu", 1),
    Spec(3, 240, 80, False, "hard_swish", 2),
    Spec(3, 200, 80, False, "hard_swish", 1),
    Spec(3, 184, 80, False, "hard_swish", 1),
    Spec(3, 184, 80, False, "hard_swish", 1),
    Spec(3, 480, 112, True, "hard_swish", 1),
    Spec(3, 672, 112, True, "hard_swish", 1),
    Spec(5, 672, 160, True, "hard_swish", 2),
    Spec(5, 960, 160, True, "hard_swish", 1),
    Spec(5, 960, 160, True, "hard_swish", 1),
)
STEM = 16  # channels of the first convolution
LAST = 960  # channels of the last 1x1
# Level -> the layer whose output it is: 0 is the stem, 1 to 15 the blocks, 16 the last 1x1. The strided blocks end a
# level, as torchvision cuts the network. Level 6 has the stride of level 5.
LAYERS = {1: 0, 2: 2, 3: 4, 4: 7, 5: 13, 6: 16}
ACTIVATIONS = {"relu": relu, "hard_swish": jax.nn.hard_swish}


class InvertedResidual(nn.Module):
    """1x1 to more channels (unless there are as many already), depthwise, squeeze-and-excitation, 1x1 to fewer."""

    spec: Spec
    norm: str
    norm_eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        spec, act = self.spec, ACTIVATIONS[self.spec.activation]

        def layer(x: jax.Array, name: str, features: int, kernel: int, stride: int = 1, groups: int = 1) -> jax.Array:
            names = f"{name}_conv", f"{name}_norm"
            how = {"norm": self.norm, "eps": self.norm_eps, "dtype": self.dtype}
            return conv_norm(x, names, features, kernel, train, stride=stride, groups=groups, **how)

        y = x
        if spec.expanded != x.shape[-1]:
            y = act(layer(y, "expand", spec.expanded, 1))
        y = act(layer(y, "depth", spec.expanded, spec.kernel, spec.stride, spec.expanded))
        if spec.squeezes:
            weight = relu(Conv(_eighths(spec.expanded / 4), 1, dtype=self.dtype, name="squeeze")(_mean(y)))
            y *= jax.nn.hard_sigmoid(Conv(spec.expanded, 1, dtype=self.dtype, name="excite")(weight))
        y = layer(y, "project", spec.features, 1)
        return x + y if x.shape == y.shape else y


class MobileNetV3(nn.Module):
    """x [b h w 3] -> {l: C_l} for the levels asked for, with 16, 24, 40, 80, 160 and 960 channels at levels 1 to 6.

    Levels 1 to 5 have stride 2**l; level 6 is the last 1x1 convolution, with the stride of level 5.

    Attributes:
        levels: of 1 to 6, ascending; torchvision's detectors take 5 and 6.
        norm: "frozen_bn", "bn" or "gn".
        frozen_stages: how many of the levels' stretches, from the stem on, are not trained: 3 freezes everything
            before level 4's own block, as torchvision does by default with pretrained weights.
        remat: levels, of 2 to 6, whose blocks are computed again in the backward pass, as in `ResNet`.
    """

    levels: tuple[int, ...] = (5, 6)
    norm: str = "frozen_bn"
    norm_eps: float = 1e-5
    frozen_stages: int = 3
    remat: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> dict[int, jax.Array]:
        frozen = self.frozen_layers
        how = {"norm": self.norm, "eps": self.norm_eps, "dtype": self.dtype}

        outputs = []
        for layer in range(LAYERS[max(self.output_levels())] + 1):
            live = train and layer >= frozen  # a frozen layer's batch norm stays as it is, too
            if layer == 0:
                x = jax.nn.hard_swish(conv_norm(x, ("stem_conv", "stem_norm"), STEM, 3, live, stride=2, **how))
            elif layer <= len(LARGE):
                spec, name = LARGE[layer - 1], f"block{layer:02d}"
                level = next(level for level, last in LAYERS.items() if layer <= last)
                block = recomputed(InvertedResidual) if level in self.remat and layer >= frozen else InvertedResidual
                x = block(spec, self.norm, self.norm_eps, self.dtype, name=name)(x, live)
            else:
                x = jax.nn.hard_swish(conv_norm(x, ("last_conv", "last_norm"), LAST, 1, live, **how))
            if layer == frozen - 1:
                x = jax.lax.stop_gradient(x)
            outputs.append(x)
        return {level: outputs[LAYERS[level]] for level in self.levels}

    def output_levels(self) -> tuple[int, ...]:
        """The levels of the outputs. Raises `UserError` if there is no such."""
        if not self.levels or not set(self.levels) <= set(LAYERS):
            raise UserError(f"model.backbone.levels is {self.levels}; choose some of {', '.join(map(str, LAYERS))}")
        if not 0 <= self.frozen_stages <= len(LAYERS):
            raise UserError(f"model.backbone.frozen_stages is {self.frozen_stages}; choose 0 to {len(LAYERS)}")
        check_remat(self.remat, tuple(level for level in LAYERS if 1 < level <= max(self.levels)))
        return self.levels

    @property
    def frozen_layers(self) -> int:
        """How many layers, the stem first, are not trained."""
        return [*LAYERS.values(), len(LARGE) + 2][self.frozen_stages] if self.frozen_stages else 0

    @property
    def frozen_prefixes(self) -> tuple[str, ...]:
        """Beginnings of the names of the parameters that are not trained."""
        names = ["stem_", *(f"block{i:02d}" for i in range(1, len(LARGE) + 1)), "last_"]
        return tuple(names[: self.frozen_layers])


def _mean(x: jax.Array) -> jax.Array:
    """[b h w c] -> [b 1 1 c]."""
    return x.mean((1, 2), keepdims=True)


def _eighths(channels: float) -> int:
    """The nearest multiple of 8 that loses less than a tenth (the paper's code)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
