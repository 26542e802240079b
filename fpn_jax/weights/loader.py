"""Weights of other frameworks into our variables and back: one function each way, for all formats.

Every weight is accounted for. One that the detector lacks, that the file lacks, or that has another shape is named in
a `UserError`, and nothing is loaded: there is no half-loaded model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fpn_jax.errors import UserError
from fpn_jax.weights import names, semantics
from fpn_jax.weights.tables import Format

CLASS_LAYERS = (("params", "box_head", "classes"), ("params", "box_head", "deltas"))
PARTS = ("backbone", "neck", "rpn_head", "box_head")
_SHOWN = 4  # names in a message


@dataclass
class Loaded:
    """What came of a file."""

    variables: dict[str, Any]  # like those given
    format: Format
    count: int  # arrays taken over
    ignored: list[str] = field(default_factory=list)  # names in the file that a detector has no use for
    fresh: list[str] = field(default_factory=list)  # our variables that keep their initial values

    def remarks(self, model: Mapping[str, Any]) -> list[str]:
        """What the weights do not tell, and where `config.model` is not as the framework they are from has it."""
        framework, lines = self.format.framework, []
        parts = {path[1] for path in names.flatten(self.variables) if "/".join(path) not in set(self.fresh)}
        lines += [f"remark: {line}" for line in semantics.differences(model, framework, parts)]
        if framework == "torchvision" and model["backbone"]["name"] == "resnet" and "backbone" in parts:
            lines.append(
                f"remark: model.backbone.norm_eps is {model['backbone']['norm_eps']}: torchvision's COCO_V1 file of "
                "fasterrcnn_resnet50_fpn, and what was fine-tuned from it, wants 0.0, everything else 1e-5"
            )
        return lines

    def describe(self) -> str:
        """One line for the log."""
        text = f"{self.count} arrays of a {self.format.name}"
        if self.fresh:
            taken = {"/".join(path) for path in names.flatten(self.variables)} - set(self.fresh)
            parts = {name.split("/")[1] for name in taken}  # a part of which nothing was taken is named as a whole
            modules = [name.split("/")[1:3] for name in self.fresh]
            new = list(dict.fromkeys("/".join(m) if m[0] in parts else m[0] for m in modules))
            more = f" and {len(new) - _SHOWN} more" if len(new) > _SHOWN else ""
            text += f"; new, with random values: {', '.join(new[:_SHOWN])}{more}"
        return text


def load(
    variables: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    file: str,
    pooled_size: int,
    parts: Sequence[str] = (),
    reset_classes: bool = False,
) -> Loaded:
    """Put the arrays of a file into variables like the given ones, float32.

    Args:
        variables: {"params": ..., "batch_stats": ...}: the detector's initial values, which everything that is not
            taken over keeps.
        arrays: by their names, as `files.read_arrays` gives them; file: their origin, for messages.
        pooled_size: side of the RoI features in cells, which the first layer of the box head reads in another order.
        parts: some of PARTS to take over those alone; () takes what the format describes, a detector or a backbone.
        reset_classes: whether the class layers keep their initial values, for a detector of other classes.

    Raises `UserError` naming the weights that are unknown, missing or misshapen.
    """
    for part in parts:
        if part not in PARTS:
            raise UserError(f"there is no part {part!r} of a detector; choose some of {', '.join(PARTS)}")
    format = names.recognise(arrays, file)
    found = names.renamed(arrays, format)
    ours = names.flatten(variables)
    result, fresh, troubles, used = dict(ours), [], [], set()
    wanted = set(parts or PARTS) & (
        set(PARTS) if format.ours else {pattern.split("/")[0] for pattern in format.modules}
    )
    count = 0
    for path, initial in ours.items():
        source = path if format.ours else _of_backbone(path)
        name = names.their_name(source, format)
        if name:
            used.add(name)
        is_reset = reset_classes and path[:3] in CLASS_LAYERS
        if source[1] not in wanted or is_reset:
            fresh.append("/".join(path))
            continue
        if name is None:
            troubles.append(f"the file's format has no {'/'.join(path)}")
            continue
        array = _array(name, arrays, found, format, tuple(initial.shape))
        if array is None:
            troubles.append(f"{name} is missing")
            continue
        if array.dtype.kind != "f":
            troubles.append(f"{name} is of type {array.dtype}, not of floating point numbers")
            continue
        if not np.isfinite(array).all():
            troubles.append(f"{name} holds numbers that are not finite")
            continue
        converted = names.to_ours(path, array, format, pooled_size)
        if converted.shape != tuple(initial.shape):
            expected = names.to_theirs(path, np.broadcast_to(np.float32(0), initial.shape), format, pooled_size).shape
            troubles.append(f"{name} is {list(array.shape)}, the detector's {list(expected)}")
            continue
        result[path] = np.ascontiguousarray(converted, np.float32)
        count += 1
    leftover = [name for name in found if name not in used]
    ignored = [name for name in leftover if names.is_ignored(name, format)]
    for name in leftover:
        if name not in ignored and not (parts and names.is_known(name, format)):
            troubles.append(f"{name} is not in the detector")
    if troubles:
        raise _refusal(file, format, troubles)
    if count == 0:
        raise UserError(f"{file}: a {format.name} has no {' or '.join(parts)}; choose other parts")
    return Loaded(names.unflatten(result), format, count, [found[name] for name in ignored], fresh)


def _of_backbone(path: tuple[str, ...]) -> tuple[str, ...]:
    """Where other frameworks' files have the weights of a head that is the last stage of the backbone (`Conv5Head`)."""
    is_stage = path[1] == "box_head" and path[2].startswith("stage")
    return (path[0], "backbone", *path[2:]) if is_stage else path


def export(variables: Mapping[str, Any], framework: str, pooled_size: int) -> dict[str, np.ndarray]:
    """The variables under the names and in the layouts of a framework, float32, ready for `files.write_arrays`.

    framework: one of `names.frameworks()`. Raises `UserError` naming a variable that none of its formats has a place
    for.
    """
    flat = names.flatten(variables)
    formats = names.formats(framework)
    for format in formats:
        result = {}
        for path, array in flat.items():
            name = names.their_name(path, format)
            if name is None:
                break
            result[name] = np.ascontiguousarray(
                names.to_theirs(path, np.asarray(array, np.float32), format, pooled_size)
            )
            is_live = path[0] == "batch_stats" and path[-2:] == ("norm", "mean")
            if is_live and format.counters:
                result[f"{name.removesuffix('running_mean')}num_batches_tracked"] = np.zeros((), np.int64)
        else:
            if set(format.sign) <= set(result):
                return result
    homeless = min(([path for path in flat if names.their_name(path, format) is None] for format in formats), key=len)
    raise UserError(
        f"no {framework} format has a place for {', '.join('/'.join(path) for path in homeless[:_SHOWN]) or 'this'}; "
        f"known are {'; '.join(format.name for format in formats)}"
    )


def class_slots(arrays: Mapping[str, np.ndarray], file: str) -> int | None:
    """How many class slots (background included) a detector's file has; None for a backbone's."""
    format = names.recognise(arrays, file)
    name = names.their_name((*CLASS_LAYERS[0], "bias"), format)
    found = names.renamed(arrays, format)
    return len(arrays[found[name]]) if name in found else None


def _array(
    name: str, arrays: Mapping[str, np.ndarray], found: Mapping[str, str], format: Format, shape: tuple[int, ...]
) -> np.ndarray | None:
    """Their array, or what stands for it where the format does without."""
    if name in found:
        return arrays[found[name]]
    # All or none: no statistics may be made up among others.
    without = not any(other.endswith(".running_var") for other in found)
    if format.statistics and without and name.endswith((".running_mean", ".running_var")):
        return np.full(shape, format.statistics[name.endswith("var")], np.float32)
    return None


def _refusal(file: str, format: Format, troubles: list[str]) -> UserError:
    more = f" and {len(troubles) - _SHOWN} more" if len(troubles) > _SHOWN else ""
    hint = "give the --config that it was trained with"
    if all("box_predictor" in trouble for trouble in troubles):
        hint = "for other classes than the file's say --reset_classes (config.init_reset_classes=True in training)"
    return UserError(
        f"{file}: a {format.name} that does not fit: {'; '.join(troubles[:_SHOWN])}{more}. Nothing was loaded; {hint}"
    )
