"""Convolutions by Winograd's rule against the direct ones, in values, gradients and what they do with the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.ops.winograd import conv3x3


def direct(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


SHAPES = [(0, 6, 8, 5), (2, 6, 8, 5), (1, 5, 7, 3), (3, 1, 4, 2), (1, 1, 1, 4), (1, 2, 9, 1), (2, 45, 6, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape):
    """The last in three strips."""
    rng = np.random.default_rng(sum(shape))
    x, kernel = rng.normal(size=shape).astype(np.float32), rng.normal(size=(3, 3, shape[-1], 6)).astype(np.float32)
    expected, back = jax.vjp(direct, x, kernel)
    found, our_back = jax.vjp(conv3x3, x, kernel)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=2e-5)
    gradient = rng.normal(size=expected.shape).astype(np.float32)
    for one, other in zip(our_back(gradient), back(gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5)


def test_whole_numbers_are_exact():
    """Halves of small whole numbers have no rounding: every sum must come out to the bit."""
    rng = np.random.default_rng(1)
    x = rng.integers(-8, 9, (2, 7, 10, 4)).astype(np.float32)
    kernel = rng.integers(-4, 5, (3, 3, 4, 3)).astype(np.float32)
    np.testing.assert_array_equal(conv3x3(x, kernel), direct(x, kernel))
    gradient = rng.integers(-4, 5, (2, 7, 10, 3)).astype(np.float32)
    for f in zip(jax.vjp(conv3x3, x, kernel)[1](gradient), jax.vjp(direct, x, kernel)[1](gradient), strict=True):
        np.testing.assert_array_equal(*f)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bias_is_added_and_gets_its_gradient(shape):
    """To the bit, of whole numbers."""
    rng = np.random.default_rng(sum(shape))
    x, kernel, bias, gradient = (
        rng.integers(-4, 5, size).astype(np.float32) for size in (shape, (3, 3, shape[-1], 6), (6,), (*shape[:-1], 6))
    )
    expected, back = jax.vjp(lambda *x: direct(*x[:2]) + x[2], x, kernel, bias)
    found, our_back = jax.vjp(conv3x3, x, kernel, bias)
    np.testing.assert_array_equal(found, expected)
    for one, other in zip(our_back(gradient), back(gradient), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_relu_in_the_strips_is_one_behind_them(shape):
    """To the bit, of whole numbers; no gradient at 0."""
    rng = np.random.default_rng(sum(shape))
    x, kernel, bias, gradient = (
        rng.integers(-1, 2, size).astype(np.float32) for size in (shape, (3, 3, shape[-1], 6), (6,), (*shape[:-1], 6))
    )
    expected, back = jax.vjp(lambda *x: jax.nn.relu(conv3x3(*x)), x, kernel, bias)
    found, our_back = jax.vjp(lambda *x: conv3x3(*x, rectify=True), x, kernel, bias)
    np.testing.assert_array_equal(found, expected)
    for one, other in zip(our_back(gradient), back(gradient), strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_is_kept_for_the_backward_pass_but_the_inputs():
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    _, back = jax.vjp(conv3x3, x, kernel)
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(back) if hasattr(leaf, "shape"))
    assert kept == sorted([x.shape, kernel.shape])


def test_large_convolutions_take_it_on_a_cpu(monkeypatch):
    """And give what small ones would, with the same parameters."""
    from fpn_jax.models import layers

    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 8, 9, 4)), jnp.float32)
    layer = layers.Conv(6)
    variables = layer.init(jax.random.key(0), x)
    expected, lowered = layer.apply(variables, x), jax.jit(layer.apply).lower(variables, x).as_text()
    monkeypatch.setattr(layers, "_WINOGRAD_FROM", 0)
    np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-5)
    biased = {"params": variables["params"] | {"bias": jnp.arange(6.0) - 3}}
    expected += jnp.arange(6.0) - 3
    np.testing.assert_allclose(layer.apply(biased, x), expected, atol=1e-5)
    np.testing.assert_allclose(layer.apply(biased, x, rectify=True), jnp.maximum(expected, 0), atol=1e-5)
    text = jax.jit(lambda v, x: layer.apply(v, x)).lower(variables, x).as_text()
    assert "stablehlo.convolution" in lowered
    assert "stablehlo.convolution" not in text
    assert "stablehlo.dot_general" in text
    for other in (layers.Conv(6, stride=2), layers.Conv(4, groups=2), layers.Conv(6, dtype=jnp.bfloat16)):
        v = other.init(jax.random.key(0), x)
        assert "stablehlo.convolution" in jax.jit(other.apply).lower(v, x).as_text()
