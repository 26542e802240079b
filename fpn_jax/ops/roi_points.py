"""Where RoIAlign samples a map, and between which cells it interpolates there."""

import jax
import jax.numpy as jnp


def corner_and_sides(rois: jax.Array, scale: jax.Array, aligned: bool) -> tuple[jax.Array, jax.Array]:
    """(low corner, sides), both float32 [... 2] (x, y) in cells, of rois [... 4] in pixels.

    scale [...]: cells per pixel; aligned: as for `roi_align`.
    """
    corners = rois.astype(jnp.float32) * scale[..., None] - (0.5 if aligned else 0.0)
    sides = corners[..., 2:] - corners[..., :2]
    return corners[..., :2], sides if aligned else jnp.maximum(sides, 1)


def neighbours(
    start: jax.Array, side: jax.Array, points: jax.Array, length: jax.Array, bin: jax.Array, point: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The two cells beside a sampling point along one axis: ((low, high) int32, (their weights) float32).

    The RoI begins at `start` and its bins have sides of `side` cells with `points` points each; the map is `length`
    cells long. Of these arrays, which broadcast, the point-th point of the bin-th bin is meant. The weights add up to
    the point's share of its bin, 1 / points, or to 0 where it does not count.
    """
    at = start + bin * side + (point + 0.5) * side / jnp.maximum(points, 1)
    counts = (at >= -1) & (at <= length) & (point < points)
    at = jnp.where(counts, jnp.clip(at, 0, length - 1), 0)  # also where `at` is NaN: the cells must be in the map
    low = jnp.floor(at)
    share = counts / jnp.maximum(points, 1)
    weights = (1 - (at - low)) * share, (at - low) * share
    low = low.astype(jnp.int32)
    return (low, jnp.minimum(low + 1, length - 1)), weights
