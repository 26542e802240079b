"""Weights that anyone can rebuild from their names, so that results can be stored without them. NumPy alone.

Element i of a weight is a fixed function, named by its kind, of the i-th uniform number of the PCG64 stream seeded
with the CRC-32 of salt + name. NumPy guarantees that stream, so the rebuilt weights are equal bit for bit.
"""

import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

# kind -> the weight, from uniform numbers in [-1, 1) and the fan-in
KINDS = {
    "he": lambda u, fan_in: u * np.sqrt(6.0 / fan_in),  # in front of a ReLU
    "lin": lambda u, fan_in: u * np.sqrt(3.0 / fan_in),  # in front of anything else
    "bias": lambda u, fan_in: u * 0.1,
    "bn_w": lambda u, fan_in: 0.75 + 0.25 * (u + 1),
    "bn3_w": lambda u, fan_in: 0.2 + 0.15 * (u + 1),  # small at the end of a residual branch, or the maps would grow
    "bn_rm": lambda u, fan_in: u * 0.2,
    "bn_rv": lambda u, fan_in: 0.5 + 0.5 * (u + 1),
}
_COUNT = "count"  # zero, int64


def state_dict(meta: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{torchvision name: array} of a stored case: its `salt`, `shapes`, `kinds` and `scale`."""
    result = {}
    for name, shape in meta["shapes"].items():
        kind = meta["kinds"][name]
        result[name] = np.zeros(shape, np.int64) if kind == _COUNT else _make(meta["salt"] + name, shape, kind)
        layer, _, leaf = name.rpartition(".")
        if layer in meta["scale"]:  # output layers, scaled so that scores and boxes spread as a trained detector's
            scale = meta["scale"][layer]
            factor = np.float32(scale["weight_factor"])
            result[name] = result[name] * factor if leaf == "weight" else np.array(scale["bias"], np.float32)
    return result


def kinds(shapes: Mapping[str, Any]) -> dict[str, str]:
    """A kind for every weight of a torchvision detector, by its name and those around it."""
    result = {}
    for name, shape in shapes.items():
        layer, _, leaf = name.rpartition(".")
        is_norm = f"{layer}.running_mean" in shapes
        if leaf == "weight" and is_norm:
            result[name] = "bn3_w" if _ends_a_branch(layer, shapes) else "bn_w"
        elif leaf == "weight":
            straight = re.search(r"cls_|bbox_pred|(inner|layer)_blocks|fc2$", layer)
            result[name] = "lin" if straight or len(shape) < 2 else "he"
        else:
            known = {"running_mean": "bn_rm", "running_var": "bn_rv", "num_batches_tracked": _COUNT}
            result[name] = known.get(leaf, "bias")
    return result


def kept(meta: Mapping[str, Any], key: str) -> Any:
    """The index that takes a whole array to the part of it that a stored case has."""
    return tuple(slice(*s) for s in meta["kept"][key]["slice"]) if key in meta["kept"] else ...


def _ends_a_branch(layer: str, shapes: Mapping[str, Any]) -> bool:
    if match := re.fullmatch(r"(.*\.layer\d\.\d+)\.bn(\d)", layer):
        return f"{match[1]}.bn{int(match[2]) + 1}.weight" not in shapes
    if match := re.fullmatch(r"(.*\.block)\.(\d+)\.1", layer):  # MobileNet
        return f"{match[1]}.{int(match[2]) + 1}.0.weight" not in shapes
    return False


def _make(seed: str, shape: list[int], kind: str) -> np.ndarray:
    bits = np.random.PCG64(zlib.crc32(seed.encode())).random_raw(int(np.prod(shape)))
    uniform = 2 * ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape) - 1
    return KINDS[kind](uniform, float(np.prod(shape[1:]))).astype(np.float32)
