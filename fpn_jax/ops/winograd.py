"""3x3 convolutions with fewer multiplications (Lavin and Gray, arXiv 1509.09308), for backends that lack them.

F(2x2, 3x3): four outputs of a channel take 16 products in place of 36, each a matrix product over all tiles. On a CPU
XLA's own convolution leaves that undone, and its weight gradient of a large map takes many times the forward pass.

The transformed tiles take four times the memory of the map, so a map is worked through in strips of rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fpn_jax.ops.strips import take_rows

# Rows of tiles in a strip, at most. At 336 columns and 256 channels a strip's tiles take 27 MB.
_STRIP = 10

Grid = list[list[jax.Array]]  # 4 x 4 entries of tiles, or 2 x 2


def conv3x3(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, rectify: bool = False) -> jax.Array:
    """Convolution of x [b h w c] with kernel [3 3 c c'], stride 1 and a zero on every side, plus bias [c'].

    -> [b h w c'], as exact as the direct sum to within a few units in the last place of the largest terms. With rectify
    no less than 0: a ReLU in the strips, where one behind them would need a second map.
    """
    return _conv3x3(x, kernel, bias, rectify)


# Jitted to be traced once for all layers of the same shapes.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
@functools.partial(jax.jit, static_argnums=3)
def _conv3x3(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, rectify: bool) -> jax.Array:
    return _in_strips(x, kernel, bias, rectify, kernel[0, 0, 0, :1])


def _in_strips(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, rectify: bool, fill: jax.Array) -> jax.Array:
    """As `conv3x3`, begun once there is `fill` [1], any value."""
    b, h, w, c = x.shape
    strips, rows, columns = _strips(h, w)
    kernels = [_kernel_parts(part, 1) for part in _kernel_parts(kernel, 0)]

    def add_strip(i: jax.Array, y: jax.Array) -> jax.Array:
        tiles = _input_tiles(_strip(x, i, rows, 1))
        flat = [[tiles[u][v].reshape(b * rows * columns, c) for v in range(4)] for u in range(4)]
        products = [[flat[u][v] @ kernels[u][v].reshape(c, -1) for v in range(4)] for u in range(4)]
        halves = [_output_parts([products[u][v] for u in range(4)]) for v in range(4)]
        outputs = [_output_parts([halves[v][row] for v in range(4)]) for row in range(2)]
        shape = b, rows, columns, y.shape[-1]
        mine = jnp.stack([jnp.stack([part.reshape(shape) for part in row], 3) for row in outputs], 2)
        mine = mine.reshape(b, 2 * rows, 2 * columns, y.shape[-1])
        mine = mine if bias is None else mine + bias
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.maximum(mine, 0) if rectify else mine, 2 * rows * i, 1)

    # All of it is written over. Zeros would be a constant, which XLA keeps in memory from the first loop to the last.
    y = jnp.broadcast_to(fill, (b, 2 * strips * rows, 2 * columns, kernel.shape[-1]))
    return jax.lax.fori_loop(0, strips, add_strip, y)[:, :h, :w]


def _forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, rectify: bool
) -> tuple[jax.Array, tuple[Any, ...]]:
    y = _conv3x3(x, kernel, bias, rectify)
    return y, (x, kernel, bias, y if rectify else None)


@functools.partial(jax.jit, static_argnums=0)
def _backward(rectify: bool, residual: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, ...]:
    x, kernel, bias, y = residual
    gradient = jnp.where(y > 0, gradient, 0) if rectify else gradient
    of_kernel, of_bias = _parameter_gradients(x, gradient)
    # In this order, which XLA would not keep by itself: x need not be there any more while its gradient is made.
    of_x = _in_strips(gradient, kernel[::-1, ::-1].swapaxes(2, 3), None, False, of_bias[:1])
    return of_x, of_kernel, None if bias is None else of_bias


_conv3x3.defvjp(_forward, _backward)


def _parameter_gradients(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [b h w c], gradient [b h w c'] -> [3 3 c c'], [c'], by the transpose of every step of the convolution.

    Both in one loop: XLA would put the sum of a bias of its own off to the end of the step, and keep the map till then.
    """
    b, h, w, c = x.shape
    strips, rows, columns = _strips(h, w)

    def add_strip(total: tuple[Grid, jax.Array], i: jax.Array) -> tuple[tuple[Grid, jax.Array], None]:
        products, biases = total
        tiles, mine = _input_tiles(_strip(x, i, rows, 1)), _strip(gradient, i, rows, 0)
        halves = [_output_parts_transposed([mine[:, row::2, column::2] for row in range(2)]) for column in range(2)]
        spread = [_output_parts_transposed([halves[column][u] for column in range(2)]) for u in range(4)]
        flat = [
            [[x[u][v].reshape(b * rows * columns, x[u][v].shape[-1]) for x in (tiles, spread)] for v in range(4)]
            for u in range(4)
        ]
        products = [[products[u][v] + flat[u][v][0].T @ flat[u][v][1] for v in range(4)] for u in range(4)]
        return (products, biases + mine.sum((0, 1, 2))), None

    none = [[jnp.zeros((c, gradient.shape[-1]), x.dtype)] * 4] * 4, jnp.zeros(gradient.shape[-1], x.dtype)
    (total, of_bias), _ = jax.lax.scan(add_strip, none, jnp.arange(strips))
    taps = [_kernel_parts_transposed([total[u][v] for u in range(4)]) for v in range(4)]
    of_kernel = jnp.stack([jnp.stack(_kernel_parts_transposed([taps[v][row] for v in range(4)])) for row in range(3)])
    return of_kernel, of_bias


def _strips(h: int, w: int) -> tuple[int, int, int]:
    """(strips, rows of tiles of each, columns of tiles): tiles are 2 x 2 outputs, which read 4 x 4 inputs."""
    tiles = -(-h // 2)
    strips = -(-tiles // _STRIP)
    return strips, -(-tiles // strips), -(-w // 2)


def _strip(x: jax.Array, i: jax.Array, rows: int, border: int) -> jax.Array:
    """The i-th strip of x [b h w c] with zeros around whole tiles and `border`: [b 2*rows+2*border w' c]."""
    _, h, w, _ = x.shape
    strips, _, columns = _strips(h, w)
    below, right = 2 * rows * strips - h + border, 2 * columns - w + border
    return take_rows(x, 2 * rows * i - border, 2 * rows + 2 * border, border, below, border, right)


def _input_tiles(strip: jax.Array) -> Grid:
    """B^T d B of all tiles of a strip with its border, each entry [b rows columns c]."""
    return [_input_parts(part, 2) for part in _input_parts(strip, 1)]


def _input_parts(x: jax.Array, axis: int) -> list[jax.Array]:
    """B^T d of equation 7 along an axis: four arrays with one entry for each tile."""
    d = [jax.lax.slice_in_dim(x, i, x.shape[axis] - 3 + i, 2, axis) for i in range(4)]
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _kernel_parts(kernel: jax.Array, axis: int) -> list[jax.Array]:
    """G g along an axis."""
    g = [jax.lax.slice_in_dim(kernel, i, i + 1, 1, axis) for i in range(3)]
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _kernel_parts_transposed(m: list[jax.Array]) -> list[jax.Array]:
    """G^T m: three taps."""
    return [m[0] + (m[1] + m[2]) / 2, (m[1] - m[2]) / 2, (m[1] + m[2]) / 2 + m[3]]


def _output_parts(m: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """A^T m: the first and the second of two neighbouring outputs."""
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


def _output_parts_transposed(y: list[jax.Array]) -> list[jax.Array]:
    """A y: what two neighbouring outputs pass back."""
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]
