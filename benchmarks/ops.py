"""NMS, RoIAlign (forward, and with its gradient) and matching alone, against torchvision.ops.

    python -m benchmarks.ops [--quick]

One image of 800 x 1344: NMS of 2000 boxes (a level of the RPN) and of 4000 boxes of 90 classes, the best 100 kept;
RoIAlign of 512 and 1000 RoIs on P2 to P5 of 256 channels; 16 objects matched with all 268,569 anchors. float32, as the
detectors have them. Boxes lie in heaps, and RoIs are as large as proposals are. Both sides must give the same before
anything is timed; of them the layouts are their own (channels last here, first there).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import record, sides, timing
from benchmarks.sides import CHECKED, OURS, THEIRS
from benchmarks.timing import Side
from fpn_jax import cli

SIZES = {"nms": 2000, "nms of classes": 4000, "RoIAlign": 1000, "RoIAlign with gradient": 512, "matching": 16}
QUICK = {"nms": 200, "nms of classes": 200, "RoIAlign": 20, "RoIAlign with gradient": 20, "matching": 4}
TARGETS = {"gpu": 1.0}
CLOSE = 2e-4  # of features: sums of up to some thousand numbers of about 1
DIFFERENT = 1e-3  # of boxes: their IoU is at a threshold but for rounding


def check(name: str, found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError unless both sides give the same."""
    for key, value in expected.items():
        if key == "kept":
            shared = len(np.intersect1d(found[key], value))
            assert len(value) and max(len(found[key]), len(value)) - shared <= DIFFERENT * len(value), name
        elif key == "matched":
            assert np.mean(found[key] != value) <= DIFFERENT and (value >= 0).any(), name
        else:
            np.testing.assert_allclose(found[key], value, atol=CLOSE, rtol=CLOSE, err_msg=f"{name}: {key}")


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    recorder, platform = record.Recorder("ops"), record.backend()
    height, width, channels, sizes = (256, 320, 32, QUICK) if sides.QUICK.value else (800, 1344, 256, SIZES)
    size = {"height": height, "width": width, "channels": channels, "sizes": sizes}
    every, lines = {OURS: sides.ours("operations", size)}, []
    if record.have("torch", "torchvision"):
        every[THEIRS] = Side("benchmarks.theirs:operations", size, sides.WITHOUT_DEVICE)
    with timing.started(every) as running:
        facts = running[OURS].facts
        for name, count in sizes.items():
            if THEIRS in running:
                check(name, *(running[side].outputs(name, CHECKED) for side in (OURS, THEIRS)))
            times = timing.take_turns(running, name, sides.repeats(20))
            ms = {side: timing.summary([1e3 * x.wall for x in values]) for side, values in times.items()}
            lines.append(
                record.faster(f"{name}, {count}", "ms", ms[OURS], ms.get(THEIRS), THEIRS, TARGETS.get(platform))
            )
    notes = [] if THEIRS in every else [record.HOW_TO_GET_TORCHVISION]
    recorder.finish(platform, lines, {"device": facts["device"]}, sides.folder(), notes)


if __name__ == "__main__":
    cli.run(main)
