"""What a compiler made of a program, read from its text: operations with their estimated cycles, and what is sent.

The text is that of `compiled.as_text()`: scheduled HLO. The TPU compiler writes into most operations how many cycles
it expects them to take; other compilers do not.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

ROUNDS = 8  # assumed of a loop that the data end
# Bytes of an element; types of four bits are counted as one byte.
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
# What takes no time of its own, or is a transfer that runs beside the others.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_BESIDE = re.compile(r".*-(start|done|update)$")

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_SHAPE = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")


class Run(NamedTuple):
    """One operation as it is run by the step."""

    name: str
    opcode: str
    scope: str  # where in the source it is from: jit(step)/.../backbone/...
    cycles: int | None  # estimated, of all its runs together; None where the compiler gives no estimate
    times: int  # it is run, being in loops
    is_matrix: bool  # a convolution or a matrix product, with whatever was fused into it


class Message(NamedTuple):
    """One collective of a step: what each device has of its result."""

    kind: str  # "all-reduce", ...
    bytes: int  # of all its runs together
    times: int
    scope: str


class Operation(NamedTuple):
    """One line of a program: `name = shape opcode(line`."""

    name: str
    shape: str
    opcode: str
    line: str

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        return re.findall(r"%([\w.\-]+)", self.line.split(")")[0])

    @property
    def scope(self) -> str:
        """Where in the source it is from, "" if it does not say."""
        found = _SCOPE.search(self.line)
        return found[1] if found else ""


@dataclass(frozen=True)
class Program:
    """A compiled program. Raises `ValueError` if the text has no entry computation.

    Loops that a counter ends are multiplied by their number of rounds. Where the data end a loop, as in NMS, nobody
    knows the rounds beforehand: `rounds` are assumed, and `assumed_loops` tells how many loops that are.
    """

    text: str
    rounds: int = ROUNDS
    bodies: dict[str, list[Operation]] = field(init=False, repr=False)  # of its computations, by their names
    shapes: dict[str, str] = field(init=False, repr=False)  # of its operations, by their names
    _entry: str = field(init=False, repr=False)

    def __post_init__(self):
        bodies, entry, current = {}, None, None
        for line in self.text.splitlines():
            if header := _HEADER.match(line):
                current = bodies.setdefault(header[1], [])
                entry = header[1] if line.startswith("ENTRY") else entry
            elif current is not None and (found := _LINE.match(line)):
                current.append(Operation(found[2], found[3], found[4], found[5]))
        if entry is None:
            raise ValueError("this is not the text of a compiled program: it has no ENTRY")
        object.__setattr__(self, "bodies", bodies)
        object.__setattr__(self, "shapes", {o.name: o.shape for body in bodies.values() for o in body})
        object.__setattr__(self, "_entry", entry)

    def walk(self) -> Iterator[tuple[Operation, int, str]]:
        """(operation, how often it is run, scope) of what the program runs; fusions are one operation."""
        return self._walk(self._entry, 1)

    def runs(self) -> Iterator[Run]:
        """The operations that take time, in no order; those inside fusions count as the fusion."""
        for operation, times, scope in self.walk():
            if operation.opcode in FREE or _BESIDE.match(operation.opcode):
                continue
            found = _CYCLES.search(operation.line)
            yield Run(
                operation.name,
                operation.opcode,
                scope,
                int(found[1]) * times if found else None,
                times,
                self._is_matrix(operation),
            )

    def messages(self) -> list[Message]:
        """What devices say to each other, in no order."""
        found = []
        for operation, times, scope in self._walk(self._entry, 1, fusions=True):
            if match := re.fullmatch(rf"({COLLECTIVES})(-start)?", operation.opcode):
                sizes = shape_bytes(operation.shape)
                # What starts a transfer names what it reads and what it writes; an all-reduce has the latter alone.
                size = max(sizes) if match[2] and match[1] != "all-reduce" else sum(sizes)
                found.append(Message(match[1], size * times, times, scope))
        return found

    def assumed_loops(self) -> int:
        """Loops whose number of rounds is assumed to be `rounds`."""
        return sum(self._rounds(o) is None for o, *_ in self.walk() if o.opcode == "while")

    def _walk(
        self, body: str, times: int, fusions: bool = False, outside: str = ""
    ) -> Iterator[tuple[Operation, int, str]]:
        """(operation, how often it is run, scope) of a computation and of those it calls; of a branch, the first alone.

        What has no scope of its own has that of what is fused into it, or of the loop it is in.
        """
        for operation in self.bodies[body]:
            scope = operation.scope or self._scope_inside(operation) or outside
            yield operation, times, scope
            often = times
            if operation.opcode == "while":
                rounds = self._rounds(operation)
                inside, often = called(operation), times * (self.rounds if rounds is None else rounds)
            elif operation.opcode == "conditional":
                inside = _branches(operation.line)[:1]
            elif operation.opcode == "call" or (fusions and operation.opcode == "fusion"):
                inside = called(operation)
            else:
                continue
            for name in inside:
                yield from self._walk(name, often, fusions, scope)

    def _scope_inside(self, operation: Operation) -> str:
        if operation.opcode != "fusion":
            return ""
        bodies = (self.bodies[name] for name in called(operation))
        return next((o.scope for body in bodies for o in reversed(body) if o.scope), "")

    def _rounds(self, loop: Operation) -> int | None:
        """N of a loop `for i < N` as jax writes them, from 0 by 1; None if something else ends it."""
        if known := re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', loop.line):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.line)[1]
        operations = {operation.name: operation for operation in self.bodies[condition]}
        last = self.bodies[condition][-1]
        if last.opcode == "fusion" and (fused := called(last)):
            outside = last.operands
            operations |= {operation.name: operation for operation in self.bodies[fused[0]]}
            for operation in self.bodies[fused[0]]:
                if operation.opcode == "parameter":
                    operations[operation.name] = operations.get(outside[int(operation.line.split(")")[0])], operation)
            last = self.bodies[fused[0]][-1]
        if last.opcode != "compare" or "direction=LT" not in last.line:
            return None
        limit = operations.get(last.operands[1])
        if limit is None or limit.opcode != "constant" or not (number := re.match(r"(\d+)\)", limit.line)):
            return None
        return int(number[1])

    def _is_matrix(self, operation: Operation) -> bool:
        if operation.opcode in ("convolution", "dot"):
            return True
        if operation.opcode == "custom-call":
            return bool(re.search(r'custom_call_target="[^"]*(conv|matmul|gemm|dot)', operation.line, re.IGNORECASE))
        if operation.opcode != "fusion":
            return False
        return any(self._is_matrix(o) for name in called(operation) for o in self.bodies[name])


def called(operation: Operation) -> list[str]:
    """Names of the computations that are fused into an operation, or that it calls."""
    return _CALLED.findall(operation.line)


def shape_bytes(shape: str) -> list[int]:
    """Bytes of each array in the text of a shape, such as `(f32[2,3]{1,0}, s32[])`."""
    found = _SHAPE.findall(shape)
    return [_BYTES[kind] * math.prod(int(n) for n in sides.split(",") if n) for kind, sides in found]


def _branches(line: str) -> list[str]:
    names = ",".join(several or one for several, one in _BRANCHES.findall(line))
    return [name.strip().lstrip("%") for name in names.split(",")]
