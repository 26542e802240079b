"""What one record of our own data sets holds, and how such a data set is written.

A record is an image file as it is, byte for byte, and its objects with everything that COCO's annotations tell about
them. Boxes are kept twice: `bbox` clipped to the image and normalised (tfds' convention, ymin xmin ymax xmax), for
training and for other readers of tfds; `xywh` in pixels exactly as annotated, for the evaluator.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from fpn_jax.errors import UserError

VERSION = "1.0.0"
_SHARD_BYTES = 256 << 20
NAME = re.compile(r"[a-zA-Z]\w*(/[\w+.-]+)?")  # name, or name/config as in coco/2017


@dataclass
class Counts:
    """What happened to a split's images and boxes while it was written."""

    images: int = 0
    objects: int = 0  # kept ones, crowds included
    crowds: int = 0
    max_objects: int = 0  # of any image, crowds left out
    empty: int = 0  # images without any object that is not a crowd
    clipped: int = 0  # boxes that reach over the image's edge
    dropped: int = 0  # boxes without area, or wholly outside the image


def features(class_names: Sequence[str]) -> tfds.features.FeaturesDict:
    """The features of a record; labels are 0 .. k-1 in the order of `class_names`."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "image_id": np.int64,
            "file_name": tfds.features.Text(),
            "height": np.int32,
            "width": np.int32,
            "objects": tfds.features.Sequence(
                {
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(names=list(class_names)),
                    "category_id": np.int64,
                    "id": np.int64,
                    "area": np.float64,
                    "is_crowd": np.bool_,
                    "xywh": tfds.features.Tensor(shape=(4,), dtype=np.float64),
                    "segmentation": tfds.features.Text(),
                }
            ),
        }
    )


def clip_xywh(xywh: Sequence[float], height: int, width: int) -> tuple[float, float, float, float] | None:
    """x1 y1 x2 y2 of a COCO box cut to the image, or None if nothing is left of it (or it had no area)."""
    x, y, w, h = xywh
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if not (w > 0 and h > 0 and x2 > x1 and y2 > y1):  # written so that NaN is dropped as well
        return None
    return x1, y1, x2, y2


def record(
    image: bytes, image_id: int, file_name: str, size: tuple[int, int], objects: Iterable[dict], counts: Counts
) -> dict[str, Any]:
    """One record; `counts` is brought up to date.

    `objects` are dicts of xywh (pixels), label, category_id, id, area, is_crowd and segmentation (a str). Those
    without area or wholly outside the image are left out and counted.
    """
    height, width = size
    kept = []
    for item in objects:
        box = clip_xywh(item["xywh"], height, width)
        if box is None:
            counts.dropped += 1
            continue
        x1, y1, x2, y2 = box
        x, y, w, h = item["xywh"]
        # Half a hundredth of a pixel over the edge is a rounding of the annotation tool, not worth a report.
        counts.clipped += min(x, y) < -0.005 or x + w > width + 0.005 or y + h > height + 0.005
        bbox = tfds.features.BBox(ymin=y1 / height, xmin=x1 / width, ymax=y2 / height, xmax=x2 / width)
        kept.append({**item, "bbox": bbox, "xywh": np.asarray(item["xywh"], np.float64)})
    solid = sum(not item["is_crowd"] for item in kept)
    counts.images += 1
    counts.objects += len(kept)
    counts.crowds += len(kept) - solid
    counts.max_objects = max(counts.max_objects, solid)
    counts.empty += solid == 0
    return {
        "image": image,
        "image_id": image_id,
        "file_name": file_name,
        "height": height,
        "width": width,
        "objects": kept,
    }


class RecordsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A tfds builder of such records whose name, classes and splits are known only at run time.

    `splits` maps a split's name to its number of images and a function from its `Counts` to its records.
    `fingerprint` tells whether the source is still the same: prepared data carries it.
    """

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # tfds would look for files beside this source, with a package that it does not require
    url_infos: ClassVar[dict] = {}

    def __init__(
        self,
        data_dir: str | os.PathLike,
        dataset: str,
        class_names: Sequence[str],
        category_ids: Sequence[int],
        splits: dict[str, tuple[int, Callable[[Counts], Iterator[dict]]]],
        source: str,
        fingerprint: str,
        description: str = "",
    ):
        self.name, _, config = dataset.partition("/")
        self.class_names = list(class_names)
        self.category_ids = [int(i) for i in category_ids]
        self.splits = splits
        self.counts = {name: Counts() for name in splits}
        self.source, self.fingerprint, self.about = source, fingerprint, description
        super().__init__(
            data_dir=data_dir, config=tfds.core.BuilderConfig(name=config, version=VERSION) if config else None
        )

    def _info(self) -> tfds.core.DatasetInfo:
        metadata = tfds.core.MetadataDict(
            source=self.source, fingerprint=self.fingerprint, category_ids=self.category_ids, counts={}
        )
        return tfds.core.DatasetInfo(
            builder=self, description=self.about, features=features(self.class_names), metadata=metadata
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[dict]]:
        del dl_manager  # what has to be fetched was: the classes had to be known before
        return {name: self._generate_examples(name) for name in self.splits}

    def _generate_examples(self, split: str) -> Iterator[dict]:
        counts = self.counts[split] = Counts()
        total, generate = self.splits[split]
        # The bar keeps silent when standard error is not a terminal.
        yield from tqdm(generate(counts), desc=f"{self.name} {split}", total=total, unit=" images", disable=None)
        self.info.metadata["counts"][split] = dataclasses.asdict(counts)

    def _generate_splits(
        self, dl_manager: tfds.download.DownloadManager, download_config: tfds.download.DownloadConfig
    ) -> list[tfds.core.SplitInfo]:
        """Write the records in the order they come.

        tfds' own writer sorts them by a hash, for which it needs TensorFlow's files as soon as they exceed 1 GB, and
        twice the space. Nobody here reads them in their order on disk.
        """
        del download_config
        return [self._write_split(*item) for item in self._split_generators(dl_manager).items()]

    def _write_split(self, split: str, examples: Iterator[dict]) -> tfds.core.SplitInfo:
        template = self._get_filename_template(split_name=split)
        lengths, size = [], 0
        serialized = (self.info.features.serialize_example(example) for example in examples)
        for first in serialized:
            shard = Path(self.data_dir) / f"{split}.{len(lengths)}.part"
            written = _write_shard(shard, itertools.chain([first], serialized))
            lengths.append(written[0])
            size += written[1]
        for number in range(len(lengths)):  # their names tell how many there are
            path = template.sharded_filepath(shard_index=number, num_shards=len(lengths))
            (Path(self.data_dir) / f"{split}.{number}.part").rename(path)
        return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)


def _write_shard(path: Path, serialized: Iterator[bytes]) -> tuple[int, int]:
    """Write records until the shard is full; (number of records, bytes)."""
    writer = ArrayRecordWriter(str(path), "group_size:1")  # each record can be read alone, as tfds writes them
    number = size = 0
    try:
        for data in serialized:
            with _disk_errors(path):
                writer.write(data)
            number += 1
            size += len(data)
            if size >= _SHARD_BYTES:
                break
    except BaseException:
        with contextlib.suppress(RuntimeError):
            writer.close()
        raise
    with _disk_errors(path):
        writer.close()
    return number, size


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """ArrayRecord's writer raises a RuntimeError of several lines when the disk is full."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).split(";")[0]
        raise UserError(
            f"{path.parent}: {reason}; free some space or choose another --data_dir, then run this again"
        ) from None


def already_prepared(data_dir: str | os.PathLike, dataset: str, source: str, fingerprint: str | None) -> bool:
    """Whether the data set is there, made from this source; False if nothing is there under its name.

    A fingerprint of None takes what is there. Raises a `UserError` if it was made from something else, or if the name
    is not one that tfds accepts.
    """
    if not NAME.fullmatch(dataset):
        raise UserError(
            f"--name={dataset}: a data set's name starts with a letter and goes on with letters, digits and _ "
            "(then, at most, one / and a second name); give such a --name"
        )
    folder = Path(data_dir) / dataset / VERSION
    if not folder.exists():
        return False
    stored = metadata(folder)
    if fingerprint is not None and stored.get("fingerprint") != fingerprint:
        was = stored.get("source", "something else")
        change = "which has changed since" if was == source else f"not from {source}"
        raise UserError(
            f"{folder} was prepared from {was}, {change}: remove that folder to prepare it anew, or give the new data "
            "set another --name"
        )
    return True


def metadata(folder: Path) -> dict[str, Any]:
    """What `RecordsBuilder` wrote about a prepared data set, {} for another builder's."""
    try:
        return json.loads((folder / "metadata.json").read_text())
    except (OSError, ValueError):
        return {}


def write(builder: RecordsBuilder) -> None:
    """Write a data set that is not there yet.

    The records go to a temporary folder that is renamed when all of them are there, so that a failure leaves nothing
    behind that could be taken for the whole. Raises the `UserError` that a split's function raises.
    """
    _remove_leftovers(Path(builder.data_dir))
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # tfds tells sizes that it does not know
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False, compute_stats=False),
            )
    except Exception as error:
        cause = _user_error_within(error)
        if cause is None:
            raise
        raise cause from None
    for unused in ("downloads/extracted", "downloads"):  # made by tfds whether or not there is something to fetch
        with contextlib.suppress(OSError):
            (Path(builder.data_dir_root) / unused).rmdir()


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed run has left; a folder that was written to within the hour may be a live run's."""
    for leftover in folder.parent.glob(f"incomplete.*_{folder.name}"):
        newest = max(path.stat().st_mtime for path in [leftover, *leftover.iterdir()])
        if time.time() - newest > 3600:
            shutil.rmtree(leftover, ignore_errors=True)


def _user_error_within(error: BaseException) -> UserError | None:
    """The `UserError` that tfds wrapped into its own exception, if that is what happened."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
