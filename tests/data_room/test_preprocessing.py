"""From the bytes of an image file to what the network sees: as torchvision makes it, and as detectron2 does."""

import io

import numpy as np
from PIL import Image

from fpn_jax.data.decode import decode
from fpn_jax.data.pipeline import PipelineOptions, image_batch
from fpn_jax.models.pixels import Pixels, normalize_pixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's


def test_float32_is_torchvisions_from_the_bytes_of_a_jpeg_to_the_network(data_dir):
    """Decoded, resized to 799 of 800 rows, normalised on the device, black after normalising: within 1e-4."""
    answers = np.load(data_dir / "jpeg_to_batch.npz")
    options = PipelineOptions(shorter=(800,), longest=1333, buckets=((800, 1216),), pixels="float32")
    batch = image_batch([decode(answers["jpeg"].tobytes(), "scene.jpg", None)], options)
    assert batch["size"].tolist() == [answers["size"].tolist()] == [[799, 1197]]
    x = np.asarray(normalize_pixels(batch["image"], batch["size"], Pixels()))
    np.testing.assert_allclose(x[0, ::31, ::37], answers["batch_part"], atol=1e-4)
    assert not x[0, 799:].any() and not x[0, :, 1197:].any()


def test_float32_is_torchvisions_for_small_images(data_dir):
    answers = np.load(data_dir / "resize_answers.npz")
    for i in range(3):
        shorter = int(answers[f"size{i}"].min())
        options = PipelineOptions(shorter=(shorter,), longest=32, buckets=((32, 32),), pixels="float32")
        batch = image_batch([answers[f"image{i}"]], options)
        np.testing.assert_array_equal(batch["size"], [answers[f"size{i}"]])
        x = np.asarray(normalize_pixels(batch["image"], batch["size"], Pixels()))
        np.testing.assert_allclose(x, answers[f"batch{i}"].transpose(0, 2, 3, 1), atol=1e-4)


def test_antialias_is_detectron2s_from_the_bytes_of_a_jpeg(data_dir):
    """Which decodes and resizes with Pillow, and rounds sides to 800, not 799."""
    data = np.load(data_dir / "jpeg_to_batch.npz")["jpeg"].tobytes()
    options = PipelineOptions(
        shorter=(800,), longest=1333, buckets=((800, 1216),), rounding="round", interpolation="antialias"
    )
    batch = image_batch([decode(data, "scene.jpg", None)], options)
    picture = Image.open(io.BytesIO(data)).convert("RGB").resize((1198, 800), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(batch["image"][0, :800, :1198], np.asarray(picture))
    assert batch["size"].tolist() == [[800, 1198]] and batch["image"].dtype == np.uint8
