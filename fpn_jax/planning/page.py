"""A plan as text for the terminal; its tables are Markdown."""

from collections import Counter
from collections.abc import Sequence

from fpn_jax.planning.chips import Slice
from fpn_jax.planning.gpus import Hosts
from fpn_jax.planning.hlo import ROUNDS
from fpn_jax.planning.scaling import Scaling
from fpn_jax.planning.step import StepPlan

_SMALL = 4096  # bytes of a message that is about latency alone


def describe(plan: StepPlan, machine: Slice | Hosts | None, rate: float) -> str:
    """What one step needs; machine: None for local devices; rate: the learning rate after warm-up."""
    on = machine.description if machine else f"{plan.devices} local devices"
    height, width = plan.bucket
    lines = [
        f"{on}: {plan.images} images of {height}x{width} a step, {plan.images / plan.devices:g} a device",
        f"learning rate   {rate:g}",
        f"memory          {_memory(plan, machine)}",
        f"FLOPs           {plan.flops_per_image / 1e9:.0f} G an image, forward and backward",
        f"sent            {_messages(plan)}",
    ]
    if plan.parts:
        clock = machine.chip.clock if machine else 0.0
        clock = f" = {1e3 * plan.cycles / clock:.0f} ms at {clock / 1e9:.2f} GHz" if clock else ""
        lines += [
            f"cycles          {plan.cycles / 1e6:.1f} M as the compiler estimates{clock}, {plan.matrix_share:.0%} "
            "of them in convolutions and matrix products",
            "",
            cycles_table(plan),
            "",
            f"The rounds of {plan.assumed_loops} loops depend on the data, here {ROUNDS} each. Sorts, gathers, "
            "scatters and kernels of our own have no estimate: they come on top.",
        ]
    if plan.bounds:
        images = plan.images / plan.devices
        used = plan.flops_per_image * images / plan.seconds / machine.gpu.matrix_flops
        lines += [
            f"time            {1e3 * plan.seconds:.1f} ms at least, {plan.images / plan.seconds:.0f} images/s at most, "
            f"{used:.0%} of the peak in bfloat16",
            "",
            bounds_table(plan),
            "",
            "Each kernel computes, or reads and writes, at full speed. Starting kernels, sorting in several passes, "
            f"what is sent, and {plan.assumed_loops} loops beyond {ROUNDS} rounds come on top.",
        ]
    return "\n".join(lines)


def cycles_table(plan: StepPlan) -> str:
    """The share of the estimated cycles by part."""
    rows = [
        (
            part,
            f"{(matrix + other) / plan.cycles:.1%}",
            f"{matrix / 1e6:.2f}",
            f"{other / 1e6:.2f}",
            str(plan.not_estimated.get(part, 0)),
        )
        for part, (matrix, other) in plan.parts.items()
    ]
    head = ("part", "of the cycles", "convolutions, products, M", "all else, M", "operations without an estimate")
    return _table(head, rows)


def bounds_table(plan: StepPlan) -> str:
    """The least time of GPUs by part."""
    order = sorted(plan.bounds.items(), key=lambda item: -item[1].seconds)
    rows = [
        (
            part,
            f"{1e3 * bound.seconds:.2f}",
            f"{1e3 * bound.computing:.2f}",
            f"{1e3 * bound.moving:.2f}",
            f"{bound.flops / 1e9:.0f}",
            str(bound.kernels),
        )
        for part, bound in order
    ]
    return _table(("part", "ms", "bound by computing", "by memory", "GFLOPs", "kernels"), rows)


def scaling_table(scalings: Sequence[Scaling]) -> str:
    """Weak scaling from one size of slice to the next."""
    rows = [
        (
            str(s.slice),
            str(s.slice.size),
            f"{s.slice.bandwidth / 1e9:.0f}",
            f"{1e3 * s.exchange:.2f}",
            f"{s.efficiency:.1%}",
            f"{s.efficiency_overlapped:.1%}",
        )
        for s in scalings
    ]
    head = ("slice", "chips", "GB/s a chip", "all-reduce, ms", "efficiency, nothing overlapped", "overlapped")
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruler = ["---"] * len(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ruler, *rows))


def _memory(plan: StepPlan, machine: Slice | Hosts | None) -> str:
    gib = {name: size / 2**30 for name, size in plan.memory.items()}
    limit = f" of {machine.memory / 2**30:.2f}" if machine else ""
    share = f" ({plan.memory['total'] / machine.memory:.0%})" if machine else ""
    parts = ", ".join(f"{name} {gib[name]:.2f}" for name in ("arguments", "temporary", "program"))
    return f"{gib['total']:.2f}{limit} GiB a device{share}: {parts}"


def _messages(plan: StepPlan) -> str:
    if not plan.messages:
        return "nothing"
    large = [m for m in plan.messages if m.bytes > _SMALL]
    small = [m for m in plan.messages if m.bytes <= _SMALL]
    count, size = Counter(), Counter()
    for message in large:
        count[message.kind] += message.times
        size[message.kind] += message.bytes
    said = [f"{size[kind] / 1e6:.1f} MB by {count[kind]} {kind}" for kind in size]
    if small:
        said.append(f"{sum(m.bytes for m in small)} bytes in {sum(m.times for m in small)} small messages")
    return ", ".join(said)
