"""From JPEG files to padded batches against torchvision's v2 transforms and a DataLoader: images a second and core.

    python -m benchmarks.input_pipeline [--quick]

Made-up pictures of 640 x 480 as large in bytes as COCO's (quality 90, about 135 KB), with their boxes: decoded, flipped
every other time, resized to 800 x 1066, padded to 800 x 1088, in batches of 8; as uint8, and as floats that are resized
unrounded. Ours reads records through Grain; torchvision's reads the files with Pillow as its reference scripts do.

The first figure is images by CPU time (user and system) of one core: both sides work in the process itself, in its one
thread, where nothing has to be sent or waited for. Then images by the clock: ours in the threads that training has, the
DataLoader with as many workers as there are cores. Before anything is timed a batch of each side must be the other's.
What an image's CPU time goes to, each part alone and one after another, is in a table.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record, sides, timing
from benchmarks.ours_input import BATCH, write_pictures
from benchmarks.sides import CHECKED, OURS, THEIRS
from benchmarks.timing import Side
from fpn_jax import cli

TARGET = 2.0
# (largest, mean) difference in grey levels. Both sides decode with libjpeg-turbo, but round differently when they
# resize to uint8.
OFF = {"uint8": (2, 0.6), "float32": (0.1, 0.01)}
WORKERS, THREADS = f"{THEIRS}, {os.cpu_count()} workers", f"{OURS}, in threads"


def check(kind: str, found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError unless images and boxes agree."""
    off = np.abs(found["image"].astype(np.float32) - expected["image"])
    assert off.max() <= OFF[kind][0] and off.mean() <= OFF[kind][1], f"{kind}: {off.max()}, on average {off.mean()} off"
    np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=0.01)


def table(kind: str, seconds: Mapping[str, float], parts: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """The table of a record: milliseconds of an image, of which each side takes `seconds`; parts: {side: {part: s}}."""
    columns = []
    for side, of_side in parts.items():
        known = {part: float(x) for part, x in of_side.items()}
        columns.append(known | {"all else": seconds[side] - sum(known.values()), "all": seconds[side]})
    rows = [[part, *(f"{1e3 * column[part]:.2f}" for column in columns)] for part in columns[0]]
    return {"title": f"{kind}, an image", "head": ["part", *(f"{side}, ms" for side in parts)], "rows": rows}


def measure(folder: str, kind: str, batches: int, repeats: int) -> tuple[list[dict], dict[str, Any]]:
    """The lines and the table of one kind of pixels."""
    options = {"folder": folder, "kind": kind, "batches": batches}
    alone = options | {"changes": {"num_threads": 0}}
    every = {name: Side("benchmarks.ours_input:pictures", x) for name, x in ((OURS, alone), (THREADS, options))}
    if record.have("torch", "torchvision"):
        make = "benchmarks.theirs_input:pictures"
        every |= {
            THEIRS: Side(make, options | {"workers": 0}),
            WORKERS: Side(make, options | {"workers": os.cpu_count()}),
        }
    with timing.started(every) as running:
        if THEIRS in running:
            check(kind, *(running[side].outputs("first", CHECKED) for side in (OURS, THEIRS)))
        times = timing.take_turns(running, "epoch", repeats, warm_up=1)
        parts = {name: running[name].outputs("parts", CHECKED) for name in (OURS, THEIRS) if name in running}
    images = batches * BATCH
    cpu, wall = (
        {name: timing.rates(images, [getattr(x, clock) for x in values]) for name, values in times.items()}
        for clock in ("cpu", "wall")
    )
    lines = [
        record.faster(f"{kind}, by CPU time", "images/s", cpu[OURS], cpu.get(THEIRS), THEIRS, TARGET),
        record.faster(f"{kind}, by the clock", "images/s", wall[THREADS], wall.get(WORKERS), WORKERS, None),
    ]
    return lines, table(kind, {side: 1 / cpu[side]["median"] for side in parts}, parts)


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    recorder, (count, batches) = record.Recorder("input_pipeline"), (16, 2) if sides.QUICK.value else (128, 32)
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), count)
        found = [measure(folder, kind, batches, sides.repeats(4)) for kind in OFF]
    lines, tables = [line for lines, _ in found for line in lines], [shown for _, shown in found]
    notes = [] if lines[0]["theirs"] else [record.HOW_TO_GET_TORCHVISION]
    recorder.finish("cpu", lines, {}, sides.folder(), notes, tables)


if __name__ == "__main__":
    cli.run(main)
