"""Maps [b h w c] of other sizes: upsampling in a neck, max pooling in a backbone."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.ops.platforms import by_platform


def upsample_nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Repeat rows and columns of x [b h w c] up to `size` (height, width): row i reads row floor(i h / height)."""
    return by_platform(x, tpu=lambda x: repeat_by_products(x, size), default=lambda x: repeat_by_index(x, size))


def repeat_by_index(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """`upsample_nearest` as copies."""
    for axis, n in ((1, size[0]), (2, size[1])):
        if n == 2 * x.shape[axis]:
            x = jnp.repeat(x, 2, axis)
        elif n != x.shape[axis]:
            x = jnp.take(x, jnp.arange(n) * x.shape[axis] // n, axis)
    return x


def repeat_by_products(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """`upsample_nearest` as products with matrices of zeros and ones, which is exact for finite x.

    A TPU keeps columns and channels in tiles, where copies of columns and their gradient, a sum over pairs, cost
    several times what its matrix units take for this (benchmarks/LOG.md).
    """

    def matrix(n: int, of: int) -> jax.Array:
        return jnp.asarray(np.arange(of) == np.arange(n)[:, None] * of // n, x.dtype)

    across = jnp.einsum("vw,bhwc->bhvc", matrix(size[1], x.shape[2]), x, precision="highest")
    return jnp.einsum("uh,bhvc->buvc", matrix(size[0], x.shape[1]), across, precision="highest")


UPSAMPLINGS = ("nearest", "bilinear", "transposed")


class Upsample(nn.Module):
    """x [b h w c] -> [b height width c], to a `size` (height, width) of at most twice its own.

    Attributes:
        how: "nearest", without weights; "bilinear", with pixel centres at halves (no corners aligned); "transposed",
            a 4x4 transposed convolution of stride 2 on each channel, which begins as bilinear doubling (Long et al.,
            arXiv 1411.4038, section 3.3) and is cut to `size`.
    """

    how: str = "nearest"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int]) -> jax.Array:
        if self.how == "nearest":
            return upsample_nearest(x, size)
        if self.how == "bilinear":
            return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "linear").astype(self.dtype)
        c = x.shape[-1]
        tent = jnp.array([0.25, 0.75, 0.75, 0.25])
        kernel = self.param(
            "kernel", lambda _, shape: jnp.broadcast_to(jnp.outer(tent, tent)[..., None, None], shape), (4, 4, 1, c)
        )
        y = jax.lax.conv_general_dilated(
            jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (0, 0)), "edge"),
            kernel.astype(self.dtype),
            window_strides=(1, 1),
            padding=((0, 0), (0, 0)),
            lhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=c,
        )
        return y[:, : size[0], : size[1]]


def max_pool(x: jax.Array, window: int, stride: int) -> jax.Array:
    """Maximum over windows of x [b h w c], padded by window // 2 on every side with values that never win.

    Written as maxima of shifted copies, first over rows, then over columns: the gradient of XLA's own windowed
    maximum is a scatter, which on a CPU costs more than the convolutions around it. TPUs, where such copies are dear,
    take XLA's own, with the gradient of the other.
    """
    how = {"window": window, "stride": stride}
    return by_platform(
        x, tpu=functools.partial(max_of_windows, **how), default=functools.partial(max_of_shifted, **how)
    )


def max_of_shifted(x: jax.Array, window: int, stride: int) -> jax.Array:
    """`max_pool` as maxima of shifted copies."""
    pad = window // 2
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        last = (x.shape[axis] - window) // stride * stride
        shifted = (jax.lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(window))
        x = functools.reduce(jnp.maximum, shifted)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def max_of_windows(x: jax.Array, window: int, stride: int) -> jax.Array:
    """`max_pool` as XLA's windowed maximum."""
    pad = window // 2
    shape, strides, padding = (1, window, window, 1), (1, stride, stride, 1), ((0, 0), (pad, pad), (pad, pad), (0, 0))
    return jax.lax.reduce_window(x, np.array(-np.inf, x.dtype), jax.lax.max, shape, strides, padding)


def _windows_forward(x: jax.Array, window: int, stride: int) -> tuple[jax.Array, jax.Array]:
    return max_of_windows(x, window, stride), x


def _windows_backward(window: int, stride: int, x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    _, pull = jax.vjp(lambda x: max_of_shifted(x, window, stride), x)
    return pull(gradient)


max_of_windows.defvjp(_windows_forward, _windows_backward)
