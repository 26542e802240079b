"""Strips of rows, in which large maps are worked through on a CPU: what is made for a strip stays small."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fpn_jax.ops.platforms import apart


def rows_of_strip(h: int, w: int, cells: int) -> int:
    """The most rows that a map of h x w cells can be cut into evenly with no more than `cells` in a strip, else one."""
    return max((n for n in range(1, h + 1) if h % n == 0 and n * w <= cells), default=1)


def take_rows(
    x: jax.Array, first: jax.Array, height: int, above: int, below: int, left: int = 0, right: int = 0
) -> jax.Array:
    """Rows first .. first + height of x [b h w c] with zeros around it -> [b height left+w+right c].

    first: from -above to h + below - height. No copy of the map with its zeros is made, which XLA would keep beside the
    map for the backward pass.
    """
    return _take_rows_apart(x, first, height, above, below, left, right)


def _take_rows(x: jax.Array, first: jax.Array, height: int, above: int, below: int, left: int, right: int) -> jax.Array:
    h = x.shape[1]
    begin = jnp.clip(first, 0, max(h - height, 0))
    rows = jax.lax.dynamic_slice_in_dim(x, begin, min(height, h), 1)
    rows = jnp.pad(rows, ((0, 0), (above, below), (left, right), (0, 0)))
    return jax.lax.dynamic_slice_in_dim(rows, first - begin + above, height, 1)


_take_rows_apart = apart(_take_rows, range(2, 7))  # or XLA makes the rows anew for each that reads them


def product_of_cells(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """x [n c], gradient [n c'] -> x^T gradient, float32 [c c']: a sum over strips in less would lose what is added."""
    return jnp.matmul(x.T, gradient, preferred_element_type=jnp.float32)


def after(first: jax.Array, x: jax.Array) -> jax.Array:
    """x, once there is `first`; all NaN if the first number of that is NaN.

    An order that XLA must keep. Of a layer's two gradients, that of the kernel has to come first, or XLA puts it off to
    the end of the step and keeps the maps that it is made of (benchmarks/LOG.md).
    """
    return jnp.where(jnp.isnan(first.reshape(-1)[:1]).any(), jnp.nan, x)


def blank(once: jax.Array, shape: Sequence[int]) -> jax.Array:
    """An array of `shape` to be written over in a loop, made once there is `once` and of its dtype.

    Zeros would be a constant, which XLA keeps in memory from the first loop to the last.
    """
    return jnp.broadcast_to(once.reshape(-1)[:1].sum(dtype=once.dtype), shape)
