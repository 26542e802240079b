"""From a config to a detector: the visible tables of what a config can name.

To add a neck: write a module {l: C_l} -> {l: P_l} in `fpn_jax/models/necks/`, put it into NECKS, and say
`config.model.neck.name = "yours"`; the other keys of `config.model.neck` become its attributes. Backbones alike.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from fpn_jax.errors import UserError
from fpn_jax.models.backbones.mobilenet import MobileNetV3
from fpn_jax.models.backbones.resnet import ResNet
from fpn_jax.models.faster_rcnn import FasterRCNN
from fpn_jax.models.heads.box import BoxHead, BoxSettings
from fpn_jax.models.heads.rpn import RPNHead, RPNSettings
from fpn_jax.models.layers import NORMS, ORDERS, Pixels
from fpn_jax.models.necks.fpn import FPN

BACKBONES = {"resnet": ResNet, "mobilenet_v3": MobileNetV3}
NECKS = {"fpn": FPN}
# Values that are names, of whatever part they belong to.
CHOICES = {
    "norm": ("none", *NORMS),
    "order": tuple(ORDERS),
    "anchor_order": ("ratio_major", "size_major"),
    "anchor_stride": ("image", "level"),
    "normalizer": ("sampled", "nominal"),
    "sampling": ("random", "first"),
    "background": ("first", "last"),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_detector(model: Mapping[str, Any], num_classes: int) -> FasterRCNN:
    """The detector that `config.model` describes. Raises `UserError` naming the key that does not fit."""
    dtype = _choose("model.dtype", DTYPES, model["dtype"])
    settings = RPNSettings(**_fields("model.rpn", RPNSettings, model["rpn"]))
    if len(settings.sizes) != len(settings.levels):
        raise UserError(
            f"model.rpn.sizes has {len(settings.sizes)} rows for {len(settings.levels)} levels; give one per level"
        )
    box_settings = BoxSettings(**_fields("model.box", BoxSettings, model["box"]))
    return FasterRCNN(
        backbone=_make("model.backbone", BACKBONES, model["backbone"], dtype=dtype),
        neck=_make("model.neck", NECKS, model["neck"], dtype=dtype),
        rpn_head=RPNHead(
            len(settings.sizes[0]) * len(settings.ratios),
            dtype=dtype,
            **_fields("model.rpn_head", RPNHead, model.get("rpn_head", {})),
        ),
        box_head=BoxHead(
            num_classes, box_settings.background, dtype=dtype, **_fields("model.box_head", BoxHead, model["box_head"])
        ),
        pixels=Pixels(**_fields("model.pixels", Pixels, model.get("pixels", {}))),
        rpn_settings=settings,
        box_settings=box_settings,
        dtype=dtype,
    )


def _choose(key: str, table: Mapping[str, Any], name: str) -> Any:
    if name not in table:
        raise UserError(f"{key} is {name!r}; choose one of {', '.join(table)}")
    return table[name]


def _make(key: str, table: Mapping[str, Callable[..., Any]], values: Mapping[str, Any], **extra: Any) -> Any:
    values = dict(values)
    module = _choose(f"{key}.name", table, values.pop("name"))
    return module(**_fields(key, module, values), **extra)


def _fields(key: str, cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as keyword arguments of the dataclass `cls`, lists as tuples (modules must be hashable)."""
    known = {field.name for field in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UserError(f"{key}.{name}: {cls.__name__} has no such attribute")
        if name in CHOICES:
            _choose(f"{key}.{name}", dict.fromkeys(CHOICES[name]), values[name])
    return {name: _frozen(value) for name, value in values.items()}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value
