"""Images per second, model FLOP utilisation and peak memory of a config's training step, on whatever is here.

    python -m benchmarks.train_step --config=experiments/faster_rcnn_r50_fpn.py --config.batch_size=2 [--steps=10]

The step is the training's own, on random images with random objects that are already on the device: what the input
pipeline costs is not in these figures. The last line is the table's row as JSON.
"""

import json
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax import cli, common
from fpn_jax.training import sharding
from fpn_jax.training.optim import make_optimizer, make_schedule
from fpn_jax.training.state import init_variables, make_state
from fpn_jax.training.step import make_train_step
from fpn_jax.types import Batch

_CONFIG = cli.config_flag()
_STEPS = cli.flag("steps", int, 10, "Timed steps, after two for warming up; the median is reported.")
_CLASSES = cli.flag("classes", int, 80, "Classes of the detector.")

# Dense bf16 FLOP/s of one device, from the vendors' data sheets; others are measured by a large matrix product.
PEAK = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def matmul_flops(jaxpr: Any) -> float:
    """Floating point operations of all matrix products and convolutions in a jaxpr, two per multiply-add.

    Zeros that a strided convolution's gradient puts between the rows are not counted: no implementation needs them.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            total += 2 * out.size * np.prod([eqn.invars[0].aval.shape[d] for d in contracted])
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * out.size * kernel.size / features / np.prod(eqn.params["lhs_dilation"])
        inner = [p for v in eqn.params.values() for p in (v if isinstance(v, tuple | list) else [v])]
        repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += repeats * sum(
            matmul_flops(getattr(p, "jaxpr", p)) for p in inner if hasattr(p, "eqns") or hasattr(p, "jaxpr")
        )
    return total


def peak_flops(device: jax.Device) -> tuple[float, str]:
    """(FLOP/s that the device can reach in bf16, or on a CPU in float32; where the number is from)."""
    for name, value in PEAK.items():
        if device.device_kind.startswith(name):
            return value, "data sheet"
    n, dtype = (2048, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(lambda a, b: a @ b)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times), f"measured on a {n}x{n} product"


def random_batch(batch_size: int, height: int, width: int, classes: int, seed: int) -> dict[str, np.ndarray]:
    """Noise with 8 to 16 boxes of 16 to 400 pixels in every image."""
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(np.log(16), np.log(min(400, height, width)), (batch_size, 16, 2)))
    corners = rng.uniform(size=(batch_size, 16, 2)) * (np.array([width, height]) - sides)
    batch = Batch(
        image=rng.integers(0, 256, (batch_size, height, width, 3), np.uint8),
        size=np.tile(np.array([[height, width]], np.int32), (batch_size, 1)),
        boxes=np.concatenate([corners, corners + sides], -1).astype(np.float32),
        labels=rng.integers(0, classes, (batch_size, 16)).astype(np.int32),
        valid=np.arange(16) < rng.integers(8, 17, (batch_size, 1)),
    )
    return vars(batch)


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    cli.check_required(config=_CONFIG.value)
    config = _CONFIG.value
    common.set_up_jax()
    mesh_options = common.mesh_options(config)
    mesh, over = sharding.make_mesh(options=mesh_options), mesh_options.shard_params
    sharding.check_batch_size(mesh, config.batch_size, "batch_size")
    height, width = common.pipeline_options(config).buckets[0]
    detector = common.make_detector(config, common.Classes([str(i) for i in range(_CLASSES.value)], []))
    variables = init_variables(detector, (height, width), config.seed)
    schedule = make_schedule(config.optim, config.batch_size, config.num_steps)
    optimizer = make_optimizer(config.optim, schedule, variables["params"], detector.frozen)
    state = sharding.put_state(mesh, make_state(variables, optimizer, config.ema_decay), over)
    how = config.seed, config.accumulate, config.ema_decay, mesh, over
    step = make_train_step(detector, optimizer, schedule, *how)
    batches = [
        sharding.put_batch(mesh, random_batch(config.batch_size, height, width, _CLASSES.value, seed))
        for seed in range(4)
    ]

    flops = matmul_flops(jax.make_jaxpr(step)(state, batches[0]).jaxpr)
    start = time.perf_counter()
    compiled = step.lower(state, batches[0]).compile()
    compile_s = time.perf_counter() - start
    times = []
    for i in range(_STEPS.value + 2):
        start = time.perf_counter()
        state, metrics = compiled(state, batches[i % len(batches)])
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    device = jax.devices()[0]
    peak, source = peak_flops(device)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    row = {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "jax": jax.__version__,
        "images": f"{config.batch_size} x {height}x{width} {config.model.dtype}",
        "images_per_s": round(config.batch_size / seconds, 2),
        "step_s": round(seconds, 4),
        "step_s_min_max": [round(min(times[2:]), 4), round(max(times[2:]), 4)],
        "tflop_per_step": round(flops / 1e12, 4),
        "mfu_percent": round(100 * flops / seconds / peak / jax.device_count(), 1),
        "peak_tflop_per_s": f"{peak / 1e12:.2f} ({source})",
        "peak_memory_gib": round((memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2**30, 2),
        "memory_of": "device" if memory else "whole process",
        "compile_s": round(compile_s, 1),
        "loss": round(float(metrics["loss"]), 4),
    }
    width_of_names = max(map(len, row))
    for name, value in row.items():
        print(f"{name:<{width_of_names}}  {value}")
    print(json.dumps(row))


if __name__ == "__main__":
    cli.run(main)
