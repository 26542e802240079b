"""A plan as text for the terminal; its tables are Markdown."""

from collections import Counter
from collections.abc import Sequence

from fpn_jax.planning.chips import Slice
from fpn_jax.planning.hlo import ROUNDS
from fpn_jax.planning.scaling import Scaling
from fpn_jax.planning.step import StepPlan

_SMALL = 4096  # bytes of a message that is about latency alone


def describe(plan: StepPlan, slice_: Slice | None, rate: float) -> str:
    """What one step needs; rate: the learning rate after warm-up."""
    on = f"{slice_} ({slice_.size} chips, {slice_.accelerator_type})" if slice_ else f"{plan.devices} local devices"
    height, width = plan.bucket
    lines = [
        f"{on}: {plan.images} images of {height}x{width} a step, {plan.images / plan.devices:g} a device",
        f"learning rate   {rate:g}",
        f"memory          {_memory(plan, slice_)}",
        f"FLOPs           {plan.flops_per_image / 1e9:.0f} G an image, forward and backward",
        f"sent            {_messages(plan)}",
    ]
    if plan.parts:
        clock = (
            f" = {1e3 * plan.cycles / slice_.chip.clock:.0f} ms at {slice_.chip.clock / 1e9:.2f} GHz" if slice_ else ""
        )
        lines += [
            f"cycles          {plan.cycles / 1e6:.1f} M as the compiler estimates{clock}, {plan.matrix_share:.0%} "
            "of them in convolutions and matrix products",
            "",
            cycles_table(plan),
            "",
            f"The rounds of {plan.assumed_loops} loops depend on the data, here {ROUNDS} each. Sorts, gathers and "
            "scatters have no estimate: they come on top.",
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


def _memory(plan: StepPlan, slice_: Slice | None) -> str:
    gib = {name: size / 2**30 for name, size in plan.memory.items()}
    limit = f" of {slice_.chip.memory / 2**30:.2f}" if slice_ else ""
    share = f" ({plan.memory['total'] / slice_.chip.memory:.0%})" if slice_ else ""
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
