"""From a config to a detector: the visible tables of what a config can name.

To add a neck: write a module {l: C_l} -> {l: P_l} in `fpn_jax/models/necks/`, put it into NECKS, and say
`config.model.neck.name = "yours"`; the other keys of `config.model.neck` become its attributes. Its
`output_levels(received)` tells the levels it gives. So that `evaluate` and all other commands know it, it is imported
here, not by the experiment's file. The same with

* backbones, images [b h w 3] -> {l: C_l}, and `output_levels()`; `frozen_prefixes` are the beginnings of the names of
  parameters that are not trained, where there are some;
* box heads, with the attributes `num_classes` and `background`: (RoI features [b r h w c], train, levels of the RoIs
  [b r]) -> what `heads.box.BoxHead` gives.

Each is made with a `dtype` to compute in. A loss of another kind is a name for a field of RPNSettings or BoxSettings, a
branch in their losses (`heads/rpn.py`, `heads/box.py`), and a line in CHOICES. So is any other name that a module of
this package takes, such as an activation; modules of other packages are not bound by CHOICES.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fpn_jax.errors import UserError
from fpn_jax.models.backbones.image_pyramid import ImagePyramid
from fpn_jax.models.backbones.mobilenet import MobileNetV3
from fpn_jax.models.backbones.resnet import ResNet
from fpn_jax.models.detector import Detector
from fpn_jax.models.fast_rcnn import FastRCNN
from fpn_jax.models.faster_rcnn import FasterRCNN
from fpn_jax.models.heads.box import BoxHead, BoxSettings
from fpn_jax.models.heads.conv5 import Conv5Head
from fpn_jax.models.heads.rpn import RPNHead, RPNSettings
from fpn_jax.models.layers import NORMS
from fpn_jax.models.necks.fpn import ACTIVATIONS, FPN, MERGES, Bare
from fpn_jax.models.pixels import ORDERS, Pixels
from fpn_jax.models.resampling import UPSAMPLINGS
from fpn_jax.models.rpn import RPN

DETECTORS = {"rpn": RPN, "fast_rcnn": FastRCNN, "faster_rcnn": FasterRCNN}
BACKBONES = {"resnet": ResNet, "mobilenet_v3": MobileNetV3}
NECKS = {"fpn": FPN, "none": Bare}
BOX_HEADS = {"fc": BoxHead, "conv5": Conv5Head}
PARTS = ("backbone", "neck", "rpn_head", "box_head")
# Values that are names, of whatever part they belong to.
CHOICES = {
    "norm": ("none", "frozen_bn", *NORMS),
    "order": tuple(ORDERS),
    "anchor_order": ("ratio_major", "size_major"),
    "anchor_stride": ("image", "level"),
    "normalizer": ("sampled", "nominal"),
    "sampling": ("random", "first"),
    "background": ("first", "last"),
    "pooling": ("align", "pool"),
    "upsampling": UPSAMPLINGS,
    "merge": MERGES,
    "activation": tuple(ACTIVATIONS),
}
_ABOVE_ZERO = math.nextafter(0, 1)
# Numbers by their keys, or each number where there are several: the least and the most.
NUMBERS = {
    "model.backbone.width": (1, math.inf),
    "model.backbone.groups": (1, math.inf),
    "model.backbone.width_per_group": (1, math.inf),
    "model.backbone.blocks": (1, math.inf),
    **{f"model.{part}.norm_eps": (0, math.inf) for part in ("backbone", "neck", "box_head")},  # 0: torchvision's R50
    "model.neck.channels": (1, math.inf),
    "model.rpn_head.convs": (1, math.inf),
    "model.rpn_head.channels": (0, math.inf),
    "model.box_head.channels": (1, math.inf),
    "model.box_head.convs": (0, math.inf),
    "model.box_head.conv_channels": (1, math.inf),
    "model.box_head.fcs": (0, math.inf),
    "model.box.pooled_size": (1, math.inf),
    "model.box.canonical_size": (1, math.inf),
    "model.box.k0": (0, math.inf),
    "model.box.level_eps": (0, 1),
    "model.box.detections": (1, math.inf),
    "model.rpn.sizes": (_ABOVE_ZERO, math.inf),
    "model.rpn.ratios": (_ABOVE_ZERO, math.inf),
    "model.rpn.negative_iou": (0, 1),
    "model.rpn.pre_nms_train": (0, math.inf),
    "model.rpn.pre_nms_test": (0, math.inf),
    "model.rpn.post_nms_train": (1, math.inf),
    "model.rpn.post_nms_test": (1, math.inf),
    "model.pixels.white": (_ABOVE_ZERO, math.inf),
    "model.pixels.mean": (-math.inf, math.inf),
    "model.pixels.std": (_ABOVE_ZERO, math.inf),
    **{
        f"model.{part}.{name}": bounds
        for part in ("rpn", "box")
        for name, bounds in {
            "samples": (1, math.inf),
            "positive_fraction": (0, 1),
            "positive_iou": (0, 1),
            "nms_iou": (0, 1),
            "score_threshold": (0, 1),
            "min_size": (0, math.inf),
            "beta": (0, math.inf),
            "delta_weights": (_ABOVE_ZERO, math.inf),
        }.items()
    },
}
# How many numbers, where there are several: one for each of dx, dy, dw and dh, one for each channel.
COUNTS = {"delta_weights": 4, "mean": 3, "std": 3}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_OF_BACKBONE = (
    "depth",
    "width",
    "groups",
    "width_per_group",
    "stride_in_1x1",
    "norm",
    "norm_eps",
)  # conv5 has them, too


def build_detector(model: Mapping[str, Any], num_classes: int) -> Detector:
    """The detector that `config.model` describes. Raises `UserError` naming the key that does not fit.

    model: keys that are missing (in workdirs of before there was a choice) have the defaults of the modules.
    """
    dtype = _choose("model.dtype", DTYPES, model["dtype"])
    detector = _choose("model.detector", DETECTORS, model.get("detector", "faster_rcnn"))
    backbone = _backbone(model, dtype)
    neck = _make("model.neck", NECKS, model["neck"], dtype=dtype)
    levels = neck.output_levels(backbone.output_levels())
    _check_doubling(backbone, neck)
    parts: dict[str, Any] = {}
    if issubclass(detector, RPN):
        parts |= _rpn(model, levels, dtype)
    if issubclass(detector, FastRCNN):
        parts |= _fast_rcnn(model, levels, num_classes, dtype)
    _check_strides(backbone, parts)
    _check_channels(model, backbone, neck, parts)
    frozen_parts = tuple(model.get("frozen_parts", ()))
    for part in frozen_parts:
        _choose("model.frozen_parts", dict.fromkeys(PARTS), part)
    pixels = Pixels(**_fields("model.pixels", Pixels, model.get("pixels", {})))
    return detector(backbone=backbone, neck=neck, pixels=pixels, frozen_parts=frozen_parts, dtype=dtype, **parts)


def _backbone(model: Mapping[str, Any], dtype: Any) -> Any:
    net = _make("model.backbone", BACKBONES, model["backbone"], dtype=dtype)
    pyramid = model.get("image_pyramid", {})
    if not pyramid.get("scales"):
        return net
    if len(set(pyramid["scales"])) < len(pyramid["scales"]):
        raise UserError(f"model.image_pyramid.scales is {tuple(pyramid['scales'])}; name each scale once")
    given = {"net": net, "dtype": dtype}
    return ImagePyramid(**given, **_fields("model.image_pyramid", ImagePyramid, pyramid, given))


def _rpn(model: Mapping[str, Any], levels: Sequence[int], dtype: Any) -> dict[str, Any]:
    settings = RPNSettings(**_fields("model.rpn", RPNSettings, model["rpn"]))
    _check_levels("rpn", settings.levels, levels)
    if len(settings.sizes) != len(settings.levels):
        raise UserError(
            f"model.rpn.sizes has {len(settings.sizes)} rows for {len(settings.levels)} levels; give one per level"
        )
    if not all(isinstance(row, tuple) and row for row in settings.sizes):
        raise UserError(f"model.rpn.sizes is {settings.sizes}; give a row of sizes for each level: ((32,), (64,), ...)")
    counts = {len(sizes) for sizes in settings.sizes}
    if len(counts) > 1:
        raise UserError(
            f"model.rpn.sizes has {' and '.join(map(str, sorted(counts)))} sizes in a row; give each level as many"
        )
    if not settings.ratios:
        raise UserError("model.rpn.ratios is empty; give at least one, such as (1.0,)")
    if settings.negative_iou > settings.positive_iou:
        raise UserError(
            f"model.rpn.negative_iou is {settings.negative_iou}, above model.rpn.positive_iou {settings.positive_iou}: "
            "an anchor between them would be both; set it to that or less"
        )
    given = {"anchors": counts.pop() * len(settings.ratios), "dtype": dtype}
    values = _fields("model.rpn_head", RPNHead, model.get("rpn_head", {}), given)
    return {"rpn_head": RPNHead(**given, **values), "rpn_settings": settings}


def _fast_rcnn(model: Mapping[str, Any], levels: Sequence[int], num_classes: int, dtype: Any) -> dict[str, Any]:
    settings = BoxSettings(**_fields("model.box", BoxSettings, model["box"]))
    _check_levels("box", settings.levels, levels)
    if settings.pooling == "pool" and settings.aligned:
        raise UserError(
            "model.box.aligned is True: RoI pooling has no such; set it to False, or model.box.pooling=align"
        )
    values = {"name": "fc", **model["box_head"]}
    extra: dict[str, Any] = {}
    if values["name"] == "conv5":
        if model["backbone"]["name"] != "resnet":
            raise UserError(
                "model.box_head.name is 'conv5', the last stage of a ResNet; set model.backbone.name=resnet"
            )
        extra = {name: model["backbone"][name] for name in _OF_BACKBONE if name in model["backbone"]}
        values = {name: value for name, value in values.items() if name not in ("norm", "norm_eps")}  # the fc head's
        if 5 in settings.levels:
            raise UserError(f"model.box.levels is {settings.levels}: the head conv5 goes on from C4; set it to (4,)")
    given = dict(num_classes=num_classes, background=settings.background, dtype=dtype, **extra)
    head = _make("model.box_head", BOX_HEADS, values, **given)
    if isinstance(head, BoxHead) and head.separate_levels and set(head.separate_levels) != set(settings.levels):
        raise UserError(
            f"model.box_head.separate_levels is {head.separate_levels}, model.box.levels is {settings.levels}: RoIs of "
            "a level without a head would have none; name the same levels, or set separate_levels=()"
        )
    return {"box_head": head, "box_settings": settings}


def _check_levels(key: str, wanted: Sequence[int], there: Sequence[int]) -> None:
    if not wanted:
        raise UserError(f"model.{key}.levels is empty; give at least one of {tuple(there)}")
    for level in wanted:
        if level not in there:
            kept = tuple(level for level in wanted if level in there) or "some of those"
            rows = ", and model.rpn.sizes to a row for each" if key == "rpn" else ""
            raise UserError(
                f"model.{key}.levels is {tuple(wanted)}: model.neck gives levels {tuple(there)}, no level {level}; set "
                f"it to {kept}{rows}"
            )
    if len(set(wanted)) < len(wanted):
        raise UserError(f"model.{key}.levels is {tuple(wanted)}; name each level once")


def _check_doubling(backbone: Any, neck: Any) -> None:
    """A transposed convolution doubles the size, which levels 5 and 6 of a MobileNet have in common."""
    if isinstance(backbone, MobileNetV3) and isinstance(neck, FPN) and neck.upsampling == "transposed":
        levels = neck.levels or backbone.levels
        if {5, 6} <= set(levels):
            raise UserError(
                "model.neck.upsampling is 'transposed', which doubles the size, but levels 5 and 6 of mobilenet_v3 are "
                "of one size; set it to nearest or bilinear, or leave one of them out of model.neck.levels"
            )


def _check_strides(backbone: Any, parts: Mapping[str, Any]) -> None:
    """A cell of level l is 2**l pixels wide to RoIs, and to anchors if asked for; not so of a MobileNet's level 6."""
    if not isinstance(backbone, MobileNetV3):
        return
    coarse = "but levels 6 and above of mobilenet_v3 have half the stride of their number"
    if "box_settings" in parts and max(parts["box_settings"].levels) > 5:
        raise UserError(
            f"model.box.levels is {parts['box_settings'].levels}, {coarse}; leave them out, as torchvision does"
        )
    settings = parts.get("rpn_settings")
    if settings and settings.anchor_stride == "level" and max(settings.levels) > 5:
        raise UserError(f"model.rpn.anchor_stride is 'level', {coarse}; set it to image")


def _check_channels(model: Mapping[str, Any], backbone: Any, neck: Any, parts: Mapping[str, Any]) -> None:
    """Maps as the backbone gives them differ in channels, which weights that serve several levels cannot read."""
    if not isinstance(neck, Bare) or isinstance(backbone, ImagePyramid):
        return
    if "rpn_head" in parts and parts["rpn_head"].shared and len(parts["rpn_settings"].levels) > 1:
        raise UserError(
            "model.rpn_head.shared is True, but model.neck.name=none gives levels of different channels; set it to "
            "False, or model.neck.name=fpn with lateral=True and top_down=False"
        )
    if "box_head" in parts and len(parts["box_settings"].levels) > 1:
        raise UserError(
            f"model.box.levels is {parts['box_settings'].levels}, but model.neck.name=none gives levels of different "
            "channels; take one of them, or model.neck.name=fpn with lateral=True and top_down=False"
        )


def _choose(key: str, table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise UserError(f"{key} is {name!r}; choose one of {', '.join(table)}")
    return table[name]


def _make(key: str, table: Mapping[str, Callable[..., Any]], values: Mapping[str, Any], **extra: Any) -> Any:
    """The module of the table that values["name"] names, with the other values.

    Those that only its neighbours in the table know are theirs and left out, so that a change of the name is enough.
    """
    values = dict(values)
    module = table.get(name := values.pop("name", None))
    if module is None:
        own = "one of your own is put there in fpn_jax/models/__init__.py, so that all commands know it"
        raise UserError(f"{key}.name is {name!r}; choose one of {', '.join(table)}; {own}")
    known, others = _attributes(module), set().union(*map(_attributes, table.values()))
    values = {name: value for name, value in values.items() if name in known or name not in others}
    return module(**_fields(key, module, values, extra), **extra)


def _attributes(module: type) -> set[str]:
    return {field.name for field in dataclasses.fields(module)}


def _fields(key: str, cls: type, values: Mapping[str, Any], given: Collection[str] = ()) -> dict[str, Any]:
    """The values as keyword arguments of the dataclass `cls`, lists as tuples (modules must be hashable).

    given: names of the arguments that do not come from values.
    """
    known = _attributes(cls)
    for name in values:
        if name in (*given, "name", "parent"):
            raise UserError(f"{key}.{name} follows from the rest of config.model; remove it")
        if name not in known:
            raise UserError(f"{key}.{name}: {cls.__name__} has no such attribute")
        if name in CHOICES and cls.__module__.startswith(f"{__name__}."):  # a module of one's own has names of its own
            _choose(f"{key}.{name}", dict.fromkeys(CHOICES[name]), values[name])
        if f"{key}.{name}" in NUMBERS:
            _check_number(f"{key}.{name}", _frozen(values[name]), COUNTS.get(name, 0))
    return {name: _frozen(value) for name, value in values.items()}


def _check_number(key: str, value: Any, count: int) -> None:
    """Raises `UserError` unless the number, or each of a tuple or of a tuple of tuples, is one that NUMBERS allows."""
    least, most = NUMBERS[key]
    rows = value if isinstance(value, tuple) else (value,)
    if key == "model.rpn.sizes":  # a row for each level
        rows = jax.tree.leaves(value)
    for number in rows:
        if not isinstance(number, numbers.Real):
            raise UserError(f"{key} is {value}: {number!r} is not a number; give numbers alone")
        if not (least <= number <= most and math.isfinite(number)):
            bounds = "above 0" if least == _ABOVE_ZERO else f"at least {least}" if least > -math.inf else "finite"
            bounds += f" and at most {most}" if most < math.inf else ""
            raise UserError(f"{key} is {value}; {'each' if isinstance(value, tuple) else 'it'} must be {bounds}")
    if count and not (isinstance(value, tuple) and len(value) == count):
        raise UserError(f"{key} is {value}; give {count} numbers")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value
