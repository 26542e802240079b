"""From a source as the user names it to a prepared data set: the one place that knows all kinds of source."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from fpn_jax.data import coco, coco_files, records, scenes
from fpn_jax.data.datasets import list_splits, open_split
from fpn_jax.data.records import Counts
from fpn_jax.errors import UserError
from fpn_jax.storage import paths


@dataclass(frozen=True)
class Prepared:
    """A prepared data set."""

    dataset: str
    folder: Path
    written: bool  # now; False if it was there
    counts: dict[str, Counts]  # by split


def prepare(
    source: str,
    data_dir: str | os.PathLike,
    name: str | None = None,
    coco_url: str | None = None,
    download_dir: str | os.PathLike | None = None,
) -> Prepared:
    """Prepare `scenes`, `coco/2017` or a COCO-format folder below `data_dir`, or find it prepared.

    `coco/2017` is fetched from `coco_url` to `download_dir` (by default downloads/ below data_dir). Raises a
    `UserError` for every fault of the source; then nothing that could be taken for the data set is left behind.
    """
    if paths.is_remote(data_dir):
        raise UserError(
            f"--data_dir={data_dir}: data is prepared on this machine; prepare it into a folder, then: "
            f"gcloud storage cp -r FOLDER/* {str(data_dir).rstrip('/')}/"
        )
    root = Path(data_dir)
    if source == scenes.NAME:
        dataset = name or scenes.NAME
        builder = scenes.builder(root, dataset)
        written = not records.already_prepared(root, dataset, source, builder.fingerprint)
        if written:
            records.write(builder)
    else:
        dataset, written = _prepare_coco(source, root, name, coco_url, download_dir)
    counts = {split: _counts(root, dataset, split) for split in list_splits(root, dataset)}
    return Prepared(dataset, root / dataset / records.VERSION, written, counts)


def _prepare_coco(
    source: str, root: Path, name: str | None, coco_url: str | None, download_dir: str | os.PathLike | None
) -> tuple[str, bool]:
    if source == coco_files.COCO_2017:
        dataset = name or source
        if records.already_prepared(root, dataset, source, None):  # before 20 GB are fetched
            return dataset, False
        splits = coco_files.coco_2017_splits(download_dir or root / "downloads", coco_url or coco_files.COCO_URL)
    else:
        splits = coco_files.folder_splits(source)
        dataset = name or (coco_files.COCO_2017 if coco_files.is_coco_2017(source) else coco.default_name(source))
        source = str(Path(source).resolve())
    fingerprint = coco.fingerprint(splits)
    if records.already_prepared(root, dataset, source, fingerprint):
        return dataset, False
    records.write(coco.builder(root, dataset, splits, source, fingerprint))
    return dataset, True


def _counts(root: Path, dataset: str, split: str) -> Counts:
    """What was counted while the split was written; opening it makes its index, if it has none yet."""
    opened = open_split(root, dataset, split)
    known = {field.name for field in dataclasses.fields(Counts)}
    stored = records.metadata(root / dataset / records.VERSION).get("counts", {}).get(split, {})
    return Counts(**{"images": len(opened)} | {key: value for key, value in stored.items() if key in known})
