"""Sampling: exact counts in every regime, no repeats, and uniform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.ops import sampling

sample = jax.jit(sampling.sample, static_argnames=("num", "fraction"))
R, NUM, FRACTION = 40, 16, 0.25  # at most 4 positives


def masks(positives, negatives, seed=0):
    order = np.random.default_rng(seed).permutation(R)
    positive, negative = np.zeros((2, R), bool)
    positive[order[:positives]] = True
    negative[order[positives : positives + negatives]] = True
    return positive, negative


draw = partial(sample, num=NUM, fraction=FRACTION)


@pytest.mark.parametrize("key", [None, 0])
@pytest.mark.parametrize(
    ("positives", "negatives"),
    [(10, 30), (4, 12), (2, 30), (0, 30), (10, 5), (1, 1), (10, 0), (0, 0), (3, 13), (40, 0), (0, 40)],
)
def test_counts(key, positives, negatives):
    positive, negative = masks(positives, negatives)
    drawn = draw(None if key is None else jax.random.key(key), positive, negative)
    index, is_positive, valid = map(np.asarray, drawn)
    expected_positives = min(positives, 4)
    expected_negatives = min(negatives, NUM - expected_positives)
    assert valid.tolist() == [i < expected_positives + expected_negatives for i in range(NUM)]
    assert is_positive.tolist() == [i < expected_positives for i in range(NUM)]
    assert positive[index[is_positive]].all() and negative[index[valid & ~is_positive]].all()
    assert len(set(index[valid])) == valid.sum()
    assert (index[~valid] == 0).all() and index.dtype == np.int32
    if key is None:
        first = np.flatnonzero(positive)[:expected_positives], np.flatnonzero(negative)[:expected_negatives]
        assert index[valid].tolist() == np.concatenate(first).tolist()


@pytest.mark.parametrize(("r", "num", "fraction"), [(3, 8, 0.5), (0, 4, 0.5), (6, 4, 0.0), (6, 4, 1.0), (8, 7, 0.25)])
def test_more_rows_than_candidates_and_extreme_fractions(r, num, fraction):
    positive = np.arange(r) % 2 == 0
    drawn = sample(jax.random.key(0), jnp.asarray(positive), jnp.asarray(~positive), num=num, fraction=fraction)
    positives = min(int(positive.sum()), int(num * fraction))
    assert drawn.positive.sum() == positives
    assert drawn.valid.sum() == positives + min(int((~positive).sum()), num - positives)
    assert drawn.index.shape == drawn.valid.shape == (num,)


def test_every_pair_of_candidates_is_equally_likely():
    """Chi-square over which two of six positives and which two of five negatives were drawn, 4000 draws."""
    positive, negative = np.arange(12) < 6, (np.arange(12) >= 6) & (np.arange(12) < 11)
    keys = jax.random.split(jax.random.key(3), 4000)
    index = np.asarray(jax.jit(jax.vmap(lambda k: sample(k, positive, negative, num=4, fraction=0.5).index))(keys))
    for columns, pairs in ((index[:, :2], 15), (index[:, 2:], 10)):
        columns = np.sort(columns, axis=1)
        _, counts = np.unique(columns[:, 0] * 12 + columns[:, 1], return_counts=True)
        assert len(counts) == pairs
        expected = len(index) / pairs
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 36.1  # the .1 % point for 14 degrees of freedom (9: 27.9)


def test_keys_decide():
    positive, negative = masks(20, 20)
    a, b, c = (draw(jax.random.key(seed), positive, negative).index for seed in (0, 0, 1))
    assert a.tolist() == b.tolist() != c.tolist()
