"""All benchmarks that this machine can run, one after another, and the table of what was measured.

    python -m benchmarks.run [--quick] [train_step inference ...]
    python -m benchmarks.run --nomeasure          # only write the table anew

Every figure in benchmarks/RESULTS.md comes from the JSON files in benchmarks/results, which the benchmarks write: one
for each benchmark and platform, so that those of a GPU stand beside those of a CPU. Everything between the two markers
of the file is replaced. With --quick nothing is kept; with --output=FOLDER the JSON files and a RESULTS.md go there.
"""

import difflib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record, sides
from fpn_jax import cli
from fpn_jax.errors import UserError
from fpn_jax.storage.paths import write_atomically

_MEASURE = cli.flag("measure", bool, True, "Run benchmarks; --nomeasure only writes the table of what is there.")

ROWS = {  # benchmark -> (what it is, the platforms that there are targets or figures for)
    "train_step": ("training step", ("gpu", "cpu")),
    "inference": ("inference", ("gpu", "cpu")),
    "ops": ("operations alone", ("gpu", "cpu")),
    "input_pipeline": ("input pipeline", ("cpu",)),
    "evaluation": ("evaluation", ("cpu",)),
    "first_step": ("first step after a start", ("gpu", "cpu")),
    "parts": ("parts of a step", ("gpu", "cpu")),
}
BEGIN, END = (
    "<!-- measured: from benchmarks/results, by python -m benchmarks.run -->",
    "<!-- end of what was measured -->",
)
RESULTS = record.ROOT / "benchmarks" / "RESULTS.md"


def read(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """{(benchmark, platform): record} of all that have been written. Raises `UserError` for a file that is none."""
    records = {}
    for file in sorted(folder.glob("*.json")):
        try:
            found = json.loads(file.read_text())
            records[found["row"], found["platform"]] = found
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{file}: not a benchmark's record; delete it and measure again") from None
    return records


def markdown(records: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """The table of all lines, the tables that some benchmarks add, and how each was measured."""
    lines = [
        "| what | ours | theirs | ratio | target | |",
        "|---|---|---|---|---|---|",
    ]
    details: list[str] = []
    for row, (title, platforms) in ROWS.items():
        for platform in platforms:
            name = f"{title}, {platform.upper()}"
            found = records.get((row, platform))
            if found is None:
                why = "not run yet" if platform == "cpu" else f"no {platform.upper()} at hand"
                lines.append(f"| {name} | not measured: {why} | | | | |")
                continue
            lines += [_line(f"{name}: {line['what']}", line) for line in found["lines"]]
            details += _details(name, found)
    return "\n".join([*lines, "", "Medians, with the smallest and the largest of all repetitions.", *details])


def _line(name: str, line: Mapping[str, Any]) -> str:
    ours, theirs = (record.figure(line[side], line["unit"]) if line[side] else "" for side in ("ours", "theirs"))
    against = f"{theirs}, {line['against']}" if theirs else ""
    ratio = f"{line['ratio']:.2f}" if "ratio" in line else ""
    met = {True: "met", False: "**missed**", None: ""}[line.get("met")]
    return f"| {name} | {ours} | {against} | {ratio} | {line.get('target', '')} | {met} |"


def _details(name: str, found: Mapping[str, Any]) -> Iterable[str]:
    machine = found["machine"]
    device = machine.get("device", "CPU")
    hardware = machine["cpu"] if device == "CPU" else f"{device}, {machine['cpu']}"
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    yield ""
    yield f"### {name}"
    yield ""
    yield f"`{machine['command']}` on {hardware}, {machine['memory_gib']} GiB; commit {machine['commit']},"
    yield f"{machine['date']}, {machine['seconds']} s. {versions}."
    yield ""
    for note in found["notes"]:
        yield f"- {note}"
    for table in found["tables"]:
        yield from ["", f"{table['title']}:", ""]
        yield f"| {' | '.join(table['head'])} |"
        yield "|---" * len(table["head"]) + "|"
        yield from (f"| {' | '.join(row)} |" for row in table["rows"])


def write(file: Path, text: str) -> None:
    """Replace what is between the markers of the file; a new file has nothing else."""
    whole = file.read_text() if file.exists() else f"# Measured\n\n{BEGIN}\n{END}\n"
    if whole.count(BEGIN) != 1 or END not in whole.partition(BEGIN)[2]:
        raise UserError(f"{file}: lacks the lines {BEGIN!r} and {END!r}, in this order; put them back")
    before, _, rest = whole.partition(BEGIN)
    after = rest.partition(END)[2]
    write_atomically(file, lambda out: out.write(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"))


def measure(rows: Sequence[str]) -> list[str]:
    """Run these benchmarks in processes of their own; the names of those that failed."""
    flags = [f"--quick={sides.QUICK.value}", f"--repeats={sides.REPEATS.value}"]
    flags += [f"--output={sides.OUTPUT.value}"] if sides.OUTPUT.value else []
    failed = []
    for row in rows:
        start = time.perf_counter()
        status = subprocess.run([sys.executable, "-m", f"benchmarks.{row}", *flags], cwd=record.ROOT).returncode
        failed += [row] if status else []
        print(
            f"{row}: {'status ' + str(status) if status else 'done'}, {time.perf_counter() - start:.0f} s", flush=True
        )
    return failed


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    rows = list(argv[1:]) or list(ROWS)
    for row in rows:
        if row not in ROWS:
            near = difflib.get_close_matches(row, ROWS, 1)
            raise UserError(
                f"no benchmark {row!r}; " + (f"did you mean {near[0]}?" if near else f"take {', '.join(ROWS)}")
            )
    if not record.have("torch", "torchvision"):
        print(record.HOW_TO_GET_TORCHVISION, flush=True)
    failed = measure(rows) if _MEASURE.value else []
    if folder := sides.folder():
        file = folder / RESULTS.name if sides.OUTPUT.value else RESULTS
        write(file, markdown(read(folder)))
        print(f"wrote {file}")
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; what is above says why")


if __name__ == "__main__":
    cli.run(main, words=True)
