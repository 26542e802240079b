"""Before the first step: all processes make sure that they do the same, and each says what it is."""

import importlib.metadata
import itertools
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fpn_jax
from fpn_jax.errors import ProcessLost, UserError
from fpn_jax.training import processes, sharding

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_calls, _announcements = itertools.count(), itertools.count()


def agree(what: str, facts: Mapping[str, Any], within: float) -> None:
    """Return once all processes have called this with equal facts {what: value}.

    Nothing is computed for it, so programs that differ cannot wait for each other for ever. Values are compared by
    their `str`. Raises the same `UserError` on all processes where a fact differs, naming ranks and values, and
    `ProcessLost` naming the ranks that have not called it `within` seconds. Every process must call this equally often.
    """
    call, store = next(_calls), processes.key_values()
    if store is None:
        return
    folder, limit = f"fpn_jax/facts/{call}", time.monotonic() + within
    mine = json.dumps({name: str(value) for name, value in facts.items()})
    again = "see what it says, and start the same command on all"
    try:
        store.write(f"{folder}/{store.rank}", mine)
        while len(all_facts := store.below(folder)) < store.world:
            if time.monotonic() > limit:
                missing = _ranks(sorted(set(range(store.world)) - {int(rank) for rank in all_facts}))
                who = f"{missing} of {store.world} did not come to compare {what}"
                raise ProcessLost(f"{who} within {within:.0f} s (config.join_within); {again}")
            time.sleep(0.1)
    except OSError as error:
        raise ProcessLost(f"rank 0 of {store.world} went away while {what} were compared; {again}") from error
    by_rank = {int(rank): json.loads(text) for rank, text in all_facts.items()}
    if differing := _differences(by_rank):
        more = f"; {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"the processes of this job differ in {'; '.join(differing[:3])}{more}: start all with the same command, "
            "packages and data"
        )


def _differences(by_rank: Mapping[int, Mapping[str, str]]) -> list[str]:
    """["KEY: VALUE on rank 0, OTHER on ranks 1 2", ...], the same on all processes."""
    lines = []
    for name in sorted({name for facts in by_rank.values() for name in facts}):
        ranks: dict[str, list[int]] = {}
        for rank, facts in sorted(by_rank.items()):
            ranks.setdefault(facts.get(name, "not there"), []).append(rank)
        if len(ranks) > 1:
            lines.append(f"{name}: " + ", ".join(f"{value} on {_ranks(who)}" for value, who in ranks.items()))
    return lines


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {' '.join(map(str, ranks[:8]))}{more}"


def versions() -> dict[str, str]:
    """Of what must be equal on all processes."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "fpn_jax": fpn_jax.__version__} | packages


def announce(batch_size: int, train_split: str, images: int) -> None:
    """Print the one line of this process; only the first time, as a sweep is many runs.

    batch_size: images of a step over all processes, of which each reads its own rows.
    """
    if next(_announcements):
        return
    rank, world = sharding.process()
    share, known = batch_size // world, versions()
    total, available = host_memory()
    print(
        f"rank {rank} of {world} on {socket.gethostname()}: {sharding.describe_devices()}; rows {rank * share} to "
        f"{(rank + 1) * share - 1} of each batch of {batch_size} from {images} images of {train_split}; "
        f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB of host memory free; "
        f"jax {known['jax']}, jaxlib {known['jaxlib']}, fpn_jax {known['fpn_jax']}",
        file=sys.stderr,
        flush=True,
    )


def host_memory() -> tuple[int, int]:
    """(bytes of this machine's memory, bytes of it that programs could still get)."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # Linux counts what the file cache would give back
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return total, 1024 * int(lines["MemAvailable"].split()[0])
    return total, page * os.sysconf("SC_AVPHYS_PAGES")
