"""The state a run starts from."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fpn_jax.models.detector import Detector
from fpn_jax.ops.platforms import compiling_for
from fpn_jax.types import Batch, TrainState


def init_variables(detector: Detector, image_size: tuple[int, int], seed: int) -> dict[str, Any]:
    """Fresh variables {"params": ..., "batch_stats": ...}; image_size is one bucket, its values do not matter."""
    height, width = image_size
    batch = Batch(
        image=jnp.zeros((1, height, width, 3), jnp.uint8),
        size=jnp.array([[height, width]], jnp.int32),
        boxes=jnp.zeros((1, 1, 4)),
        labels=jnp.zeros((1, 1), jnp.int32),
        valid=jnp.zeros((1, 1), bool),
        proposals=jnp.zeros((1, 1, 4)),
        proposals_valid=jnp.zeros((1, 1), bool),
    )
    key = jax.random.key(seed)

    def init(key):
        with compiling_for(jax.default_backend()):
            return detector.init({"params": key}, batch, key, method="losses")

    variables = jax.jit(init)(key)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def make_state(variables: dict[str, Any], optimizer: optax.GradientTransformation, ema_decay: float) -> TrainState:
    """Step 0 with these variables. The average starts at the parameters; decay 0 keeps none."""
    params = variables["params"]

    @jax.jit  # one program: one for each shape takes a second longer, and 0.1 GB as long as the process lives
    def others(params):
        return optimizer.init(params), jax.tree.map(jnp.copy, params) if ema_decay else {}

    opt_state, ema_params = others(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=opt_state,
        ema_params=ema_params,
    )


def inference_variables(state: TrainState) -> dict[str, Any]:
    """What `detect` runs with: the averaged parameters where there are any."""
    return {"params": state.ema_params or state.params, "batch_stats": state.batch_stats}
