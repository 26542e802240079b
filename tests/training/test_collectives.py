"""What devices say to each other: in training the gradients (and what batch norm needs), in detection nothing."""

import math
import re

import jax
import pytest

from fpn_jax.models import build_detector
from fpn_jax.training import sharding
from fpn_jax.training.optim import make_optimizer, make_schedule
from fpn_jax.training.state import inference_variables, init_variables, make_state
from fpn_jax.training.step import make_detect, make_level_counts, make_train_step

BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "u8": 1}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


def collectives(compiled):
    """[(kind, bytes)] of a compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line):
            shapes = re.findall(rf"({'|'.join(BYTES)})\[([\d,]*)\]", match[1])
            sizes = (BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in shapes)
            found.append((match[2], sum(sizes)))
    return found


@pytest.fixture
def set_up(tiny_config, make_batch):
    def make(norm):
        tiny_config.model.backbone.norm = norm
        detector = build_detector(tiny_config.model, 3)
        variables = init_variables(detector, (64, 64), 0)
        schedule = make_schedule(tiny_config.optim, 8, 10)
        optimizer = make_optimizer(tiny_config.optim, schedule, variables["params"], detector.frozen)
        mesh = sharding.make_mesh()
        assert mesh.size == 8
        state = sharding.put_replicated(mesh, make_state(variables, optimizer, 0.0))
        step = make_train_step(detector, optimizer, schedule, 0, mesh=mesh)
        return detector, mesh, state, sharding.put_batch(mesh, vars(make_batch(8))), step

    return make


@pytest.mark.parametrize("norm", ["gn", pytest.param("bn", marks=pytest.mark.slow)])
def test_a_step_moves_the_gradients_and_little_else(set_up, norm):
    _, _, state, batch, step = set_up(norm)
    found = collectives(step.lower(state, batch).compile())
    assert {kind for kind, _ in found} == {"all-reduce"}
    gradients = sum(4 * x.size for x in jax.tree.leaves(state.params))
    # A head that serves several levels may be summed over devices once for each.
    heads = sum(4 * x.size for x in jax.tree.leaves(state.params["rpn_head"]))
    statistics = 8 * sum(4 * x.size for x in jax.tree.leaves(state.batch_stats))  # means and squares, there and back
    assert gradients <= sum(size for _, size in found) <= gradients + 4 * heads + statistics + 256
    assert norm == "bn" or len([size for _, size in found if size > 256]) <= 4  # a few large messages, not many small


def test_detection_and_counting_move_nothing(set_up):
    detector, mesh, state, batch, _ = set_up("bn")
    variables = inference_variables(state)
    assert collectives(make_detect(detector, mesh).lower(variables, batch).compile()) == []
    assert collectives(make_level_counts(detector, mesh).lower(variables, batch).compile()) == []


@pytest.mark.slow
def test_without_a_mesh_the_work_on_images_is_gathered(set_up):
    """Why `per_device` is there; if this fails, XLA has learnt to do without."""
    detector, _, state, batch, _ = set_up("gn")
    kinds = {kind for kind, _ in collectives(make_detect(detector).lower(inference_variables(state), batch).compile())}
    assert "all-gather" in kinds
