"""Configs that differ from a base in a few keys: rows of an ablation, stages of a training; and their differences."""

import difflib
from collections.abc import Mapping
from typing import Any

import ml_collections

from fpn_jax.common import flat_values
from fpn_jax.errors import UserError


def changed(
    config: ml_collections.ConfigDict, changes: Mapping[str, Any], where: str, runs: Mapping[str, str] | None = None
) -> ml_collections.ConfigDict:
    """A copy of config with {dotted key: value}; a dict as value takes the place of the whole group.

    runs: {"row:fpn": workdir, ...}, what values that name another run stand for; None leaves them as they
    are. where: the row or stage, for errors.
    Raises `UserError` for a key that config has not, a value of another type, or a run that is not among `runs`.
    """
    result = ml_collections.ConfigDict(config.to_dict())
    for key, value in changes.items():
        parent, name = result, key
        *groups, name = key.split(".")
        for group in groups:
            parent = parent[group] if isinstance(parent, ml_collections.ConfigDict) and group in parent else None
        if not isinstance(parent, ml_collections.ConfigDict) or name not in parent:
            near = difflib.get_close_matches(key, list(flat_values(config)), 1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "the keys are those of the base config"
            raise UserError(f"{where}: the config has no {key}; {hint}")
        if isinstance(value, Mapping):
            del parent[name]
            parent[name] = ml_collections.ConfigDict(dict(value))
            continue
        try:
            parent[name] = value
        except TypeError:
            kinds = f"{type(value).__name__}, the config's is {type(parent[name]).__name__}"
            raise UserError(f"{where}: {key} is {value!r}, a {kinds}; give a value of that type") from None
    return result if runs is None else _resolved(result, where, runs)


def _resolved(config: ml_collections.ConfigDict, where: str, runs: Mapping[str, str]) -> ml_collections.ConfigDict:
    """References "row:NAME" and "stage:NAME" as the workdirs that they stand for; other strings as they are."""
    for key in references(config):
        parent, name = (config.data, key.removeprefix("data.")) if key.startswith("data.") else (config, key)
        if parent[name] in runs:
            parent[name] = runs[parent[name]]
        else:
            raise UserError(
                f"{where}: {key} is {parent[name]!r}; name one that comes before: {', '.join(runs) or 'none does'}"
            )
    return config


def references(config: ml_collections.ConfigDict) -> list[str]:
    """The keys whose value is another run, such as "row:rpn"."""
    keys = ("init_from", "data.proposals_train", "data.proposals_eval")
    values = flat_values(config)
    return [key for key in keys if str(values.get(key, "")).startswith(("row:", "stage:"))]


def difference(first: ml_collections.ConfigDict, second: ml_collections.ConfigDict) -> list[tuple[str, Any, Any]]:
    """(dotted key, value here, value there) of every key that differs; None where one has no such key."""
    one, other = flat_values(first), flat_values(second)
    keys = [*one, *(key for key in other if key not in one)]
    return [(key, one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)]
