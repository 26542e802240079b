"""One table, rendered for the terminal, Markdown and HTML; and how numbers and running text are written in each.

Running text may hold `code` between backticks. Everything else in it is taken literally: names and titles are the
user's, and a | or < of theirs must not break a table or a page.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fpn_jax.reporting.statistics import Summary

NOTHING = "-"  # what a cell without a number shows


@dataclass(frozen=True)
class Cell:
    """Text of one cell. In the terminal, bold is a star."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head. The first `left` columns are words, the others numbers, aligned right.

    marked: the rows, by number, that HTML lays a colour under. Raises ValueError if a row is not as long as the head.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    left: int = 1
    marked: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"a row of {len(row)} cells under a head of {len(self.head)}: {row}")

    def select(self, columns: Sequence[int]) -> "Table":
        """The table with these columns only, by number; those left of `left` must come first."""
        return Table(
            tuple(self.head[i] for i in columns),
            tuple(tuple(row[i] for i in columns) for row in self.rows),
            sum(i < self.left for i in columns),
            self.marked,
        )


def table_text(table: Table) -> str:
    """Plain and aligned, for a terminal."""
    rows = [table.head, *([plain(c.text) + "*" * c.bold for c in row] for row in table.rows)]
    # A column with a star keeps its place on every line, or the digits would not stand below each other.
    starred = [any(row[i].bold for row in table.rows) for i in range(len(table.head))]
    rows = [[t + " " * (star and not t.endswith("*")) for t, star in zip(row, starred, strict=True)] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.head))]
    lines = []
    for row in rows:
        cells = [t.ljust(w) if i < table.left else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def table_markdown(table: Table) -> str:
    """GitHub's tables."""
    rule = [":---" if i < table.left else "---:" for i in range(len(table.head))]
    rows = [[f"**{markdown(c.text)}**" if c.bold else markdown(c.text) for c in row] for row in table.rows]
    lines = [[markdown(text) for text in table.head], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_html(table: Table) -> str:
    """A table in a box that scrolls sideways where the window is narrow."""

    def line(tag: str, texts: Sequence[str], marked: bool = False) -> str:
        cells = [f'<{tag} class="word">{t}</{tag}>' for t in texts[: table.left]]
        cells += [f"<{tag}>{t}</{tag}>" for t in texts[table.left :]]
        mark = ' class="marked"' if marked else ""
        return f"<tr{mark}>{''.join(cells)}</tr>"

    rows = [[f"<b>{inline_html(c.text)}</b>" if c.bold else inline_html(c.text) for c in row] for row in table.rows]
    body = "\n".join(line("td", row, i in table.marked) for i, row in enumerate(rows))
    head = line("th", [inline_html(text) for text in table.head])
    return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _spans(text: str) -> list[tuple[str, bool]]:
    """(piece, whether it is code) in order; one line, as neither a table's cell nor a list's item may have two."""
    pieces = re.split(r"`([^`]+)`", " ".join(text.split()))
    return [(piece, i % 2 == 1) for i, piece in enumerate(pieces) if piece]


def plain(text: str) -> str:
    """For the terminal: without the backticks."""
    return "".join(piece for piece, _ in _spans(text))


def markdown(text: str) -> str:
    """For Markdown. | is escaped in code as well, as GitHub wants it within tables."""
    return "".join(f"`{_pipes(piece)}`" if code else _escape_markdown(piece) for piece, code in _spans(text))


def _pipes(text: str) -> str:
    return text.replace("|", r"\|")


def _escape_markdown(text: str) -> str:
    text = re.sub(r"([\\*`\[\]|~])", r"\\\1", text)
    text = re.sub(r"^([#>+-])(?=[\s#])", r"\\\1", text)  # at the start of a line: heading, quote, list
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # within a word it is no emphasis
    return text.replace("&", "&amp;").replace("<", "&lt;")


def inline_html(text: str) -> str:
    """For HTML."""
    return "".join(
        f"<code>{html.escape(piece)}</code>" if code else html.escape(piece, quote=False)
        for piece, code in _spans(text)
    )


def mean_std(summary: Summary | None, signed: bool = False) -> str:
    """ "44.0 ± 0.3", or with a sign; without ± for one seed, a dash for none."""
    if summary is None:
        return NOTHING
    mean = signed_number(summary.mean) if signed else decimal(summary.mean)
    return mean if summary.std is None else f"{mean} ± {summary.std:.1f}"


def decimal(value: float, digits: int = 1) -> str:
    """With that many digits behind the point; never -0.0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def signed_number(value: float) -> str:
    """One digit behind the point, with + or -, except for 0.0."""
    rounded = round(value, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


def interval_text(interval: tuple[float, float] | None) -> str:
    """ "+1.2 to +3.4", or a dash."""
    return NOTHING if interval is None else f"{signed_number(interval[0])} to {signed_number(interval[1])}"
