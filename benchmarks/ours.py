"""Our sides of the benchmarks: functions that make the programs, called in the sides' own processes."""

import gzip
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import flops, inputs
from benchmarks.parity import weights
from benchmarks.parity.ours import LOSSES
from benchmarks.parts import by_part
from benchmarks.timing import Made, Program
from experiments.faster_rcnn_r50_fpn import get_config
from fpn_jax.common import set_up_jax
from fpn_jax.errors import UserError
from fpn_jax.models import build_detector
from fpn_jax.models.heads import rpn
from fpn_jax.ops.nms import nms, nms_top
from fpn_jax.ops.roi_align import multilevel_roi_align
from fpn_jax.training import sharding
from fpn_jax.training.optim import make_optimizer
from fpn_jax.training.state import init_variables, make_state
from fpn_jax.training.step import make_detect, make_train_step
from fpn_jax.types import Batch
from fpn_jax.weights import loader

LEARNING_RATE = 1e-6  # of weights that mean nothing: the work is that of a step, and the losses stay where they are


def config(changes: Mapping[str, Any], dtype: str) -> Any:
    """The base experiment with some values changed, {dotted key: value}."""
    config = get_config()
    config.model.dtype = dtype
    config.update_from_flattened_dict(dict(changes))
    return config


class Trainer(NamedTuple):
    """A training step of the base experiment on one device."""

    detector: Any
    variables: Callable[[], Any]  # makes those that the state began with: kept, they would count as memory of the step
    state: list[Any]  # of one state, which the step replaces, as it reuses its memory
    step: Any  # jitted: (state, batch) -> (state, metrics)
    direct: Any  # the same with every convolution as such, as on a GPU: what there is to compute
    prepare: Callable[[int], Batch]

    def run(self, batch: Batch) -> Any:
        """Take a step; its metrics."""
        self.state[0], metrics = self.step(self.state[0], batch)
        return jax.block_until_ready((self.state[0], metrics))[1]


def trainer(count: int, height: int, width: int, dtype: str, changes: Mapping[str, Any] | None = None) -> Trainer:
    """The step of `count` images, not compiled yet."""
    of_step = config(changes or {}, dtype)
    detector, variables = _detector(of_step)
    mesh = sharding.make_mesh(sharding.first_device())
    optimizer = make_optimizer(of_step.optim, lambda step: LEARNING_RATE, variables["params"], detector.frozen)
    state = sharding.put_replicated(mesh, make_state(variables, optimizer, 0.0))
    given = detector, optimizer, lambda step: jnp.float32(LEARNING_RATE)
    step, direct = (make_train_step(*given, seed=0, mesh=mesh, platform=platform) for platform in ("", "gpu"))

    def prepare(seed: int) -> Batch:
        return jax.block_until_ready(sharding.put_batch(mesh, inputs.batch(seed, count, height, width)))

    return Trainer(detector, lambda: _detector(of_step)[1], [state], step, direct, prepare)


def training(count: int, height: int, width: int, dtype: str, changes: Mapping[str, Any] | None = None) -> Made:
    """ "step": a training step of `count` images; "losses": those of the first anchors and RoIs, in float32;
    "work": how much there is to compute in a step, and how fast the device could.
    """
    made = trainer(count, height, width, dtype, changes)
    exact = config(changes or {}, "float32")
    exact.model.rpn.sampling = exact.model.box.sampling = "first"
    detector = build_detector(exact.model, inputs.CLASSES)

    @jax.jit
    def losses(variables, batch):
        found, _ = detector.apply(variables, batch, jax.random.key(0), method="losses", mutable=["batch_stats"])
        return found[0]

    def run_losses(batch: Batch) -> Any:
        with jax.default_matmul_precision("highest"):
            return jax.block_until_ready(losses(made.variables(), batch))

    def work(batch: Batch) -> dict[str, Any]:
        needed = flops.matmul_flops(made.direct.trace(made.state[0], batch).jaxpr.jaxpr)
        peak, source = flops.peak_flops(jax.devices()[0])
        return {"tflop": needed / 1e12, "peak_tflop_per_s": peak / 1e12, "peak_from": source}

    programs = {
        "work": Program(made.prepare, work, lambda found: {name: np.asarray(x) for name, x in found.items()}),
        "step": Program(made.prepare, made.run, lambda metrics: {"loss": metrics["loss"]}),
        "losses": Program(made.prepare, run_losses, lambda found: {LOSSES[name]: x for name, x in found.items()}),
    }
    return Made(programs, _facts(), _device_peak)


def first_step(count: int, height: int, width: int, dtype: str, changes: Mapping[str, Any] | None = None) -> Made:
    """ "ready": the step is traced, then compiled or found in the cache; "step": then runs."""
    made = trainer(count, height, width, dtype, changes)
    ready: list[Any] = []

    def compiled(batch: Batch) -> None:
        ready.append(made.step.lower(made.state[0], batch).compile())

    def run(batch: Batch) -> Any:
        made.state[0], metrics = ready[0](made.state[0], batch)
        return jax.block_until_ready((made.state[0], metrics))[1]

    return Made({"ready": Program(made.prepare, compiled), "step": Program(made.prepare, run)}, _facts())


def parts(count: int, height: int, width: int, dtype: str, changes: Mapping[str, Any] | None = None) -> Made:
    """ "training", "inference": the seconds that each part of a step, or of detecting, takes, see `by_part`."""
    made = trainer(count, height, width, dtype, changes)
    step = made.step.lower(made.state[0], made.prepare(0)).compile()
    variables = made.variables()
    detect = make_detect(made.detector).lower(variables, made.prepare(0)).compile()

    def train(batch: Batch) -> None:
        made.state[0], metrics = step(made.state[0], batch)
        jax.block_until_ready((made.state[0], metrics))

    def traced(run: Callable[[Batch], Any], hlo: str) -> Program:
        def profile(batch: Batch) -> dict[str, float]:
            run(batch)
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    run(batch)
                (file,) = Path(folder).rglob("*.trace.json.gz")
                events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
            return by_part(events, hlo)

        return Program(made.prepare, profile, lambda seconds: {key: np.float64(x) for key, x in seconds.items()})

    def infer(batch: Batch) -> None:
        jax.block_until_ready(detect(variables, batch))

    programs = {"training": traced(train, step.as_text()), "inference": traced(infer, detect.as_text())}
    return Made(programs, _facts())


def inference(count: int, height: int, width: int, dtype: str, changes: Mapping[str, Any] | None = None) -> Made:
    """ "detect": `count` images of height x width, padded to multiples of 32; "exact": the same in float32."""
    padded = (-(-height // 32) * 32, -(-width // 32) * 32)

    def prepare(seed: int) -> Batch:
        host = inputs.batch(seed, count, height, width, padded)
        return jax.block_until_ready(jax.device_put(Batch(**host), sharding.first_device()[0]))

    def program(dtype: str) -> Callable[[Batch], Any]:
        detector, variables = _detector(config(changes or {}, dtype))
        detect = make_detect(detector)
        return lambda batch: jax.block_until_ready(detect(variables, batch))

    timed = program(dtype)
    exact = timed if dtype == "float32" and jax.default_backend() == "cpu" else program("float32")

    def run_exact(batch: Batch) -> Any:
        with jax.default_matmul_precision("highest"):
            return exact(batch)

    def outputs(found: Any) -> dict[str, np.ndarray]:
        kept = np.asarray(found.valid)
        arrays = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels + 1}  # torchvision's slots
        return {f"{k}{i}": np.asarray(x)[i][kept[i]] for k, x in arrays.items() for i in range(count)}

    programs = {"detect": Program(prepare, timed, outputs), "exact": Program(prepare, run_exact, outputs)}
    return Made(programs, _facts(), _device_peak)


def operations(height: int, width: int, channels: int, sizes: Mapping[str, int]) -> Made:
    """The operations alone, jitted; `sizes`: how many boxes each has."""

    @jax.jit
    def keep(boxes, scores, labels):
        return nms(boxes, scores, jnp.ones(len(boxes), bool), inputs.RPN_IOU)

    @jax.jit
    def top(boxes, scores, labels):
        everything = jnp.ones(len(boxes), bool)
        return nms_top(boxes, scores, everything, inputs.CLASS_IOU, inputs.DETECTIONS, groups=labels)

    @jax.jit
    def align(pyramid, rois, gradient):
        return multilevel_roi_align(pyramid, rois)

    @jax.jit
    def both_ways(pyramid, rois, gradient):
        pooled, pull = jax.vjp(lambda pyramid: multilevel_roi_align(pyramid, rois), pyramid)
        return pooled, pull(gradient)[0]

    high, low = inputs.MATCHING_IOU
    settings, grids = rpn.RPNSettings(positive_iou=high, negative_iou=low), inputs.anchors(height, width)

    @jax.jit
    def matched(boxes):
        return rpn.match_anchors(settings, grids, boxes, jnp.ones(len(boxes), bool))

    def program(function: Callable, make: Callable, count: int, outputs: Callable) -> Program:
        def prepare(seed: int) -> Any:
            return jax.block_until_ready(jax.device_put(make(seed, count)))

        return Program(prepare, lambda given: jax.block_until_ready(function(*given)), outputs)

    def crowd(seed: int, count: int) -> Any:
        return inputs.crowded_boxes(seed, count, height, width)

    def pyramid(seed: int, count: int) -> Any:
        maps, rois, gradient = inputs.pyramid(seed, count, height, width, channels)
        return {level: x[None] for level, x in maps.items()}, rois[None], gradient[None]

    def best(found: Any) -> dict[str, np.ndarray]:
        index, valid = map(np.asarray, found)
        return {"kept": np.sort(index[valid])}

    def gradients(found: Any) -> dict[str, np.ndarray]:
        return {"pooled": found[0][0]} | {f"P{level}": x[0] for level, x in found[1].items()}

    def objects(seed: int, count: int) -> Any:
        return (inputs.objects(seed, count, height, width),)

    programs = {
        "nms": program(keep, crowd, sizes["nms"], lambda kept: {"kept": np.flatnonzero(kept)}),
        "nms of classes": program(top, crowd, sizes["nms of classes"], best),
        "RoIAlign": program(align, pyramid, sizes["RoIAlign"], lambda out: {"pooled": out[0]}),
        "RoIAlign with gradient": program(both_ways, pyramid, sizes["RoIAlign with gradient"], gradients),
        "matching": program(matched, objects, sizes["matching"], lambda found: {"matched": found}),
    }
    return Made(programs, _facts())


def _detector(config: Any) -> tuple[Any, Any]:
    """(detector, variables): with the weights by rule if its layers are the base experiment's, else fresh ones."""
    set_up_jax()  # as the commands do; what one side has compiled the next ones find
    detector = build_detector(config.model, inputs.CLASSES)
    shapes, arrays = jax.eval_shape(lambda: init_variables(detector, (64, 64), 0)), weights.state_dict(inputs.case())
    try:
        loaded = loader.load(shapes, arrays, "benchmarks", config.model.box.pooled_size).variables
    except UserError:
        if config.model == _base_model(config.model.dtype):
            raise
        return detector, init_variables(detector, (64, 64), 0)
    return detector, jax.device_put(loaded, sharding.first_device()[0])


def _base_model(dtype: str) -> Any:
    return config({}, dtype).model


def _facts() -> dict[str, Any]:
    device = jax.devices()[0]
    return {"device": device.device_kind if device.platform != "cpu" else "CPU"}


def _device_peak() -> int | None:
    """Since the process began; XLA keeps no other."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
