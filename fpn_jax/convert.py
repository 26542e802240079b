"""Weights of torchvision and detectron2 into a workdir, and a workdir's weights back into a file.

python -m fpn_jax.convert --from=fasterrcnn_resnet50_fpn_coco-258fb6c6.pth --workdir=runs/tv    # then evaluate, ...
python -m fpn_jax.convert --from=resnet50.safetensors --part=backbone --config=... --workdir=runs/mine
python -m fpn_jax.convert --workdir=runs/tv --to=my_detector.pth      # loads into torchvision with strict=True
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import ml_collections
import numpy as np

from fpn_jax import cli, common
from fpn_jax.data.class_lists import class_list
from fpn_jax.errors import UserError
from fpn_jax.storage import paths
from fpn_jax.training import checkpoint, sharding
from fpn_jax.training.state import init_variables
from fpn_jax.types import TrainState
from fpn_jax.weights import files, guess, loader, names, semantics

_CONFIG = cli.config_flag()
_FROM = cli.flag("from", str, None, "File, workdir, torchvision://NAME/WEIGHTS or detectron2://... to read.")
_WORKDIR = cli.flag("workdir", str, None, "Folder to put the weights in, or with --to= to take them from.")
_TO = cli.flag("to", str, None, "File to write, .pth or .safetensors.")
_PART = cli.flag("part", str, "", "Parts to take over, such as backbone or backbone,neck; by default all.")
_RESET = cli.flag("reset_classes", bool, False, "Start the class layers anew, for other classes than the file's.")
_NAMES = cli.flag("names", str, "torchvision", "Whose names to write: torchvision, detectron2 or fpn_jax.")
_CHECKPOINT = cli.flag("checkpoint", str, "best", "Which weights to write: best (of the evaluations) or latest.")


def convert_in(
    config: ml_collections.ConfigDict | None, address: str, workdir: str, part: str = "", reset_classes: bool = False
) -> list[str]:
    """Put weights into a new workdir, ready to evaluate, predict and train; lines that say what came of it.

    Without a config the experiment is guessed from the file. Raises `UserError` if the workdir is in use, or if any
    weight has no place; then the workdir is left without weights.
    """
    arrays = common.read_weights(address, config.data.cache_dir if config else "")
    remarks: list[str] = []
    if config is None:
        config, remarks = _guess_config(arrays, address)
    config.init_part, config.init_reset_classes = part or config.init_part, reset_classes or config.init_reset_classes
    detector_slots = loader.class_slots(arrays, address)
    is_whole = detector_slots is not None and not config.init_reset_classes and not config.init_part
    if common.is_workdir(address) and not config.init_reset_classes and not config.init_part:
        classes = common.Classes.read(address)
    else:
        classes = _classes(config, detector_slots if is_whole else None, address, remarks)
    detector = common.make_detector(config, classes)
    variables = init_variables(detector, common.pipeline_options(config).buckets[0], config.seed)
    loaded = common.load_weights(config, variables, address, arrays)
    # Nothing is written before everything fits.
    with checkpoint.claim_workdir(workdir), checkpoint.Checkpoints(workdir, writes=True) as checkpoints:
        if not checkpoints.is_empty:
            raise UserError(f"--workdir={workdir}: there are weights in it already; give another folder")
        checkpoint.write_config(workdir, config)
        classes.write(workdir)
        state = TrainState(jnp.zeros((), jnp.int32), **loaded.variables, opt_state={}, ema_params={})
        mesh = sharding.make_mesh(devices=sharding.first_device())
        checkpoints.save_initial(sharding.put_replicated(mesh, state))
    skipped = f", {len(loaded.ignored)} without use here left out" if loaded.ignored else ""
    remarks = [*remarks, *loaded.remarks(config.model)]
    return [f"{address}: {loaded.describe()}{skipped}", *remarks, f"written to {workdir}/initial"]


def convert_out(workdir: str, path: str, framework: str, which: str) -> list[str]:
    """Write a workdir's weights to a file under a framework's names; lines that say how to use it there."""
    if paths.is_remote(path):
        raise UserError(f"--to={path}: name a file of this machine, then: gcloud storage cp FILE {path}")
    config = checkpoint.read_config(workdir)
    classes = common.Classes.read(workdir)
    names.formats(framework)
    semantics.check(config.model, framework)
    slots = len(classes.names) + 1
    code = semantics.torchvision_code(config, slots, path) if framework == "torchvision" else ""
    with checkpoint.Checkpoints(workdir) as checkpoints:
        variables, step = checkpoints.saved_weights(which)
    arrays = loader.export(variables, framework, config.model.box.pooled_size)
    files.write_arrays(path, arrays)
    lines = [f"# {path}: {len(arrays)} arrays of step {step}, under {framework}'s names"]
    if code:
        lines += ["# In torchvision, where images are RGB from 0 to 1 and label i is the i-th class from 1 on:", code]
        if config.data.interpolation != "linear" or config.data.rounding != "floor":
            lines.append("# torchvision resizes by linear interpolation; this detector was trained otherwise")
    return lines


def _guess_config(arrays: Mapping[str, np.ndarray], address: str) -> tuple[ml_collections.ConfigDict, list[str]]:
    if common.is_workdir(address):
        config = ml_collections.ConfigDict(checkpoint.read_config(address).to_dict())
        config.init_from, config.init_part, config.init_reset_classes, config.stages = "", "", False, ()
        return config.lock(), [f"config: {address}/config.json"]
    experiment, changes, remarks = guess.experiment(arrays, address)
    path = Path(__file__).parent.parent / "experiments" / experiment
    config = cli.load_config(str(path))
    config.update_from_flattened_dict(changes)
    return config, [
        f"config: experiments/{experiment}",
        *(f"  {key} = {value}" for key, value in changes.items()),
        *remarks,
    ]


def _classes(config: ml_collections.ConfigDict, slots: int | None, address: str, remarks: list[str]) -> common.Classes:
    """What the labels mean: the config's class list, else its data set's classes, else numbers.

    slots: of the file, background included, if they must agree.
    """
    if config.data.classes:
        chosen = class_list(config.data.classes)
        classes, origin = common.Classes(list(chosen.names), list(chosen.category_ids)), f"list {config.data.classes}"
    else:
        try:
            split = common.open_data(config, config.data.eval_split, "data.eval_split")
            classes, origin = common.Classes(split.class_names, split.category_ids), f"data set {config.data.dataset}"
        except UserError:
            if slots is None:
                raise
            count = range(1, slots)
            remarks.append(f"the classes are called by their numbers, 1 to {slots - 1}: no data set tells their names")
            classes, origin = common.Classes([str(i) for i in count], list(count)), "file"
    if slots is not None and slots != len(classes.names) + 1:
        raise UserError(
            f"{address} has {slots} class slots with the background, the {origin} {len(classes.names) + 1}; give "
            "--config= with its data set (config.data.classes='' and config.data.dataset), or say --reset_classes"
        )
    return classes


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    cli.check_required(workdir=_WORKDIR.value)
    if bool(_FROM.value) == bool(_TO.value):
        trouble = "both --from= and --to= are given" if _TO.value else "neither --from= nor --to= is given"
        raise UserError(f"{trouble}; say --from= to fill the workdir, or --to= to write its weights to a file")
    common.set_up_jax()
    if _TO.value:
        print("\n".join(convert_out(_WORKDIR.value, _TO.value, _NAMES.value, _CHECKPOINT.value)))
        return
    print("\n".join(convert_in(_CONFIG.value, _FROM.value, _WORKDIR.value, _PART.value, _RESET.value)))
    workdir = shlex.quote(f"--workdir={_WORKDIR.value}")
    print(f"next: {cli.interpreter()} -m fpn_jax.predict {workdir} picture.jpg --output=found")


if __name__ == "__main__":
    cli.run(main)
