"""The only home of meshes and shardings: everything else sees ordinary arrays.

The mesh has three axes, of which `data` alone is longer than 1 unless `config.mesh` says otherwise:

    data    batches are split along their first axis, b
    fsdp    so they are over this one, and parameters can be split over it, too
    space   the devices along it share the rows, h, of the same images

XLA puts in the gradient sums and what else devices have to tell each other. The same code runs on one CPU, eight GPUs,
or a pod.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fpn_jax.errors import UserError
from fpn_jax.types import Batch, PerDevice, SpreadMaps, as_they_are, together

_BATCH, _SPACE = ("data", "fsdp"), "space"
# Rows of a map that is cut. Where a map has fewer rows than a kernel, of which the largest here is 5x5, XLA (jaxlib
# 0.10.2) gets the gradient of convolutions wrong: of two rows on two devices times two it is zero.
FEWEST_ROWS = 5
SMALLEST_SPLIT = 4096  # elements: below, a message costs more than the memory is worth


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


@dataclass(frozen=True)
class MeshOptions:
    """`config.mesh`: how many devices each axis has, and over which of them the state of training is split."""

    data: int = 0  # 0: all that the other axes leave
    fsdp: int = 1
    space: int = 1
    shard_params: str = ""  # "data" or "fsdp": see `layout`; "": every device holds all of it


def make_mesh(devices: Sequence[jax.Device] | None = None, options: MeshOptions | None = None) -> Mesh:
    """The axes of `options`, by default `data` alone, over the given devices, by default all of them.

    Raises `UserError` naming the key that does not fit to the devices.
    """
    options = options or MeshOptions()
    # By process, then by number: the images of a batch lie in the order of the processes whatever the network between
    # them, and the devices that share an image are of one host.
    devices = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    placed = np.array(devices).reshape(_sizes(options, len(devices)))
    for group in placed.reshape(-1, options.space):
        if len({device.process_index for device in group}) > 1:
            raise UserError(
                f"mesh.space is {options.space}, but the devices that share an image must be of one process; take a "
                "divisor of the number of each process's devices"
            )
    # Auto: XLA propagates shardings. The default, Explicit, refuses reshapes such as (b, h, w, a) -> (b, hwa).
    return Mesh(placed, (*_BATCH, _SPACE), axis_types=(AxisType.Auto,) * placed.ndim)


def _sizes(options: MeshOptions, count: int) -> tuple[int, int, int]:
    """Devices along data, fsdp and space. Raises `UserError` if that is not all of the `count` there are."""
    for name, least in (("data", 0), ("fsdp", 1), ("space", 1)):
        if getattr(options, name) < least:
            raise UserError(f"mesh.{name} is {getattr(options, name)}; at least {least}")
    others = options.fsdp * options.space
    data = options.data or max(1, count // others)
    if data * others != count:
        shown = f"mesh.data={options.data}, mesh.fsdp={options.fsdp}, mesh.space={options.space}"
        hint = "mesh.data=0 takes what the others leave" if count % others == 0 else "lower mesh.fsdp or mesh.space"
        raise UserError(f"{shown}: their product must be the number of devices, {count}; {hint}")
    if options.shard_params not in ("", *_BATCH):
        raise UserError(f"mesh.shard_params is {options.shard_params!r}; choose data or fsdp, or leave it empty")
    if options.shard_params == "fsdp" and options.fsdp == 1:
        raise UserError("mesh.shard_params is 'fsdp', but mesh.fsdp is 1; raise that, or split over data")
    return data, options.fsdp, options.space


def fitting(options: MeshOptions) -> MeshOptions:
    """Options for scoring what was trained with these: the same where they suit the devices here, else the defaults."""
    try:
        make_mesh(options=options)
    except UserError:
        return MeshOptions()
    return options


def describe(mesh: Mesh, over: str = "") -> str:
    """The mesh and what is split over which axis, in words: "8 devices (data 4 x space 2)"."""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    state = f", parameters split over {over}" if over else ""
    shown = f" ({axes}{state})" if state or axes.count("x") else ""
    return f"{mesh.size} device{'s' * (mesh.size > 1)}{shown}"


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicated_beside(array: Any) -> Any:
    """The sharding of a value that all devices of this array hold."""
    there = array.sharding
    return replicated(there.mesh) if isinstance(there, NamedSharding) else there


def split(mesh: Mesh) -> NamedSharding:
    """The first axis cut into one piece for each device, or each group of devices that share their images."""
    return NamedSharding(mesh, PartitionSpec(_BATCH))


def split_maps(mesh: Mesh) -> NamedSharding:
    """Images or maps [b h w c]: as `split`, and the rows of each cut into one piece for each device along space."""
    return NamedSharding(mesh, PartitionSpec(_BATCH, _SPACE))


def layout(mesh: Mesh, tree: Any, over: str = "") -> Any:
    """The sharding of each array of a state, or anything in it, by shapes alone.

    over: the axis along which each array is cut, along its longest dimension that divides (Rajbhandari et al.,
    arXiv 1910.02054); arrays of fewer than `SMALLEST_SPLIT` elements, and those that do not divide, are held by all, as
    everything is with "".
    """

    def of(x: Any) -> NamedSharding:
        dividing = [axis for axis, n in enumerate(x.shape) if over and n % mesh.shape[over] == 0]
        if not dividing or np.prod(x.shape) < SMALLEST_SPLIT or mesh.shape[over] == 1:
            return replicated(mesh)
        axis = max(dividing, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, over))

    return jax.tree.map(of, tree)


def batch_layout(mesh: Mesh, batch: dict[str, Any]) -> dict[str, NamedSharding]:
    """The sharding of each field of a batch."""
    return {name: split_maps(mesh) if name == "image" else split(mesh) for name in batch}


def check_batch_size(mesh: Mesh, batch_size: int, key: str) -> None:
    """Raise a `UserError` naming `key` unless the batch divides over the devices of the mesh."""
    space = mesh.shape[_SPACE]
    parts = mesh.size // space
    if batch_size <= 0 or batch_size % parts:
        above = max(1, -(-batch_size // parts)) * parts
        over = f"{parts} devices" if space == 1 else f"{parts} groups of {space} devices (mesh.space)"
        raise UserError(f"{key} is {batch_size}, which does not divide over {over}; try {above}")


def check_buckets(mesh: Mesh, buckets: Sequence[tuple[int, int]], stride: int, coarsest: int) -> None:
    """Raise a `UserError` unless images of these (height, width) can be cut into rows over the devices along space.

    Each device gets whole rows of the map of `stride`, as many as the others. The map of stride `coarsest` must have at
    least `FEWEST_ROWS`.
    """
    space = mesh.shape[_SPACE]
    unit, least = stride * space, FEWEST_ROWS * coarsest
    for height, width in buckets if space > 1 else ():
        if height % unit or height < least:
            raise UserError(
                f"the bucket {height}x{width} cannot be cut into mesh.space={space} pieces; give data.buckets (or "
                f"data.shorter) whose heights are multiples of {unit} and at least {least}, or lower mesh.space"
            )


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> Batch:
    """This process's rows of a host batch -> the global batch, split over the mesh."""
    fields = {name: batch[name] for name in Batch.__dataclass_fields__ if batch.get(name) is not None}
    with jax.transfer_guard("allow"):
        put = jax.make_array_from_process_local_data
        return Batch(**jax.tree.map(put, batch_layout(mesh, fields), fields))


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Values that are equal on all processes -> arrays that every device holds."""
    return put_state(mesh, tree)


def put_state(mesh: Mesh, tree: Any, over: str = "") -> Any:
    """Values that are equal on all processes -> arrays laid out as `layout` has it.

    They have memory of their own: what shares it with `tree`, as arrays on a CPU otherwise would, cannot be donated,
    and the first step would need room for two states.
    """
    where = layout(mesh, tree, over)
    placed = jax.device_put(jax.tree.map(np.asarray, tree), where)
    if mesh.devices.flat[0].platform != "cpu":
        return placed
    # A CPU takes over what lies as XLA wants it, as a copy by NumPy does now and then, and cannot donate it. Copied by
    # one program: one for each shape would stay, too.
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=where)(placed)


def constrain(mesh: Mesh, tree: Any, over: str = "") -> Any:
    """Inside a jitted function: the same values, laid out as `layout` has it."""
    return jax.lax.with_sharding_constraint(tree, layout(mesh, tree, over))


def per_device(mesh: Mesh) -> PerDevice:
    """A function of batches, arrays [b ...], for each device's own images, without a word between devices.

    Devices that share images each get all rows of them, and do the same.
    """
    if mesh.size == 1:
        return together

    def split_up(function: Callable[..., Any]) -> Callable[..., Any]:
        # A space of one device is named all the same: the gradient is summed over what is not, if only with itself.
        along = PartitionSpec((*_BATCH, _SPACE) if mesh.shape[_SPACE] == 1 else _BATCH)
        return jax.shard_map(function, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)

    return split_up


def spread_maps(mesh: Mesh) -> SpreadMaps:
    """A function that keeps maps {l: [b h w c]} where their images are, in rows along space."""
    if mesh.shape[_SPACE] == 1:
        return as_they_are
    return lambda maps: jax.lax.with_sharding_constraint(maps, split_maps(mesh))


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
