"""Detect objects in pictures: annotated copies and one COCO-results JSON.

python -m fpn_jax.predict --workdir=runs/demo picture.jpg folder/ --output=found [--threshold=0.5]
"""

import collections
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fpn_jax import cli, common, evaluation, visualize
from fpn_jax.data.decode import decode
from fpn_jax.data.pipeline import image_batch
from fpn_jax.errors import UserError, some
from fpn_jax.storage.paths import path as output_path
from fpn_jax.storage.paths import write_atomically
from fpn_jax.training import checkpoint, sharding
from fpn_jax.training.step import make_detect

_WORKDIR = cli.flag("workdir", str, None, "Folder of the training run.")
_OUTPUT = cli.flag("output", str, None, "Folder for the annotated pictures and detections.json.")
_THRESHOLD = cli.flag("threshold", float, 0.5, "Boxes below this score are not drawn; the JSON has them all.")
_TIGHT = cli.flag("tight", bool, False, "Pad images no further than torchvision does; each size is compiled anew.")
_CHECKPOINT = cli.flag("checkpoint", str, "best", "Which weights: best (of the evaluations) or latest.")

_MOST_NAMED = 10
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def find_images(paths: Sequence[str]) -> list[Path]:
    """The given files, and the pictures in the given folders and below, in order. Raises `UserError`s."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.is_dir())
            if not inside:
                raise UserError(f"{path}: no pictures in this folder (looked for {' '.join(SUFFIXES)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; give pictures or folders of pictures")
    if not found:
        raise UserError("no pictures given; name files or folders after the flags")
    return found


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    cli.check_required(workdir=_WORKDIR.value, output=_OUTPUT.value)
    if not 0 <= _THRESHOLD.value <= 1:
        raise UserError(f"--threshold={_THRESHOLD.value}: give a score between 0 and 1")
    if Path(_OUTPUT.value).is_file():
        raise UserError(f"--output={_OUTPUT.value}: there is a file of this name; name a folder")
    paths = find_images(argv[1:])
    output = output_path(_OUTPUT.value)
    names = dict(zip(paths, picture_names(paths), strict=True))
    own = {path.resolve() for path in paths}
    if over := next((name for name in names.values() if (Path(output) / name).resolve() in own), None):
        raise UserError(f"--output={_OUTPUT.value}: {over} there is one of the pictures given; name another folder")
    config = checkpoint.read_config(_WORKDIR.value)
    common.set_up_jax()
    mesh = sharding.make_mesh(devices=sharding.first_device())
    classes = common.Classes.read(_WORKDIR.value)
    options = common.pipeline_options(config)
    detector = common.make_detector(config, classes)
    if detector.needs_proposals:
        raise UserError(
            f"--workdir={_WORKDIR.value} is a Fast R-CNN, which needs proposals; run fpn_jax.evaluate on a data set "
            "that has them, or predict with a Faster R-CNN"
        )
    if detector.class_agnostic:
        classes = common.Classes(["object"], [1])
    like = common.abstract_variables(detector, options.buckets[0], mesh)
    with checkpoint.Checkpoints(_WORKDIR.value) as checkpoints:
        variables, _ = checkpoints.restore_weights(like, _CHECKPOINT.value)
    detect = make_detect(detector)

    results: list[dict[str, Any]] = []
    unreadable: list[str] = []
    try:
        for number, (path, image) in enumerate(_images(paths, unreadable), start=1):
            size = np.array([image.shape[:2]])
            try:
                host = image_batch([image], common.pad_tightly(options, size) if _TIGHT.value else options)
            except UserError as error:  # it fits into no bucket
                unreadable.append(f"{path}: {error}")
                continue
            found = sharding.local_rows(detect(variables, sharding.put_batch(mesh, host)))
            boxes = evaluation.to_original(found.boxes[0], host["size"][0], host["original_size"][0])
            rows = evaluation.coco_results(
                boxes, found.scores[0], found.labels[0], found.valid[0], number, classes.category_ids
            )
            results += [row | {"file_name": str(path)} for row in rows]
            shown = found.valid[0] & (found.scores[0] >= _THRESHOLD.value)
            picture = visualize.draw(image, boxes[shown], found.labels[0][shown], found.scores[0][shown], classes.names)
            visualize.save(output / names[path], picture, quality=92)
    finally:  # of an hour's pictures those that are done, whatever befell the next
        write_atomically(output / "detections.json", lambda file: file.write(json.dumps(results) + "\n"))
    print(f"{len(results)} detections in {len(paths) - len(unreadable)} pictures; written to {output}/")
    if unreadable:
        rest = "the others are done" if len(unreadable) < len(paths) else "no picture is done"
        raise UserError(f"{some(unreadable, _MOST_NAMED, ' | ')}; {rest}")


def _images(paths: list[Path], unreadable: list[str]) -> Iterator[tuple[Path, np.ndarray]]:
    """The pictures that can be read; why the others cannot goes to `unreadable`."""
    for path in tqdm(paths, "predict", disable=not sys.stderr.isatty(), leave=False):
        try:
            data = path.read_bytes()
        except OSError as error:
            unreadable.append(f"{path}: cannot be read ({error.strerror or error})")
            continue
        try:
            image = decode(data, str(path), None)
        except UserError as error:
            unreadable.append(str(error))
            continue
        yield path, image


def picture_names(paths: Sequence[Path]) -> list[str]:
    """NAME.jpg for each picture; where two would share it the folders come before it, then its own suffix behind it,
    then its number."""
    forms = [
        [path.stem, "_".join(path.with_suffix("").parts).strip("_/"), "_".join(path.parts).strip("_/")]
        for path in paths
    ]
    count = collections.Counter(form for own in forms for form in set(own))
    return [
        f"{next((form for form in own if count[form] == 1), f'{own[-1]}_{number}')}.jpg"
        for number, own in enumerate(forms, start=1)
    ]


if __name__ == "__main__":
    cli.run(main, words=True)
