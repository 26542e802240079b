"""Image files of every common kind to uint8 RGB, or one line that says why not."""

import cv2
import numpy as np

from fpn_jax.errors import UserError

# Alpha is dropped, grey becomes three equal channels.
_AS_IT_IS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH
# The bits that say "reduced"; in IMREAD_REDUCED_COLOR_2 they are together with BGR, which RGB excludes.
_REDUCED = {
    divisor: cv2.IMREAD_COLOR_RGB | bits
    for divisor, bits in (
        (2, cv2.IMREAD_REDUCED_GRAYSCALE_2),
        (4, cv2.IMREAD_REDUCED_GRAYSCALE_4),
        (8, cv2.IMREAD_REDUCED_GRAYSCALE_8),
    )
}


def decode(data: bytes, name: str, size: tuple[int, int] | None, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """Decode the bytes of an image file, called `name` in errors, to uint8 [h w 3] RGB.

    JPEG, PNG, WebP, BMP and TIFF; greyscale, palette, CMYK and 16 bits per channel (scaled to
    8) come out as RGB, alpha is dropped. `size` is the (height, width) that the annotations are about. The
    orientation in the file's EXIF data is followed unless only the picture as stored has that size: some annotators
    overlook it. With None it is always followed.
    `at_least` (height, width) allows a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size, rounded up, as long as no
    side becomes smaller: the cheap first half of shrinking it by averaging. It needs `size`, and then only checks it
    to within that divisor.
    Raises `UserError` if the file is cut short, no image, or has another size.
    """
    if not data:
        raise UserError(f"{name}: the file is empty; copy or download it again")
    if _is_cut_short(data):
        raise UserError(f"{name}: the file is cut short after {len(data)} bytes; copy or download it again")
    divisor = _divisor(size, at_least) if at_least and data.startswith(b"\xff\xd8") else 1
    flags = _REDUCED[divisor] if divisor > 1 else _AS_IT_IS
    image = _read(data, name, flags)
    if size is None:
        return image
    expected = tuple(-(-int(side) // divisor) for side in size)
    if image.shape[:2] == expected:
        return image
    stored = _read(data, name, flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if stored.shape[:2] == expected:
        return stored
    height, width = (image if divisor == 1 else _read(data, name, _AS_IT_IS)).shape[:2]
    raise UserError(
        f"{name}: the file is {height} x {width} (height x width), its annotations say {size[0]} x {size[1]}; "
        "correct the annotations or take the file they were made for"
    )


def _read(data: bytes, name: str, flags: int) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise UserError(f"{name}: not an image that can be read, or damaged; use JPEG, PNG, WebP, BMP or TIFF")
    if image.dtype == np.uint16:
        return cv2.convertScaleAbs(image, alpha=1 / 257)  # rounds; 65535 becomes 255
    if image.dtype != np.uint8:
        raise UserError(f"{name}: has {image.dtype} pixels; save it with 8 or 16 bits per channel")
    return image


def _divisor(size: tuple[int, int] | None, at_least: tuple[int, int]) -> int:
    """The largest divisor allowed; upright and turned must stay two different sizes, if they are."""
    if size is None:
        raise ValueError("at_least needs the size")
    for divisor in (8, 4, 2):
        height, width = (-(-int(side) // divisor) for side in size)
        if height >= at_least[0] and width >= at_least[1] and (height != width or size[0] == size[1]):
            return divisor
    return 1


def _is_cut_short(data: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end: OpenCV 4 fills the missing part with grey and says nothing."""
    if data.startswith(b"\xff\xd8"):
        scan = _jpeg_scan(data)
        return scan < 0 or data.rfind(b"\xff\xd9", scan) < 0
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data.rfind(b"IEND") < 0
    return False


def _jpeg_scan(data: bytes) -> int:
    """Where a JPEG's first scan begins, -1 if nowhere. Segments are stepped over: thumbnails in them end, too."""
    position = 2
    while (position := data.find(b"\xff", position)) >= 0 and position + 4 <= len(data):
        marker = data[position + 1]
        if marker == 0xDA:
            return position
        if marker == 0xFF:  # padding
            position += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD9:  # without a length
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return -1
