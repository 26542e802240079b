"""Run every row of an ablation, or what is left of it.

python -m fpn_jax.sweep --config=experiments/ablations/rpn.py:scenes --workdir=runs/rpn [--seeds=3] [--only=fpn,c4]
python -m fpn_jax.sweep --config=experiments/ablations/rpn.py:scenes --diff=fpn,c4

A config of one returns {"title", "baseline", "base": the config all rows start from, "rows": ({"name", "changes":
{dotted key: value}, ...}, ...)}, see experiments/ablations/bases.py; overrides are --config.base.num_steps=100 and so
on. Each run is an ordinary training in WORKDIR/ROW/seedK. A sweep that was stopped or killed goes on with the same
command: what is finished stays, what was under way resumes. `fpn_jax.report` makes the tables.
"""

import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from fpn_jax import cli, common
from fpn_jax.cost import cost
from fpn_jax.errors import InUseError, UserError
from fpn_jax.models import build_detector
from fpn_jax.stages import stage_configs
from fpn_jax.storage.paths import path, write_json
from fpn_jax.train import train
from fpn_jax.training import processes, sharding
from fpn_jax.training.optim import make_optimizer, make_schedule
from fpn_jax.variants import changed, check_unchanged, difference, references

_CONFIG = cli.config_flag()
_WORKDIR = cli.flag("workdir", str, None, "Folder of the sweep; one that is there continues.")
_SEEDS = cli.flag("seeds", int, 3, "Runs of each row, with the base's seed and the next ones.")
_ONLY = cli.flag("only", list, [], "Names of the rows to run, by default all.")
_ROW = cli.flag("row", str, None, "The one row to run, for a job of its own beside those of other rows.")
_DIFF = cli.flag(
    "diff", list, [], "Rows or config files whose differences to show, instead of running: A,B or B alone."
)

_POLL = 30.0  # seconds between two looks at a run of another job
_SAME_IN_ALL = ("seed", "data.dataset", "data.eval_split")
_ROW_KEYS = {"name", "changes", "note", "published", "in_table"}


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    cli.check_required(config=_CONFIG.value)
    if _DIFF.value:
        _print_difference(_CONFIG.value, _DIFF.value)
        return
    cli.check_required(workdir=_WORKDIR.value)
    if _ROW.value and _ONLY.value:
        raise UserError(f"--row={_ROW.value} and --only={','.join(_ONLY.value)} are both given; give one of them")
    only = [_ROW.value] if _ROW.value else _ONLY.value
    sweep(_CONFIG.value, _WORKDIR.value, _SEEDS.value, only)


def sweep(config: ml_collections.ConfigDict, workdir: str, seeds: int, only: Sequence[str] = ()) -> None:
    """Print and write the plan, then run the rows `only` (() all) and the rows whose results they need.

    Seeds go round the rows, so that the first table is whole early. A run that fails is told, and the others go on.
    Raises `UserError` before anything is run if a row cannot be built, and at the end if runs failed.
    """
    rows = check_rows(config)
    needs = {name: needed_rows(config, row) for name, row in rows.items()}
    chosen = _with_needed(needs, only or list(rows))
    if seeds < 1:
        raise UserError(f"--seeds={seeds}; at least one")
    processes.start_processes()
    common.set_up_jax()
    first = sharding.process()[0] == 0
    all_seeds = [config.base.seed + i for i in range(seeds)]
    plan_file = path(workdir) / "plan.json"
    known_seeds = sorted({*all_seeds, *_former_seeds(plan_file)})
    configs = {seed: _configs(config, rows, workdir, seed) for seed in known_seeds}
    for seed in known_seeds:  # nothing is written before all fits to what is there, also to the rows not chosen now
        for row_config, where in configs[seed].values():
            check_unchanged(row_config, where)
            for stage_where, stage in stage_configs(row_config, where).items():
                check_unchanged(stage, stage_where)
    for name in chosen:
        row_config, _ = configs[all_seeds[0]][name]
        try:
            mesh = sharding.make_mesh(options=common.mesh_options(row_config))
            sharding.check_batch_size(mesh, row_config.batch_size // row_config.accumulate, "batch_size")
        except UserError as error:
            raise UserError(f"row {name}: {error}") from None
    plan = make_plan(config, rows, all_seeds)
    if first:
        print(plan_table(plan, chosen), flush=True)
        # Read once more, as another job may have come in the meantime.
        write_json(plan_file, plan | {"seeds": sorted({*all_seeds, *_former_seeds(plan_file)})}, finite=False)
    made_by = {"command": plan["command"], **plan["environment"]}
    failures: list[str] = []
    for seed in all_seeds:
        failed: set[str] = set()
        for name in chosen:
            lost = [other for other in needs[name] if other in failed]
            given = *configs[seed][name], name, seed, made_by
            problem = f"row {lost[0]} failed, whose run it needs" if lost else _run(*given)
            if problem:
                failed.add(name)
                failures.append(f"{name}, seed {seed}")
                print(f"error: {failures[-1]}: {problem}", file=sys.stderr, flush=True)
            jax.clear_caches()  # the next row is another program, and these would only grow
    if failures:
        raise UserError(f"{len(failures)} runs failed: {'; '.join(failures)}; see above, mend, run the same command")
    if first:
        print(f"done; next: {cli.interpreter()} -m fpn_jax.report {shlex.quote(f'--workdir={workdir}')}")


def check_rows(config: ml_collections.ConfigDict) -> dict[str, dict[str, Any]]:
    """{name: row}, each of which can be built. Raises `UserError` naming the row and the key that does not fit."""
    lacking = [key for key in ("title", "baseline", "base", "rows") if key not in config]
    if lacking:
        raise UserError(f"--config has no {lacking[0]}: it is no ablation; see experiments/ablations/ for some")
    rows: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(config.rows):
        if not isinstance(row, Mapping) or not isinstance(row.get("name"), str) or "changes" not in row:
            raise UserError(f"rows[{number}] lacks 'name' or 'changes'; write {{'name': ..., 'changes': {{...}}}}")
        row = dict(row)
        name, unknown = row["name"], set(row) - _ROW_KEYS
        if unknown or name in rows or not name.replace("_", "").replace("-", "").isalnum():
            problem = f"has an unknown {min(unknown)!r}" if unknown else "is there twice or is no plain word"
            raise UserError(f"row {name!r} {problem}; keys are {', '.join(sorted(_ROW_KEYS))}")
        for key in ("changes", "published"):
            if not isinstance(row.get(key, {}), Mapping):
                raise UserError(f"row {name}: {key} is {row[key]!r}; give a dict")
        for key, source in _sources(changed(config.base, row["changes"], f"row {name}")):
            if source not in rows:
                there = ", ".join(rows) or "none does"
                raise UserError(f"row {name}: {key} names row {source!r}, which must come before it: {there}")
        _check_config(config, row)
        rows[name] = row
    if config.baseline not in rows:
        raise UserError(f"baseline is {config.baseline!r}; choose one of the rows {', '.join(rows)}")
    return rows


def _check_config(config: ml_collections.ConfigDict, row: dict[str, Any]) -> None:
    """Raise a `UserError` that names the row if its detector, its data options or its stages cannot be."""
    try:
        row_config = changed(config.base, row["changes"], f"row {row['name']}")
        for key in _SAME_IN_ALL:
            if key in row["changes"]:
                raise UserError(f"{key} is changed, but rows are compared at the same; set --config.base.{key}")
        common.check_numbers(row_config)
        make_optimizer(row_config.optim, make_schedule(row_config.optim, row_config.batch_size, 1), {})
        build_detector(row_config.model, 1)
        common.pipeline_options(row_config)
        for stage in stage_configs(row_config, "").values():
            common.check_numbers(stage)
            build_detector(stage.model, 1)
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith("row ") else f"row {row['name']}: {message}") from None


def _sources(config: ml_collections.ConfigDict) -> list[tuple[str, str]]:
    """[(key, row)] of a row's config that reads the runs of others."""
    values = common.flat_values(config)
    pairs = [(key, str(values[key]).partition(":")) for key in references(config)]
    return [(key, name) for key, (kind, _, name) in pairs if kind == "row"]


def needed_rows(config: ml_collections.ConfigDict, row: dict[str, Any]) -> list[str]:
    """The rows whose runs this one reads."""
    return [name for _, name in _sources(changed(config.base, row["changes"], f"row {row['name']}"))]


def _configs(
    config: ml_collections.ConfigDict, rows: dict[str, dict[str, Any]], workdir: str, seed: int
) -> dict[str, tuple[ml_collections.ConfigDict, str]]:
    """{row: (config, workdir of its run)} with references to other runs put in."""
    runs = {f"row:{name}": f"{workdir}/{name}/seed{seed}" for name in rows}
    return {
        name: (changed(config.base, {**rows[name]["changes"], "seed": seed}, f"row {name}", runs), runs[f"row:{name}"])
        for name in rows
    }


def _former_seeds(plan_file: Any) -> list[int]:
    """Those of former calls, of which this one may be a part."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return [int(seed) for seed in json.loads(plan_file.read_text())["seeds"]]
    return []


def make_plan(
    config: ml_collections.ConfigDict, rows: dict[str, dict[str, Any]], seeds: Sequence[int]
) -> dict[str, Any]:
    """What is to be run, and its cost per image, as JSON; `fpn_jax.report` reads it."""
    base, planned = config.base, []
    for name, row in rows.items():
        row_config = changed(base, row["changes"], f"row {name}")
        detector = build_detector(row_config.model, _num_classes(row_config))
        spent = cost(detector, common.pipeline_options(row_config).buckets[0], row_config.data.max_proposals[1])
        planned.append(
            {
                "name": name,
                "note": row.get("note", ""),
                "changes": {key: _plain(value) for key, value in row["changes"].items()},
                "parameters": spent.parameters,
                "flops": spent.flops,
                "anchors": spent.anchors,
                "num_steps": sum(c.num_steps for c in stage_configs(row_config, "").values()) or row_config.num_steps,
                "published": dict(row.get("published", {})),
                "in_table": row.get("in_table", True),
            }
        )
    detectors = {name: changed(base, row["changes"], name).model.detector for name, row in rows.items()}
    bucket = common.pipeline_options(base).buckets[0]
    return {
        "title": config.title,
        "description": f"{base.num_steps} steps of {base.batch_size} images of {bucket[0]} x {bucket[1]} pixels.",
        "command": f"python -m fpn_jax.sweep {shlex.join(sys.argv[1:])}",
        "baseline": config.baseline,
        "detector": detectors[config.baseline],
        "dataset": base.data.dataset,
        "split": base.data.eval_split,
        "image_size": list(bucket),
        "seeds": list(seeds),
        "rows": planned,
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """What figures depend on besides the config."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def plan_table(plan: dict[str, Any], chosen: Sequence[str]) -> str:
    """The plan for the terminal."""
    height, width = plan["image_size"]
    lines = [
        f"{plan['title']}: {plan['description']} {plan['dataset']}, seeds {', '.join(map(str, plan['seeds']))}",
        f"{'row':<18}{'parameters':>12}{'GFLOPs':>9}{'anchors':>11}{'steps':>8}   changes; image {height} x {width}",
    ]
    for row in plan["rows"]:
        changes = ", ".join(f"{key}={value}" for key, value in row["changes"].items())
        anchors = "-" if row["anchors"] is None else f"{row['anchors']:,}"
        skipped = "" if row["name"] in chosen else "   (not now)"
        lines.append(
            f"{row['name']:<18}{row['parameters']:>12,}{row['flops'] / 1e9:>9.2f}{anchors:>11}{row['num_steps']:>8}"
            f"   {changes if len(changes) < 100 else changes[:97] + '...'}{skipped}"
        )
    return "\n".join(lines)


def _with_needed(needs: dict[str, list[str]], wanted: Sequence[str]) -> list[str]:
    """The wanted rows, in the order of the table, and those whose runs they read."""
    for name in wanted:
        if name not in needs:
            raise UserError(f"there is no row {name!r}; choose some of {', '.join(needs)}")
    needed = set(wanted)
    for name in reversed(needs):  # what a row reads comes before it
        if name in needed:
            needed |= set(needs[name])
    return [name for name in needs if name in needed]


def _run(config: ml_collections.ConfigDict, workdir: str, name: str, seed: int, made_by: dict[str, Any]) -> str | None:
    """Train, unless that is done; what went wrong, if it is the user's or the memory's fault.

    A row that another job runs, as several may need the same, is waited for. made_by: kept in made_by.json, for the
    report: rows may be run by several calls.

    One of several processes may fail alone, and the others would wait for it for ever: then the error ends them all.
    """
    what = f"{name}, seed {seed}"
    first = sharding.process()[0] == 0
    if (path(workdir) / "metrics.json").exists():
        if first:
            print(f"{what}: finished before", flush=True)
        return None
    start = time.monotonic()
    if first:
        print(f"{what}: {workdir}", flush=True)
    try:
        waited = _train_or_wait(config.lock(), workdir, what)
    except (UserError, jax.errors.JaxRuntimeError) as error:  # the latter: it does not fit into memory
        if sharding.process()[1] > 1:
            raise
        return " ".join(str(error).split())[:500]
    if first:
        note = path(workdir) / "made_by.json"
        if not waited or not note.exists():  # else it is the other job's run
            write_json(note, made_by)
        print(f"{what}: finished in {time.monotonic() - start:.0f} s", flush=True)
    return None


def _train_or_wait(config: ml_collections.ConfigDict, workdir: str, what: str) -> bool:
    """Train; as long as another job does that, wait for it. Whether it was waited for."""
    told = False
    while True:
        try:
            train(config, workdir)
            return told
        except InUseError as busy:
            if sharding.process()[1] > 1:  # only one of the processes has claimed, and was refused
                raise
            if not told:
                print(f"{what}: {busy}; waiting for it", flush=True)
            told = True
            time.sleep(_POLL)


def _num_classes(config: ml_collections.ConfigDict) -> int:
    """Of the data set, where it is there; else COCO's."""
    try:
        return len(common.open_data(config, config.data.eval_split).class_names)
    except UserError:
        return 80


def _print_difference(config: ml_collections.ConfigDict, names: Sequence[str]) -> None:
    """Both sides are a row of the config or a config file; with one name the other side is the config or its base."""
    if len(names) > 2:
        raise UserError(f"--diff={','.join(names)}: give one or two rows or config files")
    sides = [(name, _named(config, name)) for name in names]
    if len(sides) == 1:
        sides.insert(0, ("base", config.base) if "base" in config else ("--config", config))
    found = difference(sides[0][1], sides[1][1])
    width = max([len(key) for key, *_ in found], default=0)
    print(f"{sides[0][0]} -> {sides[1][0]}: {len(found)} keys differ")
    for key, one, other in found:
        print(f"  {key:<{width}}  {one!r} -> {other!r}")


def _named(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    if name.split(":")[0].endswith(".py"):
        other = cli.load_config(name)
        return other.base if "base" in other and "rows" in other else other
    rows = check_rows(config)
    if name not in rows:
        raise UserError(f"--diff: {name!r} is neither a config file nor one of the rows {', '.join(rows)}")
    return changed(config.base, rows[name]["changes"], f"row {name}")


def _plain(value: Any) -> Any:
    return {k: _plain(v) for k, v in value.items()} if hasattr(value, "items") else value


if __name__ == "__main__":
    cli.run(main)
