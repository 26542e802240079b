"""A split in memory, of pictures that tell their own number: enough for the pipeline, in no time."""

import cv2
import numpy as np

from fpn_jax.data.datasets import Index, Split

SIZES = ((20, 30), (30, 20), (24, 24))  # height, width of records 0, 1, 2, and so on in turn


def make_split(count: int, sizes=SIZES, objects=lambda i: i % 3 + 1, crowds=lambda i: 0) -> Split:
    """`count` PNG files; record i has the colour (i, i // 256, 77), objects(i) objects and after them crowds(i) crowds.

    Object j of record i is the box (j, j, j + 2 + i % 5, j + 3) with label (i + j) % 4.
    """
    height, width = np.array([sizes[i % len(sizes)] for i in range(count)], np.int32).reshape(-1, 2).T
    solid, crowded = (np.array([f(i) for i in range(count)], np.int64) for f in (objects, crowds))
    offsets = np.concatenate([[0], np.cumsum(solid + crowded)])
    owner = np.repeat(np.arange(count), solid + crowded)
    place = np.arange(len(owner)) - offsets[owner]
    boxes = np.stack([place, place, place + 2 + owner % 5, place + 3], 1).astype(np.float32)
    index = Index(
        image_id=np.arange(count, dtype=np.int64) * 10 + 7,
        height=height,
        width=width,
        file_name=np.array([f"{i:04d}.png" for i in range(count)], np.str_),
        offsets=offsets,
        bbox_xyxy=boxes,
        xywh=np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).astype(np.float64),
        label=((owner + place) % 4).astype(np.int32),
        category_id=(owner + place) % 4 + 1,
        area=np.ones(len(owner)),
        iscrowd=place >= solid[owner],
        annotation_id=np.arange(len(owner), dtype=np.int64),
    )
    source = [{"image": picture(i, (int(height[i]), int(width[i])))} for i in range(count)]
    return Split("fake", "train", source, index, list("abcd"), [1, 2, 3, 4])


def picture(number: int, size: tuple[int, int]) -> bytes:
    """A PNG of one colour that tells the number."""
    pixels = np.full((*size, 3), (77, number // 256, number % 256), np.uint8)  # OpenCV's order: blue, green, red
    return cv2.imencode(".png", pixels)[1].tobytes()


def number_of(image: np.ndarray) -> int:
    """The number that the upper left pixel of an RGB image tells."""
    red, green, blue = image[0, 0].tolist()
    assert blue == 77
    return red + 256 * green
