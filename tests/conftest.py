"""Before any test imports jax: eight CPU devices, full float32, and a compile cache that survives between runs."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling takes most of the tests' time; what is compiled runs for milliseconds and need not be fast.
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # 0.12 does not know the flag, and ends at it
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"  # which go through MLIR: half of the compiling
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {_FLAGS}"
# One cache for all of pytest-xdist's workers and the commands they start: each compiles what no other has.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
gc.set_threshold(50_000)  # tracing makes many objects that stay: going through them all the time is a tenth of it

import pytest  # noqa: E402 - the environment comes first

DATA = Path(__file__).parent / "data"


@pytest.fixture
def data_dir() -> Path:
    """The small files that tests compare with; tests/data/README.md says where each comes from."""
    return DATA


@pytest.fixture
def tiny_config():
    """The demo, small enough that a training step compiles in seconds: 64-pixel images, a few channels."""
    from experiments.demo import get_config

    config = get_config()
    config.batch_size = config.eval_batch_size = 8
    config.data.shorter, config.data.longest, config.data.buckets = (64,), 64, ((64, 64),)
    config.model.backbone.update(width=4, norm="gn")
    config.model.neck.channels = 8
    config.model.box_head.channels = 16
    config.model.rpn.update(sizes=((8.0,), (16.0,), (32.0,), (64.0,), (128.0,)), samples=16)
    config.model.rpn.update(pre_nms_train=32, post_nms_train=32, pre_nms_test=32, post_nms_test=16)
    config.model.box.update(samples=8, detections=8, canonical_size=32.0)
    return config


@pytest.fixture
def tinier_config(tiny_config):
    """Two stages and three levels, half as long to trace and compile: for what is about runs, not about detectors."""
    tiny_config.model.backbone.blocks = (1, 1)
    tiny_config.model.rpn.update(levels=(2, 3, 4), sizes=((8.0,), (16.0,), (32.0,)))
    tiny_config.model.box.levels = (2, 3)
    return tiny_config


@pytest.fixture
def make_batch():
    """make_batch(n, seed) -> a `Batch` of n 64-pixel noise images with one to three boxes, the first without any."""
    import numpy as np

    from fpn_jax.types import Batch

    def make(n: int, seed: int = 0, size: int = 64) -> Batch:
        rng = np.random.default_rng(seed)
        corners = rng.uniform(0, size * 0.6, (n, 4, 2))
        sides = rng.uniform(size * 0.1, size * 0.4, (n, 4, 2))
        valid = np.arange(4) < rng.integers(1, 4, (n, 1))
        valid[0] = False
        boxes = np.concatenate([corners, corners + sides], -1) * valid[..., None]
        return Batch(
            image=rng.integers(0, 256, (n, size, size, 3), np.uint8),
            size=np.tile(np.array([[size, size - 8]], np.int32), (n, 1)),
            boxes=boxes.astype(np.float32),
            labels=rng.integers(0, 3, (n, 4)).astype(np.int32) * valid,
            valid=valid,
        )

    return make


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory) -> Path:
    """A data_dir with 16 training and 5 validation scenes."""
    from fpn_jax.data import records, scenes

    root = tmp_path_factory.mktemp("data")
    records.write(scenes.builder(root, train=16, val=5))
    return root


@pytest.fixture
def tiny_experiment(tmp_path, tinier_config, scenes_dir) -> Path:
    """The file of a config that trains 12 steps on the tiny scenes."""
    import json

    tinier_config.update(num_steps=12, batch_size=2, eval_batch_size=2, checkpoint_every=4, eval_every=0, pictures=2)
    tinier_config.data.data_dir = str(scenes_dir)
    path, values = tmp_path / "tiny.py", json.dumps(tinier_config.to_dict())
    path.write_text(
        "import json, ml_collections\n"
        f"def get_config():\n    return ml_collections.ConfigDict(json.loads({values!r}))\n"
    )
    return path
