"""Shapes and arithmetic of the bottom-up and the top-down pathway."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.models.backbones.mobilenet import MobileNetV3
from fpn_jax.models.backbones.resnet import ResNet
from fpn_jax.models.layers import Conv, conv_norm, plus_by_product
from fpn_jax.models.necks.fpn import FPN
from fpn_jax.models.pixels import Pixels, normalize_pixels
from fpn_jax.models.resampling import max_of_windows, max_pool, repeat_by_index, repeat_by_products, upsample_nearest
from fpn_jax.ops.platforms import compiling_for


def shapes(module, *inputs):
    return jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), *inputs))


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_resnet50_fpn_of_a_512_image_has_the_papers_sizes():
    image = jnp.zeros((1, 512, 512, 3))
    features, variables = shapes(ResNet(depth=50), image)
    assert {level: x.shape for level, x in features.items()} == {
        2: (1, 128, 128, 256),
        3: (1, 64, 64, 512),
        4: (1, 32, 32, 1024),
        5: (1, 16, 16, 2048),
    }
    pyramid, neck = shapes(FPN(), {level: jnp.zeros(x.shape) for level, x in features.items()})
    assert {level: x.shape[1:] for level, x in pyramid.items()} == {
        2: (128, 128, 256),
        3: (64, 64, 256),
        4: (32, 32, 256),
        5: (16, 16, 256),
        6: (8, 8, 256),
    }
    # torchvision's resnet50 without its classifier has 25,557,032 - 2,049,000 weights, 53,120 of them of batch norms
    assert count(variables["params"]) == 25_557_032 - 2_049_000 - 53_120
    assert count(variables["batch_stats"]) == 2 * 53_120
    assert count(neck["params"]) == 3_344_384  # torchvision's BackboneWithFPN minus its body


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(18, 11_176_512), (34, 21_284_672), (101, 42_500_160), (152, 58_143_808)],
)
def test_resnets_have_the_published_number_of_parameters(depth, parameters):
    _, variables = shapes(ResNet(depth=depth, norm="bn"), jnp.zeros((1, 64, 64, 3)))
    assert count(variables["params"]) == parameters


@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "gn"])
def test_norms_run_and_frozen_stages_get_no_gradient(norm):
    net = ResNet(depth=18, blocks=(1, 1, 1, 1), width=8, norm=norm, frozen_stages=2)
    x = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    variables = jax.jit(net.init)(jax.random.key(0), x)  # far faster than one operation at a time
    stats = variables.get("batch_stats", {})

    def loss(params):
        features, updated = net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return sum((f**2).sum() for f in features.values()), updated.get("batch_stats", {})

    grads, updated = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    for name, tree in grads.items():
        frozen = name.startswith(net.frozen_prefixes)
        assert frozen == name.startswith(("stem_", "stage2_"))
        assert all((np.abs(g).max() == 0) == frozen for g in jax.tree.leaves(tree)), name
    moved = {
        name
        for name in stats
        if any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), stats[name], updated[name])))
    }
    live = {name for name in stats if not name.startswith(("stem_", "stage2_"))}
    assert moved == (live if norm == "bn" else set())


@pytest.mark.parametrize(("stages", "layers"), [(0, 0), (1, 2), (2, 4)])  # up to the block that makes the next level
def test_frozen_layers_of_a_mobilenet_keep_their_weights_and_statistics(stages, layers):
    net = MobileNetV3(levels=(3,), norm="bn", frozen_stages=stages)
    x = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = jax.jit(net.init)(jax.random.key(0), x)
    stats = variables["batch_stats"]

    def loss(params):
        features, updated = net.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        return (features[3] ** 2).sum(), updated["batch_stats"]

    grads, updated = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    moved = jax.tree.map(lambda a, b: a - b, stats, updated)
    frozen = ("stem_", "block01", "block02", "block03")[:layers]
    for tree in (grads, moved):
        for name, of_layer in tree.items():
            assert all(np.any(x) != name.startswith(frozen) for x in jax.tree.leaves(of_layer)), name


@pytest.mark.parametrize(("in_1x1", "strided"), [(False, 4), (True, 1)])  # the stem, and three 3x3
def test_stride_in_1x1_moves_the_stride(in_1x1, strided):
    net = ResNet(depth=50, blocks=(1, 1, 1, 1), width=4, stride_in_1x1=in_1x1)
    with compiling_for("cpu"):  # where a 1x1 is no convolution
        jaxpr = str(jax.make_jaxpr(lambda: net.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))())
    assert jaxpr.count("window_strides=(2, 2)") == strided


def slow_conv(x, kernel, stride):
    kh = kernel.shape[0]
    pad = kh // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = range(0, x.shape[1] - kh + 1, stride)
    columns = range(0, x.shape[2] - kh + 1, stride)
    return np.stack(
        [
            np.stack([np.einsum("bhwi,hwio->bo", x[:, r : r + kh, c : c + kh], kernel) for c in columns], 1)
            for r in rows
        ],
        1,
    )


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_conv_pads_symmetrically(kernel, stride, platform):
    x = np.random.default_rng(0).normal(size=(2, 9, 12, 3)).astype(np.float32)
    layer = Conv(5, kernel, stride)
    variables = layer.init(jax.random.key(0), x)
    expected = slow_conv(x, np.asarray(variables["params"]["kernel"]), stride)
    with compiling_for(platform):
        np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 2)])
def test_a_frozen_norm_in_its_convolution_is_the_map_behind_it(kernel, stride, dtype, tolerance):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, 12, 3)), jnp.float32)
    norm = {name: rng.uniform(0.2, 3, 5).astype(np.float32) for name in ("scale", "bias", "mean", "var")}

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            how = {"stride": stride, "norm": "frozen_bn", "eps": 1e-3, "dtype": jnp.dtype(dtype)}
            return conv_norm(x, ("conv", "norm"), 5, kernel, True, **how)

    variables = Layer().init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["batch_stats"]["norm"]) == dict.fromkeys(norm, (5,))

    def folded(params, x):
        return Layer().apply({"params": params, "batch_stats": {"norm": norm}}, x).astype(jnp.float32)

    def behind(params, x):
        y = Conv(5, kernel, stride, use_bias=False).apply({"params": params["conv"]}, x)
        return (y - norm["mean"]) * jax.lax.rsqrt(norm["var"] + 1e-3) * norm["scale"] + norm["bias"]

    (y, pull), (expected, expected_pull) = (jax.vjp(f, variables["params"], x) for f in (folded, behind))
    gradient = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    for found, right in zip(
        jax.tree.leaves((y, pull(gradient))), jax.tree.leaves((expected, expected_pull(gradient))), strict=True
    ):
        np.testing.assert_allclose(found, right, atol=tolerance * float(abs(right).max()))


def test_the_gain_is_folded_in_before_rounding():
    rng = np.random.default_rng(0)
    x, kernel, gain = (rng.normal(size=size).astype(np.float32) for size in ((2, 9, 12, 4), (3, 3, 4, 6), 6))
    layer = Conv(6, use_bias=False, dtype=jnp.bfloat16)
    folded = layer.apply({"params": {"kernel": kernel}}, x, affine=(gain, jnp.zeros(6)))
    np.testing.assert_array_equal(folded, layer.apply({"params": {"kernel": kernel * gain}}, x))


@pytest.mark.parametrize(("groups", "pad"), [(1, True), (2, True), (1, False)])
def test_an_affine_map_takes_the_bias_along(groups, pad):
    rng = np.random.default_rng(0)
    x, bias, gain, shift = (rng.normal(size=size).astype(np.float32) for size in ((2, 9, 12, 4), 6, 6, 6))
    layer = Conv(6, groups=groups)
    variables = layer.init(jax.random.key(0), x)
    variables = {"params": variables["params"] | {"bias": bias}}
    expected = layer.apply(variables, x, pad) * gain + shift
    np.testing.assert_allclose(layer.apply(variables, x, pad, (gain, shift)), expected, atol=1e-5)


@pytest.mark.parametrize(("platform", "product"), [("cpu", True), ("tpu", True), ("cuda", False)])
def test_gpus_get_no_product_with_a_strided_slice(platform, product):
    """XLA aborts the process when it fuses them: `benchmarks/LOG.md`, "Compiled for an H100"."""
    x, layer = jnp.zeros((1, 8, 8, 72)), Conv(80, 1, stride=2)
    variables = layer.init(jax.random.key(0), x)
    text = jax.jit(layer.apply).trace(variables, x).lower(lowering_platforms=(platform,)).as_text()
    assert ("dot_general" in text, "stablehlo.convolution" in text) == (product, not product)


@pytest.mark.parametrize(("channels", "features", "product"), [(64, 256, False), (256, 64, False), (65, 128, True)])
def test_tpus_get_products_of_many_channels_alone(channels, features, product):
    """Around the product of few channels the compiler copies the map into another layout and back."""
    x, layer = jnp.zeros((1, 8, 8, channels)), Conv(features, 1)
    text = jax.jit(layer.init_with_output).trace(jax.random.key(0), x).lower(lowering_platforms=("tpu",)).as_text()
    assert ("dot_general" in text, "stablehlo.convolution" in text) == (product, not product)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 5, 7, 3), "float32"), ((9, 3), "float32"), ((2, 5, 7, 3), "bfloat16")]
)
def test_the_bias_gradient_by_products_is_the_sum(shape, dtype):
    """To the bit, of whole numbers, which bfloat16 has as well."""
    rng = np.random.default_rng(0)
    y, bias, gradient = (jnp.asarray(rng.integers(-8, 9, size), dtype) for size in (shape, shape[-1:], shape))
    found, pull = jax.vjp(plus_by_product, y, bias)
    expected, back = jax.vjp(jnp.add, y, bias)
    for one, other in zip((found, *pull(gradient)), (expected, *back(gradient)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("pad", [True, False])
def test_a_rectified_convolution_is_one_with_a_relu_behind_it(pad):
    x, layer = np.random.default_rng(0).normal(size=(2, 6, 7, 4)).astype(np.float32), Conv(5)
    variables = layer.init(jax.random.key(0), x)
    expected = layer.apply(variables, x, pad)
    assert (expected < 0).any()
    np.testing.assert_array_equal(layer.apply(variables, x, pad, rectify=True), np.maximum(expected, 0))


@pytest.mark.parametrize(("platform", "product"), [("cpu", False), ("cuda", False), ("tpu", True)])
def test_tpus_sum_the_biass_gradient_by_a_product(platform, product):
    x, layer = jnp.zeros((2, 8, 8, 4)), Conv(4, 3)
    gradient = jax.jit(jax.grad(lambda v, x: layer.apply(v, x).sum()))
    text = gradient.trace(layer.init(jax.random.key(0), x), x).lower(lowering_platforms=(platform,)).as_text()
    assert ("dot_general" in text) == product


@pytest.mark.parametrize("pool", [max_pool, max_of_windows])
def test_max_pool_never_picks_the_padding(pool):
    x = -np.arange(1.0, 17).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(pool(jnp.asarray(x), 3, 2)[0, ..., 0], [[-1, -2], [-5, -6]])


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_both_max_pools_have_the_same_gradient(size):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, *size, 3)), jnp.bfloat16)  # with many ties
    (windows, pull), (shifted, expected) = (
        jax.vjp(lambda x, pool=pool: pool(x, 3, 2), x) for pool in (max_of_windows, max_pool)
    )
    np.testing.assert_array_equal(windows, shifted)
    np.testing.assert_array_equal(pull(shifted)[0], expected(shifted)[0])


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_stem_and_pool_are_written_for_tpus_on_tpus_alone(platform):
    x, stem = jnp.zeros((1, 16, 16, 3)), Conv(4, 7, stride=2)
    variables = stem.init(jax.random.key(0), x)
    pool, conv = (
        jax.jit(f).trace(x).lower(lowering_platforms=(platform,)).as_text()
        for f in (lambda x: max_pool(x, 3, 2), lambda x: stem.apply(variables, x))
    )
    assert ("reduce_window" in pool) == ("tensor<4x4x12x4xf32>" in conv) == (platform == "tpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("upsample", [upsample_nearest, repeat_by_index, repeat_by_products])
@pytest.mark.parametrize("size", [(6, 8), (5, 7), (3, 4), (4, 9)])
def test_upsample_reads_the_nearest_source_row(size, upsample, dtype):
    x = np.random.default_rng(0).normal(size=(1, 3, 4, 2)).astype(np.float32)
    rows = [i * 3 // size[0] for i in range(size[0])]
    columns = [i * 4 // size[1] for i in range(size[1])]
    x = jnp.asarray(x, dtype)
    y, back = jax.vjp(lambda x: upsample(x, size), x)
    np.testing.assert_array_equal(y, x[:, rows][:, :, columns])
    counts = np.outer(np.bincount(rows), np.bincount(columns))
    np.testing.assert_array_equal(back(jnp.ones_like(y))[0], np.broadcast_to(counts[..., None], x.shape))


def test_pixels_are_normalised_and_padding_is_zero():
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    size = np.array([[4, 6], [3, 2]], np.int32)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    out = np.asarray(normalize_pixels(jnp.asarray(image), jnp.asarray(size), Pixels(mean=mean, std=std)))
    np.testing.assert_allclose(out[0], (image[0] / 255 - np.array(mean)) / std, atol=1e-5)
    np.testing.assert_allclose(out[1, :3, :2], (image[1, :3, :2] / 255 - np.array(mean)) / std, atol=1e-5)
    assert not out[1, 3:].any()
    assert not out[1, :, 2:].any()


def test_detectron2s_pixels_are_bgr_from_0_to_255():
    image = np.random.default_rng(0).integers(0, 256, (1, 4, 6, 3), np.uint8)
    pixels = Pixels(order="bgr", white=255.0, mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0))
    out = np.asarray(normalize_pixels(jnp.asarray(image), jnp.array([[4, 6]]), pixels))
    np.testing.assert_array_equal(out, image[..., ::-1].astype(np.float32) - np.float32(pixels.mean))


def test_fpn_is_lateral_plus_upsampled_then_smoothed():
    rng = np.random.default_rng(0)
    features = {
        level: rng.normal(size=(1, 16 >> (level - 2), 24 >> (level - 2), 2 * level)).astype(np.float32)
        for level in (2, 3, 4, 5)
    }
    neck = FPN(channels=6)
    variables = jax.jit(neck.init)(jax.random.key(0), features)
    pyramid = jax.jit(neck.apply)(variables, features)
    p = jax.tree.map(np.asarray, variables["params"])
    merged = None
    for level in (5, 4, 3, 2):
        x = features[level] @ p[f"lateral{level}"]["kernel"][0, 0] + p[f"lateral{level}"]["bias"]
        if merged is not None:
            x = x + merged.repeat(2, 1).repeat(2, 2)
        merged = x
        smooth = p[f"smooth{level}"]
        np.testing.assert_allclose(pyramid[level], slow_conv(x, smooth["kernel"], 1) + smooth["bias"], atol=1e-4)
    np.testing.assert_array_equal(pyramid[6], pyramid[5][:, ::2, ::2])
