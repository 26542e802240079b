"""What docs/ tells a user to type: it parses, and its keys and flags are there."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from experiments.faster_rcnn_r50_fpn import get_config
from fpn_jax.common import flat_values

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


@pytest.mark.parametrize("script", blocks("bash"), ids=lambda script: script.split("\n")[0][:40])
def test_scripts_parse(script):
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_job_set_starts_the_training_on_every_host_of_the_slice():
    (job_set,) = map(yaml.safe_load, blocks("yaml"))
    (job,) = (replicated["template"]["spec"] for replicated in job_set["spec"]["replicatedJobs"])
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == rows * columns
    assert job["completions"] == job["parallelism"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert pod["restartPolicy"] == "Never"  # Kubernetes takes a podFailurePolicy with no other
    assert container["command"][:3] == ["python", "-m", "fpn_jax.train"]


def test_keys_of_the_config_and_files_are_there():
    keys = flat_values(get_config())
    named = set(re.findall(r"--config\.([\w.]+)", TEXT)) | set(re.findall(r"`((?:data|optim)\.\w+)`", TEXT))
    assert {"data.data_dir", "data.cache_dir", "optim.base_batch_size"} <= named <= keys.keys()
    for path in re.findall(r"(?:experiments|tests)/[\w/]+\.py", TEXT):
        assert (ROOT / path).exists(), path


def test_the_table_of_rates_follows_the_config():
    base = get_config()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| (\d+) \|", TEXT, re.M)
    assert len(rows) == 4
    for batch, rate, steps in rows:
        share = int(batch) / base.optim.base_batch_size
        assert float(rate) == pytest.approx(base.optim.learning_rate * share)
        assert int(steps) == base.num_steps / share
