"""Stages computed again in the backward pass keep less for it and change nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.errors import UserError
from fpn_jax.models.backbones.mobilenet import MobileNetV3
from fpn_jax.models.backbones.resnet import ResNet

IMAGE = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


def resnet(**changes):
    return ResNet(**({"depth": 18, "blocks": (2, 1, 1), "width": 4, "norm": "bn", "frozen_stages": 1} | changes))


def loss_of(net, variables):
    """loss(params) -> (loss, new statistics)"""

    def loss(params):
        maps, updated = net.apply(variables | {"params": params}, IMAGE, train=True, mutable=["batch_stats"])
        return sum((x**2).mean() for x in maps.values()), updated

    return loss


def kept(net):
    """Numbers kept between the forward and the backward pass."""
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), IMAGE))

    def backward(variables):
        return jax.vjp(loss_of(net, variables), variables["params"], has_aux=True)[1]

    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(backward, variables)))


def test_gradients_and_statistics_are_the_same_and_names_stay():
    plain, again = resnet(), resnet(remat=(2, 4))
    variables = jax.jit(plain.init)(jax.random.key(0), IMAGE)
    shapes = jax.eval_shape(lambda: again.init(jax.random.key(0), IMAGE))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    one, other = (
        jax.jit(jax.grad(loss_of(net, variables), has_aux=True))(variables["params"]) for net in (plain, again)
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_each_stage_keeps_less_unless_it_is_frozen():
    plain, second, third = kept(resnet()), kept(resnet(remat=(2,))), kept(resnet(remat=(3,)))
    assert second < 0.8 * plain
    assert third < plain
    both = kept(resnet(remat=(2, 3)))
    assert both < min(second, third)
    between = 2 * 8 * 8 * 4  # the map from one to the other: kept by both, as one's result and the other's argument
    assert 0 <= both - (second + third - plain) <= between
    assert kept(resnet(remat=(2,), frozen_stages=2)) == kept(resnet(frozen_stages=2))


def test_mobilenet_keeps_less_by_level():
    plain, fourth = kept(MobileNetV3(norm="gn")), kept(MobileNetV3(norm="gn", remat=(4,)))
    assert fourth < plain
    assert kept(MobileNetV3(norm="gn", remat=(2, 3))) == plain  # frozen by default
    assert kept(MobileNetV3(norm="gn", remat=(4, 5))) < fourth


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (resnet(remat=(1,)), r"model.backbone.remat is \(1,\); choose some of the stages 2, 3, 4$"),
        (resnet(remat=(4,), last_level=3), r"model.backbone.remat is \(4,\); choose some of the stages 2, 3$"),
        (MobileNetV3(remat=(6,), levels=(4, 5)), r"model.backbone.remat is \(6,\); choose .* 2, 3, 4, 5$"),
    ],
)
def test_stages_that_are_not_there_are_refused(net, message):
    with pytest.raises(UserError, match=message):
        net.output_levels()
