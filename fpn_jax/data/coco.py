"""COCO annotations, checked and turned into records.

A COCO JSON has `images` (id, file_name, height, width), `categories` (id, name) and `annotations` (id, image_id,
category_id, bbox as x y w h in pixels; area, iscrowd and segmentation may be missing). Ids need not be contiguous or in
order. Everything that can be checked without reading an image is checked before the first record is written.
"""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpn_jax.data.coco_files import SplitFiles
from fpn_jax.data.decode import decode
from fpn_jax.data.records import Counts, RecordsBuilder, record
from fpn_jax.errors import UserError, some

_THREADS = min(8, os.cpu_count() or 1)
_MOST_BAD_IMAGES = 20  # then the rest is not tried any more
_MOST_NAMED = 10  # images in a message


@dataclass(frozen=True)
class Annotations:
    """A checked COCO JSON."""

    images: list[dict]
    objects: dict[int, list[dict]]  # image id -> its annotations
    categories: dict[int, str]  # original id -> name


def fingerprint(splits: list[SplitFiles]) -> str:
    """A sum over the annotations of all splits: it changes when any of them does."""
    digest = hashlib.sha256()
    for files in splits:
        digest.update(f"{files.split}\n".encode())
        digest.update(hashlib.sha256(_read(files)).digest())
    return digest.hexdigest()


def builder(
    data_dir: str | os.PathLike, dataset: str, splits: list[SplitFiles], source: str, fingerprint: str
) -> RecordsBuilder:
    """The tfds builder of a COCO-format data set; raises a `UserError` for the first fault in its annotations."""
    parsed = {files.split: parse(_read(files), files.annotations) for files in splits}
    for files in splits:
        _check_images(files, parsed[files.split])
    categories = _common_categories(splits, parsed)
    label_of = {category: label for label, category in enumerate(categories)}

    def generator(files: SplitFiles) -> Callable[[Counts], Iterator[dict]]:
        return lambda counts: _records(files, parsed[files.split], label_of, counts)

    return RecordsBuilder(
        data_dir,
        dataset,
        list(categories.values()),
        list(categories),
        {files.split: (len(parsed[files.split].images), generator(files)) for files in splits},
        source=source,
        fingerprint=fingerprint,
        description=f"COCO-format annotations of {source}",
    )


def parse(data: bytes, name: str) -> Annotations:
    """Check a COCO JSON; `name` is its path, for messages. Raises a `UserError` for the first fault."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON ({error}); export the annotations again") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: not a COCO file, which is an object with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise UserError(f"{name}: no list {key!r}; COCO files have images, annotations and categories")
    categories = _categories(content["categories"], name)
    images = _images(content["images"], name)
    objects: dict[int, list[dict]] = {image["id"]: [] for image in images}
    seen: set[int] = set()
    for position, annotation in enumerate(content["annotations"]):
        _check_annotation(annotation, position, objects, categories, seen, name)
        objects[annotation["image_id"]].append(annotation)
    _check_pixels(content["annotations"], images, name)
    return Annotations(images, objects, categories)


def _read(files: SplitFiles) -> bytes:
    try:
        return files.read_annotations()
    except OSError as error:
        raise UserError(f"{files.annotations}: cannot be read ({error.strerror}); check its permissions") from None


def _whole(value: Any) -> bool:
    """Whether it can be an id: COCO's own are none below 0, and hotcoco takes none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _categories(items: list, name: str) -> dict[int, str]:
    """id -> name, in the order of the ids."""
    categories: dict[int, str] = {}
    for position, item in enumerate(items):
        if not (isinstance(item, dict) and _whole(item.get("id")) and isinstance(item.get("name"), str)):
            raise UserError(
                f"{name}: categories[{position}] needs an id, an integer from 0 on, and a name, it is {_short(item)}"
            )
        if item["id"] in categories:
            raise UserError(f"{name}: category id {item['id']} occurs twice; ids must be unique")
        if item["name"] in categories.values():
            raise UserError(f"{name}: category name {item['name']!r} occurs twice; rename one of them")
        categories[item["id"]] = item["name"]
    if not categories:
        raise UserError(f"{name}: categories is empty; list the classes there")
    return dict(sorted(categories.items()))


def _images(items: list, name: str) -> list[dict]:
    if not items:
        raise UserError(f"{name}: images is empty, a split needs at least one; fill it or remove the file")
    seen: set[int] = set()
    for position, item in enumerate(items):
        where = f"{name}: images[{position}]"
        if not (isinstance(item, dict) and _whole(item.get("id"))):
            raise UserError(f"{where} needs an id, an integer from 0 on, it is {_short(item)}")
        where = f"{name}: image id {item['id']}"
        if item["id"] in seen:
            raise UserError(f"{where} occurs twice; ids must be unique")
        seen.add(item["id"])
        if not (isinstance(item.get("file_name"), str) and item["file_name"]):
            raise UserError(f"{where} has no file_name; give every image one")
        for key in ("height", "width"):
            if not (_whole(item.get(key)) and item[key] > 0):
                raise UserError(f"{where} ({item['file_name']}) needs a {key} > 0 in pixels, it is {item.get(key)!r}")
    return items


def _check_annotation(
    item: Any, position: int, objects: dict[int, list], categories: dict[int, str], seen: set[int], name: str
) -> None:
    if not (isinstance(item, dict) and _whole(item.get("id"))):
        raise UserError(f"{name}: annotations[{position}] needs an id, an integer from 0 on, it is {_short(item)}")
    where = f"{name}: annotation id {item['id']}"
    if item["id"] in seen:
        raise UserError(f"{where} occurs twice; ids must be unique")
    seen.add(item["id"])
    if not (_whole(item.get("image_id")) and item["image_id"] in objects):
        raise UserError(
            f"{where} points to image_id {item.get('image_id')!r}, which is not among the images; "
            "remove the annotation or add the image"
        )
    if not (_whole(item.get("category_id")) and item["category_id"] in categories):
        raise UserError(
            f"{where} points to category_id {item.get('category_id')!r}, which is not among the categories; "
            f"those are {_short(list(categories))}"
        )
    bbox = item.get("bbox")
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(_number(value) for value in bbox)):
        raise UserError(f"{where} needs a bbox of four numbers x, y, width, height in pixels, it is {_short(bbox)}")
    if item.get("area") is not None and not (_number(item["area"]) and item["area"] >= 0):
        raise UserError(f"{where}: area is {_short(item['area'])}; give a number of at least 0 or leave the key out")
    if item.get("iscrowd", 0) not in (0, 1, None):
        raise UserError(f"{where}: iscrowd is {_short(item['iscrowd'])}; give 0 or 1 or leave the key out")


def _check_pixels(annotations: list[dict], images: list[dict], name: str) -> None:
    """Boxes in fractions of the image, a common mistake, would all be dropped or tiny: say so."""
    boxes = [item["bbox"] for item in annotations]
    if boxes and max(map(max, boxes)) <= 1 and max(image["width"] for image in images) > 1:
        raise UserError(f"{name}: all boxes lie within 0 .. 1, like fractions of the image; COCO's bbox is in pixels")


def _common_categories(splits: list[SplitFiles], parsed: dict[str, Annotations]) -> dict[int, str]:
    """The categories of all splits together, by id; an id must mean the same class in each."""
    common: dict[int, str] = {}
    for files in splits:
        for category, name in parsed[files.split].categories.items():
            if common.setdefault(category, name) != name:
                raise UserError(
                    f"{files.annotations}: category id {category} is {name!r} here and {common[category]!r} in "
                    f"{splits[0].annotations}; give a class the same id in every split"
                )
    names = list(common.values())
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{splits[-1].annotations}: category {name!r} has another id than in {splits[0].annotations}; give a "
                "class the same id in every split"
            )
    return dict(sorted(common.items()))


def _check_images(files: SplitFiles, annotations: Annotations) -> None:
    missing = files.images.missing(image["file_name"] for image in annotations.images)
    if missing:
        raise UserError(
            f"{files.annotations}: {len(missing)} of {len(annotations.images)} images are missing: "
            f"{some(missing, _MOST_NAMED)}; looked in {files.images.looked_in()}; copy them there or remove their "
            "entries"
        )


def _records(files: SplitFiles, annotations: Annotations, label_of: dict[int, int], counts: Counts) -> Iterator[dict]:
    """The split's records, every image tried; raises a `UserError` that names the bad ones when all are through."""
    bad: list[UserError] = []
    for image, data in _read_images(files, annotations.images):
        if isinstance(data, UserError):
            bad.append(data)
            if len(bad) >= _MOST_BAD_IMAGES:
                break
            continue
        objects = [_object(item, label_of) for item in annotations.objects[image["id"]]]
        size = image["height"], image["width"]
        yield record(data, image["id"], image["file_name"], size, objects, counts)
    if len(bad) == 1:
        raise UserError(f"{bad[0]} (or remove its entry from {files.annotations})")
    if bad:
        # What to do about each is said once for all.
        troubles = [str(error).rpartition("; ")[0] or str(error) for error in bad]
        more = " or more" if len(bad) >= _MOST_BAD_IMAGES else ""
        raise UserError(
            f"{files.annotations}: {len(bad)}{more} images are bad: {some(troubles, _MOST_NAMED, ' | ')}; copy or "
            "download them again, or correct or remove their entries"
        )


def _object(item: dict, label_of: dict[int, int]) -> dict:
    x, y, w, h = item["bbox"]
    segmentation = item.get("segmentation")
    return {
        "xywh": (x, y, w, h),
        "label": label_of[item["category_id"]],
        "category_id": item["category_id"],
        "id": item["id"],
        "area": float(w * h if item.get("area") is None else item["area"]),
        "is_crowd": bool(item.get("iscrowd", 0)),
        "segmentation": json.dumps(segmentation, separators=(",", ":")) if segmentation else "",
    }


def _read_images(files: SplitFiles, images: list[dict]) -> Iterator[tuple[dict, bytes | UserError]]:
    """Every image with its file's bytes, or with what is wrong with it, in order; decoded in threads to find out."""

    def load(image: dict) -> bytes | UserError:
        try:
            data = files.images.read(image["file_name"])
            decode(data, files.images.where(image["file_name"]), (image["height"], image["width"]))
        except UserError as error:
            return error
        return data

    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[tuple[dict, Future]] = deque()
        for image in images:
            waiting.append((image, pool.submit(load, image)))
            if len(waiting) > 2 * _THREADS:  # a few images ahead, not the whole data set in memory
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def default_name(folder: str | os.PathLike) -> str:
    """A data set's name from its folder's: what tfds does not take becomes `_`."""
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in Path(folder).resolve().name).strip("_")
    return name if name[:1].isalpha() else f"data_{name}".rstrip("_")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
