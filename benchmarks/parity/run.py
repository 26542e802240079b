"""How far our detectors are from torchvision's with the same weights, stage by stage: the README's table.

    python -m benchmarks.parity.run [--models=fasterrcnn_resnet50_fpn,...] [--shorter=256] [--output=parity.json]

Both sides run here, in float32 on the CPU, on the same two images of structured noise, with weights made by rule
(there is nothing to download) and all layers trained. Needs torch and torchvision beside this project's requirements.
"""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import torchvision

from benchmarks.parity import cases, compare, ours, theirs, weights
from fpn_jax import cli
from fpn_jax.data.pipeline import PipelineOptions, image_batch
from fpn_jax.data.transforms import resize_boxes
from fpn_jax.errors import UserError
from fpn_jax.evaluation import to_original
from fpn_jax.models import build_detector
from fpn_jax.training.state import init_variables
from fpn_jax.weights import loader, names

_MODELS = cli.flag("models", list, list(theirs.MODELS), "Which models to compare.")
_SHORTER = cli.flag("shorter", int, 256, "Pixels of the shorter side; the longest is 5/3 of it.")
_STORE = cli.flag("store", str, None, "Folder for torchvision's results, small enough for tests/data/parity.")
_OUTPUT = cli.flag("output", str, None, "JSON file for the figures.")
_TRAIN = cli.flag("train", bool, True, "Also compare the training pass.")

COLUMNS = {
    "maps": "C and P maps",
    "rpn": "RPN outputs",
    "roi": "RoI features, class logits, deltas",
    "proposals": "proposals unmatched",
    "detections": "detections unmatched",
    "themselves": "theirs in float64",
    "boxes": "boxes, px",
    "scores": "scores",
    "losses": "losses",
    "rois": "sampled RoIs unmatched",
    "gradients": "gradients, L2",
}


def run(name: str, shorter: int, train: bool, folder: str | None = None) -> dict[str, float]:
    """The row of one model; torchvision's results are kept in `folder` if one is given, see `store`."""
    longest = shorter * 5 // 3
    pictures, boxes, labels = cases.images()
    model, case = theirs.build(name, shorter, longest, pictures)
    config = cases.config_for(case, shorter, longest)
    detector = build_detector(config.model, cases.SLOTS - 1)
    shapes = jax.eval_shape(lambda: init_variables(detector, (64, 64), 0))
    arrays = weights.state_dict(case)
    variables = loader.load(shapes, arrays, name, config.model.box.pooled_size).variables
    rois = [np.concatenate([b, b * 0.7 + 5, [[0, 0, 600, 600], [3, 3, 3.5, 4]]]).astype(np.float32) for b in boxes]
    levels = list(config.model.rpn.levels)
    expected = theirs.inference(model, pictures, rois, levels)

    if folder:
        store(Path(folder), case | {"shorter": shorter, "longest": longest}, expected, rois)

    options = PipelineOptions((shorter,), longest, (expected["batch"].shape[2:],), pixels="float32")
    host = image_batch(pictures, options)
    device = ours.inference(detector)(variables, host["image"], host["size"], np.stack(rois))
    found = ours.unpadded(detector, device)
    for key in ("roi/align_fixed", "roi/class_logits_fixed", "roi/box_deltas_fixed"):
        found[key] = np.concatenate(list(found[key]))
    row = {
        "maps": compare.largest(found, expected, [k for k in expected if k.startswith(("body", "fpn"))]),
        "rpn": compare.largest(found, expected, [k for k in expected if k.startswith(("rpn/obj", "rpn/delta"))]),
        "roi": compare.largest(found, expected, [k for k in expected if k.startswith("roi/")]),
    }
    proposals, detections = [], []
    for i in range(len(pictures)):
        none = np.zeros(len(found[f"rpn/proposals{i}"])), np.zeros(len(expected[f"rpn/proposals{i}"]))
        both = (found[f"rpn/proposals{i}"], none[0]), (expected[f"rpn/proposals{i}"], none[1])
        proposals.append(compare.match_boxes(*both))
        original = to_original(found[f"out/boxes{i}"], host["size"][i], host["original_size"][i])
        mine = original, found[f"out/scores{i}"], found[f"out/labels{i}"]
        detections.append(
            compare.match_boxes(mine, tuple(expected[f"out/{k}{i}"] for k in ("boxes", "scores", "labels")), score=3e-4)
        )
    row |= {
        "proposals": sum(x.unmatched for x in proposals),
        "proposals_of": sum(x.pairs for x in proposals),
        "detections": sum(x.unmatched for x in detections),
        "detections_of": sum(x.pairs for x in detections),
        "boxes": max(x.boxes for x in detections),
        "scores": max(x.scores for x in detections),
    }
    # How much of it is rounding: torchvision's own detections in float64 against those in float32.
    exact = theirs.inference(model.double(), pictures, rois, levels)
    model.float()
    own = [
        compare.match_boxes(
            *(tuple(x[f"out/{k}{i}"] for k in ("boxes", "scores", "labels")) for x in (expected, exact))
        )
        for i in range(len(pictures))
    ]
    row |= {"themselves": sum(x.unmatched for x in own), "themselves_of": sum(x.pairs for x in own)}
    if train:
        row |= _training_row(detector, variables, case, model, host, pictures, boxes, labels)
    return row


def _training_row(detector, variables, case, model, host, pictures, boxes, labels) -> dict[str, float]:
    expected = theirs.training(model, pictures, boxes, labels)
    moved = [
        resize_boxes(b, tuple(o), tuple(s)) for b, o, s in zip(boxes, host["original_size"], host["size"], strict=True)
    ]
    batch = ours.batch_of(host["image"], host["size"], moved, [x - 1 for x in labels])
    format = names.recognise(case["shapes"], case["arch"])
    found = ours.trained(detector, *ours.training(detector)(variables, batch), format)
    unmatched = 0
    for i in range(len(pictures)):
        sides = [(x[f"train/roi_boxes{i}"], np.zeros(len(x[f"train/roi_boxes{i}"]))) for x in (found, expected)]
        unmatched += compare.match_boxes(*sides).unmatched
    grads = [key for key in expected if key.startswith("grad/")]
    return {
        "losses": compare.largest(found, expected, ours.LOSSES.values()),
        "rois": unmatched,
        "gradients": max(
            float(np.linalg.norm(found[key] - expected[key]) / max(np.linalg.norm(expected[key]), 1e-30))
            for key in grads
        ),
    }


def store(folder: Path, case: dict[str, Any], expected: dict[str, np.ndarray], rois: list[np.ndarray]) -> None:
    """What a test without torchvision compares with: of every map its channels' means and deviations."""
    kept = {key: x for key, x in expected.items() if key.startswith(("out/", "rpn/proposals", "roi/class", "roi/box"))}
    for key, x in expected.items():
        if key.startswith(("body/", "fpn/")):
            kept |= {f"{key}.mean": x.mean((2, 3)), f"{key}.std": x.std((2, 3))}
    kept |= {"rois": np.stack(rois), "hw": np.array(expected["batch"].shape[2:])}
    name = case["arch"]
    np.savez_compressed(folder / f"{name}.npz", **kept)
    case["versions"] = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    (folder / f"{name}.json").write_text(json.dumps(case, separators=(",", ":")) + "\n")


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown."""

    def cell(row: dict[str, float], key: str) -> str:
        if key not in row:
            return "-"
        if f"{key}_of" in row:
            return f"{row[key]} of {row[f'{key}_of']}"
        return str(row[key]) if isinstance(row[key], int) else f"{row[key]:.1e}"

    lines = [f"| model | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell(row, key) for key in COLUMNS)} |" for name, row in rows.items()]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Entry point."""
    del argv
    unknown = set(_MODELS.value) - set(theirs.MODELS)
    if unknown:
        raise UserError(f"--models: there is no {', '.join(sorted(unknown))}; choose of {', '.join(theirs.MODELS)}")
    jax.config.update("jax_platforms", "cpu")
    versions = {"jax": jax.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    where = f"{platform.machine()}, {', '.join(f'{k} {v}' for k, v in versions.items())}, shorter side {_SHORTER.value}"
    rows = {}
    for name in _MODELS.value:
        rows[name] = run(name, _SHORTER.value, _TRAIN.value, _STORE.value)
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
    print(f"\n{table(rows)}\n\n{where}")
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps({"where": where, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
