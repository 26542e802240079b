"""Anchors against torchvision's and against what the paper asks of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fpn_jax.ops.anchors import AnchorGrid, cell_anchors
from fpn_jax.ops.boxes import iou

RETINANET = ((32, 40, 50), (64, 80, 101), (128, 161, 203), (256, 322, 406), (512, 645, 812))
CASES = {
    "rpn_96x128": (((32,), (64,), (128,), (256,), (512,)), (0.5, 1.0, 2.0)),
    "retinanet_96x128": (RETINANET, (0.5, 1.0, 2.0)),
    "fcos_96x128": (((8,), (16,), (32,), (64,), (128,)), (1.0,)),
    "three_sizes_64x64": (((16, 32, 64),), (0.4, 1.0, 2.5)),
    "quirk_100x140": (((32,), (64,)), (0.5, 1.0, 2.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_goldens(case, data_dir):
    golden = np.load(data_dir / "ops.npz")
    sizes, ratios = CASES[case]
    height, width = map(int, case.split("_")[-1].split("x"))
    grids = golden[f"anchors/{case}/grids"].tolist()
    cells = [cell_anchors(s, ratios) for s in sizes]
    anchors = [
        AnchorGrid((h, w), cell, (height // h, width // w)).boxes() for (h, w), cell in zip(grids, cells, strict=True)
    ]
    assert all(x.dtype == np.float32 for x in anchors)
    np.testing.assert_array_equal(np.concatenate(cells), golden[f"anchors/{case}/cells"])
    np.testing.assert_array_equal(np.concatenate(anchors), golden[f"anchors/{case}"])


def test_unrounded_anchors_have_their_area_and_ratio_in_either_order():
    sizes, ratios = (16.0, 25.3), (0.5, 1.0, 2.0)
    expected = {
        "ratio_major": [(s, q) for q in ratios for s in sizes],
        "size_major": [(s, q) for s in sizes for q in ratios],
    }
    for order, pairs in expected.items():
        x1, y1, x2, y2 = cell_anchors(sizes, ratios, rounded=False, order=order).T
        np.testing.assert_allclose(np.sqrt((x2 - x1) * (y2 - y1)), [s for s, _ in pairs], rtol=1e-6)
        np.testing.assert_allclose((y2 - y1) / (x2 - x1), [q for _, q in pairs], rtol=1e-6)
        np.testing.assert_allclose([x1, y1], [-x2, -y2])


def test_row_column_anchor_order_and_strides():
    cells = np.float32([[-1, -2, 1, 2], [-3, -3, 3, 3]])
    anchors = AnchorGrid((2, 3), cells, (8, 10)).boxes().reshape(2, 3, 2, 4)
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(anchors[i, j], cells + np.float32([10 * j, 8 * i, 10 * j, 8 * i]))


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (70, 130)])
def test_highest_iou_is_that_of_all_anchors(rounded, size):
    """To the bit, or no anchor would be an object's best; also where sides are rounded here so, there so."""
    rng = np.random.default_rng(size[1])
    cells = cell_anchors((30.3, 64.0), (0.5, 1.0, 2.0), rounded)
    grid = AnchorGrid(size, cells, (8, 12))
    corners = rng.uniform(-60, 600, (60, 2)) * (2.6, 1)
    objects = np.concatenate([corners, corners + rng.lognormal(3.5, 1, (60, 2))], -1).astype(np.float32)
    objects[:20] = np.round(objects[:20])
    objects[20] = grid.boxes()[0]
    objects[21] = 0
    objects[22] = -100, -100, -90, -90  # touches nothing
    objects[23] = 10, 10, 5, 20
    objects[24] = -1e18, -1e18, 1e18, 1e18
    objects[25:29][np.eye(4, dtype=bool)] = np.nan
    found = np.asarray(jax.jit(grid.highest_iou)(objects))
    expected = np.asarray(jax.jit(lambda objects: iou(objects, grid.boxes()).max(1))(objects))
    assert (found > 0.5).any() and found[20] == 1 and found[22] == 0
    poisoned = np.isnan(objects).any(1)
    np.testing.assert_array_equal(found[~poisoned], expected[~poisoned])
    # XLA's CPU backend makes -inf of a long row of NaN; the one ties with an anchor as little as the other.
    assert not np.isfinite(found[poisoned]).any()
    if not rounded and size[1] > 9:
        sides = grid.boxes()[:, 2:] - grid.boxes()[:, :2]
        assert len(jnp.unique(sides, axis=0)) > len(cells)


def test_unknown_order():
    with pytest.raises(ValueError, match="ratio_major"):
        cell_anchors((32,), (1.0,), order="rows")
