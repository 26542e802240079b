"""Train a detector; the same command continues a run that was stopped or killed.

python -m fpn_jax.train --config=experiments/demo.py --workdir=runs/demo [--config.batch_size=16 ...]
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import flags

from fpn_jax import cli, common, evaluation
from fpn_jax.data.pipeline import train_batches
from fpn_jax.errors import UserError
from fpn_jax.evaluate import detect_split, score_split
from fpn_jax.training import checkpoint, sharding
from fpn_jax.training.logs import MetricLog
from fpn_jax.training.optim import make_optimizer, make_schedule
from fpn_jax.training.state import inference_variables, init_variables, make_state
from fpn_jax.training.step import make_detect, make_train_step

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and scores; a run there continues.")


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Run (or continue) the experiment in workdir and return the metrics of the last evaluation."""
    sharding.start_processes()
    common.set_up_jax()
    rank, world = sharding.process()
    mesh = sharding.make_mesh()
    sharding.check_batch_size(mesh, config.batch_size // config.accumulate, "batch_size / accumulate")
    sharding.check_batch_size(mesh, config.eval_batch_size, "eval_batch_size")

    train_split = common.open_data(config, config.data.train_split)
    eval_split = common.open_data(config, config.data.eval_split)
    classes = common.Classes(train_split.class_names, train_split.category_ids)
    common.check_classes(classes, eval_split, workdir)
    options = common.pipeline_options(config)
    detector = common.make_detector(config, classes)

    variables = init_variables(detector, options.buckets[0], config.seed)
    schedule = make_schedule(config.optim, config.batch_size, config.num_steps)
    optimizer = make_optimizer(config.optim, schedule, variables["params"], detector.frozen)
    state = sharding.put_replicated(mesh, make_state(variables, optimizer, config.ema_decay))
    step_fn = make_train_step(detector, optimizer, schedule, config.seed, config.accumulate, config.ema_decay)
    detect = make_detect(detector)

    lock = checkpoint.claim_workdir(workdir, config)
    if rank == 0:
        classes.write(workdir)
    checkpoints = checkpoint.Checkpoints(workdir)
    if found := checkpoints.restore(state):
        state, position = found
        _check_same_data(position, _position(config, train_split), workdir)
    first = int(state.step)
    batches = train_batches(
        train_split, options, config.batch_size, config.seed, config.num_steps, rank=rank, world=world, start=first
    )
    log = MetricLog(workdir, config.num_steps, first, enabled=rank == 0)
    log.message(
        f"{_describe(variables, mesh, train_split, options)}; {'continuing at' if first else 'from'} step {first}"
    )

    def evaluate_now(step: int) -> dict[str, Any]:
        results = detect_split(detect, inference_variables(state), mesh, eval_split, options, config.eval_batch_size)
        metrics = score_split(workdir, eval_split, results)
        log.write_now(step, {f"eval/{name}": value for name, value in metrics.items() if isinstance(value, float)})
        log.message(f"step {step}: " + "  ".join(f"{k} {metrics[k] or 0:.3f}" for k in ("AP", "AP50", "AP75")))
        best = checkpoints.best_metrics()
        if best is None or (metrics["AP"] or 0.0) > best["AP"]:
            checkpoints.save_best(state, {"AP": metrics["AP"] or 0.0})
        return metrics

    image_ids: collections.deque[tuple[int, list[int]]] = collections.deque(maxlen=3)  # of the steps not yet checked

    def check_finite(written: tuple[int, dict[str, float]] | None) -> None:
        if written is None:
            return
        step, values = written
        broken = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if broken:
            raise UserError(
                f"step {step}: {' and '.join(broken)} not finite on the images with ids {dict(image_ids).get(step)}; "
                f"the last good checkpoint is {checkpoints.latest_step or 'none'} in {workdir}/checkpoints; "
                "look at these images, or lower optim.learning_rate or set optim.clip_norm"
            )

    metrics: dict[str, Any] = {}
    try:
        for step, host in zip(range(first + 1, config.num_steps + 1), batches, strict=False):
            image_ids.append((step, np.asarray(host["image_id"]).tolist()))
            state, step_metrics = step_fn(state, sharding.put_batch(mesh, host))
            check_finite(log.write(step, step_metrics))
            last = step == config.num_steps
            evaluating = last or (config.eval_every and step % config.eval_every == 0)
            saving = last or step % config.checkpoint_every == 0
            if evaluating or saving:
                check_finite(log.flush())  # a broken state must not become a checkpoint
            # Saving comes first: what an evaluation dies of must not cost the steps before it.
            if saving:
                checkpoints.save(state, _position(config, train_split))
            if evaluating:
                metrics = evaluate_now(step)
        if not metrics:  # the run was complete already
            metrics = evaluate_now(first)
    finally:
        log.close()
    checkpoints.close()
    if rank == 0:
        print(evaluation.metrics_table(metrics))
        print(f"everything lies in {workdir}; scores in {workdir}/eval/{eval_split.split}/metrics.json")
    lock = None  # noqa: F841 - held until here
    return metrics


def _position(config: ml_collections.ConfigDict, split: Any) -> dict[str, Any]:
    """With the step, the exact place in the data: the batches are a function of these and the step."""
    return {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "dataset": split.name,
        "split": split.split,
        "images": len(split),
    }


def _check_same_data(saved: dict[str, Any], wanted: dict[str, Any], workdir: str) -> None:
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise UserError(
                f"--workdir={workdir} was trained with {name} {saved.get(name)!r}, now it is {value!r}: the order of "
                "the data would break; set it back, or train into another --workdir"
            )


def _describe(variables: dict[str, Any], mesh: Any, split: Any, options: Any) -> str:
    count = sum(x.size for x in _leaves(variables["params"]))
    buckets = " ".join(f"{h}x{w}" for h, w in options.buckets)
    return (
        f"{count / 1e6:.1f} M parameters, {mesh.size} device(s), {len(split)} images of {split.name} {split.split}, "
        f"buckets {buckets}"
    )


def _leaves(tree: Any) -> list[Any]:
    return [leaf for x in tree.values() for leaf in (_leaves(x) if isinstance(x, dict) else [x])]


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    cli.check_required(workdir=_WORKDIR.value, config=_CONFIG.value and "given")
    train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    cli.run(main)
