"""The optimizer against torch's rules written out, and the schedule against its published points."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from experiments.faster_rcnn_r50_fpn import get_config
from fpn_jax.errors import UserError
from fpn_jax.training.optim import is_frozen, make_optimizer, make_schedule

PARAMS = {
    "backbone": {"stem_conv": {"kernel": np.full((2, 2), 3.0, np.float32)}},
    "head": {"kernel": np.array([[1.0, -2.0]], np.float32), "bias": np.array([0.5], np.float32)},
}
GRADS = [jax.tree.map(lambda x, s=s: np.full_like(x, s), PARAMS) for s in (0.3, -1.0, 2.0)]


def optim(**changes):
    config = get_config().optim
    config.update(changes)
    return ml_collections.ConfigDict(config)


def run(config, schedule, frozen=()):
    optimizer = make_optimizer(config, schedule, PARAMS, frozen)
    params, state = PARAMS, optimizer.init(PARAMS)
    for grads in GRADS:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_schedule_of_the_1x_recipe():
    schedule = make_schedule(optim(), 16, 90_000)
    points = {0: 0.02e-3, 500: 0.01001, 1000: 0.02, 59_999: 0.02, 60_000: 0.002, 79_999: 0.002, 80_000: 0.0002}
    for step, rate in points.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-4)


def test_the_rate_falls_at_the_nearest_step():
    schedule = make_schedule(optim(step_at=(2 / 3, 0.904), warmup_steps=0), 16, 100)  # 66.7 and 90.4
    points = {0: 0.02, 66: 0.02, 67: 0.002, 89: 0.002, 90: 0.0002}
    np.testing.assert_allclose([schedule(step) for step in points], list(points.values()), rtol=1e-5)


@pytest.mark.parametrize(("batch", "base", "scale"), [(2, 16, 0.125), (64, 16, 4.0), (64, 0, 1.0)])
def test_learning_rate_scales_with_the_batch(batch, base, scale):
    schedule = make_schedule(optim(base_batch_size=base, schedule="constant"), batch, 10_000)
    np.testing.assert_allclose(schedule(5000), 0.02 * scale, rtol=1e-6)


def test_cosine_ends_at_zero():
    schedule = make_schedule(optim(schedule="cosine", warmup_steps=0), 16, 100)
    points = [schedule(step) for step in (0, 50, 100, 150)]  # and stays there
    np.testing.assert_allclose(points, [0.02, 0.01, 0.0, 0.0], atol=1e-8)


def test_sgd_is_torchs_and_spares_biases_from_decay():
    params = run(optim(weight_decay=0.1), lambda step: 0.5)
    for name, decay in (("kernel", 0.1), ("bias", 0.0)):
        value, velocity = PARAMS["head"][name], 0.0
        for grads in GRADS:
            velocity = 0.9 * velocity + grads["head"][name] + decay * value
            value = value - 0.5 * velocity
        np.testing.assert_allclose(params["head"][name], value, rtol=1e-5)


def test_adamw_is_torchs():
    """The numbers of torch.optim.AdamW (torch 2.13), with these rates, in its two groups."""
    params = run(optim(name="adamw", weight_decay=0.1, momentum=0.8, adam_b2=0.99), lambda step: 0.05)["head"]
    np.testing.assert_allclose(params["kernel"], [[0.9421529173851013, -2.0130715370178223]], rtol=1e-6)
    np.testing.assert_allclose(params["bias"], [0.4567219614982605], rtol=1e-6)


def test_gradients_are_clipped_before_all_else_as_by_torch():
    """The numbers of clip_grad_norm_ followed by torch.optim.SGD (torch 2.13)."""
    params = run(optim(clip_norm=1.5, weight_decay=0.1), lambda step: 0.5)
    np.testing.assert_allclose(params["head"]["kernel"], [[0.5939522385597229, -1.600172758102417]], rtol=1e-5)
    np.testing.assert_allclose(params["head"]["bias"], [0.3486258387565613], rtol=1e-5)
    np.testing.assert_allclose(params["backbone"]["stem_conv"]["kernel"], 2.056702136993408, rtol=1e-5)


def test_biases_decay_when_asked():
    spared, decayed = (run(optim(decay_norms_and_biases=on), lambda step: 0.5)["head"]["bias"] for on in (False, True))
    assert (spared != decayed).all()


def test_frozen_parameters_stay_and_do_not_count_in_the_norm():
    clipped = optim(clip_norm=1e-3, weight_decay=0.0, momentum=0.0)
    params = run(clipped, lambda step: 1.0, frozen=(("backbone", "stem_"),))
    np.testing.assert_array_equal(params["backbone"]["stem_conv"]["kernel"], PARAMS["backbone"]["stem_conv"]["kernel"])
    # Three steps of norm 1e-3 over the three trained numbers, signs + - +: one step's length remains.
    moved = jnp.concatenate([(params["head"][n] - PARAMS["head"][n]).ravel() for n in ("kernel", "bias")])
    np.testing.assert_allclose(moved, -1e-3 / np.sqrt(3), rtol=1e-3)


def test_is_frozen_matches_whole_parts_and_beginnings():
    frozen = (("backbone", "stem_"), ("backbone", "stage2_"))
    assert is_frozen(("backbone", "stem_conv", "kernel"), frozen)
    assert is_frozen(("backbone", "stage2_block0", "conv1", "kernel"), frozen)
    assert not is_frozen(("backbone", "stage3_block0", "conv1", "kernel"), frozen)
    assert not is_frozen(("neck", "stem_conv", "kernel"), frozen)


@pytest.mark.parametrize(("key", "value"), [("name", "adan"), ("schedule", "sawtooth")])
def test_unknown_names_are_refused_with_the_choices(key, value):
    with pytest.raises(UserError, match=rf"optim\.{key} is '{value}'; choose one of .*(sgd|step)"):
        run(optim(**{key: value}), make_schedule(optim(**{key: value}), 16, 10))


def test_clipping_may_begin_and_end_when_a_run_goes_on():
    """As the advice is after a loss that is not finite: the state is of one form, and that of before is used."""
    first, second = (make_optimizer(optim(clip_norm=norm), lambda step: 0.5, PARAMS) for norm in (0.0, 1e-3))
    state = first.init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(second.init(PARAMS))
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = first.update(gradients, state, PARAMS)
    _, state = second.update(gradients, state, PARAMS)
