"""A sweep's folder as plain values. Only this file knows what the files of a sweep are called and how they look.

Scores are 0 .. 1 in the files and percent from here on. What a run lacks (a number without meaning, an analysis) is
left out of the {key: {seed: number}} that the functions at the end return.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpn_jax.errors import UserError
from fpn_jax.storage import paths

Values = dict[int, float]  # {seed: number}
Octave = tuple[float, float | None]  # from .. to pixels of sqrt(area); None: the open end

# (part of "levels" in analysis.json, what is counted there) -> its name on the page.
LEVEL_COUNTS = {
    ("rpn", "objects"): "objects, RPN",
    ("rpn", "proposals"): "proposals",
    ("box", "objects"): "objects, box head",
    ("box", "rois"): "RoIs",
}


@dataclass(frozen=True)
class Scores:
    """The metrics of a kind of detector, by their names in metrics.json. main: the one that is drawn where one is."""

    main: str
    headline: tuple[str, ...]
    rest: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """headline and rest."""
        return self.headline + self.rest


_PROPOSALS = Scores("AR1000", ("AR100", "AR1000"), ("AR1000_small", "AR1000_medium", "AR1000_large"))
_DETECTIONS = Scores("AP", ("AP50", "AP"), ("AP75", "AP_small", "AP_medium", "AP_large"))


_LABELS = {"AR1000": "AR1k", "_small": " s", "_medium": " m", "_large": " l"}


def label(metric: str) -> str:
    """How a metric is called on the page: AR1000_small is "AR1k s"."""
    for key, short in _LABELS.items():
        metric = metric.replace(key, short)
    return metric


@dataclass(frozen=True)
class Run:
    """One seed of a row. All but curves and progress are of a finished run, else None, False and {}."""

    seed: int
    metrics: dict[str, Any] | None
    errors: dict[str, float]  # {type: points}
    octaves: dict[Octave, dict[str, Any]]  # {octave: {"num_objects", metric: 0 .. 1}}
    shares: dict[tuple[str, str], dict[int, float]]  # {key of LEVEL_COUNTS: {level: percent of the count}}
    curves: dict[str, dict[int, float]]  # {metric: {step: percent}} of the evaluations so far
    progress: str  # "finished", "not started", "under way" or "step 300"
    analysed: bool  # whether there are errors, octaves and shares
    made_by: dict[str, Any]  # {"command", "commit", "date", "jax", ...} of the sweep that ran it last; {} if unknown


@dataclass(frozen=True)
class Row:
    """One variant of the ablation. published: the paper's figures in percent."""

    name: str
    note: str
    changes: dict[str, Any]
    parameters: int | None
    flops: float | None
    anchors: int | None
    num_steps: int | None  # of all its stages together
    published: dict[str, float]
    in_table: bool
    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that have scores."""
        return tuple(run for run in self.runs if run.metrics is not None)

    @property
    def proposals(self) -> float | None:
        """Proposals an image that an RPN's recall was taken of, mean of the finished runs; NMS may leave few."""
        found = [run.metrics for run in self.finished if run.metrics]
        counts = [m["num_proposals"] / m["num_images"] for m in found if m.get("num_proposals") and m.get("num_images")]
        return sum(counts) / len(counts) if counts else None

    def scores(self, metric: str) -> Values:
        """Percent by seed, of the finished runs where the metric has a meaning."""
        return _percent({run.seed: (run.metrics or {}).get(metric) for run in self.finished})


@dataclass(frozen=True)
class Sweep:
    """A sweep and all that its runs have left so far. baseline is the name of a row of the tables."""

    name: str  # of the folder
    title: str
    description: str
    command: str
    detector: str
    dataset: str
    split: str
    seeds: tuple[int, ...]
    environment: dict[str, Any]  # of the last call of the sweep
    baseline: str
    rows: tuple[Row, ...]

    @property
    def table_rows(self) -> tuple[Row, ...]:
        """Without the rows that only make proposals for others."""
        return tuple(row for row in self.rows if row.in_table)

    @property
    def metrics(self) -> Scores:
        """What this kind of detector is measured by."""
        scored = [run.metrics for row in self.rows for run in row.finished if run.metrics and row.in_table]
        return _PROPOSALS if any("AR1000" in metrics for metrics in scored) else _DETECTIONS

    @property
    def baseline_row(self) -> Row:
        """The row that the others are compared with."""
        return next(row for row in self.table_rows if row.name == self.baseline)


def read_sweep(folder: str | Path, baseline: str | None = None) -> Sweep:
    """Read a sweep that `fpn_jax.sweep` started, finished or not. baseline: a row's name, by default the plan's.

    Raises `UserError` if there is no plan, no finished run, no such baseline, or a file that is not what it should be.
    """
    folder = paths.path(folder)
    path = folder / "plan.json"
    if not path.is_file():
        raise UserError(f"{folder} has no plan.json; give the folder of a sweep, which python -m fpn_jax.sweep makes")
    plan = _read_object(path, "run fpn_jax.sweep again")
    try:
        sweep = _sweep(folder, plan, baseline)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not a plan of fpn_jax.sweep ({what}); run fpn_jax.sweep again") from None
    names = [row.name for row in sweep.table_rows]
    if sweep.baseline not in names:
        where = f"--baseline={baseline}" if baseline else f"{path}: baseline {sweep.baseline!r}"
        raise UserError(f"{where} is no row of the sweep in {folder}; the rows are {', '.join(names)}")
    if not any(row.finished for row in sweep.table_rows):
        raise UserError(f"{folder}: no run is finished yet (none has a metrics.json); wait for fpn_jax.sweep")
    return sweep


def _sweep(folder: Any, plan: dict[str, Any], baseline: str | None) -> Sweep:
    seeds = tuple(int(seed) for seed in plan["seeds"])
    rows = tuple(
        Row(
            name=row["name"],
            note=row.get("note") or "",
            changes=dict(row.get("changes") or {}),
            parameters=row.get("parameters"),
            flops=row.get("flops"),
            anchors=row.get("anchors"),
            num_steps=row.get("num_steps"),
            published={k: float(v) for k, v in (row.get("published") or {}).items() if v is not None},
            in_table=row.get("in_table", True),
            runs=tuple(_run(folder / row["name"] / f"seed{seed}", seed, plan["split"]) for seed in seeds),
        )
        for row in plan["rows"]
    )
    texts = {key: plan.get(key) or "" for key in ("description", "command", "dataset")}
    return Sweep(
        name=folder.resolve().name,
        title=plan.get("title") or folder.resolve().name,
        detector=plan["detector"],
        split=plan["split"],
        seeds=seeds,
        environment=dict(plan.get("environment") or {}),
        baseline=baseline or plan["baseline"],
        rows=rows,
        **texts,
    )


def _run(workdir: Any, seed: int, split: str) -> Run:
    scores, analysis = workdir / "metrics.json", workdir / "eval" / split / "analysis.json"
    finished = scores.is_file()
    curves, last_step = _read_curves(workdir / "metrics.jsonl")
    progress = f"step {last_step}" if last_step else "under way" if workdir.is_dir() else "not started"
    anew = f"delete it and {scores}, and run fpn_jax.sweep again, which scores the run anew"
    found = _read_object(analysis, anew) if finished and analysis.is_file() else {}
    made_by = workdir / "made_by.json"
    try:
        return Run(
            seed=seed,
            metrics=_read_object(scores, "delete it and run fpn_jax.sweep again") if finished else None,
            errors=_percent((found.get("errors") or {}).get("dAP") or {}),
            octaves={(octave["from"] or 0, octave["to"]): octave for octave in found.get("octaves") or []},
            shares={key: _shares((found.get("levels") or {}).get(key[0]) or {}, key[1]) for key in LEVEL_COUNTS},
            curves=curves,
            progress="finished" if finished else progress,
            analysed=bool(found),
            made_by=_read_object(made_by, "delete it") if finished and made_by.is_file() else {},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{analysis} is no analysis of a run ({what}); {anew}") from None


def _shares(counted: dict[str, Any], what: str) -> dict[int, float]:
    """{level: percent}; {} where nothing was counted."""
    if not counted.get(what):
        return {}
    counts = [_number(count) or 0.0 for count in counted[what]]
    total = sum(counts)
    return {level: 100.0 * n / total for level, n in zip(counted["levels"], counts, strict=True)} if total else {}


def _read_object(path: Any, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; {remedy}")
    return value


def _read_curves(path: Any) -> tuple[dict[str, dict[int, float]], int]:
    """({metric: {step: percent}}, last step or 0). A last line without its end is still being written: left out."""
    if not path.is_file():
        return {}, 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    lines = [line for line in lines if line.endswith("\n")]
    curves: dict[str, dict[int, float]] = {}
    last_step = 0
    # Parsing every step's line of many long runs would take longer than all the rest.
    for number, line in enumerate(lines, 1):
        if '"eval/' not in line and number < len(lines):
            continue
        try:
            values = json.loads(line)
            last_step = int(values["step"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number} is no line of metrics; delete that line") from None
        for key, value in values.items():
            if key.startswith("eval/") and (score := _number(value)) is not None:
                curves.setdefault(key.removeprefix("eval/"), {})[last_step] = 100.0 * score
    return curves, last_step


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _percent(values: Mapping[Any, Any]) -> dict[Any, float]:
    """100 times the finite numbers among the values."""
    return {key: 100.0 * x for key, value in values.items() if (x := _number(value)) is not None}


def by_seed(row: Row, values_of: Callable[[Run], Mapping[Any, float]]) -> dict[Any, Values]:
    """{key: {seed: number}} from what values_of says, {key: number}, of each finished run."""
    found: dict[Any, Values] = {}
    for run in row.finished:
        for key, value in values_of(run).items():
            found.setdefault(key, {})[run.seed] = value
    return found


def octave_scores(run: Run, metric: str) -> dict[Octave, float]:
    """Percent by octave; without the octaves where the metric has no meaning."""
    return _percent({octave: scores.get(metric) for octave, scores in run.octaves.items()})


def octave_objects(rows: Sequence[Row]) -> dict[Octave, int]:
    """How many objects each octave has in the split, from the small to the large."""
    octaves = {o: s["num_objects"] for row in rows for run in row.finished for o, s in run.octaves.items()}
    return dict(sorted(octaves.items(), key=lambda item: item[0][0]))


def curve(row: Row, metric: str) -> dict[int, Values]:
    """Percent by step, at the steps that all runs have: the finished ones, or else all that were started.

    A mean over now two and now three seeds would jump where none of them does.
    """
    runs = [run for run in row.finished or row.runs if run.curves.get(metric)]
    steps = sorted(set.intersection(*(set(run.curves[metric]) for run in runs))) if runs else []
    return {step: {run.seed: run.curves[metric][step] for run in runs} for step in steps}
