"""The training step of a config, compiled ahead of time for devices that need not be there."""

import dataclasses
import os
import re
import time
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from fpn_jax.errors import UserError
from fpn_jax.models import build_detector
from fpn_jax.models.detector import Detector
from fpn_jax.planning.chips import Slice
from fpn_jax.planning.gpus import Hosts
from fpn_jax.planning.hlo import Message, Program, Run
from fpn_jax.planning.roofline import Bound, bounds_by_part
from fpn_jax.training import sharding
from fpn_jax.training.optim import make_optimizer, make_schedule
from fpn_jax.training.state import init_variables, make_state
from fpn_jax.training.step import make_train_step
from fpn_jax.types import Batch

# Scopes of the source, see the named scopes in models/ and training/step.py, by the part that a plan tells of.
PARTS = {
    "backbone": ("backbone",),
    "neck": ("neck",),
    "RPN head": ("rpn_head",),
    "proposals, NMS": ("proposals",),
    "RoIAlign": ("roi_align",),
    "box head": ("box_head",),
    "losses, matching, sampling": ("rpn_losses", "roi_sampling", "box_losses"),
    "optimizer": ("optimizer",),
}
OTHER = "the rest"


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one step of one bucket needs, on each device if not said otherwise."""

    devices: int
    images: int  # of a step, on all devices
    bucket: tuple[int, int]  # height, width
    memory: dict[str, int]  # bytes: "arguments" (the state and the batch), "temporary", "program", "total"
    flops_per_image: float  # but for GPUs, loops inside of a piece of `accumulate` count once
    messages: list[Message]
    parts: dict[str, tuple[int, int]]  # estimated cycles: in convolutions and matrix products, in all else; {}: unknown
    not_estimated: dict[str, int]  # by part, operations that the compiler gives no cycles for
    bounds: dict[str, Bound]  # of GPUs, by part; {} for others
    assumed_loops: int  # whose rounds the data decide
    seconds_to_compile: float

    @property
    def cycles(self) -> int:
        """Estimated, of the whole step."""
        return sum(sum(pair) for pair in self.parts.values())

    @property
    def seconds(self) -> float:
        """At least, of the whole step on GPUs."""
        return sum(bound.seconds for bound in self.bounds.values())

    @property
    def matrix_share(self) -> float:
        """Part of the estimated cycles that convolutions and matrix products take, 0 .. 1."""
        return sum(matrix for matrix, _ in self.parts.values()) / max(self.cycles, 1)

    @property
    def gradient_bytes(self) -> int:
        """Of what is summed over the devices in a step."""
        return sum(m.bytes for m in self.messages if m.kind in ("all-reduce", "reduce-scatter"))


class DoesNotFitError(Exception):
    """The step needs more memory than a device has."""

    def __init__(self, needed: float, limit: float):
        super().__init__(f"needs {needed / 2**30:.2f} GiB of the device's {limit / 2**30:.2f} GiB")
        self.needed, self.limit = needed, limit  # bytes


def slice_devices(slice_: Slice) -> list[Any]:
    """Devices of a slice that is not there, as the TPU compiler describes them. Raises `UserError` without libtpu.

    Call it before anything else asks jax for devices.
    """
    from jax.experimental import topologies  # it loads the compiler, which the other commands do without

    settings = {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "TPU_ACCELERATOR_TYPE": slice_.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once disturb nobody
    }
    os.environ.update({name: os.environ.get(name, value) for name, value in settings.items()})
    jax.config.update("jax_platforms", "cpu")
    try:
        import libtpu  # noqa: F401 - jax's own complaint would not say what to install
    except ImportError:
        raise UserError(
            f'--topology={slice_} needs the TPU compiler; pip install -e ".[tpu]", or say --topology=local:8'
        ) from None
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=str(slice_)).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={slice_} is no slice that the compiler knows: {_first(error)}") from None


def plan_step(
    config: ml_collections.ConfigDict,
    classes: int,
    objects: int,
    bucket: tuple[int, int],
    mesh: Any,
    over: str = "",
    hosts: Hosts | None = None,
) -> StepPlan:
    """Compile the step of `config` for a batch of this bucket with so many classes, and objects an image at most.

    over: the axis of the mesh over which the state is split, see `sharding.layout`; hosts: what the mesh is of, if of
    GPUs.

    Raises `DoesNotFitError` where the compiler says so, `UserError` for a config that cannot be run on these devices.
    """
    detector = build_detector(config.model, classes)
    sharding.check_batch_size(mesh, config.batch_size // config.accumulate, "batch_size / accumulate")
    schedule = make_schedule(config.optim, config.batch_size, config.num_steps)

    def initial_state():
        variables = init_variables(detector, bucket, config.seed)
        optimizer = make_optimizer(config.optim, schedule, variables["params"], detector.frozen)
        return make_state(variables, optimizer, config.ema_decay)

    shapes = jax.eval_shape(initial_state)
    state = _placed(shapes, sharding.layout(mesh, shapes, over))
    batch = _abstract_batch_on(mesh, abstract_batch(config, detector, bucket, objects))
    optimizer = make_optimizer(config.optim, schedule, shapes.params, detector.frozen)
    how = config.seed, config.accumulate, config.ema_decay, mesh, over
    step = make_train_step(detector, optimizer, schedule, *how)
    start = time.perf_counter()
    compiled = _compile(step.lower(state, batch))
    program = Program(compiled.as_text())
    parts, not_estimated = cycles_by_part(list(program.runs()))
    bounds = bounds_by_part(program, hosts.gpu, part_of) if hosts else {}
    memory = _memory(compiled.memory_analysis())
    if hosts and memory["total"] > hosts.memory:  # this compiler does not refuse
        raise DoesNotFitError(memory["total"], hosts.memory)
    flops = sum(bound.flops for bound in bounds.values())
    if not flops:  # the compiler's own count takes loops once; the pieces of a batch are such a loop
        flops = (compiled.cost_analysis() or {}).get("flops", 0.0) * config.accumulate
    return StepPlan(
        devices=mesh.size,
        images=config.batch_size,
        bucket=bucket,
        memory=memory,
        flops_per_image=flops * mesh.size / config.batch_size,
        messages=program.messages(),
        parts=parts,
        not_estimated=not_estimated,
        bounds=bounds,
        assumed_loops=program.assumed_loops(),
        seconds_to_compile=time.perf_counter() - start,
    )


def abstract_batch(
    config: ml_collections.ConfigDict, detector: Detector, bucket: tuple[int, int], objects: int
) -> Batch:
    """Shapes of a training batch as the input pipeline would make it."""
    like, b = jax.ShapeDtypeStruct, config.batch_size
    regions = config.data.max_proposals[0] if detector.needs_proposals else None
    return Batch(
        image=like((b, *bucket, 3), jnp.dtype(config.data.pixels)),
        size=like((b, 2), jnp.int32),
        boxes=like((b, objects, 4), jnp.float32),
        labels=like((b, objects), jnp.int32),
        valid=like((b, objects), jnp.bool_),
        proposals=like((b, regions, 4), jnp.float32) if regions else None,
        proposals_valid=like((b, regions), jnp.bool_) if regions else None,
    )


def cycles_by_part(runs: list[Run]) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """({part: (cycles in convolutions and matrix products, in all else)}, {part: operations without an estimate})."""
    matrix, other, unknown = defaultdict(int), defaultdict(int), defaultdict(int)
    for run in runs:
        part = part_of(run.scope)
        if run.cycles is None:
            unknown[part] += run.opcode not in ("while", "call", "conditional")  # what is in them is counted itself
        else:
            (matrix if run.is_matrix else other)[part] += run.cycles
    if not matrix and not other:  # a compiler that estimates nothing
        return {}, {}
    return {part: (matrix[part], other[part]) for part in (*PARTS, OTHER)}, {k: n for k, n in unknown.items() if n}


def part_of(scope: str) -> str:
    """The part of an operation's scope, such as jit(step)/transpose(jvp(RPN.losses))/RPN.features/neck/..."""
    pieces = set(re.split(r"[/().]", scope))
    return next((part for part, names in PARTS.items() if pieces & set(names)), OTHER)


def largest_batch(fits: Any, first: int = 1) -> int:
    """The most images per device for which fits(images) holds, by doubling and bisection; 0 if not even one does.

    fits is asked about each number once at most; it must be true up to some number and false beyond it.
    """
    below, above = 0, first
    while fits(above):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def _abstract_batch_on(mesh: Any, batch: Batch) -> Batch:
    fields = {name: value for name, value in vars(batch).items() if value is not None}
    return Batch(**_placed(fields, sharding.batch_layout(mesh, fields)))


def _compile(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        numbers = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", str(error))
        if numbers is None:
            raise
        used, unit, limit, limit_unit = numbers.groups()
        powers = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
        raise DoesNotFitError(float(used) * 1024 ** powers[unit], float(limit) * 1024 ** powers[limit_unit]) from None


def _memory(stats: Any) -> dict[str, int]:
    arguments, temporary = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    program = stats.generated_code_size_in_bytes
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes  # outputs that are not written over an argument
    total = arguments + fresh + temporary + program
    return {"arguments": arguments, "temporary": temporary, "program": program, "total": total}


def _first(error: BaseException) -> str:
    return str(error).splitlines()[0][:200]
