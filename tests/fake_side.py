"""A side of a benchmark for the tests of what times them, made in a process of its own."""

import os
import time

import numpy as np

from benchmarks.timing import Made, Program


def make(sleep=0.0, fail=False, megabytes=0):
    if fail:
        raise RuntimeError("no such device")

    def run(seed):
        held = np.ones(megabytes * 2**20, np.uint8)
        time.sleep(sleep)
        if seed < 0:
            raise ValueError("seed is negative")
        return {"seed": seed, "sum": held.sum()}

    programs = {"sleep": Program(lambda seed: seed, run, lambda found: {"seed": found["seed"], "pid": os.getpid()})}
    return Made(programs, {"told": os.environ.get("FAKE_SIDE", "nothing")})
