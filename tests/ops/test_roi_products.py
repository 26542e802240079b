"""RoIAlign as products of matrices against RoIAlign of cells, which is tested against loops and torchvision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.ops.platforms import compiling_for
from fpn_jax.ops.roi_align import multilevel_roi_align, roi_levels
from fpn_jax.ops.roi_products import PIECE, _pieces

LEVELS = (2, 3, 4, 5)


def pyramid_of(b=2, h=64, w=80, c=3):
    rng = np.random.default_rng(0)
    return {level: rng.normal(size=(b, h >> level, w >> level, c)).astype(np.float32) for level in LEVELS}


def rois_of_all_levels(b=2, r=90):
    """More than a piece of one level, of another none of one image; the first ones empty, infinite and no numbers."""
    rng = np.random.default_rng(1)
    sides, centres = np.exp(rng.uniform(0, 5, (b, r, 2))), rng.uniform(-5, 75, (b, r, 2))
    rois = np.concatenate([centres - sides / 2, centres + sides / 2], -1).astype(np.float32)
    rois[1] = np.where((rois[1, :, 2:] - rois[1, :, :2]).prod(-1, keepdims=True) < 900, rois[1], [[9, 4, 20, 12]])
    rois[:, -1] = [9, 4, 20, 12]  # what places without a RoI would be filled with
    rois[:, :3] = np.float32([[0, 0, 0, 0], [-np.inf, 0, np.inf, 9], [np.nan] * 4])
    return rois


def by_products(pyramid, rois, size=7, sampling_ratio=2, aligned=False, canonical=30.0):
    """As a TPU gets it, with the levels and scales that `multilevel_roi_align` chooses."""
    with compiling_for("tpu"):
        return multilevel_roi_align(pyramid, rois, size, sampling_ratio, aligned, canonical=canonical)


@partial(jax.jit, static_argnames="how")
def both_ways(pyramid, rois, gradient, how):
    out, pull = jax.vjp(lambda pyramid: how(pyramid, rois), pyramid)
    return out, pull(gradient)[0]


@pytest.mark.parametrize(("sampling_ratio", "aligned", "size"), [(2, False, 4), (1, True, 2), (3, True, 2)])
def test_same_as_of_cells(sampling_ratio, aligned, size):
    pyramid, rois = pyramid_of(), rois_of_all_levels()
    assert set(np.ravel(roi_levels(rois, LEVELS, canonical=30.0)[0])) == set(LEVELS)
    gradient = np.random.default_rng(2).normal(size=(*rois.shape[:2], size, size, 3)).astype(np.float32)
    settings = {"canonical": 30.0, "sampling_ratio": sampling_ratio, "aligned": aligned, "size": size}
    found, expected = (
        both_ways(pyramid, rois, gradient, partial(how, **settings)) for how in (by_products, multilevel_roi_align)
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), found, expected)


def test_bfloat16_is_as_exact_as_its_rounding():
    to = partial(jax.tree.map, lambda x, dtype: jnp.asarray(x, dtype))
    pyramid, rois = to(pyramid_of(), dict.fromkeys(LEVELS, jnp.bfloat16)), rois_of_all_levels()
    gradient = jnp.asarray(np.random.default_rng(2).normal(size=(*rois.shape[:2], 4, 4, 3)), jnp.bfloat16)
    out, back = both_ways(pyramid, rois, gradient, partial(by_products, size=4))
    assert {x.dtype for x in jax.tree.leaves((out, back))} == {jnp.dtype("bfloat16")}
    exact = to((pyramid, gradient), jax.tree.map(lambda _: jnp.float32, (pyramid, gradient)))
    expected, expected_back = both_ways(exact[0], rois, exact[1], partial(multilevel_roi_align, canonical=30.0, size=4))
    # Half a unit in the last place, as from sums in float32: weights in bfloat16 would miss that.
    close = partial(np.testing.assert_allclose, rtol=1.02 * 2**-8, atol=1e-4)
    jax.tree.map(lambda a, b: close(a.astype(np.float32), b), (out, back), (expected, expected_back))


def test_without_rois():
    pyramid = pyramid_of()
    none = np.zeros((2, 0, 4), np.float32)
    out, back = both_ways(pyramid, none, np.zeros((2, 0, 7, 7, 3), np.float32), by_products)
    assert out.shape == (2, 0, 7, 7, 3)
    assert all((x == 0).all() for x in jax.tree.leaves(back))


@pytest.mark.parametrize("counts", [(300, 0, 0, 0), (0, 0, 0, 1), (64, 65, 63, 108), (1, 1, 1, 1), (0, 128, 0, 7)])
def test_pieces_hold_each_roi_once_and_of_one_map(counts):
    position = np.random.default_rng(0).permutation(np.repeat(np.arange(4, dtype=np.int32), counts))
    pieces = jax.jit(_pieces, static_argnums=1)(position, 4)
    source = np.asarray(pieces.source)
    assert sorted(source[source < len(position)].tolist()) == list(range(len(position)))
    np.testing.assert_array_equal(source.reshape(-1)[pieces.place], np.arange(len(position)))
    np.testing.assert_array_equal(pieces.ends - pieces.begins, -(-np.array(counts) // PIECE))
    for i, (begin, end) in enumerate(zip(pieces.begins, pieces.ends, strict=True)):
        own = source[begin:end][source[begin:end] < len(position)]
        assert len(own) == counts[i] and (position[own] == i).all()


def test_only_tpus_take_products():
    traced = jax.jit(multilevel_roi_align).trace(pyramid_of(), rois_of_all_levels())
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")}
    assert {platform: "dot_general" in text for platform, text in texts.items()} == {
        "cpu": False,
        "cuda": False,
        "tpu": True,
    }
    adaptive = jax.jit(partial(multilevel_roi_align, sampling_ratio=0)).trace(pyramid_of(), rois_of_all_levels())
    assert "dot_general" not in adaptive.lower(lowering_platforms=("tpu",)).as_text()
