"""From `config.optim` to an optax transformation and its learning rate schedule."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import optax

from fpn_jax.errors import UserError

Schedule = Callable[[Any], Any]


def peak_rate(optim: Mapping[str, Any], batch_size: int) -> float:
    """The learning rate after warm-up, of batches of so many images."""
    scale = batch_size / optim["base_batch_size"] if optim["base_batch_size"] else 1.0
    return optim["learning_rate"] * scale


def make_schedule(optim: Mapping[str, Any], batch_size: int, num_steps: int) -> Schedule:
    """Optimizer step -> learning rate.

    The rate is `learning_rate * batch_size / base_batch_size` (linear scaling, Goyal et al. 2017; base_batch_size 0
    switches it off), warmed up linearly over `warmup_steps` from `warmup_factor` of it, then by `schedule`: "step"
    multiplies by `step_factor` at every fraction of the run in `step_at`; "cosine" falls to zero; "constant".
    """
    rate = peak_rate(optim, batch_size)
    warmup, factor = optim["warmup_steps"], optim["warmup_factor"]
    boundaries = [round(at * num_steps) for at in optim["step_at"]]

    def step_decay(step):
        return optim["step_factor"] ** sum((step >= b).astype(jnp.float32) for b in boundaries)

    def cosine_decay(step):
        return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / num_steps, 0, 1)))

    decays = {"step": step_decay, "cosine": cosine_decay, "constant": jnp.ones_like}
    if optim["schedule"] not in decays:
        raise UserError(f"optim.schedule is {optim['schedule']!r}; choose one of {', '.join(decays)}")
    decay = decays[optim["schedule"]]

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.where(step < warmup, factor + (1 - factor) * step / max(warmup, 1), 1.0)
        return jnp.asarray(rate * warm * decay(step), jnp.float32)

    return schedule


def make_optimizer(
    optim: Mapping[str, Any], schedule: Schedule, params: Any, frozen: tuple[tuple[str, ...], ...] = ()
) -> optax.GradientTransformation:
    """Clip by the global norm, decay weights, then "sgd" with momentum (as torch: v = m v + g) or "adamw".

    Args:
        params: float32 arrays or shapes, to know which leaves are decayed: those with more than one dimension, unless
            `decay_norms_and_biases`.
        frozen: beginnings of the parameter paths that keep their values, see `Detector.frozen`.
    """
    decayed = tree_of_paths(params, lambda path, x: x.ndim > 1 or optim["decay_norms_and_biases"])
    scaled = optax.scale_by_learning_rate(schedule)
    decay = optax.add_decayed_weights(optim["weight_decay"], decayed)
    rules = {
        # Coupled decay before momentum is what published schedules assume; adamw's comes after the scaling.
        "sgd": optax.chain(decay, optax.trace(optim["momentum"]), scaled),
        "adamw": optax.chain(optax.scale_by_adam(b1=optim["momentum"], b2=optim["adam_b2"]), decay, scaled),
    }
    if optim["name"] not in rules:
        raise UserError(f"optim.name is {optim['name']!r}; choose one of {', '.join(rules)}")
    # A place is kept for clipping, so that a run may begin to clip when it goes on.
    clip = optax.clip_by_global_norm(optim["clip_norm"]) if optim["clip_norm"] else optax.identity()
    rule = optax.chain(clip, rules[optim["name"]])
    labels = tree_of_paths(params, lambda path, x: "frozen" if is_frozen(path, frozen) else "trained")
    return optax.multi_transform({"trained": rule, "frozen": optax.set_to_zero()}, labels)


def is_frozen(path: tuple[str, ...], frozen: tuple[tuple[str, ...], ...]) -> bool:
    """Whether a parameter path begins with one of the given beginnings; the last part may be cut short."""
    return any(path[: len(f) - 1] == f[:-1] and path[len(f) - 1].startswith(f[-1]) for f in frozen)


def tree_of_paths(params: Any, value: Callable[[tuple[str, ...], Any], Any]) -> Any:
    """A tree like params that holds value(path, leaf)."""
    flat = flax.traverse_util.flatten_dict(params)
    return flax.traverse_util.unflatten_dict({path: value(path, x) for path, x in flat.items()})
