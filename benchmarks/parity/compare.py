"""How far two results are apart, in the measures of the table."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over largest magnitude. Raises ValueError if the shapes differ."""
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes {ours.shape} and {theirs.shape}")
    return float(np.abs(ours.astype(np.float64) - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), 1e-30))


def largest(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], keys: Iterable[str]) -> float:
    """The largest relative difference of the arrays named; there must be some."""
    return max(relative(ours[key], theirs[key]) for key in keys)


@dataclass(frozen=True)
class Matched:
    """Two sets of boxes, paired greedily by the nearest; `boxes` and `scores` are the largest differences of a pair."""

    unmatched: int  # boxes of either side without a counterpart
    boxes: float  # pixels
    scores: float
    pairs: int


def match_boxes(
    ours: tuple[np.ndarray, ...], theirs: tuple[np.ndarray, ...], pixels: float = 0.02, score: float = np.inf
) -> Matched:
    """Compare as sets: (boxes [r 4], scores [r] and, if given, labels [r]) of either side.

    A pair has the same label, corners within `pixels` and scores within `score`. Scores that nearly tie may swap
    places between implementations, so that the order says nothing.
    """
    boxes, their_boxes = ours[0].astype(np.float64), theirs[0].astype(np.float64)
    free = np.ones(len(their_boxes), bool)
    far, apart, unmatched = 0.0, 0.0, 0
    for i, mine in enumerate(boxes):
        distance = np.abs(their_boxes - mine).max(1, initial=0) if len(their_boxes) else np.zeros(0)
        gap = np.abs(theirs[1].astype(np.float64) - ours[1][i])
        able = free & (distance <= pixels) & (gap <= score)
        if len(ours) > 2:
            able &= theirs[2] == ours[2][i]
        if not able.any():
            unmatched += 1
            continue
        best = int(np.argmin(np.where(able, distance, np.inf)))
        free[best] = False
        far, apart = max(far, distance[best]), max(apart, gap[best])
    return Matched(unmatched + int(free.sum()), float(far), float(apart), len(boxes) - unmatched)
