"""From pixels to what a backbone's weights expect."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

ORDERS = {"rgb": 1, "bgr": -1}  # order of the channels -> step through RGB


@flax.struct.dataclass
class Pixels:
    """What a backbone's weights expect of its input; the defaults are torchvision's."""

    order: str = "rgb"  # of the channels, mean and std; detectron2: "bgr"
    white: float = 1.0  # what 255 becomes before mean and std; detectron2: 255
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def normalize_pixels(image: jax.Array, size: jax.Array, pixels: Pixels, dtype: Any = jnp.float32) -> jax.Array:
    """RGB, 0 to 255, uint8 or float32 [b h w 3] -> (image * white / 255 - mean) / std, with zeros outside `size` [b 2].

    Padding is zero after normalising, not before, as in torchvision and detectron2: a network must not see an edge
    between the picture and a padding that is darker than any picture.
    """
    x = image[..., :: ORDERS[pixels.order]].astype(jnp.float32) / (255 / pixels.white)
    x = (x - jnp.array(pixels.mean)) / jnp.array(pixels.std)
    rows, columns = jnp.arange(image.shape[1]), jnp.arange(image.shape[2])
    inside = (rows < size[:, :1])[:, :, None] & (columns < size[:, 1:])[:, None, :]
    return jnp.where(inside[..., None], x, 0).astype(dtype)
