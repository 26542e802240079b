"""A synthetic sweep in a folder; what the report says of it is compared with numbers worked out by hand."""

import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import cv2
import numpy as np
import pytest

from fpn_jax import report
from fpn_jax.errors import UserError
from fpn_jax.reporting import page, plots, statistics
from fpn_jax.reporting.collect import read_sweep
from fpn_jax.reporting.page import Heading, Picture, Text
from fpn_jax.reporting.tables import Cell, Table, table_html, table_markdown, table_text

# By row and seed. In points of AR100, no_top_down minus fpn: -6, -7, -8; c5 minus fpn: -4, 0, -2.
AR100 = {"c5": [0.48, 0.54, 0.54], "fpn": [0.52, 0.54, 0.56], "no_top_down": [0.46, 0.47, 0.48]}
PUBLISHED = {"c5": {"AR100": 36.3}, "fpn": {"AR100": 44.0}, "no_top_down": {"AR100": 37.4}}
CHANGES = {"c5": {"model.rpn.levels": [5]}, "fpn": {}, "no_top_down": {"model.neck.top_down": False}}


@pytest.fixture
def drawn():
    """For the tests that look at pictures."""


@pytest.fixture(autouse=True)
def without_painting(request, monkeypatch):
    """Figures are made in every test, but painting them takes most of the time."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(plots, "_png", lambda figure: b"not painted")


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def plan_row(name, **changes):
    row = {"name": name, "note": "", "changes": CHANGES.get(name, {}), "published": PUBLISHED.get(name, {})}
    return row | {"parameters": 1_234_567, "flops": 2.5e9, "anchors": 12345, "in_table": True} | changes


def analysis(detector, level):
    metrics = ("AR100", "AR1000") if detector == "rpn" else ("AP", "AP50", "AR100")
    octaves = [
        {"from": low, "to": high, "num_objects": 10 + low} | dict.fromkeys(metrics, value)
        for low, high, value in ((0, 8, None), (8, 16, 0.25), (16, None, 0.5))
    ]
    levels = {"rpn": {"levels": [level, level + 1], "objects": [30, 10], "proposals": [100, 300]}}
    found = {"octaves": octaves, "levels": levels}
    if detector != "rpn":
        levels["box"] = {"levels": [level], "objects": [40], "rois": [0]}
        types = dict.fromkeys(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FP", "FN"), 0.04)
        found["errors"] = {"AP50": 0.5, "count": {}, "dAP": types | {"Miss": 0.1}}
    return found


def make_sweep(folder, scores=None, detector="rpn", seeds=(0, 1, 2), rows=None, **plan):
    """A sweep whose runs score scores[row][seed]; None: not finished. The other metrics follow from the first."""
    scores = AR100 if scores is None else scores
    main, other = ("AR100", "AR1000") if detector == "rpn" else ("AP", "AP50")
    drawn = "AR1000" if detector == "rpn" else "AP"
    plan = {
        "title": "Table 1",
        "description": "What each part buys.",
        "command": "python -m fpn_jax.sweep --workdir=runs/t1",
        "baseline": "fpn",
        "detector": detector,
        "split": "val",
        "dataset": "scenes",
        "seeds": list(seeds),
        "rows": rows or [plan_row(name) for name in scores],
        "environment": {"jax": "0.10.2", "device": "cpu", "device_count": 2, "machine": "EPYC", "commit": "abc"},
    } | plan
    dump(folder / "plan.json", plan)
    for (name, values), level in zip(scores.items(), (5, 2, 3), strict=False):
        for seed, value in zip(seeds, values, strict=False):
            workdir = folder / name / f"seed{seed}"
            steps = [
                {"step": step, "time": 0.0, "loss": 1.0, f"eval/{drawn}": (value or 0.1) * step / 30}
                for step in (10, 20, 30)
            ]
            dump(workdir / "metrics.jsonl", "".join(json.dumps(step) + "\n" for step in steps) + '{"step": 40, "lo')
            if value is not None:
                metrics = {main: value, other: value + 0.1, "num_images": 100, "num_objects": 1500}
                small = "AR1000_small" if detector == "rpn" else "AP_small"
                dump(workdir / "metrics.json", metrics | {small: None})
                dump(workdir / "eval" / "val" / "analysis.json", analysis(detector, level))
    return folder


def markdown_of(folder, **options):
    return report.report([str(folder)], **options)[0].read_text()


def cells(text, start):
    """The cells of the table lines that begin with this cell, as strings."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# Statistics


def test_mean_and_sample_deviation():
    assert statistics.summarize([1.0, 2.0, 6.0]) == statistics.Summary(3.0, math.sqrt(7.0), 3)
    assert statistics.summarize([5.0]) == statistics.Summary(5.0, None, 1)
    assert statistics.summarize([]) is None


def test_differences_are_paired_by_seed():
    found = statistics.paired({0: 46.0, 1: 47.0, 2: 48.0, 7: 99.0}, {2: 56.0, 0: 52.0, 1: 54.0, 5: 1.0})
    assert found.each == (-6.0, -7.0, -8.0) and (found.mean, found.std, found.n) == (-7.0, 1.0, 3)
    assert found.interval == pytest.approx((-7 - 4.3027 / math.sqrt(3), -7 + 4.3027 / math.sqrt(3)))
    assert found.excludes_zero
    assert statistics.paired({0: 1.0}, {1: 2.0}) is None


@pytest.mark.parametrize(
    ("values", "baseline"),
    [({0: 5.0}, {0: 1.0}), ({0: 5.0, 1: 6.0}, {0: 1.0, 1: 2.0}), ({0: 0.3, 1: 0.4}, {0: 0.1, 1: 0.2})],
)
def test_one_pair_and_pairs_that_agree_have_no_interval(values, baseline):
    found = statistics.paired(values, baseline)
    assert found.interval is None and not found.excludes_zero


def test_an_interval_with_zero_in_it_claims_nothing():
    assert not statistics.paired({0: 1.0, 1: -0.5}, {0: 0.0, 1: 0.0}).excludes_zero


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (30, 2.042), (1000, 2.042)])
def test_t_quantiles(degrees, quantile):
    assert statistics.t975(degrees) == pytest.approx(quantile, abs=1e-3)


def test_t_quantiles_are_those_of_the_density():
    """Simpson's rule over the density of Student's t up to each quantile gives 0.475 on one side."""
    for degrees in range(1, 31):
        x, step = np.linspace(0, statistics.t975(degrees), 20001, retstep=True)
        scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
        density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        integral = step / 3 * (density[0] + density[-1] + 4 * density[1:-1:2].sum() + 2 * density[2:-1:2].sum())
        assert integral == pytest.approx(0.475, abs=4e-6), degrees
    with pytest.raises(ValueError, match="at least 1"):
        statistics.t975(0)


def test_agreement_of_orders():
    first = {"a": 3.0, "b": 2.0, "c": 1.0, "x": 9.0}
    assert statistics.agreement(first, {"a": 30, "b": 20, "c": 10}).tau == 1.0
    reverse = statistics.agreement(first, {"a": 1, "b": 2, "c": 3})
    assert (reverse.tau, reverse.pairs, len(reverse.discordant)) == (-1.0, 3, 3)
    one = statistics.agreement(first, {"a": 30, "b": 10, "c": 20})
    assert one.tau == pytest.approx(1 / 3) and one.discordant == (("c", "b"),)
    tied = statistics.agreement({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0})
    assert (tied.tau, tied.tied, tied.discordant) == (0.0, 1, ())
    assert statistics.agreement(first, {"a": 1.0}) is None
    assert statistics.ranking({"a": 1.0, "b": 3.0, "c": 1.0}) == "b 3.0 > a 1.0 = c 1.0"


# Tables and pages


def test_a_table_in_three_forms():
    table = Table(("row", "AP"), ((Cell("a|b_c"), Cell("10.0", True)), (Cell("<d> `e|f`"), Cell("9.5"))))
    assert table_text(table).splitlines() == [
        "row        AP",
        "--------------",
        "a|b_c    10.0*",
        "<d> e|f   9.5",
    ]
    assert table_markdown(table).splitlines() == [
        "| row | AP |",
        "| :--- | ---: |",
        r"| a\|b_c | **10.0** |",
        r"| &lt;d> `e\|f` | 9.5 |",
    ]
    text = table_html(table)
    assert "&lt;d&gt; <code>e|f</code>" in text and "<b>10.0</b>" in text
    with pytest.raises(ValueError, match="1 cells under a head of 2"):
        Table(("a", "b"), ((Cell("c"),),))


def test_what_the_user_writes_cannot_break_the_page():
    blocks = [Heading(1, "a <b> & `c<d`"), Text("# *no* _emphasis_, snake_case\n\nand <script>")]
    assert page.to_markdown(blocks) == (
        "# a &lt;b> &amp; `c<d`\n\n\\# \\*no\\* \\_emphasis\\_, snake_case and &lt;script>\n"
    )
    root = ElementTree.fromstring(page.to_html(blocks))
    assert root.find("head/title").text == "a <b> & c<d" and root.find("body/h1/code").text == "c<d"
    assert not list(root.iter("script"))
    assert "a <b> & c<d\n===========" in page.to_text(blocks)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    page.write([Heading(1, "old")], tmp_path / "out")
    (tmp_path / "out" / "plots").write_text("in the way")
    with pytest.raises(UserError, match=r"plots.*another folder"):
        page.write([Heading(1, "new"), Picture("p", "p", b"png")], tmp_path / "out")
    assert "old" in (tmp_path / "out" / "report.md").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["plots", "report.html", "report.md"]


# The report


def test_scores_and_differences_are_those_worked_out_by_hand(tmp_path):
    text = markdown_of(make_sweep(tmp_path / "t1"))
    scores = {name: cells(text, name)[0] for name in ("c5", "fpn (baseline)", "no_top_down")}
    assert scores["c5"][:4] == ["c5", "3", "52.0 ± 3.5", "62.0 ± 3.5"]
    assert scores["fpn (baseline)"][2:4] == ["**54.0 ± 2.0**", "**64.0 ± 2.0**"]
    assert scores["no_top_down"][1:] == ["3", "47.0 ± 1.0", "57.0 ± 1.0", "1.23", "2.50", "12,345"]
    # 4.3027 * 1 / sqrt(3) = 2.5; the other difference is 2 * 4.3027 / sqrt(3) = 5.0 wide to either side.
    assert cells(text, "no_top_down")[1][1:5] == ["3", "**-7.0 ± 1.0**", "-9.5 to -4.5", "-6.6"]
    assert cells(text, "c5")[1][1:5] == ["3", "-2.0 ± 2.0", "-7.0 to +3.0", "-7.7"]
    assert "- AR100 in the paper: fpn 44.0 > no_top_down 37.4 > c5 36.3" in text
    assert "- AR100 here: fpn 54.0 > c5 52.0 > no_top_down 47.0" in text
    assert "AR100: Kendall's tau of the two orders is 0.33; 1 of 3 pairs are the other way round: no_top_down" in text
    # -2, -7, -6: a deviation of sqrt(7), and 4.3027 * sqrt(7 / 3) = 6.6 to either side.
    assert "no_top_down above c5 in the paper by 1.1 (here -5.0, interval -11.6 to +1.6)" in text
    assert "2 of 4 do here" in text and "(0.2 of 4)" in text


def test_the_best_mean_is_bold_and_ties_are_all_bold(tmp_path):
    text = markdown_of(make_sweep(tmp_path, {"fpn": [0.5, 0.5], "a": [0.5, 0.5], "b": [0.4, 0.6001]}, seeds=(0, 1)))
    assert [cells(text, name)[0][2].startswith("**") for name in ("fpn (baseline)", "a", "b")] == [False] * 3
    text = markdown_of(make_sweep(tmp_path, {"fpn": [0.5, 0.5], "a": [0.5, 0.5], "b": [0.4, 0.4]}, seeds=(0, 1)))
    assert [cells(text, name)[0][2].startswith("**") for name in ("fpn (baseline)", "a", "b")] == [True, True, False]
    assert "0.0 ± 0.0" in cells(text, "a")[1]  # seeds that all say the same: nothing about others follows
    assert not re.search(r"\*\*[-+]", text)


def test_what_was_run_and_what_changes(tmp_path, capsys):
    text = markdown_of(make_sweep(tmp_path / "t1"))
    for line in (
        "# Table 1",
        "What each part buys.",
        "- Command: `python -m fpn_jax.sweep --workdir=runs/t1`",
        "- Scored on: data set scenes, split val (100 images, 1,500 objects)",
        "- Seeds: 0, 1, 2",
        "- Made with: 2 cpu devices, jax 0.10.2, machine EPYC, commit abc",
        "- Not finished: nothing",
        "| no_top_down | `model.neck.top_down=False` |",
        "| c5 | `model.rpn.levels=[5]` |",
        "| fpn | nothing |",
    ):
        assert line in text.splitlines()
    shown = capsys.readouterr().out
    assert "no_top_down" in shown and "-7.0 ± 1.0*" in shown and "plots" not in shown and "level 5" not in shown
    assert max(map(len, shown.splitlines()[:-1])) < 150


def test_octaves_levels_and_curves(tmp_path):
    text = markdown_of(make_sweep(tmp_path / "t1"))
    assert cells(text, "AR100")[0] == ["AR100", "0 to 8 px", "8 to 16 px", "from 16 px"]
    assert cells(text, "objects")[0] == ["objects", "10", "18", "26"]
    assert cells(text, "fpn")[1] == ["fpn", "-", "25.0 ± 0.0", "50.0 ± 0.0"]
    proposals = [row for row in cells(text, "fpn") if row[1] == "proposals"]
    assert proposals == [["fpn", "proposals", "25.0 ± 0.0", "75.0 ± 0.0", "-", "-", "-"]]
    names = re.findall(r"!\[[^]]+]\(plots/(\S+)\.png\)", text)
    assert names == [f"t1-{name}" for name in ("differences", "octaves", "levels", "curves")]
    assert "## Types of errors" not in text


@pytest.mark.parametrize("detector", ["fast_rcnn", "faster_rcnn"])
def test_a_detector_that_names_classes(tmp_path, detector):
    text = markdown_of(make_sweep(tmp_path / "t2", detector=detector))
    assert cells(text, "row")[0][:4] == ["row", "seeds", "AP50", "AP"]
    assert cells(text, "no_top_down")[0][2:4] == ["57.0 ± 1.0", "47.0 ± 1.0"]
    errors = next(row for row in cells(text, "row") if "Cls" in row)
    assert errors[1:] == ["Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FP", "FN"]
    assert ["fpn", *["4.0 ± 0.0"] * 5, "10.0 ± 0.0", *["4.0 ± 0.0"] * 2] in cells(text, "fpn")
    assert ["fpn", "objects, box head", "100.0 ± 0.0", *["-"] * 4] in cells(text, "fpn")
    assert not [row for row in cells(text, "fpn") if row[1] == "RoIs"]  # none counted
    assert (tmp_path / "t2" / "report" / "plots" / "t2-errors.png").is_file()


@pytest.mark.parametrize("detector", ["rpn", "faster_rcnn"])
def test_every_table_is_whole_and_every_picture_is_there(drawn, tmp_path, detector):
    folder = make_sweep(tmp_path / "a sweep", detector=detector)
    text = markdown_of(folder)
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) >= 6
    for lines in tables:
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in lines}) == 1 and len(lines) > 2
    pictures = re.findall(r"\((plots/[^)]+)\)", text)
    assert len(pictures) >= 4
    for name in pictures:
        path = folder / "report" / name
        assert path.stat().st_size < 100_000
        assert cv2.imread(str(path)).std() > 5
    assert len(list((folder / "report" / "plots").iterdir())) == len(pictures)


def test_the_html_is_well_formed_and_needs_no_other_file(tmp_path):
    folder = make_sweep(tmp_path / "t1", detector="faster_rcnn", title="a < b & c | `d`")
    report.report([str(folder)])
    text = (folder / "report" / "report.html").read_text()
    root = ElementTree.fromstring(text)
    assert root.find("body/h1").text == "a < b & c | "
    images = list(root.iter("img"))
    assert len(images) == 5 and all(image.get("src").startswith("data:image/png;base64,") for image in images)
    assert not {"script", "link", "iframe"} & {element.tag for element in root.iter()}
    assert not re.search(r"https?:|url\(|@import", text)
    for table in root.iter("table"):
        assert len({len(row) for row in table.iter("tr")}) == 1
    assert len([row for row in root.iter("tr") if row.get("class") == "marked"]) == 2


def test_an_unfinished_sweep_is_reported_as_far_as_it_is(drawn, tmp_path):
    scores = {"c5": [0.5, None, None], "fpn": [0.52, 0.54, None], "no_top_down": [None, None, None]}
    folder = make_sweep(tmp_path / "t1", scores)
    (folder / "no_top_down" / "seed1" / "metrics.jsonl").unlink()
    shutil.rmtree(folder / "no_top_down" / "seed2")
    text = markdown_of(folder)
    assert "- Not finished: c5 seed 1 (step 30), seed 2 (step 30); fpn seed 2 (step 30); no_top_down seed 0" in text
    assert "seed 1 (under way), seed 2 (not started)" in text
    assert cells(text, "fpn (baseline)")[0][1:3] == ["2 of 3", "**53.0 ± 1.4**"]
    assert cells(text, "c5")[0][1:3] == ["1 of 3", "50.0"]
    assert cells(text, "no_top_down")[0][1:4] == ["0 of 3", "-", "-"]
    assert cells(text, "c5")[1][1:5] == ["1", "-2.0", "-", "-7.7"]
    assert cells(text, "no_top_down")[1][1:5] == ["0", "-", "-", "-6.6"]
    assert "There is no interval here" in text and "do here" not in text
    assert "Not finished: no_top_down." in text  # its curve is drawn nevertheless


def test_without_the_baseline_there_are_no_differences(tmp_path):
    text = markdown_of(make_sweep(tmp_path, {"fpn": [None], "c5": [0.5]}, seeds=(0,)))
    assert "No run of the baseline fpn is finished yet." in text and "differences.png" not in text


def test_a_single_seed_has_no_spread(drawn, tmp_path):
    text = markdown_of(make_sweep(tmp_path, {"fpn": [0.5], "c5": [0.4]}, seeds=(0,)))
    assert "±" not in "".join(line for line in text.splitlines() if line.startswith("|"))
    assert cells(text, "c5")[1][1:4] == ["1", "-10.0", "-"]


def test_a_single_row(tmp_path):
    assert "no other row" in markdown_of(make_sweep(tmp_path, {"fpn": [0.5, 0.6]}, seeds=(0, 1)))


def test_no_analysis_no_curve_no_description(tmp_path):
    folder = make_sweep(tmp_path, {"fpn": [0.5, 0.6], "c5": [0.5, 0.55]}, seeds=(0, 1), description="", environment={})
    for path in [*folder.rglob("analysis.json"), *folder.rglob("metrics.jsonl")]:
        path.unlink()
    text = markdown_of(folder)
    for title in ("By size", "Levels", "Learning curves", "Made with"):
        assert title not in text


def test_rows_that_only_make_proposals_stay_out_of_the_tables(tmp_path):
    rows = [plan_row("fpn"), plan_row("c5"), plan_row("proposals", in_table=False)]
    folder = make_sweep(tmp_path, {"fpn": [0.5], "c5": [0.4], "proposals": [None]}, seeds=(0,), rows=rows)
    text = markdown_of(folder)
    assert not cells(text, "proposals") and "proposals seed 0 (step 30)" in text


def test_another_baseline(tmp_path):
    text = markdown_of(make_sweep(tmp_path), baseline="no_top_down")
    assert "## Differences to no_top_down" in text and "no_top_down (baseline)" in text
    assert cells(text, "fpn")[1][2] == "**+7.0 ± 1.0**"


def test_the_curve_is_the_mean_of_the_finished_runs(tmp_path):
    from fpn_jax.reporting.collect import curve

    folder = make_sweep(tmp_path, {"fpn": [0.3, 0.6, None], "c5": [None, None, None]})
    lines = (folder / "c5" / "seed1" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "c5" / "seed1" / "metrics.jsonl").write_text("".join(lines[:2]))
    fpn, c5 = read_sweep(folder).table_rows
    assert curve(fpn, "AR1000") == {
        step: {0: pytest.approx(step), 1: pytest.approx(2 * step)} for step in (10, 20, 30)
    }  # not seed 2, which is unfinished
    assert [sorted(values) for values in curve(c5, "AR1000").values()] == [[0, 1, 2]] * 2  # steps that all have


def test_one_markdown_file_for_several_sweeps(tmp_path):
    folders = [make_sweep(tmp_path / x / "t", title=f"Table {x}") for x in "ab"]
    output = tmp_path / "docs" / "RESULTS.md"
    written = report.report([str(folder) for folder in folders], output=str(output))
    assert written == [output]
    text = output.read_text()
    assert re.findall(r"^##? .*$", text, re.M) == ["# Ablations", "## Table a", "## Table b"]
    assert {"t-curves.png", "t-2-curves.png"} <= {path.name for path in (output.parent / "plots").iterdir()}
    assert sorted(path.name for path in output.parent.iterdir()) == ["RESULTS.md", "plots"]
    assert not any((folder / "report").exists() for folder in folders)


def test_the_same_runs_give_the_same_files(drawn, tmp_path):
    folder = make_sweep(tmp_path / "t1")
    contents = []
    for _ in range(2):
        report.report([str(folder)])
        files = sorted(path for path in (folder / "report").rglob("*") if path.is_file())
        contents.append({path: path.read_bytes() for path in files})
    assert contents[0] == contents[1]


def test_many_rows_with_odd_names(drawn, tmp_path):
    names = ["fpn", *(f"$row_{i}$ with a long name" for i in range(23))]
    text = markdown_of(make_sweep(tmp_path, {name: [0.5, 0.6] for name in names}, seeds=(0, 1)))
    assert "$row_22$ with a long name" in text


# Mistakes


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "plan.json").unlink(), r"no plan\.json; .*fpn_jax\.sweep"),
        (lambda f: dump(f / "plan.json", "{"), r"plan\.json cannot be read"),
        (lambda f: dump(f / "plan.json", {"title": "x"}), r"plan\.json is not a plan.*seeds"),
        (lambda f: dump(f / "plan.json", "[]"), r"plan\.json holds no JSON object"),
        (lambda f: [p.unlink() for p in f.rglob("metrics.json")], r"no run is finished yet"),
        (lambda f: dump(f / "fpn/seed1/metrics.json", '{"AR100": '), r"fpn/seed1/metrics\.json cannot be read"),
        (lambda f: dump(f / "fpn/seed1/eval/val/analysis.json", {"octaves": [{}]}), r"seed1/eval/val/analysis\.json"),
        (lambda f: dump(f / "c5/seed0/metrics.jsonl", '{"eval/AR100": 1}\n'), r"c5/seed0/metrics\.jsonl: line 1"),
    ],
)
def test_mistakes_name_the_file_and_leave_the_old_report(tmp_path, spoil, message):
    folder = make_sweep(tmp_path / "t1")
    (folder / "report").mkdir()
    (folder / "report" / "report.md").write_text("old")
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        report.report([str(folder)])
    assert "\n" not in str(error.value)
    assert [path.name for path in (folder / "report").iterdir()] == ["report.md"]
    assert (folder / "report" / "report.md").read_text() == "old"


def test_an_unknown_baseline_is_answered_with_the_rows(tmp_path):
    folder = make_sweep(tmp_path)
    with pytest.raises(UserError, match=r"--baseline=fnp is no row .*the rows are c5, fpn, no_top_down"):
        report.report([str(folder)], baseline="fnp")
    make_sweep(tmp_path, baseline="gone")
    with pytest.raises(UserError, match=r"plan\.json: baseline 'gone' is no row"):
        report.report([str(folder)])


def test_several_sweeps_need_an_output(tmp_path):
    folders = [str(make_sweep(tmp_path / x)) for x in "ab"]
    with pytest.raises(UserError, match="--output="):
        report.report(folders)


def test_numbers_without_meaning_are_left_out(tmp_path):
    folder = make_sweep(tmp_path, {"fpn": [0.5, float("nan")], "c5": [0.4, 0.5]}, seeds=(0, 1))
    assert "NaN" in (folder / "fpn" / "seed1" / "metrics.json").read_text()
    assert cells(markdown_of(folder), "fpn (baseline)")[0][2] == "**50.0**"
    assert Path(folder / "report" / "report.html").is_file()


def test_the_command(tmp_path):
    """Its mistakes are one line on stderr and exit status 2, and it starts without jax."""
    code = "import sys; from fpn_jax import cli, report; assert 'jax' not in sys.modules; cli.run(report.main)"
    for arguments, message in (([], "--workdir= is missing"), ([f"--workdir={tmp_path}/no"], "no has no plan.json")):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
