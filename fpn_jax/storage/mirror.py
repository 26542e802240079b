"""Local copies of files on object storage, for readers that need files of this machine."""

import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fpn_jax.errors import UserError
from fpn_jax.storage import paths

CACHE = "~/.cache/fpn_jax/data"
_THREADS = 8  # files on their way at once
_SPARE = 1 << 28  # bytes to leave free on the disk
_KNOWN = ".mirror.json"  # {name: ETag of what was copied}


def mirror(folder: Any, wanted: Callable[[str], bool], cache_dir: str = "") -> Path:
    """A local folder with the files of a remote one whose names are `wanted`, as they are there now.

    Copied is what is not there yet or has another size or ETag; copies stay of what is no longer there. A file appears
    when it is whole, so a copy that was interrupted goes on with the next file; processes of one machine wait for the
    one that copies. Raises `UserError` if nothing is wanted of what is there, a file cannot be read, or the disk cannot
    hold them.
    """
    local = _place(os.fspath(folder), cache_dir)
    with paths.telling(local, "cannot be written"):
        local.mkdir(parents=True, exist_ok=True)
    with _alone(local):
        with paths.telling(folder, "cannot be read"):
            there = {Path(x["name"]).name: x for x in paths.filesystem().ls(os.fspath(folder), detail=True)}
        there = {name: x for name, x in there.items() if x["type"] == "file" and wanted(name)}
        known = _read_known(local)
        missing = [
            name
            for name, x in there.items()
            if known.get(name) != x["etag"] or not (local / name).exists() or (local / name).stat().st_size != x["size"]
        ]
        if missing:
            _copy_all(os.fspath(folder), [there[name] for name in missing], local, known)
    return local


def fetched(address: str, cache_dir: str = "") -> Path:
    """The local copy of one remote file, or the path of a local one as it is. Raises `UserError` as `mirror`."""
    if not paths.is_remote(address):
        return Path(address)
    folder, _, name = address.rpartition("/")
    with paths.telling(address, "cannot be read"):
        if not paths.path(address).exists():
            raise UserError(f"{address}: no such file; check the address")
    return mirror(folder, lambda other: other == name, cache_dir) / name


def _place(folder: str, cache_dir: str) -> Path:
    return Path(cache_dir or CACHE).expanduser() / "gs" / folder.removeprefix("gs://")


@contextlib.contextmanager
def _alone(local: Path) -> Iterator[None]:
    """While no other process of this machine copies into the folder."""
    with paths.telling(local, "cannot be written"):
        lock = open(local / ".lock", "w")  # noqa: SIM115 - closed below
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_known(local: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((local / _KNOWN).read_text()))
    return {}


def _copy_all(folder: str, files: list[dict[str, Any]], local: Path, known: dict[str, str]) -> None:
    total = sum(x["size"] for x in files)
    free = shutil.disk_usage(local).free
    if total + _SPARE > free:
        raise UserError(
            f"{local}: {_size(total)} of {folder} do not fit into the {_size(free)} that are free; free some space, or "
            "set config.data.cache_dir to a folder of a larger disk"
        )
    print(f"copying {len(files)} files, {_size(total)}, of {folder} to {local}", file=sys.stderr, flush=True)
    # What was derived from files that are copied anew is out of date; it has no ETag.
    for derived in local.iterdir():
        if derived.is_file() and not derived.name.startswith(".") and derived.name not in known:
            derived.unlink()

    def copy(file: dict[str, Any]) -> tuple[str, str]:
        name = Path(file["name"]).name
        part = local / f".{name}.part"
        with paths.telling(f"{folder}/{name}", "cannot be copied"):
            paths.filesystem().get_file(f"{folder}/{name}", str(part))
        if part.stat().st_size != file["size"]:
            raise UserError(f"{folder}/{name}: changed while it was copied; run the same command again")
        os.replace(part, local / name)
        return name, file["etag"]

    with ThreadPoolExecutor(_THREADS) as pool:
        for name, etag in pool.map(copy, files):
            known[name] = etag
            text = json.dumps(known)
            paths.write_atomically(local / _KNOWN, lambda file, text=text: file.write(text))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
