"""Runs and data on gs://, against a stand-in that speaks the protocol to the real gcsfs, tensorstore and orbax."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from launching import environment

from fpn_jax import common
from fpn_jax.data import proposals
from fpn_jax.data.proposals import ProposalTable
from fpn_jax.errors import UserError
from fpn_jax.propose import open_proposals
from fpn_jax.storage import claim, mirror, paths, spool
from fpn_jax.training import checkpoint
from fpn_jax.weights import files

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def cloud():
    """The address of an empty bucket's server; this process and those it starts find it at gs://bucket."""
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fake_gcs.py"), "bucket"], stdout=subprocess.PIPE, text=True
    )
    url = server.stdout.readline().strip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for a bucket's kind by gRPC
        yield url
    server.terminate()
    server.wait()
    server.stdout.close()


def train(config, workdir, cache, *changes):
    command = [sys.executable, "-m", "fpn_jax.train", f"--config={config}", f"--workdir={workdir}"]
    command += ["--config.data.data_dir=gs://bucket/data", f"--config.data.cache_dir={cache}", *changes]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def lines(workdir):
    return [json.loads(line) for line in paths.path(f"{workdir}/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_in_the_cloud_is_killed_resumed_and_scored(cloud, tiny_experiment, scenes_dir, tmp_path):
    paths.filesystem().put(f"{scenes_dir}/scenes", "gs://bucket/data/", recursive=True)
    workdir, cache = "gs://bucket/deep/run", tmp_path / "cache"
    many = ["--config.num_steps=2000", "--config.checkpoint_every=10"]
    victim = train(tiny_experiment, workdir, cache, *many)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and victim.poll() is None:
        if len(list(paths.path(f"{workdir}/checkpoints").glob("*/commit_success.txt"))) >= 2:
            break
        time.sleep(0.1)
    assert paths.path(f"{workdir}/lock").exists()
    victim.send_signal(signal.SIGKILL)
    _, errors = victim.communicate()
    assert victim.returncode == -signal.SIGKILL, errors
    assert errors.count("copying ") == 2, errors  # the two splits
    whole = [int(file.parent.name) for file in paths.path(f"{workdir}/checkpoints").glob("*/commit_success.txt")]
    saved = max(whole)
    assert {row["step"] for row in lines(workdir)} >= set(range(1, saved + 1))  # no checkpoint without its log

    total = saved + 6
    again = train(tiny_experiment, workdir, cache, f"--config.num_steps={total}", many[1])
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert f"continuing at step {saved}" in errors and "copying" not in errors
    assert [row["step"] for row in lines(workdir) if "loss" in row] == list(range(1, total + 1))
    assert len(list(paths.path(f"{workdir}/tensorboard").iterdir())) == 2
    assert not paths.path(f"{workdir}/lock").exists()
    for name in ("curves.png", "eval/val/overview.jpg", "config.json", "classes.json"):
        assert paths.path(f"{workdir}/{name}").stat().length > 0

    scores = json.loads(paths.path(f"{workdir}/metrics.json").read_text())
    command = [sys.executable, "-m", "fpn_jax.evaluate", f"--workdir={workdir}", "--pictures=0"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(paths.path(f"{workdir}/eval/val/metrics.json").read_text()) == scores


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in {"RENEWED": 0.1, "STALE": 0.6, "_POLL": 0.05}.items():
        monkeypatch.setattr(claim, name, seconds)


def test_a_claim_holds_while_it_is_renewed_and_is_given_free(cloud, quick, capsys, monkeypatch):
    monkeypatch.setattr(claim, "STALE", 30.0)  # who sees it renewed does not wait so long
    with claim.RemoteClaim("gs://bucket/a") as held:
        start = time.monotonic()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} of"):
            checkpoint.claim_workdir("gs://bucket/a")
        assert time.monotonic() - start < 15
        claim.check_held("gs://bucket/a/")
        held.close()
        assert not paths.path("gs://bucket/a/lock").exists()
        claim.RemoteClaim("gs://bucket/a").close()
    assert "waiting up to" in capsys.readouterr().err


def test_a_claim_that_nobody_renews_is_taken_over_and_its_holder_told(cloud, quick, monkeypatch):
    first = claim.RemoteClaim("gs://bucket/b")
    with monkeypatch.context() as broken:
        broken.setattr(first, "_write", lambda generation: generation)  # nothing arrives
        time.sleep(0.2)
        start = time.monotonic()
        second = claim.RemoteClaim("gs://bucket/b")
        assert time.monotonic() - start >= claim.STALE
    time.sleep(0.5)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} of .* ends here"):
        claim.check_held("gs://bucket/b")
    second.close()


def test_a_process_that_lost_its_claim_may_not_write(cloud, quick):
    first = claim.RemoteClaim("gs://bucket/c")
    paths.path("gs://bucket/c/lock").write_text(json.dumps({"host": "other", "pid": 7}))
    time.sleep(0.5)
    with pytest.raises(UserError, match=r"in use by process 7 of other.*ends here"):
        claim.check_held("gs://bucket/c")
    first.close()
    assert paths.path("gs://bucket/c/lock").exists()  # the other's


def test_the_claim_of_a_process_that_was_killed_here_is_taken_at_once(cloud):
    code = "from fpn_jax.storage.claim import RemoteClaim as C; C('gs://bucket/d'); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stdin=-1, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    start = time.monotonic()
    claim.RemoteClaim("gs://bucket/d").close()
    assert time.monotonic() - start < 2


def test_a_mirror_copies_once_and_anew_what_changed(cloud, tmp_path, capfd, monkeypatch):
    folder = paths.path("gs://bucket/mirrored")
    for name, text in {"a.json": "1", "b.bin": "22", "c.txt": "not wanted"}.items():
        (folder / name).write_text(text)

    def copy():
        return mirror.mirror(folder, lambda name: not name.endswith(".txt"), str(tmp_path))

    with ThreadPoolExecutor(2) as pool:  # as two processes of a machine that start together
        local, _ = pool.map(lambda _: copy(), range(2))
    assert capfd.readouterr().err.count("copying 2 files") == 1
    assert sorted(file.name for file in local.iterdir() if file.name[0] != ".") == ["a.json", "b.bin"]
    (local / "derived.npz").write_text("of b.bin")
    (local / ".b.bin.part").write_text("of a copy that was killed")
    (local / "deeper").mkdir()  # of a folder below that is mirrored, too
    copy()
    assert capfd.readouterr().err == "" and (local / "derived.npz").exists()
    (folder / "b.bin").write_text("23")  # as long as before
    copy()
    assert "copying 1 files" in capfd.readouterr().err
    assert (local / "b.bin").read_text() == "23" and not (local / "derived.npz").exists()
    assert (local / "deeper").is_dir()
    (local / "a.json").unlink()
    monkeypatch.setattr(mirror, "_SPARE", 1 << 60)
    with pytest.raises(UserError, match=r"do not fit into .*config\.data\.cache_dir"):
        copy()
    with pytest.raises(UserError, match="no such file"):
        mirror.fetched("gs://bucket/mirrored/nothing.npz", str(tmp_path))


def test_weights_and_proposals_go_where_the_data_goes(cloud, tmp_path):
    arrays = {"a": np.arange(3, dtype=np.float32)}
    files.write_arrays(tmp_path / "w.pth", arrays)
    table = ProposalTable.from_lists([7], [np.float32([[0, 0, 8, 8]])], [np.float32([0.5])], "p.npz")
    proposals.write(tmp_path / "p.npz", table, {7: (16, 16)})
    for name in ("w.pth", "p.npz"):
        paths.filesystem().put(str(tmp_path / name), f"gs://bucket/given/{name}")
    cache = tmp_path / "cache"
    assert common.read_weights("gs://bucket/given/w.pth", str(cache))["a"].tolist() == [0, 1, 2]
    assert open_proposals("gs://bucket/given/p.npz", None, 10, str(cache)).image_id.tolist() == [7]
    assert sorted(file.name for file in cache.rglob("*.[np]*") if file.name[0] != ".") == ["p.npz", "w.pth"]


def test_a_spool_goes_on_with_what_is_there_and_loses_nothing(cloud, monkeypatch):
    monkeypatch.setattr(spool, "SECONDS", 0.1)
    target = paths.path("gs://bucket/spooled")
    (target / "log").write_text("1\n")
    grows = spool.Spool("gs://bucket/spooled")
    grows.fetch("log")
    grows.fetch("nothing")
    with open(grows.folder / "log", "a") as file:
        file.write("2\n")
        file.flush()
        deadline = time.monotonic() + 5
        while (target / "log").read_text() != "1\n2\n" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (target / "log").read_text() == "1\n2\n"  # by the thread
        file.write("3\n")
    grows.close()
    assert (target / "log").read_text() == "1\n2\n3\n"
    assert not grows.folder.exists()


def test_what_a_user_can_mend_is_one_line(cloud, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"gs://nothing: there is no such bucket.*buckets create gs://nothing"):
        paths.path("gs://nothing/run")
    with pytest.raises(UserError, match=r"s3://bucket/run: folders are paths of this machine or gs://"):
        paths.path("s3://bucket/run")
    with pytest.raises(UserError, match=r"there is no bucket in it"):
        paths.path("gs:///run")
    try:
        urllib.request.urlopen(f"{cloud}/refuse?status=401").close()
        with pytest.raises(UserError, match=r"Anonymous caller .*gcloud auth application-default login"):
            paths.path("gs://private/run")
        urllib.request.urlopen(f"{cloud}/refuse?status=403").close()
        with pytest.raises(UserError, match=r"a\.json: cannot be written .*storage\.objectUser"):
            paths.write_atomically("gs://bucket/a.json", lambda file: file.write("1"))
    finally:
        urllib.request.urlopen(f"{cloud}/refuse?status=0").close()
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gcsfs, which is not installed; pip install -e \"\.\[gcs\]\""):
        paths.filesystem()
