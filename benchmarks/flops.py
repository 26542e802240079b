"""How much a step computes, and how much a device can."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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

    Zeros that a strided convolution's gradient puts between the rows are not counted: no implementation needs them. Of
    the branches of a conditional, such as the forms of `jax.lax.platform_dependent`, the dearest counts: one is run.
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
        counts = [matmul_flops(getattr(p, "jaxpr", p)) for p in inner if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
        repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        total += repeats * (max(counts) if eqn.primitive.name == "cond" else sum(counts))
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
