"""Prepare a data set for training, once: python -m fpn_jax.prepare --source=... --data_dir=data

The source is `scenes` (drawn here), `coco/2017` (fetched, 20 GB) or a folder of images with COCO annotations:
annotations/instances_SPLIT.json, instances_SPLIT.json, instances.json or SPLIT/_annotations.coco.json, with the
images in images/SPLIT, SPLIT, images or beside the annotations.
"""

import shlex
from collections.abc import Sequence

from absl import logging

from fpn_jax import cli
from fpn_jax.data.coco_files import COCO_2017
from fpn_jax.data.preparation import Prepared, prepare

_SOURCE = cli.flag("source", str, None, "scenes, coco/2017 or a COCO-format folder.")
_DATA_DIR = cli.flag("data_dir", str, "data", "Folder of all prepared data sets.")
_NAME = cli.flag("name", str, None, "Name of the data set; by default the source's.")
_COCO_URL = cli.flag("coco_url", str, None, "A mirror of http://images.cocodataset.org.")
_DOWNLOAD_DIR = cli.flag("download_dir", str, None, "Where archives are kept; by default DATA_DIR/downloads.")


def main(argv: Sequence[str]) -> None:
    """Prepare what the flags name and say what came of it."""
    del argv
    logging.set_verbosity(logging.WARNING)  # tfds tells of every file
    cli.check_required(source=_SOURCE.value)
    prepared = prepare(_SOURCE.value, _DATA_DIR.value, _NAME.value, _COCO_URL.value, _DOWNLOAD_DIR.value)
    print(report(prepared))
    print(f"next: {next_command(prepared, _DATA_DIR.value)}")


def report(prepared: Prepared) -> str:
    """One line per split and one that says where the data set lies."""
    lines = []
    for split, counts in prepared.counts.items():
        notes = [f"at most {counts.max_objects} in an image"]
        if counts.crowds:
            notes.append(f"{counts.crowds} of them crowds")
        if counts.empty:
            notes.append(f"{counts.empty} images without objects")
        if counts.clipped:
            notes.append(f"{counts.clipped} boxes clipped to the image")
        if counts.dropped:
            notes.append(f"{counts.dropped} boxes dropped: no area or outside the image")
        lines.append(f"{split}: {counts.images} images, {counts.objects} objects ({'; '.join(notes)})")
    lines.append(f"{prepared.dataset} is {'now' if prepared.written else 'already'} in {prepared.folder}")
    return "\n".join(lines)


def next_command(prepared: Prepared, data_dir: str) -> str:
    """The training command for what was prepared."""
    values = {"data.data_dir": data_dir}
    if prepared.dataset == "scenes":
        config, workdir = "experiments/demo.py", "runs/demo"
    else:
        workdir = f"runs/{prepared.dataset.replace('/', '_')}"
        train, evaluated = _guess_splits(list(prepared.counts))
        values |= {"data.dataset": prepared.dataset, "data.train_split": train, "data.eval_split": evaluated}
        config = "experiments/faster_rcnn_r18_fpn_cpu.py"  # learns from random weights, on any machine
        if prepared.dataset == COCO_2017:
            config = "experiments/faster_rcnn_r50_fpn.py"  # whose first stages are frozen: they need weights
            values |= {"init_from": "torchvision://resnet50/IMAGENET1K_V1", "init_part": "backbone"}
    parts = [f"--config={config}", f"--workdir={workdir}", *(f"--config.{key}={x}" for key, x in values.items())]
    return f"{cli.interpreter()} -m fpn_jax.train {shlex.join(parts)}"


def _guess_splits(names: list[str]) -> tuple[str, str]:
    """Which split to train and which to score on, going by their names."""
    train = next((name for name in names if name.startswith("train")), names[0])
    others = [name for name in names if name != train]
    scored = [name for start in ("val", "test") for name in others if name.startswith(start)]
    return train, [*scored, *others, train][0]


if __name__ == "__main__":
    cli.run(main)
