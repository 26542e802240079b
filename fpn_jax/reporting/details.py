"""The sections on what is measured besides the scores: sizes of objects, types of errors, levels, learning curves."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fpn_jax.reporting import collect, plots
from fpn_jax.reporting.collect import Octave, Row, Sweep, Values, label
from fpn_jax.reporting.page import Block, Picture, Text
from fpn_jax.reporting.statistics import Summary, paired, summarize
from fpn_jax.reporting.tables import Cell, Table, mean_std

# TIDE's six types share out the same detections; FP and FN are what mending all false or all missed ones would add.
_ERROR_PANELS = {"by type": ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), "all false, all missed": ("FP", "FN")}
_ERROR_MEANINGS = (
    "Cls: right place, wrong class. Loc: right class, place too far off (IoU 0.1 to 0.5). Both: wrong class and too "
    "far off. Dupe: an object found again. Bkg: nothing there. Miss: an object not found that mending Cls and Loc "
    "would not find either. FP: all false detections. FN: all objects not found."
)

Summaries = dict[Any, Summary]


def _summaries(sweep: Sweep, values_of: Any) -> dict[str, Summaries]:
    """{row: {key: summary over seeds}} of {key: {seed: number}}, without the rows that have nothing."""
    found = {}
    for row in sweep.table_rows:
        of_row = {key: summarize(values.values()) for key, values in values_of(row).items()}
        found |= {row.name: {key: s for key, s in of_row.items() if s}} if of_row else {}
    return found


def _table(head: Sequence[str], keys: Sequence[Any], rows: Mapping[str, Summaries]) -> Table:
    cells = [(Cell(row), *(Cell(mean_std(s.get(key))) for key in keys)) for row, s in rows.items()]
    return Table(("row", *head), tuple(cells))


def octaves(sweep: Sweep, name: str, looks: plots.Styles) -> list[Block]:
    """Scores by size of the objects: the main one drawn, beside its difference to the baseline; tables."""
    objects = collect.octave_objects(sweep.table_rows)
    places = {octave: f"{octave[0]:g} to {octave[1]:g}" if octave[1] else f"from {octave[0]:g}" for octave in objects}
    tables = []
    for metric in sweep.metrics.headline:
        rows = _summaries(sweep, lambda row, m=metric: _by_octave(row, m))
        if not rows:
            continue
        counts = tuple(Cell(f"{count:,}") for count in objects.values())
        table = _table([f"{place} px" for place in places.values()], list(places), rows)
        tables.append(Table((label(metric), *table.head[1:]), ((Cell("objects"), *counts), *table.rows)))
    if not tables:
        return []
    text = (
        "Octaves of the square root of an object's area, in pixels of the original image: mean ± standard deviation "
        f"over the seeds; differences to {sweep.baseline} are paired by seed. Octaves with few objects say little."
    )
    return [*_octaves_picture(sweep, name, looks, objects, places), Text(text), *tables]


def _by_octave(row: Row, metric: str) -> dict[Octave, Values]:
    """In the order of the sizes."""
    found = collect.by_seed(row, lambda run: collect.octave_scores(run, metric))
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


def _octaves_picture(
    sweep: Sweep, name: str, looks: plots.Styles, objects: Mapping[Octave, int], places: Mapping[Octave, str]
) -> list[Block]:
    metric = sweep.metrics.main
    scores = _summaries(sweep, lambda row: _by_octave(row, metric))
    base = _by_octave(sweep.baseline_row, metric)
    changes: dict[str, Summaries] = {}
    for row in sweep.table_rows:
        of_row = {octave: paired(v, base[octave]) for octave, v in _by_octave(row, metric).items() if octave in base}
        if of_row and row.name != sweep.baseline:
            changes[row.name] = {octave: change for octave, change in of_row.items() if change}
    panels = {f"{label(metric)}, percent": scores, f"{label(metric)} minus that of {sweep.baseline}, points": changes}
    panels = {title: rows for title, rows in panels.items() if rows}
    if not panels:
        return []
    named = {octave: f"{place}\nn={objects[octave]:,}" for octave, place in places.items()}
    picture = plots.lines(panels, named, looks, "square root of the area, px")
    return [Picture(f"{name}-octaves", f"{label(metric)} by size of the objects", picture)]


def errors(sweep: Sweep, name: str, looks: plots.Styles) -> list[Block]:
    """TIDE's error types: drawn, and a table."""
    rows = _summaries(sweep, lambda row: collect.by_seed(row, lambda run: run.errors))
    if not rows:
        return []
    panels = {
        title: {row: {k: s[k] for k in kinds if k in s} for row, s in rows.items() if s.keys() & set(kinds)}
        for title, kinds in _ERROR_PANELS.items()
    }
    panels = {title: of_rows for title, of_rows in panels.items() if of_rows}
    kinds = [kind for kinds in _ERROR_PANELS.values() for kind in kinds if any(kind in s for s in rows.values())]
    text = "Points of AP50 that mending all errors of one type would add (TIDE), mean ± standard deviation over the "
    text += f"seeds. They do not add up. {_ERROR_MEANINGS}"
    picture = plots.bars(panels, looks, "AP50 lost, points")
    alt = "AP50 lost to each type of error"
    return [Picture(f"{name}-errors", alt, picture), Text(text), _table(kinds, kinds, rows)]


def levels(sweep: Sweep, name: str) -> list[Block]:
    """Shares of the levels in objects, proposals and RoIs: drawn, and a table."""
    counts = {
        title: _summaries(sweep, lambda row, k=key: collect.by_seed(row, lambda run: run.shares[k]))
        for key, title in collect.LEVEL_COUNTS.items()
    }
    counts = {title: rows for title, rows in counts.items() if rows}
    if not counts:
        return []
    levels = sorted({level for rows in counts.values() for shares in rows.values() for level in shares})
    cells = [
        (Cell(row.name), Cell(title), *(Cell(mean_std(rows[row.name].get(level))) for level in levels))
        for row, (title, rows) in itertools.product(sweep.table_rows, counts.items())
        if row.name in rows
    ]
    table = Table(("row", "share of", *(f"level {level}" for level in levels)), tuple(cells), 2)
    text = "Percent on each level (level l has a stride of 2^l pixels), mean ± standard deviation over the seeds."
    return [Picture(f"{name}-levels", "shares of the levels", plots.stacks(counts)), Text(text), table]


def curves(sweep: Sweep, name: str, looks: plots.Styles) -> list[Block]:
    """The main score over the steps, if it was taken more than once."""
    metric = sweep.metrics.main
    rows = _summaries(sweep, lambda row: collect.curve(row, metric))
    if not any(len(steps) > 1 for steps in rows.values()):
        return []
    unfinished = [row.name for row in sweep.table_rows if row.name in rows and not row.finished]
    text = f"{label(metric)} on {sweep.split} over the steps: mean over the seeds, band of one standard deviation."
    text += f" Not finished: {', '.join(unfinished)}." if unfinished else ""
    picture = plots.curves(rows, looks, f"{label(metric)}, percent")
    return [Picture(f"{name}-curves", f"{label(metric)} over the steps", picture), Text(text)]
