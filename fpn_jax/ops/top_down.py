"""One step of the top-down pathway (FPN, section 3): a lateral 1x1 convolution plus the map above, twice as large.

For CPUs, in strips of rows: three maps that XLA would write and read again, the convolution's result and the two that
the gradients are summed from, are never whole. And the gradients come at once. XLA puts those of kernel and bias
off to the end of the step, and keeps the map's gradient till then, where no one waits for that of a frozen stage.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fpn_jax.ops.strips import after, blank, product_of_cells, rows_of_strip, take_rows

# Cells of an image's map above in a strip, at most, unless a row has more.
_STRIP = 1024


@jax.custom_vjp
@jax.jit
def lateral_plus_above(x: jax.Array, kernel: jax.Array, bias: jax.Array, above: jax.Array) -> jax.Array:
    """1x1 convolution of x [b 2*h 2*w c], kernel [c c'] and bias [c'], plus above [b h w c'], each cell for four of x.

    -> [b 2*h 2*w c'].
    """
    b, h, w, features = above.shape
    rows = rows_of_strip(h, w, _STRIP)

    def add_strip(i: jax.Array, y: jax.Array) -> jax.Array:
        mine = take_rows(x, 2 * rows * i, 2 * rows, 0, 0).reshape(-1, x.shape[-1]) @ kernel + bias
        higher = take_rows(above, rows * i, rows, 0, 0)[:, :, None, :, None]
        both = mine.reshape(b, rows, 2, w, 2, features) + higher
        return jax.lax.dynamic_update_slice_in_dim(y, both.reshape(b, 2 * rows, 2 * w, features), 2 * rows * i, 1)

    return jax.lax.fori_loop(0, h // rows, add_strip, blank(above, (b, 2 * h, 2 * w, features)))


def _forward(x: jax.Array, kernel: jax.Array, bias: jax.Array, above: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    return lateral_plus_above(x, kernel, bias, above), (x, kernel, bias)


@jax.jit
def _backward(residual: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    x, kernel, bias = residual
    b, h, w, features = gradient.shape
    rows = rows_of_strip(h // 2, w // 2, _STRIP)

    def add_strip(i: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        of_kernel, of_bias, of_above = totals
        read = take_rows(x, 2 * rows * i, 2 * rows, 0, 0).reshape(-1, x.shape[-1])
        own = take_rows(gradient, 2 * rows * i, 2 * rows, 0, 0)
        # Slices, not a sum over axes of a reshaped map, which XLA would compute number by number.
        fours = sum(own[:, i::2, j::2].astype(jnp.float32) for i in range(2) for j in range(2))
        of_above = jax.lax.dynamic_update_slice_in_dim(of_above, fours.astype(own.dtype), rows * i, 1)
        return of_kernel + product_of_cells(read, own.reshape(-1, features)), of_bias + fours.sum((0, 1, 2)), of_above

    none = jnp.zeros(kernel.shape, jnp.float32), jnp.zeros(features, jnp.float32)
    of_above = blank(gradient, (b, h // 2, w // 2, features))
    of_kernel, of_bias, of_above = jax.lax.fori_loop(0, h // 2 // rows, add_strip, (*none, of_above))
    of_kernel, of_bias = of_kernel.astype(kernel.dtype), of_bias.astype(bias.dtype)
    return gradient @ after(of_kernel, kernel).T, of_kernel, of_bias, of_above


lateral_plus_above.defvjp(_forward, _backward)
