"""The first layers of a backbone on a TPU, whose matrix units see three channels of an image as 3 of 128 lanes."""

import jax
import jax.numpy as jnp


def space_to_depth(x: jax.Array, n: int) -> jax.Array:
    """x [b h w c] -> [b h/n w/n n*n*c]: blocks of n x n cells as channels, row after row of a block.

    n divides h and w. Every n-th column is taken by a product with a matrix [w w] of zeros and ones, which is exact for
    normal numbers; one that is not finite spreads over its row. As slices that takes a TPU, with columns in lanes, as
    long as the convolution behind it, where at 1344 columns the product takes a tenth (benchmarks/LOG.md).
    """
    b, h, w, c = x.shape
    column, phase, block = (jax.lax.broadcasted_iota(jnp.int32, (w, n, w // n), axis) for axis in range(3))
    chosen = (column == n * block + phase).astype(x.dtype)
    rows = x.reshape(b, h // n, n, w, c)
    return jnp.einsum("byiwc,wjv->byvijc", rows, chosen, precision="highest").reshape(b, h // n, w // n, n * n * c)


def space_to_depth_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of x [b h w c] by kernel [k k c f], k odd, with stride 2 and k // 2 zeros on every side.

    Written as one of stride 1 over blocks of 2 x 2 cells with 4 c channels, as in MLPerf's ResNet: with the 3 of
    an image, a TPU first copies it so that its images lie in lanes, few as they are of 128 (benchmarks/LOG.md). x is
    finite, see `space_to_depth`.
    """
    k = len(kernel)
    front = k // 2 % 2  # zeros before the kernel, so that it begins with a block
    blocks, before = (k + front + 1) // 2, (k // 2 + front) // 2
    kernel = _of_blocks(jnp.pad(kernel, ((front, 2 * blocks - k - front),) * 2 + ((0, 0),) * 2), 2)
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    return _convolve(space_to_depth(x, 2), kernel, ((before, blocks - 1 - before),) * 2)


def conv_relu_pool(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """The stem of a ResNet: x [b h w c], finite, kernel [7 7 c f], bias [f] -> [b h/4 w/4 f]; 4 divides h and w.

    A convolution with stride 2 and 3 zeros on every side, ReLU, and the maximum of 3 x 3 windows with stride 2, padded
    by 1 with what never wins. Written as convolutions over blocks of 4 x 4 cells, each with both columns of a block's
    four results side by side as features: a quarter of the places, and all of 128 lanes at f = 64. The maximum over
    the windows' three rows is that of three such convolutions, which a TPU takes as they leave its matrix units; one
    of them is of the block above. (As slices of one, it wrote and read them: 5 M cycles in place of 3; see
    benchmarks/LOG.md.)
    """
    f, blocks = kernel.shape[-1], space_to_depth(x, 4)

    def results(row: int, above: int) -> jax.Array:
        """Row 0 or 1 of the results of each block, or of the block `above`: [b h/4 w/4 2*f]."""
        rows = (2 * row + 1, 4 - 2 * row)
        both = [jnp.pad(kernel, (rows, (2 * j + 1, 4 - 2 * j), (0, 0), (0, 0))) for j in range(2)]
        return _convolve(blocks, _of_blocks(jnp.concatenate(both, -1), 4), ((1 + above, 1 - above), (1, 1)))

    above = results(1, above=1)
    first = (jnp.arange(above.shape[1]) == 0)[:, None, None]  # has no block above
    above = jnp.where(first, jnp.array(-jnp.inf, above.dtype), above)
    highest = jnp.maximum(jnp.maximum(results(0, above=0), results(1, above=0)), above)
    highest = jnp.maximum(highest + jnp.tile(bias, 2), 0)
    left, right = highest[..., :f], highest[..., f:]
    before = jnp.pad(highest, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1, f:]  # 0 is below nothing
    return jnp.maximum(jnp.maximum(left, right), before)


def _of_blocks(kernel: jax.Array, n: int) -> jax.Array:
    """A kernel [k k c f] of cells, n divides k, as one of `space_to_depth`'s blocks, [k/n k/n n*n*c f]."""
    k, _, c, f = kernel.shape
    kernel = kernel.reshape(k // n, n, k // n, n, c, f).transpose(0, 2, 1, 3, 4, 5)
    return kernel.reshape(k // n, k // n, n * n * c, f)


def _convolve(x: jax.Array, kernel: jax.Array, padding: tuple[tuple[int, int], ...]) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
