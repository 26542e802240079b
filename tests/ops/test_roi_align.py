"""RoIAlign against loops over single points in float64, against torchvision, and its gradient against both."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from fpn_jax.ops import roi_align as roi_ops
from fpn_jax.ops.platforms import compiling_for
from fpn_jax.ops.roi_align import multilevel_roi_align, roi_align

align = jax.jit(roi_align, static_argnames=("size", "sampling_ratio", "aligned"))
roi_levels = jax.jit(roi_ops.roi_levels, static_argnames=("levels", "k0", "canonical", "eps"))


def slow_point(feature, y, x):
    h, w, _ = feature.shape
    if y < -1 or y > h or x < -1 or x > w:
        return 0.0
    y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
    y, x = y - top, x - left
    upper = (1 - x) * feature[top, left] + x * feature[top, right]
    lower = (1 - x) * feature[bottom, left] + x * feature[bottom, right]
    return (1 - y) * upper + y * lower


def slow_roi_align(feature, rois, scale, size=7, sampling_ratio=2, aligned=False):
    feature, rois = np.asarray(feature, np.float64), np.asarray(rois, np.float64)
    out = np.zeros((len(rois), size, size, feature.shape[-1]))
    for r, roi in enumerate(rois):
        x1, y1, x2, y2 = roi * scale - (0.5 if aligned else 0)
        w, h = (x2 - x1, y2 - y1) if aligned else (max(x2 - x1, 1), max(y2 - y1, 1))
        rows = sampling_ratio if sampling_ratio > 0 else max(int(np.ceil(h / size)), 0)
        columns = sampling_ratio if sampling_ratio > 0 else max(int(np.ceil(w / size)), 0)
        for i, j, y, x in np.ndindex(size, size, rows, columns):
            at = y1 + (i + (y + 0.5) / rows) * h / size, x1 + (j + (x + 0.5) / columns) * w / size
            out[r, i, j] += slow_point(feature, *at) / (rows * columns)
    return out


ROIS = np.float32(
    [
        [4, 8, 30, 40],
        [0, 0, 68, 52],  # the whole map
        [-30, -20, 20, 30],  # partly outside
        [50, 40, 100, 90],
        [-1000, -1000, -900, -900],  # wholly outside
        [-400, -300, 500, 400],
        [20, 20, 20, 20],  # no area
        [30, 30, 10, 10],  # inverted
        [0, 0, 0, 0],  # padding
        [10, 10, 10.5, 40],
        [0, 20, 68, 22],  # long
        [67.9, 51.9, 68, 52],
        [-4, -4, 4, 4],  # begins exactly one cell outside
    ]
)


def feature_map(h=13, w=17, c=3, seed=0):
    return np.random.default_rng(seed).normal(size=(h, w, c)).astype(np.float32)


@pytest.mark.parametrize(("size", "sampling_ratio"), [(7, 2), (2, 1), (3, 3), (3, 0)])
@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_is_that_of_a_loop(size, sampling_ratio, aligned):
    rois = (
        ROIS if not aligned else ROIS[[i for i in range(len(ROIS)) if i != 7]]
    )  # no inverted ones where not stretched
    settings = {"size": size, "sampling_ratio": sampling_ratio, "aligned": aligned}
    got = align(feature_map(), rois, scale=0.25, **settings)
    np.testing.assert_allclose(got, slow_roi_align(feature_map(), rois, 0.25, **settings), atol=2e-5)
    assert (got[4] == 0).all()


def test_adaptive_ratio_does_not_round_up_whole_bins():
    """A RoI of 7 k cells has k points per bin, however the compiler divides by 7."""
    sides = np.arange(7, 43, 7, dtype=np.float32)
    rois = np.stack([0 * sides + 1, 0 * sides + 2, sides + 1, sides + 2], -1)
    feature = feature_map(48, 48, 2)
    got = align(feature, rois, scale=1.0, sampling_ratio=0)
    np.testing.assert_allclose(got, slow_roi_align(feature, rois, 1.0, sampling_ratio=0), atol=2e-5)


def test_far_from_the_origin():
    """The right end of a map of 1344 columns, 4 pixels each."""
    feature = feature_map(4, 1344, 2)
    rois = np.float32([[5300.3, 1.7, 5375.9, 14.2], [5000.1, 0, 5376, 16]])
    np.testing.assert_allclose(align(feature, rois, scale=0.25), slow_roi_align(feature, rois, 0.25), atol=2e-3)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_gradient(aligned, sampling_ratio):
    function = partial(align, rois=ROIS, scale=0.25, size=3, sampling_ratio=sampling_ratio, aligned=aligned)
    check_grads(function, (feature_map(c=2),), order=1, modes=["rev"], eps=1.0)  # linear, so a big step is exact


def test_gradient_of_more_rois_than_pieces():
    """The cotangent of a linear map: <g, A x> = <A' g, x>, with a number of RoIs that does not divide evenly."""
    rng = np.random.default_rng(1)
    corners = rng.uniform(-10, 60, (75, 2))
    rois = np.concatenate([corners, corners + rng.uniform(0, 40, (75, 2))], -1).astype(np.float32)
    x, g = feature_map(c=4), rng.normal(size=(75, 7, 7, 4)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x, rois, g: jnp.vdot(g, align(x, rois, scale=0.25))))
    np.testing.assert_allclose(np.vdot(g, align(x, rois, scale=0.25)), np.vdot(gradient(x, rois, g), x), rtol=1e-4)
    thirds = sum(gradient(x, rois[start::3], g[start::3]) for start in range(3))
    np.testing.assert_allclose(gradient(x, rois, g), thirds, atol=1e-4)


def test_rois_are_constants():
    gradient = jax.jit(jax.grad(lambda rois: align(feature_map(), rois, scale=0.25).sum()))(ROIS)
    assert (gradient == 0).all()


@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_no_rois_and_no_numbers(sampling_ratio):
    settings = {"scale": 0.25, "sampling_ratio": sampling_ratio}
    assert align(feature_map(), np.zeros((0, 4), np.float32), **settings).shape == (0, 7, 7, 3)
    rois = np.float32([[np.nan] * 4, [np.inf] * 4, [-np.inf, 0, np.inf, 9], [1, 2, 30, 40]])
    rois = rois if sampling_ratio else rois[[0, 3]]  # an infinite RoI has infinitely many points
    good = align(feature_map(), rois[-1:], **settings)
    out, gradient = jax.jit(jax.value_and_grad(lambda x: align(x, rois, **settings)[-1:].sum()))(feature_map())
    np.testing.assert_allclose(out, good.sum(), rtol=1e-5)
    assert np.isfinite(gradient).all()


def pyramid_of(c=3, b=2, h=64, w=80, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {l: rng.normal(size=(b, h >> l, w >> l, c)).astype(dtype) for l in (2, 3, 4, 5)}


def rois_of_all_levels(b=2, r=12, seed=0):
    """RoIs from a pixel to more than the 64 x 80 image."""
    rng = np.random.default_rng(seed)
    sides, centres = np.exp(rng.uniform(0, 5, (b, r, 2))), rng.uniform(0, 70, (b, r, 2))
    rois = np.concatenate([centres - sides / 2, centres + sides / 2], -1).astype(np.float32)
    rois[:, -1] = 0
    return rois


@pytest.mark.parametrize("aligned", [False, True])
def test_every_roi_is_read_from_its_level(aligned):
    pyramid, rois = pyramid_of(), rois_of_all_levels()
    got = jax.jit(partial(multilevel_roi_align, canonical=30.0, aligned=aligned))(pyramid, rois)
    levels = np.asarray(roi_levels(rois, (2, 3, 4, 5), canonical=30.0))
    assert set(levels.ravel()) == {2, 3, 4, 5}
    for b, r in np.ndindex(*levels.shape):
        level = int(levels[b, r])
        expected = slow_roi_align(pyramid[level][b], rois[b, r : r + 1], 2.0**-level, aligned=aligned)[0]
        np.testing.assert_allclose(got[b, r], expected, atol=3e-5)


def test_one_level_is_enough():
    pyramid, rois = pyramid_of(), rois_of_all_levels()
    got = jax.jit(multilevel_roi_align)({3: pyramid[3]}, rois)
    np.testing.assert_allclose(got[1], align(pyramid[3][1], rois[1], scale=0.125), atol=1e-5)


def test_bfloat16_is_summed_in_float32():
    feature = jnp.asarray(feature_map(), jnp.bfloat16)
    rois = np.tile(np.float32([[8, 8, 40, 40]]), (600, 1))
    out = align(feature, rois, scale=0.25)
    gradient = jax.jit(jax.grad(lambda x: align(x, rois, scale=0.25).sum(dtype=jnp.float32)))(feature)
    assert out.dtype == gradient.dtype == jnp.bfloat16
    exact = align(feature.astype(jnp.float32), rois, scale=0.25)
    np.testing.assert_allclose(out.astype(np.float32), exact, rtol=2**-8, atol=1e-6)
    # Every bin passes on 1, to cells that get far more than 256 together, where sums in bfloat16 would stick.
    assert gradient.max() > 300
    np.testing.assert_allclose(gradient.astype(np.float32).sum((0, 1)), 600 * 49, rtol=1e-2)


def test_sharded_over_images_without_talking():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    inputs = pyramid_of(b=8), rois_of_all_levels(b=8)
    split = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    def forward_and_gradient(pyramid, rois):
        out, pull = jax.vjp(lambda p: multilevel_roi_align(p, rois, canonical=30.0), pyramid)
        return out, pull(out)[0]

    program = forward_and_gradient.lower(*split).compile().as_text()
    assert not any(word in program for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-4), forward_and_gradient(*split), forward_and_gradient(*inputs)
    )


def test_levels_at_the_boundaries(data_dir):
    golden = np.load(data_dir / "ops.npz")
    np.testing.assert_array_equal(roi_levels(golden["levels/boxes"], (2, 3, 4, 5)), golden["levels/level"])
    np.testing.assert_array_equal(roi_levels(golden["levels/boxes"], (3, 4, 5)), golden["levels/level_3_to_5"])
    np.testing.assert_array_equal(roi_levels(golden["levels/quirk_boxes"], (2, 3, 4, 5)), golden["levels/quirk_level"])
    sides = np.float32([0, 1, 111.9, 112, 223.9, 224, 447.9, 448, 1e6])
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], -1)
    assert roi_levels(boxes, (2, 3, 4, 5)).tolist() == [2, 2, 2, 3, 3, 4, 4, 5, 5]
    assert roi_levels(boxes, (2, 3, 4, 5), k0=5, canonical=448.0).tolist() == [2, 2, 2, 3, 3, 4, 4, 5, 5]
    assert roi_levels(boxes, (2, 3, 4, 5), eps=0.0).tolist() == [2, 2, 2, 3, 3, 4, 4, 5, 5]
    assert roi_levels(boxes, (2,)).tolist() == [2] * 9
    assert roi_levels(np.float32([[9, 9, 2, 2], [-900, 0, 900, -9]]), (2, 3, 4, 5)).tolist() == [2, 2]  # inverted


@pytest.mark.parametrize("case", ["ratio1_7x7", "ratio2_7x7", "ratio-1_7x7", "ratio2_14x14"])
@pytest.mark.parametrize("aligned", [0, 1])
def test_goldens(case, aligned, data_dir):
    golden = np.load(data_dir / "ops.npz")
    feature, rois = golden["roi_align/input"].transpose(0, 2, 3, 1), golden["roi_align/rois"]
    ratio, size = case.removeprefix("ratio").split("_")
    settings = {"size": int(size.split("x")[0]), "sampling_ratio": int(ratio), "aligned": bool(aligned)}

    @jax.jit
    def both_images(feature, rois, scale):
        return jax.vmap(lambda f: roi_align(f, rois, scale, **settings))(feature)

    for scale in (1.0, 0.25, 0.0625) if case.endswith("7x7") else (0.25,):
        got = both_images(feature, rois[:, 1:] / np.float32(scale), scale)
        got = got[rois[:, 0].astype(int), np.arange(len(rois))].transpose(0, 3, 1, 2)
        np.testing.assert_allclose(got, golden[f"roi_align/scale{scale}_aligned{aligned}_{case}"], atol=3e-5)


@pytest.mark.parametrize("aligned", [0, 1])
def test_golden_gradient(aligned, data_dir):
    golden = np.load(data_dir / "ops.npz")
    feature, rois = golden["roi_align/input"].transpose(0, 2, 3, 1), golden["roi_align/rois"]
    mine = rois[:, 0] == np.arange(2)[:, None]
    weight = golden[f"roi_align/grad_weight_aligned{aligned}"].transpose(0, 2, 3, 1) * mine[:, :, None, None, None]

    def weighted(feature):
        pooled = jax.vmap(lambda f: roi_align(f, rois[:, 1:] * 4, 0.25, aligned=bool(aligned)))(feature)
        return (pooled * weight).sum()

    gradient = jax.jit(jax.grad(weighted))(feature).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(gradient, golden[f"roi_align/grad_input_aligned{aligned}"], atol=2e-5)


def test_golden_pyramid(data_dir):
    golden = np.load(data_dir / "ops.npz")
    pyramid = {level: golden[f"multiscale/P{level}"].transpose(0, 2, 3, 1) for level in (2, 3, 4, 5)}
    rois = [golden["multiscale/rois0"], golden["multiscale/rois1"]]
    counts = [len(x) for x in rois]
    padded = np.stack([np.pad(x, ((0, max(counts) - len(x)), (0, 0))) for x in rois])
    got = jax.jit(multilevel_roi_align)(pyramid, padded)
    got = np.concatenate([x[:n] for x, n in zip(got, counts, strict=True)]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, golden["multiscale/out_7x7"], atol=5e-5)


def test_gradients_of_gpus_are_those_of_cpus():
    """At once there, in pieces that 75 RoIs do not fill here."""
    pyramid, rois = pyramid_of(), rois_of_all_levels(r=75)
    g = np.random.default_rng(1).normal(size=(2, 75, 7, 7, 3)).astype(np.float32)

    def gradient(platform):
        with compiling_for(platform):
            return jax.jit(jax.grad(lambda p: jnp.vdot(g, multilevel_roi_align(p, rois, canonical=30.0))))(pyramid)

    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), gradient("cuda"), gradient("cpu"))


@pytest.mark.parametrize(("platform", "arrays", "rois"), [("cpu", {"30x3", "12x3"}, 2), ("cuda", {"42x3"}, 40)])
def test_on_a_cpu_each_level_has_an_array_of_its_own_for_the_gradient(platform, arrays, rois):
    """And two of 40 RoIs at a time are scattered. On a GPU more scatters are as many more kernels to start."""
    pyramid = {2: jnp.zeros((1, 5, 6, 3)), 3: jnp.zeros((1, 3, 4, 3))}
    gradient = jax.jit(jax.grad(lambda pyramid: multilevel_roi_align(pyramid, jnp.zeros((1, 40, 4))).sum()))
    text = gradient.trace(pyramid).lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"\}\) : \(tensor<1x(\d+x3)xf32>, \S+ tensor<1x4x(\d+)x7x7x3xf32>\)", text)
    assert {array for array, _ in found} == arrays
    assert {int(r) for _, r in found} == {rois}


def test_on_a_cpu_it_is_computed_before_it_is_reshaped():
    """As the box head does: fused with that, XLA computes it number by number, four times as slowly."""
    pyramid, rois = {2: jnp.ones((1, 8, 8, 4)), 3: jnp.ones((1, 4, 4, 4))}, jnp.ones((1, 5, 4))
    text = jax.jit(lambda *x: multilevel_roi_align(*x, size=2).reshape(5, -1)).lower(pyramid, rois).compile().as_text()
    assert re.search(r"= f32\[1,5,2,2,4\]\S* call\(", text)
