"""Files that grow, such as logs, in a folder of object storage, which knows whole objects only."""

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from fpn_jax.errors import UserError
from fpn_jax.storage import paths

SECONDS = 30.0  # between two copies while nobody asks


class Spool:
    """A local folder whose files are copied, whole, to a remote one: now and then, by a thread, and by `copy`.

    A killed process loses at most what came after the last copy. Raises `UserError` where one cannot be made.
    """

    def __init__(self, remote: str):
        self._remote = paths.path(remote)
        self.folder = Path(tempfile.mkdtemp(prefix="fpn_jax-"))
        self._copied: dict[Path, tuple[int, int]] = {}  # size and time of a file when it was copied
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._copy_now_and_then, name="spool", daemon=True)
        self._thread.start()

    def fetch(self, name: str) -> None:
        """Take a file from the remote folder, if it is there, to go on with it."""
        source = self._remote / name
        with paths.telling(source, "cannot be read"):
            if source.exists():
                (self.folder / name).write_bytes(source.read_bytes())

    def copy(self) -> None:
        """Copy what has changed, and wait until it is there."""
        with self._lock:
            for file in sorted(self.folder.rglob("*")):
                self._copy(file)

    def _copy(self, file: Path) -> None:
        state: Any = file.stat()
        seen = state.st_size, state.st_mtime_ns
        if file.is_dir() or self._copied.get(file) == seen:
            return
        data = file.read_bytes()
        paths.write_atomically(self._remote / file.relative_to(self.folder), lambda to: to.write(data), binary=True)
        self._copied[file] = seen

    def _copy_now_and_then(self) -> None:
        while not self._ended.wait(SECONDS):
            try:
                self.copy()
            except UserError:
                continue  # the network may be back next time; a checkpoint asks, and then it is told

    def close(self) -> None:
        """Copy what is left and remove the local folder."""
        self._ended.set()
        self._thread.join()
        try:
            self.copy()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
