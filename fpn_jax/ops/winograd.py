"""3x3 convolutions with fewer multiplications (Lavin and Gray, arXiv 1509.09308), for backends that lack them.

F(4x4, 3x3): sixteen outputs of a channel take 36 products in place of 144, each a matrix product over all tiles. On a
CPU XLA's own convolution leaves that undone, and its weight gradient of a large map takes many times the forward pass.

The rule is that of Toom and Cook: polynomials are multiplied by their values at six points. The usual ones, 0, 1, -1,
2, -2 and infinity, have two to five times the rounding of 0, 1/√2, -1/√2, √2, -√2 and infinity (benchmarks/LOG.md).

The transformed tiles take more than twice the memory of the map, so a map is worked through in strips of rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.ops.strips import blank, take_rows

# Tiles in a strip, at most, unless a row has more. Of 256 channels their transforms take 9 MB, and so do the products.
_TILES = 256


def _rule(points: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B^T [m+2 m+2], G [m+2 3] and A^T [m m+2] of F(m, 3) by m + 1 points and infinity, as equation 7 has them.

    A row of G evaluates the kernel at a point, divided by the product of the point's distances to the others. A row of
    B^T has the coefficients of the polynomial that is 0 at all others.
    """
    others = [[q for q in points if q != p] for p in points]
    data = [[*np.poly(rest)[::-1], 0] for rest in others]
    kernel = [[p**i / np.prod([p - q for q in rest]) for i in range(3)] for p, rest in zip(points, others, strict=True)]
    outputs = [[p**i for p in points] + [i + 2 == len(points)] for i in range(len(points) - 1)]
    with_infinity = [*data, np.poly(points)[::-1]], [*kernel, [0, 0, 1]], outputs
    return tuple(np.asarray(x, np.float32) for x in with_infinity)


_DATA, _KERNEL, _OUTPUTS = _rule((0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)))


def conv3x3(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, rectify: bool = False) -> jax.Array:
    """Convolution of x [b h w c] with kernel [3 3 c c'], stride 1 and a zero on every side, plus bias [c'].

    -> [b h w c'], float32, with some five times the rounding of the direct sum, a few millionths of the largest value.
    With rectify no less than 0: a ReLU in the strips, where one behind them would need a second map.
    """
    return _conv3x3(x, kernel, bias, rectify)


# Jitted to be traced once for all layers of the same shapes.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
@functools.partial(jax.jit, static_argnums=3)
def _conv3x3(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, rectify: bool) -> jax.Array:
    return _in_strips(x, kernel, bias, rectify, kernel)


def _in_strips(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, rectify: bool, once: jax.Array) -> jax.Array:
    """As `conv3x3`, begun once there is `once`, any array."""
    b, h, w, c = x.shape
    strips, rows, columns = _strips(b, h, w)
    height, width, features = 4 * rows, 4 * columns, kernel.shape[-1]
    kernels = _both_axes(_KERNEL, kernel.reshape(9, c, features))

    def add_strip(i: jax.Array, y: jax.Array) -> jax.Array:
        first = jnp.minimum(height * i, y.shape[1] - height)  # the last strip begins earlier, and makes some rows anew
        mine = take_rows(x, first - 1, height + 2, 1, y.shape[1] - h + 1, 1, width - w + 1)
        products = _transformed(mine, _DATA, rows, columns).reshape(36, -1, c) @ kernels
        outputs = _both_axes(_OUTPUTS, products).reshape(4, 4, b, rows, columns, features)
        outputs = outputs.transpose(2, 3, 0, 4, 1, 5).reshape(b, height, width, features)
        outputs = outputs if bias is None else outputs + bias
        return jax.lax.dynamic_update_slice_in_dim(y, jnp.maximum(outputs, 0) if rectify else outputs, first, 1)

    y = blank(once, (b, max(h, height), width, features))
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
    of_x = _in_strips(gradient, kernel[::-1, ::-1].swapaxes(2, 3), None, False, of_bias)
    return of_x, of_kernel, None if bias is None else of_bias


_conv3x3.defvjp(_forward, _backward)


def _parameter_gradients(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [b h w c], gradient [b h w c'] -> [3 3 c c'], [c'], by the transpose of every step of the convolution.

    Both in one loop: XLA would put the sum of a bias of its own off to the end of the step, and keep the map till then.
    """
    b, h, w, c = x.shape
    features = gradient.shape[-1]
    strips, rows, columns = _strips(b, h, w)
    height, right = 4 * rows, 4 * columns - w
    below = height * strips - h

    def add_strip(total: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        products, biases = total
        inputs = take_rows(x, height * i - 1, height + 2, 1, below + 1, 1, right + 1)
        outputs = take_rows(gradient, height * i, height, 0, below, 0, right)
        tiles = _transformed(inputs, _DATA, rows, columns).reshape(36, -1, c)
        spread = _transformed(outputs, _OUTPUTS.T, rows, columns).reshape(36, -1, features)
        own = jnp.einsum("pnc,pnk->pck", tiles, spread)
        return (jnp.where(i > 0, products + own, own), biases + outputs.sum((0, 1, 2))), None

    none = blank(gradient, (36, c, features)), jnp.zeros(features, x.dtype)
    (products, of_bias), _ = jax.lax.scan(add_strip, none, jnp.arange(strips))
    return _both_axes(_KERNEL.T, products).reshape(3, 3, c, features), of_bias


def _strips(b: int, h: int, w: int) -> tuple[int, int, int]:
    """(strips, rows of tiles of each, columns of tiles): tiles are 4 x 4 outputs, which read 6 x 6 inputs."""
    tiles, columns = -(-h // 4), -(-w // 4)
    most = max(1, _TILES // max(1, b * columns))
    strips = -(-tiles // most)
    return strips, -(-tiles // strips), columns


def _transformed(x: jax.Array, matrix: np.ndarray, rows: int, columns: int) -> jax.Array:
    """M d M^T of windows d of x [b h' w' c] at every fourth row and column -> [n n b rows columns c]; M [n size]."""
    for axis, count in ((2, columns), (1, rows)):
        begins = range(matrix.shape[1])
        axis += x.ndim - 4
        x = jnp.stack([jax.lax.slice_in_dim(x, i, i + 4 * count - 3, 4, axis) for i in begins])
        x = jnp.tensordot(matrix, x, 1)
    return x


def _both_axes(matrix: np.ndarray, x: jax.Array) -> jax.Array:
    """M d M^T along the first axis of x [size * size ...], which has rows and columns -> [n * n ...]; M [n size]."""
    return jnp.tensordot(np.kron(matrix, matrix), x, 1)
