"""Geometry of images and their boxes: resized sizes, resizing into a padded batch, flipping, buckets."""

import contextlib
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from fpn_jax.errors import UserError

ROUNDINGS = ("floor", "round")
INTERPOLATIONS = ("linear", "area", "antialias")
PIXELS = ("uint8", "float32")

cv2.setNumThreads(0)  # images are spread over our own threads, with which OpenCV's would only compete


def resized_size(height, width, shorter: int, longest: int, rounding: str = "floor"):
    """Height and width after the shorter side becomes `shorter`, or the longer one `longest` if that is smaller.

    Takes numbers or arrays alike, in pixels, at least 1; returns ints or int64 arrays, at least 1. "floor" is
    torchvision's arithmetic, in which the rounding of the scale can make 799 of 800; "round" is detectron2's.
    """
    h, w = np.asarray(height, np.int64), np.asarray(width, np.int64)
    short, long = np.minimum(h, w), np.maximum(h, w)
    if rounding == "floor":
        scale = np.minimum(shorter / short, longest / long)
        sides = [np.floor(side * scale) for side in (h, w)]
    elif rounding == "round":
        scale = shorter / short
        sides = [np.where(side == short, float(shorter), scale * side) for side in (h, w)]
        shrink = np.minimum(1.0, longest / np.maximum(*sides))
        sides = [np.floor(side * shrink + 0.5) for side in sides]
    else:
        raise UserError(f"data.rounding is {rounding!r}; choose one of {', '.join(ROUNDINGS)}")
    new_h, new_w = (np.maximum(side, 1).astype(np.int64) for side in sides)
    return (new_h, new_w) if new_h.ndim else (int(new_h), int(new_w))


def resize_into(canvas: np.ndarray, image: np.ndarray, size: tuple[int, int], interpolation: str, flip: bool) -> None:
    """Mirror image uint8 [h w 3] if flip, resize it to `size` (height, width), at the upper left of canvas [H W 3].

    "linear" interpolates between the four nearest pixels, without smoothing before (as torchvision does); "area"
    averages where the image shrinks and is "linear" where it grows; "antialias" is Pillow's BILINEAR, which smooths
    where the image shrinks (as detectron2 does). A uint8 canvas gets rounded pixels; a float32 one gets them unrounded,
    0 .. 255, and needs "linear". The rest of the canvas is left as it is.
    """
    height, width = size
    window = canvas[:height, :width]
    if flip:  # before it grows, as torchvision's reference scripts do
        image = cv2.flip(image, 1)
    if image.shape[:2] == (height, width):
        window[:] = image
    elif canvas.dtype == np.float32:
        if interpolation != "linear":
            raise ValueError(f"{interpolation!r} gives uint8 only")
        _interpolate(window, image)
    elif interpolation == "antialias":
        from PIL import Image  # only here, so that reading processes load it only if they need it

        window[:] = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    else:
        shrinks = height <= image.shape[0] and width <= image.shape[1]
        method = cv2.INTER_AREA if interpolation == "area" and shrinks else cv2.INTER_LINEAR
        with _intel(exact=False):
            cv2.resize(image, (width, height), dst=window, interpolation=method)


def _interpolate(window: np.ndarray, image: np.ndarray) -> None:
    """Linear interpolation of uint8 [h w 3] into a float32 window [height width 3], as torch's CPU kernel does it.

    Normalised, within 1e-6 of torchvision's, for which the samples must lie where torch puts them: at the double
    product with a scale that was rounded to float32, itself rounded once. OpenCV takes its scale from fx and fy if it
    is given no size, and rounds the place once, too; from the size its own scale would be exact, which between a bright
    and a dark pixel comes to several hundredths of a grey level (7e-4 normalised). Intel's library rounds otherwise.
    """
    fy, fx = (
        1 / float(np.float32(old) / np.float32(new)) for old, new in zip(image.shape[:2], window.shape[:2], strict=True)
    )
    with _intel(exact=True):
        resized = cv2.resize(image.astype(np.float32), None, dst=window, fx=fx, fy=fy, interpolation=cv2.INTER_LINEAR)
    if resized.shape != window.shape:  # OpenCV would have made an array of its own
        raise ValueError(f"OpenCV resizes to {resized.shape[:2]} instead of {window.shape[:2]}")


@contextlib.contextmanager
def _intel(exact: bool) -> Iterator[None]:
    """Whether OpenCV leaves resizing to Intel's library (IPP), where it has it, in this thread.

    For uint8 it takes three quarters of the time ("area": a third), and differs from OpenCV's own by one grey level at
    most where that rounds; both are equally near to the exact values. OpenCV calls it not exact all the same, and does
    so only if it is told to. For float32 it does so by itself.
    """
    before = cv2.ipp.useIPP(), cv2.ipp.useIPP_NotExact()
    cv2.ipp.setUseIPP(before[0] and not exact)
    cv2.ipp.setUseIPP_NotExact(before[0] and not exact)
    try:
        yield
    finally:
        cv2.ipp.setUseIPP(before[0])
        cv2.ipp.setUseIPP_NotExact(before[1])


def resize_boxes(boxes: np.ndarray, old: tuple[int, int], new: tuple[int, int], flip: bool = False) -> np.ndarray:
    """Boxes float32 [m 4] of an image of (height, width) `old`, moved along with it to `new` and mirrored if flip.

    Each axis has its own ratio, in float32, as torchvision's resize_boxes.
    """
    ratio_y, ratio_x = (np.float32(n) / np.float32(o) for n, o in zip(new, old, strict=True))
    moved = boxes.astype(np.float32) * np.array([ratio_x, ratio_y, ratio_x, ratio_y], np.float32)
    if flip:
        moved[:, [0, 2]] = np.float32(new[1]) - moved[:, [2, 0]]
    return moved


def default_buckets(shorter: Sequence[int], longest: int, divisor: int) -> tuple[tuple[int, int], ...]:
    """A few (height, width), multiples of `divisor`, that hold every image: landscape first, then portrait.

    Then, where padding falls by an eighth or more, smaller ones: 4:3 and 3:4, or else a square. Those that a data set
    has no images for cost nothing.
    """
    side = max(shorter)
    short, long = (_round_up(value, divisor) for value in (min(side, longest), longest))
    buckets = [(short, long), (long, short)]
    middle = _round_up(side * 4 / 3, divisor)
    if middle <= long * 7 / 8:
        buckets += [(short, middle), (middle, short)]
    elif short <= long * 7 / 8:
        buckets += [(short, short)]
    return tuple(dict.fromkeys(buckets))


def assign_buckets(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """For sizes int [n 2] (height, width) the bucket of least area that holds each: int32 [n], -1 where none does."""
    shapes = np.asarray(buckets, np.int64).reshape(-1, 2)
    chosen = np.full(len(sizes), -1, np.int32)
    for j in np.argsort(-shapes.prod(1), kind="stable"):  # the smallest last, so that it has the final say
        chosen[(sizes <= shapes[j]).all(1)] = j
    return chosen


def _round_up(value: float, divisor: int) -> int:
    return int(-(-value // divisor)) * divisor
