"""3x3 convolutions with fewer multiplications (Lavin and Gray, arXiv 1509.09308), for backends that lack them.

F(2x2, 3x3): four outputs of a channel take 16 products in place of 36, each a matrix product over all tiles. On a CPU
XLA's own convolution leaves that undone, and its weight gradient of a large map takes many times the forward pass.

The transformed tiles take four times the memory of the map, so a map is worked through in strips of rows.
"""

import jax
import jax.numpy as jnp

# Rows of tiles in a strip, at most. At 336 columns and 256 channels a strip's tiles take 27 MB.
_STRIP = 10

Grid = list[list[jax.Array]]  # 4 x 4 entries of tiles, or 2 x 2


def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of x [b h w c] with kernel [3 3 c c'], stride 1 and a zero on every side -> [b h w c'].

    As exact as the direct sum to within a few units in the last place of the largest terms.
    """
    return _conv3x3(x, kernel)


# Jitted to be traced once for all layers of the same shapes.
@jax.custom_vjp
@jax.jit
def _conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    strips, rows, columns = _strips(h, w)
    kernels = [_kernel_parts(part, 1) for part in _kernel_parts(kernel, 0)]
    padded = _pad(x, 1, 1 + 2 * strips * rows - h, 1 + 2 * columns - w)

    def add_strip(i: jax.Array, y: jax.Array) -> jax.Array:
        tiles = _input_tiles(padded, i, rows, columns)
        flat = [[tiles[u][v].reshape(b * rows * columns, c) for v in range(4)] for u in range(4)]
        products = [[flat[u][v] @ kernels[u][v].reshape(c, -1) for v in range(4)] for u in range(4)]
        halves = [_output_parts([products[u][v] for u in range(4)]) for v in range(4)]
        outputs = [_output_parts([halves[v][row] for v in range(4)]) for row in range(2)]
        shape = b, rows, columns, y.shape[-1]
        mine = jnp.stack([jnp.stack([part.reshape(shape) for part in row], 3) for row in outputs], 2)
        mine = mine.reshape(b, 2 * rows, 2 * columns, y.shape[-1])
        return jax.lax.dynamic_update_slice_in_dim(y, mine, 2 * rows * i, 1)

    # All of it is written over. Zeros would be a constant, which XLA keeps in memory from the first loop to the last.
    y = jnp.broadcast_to(x[:1, :1, :1, :1], (b, 2 * strips * rows, 2 * columns, kernel.shape[-1]))
    return jax.lax.fori_loop(0, strips, add_strip, y)[:, :h, :w]


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv3x3(x, kernel), (x, kernel)


def _backward(residual: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residual
    return _conv3x3(gradient, kernel[::-1, ::-1].swapaxes(2, 3)), _kernel_gradient(x, gradient)


_conv3x3.defvjp(_forward, _backward)


@jax.jit
def _kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """x [b h w c], gradient [b h w c'] -> [3 3 c c'], by the transpose of every step of the convolution."""
    b, h, w, c = x.shape
    strips, rows, columns = _strips(h, w)
    below, right = 2 * strips * rows - h, 2 * columns - w
    x, gradient = _pad(x, 1, 1 + below, 1 + right), _pad(gradient, 0, below, right)

    def add_strip(total: Grid, i: jax.Array) -> tuple[Grid, None]:
        tiles = _input_tiles(x, i, rows, columns)
        mine = jax.lax.dynamic_slice_in_dim(gradient, 2 * rows * i, 2 * rows, 1)
        halves = [_output_parts_transposed([mine[:, row::2, column::2] for row in range(2)]) for column in range(2)]
        spread = [_output_parts_transposed([halves[column][u] for column in range(2)]) for u in range(4)]
        flat = [
            [[x[u][v].reshape(b * rows * columns, x[u][v].shape[-1]) for x in (tiles, spread)] for v in range(4)]
            for u in range(4)
        ]
        return [[total[u][v] + flat[u][v][0].T @ flat[u][v][1] for v in range(4)] for u in range(4)], None

    none = [[jnp.zeros((c, gradient.shape[-1]), x.dtype)] * 4] * 4
    total, _ = jax.lax.scan(add_strip, none, jnp.arange(strips))
    taps = [_kernel_parts_transposed([total[u][v] for u in range(4)]) for v in range(4)]
    return jnp.stack([jnp.stack(_kernel_parts_transposed([taps[v][row] for v in range(4)])) for row in range(3)])


def _strips(h: int, w: int) -> tuple[int, int, int]:
    """(strips, rows of tiles of each, columns of tiles): tiles are 2 x 2 outputs, which read 4 x 4 inputs."""
    tiles = -(-h // 2)
    strips = -(-tiles // _STRIP)
    return strips, -(-tiles // strips), -(-w // 2)


def _pad(x: jax.Array, before: int, below: int, right: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (before, below), (before, right), (0, 0)))


def _input_tiles(padded: jax.Array, strip: jax.Array, rows: int, columns: int) -> Grid:
    """B^T d B of all tiles of a strip, each entry [b rows columns c]."""
    x = jax.lax.dynamic_slice_in_dim(padded, 2 * rows * strip, 2 * rows + 2, 1)
    return [_input_parts(part, 2, columns) for part in _input_parts(x, 1, rows)]


def _input_parts(x: jax.Array, axis: int, tiles: int) -> list[jax.Array]:
    """B^T d of equation 7 along an axis: four arrays with one entry for each tile."""
    d = [jax.lax.slice_in_dim(x, i, i + 2 * tiles - 1, 2, axis) for i in range(4)]
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
