"""The reader of compiled programs, on the TPU compiler's own text and on what this machine's compiler writes."""

import gzip

import jax
import jax.numpy as jnp
import pytest

from fpn_jax.planning.hlo import ROUNDS, Program, shape_bytes
from fpn_jax.planning.step import cycles_by_part
from fpn_jax.training import sharding


@pytest.fixture(scope="module")
def tpu_step(request):
    path = request.path.parent.parent / "data" / "tpu_step.hlo.gz"
    return gzip.decompress(path.read_bytes()).decode()


def test_the_gradient_is_all_that_is_sent(tpu_step):
    (message,) = Program(tpu_step).messages()
    assert (message.kind, message.bytes, message.times) == ("all-reduce", 3 * 3 * 8 * 16 * 4, 1)


def test_loops_count_as_often_as_they_run(tpu_step):
    runs = list(Program(tpu_step).runs())
    assert {r.times for r in runs if "roi_align" in r.scope and "/body/" in r.scope} == {5}
    assert {r.times for r in runs if "proposals/while/body/" in r.scope} == {ROUNDS}
    assert Program(tpu_step).assumed_loops() == 1
    more = {r.name: r for r in Program(tpu_step, rounds=2 * ROUNDS).runs()}
    for run in runs:
        in_loop = "proposals/while" in run.scope and run.times > 1
        assert more[run.name].times == run.times * (1 + in_loop)
        assert run.cycles is None or more[run.name].cycles == run.cycles * (1 + in_loop)


def test_cycles_go_to_their_parts(tpu_step):
    runs = list(Program(tpu_step).runs())
    parts, unknown = cycles_by_part(runs)
    assert sum(map(sum, parts.values())) == sum(r.cycles for r in runs if r.cycles)
    # Only the backbone convolves: forward and the gradient of its weights.
    assert [part for part, (matrix, _) in parts.items() if matrix] == ["backbone"]
    assert parts["backbone"][0] == sum(r.cycles for r in runs if r.is_matrix) > 0
    assert all(parts[part][1] > 0 for part in ("RoIAlign", "proposals, NMS", "optimizer"))
    assert unknown["RoIAlign"] >= 1  # the sort


def test_what_is_fused_is_not_counted_again(tpu_step):
    """Cycles of operations that are inside fusions are part of the fusion's."""
    import re

    names = {run.name for run in Program(tpu_step).runs()}
    inside = re.findall(r"^%fused_computation[^{]*\{\n(.*?)^\}", tpu_step, re.MULTILINE | re.DOTALL)
    fused = set(re.findall(r"^  (?:ROOT )?%([\w.\-]+) =", "".join(inside), re.MULTILINE))
    assert len(fused) > 20
    assert not names & fused


def test_this_machines_program():
    """A loop of seven rounds around an all-reduce of 8 x 4 floats, on eight devices."""
    mesh = sharding.make_mesh()
    x = jax.ShapeDtypeStruct((64, 4), jnp.float32, sharding=sharding.split(mesh))

    def step(x):
        def body(total, k):
            return jax.lax.with_sharding_constraint(
                total + (x * jnp.cos(total)).sum(0) * k, sharding.replicated(mesh)
            ), None

        return jax.lax.scan(body, jnp.zeros(4), jnp.arange(7.0))[0]

    program = Program(jax.jit(step).lower(x).compile().as_text())
    (message,) = program.messages()
    assert (message.kind, message.times, message.bytes) == ("all-reduce", 7, 7 * 4 * 4)
    assert program.assumed_loops() == 0
    assert cycles_by_part(list(program.runs())) == ({}, {})  # no estimates here


PROGRAM = """
%up (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %go = pred[] compare(%i, %n), direction=LT
}

%down (q: (s32[], f32[4])) -> pred[] {
  %q = (s32[], f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] constant(3)
  ROOT %on = pred[] compare(%j, %m), direction=GT
}

%inner (r: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = (s32[], f32[4]{0}) parameter(0)
  ROOT %sum = f32[4]{0} all-reduce(%r), to_apply=%never
}

%outer (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  ROOT %again = (s32[], f32[4]{0}) while(%s), condition=%down, body=%inner
}

%never (t: f32[4]) -> f32[4] {
  ROOT %t = f32[4]{0} parameter(0)
}

%unseen (o: f32[4]) -> f32[4] {
  ROOT %idled = f32[4]{0} negate(%o)
}

%yes (u: f32[4]) -> f32[4] {
  ROOT %taken = f32[4]{0} negate(%u)
}

%no (v: f32[4]) -> f32[4] {
  ROOT %spared = f32[4]{0} negate(%v)
}

%fused (w: f32[4]) -> f32[4] {
  %w = f32[4]{0} parameter(0)
  %sent = f32[8]{0} all-gather(%w), dimensions={0}
  %first = f32[4]{0} negate(%w), metadata={op_name="jit(step)/neck/a"}
  ROOT %last = f32[4]{0} negate(%first), metadata={op_name="jit(step)/backbone/b"}
}

ENTRY %main (x: f32[4,4]) -> f32[4] {
  %x = f32[4,4]{1,0} parameter(0)
  %loop = (s32[], f32[4]{0}) while(%x), condition=%up, body=%outer, metadata={op_name="jit(step)/optimizer/while"}
  %idle = (s32[], f32[4]{0}) while(%x), condition=%up, body=%unseen, backend_config={"known_trip_count":{"n":"0"}}
  %either = f32[4]{0} conditional(%x), branch_computations={%yes, %no}
  %part = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %product = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %kernel = f32[4,4]{1,0} custom-call(%x), custom_call_target="__cudnn$convForward"
  %gather = (f32[4,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%x), dimensions={0}
  %gathered = f32[32,4]{1,0} all-gather-done(%gather)
  %reduce = (f32[4,4]{1,0}, f32[2]{0}) all-reduce-start(%x, %part), to_apply=%never
  ROOT %reduced = f32[4]{0} all-reduce-done(%reduce)
}
"""


def test_loops_branches_scopes_and_messages_of_a_program_by_hand():
    program = Program(PROGRAM)
    runs = {run.name: run for run in program.runs()}
    # Three rounds around one that nobody knows; none of a loop that is known to have none; the first branch alone.
    assert program.assumed_loops() == 1
    assert sorted((m.kind, m.times, m.bytes) for m in program.messages()) == [
        ("all-gather", 1, 4 * 8),  # in a fusion
        ("all-gather", 1, 4 * 32 * 4),  # what is written, not what is read beside it
        ("all-reduce", 1, 4 * 4 * 4 + 4 * 2),  # of what starts an all-reduce all is written
        ("all-reduce", 3 * ROUNDS, 3 * ROUNDS * 4 * 4),
    ]
    assert runs["sum"].scope == "jit(step)/optimizer/while"  # of the loop it is in
    assert runs["part"].scope == "jit(step)/backbone/b"  # of the last that is fused into it
    assert runs["idled"].times == 0
    assert "taken" in runs and "spared" not in runs
    assert {name for name, run in runs.items() if run.is_matrix} == {"product", "kernel"}
    assert not {"gather", "gathered", "reduce", "reduced", "first", "last", "x"} & runs.keys()


def test_bytes_of_shapes():
    assert shape_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4]{0}, /*index=2*/pred[], u8[0,5])") == [24, 8, 1, 0]


def test_what_is_no_program_is_told():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("HloModule nothing\n")
