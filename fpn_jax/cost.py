"""What a detector costs, known before anything is computed: parameters, operations of one image, anchors."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fpn_jax.models.detector import Detector
from fpn_jax.models.rpn import RPN
from fpn_jax.ops.platforms import compiling_for
from fpn_jax.training.state import init_variables
from fpn_jax.types import Batch


class Cost(NamedTuple):
    """Of one image of one size."""

    parameters: int  # trained or not; frozen batch norms have none
    flops: float  # of finding its objects; a multiplication and an addition are two. Loops count once
    anchors: int | None  # None without an RPN


def cost(detector: Detector, image_size: tuple[int, int], proposals: int = 1) -> Cost:
    """The cost on an image of `image_size` (height, width) with this many given proposals, by shapes alone."""
    variables = jax.eval_shape(lambda: init_variables(detector, image_size, 0))
    batch = abstract_batch(image_size, proposals)
    # As a GPU would do it: a CPU gets large convolutions by a rule with fewer products, a TPU copies as products.
    with compiling_for("gpu"):
        traced = jax.jit(lambda v, b: detector.apply(v, b, method="detect")).trace(variables, batch)
    analysis = traced.lower(lowering_platforms=("cuda",)).cost_analysis() or {}
    return Cost(
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"])),
        flops=float(analysis.get("flops", 0.0)),
        anchors=count_anchors(detector, variables, batch) if isinstance(detector, RPN) else None,
    )


def count_anchors(detector: RPN, variables: Any, batch: Batch) -> int:
    """Anchors of an image of all levels together."""

    def logits(self: RPN, batch: Batch) -> Any:
        return self.predict_anchors(self.features(batch.image, batch.size), batch.image.shape[1:3])[0]

    shapes = jax.eval_shape(lambda v, b: detector.apply(v, b, method=logits), variables, batch)
    return sum(x.shape[1] for x in shapes.values())


def abstract_batch(image_size: tuple[int, int], proposals: int = 1) -> Batch:
    """Shapes of a batch of one image with one object."""
    like = jax.ShapeDtypeStruct
    return Batch(
        image=like((1, *image_size, 3), jnp.uint8),
        size=like((1, 2), jnp.int32),
        boxes=like((1, 1, 4), jnp.float32),
        labels=like((1, 1), jnp.int32),
        valid=like((1, 1), jnp.bool_),
        proposals=like((1, proposals, 4), jnp.float32),
        proposals_valid=like((1, proposals), jnp.bool_),
    )
