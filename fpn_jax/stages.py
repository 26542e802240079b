"""Training in stages, each a run of its own in WORKDIR/STAGE, whose weights make one detector in the end.

For the four-step training that lets RPN and Fast R-CNN share their features (Ren et al., arXiv 1506.01497, section
3.2): see experiments/faster_rcnn_r50_fpn_4step.py.
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from fpn_jax import common, evaluate, visualize
from fpn_jax.errors import UserError
from fpn_jax.models import PARTS
from fpn_jax.storage.paths import path, write_json
from fpn_jax.training import checkpoint, sharding
from fpn_jax.training.optim import make_optimizer, make_schedule
from fpn_jax.training.state import init_variables, make_state
from fpn_jax.variants import changed, check_unchanged, were_stages

Train = Callable[[ml_collections.ConfigDict, str], dict[str, Any]]


def train_stages(config: ml_collections.ConfigDict, workdir: str, train: Train) -> dict[str, Any]:
    """Run what is left of the stages, put their weights together, and return the metrics of the whole.

    train: runs one config in one workdir. Each part of the detector comes from the last stage that has it.
    Raises `UserError` if a stage names one that does not come before it, or no stage has some part.
    """
    configs = stage_configs(config, workdir)
    for where, stage in configs.items():  # all of them before the first takes hours
        try:
            common.check_numbers(stage)
        except UserError as error:
            raise UserError(f"stage {path(where).name}: {error}") from None
        check_unchanged(stage, where)
    _check_same_stages(config, workdir)
    for where, stage in configs.items():
        train(stage, where)
    metrics_file = path(workdir) / "metrics.json"
    if metrics_file.exists():
        return json.loads(metrics_file.read_text())
    _join(config, workdir, configs)
    metrics = evaluate.evaluate(workdir, None, "best", config.pictures, None)
    if sharding.process()[0] == 0:
        visualize.curves(path(list(configs)[-1]) / "metrics.jsonl", path(workdir) / "curves.png")
        write_json(metrics_file, metrics)
    return metrics


def _check_same_stages(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Raise a `UserError` if the workdir's weights were put together from other stages than the config's."""
    if not (path(workdir) / "config.json").exists():
        return
    made_of, wanted = (
        [stage["name"] for stage in c.get("stages", ())] for c in (checkpoint.read_config(workdir), config)
    )
    if made_of != wanted and not (not made_of and were_stages(workdir, wanted)):
        raise UserError(
            f"--workdir={workdir} was made of the stages {', '.join(made_of) or '(none)'}, now config.stages has "
            f"{', '.join(wanted)}; set them back, or take another --workdir"
        )


def stage_configs(config: ml_collections.ConfigDict, workdir: str) -> dict[str, ml_collections.ConfigDict]:
    """{workdir of the stage: its config}, in order."""
    whole, runs, configs = _whole(config), {}, {}
    for number, stage in enumerate(config.stages):
        if not isinstance(stage, Mapping) or set(stage) != {"name", "changes"}:
            raise UserError(f"config.stages[{number}] must be {{'name': ..., 'changes': {{...}}}}")
        where = f"{workdir}/{stage['name']}"
        configs[where] = changed(whole, stage["changes"], f"config.stages, {stage['name']}", runs)
        runs[f"stage:{stage['name']}"] = where
    return configs


def _whole(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    whole = ml_collections.ConfigDict(config.to_dict())
    whole.stages = ()
    return whole


def _join(config: ml_collections.ConfigDict, workdir: str, configs: dict[str, ml_collections.ConfigDict]) -> None:
    """Write the workdir's weights, config and classes from those of the stages, unless they are there already.

    All processes do this, as orbax wants it.
    """
    first = sharding.process()[0] == 0
    with (
        checkpoint.claim_workdir(workdir) if first else contextlib.nullcontext(),
        checkpoint.Checkpoints(workdir, writes=True) as checkpoints,
    ):
        if checkpoints.has_initial:
            return
        classes = common.Classes.read(list(configs)[-1])
        detector = common.make_detector(config, classes)
        variables = init_variables(detector, common.pipeline_options(config).buckets[0], config.seed)
        _take_parts(variables, configs)
        if first:
            checkpoint.write_config(workdir, config)
            classes.write(workdir)
        optimizer = make_optimizer(config.optim, make_schedule(config.optim, config.batch_size, 1), variables["params"])
        state = make_state(variables, optimizer, 0.0)
        checkpoints.save_initial(sharding.put_replicated(sharding.make_mesh(), state))


def _take_parts(variables: dict[str, Any], configs: dict[str, ml_collections.ConfigDict]) -> None:
    """Replace each part of the variables by that of the last stage that has it."""
    lacking = set(variables["params"])
    for where in reversed(configs):
        with checkpoint.Checkpoints(where) as checkpoints:
            saved, _ = checkpoints.saved_weights("best")
        for part in [part for part in PARTS if part in lacking and part in saved["params"]]:
            lacking.remove(part)
            for kind in ("params", "batch_stats"):
                if part in saved[kind]:
                    variables[kind][part] = _as_arrays(saved[kind][part])
    if lacking:
        raise UserError(f"config.stages: no stage trains {', '.join(sorted(lacking))}; add one that does")


def _as_arrays(tree: Any) -> Any:
    return {k: _as_arrays(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree)
