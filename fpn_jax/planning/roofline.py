"""How long a compiled program takes a GPU at least, kernel by kernel: each computes or reads and writes at full speed.

The bound is that of the roofline model (Williams, Waterman and Patterson 2009). A kernel reads each operand once and
writes its result once; of what it slices, gathers, or updates in place, only those parts. Starting kernels, sorting in
several passes and waiting for the host come on top, and what the cache keeps from one kernel to the next comes off.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fpn_jax.planning.gpus import Gpu
from fpn_jax.planning.hlo import COLLECTIVES, FREE, Operation, Program, called, shape_bytes

_PASSED_ON = ("bitcast", "get-tuple-element", "convert")
_READ_IN_PART = ("dynamic-slice", "gather", "slice")
_CONTAINERS = {"while", "call", "conditional"}  # what is in them is counted itself
_BESIDE = re.compile(rf"({COLLECTIVES})(-start)?|.*-(done|update)")  # other kernels run beside them


class Kernel(NamedTuple):
    """One kernel of a program."""

    name: str
    scope: str
    times: int  # it is run
    flops: float  # of one run, in convolutions and matrix products
    bytes: int  # that one run reads and writes
    dtype: str  # of the operands of the products, "" without any
    exact: bool  # products in float32 that must not be rounded

    def seconds(self, gpu: Gpu) -> tuple[float, float]:
        """(computing, reading and writing) of all runs, if there were nothing else to do."""
        peak = gpu.exact_flops if self.exact else gpu.peak(self.dtype)
        return self.times * self.flops / peak, self.times * self.bytes / gpu.memory_bandwidth


class Bound(NamedTuple):
    """Of a part of a program, seconds at least, and what they are bound by."""

    flops: float  # in convolutions and matrix products
    computing: float  # seconds of kernels that take longer to compute than to read and write
    moving: float  # of those that do not
    kernels: int  # started

    @property
    def seconds(self) -> float:
        """Both."""
        return self.computing + self.moving


def kernels(program: Program) -> Iterator[Kernel]:
    """All kernels, in no order."""
    for operation, times, scope in program.walk():
        if operation.opcode in FREE | _CONTAINERS or _BESIDE.fullmatch(operation.opcode):
            continue
        inside = [o for name in called(operation) for o in program.bodies[name]] if operation.opcode == "fusion" else []
        products = [
            (flops, dtype, exact) for o in inside or [operation] for flops, dtype, exact in _products(o, program)
        ]
        dtype = max((dtype for _, dtype, _ in products), default="")  # "f32" before "bf16"
        exact = any(exact for *_, exact in products)
        flops = sum(flops for flops, *_ in products)
        yield Kernel(operation.name, scope, times, flops, _moved(operation, inside, program), dtype, exact)


def bounds_by_part(program: Program, gpu: Gpu, part_of: Callable[[str], str]) -> dict[str, Bound]:
    """{part: its bound}, part_of(scope) being the part."""
    bounds = defaultdict(lambda: Bound(0.0, 0.0, 0.0, 0))
    for kernel in kernels(program):
        compute, move = kernel.seconds(gpu)
        own = kernel.times * kernel.flops, compute * (compute > move), move * (compute <= move), kernel.times
        part = part_of(kernel.scope)
        bounds[part] = Bound(*(a + b for a, b in zip(bounds[part], own, strict=True)))
    return dict(bounds)


def _products(o: Operation, program: Program) -> Iterator[tuple[float, str, bool]]:
    """(FLOPs, type of the operands, whether float32 is kept) of an operation that is a product or a convolution."""
    exact = "operand_precision={highest" in o.line
    shapes = [program.shapes.get(name, "") for name in o.operands]
    if o.opcode == "dot":
        contracted = [int(d) for d in re.search(r"lhs_contracting_dims=\{([\d,]*)\}", o.line)[1].split(",") if d]
        yield 2 * _size(o.shape) * math.prod(_sides(shapes[0])[d] for d in contracted), _dtype(shapes[0]), exact
    elif o.opcode == "convolution" or "__cudnn$conv" in o.line:
        output, kernel = o.shape, shapes[1]
        if "convBackwardInput" in o.line:  # from the gradient of the output and the kernel
            output = shapes[0]
        elif "convBackwardFilter" in o.line:  # from the input and the gradient of the output
            output, kernel = shapes[1], o.shape
        of_kernel = re.search(r"dim_labels=\w+_(\w+)->", o.line)[1]
        features = _sides(kernel)[of_kernel.index("o")]
        yield 2 * _size(output) * _size(kernel) / max(features, 1), _dtype(shapes[0]), exact
    elif "__cublas$" in o.line:
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', o.line)[1]
        sides = _sides(shapes[0])
        yield (
            2 * _size(o.shape) * math.prod(sides[int(d)] for d in re.findall(r"\d+", contracted)),
            _dtype(shapes[0]),
            exact,
        )


def _moved(operation: Operation, inside: list[Operation], program: Program) -> int:
    """Bytes that one run of a kernel reads and writes."""
    if not inside:
        inside = [operation]
    by_name = {o.name: o for o in inside}
    root = inside[-1]
    moved = 0
    for result in [by_name[n] for n in root.operands if n in by_name] if root.opcode == "tuple" else [root]:
        moved += _written(_origin(result, by_name), by_name, program)
    if operation.opcode != "fusion":
        read = () if _updates(operation) else operation.operands
        whole = sum(sum(shape_bytes(program.shapes.get(name, ""))) for name in read)
        return moved + (moved if operation.opcode in _READ_IN_PART else whole)
    for parameter in (o for o in inside if o.opcode == "parameter"):
        moved += _read(parameter, inside)
    return moved


def _written(o: Operation, inside: dict[str, Operation], program: Program) -> int:
    if updates := _updates(o):
        sizes = [sum(shape_bytes(inside[n].shape if n in inside else program.shapes.get(n, ""))) for n in updates]
        return 2 * sum(sizes) if o.opcode == "scatter" else sum(sizes)  # a scatter reads what it adds to
    return sum(shape_bytes(o.shape))


def _updates(o: Operation) -> list[str]:
    """The operands that are written into another one in place."""
    if o.opcode == "dynamic-update-slice":
        return o.operands[1:2]
    if o.opcode == "scatter":  # arrays, indices, updates
        return o.operands[len(o.operands) // 2 + 1 :]
    return []


def _origin(o: Operation, inside: dict[str, Operation]) -> Operation:
    while o.opcode in _PASSED_ON[:2] and o.operands and o.operands[0] in inside:
        o = inside[o.operands[0]]
    return o


def _read(parameter: Operation, inside: list[Operation]) -> int:
    """Bytes of a fusion's operand that it reads."""
    whole = sum(shape_bytes(parameter.shape))
    total = 0
    names = [parameter.name]
    for o in inside:  # operations come after what they read
        if not set(names) & set(o.operands):
            continue
        if o.opcode in _PASSED_ON:
            names.append(o.name)
        elif o.opcode in _READ_IN_PART and o.operands[0] in names:
            total += whole * _size(o.shape) // max(_size(parameter.shape), 1)
        elif not (_updates(o) and o.operands[0] in names):
            return whole
    return min(total, whole)


def _sides(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(n) for n in found[1].split(",") if n] if found else []


def _size(shape: str) -> int:
    return math.prod(_sides(shape))


def _dtype(shape: str) -> str:
    return re.match(r"\(?(\w+)", shape)[1]
