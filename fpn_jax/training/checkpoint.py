"""The only home of orbax: what a run keeps on disk, how it comes back, and how a workdir is claimed.

WORKDIR/checkpoints/<step>/   weights, optimizer, position in the data: the latest two
WORKDIR/best/<step>/          weights alone, of the best evaluation so far
WORKDIR/initial/0/            weights alone, put there by `fpn_jax.convert`: what training starts from; never removed
WORKDIR/config.json           the config of the run
WORKDIR/lock                  held while a process trains here

WORKDIR may be on gs://: there orbax marks a folder as whole where it renames it on this machine.
"""

import fcntl
import functools
import json
import logging
import os
import sys
from pathlib import Path
from typing import IO, Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from fpn_jax.errors import InUseError, UserError
from fpn_jax.storage import paths
from fpn_jax.storage.claim import RemoteClaim, check_held
from fpn_jax.training.sharding import replicated_beside
from fpn_jax.types import TrainState

_WEIGHTS = ("step", "params", "batch_stats", "ema_params")


class Checkpoints:
    """The checkpoints of one workdir. Saving is asynchronous; `close` waits for what is under way.

    Only who has claimed the workdir may save: `writes` also clears away what a killed process has half written.
    """

    def __init__(self, workdir: str, keep: int = 2, writes: bool = False):
        _tell_failed_saves_once()
        self.workdir = workdir
        self._latest = _manager(workdir, "checkpoints", keep, writes)
        self._best = _manager(workdir, "best", 1, writes)
        self._initial = _manager(workdir, "initial", 1, writes)

    @property
    def latest_step(self) -> int | None:
        """Optimizer steps of the newest finished checkpoint, None without any."""
        return self._latest.latest_step()

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Start writing the state and the JSON-like position in the data; an older save's failure comes up here."""
        step = int(state.step)
        items = {
            "weights": ocp.args.StandardSave(_weights(state)),
            "optimizer": ocp.args.StandardSave({"state": state.opt_state}),
            "data": ocp.args.JsonSave(data),
        }
        self._guarded(self._latest, lambda: self._latest.save(step, args=ocp.args.Composite(**items), force=True))

    def save_best(self, state: TrainState, metrics: dict[str, float | str]) -> None:
        """Keep these weights as the best, in place of the former best."""
        items = {"weights": ocp.args.StandardSave(_weights(state)), "metrics": ocp.args.JsonSave(metrics)}
        step = int(state.step)

        def replace() -> None:
            if self._best.latest_step() == step:  # scored anew; the weights are the latest checkpoint's, too
                self._best.delete(step)
            self._best.save(step, args=ocp.args.Composite(**items), force=True)

        self._guarded(self._best, replace)

    def save_initial(self, state: TrainState) -> None:
        """Keep these weights as what training here starts from."""
        items = {"weights": ocp.args.StandardSave(_weights(state))}
        self._guarded(self._initial, lambda: self._initial.save(0, args=ocp.args.Composite(**items), force=True))

    @property
    def has_initial(self) -> bool:
        """Whether `fpn_jax.convert` has put weights here."""
        return self._initial.latest_step() is not None

    @property
    def is_empty(self) -> bool:
        """Whether there are no weights of any kind."""
        return all(m.latest_step() is None for m in (self._latest, self._best, self._initial))

    def best_metrics(self) -> dict[str, Any] | None:
        """What `save_best` was last given, None without a best."""
        step = self._best.latest_step()
        if step is None:
            return None
        return self._best.restore(step, args=ocp.args.Composite(metrics=ocp.args.JsonRestore()))["metrics"]

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state, on the devices and in the shardings of `like`, and the position; None without any.

        Raises `UserError` naming the weights that differ if the checkpoint is of another architecture.
        """
        step = self.latest_step
        if step is None:
            return None
        weights, optimizer = _shapes(_weights(like)), _shapes({"state": like.opt_state})
        self._check_same(self._latest, step, "weights", weights)
        self._check_same(self._latest, step, "optimizer", optimizer)
        items = {
            "weights": ocp.args.StandardRestore(weights),
            "optimizer": ocp.args.StandardRestore(optimizer),
            "data": ocp.args.JsonRestore(),
        }
        found = self._latest.restore(step, args=ocp.args.Composite(**items))
        return TrainState(**found["weights"], opt_state=found["optimizer"]["state"]), found["data"]

    def restore_weights(self, variables: dict[str, Any], which: str) -> tuple[dict[str, Any], int]:
        """(variables for inference shaped like the given ones, their step), of the "best" or the "latest" checkpoint.

        "best" falls back to the latest where no evaluation has chosen one. The averaged weights are taken where the
        run kept an average.
        """
        manager, step = self._chosen(which)
        has_average = bool(self._saved(manager, step, "weights").get("ema_params"))
        target = _shapes(
            {
                # Where the weights go: else it would be sought on the devices of the processes that wrote it.
                "step": jax.ShapeDtypeStruct((), "int32", sharding=replicated_beside(jax.tree.leaves(variables)[0])),
                **variables,
                "ema_params": variables["params"] if has_average else {},
            }
        )
        self._check_same(manager, step, "weights", target)
        found = manager.restore(step, args=ocp.args.Composite(weights=ocp.args.StandardRestore(target)))["weights"]
        return {"params": found["ema_params"] or found["params"], "batch_stats": found["batch_stats"]}, step

    def wait(self) -> None:
        """Until what is being written is on disk; raises `UserError` if it could not be written."""
        for manager in (self._latest, self._best, self._initial):
            self._guarded(manager, lambda: None)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        """Wait and let go of the folders, also when the run ends by an error: what is being saved is still good."""
        try:
            self.wait()
        except UserError as lost:
            if error is None:
                raise
            print(f"error: {lost}", file=sys.stderr, flush=True)  # beside what ends the run
        finally:
            self._latest.close()
            self._best.close()
            self._initial.close()

    def chosen_step(self, which: str) -> int:
        """The step of the weights that `restore_weights` would take."""
        return self._chosen(which)[1]

    def saved_weights(self, which: str) -> tuple[dict[str, Any], int]:
        """As `restore_weights`, of whatever architecture they are, on this process's first device."""
        saved = self._saved(*self._chosen(which), "weights")
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = {
            name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), saved[name])
            for name in ("params", "batch_stats")
        }
        return self.restore_weights(like, which)

    def _chosen(self, which: str) -> tuple[ocp.CheckpointManager, int]:
        if which not in ("best", "latest"):
            raise UserError(f"--checkpoint={which}: choose best or latest")
        managers = [self._best, self._latest, self._initial] if which == "best" else [self._latest, self._initial]
        for manager in managers:
            step = manager.latest_step()
            if step is not None:
                return manager, step
        raise UserError(f"{self.workdir}: there is no checkpoint; train there first, or give another --workdir")

    def _guarded(self, manager: ocp.CheckpointManager, action: Any) -> None:
        """Run a save; a failure to write, also of the save before, is a `UserError` naming the last good step."""
        try:
            check_held(self.workdir)
            manager.wait_until_finished()
            action()
        except (OSError, ValueError, RuntimeError) as error:
            good = self._latest.latest_step()
            raise UserError(
                f"{manager.directory}: the checkpoint could not be written ({_first_line(error)}); free some space and "
                f"run the same command, which continues from {'the start' if good is None else f'step {good}'}"
            ) from error

    def _saved(self, manager: ocp.CheckpointManager, step: int, item: str) -> dict[str, Any]:
        return manager.item_metadata(step)[item].tree

    def _check_same(self, manager: ocp.CheckpointManager, step: int, item: str, target: Any) -> None:
        """Raise a `UserError` that names what one tree has and the other has not, or has in another shape."""
        saved, wanted = _flat(self._saved(manager, step, item)), _flat(target)
        differing = [f"{name} is not in the checkpoint" for name in wanted.keys() - saved.keys()]
        differing += [f"{name} is not in the model" for name in saved.keys() - wanted.keys()]
        differing += [
            f"{name} is {list(saved[name])} in the checkpoint and {list(wanted[name])} in the model"
            for name in wanted.keys() & saved.keys()
            if tuple(saved[name]) != tuple(wanted[name])
        ]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UserError(
                f"{manager.directory}/{step} is of another architecture: {'; '.join(sorted(differing)[:3])}{more}; "
                "use the config it was trained with, or another --workdir"
            )


def claim_workdir(workdir: str) -> IO[str] | RemoteClaim:
    """Lock the workdir for training. Keep the result: the lock lasts as long as it does.

    On this machine the lock goes with the process, however that ends, so a killed run leaves no stale one. On gs:// see
    `fpn_jax.storage.claim`. Raises `InUseError` if another process trains there.
    """
    if paths.is_remote(workdir):
        return RemoteClaim(workdir)
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "a+")  # noqa: SIM115 - the caller keeps it open
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "?"
        lock.close()
        raise InUseError(
            f"--workdir={workdir} is in use by process {holder}; wait for it, stop it, or give another folder"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def write_config(workdir: str, config: ml_collections.ConfigDict) -> None:
    """Keep the config in WORKDIR/config.json; only once it is known to fit the weights that are there."""
    paths.write_json(paths.path(workdir) / "config.json", config.to_dict(), finite=False)


def read_config(workdir: str) -> ml_collections.ConfigDict:
    """The config that `write_config` wrote, locked. Raises `UserError` if there is none."""
    path = paths.path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir}: there is no config.json; train there first, or give another folder")
    try:
        return ml_collections.ConfigDict(json.loads(path.read_text())).lock()
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it, or train into another --workdir") from None


def _manager(workdir: str, name: str, keep: int, writes: bool) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=writes, create=writes)
    # Without its handlers a manager that has not saved yet cannot tell the shapes of what another has saved.
    arrays = {item: ocp.StandardCheckpointHandler() for item in ("weights", "optimizer")}
    values = {item: ocp.JsonCheckpointHandler() for item in ("data", "metrics")}
    return ocp.CheckpointManager(paths.absolute(workdir) / name, options=options, item_handlers=arrays | values)


@functools.cache
def _tell_failed_saves_once() -> None:
    """Of a save that fails `Checkpoints` raises the first fault; hundreds would be printed, one for each array."""
    absl_logging.get_absl_logger().addFilter(_is_not_raised_later)
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    otherwise = sys.unraisablehook

    def hook(fault: Any) -> None:
        # By tensorstore's threads, which tell orbax's loop of each array; it ended with the first fault.
        if str(fault.exc_value) != "Event loop is closed":
            otherwise(fault)

    sys.unraisablehook = hook


def _is_not_raised_later(record: logging.LogRecord) -> bool:
    """False for the stack traces that orbax's threads log of a save that fails."""
    return not (record.exc_info and "orbax" in Path(record.pathname).parts)


def _weights(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _WEIGHTS}


def _shapes(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def _flat(tree: Any) -> dict[str, tuple[int, ...]]:
    """{"params/backbone/...": shape} of a tree of arrays, shapes or orbax metadata, whatever its containers."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))[0]
    return {"/".join(_part(p) for p in path): tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}


def _part(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))))


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:95]} ... {line[-100:]}"  # tensorstore's reason is at the end
