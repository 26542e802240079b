"""The exception that a user's mistake raises, and the one of a run that was told to stop."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line. It names the file, key or value that is wrong and says what to do about it. Entry
    points print it without a traceback and exit with status 2 (see `fpn_jax.cli`).
    """


class Stopped(Exception):
    """The run was told to stop (SIGTERM, preemption) and has saved what it has.

    Entry points print the message and exit with status 75, EX_TEMPFAIL: the same command continues.
    """
