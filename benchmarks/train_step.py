"""A training step of Faster R-CNN R50-FPN against torchvision's: time, how much of the device it uses, memory.

    python -m benchmarks.train_step [--quick]

800 x 1344; on a GPU in bf16 with 8 and 16 images against AMP bf16 and channels last, also compiled; on a CPU in float32
with one image against torchvision as it is, and with a tuned allocator and channels last. Both sides have the same
weights, images, objects, frozen layers (stem and first stage) and settings of sampling. Before anything is timed the
losses of both must agree, in float32 and with the first candidates as samples. Images and objects are on the device
already: what the input pipeline costs is `benchmarks.input_pipeline`.

Memory is the most that a step after warming up takes: of a GPU what the framework has allocated, on a CPU what the
process has beyond its libraries; the median of three processes of each side.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import record, sides, timing
from benchmarks.sides import COMPILED, ON_GPU, OURS, THEIRS, TUNED
from fpn_jax import cli

TOLERANCE = 1e-3  # of a loss, relative
TARGETS = {"cpu": {THEIRS: 1.1, THEIRS + TUNED: 0.9}, "gpu": {ON_GPU: 2.0, COMPILED: 2.0}}
COUNTS = {"cpu": (1,), "gpu": (8, 16)}
MFU_TARGET, MEMORY_TARGET = 40.0, 0.8


def check(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError unless the losses agree."""
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=TOLERANCE, err_msg=name)


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    recorder, platform = record.Recorder("train_step"), record.backend()
    dtype = "float32" if platform == "cpu" else "bfloat16"
    targets = TARGETS.get(platform, {}) if record.have("torch", "torchvision") else {}
    height, width = (256, 320) if sides.QUICK.value else (800, 1344)
    lines, notes = [], [] if targets else [record.HOW_TO_GET_TORCHVISION]
    for count in (1,) if sides.QUICK.value else COUNTS.get(platform, (8,)):
        size = {"count": count, "height": height, "width": width}
        repeats, memory = sides.repeats(5), 1 if sides.QUICK.value else 3
        found = sides.measure("training", "step", "losses", check, size, dtype, targets, repeats, "work", memory)
        what, facts = f"{count} x {height}x{width}, {dtype}", found.facts
        shares = [100 * facts["tflop"] / x.wall / facts["peak_tflop_per_s"] for x in found.times[OURS]]
        target = None if platform == "cpu" else MFU_TARGET
        lines += [*found.lines, record.alone(f"{what}: of the peak FLOP/s", "%", timing.summary(shares), target)]
        memory = {name: timing.summary([x / 2**30 for x in values]) for name, values in found.memory.items()}
        peer = next((way for way in targets if way in memory), "")
        row = f"{what}: peak memory", "GiB", memory[OURS], memory.get(peer), peer
        lines.append(record.smaller(*row, MEMORY_TARGET))
        notes += found.notes
    notes.append(f"the peak is {facts['peak_tflop_per_s']:.3g} TFLOP/s ({facts['peak_from']})")
    recorder.finish(platform, lines, {"device": facts["device"]}, sides.folder(), notes)


if __name__ == "__main__":
    cli.run(main)
