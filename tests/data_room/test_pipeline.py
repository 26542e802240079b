"""Batches hold what they should, whatever reads them: threads, workers, several processes, a resumed run."""

import dataclasses
import threading
import time

import cv2
import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from fake_split import make_split, number_of

from fpn_jax.data.canvases import Canvases
from fpn_jax.data.decode import decode
from fpn_jax.data.pipeline import PipelineOptions, bucket_members, eval_batches, image_batch, train_batches
from fpn_jax.data.transforms import assign_buckets, resize_boxes, resize_into, resized_size
from fpn_jax.errors import UserError

BUCKETS = ((24, 40), (40, 24), (24, 24))
OPTIONS = PipelineOptions(shorter=(16, 20), longest=40, buckets=BUCKETS, num_threads=2)


def options(**changes):
    return dataclasses.replace(OPTIONS, **changes)


def assert_same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_a_batch_has_the_documented_arrays():
    batch = next(train_batches(make_split(20), OPTIONS, 4, seed=0))
    height, width = batch["image"].shape[1:3]
    shapes = {key: (value.dtype.name, value.shape) for key, value in batch.items()}
    assert shapes == {
        "image": ("uint8", (4, height, width, 3)),
        "size": ("int32", (4, 2)),
        "boxes": ("float32", (4, 8, 4)),
        "labels": ("int32", (4, 8)),
        "valid": ("bool", (4, 8)),
        "image_id": ("int64", (4,)),
        "original_size": ("int32", (4, 2)),
        "index": ("int32", (4,)),
    }
    assert (height, width) in BUCKETS
    assert all(value.flags.c_contiguous and value.flags.writeable for value in batch.values())


def expected_row(split, row, shorter, flip, bucket, interpolation="linear", pixels="uint8"):
    """One row of a batch, put together by hand."""
    original = tuple(split.image_sizes[row].tolist())
    size = resized_size(*original, shorter, 40)
    image = np.zeros((*bucket, 3), pixels)
    resize_into(image, decode(split.source[row]["image"], "x", original), size, interpolation, flip)
    objects = split.objects(row)
    boxes = resize_boxes(objects["boxes"][~objects["crowd"]], original, size, flip)
    return image, size, boxes, objects["labels"][~objects["crowd"]]


def test_every_row_is_its_image_at_one_of_the_sizes_perhaps_mirrored():
    split = make_split(21, objects=lambda i: i % 4, crowds=lambda i: i % 2)
    drawn = []
    for batch in take(train_batches(split, options(skip_empty=False), 3, seed=1), 40):
        bucket = batch["image"].shape[1:3]
        for i, row in enumerate(batch["index"].tolist()):
            assert number_of(batch["image"][i]) == row
            assert batch["image_id"][i] == split.index.image_id[row]
            assert batch["original_size"][i].tolist() == split.image_sizes[row].tolist()
            largest = resized_size(*split.image_sizes[row].tolist(), 20, 40)
            assert bucket == BUCKETS[assign_buckets(np.array([largest]), BUCKETS)[0]]
            count = int(batch["valid"][i].sum())
            assert batch["valid"][i].tolist() == [True] * count + [False] * (8 - count)
            assert not batch["boxes"][i, count:].any()
            assert not batch["labels"][i, count:].any()
            matches = []
            for shorter in OPTIONS.shorter:
                for flip in (False, True):
                    image, size, boxes, labels = expected_row(split, row, shorter, flip, bucket)
                    same = np.array_equal(batch["image"][i], image) and batch["size"][i].tolist() == list(size)
                    if same and np.array_equal(batch["boxes"][i, :count], boxes):
                        np.testing.assert_array_equal(batch["labels"][i, :count], labels)
                        matches.append((shorter, flip))
            assert matches
            if len(matches) == 1:  # without objects, mirrored or not looks the same
                drawn += matches
    assert len(drawn) > 60
    for choice in [(shorter, flip) for shorter in (16, 20) for flip in (False, True)]:
        assert drawn.count(choice) > len(drawn) / 8


def test_an_image_looks_different_in_every_epoch():
    split = make_split(4, sizes=((20, 30),))
    batches = take(train_batches(split, OPTIONS, 4, seed=0), 8)
    shown = {batch["boxes"][batch["index"] == 2].tobytes() for batch in batches}
    assert len(shown) == 4  # two sizes, mirrored or not
    assert len({batch["index"].tobytes() for batch in batches}) > 1


def test_all_sizes_are_drawn_equally_often():
    split = make_split(30, sizes=((24, 24),))
    batches = take(train_batches(split, options(shorter=(12, 20, 16, 18)), 5, seed=0), 48)
    sizes, counts = np.unique(np.concatenate([batch["size"][:, 0] for batch in batches]), return_counts=True)
    assert sizes.tolist() == [12, 16, 18, 20] and (abs(counts - 60) < 20).all()  # 3 standard deviations


@pytest.mark.parametrize(("flip", "mirrored"), [(0.0, False), (1.0, True)])
def test_flip_is_a_probability(flip, mirrored):
    split = make_split(6)
    for batch in take(train_batches(split, options(flip=flip, shorter=(20,)), 3, seed=0), 6):
        for i, row in enumerate(batch["index"].tolist()):
            _, _, boxes, _ = expected_row(split, row, 20, mirrored, batch["image"].shape[1:3])
            np.testing.assert_array_equal(batch["boxes"][i][batch["valid"][i]], boxes)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_image_once_per_epoch(batch_size):
    """The second has a bucket with fewer images than a batch, the third fewer images than a batch in all."""
    for split in (make_split(30), make_split(11, sizes=((20, 30),) * 10 + ((30, 20),)), make_split(3)):
        epochs = 16
        steps = len(split) * epochs // batch_size
        batches = list(train_batches(split, OPTIONS, batch_size, seed=0, num_steps=steps))
        seen = np.concatenate([batch["index"] for batch in batches])
        counts = np.bincount(seen, minlength=len(split))
        # In the queues of three buckets less than a batch each is left; one image is seen once per epoch.
        assert counts.max() <= epochs + -(-2 * (batch_size - 1) // len(split)) + 1
        assert counts.sum() == steps * batch_size
        assert (counts >= epochs - batch_size).all()
    whole = [row for batch in train_batches(make_split(30), OPTIONS, 5, seed=0, num_steps=6) for row in batch["index"]]
    assert sorted(whole) == list(range(30))


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_change_nothing(threads):
    split = make_split(20)
    expected = list(train_batches(split, OPTIONS, 4, seed=3, num_steps=12))
    assert_same(list(train_batches(split, options(num_threads=threads, prefetch=0), 4, seed=3, num_steps=12)), expected)


def test_workers_change_nothing_and_resume_exactly():
    split = make_split(20)
    expected = list(train_batches(split, OPTIONS, 4, seed=3, num_steps=7))
    with_workers = options(num_workers=2, num_threads=1)
    iterator = train_batches(split, with_workers, 4, seed=3, num_steps=7)
    assert_same(take(iterator, 3), expected[:3])
    state = iterator.get_state()
    assert_same(list(iterator), expected[3:])
    again = train_batches(split, with_workers, 4, seed=3, num_steps=7)
    again.set_state(state)
    assert_same(list(again), expected[3:])


def test_a_bad_image_is_told_from_a_worker_in_one_line():
    split = with_bad_image(make_split(8), 5, b"hello")
    with pytest.raises(UserError, match=r"^0005\.png \(record 5 of fake train\): not an image") as told:
        list(train_batches(split, options(num_workers=1, num_threads=1), 2, seed=0, num_steps=4))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_together_read_the_global_batch(world):
    split = make_split(20)
    expected = list(train_batches(split, OPTIONS, 8, seed=2, num_steps=6))
    parts = [
        list(train_batches(split, OPTIONS, 8, seed=2, num_steps=6, rank=rank, world=world)) for rank in range(world)
    ]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)
    ]
    assert_same(joined, expected)


def test_a_run_continues_from_a_step():
    split = make_split(20)
    expected = list(train_batches(split, OPTIONS, 4, seed=0, num_steps=10))
    for start in (0, 3, 9, 10, 12):
        assert_same(list(train_batches(split, OPTIONS, 4, seed=0, num_steps=10, start=start)), expected[start:])
    far = next(train_batches(split, OPTIONS, 4, seed=0, start=10**9))
    assert_same([far], [next(train_batches(split, OPTIONS, 4, seed=0, start=10**9))])


def test_the_position_survives_an_orbax_checkpoint(tmp_path):
    split = make_split(20)
    expected = list(train_batches(split, OPTIONS, 4, seed=0, num_steps=10))
    iterator = train_batches(split, OPTIONS, 4, seed=0, num_steps=10)
    take(iterator, 4)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        again = train_batches(split, options(num_threads=0), 4, seed=0, num_steps=10)
        manager.restore(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(again)))
    assert_same(list(again), expected[4:])
    assert_same(list(iterator), expected[4:])


def test_seeds_differ():
    split = make_split(20)
    orders = {
        tuple(np.concatenate([batch["index"] for batch in take(train_batches(split, OPTIONS, 4, seed), 5)]).tolist())
        for seed in (0, 1, -1)
    }
    assert len(orders) == 3
    alone = make_split(1)  # no order to tell them apart, only what is done to the image
    shown = {
        b"".join(batch["boxes"].tobytes() for batch in take(train_batches(alone, OPTIONS, 1, seed), 16))
        for seed in (0, 1, -1)
    }
    assert len(shown) == 3


def test_images_without_objects():
    some = make_split(30, objects=lambda i: i % 2, crowds=lambda i: 1)  # crowds are no objects
    rows = np.concatenate([b["index"] for b in train_batches(some, OPTIONS, 5, seed=0, num_steps=12)])
    assert set(rows.tolist()) == set(range(1, 30, 2))
    rows = np.concatenate([b["index"] for b in train_batches(some, options(skip_empty=False), 5, seed=0, num_steps=6)])
    assert set(rows.tolist()) == set(range(30))

    none = make_split(6, objects=lambda i: 0)
    with pytest.raises(UserError, match=r"fake: no image of split 'train' has objects; set data\.skip_empty=False"):
        train_batches(none, OPTIONS, 2, seed=0)
    for batch in train_batches(none, options(skip_empty=False), 2, seed=0, num_steps=5):
        assert not batch["valid"].any()
        assert batch["boxes"].shape == (2, 8, 4)
    with pytest.raises(UserError, match="no image of split"):
        train_batches(make_split(0), options(skip_empty=False), 2, seed=0)


@pytest.mark.parametrize(("most", "padded"), [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16)])
def test_the_data_set_sets_the_number_of_boxes(most, padded):
    split = make_split(4, objects=lambda i: most if i == 2 else 0, crowds=lambda i: 20)
    batch = next(train_batches(split, options(skip_empty=False), 4, seed=0))
    assert batch["boxes"].shape[1] == padded
    batches = list(eval_batches(split, OPTIONS, 4))
    assert max(int(batch["valid"].sum(1).max()) for batch in batches) == most


def test_of_too_many_objects_the_largest_stay_and_it_is_told_once(capsys):
    split = make_split(5, objects=lambda i: 2 + i)
    boxes = split.index.bbox_xyxy
    rng = np.random.default_rng(0)
    for axis in (0, 1):  # so that the widest, the tallest and the largest are others; no areas tie
        boxes[:, axis + 2] = boxes[:, axis] + rng.permutation(len(boxes)) + 1
    batches = list(train_batches(split, options(max_objects=3, flip=0.0, shorter=(20,)), 1, seed=0, num_steps=5))
    line = "fake train: 3 images have more than data.max_objects = 3 objects; their 6 smallest are not trained on"
    assert capsys.readouterr().err == f"warning: {line}\n"
    train_batches(split, options(max_objects=3), 2, seed=0, rank=1, world=2)
    assert not capsys.readouterr().err  # process 0 has told it
    for batch in batches:
        row = int(batch["index"][0])
        _, _, boxes, labels = expected_row(split, row, 20, False, batch["image"].shape[1:3])
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        kept = [i for i in range(len(boxes)) if (areas > areas[i]).sum() < 3]  # in the order of the record
        np.testing.assert_array_equal(batch["boxes"][0][batch["valid"][0]], boxes[kept])
        np.testing.assert_array_equal(batch["labels"][0][batch["valid"][0]], labels[kept])
    next(train_batches(split, options(max_objects=6), 1, seed=0))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (3, 1), (4, 2), (4, 4), (64, 2)])
def test_evaluation_covers_every_image_once(batch_size, world):
    split = make_split(17, objects=lambda i: i % 2)
    parts = [list(eval_batches(split, OPTIONS, batch_size, rank, world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert all(len({part["image"].shape for part in step}) == 1 for step in zip(*parts, strict=True))
    rows = [batch for part in parts for batch in part]
    index = np.concatenate([batch["index"] for batch in rows])
    assert sorted(index[index >= 0].tolist()) == list(range(17))
    for batch in rows:
        assert len(batch["index"]) == batch_size // world
        bucket = batch["image"].shape[1:3]
        for i, row in enumerate(batch["index"].tolist()):
            if row < 0:
                assert batch["image_id"][i] == -1
                assert not batch["image"][i].any()
                assert not batch["valid"][i].any()
                assert batch["size"][i].tolist() == batch["original_size"][i].tolist() == list(bucket)
                continue
            image, size, boxes, _ = expected_row(split, row, 20, False, bucket)  # the last size, not mirrored
            np.testing.assert_array_equal(batch["image"][i], image)
            np.testing.assert_array_equal(batch["size"][i], size)
            np.testing.assert_array_equal(batch["boxes"][i][batch["valid"][i]], boxes)


@pytest.mark.parametrize("pixels", ["uint8", "float32"])
def test_nothing_is_left_of_what_was_on_a_canvas_before(monkeypatch, pixels):
    blank = Canvases.take

    def scribbled(self, shape, dtype):
        array = blank(self, shape, dtype)
        array[:] = 77
        return array

    monkeypatch.setattr(Canvases, "take", scribbled)
    padding = 0
    for batch in eval_batches(make_split(8), options(buckets=((44, 48),), pixels=pixels), 3):
        for image, size, index in zip(batch["image"], batch["size"], batch["index"], strict=True):
            height, width = size if index >= 0 else (0, 0)
            assert not image[height:].any() and not image[:, width:].any()
            padding += index < 0
    assert padding == 1


def test_evaluation_of_no_images_is_no_batch():
    assert list(eval_batches(make_split(0), OPTIONS, 4)) == []


def test_evaluation_may_use_smaller_buckets_than_training():
    split = make_split(4, sizes=((24, 24),))
    changed = options(shorter=(20, 16), buckets=((20, 20), (16, 16)))
    for batch in (next(eval_batches(split, changed, 2)), image_batch([np.zeros((24, 24, 3), np.uint8)] * 2, changed)):
        assert batch["image"].shape == (2, 16, 16, 3) and (batch["size"] == 16).all()  # the last, not the largest
    assert next(train_batches(split, changed, 2, seed=0))["image"].shape == (2, 20, 20, 3)


@pytest.mark.parametrize(
    ("interpolation", "pixels"), [("linear", "uint8"), ("area", "uint8"), ("antialias", "uint8"), ("linear", "float32")]
)
def test_interpolation_and_pixels_reach_every_kind_of_batch(interpolation, pixels):
    split = make_split(3, sizes=((40, 60),))
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    split.source[1]["image"] = cv2.imencode(".png", noise)[1].tobytes()
    changed = options(shorter=(11,), interpolation=interpolation, pixels=pixels, num_threads=0)
    images = [decode(item["image"], "x", (40, 60)) for item in split.source]
    for flip, batch in (
        (False, next(eval_batches(split, changed, 3))),
        (False, image_batch(images, changed)),
        (True, next(train_batches(split, dataclasses.replace(changed, flip=1.0), 3, seed=0))),
    ):
        image, *_ = expected_row(split, 1, 11, flip, batch["image"].shape[1:3], interpolation, pixels)
        assert batch["image"].dtype == image.dtype == pixels
        np.testing.assert_array_equal(batch["image"][batch["index"] == 1][0], image)


def with_bad_image(split, row, data):
    split.source[row]["image"] = data
    return split


@pytest.mark.parametrize("threads", [0, 3])
def test_a_bad_image_stops_with_its_name(threads):
    split = with_bad_image(make_split(8), 5, b"")
    with pytest.raises(UserError, match=r"^0005\.png \(record 5 of fake train\): the file is empty") as told:
        list(train_batches(split, options(num_threads=threads), 2, seed=0, num_steps=4))
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"^0005\.png"):
        list(eval_batches(split, options(num_threads=threads), 2))


def test_a_bad_image_waits_for_its_turn():
    """Reading ahead must not spoil the batches before."""
    split = make_split(8)
    whole = list(train_batches(split, OPTIONS, 2, seed=0, num_steps=4))
    last = int(whole[3]["index"][0])
    iterator = train_batches(with_bad_image(split, last, b""), options(prefetch=4), 2, seed=0, num_steps=4)
    assert_same(take(iterator, 3), whole[:3])
    with pytest.raises(UserError, match=f"record {last} "):
        next(iterator)


def test_a_record_that_cannot_be_read_is_named():
    class Broken(list):
        def __getitem__(self, i):
            if i == 3:
                raise RuntimeError("chunk header\nis damaged")
            return super().__getitem__(i)

    split = make_split(6)
    split = dataclasses.replace(split, source=Broken(split.source))
    with pytest.raises(
        UserError, match=r"^0003\.png \(record 3 of fake train\): the record cannot be read \(chunk"
    ) as told:
        list(eval_batches(split, OPTIONS, 2))
    assert "\n" not in str(told.value)


def test_an_image_that_fits_no_bucket_is_named():
    split = make_split(9)
    message = r"^0001\.png: 30 x 20 pixels, resized 30 x 20 .* none of data\.buckets 24 x 40, 24 x 24; add a larger one"
    changed = options(buckets=(BUCKETS[0], BUCKETS[2]))
    with pytest.raises(UserError, match=message):
        train_batches(split, changed, 2, seed=0)
    with pytest.raises(UserError, match=message):
        eval_batches(split, changed, 2)


def test_a_batch_that_the_processes_cannot_share_is_refused():
    split = make_split(9)
    for batch_size, world in ((6, 4), (0, 1)):
        with pytest.raises(UserError, match=f"batch_size is {batch_size}; .* number of processes, {world}"):
            train_batches(split, OPTIONS, batch_size, seed=0, world=world)
        with pytest.raises(UserError, match="batch_size is"):
            eval_batches(split, OPTIONS, batch_size, world=world)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shorter": ()}, r"data\.shorter is empty"),
        ({"buckets": ()}, r"data\.buckets is empty"),
        ({"shorter": (16, 0)}, r"data\.shorter is \(16, 0\); give whole numbers of pixels, at least 1"),
        ({"shorter": (16.5,)}, r"data\.shorter is \(16\.5,\); give whole numbers of pixels"),
        ({"longest": -1}, r"data\.longest is -1; give whole numbers of pixels"),
        ({"buckets": ((24, 0),)}, r"data\.buckets is \(\(24, 0\),\); give whole numbers of pixels"),
        ({"flip": 1.5}, r"data\.flip is 1\.5; a probability"),
        ({"flip": float("nan")}, r"data\.flip is nan; a probability"),
        ({"rounding": "ceil"}, r"data\.rounding is 'ceil'; choose one of floor, round"),
        ({"interpolation": "cubic"}, r"data\.interpolation is 'cubic'; choose one of linear, area, antialias"),
        ({"pixels": "float16"}, r"data\.pixels is 'float16'; choose one of uint8, float32"),
        ({"pixels": "float32", "interpolation": "area"}, r"data\.pixels is 'float32' and data\.interpolation 'area'"),
        ({"pixels": "float32", "interpolation": "antialias"}, r"set data\.interpolation=linear or data\.pixels=uint8"),
        ({"max_objects": 0}, r"data\.max_objects is 0; it must be at least 1"),
        ({"num_threads": -1}, r"data\.num_threads is -1"),
        ({"num_workers": -2}, r"data\.num_workers is -2"),
    ],
)
def test_senseless_options_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        options(**change)


def test_image_batch_is_what_evaluation_makes():
    split = make_split(6, sizes=((20, 30),), objects=lambda i: 0)
    images = [decode(split.source[i]["image"], "x", None) for i in range(3)]
    expected = next(eval_batches(split, OPTIONS, 3))
    batch = image_batch(images, OPTIONS)
    for key in ("image", "size", "boxes", "labels", "valid", "original_size", "index"):
        np.testing.assert_array_equal(batch[key], expected[key], err_msg=key)
        assert batch[key].dtype == expected[key].dtype
    assert batch["image_id"].tolist() == [0, 1, 2]  # they have none of a data set
    assert image_batch(images, options(max_objects=3))["boxes"].shape == (3, 3, 4)


def test_only_area_reads_a_picture_smaller_than_it_is():
    """A JPEG gives it at an eighth of its sides at once, but not as any other interpolation would."""
    split = make_split(1, sizes=((160, 240),))
    noise = np.random.default_rng(0).integers(0, 256, (160, 240, 3), np.uint8)
    split.source[0]["image"] = cv2.imencode(".jpg", noise)[1].tobytes()
    for interpolation in ("linear", "antialias"):
        batch = next(eval_batches(split, options(shorter=(20,), interpolation=interpolation), 1))
        image, *_ = expected_row(split, 0, 20, False, batch["image"].shape[1:3], interpolation)
        np.testing.assert_array_equal(batch["image"][0], image)


def test_the_checksum_of_the_images_stays_what_runs_have_stored():
    assert bucket_members(make_split(5), OPTIONS) == "2, 2, 1 (37c21bd3)"


def test_image_batch_takes_the_smallest_bucket_for_all():
    def black(height, width):
        return np.zeros((height, width, 3), np.uint8)

    assert image_batch([black(30, 30)], OPTIONS)["image"].shape == (1, 24, 24, 3)
    assert image_batch([black(30, 30), black(20, 25)], OPTIONS)["image"].shape == (2, 24, 40, 3)
    with pytest.raises(UserError, match=r"^the images together: .* fits none of data\.buckets"):
        image_batch([black(20, 30), black(30, 20)], OPTIONS)
    with pytest.raises(UserError, match=r"^the image: 30 x 20 pixels"):
        image_batch([black(30, 20)], options(buckets=BUCKETS[:1]))


def test_a_closed_iterator_leaves_no_threads_behind():
    before = set(threading.enumerate())
    iterator = train_batches(make_split(6), options(num_threads=4), 2, seed=0)  # endless
    next(iterator)
    assert set(threading.enumerate()) - before
    iterator.close()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
