"""A few proposals of three images, and what tests of their files ask of them."""

import re

import numpy as np
import pytest

from fpn_jax.data.proposals import ProposalTable
from fpn_jax.errors import UserError
from fpn_jax.given_proposals import read_proposals

IDS = [139, 7, 285]
BOXES = [
    np.array([[0, 0, 10, 20], [5.5, 2, 640, 480]], np.float32),
    np.zeros((0, 4), np.float32),
    np.array([[1, 1, 2, 2], [30, 40, 50, 61], [3, 3, 3, 9]], np.float32),
]
SCORES = [np.array([0.25, 0.75], np.float32), np.zeros(0, np.float32), np.array([0.5, 0.9, 0.5], np.float32)]
SIZES = {139: (480, 640), 7: (20, 30), 285: (100, 61)}


def assert_same(table, other, images=None):
    for image_id in other.image_id.tolist() if images is None else images:
        for one, another in zip(table.of(image_id), other.of(image_id), strict=True):
            assert one.dtype == another.dtype == np.float32
            np.testing.assert_array_equal(one, another, err_msg=str(image_id))


def made(scores=SCORES):
    return ProposalTable.from_lists(IDS, BOXES, scores)


def refused(path, message):
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {message}") as error:
        read_proposals(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    assert ";" in str(error.value)  # what is wrong; what to do
