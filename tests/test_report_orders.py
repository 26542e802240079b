"""Differences to the baseline and orders of rows while some runs, or some of the paper's figures, are missing."""

import pytest
from test_report import make_sweep, plan_row

from fpn_jax.reporting import comparison, statistics
from fpn_jax.reporting.collect import Sweep, read_sweep
from fpn_jax.reporting.page import Bullets, Picture
from fpn_jax.reporting.tables import Table


def read(folder, scores, paper=None) -> Sweep:
    """A sweep of these scores by row and seed, and the paper's AR100 by row."""
    published = {name: {"AR100": value} for name, value in (paper or {}).items()}
    rows = [plan_row(name, published=published.get(name, {})) for name in scores]
    return read_sweep(make_sweep(folder, scores, rows=rows))


def orders(sweep: Sweep) -> list[str]:
    """The lines on the orders by AR100."""
    blocks = comparison.tables(sweep, [["AR100"]])
    return [line for block in blocks if isinstance(block, Bullets) for line in block.items if line.startswith("AR100")]


def tables(sweep: Sweep, *metrics: str) -> list[Table]:
    return [block for block in comparison.tables(sweep, [[m] for m in metrics]) if isinstance(block, Table)]


def test_rows_without_a_run_have_no_place_in_either_order(tmp_path):
    scores = {"fpn": [0.5, 0.5, None], "c5": [0.4, None, None], "late": [None, None, None]}
    lines = orders(read(tmp_path, scores, {"fpn": 44.0, "c5": 36.0, "late": 40.0}))
    assert lines[:2] == ["AR100 here: fpn 50.0 > c5 40.0", "AR100 in the paper: fpn 44.0 > c5 36.0"]
    assert lines[2].endswith("is 1.00; 0 of 1 pairs are the other way round")


def test_one_row_is_no_order(tmp_path):
    assert orders(read(tmp_path, {"fpn": [0.5], "c5": [None]}, {"fpn": 44.0, "c5": 36.0})) == []


def test_equal_means_are_told_as_equal_whatever_their_rounding(tmp_path):
    """100 * 0.07 is 7.000000000000001, and the mean of 6 and 8 is 7."""
    assert orders(read(tmp_path, {"fpn": [0.07, 0.07], "c5": [0.06, 0.08]})) == ["AR100 here: fpn 7.0 = c5 7.0"]


def test_an_order_that_other_seeds_made_is_told(tmp_path):
    """Over the only seed that both have the rows are equal."""
    lines = orders(read(tmp_path, {"fpn": [0.5, 0.6], "c5": [0.5, None]}, {"fpn": 36.0, "c5": 44.0}))
    assert lines[2].endswith("c5 above fpn in the paper by 8.0 (not over the seeds in common: here 0.0, no interval)")


def test_pairs_are_the_seeds_that_both_have(tmp_path):
    (found,) = tables(read(tmp_path, {"fpn": [0.5, 0.6, None], "c5": [None, 0.5, 0.4]}), "AR100")
    assert [cell.text for cell in found.rows[0]] == ["c5", "1", "-10.0", "-"]


def test_the_papers_difference_needs_both_of_its_figures(tmp_path):
    scores = {"fpn": [0.5], "c5": [0.4]}
    for published, head in (({"fpn": 44.0, "c5": 36.0}, "paper"), ({"c5": 36.0}, "95 % interval")):
        (found,) = tables(read(tmp_path, scores, published), "AR100")
        assert found.head[-1] == head


def test_a_metric_without_meaning_has_no_table(tmp_path):
    (found,) = tables(read(tmp_path, {"fpn": [0.5], "c5": [0.4]}), "AR1000_small", "AR100")
    assert found.head[2] == "Δ AR100"


def test_differences_are_drawn_as_soon_as_one_row_has_some(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison.plots, "differences", lambda panels, looks: b"not painted")
    sweep = read(tmp_path, {"fpn": [0.5], "c5": [0.4], "late": [None]})
    assert [type(block) for block in comparison.picture(sweep, "t", {})][:1] == [Picture]


@pytest.mark.parametrize(("interval", "excludes"), [((0.0, 2.0), False), ((-2.0, 0.0), False), ((0.1, 2.0), True)])
def test_an_interval_that_ends_at_zero_does_not_exclude_it(interval, excludes):
    assert statistics.Difference(1.0, 1.0, 2, interval, ()).excludes_zero is excludes


def test_differences_come_in_the_order_of_the_seeds():
    assert statistics.paired({8: 1.0, 1: 2.0}, {8: 0.0, 1: 0.0}).each == (2.0, 1.0)


def test_a_ranking_calls_equal_only_what_is():
    assert statistics.ranking({"a": 5.01, "b": 5.04, "c": 5.01}) == "b 5.0 > a 5.0 = c 5.0"
