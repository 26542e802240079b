"""The section on differences to the baseline, here and in the paper, and on the orders of the rows."""

from collections.abc import Mapping, Sequence

from fpn_jax.reporting import plots
from fpn_jax.reporting.collect import Row, Sweep, label
from fpn_jax.reporting.page import Block, Bullets, Picture, Text
from fpn_jax.reporting.statistics import agreement, paired, ranking, summarize
from fpn_jax.reporting.tables import NOTHING, Cell, Table, decimal, interval_text, mean_std, signed_number


def _change(sweep: Sweep, row: Row, metric: str) -> plots.Change:
    """By what the row differs from the baseline, seed by seed here, and in the paper where it has both."""
    base = sweep.baseline_row
    paper = None
    if metric in row.published and metric in base.published:
        paper = row.published[metric] - base.published[metric]
    return plots.Change(paired(row.scores(metric), base.scores(metric)), paper)


def _others(sweep: Sweep) -> list[Row]:
    return [row for row in sweep.table_rows if row.name != sweep.baseline]


def tables(sweep: Sweep, groups: Sequence[Sequence[str]]) -> list[Block]:
    """A table for each group of metrics, what the intervals say, and the orders."""
    if not _others(sweep):
        return [Text("There is no other row to compare with.")]
    if not sweep.baseline_row.finished:
        return [Text(f"No run of the baseline {sweep.baseline} is finished yet."), *_orders(sweep)]
    changes = {m: [_change(sweep, row, m) for row in _others(sweep)] for group in groups for m in group}
    # A metric without meaning here (no small objects, say) would be a column of dashes.
    groups = [[m for m in group if any(change.here for change in changes[m])] for group in groups]
    here = [change.here for of_metric in changes.values() for change in of_metric]
    intervals = [change for change in here if change and change.interval]
    text = (
        f"Row minus {sweep.baseline}, in points, seed by seed: mean ± sample standard deviation of these differences. "
        "The interval is mean ± t·s/√n, with Student's t of n - 1 degrees of freedom: 95 of 100 intervals made so hold "
        "the mean over all seeds, if the differences are normally distributed. It knows of no other images, data sets "
        "or schedules. One pair, or pairs that agree exactly, give none. "
    )
    if intervals:
        outside = sum(change.excludes_zero for change in intervals)
        text += (
            f"Marked: the interval excludes zero; {outside} of {len(intervals)} do here. Of intervals of rows that "
            f"differ in nothing, one in twenty would ({decimal(len(intervals) / 20)} of {len(intervals)})."
        )
    else:
        text += "There is no interval here: none of these differences can be told from chance."
    return [*(_difference_table(sweep, group, changes) for group in groups if group), Text(text), *_orders(sweep)]


def _difference_table(sweep: Sweep, metrics: Sequence[str], changes: Mapping[str, Sequence[plots.Change]]) -> Table:
    head: list[str] = ["row", "pairs"]
    columns: list[list[Cell]] = []
    for metric in metrics:
        here = [change.here for change in changes[metric]]
        columns.append([Cell(mean_std(d, signed=True), bool(d and d.excludes_zero)) for d in here])
        columns.append([Cell(interval_text(d.interval if d else None)) for d in here])
        head += [f"Δ {label(metric)}", "95 % interval"]
        paper = [change.paper for change in changes[metric]]
        if any(difference is not None for difference in paper):
            columns.append([Cell(NOTHING if d is None else signed_number(d)) for d in paper])
            head.append("paper")
    base = {run.seed for run in sweep.baseline_row.finished}
    first = [(Cell(r.name), Cell(str(len(base & {run.seed for run in r.finished})))) for r in _others(sweep)]
    return Table(tuple(head), tuple((*cells, *(c[i] for c in columns)) for i, cells in enumerate(first)))


def _orders(sweep: Sweep) -> list[Block]:
    lines = [line for metric in sweep.metrics.headline for line in _order(sweep, metric)]
    return [Bullets(tuple(lines))] if lines else []


def _order(sweep: Sweep, metric: str) -> list[str]:
    """The order of the rows by a metric here and in the paper, and where the two disagree."""
    rows = {row.name: row for row in sweep.table_rows}
    summaries = {name: summarize(row.scores(metric).values()) for name, row in rows.items()}
    means = {name: round(summary.mean, 6) for name, summary in summaries.items() if summary}  # a tie is a tie
    if len(means) < 2:
        return []
    lines = [f"{label(metric)} here: {ranking(means)}"]
    published = {name: row.published[metric] for name, row in rows.items() if metric in row.published}
    agreed = agreement(means, published)
    if agreed is None:
        return lines
    lines.append(f"{label(metric)} in the paper: {ranking({n: v for n, v in published.items() if n in means})}")
    verdict = f"{label(metric)}: Kendall's tau of the two orders is {agreed.tau:.2f}; "
    verdict += f"{len(agreed.discordant)} of {agreed.pairs} pairs are the other way round"
    verdict += f", {agreed.tied} tied" if agreed.tied else ""
    pairs = []
    for upper, lower in agreed.discordant:
        difference = paired(rows[upper].scores(metric), rows[lower].scores(metric))
        interval = difference.interval if difference else None
        sure = f"interval {interval_text(interval)}" if interval else "no interval"
        here = f"here {signed_number(difference.mean)}, {sure}" if difference else "no seed in common"
        if difference and difference.mean >= 0:  # rows with other seeds besides those in common
            here = f"not over the seeds in common: {here}"
        pairs.append(f"{upper} above {lower} in the paper by {published[upper] - published[lower]:.1f} ({here})")
    return [*lines, ": ".join([verdict, "; ".join(pairs)] if pairs else [verdict])]


def picture(sweep: Sweep, name: str, looks: plots.Styles) -> list[Block]:
    """The differences drawn; [] while there are none."""
    panels = {}
    for metric in sweep.metrics.all:
        changes = {row.name: _change(sweep, row, metric) for row in _others(sweep)}
        if any(change.here is not None for change in changes.values()):
            panels[label(metric)] = changes
    if not panels:
        return []
    alt = f"differences of each row to {sweep.baseline}, in points"
    text = f"Left of zero is worse than {sweep.baseline}. An interval that ends in an arrow goes on."
    return [Picture(f"{name}-differences", alt, plots.differences(panels, looks)), Text(text)]
