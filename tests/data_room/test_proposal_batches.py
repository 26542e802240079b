"""Given proposals go through the pipeline with their images."""

import dataclasses
import re

import numpy as np
import pytest
from fake_split import make_split

from fpn_jax.data.pipeline import PipelineOptions, eval_batches, train_batches
from fpn_jax.data.proposals import ProposalTable
from fpn_jax.data.transforms import resized_size
from fpn_jax.errors import UserError

OPTIONS = PipelineOptions(
    shorter=(16, 20), longest=40, buckets=((24, 40), (40, 24), (24, 24)), num_threads=2, max_proposals=(6, 4)
)


def options(**changes):
    return dataclasses.replace(OPTIONS, **changes)


def table_for(split, seed=0, most=9):
    """Random boxes, some of them beyond the image, without area, or a single number apart."""
    rng = np.random.default_rng(seed)
    boxes, scores = [], []
    for height, width in split.image_sizes.tolist():
        n = int(rng.integers(0, most + 1))
        corners = np.sort(rng.uniform(-0.3, 1.3, (n, 2, 2)), 1).reshape(n, 4) * [width, height, width, height]
        corners[1::5] = np.round(corners[1::5])
        corners[2::5, 2] = corners[2::5, 0]
        boxes.append(corners)
        scores.append(rng.random(n))
    return ProposalTable.from_lists(split.index.image_id[::-1].tolist(), boxes[::-1], scores[::-1])


def expected_proposals(table, image_id, original, size, flip, most):
    """Box by box, number by number."""
    (old_height, old_width), (height, width) = original, size
    ratio_y, ratio_x = np.float32(height) / np.float32(old_height), np.float32(width) / np.float32(old_width)
    expected = []
    for x1, y1, x2, y2 in table.of(image_id)[0]:
        x1, x2 = (min(max(x, np.float32(0)), np.float32(old_width)) * ratio_x for x in (x1, x2))
        y1, y2 = (min(max(y, np.float32(0)), np.float32(old_height)) * ratio_y for y in (y1, y2))
        if flip:
            x1, x2 = np.float32(width) - x2, np.float32(width) - x1
        if x2 > x1 and y2 > y1 and len(expected) < most:
            expected.append([x1, y1, x2, y2])
    return np.array(expected, np.float32).reshape(-1, 4)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_proposals_move_with_the_image_best_first(flip):
    split = make_split(21)
    table = table_for(split)
    counts = []
    for batch in train_batches(split, options(flip=flip), 3, 1, num_steps=20, proposals=table):
        assert (batch["proposals"].shape, batch["proposals"].dtype) == ((3, 6, 4), np.float32)
        assert (batch["proposals_valid"].shape, batch["proposals_valid"].dtype) == ((3, 6), bool)
        for i, image_id in enumerate(batch["image_id"].tolist()):
            original, size = batch["original_size"][i].tolist(), batch["size"][i].tolist()
            assert tuple(size) in [resized_size(*original, shorter, 40) for shorter in (16, 20)]
            expected = expected_proposals(table, image_id, original, size, bool(flip), 6)
            count = int(batch["proposals_valid"][i].sum())
            assert batch["proposals_valid"][i].tolist() == [True] * count + [False] * (6 - count)
            np.testing.assert_array_equal(batch["proposals"][i, :count], expected)
            assert not batch["proposals"][i, count:].any()
            counts.append(count)
    assert min(counts) == 0 and max(counts) == 6


def test_a_proposal_where_an_object_is_stays_there():
    split = make_split(12)
    truth = [split.objects(i)["boxes"] for i in range(12)]
    table = ProposalTable.from_lists(split.index.image_id.tolist(), truth)
    for batch in train_batches(split, OPTIONS, 4, seed=0, num_steps=12, proposals=table):
        for i in range(4):
            boxes = batch["boxes"][i][batch["valid"][i]]
            np.testing.assert_array_equal(batch["proposals"][i][batch["proposals_valid"][i]], boxes)


def test_evaluation_takes_its_own_number_and_pads_its_last_batches():
    split = make_split(10, objects=lambda i: i % 2)
    table = table_for(split)
    seen = []
    for batch in eval_batches(split, OPTIONS, 4, proposals=table):
        assert batch["proposals"].shape == (4, 4, 4)
        for i, image_id in enumerate(batch["image_id"].tolist()):
            found = batch["proposals"][i][batch["proposals_valid"][i]]
            if image_id < 0:
                assert len(found) == 0
                continue
            original, size = batch["original_size"][i].tolist(), batch["size"][i].tolist()
            np.testing.assert_array_equal(found, expected_proposals(table, image_id, original, size, False, 4))
            seen.append(image_id)
    assert sorted(seen) == split.index.image_id.tolist()


def assert_same_batches(a, b):
    assert len(a) == len(b) > 0
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_proposals_add_two_arrays_and_change_no_other():
    split = make_split(20)
    plain = list(train_batches(split, OPTIONS, 4, 3, num_steps=8))
    given = list(train_batches(split, OPTIONS, 4, 3, num_steps=8, proposals=table_for(split)))
    for batch in given:
        assert batch.pop("proposals_valid").any()
        del batch["proposals"]
    assert_same_batches(given, plain)
    assert not any("proposals" in key for batch in eval_batches(split, OPTIONS, 4) for key in batch)


def test_threads_workers_processes_and_a_later_start_change_nothing():
    split = make_split(20)
    table = table_for(split)

    def batches(changes=None, **more):
        return list(train_batches(split, options(**(changes or {})), 4, 3, num_steps=6, proposals=table, **more))

    expected = batches()
    for changes in ({"num_threads": 0}, {"num_threads": 5}, {"num_threads": 1, "num_workers": 2}):
        assert_same_batches(batches(changes), expected)
    assert_same_batches(batches(start=2), expected[2:])
    parts = zip(batches(rank=0, world=2), batches(rank=1, world=2), strict=True)
    assert_same_batches([{key: np.concatenate([a[key], b[key]]) for key in a} for a, b in parts], expected)


def test_images_without_an_entry_are_named_before_the_first_batch():
    split = make_split(12, objects=lambda i: i % 2)
    ids = split.index.image_id.tolist()  # 7, 17, ...
    nothing = np.zeros((0, 4))
    whole = ProposalTable.from_lists([*ids, 5000], [nothing] * 13, file="all.npz")
    whole.check_covers(split)
    assert len(list(eval_batches(split, OPTIONS, 4, proposals=whole))) == 3
    trained = ProposalTable.from_lists(ids[1::2], [nothing] * 6, file="some.npz")
    next(train_batches(split, OPTIONS, 2, 0, proposals=trained))  # images without objects are not needed
    lacking = (
        r"^some\.npz: has no proposals for 6 of 12 images of fake train: image ids 7 \(0000\.png\), 27 \(0002\.png\), "
        r"47 \(0004\.png\), 67 \(0006\.png\), 87 \(0008\.png\) and 1 more; it has 17, 37, 57, 77, 97 and 1 more; give"
    )
    for call in (
        lambda: eval_batches(split, OPTIONS, 4, proposals=trained),
        lambda: train_batches(split, options(skip_empty=False), 4, 0, proposals=trained),
        lambda: trained.check_covers(split),
    ):
        with pytest.raises(UserError, match=lacking):
            call()
    with pytest.raises(UserError, match=r"^b\.pkl: has no proposals for 12 of 12 images .* it has none; give"):
        ProposalTable.from_lists([], []).check_covers(split, "b.pkl")


@pytest.mark.parametrize("value", [(0, 5), (5, -1), (5,), (1, 2, 3)])
def test_numbers_of_proposals_that_make_no_sense(value):
    message = rf"data\.max_proposals is {re.escape(str(value))}; give two numbers > 0, for training and evaluation"
    with pytest.raises(UserError, match=message):
        options(max_proposals=value)
