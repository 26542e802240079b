"""Paths on this machine and below gs://, and how a file is written whole. The only home of etils, fsspec and gcsfs."""

import functools
import importlib.util
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fpn_jax.errors import UserError, remedy

_SCHEME = "gs://"
INSTALL = 'pip install -e ".[gcs]"'
LOG_IN = "gcloud auth application-default login"


def is_remote(address: str | os.PathLike) -> bool:
    """Whether the address is one of Google Cloud Storage. Raises `UserError` for any other that has a scheme."""
    text = os.fspath(address)
    if "://" in text and not text.startswith(_SCHEME):
        raise UserError(f"{text}: folders are paths of this machine or {_SCHEME}BUCKET/...; give one of these")
    return text.startswith(_SCHEME)


def path(address: str | os.PathLike) -> Any:
    """A pathlib.Path, or etils' likeness of one for gs://.

    Raises `UserError` if the packages for gs:// are missing, or the bucket is not there for this user.
    """
    if not is_remote(address):
        return Path(address)
    bucket = os.fspath(address).removeprefix(_SCHEME).split("/")[0]
    if not bucket:
        raise UserError(f"{address}: there is no bucket in it; give {_SCHEME}BUCKET/FOLDER")
    _check_bucket(bucket)
    from etils import epath

    return epath.Path(address)


def absolute(address: str | os.PathLike) -> Any:
    """As `path`; one of this machine from its root."""
    return path(address) if is_remote(address) else Path(address).absolute()


def filesystem() -> Any:
    """fsspec's view of Google Cloud Storage, the one that etils uses, too. Raises `UserError` without gcsfs."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{_SCHEME} needs the package gcsfs, which is not installed; {INSTALL}")
    import fsspec

    # What other processes write must be seen at once, and what fails is told by us, in one line.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return fsspec.filesystem("gcs", finalize_on_close=True)


@functools.lru_cache
def _check_bucket(bucket: str) -> None:
    with telling(f"{_SCHEME}{bucket}", "cannot be read"):
        try:
            filesystem().call("GET", "b/{}/o", bucket, maxResults=1)
        except FileNotFoundError:
            raise UserError(
                f"{_SCHEME}{bucket}: there is no such bucket; check its name, or make it by: gcloud storage buckets "
                f"create {_SCHEME}{bucket}"
            ) from None


@contextmanager
def telling(where: Any, what: str) -> Iterator[None]:
    """Turn what goes wrong with a file, here or in the cloud, into one line for the user."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, faults()):
            raise
        if not is_remote(where):
            reason = getattr(error, "strerror", None) or _line(error)
            raise UserError(f"{where}: {what} ({reason}); {remedy(error)} or choose another folder") from None
        raise UserError(f"{where}: {what} ({_line(error)}); {_advice(error)}") from None


def faults() -> tuple[type[Exception], ...]:
    """What opening, reading and writing may raise; gcsfs' and Google's own exceptions are no OSErrors."""
    if importlib.util.find_spec("gcsfs") is None:
        return (OSError,)
    import google.api_core.exceptions
    import google.auth.exceptions
    from gcsfs.retry import HttpError

    return OSError, HttpError, google.auth.exceptions.GoogleAuthError, google.api_core.exceptions.GoogleAPIError


def _advice(error: Exception) -> str:
    text, code = str(error), getattr(error, "code", None)
    if code == 401 or "Anonymous caller" in text or "credentials" in text.lower():
        return f"log in by: {LOG_IN}"
    if code == 403 or "Forbidden" in text or "does not have" in text:
        return f"let this account use the bucket (role storage.objectUser), or log in as another by: {LOG_IN}"
    return "look at the network and the bucket, and run the same command again"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def write_atomically(target: Any, write_to: Callable[[IO[Any]], Any], binary: bool = False) -> None:
    """Let `write_to` fill what becomes the file `target` (a path of `path`), in a folder that is made.

    Nobody ever reads half of it, and where writing fails what was there stays: a file of this machine is written beside
    its place and renamed, an object appears when all of it has arrived. Raises `UserError` if it cannot be written.
    """
    if is_remote(target):
        buffer = io.BytesIO() if binary else io.StringIO()
        write_to(buffer)
        content = buffer.getvalue()
        with telling(target, "cannot be written"):
            path(target).write_bytes(content if binary else content.encode())
        return
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with telling(target, "cannot be written"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") if binary else open(temporary, "w", encoding="utf-8") as file:
                write_to(file)
            os.replace(temporary, target)
    finally:
        if target.parent.is_dir():
            temporary.unlink(missing_ok=True)


def check_writable(folder: Any) -> None:
    """Make a folder of this machine, to be written to later. Raises `UserError` if that would fail."""
    if is_remote(folder):
        return
    with telling(folder, "cannot be written"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def write_json(target: Any, value: Any, finite: bool = True) -> None:
    """Write a value as JSON, see `write_atomically`. finite: raises ValueError for NaN and infinities."""
    text = json.dumps(value, indent=2, allow_nan=not finite) + "\n"
    write_atomically(target, lambda file: file.write(text))


def modified(folder: Any) -> float:
    """When a file or a folder was last changed, in seconds since 1970; of a remote folder, anything in it; 0: never."""
    if not is_remote(folder):
        return Path(folder).stat().st_mtime if Path(folder).exists() else 0.0
    with telling(folder, "cannot be read"):
        found = filesystem().find(os.fspath(folder), detail=True).values()
        return max((entry["mtime"].timestamp() for entry in found), default=0.0)
