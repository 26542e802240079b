"""Memory kept between steps: whether the kernel is asked for pages again, and where nothing is to be changed."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from fpn_jax import allocator

GLIBC = platform.libc_ver()[0] == "glibc"

# Prints whether memory is kept and the pages asked for by the third of three calls with 128 MiB of temporary memory,
# in a thread, as XLA runs what takes long.
SCRIPT = """
import os
import resource
import sys
import threading
import jax
from fpn_jax import allocator, common

os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:2])
allocator._MOST_CPUS = int(sys.argv[1])
common.set_up_jax()

@jax.jit
def call(x):
    cells = jax.numpy.broadcast_to(x, 2**25)
    return jax.lax.fori_loop(0, 2, lambda i, cells: cells.at[i].add(1), cells)[::2**20].sum()

def calls():
    global pages
    for i in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call(float(i)).block_until_ready()
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

thread = threading.Thread(target=calls)
thread.start()
thread.join()
print(allocator.keep_memory(), pages)
"""


@pytest.mark.skipif(not GLIBC, reason="another C library than glibc, of which nothing is asked")
@pytest.mark.parametrize(
    ("environment", "most_cpus", "keeps"), [({}, 2, True), ({"MALLOC_ARENA_MAX": "4"}, 2, False), ({}, 0, False)]
)
def test_pages_are_used_again(environment, most_cpus, keeps):
    """Also by threads. Not where the environment says what glibc is to do, or CPUs are many: it shows the gain."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    ours |= {"JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-c", SCRIPT, str(most_cpus)]
    done = subprocess.run(command, env=ours, capture_output=True, text=True, check=True)
    kept, pages = done.stdout.split()
    assert kept == str(keeps)
    assert (int(pages) < 1000) is keeps


@pytest.mark.parametrize("way", ["entry point", "jax_plugins", "libtpu"])
def test_an_accelerators_host_is_left_alone(way, monkeypatch):
    """However its plugin is installed, unless JAX is told to stay on the CPU."""
    points = [importlib.metadata.EntryPoint("own", "own", "jax_plugins")] if way == "entry point" else []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "jax_plugins" else [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == way else None)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("glibc was asked"))
    assert jax.config.jax_platforms == "cpu"  # tests never look for another
    assert not allocator._may_find_accelerator()
    monkeypatch.setattr(allocator, "_cpus", lambda: 1)
    monkeypatch.setattr(allocator, "jax", SimpleNamespace(config=SimpleNamespace(jax_platforms=None)))
    assert allocator.keep_memory() is False
