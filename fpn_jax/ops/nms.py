"""Exact greedy non-maximum suppression with static shapes.

Greedy means: in the order of falling scores (equal scores: the lower index first) a box is kept unless a kept box
of its group overlaps it by more than the threshold.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.ops.boxes import iou

BLOCK = 256  # candidates that nms_top looks at together
WORD = 32  # bits of the numbers that hold the matrix of suppression


def nms(
    boxes: jax.Array, scores: jax.Array | None, valid: jax.Array, threshold: float, groups: jax.Array | None = None
) -> jax.Array:
    """Which boxes greedy NMS keeps, bool [r].

    boxes [r 4] pixels, scores [r], or None where the boxes are sorted, best first; valid [r] (the others are neither
    kept nor suppress), threshold: an IoU above it (not equal) suppresses; groups int32 [r]: boxes of different groups
    leave each other alone. Memory is r * r / 8 bytes.
    """
    r = boxes.shape[0]
    more = -r % WORD  # so that the matrix need not be filled up
    boxes, valid = jnp.pad(boxes, ((0, more), (0, 0))), jnp.pad(valid, (0, more))
    index = jnp.arange(r + more)
    better = index[:, None] < index
    if scores is not None:
        scores = jnp.pad(scores, (0, more))
        better = (scores[:, None] > scores) | ((scores[:, None] == scores) & better)
    suppresses = better & (iou(boxes, boxes) > threshold)
    if groups is not None:
        groups = jnp.pad(groups, (0, more))
        suppresses &= groups[:, None] == groups
    return _settle(suppresses, valid)[:r]


def _settle(suppresses: jax.Array, candidates: jax.Array) -> jax.Array:
    """The kept boxes [r], given suppresses [r r] (row suppresses column, if it is kept) and candidates [r].

    kept = candidates not suppressed by any kept box. `suppresses` follows a strict order, so there is exactly one
    solution, and repeated substitution reaches it in as many rounds as the longest chain of suppression has links.
    Every round reads the matrix, which is why it is packed into bits.
    """
    words = _pack(suppresses)

    def changed(state):
        kept, before = state
        return jnp.any(kept != before)

    def substitute(state):
        kept, _ = state
        return candidates & ~jnp.any(words & _pack(kept)[:, None], axis=0), kept

    return jax.lax.while_loop(changed, substitute, substitute((candidates, candidates)))[0]


def _pack(bits: jax.Array) -> jax.Array:
    """bool [r ...] -> uint32 [r/32 ...]: of every 32 rows one word, the first its lowest bit, filled up with zeros."""
    rows = -(-bits.shape[0] // WORD)
    bits = jnp.pad(bits, [(0, WORD * rows - bits.shape[0]), *[(0, 0)] * (bits.ndim - 1)])
    bits = bits.reshape(rows, WORD, *bits.shape[1:])
    place = np.uint32(1) << np.arange(WORD, dtype=np.uint32).reshape(WORD, *[1] * (bits.ndim - 2))
    return jnp.where(bits, place, 0).sum(axis=1, dtype=jnp.uint32)


def nms_top(
    boxes: jax.Array,
    scores: jax.Array,
    valid: jax.Array,
    threshold: float,
    max_output: int,
    groups: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The first `max_output` boxes that greedy NMS keeps: (index int32 [max_output], valid bool [max_output]).

    Inputs as for `nms`, with finite scores; best first. Works through the sorted candidates in blocks and stops when
    enough are kept, so that r may be large: memory is r + BLOCK * (BLOCK + max_output).
    """
    r = scores.shape[0]
    boxes, groups = jnp.asarray(boxes), jnp.zeros(r, jnp.int32) if groups is None else jnp.asarray(groups)
    blocks = -(-r // BLOCK)
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, blocks * BLOCK - r)).reshape(blocks, BLOCK)
    num_valid = valid.sum()

    def unfinished(state):
        block, _, count = state
        return (block * BLOCK < num_valid) & (count < max_output)

    def one_block(state):
        block, kept, count = state
        index = order[block]
        fresh = block * BLOCK + jnp.arange(BLOCK) < num_valid
        overlaps = (iou(boxes[kept], boxes[index]) > threshold) & (groups[kept][:, None] == groups[index])
        overlaps &= (jnp.arange(max_output) < count)[:, None]
        fresh &= ~overlaps.any(axis=0)
        inside = (iou(boxes[index], boxes[index]) > threshold) & (groups[index][:, None] == groups[index])
        fresh = _settle(jnp.triu(inside, 1), fresh)
        slot = jnp.where(fresh, count + jnp.cumsum(fresh) - 1, max_output)
        return block + 1, kept.at[slot].set(index, mode="drop"), count + fresh.sum()

    start = (jnp.int32(0), jnp.zeros(max_output, jnp.int32), jnp.int32(0))
    if r == 0:
        return start[1], jnp.zeros(max_output, bool)
    _, kept, count = jax.lax.while_loop(unfinished, one_block, start)
    return kept, jnp.arange(max_output) < count
