"""The rectifier that keeps its output alone, against jax.nn.relu, and what the compiler makes of it on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.models.layers import relu


def equal(found, expected):
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (found, expected)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_jax_to_the_bit(dtype):
    edges = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-38, -1e-38]
    x = jnp.asarray(np.concatenate([edges, np.random.default_rng(0).normal(size=200)]), dtype)
    g = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), dtype)
    for mine, theirs in ((relu, jax.nn.relu), (jax.jit(relu), jax.jit(jax.nn.relu))):
        equal(mine(x), theirs(x))
        (found, back), (expected, their_back) = jax.vjp(mine, x), jax.vjp(theirs, x)
        equal(found, expected)
        equal(back(g)[0], their_back(g)[0])


def test_only_the_output_is_kept():
    y, back = jax.vjp(relu, jnp.linspace(-1, 1, 8))
    (kept,) = (leaf for leaf in jax.tree.leaves(back) if hasattr(leaf, "shape"))
    np.testing.assert_array_equal(kept, y)


def test_a_chain_of_residual_layers_keeps_one_map_for_each():
    """Not the products and shortcuts that it is made of: XLA's CPU backend would, were it let."""
    layers, rows, width = 6, 4096, 64

    def loss(weights, x, activation):
        for w in weights:
            x = activation(x + 0.5 * (x @ w))
        return (x * x).sum()

    def needed(activation):
        weights, x = [jnp.ones((width, width))] * layers, jnp.ones((rows, width))
        compiled = jax.jit(jax.grad(loss), static_argnums=2).lower(weights, x, activation).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * rows * width)

    assert needed(relu) < layers + 4
    assert needed(jax.nn.relu) > needed(relu) + layers / 2


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_on_accelerators_a_barrier_keeps_the_output_and_nothing_beside_it(platform):
    """Without it they keep a mask, or what the output is made of, as well; see benchmarks/LOG.md."""
    gradient = jax.jit(jax.grad(lambda x: relu(2 * x).sum()))
    text = gradient.trace(jnp.ones(8)).lower(lowering_platforms=(platform,)).as_text()
    assert "optimization_barrier" in text and "inlineable" not in text
