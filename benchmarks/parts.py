"""Where the time goes: every part of a training step and of detecting, from a trace of the device.

    python -m benchmarks.parts [--quick]

Ours alone, 800 x 1344, on a GPU 8 images in bf16, on a CPU one in float32. Each moment of the trace is given to the
operations that run in it, and an operation to the part of the model whose name scope it has, forward or backward.
Tracing itself takes time, so that only the shares are of use. What the input costs is from `benchmarks.input_pipeline`,
if that has been measured.
"""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record, sides, timing
from benchmarks.sides import OURS
from fpn_jax import cli

# The name scopes in fpn_jax/models and fpn_jax/training/step.py, in the order of the step.
PARTS = ("backbone", "neck", "rpn_head", "rpn_losses", "proposals", "roi_sampling", "roi_align", "box_head")
PARTS += ("box_losses", "detect", "optimizer")
REST, IDLE = "other operations", "no operation"
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = .*? ([\w-]+)\((.*)$")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_CONTAINERS = ("while", "call", "conditional")  # what runs inside them has events of its own


def by_part(events: Sequence[Mapping[str, Any]], hlo: str) -> dict[str, float]:
    """Seconds of "PART forward" and "PART backward", of `REST` and of `IDLE`, in a trace of one program's run.

    events: the `traceEvents` of jax.profiler's JSON; hlo: the text of the compiled program, which tells the name scope
    of every operation. All together they are the time from the first operation's beginning to the last one's end.
    """
    opcodes, parts = instructions(hlo)
    seconds: dict[str, float] = defaultdict(float)
    for begin, end, running in _moments(_intervals(events, opcodes)):
        inner = [name for name in running if opcodes[name] not in _CONTAINERS] or running
        for name in inner:
            seconds[parts.get(name, REST)] += 1e-6 * (end - begin) / len(inner)
        if not inner:
            seconds[IDLE] += 1e-6 * (end - begin)
    return dict(seconds)


def instructions(hlo: str) -> tuple[dict[str, str], dict[str, str]]:
    """({operation: its kind}, {operation: "PART forward" or "PART backward"}) of a compiled program's text.

    What the compiler made without a name scope (fusions, copies into other layouts) belongs to the part that it was
    made of, or else that it reads from (backward before forward, as gradients of weights read both), or else that reads
    it. The second lacks what belongs to no part at all.
    """
    opcodes, parts, reads, inside = {}, {}, {}, defaultdict(list)
    computation = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            name, opcodes[name], rest = match[1], match[2], match[3]
            scope = _SCOPE.search(rest)
            if scope and (part := _part(scope[1])):
                parts[name] = part
                inside[computation].append(part)
            reads[name] = re.findall(r"%([\w.-]+)", rest.partition(", metadata=")[0])
    readers = defaultdict(list)
    for name, names in reads.items():
        called = [inside[x][0] for x in names if inside.get(x)]
        if name not in parts and opcodes[name] == "fusion" and called:
            parts[name] = called[0]
        for read in names:
            readers[read].append(name)
    for neighbours in (reads, readers, reads):
        for name in opcodes:
            known = [parts[x] for x in neighbours[name] if x in parts]
            if name not in parts and known:
                parts[name] = next((part for part in known if part.endswith("backward")), known[0])
    return opcodes, parts


def _part(scope: str) -> str | None:
    segments = scope.split("/")
    found = next((segment for segment in segments if segment in PARTS), None)
    backward = any(segment.startswith("transpose(") for segment in segments)
    return found and f"{found} {'backward' if backward else 'forward'}"


def _intervals(events: Iterable[Mapping[str, Any]], named: Mapping[str, str]) -> list[tuple[float, float, str]]:
    """(begin, end, operation) in microseconds. On a CPU an operation goes on until its "end: NAME" event."""
    begins, ends = defaultdict(list), defaultdict(list)
    for event in events:
        if event.get("ph") != "X":
            continue
        name, until = event["name"], event["ts"] + event["dur"]
        if name.startswith("end: "):
            ends[name.removeprefix("end: ")].append(until)
        elif (operation := event.get("args", {}).get("hlo_op")) in named:
            begins[operation].append((event["ts"], until))
    found = []
    for name, spans in begins.items():
        later = sorted(ends[name]) if len(ends[name]) == len(spans) else [0.0] * len(spans)
        found += [(a, max(b, end), name) for (a, b), end in zip(sorted(spans), later, strict=True)]
    return found


def _moments(intervals: Sequence[tuple[float, float, str]]) -> Iterable[tuple[float, float, list[str]]]:
    """(begin, end, operations that run all through it), without gaps."""
    edges = sorted(edge for i, (a, b, _) in enumerate(intervals) for edge in ((a, True, i), (b, False, i)))
    running: dict[int, str] = {}
    for (time, opens, i), (until, *_) in itertools.pairwise(edges):
        if opens:
            running[i] = intervals[i][2]
        else:
            running.pop(i)
        if until > time:
            yield time, until, list(running.values())


def table(what: str, runs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """The table of a record: medians over runs, in milliseconds, with shares of their sum."""
    keys = {key for run in runs for key in run}
    ms = {key: 1e3 * float(np.median([run.get(key, 0.0) for run in runs])) for key in keys}
    whole = sum(ms.values())
    rows = []
    for part in (*PARTS, REST, IDLE):
        both = [ms.get(f"{part} {way}", 0.0) for way in ("forward", "backward")]
        total = sum(both) + ms.get(part, 0.0)
        if total:
            cells = [f"{x:.1f}" if x else "" for x in both]
            rows.append([part, *cells, f"{total:.1f}", f"{100 * total / whole:.1f} %"])
    head = ["part", "forward, ms", "backward, ms", "ms", "share"]
    return {"title": what, "head": head, "rows": [*rows, ["all", "", "", f"{whole:.1f}", ""]]}


def input_cost(folder: Path) -> list[str]:
    """A note of what an image's input costs, if it has been measured."""
    file = folder / "input_pipeline.cpu.json"
    if not file.exists():
        return []
    line = json.loads(file.read_text())["lines"][0]
    return [f"input: {1000 / line['ours']['median']:.2f} ms of one core for each image ({line['what']})"]


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    recorder, platform = record.Recorder("parts"), record.backend()
    height, width = (128, 160) if sides.QUICK.value else (800, 1344)
    dtype, count = ("float32", 1) if platform == "cpu" or sides.QUICK.value else ("bfloat16", 8)
    options = {"count": count, "height": height, "width": width, "dtype": dtype}
    with timing.started({OURS: sides.ours("parts", options)}) as running:
        facts, tables = running[OURS].facts, []
        for program in ("training", "inference"):
            runs = [running[OURS].outputs(program, seed) for seed in range(sides.repeats(2))]
            tables.append(table(f"{program}, {count} x {height}x{width}, {dtype}", runs))
    notes = input_cost(sides.folder() or record.RESULTS)
    recorder.finish(platform, [], {"device": facts["device"]}, sides.folder(), notes, tables)


if __name__ == "__main__":
    cli.run(main)
