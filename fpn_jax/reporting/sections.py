"""What a report says, sweep by sweep: what was run, the scores, what the rows change; and the order of it all.

Like the functions of `comparison` and `details`, each returns blocks of the page, [] where there is nothing to say.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fpn_jax.reporting import comparison, details, plots
from fpn_jax.reporting.collect import Sweep, label
from fpn_jax.reporting.page import Block, Bullets, Heading, Text
from fpn_jax.reporting.statistics import Summary, summarize
from fpn_jax.reporting.tables import NOTHING, Cell, Table, decimal, mean_std


def page(sweeps: Sequence[Sweep]) -> list[Block]:
    """The whole page: a section for each sweep."""
    names = _unique([re.sub(r"[^\w.-]+", "-", sweep.name) for sweep in sweeps])
    if len(sweeps) == 1:
        return _whole(sweeps[0], names[0], 1)
    blocks: list[Block] = [Heading(1, "Ablations"), Bullets(tuple(sweep.title for sweep in sweeps))]
    return blocks + [b for sweep, name in zip(sweeps, names, strict=True) for b in _whole(sweep, name, 2)]


def terminal(sweep: Sweep) -> list[Block]:
    """The short form: what was run, the scores, the differences of the main ones."""
    headline = tuple(sweep.metrics.headline)
    return [
        Heading(2, sweep.title),
        *_what_was_run(sweep),
        Heading(3, "Scores"),
        *_scores(sweep),
        Heading(3, f"Differences to {sweep.baseline}"),
        *comparison.tables(sweep, [headline]),
    ]


def _whole(sweep: Sweep, name: str, level: int) -> list[Block]:
    looks = plots.styles([row.name for row in sweep.table_rows], sweep.baseline)
    scores = sweep.metrics
    parts = {
        "Scores": _scores(sweep),
        f"Differences to {sweep.baseline}": [
            *comparison.picture(sweep, name, looks),
            *comparison.tables(sweep, [scores.headline, scores.rest]),
        ],
        "What each row changes": _changes(sweep),
        "By size of the objects": details.octaves(sweep, name, looks),
        "Types of errors": details.errors(sweep, name, looks),
        "Levels of the pyramid": details.levels(sweep, name),
        "Learning curves": details.curves(sweep, name, looks),
    }
    blocks: list[Block] = [Heading(level, sweep.title), *_what_was_run(sweep)]
    for title, part in parts.items():
        blocks += [Heading(level + 1, title), *part] if part else []
    return blocks


def _unique(names: Sequence[str]) -> list[str]:
    """Two sweeps may have folders of one name in different places; their pictures must not overwrite each other."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name}-{i}" for i in itertools.count(2))
        found.append(next(x for x in itertools.chain([name], numbered) if x not in found))
    return found


def _what_was_run(sweep: Sweep) -> list[Block]:
    metrics = next(run.metrics for row in sweep.table_rows for run in row.finished)
    counted = {"images": metrics.get("num_images"), "objects": metrics.get("num_objects")}
    size = ", ".join(f"{count:,} {what}" for what, count in counted.items() if count is not None)
    lacking = ", ".join(f"{row.name} seed {r.seed}" for row in sweep.rows for r in row.finished if not r.analysed)
    lines = [
        *_made_by(sweep),
        f"Detector: {sweep.detector}",
        f"Scored on: data set {sweep.dataset}, split {sweep.split}" + (f" ({size})" if size else ""),
        f"Seeds: {', '.join(map(str, sweep.seeds))}",
        f"Not finished: {_unfinished(sweep) or 'nothing'}",
        f"Without analysis: {lacking} (delete metrics.json of these runs and run the sweep again)" if lacking else "",
    ]
    description = [Text(sweep.description)] if sweep.description else []
    return [*description, Bullets(tuple(line for line in lines if line))]


def _made_by(sweep: Sweep) -> list[str]:
    """The command and what it ran on; of each, where the runs were made by several."""
    runs: dict[tuple[str, str], list[str]] = {}
    for row in sweep.rows:
        for run in row.finished:
            made = dict(run.made_by) or {"command": sweep.command, **sweep.environment}
            command = made.pop("command", "")
            runs.setdefault((command, _environment(made)), []).append(f"{row.name} seed {run.seed}")
    lines = []
    for (command, environment), of in runs.items():
        what = f" ({', '.join(of)})" if len(runs) > 1 else ""
        lines += [f"Command{what}: `{command}`"] if command else []
        lines += [f"Made with{what}: {environment}"] if environment else []
    return lines


def _environment(environment: Mapping[str, Any]) -> str:
    rest = dict(environment)
    count, device = rest.pop("device_count", None), rest.pop("device", None)
    devices = [f"{count or 1} {device} device{'s' * ((count or 1) != 1)}"] if device else []
    return ", ".join([*devices, *(f"{key} {value}" for key, value in rest.items() if value)])


def _unfinished(sweep: Sweep) -> str:
    parts = []
    for row in sweep.rows:
        runs = [run for run in row.runs if run.metrics is None]
        steps = [f"seed {run.seed} ({run.progress})" for run in runs]
        parts += [f"{row.name} {', '.join(steps)}"] if steps else []
    return "; ".join(parts)


def _scores(sweep: Sweep) -> list[Block]:
    rows, metrics = sweep.table_rows, sweep.metrics.all
    summaries = {metric: {row.name: summarize(row.scores(metric).values()) for row in rows} for metric in metrics}
    best = {metric: _best(of_rows) for metric, of_rows in summaries.items()}
    unlike = len({row.num_steps for row in rows}) > 1  # else the description tells
    cells = []
    for row in rows:
        finished, of = len(row.finished), len(row.runs)
        cells.append(
            (
                Cell(f"{row.name} (baseline)" if row.name == sweep.baseline else row.name),
                Cell(str(of) if finished == of else f"{finished} of {of}"),
                *(Cell(mean_std(summaries[m][row.name]), row.name in best[m]) for m in metrics),
                Cell(NOTHING if row.parameters is None else decimal(row.parameters / 1e6, 2)),
                Cell(NOTHING if row.flops is None else decimal(row.flops / 1e9, 2)),
                Cell(NOTHING if row.anchors is None else f"{row.anchors:,}"),
                Cell(NOTHING if row.proposals is None else f"{row.proposals:,.0f}"),
                Cell(NOTHING if row.num_steps is None or not unlike else f"{row.num_steps:,}"),
            )
        )
    head = ("row", "seeds", *map(label, metrics), "parameters, M", "GFLOPs", "anchors", "proposals", "steps")
    table = Table(head, tuple(cells), 1, _baseline_index(sweep))
    columns = [i for i in range(len(head)) if i < 2 or any(row[i].text != NOTHING for row in cells)]
    text = (
        "In percent: mean ± sample standard deviation over the seeds. Marked: the highest mean of a column, however "
        "small its lead is beside the spread. GFLOPs: forward, one image."
        + (" Proposals: of an image, mean." if any(row.proposals for row in rows) else "")
    )
    return [table.select(columns), Text(text)]


def _best(summaries: Mapping[str, Summary | None]) -> set[str]:
    """The rows whose mean, as it is printed, is the highest; none where there is nothing to compare."""
    means = {row: round(summary.mean, 1) for row, summary in summaries.items() if summary}
    if len(set(means.values())) < 2:
        return set()
    return {row for row, mean in means.items() if mean == max(means.values())}


def _baseline_index(sweep: Sweep) -> frozenset[int]:
    return frozenset(i for i, row in enumerate(sweep.table_rows) if row.name == sweep.baseline)


def _changes(sweep: Sweep) -> list[Block]:
    rows = []
    for row in sweep.table_rows:
        changes = ", ".join(f"`{key}={_value(value)}`" for key, value in row.changes.items())
        rows.append((Cell(row.name), Cell(row.note), Cell(changes or "nothing")))
    table = Table(("row", "note", "changes against the base config"), tuple(rows), 3, _baseline_index(sweep))
    return [table if any(row.note for row in sweep.table_rows) else table.select([0, 2])]


def _value(value: Any) -> str:
    """As one would write it on the command line."""
    if isinstance(value, bool | None):
        return str(value)
    return value if isinstance(value, str) else json.dumps(value)
