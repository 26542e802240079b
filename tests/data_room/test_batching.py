"""The schedule's closed form is the stream that its docstring tells, played by a slow twin."""

import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from fpn_jax.data import batching
from fpn_jax.data.batching import EvalSchedule, TrainSchedule, augmentation_rng, local_rows

CASES = [  # images per bucket, batch size
    ([5], 1),
    ([7], 3),
    ([3], 8),  # fewer images than a batch
    ([1], 5),
    ([6, 0, 9], 4),
    ([1, 13, 2], 4),  # one bucket needs several epochs for a batch
    ([8, 4], 4),
    ([1, 1, 1], 7),
    ([40, 17, 3], 6),
]


def members_of(counts):
    """Image numbers shuffled over the buckets, with gaps."""
    rows = np.random.default_rng(9).permutation(sum(counts)) * 2
    return np.split(rows, np.cumsum(counts)[:-1])


def rng(*key):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def played(members, batch_size, seed):
    """The stream, image by image, with a real queue per bucket. Yields (bucket, rows, epochs)."""
    queues = defaultdict(list)
    epoch = 0
    while True:
        buckets = np.repeat(np.arange(len(members), dtype=np.int16), [len(rows) for rows in members])
        rng(seed, 0, epoch).shuffle(buckets)
        orders = [iter(rows[rng(seed, 1, epoch, j).permutation(len(rows))]) for j, rows in enumerate(members)]
        for bucket in buckets.tolist():
            queues[bucket].append((next(orders[bucket]), epoch))
            if len(queues[bucket]) == batch_size:
                rows, epochs = zip(*queues.pop(bucket), strict=True)
                yield bucket, list(rows), list(epochs)
        epoch += 1


@pytest.mark.parametrize(("counts", "batch_size"), CASES)
def test_any_step_is_that_of_the_played_stream(counts, batch_size):
    members = members_of(counts)
    schedule = TrainSchedule(members, batch_size, seed=3)
    steps = 6 * sum(counts) // batch_size + 5
    expected = [batch for batch, _ in zip(played(members, batch_size, 3), range(steps), strict=False)]
    batching._images_of_epoch.cache_clear()
    for step in np.random.default_rng(0).permutation(steps).tolist():  # in any order
        batch = schedule.batch(step)
        assert (batch.bucket, batch.rows.tolist(), batch.epochs.tolist()) == expected[step]
        assert schedule.epoch_of(step) == max(expected[step][2])
    epochs_of_steps = [max(epochs) for _, _, epochs in expected]
    for epoch in range(4):
        assert schedule.batches_before(epoch) == sum(e < epoch for e in epochs_of_steps)


@pytest.mark.parametrize(("counts", "batch_size"), CASES)
def test_every_image_exactly_once_per_epoch_and_one_bucket_per_batch(counts, batch_size):
    members = members_of(counts)
    schedule = TrainSchedule(members, batch_size, seed=0)
    bucket_of = {row: j for j, rows in enumerate(members) for row in rows.tolist()}
    seen = Counter()
    epochs = 3
    steps = schedule.batches_before(epochs + batch_size)  # after which no image of the first epochs is left in a queue
    for step in range(steps):
        batch = schedule.batch(step)
        assert {bucket_of[row] for row in batch.rows.tolist()} == {batch.bucket}
        seen.update(zip(batch.rows.tolist(), batch.epochs.tolist(), strict=True))
    assert {key: n for key, n in seen.items() if key[1] < epochs} == {
        (row, epoch): 1 for row in bucket_of for epoch in range(epochs)
    }


def test_seeds_and_epochs_differ_and_repeat():
    members = members_of([30, 20])

    def epoch(seed, number):
        schedule = TrainSchedule(members, 5, seed)
        steps = range(schedule.batches_before(number), schedule.batches_before(number + 1))
        return np.concatenate([schedule.batch(step).rows for step in steps]).tolist()

    for seed in (0, 1, -1, 2**40, -(2**40)):
        assert epoch(seed, 0) == epoch(seed, 0)
        assert sorted(epoch(seed, 0)) == sorted(epoch(seed, 1))
    distinct = {str(epoch(seed, number)) for seed in (0, 1, -1, 2**40) for number in (0, 1, 1000)}
    assert len(distinct) == 12


def test_every_order_is_equally_likely():
    """Two images in one bucket and one in another: who comes when, over many epochs."""
    schedule = TrainSchedule([np.array([0, 1]), np.array([2])], 1, seed=5)
    orders = Counter(tuple(int(schedule.batch(3 * e + i).rows[0]) for i in range(3)) for e in range(1200))
    assert len(orders) == 6
    assert all(140 < n < 260 for n in orders.values())  # 200 expected, standard deviation 13


def test_an_epoch_of_coco_is_planned_in_an_instant():
    counts = (100_000, 18_000, 286, 1)
    schedule = TrainSchedule(np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1]), 16, seed=1)
    start = time.process_time()
    for epoch in (7, 8, 9):
        schedule.batch(schedule.batches_before(epoch))
    assert (time.process_time() - start) / 3 < 1.0
    start = time.process_time()
    for step in range(1000):
        schedule.batch(schedule.batches_before(9) + step)
    assert (time.process_time() - start) / 1000 < 1e-2


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_a_batch_in_order(world):
    batch = TrainSchedule(members_of([9, 6]), 8, seed=0).batch(3)
    parts = [local_rows(batch, rank, world) for rank in range(world)]
    assert all(len(part.rows) == len(part.epochs) == 8 // world for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), batch.rows)
    np.testing.assert_array_equal(np.concatenate([part.epochs for part in parts]), batch.epochs)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_evaluation_sees_every_image_once(batch_size):
    members = [np.array([4, 0, 2]), np.array([], int), np.array([1, 3, 5, 6])]
    schedule = EvalSchedule(members, batch_size)
    batches = [schedule.batch(step) for step in range(len(schedule))]
    assert all(len(batch.rows) == batch_size for batch in batches)
    for j, rows in enumerate(members):
        mine = [row for batch in batches if batch.bucket == j for row in batch.rows.tolist()]
        assert mine[: len(rows)] == rows.tolist()
        assert set(mine[len(rows) :]) <= {-1}
        assert len(mine) == -(-len(rows) // batch_size) * batch_size


def test_augmentation_depends_on_seed_epoch_and_image():
    def draw(*key):
        return augmentation_rng(*key).random()

    keys = [(seed, epoch, row) for seed in (0, 1, -1) for epoch in (0, 1, 2) for row in (0, 1, 2)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(0, 1, 2) == draw(0, 1, 2)


def test_nothing_to_schedule_is_an_error():
    for members, batch_size in (([[]], 4), ([[1]], 0)):
        with pytest.raises(ValueError, match="nothing to schedule"):
            TrainSchedule([np.array(rows, int) for rows in members], batch_size, 0)
