"""The training step: one pure jitted function from state and batch to state and metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fpn_jax.models.detector import Detector
from fpn_jax.ops.platforms import compiling_for
from fpn_jax.training import sharding
from fpn_jax.training.optim import Schedule, is_frozen, tree_of_paths
from fpn_jax.types import Batch, Detections, TrainState

Metrics = dict[str, jax.Array]

# Of a step's operations on a CPU: what needs the least memory first. XLA's own choice, the most side by side, takes a
# third of a gigabyte more for an image of 800 x 1344 and is no faster. And no copies of kernels that the update writes
# over when their last reader is done, which XLA finds out only if it looks at whole regions: another 0.08 GiB.
_ON_CPU = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_copy_insertion_use_region_analysis": True,
}


def make_train_step(
    detector: Detector,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    seed: int,
    accumulate: int = 1,
    ema_decay: float = 0.0,
    mesh: Any = None,
    shard_params: str = "",
    platform: str = "",
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """step(state, batch) -> (state, metrics), jitted; the given state's memory is reused, so it must not be read again.

    Args:
        seed: of the sampling of anchors and RoIs; with the step number it decides them, on any number of devices.
        accumulate: pieces the batch is cut into, one after another, whose gradients are averaged.
        ema_decay: of the averaged parameters; 0 for none. It warms up as (1 + step) / (10 + step).
        mesh: of the devices that the batch is split over; work on single images then stays on their device.
        shard_params: the axis of the mesh over which the state is split, see `sharding.layout`; so are the gradients
            and the update, while each device has all parameters to compute the losses with.
        platform: whose forms of the operations the step is made of, see `ops.platforms`; that of the devices if empty.
    """
    detector, platform = _on(detector, mesh), platform or _platform(mesh)

    def place(tree: Any, over: str = shard_params) -> Any:
        return tree if mesh is None else sharding.constrain(mesh, tree, over)

    def loss_fn(params, batch_stats, batch, key):
        variables = {"params": place(params, ""), "batch_stats": batch_stats}
        found, updated = detector.apply(variables, batch, key, method="losses", mutable=["batch_stats"])
        losses, statistics = found
        total = sum(losses.values())
        return total, ({"loss": total} | losses | statistics, updated.get("batch_stats", {}))

    def gradients(params, batch_stats, batch, key) -> tuple[Any, Any, Metrics]:
        with compiling_for(platform):
            grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(params, batch_stats, batch, key)
        return place(grads), batch_stats, metrics

    def accumulated(params, batch_stats, batch, key) -> tuple[Any, Any, Metrics]:
        # Piece i takes every accumulate-th image, so that each piece stays spread over all devices.
        pieces = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

        def body(carry, piece_and_key):
            total, batch_stats = carry
            grads, batch_stats, metrics = gradients(params, batch_stats, *piece_and_key)
            return (place(jax.tree.map(jnp.add, total, grads)), batch_stats), metrics

        keys = jax.random.split(key, accumulate)
        start = place(jax.tree.map(jnp.zeros_like, params)), batch_stats
        (total, batch_stats), metrics = jax.lax.scan(body, start, (pieces, keys))
        mean = jax.tree.map(lambda x: x / accumulate, total)
        return mean, batch_stats, jax.tree.map(lambda x: x.mean(0), metrics)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        compute = accumulated if accumulate > 1 else gradients
        grads, batch_stats, metrics = compute(state.params, state.batch_stats, batch, key)
        # What is frozen has no part in the norm, and XLA need not compute its gradient.
        grads = tree_of_paths(grads, lambda path, x: jnp.zeros_like(x) if is_frozen(path, detector.frozen) else x)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        ema_params = state.ema_params
        if ema_decay:
            decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
            ema_params = optax.incremental_update(params, ema_params, 1 - decay)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": schedule(state.step)}
        # Laid out as it came, or the next step would be another program.
        return place(TrainState(state.step + 1, params, batch_stats, opt_state, ema_params)), place(metrics, "")

    return jax.jit(step, donate_argnums=0, compiler_options=_ON_CPU if platform == "cpu" else None)


def _platform(mesh: Any) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _on(detector: Detector, mesh: Any) -> Detector:
    if mesh is None:
        return detector
    return detector.clone(per_device=sharding.per_device(mesh), spread_maps=sharding.spread_maps(mesh))


def make_level_counts(detector: Detector, mesh: Any = None) -> Callable[[dict[str, Any], Batch], Any]:
    """counts(variables, batch) -> {part: {what: int32 [b l]}}, see `Detector`; jitted."""
    return _inference(detector, mesh, "level_counts")


def make_detect(detector: Detector, mesh: Any = None) -> Callable[[dict[str, Any], Batch], Detections]:
    """detect(variables, batch) -> detections in pixels of the resized image, jitted."""
    return _inference(detector, mesh, "detect")


def _inference(detector: Detector, mesh: Any, method: str) -> Callable[[dict[str, Any], Batch], Any]:
    """A method of the detector, jitted, whose results lie where the images do."""
    detector, platform = _on(detector, mesh), _platform(mesh)

    def run(variables: dict[str, Any], batch: Batch) -> Any:
        variables = variables if mesh is None else sharding.constrain(mesh, variables)
        with compiling_for(platform):
            return detector.apply(variables, batch, method=method)

    return jax.jit(run, out_shardings=None if mesh is None else sharding.split(mesh))
