"""What ablations switch, against slow twins in NumPy: the neck's parts, the image pyramid, heads of their own."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.models.backbones.image_pyramid import ImagePyramid
from fpn_jax.models.backbones.resnet import ResNet
from fpn_jax.models.heads.box import BoxHead
from fpn_jax.models.heads.conv5 import Conv5Head
from fpn_jax.models.heads.rpn import RPNHead
from fpn_jax.models.necks.fpn import FPN, Bare
from fpn_jax.models.resampling import Upsample


def filled(module, *inputs, seed=0):
    """Variables of the module, all of them random, and no variance near 0."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))

    def fill(path, x):
        values = rng.normal(size=x.shape) / np.sqrt(max(np.prod(x.shape[:-1]), 1))
        return np.float32(abs(values) + 0.5 if path[-1].key == "var" else values)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def apply(module, variables, *inputs):
    return jax.tree.map(np.asarray, jax.jit(module.apply)(variables, *inputs))


def maps(sizes, channels=lambda level: level + 1, b=2):
    """Feature maps {l: [b h w c]} of {l: (h, w)}, each with channels of its own."""
    rng = np.random.default_rng(1)
    return {level: np.float32(rng.normal(size=(b, *size, channels(level)))) for level, size in sizes.items()}


def slow_conv(x, kernel, bias=0.0):
    """One output pixel at a time, with zeros around x."""
    pad = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    y = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for i, j in np.ndindex(x.shape[1:3]):
        y[:, i, j] = np.tensordot(padded[:, i : i + 2 * pad + 1, j : j + 2 * pad + 1], kernel, 3)
    return y + bias


def slow_resize(x, size):
    """x [b h w c] to `size`: a tent around each output's place, as wide as an input cell, or an output's if larger."""
    for axis, n in zip((1, 2), size, strict=True):
        step = x.shape[axis] / n
        rows = []
        for i in range(n):
            places = np.arange(x.shape[axis]) - ((i + 0.5) * step - 0.5)
            weights = np.maximum(1 - abs(places) / max(step, 1), 0)
            rows.append(np.tensordot(weights / weights.sum(), x, (0, axis)))
        x = np.stack(rows, axis)
    return x


def slow_transposed(x, kernel, size):
    """Every cell, and those beside the border once more, spreads over 4 x 4; what is beyond `size` is cut off."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    y = np.zeros((x.shape[0], 2 * x.shape[1] + 6, 2 * x.shape[2] + 6, x.shape[3]))
    for i, j in np.ndindex(padded.shape[1:3]):
        y[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += padded[:, i, j, None, None] * kernel[::-1, ::-1, 0]
    return y[:, 3 : 3 + size[0], 3 : 3 + size[1]]


class Weights(dict):
    """A dict that remembers what was read from it."""

    def __init__(self, weights):
        super().__init__(weights)
        self.read = set()

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


def slow_fpn(neck, params, stats, features):
    """The pyramid as the docstring of `FPN` states it, level by level from the definition of M_l."""

    def layer(x, name, level):
        y = slow_conv(x, **params[f"{name}{level}"])
        norm = f"{name}_norm{level}"
        if neck.norm == "gn":  # as many groups as channels up to 32
            y = (y - y.mean((1, 2), keepdims=True)) / np.sqrt(y.var((1, 2), keepdims=True) + neck.norm_eps)
            y = y * params[norm]["norm"]["scale"] + params[norm]["norm"]["bias"]
        elif neck.norm == "bn":
            mean, var = stats[norm]["norm"]["mean"], stats[norm]["norm"]["var"]
            y = (y - mean) / np.sqrt(var + neck.norm_eps)
            y = y * params[norm]["norm"]["scale"] + params[norm]["norm"]["bias"]
        return np.maximum(y, 0) if neck.activation == "relu" else y

    def upsample(x, level):
        size = features[level].shape[1:3]
        if neck.upsampling == "bilinear":
            return slow_resize(x, size)
        if neck.upsampling == "transposed":
            return slow_transposed(x, params[f"upsample{level}"]["kernel"], size)
        return np.stack([np.stack([x[:, i // 2, j // 2] for j in range(size[1])], 1) for i in range(size[0])], 1)

    levels = sorted(neck.levels or features)

    def merged(level):
        coarser = level + 1 if neck.top_down and level < levels[-1] else None
        lateral = layer(features[level], "lateral", level) if neck.lateral or level == levels[-1] else None
        if coarser is None:
            return lateral
        from_above = upsample(merged(coarser), level)
        if lateral is None:
            return from_above
        if neck.merge == "concat":
            return layer(np.concatenate([lateral, from_above], -1), "merge", level)
        return lateral + from_above

    outputs = neck.outputs or levels
    pyramid = {x: layer(merged(x), "smooth", x) if neck.smooth else merged(x) for x in outputs}
    if neck.extra_level:
        pyramid[max(outputs) + 1] = pyramid[max(outputs)][:, ::2, ::2]
    return pyramid


SWITCHES = {
    "paper": {},
    "levels": {"levels": (3, 4)},
    "outputs": {"outputs": (2,)},
    "coarse_outputs": {"outputs": (5, 4)},
    "no_lateral": {"lateral": False},
    "no_top_down": {"top_down": False},
    "no_smooth": {"smooth": False},
    "bilinear": {"upsampling": "bilinear"},
    "transposed": {"upsampling": "transposed"},
    "concat": {"merge": "concat"},
    "relu": {"activation": "relu"},
    "no_extra": {"extra_level": False},
    "gn": {"norm": "gn"},
    "bn": {"norm": "bn"},
    "outputs_of_levels": {"levels": (3, 4, 5), "outputs": (3,), "upsampling": "bilinear", "norm": "gn"},
    "bottom_up_with_a_gap": {"levels": (2, 4), "top_down": False, "activation": "relu", "extra_level": False},
    "one_of_bottom_up": {"top_down": False, "outputs": (2,)},
    "coarsest_alone": {"top_down": False, "lateral": False, "outputs": (5,)},
    "no_lateral_transposed": {"lateral": False, "upsampling": "transposed", "outputs": (2,), "activation": "relu"},
    "concat_relu_gn": {"merge": "concat", "activation": "relu", "norm": "gn", "smooth": False, "outputs": (2, 3)},
    "concat_transposed_bn": {"merge": "concat", "upsampling": "transposed", "norm": "bn", "levels": (4, 5)},
}
SIZES = {2: (9, 12), 3: (5, 6), 4: (3, 3), 5: (2, 2)}  # odd ones are cut to: 9 of 10, 5 of 6, 3 of 4


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_the_neck_is_its_slow_twin_and_has_no_more_weights_than_that_reads(switches):
    features, neck = maps(SIZES), FPN(channels=4, **switches)
    variables = filled(neck, features)
    params, stats = Weights(variables["params"]), variables.get("batch_stats", {})
    expected = slow_fpn(neck, params, stats, features)
    found = apply(neck, variables, features)
    assert set(found) == set(expected) == set(neck.output_levels((2, 3, 4, 5)))
    for level, x in expected.items():
        np.testing.assert_allclose(found[level], x, atol=1e-5, err_msg=f"level {level}")
    assert set(params) == params.read


def test_names_of_the_necks_weights_by_the_papers_rows():
    def names(**switches):
        return set(jax.eval_shape(FPN(channels=4, **switches).init, jax.random.key(0), maps(SIZES))["params"])

    laterals, smooths = ({f"{name}{level}" for level in (2, 3, 4, 5)} for name in ("lateral", "smooth"))
    assert names() == names(top_down=False) == names(upsampling="bilinear") == laterals | smooths
    assert names(lateral=False) == {"lateral5"} | smooths
    assert names(outputs=(2,)) == laterals | {"smooth2"}
    assert names(top_down=False, outputs=(2,)) == {"lateral2", "smooth2"}
    assert names(levels=(3, 4, 5)) == (laterals | smooths) - {"lateral2", "smooth2"}
    assert names(smooth=False) == laterals
    assert names(merge="concat") == laterals | smooths | {"merge2", "merge3", "merge4"}
    assert names(upsampling="transposed") == laterals | smooths | {"upsample2", "upsample3", "upsample4"}


@pytest.mark.parametrize(
    ("switches", "reads"),
    [
        ({}, {2: {2, 3, 4, 5}, 3: {3, 4, 5}, 4: {4, 5}, 5: {5}, 6: {5}}),
        ({"top_down": False}, {2: {2}, 3: {3}, 4: {4}, 5: {5}, 6: {5}}),  # row (d)
        ({"lateral": False}, {2: {5}, 3: {5}, 4: {5}, 5: {5}, 6: {5}}),  # row (e)
        ({"outputs": (2,), "extra_level": False}, {2: {2, 3, 4, 5}}),  # row (f)
    ],
    ids=["fpn", "bottom_up", "no_lateral", "finest"],
)
def test_which_c_each_p_reads(switches, reads):
    features, neck = maps(SIZES, b=1), FPN(channels=4, **switches)
    variables = filled(neck, features)

    @jax.jit
    def gradients(features):  # {P: {C: gradient}}, of every P by itself
        pyramid, backward = jax.vjp(lambda x: neck.apply(variables, x), features)
        return {
            p: backward({q: jnp.ones_like(y) if p == q else jnp.zeros_like(y) for q, y in pyramid.items()})[0]
            for p in pyramid
        }

    found = {p: {c for c, g in of_c.items() if np.any(g)} for p, of_c in gradients(features).items()}
    assert found == reads


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (5, 7)])
def test_a_transposed_convolution_begins_as_bilinear_doubling_and_is_learnt(size):
    x = maps({2: (3, 4)})[2]
    layer = Upsample("transposed")
    variables = layer.init(jax.random.key(0), x, size)
    doubled = slow_resize(x, (6, 8))[:, : size[0], : size[1]]
    loss = jax.jit(lambda v: ((layer.apply(v, x, size) - 1) ** 2).sum())
    np.testing.assert_allclose(layer.apply(variables, x, size), doubled, atol=1e-6)
    gradient = np.asarray(jax.grad(loss)(variables)["params"]["kernel"])
    assert gradient.shape == (4, 4, 1, 3)
    assert (gradient != 0).all()


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (3, 4)])
def test_bilinear_upsampling_is_its_slow_twin(size):
    x = maps({2: (3, 4)})[2]
    np.testing.assert_allclose(Upsample("bilinear").apply({}, x, size), slow_resize(x, size), atol=1e-6)


def test_without_a_neck_maps_are_what_they_were():
    features = maps(SIZES)
    assert Bare().apply({}, features) == features
    assert Bare(levels=(4, 2)).apply({}, features) == {4: features[4], 2: features[2]}
    assert Bare().output_levels((2, 3)) == (2, 3)
    assert Bare(levels=(3,)).output_levels((2, 3)) == (3,)


TINY = ResNet(depth=18, blocks=(1, 1), width=4, norm="gn", frozen_stages=1)


def test_the_image_pyramid_is_the_network_on_every_resized_image_and_sums_their_gradients():
    scales = (0.5, 2.0, 1.0)  # in any order
    image = np.float32(np.random.default_rng(0).normal(size=(1, 32, 24, 3)))
    pyramid = ImagePyramid(TINY, scales=scales, level=3)
    assert pyramid.output_levels() == (4, 2, 3)
    variables = filled(TINY, image)
    resized = {4: slow_resize(image, (16, 12)), 2: slow_resize(image, (64, 48)), 3: image}

    @jax.jit
    def of(params, inputs):
        def by_pyramid(params):
            found = pyramid.apply({"params": params}, image)
            return sum((x**2).sum() for x in found.values()), found

        def by_net(params, x):
            found = TINY.apply({"params": params}, x)[3]
            return (found**2).sum(), found

        one_by_one = {level: jax.grad(by_net, has_aux=True)(params, x) for level, x in inputs.items()}
        return jax.grad(by_pyramid, has_aux=True)(params), one_by_one

    (gradient, found), one_by_one = of(variables["params"], {x: np.float32(y) for x, y in resized.items()})
    assert {level: x.shape for level, x in found.items()} == {2: (1, 8, 6, 8), 3: (1, 4, 3, 8), 4: (1, 2, 2, 8)}
    for level, (_, expected) in one_by_one.items():
        np.testing.assert_allclose(found[level], expected, atol=2e-5, err_msg=f"level {level}")
    total = jax.tree.map(lambda *x: sum(x), *(g for g, _ in one_by_one.values()))
    total = dict(jax.tree_util.tree_leaves_with_path(total))
    for path, x in jax.tree_util.tree_leaves_with_path(gradient):
        np.testing.assert_allclose(x, total[path], atol=1e-4 * np.abs(total[path]).max(), err_msg=str(path))
        assert np.any(x) == (not path[0].key.startswith("stem_"))  # the stem is frozen


def test_the_image_pyramid_has_the_networks_own_weights_and_freezes_the_same():
    def shapes(module):
        return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))

    net = ResNet(depth=50, blocks=(3, 4, 6))
    pyramid = ImagePyramid(net, scales=(2.0, 1.0, 0.5, 0.25), level=4)
    assert shapes(pyramid) == shapes(net)
    assert pyramid.frozen_prefixes == net.frozen_prefixes == ("stem_", "stage2_")
    assert pyramid.output_levels() == (3, 4, 5, 6)


def test_rpn_heads_of_their_own_have_weights_of_each_level_alone():
    pyramid = maps({2: (4, 5), 4: (2, 3)}, channels=lambda level: 2 * level)
    own = RPNHead(anchors=2, convs=2, shared=False)
    variables = filled(own, pyramid)
    names = ("conv", "conv2", "objectness", "deltas")
    params = variables["params"]
    assert set(params) == {f"{name}_level{level}" for name in names for level in (2, 4)}
    assert {level: params[f"conv_level{level}"]["kernel"].shape for level in (2, 4)} == {
        2: (3, 3, 4, 4),
        4: (3, 3, 8, 8),
    }
    shared = RPNHead(anchors=2, convs=2)
    found = apply(own, variables, pyramid)
    for level, x in pyramid.items():
        alone = {"params": {name: params[f"{name}_level{level}"] for name in names}}
        expected = apply(shared, alone, {level: x})
        for which in (0, 1):
            np.testing.assert_allclose(found[which][level], expected[which][level], atol=1e-6)
    # Against convolutions written out, with ReLU between them: rows, columns, anchors.
    x = pyramid[4]
    for name in ("conv_level4", "conv2_level4"):
        x = np.maximum(slow_conv(x, **params[name]), 0)
    np.testing.assert_allclose(found[0][4], slow_conv(x, **params["objectness_level4"]).reshape(2, -1), atol=1e-5)
    np.testing.assert_allclose(found[1][4], slow_conv(x, **params["deltas_level4"]).reshape(2, -1, 4), atol=1e-5)


def test_the_rpn_heads_width_is_the_levels_or_the_one_asked_for():
    def shapes(pyramid, **attributes):
        head = RPNHead(anchors=3, **attributes)
        return {
            n: x["kernel"].shape for n, x in jax.eval_shape(head.init, jax.random.key(0), pyramid)["params"].items()
        }

    pyramid = maps({2: (4, 5), 3: (2, 3)}, channels=lambda level: 6)
    assert shapes(pyramid) == {"conv": (3, 3, 6, 6), "objectness": (1, 1, 6, 3), "deltas": (1, 1, 6, 12)}
    wide = {"conv": (3, 3, 6, 7), "conv2": (3, 3, 7, 7), "objectness": (1, 1, 7, 3), "deltas": (1, 1, 7, 12)}
    assert shapes(pyramid, channels=7, convs=2) == wide
    apart = shapes(pyramid, channels=7, convs=2, shared=False)
    assert apart == {f"{name}_level{level}": shape for name, shape in wide.items() for level in (2, 3)}


@pytest.mark.parametrize("background", ["first", "last"])
def test_every_roi_gets_its_own_levels_box_head_and_teaches_no_other(background):
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(2, 5, 3, 3, 4)))
    levels = np.array([[2, 3, 2, 4, 2], [4, 4, 2, 2, 4]], np.int32)  # one RoI of level 3
    attributes = {"num_classes": 3, "background": background, "channels": 6, "convs": 1, "conv_channels": 5}
    apart = BoxHead(separate_levels=(2, 3, 4), **attributes)
    alone = BoxHead(**attributes)
    variables = filled(apart, x, False, levels)
    params = variables["params"]
    assert set(params) == {"level2", "level3", "level4"}
    like_one = jax.eval_shape(lambda: alone.init(jax.random.key(0), x))["params"]
    assert all(jax.tree.map(np.shape, params[name]) == jax.tree.map(np.shape, like_one) for name in params)

    @jax.jit
    def run(params, levels, counted):
        def loss(params):
            logits, deltas = apart.apply({"params": params}, x, False, levels)
            return ((logits**2).sum(-1) + (deltas**2).sum((-1, -2)))[counted].sum(), (logits, deltas)

        return *jax.grad(loss, has_aux=True)(params), {n: alone.apply({"params": p}, x) for n, p in params.items()}

    not_level_3 = np.nonzero(levels != 3)
    gradients, found, each = run(params, levels, not_level_3)
    for i, j in np.ndindex(levels.shape):
        for which in (0, 1):
            expected = each[f"level{levels[i, j]}"][which][i, j]
            np.testing.assert_allclose(found[which][i, j], expected, atol=1e-6)
    touched = {name: any(np.any(g) for g in jax.tree.leaves(tree)) for name, tree in gradients.items()}
    assert touched == {"level2": True, "level3": False, "level4": True}
    assert all(np.any(g) for name in ("level2", "level4") for g in jax.tree.leaves(gradients[name]))


@pytest.mark.parametrize(("depth", "in_1x1", "background"), [(18, False, "first"), (50, True, "last")])
def test_the_conv5_head_is_the_networks_last_stage_its_mean_and_two_layers(depth, in_1x1, background):
    how = {"depth": depth, "width": 4, "norm": "frozen_bn", "norm_eps": 1e-3, "stride_in_1x1": in_1x1}
    net = ResNet(blocks=(1, 1, 1, 2), **how)
    image = np.float32(np.random.default_rng(0).normal(size=(6, 64, 48, 3)))
    variables = filled(net, image, seed=1)
    features = apply(net, variables, image)
    head = Conv5Head(num_classes=3, background=background, blocks=2, **how)
    rois = features[4].reshape(2, 3, *features[4].shape[1:])  # every picture as one RoI
    own = filled(head, rois)
    layers = {"classes", "deltas"}
    of_net = {name for name in variables["params"] if name.startswith("stage5_")}
    assert set(own["params"]) == of_net | layers
    for kind in ("params", "batch_stats"):
        own[kind] |= {name: variables[kind][name] for name in of_net}
    logits, deltas = apply(head, own, rois)
    mean = features[5].mean((1, 2)).reshape(2, 3, -1)
    assert np.std(mean) > 0.01
    for found, name in ((logits, "classes"), (deltas.reshape(2, 3, -1), "deltas")):
        expected = mean @ own["params"][name]["kernel"] + own["params"][name]["bias"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert deltas.shape == (2, 3, 4 if background == "first" else 3, 4)


def test_the_conv5_head_fits_the_published_stage_at_either_stride():
    net = jax.eval_shape(lambda: ResNet().init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    for stride, size in ((2, 14), (1, 7)):
        head = Conv5Head(num_classes=80, stride=stride)
        own = jax.eval_shape(lambda h=head, n=size: h.init(jax.random.key(0), jnp.zeros((1, 2, n, n, 1024))))
        for kind in ("params", "batch_stats"):
            stage5 = {name: tree for name, tree in net[kind].items() if name.startswith("stage5_")}
            assert {name: tree for name, tree in own[kind].items() if name.startswith("stage")} == stage5
        assert own["params"]["classes"]["kernel"].shape == (2048, 81)
    assert len(stage5) == 3


def test_all_switches_together_keep_float32_weights_in_bfloat16():
    features = {level: x.astype(jnp.bfloat16) for level, x in maps(SIZES).items()}
    for upsampling, merge, norm in itertools.product(("bilinear", "transposed"), ("sum", "concat"), ("none", "gn")):
        neck = FPN(channels=4, upsampling=upsampling, merge=merge, norm=norm, dtype=jnp.bfloat16)
        pyramid, variables = jax.eval_shape(lambda n=neck: n.init_with_output(jax.random.key(0), features))
        assert {x.dtype for x in pyramid.values()} == {jnp.dtype(jnp.bfloat16)}
        assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
