"""Train a detector; the same command continues a run that was stopped or killed.

python -m fpn_jax.train --config=experiments/demo.py --workdir=runs/demo [--config.batch_size=16 ...]
"""

import collections
import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import ml_collections

from fpn_jax import cli, common, visualize
from fpn_jax.data.datasets import Split
from fpn_jax.data.pipeline import PipelineOptions, bucket_members, train_batches
from fpn_jax.errors import Stopped, UserError, some
from fpn_jax.models import build_detector
from fpn_jax.models.detector import Detector
from fpn_jax.propose import open_proposals
from fpn_jax.scoring import Evaluator, Found, metrics_table
from fpn_jax.stages import train_stages
from fpn_jax.storage.paths import path, write_json
from fpn_jax.training import checkpoint, peers, roll_call, sharding
from fpn_jax.training.logs import MetricLog
from fpn_jax.training.optim import make_optimizer, make_schedule
from fpn_jax.training.state import inference_variables, init_variables, make_state
from fpn_jax.training.step import make_train_step
from fpn_jax.training.watch import Compilations, StopRequest, TimedBatches
from fpn_jax.types import TrainState
from fpn_jax.variants import HARMLESS, difference

_CONFIG = cli.config_flag()
_WORKDIR = cli.flag("workdir", str, None, "Folder for checkpoints, metrics and scores; a run there continues.")

_BY_BUCKET = "images by bucket (data.buckets, shorter, longest, rounding and skip_empty decide)"


def train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Run the experiment in workdir, or what is left of it, and return the metrics of the last evaluation."""
    if "rows" in config:
        raise UserError("--config is an ablation of several rows; run it with python -m fpn_jax.sweep")
    common.check_numbers(config)
    with common.together(config, workdir):
        return _train(config, workdir)


def _train(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    common.set_up_jax()
    build_detector(config.model, 1)  # what cannot be built is told before anything is read
    if config.stages:
        return train_stages(config, workdir, train)
    rank, world = sharding.process()
    mesh_options = common.mesh_options(config)
    mesh, over = sharding.make_mesh(options=mesh_options), mesh_options.shard_params
    sharding.check_batch_size(mesh, config.batch_size // config.accumulate, "batch_size / accumulate")
    sharding.check_batch_size(mesh, config.eval_batch_size, "eval_batch_size")

    train_split = common.open_data(config, config.data.train_split, "data.train_split")
    eval_split = common.open_data(config, config.data.eval_split, "data.eval_split")
    classes = common.Classes(train_split.class_names, train_split.category_ids)
    common.check_classes(classes, eval_split, workdir)
    roll_call.agree("devices and data", common.fingerprint(train_split, eval_split), config.join_within)
    roll_call.announce(config.batch_size, f"{train_split.name} {train_split.split}", len(train_split))
    options = common.pipeline_options(config)
    detector = common.make_detector(config, classes)
    sharding.check_buckets(mesh, options.buckets, common.STRIDE, detector.coarsest_stride)
    regions = _regions(config, detector, train_split, eval_split)
    evaluator = Evaluator(detector, mesh, eval_split, options, config.eval_batch_size, regions["eval"])

    claim = checkpoint.claim_workdir(workdir) if rank == 0 else contextlib.nullcontext()
    with claim, checkpoint.Checkpoints(workdir, writes=True) as checkpoints:
        variables, origin = _starting_weights(config, detector, options.buckets[0], mesh, checkpoints)
        schedule = make_schedule(config.optim, config.batch_size, config.num_steps)
        optimizer = make_optimizer(config.optim, schedule, variables["params"], detector.frozen)
        state = sharding.put_state(mesh, make_state(variables, optimizer, config.ema_decay), over)
        how = config.seed, config.accumulate, config.ema_decay, mesh, over
        train_step = make_train_step(detector, optimizer, schedule, *how)
        position = _position(config, train_split, options)
        if checkpoints.latest_step is not None and common.Classes.known(workdir):
            common.check_classes(common.Classes.read(workdir), train_split, workdir)
        changes = _changes(config, workdir)
        if found := _restore(checkpoints, state, changes):
            state, saved_position = found
            _check_same_data(saved_position, position, workdir)
        first = int(state.step)
        if not first:  # a converted model's config told of no run
            changes = [change for change in changes if change.startswith("model.")]
        order = {"rank": rank, "world": world, "start": first, "proposals": regions["train"]}
        batches = train_batches(train_split, options, config.batch_size, config.seed, config.num_steps, **order)
        metrics = _finished(workdir) if first >= config.num_steps else None
        if rank == 0 and metrics is None:  # of a finished run nothing is done anew: it stays as it was configured
            checkpoint.write_config(workdir, config)
            classes.write(workdir)
            # If a run that was finished goes on, those are not its scores any more.
            (path(workdir) / "metrics.json").unlink(missing_ok=True)
        # Saving comes before evaluating: an evaluation of this very step may have been cut short or never have begun.
        again = metrics is None and _evaluates(config, first)
        log = MetricLog(workdir, config.num_steps, first, enabled=rank == 0, evaluates_again=again)
        with log, StopRequest() as stop:
            log.message(_describe(state, sharding.describe(mesh, over), train_split, options, first))
            for line in [*origin, *(f"changed: {change}" for change in changes)]:
                log.message(line)
            if metrics is not None and changes:
                log.message(
                    f"warning: the run was finished at step {first}, num_steps={config.num_steps}: nothing is done"
                )
            run = _Run(config, workdir, evaluator, checkpoints, log)
            if again:
                metrics = run.evaluate(state, first >= config.num_steps)
            batches, compilations = TimedBatches(batches), Compilations(train_step)
            for step, host in zip(range(first + 1, config.num_steps + 1), batches, strict=False):
                run.image_ids.append((step, host["image_id"].tolist()))
                peers.at("training" if compilations.knows(host) else "compiling", step)
                state, step_metrics = train_step(state, sharding.put_batch(mesh, host))
                run.check_finite(log.write(step, step_metrics | {"data_wait": batches.waited}))
                if warning := compilations.check(host):
                    log.message(warning)
                last, stopping = step == config.num_steps, stop.came(step)
                # Saving comes first: what an evaluation dies of must not cost the steps before it.
                if last or stopping or _is_due(config.checkpoint_every, step):
                    run.save(state, position)
                if stopping and not last:
                    checkpoints.wait()
                    raise Stopped(f"stopped after step {step} as told, which is saved; the same command continues")
                if _evaluates(config, step):
                    metrics = run.evaluate(state, last)
    return metrics


@dataclass
class _Run:
    """What happens between steps: checkpoints, evaluations, and the watch over the loss."""

    config: ml_collections.ConfigDict
    workdir: str
    evaluator: Evaluator
    checkpoints: checkpoint.Checkpoints
    log: MetricLog
    image_ids: collections.deque = field(default_factory=lambda: collections.deque(maxlen=3))  # steps not yet checked

    def save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Checkpoint the state, after making sure that it is not broken."""
        self.check_finite(self.log.flush())
        peers.at("saving")
        self.checkpoints.save(state, position)

    def evaluate(self, state: TrainState, last: bool) -> dict[str, Any]:
        """Score the state and keep its weights if they are the best; the last time also draw and conclude."""
        self.check_finite(self.log.flush())
        step, split, main = int(state.step), self.evaluator.split, self.evaluator.main_metric
        variables = inference_variables(state)
        found = self.evaluator.detect(variables)
        metrics = self.evaluator.score(found)
        numbers = {f"eval/{name}": value for name, value in metrics.items() if name != "per_class"}
        self.log.write_now(step, numbers)
        shown = "  ".join(f"{name} {metrics[name] or 0:.3f}" for name in self.evaluator.shown_metrics)
        self.log.message(f"step {step}, {len(split)} images of {split.split}: {shown}")
        self.evaluator.write(self.workdir, found, metrics)
        score, images = metrics[main] or 0.0, f"{split.name} {split.split}"
        best = self.checkpoints.best_metrics()
        # Scores on other images, before data.eval_split was changed, are no measure of these.
        if best is None or best.get("images", images) != images or score > best[main]:
            self.checkpoints.save_best(state, {main: score, "images": images})
        if last:
            peers.at("analysing")
            self.evaluator.analyse(self.workdir, variables, found)
            if sharding.process()[0] == 0:
                self._conclude(found, metrics)
        return metrics

    def check_finite(self, written: tuple[int, dict[str, float]] | None) -> None:
        """Stop the run at the first loss or gradient that is not finite."""
        if written is None:
            return
        step, values = written
        broken = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if broken:
            good = self.checkpoints.latest_step
            raise UserError(
                f"step {step}: {' and '.join(broken)} not finite on the images with ids {dict(self.image_ids)[step]}; "
                f"the last good checkpoint is {'none' if good is None else f'{self.workdir}/checkpoints/{good}'}; look "
                "at these images, or lower optim.learning_rate or set optim.clip_norm, and run the same command"
            )

    def _conclude(self, found: list[Found], metrics: dict[str, Any]) -> None:
        """Pictures, the curve, and the scores at the top of the workdir, where a finished run is recognised by them."""
        self.evaluator.draw(self.workdir, found, self.config.pictures)
        folder = path(self.workdir)
        visualize.curves(folder / "metrics.jsonl", folder / "curves.png")
        write_json(folder / "metrics.json", metrics)  # that it is there says: finished


def _regions(
    config: ml_collections.ConfigDict, detector: Detector, train_split: Split, eval_split: Split
) -> dict[str, Any]:
    """The proposals that a Fast R-CNN is trained and tested on, by "train" and "eval"; None for other detectors."""
    if not detector.needs_proposals:
        for key in ("proposals_train", "proposals_eval"):
            if config.data.get(key):
                raise UserError(
                    f"data.{key} is {config.data[key]!r}, but {config.model.detector} makes its own proposals; "
                    "leave it empty, or set model.detector=fast_rcnn"
                )
        return {"train": None, "eval": None}
    most, cache_dir = config.data.max_proposals, config.data.cache_dir
    return {
        "train": open_proposals(config.data.proposals_train, train_split, most[0], cache_dir),
        "eval": open_proposals(config.data.proposals_eval, eval_split, most[1], cache_dir),
    }


def _starting_weights(
    config: ml_collections.ConfigDict,
    detector: Detector,
    image_size: tuple[int, int],
    mesh: Any,
    checkpoints: checkpoint.Checkpoints,
) -> tuple[dict[str, Any], list[str]]:
    """(variables of step 0, lines that say where they are from: none if a checkpoint replaces them).

    Random ones are told only where a part of the backbone would stay so.
    Raises `UserError` if both the workdir, by `fpn_jax.convert`, and `config.init_from` have weights.
    """
    variables = init_variables(detector, image_size, config.seed)
    if checkpoints.latest_step is not None:
        return variables, []
    if checkpoints.has_initial:
        if config.init_from:
            raise UserError(
                f"config.init_from={config.init_from}: {checkpoints.workdir} has weights of fpn_jax.convert already; "
                "leave init_from empty, or train in another --workdir"
            )
        like = sharding.put_replicated(mesh, variables)
        return checkpoints.restore_weights(like, "latest")[0], [f"weights: those in {checkpoints.workdir}/initial"]
    if config.init_from:
        loaded = common.load_weights(config, variables, config.init_from)
        lines = [f"weights: {config.init_from}, {loaded.describe()}", *loaded.remarks(config.model)]
        if any(name.startswith("params/backbone/") for name in loaded.fresh):  # init_part left it out
            lines += _frozen_at_random(config.model.backbone)
        return loaded.variables, lines
    idle = [f"{key}={config[key]}" for key in ("init_part", "init_reset_classes") if config.get(key)]
    lines = [f"warning: {' and '.join(idle)} without init_from: all weights start at random"] if idle else []
    return variables, lines + _frozen_at_random(config.model.backbone)


def _frozen_at_random(backbone: ml_collections.ConfigDict) -> list[str]:
    """A line if what starts at random would never be trained, else none."""
    frozen = []
    if backbone.get("frozen_stages"):
        frozen.append(f"model.backbone.frozen_stages={backbone.frozen_stages} never trains its first stages")
    if backbone.get("norm") == "frozen_bn":
        frozen.append("model.backbone.norm=frozen_bn normalises nothing without a file's statistics")
    if not frozen:
        return []
    return [
        f"warning: the backbone starts from random weights, but {', and '.join(frozen)}; set --config.init_from=... "
        "--config.init_part=backbone, or --config.model.backbone.norm=gn --config.model.backbone.frozen_stages=0"
    ]


def _changes(config: ml_collections.ConfigDict, workdir: str) -> list[str]:
    """What is otherwise than when this workdir was last trained or converted; keys that one side lacks came later."""
    if not (path(workdir) / "config.json").exists():
        return []
    return [
        f"{key} is {now!r}, was {before!r}"
        for key, before, now in difference(checkpoint.read_config(workdir), config)
        if key not in HARMLESS and before is not None and now is not None
    ]


def _restore(
    checkpoints: checkpoint.Checkpoints, state: TrainState, changes: list[str]
) -> tuple[TrainState, dict[str, Any]] | None:
    """As `Checkpoints.restore`; what does not fit is told with the keys that may be why."""
    try:
        return checkpoints.restore(state)
    except UserError as error:
        raise UserError(f"{error} (changed: {some(changes)})" if changes else str(error)) from None


def _position(config: ml_collections.ConfigDict, split: Split, options: PipelineOptions) -> dict[str, Any]:
    """With the step, the place in the data: which images a batch has is a function of these and the step alone."""
    return {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "dataset": split.name,
        "split": split.split,
        "images": len(split),
        "objects (checksum)": split.checksum,
        _BY_BUCKET: bucket_members(split, options),
    }


def _check_same_data(saved: dict[str, Any], wanted: dict[str, Any], workdir: str) -> None:
    for name, value in wanted.items():
        if saved.get(name, value) != value:
            raise UserError(
                f"--workdir={workdir} was trained with {name} {saved.get(name)!r}, now it is {value!r}: it would go on "
                "with other data; set it back, or train into another --workdir"
            )


def _evaluates(config: ml_collections.ConfigDict, step: int) -> bool:
    """Whether the state after this step is scored."""
    return step >= config.num_steps or _is_due(config.eval_every, step)


def _is_due(every: int, step: int) -> bool:
    """Whether this step is one of every so many; 0: none is."""
    return bool(step and every and step % every == 0)


def _finished(workdir: str) -> dict[str, Any] | None:
    file = path(workdir) / "metrics.json"
    return json.loads(file.read_text()) if file.exists() else None


def _describe(state: TrainState, devices: str, split: Split, options: PipelineOptions, first: int) -> str:
    count = sum(x.size for x in jax.tree.leaves(state.params))
    buckets = " ".join(f"{height}x{width}" for height, width in options.buckets)
    return (
        f"{'continuing at' if first else 'starting from'} step {first}: {count / 1e6:.1f} M parameters, {devices}, "
        f"{len(split)} images of {split.name} {split.split}, buckets {buckets}"
    )


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    cli.check_required(workdir=_WORKDIR.value, config=_CONFIG.value)
    config, workdir = _CONFIG.value, _WORKDIR.value
    metrics = train(config, workdir)
    if sharding.process()[0] == 0:
        print(metrics_table(metrics))
        print(f"scores: {workdir}/metrics.json  curve: {workdir}/curves.png  pictures: ", end="")
        split = checkpoint.read_config(workdir).data.eval_split
        print(f"{workdir}/eval/{split}/overview.jpg  TensorBoard: --logdir={workdir}/tensorboard")


if __name__ == "__main__":
    cli.run(main)
