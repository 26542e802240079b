"""Which images make up which batch: a pure function of the seed and the step, for any number of processes.

Picture an endless stream of images, one random permutation of the data set after another (an epoch each), in which
the images of every bucket queue up on their own. Whenever a queue holds a batch, that batch is the next step. So every
image appears exactly once per epoch, no batch mixes buckets, and what an epoch leaves in the queues goes into the
next. The stream need not be played to know a step: after e epochs a bucket of n images has given floor(e n / B)
batches of B, which tells the epoch of any step; within an epoch, permutations that depend on the seed, the epoch and
the bucket tell the rest.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_ORDER_OF_BUCKETS, _ORDER_OF_IMAGES, _AUGMENTATION = range(3)  # keep the streams of one seed apart


@dataclass(frozen=True)
class PlannedBatch:
    """One global batch: which images, in what order."""

    bucket: int
    rows: np.ndarray  # int32 [b], image numbers in the split; -1: padding
    epochs: np.ndarray  # int64 [b], for how many-th time (from 0) each image is seen


class TrainSchedule:
    """The batch of any step, from the images of every bucket.

    `members[j]` holds the image numbers of bucket j, int [n_j]; together at least one image. Batches are planned as
    asked for, at the cost of one permutation per epoch and process; any thread may ask.
    """

    def __init__(self, members: Sequence[np.ndarray], batch_size: int, seed: int):
        self._members = [np.asarray(rows, np.int32) for rows in members]
        self._counts = tuple(len(rows) for rows in self._members)
        self.batch_size = batch_size
        self._seed = seed
        if sum(self._counts) < 1 or batch_size < 1:
            raise ValueError(f"nothing to schedule: {sum(self._counts)} images in batches of {batch_size}")

    def batches_before(self, epoch: int) -> int:
        """Batches complete after `epoch` epochs, i.e. the step at which epoch number `epoch` begins."""
        return sum(epoch * count // self.batch_size for count in self._counts)

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) whose images complete the batch of this step (from 0)."""
        epoch = step * self.batch_size // sum(self._counts)  # never too late: the queues only hold batches back
        while self.batches_before(epoch + 1) <= step:
            epoch += 1
        return epoch

    def batch(self, step: int) -> PlannedBatch:
        """The global batch of a step, counted from 0."""
        epoch, size = self.epoch_of(step), self.batch_size
        buckets, ordinals = _batches_of_epoch(self._seed, epoch, self._counts, size)
        nth = step - self.batches_before(epoch)
        bucket = int(buckets[nth])
        count = self._counts[bucket]
        first = (epoch * count // size + int(ordinals[nth])) * size  # place in the bucket's endless queue
        epochs, places = np.divmod(np.arange(first, first + size), count)
        rows = np.empty(size, np.int32)
        for e in np.unique(epochs):
            here = epochs == e
            order = _images_of_epoch(self._seed, int(e), bucket, count)
            rows[here] = self._members[bucket][order[places[here]]]
        return PlannedBatch(bucket, rows, epochs)


class EvalSchedule:
    """Every image once, bucket after bucket, in the order of the records; the last batch of a bucket is padded."""

    def __init__(self, members: Sequence[np.ndarray], batch_size: int):
        self._batches = [
            (bucket, np.asarray(rows[start : start + batch_size], np.int32))
            for bucket, rows in enumerate(members)
            for start in range(0, len(rows), batch_size)
        ]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, step: int) -> PlannedBatch:
        """The global batch of a step, counted from 0; padding rows are -1."""
        bucket, images = self._batches[step]
        rows = np.full(self.batch_size, -1, np.int32)
        rows[: len(images)] = images
        return PlannedBatch(bucket, rows, np.zeros(self.batch_size, np.int64))


def local_rows(batch: PlannedBatch, rank: int, world: int) -> PlannedBatch:
    """The part of process `rank` of `world`, which must divide the batch."""
    share = len(batch.rows) // world
    part = slice(rank * share, (rank + 1) * share)
    return PlannedBatch(batch.bucket, batch.rows[part], batch.epochs[part])


def augmentation_rng(seed: int, epoch: int, row: int) -> np.random.Generator:
    """Random numbers for one image in one epoch, the same wherever and whenever it is read."""
    return _rng(seed, _AUGMENTATION, epoch, row)


def _rng(seed: int, *key: int) -> np.random.Generator:
    # The bits of a negative seed are taken as they are, since SeedSequence refuses negative numbers.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed % 2**64, *key])))


# Cached per process, with plain numbers as keys, so that schedules carry no state to worker processes.
@functools.lru_cache(maxsize=8)
def _batches_of_epoch(seed: int, epoch: int, counts: tuple[int, ...], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """For every batch that the epoch completes, in order: its bucket, and the how many-th of that bucket it is."""
    stream = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    _rng(seed, _ORDER_OF_BUCKETS, epoch).shuffle(stream)
    completions, buckets, ordinals = [], [], []
    for bucket, count in enumerate(counts):
        waiting = epoch * count % batch_size
        ends = np.flatnonzero(stream == bucket)[batch_size - 1 - waiting :: batch_size]
        completions.append(ends)
        buckets.append(np.full(len(ends), bucket, np.int16))
        ordinals.append(np.arange(len(ends), dtype=np.int32))
    order = np.argsort(np.concatenate(completions))
    return np.concatenate(buckets)[order], np.concatenate(ordinals)[order]


@functools.lru_cache(maxsize=64)
def _images_of_epoch(seed: int, epoch: int, bucket: int, count: int) -> np.ndarray:
    return _rng(seed, _ORDER_OF_IMAGES, epoch, bucket).permutation(count).astype(np.int32)
