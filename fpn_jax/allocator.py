"""Memory that a process keeps from one step to the next, on machines where JAX has nothing but a few CPUs."""

import ctypes
import importlib.metadata
import importlib.util
import os

import jax

# What mallopt calls, in glibc's malloc.h, M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD.
_WANTED = {-8: 1, -4: 0, -1: -1}
_MOST_CPUS = 4  # measured with two: the more threads compile, the longer they wait for the one arena


def keep_memory() -> bool:
    """Have glibc keep what a step or a batch gives back for the next one; whether it does so from now on.

    A step takes all that it needs at once, 0.8 GB for an image of 800 x 1344, and gives it back when it ends. For the
    next the kernel would have to clear every page anew: a tenth of the time (benchmarks/LOG.md). It must come before
    JAX starts threads, which otherwise get memory of their own, and that is never kept where it is large.

    Nothing is changed where JAX may find an accelerator, or has more than four CPUs: many threads would wait for each
    other; where the environment tells glibc something itself (MALLOC_..., GLIBC_TUNABLES); and with other C libraries.
    """
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if told or _cpus() > _MOST_CPUS or _may_find_accelerator():
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return all(library.mallopt(name, value) for name, value in _WANTED.items())


def _cpus() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _may_find_accelerator() -> bool:
    """Whether JAX is not told to leave them alone and a plugin is installed, in any of the ways that it looks for."""
    if jax.config.jax_platforms == "cpu":
        return False
    named = importlib.metadata.entry_points(group="jax_plugins")
    return bool(named) or any(importlib.util.find_spec(name) is not None for name in ("jax_plugins", "libtpu"))
