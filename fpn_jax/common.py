"""What train, evaluate and predict set up alike from a config."""

import contextlib
import dataclasses
import json
import math
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from fpn_jax.allocator import keep_memory
from fpn_jax.data.class_lists import class_list
from fpn_jax.data.datasets import Split, open_split
from fpn_jax.data.pipeline import PipelineOptions, default_buckets
from fpn_jax.data.transforms import resized_size
from fpn_jax.errors import UserError, some, warn
from fpn_jax.models import build_detector
from fpn_jax.models.detector import Detector
from fpn_jax.storage import mirror, paths
from fpn_jax.training import checkpoint, peers, processes, roll_call, sharding
from fpn_jax.training.state import init_variables
from fpn_jax.weights import files, loader, names, published, semantics

STRIDE = 32  # of C5: sides that are no multiples of it would shift the top-down pathway against the bottom-up one


@dataclasses.dataclass(frozen=True)
class Classes:
    """What the labels 0 .. k-1 mean, so that a workdir can be used without its data set."""

    names: list[str]
    category_ids: list[int]  # the data set's own numbers, or the class list's, which go into results

    def write(self, workdir: str) -> None:
        """Keep them in WORKDIR/classes.json."""
        paths.write_json(paths.path(workdir) / "classes.json", dataclasses.asdict(self))

    @staticmethod
    def known(workdir: str) -> bool:
        """Whether the workdir has any yet."""
        return (paths.path(workdir) / "classes.json").exists()

    @classmethod
    def read(cls, workdir: str) -> "Classes":
        """Raises `UserError` if the workdir has none."""
        path = paths.path(workdir) / "classes.json"
        if not path.exists():
            raise UserError(f"{path} is missing; train in this workdir first, or give another --workdir")
        return cls(**json.loads(path.read_text()))


def set_up_jax() -> None:
    """Keep compiled programs between runs: a second start then takes seconds where the first took minutes. And keep
    memory between steps, see `keep_memory`. Before JAX is asked for its devices."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/fpn_jax/jax").expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    keep_memory()


@contextlib.contextmanager
def together(config: ml_collections.ConfigDict, workdir: str) -> Iterator[None]:
    """Around all that several processes do together: they join, make sure that they do the same, and watch each other.

    See `processes.start_processes`, `peers.watched` and `roll_call.agree` for what comes out if they do not.
    """
    limits = {"join_within": 300.0, "dead_after": 60.0, "stall_after": 1800.0}  # workdirs of before have none
    join_within, dead_after, stall_after = (config.get(name, default) for name, default in limits.items())
    processes.start_processes(join_within, dead_after)
    with peers.watched(dead_after, stall_after):
        facts = {"command": Path(sys.argv[0]).name, "--workdir": workdir} | roll_call.versions()
        facts |= {f"config.{key}": value for key, value in flat_values(config).items()}
        roll_call.agree("config and versions", facts, join_within)
        yield


# Key of the config -> (its least value, whether that itself will do, what it must stay below).
_NUMBERS = {
    "num_steps": (1, True, math.inf),
    "batch_size": (1, True, math.inf),
    "eval_batch_size": (1, True, math.inf),
    "accumulate": (1, True, math.inf),
    "eval_every": (0, True, math.inf),
    "checkpoint_every": (0, True, math.inf),
    "pictures": (0, True, math.inf),
    "ema_decay": (0, True, 1),
    "join_within": (0, False, math.inf),
    "dead_after": (0, False, math.inf),
    "stall_after": (0, False, math.inf),
    "optim.learning_rate": (0, True, math.inf),
    "optim.base_batch_size": (0, True, math.inf),
    "optim.weight_decay": (0, True, math.inf),
    "optim.clip_norm": (0, True, math.inf),
    "optim.warmup_steps": (0, True, math.inf),
    "optim.warmup_factor": (0, True, math.inf),
    "optim.step_factor": (0, True, math.inf),
    "optim.momentum": (0, True, 1),
    "optim.adam_b2": (0, True, 1),
    "data.max_objects": (0, True, math.inf),
}
# Keys of numbers in a row that have no bounds, for which the models look (`models.NUMBERS`). Other keys, of a neck of
# one's own, may hold what they like.
_ROWS = (
    "data.shorter",
    "data.max_proposals",
    "optim.step_at",
    "model.backbone.blocks",
    "model.backbone.levels",
    "model.backbone.remat",
    "model.image_pyramid.scales",
    "model.neck.levels",
    "model.neck.outputs",
    "model.rpn.levels",
    "model.box.levels",
    "model.box_head.separate_levels",
)


def check_numbers(config: ml_collections.ConfigDict) -> None:
    """Raise a `UserError` that names the first number of a training which is none or lies beyond its bounds."""
    values = flat_values(config)
    for key in _ROWS:
        value = values.get(key, ())
        row = value if isinstance(value, tuple) else (value,)
        strange = [x for x in row if not isinstance(x, int | float) and (x, key) != (None, "model.backbone.blocks")]
        if strange:
            raise UserError(f"{key} is {value}: {strange[0]!r} is not a number; give numbers alone")
    for key, (least, itself, below) in _NUMBERS.items():
        value = values.get(key, 1)  # a workdir of before there was the key has none
        if not (value >= least if itself else value > least) or not value < below:
            bounds = f"{'at least' if itself else 'above'} {least}" + (
                f" and below {below}" if below < math.inf else ""
            )
            raise UserError(f"{key} is {value}; it must be {bounds}")
    if not all(0 <= at <= 1 for at in config.optim.step_at):
        raise UserError(
            f"optim.step_at is {tuple(config.optim.step_at)}; give fractions of num_steps between 0 and 1, such as "
            "(0.67, 0.89)"
        )
    if config.batch_size % config.accumulate:
        raise UserError(
            f"batch_size is {config.batch_size}, which accumulate={config.accumulate} does not divide; set one so that "
            "it does"
        )


def mesh_options(config: ml_collections.ConfigDict) -> sharding.MeshOptions:
    """`config.mesh` as options of the mesh; the defaults for what a workdir of before there was a choice lacks."""
    values = dict(config.get("mesh", {}))
    known = [field.name for field in dataclasses.fields(sharding.MeshOptions)]
    for name in values:
        if name not in known:
            raise UserError(f"mesh.{name}: the mesh has no such axis; choose some of {', '.join(known)}")
    return sharding.MeshOptions(**values)


def pipeline_options(config: ml_collections.ConfigDict) -> PipelineOptions:
    """`config.data` as options of the input pipeline. Raises `UserError` for sides the network cannot take."""
    data = config.data
    # Devices that share an image get whole rows of C5, as many each.
    unit = STRIDE * max(1, mesh_options(config).space)
    buckets = semantics.plain(data.buckets) or default_buckets(data.shorter, data.longest, unit)
    if not all(isinstance(bucket, tuple) for bucket in buckets):
        example = (buckets,) if len(buckets) == 2 else ((256, 320), (320, 256))
        raise UserError(f"data.buckets is {buckets}; give (height, width) pairs: {example}")
    for bucket in buckets:
        if len(bucket) != 2 or any(not isinstance(side, int) or side % STRIDE for side in bucket):
            raise UserError(f"data.buckets: {bucket} is not a (height, width) of multiples of {STRIDE}")
    return PipelineOptions(
        shorter=tuple(data.shorter),
        longest=data.longest,
        buckets=buckets,
        flip=data.flip,
        rounding=data.rounding,
        interpolation=data.interpolation,
        pixels=data.get("pixels", "uint8"),  # not there in workdirs of before there was a choice
        max_objects=data.max_objects or None,
        max_proposals=tuple(data.get("max_proposals", (2000, 1000))),
        skip_empty=data.skip_empty,
        num_threads=data.num_threads,
        num_workers=data.num_workers,
    )


def pad_tightly(options: PipelineOptions, image_sizes: np.ndarray) -> PipelineOptions:
    """Options whose buckets pad images of these sizes [n 2] to the next multiples of the stride and no further.

    As torchvision pads an image that is alone in its batch: padding moves P6's anchors and what convolutions see beyond
    the picture's edge, and so the detections a little. Each size of its own costs a compilation.
    """
    sizes = np.stack(resized_size(*image_sizes.T, options.shorter[-1], options.longest, options.rounding), 1)
    shapes = np.unique(-(-sizes // STRIDE) * STRIDE, axis=0)
    return dataclasses.replace(options, buckets=tuple(map(tuple, shapes.tolist())))


def open_data(config: ml_collections.ConfigDict, split: str, chosen_by: str = "split") -> Split:
    """One split of `config.data.dataset`, with the labels of the list `config.data.classes` if that names one.

    chosen_by: the key or flag that the split is from, for the error if there is no such split.
    Raises `UserError` if there is no such list, or the data set has classes that are not in it.
    """
    name = config.data.get("classes", "")  # not there in workdirs of before there was a choice
    classes = class_list(name) if name else None  # an unknown name is told before the data is opened
    data = config.data
    opened = open_split(data.data_dir, data.dataset, split, data.get("cache_dir", ""), chosen_by)
    return opened.with_classes(classes.names, classes.category_ids) if classes else opened


def fingerprint(*splits: Split) -> dict[str, str]:
    """What must be equal on all processes besides the config: {"devices": how many, "data SPLIT": which images}."""
    images = {
        f"data {x.split}": f"{x.name}, {len(x)} images (ids {zlib.crc32(x.index.image_id.tobytes()):08x})"
        for x in splits
    }
    return {"devices": sharding.describe_devices()} | images


def check_classes(classes: Classes, split: Split, workdir: str) -> None:
    """Raise a `UserError` unless the split has the classes that the workdir's detector was trained on.

    Tells of those whose id has another name there.
    """
    if classes.category_ids != list(split.category_ids):
        raise UserError(
            f"--workdir={workdir} was trained on {len(classes.names)} classes with ids {classes.category_ids[:5]}..., "
            f"{split.name} has {len(split.class_names)} with ids {list(split.category_ids)[:5]}...; "
            f"use the data set it was trained on, or train in another --workdir, to which --config.init_from={workdir} "
            "--config.init_reset_classes=True takes all other weights"
        )
    renamed = [
        f"{category} is {now!r}, there {before!r}"
        for category, before, now in zip(classes.category_ids, classes.names, split.class_names, strict=True)
        if before != now
    ]
    if renamed and sharding.process()[0] == 0:
        warn(f"{split.name} has other names for the categories of --workdir={workdir}: {some(renamed)}")


def make_detector(config: ml_collections.ConfigDict, classes: Classes) -> Detector:
    """The detector of `config.model` for these classes."""
    return build_detector(config.model, len(classes.names))


def flat_values(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """{dotted key: value}, lists as tuples, as they come back from JSON."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat |= {f"{name}.{key}": x for key, x in flat_values(value).items()}
        else:
            flat[name] = semantics.plain(value)
    return flat


def read_weights(address: str, cache_dir: str = "") -> dict[str, np.ndarray]:
    """The arrays, by their names there, of a file, an address that `published.fetch` knows, or the best of a workdir.

    A workdir's are named as the paths of our variables. cache_dir: for a file on gs://, see `mirror`. Raises
    `UserError` if there is nothing readable.
    """
    if is_workdir(address):
        with checkpoint.Checkpoints(address) as checkpoints:
            variables, _ = checkpoints.saved_weights("best")
        return {"/".join(path): np.asarray(x) for path, x in names.flatten(variables).items()}
    local = mirror.fetched(address, cache_dir) if address.startswith("gs://") else published.fetch(address)
    return files.read_arrays(local)


def is_workdir(address: str) -> bool:
    """Whether a run's folder is what this names, rather than a file or an address of weights."""
    has_scheme = "://" in address and not address.startswith("gs://")
    return not has_scheme and (paths.path(address) / "config.json").exists()


def load_weights(
    config: ml_collections.ConfigDict,
    variables: dict[str, Any],
    address: str,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> loader.Loaded:
    """Put the weights of `address`, or those read from it, into variables like these.

    `config.init_part` and `config.init_reset_classes` say which.
    """
    return loader.load(
        variables,
        read_weights(address, config.data.get("cache_dir", "")) if arrays is None else arrays,
        address,
        config.model.box.pooled_size,
        [part.strip() for part in config.init_part.split(",") if part.strip()],
        config.init_reset_classes,
    )


def abstract_variables(detector: Detector, image_size: tuple[int, int], mesh: Any, over: str = "") -> dict[str, Any]:
    """Shapes and `sharding.layout` of the variables, without computing them, to restore a checkpoint into."""
    shapes = jax.eval_shape(lambda: init_variables(detector, image_size, 0))
    places = sharding.layout(mesh, shapes, over)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
