"""From a split's records to padded host batches, through Grain; nothing here knows the device.

A batch is a dict of NumPy arrays (b images, at most m objects each, one bucket):

    image          uint8 [b h w 3]    RGB, zeros below and right of `size`; float32 (0 .. 255) if the options say so
    size           int32 [b 2]        height and width of the picture inside the padding
    boxes          float32 [b m 4]    x1 y1 x2 y2 in pixels of the resized image
    labels         int32 [b m]        0 .. k-1
    valid          bool [b m]         False where a row of boxes is padding
    image_id       int64 [b]          the data set's own; -1 in padding rows
    original_size  int32 [b 2]        before resizing
    index          int32 [b]          number of the image in the split; -1 in padding rows

and, where proposals are given, r of them for each image, which move with it as the boxes do:

    proposals        float32 [b r 4]  x1 y1 x2 y2 in pixels of the resized image, best first
    proposals_valid  bool [b r]       False where a row of proposals is padding
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from fpn_jax.data.batching import (
    EvalSchedule,
    PlannedBatch,
    TrainSchedule,
    augmentation_rng,
    local_rows,
)
from fpn_jax.data.canvases import Canvases
from fpn_jax.data.datasets import Split
from fpn_jax.data.decode import decode
from fpn_jax.data.proposals import ProposalTable
from fpn_jax.data.transforms import (
    INTERPOLATIONS,
    PIXELS,
    ROUNDINGS,
    assign_buckets,
    default_buckets,
    resize_boxes,
    resize_into,
    resized_size,
)
from fpn_jax.errors import UserError, warn

__all__ = ["PipelineOptions", "bucket_members", "default_buckets", "eval_batches", "image_batch", "train_batches"]

_ENDLESS = 2**40  # steps, where no number is given


@dataclass(frozen=True)
class PipelineOptions:
    """How images become batches; the names are those of `config.data`. Raises `UserError` for senseless values.

    Every image must fit a bucket at the largest `shorter`; it goes to the one of least area.
    """

    shorter: tuple[
        int, ...
    ]  # pixels of the shorter side; one is drawn per image in training, evaluation takes the last
    longest: int  # pixels that the longer side must not exceed
    buckets: tuple[tuple[int, int], ...]  # (height, width) that images are padded to; see default_buckets
    flip: float = 0.5  # probability of a mirror image, in training
    rounding: str = "floor"  # of resized sides, as torchvision; "round" as detectron2
    interpolation: str = "linear"  # as torchvision; "antialias" as detectron2; "area" averages where images shrink
    pixels: str = "uint8"  # of resized images, as detectron2; "float32" keeps them unrounded, as torchvision
    max_objects: int | None = None  # m; None: the split's most, rounded up to a multiple of 8. Fewer keep the largest
    max_proposals: tuple[int, int] = (2000, 1000)  # r in training and in evaluation, of given proposals; the best stay
    skip_empty: bool = True  # leave out images without objects (crowds do not count), in training
    num_threads: int = 8  # that make a batch each, in every reading process; 0: batches are made when asked for
    num_workers: int = 0  # reading processes; 0: only the threads of this one
    prefetch: int = 2  # finished batches that wait, besides those in the making, in every reading process

    def __post_init__(self):
        for name in ("shorter", "buckets"):
            if not getattr(self, name):
                raise UserError(f"data.{name} is empty; give at least one")
        for name, values in (
            ("shorter", self.shorter),
            ("longest", [self.longest]),
            ("buckets", sum(self.buckets, ())),
        ):
            if not all(value >= 1 and value == int(value) for value in values):
                raise UserError(f"data.{name} is {getattr(self, name)}; give whole numbers of pixels, at least 1")
        for name, allowed in (("rounding", ROUNDINGS), ("interpolation", INTERPOLATIONS), ("pixels", PIXELS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"data.{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.pixels == "float32" and self.interpolation != "linear":
            raise UserError(
                f"data.pixels is 'float32' and data.interpolation {self.interpolation!r}, which gives uint8 only; "
                "set data.interpolation=linear or data.pixels=uint8"
            )
        if not 0 <= self.flip <= 1:
            raise UserError(f"data.flip is {self.flip}; a probability lies between 0 and 1")
        if len(self.max_proposals) != 2 or min(self.max_proposals) < 1:
            raise UserError(
                f"data.max_proposals is {self.max_proposals}; give two numbers > 0, for training and evaluation"
            )
        for name, least in (("max_objects", 1), ("num_threads", 0), ("num_workers", 0), ("prefetch", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"data.{name} is {value}; it must be at least {least}")


def train_batches(
    split: Split,
    options: PipelineOptions,
    batch_size: int,
    seed: int,
    num_steps: int | None = None,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    *,
    proposals: ProposalTable | None = None,
) -> grain.DatasetIterator:
    """The batches of steps start .. num_steps - 1 (None: for ever), the part of process `rank` of `world` of each.

    `batch_size` is that of all processes together. What a step holds depends on the split, the options, the batch
    size, the seed and the proposals alone, not on threads, workers or processes; a run continues with `start` or, given
    the same arguments, with the iterator's own state. An image that cannot be read raises `UserError` when its batch is
    due. Raises `UserError` if there is no image to train on, an image fits no bucket, `proposals` lack an image that is
    trained on, or `world` does not divide the batch. Each of data.num_workers gets a copy of the proposals.
    """
    _check_share(batch_size, world)
    members = _trained_on(split, options)
    rows = np.sort(np.concatenate(members))
    if proposals is not None:
        proposals.check_covers(split, rows=rows)
    if rank == 0:
        _tell_of_surplus_objects(split, rows, options)
    schedule = TrainSchedule(members, batch_size, seed)
    end = _ENDLESS if num_steps is None else num_steps
    length = max(end - start, 0)
    return _iterate(_Batches(split, options, schedule, rank, world, length, start, seed, proposals), options)


def bucket_members(split: Split, options: PipelineOptions) -> str:
    """How many images are trained on in each bucket, and a checksum of which: with seed and batch size their order.

    Raises `UserError` as `train_batches` does.
    """
    members = _trained_on(split, options)
    return f"{', '.join(str(len(x)) for x in members)} ({zlib.crc32(np.concatenate(members).astype('<i8')):08x})"


def eval_batches(
    split: Split,
    options: PipelineOptions,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    *,
    proposals: ProposalTable | None = None,
) -> grain.DatasetIterator:
    """Every image of the split once, unaltered but for its size; the last batch of a bucket is padded.

    All processes get the same number of batches, with one bucket per batch. Raises `UserError` as train_batches does;
    `proposals` must have every image.
    """
    _check_share(batch_size, world)
    if proposals is not None:
        proposals.check_covers(split)
    members = _members(split, np.arange(len(split)), options, options.shorter[-1])
    schedule = EvalSchedule(members, batch_size)
    batches = _Batches(split, options, schedule, rank, world, len(schedule), proposals=proposals)
    return _iterate(batches, options)


def image_batch(images: Sequence[np.ndarray], options: PipelineOptions) -> dict[str, np.ndarray]:
    """One batch of decoded images, uint8 [h w 3] each, as evaluation would make it; the smallest bucket for all.

    Raises `UserError` if no bucket holds them all.
    """
    original = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    sizes = np.stack(resized_size(*original.T, options.shorter[-1], options.longest, options.rounding), 1)
    largest = sizes.max(0)
    bucket = int(assign_buckets(largest[None], options.buckets)[0])
    if bucket < 0:
        raise _no_bucket("the image" if len(images) == 1 else "the images together", original.max(0), largest, options)
    canvases = np.zeros((len(images), *options.buckets[bucket], 3), options.pixels)
    batch = _empty_batch(canvases, options.max_objects or 8)
    batch["size"][:], batch["original_size"][:] = sizes, original
    batch["index"][:] = batch["image_id"][:] = np.arange(len(images))
    for canvas, image, size in zip(canvases, images, sizes, strict=True):
        resize_into(canvas, image, tuple(size), options.interpolation, flip=False)
    return batch


class _Batches:
    """Grain's random-access source: element i is this process's part of the batch of step start + i.

    Whole batches are the elements, rather than images that Grain would batch, because then no arrangement of threads
    and workers can change what is in them.
    """

    def __init__(
        self,
        split: Split,
        options: PipelineOptions,
        schedule: TrainSchedule | EvalSchedule,
        rank: int,
        world: int,
        length: int,
        start: int = 0,
        seed: int | None = None,  # of the augmentation; None: there is none
        proposals: ProposalTable | None = None,
    ):
        self._split, self._options, self._schedule = split, options, schedule
        self._rank, self._world, self._length, self._start, self._seed = rank, world, length, start, seed
        self._max_objects = options.max_objects or max(-(-split.max_objects // 8) * 8, 8)
        self._proposals = proposals
        largest = max(map(math.prod, options.buckets))
        self._canvases = Canvases(schedule.batch_size // world * largest * 3 * np.dtype(options.pixels).itemsize)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        plan = local_rows(self._schedule.batch(self._start + int(step)), self._rank, self._world)
        shape = (len(plan.rows), *self._options.buckets[plan.bucket], 3)
        canvases = self._canvases.take(shape, self._options.pixels)
        return _load(plan, canvases, self._split, self._options, self._max_objects, self._seed, self._proposals)


def _load(
    plan: PlannedBatch,
    canvases: np.ndarray,
    split: Split,
    options: PipelineOptions,
    max_objects: int,
    seed: int | None,
    proposals: ProposalTable | None,
) -> dict[str, np.ndarray]:
    """Read, decode, flip and resize the images of a plan onto canvases [b h w 3] with anything on them."""
    batch = _empty_batch(canvases, max_objects)
    if proposals is not None:
        batch |= _empty_proposals(len(plan.rows), options.max_proposals[0 if seed is not None else 1])
    for i, (row, epoch) in enumerate(zip(plan.rows.tolist(), plan.epochs.tolist(), strict=True)):
        if row < 0:
            canvases[i] = 0
            continue
        shorter, flip = options.shorter[-1], False
        if seed is not None:
            rng = augmentation_rng(seed, epoch, row)
            shorter = options.shorter[rng.integers(len(options.shorter))]
            flip = rng.random() < options.flip
        original = (int(split.index.height[row]), int(split.index.width[row]))
        size = resized_size(*original, shorter, options.longest, options.rounding)
        image = _image(split, row, original, size if options.interpolation == "area" else None)
        resize_into(canvases[i], image, size, options.interpolation, flip)
        canvases[i, size[0] :], canvases[i, : size[0], size[1] :] = 0, 0
        boxes, labels = _targets(split, row, max_objects)
        count = len(labels)
        batch["boxes"][i, :count] = resize_boxes(boxes, original, size, flip)
        batch["labels"][i, :count] = labels
        batch["valid"][i, :count] = True
        batch["size"][i], batch["original_size"][i] = size, original
        batch["image_id"][i], batch["index"][i] = split.index.image_id[row], row
        if proposals is not None:
            given, _ = proposals.of(split.index.image_id[row])
            given = _moved_proposals(given, original, size, flip)[: batch["proposals"].shape[1]]
            batch["proposals"][i, : len(given)] = given
            batch["proposals_valid"][i, : len(given)] = True
    return batch


def _empty_batch(canvases: np.ndarray, max_objects: int) -> dict[str, np.ndarray]:
    """Padding rows only, as large as their canvases [b h w 3], so that no size is 0."""
    count, *bucket = canvases.shape[:3]
    sizes = np.tile(np.array(bucket, np.int32), (count, 1))
    return {
        "image": canvases,
        "size": sizes,
        "boxes": np.zeros((count, max_objects, 4), np.float32),
        "labels": np.zeros((count, max_objects), np.int32),
        "valid": np.zeros((count, max_objects), bool),
        "image_id": np.full(count, -1, np.int64),
        "original_size": sizes.copy(),
        "index": np.full(count, -1, np.int32),
    }


def _empty_proposals(count: int, most: int) -> dict[str, np.ndarray]:
    return {"proposals": np.zeros((count, most, 4), np.float32), "proposals_valid": np.zeros((count, most), bool)}


def _image(split: Split, row: int, size: tuple[int, int], at_least: tuple[int, int] | None) -> np.ndarray:
    name = f"{split.index.file_name[row]} (record {row} of {split.name} {split.split})"
    try:
        data = split.source[row]["image"]
    except (OSError, RuntimeError, ValueError) as error:  # what array_record makes of a damaged file
        what = " ".join(str(error).split())
        raise UserError(f"{name}: the record cannot be read ({what}); prepare the data anew") from error
    return decode(data, name, size, at_least)


def _targets(split: Split, row: int, max_objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [o 4] and labels [o] to train on: no crowds, and of too many the largest, in the order of the record."""
    objects = split.objects(row)
    kept = np.flatnonzero(~objects["crowd"])
    if len(kept) > max_objects:
        x1, y1, x2, y2 = objects["boxes"][kept].T
        largest = np.argsort(-(x2 - x1) * (y2 - y1), kind="stable")[:max_objects]
        kept = kept[np.sort(largest)]
    return objects["boxes"][kept], objects["labels"][kept]


def _moved_proposals(boxes: np.ndarray, original: tuple[int, int], size: tuple[int, int], flip: bool) -> np.ndarray:
    """Proposals float32 [r 4] of an original image, as an RPN would have them in the resized one, in their order.

    Clipped to the image, like ground truth when the data is prepared, and without those that have no area then, since
    no RoI can be pooled or box regressed from nothing.
    """
    height, width = original
    clipped = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    moved = resize_boxes(clipped, original, size, flip)
    return moved[(moved[:, 2:] > moved[:, :2]).all(1)]


def _trained_on(split: Split, options: PipelineOptions) -> list[np.ndarray]:
    """The rows of the split that go to each bucket in training."""
    rows = np.flatnonzero(split.num_objects > 0) if options.skip_empty else np.arange(len(split))
    if len(rows) == 0:
        hint = "set data.skip_empty=False to train on images without" if len(split) else "prepare the data anew"
        raise UserError(f"{split.name}: no image of split {split.split!r} has objects; {hint}")
    return _members(split, rows, options, max(options.shorter))


def _members(split: Split, rows: np.ndarray, options: PipelineOptions, shorter: int) -> list[np.ndarray]:
    """The images among `rows` that go to each bucket."""
    original = split.image_sizes[rows]
    sizes = np.stack(resized_size(*original.T, shorter, options.longest, options.rounding), 1)
    chosen = assign_buckets(sizes, options.buckets)
    if (chosen < 0).any():
        first = int(np.flatnonzero(chosen < 0)[0])
        raise _no_bucket(str(split.index.file_name[rows[first]]), original[first], sizes[first], options)
    return [rows[chosen == j] for j in range(len(options.buckets))]


def _no_bucket(what: str, original: np.ndarray, size: np.ndarray, options: PipelineOptions) -> UserError:
    there = ", ".join(f"{h} x {w}" for h, w in options.buckets)
    return UserError(
        f"{what}: {original[0]} x {original[1]} pixels, resized {size[0]} x {size[1]} (height x width), fits none of "
        f"data.buckets {there}; add a larger one, or make data.shorter or data.longest smaller"
    )


def _tell_of_surplus_objects(split: Split, rows: np.ndarray, options: PipelineOptions) -> None:
    if options.max_objects is None:
        return
    surplus = np.maximum(split.num_objects[rows] - options.max_objects, 0)
    if surplus.any():
        warn(
            f"{split.name} {split.split}: {np.count_nonzero(surplus)} images have more than data.max_objects = "
            f"{options.max_objects} objects; their {surplus.sum()} smallest are not trained on"
        )


def _check_share(batch_size: int, world: int) -> None:
    if batch_size < 1 or batch_size % world:
        raise UserError(f"batch_size is {batch_size}; it must be a multiple of the number of processes, {world}")


def _iterate(source: Any, options: PipelineOptions) -> grain.DatasetIterator:
    threads = options.num_threads
    buffer = threads + options.prefetch if threads else 0
    dataset = grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(threads, buffer))
    if options.num_workers:
        if not flags.FLAGS.is_parsed():  # under pytest, in a notebook: Grain reads its debugging flags
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=options.num_workers))
    return iter(dataset)
