"""Resizing has torchvision's sizes, pixels and boxes; buckets hold what they are given."""

import cv2
import numpy as np
import pytest
from PIL import Image

from fpn_jax.data.transforms import assign_buckets, default_buckets, resize_boxes, resize_into, resized_size
from fpn_jax.errors import UserError


@pytest.mark.parametrize(("shorter", "longest"), [(800, 1333), (512, 853), (320, 640)])
def test_sizes_are_torchvisions(data_dir, shorter, longest):
    answers = np.load(data_dir / "resize_answers.npz")
    expected = answers[f"out_{shorter}_{longest}"]
    together = np.stack(resized_size(*answers["hw"].T, shorter, longest), 1)
    np.testing.assert_array_equal(together, expected)
    one_by_one = [resized_size(h, w, shorter, longest) for h, w in answers["hw"].tolist()]
    np.testing.assert_array_equal(one_by_one, expected)


def test_some_sides_lose_a_pixel_to_the_rounding_of_the_scale():
    assert resized_size(334, 500, 800, 1333) == (799, 1197)
    assert resized_size(334, 500, 800, 1333, "round") == (800, 1198)


def detectron2_size(h, w, shorter, longest):
    """ResizeShortestEdge.get_output_shape, as one reads it."""
    scale = shorter / min(h, w)
    new_h, new_w = (shorter, scale * w) if h < w else (scale * h, shorter)
    if max(new_h, new_w) > longest:
        scale = longest / max(new_h, new_w)
        new_h, new_w = new_h * scale, new_w * scale
    return int(new_h + 0.5), int(new_w + 0.5)


def test_rounded_sizes_are_detectron2s():
    sides = np.random.default_rng(0).integers(20, 2000, (500, 2))
    expected = [detectron2_size(h, w, 800, 1333) for h, w in sides.tolist()]
    np.testing.assert_array_equal(np.stack(resized_size(*sides.T, 800, 1333, "round"), 1), expected)
    assert resized_size(4, 10, 5, 100, "round") == detectron2_size(4, 10, 5, 100) == (5, 13)  # 12.5


def test_extreme_sizes_keep_a_pixel():
    for rounding in ("floor", "round"):
        assert resized_size(1, 5000, 800, 1333, rounding) == (1, 1333)
        assert resized_size(1, 1, 800, 1333, rounding) == (800, 800)


def test_an_unknown_rounding_is_refused():
    with pytest.raises(UserError, match=r"data\.rounding is 'ceil'; choose one of floor, round"):
        resized_size(3, 4, 8, 13, "ceil")


def bilinear(image, size):
    """Half-pixel centres, edges repeated, no smoothing: one axis after the other in float64."""
    result = image.astype(np.float64)
    for axis, (old, new) in enumerate(zip(image.shape, size, strict=False)):
        centre = (np.arange(new) + 0.5) * old / new - 0.5
        below = np.floor(centre).astype(int)
        weight = (centre - below).reshape([-1 if a == axis else 1 for a in range(3)])
        low, high = (np.take(result, np.clip(i, 0, old - 1), axis) for i in (below, below + 1))
        result = low * (1 - weight) + high * weight
    return result


@pytest.mark.parametrize("size", [(20, 26), (5, 9), (13, 17), (13, 40), (1, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_linear_resizing_and_padding(size, flip):
    image = np.random.default_rng(2).integers(0, 256, (13, 17, 3), np.uint8)
    canvas = np.zeros((22, 45, 3), np.uint8)
    resize_into(canvas, image, size, "linear", flip)
    expected = bilinear(image, size)[:, :: -1 if flip else 1]
    window = canvas[: size[0], : size[1]]
    assert np.abs(window - expected).max() <= 1.0
    assert np.abs(window - expected).mean() <= 0.4  # rounding, not a shift
    assert canvas.sum() == window.sum()  # the padding is untouched


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.uint8, 1.01), (np.float32, 2e-4)])
def test_pixels_are_torchvisions(data_dir, dtype, tolerance):
    """Its answers are normalised float32; our uint8 is rounded to integers before. The tolerance is in grey levels."""
    answers = np.load(data_dir / "resize_answers.npz")
    for i in range(3):
        image, size = answers[f"image{i}"], tuple(answers[f"size{i}"].tolist())
        normalised = answers[f"batch{i}"][0].transpose(1, 2, 0)
        canvas = np.zeros(normalised.shape, dtype)
        resize_into(canvas, image, size, "linear", flip=False)
        expected = (normalised * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]) * 255
        window = np.s_[: size[0], : size[1]]
        assert np.abs(canvas[window] - expected[window]).max() <= tolerance
        boxes = resize_boxes(answers[f"box{i}"], image.shape[:2], size)
        np.testing.assert_allclose(boxes, answers[f"box_out{i}"], rtol=1e-6)


@pytest.mark.parametrize("size", [(20, 26), (5, 9), (13, 17), (13, 40), (40, 5), (1, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_float32_canvas_is_not_rounded(size, flip):
    image = np.random.default_rng(2).integers(0, 256, (13, 17, 3), np.uint8)
    canvas = np.full((42, 45, 3), 7, np.float32)
    resize_into(canvas, image, size, "linear", flip)
    window = canvas[: size[0], : size[1]]
    np.testing.assert_allclose(window, bilinear(image, size)[:, :: -1 if flip else 1], atol=2e-4)
    assert (canvas[size[0] :] == 7).all() and (canvas[:, size[1] :] == 7).all()
    for interpolation in ("area", "antialias"):
        with pytest.raises(ValueError, match="gives uint8 only"):
            resize_into(canvas, image, (3, 3), interpolation, flip)


@pytest.mark.parametrize("pixels", [np.uint8, np.float32])
def test_an_image_is_mirrored_before_it_is_resized(pixels):
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    found, expected = np.zeros((2, 81, 107, 3), pixels)
    resize_into(found, image, (81, 107), "linear", flip=True)
    resize_into(expected, image[:, ::-1].copy(), (81, 107), "linear", flip=False)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [(90, 130), (20, 31), (53, 77), (100, 30), (20, 120), (1, 1)])
@pytest.mark.parametrize("flip", [False, True])
def test_antialias_is_pillows_to_the_bit(size, flip):
    image = np.random.default_rng(6).integers(0, 256, (53, 77, 3), np.uint8)
    canvas = np.full((110, 140, 3), 7, np.uint8)
    resize_into(canvas, image, size, "antialias", flip)
    picture = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    np.testing.assert_array_equal(canvas[: size[0], : size[1]], np.asarray(picture))
    assert (canvas[size[0] :] == 7).all() and (canvas[:, size[1] :] == 7).all()


def test_area_averages_what_it_shrinks():
    image = np.random.default_rng(3).integers(0, 256, (24, 32, 3), np.uint8)
    canvas = np.zeros((6, 8, 3), np.uint8)
    resize_into(canvas, image, (6, 8), "area", flip=False)
    expected = image.reshape(6, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(canvas - expected).max() <= 0.51
    for size in ((50, 70), (50, 16), (12, 70)):  # grows, if only one way
        grown = np.zeros((2, *size, 3), np.uint8)
        for canvas, interpolation in zip(grown, ("area", "linear"), strict=True):
            resize_into(canvas, image, size, interpolation, flip=False)
        np.testing.assert_array_equal(*grown)


@pytest.mark.parametrize("pixels", [np.uint8, np.float32])
def test_resizing_leaves_opencvs_switches_as_they_were(pixels):
    def switches():
        return cv2.ipp.useIPP(), cv2.ipp.useIPP_NotExact()

    before = switches()
    resize_into(np.zeros((6, 8, 3), pixels), np.zeros((12, 16, 3), np.uint8), (6, 8), "linear", flip=False)
    assert switches() == before


@pytest.mark.parametrize("interpolation", ["linear", "area", "antialias"])
def test_boxes_move_with_the_picture(interpolation):
    """A white rectangle is found where its box went."""
    rng = np.random.default_rng(4)
    for old, new in (((40, 60), (80, 120)), ((64, 64), (32, 32)), ((48, 30), (96, 60))):
        y1, x1 = rng.integers(0, 10, 2) * 2
        y2, x2 = y1 + 14, x1 + 8
        image = np.zeros((*old, 3), np.uint8)
        image[y1:y2, x1:x2] = 255
        for flip in (False, True):
            canvas = np.zeros((128, 128, 3), np.uint8)
            resize_into(canvas, image, new, interpolation, flip)
            rows, columns = (np.flatnonzero((canvas[..., 0] >= 128).any(a)) for a in (1, 0))
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            box = resize_boxes(np.array([[x1, y1, x2, y2]], np.float32), old, new, flip)
            np.testing.assert_allclose(box[0], found, atol=0.51)


def test_flipping_boxes_twice_changes_nothing_and_none_are_no_problem():
    boxes = np.array([[0, 1, 10, 5], [3, 2, 4, 9]], np.float32)
    once = resize_boxes(boxes, (10, 20), (10, 20), flip=True)
    np.testing.assert_array_equal(once, [[10, 1, 20, 5], [16, 2, 17, 9]])
    np.testing.assert_array_equal(resize_boxes(once, (10, 20), (10, 20), flip=True), boxes)
    assert resize_boxes(np.zeros((0, 4), np.float32), (10, 20), (5, 10), flip=True).shape == (0, 4)


@pytest.mark.parametrize(
    ("shorter", "longest", "expected"),
    [
        ((640, 800), 1333, ((800, 1344), (1344, 800), (800, 1088), (1088, 800))),
        ((256,), 320, ((256, 320), (320, 256), (256, 256))),
        ((64,), 64, ((64, 64),)),
        ((600,), 400, ((416, 416),)),
        ((800, 640), 1333, ((800, 1344), (1344, 800), (800, 1088), (1088, 800))),  # in any order
        # An eighth of 1024 less is still worth a bucket, anything nearer is not: 4:3, then a square, then none.
        ((672,), 1024, ((672, 1024), (1024, 672), (672, 896), (896, 672))),
        ((673,), 1024, ((704, 1024), (1024, 704), (704, 704))),
        ((896,), 1024, ((896, 1024), (1024, 896), (896, 896))),
        ((897,), 1024, ((928, 1024), (1024, 928))),
    ],
)
def test_default_buckets(shorter, longest, expected):
    assert default_buckets(shorter, longest, 32) == expected


def test_default_buckets_hold_every_image():
    rng = np.random.default_rng(5)
    sides = rng.integers(1, 3000, (2000, 2))
    for shorter, longest, divisor in ((800, 1333, 32), (300, 300, 1), (333, 777, 64), (900, 500, 32)):
        buckets = default_buckets((shorter // 2, shorter), longest, divisor)
        assert all(side % divisor == 0 for bucket in buckets for side in bucket)
        for rounding in ("floor", "round"):
            sizes = np.stack(resized_size(*sides.T, shorter, longest, rounding), 1)
            assert (assign_buckets(sizes, buckets) >= 0).all()


def test_an_image_goes_to_the_smallest_bucket_that_holds_it():
    buckets = ((40, 45), (40, 45), (40, 60), (60, 40), (30, 60))
    sizes = np.array([[40, 60], [40, 46], [40, 45], [41, 40], [30, 60], [30, 45], [41, 41], [61, 1]])
    areas = np.prod(buckets, 1)
    for size, chosen in zip(sizes, assign_buckets(sizes, buckets), strict=True):
        fitting = [areas[j] for j, b in enumerate(buckets) if size[0] <= b[0] and size[1] <= b[1]]
        assert (areas[chosen] == min(fitting)) if fitting else chosen == -1
    np.testing.assert_array_equal(assign_buckets(sizes, buckets) >= 0, [1, 1, 1, 1, 1, 1, 0, 0])
    assert assign_buckets(np.zeros((0, 2), int), buckets).shape == (0,)
