"""The first step after a start: with an empty compile cache, and with what the start before has left there.

    python -m benchmarks.first_step [--quick]

The training step of Faster R-CNN R50-FPN at 800 x 1344, ours alone, each time in a new process. The figure is the time
from the call of the first step to its end: it is traced, then compiled or read from the cache, and run once.
"""

import tempfile
from collections.abc import Sequence

from benchmarks import record, sides, timing
from benchmarks.sides import OURS
from fpn_jax import cli

TARGET = 0.25
KINDS = ("cold", "warm")


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    recorder, platform = record.Recorder("first_step"), record.backend()
    height, width = (128, 160) if sides.QUICK.value else (800, 1344)
    dtype, count = ("float32", 1) if platform == "cpu" else ("bfloat16", 8)
    options = {"count": count, "height": height, "width": width, "dtype": dtype}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(sides.repeats(2, quick=1)):
        with tempfile.TemporaryDirectory() as cache:
            for kind in KINDS:
                side = sides.ours("first_step", options, {"JAX_COMPILATION_CACHE_DIR": cache})
                with timing.started({OURS: side}) as running:
                    facts = running[OURS].facts
                    seconds[kind].append(running[OURS].times("step", 0).wall)
    cold, warm = (timing.summary(seconds[kind]) for kind in KINDS)
    what = f"{count} x {height}x{width}, {dtype}: warm cache"
    lines = [record.smaller(what, "s", warm, cold, "cold cache", TARGET)]
    recorder.finish(platform, lines, {"device": facts["device"]}, sides.folder())


if __name__ == "__main__":
    cli.run(main)
