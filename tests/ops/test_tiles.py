"""Which tiles of a map a window is read from: all that it touches, and never more than there is room for."""

import numpy as np
import pytest

from fpn_jax.ops import tiles
from fpn_jax.ops.tiles import Windows, _cut, _pack, _pairs, _unpack, calls


def windows_of(area, n=4000):
    """Windows of up to `area` cells with 7 x 7 bins, of all sides, also wide, high and empty ones: float32 [n 4]."""
    rng = np.random.default_rng(0)
    height = np.exp(rng.uniform(-1, np.log(300), n))
    width = area / height * np.where(rng.random(n) < 0.5, 1, rng.random(n))
    start = rng.uniform(-20, [110, 190], (n, 2))
    # The worst: touching the last cell of a tile, and at its end the first of another.
    start[::2] = 16 * np.floor(start[::2] / 16) + 14.999
    height[::2] = 16 * np.floor(height[::2] / 16) + 0.002
    width[::2] = area / height[::2]
    return np.stack([start[:, 0], height / 7, start[:, 1], width / 7], 1).astype(np.float32)


@pytest.mark.parametrize("area", [9.0, 784.0, 3000.0])
@pytest.mark.parametrize("size", [(104, 168), (50, 21), (3, 5)])
def test_pairs_are_all_tiles_that_a_window_touches(size, area):
    places, mine = windows_of(area), np.random.default_rng(1).random(4000) < 0.9
    grid = _cut(size, Windows(7, 2, area))
    row, column, there = (np.asarray(x) for x in _pairs(places, mine, grid, 7))
    assert grid.shape == (-(-size[0] // 16), -(-size[1] // 32))
    for i in range(len(places)):
        expected = []
        if mine[i]:
            ends = []
            for axis in (0, 1):
                low = np.floor(places[i, 2 * axis])
                high = np.floor(places[i, 2 * axis] + np.float32(7) * places[i, 2 * axis + 1]) + 1
                ends.append(np.clip([low, high], 0, size[axis] - 1).astype(int) // tiles.TILE[axis])
            (top, bottom), (left, right) = ends
            expected = [(y, x) for y in range(top, bottom + 1) for x in range(left, right + 1)]
        assert list(zip(row[i][there[i]], column[i][there[i]], strict=True)) == expected


def test_a_window_can_touch_as_many_tiles_as_there_is_room_for():
    """From the last cell of a tile over whole ones to the first of another, though hardly longer than those."""
    places = np.float32([[15.999, 31.002 / 7, 31.999, 31.002 / 7]])
    grid = _cut((64, 96), Windows(7, 2, 31.002**2))
    _, _, there = _pairs(places, np.array([True]), grid, 7)
    assert there.sum() == grid.most == 12


@pytest.mark.parametrize("lengths", [(2, 5, 13, 11), (9, 513, 1, 1), (1, 1, 1, 7)])
def test_packed_numbers_are_in_order(lengths):
    values = list(np.ndindex(*lengths))
    packed = [_pack(value, lengths) for value in values]
    assert packed == sorted(set(packed)) and max(packed) < 2**31
    assert [_unpack(x, lengths) for x in packed] == values


def test_more_pairs_than_int32_has_numbers_are_refused():
    with pytest.raises(ValueError, match="100000 x 1000 x 20 x 20 pairs are too many"):
        _pack((0, 0, 0, 0), (100000, 1000, 20, 20))


def test_calls_are_as_large_as_there_is_room():
    base, any_size = Windows(7, 2, 784.0), Windows(7, 2, float("inf"))
    sizes = [(208, 336), (104, 168)]
    assert calls(30, 512, sizes, [base] * 2)[:2] == [(slice(0, 12), slice(0, 6328)), (slice(12, 24), slice(0, 6328))]
    assert calls(2, 2000, sizes[:1], [any_size])[:2] == [
        (slice(0, 1), slice(0, 1291)),
        (slice(0, 1), slice(1291, 2582)),
    ]
    for b, r in ((0, 5), (5, 0)):
        assert calls(b, r, sizes, [base] * 2) == []
    for b, r in ((3, 20000), (64, 300)):
        seen = np.zeros((b, r), int)
        for images, some in calls(b, r, sizes, [base, any_size]):
            seen[images, some] += 1
            most = max(_cut(sizes[0], base).most, _cut(sizes[1], any_size).most)
            assert seen[images, some].size * (4 + most) <= tiles.MOST_NUMBERS
        assert (seen == 1).all()
