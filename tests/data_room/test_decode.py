"""Every kind of image file comes out as Pillow reads it; what is damaged is refused by name."""

import io
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from fpn_jax.data.decode import decode
from fpn_jax.errors import UserError

SMOOTH = cv2.resize(
    np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC
)
PICTURE = Image.fromarray(SMOOTH)


def save(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_orientation(orientation, kind="JPEG", **options):
    exif = Image.Exif()
    exif[0x112] = orientation
    return save(PICTURE, kind, exif=exif, **options)


def with_alpha(mode):
    image = PICTURE.copy()
    image.putalpha(PICTURE.convert("L"))
    return image.convert(mode)


KINDS = {
    "jpeg": save(PICTURE, "JPEG", quality=90),
    "progressive": save(PICTURE, "JPEG", progressive=True, subsampling=0),
    "grey": save(PICTURE.convert("L"), "JPEG"),
    "png": save(PICTURE, "PNG"),
    "grey png": save(PICTURE.convert("L"), "PNG"),
    "bilevel": save(PICTURE.convert("1"), "PNG"),
    "palette": save(PICTURE.convert("P"), "PNG"),
    "palette with a transparent colour": save(PICTURE.convert("P"), "PNG", transparency=3),
    "alpha": save(with_alpha("RGBA"), "PNG"),
    "grey with alpha": save(with_alpha("LA"), "PNG"),
    "webp": save(PICTURE, "WEBP", lossless=True),
    "bmp": save(PICTURE, "BMP"),
    "tiff": save(PICTURE, "TIFF"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_common_kinds_are_read_as_pillow_reads_them(kind):
    expected = np.asarray(Image.open(io.BytesIO(KINDS[kind])).convert("RGB"))
    image = decode(KINDS[kind], "x", (48, 64))
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, expected)


def test_cmyk_jpeg_is_not_inverted():
    data = save(PICTURE.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # whose CMYK is stored inverted
    image = decode(data, "x", None).astype(int)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(image - expected).max() <= 2
    assert np.abs(image - SMOOTH).mean() < 4


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_are_scaled_to_eight(channels):
    values = np.random.default_rng(1).integers(0, 65536, (20, 30, channels)).astype(np.uint16)
    values[0, :3] = np.array([[0], [65535], [128]])
    data = cv2.imencode(".png", values[..., [2, 1, 0, 3][:channels]] if channels > 1 else values)[1].tobytes()
    expected = np.rint(values[..., :3] / 257).astype(np.uint8)
    np.testing.assert_array_equal(decode(data, "x", None), np.broadcast_to(expected, (20, 30, 3)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed_unless_the_annotators_overlooked_it(orientation, kind):
    data = with_orientation(orientation, kind)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(decode(data, "x", None), upright)
    np.testing.assert_array_equal(decode(data, "x", upright.shape[:2]), upright)
    if orientation > 4:  # turned by a right angle: the annotations' size tells which they are about
        np.testing.assert_array_equal(decode(data, "x", (48, 64)), stored)
        assert upright.shape == (64, 48, 3)


def test_a_square_picture_is_ambiguous_and_follows_exif():
    exif = Image.Exif()
    exif[0x112] = 6
    data = save(PICTURE.crop((0, 0, 48, 48)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data, "x", (48, 48)), np.rot90(SMOOTH[:, :48], -1))


@pytest.mark.parametrize("at_least", [None, (10, 10)])
@pytest.mark.parametrize("size", [(48, 60), (64, 48), (24, 32), (480, 640)])
def test_another_size_than_annotated_is_refused(size, at_least):
    with pytest.raises(UserError, match=rf"^a/b\.jpg: the file is 48 x 64 .* say {size[0]} x {size[1]}; .*$"):
        decode(save(PICTURE, "JPEG"), "a/b.jpg", size, at_least)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("at_least", "divisor"), [((49, 64), 1), ((25, 30), 1), ((24, 32), 2), ((13, 9), 2), ((12, 16), 4), ((1, 8), 8)]
)
def test_a_jpeg_is_decoded_smaller_where_that_is_enough(orientation, at_least, divisor):
    data = with_orientation(orientation, quality=95)
    for size, wanted in (((48, 64), at_least), ((64, 48), at_least[::-1])):
        if orientation == 1 and size != (48, 64):
            continue
        small = decode(data, "x", size, wanted)
        assert small.shape == (size[0] // divisor, size[1] // divisor, 3)
        whole = decode(data, "x", size)
        expected = cv2.resize(whole, small.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(small.astype(int) - expected).mean() < 4  # it averages, and colours and sides are in order


def test_odd_sides_round_up_and_other_kinds_stay_whole():
    odd = PICTURE.crop((0, 0, 63, 47))
    assert decode(save(odd, "JPEG"), "x", (47, 63), (1, 1)).shape == (6, 8, 3)
    assert decode(save(odd, "PNG"), "x", (47, 63), (1, 1)).shape == (47, 63, 3)


def test_a_nearly_square_jpeg_is_not_made_so_small_that_turning_it_goes_unseen():
    exif = Image.Exif()
    exif[0x112] = 6
    data = save(PICTURE.crop((0, 0, 46, 43)), "JPEG", exif=exif, quality=95)  # turned it is 46 high and 43 wide
    stored = decode(data, "x", (43, 46), (1, 1))
    assert stored.shape == (11, 12, 3)  # at 1/8 both would be 6 x 6
    upright = decode(data, "x", (46, 43), (1, 1))
    np.testing.assert_array_equal(upright, np.rot90(stored, -1))


def thumbnailed_jpeg():
    """A JPEG whose EXIF data holds a whole JPEG, with an end of its own."""
    thumbnail = save(PICTURE.resize((16, 12)), "JPEG")
    exif = b"Exif\0\0" + thumbnail
    plain = save(PICTURE, "JPEG", quality=95)
    return plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + plain[2:]


@pytest.mark.parametrize(
    "data",
    [save(PICTURE, "JPEG"), save(PICTURE, "JPEG", progressive=True), thumbnailed_jpeg(), save(PICTURE, "PNG")],
    ids=["jpeg", "progressive", "thumbnailed", "png"],
)
def test_a_file_cut_short_anywhere_is_refused(data):
    decode(data, "x", (48, 64))
    decode(data + b"\0 appended by some camera", "x", (48, 64))
    for length in sorted({1, 2, 3, 4, 20, *range(50, len(data), 97), *range(len(data) - 12, len(data))}):
        with pytest.raises(UserError, match=r"^cut\.jpg: (the file is cut short|not an image)"):
            decode(data[:length], "cut.jpg", (48, 64))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_whose_tail_is_zeros_is_refused(kind):
    data = save(PICTURE, kind)
    half = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    with pytest.raises(UserError, match="cut short"):
        decode(half, "x", (48, 64))


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "TIFF"])
def test_other_kinds_cut_short_are_refused(kind, capfd):
    with pytest.raises(UserError, match=r"^x\.webp: not an image"):
        decode(save(PICTURE, kind)[:-200], "x.webp", None)
    capfd.readouterr()  # OpenCV's own remarks


def test_what_is_no_image_is_refused():
    for data, why in ((b"", "the file is empty"), (b"hello\n" * 50, "not an image"), (b"\xff\xd8 hello", "cut short")):
        with pytest.raises(UserError, match=rf"^notes\.jpg: .*{why}"):
            decode(data, "notes.jpg", None)
    floats = cv2.imencode(".tiff", np.zeros((3, 4, 3), np.float32))[1].tobytes()
    with pytest.raises(UserError, match=r"^depth\.tiff: has float32 pixels; save it with 8 or 16 bits"):
        decode(floats, "depth.tiff", None)


def test_a_flipped_bit_in_a_png_is_refused():
    data = bytearray(save(PICTURE, "PNG"))
    data[len(data) // 2] ^= 0x10
    with pytest.raises(UserError, match="damaged"):
        decode(bytes(data), "x", None)


def test_reading_images_does_not_load_jax():
    code = (
        "import sys, fpn_jax.data.decode, fpn_jax.data.transforms, fpn_jax.data.batching;"
        "sys.exit('jax' in sys.modules or 'tensorflow' in sys.modules or 'PIL' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
