"""The training step: the same on one device and on eight, deterministic, and a gradient that descends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fpn_jax.models import build_detector
from fpn_jax.training import sharding
from fpn_jax.training.optim import make_optimizer, make_schedule
from fpn_jax.training.state import inference_variables, init_variables, make_state
from fpn_jax.training.step import make_detect, make_train_step

CLASSES = 3


def set_up(config, mesh, **step_options):
    detector = build_detector(config.model, CLASSES)
    variables = init_variables(detector, (64, 64), config.seed)
    schedule = make_schedule(config.optim, config.batch_size, config.num_steps)
    optimizer = make_optimizer(config.optim, schedule, variables["params"], detector.frozen)
    state = sharding.put_replicated(mesh, make_state(variables, optimizer, step_options.get("ema_decay", 0.0)))
    return detector, state, make_train_step(detector, optimizer, schedule, config.seed, mesh=mesh, **step_options)


def train(config, devices, batches, **step_options):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    _, state, step = set_up(config, mesh, **step_options)
    metrics = []
    for batch in batches:
        state, values = step(state, sharding.put_batch(mesh, vars(batch)))
        metrics.append({name: float(value) for name, value in values.items()})
    return state, metrics


@pytest.fixture
def config(tiny_config):
    tiny_config.optim.update(name="sgd", learning_rate=0.01, warmup_steps=0, schedule="constant", clip_norm=0.0)
    return tiny_config


def test_one_and_eight_devices_give_the_same_losses_and_weights(config, make_batch):
    batches = [make_batch(8, seed) for seed in range(3)]
    config.model.backbone.norm = "bn"  # the statistics are of the global batch, so they agree as well
    one, one_metrics = train(config, 1, batches)
    eight, eight_metrics = train(config, 8, batches)
    for a, b in zip(one_metrics, eight_metrics, strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-5), name
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    for a, b in zip(jax.tree.leaves(one.batch_stats), jax.tree.leaves(eight.batch_stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("tinier_config")
def test_the_step_is_deterministic_and_its_seed_matters(config, make_batch):
    config.model.rpn.samples = 4  # so few that chance decides which
    batches = [make_batch(8, seed) for seed in range(2)]
    (_, first), (_, again) = train(config, 1, batches), train(config, 1, batches)
    assert first == again
    config.seed = 1
    assert train(config, 1, batches)[1] != first


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_step_can_be_translated_for_every_platform(config, make_batch, platform):
    """What is written for CPUs alone must not be in the programs of the others."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    _, state, step = set_up(config, mesh, platform=platform)
    traced = step.trace(state, sharding.put_batch(mesh, vars(make_batch(8))))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.convolution" in text
    assert ("inlineable" in text) == (platform == "cpu")
    # Nor are they traced for them, forward or backward, which would make a start longer.
    assert ("pallas_call" in str(traced.jaxpr)) == (platform == "tpu")


def test_losses_fall_on_one_batch_and_the_gradient_reaches_every_part(config, make_batch):
    batch = make_batch(8)
    mesh = sharding.make_mesh(jax.devices()[:1])
    _, state, step = set_up(config, mesh)
    before = jax.tree.map(np.asarray, state.params)
    losses = []
    for _ in range(15):
        state, metrics = step(state, sharding.put_batch(mesh, vars(batch)))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    for part in ("backbone", "neck", "rpn_head", "box_head"):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before[part], state.params[part])
        assert all(jax.tree.leaves(moved)), (part, moved)


@pytest.mark.usefixtures("tinier_config")
def test_accumulated_gradients_are_those_of_the_whole_batch(config, make_batch):
    batch = make_batch(8)
    batch = batch.replace(valid=np.ones_like(batch.valid), boxes=np.maximum(batch.boxes, [[[4, 4, 30, 30]]]))
    # Every candidate is taken, so that no dice differ, and every image counts the same.
    config.model.box.update(samples=64, add_ground_truth=False, positive_fraction=1.0, sampling="first")
    config.model.rpn.update(samples=64, sampling="first")
    whole, (whole_metrics,) = train(config, 2, [batch])
    pieces, (pieces_metrics,) = train(config, 2, [batch], accumulate=4)
    for name in ("rpn_objectness", "rpn_box"):  # the second is another in each piece
        assert pieces_metrics[name] == pytest.approx(whole_metrics[name], rel=1e-4)
    for a, b in zip(jax.tree.leaves(whole.params["rpn_head"]), jax.tree.leaves(pieces.params["rpn_head"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.usefixtures("tinier_config")
def test_accumulating_is_a_loop_over_the_pieces(config, make_batch):
    """Each piece has every other image and dice of its own, and starts from the statistics of the one before."""
    config.model.backbone.norm, config.model.frozen_parts = "bn", ("neck",)
    config.model.rpn.samples = 4  # so few that chance decides which
    config.optim.update(momentum=0.0, weight_decay=0.0, base_batch_size=0)
    batch, mesh = make_batch(8), sharding.make_mesh(jax.devices()[:1])
    detector, state, step = set_up(config, mesh, accumulate=2)
    params, statistics = jax.tree.map(np.asarray, (state.params, state.batch_stats))

    @jax.jit
    def gradients(params, statistics, piece, key):
        def loss(params):
            variables = {"params": params, "batch_stats": statistics}
            (losses, _), updated = detector.apply(variables, piece, key, method="losses", mutable=["batch_stats"])
            return sum(losses.values()), updated["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    total = jax.tree.map(np.zeros_like, params)
    for i, key in enumerate(jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0), 2)):
        piece = jax.tree.map(lambda x, i=i: x[i::2], batch)
        found, statistics = gradients(params, statistics, piece, key)
        total = jax.tree.map(np.add, total, found)
    mean = jax.tree.map(lambda x: x / 2, total) | {"neck": jax.tree.map(np.zeros_like, params["neck"])}
    state, metrics = step(state, sharding.put_batch(mesh, vars(batch)))
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(mean)), rel=1e-3)
    expected = jax.tree.map(lambda x, gradient: x - 0.01 * gradient, params, mean)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.batch_stats, statistics)


@pytest.mark.usefixtures("tinier_config")
def test_accumulated_gradients_take_the_memory_of_one_piece(config, make_batch):
    mesh = sharding.make_mesh(jax.devices()[:1])
    _, state, step = set_up(config, mesh, accumulate=4)
    (loop,) = (
        eqn
        for eqn in step.trace(state, sharding.put_batch(mesh, vars(make_batch(8)))).jaxpr.eqns
        if eqn.primitive.name == "scan" and eqn.params["length"] == 4
    )
    # Of each piece its metrics alone; no kernel begins with 4 itself.
    assert not [x.aval.shape for x in loop.outvars if x.aval.ndim > 1 and x.aval.shape[0] == 4]


def test_the_average_of_the_weights_begins_as_a_copy():
    """What shares its memory with the weights could not be donated with them."""
    params = {"w": jnp.ones(64)}
    average = make_state({"params": params, "batch_stats": {}}, optax.sgd(0.1), 0.5).ema_params
    np.testing.assert_array_equal(average["w"], params["w"])
    assert average["w"].unsafe_buffer_pointer() != params["w"].unsafe_buffer_pointer()


@pytest.mark.usefixtures("tinier_config")
def test_average_of_the_weights_follows_its_formula(config, make_batch):
    mesh = sharding.make_mesh(jax.devices()[:1])
    _, state, step = set_up(config, mesh, ema_decay=0.5)
    average = jax.tree.map(np.asarray, state.params)
    for i in range(3):
        state, _ = step(state, sharding.put_batch(mesh, vars(make_batch(8, i))))
        decay = min(0.5, (1 + i) / (10 + i))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * np.asarray(p), average, state.params)
    for a, b in zip(jax.tree.leaves(average), jax.tree.leaves(state.ema_params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert inference_variables(state)["params"] is state.ema_params


def test_bfloat16_keeps_float32_parameters_and_losses_stay_close(config, make_batch):
    config.model.dtype = "bfloat16"
    state, (metrics,) = train(config, 1, [make_batch(8)])
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
    config.model.dtype = "float32"
    _, (reference,) = train(config, 1, [make_batch(8)])
    assert metrics["rpn_objectness"] == pytest.approx(reference["rpn_objectness"], rel=0.02)


def test_images_without_objects_train_and_detect(config, make_batch):
    batch = make_batch(8)
    empty = batch.replace(valid=np.zeros_like(batch.valid), boxes=np.zeros_like(batch.boxes))
    state, (metrics,) = train(config, 1, [empty])
    assert np.isfinite(metrics["loss"])
    assert metrics["rpn_box"] == metrics["box"] == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    mesh = sharding.make_mesh(jax.devices()[:1])
    config.model.box.score_threshold = 0.0
    detect = make_detect(build_detector(config.model, CLASSES))
    found = detect(inference_variables(state), sharding.put_batch(mesh, vars(empty)))
    boxes, valid = np.asarray(found.boxes), np.asarray(found.valid)
    assert valid.any()
    assert (boxes[valid][:, 2] <= 56).all()  # clipped to the picture, not to the padding
    assert (np.diff(np.where(valid, found.scores, 0)) <= 0).all()
