"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line. It names the file, key or value that is wrong and says what to do about it. Entry
    points print it without a traceback and exit with status 2 (see `fpn_jax.cli`).
    """
