"""3x3 convolutions of stride 2 whose gradients are matrix products, for CPUs.

XLA's CPU backend takes the gradient of the input by way of all nine products of every cell, at once in memory, and that
of the kernel by way of two copies of the input: 77 and 69 MB for the first such layer of a ResNet at 800 x 1344, on top
of what it plans for a step (benchmarks/LOG.md). The input's takes no less here, but in the plan, at the end of the
backward pass, where there is room.
"""

import jax
import jax.numpy as jnp

from fpn_jax.ops.strips import after, product_of_cells, rows_of_strip, take_rows

# Cells of an image's gradient in a strip, at most, unless a row has more.
_STRIP = 4096


@jax.custom_vjp
@jax.jit
def halving_conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of x [b h w c] with kernel [3 3 c c'], stride 2 and a zero on every side.

    -> [b ceil(h/2) ceil(w/2) c'].
    """
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return halving_conv3x3(x, kernel), (x, kernel)


@jax.jit
def _backward(residual: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residual
    of_kernel = _kernel_gradient(x, gradient)
    return _input_gradient(after(of_kernel, kernel), gradient)[:, : x.shape[1], : x.shape[2]], of_kernel


halving_conv3x3.defvjp(_forward, _backward)


def _input_gradient(kernel: jax.Array, gradient: jax.Array) -> jax.Array:
    """[b h w c'] -> [b 2*h 2*w c]: of each square of four inputs the first is read by one output, the last by four."""
    b, h, w, _ = gradient.shape
    c = kernel.shape[2]
    padded = jnp.pad(gradient, ((0, 0), (0, 1), (0, 1), (0, 0)))
    # Along an axis input 2 i is the middle of output i, and 2 i + 1 the last of output i and the first of output i + 1.
    readers = [[(0, 1)], [(0, 2), (1, 0)]]  # (output - i, tap)

    def of_inputs(row: int, column: int) -> jax.Array:
        taps = [(i, j, u, v) for i, u in readers[row] for j, v in readers[column]]
        read = jnp.concatenate([padded[:, i : i + h, j : j + w] for i, j, _, _ in taps], -1)
        return read @ jnp.concatenate([kernel[u, v].T for _, _, u, v in taps])

    squares = jnp.stack([jnp.stack([of_inputs(row, column) for column in range(2)], 3) for row in range(2)], 2)
    return squares.reshape(b, 2 * h, 2 * w, c)


def _kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """x [b h w c], gradient [b ceil(h/2) ceil(w/2) c'] -> [3 3 c c'], a product for each tap and strip of rows."""
    _, h, w, features = gradient.shape
    c, rows = x.shape[-1], rows_of_strip(h, w, _STRIP)
    below, right = 2 * h - x.shape[1], 2 * w - x.shape[2]

    def add_strip(i: jax.Array, total: list[list[jax.Array]]) -> list[list[jax.Array]]:
        read = take_rows(x, 2 * rows * i - 1, 2 * rows + 1, 1, below, 1, right)
        own = jax.lax.dynamic_slice_in_dim(gradient, i * rows, rows, 1).reshape(-1, features)
        taps = [[read[:, u : u + 2 * rows : 2, v : v + 2 * w : 2].reshape(-1, c) for v in range(3)] for u in range(3)]
        return [[total[u][v] + product_of_cells(taps[u][v], own) for v in range(3)] for u in range(3)]

    none = [[jnp.zeros((c, features), jnp.float32)] * 3] * 3
    total = jax.lax.fori_loop(0, h // rows, add_strip, none)
    return jnp.stack([jnp.stack(row) for row in total]).astype(x.dtype)
