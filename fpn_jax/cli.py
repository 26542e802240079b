"""How every command starts and how it fails: one line for a user's mistake, a traceback only for our own."""

import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from fpn_jax.errors import UserError

_STATUS_USER_ERROR = 2  # as argparse and most Unix tools do


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parse flags and call main(argv); a `UserError` becomes one line on stderr and exit status 2."""

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(argv)
        except UserError as error:
            _fail(error)
        except OSError as error:  # a full disk or a read-only folder is the user's to mend, too
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            _fail(f"{error.filename or 'writing'}: {error.strerror}; free some space or choose another folder")
        except KeyboardInterrupt:
            print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
            sys.exit(130)

    try:
        app.run(guarded, flags_parser=_parse_flags)
    except UserError as error:
        _fail(error)


def config_flag(default: str | None = None) -> config_flags.ConfigFileFlagHolder:
    """Define --config=FILE.py with overrides --config.some.key=value; the values are locked to the file's keys."""
    return config_flags.DEFINE_config_file("config", default, "Experiment file, see experiments/.", lock_config=True)


def check_required(**values: str | None) -> None:
    """Raise a `UserError` that names the first flag without a value."""
    for name, value in values.items():
        if not value:
            raise UserError(f"--{name}= is missing; {os.path.basename(sys.argv[0])} --help lists the flags")


def _fail(error: object) -> None:
    sys.stdout.flush()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(_STATUS_USER_ERROR)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with its errors as one line that names the nearest right key."""
    try:
        return flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), 1)
        raise UserError(f"unknown flag --{error.flagname}{f'; did you mean --{near[0]}?' if near else ''}") from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        override = re.search(r"--(?:no)?config\.([\w.]+)", " ".join(argv))
        if override is None and not isinstance(error, flags.Error):
            raise
        raise UserError(_explain_override(argv, error)) from None
    except (FileNotFoundError, OSError) as error:
        raise UserError(f"--config: {error}; give the path of an experiment file, e.g. experiments/demo.py") from None


def _explain_override(argv: list[str], error: Exception) -> str:
    """Which --config.key of the command line does not exist or has a wrong value, and the nearest key that does."""
    config = _config_file(argv)
    for argument in argv[1:] if config is not None else []:
        match = re.match(r"--config\.([\w.\[\]]+)", argument)
        if match and (unknown := _unknown_key(config, match[1])):
            return unknown
    return str(error)


def _config_file(argv: list[str]) -> ConfigDict | None:
    """The config without its overrides, or None when the file itself is the trouble."""
    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if path is None or not os.path.exists(path.split(":")[0]):
        return None
    scope: dict = {"__file__": path, "__name__": "config"}
    sys.path.insert(0, os.getcwd())
    try:
        with open(path) as file:
            exec(compile(file.read(), path, "exec"), scope)
        return scope["get_config"]()
    except Exception:
        return None
    finally:
        sys.path.pop(0)


def _unknown_key(config: ConfigDict, key: str) -> str | None:
    """None if config has this dotted key, else a line that says what is wrong with it."""
    node, done = config, []
    for part in key.split("."):
        if not isinstance(node, ConfigDict) or part not in node:
            keys = list(node.keys()) if isinstance(node, ConfigDict) else []
            near = difflib.get_close_matches(part, keys, 1, cutoff=0.5) or _anywhere(config, part)
            hint = f"did you mean --config.{'.'.join([*done, near[0]])}?" if near and near[0] in keys else ""
            if near and not hint:
                hint = f"did you mean --config.{near[0]}?"
            return f"--config.{key}: there is no such key; {hint or 'the keys here are ' + ', '.join(keys)}"
        node = node[part]
        done.append(part)
    return None


def _anywhere(config: ConfigDict, leaf: str) -> list[str]:
    """Dotted keys of the whole config whose last part resembles `leaf`."""
    dotted: dict[str, str] = {}

    def walk(node: ConfigDict, prefix: str) -> None:
        for name, value in node.items():
            dotted.setdefault(name, prefix + name)
            if isinstance(value, ConfigDict):
                walk(value, f"{prefix}{name}.")

    walk(config, "")
    return [dotted[name] for name in difflib.get_close_matches(leaf, dotted, 1)]
