"""A page as a list of blocks; written as Markdown with pictures beside it, as one HTML file, and as plain text."""

import base64
import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from fpn_jax.reporting.tables import Table, inline_html, markdown, plain, table_html, table_markdown, table_text
from fpn_jax.storage import paths

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; background: #fff; max-width: 1020px; margin: 2em auto;
       padding: 0 1.2em; }
h1, h2, h3 { line-height: 1.25; margin: 1.6em 0 .5em; }
h2 { border-bottom: 1px solid #ddd; padding-bottom: .2em; }
.wide { overflow-x: auto; margin: .8em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .28em .75em; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
th { border-bottom: 2px solid #999; }
.word { text-align: left; white-space: normal; }
.marked { background: #eef4fb; }
p { max-width: 52em; }
code { font: .92em ui-monospace, monospace; background: #f3f3f3; padding: .05em .25em; border-radius: 3px; }
li code { overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
""".strip()


@dataclass(frozen=True)
class Heading:
    """level 1 (the page's title), 2, 3."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph of running text (see `tables`)."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of running texts."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A PNG; name becomes the file's, alt is what it says to those who do not see it."""

    name: str
    alt: str
    png: bytes


Block = Heading | Text | Bullets | Table | Picture


def to_text(blocks: Sequence[Block], width: int = 110) -> str:
    """For a terminal, without the pictures. Tables are as wide as they are."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                line = plain(text)
                parts.append(f"{line}\n{('=' if level < 3 else '-') * len(line)}")
            case Text(text):
                parts.append(textwrap.fill(plain(text), width, break_long_words=False, break_on_hyphens=False))
            case Bullets(items):
                indent = {"initial_indent": "- ", "subsequent_indent": "  ", "break_on_hyphens": False}
                parts.append("\n".join(textwrap.fill(plain(i), width, break_long_words=False, **indent) for i in items))
            case Table():
                parts.append(table_text(block))
    return "\n\n".join(parts)


def to_markdown(blocks: Sequence[Block]) -> str:
    """Markdown whose pictures are in plots/ beside it."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {markdown(text)}")
            case Text(text):
                parts.append(markdown(text))
            case Bullets(items):
                parts.append("\n".join(f"- {markdown(item)}" for item in items))
            case Table():
                parts.append(table_markdown(block))
            case Picture(name, alt):
                parts.append(f"![{markdown(alt)}](plots/{quote(name)}.png)")
    return "\n\n".join(parts) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """One file that needs no other and runs nothing."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"<h{level}>{inline_html(text)}</h{level}>")
            case Text(text):
                parts.append(f"<p>{inline_html(text)}</p>")
            case Bullets(items):
                parts.append("<ul>\n" + "\n".join(f"<li>{inline_html(item)}</li>" for item in items) + "\n</ul>")
            case Table():
                parts.append(table_html(block))
            case Picture(_, alt, png):
                data = base64.b64encode(png).decode()
                parts.append(f'<p><img alt="{html.escape(plain(alt))}" src="data:image/png;base64,{data}"/></p>')
    title = html.escape(next((plain(b.text) for b in blocks if isinstance(b, Heading)), "report"))
    head = f'<meta charset="utf-8"/>\n<meta name="viewport" content="width=device-width"/>\n<title>{title}</title>'
    body = "\n".join(parts)
    head = f"<head>\n{head}\n<style>\n{_STYLE}\n</style>\n</head>"
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<body>\n{body}\n</body>\n</html>\n'


def write(blocks: Sequence[Block], output: str | Path) -> list[Path]:
    """Write the page; returns the paths of the Markdown and, if it is there, of the HTML.

    output FILE.md: that file, and its pictures in plots/ beside it. Any other is a folder, which gets report.md,
    report.html and plots/. Everything is made before the first file is replaced, and each is replaced as a whole.
    Raises `UserError` if one cannot be written.
    """
    output = paths.path(output)
    single = output.suffix == ".md"
    path = output if single else output / "report.md"
    pictures = [block for block in blocks if isinstance(block, Picture)]
    files = {path.parent / "plots" / f"{picture.name}.png": picture.png for picture in pictures}
    pages = {path: to_markdown(blocks).encode()}
    if not single:
        pages[path.with_suffix(".html")] = to_html(blocks).encode()
    for target, data in (files | pages).items():  # the pictures first: no page ever shows one that is not there
        paths.write_atomically(target, lambda file, data=data: file.write(data), binary=True)
    return list(pages)
