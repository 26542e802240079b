"""How a process finds the others of its job, from the environment that Slurm, Open MPI, GKE and Cloud TPU give it."""

import os
import re
import socket
import subprocess
import sys

import pytest

from fpn_jax.training import processes

_TELL = """
import jax
from fpn_jax.training import processes, sharding
processes.start_processes()
print(*sharding.process(), jax.device_count(), jax.config._read('jax_cuda_visible_devices'))
"""
_LAUNCHERS = ("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM", "JAX_PROCESS", "TPU_", "KUBERNETES_", "JOB_COMPLETION")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def clean():
    return {k: v for k, v in os.environ.items() if not k.startswith((*_LAUNCHERS, "XLA_FLAGS", "CUDA_"))}


def together(*places):
    """What each of the processes started with these environments says."""
    start = [sys.executable, "-c", _TELL]
    running = [subprocess.Popen(start, env=clean() | place, stdout=-1, stderr=-1, text=True) for place in places]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * len(places), outputs
    return [output.strip() for output, _ in outputs]


def slurm(rank, port, **more):
    """What srun sets on two nodes with one task each, the first of which is this machine."""
    return {
        "SLURM_JOB_ID": "1234",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost,other",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
        "JAX_COORDINATOR_PORT": port,
    } | more


def test_two_tasks_of_srun_are_one_job_with_all_gpus_of_their_nodes():
    port = free_port()
    found = together(*(slurm(rank, port, SLURM_GPUS_ON_NODE="4") for rank in range(2)))
    assert found == ["0 2 2 0,1,2,3", "1 2 2 0,1,2,3"]


def test_the_three_variables_come_before_slurm_and_leave_the_gpus_alone():
    port = free_port()
    three = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    assert together(slurm(1, port) | three) == ["0 1 1 all"]


def test_a_script_of_sbatch_without_srun_is_one_process():
    alone = {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert together(alone) == ["0 1 1 all"]


@pytest.fixture
def nothing(monkeypatch):
    for name in [name for name in os.environ if name.startswith((*_LAUNCHERS, "CUDA_"))]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "a"}, None),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "a"}, "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "ompi"),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        ({"TPU_ML_PLATFORM": "JAX"}, "tpu"),  # as jax leaves it on a Cloud TPU VM, where nothing else is set
        ({"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}, "tpu"),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "t-0.svc"}, "tpu"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
    ],
)
def test_who_started_several(nothing, monkeypatch, environment, launcher):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes._launcher() == launcher


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "8"}, list(range(8))),
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "CUDA_VISIBLE_DEVICES": "4,5"}, [0, 1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, None),  # one each
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "3"}, [0]),  # --gpus-per-task=1
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "2"}, [0, 1]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "2"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "4"}, None),  # no GPUs
        ({"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "8", "JAX_LOCAL_DEVICE_IDS": "1,2"}, None),
    ],
)
def test_the_gpus_of_a_task(nothing, monkeypatch, environment, gpus):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes._slurm_gpus() == gpus


def test_a_launcher_that_jax_cannot_ask_is_an_error_and_not_many_single_runs():
    """Open MPI from 5 on does not set what jax reads."""
    environment = clean() | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    run = subprocess.run([sys.executable, "-c", _TELL], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert re.search(r"UserError: this is one of several processes of ompi.*set JAX_COORDINATOR_ADDRESS, JAX_NUM", last)
