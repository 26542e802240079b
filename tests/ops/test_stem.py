"""A TPU's stem against plain convolutions and pooling."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.models.layers import Conv, conv_norm, relu
from fpn_jax.models.resampling import max_pool
from fpn_jax.ops.platforms import compiling_for
from fpn_jax.ops.stem import conv_relu_pool, space_to_depth, space_to_depth_conv


@pytest.mark.parametrize("dtype", ["uint8", "float32", "bfloat16"])
def test_blocks_become_channels_to_the_bit(dtype):
    x = np.random.default_rng(0).integers(0, 250, (2, 8, 12, 3)).astype(jnp.dtype(dtype))
    x = x if dtype == "uint8" else (x / 7).astype(x.dtype)
    expected = x.reshape(2, 2, 4, 3, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 2, 3, 48)
    found = space_to_depth(jnp.asarray(x), 4)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("size", [(16, 12), (15, 11), (9, 14)])
def test_space_to_depth_is_the_convolution_of_stride_2(size, kernel):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
    layer = Conv(4, kernel, stride=2, use_bias=False)
    variables = layer.init(jax.random.key(0), x)
    (y, pull), (expected, expected_pull) = (
        jax.vjp(function, variables["params"]["kernel"], x)
        for function in (
            lambda kernel, x: space_to_depth_conv(x, kernel),
            lambda kernel, x: layer.apply({"params": {"kernel": kernel}}, x),
        )
    )
    np.testing.assert_allclose(y, expected, atol=1e-5)
    gradient = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), pull(gradient), expected_pull(gradient))


def slow_stem(x, kernel, bias):
    """conv_relu_pool by loops, in float64."""
    b, h, w, _ = x.shape
    padded = np.pad(x.astype(np.float64), ((0, 0), (3, 3), (3, 3), (0, 0)))
    results = np.zeros((b, h // 2, w // 2, kernel.shape[-1]))
    for i in range(h // 2):
        for j in range(w // 2):
            window = padded[:, 2 * i : 2 * i + 7, 2 * j : 2 * j + 7]
            results[:, i, j] = np.maximum(np.einsum("bijc,ijcf->bf", window, kernel) + bias, 0)
    pooled = np.zeros((b, h // 4, w // 4, kernel.shape[-1]))
    for i in range(h // 4):
        for j in range(w // 4):
            rows, columns = (slice(max(2 * k - 1, 0), 2 * k + 2) for k in (i, j))
            pooled[:, i, j] = results[:, rows, columns].max((1, 2))
    return pooled


@pytest.mark.parametrize("size", [(4, 4), (4, 12), (16, 8), (20, 24)])
@pytest.mark.parametrize("shift", [0.0, -40.0, 40.0])
def test_conv_relu_pool_is_that_of_loops(size, shift):
    """Also where all results are below zero but at the border, where the padding of the image is higher."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(shift / 20, 1, (2, *size, 3)), rng.normal(0.2, 1, (7, 7, 3, 5))
    x, kernel, bias = (array.astype(np.float32) for array in (x, kernel, rng.normal(size=5) - shift))
    found = jax.jit(conv_relu_pool)(x, kernel, bias)
    np.testing.assert_allclose(found, slow_stem(x, kernel, bias), atol=2e-4)
    assert (np.asarray(found) > 0).any()


def test_bfloat16_is_as_exact_as_its_rounding():
    rng = np.random.default_rng(0)
    given = (rng.normal(size=shape) for shape in ((2, 16, 24, 3), (7, 7, 3, 8), (8,)))
    given = [jnp.asarray(x, jnp.bfloat16) for x in given]
    found = jax.jit(conv_relu_pool)(*given)
    assert found.dtype == jnp.bfloat16
    expected = slow_stem(*(np.asarray(x, np.float64) for x in given))
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=0.2, rtol=1e-2)


class Stem(nn.Module):
    norm: str
    pool: bool = True

    @nn.compact
    def __call__(self, x):
        how = {"norm": self.norm, "eps": 1e-5, "dtype": jnp.float32, "stride": 2, "pool": self.pool}
        y = conv_norm(x, ("conv", "norm"), 8, 7, True, **how)
        return y if self.pool else max_pool(relu(y), 3, 2)


@pytest.mark.parametrize("norm", ["frozen_bn", "none", "gn"])
@pytest.mark.parametrize("size", [(16, 24), (14, 24), (16, 22)])
def test_the_stem_of_a_tpu_is_that_of_others_and_so_are_its_gradients(norm, size):
    """Sizes that no block divides, and norms between convolution and ReLU, are computed as elsewhere."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
    variables = Stem(norm).init(jax.random.key(0), x)

    def both(pool, variables, x):
        y, pull = jax.vjp(Stem(norm, pool).apply, variables, x)
        return y, pull(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    expected = jax.jit(partial(both, False))(variables, x)
    with compiling_for("tpu"):
        traced = jax.jit(partial(both, True)).trace(variables, x)
    assert ("[3,3,48,16]" in str(traced.jaxpr)) == (norm != "gn" and size == (16, 24))
    for found in (traced.lower().compile()(variables, x), jax.jit(partial(both, True))(variables, x)):
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), found, expected)


OTHERS = {
    "kernel": Conv(6, 5, 2),
    "stride": Conv(6, 7, 1),
    "groups": Conv(6, 7, 2, groups=3),
    "no bias": Conv(6, 7, 2, use_bias=False),
    "as it is": Conv(6, 7, 2),
}


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_stem_is_pooled_as_well(other, channels):
    layer, x = OTHERS[other], jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 24, channels)), jnp.float32)
    variables = layer.init(jax.random.key(0), x)
    expected = max_pool(layer.apply(variables, x, rectify=True), 3, 2)
    with compiling_for("tpu"):
        traced = jax.jit(lambda *given: layer.apply(*given, pool=True)).trace(variables, x)
    np.testing.assert_allclose(traced.lower().compile()(variables, x), expected, atol=1e-5)
    by_blocks = f"[3,3,{16 * channels},12]" in str(traced.jaxpr)
    assert by_blocks == (other == "as it is" and channels == 3)


def test_products_with_zeros_and_ones_are_exact_on_a_tpu():
    """Where a float32 product is one of bfloat16 if nothing is said."""
    traced = jax.make_jaxpr(lambda x: space_to_depth(x, 2))(jnp.zeros((1, 4, 4, 3)))
    assert "Precision.HIGHEST" in str(traced)
