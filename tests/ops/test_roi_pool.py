"""RoI pooling against loops over cells in NumPy and against torchvision, values and gradients both to the last bit."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fpn_jax.ops.roi_align import roi_levels
from fpn_jax.ops.roi_pool import _edges, multilevel_roi_pool, roi_pool
from fpn_jax.ops.rounds import PIECES, sort_into_pieces

pool = jax.jit(roi_pool, static_argnames="size")


@partial(jax.jit, static_argnames="size")
def pool_and_gradient(feature, rois, gradient, scale, size):
    """(pooled, gradient of the feature), gradient being that of the pooled."""
    out, pull = jax.vjp(lambda feature: roi_pool(feature, rois, scale, size), feature)
    return out, pull(gradient)[0]


def away_from_zero(x):
    return int(np.sign(x) * np.floor(abs(np.float64(x)) + 0.5))


def slow_bins(low, high, scale, length, size):
    """The ranges of cells of the bins along one axis."""
    first, last = (away_from_zero(np.float32(x) * np.float32(scale)) for x in (low, high))
    side = np.float32(max(last - first + 1, 1)) / np.float32(size)
    for i in range(size):
        begin, end = int(np.floor(np.float32(i) * side)), int(np.ceil(np.float32(i + 1) * side))
        yield range(max(first + begin, 0), min(first + end, length))


def slow_roi_pool(feature, rois, gradient, scale, size):
    """(pooled, gradient of the feature)."""
    h, w, c = feature.shape
    out, back = np.zeros((len(rois), size, size, c), feature.dtype), np.zeros(feature.shape, np.float32)
    for r, (x1, y1, x2, y2) in enumerate(rois):
        for i, rows in enumerate(slow_bins(y1, y2, scale, h, size)):
            for j, columns in enumerate(slow_bins(x1, x2, scale, w, size)):
                for k in range(c if len(rows) and len(columns) else 0):
                    most, at = np.finfo(np.float32).min, None
                    for y in rows:
                        for x in columns:
                            if feature[y, x, k] > most:
                                most, at = feature[y, x, k], (y, x, k)
                    out[r, i, j, k] = most
                    if at:
                        back[at] += gradient[r, i, j, k]
    return out, back


ROIS = np.float32(
    [
        [4, 8, 30, 40],
        [0, 0, 68, 52],  # the whole map
        [-30, -20, 20, 30],  # partly outside
        [50, 40, 100, 90],
        [-1000, -1000, -900, -900],  # wholly outside
        [-400, -300, 500, 400],
        [20, 20, 20, 20],  # one cell
        [30, 30, 10, 10],  # inverted
        [0, 0, 0, 0],  # padding
        [10, 10, 10.5, 40],
        [0, 20, 68, 22],  # long
        [2, 6, 10, 14],  # halves of cells at scale 1/4
        [-2, -6, 26, 30],
        [-1e6, 4, 1e6, 9],
    ]
)


def feature_map(h=13, w=17, c=3, seed=0):
    """Rounded so that some cells are equal."""
    return np.random.default_rng(seed).normal(size=(h, w, c)).round(1).astype(np.float32)


def gradient_of(r, size, c=3, seed=0):
    """Whole numbers, whose sums are exact in any order."""
    return np.random.default_rng(seed).integers(-8, 9, (r, size, size, c)).astype(np.float32)


def random_rois(r=40, seed=0):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-20, 70, (r, 2))
    sides = np.exp(rng.uniform(0, 4.5, (r, 2)))
    return np.concatenate([corners, corners + sides], -1).astype(np.float32)


@pytest.mark.parametrize(("size", "scale"), [(7, 0.25), (1, 0.25), (3, 1 / 3), (2, 1.0)])
def test_roi_pool_is_that_of_a_loop(size, scale):
    rois = np.concatenate([ROIS, random_rois()])
    case = feature_map(), rois, gradient_of(len(rois), size), scale, size
    for got, expected in zip(pool_and_gradient(*case), slow_roi_pool(*case), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert (pool(feature_map(), ROIS[4:5], scale, size) == 0).all()


def test_borders_of_bins_are_rounded_as_in_float32():
    """A quotient of 7 that is rounded up ends the last bin a cell late, in torchvision too."""
    sides = np.concatenate([np.arange(1, 3000), np.random.default_rng(0).integers(3000, 2**23, 3000), [2**23 + 1]])
    edges = jax.jit(_edges, static_argnums=1)
    for size in (1, 2, 6, 7, 14, 255):
        side, i = (sides.astype(np.float32) / np.float32(size))[:, None], np.arange(size, dtype=np.float32)
        begins, ends = edges(sides[:, None].astype(np.int32), size)
        np.testing.assert_array_equal(begins, np.floor(i * side))
        np.testing.assert_array_equal(ends, np.ceil((i + 1) * side))
    assert edges(np.int32([[57]]), 7)[1][0, -1] == 58


def test_first_of_equal_cells_gets_the_gradient():
    _, gradient = pool_and_gradient(
        np.ones((4, 6, 1), np.float32), np.float32([[0, 0, 5, 3]]), np.ones((1, 2, 2, 1), np.float32), 1.0, 2
    )
    assert np.argwhere(gradient[..., 0]).tolist() == [[0, 0], [0, 3], [2, 0], [2, 3]]


def test_rois_are_constants():
    gradient = jax.jit(jax.grad(lambda rois: pool(feature_map(), rois, 0.25).sum()))(ROIS)
    assert (gradient == 0).all()


def test_no_rois_and_no_numbers():
    nothing = pool_and_gradient(feature_map(), np.zeros((0, 4), np.float32), gradient_of(0, 7), 0.25, 7)
    assert nothing[0].shape == (0, 7, 7, 3)
    assert (nothing[1] == 0).all()
    inf, nan = np.inf, np.nan
    rois = np.float32([[nan] * 4, [1, 2, 30, nan], [inf] * 4, [-inf] * 4, [-inf, 0, inf, 9], [inf, 0, -inf, 9]])
    rois = np.concatenate([rois, [[1, 2, 30, 40]]]).astype(np.float32)
    out, gradient = pool_and_gradient(feature_map(), rois, gradient_of(7, 7), 0.25, 7)
    assert (out[:4] == 0).all()
    assert (out[4, :, [0, 1, 2, 4, 5, 6]] == 0).all()  # the middle bin has the whole row
    assert (out[4, 0, 3] == feature_map()[0].max(0)).all()
    assert (out[5] == 0).all()
    np.testing.assert_array_equal(out[6], pool(feature_map(), rois[6:], 0.25)[0])
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("size", [0, 256])
def test_size_has_a_range(size):
    with pytest.raises(ValueError, match=f"size must be 1 to 255, not {size}"):
        roi_pool(feature_map(), ROIS, 0.25, size)


def test_bfloat16():
    """The values are the features' own, the gradient is summed in float32."""
    feature = jnp.asarray(feature_map(), jnp.bfloat16)
    rois = np.tile(np.float32([[8, 8, 40, 40]]), (600, 1))
    ones = jnp.ones((600, 7, 7, 3), jnp.bfloat16)
    out, gradient = pool_and_gradient(feature, rois, ones, 0.25, 7)
    assert out.dtype == gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(np.float32), pool(feature.astype(np.float32), rois, 0.25))
    assert gradient.max() > 300  # where sums in bfloat16 would stick at 256
    np.testing.assert_allclose(gradient.astype(np.float32).sum((0, 1)), 600 * 49, rtol=1e-2)


def pyramid_of(c=3, b=2, h=64, w=80):
    rng = np.random.default_rng(0)
    return {l: rng.normal(size=(b, h >> l, w >> l, c)).round(1).astype(np.float32) for l in (2, 3, 4, 5)}


def rois_of_all_levels(b=2, r=40):
    """RoIs from a pixel to more than the 64 x 80 image."""
    rng = np.random.default_rng(0)
    sides, centres = np.exp(rng.uniform(0, 5, (b, r, 2))), rng.uniform(0, 70, (b, r, 2))
    rois = np.concatenate([centres - sides / 2, centres + sides / 2], -1).astype(np.float32)
    rois[:, -1] = 0
    return rois


@jax.jit
def multilevel_and_gradient(pyramid, rois, gradient):
    out, pull = jax.vjp(lambda pyramid: multilevel_roi_pool(pyramid, rois, size=3, canonical=30.0), pyramid)
    return out, pull(gradient)[0]


def test_every_roi_is_read_from_its_level():
    pyramid, rois = pyramid_of(), rois_of_all_levels()
    gradient = gradient_of(rois.size // 4, 3).reshape(2, -1, 3, 3, 3)
    out, back = multilevel_and_gradient(pyramid, rois, gradient)
    levels = np.asarray(roi_levels(rois, (2, 3, 4, 5), canonical=30.0))
    for b in range(2):
        for level in pyramid:
            mine = levels[b] == level
            assert mine.any()
            case = pyramid[level][b], rois[b, mine], gradient[b, mine], 2.0**-level, 3
            for got, expected in zip((out[b, mine], back[level][b]), slow_roi_pool(*case), strict=True):
                np.testing.assert_array_equal(got, expected)


def test_one_level_is_enough():
    pyramid, rois = pyramid_of(), rois_of_all_levels()
    got = jax.jit(multilevel_roi_pool)({3: pyramid[3]}, rois)
    single = jax.jit(jax.vmap(lambda feature, rois: roi_pool(feature, rois, 0.125)))(pyramid[3], rois)
    np.testing.assert_array_equal(got, single)


def test_large_rois_do_not_slow_the_others():
    """One of 50 x 50 cells in a bin among 95 of 2 x 2 costs its own 2500 rounds, the other pieces 4 each."""
    rows = jnp.full((1, 3 * PIECES), 2, jnp.int32).at[0, 7].set(50)
    pieces, _ = sort_into_pieces((), rows, rows)
    assert pieces.rounds.tolist() == [2500] + [4] * (PIECES - 1)


def test_sharded_over_images():
    """Devices agree on the number of rounds and pass each other nothing else."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    inputs = pyramid_of(b=8), rois_of_all_levels(b=8), gradient_of(8 * 40, 3).reshape(8, 40, 3, 3, 3)
    split = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
    program = multilevel_and_gradient.lower(*split).compile().as_text()
    assert not any(word in program for word in ("all-gather", "collective-permute", "all-to-all"))
    reduced = re.findall(r"= (\S+) all-reduce(?:-start)?\(", program)
    assert [re.sub(r"\{.*", "", shape) for shape in reduced] == ["s32[20]"]  # two RoIs to a piece
    jax.tree.map(np.testing.assert_array_equal, multilevel_and_gradient(*split), multilevel_and_gradient(*inputs))


@pytest.mark.parametrize("case", ["quarter_7", "third_3", "not_finite_2", "wide_7", "wide_14"])
def test_goldens(case, data_dir):
    golden = {
        name.removeprefix(f"{case}/"): value
        for name, value in np.load(data_dir / "roi_pool.npz").items()
        if name.startswith(f"{case}/")
    }
    features, gradients, outs, backs = (
        np.moveaxis(golden[name], 1, -1) for name in ("input", "grad_out", "out", "grad_input")
    )
    image, rois = golden["rois"][:, 0].astype(int), golden["rois"][:, 1:]
    for b in range(len(features)):
        mine = image == b
        inputs = features[b], rois[mine], gradients[mine], golden["scale"], outs.shape[1]
        for got, expected in zip(pool_and_gradient(*inputs), (outs[mine], backs[b]), strict=True):
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("eps", "level"), [(1e-6, 4), (0.0, 3)])
def test_what_is_added_before_rounding_decides_the_level(eps, level):
    """Of an RoI a hair smaller than the canonical one."""
    pyramid = {l: jnp.full((1, 4, 4, 1), float(l)) for l in (3, 4)}
    rois = jnp.array([[[0, 0, 223.99998, 223.99998]]])
    assert multilevel_roi_pool(pyramid, rois, 1, eps=eps).tolist() == [[[[[level]]]]]
