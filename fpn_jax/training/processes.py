"""The only home of `jax.distributed`: how the processes of a job find each other, and the texts they share."""

import math
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax

from fpn_jax.errors import ProcessLost, UserError

_PLACE = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_SHUTDOWN_SECONDS = 3600  # a process that is done waits so long for rank 0, which may draw and write yet


def start_processes(join_within: float = 300, dead_after: float = 60) -> None:
    """Join the other processes of this job, if there are several; call it before anything touches a device.

    Slurm, Open MPI, GKE and Cloud TPU slices tell each process its place, and jax knows how to ask them. Elsewhere set
    JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which come before all others. A single
    process does nothing. Raises `UserError` if one of the three is missing or no number, or the launcher tells too
    little. A process that waits longer than a few seconds says so, and ends with status 76 if the others have not come
    within `join_within` seconds.

    dead_after: seconds until `fpn_jax.training.peers` gives up a silent process; jax itself waits longer, so that the
    line which names the process comes first.
    """
    if jax.distributed.is_initialized():
        return
    launcher = "given" if any(os.environ.get(name) for name in _PLACE) else _launcher()
    if launcher is None:
        return
    place: dict[str, Any] = {}
    if launcher == "given":
        # Deactivated: else jax under Slurm would leave each process a single GPU, whoever gave these.
        place, how = _given_place(), {"cluster_detection_method": "deactivate"}
    elif launcher == "slurm":
        how = {"cluster_detection_method": "slurm", "local_device_ids": _slurm_gpus()}
    else:
        how = {}
    try:
        with _Waiting(_awaited(**place), join_within):
            jax.distributed.initialize(
                **place,
                **how,
                initialization_timeout=math.ceil(join_within) + 30,  # jax's own end is a stack trace: ours comes first
                heartbeat_timeout_seconds=math.ceil(2 * dead_after) + 40,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )
    except ValueError as error:  # no coordinator: a TPU without neighbours, or a launcher that jax cannot ask
        if launcher != "tpu" or "coordinator_address" not in str(error):
            raise UserError(
                f"this is one of several processes of {launcher}, but jax cannot tell which ({error}); set "
                f"{', '.join(_PLACE)}"
            ) from None


def _given_place() -> dict[str, Any]:
    given = [os.environ.get(name) for name in _PLACE]
    if not all(given):
        missing = [name for name, value in zip(_PLACE, given, strict=True) if not value]
        raise UserError(f"{missing[0]} is not set; a process of several needs {', '.join(_PLACE)}")
    if not (given[1].isdigit() and given[2].isdigit() and int(given[2]) < int(given[1])):
        raise UserError(f"JAX_PROCESS_ID={given[2]} must be a number from 0 below JAX_NUM_PROCESSES={given[1]}")
    return {"coordinator_address": given[0], "num_processes": int(given[1]), "process_id": int(given[2])}


def _awaited(coordinator_address: str = "", num_processes: int = 0, process_id: int = 0) -> str:
    if not coordinator_address:
        return "this process waits for the others of its job, whose places the cluster tells"
    if process_id:
        return (
            f"rank {process_id} of {num_processes} waits for rank 0 at {coordinator_address}, and that for all others"
        )
    others = "rank 1" if num_processes == 2 else f"ranks 1 to {num_processes - 1}"
    return f"rank 0 of {num_processes} waits at {coordinator_address} for {others}"


class _Waiting:
    """Says what is waited for if that takes longer than seconds, and ends the process if it takes too long.

    From a thread: the call that waits comes back neither with an error nor on Ctrl-C.
    """

    def __init__(self, what: str, limit: float):
        self._what, self._limit = what, limit
        self._over = threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *_: Any) -> None:
        self._over.set()

    def _watch(self) -> None:
        patience = min(5.0, self._limit / 2)
        if self._over.wait(patience):
            return
        print(f"{self._what}; at most {self._limit:.0f} s", file=sys.stderr, flush=True)
        if self._over.wait(self._limit - patience):
            return
        line = f"error: {self._what}; they have not come within {self._limit:.0f} s (config.join_within): see whether "
        print(f"{line}all were started and reach that address, and start all anew", file=sys.stderr, flush=True)
        os._exit(ProcessLost.status)


class KeyValues:
    """Short texts that all processes of a job can write and read at any time, whatever else each of them does.

    The store of jax's coordination service, which lives in rank 0 and has no public interface: this class is the only
    one that knows of it. Methods raise `OSError` if rank 0 does not answer.
    """

    def __init__(self, state: Any):
        self._client = state.client
        self.rank: int = state.process_id
        self.world: int = state.num_processes
        self.address: str = state.coordinator_address  # HOST:PORT of rank 0

    def write(self, key: str, value: str) -> None:
        """Set a key, in place of what was there."""
        self._call(lambda: self._client.key_value_set(key, value, allow_overwrite=True))

    def below(self, folder: str) -> dict[str, str]:
        """{key: value} of all keys FOLDER/..., by what comes after the slash."""
        pairs = self._call(lambda: self._client.key_value_dir_get(f"{folder}/"))
        return {key.removeprefix(f"{folder}/"): value for key, value in pairs}

    @staticmethod
    def _call(request: Callable[[], Any]) -> Any:
        try:
            return request()
        except (RuntimeError, ValueError) as error:
            raise OSError(str(error)) from error


def key_values() -> KeyValues | None:
    """The store of this job, None for a process that is alone. Touches no device."""
    from jax._src.distributed import global_state

    return KeyValues(global_state) if jax.distributed.is_initialized() and global_state.num_processes > 1 else None


def _launcher() -> str | None:
    """Who has started several processes of which this is one; None if nobody has.

    A TPU counts, too: only its metadata server knows whether there are others, and jax asks it.
    """
    several = {
        "slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),  # of srun; a bare sbatch script is one process
        "ompi": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    }
    for launcher, (count, place) in several.items():
        if int(os.environ.get(count) or 1) > 1 and place in os.environ:
            return launcher
    # jax sets the first on importing where it finds TPU chips; the others are GKE's.
    if {"TPU_ML_PLATFORM", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & os.environ.keys():
        return "tpu"
    # An indexed Kubernetes job; its size is known to jax alone, which asks the cluster if it may (pip: jax[k8s]).
    return "k8s" if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys() else None


def _slurm_gpus() -> list[int] | None:
    """The GPUs of this task, as numbers among those it sees; None: as jax has it, one for each task of a node.

    jax takes one GPU per task even where a node has one task, whose other GPUs would lie idle.
    """
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    tasks = _tasks_of_this_node()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("ROCR_VISIBLE_DEVICES")
    gpus = len(visible.split(",")) if visible else int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    # Fewer than tasks: those that a task sees are its own (--gpus-per-task).
    return list(range(gpus)) if gpus and (tasks == 1 or (visible and gpus < tasks)) else None


def _tasks_of_this_node() -> int:
    """From SLURM_STEP_TASKS_PER_NODE, which says "2(x3),1" for three nodes of two tasks and one of one."""
    counts: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID") or 0)
    return counts[node] if node < len(counts) else counts[-1]
