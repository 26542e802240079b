"""How every command starts and how it fails: one line for a user's mistake, a traceback only for our own."""

import difflib
import importlib.util
import itertools
import os
import re
import select
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from fpn_jax.errors import ProcessLost, Stopped, UserError, explain

_ALIKE = 0.6  # difflib's ratio, from which on a key is worth suggesting


def run(main: Callable[[Sequence[str]], None], words: bool = False) -> None:
    """Parse flags and call main(argv); what `explain` knows becomes one line on stderr and its status.

    words: whether the command takes arguments that are no flags; otherwise there must be none. --help prints the
    program's docstring and flags.
    """

    def guarded(argv: Sequence[str]) -> None:
        logging.set_verbosity(logging.ERROR)  # orbax and tfds tell of every file
        try:
            if argv[1:] and not words:
                raise UserError(f"{argv[1]!r} is no flag; write --NAME=VALUE, without spaces, and quote what has some")
            main(argv)
            sys.stdout.flush()
        except (UserError, ProcessLost, Stopped, OSError, KeyboardInterrupt) as error:
            if isinstance(error, BrokenPipeError) and _reader_has_left():
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tells of it once more
                sys.exit(128 + signal.SIGPIPE)
            if explain(error) is None:
                raise
            _end(error)

    try:
        app.run(guarded, flags_parser=_parse_flags)
    except UserError as error:
        _end(error)


def config_flag() -> flags.FlagHolder:
    """Define --config=FILE.py with overrides --config.some.key=value; the values are locked to the file's keys."""
    text = "Experiment file, see experiments/. Any of its values can be changed: --config.optim.learning_rate=0.01"
    _asked.append(("config", sys._getframe(1).f_globals, text))
    if "config" in flags.FLAGS:
        return flags.FlagHolder(flags.FLAGS, flags.FLAGS["config"])
    return config_flags.DEFINE_config_file("config", None, text, lock_config=True)


def flag(name: str, kind: type, default: Any, text: str) -> flags.FlagHolder:
    """Define --name=; kind is str, int, float, bool or list. Entry points that are imported together may share one."""
    _asked.append((name, sys._getframe(1).f_globals, text))
    if name in flags.FLAGS:
        return flags.FlagHolder(flags.FLAGS, flags.FLAGS[name])
    define = {
        str: flags.DEFINE_string,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        bool: flags.DEFINE_bool,
        list: flags.DEFINE_list,
    }
    return define[kind](name, default, text)


# Who asked for a flag: its name, the namespace of the module, what it said of it.
_asked: list[tuple[str, dict[str, Any], str]] = []


def help_text(program: dict[str, Any]) -> str:
    """The docstring and the flags of the program whose namespace this is.

    Its own flags and those of modules that are no programs themselves: what another program defines that this one
    imports has no effect here.
    """
    lines = [(program.get("__doc__") or "").strip(), ""]
    for name, module, text in _asked:
        if module is program or "main" not in module:
            default = flags.FLAGS[name].default
            shown = f" Default: {default}" if default not in (None, "", False, []) else ""
            lines.append(f"  --{name}{'' if flags.FLAGS[name].boolean else '='}\n      {text}{shown}")
    return "\n".join(lines)


def check_required(**values: object) -> None:
    """Raise a `UserError` that names the first flag without a value."""
    for name, value in values.items():
        if not value:
            raise UserError(f"--{name}= is missing; --help lists the flags")


def interpreter() -> str:
    """The running Python as the user would type it here: python, .venv/bin/python or its whole path."""
    if not sys.executable:
        return "python"
    running, on_path = Path(sys.executable), shutil.which("python")
    # Links are followed of the folder alone: a virtual environment's python is itself a link to the system's.
    if on_path and Path(on_path).parent.resolve() == running.parent.resolve() and running.samefile(on_path):
        return "python"
    if running.is_relative_to(Path.cwd()):
        running = running.relative_to(Path.cwd())
    return shlex.quote(str(running))


def _reader_has_left() -> bool:
    """Whether what is printed goes into a pipe that nobody reads any more, such as that of `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # what is wrong is told of without asking
    return bool(poll.poll(0))


def _end(error: BaseException) -> None:
    line, status = explain(error)
    sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)
    sys.exit(status)


def _parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with its errors as one line that names the nearest right key."""
    if {"--help", "-h", "-help", "--helpfull", "--helpshort"} & set(argv[1:]):
        print(help_text(vars(sys.modules["__main__"])))
        sys.exit(0)
    given = [a.removeprefix("--config=") for a in argv if a.startswith("--config=")]
    given += [value for name, value in itertools.pairwise(argv) if name == "--config"]
    keys = [a.partition("=")[0] for a in argv if re.match("--(?:no)?config\\.", a)]
    if keys and not given and "config" in flags.FLAGS:
        raise UserError(f"{keys[0]} changes a value of a config, but --config= is missing; see the experiments/ folder")
    if given:
        config = load_config(given[-1])
        for argument in argv[1:]:
            match = re.match(r"--(?:no)?config\.([\w.]+)", argument)
            if match and (trouble := _unknown_key(config, match[1])):
                raise UserError(trouble)
    try:
        return flags.FLAGS(_last_of_each(argv))
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), 1)
        hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
        raise UserError(f"unknown flag --{error.flagname}; {hint}") from None
    except (flags.Error, TypeError, ValueError) as error:
        what = re.sub(r"\(['\"](.*)['\"], '(.*)'\)$", r"\1, \2", str(error))  # a tuple of what is wrong with what
        raise UserError(f"{what}; give a value of the same type as in the config file") from None


def _last_of_each(argv: list[str]) -> list[str]:
    """Of a value given twice the last, as for other flags: ml_collections would put two tuples together."""
    values = {a.partition("=")[0]: i for i, a in enumerate(argv) if re.match(r"--config\.[\w.]+=", a)}
    return [a for i, a in enumerate(argv) if values.get(a.partition("=")[0], i) == i]


def load_config(given: str) -> ConfigDict:
    """The config of a file FILE.py[:ARGUMENT], as its get_config makes it. Raises `UserError` if that fails."""
    path = Path(given.split(":")[0])
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"--config={given}: there is no such .py file; see the experiments/ folder for some")
    # Experiments import the one they differ from as `experiments.NAME`, from whatever folder the command was started.
    for parent in path.resolve().parents:
        if parent.name == "experiments" and str(parent.parent) not in sys.path:
            sys.path.append(str(parent.parent))
    spec = importlib.util.spec_from_file_location("_config_without_overrides", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={given} defines no get_config(); see the experiments/ folder for some that do")
        return module.get_config(*given.split(":")[1:])
    except UserError:
        raise
    except ModuleNotFoundError as error:
        hint = (
            "start it in the folder of fpn_jax's clone"
            if (error.name or "").split(".")[0] == "experiments"
            else "install it, or correct it"
        )
        raise UserError(f"--config={given} cannot be loaded ({error}); {hint}") from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"--config={given} cannot be loaded ({what}); correct it") from error


def _unknown_key(config: ConfigDict, key: str) -> str | None:
    """None if config has this dotted key, else a line that names the nearest one it has."""
    node = config
    for part in key.split("."):
        if not isinstance(node, ConfigDict) or part not in node:
            break
        node = node[part]
    else:
        return None
    hint = nearest_key(config, key)
    return f"--config.{key}: there is no such key; " + (
        f"did you mean --config.{hint}?" if hint else f"the keys are {', '.join(config.keys())}"
    )


def nearest_key(config: ConfigDict, key: str) -> str | None:
    """The dotted key of config that `key` may have meant: by its whole, its last part or the initials of that."""
    last = key.split(".")[-1]

    def likeness(known: str) -> tuple[bool, float, float]:
        leaf = known.split(".")[-1]
        initials = "".join(word[:1] for word in leaf.split("_"))  # lr for learning_rate
        ratios = [difflib.SequenceMatcher(None, *pair).ratio() for pair in ((known, key), (leaf, last))]
        return last == leaf or (len(initials) > 1 and last == initials), max(ratios), ratios[0]

    best = max(_dotted(config), key=likeness)
    return best if max(likeness(best)[:2]) >= _ALIKE else None


def _dotted(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """All keys of a nested config, joined by dots."""
    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _dotted(value, f"{prefix}{name}.")
