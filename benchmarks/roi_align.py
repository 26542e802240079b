"""What adaptive sampling costs: RoIAlign as detectron2 has it against torchvision's, forward and with its gradient.

    python -m benchmarks.roi_align [--small] [--repeats=10]

One image of 800 x 1344, 256 channels, P2 to P5, and RoIs as large as proposals are. The ways take turns, so that a
busy machine slows all of them. `rounds` says what explains the cost: every round reads one point of each bin of every
RoI, and there are as many as the RoI with the most rows and the one with the most columns make together. The last
line is the table as JSON.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import inputs
from fpn_jax import cli
from fpn_jax.ops.roi_align import multilevel_roi_align, roi_levels

_SMALL = cli.flag("small", bool, False, "256 x 320 pixels, 32 channels and fewer RoIs, to see that it works.")
_REPEATS = cli.flag("repeats", int, 10, "Timed calls of each, after one for warming up; the median is reported.")

LEVELS = (2, 3, 4, 5)
SIZE = 7
WAYS = {
    "ratio 2": {"sampling_ratio": 2, "aligned": False, "eps": 1e-6},  # torchvision
    "adaptive": {"sampling_ratio": 0, "aligned": True, "eps": 0.0},  # detectron2
}


def points_per_bin(rois: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(level int [r], adaptive rows and columns of points in a bin int [r 2]) of rois [1 r 4]."""
    levels = np.asarray(roi_levels(rois[0], LEVELS, eps=0.0))
    sides = (rois[0, :, 2:] - rois[0, :, :2])[:, ::-1].astype(np.float64)
    return levels, np.ceil(sides / 2.0 ** levels[:, None] / SIZE).astype(int)


def check(pyramid: Mapping[int, jax.Array], rois: np.ndarray) -> int:
    """How many RoIs have two rows and two columns of points in a bin; for these both ratios must agree."""
    _, points = points_per_bin(rois)
    of_two = rois[:, (points == 2).all(1)]
    both = [jax.jit(partial(multilevel_roi_align, sampling_ratio=n, aligned=True, eps=0.0)) for n in (2, 0)]
    # Places are rounded to some 1e-5 of a cell, and neighbours differ by a few units.
    np.testing.assert_allclose(*(np.asarray(function(pyramid, of_two)) for function in both), atol=1e-4)
    assert of_two.shape[1] > 0
    return of_two.shape[1]


def programs(way: Mapping[str, object]) -> dict[str, Callable[..., jax.Array]]:
    """What is timed, as functions of (pyramid, rois, gradient of the features)."""
    align = partial(multilevel_roi_align, size=SIZE, **way)

    def both(pyramid, rois, gradient):
        out, pull = jax.vjp(lambda p: align(p, rois), pyramid)
        return out, pull(gradient)

    return {"forward": jax.jit(lambda pyramid, rois, gradient: align(pyramid, rois)), "with gradient": jax.jit(both)}


def seconds(functions: Mapping[tuple[str, str], Callable], arguments: Sequence, repeats: int) -> dict:
    """Median time of each function; they take turns."""
    times: dict = {key: [] for key in functions}
    for _ in range(repeats + 1):
        for key, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times[key].append(time.perf_counter() - start)
    return {key: statistics.median(values[1:]) for key, values in times.items()}


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    height, width, channels = (256, 320, 32) if _SMALL.value else (800, 1344, 256)
    rng = np.random.default_rng(0)
    shapes = {level: (1, height >> level, width >> level, channels) for level in LEVELS}
    pyramid = {level: jnp.asarray(rng.normal(size=shape), jnp.float32) for level, shape in shapes.items()}
    functions = {(way, name): f for way, values in WAYS.items() for name, f in programs(values).items()}
    row = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "image": f"{height}x{width}, {channels} channels, float32",
    }
    for count in (64, 128) if _SMALL.value else (512, 1000):
        rois = inputs.rois(np.random.default_rng(count), count, height, width)[None]
        levels, points = points_per_bin(rois)
        row[f"{count} RoIs"] = of_count = {
            "per level": {f"P{level}": int((levels == level).sum()) for level in LEVELS},
            "points per bin, mean": round(float(points.prod(1).mean()), 2),
            "points per bin, most": int(points.prod(1).max()),
            "rounds": int(points.max(0).prod()),
            "agree with ratio 2": check(pyramid, rois),
        }
        gradient = jnp.asarray(rng.normal(size=(1, count, SIZE, SIZE, channels)), jnp.float32)
        found = seconds(functions, (pyramid, jnp.asarray(rois), gradient), _REPEATS.value)
        for name in ("forward", "with gradient"):
            two, adaptive = found["ratio 2", name], found["adaptive", name]
            of_count[f"{name}, ms"] = [round(1e3 * two, 2), round(1e3 * adaptive, 2), round(adaptive / two, 2)]
        print(f"{count} RoIs on {row['image']} ({row['device']})")
        for name, value in of_count.items():
            if name.endswith("ms"):
                value = f"ratio 2 {value[0]:>9}   adaptive {value[1]:>9}   x {value[2]}"
            print(f"  {name:<22}{value}")
    print(json.dumps(row))


if __name__ == "__main__":
    cli.run(main)
