"""Detecting with Faster R-CNN R50-FPN against torchvision: images per second.

    python -m benchmarks.inference [--quick]

Images of 800 x 1333, which both sides pad to 800 x 1344; on a GPU in bf16 with batches of 1 and 8 against AMP bf16 and
channels last, also compiled; on a CPU in float32 with one image against torchvision as it is, and with a tuned
allocator and channels last. The weights are the same on both sides. Before anything is timed the detections of both
must be the same set, in float32. Images are on the device already.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import record, sides
from benchmarks.parity.compare import match_boxes
from benchmarks.sides import COMPILED, ON_GPU, THEIRS, TUNED
from fpn_jax import cli

# A detection of one side may lack a counterpart on the other: rounding decides which of two boxes NMS keeps, and
# torchvision's own detections differ as much between float32 and float64.
UNMATCHED, PIXELS, SCORE = 0.02, 0.02, 1e-3
TARGETS = {"cpu": {THEIRS: 1.5, THEIRS + TUNED: 1.0}, "gpu": {ON_GPU: 2.0, COMPILED: 2.0}}
COUNTS = {"cpu": (1,), "gpu": (1, 8)}


def check(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError unless nearly all detections, of which there must be some, have a counterpart."""
    for i in range(sum(name.startswith("boxes") for name in expected)):
        mine, peers = (tuple(x[f"{key}{i}"] for key in ("boxes", "scores", "labels")) for x in (found, expected))
        matched = match_boxes(mine, peers, PIXELS, SCORE)
        assert matched.pairs, f"image {i}: {len(mine[0])} and {len(peers[0])} detections, none of them shared"
        assert matched.unmatched <= UNMATCHED * 2 * len(peers[0]), f"image {i}: {matched}"


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    recorder, platform = record.Recorder("inference"), record.backend()
    dtype = "float32" if platform == "cpu" else "bfloat16"
    targets = TARGETS.get(platform, {}) if record.have("torch", "torchvision") else {}
    height, width = (256, 309) if sides.QUICK.value else (800, 1333)
    lines, notes = [], [] if targets else [record.HOW_TO_GET_TORCHVISION]
    for count in (1,) if sides.QUICK.value else COUNTS.get(platform, (1, 8)):
        size = {"count": count, "height": height, "width": width}
        found = sides.measure("inference", "detect", "exact", check, size, dtype, targets, sides.repeats(7))
        lines, notes = lines + found.lines, notes + found.notes
    recorder.finish(platform, lines, {"device": found.facts["device"]}, sides.folder(), notes)


if __name__ == "__main__":
    cli.run(main)
