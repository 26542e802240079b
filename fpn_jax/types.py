"""The letters that every docstring uses, and the three values that cross room boundaries.

    b  images in a batch           h w  rows and columns (of an image or of a feature map)
    c  channels                    m    objects in an image, padded
    k  classes without background  l    level of the pyramid: its stride is 2**l pixels
    a  anchors per cell            r    boxes of a set: anchors, proposals or RoIs
    d  detections of an image

Boxes are float32 `x1 y1 x2 y2` in pixels of the resized, padded image; a box covers [x1, x2) x [y1, y2), so its width
is x2 - x1 (no +1). Sizes are `height, width`. Labels are 0 .. k-1; background is the model's own business.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax

# What is done to a function of batches whose images have nothing to do with each other. Between devices XLA does not
# always see that: it would send all images to all of them for a top_k, and ask them all in every round of an NMS.
PerDevice = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(function: Callable[..., Any]) -> Callable[..., Any]:
    """The whole batch at once, as it is: right on one device; `fpn_jax.training.sharding.per_device` is for several."""
    return function


# What tells the compiler where maps {l: [b h w c]} lie, where several devices share the rows of an image.
SpreadMaps = Callable[[Any], Any]


def as_they_are(maps: Any) -> Any:
    """Nothing told; `fpn_jax.training.sharding.spread_maps` is for several devices."""
    return maps


@flax.struct.dataclass
class Batch:
    """What the training step and the detector take. Images are normalised on the device, whatever their type."""

    image: jax.Array  # uint8, or float32 0 .. 255 unrounded, [b h w 3], RGB, zeros below and right of `size`
    size: jax.Array  # int32 [b 2], height and width of the picture inside the padding
    boxes: jax.Array  # float32 [b m 4]
    labels: jax.Array  # int32 [b m]
    valid: jax.Array  # bool [b m], False where a row of `boxes` is padding
    proposals: jax.Array | None = None  # float32 [b r 4], best first, where regions are given (Fast R-CNN)
    proposals_valid: jax.Array | None = None  # bool [b r]


@flax.struct.dataclass
class Detections:
    """Boxes found in each image, best first."""

    boxes: jax.Array  # float32 [b d 4]
    scores: jax.Array  # float32 [b d], 0 .. 1
    labels: jax.Array  # int32 [b d]
    valid: jax.Array  # bool [b d], False where a row is padding


@flax.struct.dataclass
class TrainState:
    """All that a training step changes; the checkpoint is this and the position in the data."""

    step: jax.Array  # int32 [], optimizer steps done
    params: Any  # nested dict of float32 arrays
    batch_stats: Any  # nested dict: means and variances of batch norms, {} without any
    opt_state: Any  # optax state
    ema_params: Any  # like params, or {} when the average is switched off
