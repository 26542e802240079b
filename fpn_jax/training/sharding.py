"""The only home of meshes, shardings and processes: everything else sees ordinary arrays.

One mesh axis, `data`, over all devices of all processes. Parameters are replicated, batches are split along their
first axis, and XLA puts in the gradient sums. The same code runs on one CPU, eight GPUs, or a pod.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fpn_jax.errors import UserError
from fpn_jax.types import Batch, PerDevice, together


def start_processes() -> None:
    """Join the other processes of this job, if there are several; call it before anything touches a device.

    Slurm, Open MPI, GKE and Cloud TPU slices tell each process its place, and jax knows how to ask them. Elsewhere set
    JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which come before all others. A single
    process does nothing. Raises `UserError` if one of the three is missing, or the launcher tells too little.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    if jax.distributed.is_initialized():
        return
    if any(given):
        if not all(given):
            missing = [name for name, value in zip(names, given, strict=True) if not value]
            raise UserError(f"{missing[0]} is not set; a process of several needs {', '.join(names)}")
        # Deactivated: else jax under Slurm would leave each process a single GPU, whoever gave these.
        place = given[0], int(given[1]), int(given[2])
        jax.distributed.initialize(*place, cluster_detection_method="deactivate")
        return
    launcher = _launcher()
    if launcher == "slurm":
        jax.distributed.initialize(local_device_ids=_slurm_gpus(), cluster_detection_method="slurm")
    elif launcher:
        try:
            jax.distributed.initialize()
        except ValueError as error:  # no coordinator: a TPU without neighbours, or a launcher that jax cannot ask
            if launcher != "tpu" or "coordinator_address" not in str(error):
                raise UserError(
                    f"this is one of several processes of {launcher}, but jax cannot tell which ({error}); set "
                    f"{', '.join(names)}"
                ) from None


def _launcher() -> str | None:
    """Who has started several processes of which this is one; None if nobody has.

    A TPU counts, too: only its metadata server knows whether there are others, and jax asks it.
    """
    several = {
        "slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),  # of srun; a bare sbatch script is one process
        "ompi": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    }
    for launcher, (count, place) in several.items():
        if int(os.environ.get(count) or 1) > 1 and place in os.environ:
            return launcher
    # jax sets the first on importing where it finds TPU chips; the others are GKE's.
    if {"TPU_ML_PLATFORM", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & os.environ.keys():
        return "tpu"
    # An indexed Kubernetes job; its size is known to jax alone, which asks the cluster if it may (pip: jax[k8s]).
    return "k8s" if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys() else None


def _slurm_gpus() -> list[int] | None:
    """The GPUs of this task, as numbers among those it sees; None: as jax has it, one for each task of a node.

    jax takes one GPU per task even where a node has one task, whose other GPUs would lie idle.
    """
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    tasks = _tasks_of_this_node()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("ROCR_VISIBLE_DEVICES")
    gpus = len(visible.split(",")) if visible else int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    # Fewer than tasks: those that a task sees are its own (--gpus-per-task).
    return list(range(gpus)) if gpus and (tasks == 1 or (visible and gpus < tasks)) else None


def _tasks_of_this_node() -> int:
    """From SLURM_STEP_TASKS_PER_NODE, which says "2(x3),1" for three nodes of two tasks and one of one."""
    counts: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID") or 0)
    return counts[node] if node < len(counts) else counts[-1]


def wait_for_all(what: str) -> None:
    """Until every process has come here, so that all find the files that process 0 has written."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def preempted(step: int) -> bool:
    """Whether the platform takes one of several processes away; the same step and answer on all of them."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def process() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    return jax.process_index(), jax.process_count()


def first_device() -> list[jax.Device]:
    """One device of this process, for work that is not spread."""
    return jax.local_devices()[:1]


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """One axis `data` over the given devices, by default all of them."""
    devices = jax.devices() if devices is None else devices
    # Auto: XLA propagates shardings. The default, Explicit, refuses reshapes such as (b, h, w, a) -> (b, hwa).
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The first axis cut into one piece per device."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(mesh: Mesh, batch_size: int, key: str) -> None:
    """Raise a `UserError` naming `key` unless the batch divides over the devices of the mesh."""
    if batch_size <= 0 or batch_size % mesh.size:
        above = max(1, -(-batch_size // mesh.size)) * mesh.size
        raise UserError(f"{key} is {batch_size}, which does not divide over {mesh.size} devices; try {above}")


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> Batch:
    """This process's rows of a host batch -> the global batch, split over the mesh."""
    fields = {name: batch[name] for name in Batch.__dataclass_fields__ if name in batch}
    with jax.transfer_guard("allow"):
        return Batch(**jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(mesh), x), fields))


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Values that are equal on all processes -> arrays that every device holds."""
    return jax.device_put(jax.tree.map(np.asarray, tree), replicated(mesh))


def per_device(mesh: Mesh) -> PerDevice:
    """A function of batches, arrays [b ...], for each device's own images, without a word between devices."""
    if mesh.size == 1:
        return together

    def split_up(function: Callable[..., Any]) -> Callable[..., Any]:
        along = PartitionSpec("data")
        return jax.shard_map(function, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)

    return split_up


def local_rows(tree: Any) -> Any:
    """Arrays split along their first axis -> NumPy arrays of the rows that this process put in."""

    def rows(x: jax.Array) -> np.ndarray:
        shards = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])

    return jax.tree.map(rows, tree)


def gather_objects(objects: bytes) -> list[bytes]:
    """One byte string of every process, in rank order, to all of them."""
    if jax.process_count() == 1:
        return [objects]
    mine = np.frombuffer(objects, np.uint8)
    sizes = multihost_utils.process_allgather(np.array([mine.size], np.int64)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [rows[i, :n].tobytes() for i, n in enumerate(sizes)]
