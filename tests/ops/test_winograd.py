"""Convolutions by Winograd's rule against the direct ones, in values, gradients and what they do with the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.ops import winograd
from fpn_jax.ops.winograd import conv3x3


def direct(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


# The last in several strips, of which the last begins in the one before.
SHAPES = [
    (0, 6, 8, 5),
    (2, 6, 8, 5),
    (1, 5, 7, 3),
    (3, 1, 4, 2),
    (1, 1, 1, 4),
    (1, 2, 9, 1),
    (2, 45, 6, 3),
    (2, 77, 126, 3),
]


def assert_close(found, expected):
    """To a few millionths of the largest value."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max(initial=0)))


def test_the_last_shape_is_worked_through_in_strips_that_overlap():
    strips, rows, _ = winograd._strips(*SHAPES[-1][:3])
    assert strips > 1
    assert 4 * strips * rows > SHAPES[-1][1]


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape):
    rng = np.random.default_rng(sum(shape))
    x, kernel = rng.normal(size=shape).astype(np.float32), rng.normal(size=(3, 3, shape[-1], 6)).astype(np.float32)
    expected, back = jax.vjp(direct, x, kernel)
    found, our_back = jax.vjp(conv3x3, x, kernel)
    assert_close(found, expected)
    gradient = rng.normal(size=expected.shape).astype(np.float32)
    for one, other in zip(our_back(gradient), back(gradient), strict=True):
        assert_close(one, other)


def test_the_rule_is_exact_in_double_precision():
    """A^T [(G g) * (B^T d)] is the correlation of six numbers with three, for any points that differ."""
    rng = np.random.default_rng(3)
    d, g = rng.normal(size=6), rng.normal(size=3)
    for points in ((0, 1, -1, 2, -2), (0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5))):
        of_data, of_kernel, of_outputs = (x.astype(np.float64) for x in winograd._rule(points))
        found = of_outputs @ ((of_kernel @ g) * (of_data @ d))
        np.testing.assert_allclose(found, [d[i : i + 3] @ g for i in range(4)], atol=1e-5)


def test_rounding_is_half_of_that_by_the_usual_points(monkeypatch):
    """Of 256 channels, beside sums in double precision. By 0, ±1/√2, ±2 it is 0.58 of it."""
    rng = np.random.default_rng(4)
    x = np.maximum(rng.normal(size=(1, 16, 16, 256)), 0).astype(np.float32)
    kernel = (rng.uniform(-1, 1, size=(3, 3, 256, 16)) / 48).astype(np.float32)
    around = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    exact = sum(around[:, i : i + 16, j : j + 16] @ kernel[i, j].astype(np.float64) for i in range(3) for j in range(3))

    def error(found):
        return np.sqrt(np.mean((np.asarray(found) - exact) ** 2) / np.mean(exact**2))

    ours = error(conv3x3(x, kernel))
    assert error(direct(x, kernel)) < ours < 3e-6
    usual = winograd._rule((0, 1, -1, 2, -2))
    for name, matrix in zip(("_DATA", "_KERNEL", "_OUTPUTS"), usual, strict=True):
        monkeypatch.setattr(winograd, name, matrix)
    of_usual = error(winograd._in_strips(x, kernel, None, False, jnp.zeros(1)))
    assert 0.3 * of_usual < ours < 0.53 * of_usual


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bias_is_added_and_gets_its_gradient(shape):
    rng = np.random.default_rng(sum(shape))
    x, kernel, bias, gradient = (
        rng.integers(-4, 5, size).astype(np.float32) for size in (shape, (3, 3, shape[-1], 6), (6,), (*shape[:-1], 6))
    )
    expected, back = jax.vjp(lambda *x: direct(*x[:2]) + x[2], x, kernel, bias)
    found, our_back = jax.vjp(conv3x3, x, kernel, bias)
    assert_close(found, expected)
    for one, other in zip(our_back(gradient), back(gradient), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_relu_in_the_strips_is_one_behind_them(shape):
    rng = np.random.default_rng(sum(shape))
    x, kernel, bias, gradient = (
        rng.normal(size=size).astype(np.float32) for size in (shape, (3, 3, shape[-1], 6), (6,), (*shape[:-1], 6))
    )
    expected, back = jax.vjp(lambda *x: jax.nn.relu(conv3x3(*x)), x, kernel, bias)
    found, our_back = jax.vjp(lambda *x: conv3x3(*x, rectify=True), x, kernel, bias)
    assert_close(found, expected)
    assert found.size == 0 or found.min() == 0
    for one, other in zip(our_back(gradient), back(gradient), strict=True):
        assert_close(one, other)


def test_a_relu_in_the_strips_has_no_gradient_at_0():
    x, kernel, bias = np.zeros((1, 6, 5, 2), np.float32), np.ones((3, 3, 2, 3), np.float32), np.float32([0, 1, -1])
    y, back = jax.vjp(lambda *x: conv3x3(*x, rectify=True), x, kernel, bias)
    np.testing.assert_array_equal(y, np.broadcast_to(np.float32([0, 1, 0]), y.shape))
    np.testing.assert_array_equal(back(jnp.ones_like(y))[2], [0, 30, 0])


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
    monkeypatch.setattr(layers, "_WINOGRAD_CELLS", 13)  # 72 cells are fewer than 13 for each of 6 features
    assert "stablehlo.convolution" in jax.jit(lambda v, x: layer.apply(v, x)).lower(variables, x).as_text()
    monkeypatch.setattr(layers, "_WINOGRAD_CELLS", 12)
    assert "stablehlo.convolution" not in jax.jit(lambda v, x: layer.apply(v, x)).lower(variables, x).as_text()
    for other in (layers.Conv(6, stride=2), layers.Conv(4, groups=2), layers.Conv(6, dtype=jnp.bfloat16)):
        v = other.init(jax.random.key(0), x)
        assert "stablehlo.convolution" in jax.jit(other.apply).lower(v, x).as_text()
