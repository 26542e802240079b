"""Where COCO-format annotations and images lie: a folder of the user's, or the official archives of COCO 2017.

Both end as a list of `SplitFiles`: a split's annotations as bytes and a way to read its images by file name. The
archives are read as they are, without unpacking 19 GB.
"""

import errno
import logging
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from fpn_jax.errors import UserError

COCO_2017 = "coco/2017"
COCO_URL = "http://images.cocodataset.org"
# The names that tfds' own coco/2017 gives these splits.
_SPLITS_2017 = {"train2017": "train", "val2017": "validation"}
# path below the address -> size in bytes, SHA-256: as published with tfds' url_checksums/coco.txt
_ARCHIVES_2017 = {
    "zips/train2017.zip": (19336861798, "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    "zips/val2017.zip": (815585330, "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
    "annotations/annotations_trainval2017.zip": (
        252907541,
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    ),
}


_RETRIES = 5  # some 6 seconds; tfds' own ten wait over three minutes before they admit that there is no network
_SPLIT_NAME = re.compile(r"(?!all$)[\w-]+")  # tfds' `all` means all splits together


class Images(Protocol):
    """Image files by the names that the annotations give them."""

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the names that there is no file for."""

    def read(self, name: str) -> bytes:
        """A file's bytes; raises a `UserError` if it cannot be read."""

    def where(self, name: str) -> str:
        """The path of a file that there is, for messages."""

    def looked_in(self) -> str:
        """Where files are looked for, for messages."""


@dataclass(frozen=True)
class SplitFiles:
    """One split of a COCO-format data set."""

    split: str
    annotations: str  # the JSON's path, for messages
    read_annotations: Callable[[], bytes]
    images: Images


class FolderImages:
    """Images in the first of several folders that has them."""

    def __init__(self, folders: Iterable[Path]):
        self._folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
        self._paths: dict[str, Path] = {}

    def missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self._find(name) is None]

    def read(self, name: str) -> bytes:
        path = self._find(name)
        if path is None:
            raise UserError(f"{name}: no such image in {self.looked_in()}")
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None

    def where(self, name: str) -> str:
        return str(self._find(name) or name)

    def looked_in(self) -> str:
        return ", ".join(str(folder) for folder in self._folders)

    def _find(self, name: str) -> Path | None:
        if name not in self._paths:
            candidates = (folder / name for folder in self._folders)
            path = next((candidate for candidate in candidates if candidate.is_file()), None)
            if path is None:
                return None
            self._paths[name] = path
        return self._paths[name]


class ZipImages:
    """Images in one folder of a zip archive; several threads may read at once."""

    def __init__(self, archive: Path, folder: str):
        self._archive, self._folder = archive, folder
        self._zip = _open_zip(archive)
        self._names = set(self._zip.namelist())

    def missing(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if f"{self._folder}/{name}" not in self._names]

    def read(self, name: str) -> bytes:
        return _read_member(self._zip, self._archive, f"{self._folder}/{name}")

    def where(self, name: str) -> str:
        return f"{self.looked_in()}/{name}"

    def looked_in(self) -> str:
        return f"{self._archive}/{self._folder}"


def folder_splits(folder: str | os.PathLike) -> list[SplitFiles]:
    """The splits of a COCO-format folder, named as its files are.

    Annotations, the first of these that is there: annotations/instances_SPLIT.json, instances_SPLIT.json,
    instances.json (a split `train`), SPLIT/_annotations.coco.json. Images: images/SPLIT, SPLIT, images, beside the
    annotations, the folder itself. A folder with both splits of COCO 2017 gets tfds' names, train and validation.
    Raises a `UserError` if there is no such folder or none of those files.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"--source={folder}: no such folder; give a COCO-format folder, {COCO_2017} or scenes")
    found = _find_annotations(root)
    if not found:
        raise UserError(
            f"--source={folder}: no COCO annotations; looked for annotations/instances_SPLIT.json, "
            "instances_SPLIT.json, instances.json and SPLIT/_annotations.coco.json"
        )
    official = set(_SPLITS_2017) <= set(found)
    splits = []
    for split, path in sorted(found.items()):
        if not _SPLIT_NAME.fullmatch(split):
            raise UserError(
                f"{path}: {split!r} cannot be the name of a split; rename the file, with letters, digits, _ and - "
                "(and not 'all', which is all splits together)"
            )
        images = FolderImages([root / "images" / split, root / split, root / "images", path.parent, root])
        name = _SPLITS_2017.get(split, split) if official else split
        splits.append(SplitFiles(name, str(path), path.read_bytes, images))
    return splits


def is_coco_2017(folder: str | os.PathLike) -> bool:
    """Whether a folder holds the annotations of both splits of COCO 2017."""
    return set(_SPLITS_2017) <= set(_find_annotations(Path(folder)))


def _find_annotations(root: Path) -> dict[str, Path]:
    """Split name -> JSON file."""
    for pattern in ("annotations/instances_*.json", "instances_*.json"):
        if found := {path.stem.removeprefix("instances_"): path for path in root.glob(pattern)}:
            return found
    if (root / "instances.json").exists():
        return {"train": root / "instances.json"}
    return {path.parent.name: path for path in root.glob("*/_annotations.coco.json")}


def coco_2017_splits(download_dir: str | os.PathLike, url: str = COCO_URL) -> list[SplitFiles]:
    """The splits of COCO 2017 from the official archives, fetched to `download_dir` unless they are there.

    Size and SHA-256 are checked where `url` is the official address; a mirror's archives are checked by the sums
    inside the zip files. Raises a `UserError` if a download fails.
    """
    url = url.rstrip("/")
    paths = _download(Path(download_dir), url)
    annotations = paths["annotations/annotations_trainval2017.zip"]
    splits = []
    for folder, split in _SPLITS_2017.items():
        member = f"annotations/instances_{folder}.json"
        splits.append(
            SplitFiles(
                split,
                f"{annotations}/{member}",
                lambda member=member: _read_member(_open_zip(annotations), annotations, member),
                ZipImages(paths[f"zips/{folder}.zip"], folder),
            )
        )
    return splits


def _download(download_dir: Path, url: str) -> dict[str, Path]:
    """Archive -> where it lies now."""
    facts = {
        f"{COCO_URL}/{path}": UrlInfo(size, sha256, Path(path).name) for path, (size, sha256) in _ARCHIVES_2017.items()
    }
    downloader.MAX_RETRIES = _RETRIES
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its line for every retry
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        manager = tfds.download.DownloadManager(download_dir=download_dir, dataset_name="coco", url_infos=facts)
        # One after the other, smallest first: when one fails, no thread is left to fetch 19 GB before we may exit.
        order = sorted(_ARCHIVES_2017, key=lambda path: _ARCHIVES_2017[path])
        return {path: Path(manager.download(f"{url}/{path}")) for path in order}
    except (OSError, tfds.download.DownloadError, NonMatchingChecksumError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise  # not the network's fault
        raise _download_error(url, error) from None


def _download_error(url: str, error: Exception) -> UserError:
    cause: BaseException = error  # of a chain such as ConnectionError(MaxRetryError(reason=NameResolutionError))
    while isinstance(inner := getattr(cause, "reason", None) or next(iter(cause.args), None), Exception):
        cause = inner
    reason = str(cause).split("\n")[0][:300]
    return UserError(
        f"{url}: the download failed ({type(error).__name__}: {reason}); try again, name a mirror with --coco_url=, or "
        "download and unpack the archives yourself and give that folder as --source="
    )


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a whole zip archive ({error}); remove it and run this again") from None


def _read_member(archive: zipfile.ZipFile, path: Path, member: str) -> bytes:
    try:
        return archive.read(member)
    except KeyError:
        raise UserError(f"{path}: has no {member}; it is not the archive of COCO 2017 that it should be") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: {member} is damaged ({error}); remove the archive and run this again") from None
