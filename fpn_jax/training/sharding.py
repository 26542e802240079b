"""The only home of meshes and shardings: everything else sees ordinary arrays.

One mesh axis, `data`, over all devices of all processes. Parameters are replicated, batches are split along their
first axis, and XLA puts in the gradient sums. The same code runs on one CPU, eight GPUs, or a pod.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fpn_jax.errors import UserError
from fpn_jax.types import Batch, PerDevice, together


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
