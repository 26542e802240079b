"""Convolutions, norms and ReLU, all [b h w c], with float32 parameters and the compute dtype that callers ask for."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.models.resampling import max_pool, upsample_nearest
from fpn_jax.ops.halving import halving_conv3x3
from fpn_jax.ops.platforms import apart, by_platform
from fpn_jax.ops.products import conv1x1
from fpn_jax.ops.stem import conv_relu_pool, space_to_depth_conv
from fpn_jax.ops.top_down import lateral_plus_above
from fpn_jax.ops.winograd import conv3x3

Init = nn.initializers.Initializer

# Cells times channels times features from which Winograd's rule is faster than XLA's convolution on a CPU, both forward
# and backward (benchmarks/LOG.md): P2 to P5 of an 800-pixel image at 256 channels, C2 to C4 of a ResNet. Not where
# channels are many beside the cells, as in C5: the kernel's transform is most of the work then.
_WINOGRAD_FROM = 25 * 40 * 256 * 256
_WINOGRAD_CELLS = 4  # for each channel, of those that are read or made

he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015, eq. 14
# Both frameworks' in the neck, detectron2's in the box head, where torchvision leaves torch's default.
lecun_uniform = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


@jax.custom_vjp
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), whose gradient is read off its output: `jax.nn.relu` keeps its input, too, which nothing else needs.

    The same values and gradients to the bit, none at 0. A training step needs a quarter less memory for it
    (benchmarks/LOG.md).
    """
    return jnp.maximum(x, 0)


def _relu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = by_platform(x, cpu=_kept_maximum, default=relu)
    return y, y


def _relu_backward(y: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    y = jax.lax.optimization_barrier(y)  # or the compiler keeps a mask, or what y is made of, beside y
    return (jnp.where(y > 0, gradient, jnp.zeros_like(gradient)),)


relu.defvjp(_relu_forward, _relu_backward)


def _maximum(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


# Looked into, the convolution's result and the shortcut are kept, of which it is made anew in the backward pass.
_kept_maximum = apart(_maximum)


class Conv(nn.Module):
    """Convolution [b h w c] -> [b h' w' features] with kernel // 2 zeros on every side, as torch pads.

    "SAME" would put the odd zero of a strided convolution at the bottom right only, and other frameworks' weights
    would see shifted pictures.

    Each platform has its own forms (benchmarks/LOG.md). 1x1: a matrix product, whose kernel gradient XLA's CPU backend
    computes several times faster. Not on GPUs, where cuDNN adds bias, shortcut and ReLU to a convolution at once, and
    XLA aborts at a product of a strided slice; nor of few channels on TPUs, which keep such maps in another layout.
    3x3 on CPUs: by Winograd's rule where a float32 map is large, and of stride 2 with gradients of our own.

    affine: (gain, shift), both [features], makes y * gain + shift of the result y. The gain becomes part of the kernel:
    no map is multiplied by it, neither forward nor backward.
    With pad=False, for stride 1 and one group, nothing is put around x, and [b h-kernel+1 w-kernel+1 features] comes
    out: one product, right for many small x.
    rectify: whether a `relu` follows, of which some forms then are a part; pool: and, after it, `max_pool` of 3 x 3
    windows with stride 2, always of a padded x. On TPUs that of a ResNet's stem is one with the convolution
    (`ops.stem`), and its gradient computes all three again.
    above: a map [b h/2 w/2 features] (rounded up) to be brought to the result's size by `upsample_nearest` and added,
    in place of rectify and pool. On CPUs that is one with a 1x1 convolution (`ops.top_down`).
    """

    features: int
    kernel: int = 3
    stride: int = 1
    use_bias: bool = True
    kernel_init: Init = lecun_uniform
    dtype: Any = jnp.float32
    groups: int = 1  # each reads its own part of the channels; as many as channels make it depthwise

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        pad: bool = True,
        affine: tuple[jax.Array, jax.Array] | None = None,
        rectify: bool = False,
        pool: bool = False,
        above: jax.Array | None = None,
    ) -> jax.Array:
        shape = (self.kernel, self.kernel, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        kernel = (kernel if affine is None else kernel * affine[0]).astype(self.dtype)
        x = x.astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        if affine is not None:
            bias = affine[1] if bias is None else bias * affine[0] + affine[1]
        bias = None if bias is None else bias.astype(self.dtype)
        if pool:
            return self._convolve_and_pool(x, kernel, bias)
        if above is not None:
            return self._convolve_and_add(x, kernel, bias, above)
        if pad:
            return self._convolve(x, kernel, bias, rectify)
        y = _plus(windows(x, self.kernel) @ kernel.reshape(-1, self.features), bias)
        return relu(y) if rectify else y

    def _convolve(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, rectify: bool) -> jax.Array:
        def plain(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
            y = _plus(self._without_bias(x, kernel), bias)
            return relu(y) if rectify else y

        cells = x.shape[1] * x.shape[2]
        pays = cells * x.shape[3] * self.features >= _WINOGRAD_FROM
        pays &= cells >= _WINOGRAD_CELLS * max(x.shape[3], self.features)
        if not pays or (self.kernel, self.stride, self.groups) != (3, 1, 1) or x.dtype != jnp.float32:
            return plain(x, kernel, bias)
        return by_platform(x, kernel, bias, cpu=functools.partial(conv3x3, rectify=rectify), default=plain)

    def _convolve_and_pool(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        def plain(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
            return max_pool(self._convolve(x, kernel, bias, True), 3, 2)

        is_stem = (self.kernel, self.stride, self.groups) == (7, 2, 1) and x.shape[3] <= 4
        if not is_stem or bias is None or x.shape[1] % 4 or x.shape[2] % 4:
            return plain(x, kernel, bias)
        at_once = jax.custom_vjp(conv_relu_pool)
        at_once.defvjp(lambda *given: (conv_relu_pool(*given), given), lambda given, y: jax.vjp(plain, *given)[1](y))
        return by_platform(x, kernel, bias, tpu=at_once, default=plain)

    def _convolve_and_add(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, above: jax.Array) -> jax.Array:
        def plain(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, above: jax.Array) -> jax.Array:
            y = self._convolve(x, kernel, bias, False)
            return y + upsample_nearest(above, y.shape[1:3])

        def in_strips(x: jax.Array, kernel: jax.Array, bias: jax.Array, above: jax.Array) -> jax.Array:
            return lateral_plus_above(x, kernel[0, 0], bias, above)

        doubles = all(n == 2 * m for n, m in zip(x.shape[1:3], above.shape[1:3], strict=True))
        if (self.kernel, self.stride, self.groups) != (1, 1, 1) or bias is None or not doubles:
            return plain(x, kernel, bias, above)
        return by_platform(x, kernel, bias, above, cpu=in_strips, default=plain)

    def _without_bias(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        pad = self.kernel // 2
        direct = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(self.stride, self.stride),
            padding=((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        if self.kernel == 1 and self.groups == 1:
            on_tpu = self._multiply if min(kernel.shape[2:]) > 64 else direct  # half of the lanes
            return by_platform(x, kernel, cpu=self._multiply_in_strips, tpu=on_tpu, default=direct)
        if self.stride == 2 and self.kernel % 2 and x.shape[3] <= 4 and self.groups == 1:
            return by_platform(x, kernel, tpu=space_to_depth_conv, default=direct)
        if (self.kernel, self.stride, self.groups) == (3, 2, 1):
            return by_platform(x, kernel, cpu=halving_conv3x3, default=direct)
        return direct(x, kernel)

    def _multiply(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return x[:, :: self.stride, :: self.stride] @ kernel[0, 0]

    def _multiply_in_strips(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv1x1(x, kernel[0, 0], self.stride)


def _plus(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    if bias is None:
        return y
    return by_platform(y, bias, tpu=plus_by_product, default=jnp.add)


@jax.custom_vjp
def plus_by_product(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y [... c] + bias [c], whose gradient of the bias is a matrix product with ones.

    A TPU's vector units take several times as long to sum a map as its matrix units (benchmarks/LOG.md).
    """
    return y + bias


def _plus_backward(bias: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = "bhwn"[: gradient.ndim - 1]
    ones = jnp.ones((8, *gradient.shape[:-1]), gradient.dtype)  # of one row alone the compiler makes a sum again
    sums = jnp.einsum(f"u{axes},{axes}c->uc", ones, gradient, precision="highest", preferred_element_type=jnp.float32)
    return gradient, sums[0].astype(bias.dtype)


plus_by_product.defvjp(lambda y, bias: (y + bias, bias), _plus_backward)


def windows(x: jax.Array, size: int) -> jax.Array:
    """x [b h w c] -> [b h-size+1 w-size+1 size*size*c]: beside each other all that a convolution reads for a cell."""
    h, w = (side - size + 1 for side in x.shape[1:3])
    if h == w == 1:
        return x.reshape(len(x), 1, 1, -1)  # whose gradient needs no map for each of the cells
    return jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(size) for j in range(size)], -1)


class Affine(nn.Module):
    """The parameters of a 1x1 `Conv` of the same name: channels -> (kernel [channels features], bias [features])."""

    features: int
    kernel_init: Init = lecun_uniform
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, channels: int) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", self.kernel_init, (1, 1, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return kernel[0, 0].astype(self.dtype), bias.astype(self.dtype)


def affine_maps(x: jax.Array, *maps: Affine) -> tuple[jax.Array, ...]:
    """1x1 convolutions of x [... c] as one product, which reads x, and makes its gradient, once -> [... features]."""
    kernels, biases = zip(*(layer(x.shape[-1]) for layer in maps), strict=True)
    y = x @ jnp.concatenate(kernels, -1) + jnp.concatenate(biases)
    return tuple(jnp.split(y, np.cumsum([layer.features for layer in maps])[:-1], -1))


class FrozenBatchNorm(nn.Module):
    """Batch norm as a constant affine map, for weights that were trained with larger batches than a detector's.

    Nothing here is trained: scale, bias, mean and var all live in the collection `batch_stats`. There is no map to
    compute: (gain [features], shift [features]) become part of the convolution before it.
    """

    eps: float = 1e-5

    @nn.compact
    def __call__(self, features: int) -> tuple[jax.Array, jax.Array]:
        def constant(name: str, value: float) -> jax.Array:
            return self.variable("batch_stats", name, jnp.full, (features,), value, jnp.float32).value

        gain = constant("scale", 1.0) * jax.lax.rsqrt(constant("var", 1.0) + self.eps)
        return gain, constant("bias", 0.0) - constant("mean", 0.0) * gain


class BatchNorm(nn.Module):
    """Batch norm over the global batch: under `jax.jit` with a sharded batch this is what others call sync-BN."""

    eps: float = 1e-5
    momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = nn.BatchNorm(
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.eps,
            dtype=self.dtype,
            name="norm",
        )
        return norm(x)


class GroupNorm(nn.Module):
    """Group norm (Wu and He 2018): no dependence on the batch, so the choice for training from nothing."""

    eps: float = 1e-5
    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        groups = math.gcd(self.groups, x.shape[-1])  # as many as the channels can be cut into
        return nn.GroupNorm(num_groups=groups, epsilon=self.eps, dtype=self.dtype, name="norm")(x)


NORMS = {"bn": BatchNorm, "gn": GroupNorm}


def conv_norm(
    x: jax.Array,
    names: tuple[str, str],
    features: int,
    kernel: int,
    train: bool,
    *,
    norm: str,
    eps: float,
    dtype: Any,
    stride: int = 1,
    groups: int = 1,
    init: Init = he_fan_out,
    pool: bool = False,
    above: jax.Array | None = None,
) -> jax.Array:
    """A convolution and its norm, as two submodules of the calling module, called `names`; no non-linearity.

    x [b h w c] -> [b h' w' features]. With norm "none" the convolution keeps its bias and the second name is unused.
    pool: and then `relu` and `max_pool` of 3 x 3 windows with stride 2; above: plus this map, upsampled, see `Conv`.
    """
    conv = Conv(features, kernel, stride, norm == "none", init, dtype, groups, name=names[0])
    if norm == "frozen_bn":
        return conv(x, affine=FrozenBatchNorm(eps, name=names[1])(features), pool=pool, above=above)
    if norm == "none":
        return conv(x, pool=pool, above=above)
    y = NORMS[norm](eps=eps, dtype=dtype, name=names[1])(conv(x), train)
    y = y if above is None else y + upsample_nearest(above, y.shape[1:3])
    return max_pool(relu(y), 3, 2) if pool else y
