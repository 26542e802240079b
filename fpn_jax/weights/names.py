"""From our variables to the names and layouts of another framework's weights, by the tables of `tables`."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from fpn_jax.errors import UserError
from fpn_jax.weights.tables import FORMATS, Format

Path = tuple[str, ...]  # of a variable, its collection first: ("params", "neck", "lateral2", "kernel")

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_PLACE = re.compile(r"\{(\w)([+-]\d+)?\}")


def flatten(variables: Mapping[str, Any]) -> dict[Path, Any]:
    """Nested variables as {path: array}."""
    return flax.traverse_util.flatten_dict(dict(variables))


def unflatten(arrays: Mapping[Path, Any]) -> dict[str, Any]:
    """The inverse; both collections are there even if one is empty."""
    return {"params": {}, "batch_stats": {}} | flax.traverse_util.unflatten_dict(dict(arrays))


def frameworks() -> list[str]:
    """Those that we know the names of, ours first."""
    return list(dict.fromkeys(format.framework for format in FORMATS))


def formats(framework: str) -> list[Format]:
    """All models of one framework. Raises `UserError` if there is no such framework."""
    if framework not in frameworks():
        raise UserError(f"there are no names of {framework!r}; choose one of {', '.join(frameworks())}")
    return [format for format in FORMATS if format.framework == framework]


def recognise(names: Iterable[str], file: str) -> Format:
    """The format of weights with these names. Raises `UserError` if no table knows them."""
    names = list(names)
    for format in FORMATS:
        if set(format.sign) <= set(renamed(names, format)):
            return format
    shown = ", ".join(sorted(names)[:3]) or "nothing"
    raise UserError(
        f"{file}: not the weights of a detector or backbone known here (it has {shown}, ...); "
        f"known are {'; '.join(format.name for format in FORMATS)}"
    )


def renamed(names: Iterable[str], format: Format) -> dict[str, str]:
    """{today's name: name in the file}, older names replaced."""
    today = {}
    for name in names:
        new = name
        for pattern, replacement in format.renamed.items():
            if match := re.fullmatch(pattern, name):
                new = match.expand(replacement)
                break
        today[new] = name
    return today


def their_name(path: Path, format: Format) -> str | None:
    """What the format calls our variable, None if it has no such thing."""
    if format.ours:
        return "/".join(path)
    *module, leaf = path[1:]
    if module[-1] == "norm":  # a live norm is a module in a module, a frozen one is not
        module = module[:-1]
    ours = "/".join(module)
    for pattern, template in format.modules.items():
        if match := _regex(pattern).fullmatch(ours):
            return f"{_fill(template, match.groupdict())}.{_LEAVES[leaf]}"
    return None


def is_known(name: str, format: Format) -> bool:
    """Whether a name of theirs belongs to a module of the table, of whatever size; all of our own do."""
    if format.ours:
        return True
    module, _, leaf = name.rpartition(".")
    return leaf in _LEAVES.values() and any(_regex(t, bare=True).fullmatch(module) for t in format.modules.values())


def is_ignored(name: str, format: Format) -> bool:
    """Whether a detector has no use for their weight of this name."""
    return any(re.fullmatch(pattern, name) for pattern in format.ignored)


def to_ours(path: Path, theirs: np.ndarray, format: Format, pooled_size: int) -> np.ndarray:
    """Their array in our layout. The first layer behind the RoI features reads [h w c] here, [c h w] there."""
    if path[-1] != "kernel" or format.ours:
        return theirs
    if theirs.ndim == 4:  # [out in h w]
        return theirs.transpose(2, 3, 1, 0)
    if _reads_rois(path) and theirs.ndim == 2 and theirs.shape[1] % pooled_size**2 == 0:
        out, channels = theirs.shape[0], theirs.shape[1] // pooled_size**2
        return theirs.reshape(out, channels, -1).transpose(2, 1, 0).reshape(-1, out)
    return theirs.T


def to_theirs(path: Path, ours: np.ndarray, format: Format, pooled_size: int) -> np.ndarray:
    """The inverse of `to_ours`."""
    if path[-1] != "kernel" or format.ours:
        return ours
    if ours.ndim == 4:
        return ours.transpose(3, 2, 0, 1)
    if _reads_rois(path):
        cells, out = pooled_size**2, ours.shape[1]
        return ours.reshape(cells, -1, out).transpose(2, 1, 0).reshape(out, -1)
    return ours.T


def _reads_rois(path: Path) -> bool:
    return path[1:-1] == ("box_head", "fc1")


@functools.cache
def _regex(template: str, bare: bool = False) -> re.Pattern:
    """Numbers are caught by their letter; with `bare` any number fits, for templates that do arithmetic."""
    parts, seen, end = [], set(), 0
    for place in _PLACE.finditer(template):
        parts.append(re.escape(template[end : place.start()]))
        letter = place[1]
        parts.append(r"\d+" if bare else f"(?P={letter})" if letter in seen else rf"(?P<{letter}>\d+)")
        seen.add(letter)
        end = place.end()
    return re.compile("".join(parts) + re.escape(template[end:]))


def _fill(template: str, numbers: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda place: str(int(numbers[place[1]]) + int(place[2] or 0)), template)
