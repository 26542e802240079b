"""3x3 convolutions with fewer multiplications (Lavin and Gray, arXiv 1509.09308), for backends that lack them.

F(2x2, 3x3): four outputs of a channel take 16 products in place of 36, each a matrix product over all tiles. On a CPU
XLA's own convolution leaves that undone, and its weight gradient of a large map takes many times the forward pass.
"""

import jax
import jax.numpy as jnp


def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of x [b h w c] with kernel [3 3 c c'], stride 1 and a zero on every side -> [b h w c'].

    As exact as the direct sum to within a few units in the last place of the largest terms.
    """
    return _conv3x3(x, kernel)


@jax.custom_vjp
def _conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    rows, columns = (h + 1) // 2, (w + 1) // 2  # tiles of 2 x 2 outputs, which read 4 x 4 inputs
    padded = jnp.pad(x, ((0, 0), (1, 1 + h % 2), (1, 1 + w % 2), (0, 0)))
    tiles = [_input_parts(part, 2, columns) for part in _input_parts(padded, 1, rows)]
    kernels = [_kernel_parts(part, 1) for part in _kernel_parts(kernel, 0)]
    products = [
        [tiles[i][j].reshape(-1, c) @ kernels[i][j].reshape(c, -1) for j in range(4)] for i in range(4)
    ]  # fmt: skip
    upper_lower = [_output_parts([products[i][j] for i in range(4)]) for j in range(4)]
    outputs = [_output_parts([upper_lower[j][row] for j in range(4)]) for row in range(2)]
    shape = b, rows, columns, kernel.shape[-1]
    y = jnp.stack([jnp.stack([part.reshape(shape) for part in row], 3) for row in outputs], 2)
    return y.reshape(b, 2 * rows, 2 * columns, -1)[:, :h, :w]


def _input_parts(x: jax.Array, axis: int, tiles: int) -> list[jax.Array]:
    """B^T d of equation 7 along an axis: four arrays with one entry for each tile."""
    d = [jax.lax.slice_in_dim(x, i, i + 2 * tiles - 1, 2, axis) for i in range(4)]
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _kernel_parts(kernel: jax.Array, axis: int) -> list[jax.Array]:
    """G g along an axis."""
    g = [jax.lax.slice_in_dim(kernel, i, i + 1, 1, axis) for i in range(3)]
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _output_parts(m: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A^T m: the first and the second of two neighbouring outputs."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv3x3(x, kernel), (x, kernel)


def _backward(residual: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    # From the inputs anew: the transformed tiles are four times as large, and cheap to make.
    return jax.vjp(_conv3x3.fun, *residual)[1](gradient)


_conv3x3.defvjp(_forward, _backward)
