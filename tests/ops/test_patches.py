"""Patches against loops over their cells, at borders and corners and on maps smaller than they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.ops import patches, tiles
from fpn_jax.ops.patches import Cells, take_patches
from tests.imitation import forms_of

GRIDS = {
    "cpu": {2: (5, 7), 3: (3, 4), 6: (1, 1)},
    # Whole tiles: where a map that is added to ends within one, jax's interpreter gets its shape wrong.
    "tpu": {2: (32, 64), 3: (16, 64), 4: (16, 32), 6: (16, 32)},
}
IMAGES, CHANNELS, COUNT = 2, 3, 40


def patches_of(grids):
    """(pyramid, cells); of large maps half of them around the corner of four tiles, in level 4 none."""
    rng = np.random.default_rng(0)
    pyramid = {x: rng.normal(size=(IMAGES, *grid, CHANNELS)).astype(np.float32) for x, grid in grids.items()}
    position = rng.choice([i for i, x in enumerate(grids) if x != 4], (IMAGES, COUNT)).astype(np.int32)
    height, width = (np.int32(list(grids.values()))[position, axis] for axis in (0, 1))
    row, column = (rng.integers(0, x, dtype=np.int32) for x in (height, width))
    moved = (height > 18) & (rng.random(row.shape) < 0.5)
    corner = rng.integers([14, 30], [18, 34], (*row.shape, 2), dtype=np.int32)
    return pyramid, Cells(position, np.where(moved, corner[..., 0], row), np.where(moved, corner[..., 1], column))


@pytest.fixture(scope="module")
def given():
    return patches_of(GRIDS["cpu"])


def slow(pyramid, cells, radius):
    k = 2 * radius + 1
    values, inside = np.zeros((IMAGES, COUNT, k, k, CHANNELS), np.float32), np.zeros((IMAGES, COUNT, k, k), bool)
    maps = list(pyramid.values())
    for i, j, dy, dx in np.ndindex(IMAGES, COUNT, k, k):
        x = maps[cells.position[i, j]][i]
        y, z = cells.row[i, j] + dy - radius, cells.column[i, j] + dx - radius
        if 0 <= y < x.shape[0] and 0 <= z < x.shape[1]:
            values[i, j, dy, dx], inside[i, j, dy, dx] = x[y, z], True
    return values, inside


@pytest.mark.parametrize("radius", [0, 1, 2])
def test_patches_are_those_of_a_loop_over_cells(given, radius):
    found, maps = jax.jit(take_patches, static_argnums=2)(*given, radius)
    jax.tree.map(np.testing.assert_array_equal, maps, given[0])
    for got, expected in zip(found, slow(*given, radius), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_gradient_adds_up_where_patches_overlap(platform):
    """The sum of weights times values is linear: its gradient is how often, and with what weight, a cell is read."""
    pyramid, cells = patches_of(GRIDS[platform])
    weights = np.random.default_rng(1).normal(size=(IMAGES, COUNT, 3, 3, CHANNELS)).astype(np.float32)

    def total(pyramid):
        return (take_patches(pyramid, cells, 1)[0].values * weights).sum()

    with forms_of(platform):
        value, gradients = jax.jit(jax.value_and_grad(total))(pyramid)
    assert value == pytest.approx((slow(pyramid, cells, 1)[0] * weights).sum(), rel=1e-4)
    for level, gradient in gradients.items():
        expected = np.zeros(gradient.shape)
        mine = cells.position == list(pyramid).index(level)
        for i, j, dy, dx in np.ndindex(IMAGES, COUNT, 3, 3):
            y, z = cells.row[i, j] + dy - 1, cells.column[i, j] + dx - 1
            if mine[i, j] and 0 <= y < expected.shape[1] and 0 <= z < expected.shape[2]:
                expected[i, y, z] += weights[i, j, dy, dx]
        np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradients_of_the_maps_that_are_passed_on_come_on_top(platform):
    """As if the maps themselves had been read: the sum of both gradients."""
    pyramid, cells = patches_of(GRIDS[platform])
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(IMAGES, COUNT, 3, 3, CHANNELS)).astype(np.float32)
    of_maps = {level: rng.normal(size=x.shape).astype(np.float32) for level, x in pyramid.items()}

    def total(pyramid, passed_on):
        found, maps = take_patches(pyramid, cells, 1)
        later = maps if passed_on else pyramid
        return (found.values * weights).sum() + sum((later[x] * of_maps[x]).sum() for x in pyramid)

    with forms_of(platform):
        both, alone = (jax.jit(jax.grad(total), static_argnums=1)(pyramid, passed_on) for passed_on in (True, False))
    for level, gradient in both.items():
        assert (np.abs(gradient - of_maps[level]).max() > 0.1) == (level != 4)
        np.testing.assert_allclose(gradient, alone[level], atol=1e-5)


@pytest.mark.parametrize("room", [190_000, 600])
def test_tiles_that_end_beyond_the_map(monkeypatch, room):
    """By jax's simple interpreter, which knows no uninitialised memory; some cells or some images at a time."""
    monkeypatch.setattr(tiles, "MOST_NUMBERS", room)
    monkeypatch.setattr(tiles.pl, "pallas_call", functools.partial(tiles.pl.pallas_call, interpret=True))
    pyramid, cells = patches_of({2: (21, 37), 3: (3, 4), 4: (5, 33), 6: (1, 1)})
    values = np.random.default_rng(1).normal(size=(IMAGES, COUNT, 3, 3, CHANNELS)).astype(np.float32)
    found, expected = (
        jax.jit(functools.partial(form, radius=1))(pyramid, values, cells)
        for form in (patches._add_by_tiles, patches._add_rows)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_no_cells(platform):
    pyramid, none = patches_of(GRIDS["tpu"])[0], Cells(*np.zeros((3, IMAGES, 0), np.int32))
    with forms_of(platform):
        grad = jax.jit(jax.grad(lambda x: take_patches(x, none, 1)[1][2].sum()))(pyramid)
    assert {level: float(x.mean()) for level, x in grad.items()} == {2: 1.0, 3: 0.0, 4: 0.0, 6: 0.0}


def test_what_lies_at_other_levels_does_not_get_in(given):
    """Neither its NaNs nor, going back, a gradient."""
    pyramid, cells = given
    one = Cells(np.zeros((IMAGES, 1), np.int32), cells.row[:, :1] * 0, cells.column[:, :1] * 0)
    poisoned = pyramid | {6: np.full_like(pyramid[6], np.nan)}
    values, pull = jax.vjp(lambda maps: take_patches(maps, one, 1)[0].values, poisoned)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(pull(jnp.ones_like(values))[0][6], 0)
