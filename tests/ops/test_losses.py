"""Losses against float64 formulas, torchvision, and their own gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fpn_jax.ops import losses as loss_ops

smooth_l1 = jax.jit(loss_ops.smooth_l1, static_argnums=2)
sigmoid_bce, softmax_ce = jax.jit(loss_ops.sigmoid_bce), jax.jit(loss_ops.softmax_ce)

LOGITS = np.float32([-1e30, -1e4, -88, -20, -1, -1e-6, 0, 1e-6, 1, 20, 88, 1e4, 1e30])


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0])
def test_smooth_l1(beta):
    x = np.float32([-1e20, -3, -beta, -beta / 2, 0, beta / 2, beta, 3, 1e20])
    size = np.abs(x).astype(np.float64)
    expected = np.where(size < beta, 0.5 * size**2 / max(beta, 1e-9), size - 0.5 * beta)
    np.testing.assert_allclose(smooth_l1(x + np.float32(2) - 2, np.float32(0), beta), expected, rtol=1e-5, atol=1e-7)
    gradient = jax.grad(lambda x: smooth_l1(x, 0.0, beta).sum())(jnp.asarray(x))
    np.testing.assert_allclose(gradient, np.sign(x) if beta == 0 else np.clip(x / beta, -1, 1), rtol=1e-6)
    assert gradient[4] == 0


def test_sigmoid_bce():
    x = np.clip(LOGITS.astype(np.float64), -700, 700)
    for target in (0.0, 0.3, 1.0):
        # -t log p - (1 - t) log(1 - p); log1p of the smaller exponential keeps the digits in float64 too
        expected = target * np.logaddexp(0, -x) + (1 - target) * np.logaddexp(0, x)
        got = sigmoid_bce(LOGITS, np.float32(target))
        inner = np.abs(LOGITS) < 700
        np.testing.assert_allclose(got[inner], expected[inner], rtol=1e-6, atol=1e-37)
        assert np.isfinite(got).all() and (got >= 0).all()
        gradient = jax.grad(lambda x, t=target: sigmoid_bce(x, t).sum())(jnp.asarray(LOGITS))
        np.testing.assert_allclose(gradient, 1 / (1 + np.exp(-x)) - target, rtol=1e-5, atol=1e-7)


def test_softmax_ce():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 5, (20, 4)).astype(np.float32), rng.integers(0, 4, 20)
    exponentials = np.exp(logits.astype(np.float64))
    expected = -np.log(exponentials[np.arange(20), labels] / exponentials.sum(-1))
    np.testing.assert_allclose(softmax_ce(logits, labels), expected, rtol=1e-5, atol=1e-6)
    check_grads(lambda x: softmax_ce(x, labels), (jnp.asarray(logits),), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)
    extreme = np.float32([[1e4, -1e4, 0, 0], [0, 0, 0, 1e30]])
    values, gradient = jax.value_and_grad(lambda x: softmax_ce(x, np.int32([1, 3])).sum())(extreme)
    assert values == 2e4 and np.isfinite(gradient).all()


def test_goldens(data_dir):
    golden = np.load(data_dir / "ops.npz")
    got = smooth_l1(golden["smooth_l1/input"], golden["smooth_l1/target"], 1 / 9)
    np.testing.assert_allclose(got, golden["smooth_l1/beta_1_9"], rtol=1e-6, atol=1e-7)


def test_the_box_head_losses_of_torchvision(data_dir):
    golden = {k.split("/")[1]: v for k, v in np.load(data_dir / "ops.npz").items() if k.startswith("fastrcnn_loss/")}
    labels, targets = golden["labels"], golden["targets"]
    positive = labels > 0

    def losses(logits, deltas):
        own = jnp.take_along_axis(deltas.reshape(60, 6, 4), labels[:, None, None], axis=1)[:, 0]
        box = jnp.where(positive[:, None], smooth_l1(own, targets, 1 / 9), 0).sum() / len(labels)
        return softmax_ce(logits, labels).mean(), box

    classifier, box = jax.jit(losses)(golden["logits"], golden["deltas"])
    np.testing.assert_allclose(classifier, golden["loss_classifier"], rtol=1e-6)
    np.testing.assert_allclose(box, golden["loss_box_reg"], rtol=1e-6)
    gradients = jax.jit(jax.grad(lambda *x: sum(losses(*x)), (0, 1)))(golden["logits"], golden["deltas"])
    np.testing.assert_allclose(gradients[0], golden["grad_logits"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradients[1], golden["grad_deltas"], rtol=1e-5, atol=1e-7)
