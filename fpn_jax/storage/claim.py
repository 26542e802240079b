"""A claim on a folder of object storage, where there are no locks: an object that its holder writes again and again.

No clock is trusted. Who finds a claim watches it: if it is written anew, its holder lives. Every write names the
generation that it replaces, so that of two who come at once one is told (cloud.google.com/storage/docs, "Request
preconditions").
"""

import json
import os
import socket
import sys
import threading
import time
from typing import Any

from fpn_jax.errors import InUseError, UserError
from fpn_jax.storage import paths

RENEWED = 10.0  # seconds between two writes
STALE = 60.0  # seconds without one after which a claim is nobody's
_LONG = 3600.0  # seconds after which no clock can be that wrong, and nobody need watch
_POLL = 2.0

_lost: dict[str, str] = {}  # folder -> who took it, of claims that this process held


class RemoteClaim:
    """Holds WORKDIR/lock from now until `close` or the end of a `with`, or as long as the process lives.

    Raises `UserError` if another process holds it. Waits for at most STALE seconds to see whether one does.
    """

    def __init__(self, workdir: str):
        self.workdir = workdir.rstrip("/")
        paths.path(workdir)
        from google.cloud import storage

        bucket, _, folder = self.workdir.removeprefix("gs://").partition("/")
        with paths.telling(self.workdir, "cannot be claimed"):
            self._bucket = storage.Client().bucket(bucket)
        self._name = f"{folder}/lock" if folder else "lock"
        with paths.telling(f"{self.workdir}/lock", "cannot be written"):
            self._generation = self._take()
        _lost.pop(self.workdir, None)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="claim", daemon=True)
        self._thread.start()

    def _take(self) -> int:
        found = self._bucket.get_blob(self._name)
        if found is not None and not self._is_dead(found):
            found = self._watch(found)
        generation = self._write(found.generation if found else 0)
        if generation is None:
            raise self._in_use(self._bucket.get_blob(self._name))
        return generation

    def _is_dead(self, found: Any) -> bool:
        """Whether its holder was a process of this machine that is gone, or the claim is older than any clock errs."""
        holder = _read(found)
        if holder.get("place") == _place() and not _is_running(holder.get("pid")):
            return True
        return time.time() - found.updated.timestamp() > _LONG

    def _watch(self, found: Any) -> Any:
        """The claim, once it was not renewed for long enough, or None if it is gone; `UserError` if it is renewed."""
        holder = _read(found)
        print(
            f"{self.workdir} was claimed by process {holder.get('pid', '?')} of {holder.get('host', '?')}; waiting "
            f"up to {STALE:.0f} s to see whether that still runs",
            file=sys.stderr,
            flush=True,
        )
        end = time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(_POLL)
            now = self._bucket.get_blob(self._name)
            if now is None:
                return None
            if now.generation != found.generation:
                raise self._in_use(now)
        return found

    def _in_use(self, blob: Any) -> InUseError:
        holder = _read(blob) if blob is not None else {}
        return InUseError(
            f"--workdir={self.workdir} is in use by process {holder.get('pid', '?')} of {holder.get('host', '?')}; "
            "wait for it, stop it, or give another folder"
        )

    def _write(self, generation: int) -> int | None:
        """The new generation, or None if what is there is not the given one."""
        from google.api_core.exceptions import PreconditionFailed

        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "place": _place(), "time": time.time()})
        blob = self._bucket.blob(self._name)
        try:
            blob.upload_from_string(text, if_generation_match=generation, timeout=RENEWED)
        except PreconditionFailed:
            # An answer that was lost on its way was tried again, and what is there then is our own.
            there = self._bucket.get_blob(self._name)
            return there.generation if there is not None and there.download_as_bytes().decode() == text else None
        return blob.generation

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            try:
                with paths.telling(self.workdir, "cannot be claimed"):
                    generation = self._write(self._generation)
                    if generation is None:
                        _lost[self.workdir] = str(self._in_use(self._bucket.get_blob(self._name)))
                        return
            except UserError:
                continue  # the network may be back next time
            self._generation = generation

    def close(self) -> None:
        """Give the folder free."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        self._ended.set()
        self._thread.join()
        try:
            with paths.telling(f"{self.workdir}/lock", "cannot be removed"):
                self._bucket.blob(self._name).delete(if_generation_match=self._generation)
        except (UserError, NotFound, PreconditionFailed):
            return  # it goes stale by itself, or is another's by now

    def __enter__(self) -> "RemoteClaim":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_held(workdir: str) -> None:
    """Raise `UserError` if another process has taken a claim that this one held: it was not heard of for too long."""
    if trouble := _lost.get(workdir.rstrip("/")):
        raise UserError(f"{trouble}; this run could not renew its claim for {STALE:.0f} s and ends here")


def _read(blob: Any) -> dict[str, Any]:
    try:
        holder = json.loads(blob.download_as_bytes())
    except (ValueError, *paths.faults()):  # replaced or removed meanwhile, or not ours
        return {}
    return holder if isinstance(holder, dict) else {}


def _place() -> str:
    """Where a process id means a process: a machine since it was started, and one of its containers; "" if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_running(pid: Any) -> bool:
    if not isinstance(pid, int) or not _place():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
