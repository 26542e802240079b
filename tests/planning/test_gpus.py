"""Plans for GPUs that are not there: what XLA made of a step, and the command where its GPU compiler is installed."""

import gzip
import json
from types import SimpleNamespace

import pytest

from fpn_jax.errors import UserError
from fpn_jax.plan import devices_of
from fpn_jax.planning import gpus, page, step
from fpn_jax.planning.gpus import GPUS, compiler_is_there, parse_hosts
from fpn_jax.planning.hlo import ROUNDS, Program
from fpn_jax.planning.roofline import Bound, Kernel, bounds_by_part, kernels
from fpn_jax.planning.step import StepPlan, part_of
from fpn_jax.training import sharding
from tests.planning.test_plan import run_plan


@pytest.fixture(scope="module")
def program(request):
    path = request.path.parent.parent / "data" / "gpu_step.hlo.gz"
    return Program(gzip.decompress(path.read_bytes()).decode())


@pytest.fixture(scope="module")
def by_name(program):
    return {kernel.name: kernel for kernel in kernels(program)}


def test_convolutions_cost_what_they_compute_and_touch(by_name):
    image, kernel, output = 2 * 20 * 24 * 32, 3 * 3 * 32 * 64, 2 * 20 * 24 * 64
    for name in ("cudnn-conv.1", "cudnn-conv-bw-filter.1"):
        assert by_name[name].flops == 2 * output * 3 * 3 * 32
        assert by_name[name].bytes == 2 * (image + kernel + output)  # bfloat16
        assert (by_name[name].dtype, by_name[name].times, by_name[name].exact) == ("bf16", 1, False)


def test_a_product_in_pieces_is_one_product(by_name):
    """The compiler cut the sum of 256 into four, which are added by the next kernel."""
    product, total = by_name["gemm_fusion_dot.1"], by_name["loop_reduce_fusion"]
    assert (product.flops, product.dtype) == (2 * 512 * 128 * 256, "f32")
    assert product.bytes == 4 * (512 * 256 + 256 * 128 + 4 * 512 * 128)
    assert (total.flops, total.bytes) == (0, 4 * (4 + 1) * 512 * 128)


def test_what_is_added_in_place_costs_its_rows(by_name):
    (scatter,) = [kernel for kernel in by_name.values() if "scatter-add" in kernel.scope and kernel.times == 5]
    rows, values = 48, 48 * 128
    # Reading rows and values of this round, reading and writing their rows of the table; of 5 MB of it nothing else.
    assert scatter.bytes == pytest.approx(4 * (rows + values + 2 * values), rel=0.02)


KERNELS = """
%fused (p: bf16[100,128]) -> f32[1,128] {
  %p = bf16[100,128]{1,0} parameter(0)
  %wide = f32[100,128]{1,0} convert(%p)
  ROOT %row = f32[1,128]{1,0} slice(%wide), slice={[0:1], [0:128]}
}

%two (y: f32[8,32], yy: f32[32,16], z: bf16[8,32], zz: bf16[32,16]) -> f32[8,16] {
  %y = f32[8,32]{1,0} parameter(0)
  %yy = f32[32,16]{1,0} parameter(1)
  %z = bf16[8,32]{1,0} parameter(2)
  %zz = bf16[32,16]{1,0} parameter(3)
  %fine = f32[8,16]{1,0} dot(%y, %yy), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}
  %rough = f32[8,16]{1,0} dot(%z, %zz), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %added = f32[8,16]{1,0} add(%fine, %rough)
}

%shifted (v: f32[8,32]) -> f32[6,32] {
  %v = f32[8,32]{1,0} parameter(0)
  %v0 = f32[6,32]{1,0} slice(%v), slice={[0:6], [0:32]}
  %v2 = f32[6,32]{1,0} slice(%v), slice={[2:8], [0:32]}
  ROOT %v02 = f32[6,32]{1,0} add(%v0, %v2)
}

ENTRY %main (gradient: bf16[2,10,12,64], kernel: bf16[64,3,3,32], a: f32[8,32], b: f32[32,16], c: bf16[100,128]) -> () {
  %gradient = bf16[2,10,12,64]{3,2,1,0} parameter(0)
  %kernel = bf16[64,3,3,32]{3,2,1,0} parameter(1)
  %a = f32[8,32]{1,0} parameter(2)
  %b = f32[32,16]{1,0} parameter(3)
  %c = bf16[100,128]{1,0} parameter(4)
  %back = (bf16[2,20,24,32]{3,2,1,0}, u8[0]{0}) custom-call(%gradient, %kernel), window={size=3x3 pad=1_1x1_1 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardInput"
  %product = (f32[8,16]{1,0}, s8[0]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %cut = f32[2,32]{1,0} slice(%a), slice={[0:2], [0:32]}
  %half = bf16[8,32]{1,0} convert(%a)
  %half_b = bf16[32,16]{1,0} convert(%b)
  %both = f32[8,16]{1,0} fusion(%a, %b, %half, %half_b), kind=kOutput, calls=%two
  %overlapping = f32[6,32]{1,0} fusion(%a), kind=kLoop, calls=%shifted
  %place = s32[2,1]{1,0} constant({...})
  %new_rows = f32[2,32]{1,0} slice(%a), slice={[0:2], [0:32]}
  %scattered = f32[8,32]{1,0} scatter(%a, %place, %new_rows), to_apply=%fused
  %zero = s32[] constant(0)
  %updated = f32[8,32]{1,0} dynamic-update-slice(%a, %new_rows, %zero, %zero)
  ROOT %fusion = f32[1,128]{1,0} fusion(%c), kind=kLoop, calls=%fused
}
"""  # noqa: E501


def test_kernels_that_the_step_on_file_has_not():
    found = {kernel.name: kernel for kernel in kernels(Program(KERNELS))}
    gradient, kernel, image = 2 * 10 * 12 * 64, 64 * 3 * 3 * 32, 2 * 20 * 24 * 32
    assert found["back"].flops == 2 * gradient * 3 * 3 * 32  # of the smaller map, also with stride 2
    assert found["back"].bytes == 2 * (gradient + kernel + image)
    assert (found["product"].flops, found["product"].dtype) == (2 * 8 * 16 * 32, "f32")
    assert found["product"].bytes == 4 * (8 * 32 + 32 * 16 + 8 * 16)
    assert found["cut"].bytes == 4 * (2 * 2 * 32)  # reads what it writes
    both = found["both"]  # the slower type, and the more exact product, count for the whole kernel
    assert (both.flops, both.dtype, both.exact) == (2 * 2 * 8 * 16 * 32, "f32", True)
    assert found["overlapping"].bytes == 4 * (8 * 32 + 6 * 32)  # read once, though two slices have it
    rows = 4 * 2 * 32  # of the table alone; a scatter reads what it adds to
    assert (found["updated"].bytes, found["scattered"].bytes) == (rows, 2 * rows)
    assert found["fusion"].bytes == 2 * 128 + 4 * 128  # the row as it lies in memory, in bfloat16


def test_loops_and_messages(program, by_name):
    assert program.assumed_loops() == 1
    assert {k.times for k in by_name.values() if "proposals/while/body" in k.scope} == {ROUNDS}
    (message,) = program.messages()
    assert (message.kind, message.bytes) == ("all-reduce", 2 * 3 * 3 * 32 * 64)
    assert not any("all-reduce" in name for name in by_name)


def test_parts_add_up(program, by_name):
    gpu = GPUS["h100"]
    bounds = bounds_by_part(program, gpu, part_of)
    assert bounds.keys() >= {"backbone", "RoIAlign", "box head", "proposals, NMS", "the rest"}
    assert sum(b.seconds for b in bounds.values()) == pytest.approx(sum(max(k.seconds(gpu)) for k in by_name.values()))
    assert sum(b.kernels for b in bounds.values()) == sum(k.times for k in by_name.values())
    assert bounds["backbone"].flops == 2 * by_name["cudnn-conv.1"].flops
    assert bounds["RoIAlign"].computing == 0 < bounds["RoIAlign"].moving


def test_the_roofline():
    gpu = GPUS["h100"]
    near = Kernel("", "", 3, 989e9, 1000, "bf16", False)
    assert near.seconds(gpu) == pytest.approx((3e-3, 3000 / 3.35e12))
    assert near._replace(dtype="f16").seconds(gpu) == near.seconds(gpu)
    assert near._replace(dtype="f32").seconds(gpu)[0] == pytest.approx(6e-3)  # TF32
    exact = near._replace(dtype="f32", exact=True).seconds(gpu)[0]
    assert exact == pytest.approx(3 * 989e9 / 66.9e12, rel=0.01)  # the data sheet says 67 TFLOP/s


@pytest.mark.parametrize(
    ("topology", "shape", "text"),
    [("h100", (1, 1), "h100:1"), ("a100:8", (1, 8), "a100:8"), ("b200:4x8", (4, 8), "b200:4x8")],
)
def test_hosts(topology, shape, text):
    hosts = parse_hosts(topology)
    assert (hosts.shape, hosts.size, str(hosts)) == (shape, shape[0] * shape[1], text)
    assert hosts.memory == 0.75 * hosts.gpu.memory_size
    assert f"{shape[1]} on" in hosts.description


@pytest.mark.parametrize("topology", ["h100:", "h100:0", "h100:x8", "h100:1x2x3", "a100:-1"])
def test_what_is_no_host_is_told(topology):
    with pytest.raises(UserError, match=f"--topology={topology}: give a100 or h100"):
        devices_of(topology)


def test_an_unknown_machine_is_told_all_there_are():
    with pytest.raises(UserError, match="'v100' is not one of v5e, v5p, v6e, a100, h100, h200, b200"):
        devices_of("v100:8")


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gpus, "compiler_is_there", lambda: False)
    with pytest.raises(UserError, match=r'--topology=h100:8 needs the GPU compiler; pip install -e "\.\[cuda\]"'):
        devices_of("h100:8")


def test_the_page_of_a_plan():
    bounds = {"neck": Bound(6e12, 0.008, 0.001, 12), "backbone": Bound(1.9e12, 0.002, 0.009, 345)}
    memory = {"arguments": 2**30, "temporary": 2**31, "program": 0, "total": 3 * 2**30}
    plan = StepPlan(2, 16, (64, 64), memory, 9.89e11, [], {}, {}, bounds, 3, 1.0)
    text = page.describe(plan, parse_hosts("h100:2"), 0.02)
    assert "h100:2 (NVIDIA H100 80GB HBM3, 2 on one host): 16 images of 64x64 a step, 8 a device" in text
    assert "3.00 of 59.33 GiB a device (5%)" in text
    assert "20.0 ms at least, 800 images/s at most, 40% of the peak in bfloat16" in text
    assert text.index("| backbone | 11.00 | 2.00 | 9.00 | 1900 | 345 |") < text.index("| neck | 9.00 |")


def test_a_step_that_needs_more_than_jax_takes_is_refused(monkeypatch, tiny_config, program):
    """XLA's GPU compiler does not say so itself."""
    hosts = parse_hosts("h100:8")
    compiled = SimpleNamespace(as_text=lambda: program.text, memory_analysis=lambda: None)
    monkeypatch.setattr(step, "_compile", lambda lowered: compiled)
    monkeypatch.setattr(step, "_memory", lambda stats: {"total": int(hosts.memory) + 1})
    tiny_config.model.detector = "rpn"
    with pytest.raises(step.DoesNotFitError, match=r"needs 59\.33 GiB of the device"):
        step.plan_step(tiny_config, 3, 4, (64, 64), sharding.make_mesh(), hosts=hosts)


@pytest.mark.slow
@pytest.mark.skipif(not compiler_is_there(), reason="needs XLA's compiler for GPUs: pip install -e .[cuda]")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_training_step_compiles_for_gpus(tmp_path, dtype):
    """Products of strided slices once aborted the process there."""
    output = tmp_path / "plan.json"
    flags = f"--config.model.dtype={dtype}", "--topology=h100:2", "--batch_size=4", "--bucket=256x256"
    done = run_plan("experiments/faster_rcnn_r50_fpn.py", *flags, f"--output={output}")
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["step"]
    assert set(found["bounds"]) >= set(step.PARTS)
    assert found["messages"]
    assert "images/s at most" in done.stdout
