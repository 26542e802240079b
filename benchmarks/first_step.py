"""The first step after a start: with an empty compile cache, and with what the start before has left there.

    python -m benchmarks.first_step [--quick]

The training step of Faster R-CNN R50-FPN at 800 x 1344, ours alone, each time in a new process: how long until it is
ready to run, that is traced, then compiled or read from the cache; and that with its first run, which is not cached.
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
    ready: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with_run: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(sides.repeats(2, quick=1)):
        with tempfile.TemporaryDirectory() as cache:
            for kind in KINDS:
                side = sides.ours("first_step", options, {"JAX_COMPILATION_CACHE_DIR": cache})
                with timing.started({OURS: side}) as running:
                    facts = running[OURS].facts
                    ready[kind].append(running[OURS].times("ready", 0).wall)
                    with_run[kind].append(ready[kind][-1] + running[OURS].times("step", 0).wall)
    lines = []
    for what, seconds, target in (("ready to run", ready, TARGET), ("and run once", with_run, None)):
        cold, warm = (timing.summary(seconds[kind]) for kind in KINDS)
        what = f"{count} x {height}x{width}, {dtype}: {what}, warm cache"
        lines.append(record.smaller(what, "s", warm, cold, "cold cache", target))
    recorder.finish(platform, lines, {"device": facts["device"]}, sides.folder())


if __name__ == "__main__":
    cli.run(main)
