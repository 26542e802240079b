"""What a plan says of given numbers, without any compiler: sums, shares, units and the lines of its page."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from fpn_jax.models import build_detector
from fpn_jax.planning import page, step
from fpn_jax.planning.chips import CHIPS, Slice, parse_slice
from fpn_jax.planning.hlo import Message, Run
from fpn_jax.planning.scaling import Scaling, weak_scaling
from fpn_jax.planning.step import DoesNotFitError, StepPlan, abstract_batch
from fpn_jax.training import sharding

GIB = 2**30
MEMORY = {"arguments": GIB, "temporary": 2 * GIB, "program": 0, "total": 3 * GIB}


def plan_of(messages=(), parts=None, not_estimated=None) -> StepPlan:
    return StepPlan(8, 16, (64, 96), MEMORY, 2e9, list(messages), parts or {}, not_estimated or {}, {}, 2, 1.0)


def test_gradients_are_what_is_summed_over_the_devices():
    kinds = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all")
    assert plan_of([Message(kind, 10**i, 1, "") for i, kind in enumerate(kinds)]).gradient_bytes == 11


def test_shares_of_cycles():
    plan = plan_of(parts={"backbone": (60, 20), "neck": (0, 20)})
    assert (plan.cycles, plan.matrix_share) == (100, 0.6)
    assert plan_of().matrix_share == 0.0  # of a compiler that estimates nothing


def test_what_holds_other_operations_lacks_no_estimate():
    opcodes = ("add", 10), ("while", None), ("call", None), ("conditional", None), ("sort", None)
    runs = [Run(opcode, opcode, "jit(step)/neck/x", cycles, 1, False) for opcode, cycles in opcodes]
    parts, unknown = step.cycles_by_part(runs)
    assert (parts["neck"], unknown) == ((0, 10), {"neck": 1})


def test_outputs_that_are_written_over_arguments_take_no_memory_of_their_own():
    sizes = {"argument": 100, "temp": 20, "generated_code": 3, "output": 90, "alias": 80}
    stats = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    assert step._memory(stats) == {"arguments": 100, "temporary": 20, "program": 3, "total": 133}


@pytest.mark.parametrize(
    ("told", "needed", "limit"),
    [("Used 19.50G of 15.75G hbm", 19.5 * GIB, 15.75 * GIB), ("Used 2.00T of 512.0M hbm", 2048 * GIB, GIB / 2)],
)
def test_the_tpu_compilers_refusal_is_read(told, needed, limit):
    def compile():
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory. {told}. Exceeded by some.")

    with pytest.raises(DoesNotFitError) as error:
        step._compile(SimpleNamespace(compile=compile))
    assert (error.value.needed, error.value.limit) == (needed, limit)


def test_flops_are_those_of_all_pieces_on_all_devices_for_one_image(tinier_config, monkeypatch):
    """The compiler counts one piece of one device."""
    counted = {"cost_analysis": lambda: {"flops": 1e6}, "memory_analysis": lambda: None}
    program = SimpleNamespace(as_text=lambda: "ENTRY %main (x: f32[4]) -> f32[4] {\n}", **counted)
    monkeypatch.setattr(step, "_compile", lambda lowered: program)
    monkeypatch.setattr(step, "_memory", lambda stats: MEMORY)
    monkeypatch.setattr(step, "make_train_step", lambda *_: SimpleNamespace(lower=lambda *_: None))
    tinier_config.model.detector = "rpn"
    tinier_config.update(batch_size=32, accumulate=2)
    plan = step.plan_step(tinier_config, 3, 4, (64, 64), sharding.make_mesh())
    assert (plan.devices, plan.images, plan.flops_per_image) == (8, 32, 1e6 * 2 * 8 / 32)


def test_a_batch_has_the_pipelines_types_and_regions_where_they_are_given(tiny_config):
    tiny_config.data.update(pixels="float32", max_proposals=(30, 20))
    batches = {}
    for tiny_config.model.detector in ("fast_rcnn", "faster_rcnn"):
        detector = build_detector(tiny_config.model, 3)
        batches[tiny_config.model.detector] = abstract_batch(tiny_config, detector, (64, 96), 4)
    given = batches["fast_rcnn"]
    assert (given.image.shape, given.image.dtype) == ((8, 64, 96, 3), jnp.float32)
    assert (given.proposals.shape, given.proposals_valid.shape) == ((8, 30, 4), (8, 30))  # those of training
    assert batches["faster_rcnn"].proposals is batches["faster_rcnn"].proposals_valid is None


def test_a_side_of_one_chip_has_no_link():
    assert parse_slice("v5e:1x4").bandwidth == 50e9
    (alone,) = weak_scaling(0.1, 10**9, [Slice(CHIPS["v5e"], (1, 1))])
    assert (alone.exchange, alone.efficiency, alone.efficiency_overlapped) == (0.0, 1.0, 1.0)


def test_what_the_backward_pass_hides_is_two_thirds_of_a_step():
    assert Scaling(parse_slice("v5e:2x4"), 3.0, 3.0, 0.5).efficiency_overlapped == 0.75
    assert Scaling(parse_slice("v5e:2x4"), 3.0, 1.0, 0.75).efficiency_overlapped == 1.0


def test_the_page_of_a_slice():
    machine = parse_slice("v5e:2x4")
    plan = plan_of(parts={"backbone": (60_000_000, 20_000_000), "neck": (0, 20_000_000)}, not_estimated={"neck": 3})
    text = page.describe(plan, machine, 0.02)
    assert "v5e:2x4 (8 chips, v5litepod-8): 16 images of 64x96 a step, 2 a device" in text
    milliseconds = 1e3 * 100e6 / machine.chip.clock
    assert f"100.0 M as the compiler estimates = {milliseconds:.0f} ms at 1.50 GHz, 60% of them" in text
    assert "| backbone | 80.0% | 60.00 | 20.00 | 0 |" in text and "| neck | 20.0% | 0.00 | 20.00 | 3 |" in text
    assert "sent            nothing" in text


def test_large_messages_are_told_by_kind_and_small_ones_together():
    messages = [("all-reduce", 4_000_000, 2), ("all-reduce", 1_000_000, 1), ("all-gather", 4097, 1)]
    messages += [("all-reduce", 4096, 5), ("all-gather", 4, 1)]
    text = page.describe(plan_of([Message(*m, "") for m in messages]), None, 0.02)
    assert "8 local devices" in text
    assert "5.0 MB by 3 all-reduce, 0.0 MB by 1 all-gather, 4100 bytes in 6 small messages" in text


def test_the_table_of_scaling():
    table = page.scaling_table([Scaling(parse_slice("v5e:2x4"), 3e-3, 3e-3, 0.5)])
    assert table.splitlines()[-1] == "| v5e:2x4 | 8 | 100 | 3.00 | 50.0% | 75.0% |"
