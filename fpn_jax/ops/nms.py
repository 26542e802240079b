"""Exact greedy non-maximum suppression with static shapes.

Greedy means: in the order of falling scores (equal scores: the lower index first) a box is kept unless a kept box
of its group overlaps it by more than the threshold.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fpn_jax.ops.boxes import iou
from fpn_jax.ops.platforms import by_platform

# Candidates that nms_top looks at together. A GPU computes a larger matrix at once, and each block costs it the starts
# of a dozen kernels and a question of the host.
BLOCK = {"cpu": 256, "default": 1024}
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


@jax.custom_batching.custom_vmap
def _settle(suppresses: jax.Array, candidates: jax.Array) -> jax.Array:
    """The kept boxes [... r], given suppresses [... r r] (row suppresses column, if it is kept), candidates [... r].

    kept = candidates not suppressed by any kept box. `suppresses` follows a strict order, so there is exactly one
    solution, and repeated substitution reaches it in as many rounds as the longest chain of suppression has links.
    Every round reads the matrix, which is why it is packed into bits.
    """
    words = _pack(suppresses, -2)

    def kept(by):
        return candidates & ~jnp.any(words & by[..., None], axis=-2)

    def substitute(state):
        before, _ = state
        now = _pack(kept(before), -1)
        return now, jnp.any(now != before)

    start = _pack(candidates, -1), jnp.array(True)
    return kept(jax.lax.while_loop(lambda state: state[1], substitute, start)[0])


@_settle.def_vmap
def _settle_together(size: int, batched: list[bool], *given: jax.Array) -> tuple[jax.Array, bool]:
    """All take the same rounds: one more changes nothing where the solution is found, and `vmap` itself would select
    between before and after in each."""
    given = (x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in zip(given, batched, strict=True))
    return _settle(*given), True


def _pack(bits: jax.Array, axis: int) -> jax.Array:
    """bool -> uint32: of every 32 along an axis, -1 or -2, one word, the first its lowest bit, filled up with zeros."""
    bits = jnp.moveaxis(bits, axis, 0)
    words = -(-len(bits) // WORD)
    bits = jnp.pad(bits, [(0, WORD * words - len(bits)), *[(0, 0)] * (bits.ndim - 1)])
    bits = bits.reshape(words, WORD, *bits.shape[1:])
    place = np.uint32(1) << np.arange(WORD, dtype=np.uint32).reshape(WORD, *[1] * (bits.ndim - 2))
    return jnp.moveaxis(jnp.where(bits, place, 0).sum(axis=1, dtype=jnp.uint32), 0, axis)


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
    enough are kept, so that r may be large: memory is r + block * (block + max_output), see `BLOCK`.
    """
    if not len(scores):
        return jnp.zeros(max_output, jnp.int32), jnp.zeros(max_output, bool)
    given = boxes, scores, valid, jnp.zeros(len(scores), jnp.int32) if groups is None else groups
    rules = {"threshold": threshold, "max_output": max_output}
    forms = {name: partial(_top_by_blocks, block=block, **rules) for name, block in BLOCK.items()}
    return by_platform(*map(jnp.asarray, given), **forms)


def _top_by_blocks(
    boxes: jax.Array,
    scores: jax.Array,
    valid: jax.Array,
    groups: jax.Array,
    threshold: float,
    max_output: int,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    blocks = -(-len(scores) // block)
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True).astype(jnp.int32)
    order = jnp.pad(order, (0, blocks * block - len(scores))).reshape(blocks, block)
    num_valid = valid.sum()

    def unfinished(state):
        i, _, count = state
        return (i * block < num_valid) & (count < max_output)

    def one_block(state):
        i, kept, count = state
        index = order[i]
        fresh = i * block + jnp.arange(block) < num_valid
        overlaps = (iou(boxes[kept], boxes[index]) > threshold) & (groups[kept][:, None] == groups[index])
        overlaps &= (jnp.arange(max_output) < count)[:, None]
        fresh &= ~overlaps.any(axis=0)
        inside = (iou(boxes[index], boxes[index]) > threshold) & (groups[index][:, None] == groups[index])
        fresh = _settle(jnp.triu(inside, 1), fresh)
        slot = jnp.where(fresh, count + jnp.cumsum(fresh) - 1, max_output)
        return i + 1, kept.at[slot].set(index, mode="drop"), count + fresh.sum()

    start = (jnp.int32(0), jnp.zeros(max_output, jnp.int32), jnp.int32(0))
    _, kept, count = jax.lax.while_loop(unfinished, one_block, start)
    return kept, jnp.arange(max_output) < count
