"""The record of a benchmark: what was measured, on what, by which command; printed, and kept as JSON.

Every benchmark writes benchmarks/results/ROW.PLATFORM.json, from which `benchmarks.run` makes RESULTS.md:

    row, platform ("cpu", "gpu", "tpu"), lines, notes, tables, and `machine`: hardware, versions, commit, command, load

A line compares two figures: what, unit, ours and theirs (median, min, max, n), against (who that is), ratio, target.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fpn_jax.storage.paths import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUSY = 0.05  # of the machine; above it a record says that others were at work
PACKAGES = ("jax", "flax", "numpy", "opencv-python-headless", "hotcoco", "torch", "torchvision", "pycocotools")
HOW_TO_GET_TORCHVISION = (
    "torchvision is not installed beside this project: ours alone. `pip install torch torchvision` into the same "
    "environment compares"
)
Figure = Mapping[str, float]


def have(*packages: str) -> bool:
    """Whether all of these can be imported."""
    return all(importlib.util.find_spec(package) for package in packages)


def backend() -> str:
    """What jax runs on here: "cpu", "gpu" or "tpu". Asked in another process, so that this one takes no device."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()[-1]


def faster(what: str, unit: str, ours: Figure, theirs: Figure | None, against: str, target: float | None) -> dict:
    """A line for speed: the ratio is how many times as fast ours is, of seconds ("s", "ms") or rates alike."""
    line = {"what": what, "unit": unit, "ours": ours, "theirs": theirs, "against": against}
    if theirs is None:
        return line
    a, b = (theirs, ours) if unit in ("s", "ms") else (ours, theirs)
    return line | _ratio(a["median"] / b["median"], target, ">=")


def smaller(what: str, unit: str, ours: Figure, theirs: Figure | None, against: str, target: float | None) -> dict:
    """A line for what should be small: the ratio is ours to theirs."""
    line = {"what": what, "unit": unit, "ours": ours, "theirs": theirs, "against": against}
    return line if theirs is None else line | _ratio(ours["median"] / theirs["median"], target, "<=")


def alone(what: str, unit: str, ours: Figure, target: float | None = None) -> dict:
    """A line without a peer, whose figure itself has the target: at least."""
    line = {"what": what, "unit": unit, "ours": ours, "theirs": None, "against": ""}
    met = {} if target is None else {"target": f">= {target:g}", "met": bool(ours["median"] >= target)}
    return line | met


def _ratio(ratio: float, target: float | None, sign: str) -> dict[str, Any]:
    if target is None:
        return {"ratio": ratio}
    met = ratio >= target if sign == ">=" else ratio <= target
    return {"ratio": ratio, "target": f"{sign} {target:g}", "met": bool(met)}


class Recorder:
    """Made before a benchmark measures, finished after it: in between it watches how busy others keep the machine."""

    def __init__(self, row: str):
        self._row, self._started, self._before = row, time.perf_counter(), _busy_seconds()
        self._load = os.getloadavg()

    def finish(
        self,
        platform: str,
        lines: Sequence[Mapping[str, Any]],
        facts: Mapping[str, Any],
        folder: Path | None,
        notes: Sequence[str] = (),
        tables: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Any]:
        """Print the record, and write it if there is a folder. The sides' processes must have ended.

        facts: of the machine, such as its device; tables: more to show, {"title", "head", "rows"} of strings.
        """
        elapsed = time.perf_counter() - self._started
        machine = describe_machine() | dict(facts) | {"load_before": round(self._load[0], 2), "seconds": round(elapsed)}
        notes = list(notes)
        if self._before is not None:
            others = max(0.0, (_busy_seconds() - self._before)) / (elapsed * os.cpu_count())
            machine["busy_with_others"] = round(others, 3)
            if others > BUSY:
                notes.append(f"other processes kept {100 * others:.0f} % of the machine busy: measure again when idle")
        record = {
            "row": self._row,
            "platform": platform,
            "lines": list(lines),
            "notes": notes,
            "tables": list(tables),
            "machine": machine,
        }
        print("\n".join(text(record)), flush=True)
        if folder:
            dumped = json.dumps(record, indent=1) + "\n"
            write_atomically(folder / f"{self._row}.{platform}.json", lambda file: file.write(dumped))
        return record


def describe_machine() -> dict[str, Any]:
    """Hardware, versions, commit and command."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model n")]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES if _is_installed(name)}
    module = sys.modules["__main__"].__spec__
    command = ["python", "-m", module.name, *sys.argv[1:]] if module else [Path(sys.argv[0]).name, *sys.argv[1:]]
    return {
        "cpu": f"{os.cpu_count()} x {model}",
        "memory_gib": round(memory / 2**30, 1),
        "versions": versions,
        "commit": _commit(),
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def text(record: Mapping[str, Any]) -> list[str]:
    """The record for the terminal, line by line."""
    found = [f"{record['row']} on {record['machine'].get('device', record['machine']['cpu'])}"]
    for line in record["lines"]:
        cells = [f"  {line['what']:<44}", f"{figure(line['ours'], line['unit']):<32}"]
        if line.get("theirs"):
            cells.append(f"{line['against']}: {figure(line['theirs'], line['unit'])}   x {line['ratio']:.2f}")
        if line.get("target"):
            cells.append(f"   target {line['target']}{'' if line['met'] else ': MISSED'}")
        found.append("".join(cells))
    for table in record["tables"]:
        rows = [table["head"], *table["rows"]]
        widths = [max(len(row[i]) for row in rows) for i in range(len(table["head"]))]
        found.append(f"  {table['title']}")
        found += ["    " + "  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return found + [f"  note: {note}" for note in record["notes"]]


def figure(values: Figure, unit: str) -> str:
    """A median with its spread."""
    median, low, high = (_digits(values[key]) for key in ("median", "min", "max"))
    return f"{median} {unit} ({low} to {high})" if values["n"] > 1 else f"{median} {unit}"


def _digits(value: float) -> str:
    """Three digits that count, and no exponent."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.{2 if abs(value) >= 1 else 3}f}"


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _commit() -> str:
    """The short hash, with a plus if the files differ from it; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!*.md")
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _busy_seconds() -> float | None:
    """CPU seconds that all but this process and its ended children have used since the machine started (Linux)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().splitlines()[0].split()[1:])
    mine = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - sum(x.ru_utime + x.ru_stime for x in mine)
