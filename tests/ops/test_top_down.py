"""A step of the top-down pathway in strips against its parts: values, gradients, and what it is there to avoid."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.models.layers import Conv, conv_norm
from fpn_jax.models.necks.fpn import FPN
from fpn_jax.models.resampling import upsample_nearest
from fpn_jax.ops.top_down import lateral_plus_above


def by_parts(x, kernel, bias, above):
    return x @ kernel + bias + upsample_nearest(above, x.shape[1:3])


def given(b, h, w, c, features=6):
    """Whole numbers, whose sums have no rounding: x, kernel, bias, above [b h w features], and a gradient."""
    rng = np.random.default_rng(b + h + w)
    shapes = (b, 2 * h, 2 * w, c), (c, features), (features,), (b, h, w, features), (b, 2 * h, 2 * w, features)
    *inputs, gradient = (rng.integers(-4, 5, shape).astype(np.float32) for shape in shapes)
    return inputs, gradient


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 4), (3, 1, 4, 2), (0, 2, 2, 3), (2, 66, 70, 2)])
def test_values_and_gradients(shape):
    """To the bit. The last in several strips."""
    inputs, gradient = given(*shape)
    expected, back = jax.vjp(by_parts, *inputs)
    found, our_back = jax.vjp(lateral_plus_above, *inputs)
    np.testing.assert_array_equal(found, expected)
    for one, other in zip(our_back(gradient), back(gradient), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sums_are_float32():
    """Of bfloat16, too: a sum of many ends where one is less than half a step."""
    inputs, _ = given(1, 509, 32, 1, 1)  # a prime: single rows of above
    x, kernel, bias, above = (jnp.ones_like(v, jnp.bfloat16) for v in inputs)
    y, pull = jax.vjp(lateral_plus_above, x, kernel, bias, above)
    _, of_kernel, of_bias, of_above = pull(jnp.ones_like(y))
    assert {v.dtype for v in (y, of_kernel, of_bias, of_above)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose([float(of_kernel[0, 0]), float(of_bias[0])], y.size, rtol=2**-8)
    np.testing.assert_array_equal(of_above, 4)


def test_nothing_is_kept_but_what_parameters_need():
    (x, kernel, bias, above), _ = given(1, 4, 5, 3)
    _, back = jax.vjp(lateral_plus_above, x, kernel, bias, above)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(back) if hasattr(leaf, "shape")) == [
        (1, 8, 10, 3),
        (3, 6),
        (6,),
    ]


@pytest.mark.parametrize("wanted", [(1, 2, 3), (0,)])
def test_one_loop_makes_all_gradients_but_that_of_the_input_which_waits_for_it(wanted):
    """A frozen stage below asks for none: XLA would put the others off to the end of a step and keep the map."""
    inputs, gradient = given(1, 66, 70, 2)

    @jax.jit
    def pull(inputs, gradient):
        gradients = jax.vjp(lateral_plus_above, *inputs)[1](gradient)
        return [gradients[i] for i in wanted]

    assert pull.lower(inputs, gradient).compile().as_text().count(" while(") == 1


@pytest.mark.parametrize(
    ("layer", "size", "taken"),
    [
        (Conv(6, 1), (4, 6), True),
        (Conv(6, 1), (3, 6), False),  # rows of above that are read by one row alone
        (Conv(6, 1, use_bias=False), (4, 6), False),
        (Conv(6, 3), (4, 6), False),
        (Conv(6, 1, groups=3), (4, 6), False),
    ],
)
def test_a_layer_takes_it_on_a_cpu(layer, size, taken):
    """Where it can; all of them, and other platforms, compute the same."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 3)).astype(np.float32)
    above = rng.normal(size=(2, 2, 3, 6)).astype(np.float32)
    variables = layer.init(jax.random.key(0), x)
    apply = jax.jit(lambda variables, x, above: layer.apply(variables, x, above=above))
    expected = layer.apply(variables, x) + upsample_nearest(above, size)
    np.testing.assert_allclose(apply(variables, x, above), expected, rtol=0, atol=1e-6)
    traced = apply.trace(variables, x, above)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu", "cuda")}
    assert {platform for platform, text in texts.items() if "stablehlo.while" in text} == ({"cpu"} if taken else set())


class Lateral(nn.Module):
    """A lateral layer with a norm."""

    norm: str

    @nn.compact
    def __call__(self, x, above=None):
        how = {"norm": self.norm, "eps": 1e-5, "dtype": jnp.float32, "above": above}
        return conv_norm(x, ("conv", "norm"), 6, 1, False, **how)


@pytest.mark.parametrize("norm", ["none", "frozen_bn", "bn", "gn"])
def test_what_lies_above_is_added_behind_the_norm(norm):
    rng = np.random.default_rng(0)
    x, above = (rng.normal(size=size).astype(np.float32) for size in ((2, 4, 6, 3), (2, 2, 3, 6)))
    variables = Lateral(norm).init(jax.random.key(0), x)
    variables = jax.tree.map(lambda v: v + rng.uniform(0.1, 1, v.shape).astype(np.float32), variables)
    expected = Lateral(norm).apply(variables, x) + upsample_nearest(above, (4, 6))
    np.testing.assert_allclose(Lateral(norm).apply(variables, x, above), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [({}, True), ({"norm": "frozen_bn"}, True), ({"activation": "relu"}, False), ({"merge": "concat"}, False)],
)
def test_the_papers_pathway_takes_it_on_a_cpu(changes, taken):
    features = {level: jnp.ones((1, 32 >> level, 64 >> level, 3)) for level in (2, 3, 4)}
    neck = FPN(6, **changes)
    shapes = jax.eval_shape(neck.init, jax.random.key(0), features)
    text = jax.jit(neck.apply).lower(shapes, features).as_text()
    assert ("stablehlo.while" in text) is taken
