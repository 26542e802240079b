"""Prepared data sets: which there are, and a split of one as records plus an index of everything but the pixels.

The index holds the size and the objects of every image, so that batches can be planned, and ground truth handed to
the evaluator, without opening a record. It is made by one pass over the records and kept beside them.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from fpn_jax.data.decode import decode
from fpn_jax.data.records import clip_xywh
from fpn_jax.errors import UserError, some
from fpn_jax.storage import mirror, paths

_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # what np.load makes of a spoiled file
_FORMAT = "array_record"  # the one of tfds' formats with random access that needs no other package
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclass(frozen=True)
class Index:
    """Per image, in record order, and per object: those of image i are rows offsets[i] .. offsets[i + 1]."""

    image_id: np.ndarray  # int64 [n]
    height: np.ndarray  # int32 [n], pixels
    width: np.ndarray  # int32 [n]
    file_name: np.ndarray  # str [n]
    offsets: np.ndarray  # int64 [n + 1]
    bbox_xyxy: np.ndarray  # float32 [o 4], pixels, clipped to the image
    xywh: np.ndarray  # float64 [o 4], pixels, as annotated
    label: np.ndarray  # int32 [o], 0 .. k-1
    category_id: np.ndarray  # int64 [o], as annotated
    area: np.ndarray  # float64 [o], pixels
    iscrowd: np.ndarray  # bool [o]
    annotation_id: np.ndarray  # int64 [o]


class Record(Mapping):
    """One record, in which no more is parsed than what is asked for.

    The input pipeline asks for the image alone, since the objects are in the index: that takes a tenth of the time.
    """

    def __init__(self, serialized: bytes, features: tfds.features.FeaturesDict):
        self._serialized, self._features = serialized, features

    @cached_property
    def _all(self) -> Mapping[str, Any]:
        return self._features.deserialize_example_np(self._serialized, decoders={"image": tfds.decode.SkipDecoding()})

    def __getitem__(self, key: str) -> Any:
        if key != "image":
            return self._all[key]
        return tf_example_pb2.Example.FromString(self._serialized).features.feature["image"].bytes_list.value[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


class Records(Sequence):
    """The records of a split, in random access, also after being pickled."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self._features = builder.info.features
        self._source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, number: int) -> Record:
        return Record(self._source[number], self._features)


@dataclass(frozen=True)
class Split:
    """One split of a prepared data set."""

    name: str  # of the data set
    split: str
    source: Any  # random access: source[i]["image"] is the bytes of the image file
    index: Index
    class_names: list[str]  # by label
    category_ids: list[int]  # label -> the id that annotations and results use

    def __len__(self) -> int:
        return len(self.index.image_id)

    @property
    def image_sizes(self) -> np.ndarray:
        """int32 [n 2]: height and width of every image."""
        return np.stack([self.index.height, self.index.width], 1)

    @property
    def num_objects(self) -> np.ndarray:
        """int32 [n]: objects of every image, crowds not counted."""
        solid = np.concatenate([[0], np.cumsum(~self.index.iscrowd)])
        return (solid[self.index.offsets[1:]] - solid[self.index.offsets[:-1]]).astype(np.int32)

    @property
    def max_objects(self) -> int:
        """The most objects that any image has, crowds not counted."""
        return int(self.num_objects.max(initial=0))

    @property
    def checksum(self) -> str:
        """Of all objects: their boxes, labels and whether they are crowds."""
        parts = (self.index.offsets, self.index.bbox_xyxy, self.index.label, self.index.iscrowd)
        return f"{functools.reduce(lambda crc, part: zlib.crc32(np.ascontiguousarray(part), crc), parts, 0):08x}"

    def objects(self, i: int) -> dict[str, np.ndarray]:
        """Objects of image i: boxes float32 [m 4] (pixels, clipped), labels int32 [m], crowd bool [m]."""
        rows = slice(self.index.offsets[i], self.index.offsets[i + 1])
        return {
            "boxes": self.index.bbox_xyxy[rows],
            "labels": self.index.label[rows],
            "crowd": self.index.iscrowd[rows],
        }

    def with_classes(self, names: Sequence[str], category_ids: Sequence[int]) -> "Split":
        """The same split, labelled by a list of classes: label -> name and category id.

        Category ids stay what they are, so scores do not change. Raises a `UserError` that names the data set's
        categories which the list lacks, or has under another name: then the ids mean something else there.
        """
        label_of = {category: label for label, category in enumerate(category_ids)}
        own = list(zip(self.category_ids, self.class_names, strict=True))
        lacking = [f"{category} {name!r}" for category, name in own if category not in label_of]
        if lacking:
            raise UserError(
                f"data.classes: the list lacks categories of {self.name}: {some(lacking)}; set data.classes='' to "
                "take the data set's own classes"
            )
        other = [
            f"{category} is {name!r}, not {names[label_of[category]]!r}"
            for category, name in own
            if name.casefold() != names[label_of[category]].casefold()
        ]
        if other:
            raise UserError(
                f"data.classes: the list has other names for categories of {self.name}: {some(other)}; set "
                "data.classes='' to take the data set's own classes"
            )
        relabel = np.array([label_of[category] for category in self.category_ids], np.int32)
        index = dataclasses.replace(self.index, label=relabel[self.index.label])
        return dataclasses.replace(self, index=index, class_names=list(names), category_ids=list(category_ids))

    def ground_truth(self) -> dict:
        """The split as a COCO dict with its original ids and boxes, for the evaluator; without segmentations."""
        index = self.index
        images = [
            {"id": int(i), "file_name": str(name), "height": int(h), "width": int(w)}
            for i, name, h, w in zip(index.image_id, index.file_name, index.height, index.width, strict=True)
        ]
        owners = np.repeat(index.image_id, np.diff(index.offsets))
        annotations = [
            {
                "id": int(index.annotation_id[j]),
                "image_id": int(owners[j]),
                "category_id": int(index.category_id[j]),
                "bbox": index.xywh[j].tolist(),
                "area": float(index.area[j]),
                "iscrowd": int(index.iscrowd[j]),
            }
            for j in range(len(owners))
        ]
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.class_names, strict=True)]
        return {"images": images, "annotations": annotations, "categories": categories}


def open_split(
    data_dir: str | os.PathLike, dataset: str, split: str, cache_dir: str = "", chosen_by: str = "split"
) -> Split:
    """Open a split, e.g. ("data", "coco/2017", "validation"); a first opening of a foreign data set takes a pass.

    Of a data_dir on gs:// the split's files are copied to this machine first, once, below `cache_dir` (see
    `fpn_jax.storage.mirror`): in a shuffled epoch every image would else be waited for, a request each.

    Any data set that tfds prepared in its array_record format will do if it has `image` and `objects` with `bbox` and
    `label`. Raises a `UserError` that names what there is if the data set or the split does not exist; chosen_by: the
    key or flag by which the user chose the split, to name there.
    """
    builder = _open(data_dir, dataset, split, cache_dir)
    if split not in builder.info.splits:
        there = ", ".join(builder.info.splits)
        raise UserError(
            f"{builder.data_dir}: no split {split!r} in data set {dataset}; it has {there}: set {chosen_by} to one of "
            "them"
        )
    class_names = _check_features(builder, dataset)
    source = Records(builder, split)
    if len(source) == 0:
        raise UserError(f"{builder.data_dir}: split {split!r} of data set {dataset} has no images; prepare it anew")
    category_ids = (builder.info.metadata or {}).get("category_ids") or list(range(1, len(class_names) + 1))
    index = _load_or_build_index(Path(builder.data_dir) / f"index-{split}.npz", source, category_ids)
    return Split(dataset, split, source, index, class_names, [int(i) for i in category_ids])


def list_splits(data_dir: str | os.PathLike, dataset: str) -> list[str]:
    """Names of a prepared data set's splits; raises a `UserError` if there is no such data set."""
    return list(_open(data_dir, dataset).info.splits)


def list_datasets(data_dir: str | os.PathLike) -> list[str]:
    """Names of the data sets below a folder, e.g. ["coco/2017", "scenes"]."""
    root = paths.path(data_dir)
    found = {
        file.parent.parent.relative_to(root).as_posix()
        for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json")
        for file in root.glob(pattern)
        if _VERSION.fullmatch(file.parent.name)
    }
    return sorted(found)


def _open(data_dir: str | os.PathLike, dataset: str, split: str = "", cache_dir: str = "") -> tfds.core.DatasetBuilder:
    """The read-only builder of a data set's newest version; of a remote one, with the records of `split` alone."""
    folder = paths.path(data_dir) / dataset
    versions = [f for f in folder.glob("*") if _VERSION.fullmatch(f.name) and (f / "dataset_info.json").exists()]
    if not versions:
        there = list_datasets(data_dir)
        hint = f"it has {', '.join(there)}" if there else "it has none"
        raise UserError(
            f"{data_dir}: no prepared data set {dataset!r}; {hint}. "
            f"Make it with: python -m fpn_jax.prepare --source=... --data_dir={data_dir} --name={dataset}"
        )
    # tfds' own coco/2017 may lie beside ours: what cannot be read here gives way to what can.
    newest = max(versions, key=lambda f: (_stored_format(f) == _FORMAT, [int(part) for part in f.name.split(".")]))
    if paths.is_remote(newest):
        newest = mirror.mirror(newest, lambda name: _belongs(name, split), cache_dir)
    return tfds.builder_from_directory(newest)


def _belongs(name: str, split: str) -> bool:
    """Whether a file of a prepared data set is needed to read the split: its records, its index, what tells of all."""
    is_records, is_index = "-of-" in name, name.startswith("index-")
    return f"-{split}." in name if is_records or is_index else name.endswith((".json", ".txt"))


def _stored_format(folder: Any) -> str:
    """The records' format, tfrecord in data sets so old that they do not tell."""
    try:
        return json.loads((folder / "dataset_info.json").read_text()).get("fileFormat", "tfrecord")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/dataset_info.json: cannot be read ({error}); prepare the data set anew") from None


def _check_features(builder: tfds.core.DatasetBuilder, dataset: str) -> list[str]:
    """The class names; raises a `UserError` if the data set is not one for detection, or not readable here."""
    stored = _stored_format(Path(builder.data_dir))
    if stored != _FORMAT:
        raise UserError(
            f"{builder.data_dir}: its records are of format {stored}, which has no random access; prepare the data "
            f'set with file_format="{_FORMAT}"'
        )
    features = dict(builder.info.features)
    objects = getattr(features.get("objects"), "feature", None)  # what a Sequence is a sequence of
    objects = dict(objects) if isinstance(objects, tfds.features.FeaturesDict) else {}
    bbox = objects.get("bbox")
    needed = {
        "image": isinstance(features.get("image"), tfds.features.Image),
        "objects/bbox": isinstance(bbox, tfds.features.BBoxFeature) and _is_relative_yxyx(bbox),
        "objects/label": isinstance(objects.get("label"), tfds.features.ClassLabel),
    }
    missing = [key for key, present in needed.items() if not present]
    if missing:
        raise UserError(
            f"{builder.data_dir}: {dataset} is no detection data set: it lacks {', '.join(missing)} (an Image, and a "
            f"Sequence of BBoxFeature and ClassLabel); it has {', '.join(sorted(features))}"
        )
    return list(objects["label"].names)


def _is_relative_yxyx(bbox: tfds.features.BBoxFeature) -> bool:
    return getattr(bbox.bbox_format, "value", bbox.bbox_format) in ("REL_YXYX", "rel_yxyx")


def _load_or_build_index(path: Path, source: Sequence[dict], category_ids: list[int]) -> Index:
    if path.exists():
        with contextlib.suppress(*_DAMAGED), path.open("rb") as file, np.load(file) as stored:
            index = Index(**{field.name: stored[field.name] for field in dataclasses.fields(Index)})
            if len(index.image_id) == len(source):
                return index
    index = _build_index(source, category_ids)
    with contextlib.suppress(OSError):  # a read-only folder: the index lives as long as the process
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
        try:
            np.savez(temporary, **dataclasses.asdict(index))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return index


def _build_index(source: Sequence[dict], category_ids: list[int]) -> Index:
    """One pass over the records, ours or another tfds builder's."""
    images: dict[str, list] = {"image_id": [], "height": [], "width": [], "file_name": []}
    objects: dict[str, list] = {
        name: [] for name in ("bbox_xyxy", "xywh", "label", "category_id", "area", "iscrowd", "annotation_id")
    }
    counts = [0]
    for number in range(len(source)):
        item = source[number]
        height, width = _size(item, number)
        images["image_id"].append(_image_id(item))
        images["height"].append(height)
        images["width"].append(width)
        images["file_name"].append(_file_name(item, number))
        columns = _objects(item["objects"], height, width, category_ids)
        counts.append(len(columns["label"]))
        for name, values in columns.items():
            objects[name].append(values)
    joined = {name: np.concatenate(values) for name, values in objects.items()}
    if len(np.unique(joined["annotation_id"])) < len(joined["label"]):
        joined["annotation_id"] = np.arange(1, len(joined["label"]) + 1, dtype=np.int64)
    ids = images["image_id"]
    if None in ids or len(set(ids)) < len(ids):
        ids = range(len(ids))  # results must be told apart, so the records' numbers have to do
    return Index(
        image_id=np.asarray(ids, np.int64),
        height=np.asarray(images["height"], np.int32),
        width=np.asarray(images["width"], np.int32),
        file_name=np.asarray(images["file_name"], np.str_),
        offsets=np.cumsum(counts, dtype=np.int64),
        **joined,
    )


def _objects(objects: dict[str, Any], height: int, width: int, category_ids: list[int]) -> dict[str, np.ndarray]:
    """An image's objects as columns of the index; what a foreign record does not tell is derived."""
    label = np.asarray(objects["label"], np.int32).reshape(-1)
    if "xywh" in objects:
        xywh = np.asarray(objects["xywh"], np.float64).reshape(-1, 4)
    else:
        scale = np.array([height, width, height, width])
        y1, x1, y2, x2 = (np.asarray(objects["bbox"], np.float64).reshape(-1, 4) * scale).T
        xywh = np.stack([x1, y1, x2 - x1, y2 - y1], 1)
    clipped = [clip_xywh(box, height, width) for box in xywh.tolist()]
    kept = np.array([box is not None for box in clipped], bool)  # all of them in our own records
    columns = {
        "xywh": xywh,
        "label": label,
        "category_id": np.asarray(category_ids, np.int64)[label],
        "area": np.asarray(objects.get("area", xywh[:, 2] * xywh[:, 3]), np.float64),
        "iscrowd": np.asarray(objects.get("is_crowd", np.zeros(len(label))), bool),
        "annotation_id": np.asarray(objects.get("id", np.full(len(label), -1)), np.int64),
    }
    boxes = np.asarray([box for box in clipped if box is not None], np.float32).reshape(-1, 4)
    return {"bbox_xyxy": boxes} | {name: column[kept] for name, column in columns.items()}


def _image_id(item: dict) -> int | None:
    for key in ("image_id", "image/id", "id"):
        value = item.get(key)
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            return int(value)
    return None


def _file_name(item: dict, number: int) -> str:
    for key in ("file_name", "image/filename", "image/file_name", "filename"):
        if key in item:
            value = item[key]
            return value.decode() if isinstance(value, bytes) else str(value)
    return f"record {number}"


def _size(item: dict, number: int) -> tuple[int, int]:
    if "height" in item and "width" in item:
        return int(item["height"]), int(item["width"])
    return decode(item["image"], _file_name(item, number), None).shape[:2]
