"""Turn the runs of an ablation sweep, finished or not, into tables and plots: terminal, Markdown and HTML.

python -m fpn_jax.report --workdir=SWEEP[,SWEEP2,...] [--baseline=ROW] [--output=FOLDER_or_FILE.md]

By default writes SWEEP/report/report.md, report.html and plots/. FILE.md gets the Markdown alone, and plots/ beside it.
"""

from collections.abc import Sequence
from pathlib import Path

from fpn_jax import cli
from fpn_jax.errors import UserError
from fpn_jax.reporting import page, sections
from fpn_jax.reporting.collect import read_sweep
from fpn_jax.storage import paths

_WORKDIR = cli.flag("workdir", str, None, "Folder of the sweep; several are separated by commas.")
_BASELINE = cli.flag("baseline", str, None, "Row that the others are compared with; by default the sweep's own.")
_OUTPUT = cli.flag("output", str, None, "Folder for the report, or the Markdown file; by default SWEEP/report.")


def report(workdirs: Sequence[str], baseline: str | None = None, output: str | None = None) -> list[Path]:
    """Write the page of one or more sweeps, print its short form, and return the paths of the pages.

    Raises `UserError` if a sweep has no plan or no finished run, or lacks the baseline; then nothing is written.
    """
    if len(workdirs) > 1 and not output:
        raise UserError("several sweeps make one page; say with --output= where it shall be")
    sweeps = [read_sweep(workdir, baseline) for workdir in workdirs]
    written = page.write(sections.page(sweeps), output or paths.path(workdirs[0]) / "report")
    for sweep in sweeps:
        print(page.to_text(sections.terminal(sweep)), end="\n\n")
    print(f"written to {' and '.join(map(str, written))}")
    return written


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    cli.check_required(workdir=_WORKDIR.value)
    workdirs = [folder for folder in _WORKDIR.value.split(",") if folder]
    report(workdirs, _BASELINE.value, _OUTPUT.value)


if __name__ == "__main__":
    cli.run(main)
