"""RoIAlign by tiles of the maps against RoIAlign of cells, which is tested against loops and torchvision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.ops import tiles
from fpn_jax.ops.platforms import compiling_for
from fpn_jax.ops.roi_align import multilevel_roi_align, roi_levels
from tests.imitation import forms_of

LEVELS = (2, 3, 4, 5)


def pyramid_of(b=2, h=144, w=272, c=3):
    """P2 of 5 x 5 tiles of the tests' size, the last of each axis with a part beyond the map."""
    rng = np.random.default_rng(0)
    return {level: rng.normal(size=(b, h >> level, w >> level, c)).astype(np.float32) for level in LEVELS}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """With which RoIs touch many, and the most that they can is fewer than all."""
    monkeypatch.setattr(tiles, "TILE", (8, 16))


def rois_of_all_levels(b=2, r=60):
    """Also wide and narrow ones, and beyond the image; the first ones empty, infinite and no numbers."""
    rng = np.random.default_rng(1)
    sides, centres = np.exp(rng.uniform(0, 5.5, (b, r, 2))), rng.uniform(-5, [277, 149], (b, r, 2))
    rois = np.concatenate([centres - sides / 2, centres + sides / 2], -1).astype(np.float32)
    # Of the whole width and height; with a point just one cell beyond the map; with the corners exchanged.
    rois[:, 3:7] = [[0, 70, 272, 72], [100, 0, 101.5, 144], [100, 144, 110, 152], [250, 140, 20, 10]]
    rois[1] = np.where((rois[1, :, 2:] - rois[1, :, :2]).prod(-1, keepdims=True) < 900, rois[1], [[9, 4, 20, 12]])
    rois[:, :3] = np.float32([[0, 0, 0, 0], [-np.inf, 0, np.inf, 9], [np.nan] * 4])
    return rois


def both_ways(pyramid, rois, gradient, platform, forms=forms_of, **settings):
    """(features, gradient of the pyramid), as `platform` computes them."""

    @jax.jit
    def run(pyramid, rois, gradient):
        out, pull = jax.vjp(lambda x: multilevel_roi_align(x, rois, **{"canonical": 30.0} | settings), pyramid)
        return out, pull(gradient)[0]

    with forms(platform):
        return run(pyramid, rois, gradient)


@pytest.mark.parametrize(("sampling_ratio", "aligned", "size"), [(2, False, 5), (1, True, 2), (3, True, 2)])
def test_same_as_of_cells(sampling_ratio, aligned, size):
    pyramid, rois = pyramid_of(), rois_of_all_levels()
    assert set(np.ravel(roi_levels(rois, LEVELS, canonical=30.0)[0])) == set(LEVELS)
    gradient = np.random.default_rng(2).normal(size=(*rois.shape[:2], size, size, 3)).astype(np.float32)
    settings = {"sampling_ratio": sampling_ratio, "aligned": aligned, "size": size}
    found, expected = (both_ways(pyramid, rois, gradient, platform, **settings) for platform in ("tpu", "cpu"))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), found, expected)


def test_the_largest_rois_of_a_level():
    """They touch more tiles than narrow ones of the same area can."""
    rois = np.float32([[[3, 3, 114, 114], [30, 30, 141, 141], [60, 62, 254, 125], [1, 1, 200, 120]]] * 2)
    assert roi_levels(rois[0], LEVELS).tolist() == [2, 2, 2, 3]
    gradient = np.random.default_rng(2).normal(size=(2, 4, 3, 3, 3)).astype(np.float32)
    both = (both_ways(pyramid_of(), rois, gradient, x, size=3, canonical=224.0) for x in ("tpu", "cpu"))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), *both)


@pytest.mark.parametrize("room", [400, 1500])
def test_what_a_call_has_no_room_for_goes_into_several(monkeypatch, room):
    """With room for 400 numbers some RoIs of an image, for 1500 two images of three.

    By jax's simple interpreter: that of TPUs gets the shape of a map wrong that is added to and ends within a tile.
    """
    monkeypatch.setattr(tiles, "MOST_NUMBERS", room)
    monkeypatch.setattr(tiles.pl, "pallas_call", partial(tiles.pl.pallas_call, interpret=True))
    pyramid, rois = pyramid_of(b=3), np.concatenate([rois_of_all_levels(), rois_of_all_levels()[:1]])[:, :36]
    gradient = np.random.default_rng(2).normal(size=(*rois.shape[:2], 2, 2, 3)).astype(np.float32)
    found, expected = (both_ways(pyramid, rois, gradient, x, compiling_for, size=2) for x in ("tpu", "cpu"))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), found, expected)


def test_bfloat16_is_as_exact_as_its_rounding():
    to = partial(jax.tree.map, lambda x, dtype: jnp.asarray(x, dtype))
    pyramid, rois = to(pyramid_of(), dict.fromkeys(LEVELS, jnp.bfloat16)), rois_of_all_levels()
    gradient = jnp.asarray(np.random.default_rng(2).normal(size=(*rois.shape[:2], 4, 4, 3)), jnp.bfloat16)
    out, back = both_ways(pyramid, rois, gradient, "tpu", size=4)
    assert {x.dtype for x in jax.tree.leaves((out, back))} == {jnp.dtype("bfloat16")}
    exact = to((pyramid, gradient), jax.tree.map(lambda _: jnp.float32, (pyramid, gradient)))
    expected, expected_back = both_ways(exact[0], rois, exact[1], "cpu", size=4)
    # Half a unit in the last place, as from sums in float32: weights in bfloat16 would miss that.
    close = partial(np.testing.assert_allclose, rtol=1.02 * 2**-8, atol=1e-4)
    jax.tree.map(lambda a, b: close(a.astype(np.float32), b), (out, back), (expected, expected_back))


def test_without_rois():
    pyramid = pyramid_of()
    none = np.zeros((2, 0, 4), np.float32)
    out, back = both_ways(pyramid, none, np.zeros((2, 0, 7, 7, 3), np.float32), "tpu")
    assert out.shape == (2, 0, 7, 7, 3)
    assert all((x == 0).all() for x in jax.tree.leaves(back))


def test_a_program_for_cpus_has_room_for_any_number_of_rois():
    """All forms are traced where nobody says for which platform, that of TPUs, too."""
    rois = jax.ShapeDtypeStruct((2, 20000, 4), jnp.float32)
    assert jax.eval_shape(jax.jit(multilevel_roi_align), pyramid_of(), rois).shape == (2, 20000, 7, 7, 3)


def test_only_tpus_take_tiles():
    traced = jax.jit(multilevel_roi_align).trace(pyramid_of(), rois_of_all_levels())
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")}
    assert {platform for platform, text in texts.items() if "tpu_custom_call" in text} == {"tpu"}
    adaptive = jax.jit(partial(multilevel_roi_align, sampling_ratio=0)).trace(pyramid_of(), rois_of_all_levels())
    assert "tpu_custom_call" not in adaptive.lower(lowering_platforms=("tpu",)).as_text()
