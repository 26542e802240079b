"""Configs that differ from a base in a few keys: rows of an ablation, stages of a training; and their differences."""

import contextlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from fpn_jax.cli import nearest_key
from fpn_jax.common import flat_values
from fpn_jax.errors import UserError, some
from fpn_jax.models import build_detector
from fpn_jax.storage import paths

_RUN_KEYS = ("init_from", "data.proposals_train", "data.proposals_eval")  # whose values may be other runs


def changed(
    config: ml_collections.ConfigDict, changes: Mapping[str, Any], where: str, runs: Mapping[str, str] | None = None
) -> ml_collections.ConfigDict:
    """A copy of config with {dotted key: value}; a dict as value takes the place of a whole part of the model.

    runs: {"row:fpn": workdir, ...}, what values that name another run stand for; None leaves them as they
    are. where: the row or stage, for errors.
    Raises `UserError` for a key that config has not, a value of another type, a dict for another group than one of the
    model, whose modules have defaults, or a run that is not among `runs`.
    """
    result = ml_collections.ConfigDict(config.to_dict())
    for key, value in changes.items():
        parent, name = result, key
        *groups, name = key.split(".")
        for group in groups:
            parent = parent[group] if isinstance(parent, ml_collections.ConfigDict) and group in parent else None
        if not isinstance(parent, ml_collections.ConfigDict) or name not in parent:
            near = nearest_key(result, key)
            hint = f"did you mean {near}?" if near else "the keys are those of the base config"
            raise UserError(f"{where}: the config has no {key}; {hint}")
        if isinstance(value, Mapping):
            if not key.startswith("model."):
                raise UserError(f"{where}: {key} is a dict; name each key, as in {key}.{next(iter(value), 'NAME')}")
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


# What may differ between two starts of a run without changing what comes out.
HARMLESS = (
    *("data.data_dir", "data.cache_dir", "data.num_threads", "data.num_workers", "pictures", "checkpoint_every"),
    *("mesh.data", "mesh.fsdp", "mesh.space", "mesh.shard_params", "model.backbone.remat"),
    *("join_within", "dead_after", "stall_after"),
)


def check_unchanged(config: ml_collections.ConfigDict, workdir: str, but: Collection[str] = ()) -> None:
    """Raise a `UserError` that names the first key in which what was begun in workdir differs; `but`: not these.

    Paths to other runs count as the same if they lead to the same folder. Keys that one side lacks have their defaults
    there: of the model they count if they make another one, others came later.
    """
    path = paths.path(workdir) / "config.json"
    if not path.exists():
        return
    try:
        old = ml_collections.ConfigDict(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); remove {workdir} to run it anew") from None
    before, now = flat_values(old), flat_values(ml_collections.ConfigDict(json.loads(json.dumps(config.to_dict()))))
    advice = f"set it back, remove {workdir} to run it anew, or take another --workdir"
    for key in before.keys() & now.keys() - {*HARMLESS, *but}:
        one, other = before[key], now[key]
        same = one == other or (key == "stages" and not one and were_stages(workdir, [s["name"] for s in other]))
        same = same or (key in _RUN_KEYS and one and other and Path(one).resolve() == Path(other).resolve())
        if not same:
            raise UserError(f"{workdir} was run with another {key}: {one!r}, now {other!r}; {advice}")
    lacking = sorted(key for key in (before.keys() ^ now.keys()) - {*HARMLESS} if key.startswith("model."))
    if lacking and _built(old.model) != _built(config.model):
        raise UserError(f"{workdir} was run with another model, by {some(lacking)}; {advice}")


def _built(model: ml_collections.ConfigDict) -> Any:
    """The detector, but for what is harmless; None if it cannot be built, as of a key that is no more."""
    values = model.to_dict()
    values["backbone"].pop("remat", None)
    with contextlib.suppress(UserError):
        return build_detector(values, 1)
    return None


def were_stages(workdir: str, names: Collection[str]) -> bool:
    """Whether all of these stages were run there: config.json told nothing of stages at first."""
    return bool(names) and all((paths.path(workdir) / name / "config.json").exists() for name in names)


def references(config: ml_collections.ConfigDict) -> list[str]:
    """The keys whose value is another run, such as "row:rpn"."""
    values = flat_values(config)
    return [key for key in _RUN_KEYS if str(values.get(key, "")).startswith(("row:", "stage:"))]


def difference(first: ml_collections.ConfigDict, second: ml_collections.ConfigDict) -> list[tuple[str, Any, Any]]:
    """(dotted key, value here, value there) of every key that differs; None where one has no such key."""
    one, other = flat_values(first), flat_values(second)
    keys = [*one, *(key for key in other if key not in one)]
    return [(key, one.get(key), other.get(key)) for key in keys if one.get(key) != other.get(key)]
