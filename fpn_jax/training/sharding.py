"""The only home of meshes, shardings and processes: everything else sees ordinary arrays.

One mesh axis, `data`, over all devices of all processes. Parameters are replicated, batches are split along their
first axis, and XLA puts in the gradient sums. The same code runs on one CPU, eight GPUs, or a pod.
"""

import math
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fpn_jax.errors import ProcessLost, UserError
from fpn_jax.types import Batch, PerDevice, together

_SHUTDOWN_SECONDS = 3600  # a process that is done waits so long for rank 0, which may draw and write yet


def start_processes(join_within: float = 300, dead_after: float = 60) -> None:
    """Join the other processes of this job, if there are several; call it before anything touches a device.

    Slurm, GKE and Cloud TPU slices tell each process its place. Elsewhere set JAX_COORDINATOR_ADDRESS=HOST:PORT,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. A single process does nothing. Raises `UserError` if one of the three is
    missing or no number. A process that waits longer than a few seconds says so, and ends with status 76 if the others
    have not come within `join_within` seconds.

    dead_after: seconds until `fpn_jax.training.peers` gives up a silent process; jax itself waits longer, so that the
    line which names the process comes first.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    if jax.distributed.is_initialized():
        return
    place: dict[str, Any] = {}
    if any(given):
        if not all(given):
            missing = [name for name, value in zip(names, given, strict=True) if not value]
            raise UserError(f"{missing[0]} is not set; a process of several needs {', '.join(names)}")
        if not (given[1].isdigit() and given[2].isdigit() and int(given[2]) < int(given[1])):
            raise UserError(f"JAX_PROCESS_ID={given[2]} must be a number from 0 below JAX_NUM_PROCESSES={given[1]}")
        place = {"coordinator_address": given[0], "num_processes": int(given[1]), "process_id": int(given[2])}
    elif not (
        int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    ):
        return
    with _Waiting(_awaited(**place), join_within):
        jax.distributed.initialize(
            **place,
            initialization_timeout=math.ceil(join_within) + 30,  # jax's own end is a stack trace: ours comes first
            heartbeat_timeout_seconds=math.ceil(2 * dead_after) + 40,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )


def _awaited(coordinator_address: str = "", num_processes: int = 0, process_id: int = 0) -> str:
    if not coordinator_address:
        return "this process waits for the others of its job, whose places the cluster tells"
    if process_id:
        return (
            f"rank {process_id} of {num_processes} waits for rank 0 at {coordinator_address}, and that for all others"
        )
    others = "rank 1" if num_processes == 2 else f"ranks 1 to {num_processes - 1}"
    return f"rank 0 of {num_processes} waits at {coordinator_address} for {others}"


class _Waiting:
    """Says what is waited for if that takes longer than seconds, and ends the process if it takes too long.

    From a thread: the call that waits comes back neither with an error nor on Ctrl-C.
    """

    def __init__(self, what: str, limit: float):
        self._what, self._limit = what, limit
        self._over = threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *_: Any) -> None:
        self._over.set()

    def _watch(self) -> None:
        patience = min(5.0, self._limit / 2)
        if self._over.wait(patience):
            return
        print(f"{self._what}; at most {self._limit:.0f} s", file=sys.stderr, flush=True)
        if self._over.wait(self._limit - patience):
            return
        line = f"error: {self._what}; they have not come within {self._limit:.0f} s (config.join_within): see whether "
        print(f"{line}all were started and reach that address, and start all anew", file=sys.stderr, flush=True)
        os._exit(ProcessLost.status)


class KeyValues:
    """Short texts that all processes of a job can write and read at any time, whatever else each of them does.

    The store of jax's coordination service, which lives in rank 0 and has no public interface: this class is the only
    one that knows of it. Methods raise `OSError` if rank 0 does not answer.
    """

    def __init__(self, state: Any):
        self._client = state.client
        self.rank: int = state.process_id
        self.world: int = state.num_processes
        self.address: str = state.coordinator_address  # HOST:PORT of rank 0

    def write(self, key: str, value: str) -> None:
        """Set a key, in place of what was there."""
        self._call(lambda: self._client.key_value_set(key, value, allow_overwrite=True))

    def below(self, folder: str) -> dict[str, str]:
        """{key: value} of all keys FOLDER/..., by what comes after the slash."""
        pairs = self._call(lambda: self._client.key_value_dir_get(f"{folder}/"))
        return {key.removeprefix(f"{folder}/"): value for key, value in pairs}

    @staticmethod
    def _call(request: Callable[[], Any]) -> Any:
        try:
            return request()
        except (RuntimeError, ValueError) as error:
            raise OSError(str(error)) from error


def key_values() -> KeyValues | None:
    """The store of this job, None for a process that is alone. Touches no device."""
    from jax._src.distributed import global_state

    return KeyValues(global_state) if jax.distributed.is_initialized() and global_state.num_processes > 1 else None


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


def describe_devices() -> str:
    """Kind and number of this process's own devices: "4 x TPU v5 lite"."""
    devices = jax.local_devices()
    return f"{len(devices)} x {devices[0].device_kind}"


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
