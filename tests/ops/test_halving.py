"""3x3 convolutions of stride 2 against XLA's own: values, gradients, odd sides, and what they are there to avoid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.models.layers import Conv
from fpn_jax.ops.halving import halving_conv3x3


def direct(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


@pytest.mark.parametrize(
    "shape", [(2, 6, 8, 5), (1, 5, 7, 3), (3, 1, 4, 2), (1, 1, 1, 4), (1, 2, 9, 1), (2, 131, 141, 2)]
)
def test_values_and_gradients(shape):
    """Of whole numbers, whose sums have no rounding: to the bit. The last in two strips."""
    rng = np.random.default_rng(sum(shape))
    x, kernel = (rng.integers(-4, 5, size).astype(np.float32) for size in (shape, (3, 3, shape[-1], 6)))
    expected, back = jax.vjp(direct, x, kernel)
    found, our_back = jax.vjp(halving_conv3x3, x, kernel)
    np.testing.assert_array_equal(found, expected)
    gradient = rng.integers(-4, 5, expected.shape).astype(np.float32)
    for one, other in zip(our_back(gradient), back(gradient), strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_images_have_no_gradient():
    x, kernel = jnp.ones((0, 6, 8, 5)), jnp.ones((3, 3, 5, 6))
    y, pull = jax.vjp(halving_conv3x3, x, kernel)
    of_x, of_kernel = pull(y)
    assert of_x.shape == x.shape and not of_kernel.any()


def test_a_layer_takes_it_on_a_cpu():
    """There the gradient of its input is no convolution of maps with zeros between their cells."""
    x = jnp.ones((1, 9, 8, 6))

    def compiled(layer):
        variables = layer.init(jax.random.key(0), x)
        gradient = jax.jit(lambda v, x, gradient: jax.vjp(lambda x: layer.apply(v, x), x)[1](gradient))
        return gradient.lower(variables, x, layer.apply(variables, x)).compile().as_text()

    assert "lhs_dilate" not in compiled(Conv(6, stride=2))
    assert "lhs_dilate" in compiled(Conv(4, stride=2, groups=2))
