"""Strips of rows against slices of the map with its zeros, and products summed over them against plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.models.layers import Conv
from fpn_jax.ops.halving import halving_conv3x3
from fpn_jax.ops.products import conv1x1
from fpn_jax.ops.strips import after, rows_of_strip, take_rows
from fpn_jax.ops.winograd import conv3x3


@pytest.mark.parametrize(
    ("h", "w", "cells", "rows"), [(200, 336, 4096, 10), (7, 5, 35, 7), (7, 5, 34, 1), (6, 4, 12, 3), (3, 9, 1, 1)]
)
def test_a_map_is_cut_evenly(h, w, cells, rows):
    assert rows_of_strip(h, w, cells) == rows


@pytest.mark.parametrize("height", [1, 3, 6, 9])
def test_rows_with_zeros_around_them(height):
    """Wherever they begin, and also if they are more than the map has."""
    x = np.random.default_rng(0).normal(size=(2, 6, 3, 4)).astype(np.float32)
    above, below, left, right = 2, 5, 1, 2
    padded = np.pad(x, ((0, 0), (above, below), (left, right), (0, 0)))
    take = jax.jit(take_rows, static_argnums=(2, 3, 4, 5, 6))
    for first in range(-above, 6 + below - height + 1):
        expected = padded[:, first + above : first + above + height]
        np.testing.assert_array_equal(take(x, first, height, above, below, left, right), expected)


@pytest.mark.parametrize("shape", [(2, 6, 8, 5), (1, 7, 5, 3), (3, 1, 4, 2), (0, 4, 4, 3), (2, 131, 141, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_values_and_gradients_of_a_1x1_convolution(shape, stride):
    """Of whole numbers, whose sums have no rounding: to the bit. The last in several strips, but for stride 3."""
    rng = np.random.default_rng(sum(shape))
    x, kernel = (rng.integers(-8, 9, size).astype(np.float32) for size in (shape, (shape[-1], 6)))
    expected, back = jax.vjp(lambda x, kernel: x[:, ::stride, ::stride] @ kernel, x, kernel)
    gradient = rng.integers(-8, 9, expected.shape).astype(np.float32)
    found, our_back = jax.vjp(lambda x, kernel: conv1x1(x, kernel, stride), x, kernel)
    np.testing.assert_array_equal(found, expected)
    for one, other in zip(our_back(gradient), back(gradient), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_layer_takes_it_on_a_cpu():
    """There the kernel's gradient is summed by a loop."""
    x, layer = jnp.ones((1, 131, 141, 2)), Conv(6, 1)
    gradient = jax.jit(jax.grad(lambda v, x: layer.apply(v, x).sum()))
    traced = gradient.trace(layer.init(jax.random.key(0), x), x)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda")}
    assert {platform for platform, text in texts.items() if "stablehlo.while" in text} == {"cpu"}


@pytest.mark.parametrize("layer", [lambda x, k: conv1x1(x, k[0, 0], 1), halving_conv3x3, conv3x3])
def test_the_gradient_of_the_input_waits_for_that_of_the_kernel(layer):
    """Or XLA keeps maps for many kernels' gradients to the end of a step. So it is made even if nobody asks for it."""
    x, kernel = jnp.ones((1, 131, 141, 2)), jnp.ones((3, 3, 2, 2))
    alone = jax.jit(lambda x, kernel, gradient: jax.vjp(layer, x, kernel)[1](gradient)[0])
    loops = alone.lower(x, kernel, layer(x, kernel)).compile().as_text().count(" while(")
    assert loops == (2 if layer is conv3x3 else 1)


def test_nothing_is_kept_but_the_inputs():
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((4, 6))
    _, back = jax.vjp(lambda x, kernel: conv1x1(x, kernel, 2), x, kernel)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(back) if hasattr(leaf, "shape")) == [(1, 8, 8, 4), (4, 6)]


def test_after_leaves_values_alone():
    x = jnp.float32([1, jnp.inf, -0.0])
    np.testing.assert_array_equal(jax.jit(after)(jnp.float32([[jnp.inf, jnp.nan]]), x), x)
    assert np.isnan(after(jnp.float32([jnp.nan]), x)).all()


@pytest.mark.parametrize("layer", [lambda x, k: conv1x1(x, k[0, 0], 1), halving_conv3x3])
def test_kernel_gradients_are_summed_in_float32(layer):
    """Whatever the layer computes in: the sum of many strips of bfloat16 ends where one is less than half a step."""
    x, kernel = jnp.ones((1, 1021, 64, 1), jnp.bfloat16), jnp.ones((3, 3, 1, 1), jnp.bfloat16)  # a prime: single rows
    y, pull = jax.vjp(layer, x, kernel)
    gradient = pull(jnp.ones_like(y))[1]
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(gradient.max()), y.size, rtol=2**-8)
