"""What is read of a sweep's folder, file by file, and the orders and numbers that are made of it."""

import json

import pytest
from test_report import dump, make_sweep, markdown_of, plan_row

from fpn_jax.errors import UserError
from fpn_jax.reporting.collect import curve, read_sweep
from fpn_jax.reporting.tables import decimal, markdown


def test_progress_is_the_last_whole_line_whatever_it_holds(tmp_path):
    """Between two evaluations, too: of lines without one only the last is parsed."""
    folder = make_sweep(tmp_path, {"fpn": [0.5], "c5": [None]}, seeds=(0,))
    lines = [{"step": 10, "loss": 1.0}, {"step": 10, "eval/AR1000": 0.0}, *({"step": s, "loss": 1.0} for s in (11, 12))]
    dump(folder / "c5" / "seed0" / "metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines) + '{"step": 13}')
    fpn, c5 = read_sweep(folder).table_rows
    assert [row.runs[0].progress for row in (fpn, c5)] == ["finished", "step 12"]
    assert curve(c5, "AR1000") == {10: {0: 0.0}}  # a score of 0 is one


def test_only_a_finished_run_has_an_analysis(tmp_path):
    """A run that goes on has that of its shorter self until it is scored again."""
    folder = make_sweep(tmp_path, {"fpn": [0.5, 0.6]}, seeds=(0, 1))
    (folder / "fpn" / "seed1" / "metrics.json").unlink()
    first, second = read_sweep(folder).baseline_row.runs
    assert first.octaves and any(first.shares.values())
    assert not second.octaves and not any(second.shares.values())


def test_a_row_of_a_plan_needs_no_more_than_a_name(tmp_path):
    published = {"AR100": 0.0, "AR1000": None}
    rows = [{"name": "fpn", "published": published}, plan_row("proposals", in_table=False)]
    sweep = read_sweep(make_sweep(tmp_path, {"fpn": [0.5], "proposals": [0.5]}, seeds=(0,), rows=rows))
    (fpn,) = sweep.table_rows
    assert (fpn.note, fpn.changes, fpn.published) == ("", {}, {"AR100": 0.0})  # None: the paper does not say


def test_rows_outside_the_tables_are_no_baseline_and_no_result(tmp_path):
    rows = [plan_row("fpn"), plan_row("proposals", in_table=False)]
    folder = make_sweep(tmp_path, {"fpn": [None], "proposals": [0.5]}, seeds=(0,), rows=rows)
    with pytest.raises(UserError, match=r"--baseline=proposals is no row .*the rows are fpn$"):
        read_sweep(folder, "proposals")
    with pytest.raises(UserError, match="no run is finished yet"):
        read_sweep(folder)


def test_proposals_are_counted_by_image(tmp_path):
    folder = make_sweep(tmp_path, {"fpn": [0.5, 0.5, 0.5]})
    for seed, count in ((0, 300), (1, 500)):  # the third says nothing
        path = folder / "fpn" / f"seed{seed}" / "metrics.json"
        dump(path, json.loads(path.read_text()) | {"num_images": 10, "num_proposals": count})
    assert read_sweep(folder).baseline_row.proposals == 40.0


@pytest.mark.parametrize("value", [None, True, "0.5", float("inf")])
def test_what_is_no_number_is_no_score(tmp_path, value):
    folder = make_sweep(tmp_path, {"fpn": [0.5, 0.25]}, seeds=(0, 1))
    dump(folder / "fpn" / "seed0" / "metrics.json", {"AR100": value})
    assert read_sweep(folder).baseline_row.scores("AR100") == {1: 25.0}


def test_a_small_negative_number_is_no_negative_zero():
    assert [decimal(x) for x in (-0.04, -0.06, 0.0)] == ["0.0", "-0.1", "0.0"]


def test_what_begins_like_a_list_a_quote_or_a_heading_is_text():
    texts = ("# a", "> a", "+ a", "- a", "-1.5", "a - b")
    assert [markdown(x) for x in texts] == [r"\# a", r"\> a", r"\+ a", r"\- a", "-1.5", "a - b"]


def test_runs_of_several_calls_are_told_apart(tmp_path):
    """A plan has the last call's commit, and its rows may be older."""
    folder = make_sweep(tmp_path, {"fpn": [0.5], "c5": [0.25]}, seeds=(0,))
    dump(folder / "fpn" / "seed0" / "made_by.json", {"command": "first", "commit": "aaa"})
    dump(folder / "c5" / "seed0" / "made_by.json", {"command": "second", "commit": "bbb", "device": "cpu"})
    text = markdown_of(folder)
    assert "- Command (fpn seed 0): `first`" in text and "- Made with (fpn seed 0): commit aaa" in text
    assert "- Command (c5 seed 0): `second`" in text and "1 cpu device, commit bbb" in text
    dump(folder / "c5" / "seed0" / "made_by.json", {"command": "first", "commit": "aaa"})
    assert "- Command: `first`\n" in markdown_of(folder)


def test_a_run_without_its_analysis_is_named(tmp_path):
    folder = make_sweep(tmp_path, {"fpn": [0.5], "c5": [0.25]}, seeds=(0,))
    assert "Without analysis" not in markdown_of(folder)
    path = folder / "c5" / "seed0" / "eval" / "val" / "analysis.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"analysis\.json cannot be read .*; delete it and .*metrics\.json, and run"):
        read_sweep(folder)
    path.unlink()
    assert "- Without analysis: c5 seed 0 (delete metrics.json of these runs" in markdown_of(folder)
