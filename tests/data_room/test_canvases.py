"""Memory that is used again, but never while somebody looks at it."""

import gc
import pickle

import numpy as np
import pytest

from fpn_jax.data.canvases import Canvases


def _address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_it_is_let_go():
    pool = Canvases(96)
    first = pool.take((2, 4, 4, 3), np.uint8)
    where = _address(first)
    second = pool.take((2, 4, 4, 3), np.uint8)
    assert _address(second) != where
    del first
    third = pool.take((2, 3), np.float32)
    assert _address(third) == where and third.shape == (2, 3) and third.dtype == np.float32
    third[:] = 7  # may be written to


@pytest.mark.parametrize("view", [lambda x: x[1:], lambda x: x.reshape(-1)[::2], memoryview, lambda x: x.view(np.int8)])
def test_a_view_keeps_it(view):
    pool = Canvases(96)
    array = pool.take((2, 48), np.uint8)
    where, kept = _address(array), view(array)
    del array
    assert _address(pool.take((96,), np.uint8)) != where
    del kept
    gc.collect()
    addresses = {_address(x) for x in [pool.take((96,), np.uint8) for _ in range(3)]}
    assert where in addresses


def test_what_jax_was_given_stays_as_it_was():
    """On a CPU jax looks at an array's memory where it can, instead of copying it."""
    import jax

    pool = Canvases(1 << 16)
    given = [jax.device_put(_filled(pool, i)) for i in range(8)]
    jax.block_until_ready(given)
    others = [_filled(pool, 99) for _ in range(8)]
    assert [int(x.max()) for x in given] == [int(x.min()) for x in given] == list(range(8))
    assert all((x == 99).all() for x in others)


def _filled(pool, value):
    array = pool.take((1 << 16,), np.uint8)
    array[:] = value
    return array


def test_too_large_an_array_is_refused():
    with pytest.raises(ValueError, match="more than 96 bytes"):
        Canvases(96).take((97,), np.uint8)


def test_a_pickled_pool_starts_empty():
    pool = Canvases(1 << 16)
    pool.take((1 << 16,), np.uint8)  # and let go
    pickled = pickle.dumps(pool)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).take((1 << 16,), np.uint8).nbytes == 1 << 16
