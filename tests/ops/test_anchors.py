"""Anchors against torchvision's and against what the paper asks of them."""

import numpy as np
import pytest

from fpn_jax.ops.anchors import cell_anchors, grid_anchors

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
    grids = {level: (int(h), int(w)) for level, (h, w) in enumerate(golden[f"anchors/{case}/grids"], 2)}
    cells = {level: cell_anchors(s, ratios) for level, s in zip(grids, sizes, strict=True)}
    anchors = grid_anchors(grids, cells, {level: (height // h, width // w) for level, (h, w) in grids.items()})
    assert list(anchors) == list(grids) and all(x.dtype == np.float32 for x in anchors.values())
    np.testing.assert_array_equal(np.concatenate(list(cells.values())), golden[f"anchors/{case}/cells"])
    np.testing.assert_array_equal(np.concatenate(list(anchors.values())), golden[f"anchors/{case}"])


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
    anchors = grid_anchors({3: (2, 3)}, {3: cells}, {3: (8, 10)})[3].reshape(2, 3, 2, 4)
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(anchors[i, j], cells + np.float32([10 * j, 8 * i, 10 * j, 8 * i]))


def test_unknown_order():
    with pytest.raises(ValueError, match="ratio_major"):
        cell_anchors((32,), (1.0,), order="rows")
