"""1x1 convolutions as matrix products, for CPUs, whose kernel gradients take the map in strips of rows.

The cells that a stride leaves would be kept from the forward pass to the backward (benchmarks/LOG.md). A strip reads
them anew.
"""

import functools

import jax
import jax.numpy as jnp

from fpn_jax.ops.strips import after, product_of_cells, rows_of_strip, take_rows

# Cells of an image's gradient in a strip, at most, unless a row has more.
_STRIP = 4096


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv1x1(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolution of x [b h w c] with kernel [c c'], without padding -> [b ceil(h/stride) ceil(w/stride) c']."""
    return x[:, ::stride, ::stride] @ kernel


def _forward(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return conv1x1(x, kernel, stride), (x, kernel)


@functools.partial(jax.jit, static_argnums=0)  # traced once for all layers of the same shapes
def _backward(stride: int, residual: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residual
    of_kernel = _kernel_gradient(x, gradient, stride)
    _, pull = jax.vjp(lambda x: x[:, ::stride, ::stride], x)
    return *pull(gradient @ after(of_kernel, kernel).T), of_kernel


conv1x1.defvjp(_forward, _backward)


def _kernel_gradient(x: jax.Array, gradient: jax.Array, stride: int) -> jax.Array:
    """x [b h w c], gradient [b ceil(h/stride) ceil(w/stride) c'] -> [c c']."""
    _, h, w, features = gradient.shape
    rows = rows_of_strip(h, w, _STRIP)
    below = h * stride - x.shape[1]

    def add_strip(i: jax.Array, total: jax.Array) -> jax.Array:
        read = take_rows(x, i * rows * stride, rows * stride, 0, below)[:, ::stride, ::stride]
        own = jax.lax.dynamic_slice_in_dim(gradient, i * rows, rows, 1)
        return total + product_of_cells(read.reshape(-1, x.shape[-1]), own.reshape(-1, features))

    none = jnp.zeros((x.shape[-1], features), jnp.float32)
    return jax.lax.fori_loop(0, h // rows, add_strip, none).astype(x.dtype)
