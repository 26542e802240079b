"""GPUs by what their data sheets say, and as XLA's compiler describes them to itself, so that none need be there.

Sources: NVIDIA's data sheets of A100 (80 GB, SXM), H100 (SXM), H200 and B200, dense rates; what else the compiler asks
for is what these devices report of themselves, as listed in XLA's target_config/specs, read in November 2026.
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import jax

from fpn_jax.errors import UserError

PREALLOCATED = 0.75  # of a GPU's memory, which is what JAX takes if XLA_PYTHON_CLIENT_MEM_FRACTION says nothing else


@dataclass(frozen=True)
class Gpu:
    """One GPU, as one device of jax."""

    name: str
    kind: str  # as jax.Device.device_kind says it
    capability: tuple[int, int]
    cores: int  # multiprocessors
    units: int  # float32 multiply-adds of a multiprocessor in a cycle
    clock: float  # Hz
    memory_size: int  # bytes
    memory_bandwidth: float  # bytes per second
    matrix_flops: float  # bfloat16, per second, dense
    cache: int  # bytes, L2
    shared: tuple[int, int]  # bytes of shared memory: of a multiprocessor, of a block that asks for more than usual

    def peak(self, dtype: str) -> float:
        """FLOP/s of matrix products with operands of this HLO type; XLA rounds float32 to TF32 for them."""
        return self.matrix_flops if dtype in ("bf16", "f16") else self.matrix_flops / 2

    @property
    def exact_flops(self) -> float:
        """FLOP/s in float32 outside of the matrix units."""
        return 2 * self.cores * self.units * self.clock

    @property
    def target(self) -> str:
        """XLA's GpuTargetConfigProto as text."""
        major, minor = self.capability
        per_core, per_block = self.shared
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_block: 49152
              shared_memory_per_core: {per_core} shared_memory_per_block_optin: {per_block}
              core_count: {self.cores} fpus_per_core: {self.units} clock_rate_ghz: {self.clock / 1e9}
              memory_bandwidth: {self.memory_bandwidth:.0f} device_memory_size: {self.memory_size}
              l2_cache_size: {self.cache} cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }}
            device_description_str: "{self.kind}"
        """


_HOPPER = {"capability": (9, 0), "cores": 132, "units": 128, "clock": 1.98e9, "matrix_flops": 989e12}
_HOPPER |= {"cache": 52428800, "shared": (233472, 232448)}

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100",
            kind="NVIDIA A100-SXM4-80GB",
            capability=(8, 0),
            cores=108,
            units=64,
            clock=1.41e9,
            memory_size=85100068864,
            memory_bandwidth=2.04e12,
            matrix_flops=312e12,
            cache=41943040,
            shared=(167936, 166912),
        ),
        Gpu("h100", "NVIDIA H100 80GB HBM3", memory_size=84942979072, memory_bandwidth=3.35e12, **_HOPPER),
        Gpu("h200", "NVIDIA H200", memory_size=151397597184, memory_bandwidth=4.8e12, **_HOPPER),
        Gpu(
            name="b200",
            kind="NVIDIA B200",
            capability=(10, 0),
            cores=148,
            units=128,
            clock=1.965e9,
            memory_size=191514411008,
            memory_bandwidth=7.67e12,
            matrix_flops=2250e12,
            cache=132644864,
            shared=(233472, 232448),
        ),
    )
}


@dataclass(frozen=True)
class Hosts:
    """GPUs of one host, such as h100 or h100:8, or of several, such as h100:2x8."""

    gpu: Gpu
    shape: tuple[int, int]  # hosts, GPUs of each

    @property
    def size(self) -> int:
        """GPUs."""
        return math.prod(self.shape)

    @property
    def memory(self) -> float:
        """Bytes of a device that a program can use."""
        return PREALLOCATED * self.gpu.memory_size

    @property
    def description(self) -> str:
        """For people."""
        hosts, each = self.shape
        return f"{self} ({self.gpu.kind}, {each} on {'one host' if hosts == 1 else f'each of {hosts} hosts'})"

    def devices(self) -> list[Any]:
        """The GPUs as devices of jax to compile for, a process for each host. Raises `UserError` without a compiler.

        Call it before anything else asks jax for devices.
        """
        from jax.experimental import topologies  # it loads the compiler, which the other commands do without

        if not compiler_is_there():
            raise UserError(
                f'--topology={self} needs the GPU compiler; pip install -e ".[cuda]" (no GPU is needed), or say '
                "--topology=local:8"
            )
        jax.config.update("jax_platforms", "cpu")
        shape = "x".join(map(str, (1, *self.shape)))  # partitions, hosts, GPUs
        options = {"topology": shape, "target_config": self.gpu.target}
        return list(topologies.get_topology_desc(self.gpu.name, "cuda", **options).devices)

    def __str__(self) -> str:
        hosts, each = self.shape
        return f"{self.gpu.name}:{each if hosts == 1 else f'{hosts}x{each}'}"


def compiler_is_there() -> bool:
    """Whether XLA's compiler for NVIDIA's GPUs is installed."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def parse_hosts(topology: str) -> Hosts:
    """`h100`, `h100:8` or `h100:2x8` -> the GPUs. Raises `UserError` for what is none."""
    name, colon, counts = topology.partition(":")
    sides = counts.split("x") if colon else ["1"]
    if name not in GPUS or len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise UserError(
            f"--topology={topology}: give {' or '.join(GPUS)} and a number of GPUs, or hosts x GPUs of each, such as "
            "h100:8 or h100:2x8"
        )
    numbers = [int(side) for side in sides]
    return Hosts(GPUS[name], (numbers[0] if len(numbers) == 2 else 1, numbers[-1]))
