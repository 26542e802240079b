"""What a training step needs on machines that one does not have (yet): memory, messages, cycles, the largest batch.

python -m fpn_jax.plan --config=experiments/faster_rcnn_r50_fpn.py --topology=v5e:16x16 [--batch_size=512] [--largest]
python -m fpn_jax.plan --config=experiments/faster_rcnn_r50_fpn.py --topology=h100:8 [...]
python -m fpn_jax.plan --config=experiments/demo.py --topology=local:8

The very training step is compiled ahead of time, by the TPU compiler (pip install -e ".[tpu]"; no TPU is needed), by
the one for GPUs (pip install -e ".[cuda]"; no GPU is needed) or for local devices. On two cores a ResNet-50 takes
minutes for TPUs, half a minute for GPUs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from fpn_jax import cli, common
from fpn_jax.errors import UserError
from fpn_jax.models import build_detector
from fpn_jax.planning import page
from fpn_jax.planning.chips import CHIPS, Slice, parse_slice
from fpn_jax.planning.gpus import GPUS, Hosts, parse_hosts
from fpn_jax.planning.scaling import usual_slices, weak_scaling
from fpn_jax.planning.step import DoesNotFitError, StepPlan, largest_batch, plan_step, slice_devices
from fpn_jax.storage import paths
from fpn_jax.training import sharding
from fpn_jax.training.optim import peak_rate

_CONFIG = cli.config_flag()
_TOPOLOGY = cli.flag(
    "topology", str, "local", "v5e:16x16, v6e:8x8, v5p:4x4x4; h100:8, a100:2x8; local; local:8 (CPU devices)."
)
_BATCH_SIZE = cli.flag("batch_size", int, 0, "Images of a step on all devices; 0: the config's.")
_BUCKET = cli.flag("bucket", str, "", "Height and width as 832x1344; empty: the config's largest.")
_CLASSES = cli.flag("classes", int, 80, "Classes of the data set.")
_OBJECTS = cli.flag("objects", int, 96, "Objects of an image, at most; padded COCO has 96.")
_LARGEST = cli.flag("largest", bool, False, "Also seek the largest batch that fits, a compilation for every try.")
_OUTPUT = cli.flag("output", str, "", "A JSON file for the plan.")


def devices_of(topology: str) -> tuple[list[Any], Slice | Hosts | None]:
    """(devices, the machine they are; None for local ones). Raises `UserError` for a topology that there is not."""
    name, _, count = topology.partition(":")
    if name in GPUS:
        hosts = parse_hosts(topology)
        return hosts.devices(), hosts
    if name != "local":
        if name not in CHIPS:
            raise UserError(
                f"--topology={topology}: {name!r} is not one of {', '.join((*CHIPS, *GPUS))}; say v5e:16x16, h100:8 or "
                "local:8"
            )
        slice_ = parse_slice(topology)
        return slice_devices(slice_), slice_
    if count and not (count.isdecimal() and int(count) > 0):
        raise UserError(f"--topology={topology}: give a number of CPU devices, such as local:8")
    if count:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(count))
    return jax.devices(), None


def plan(config: ml_collections.ConfigDict, topology: str, bucket: tuple[int, int], largest: bool) -> dict[str, Any]:
    """Print the plan of the step of this bucket and return it, fit for JSON."""
    common.check_numbers(config)
    devices, machine = devices_of(topology)
    options = common.mesh_options(config)
    mesh = sharding.make_mesh(devices, options)
    coarsest = build_detector(config.model, _CLASSES.value).coarsest_stride
    sharding.check_buckets(mesh, [bucket], common.STRIDE, coarsest)
    hosts = machine if isinstance(machine, Hosts) else None
    shape = _CLASSES.value, _OBJECTS.value, bucket, mesh, options.shard_params, hosts
    try:
        step = plan_step(config, *shape)
    except DoesNotFitError as error:
        if not largest:
            raise UserError(f"{config.batch_size} images on {topology}: {_advice(config, error)}") from None
        print(f"{config.batch_size} images: {error}")
        step = None
    if step:
        print(page.describe(step, machine, peak_rate(config.optim, config.batch_size)))
    found = {"topology": topology, "bucket": bucket, "step": _as_json(step)}
    if step and isinstance(machine, Slice) and machine.chip.name != "v5p":
        scalings = weak_scaling(step.cycles / machine.chip.clock, step.gradient_bytes, usual_slices(machine.chip))
        print(f"\nThe same images a chip on slices of other sizes:\n\n{page.scaling_table(scalings)}")
        found["weak_scaling"] = [s._asdict() | {"slice": str(s.slice)} for s in scalings]
    if largest:
        found["largest"] = _largest(config, step, *shape)
    return found


def _largest(config: ml_collections.ConfigDict, known: StepPlan | None, *shape: Any) -> int:
    """The most images of a step that fit; 0 if one a device is too many."""
    mesh = shape[3]
    n = mesh.size // mesh.shape["space"]  # devices, or groups of them that share images

    def fits(images: int) -> bool:
        tried = ml_collections.ConfigDict(config)
        tried.batch_size = images * n * config.accumulate
        if known and tried.batch_size <= known.images:
            return True
        try:
            total = plan_step(tried, *shape).memory["total"]
        except DoesNotFitError as error:
            print(f"{images} images a device: {error}", flush=True)
            return False
        print(f"{images} images a device: fits, {total / 2**30:.2f} GiB", flush=True)
        return True

    images = largest_batch(fits) * n * config.accumulate
    print(f"largest batch   {images}, learning rate {peak_rate(config.optim, images):g}" if images else "nothing fits")
    return images


def _advice(config: ml_collections.ConfigDict, error: DoesNotFitError) -> str:
    """What to change, the cheapest first."""
    changes = []
    if config.model.dtype == "float32":
        changes.append("--config.model.dtype=bfloat16")
    if config.model.backbone.name == "resnet" and not config.model.backbone.remat:
        changes.append("--config.model.backbone.remat='(3, 4, 5)' (stages computed again in the backward pass)")
    changes.append(f"--config.accumulate={2 * config.accumulate} (the same batch in pieces)")
    changes.append("a smaller --batch_size (--largest seeks it), or a smaller config.data.longest")
    return f"{error}, {error.needed / error.limit - 1:.0%} too much; try {', '.join(changes)}"


def _as_json(step: StepPlan | None) -> dict[str, Any] | None:
    if step is None:
        return None
    named = {"messages": [m._asdict() for m in step.messages]}
    return dataclasses.asdict(step) | named | {"bounds": {part: bound._asdict() for part, bound in step.bounds.items()}}


def bucket_of(config: ml_collections.ConfigDict, given: str) -> tuple[int, int]:
    """`832x1344` -> (832, 1344), the config's largest bucket for nothing. Raises `UserError` for what is none."""
    if not given:
        return max(common.pipeline_options(config).buckets, key=lambda b: (b[0] * b[1], b[1]))
    sides = given.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) and int(side) % common.STRIDE == 0 for side in sides):
        raise UserError(f"--bucket={given}: give height x width in multiples of {common.STRIDE}, such as 832x1344")
    return int(sides[0]), int(sides[1])


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    cli.check_required(config=_CONFIG.value)
    config = ml_collections.ConfigDict(_CONFIG.value)
    if "rows" in config:
        raise UserError("--config is an ablation of several rows; give the file of one experiment")
    for name, value, least in (("classes", _CLASSES.value, 1), ("objects", _OBJECTS.value, 0)):
        if value < least:
            raise UserError(f"--{name}={value}: give at least {least}")
    if _OUTPUT.value:  # told before minutes of compiling, not after
        paths.check_writable(paths.path(_OUTPUT.value).parent)
    config.batch_size = _BATCH_SIZE.value or config.batch_size
    common.check_numbers(config)
    found = plan(config, _TOPOLOGY.value, bucket_of(config, _BUCKET.value), _LARGEST.value)
    if _OUTPUT.value:
        paths.write_json(_OUTPUT.value, found, finite=False)


if __name__ == "__main__":
    cli.run(main)
