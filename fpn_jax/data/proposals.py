"""Given proposals: boxes from a file in which Fast R-CNN looks for objects, where no RPN proposes any.

What can be read, besides what `fpn_jax.given_proposals` reads:

    .npz   the interchange format, for any tool: arrays image_id int [p], boxes [p 4] and perhaps scores [p], a row per
           box, the images in any order. For example
           np.savez("proposals.npz", image_id=[139, 139, 285], boxes=[[x1, y1, x2, y2], ...], scores=[0.9, 0.5, 0.7])
    .npz   our compact file, made by `write`: ten bytes per proposal, and images without proposals are in it as well
    .json  COCO results: [{"image_id": 139, "bbox": [x, y, width, height], "score": 0.9}, ...]

Boxes are x1 y1 x2 y2 (COCO's are x y width height) in pixels of the image as it is on disk, with x2 >= x1 and y2 >= y1;
they cover [x1, x2) x [y1, y2). Image ids are the data set's own. Of scores the higher is better, on any scale; a file
without any has its boxes best first.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from fpn_jax.errors import UserError
from fpn_jax.storage import paths

READABLE = (".npz", ".json")
_VERSION = 1  # of our compact file
_STEPS = 65535  # that a side of an image is divided into there
_COMPACT = {  # its arrays: type and number of axes
    "image_id": ("i8", 1),  # [n]
    "image_size": ("i4", 2),  # [n 2], height and width
    "offsets": ("i8", 1),  # [n + 1]
    "boxes": ("u2", 2),  # [p 4], x1 y1 x2 y2 in _STEPS-ths of the width and the height
    "scores": ("f2", 1),  # [p]
}
_MOST_SCORE = 65504.0  # of float16
_SHOWN = 5  # ids in a message


@dataclass(frozen=True)
class ProposalTable:
    """Proposals of many images, best first: those of image image_id[i] are rows offsets[i] .. offsets[i + 1].

    Whoever makes a table has checked the values; it sorts them. Raises `ValueError` if the arrays do not fit together.
    """

    image_id: np.ndarray  # int64 [n], the data set's own, each once
    offsets: np.ndarray  # int64 [n + 1]
    boxes: np.ndarray  # float32 [p 4], x1 y1 x2 y2 in pixels of the original image
    scores: np.ndarray  # float32 [p], falling within an image; all 0 if the file has none
    file: str = "the proposals"  # where they come from, for messages

    def __post_init__(self):
        _check_layout(self.image_id, self.offsets, self.boxes, self.scores)
        rises = self.scores[1:] > self.scores[:-1]
        between = self.offsets[1:-1] - 1  # from one image to the next scores may rise
        rises[between[(between >= 0) & (between < len(rises))]] = False
        unsorted = np.unique(np.searchsorted(self.offsets, np.flatnonzero(rises), side="right") - 1)
        if len(unsorted):  # image by image: an order of all rows at once would take more memory than the rows
            boxes, scores = self.boxes.copy(), self.scores.copy()
            for i in unsorted:
                rows = slice(self.offsets[i], self.offsets[i + 1])
                order = np.argsort(-scores[rows], kind="stable")
                boxes[rows], scores[rows] = boxes[rows][order], scores[rows][order]
            object.__setattr__(self, "boxes", boxes)
            object.__setattr__(self, "scores", scores)

    @classmethod
    def from_lists(
        cls,
        image_ids: Sequence[int],
        boxes: Sequence[np.ndarray],
        scores: Sequence[np.ndarray] | None = None,
        file: str = "the proposals",
        xywh: bool = False,
    ) -> "ProposalTable":
        """A table of n images from their ids, boxes [n_i 4] each and scores [n_i] each; an image may have none.

        Boxes are x1 y1 x2 y2, or x y width height with `xywh`. Raises a `UserError` that names `file` and the image
        for what is no box or score, and for an id that occurs twice.
        """
        for what, items in (("boxes", boxes), ("scores", scores)):
            if items is not None and len(items) != len(image_ids):
                raise UserError(f"{file}: {len(items)} arrays of {what} for {len(image_ids)} images; give one for each")
        if not all(_is_integer(image_id) for image_id in image_ids):
            raise UserError(f"{file}: has image ids that are no integers; give the data set's own")
        found, scored = [np.zeros((0, 4), np.float32)], [np.zeros(0, np.float32)]
        for i, image_id in enumerate(image_ids):
            where = f"{file}: image id {image_id}"
            where_row = partial("{}, box {}".format, where)
            found.append(_checked_boxes(boxes[i], where, where_row, xywh))
            values = np.zeros(len(found[-1])) if scores is None else scores[i]
            scored.append(_checked_scores(values, len(found[-1]), where, where_row))
        offsets = np.cumsum([0, *(len(x) for x in found[1:])], dtype=np.int64)
        return _table(np.array(image_ids, np.int64), offsets, np.concatenate(found), np.concatenate(scored), file)

    def of(self, image_id: int, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The best boxes float32 [r 4] and scores float32 [r] of an image, at most `most`; views of the table.

        Raises `KeyError` for an image that is not in the table, which check_covers tells beforehand.
        """
        i = self._places[int(image_id)]
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        rows = slice(start, end if most is None else min(end, start + most))
        return self.boxes[rows], self.scores[rows]

    def check_covers(self, split: Any, file: str | None = None, rows: np.ndarray | None = None) -> None:
        """Raise a `UserError` that tells which images of a `datasets.Split`, or of `rows` of it, the table lacks.

        `file` stands for the table's own name. An image may have no proposals; ids that the split lacks are fine.
        """
        rows = np.arange(len(split)) if rows is None else rows
        lacking = rows[~np.isin(split.index.image_id[rows], self.image_id)]
        if len(lacking):
            names = [f"{split.index.image_id[row]} ({split.index.file_name[row]})" for row in lacking[:_SHOWN]]
            raise UserError(
                f"{file or self.file}: has no proposals for {len(lacking)} of {len(rows)} images of {split.name} "
                f"{split.split}: image ids {_some(names, len(lacking))}; it has "
                f"{_some(self.image_id[:_SHOWN].tolist(), len(self.image_id))}; give the file that was made for this "
                "split, or make proposals for all its images"
            )

    @cached_property
    def _places(self) -> dict[int, int]:
        return {image_id: i for i, image_id in enumerate(self.image_id.tolist())}


def read(path: str | os.PathLike) -> ProposalTable:
    """The proposals in a file of one of the formats above.

    Raises a one-line `UserError` that names the file, and the array, entry or row, if it is not there, not whole, of no
    such format, or has boxes or scores that are none.
    """
    path = Path(path)
    if path.suffix not in READABLE:
        raise UserError(f"{path}: proposals are read from {', '.join(READABLE)}; give such a file")
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give a file of proposals in it")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty; fetch or write it again")
        return _read_json(path) if path.suffix == ".json" else _read_npz(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be read ({reason}); check the file and its permissions") from None


def write(
    path: str | os.PathLike, table: ProposalTable, image_sizes: Mapping[int, tuple[int, int]] | np.ndarray
) -> None:
    """Write our compact file, .npz: ten bytes per proposal. It appears when it is whole; its folder is made.

    `image_sizes` are (height, width) by image id, or [n 2] in the order of the table, in pixels, at least 1. A
    coordinate is kept in 65535ths of its side, so it comes back within side / 130000 (0.005 pixels of 640); what lies
    outside the image is moved to its edge. Scores are kept in float16, to 11 bits, at most 65504 large. Neither changes
    the order. Raises `UserError` for another suffix and if the file cannot be written, `ValueError` for sizes that are
    missing or not positive.
    """
    path = paths.path(path)
    if path.suffix != ".npz":
        raise UserError(f"{path}: proposals are written as .npz; choose this suffix")
    sizes = _sizes(table, image_sizes)
    boxes = np.empty(table.boxes.shape, np.uint16)
    for i, (height, width) in enumerate(sizes.tolist()):
        rows = slice(table.offsets[i], table.offsets[i + 1])
        fractions = table.boxes[rows] / np.array([width, height, width, height], np.float64)
        boxes[rows] = np.rint(np.clip(fractions, 0, 1) * _STEPS)
    arrays = {
        "image_id": table.image_id,
        "image_size": sizes,
        "offsets": table.offsets,
        "boxes": boxes,
        "scores": np.clip(table.scores, -_MOST_SCORE, _MOST_SCORE).astype(np.float16),
    }
    version = np.int32(_VERSION)
    paths.write_atomically(path, lambda file: np.savez(file, fpn_jax_proposals=version, **arrays), binary=True)


def _sizes(table: ProposalTable, image_sizes: Mapping[int, tuple[int, int]] | np.ndarray) -> np.ndarray:
    """int32 [n 2]"""
    if isinstance(image_sizes, Mapping):
        missing = [image_id for image_id in table.image_id.tolist() if image_id not in image_sizes]
        if missing:
            raise ValueError(f"no size of image id {missing[0]}")
        image_sizes = [image_sizes[image_id] for image_id in table.image_id.tolist()]
    sizes = np.asarray(image_sizes, np.int32).reshape(-1, 2)
    if len(sizes) != len(table.image_id) or (sizes < 1).any():
        raise ValueError(f"{len(sizes)} sizes, the least {sizes.min(initial=1)}, for {len(table.image_id)} images")
    return sizes


def _read_json(path: Path) -> ProposalTable:
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); write the file again") from None
    if not isinstance(entries, list):
        raise UserError(f"{path}: COCO results are a list of objects with image_id, bbox and score; write such a list")
    scored = bool(entries) and isinstance(entries[0], dict) and entries[0].get("score") is not None
    for number, entry in enumerate(entries):
        fault = _entry_fault(entry, scored)
        if fault:
            raise UserError(f"{path}: entry {number} {fault}")
    image_id = np.array([entry["image_id"] for entry in entries], np.int64)
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    scores = np.array([entry["score"] for entry in entries], np.float64) if scored else None
    return _from_rows(image_id, boxes, scores, path, "entry", xywh=True)


def _entry_fault(entry: Any, scored: bool) -> str | None:
    """What is wrong with an entry of COCO results, and what to do."""
    if not isinstance(entry, dict):
        return f"is {_short(entry)}; make it an object with image_id, bbox and score"
    if not _is_integer(entry.get("image_id")):
        return f"needs an integer image_id, it is {_short(entry.get('image_id'))}; give the data set's own"
    bbox, score = entry.get("bbox"), entry.get("score")
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_number, bbox))):
        return f"needs a bbox of four numbers, it is {_short(bbox)}; give x, y, width, height in pixels"
    if (score is not None) != scored:
        return f"has {'no' if scored else 'a'} score, unlike the first; give all boxes one, or none"
    if scored and not _is_number(score):
        return f"has the score {_short(score)}; give a number"
    return None


def _read_npz(path: Path) -> ProposalTable:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            names = list(stored.files)
            compact = "fpn_jax_proposals" in names
            version = int(stored["fpn_jax_proposals"]) if compact else None
            wanted = _COMPACT if compact else ("image_id", "boxes", "scores")
            arrays = {name: stored[name] for name in wanted if name in names}
    except OSError:
        raise
    except Exception as error:  # torn or hostile bytes make parsers raise anything at all
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{path}: incomplete, damaged or no .npz of plain arrays ({what}); fetch or write it again"
        ) from error
    if compact:
        return _from_compact(version, arrays, path)
    for name in ("image_id", "boxes"):
        if name not in arrays:
            there = _some(names[:_SHOWN], len(names))
            raise UserError(
                f"{path}: has no array {name!r} (it has {there}); give image_id [p], boxes [p 4], scores [p]"
            )
    if arrays["image_id"].ndim != 1 or (arrays["image_id"].dtype.kind not in "iu" and arrays["image_id"].size):
        what = f"{arrays['image_id'].dtype} {list(arrays['image_id'].shape)}"
        raise UserError(f"{path}: image_id is {what}; give an integer for each box")
    return _from_rows(arrays["image_id"].astype(np.int64), arrays["boxes"], arrays.get("scores"), path, "row")


def _from_compact(version: int, arrays: dict[str, np.ndarray], path: Path) -> ProposalTable:
    if version != _VERSION:
        raise UserError(
            f"{path}: is of version {version}, {_VERSION} can be read here; write it again with this program"
        )
    try:
        for name, (code, ndim) in _COMPACT.items():
            if name not in arrays or arrays[name].dtype.str[1:] != code or arrays[name].ndim != ndim:
                raise ValueError(f"no proper array {name!r}")
        image_id, sizes, offsets, stored, scores = arrays.values()
        _check_layout(image_id, offsets, stored, scores)
        if sizes.shape != (len(image_id), 2) or (sizes < 1).any():
            raise ValueError("image_size does not fit the images")
        if (stored[:, 2:] < stored[:, :2]).any() or not np.isfinite(scores).all():
            raise ValueError("boxes or scores that are none")
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); write it again") from None
    boxes = np.empty(stored.shape, np.float32)
    for i, (height, width) in enumerate(sizes.tolist()):
        rows = slice(offsets[i], offsets[i + 1])
        boxes[rows] = stored[rows] * (np.array([width, height, width, height]) / _STEPS)
    return ProposalTable(image_id, offsets, boxes, scores.astype(np.float32), str(path))


def _from_rows(
    image_id: np.ndarray, boxes: np.ndarray, scores: np.ndarray | None, path: Path, row_name: str, xywh: bool = False
) -> ProposalTable:
    """A table from a row per box, int64 [p], [p 4] and [p], in any order of images."""

    def where(row: int) -> str:
        return f"{path}: {row_name} {row} (image_id {image_id[row]})"

    if boxes.shape[:1] != image_id.shape:
        raise UserError(
            f"{path}: boxes are of shape {list(boxes.shape)} for {len(image_id)} image ids; give each box an id"
        )
    boxes = _checked_boxes(boxes, str(path), where, xywh)
    scores = np.zeros(len(boxes)) if scores is None else scores
    scores = _checked_scores(scores, len(boxes), str(path), where)
    order = np.argsort(image_id, kind="stable")
    ids, counts = np.unique(image_id, return_counts=True)
    return _table(ids, np.cumsum([0, *counts], dtype=np.int64), boxes[order], scores[order], str(path))


def _table(
    image_id: np.ndarray, offsets: np.ndarray, boxes: np.ndarray, scores: np.ndarray, file: str
) -> ProposalTable:
    """The table of checked values. Raises `UserError` for what only all boxes together show to be wrong."""
    if len(boxes) and boxes.max() <= 1:  # a common mistake, by which all boxes would be the same few pixels
        raise UserError(f"{file}: all boxes lie within 0 .. 1, like fractions of the image; give boxes in pixels")
    try:
        return ProposalTable(image_id, offsets, boxes, scores, file)
    except ValueError as error:
        raise UserError(f"{file}: {error}; write the file again") from None


def _check_layout(image_id: np.ndarray, offsets: np.ndarray, boxes: np.ndarray, scores: np.ndarray) -> None:
    """Raise a `ValueError` unless the arrays of a table fit together."""
    count = len(boxes)
    if boxes.shape != (count, 4) or scores.shape != (count,):
        raise ValueError(f"boxes of shape {boxes.shape} with scores of shape {scores.shape}")
    if offsets.shape != (len(image_id) + 1,) or offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
        raise ValueError(f"the offsets of {len(image_id)} images do not fit {count} boxes")
    ids, times = np.unique(image_id, return_counts=True)
    if len(ids) < len(image_id):
        raise ValueError(f"image id {ids[times > 1][0]} occurs {times[times > 1][0]} times")


def _checked_boxes(boxes: Any, where: str, where_row: Callable[[int], str], xywh: bool) -> np.ndarray:
    """float32 [n 4], x1 y1 x2 y2. Raises a `UserError` that begins with `where`, or where_row(i) for what row i is."""
    given = _as_numbers(boxes)
    if given is None or (given.size and (given.ndim != 2 or given.shape[1] != 4)):
        what = "no array of numbers" if given is None else f"of shape {list(given.shape)}"
        raise UserError(f"{where}: boxes are {what}; give four numbers for each box")
    given = given.reshape(-1, 4)
    with np.errstate(all="ignore"):  # what is too large becomes infinite, and is told below
        corners = given.astype(np.float64) if xywh else given
        if xywh:
            corners[:, 2:] += corners[:, :2]
        corners = corners.astype(np.float32)
    good = np.isfinite(corners).all(1) & (corners[:, 2] >= corners[:, 0]) & (corners[:, 3] >= corners[:, 1])
    if not good.all():
        row = int(np.argmin(good))
        needed = "x y width height with width, height >= 0" if xywh else "x1 y1 x2 y2 with x2 >= x1, y2 >= y1"
        raise UserError(f"{where_row(row)}: {given[row].tolist()} is no box; give finite {needed}, in pixels")
    return corners


def _checked_scores(scores: Any, count: int, where: str, where_row: Callable[[int], str]) -> np.ndarray:
    """float32 [count]. Raises `UserError` as _checked_boxes does."""
    given = _as_numbers(scores)
    if given is None or given.size != count:
        what = "no array of numbers" if given is None else f"of shape {list(given.shape)}"
        raise UserError(f"{where}: scores are {what} for {count} boxes; give one number for each box, or no scores")
    with np.errstate(over="ignore"):
        values = given.reshape(-1).astype(np.float32)
    good = np.isfinite(values)
    if not good.all():
        row = int(np.argmin(good))
        raise UserError(f"{where_row(row)}: the score {given.reshape(-1)[row]} is not finite; give a finite number")
    return values


def _as_numbers(values: Any) -> np.ndarray | None:
    try:
        array = np.asarray(values)
    except (ValueError, RecursionError):  # rows of several lengths
        return None
    return array if array.dtype.kind in "fiu" else None


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30  # neither is NaN


def _some(shown: Sequence[Any], count: int) -> str:
    """The first few of `count`, in one line, and how many more there are."""
    rest = f" and {count - len(shown)} more" if count > len(shown) else ""
    return f"{', '.join(' '.join(str(item)[:80].split()) for item in shown)}{rest}" or "none"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
