"""Imports point down only, and what rots lives in one file each. To move a wall, change the tables and say why."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    p for folder in ("fpn_jax", "experiments", "benchmarks", "tests") for p in sorted((ROOT / folder).rglob("*.py"))
]

# Room: (rooms of fpn_jax that it may import besides itself, packages that it may not).
DEVICE = {"jax", "flax", "optax", "orbax"}
READING = {"tensorflow_datasets", "grain", "cv2"}
ROOMS = {
    "errors": (set(), DEVICE | READING | {"ml_collections"}),
    "storage": ({"errors"}, DEVICE | READING | {"ml_collections"}),
    "types": ({"errors"}, {"optax", "orbax", "ml_collections"} | READING),
    "ops": ({"errors", "types"}, {"flax", "optax", "orbax", "ml_collections"} | READING),
    "data": ({"errors", "storage"}, DEVICE | {"ml_collections"}),
    "models": ({"errors", "types", "ops"}, {"optax", "orbax"} | READING),
    "training": ({"errors", "storage", "types", "ops", "models"}, READING),
    "planning": ({"errors", "types", "ops", "models", "training"}, {"orbax"} | READING),
    "weights": ({"errors", "types", "ops", "models"}, {"optax", "orbax"} | READING),
    "evaluation": ({"errors", "storage", "types", "ops", "data"}, DEVICE | {"ml_collections"}),
    "recall": ({"errors", "types", "ops", "data", "evaluation"}, DEVICE | {"ml_collections"}),
    "analysis": ({"errors", "storage", "types", "ops", "data", "evaluation", "recall"}, DEVICE | {"ml_collections"}),
    "visualize": ({"errors", "storage", "types", "ops", "data"}, DEVICE | {"ml_collections"}),
    "reporting": ({"errors", "storage"}, DEVICE | READING | {"ml_collections"}),
}
# Everything else in fpn_jax (cli, common, train, evaluate, ...) and benchmarks: the entry floor, imports anything.

PEERS = [f"benchmarks/{x}.py" for x in ("theirs", "theirs_input", "parity/theirs", "parity/run")]
PEERS += ["tests/weights/test_live.py"]

# Packages that only these files may import. Tests may, too, except for what is banned there.
PACKAGES = {
    "orbax": ["fpn_jax/training/checkpoint.py"],
    "tensorflow_datasets": [f"fpn_jax/data/{x}.py" for x in ("datasets", "records", "scenes", "coco", "coco_files")],
    "etils": ["fpn_jax/storage/paths.py"],
    "fsspec": ["fpn_jax/storage/paths.py"],
    "gcsfs": ["fpn_jax/storage/paths.py"],
    "google": [f"fpn_jax/storage/{x}.py" for x in ("paths", "claim")],
    "grain": ["fpn_jax/data/pipeline.py"],
    "hotcoco": [f"fpn_jax/{x}.py" for x in ("evaluation", "recall", "analysis")],
    "tensorboardX": ["fpn_jax/training/logs.py"],
    "pycocotools": ["benchmarks/evaluation.py"],
    "tensorflow": [],
    "safetensors": ["fpn_jax/weights/files.py"],
    "PIL": ["fpn_jax/data/transforms.py", "benchmarks/theirs_input.py"],
    # Never required: torch's files are read with it where it is installed, and it is what we are compared with.
    "torch": ["fpn_jax/weights/files.py", *PEERS],
    "torchvision": PEERS,
}
BANNED_IN_TESTS = {"tensorflow", "torch", "torchvision"}
# Names that only one file may import or mention, however they are reached.
SHARDING, PROCESSES = "fpn_jax/training/sharding.py", "fpn_jax/training/processes.py"
NAMES = dict.fromkeys(("Mesh", "PartitionSpec", "NamedSharding", "multihost_utils", "pmap", "pjit"), SHARDING)
NAMES["distributed"] = PROCESSES


def imports(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that is imported anywhere in the file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = path.removesuffix(".py").split("/")[: -node.level] if node.level else []
            module = ".".join([*here, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def mentions(tree: ast.AST, path: str) -> set[tuple[int, str]]:
    """(line, name) of everything imported and of every name or attribute."""
    found = {(line, part) for line, name in imports(tree, path) for part in name.split(".")}
    found |= {(node.lineno, node.attr) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found | {(node.lineno, node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)}


def begins(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def violations(path: str, source: str) -> list[str]:
    """What breaks the tables in the file at `path`, relative to the root of the repository."""
    tree = ast.parse(source)
    folder, _, rest = path.partition("/")
    room = rest.split("/")[0].removesuffix(".py") if folder == "fpn_jax" else None
    allowed, forbidden = ROOMS.get(room, (None, set()))
    found = []
    for line, name in imports(tree, path):
        target = [*name.split("."), ""][1] if begins(name, "fpn_jax") else None
        if target and allowed is not None and target not in allowed | {room}:
            found.append(f"{path}:{line}: {room} must not import {name}")
        if any(begins(name, package) for package in forbidden):
            found.append(f"{path}:{line}: {room} must not import {name}")
        if folder == "experiments" and name.split(".")[0] not in ("ml_collections", "experiments", "typing"):
            found.append(f"{path}:{line}: experiments import each other and ml_collections, not {name}")
        for package, homes in PACKAGES.items():
            at_home = path in homes
            if begins(name, package) and not at_home and (folder != "tests" or package in BANNED_IN_TESTS):
                found.append(f"{path}:{line}: {name} belongs in {' '.join(homes) or 'no file'}")
    if folder != "tests":
        named = [(line, x, NAMES[x]) for line, x in sorted(mentions(tree, path)) if x in NAMES]
        found += [f"{path}:{line}: {x} belongs in {home}" for line, x, home in named if path != home]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_and_stay_at_home(path):
    assert not violations(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


def test_the_rooms_are_there():
    paths = [str(path.relative_to(ROOT)) for path in SOURCES]
    for room in ROOMS:
        assert any(fnmatch(path, f"fpn_jax/{room}.py") or fnmatch(path, f"fpn_jax/{room}/*") for path in paths), room


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("fpn_jax/ops/nms.py", "import flax.linen as nn", "ops must not import flax.linen"),
        ("fpn_jax/ops/nms.py", "from fpn_jax.models.layers import Conv", "ops must not import fpn_jax.models"),
        ("fpn_jax/ops/nms.py", "from ..data import decode", "ops must not import fpn_jax.data.decode"),
        ("fpn_jax/ops/__init__.py", "from fpn_jax import training", "ops must not import fpn_jax.training"),
        ("fpn_jax/data/decode.py", "def f():\n    import jax.numpy", "decode.py:2: data must not import jax.numpy"),
        ("fpn_jax/data/decode.py", "from fpn_jax.types import Batch", "data must not import fpn_jax.types"),
        ("fpn_jax/models/heads/rpn.py", "import optax", "models must not import optax"),
        ("fpn_jax/models/heads/rpn.py", "from fpn_jax.data import decode", "models must not import fpn_jax.data"),
        ("fpn_jax/models/heads/rpn.py", "from fpn_jax import cli", "models must not import fpn_jax.cli"),
        ("fpn_jax/training/step.py", "from fpn_jax.evaluation import write", "training must not import fpn_jax.eval"),
        ("fpn_jax/training/step.py", "import orbax.checkpoint", "belongs in fpn_jax/training/checkpoint.py"),
        ("fpn_jax/training/step.py", "from jax.sharding import Mesh as M", "Mesh belongs in fpn_jax/training/sharding"),
        ("fpn_jax/train.py", "import jax\njax.distributed.initialize()", "train.py:2: distributed belongs in"),
        ("fpn_jax/train.py", "import jax\nx: jax.NamedSharding", "train.py:2: NamedSharding belongs in"),
        ("fpn_jax/train.py", "import jax\njax.pmap(f)", "pmap belongs in"),
        ("fpn_jax/evaluation.py", "from fpn_jax.models import FPN", "evaluation must not import fpn_jax.models"),
        ("fpn_jax/data/batching.py", "import tensorflow_datasets as tfds", "belongs in fpn_jax/data/datasets.py"),
        ("fpn_jax/prepare.py", "import tensorflow as tf", "tensorflow belongs in no file"),
        ("tests/test_a.py", "import torch", "torch belongs in fpn_jax/weights/files.py"),
        ("experiments/demo.py", "from fpn_jax.models import FPN", "experiments import each other and ml_collections"),
        ("experiments/demo.py", "import os", "ml_collections, not os"),
    ],
)
def test_a_planted_violation_is_caught(path, source, message):
    assert message in "\n".join(violations(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("fpn_jax/ops/nms.py", "import jax.numpy as jnp\nfrom fpn_jax.ops import boxes\nfrom .boxes import iou"),
        ("fpn_jax/data/datasets.py", "import tensorflow_datasets as tfds\nfrom fpn_jax.errors import UserError"),
        ("fpn_jax/data/pipeline.py", "import grain\nfrom fpn_jax.data import decode"),
        ("fpn_jax/training/sharding.py", "import jax\nfrom jax.sharding import Mesh"),
        ("fpn_jax/training/processes.py", "import jax\njax.distributed.initialize()"),
        ("fpn_jax/train.py", "from fpn_jax import training, cli, evaluation\nmesh = training.sharding.make_mesh()"),
        ("experiments/demo.py", "import ml_collections\nfrom experiments.base import get_config"),
        ("tests/test_a.py", "from jax.sharding import Mesh\nimport pycocotools, orbax.checkpoint"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert violations(path, source) == []
