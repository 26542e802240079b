"""An operation's forms are chosen by the platform that a program is for."""

import jax
import jax.numpy as jnp
import pytest

from fpn_jax.ops.platforms import apart, by_platform, compiling_for


def form(x):
    return by_platform(x, default=lambda x: x + 1, cpu=lambda x: x + 2, tpu=lambda x: x + 3)


@pytest.mark.parametrize(("platform", "added"), [("cpu", 2), ("tpu", 3), ("gpu", 1), ("cuda", 1)])
def test_inside_only_the_form_of_the_platform_is_traced(platform, added):
    def named(x):
        with compiling_for(platform):
            return form(x)

    assert jax.jit(named)(0.0) == added
    text = jax.jit(named).lower(0.0).as_text()
    assert f"{added}.0" in text and text.count("stablehlo.add") == 1
    assert jax.jit(form)(0.0) == 2  # outside, whatever it is lowered for


@pytest.mark.parametrize(("platform", "added"), [("cpu", 2), ("tpu", 3), ("cuda", 1)])
def test_outside_the_platform_it_is_lowered_for_decides(platform, added):
    text = jax.jit(form).trace(jnp.float32(0)).lower(lowering_platforms=(platform,)).as_text()
    assert f"{added}.0" in text


def test_an_error_inside_does_not_outlast_it():
    with pytest.raises(ZeroDivisionError), compiling_for("tpu"):
        raise ZeroDivisionError
    assert jax.jit(form)(0.0) == 2


def test_a_function_apart_is_a_call_in_the_program_of_a_cpu():
    """As XLA would have it, the sum is part of what reads it."""
    doubled = apart(lambda x, n: x + n, (1,))
    text = jax.jit(lambda x: jnp.sin(doubled(x, 2)) * 3).lower(jnp.ones(8)).compile().as_text()
    assert " call(" in text
    assert jax.jit(lambda x: doubled(x, 2))(1.0) == 3
    assert doubled(jnp.float32(1), 4) == 5
    assert jax.grad(lambda x: doubled(x, 2) ** 2)(1.0) == 6
