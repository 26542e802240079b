"""Every row of every ablation trains a step, at a tiny size of its own kind; and what a sweep does with them."""

import importlib

import jax
import numpy as np
import pytest

from fpn_jax import sweep
from fpn_jax.models import build_detector
from fpn_jax.training.optim import make_optimizer, make_schedule
from fpn_jax.training.state import init_variables, make_state
from fpn_jax.training.step import make_train_step
from fpn_jax.variants import changed

TABLES = ("rpn", "fast_rcnn", "faster_rcnn", "pyramids", "neck", "sharing")
SIZES = ("coco", "aquarium", "scenes")
# What makes a row tiny, whatever it changes.
SMALL = {
    "model.backbone.width": 4,
    "model.backbone.norm": "gn",
    "model.rpn.samples": 16,
    "model.rpn.pre_nms_train": 16,
    "model.rpn.post_nms_train": 16,
    "model.box.samples": 8,
    "model.box.canonical_size": 32.0,
}


def ablation(table, size="scenes"):
    return importlib.import_module(f"experiments.ablations.{table}").get_config(size)


def tiny(config, row):
    base = config.base.copy_and_resolve_references()
    base.model.neck.channels = 8
    result = changed(changed(base, row["changes"], row["name"]), SMALL, "tiny")
    result.model.rpn_head.channels = min(result.model.rpn_head.channels, 8)
    if "channels" in result.model.box_head:
        result.model.box_head.channels = 16
    if "channels" in result.model.neck:
        result.model.neck.channels = min(result.model.neck.channels, 16)
    return result


CASES = [(table, row["name"]) for table in TABLES for row in ablation(table).rows]
# The rows of these are stages, or are among the rows of the other tables.
TRAINED = [(table, name) for table, name in CASES if table != "sharing" and (table == "rpn" or name != "fpn")]


# Those whose step is compiled by default; the others' is only traced, which takes a quarter of the time.
COMPILED = [("rpn", "c5"), ("faster_rcnn", "c4"), ("fast_rcnn", "finest"), ("neck", "separate_heads")]
COMPILED += [("pyramids", "image_pyramid")]
assert set(COMPILED) <= set(TRAINED)


@pytest.fixture
def given(make_batch):
    """given(table, name) -> (state, step, batch), nothing of which is computed yet but the batch."""

    def make(table, name):
        config = ablation(table)
        row = tiny(config, {row["name"]: row for row in config.rows}[name])
        detector, schedule = build_detector(row.model, 3), make_schedule(row.optim, 2, 10)

        def state():
            variables = init_variables(detector, (64, 64), 0)
            optimizer = make_optimizer(row.optim, schedule, variables["params"], detector.frozen)
            return make_state(variables, optimizer, 0.0)

        params = jax.eval_shape(state).params
        step = make_train_step(detector, make_optimizer(row.optim, schedule, params, detector.frozen), schedule, 0)
        rng = np.random.default_rng(0)
        corners = np.sort(rng.uniform(0, 60, (2, 12, 2, 2)), axis=2).reshape(2, 12, 4).astype(np.float32)
        proposals = {"proposals": corners, "proposals_valid": np.ones((2, 12), bool)}
        return state, step, make_batch(2, 1).replace(**proposals)

    return make


@pytest.mark.parametrize(("table", "name"), [case for case in TRAINED if case not in COMPILED])
def test_a_row_has_a_step_that_keeps_the_state_as_it_is(table, name, given):
    state, step, batch = given(table, name)
    before = jax.eval_shape(state)
    after, metrics = jax.eval_shape(step, before, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), before)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    ("table", "name"), [pytest.param(*case, marks=[] if case in COMPILED else pytest.mark.slow) for case in TRAINED]
)
def test_a_row_initialises_and_takes_a_step(table, name, given):
    state, step, batch = given(table, name)
    state = state()
    before = jax.tree.map(np.array, state.params)
    state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"]) and metrics["loss"] > 0
    assert np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0
    moved = jax.tree.map(lambda a, b: bool((a != np.asarray(b)).any()), before, state.params)
    parts = {path[0].key for path, differs in jax.tree_util.tree_leaves_with_path(moved) if differs}
    assert parts == {part for part, params in before.items() if params}
    assert moved["backbone"]["stem_conv"]["kernel"]  # the gradient reaches the pixels


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("table", TABLES)
def test_all_rows_of_all_sizes_can_be_built(table, size):
    rows = sweep.check_rows(ablation(table, size))
    assert len(rows) >= 4
    published = [row for row in rows.values() if row.get("published")]
    assert table in ("pyramids", "neck") or len(published) >= 2


def test_a_size_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no size 'small'; choose one of coco, aquarium, scenes"):
        ablation("rpn", "small")
