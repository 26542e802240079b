"""How a run ends other than well: the exceptions, and the one line and the exit status that each becomes."""

import errno
import sys
from collections.abc import Sequence

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line. It names the file, key or value that is wrong and says what to do about it. Entry
    points print it without a traceback and exit with status 2 (see `fpn_jax.cli`), as argparse and most Unix tools do.
    """

    status = 2


class InUseError(UserError):
    """Another process trains in the workdir."""


class Stopped(Exception):
    """The run was told to stop (SIGTERM, preemption) and has saved what it has.

    Entry points print the message and exit with status 75, EX_TEMPFAIL: the same command continues.
    """

    status = 75


class ProcessLost(Exception):
    """One of several processes died, stalled or never came, so that this one cannot go on.

    Entry points print the message and exit with status 76: the same command, started anew on all, continues.
    """

    status = 76


def some(items: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """The first few for a message, and how many more there are."""
    return separator.join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def warn(line: str) -> None:
    """Tell on stderr of what may be a mistake. Not by `logging`, which is silenced for the libraries' sake."""
    print(f"warning: {' '.join(line.split())}", file=sys.stderr, flush=True)


def remedy(error: OSError) -> str:
    """What to do about a file that cannot be written, if not choosing another folder."""
    if error.errno in _IN_THE_WAY:
        return "move what is in the way"
    return "make it writable" if error.errno in _FORBIDDEN else "free some space"


def explain(error: BaseException) -> tuple[str, int] | None:
    """(the line to print, the exit status), or None for what is our own mistake and deserves a traceback."""
    if isinstance(error, UserError | ProcessLost):
        return f"error: {' '.join(str(error).split())}", error.status
    if isinstance(error, Stopped):
        return str(error), error.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on, a training from its last checkpoint", 130
    if isinstance(error, OSError):  # a full disk or a read-only folder is the user's to mend, too
        by_path = error.errno in (*_IN_THE_WAY, errno.ENOENT) and error.filename
        if by_path or error.errno in _FULL + _FORBIDDEN:
            hint = "give another path" if by_path else f"{remedy(error)} or choose another folder"
            return f"error: {error.filename or 'writing'}: {error.strerror}; {hint}", UserError.status
    return None
