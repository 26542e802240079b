"""What is saved comes back bit for bit, on other devices too; what cannot be saved or read says so in one line."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from fpn_jax.errors import UserError
from fpn_jax.training import sharding
from fpn_jax.training.checkpoint import Checkpoints, claim_workdir, read_config, write_config
from fpn_jax.types import TrainState

ROOT = Path(__file__).parent.parent.parent


def make_state(step=0, width=4, average=True, seed=0):
    params = {"neck": {"kernel": jax.random.normal(jax.random.key(seed), (3, width))}, "head": {"bias": jnp.ones(2)}}
    frozen = {"neck": "trained", "head": "frozen"}
    optimizer = optax.multi_transform({"trained": optax.sgd(0.1, momentum=0.9), "frozen": optax.set_to_zero()}, frozen)
    return TrainState(
        step=jnp.int32(step),
        params=params,
        batch_stats={},
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(lambda x: x + 1, params) if average else {},
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_state_comes_back_bit_for_bit_onto_other_devices(tmp_path):
    with_eight = sharding.put_replicated(sharding.make_mesh(), make_state(step=7))
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.latest_step is None
    assert checkpoints.restore(with_eight) is None
    checkpoints.save(with_eight, {"seed": 3})
    checkpoints.wait()
    two = sharding.make_mesh(jax.devices()[:2])
    like = sharding.put_replicated(two, make_state(seed=9))
    state, position = Checkpoints(str(tmp_path)).restore(like)
    assert_same(state, with_eight)
    assert position == {"seed": 3}
    assert state.params["neck"]["kernel"].sharding.device_set == set(jax.devices()[:2])


def test_the_latest_two_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    for step, ap in ((1, 0.1), (2, 0.5), (3, 0.3)):
        checkpoints.save(make_state(step, seed=step), {})
        best = checkpoints.best_metrics()
        if best is None or ap > best["AP"]:
            checkpoints.save_best(make_state(step, seed=step), {"AP": ap})
    checkpoints.wait()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["2"]
    like = {"params": make_state().params, "batch_stats": {}}
    variables, step = Checkpoints(str(tmp_path)).restore_weights(like, "best")
    assert step == 2
    assert_same(variables["params"], make_state(2, seed=2).ema_params)
    _, step = Checkpoints(str(tmp_path)).restore_weights(like, "latest")
    assert step == 3


def test_the_best_of_a_step_can_be_scored_anew(tmp_path):
    """On other images, or because its scores were deleted."""
    with Checkpoints(str(tmp_path)) as checkpoints:
        for images, ap in (("val", 0.5), ("test", 0.25)):
            checkpoints.save_best(make_state(2), {"AP": ap, "images": images})
            checkpoints.wait()
            assert checkpoints.best_metrics() == {"AP": ap, "images": images}


def test_without_an_average_the_parameters_are_used_and_best_falls_back(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(make_state(1, average=False), {})
    checkpoints.wait()
    variables, step = Checkpoints(str(tmp_path)).restore_weights(
        {"params": make_state().params, "batch_stats": {}}, "best"
    )
    assert step == 1
    assert_same(variables["params"], make_state().params)


def test_another_architecture_is_refused_by_the_names_of_its_weights(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(make_state(1), {})
    checkpoints.wait()
    with pytest.raises(UserError, match=r"params/neck/kernel is \[3, 4\] in the checkpoint and \[3, 5\] in the model"):
        Checkpoints(str(tmp_path)).restore(make_state(width=5))
    wide = {"params": {"neck": make_state().params["neck"], "tail": {"bias": jnp.ones(1)}}, "batch_stats": {}}
    with pytest.raises(UserError, match=r"head/bias is not in the model.*tail/bias is not in the checkpoint"):
        Checkpoints(str(tmp_path)).restore_weights(wide, "latest")


def test_no_checkpoint_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint; train there first"):
        Checkpoints(str(tmp_path)).restore_weights({"params": {}, "batch_stats": {}}, "best")


FULL_DISK = """
import resource, sys
sys.path.insert(0, "tests/training")
from test_checkpoint import Checkpoints, UserError, make_state
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(make_state(1), {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # no file may grow further: as on a full disk
large = make_state(2, width=4000)
large = large.replace(params={f"{i}": large.params["neck"]["kernel"] + i for i in range(50)})
try:
    checkpoints.save(large, {})
    checkpoints.wait()
except UserError as error:
    print(error)
"""


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert "could not be written" in done.stdout, done.stderr
    assert "continues from step 1" in done.stdout
    assert len(done.stdout.splitlines()) == 1 and not done.stderr, done.stderr  # of 50 arrays that cannot be written
    state, _ = Checkpoints(str(tmp_path)).restore(make_state())
    assert_same(state, make_state(1))


def test_a_save_that_fails_is_told_beside_what_ends_the_run(tmp_path, capsys, monkeypatch):
    def fails():
        raise UserError("checkpoints: the checkpoint could not be written")

    with pytest.raises(UserError, match="step 3: the loss"), Checkpoints(str(tmp_path), writes=True) as checkpoints:
        monkeypatch.setattr(checkpoints, "wait", fails)
        raise UserError("step 3: the loss is not finite")
    assert capsys.readouterr().err == "error: checkpoints: the checkpoint could not be written\n"


def test_a_workdir_is_claimed_by_one_process_at_a_time(tmp_path):
    config = ml_collections.ConfigDict({"seed": 3, "data": {"shorter": (1, 2)}})
    hold = (
        "import sys; from fpn_jax.training.checkpoint import claim_workdir;"
        "lock = claim_workdir(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {other.pid}"):
            claim_workdir(str(tmp_path))
        other.kill()
    with claim_workdir(str(tmp_path)):  # a killed process leaves no lock behind
        write_config(str(tmp_path), config)
        assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 3, "data": {"shorter": [1, 2]}}
        assert read_config(str(tmp_path)).data.shorter == [1, 2]


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json; train there first"):
        read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        read_config(str(tmp_path))
