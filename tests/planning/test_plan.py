"""`fpn_jax.plan`: the step of a config for devices that are there (fake ones) and for TPUs that are not."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from launching import environment

from fpn_jax.errors import UserError
from fpn_jax.models import build_detector
from fpn_jax.plan import bucket_of, devices_of, plan
from fpn_jax.planning.chips import CHIPS, parse_slice
from fpn_jax.planning.scaling import usual_slices, weak_scaling
from fpn_jax.planning.step import OTHER, PARTS, abstract_batch, largest_batch, part_of, plan_step
from fpn_jax.training import sharding
from fpn_jax.training.state import init_variables

ROOT = Path(__file__).parent.parent.parent


def run_plan(config, *arguments):
    command = [sys.executable, "-m", "fpn_jax.plan", f"--config={config}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)


def test_the_step_of_eight_devices(tiny_config):
    tiny_config.model.detector = "rpn"  # it compiles in half the time
    plan = plan_step(tiny_config, classes=3, objects=4, bucket=(64, 64), mesh=sharding.make_mesh())
    assert (plan.devices, plan.images) == (8, 8)
    params = init_variables(build_detector(tiny_config.model, 3), (64, 64), 0)["params"]
    weights = sum(4 * x.size for x in jax.tree.leaves(params))
    assert {m.kind for m in plan.messages} == {"all-reduce"}
    assert weights <= plan.gradient_bytes <= 1.5 * weights
    # Each device holds all weights, their average and both moments of adamw, its own image and boxes, and little else.
    batch = 64 * 64 * 3 + 2 * 4 + 4 * (4 * 4 + 1)  # no labels: an RPN does not read them
    assert 4 * weights + batch <= plan.memory["arguments"] <= 4.02 * weights + batch + 1024
    assert plan.memory["total"] >= plan.memory["arguments"] + plan.memory["temporary"] > plan.memory["arguments"]
    assert plan.flops_per_image > 2 * 3 * weights  # each weight is used more than once, forward and twice backward


def test_pieces_of_a_batch_are_all_counted(tiny_config):
    tiny_config.model.detector, tiny_config.model.neck.channels = "rpn", 32
    tiny_config.batch_size = 4
    mesh, flops = sharding.make_mesh(jax.devices()[:1]), []
    for tiny_config.accumulate in (1, 4):
        flops.append(plan_step(tiny_config, classes=3, objects=4, bucket=(64, 64), mesh=mesh).flops_per_image)
    assert flops[1] == pytest.approx(flops[0], rel=0.1)


def test_a_batch_that_does_not_divide_is_told(tiny_config):
    tiny_config.batch_size = 12
    with pytest.raises(UserError, match=r"batch_size / accumulate is 12, .* 8 devices; try 16"):
        plan_step(tiny_config, 3, 4, (64, 64), sharding.make_mesh())
    tiny_config.batch_size, tiny_config.accumulate = 8, 2
    with pytest.raises(UserError, match=r"batch_size / accumulate is 4, .* 8 devices"):
        plan_step(tiny_config, 3, 4, (64, 64), sharding.make_mesh())


@pytest.mark.parametrize("most", range(40))
def test_the_largest_batch_is_found_and_no_size_tried_twice(most):
    asked = []

    def fits(images):
        asked.append(images)
        return images <= most

    assert largest_batch(fits) == most
    assert len(asked) == len(set(asked)) <= 2 * max(most, 1).bit_length() + 1


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(step)/transpose(jvp(FasterRCNN.losses))/FasterRCNN.features/neck/neck/smooth2/conv", "neck"),
        ("jit(step)/jvp(FasterRCNN.losses)/FasterRCNN.propose/proposals/shard_map/vmap()/top_k", "proposals, NMS"),
        ("jit(step)/jvp(FasterRCNN.losses)/FasterRCNN.roi_losses/box_losses/log", "losses, matching, sampling"),
        ("jit(step)/optimizer/mul", "optimizer"),
        ("jit(step)/jvp(FasterRCNN.losses)/FasterRCNN.features/sub", "the rest"),
        ("", "the rest"),
    ],
)
def test_parts_of_scopes(scope, part):
    assert part_of(scope) == part


def test_every_scope_of_a_part_is_in_the_program(tiny_config):
    """A part whose scope was renamed in the models would be counted as the rest without a word."""
    tiny_config.batch_size = 1
    detector = build_detector(tiny_config.model, 3)
    batch = abstract_batch(tiny_config, detector, (64, 64), 4)
    variables = jax.eval_shape(lambda: init_variables(detector, (64, 64), 0))
    losses = jax.jit(lambda v, b: detector.apply(v, b, jax.random.key(0), method="losses", mutable=["batch_stats"]))
    text = losses.lower(variables, batch).as_text(debug_info=True)
    found = {part_of(line.split('"')[1]) for line in text.splitlines() if line.startswith("#loc") and '"' in line}
    assert found >= set(PARTS) - {"optimizer"} | {OTHER}


def test_slices():
    pod = parse_slice("v5e:16x16")
    assert (pod.size, pod.accelerator_type, str(pod)) == (256, "v5litepod-256", "v5e:16x16")
    assert parse_slice("v5p:4x4x4").accelerator_type == "v5p-128"  # named by its cores, two a chip
    assert pod.chip.clock == pytest.approx(1.5e9, rel=0.01)
    assert pod.bandwidth * pod.size == pytest.approx(51.2e12)  # the pod's all-reduce bandwidth of the data sheet
    assert parse_slice("v6e:16x16").bandwidth * 256 == pytest.approx(102.4e12)
    assert parse_slice("v5e:2x4").bandwidth == 100e9  # no rings: one link each way along two axes


@pytest.mark.parametrize("topology", ["v5e", "v5e:16", "v5e:4x4x4", "v5e:0x4", "v5e:axb", "v9:2x2", ""])
def test_what_is_no_slice_is_told(topology):
    with pytest.raises(UserError, match=f"--topology={topology}"):
        parse_slice(topology)


def test_weak_scaling_follows_from_the_data_sheet():
    scalings = weak_scaling(0.1, 200_000_000, usual_slices(CHIPS["v5e"]))
    assert [s.slice.size for s in scalings] == [8, 16, 32, 64, 128, 256]
    by_size = {s.slice.size: s for s in scalings}
    # 8 chips send 2 * 7/8 of 200 MB at 100 GB/s and hop 2 * (1 + 3) times; 256 send 2 * 255/256 of it at 200 GB/s.
    assert by_size[8].exchange == pytest.approx(3.5e-3 + 8e-6)
    assert by_size[256].exchange == pytest.approx(1.9921875e-3 + 32e-6)
    assert by_size[256].efficiency == pytest.approx(0.1 / (0.1 + by_size[256].exchange))
    assert by_size[256].efficiency_overlapped == 1.0  # 2 ms hide behind a backward pass of 67
    slow = weak_scaling(0.001, 200_000_000, usual_slices(CHIPS["v5e"]))[-1]
    assert slow.efficiency < slow.efficiency_overlapped < 0.5


def test_the_command_for_local_devices(tiny_experiment, tmp_path):
    output = tmp_path / "plan.json"
    done = run_plan(
        tiny_experiment, "--topology=local:2", "--batch_size=4", "--config.model.detector=rpn", f"--output={output}"
    )
    assert done.returncode == 0, done.stderr
    assert "2 local devices: 4 images of 64x64 a step, 2 a device" in done.stdout
    assert json.loads(output.read_text())["step"]["images"] == 4


def test_numbers_beyond_their_bounds_are_refused(tiny_config):
    tiny_config.accumulate = 0
    with pytest.raises(UserError, match="accumulate is 0; it must be at least 1"):
        plan(tiny_config, "local:1", (64, 64), largest=False)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="--topology=local:x: give a number of CPU devices"):
        devices_of("local:x")
    with pytest.raises(UserError, match="--topology=v5e:3: give v5e's 2 sides"):
        devices_of("v5e:3")
    with pytest.raises(UserError, match="--bucket=100x100: give height x width in multiples of 32"):
        bucket_of(None, "100x100")
    with pytest.raises(UserError, match="--bucket=0x32: give height x width in multiples of 32"):
        bucket_of(None, "0x32")


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--classes=0", "--classes=0: give at least 1"),
        ("--objects=-1", "--objects=-1: give at least 0"),
        (
            "--output=LICENSE/a.json",
            "LICENSE: cannot be written (File exists); move what is in the way or choose another folder",
        ),
    ],
)
def test_flags_that_cannot_be_are_told_before_anything_is_compiled(tiny_experiment, flag, told):
    done = run_plan(tiny_experiment, "--topology=local:1", flag)
    assert (done.returncode, done.stderr) == (2, f"error: {told}\n")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_tpu_compiler_it_says_what_to_install(tiny_experiment):
    done = run_plan(tiny_experiment, "--topology=v5e:2x4")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert 'pip install -e ".[tpu]"' in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[tpu]")
def test_the_command_for_tpus(tiny_experiment, tmp_path):
    output = tmp_path / "plan.json"
    done = run_plan(tiny_experiment, "--topology=v5e:2x4", "--batch_size=16", f"--output={output}")
    assert done.returncode == 0, done.stderr
    step = json.loads(output.read_text())["step"]
    assert step["devices"] == 8
    assert sum(map(sum, step["parts"].values())) > 0
    assert "v5e:16x16" in done.stdout
