"""The benchmarks run, what times them times, and the table says what the JSON says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import flops, inference, input_pipeline, ours, ours_input, parts, record, run, timing, train_step
from fpn_jax.common import flat_values
from fpn_jax.errors import UserError

ROOT = Path(__file__).parent.parent
FAKE = "fake_side:make"


def test_sides_take_turns_in_processes_of_their_own():
    sides = {
        "a": timing.Side(FAKE, {"sleep": 0.03}),
        "b": timing.Side(FAKE, {"megabytes": 100}, {"FAKE_SIDE": "its own environment"}),
    }
    with timing.started(sides) as running:
        pids = {int(side.outputs("sleep", 3)["pid"]) for side in running.values()}
        assert len(pids | {os.getpid()}) == 3
        assert running["a"].outputs("sleep", 3)["seed"] == 3
        assert [side.facts["told"] for side in running.values()] == ["nothing", "its own environment"]
        times = timing.take_turns(running, "sleep", repeats=3)
        assert [len(values) for values in times.values()] == [3, 3]
        assert all(x.wall > 0.03 > x.cpu for x in times["a"])
        assert running["a"].peak_memory("sleep", 0) + 60 * 2**20 < running["b"].peak_memory("sleep", 0)
        with pytest.raises(timing.SideFailed, match="seed is negative"):
            running["a"].outputs("sleep", -1)
        assert running["a"].outputs("sleep", 4)["seed"] == 4  # goes on
    assert "FAKE_SIDE" not in os.environ
    broken = timing.started({"broken": timing.Side(FAKE, {"fail": True})})
    with pytest.raises(UserError, match=r"^broken does not start: RuntimeError: no such device"), broken:
        pass


def test_turns_are_a_b_a_b_with_new_inputs_and_the_first_are_not_counted():
    asked = []

    class Side:
        def __init__(self, name):
            self.name = name

        def times(self, program, seed):
            asked.append((self.name, program, seed))
            return timing.Times(float(seed), 0.0)

    times = timing.take_turns({"a": Side("a"), "b": Side("b")}, "p", repeats=2, warm_up=1)
    assert asked == [(name, "p", seed) for seed in range(3) for name in "ab"]
    assert [x.wall for x in times["a"]] == [1.0, 2.0]


def test_flops_are_those_of_one_branch_and_of_every_round():
    a = jnp.ones((4, 4))

    def forms(a):
        return jax.lax.platform_dependent(a, cpu=lambda a: a @ a, default=lambda a: a @ a @ a)

    def loop(a):
        return jax.lax.fori_loop(0, 3, lambda _, x: jax.jit(lambda x: x @ a)(x), a)

    product = 2 * 4**3
    for function, products in ((forms, 2), (loop, 3), (lambda a: forms(loop(a)), 5)):
        assert flops.matmul_flops(jax.make_jaxpr(function)(a).jaxpr) == products * product


def test_statistics_and_ratios():
    slow, fast = timing.summary([3.0, 1.0, 8.0]), timing.summary([1.5])
    assert slow == {"median": 3.0, "min": 1.0, "max": 8.0, "n": 3}
    assert timing.rates(6, [3.0, 1.0, 2.0]) == {"median": 3.0, "min": 2.0, "max": 6.0, "n": 3}
    seconds = record.faster("x", "s", fast, slow, "peer", 2.0)
    assert (seconds["ratio"], seconds["target"], seconds["met"]) == (2.0, ">= 2", True)
    rates = record.faster("x", "images/s", fast, slow, "peer", 1.1)
    assert (rates["ratio"], rates["met"]) == (0.5, False)
    memory = record.smaller("x", "GiB", fast, slow, "peer", 0.5)
    assert (memory["ratio"], memory["target"], memory["met"]) == (0.5, "<= 0.5", True)
    assert not record.alone("x", "%", fast, 40.0)["met"]
    assert "ratio" not in record.faster("x", "s", fast, None, "", 2.0)


def _record(tmp_path):
    lines = [
        record.faster("1 image", "s", timing.summary([1.0, 2.0, 4.0]), timing.summary([9.0]), "peer", 5.0),
        record.alone("of the peak", "%", timing.summary([250.0])),
    ]
    table = {"title": "Parts", "head": ["part", "ms"], "rows": [["neck", "1.5"]]}
    recorder = record.Recorder("train_step")
    return recorder.finish("cpu", lines, {"device": "CPU"}, tmp_path, ["mind this"], [table])


def test_a_record_becomes_a_row_of_the_table(tmp_path, capsys):
    written = _record(tmp_path)
    assert "x 4.50   target >= 5: MISSED" in capsys.readouterr().out
    records = run.read(tmp_path)
    assert records == {("train_step", "cpu"): written}
    assert {"cpu", "versions", "commit", "command", "date", "seconds"} <= written["machine"].keys()
    text = run.markdown(records)
    row = "| training step, CPU: 1 image | 2.00 s (1.00 to 4.00) | 9.00 s, peer | 4.50 | >= 5 | **missed** |"
    assert row in text.splitlines()
    assert "| training step, CPU: of the peak | 250 % |  |  |  |  |" in text.splitlines()
    assert "| training step, GPU | not measured: no GPU at hand | | | | |" in text.splitlines()
    assert "| neck | 1.5 |" in text and "- mind this" in text and written["machine"]["commit"] in text


def test_only_what_is_between_the_markers_is_replaced(tmp_path):
    file = tmp_path / "RESULTS.md"
    file.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n")
    for _ in range(2):
        run.write(file, "new")
    assert file.read_text() == f"before\n{run.BEGIN}\n\nnew\n\n{run.END}\nafter\n"
    file.write_text("no markers")
    with pytest.raises(UserError, match="put them back"):
        run.write(file, "new")
    (tmp_path / "ops.cpu.json").write_text("[]")
    with pytest.raises(UserError, match=r"ops\.cpu\.json: not a benchmark's record"):
        run.read(tmp_path)


def test_results_are_what_was_measured():
    """RESULTS.md is the table of the JSON files beside it."""
    between = run.RESULTS.read_text().partition(run.BEGIN)[2].partition(run.END)[0]
    assert between.strip() == run.markdown(run.read(record.RESULTS)).strip()


HLO = """\
%fused.1 (p: f32[2]) -> f32[2] {
  ROOT %mul.9 = f32[2]{0} multiply(%p, %p), metadata={op_name="jit(step)/transpose(jvp(F))/F.features/neck/mul"}
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %copy.1 = f32[2]{0} copy(%x)
  %dot.1 = f32[2]{0} dot(%copy.1), metadata={op_name="jit(step)/jvp(F)/F.features/backbone/dot" stack_frame_id=3}
  %fusion.1 = f32[2]{0} fusion(%dot.1), kind=kLoop, calls=%fused.1
  %while.1 = f32[2]{0} while(%fusion.1), metadata={op_name="jit(step)/jvp(F)/proposals/while"}
  ROOT %add.1 = f32[2]{0} add(%while.1, %while.1), metadata={op_name="jit(step)/optimizer/add"}
}
"""


def test_time_is_given_to_the_part_that_an_operation_belongs_to():
    def event(name, begin, end, **arguments):
        return {"ph": "X", "name": name, "ts": begin, "dur": end - begin, "args": arguments}

    events = [
        event("copy.1", 0, 10, hlo_op="copy.1"),
        event("dot.1", 10, 12, hlo_op="dot.1"),  # started, and done on other threads at 30
        event("end: dot.1", 29, 30),
        event("fusion.1", 20, 40, hlo_op="fusion.1"),  # beside it
        event("while.1", 50, 90, hlo_op="while.1"),
        event("add.1", 60, 70, hlo_op="add.1"),  # within the loop
        event("python", 0, 500),
        event("other", 0, 500, hlo_op="of another program"),
    ]
    found = parts.by_part(events, HLO)
    expected = {"backbone forward": 25, "neck backward": 15, parts.IDLE: 10, "proposals forward": 30}
    expected["optimizer forward"] = 10
    assert {key: round(1e6 * value, 3) for key, value in found.items()} == expected
    rows = parts.table("training", [{key: np.float64(x) for key, x in found.items()}])["rows"]
    assert [row[0] for row in rows] == ["backbone", "neck", "proposals", "optimizer", parts.IDLE, "all"]
    assert rows[0][-1] == "27.8 %"


def test_every_part_is_a_name_scope_of_the_models():
    files = [*(ROOT / "fpn_jax" / "models").glob("*.py"), ROOT / "fpn_jax" / "training" / "step.py"]
    source = "".join(file.read_text() for file in files)
    assert all(f'named_scope("{part}")' in source for part in parts.PARTS)


def test_sides_that_differ_are_not_timed():
    losses = {"loss/a": np.float32(1.0), "loss/b": np.float32(2.0)}
    train_step.check(losses, losses)
    with pytest.raises(AssertionError, match="loss/b"):
        train_step.check(losses | {"loss/b": np.float32(2.01)}, losses)
    boxes = np.random.default_rng(0).uniform(0, 90, (100, 4)).astype(np.float32)
    found = {"boxes0": boxes, "scores0": np.linspace(0, 1, 100, dtype=np.float32), "labels0": np.ones(100, int)}
    inference.check(found, found)
    with pytest.raises(AssertionError, match="image 0"):
        inference.check(found | {"boxes0": boxes + np.float32(0.1)}, found)
    with pytest.raises(AssertionError, match="image 0"):
        inference.check(found, {**found, "labels0": np.r_[np.full(5, 2), np.ones(95, int)]})


@pytest.fixture
def tiny(tiny_config):
    """Arguments of our sides for a model that compiles in seconds."""
    names = ("backbone", "neck", "box_head", "rpn", "box")
    values = flat_values(tiny_config.model).items()
    changes = {f"model.{key}": x for key, x in values if key.split(".")[0] in names}
    return {"count": 1, "height": 64, "width": 64, "dtype": "float32", "changes": changes}


def test_our_inference_gives_detections_to_compare(tiny):
    detect = ours.inference(**tiny | {"width": 60}).programs["detect"]
    found = detect.outputs(detect.run(detect.prepare(0)))
    assert found.keys() == {"boxes0", "scores0", "labels0"}
    assert found["boxes0"].shape == (len(found["scores0"]), 4) and found["labels0"].min(initial=1) >= 1


@pytest.mark.slow
def test_our_training_steps_and_its_losses_do_not_depend_on_chance(tiny):
    made = ours.training(**tiny)
    step, losses = made.programs["step"], made.programs["losses"]
    assert all(np.isfinite(x) for _ in range(2) for x in step.outputs(step.run(step.prepare(0))).values())
    same = [losses.outputs(losses.run(losses.prepare(0))) for _ in range(2)]
    assert len(same[0]) == 4 and same[0] == same[1]
    work = made.programs["work"]
    told = {name: x.item() for name, x in work.outputs(work.run(work.prepare(0))).items()}
    assert told["tflop"] > 0 and told["peak_tflop_per_s"] > 0 and told["peak_from"]


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_the_input_pipelines_side_reads_the_pictures_that_were_written(tmp_path, kind):
    ours_input.write_pictures(tmp_path, 9)
    programs = ours_input.pictures(str(tmp_path), kind, batches=2).programs
    assert programs["epoch"].run(0) is None
    first = programs["first"].outputs(programs["first"].run(0))
    assert first["image"].shape == (8, 800, 1088, 3) and first["image"].dtype == kind
    file = cv2.imread(str(tmp_path / "coco" / "train" / "0.jpg"), cv2.IMREAD_COLOR_RGB)
    expected = np.zeros((800, 1088, 3), np.float32)
    expected[:, :1066] = cv2.resize(file.astype(np.float32), (1066, 800))
    both = {"image": first["image"][:1], "boxes": first["boxes"]}
    input_pipeline.check(kind, both, both | {"image": expected[None]})
    with pytest.raises(AssertionError, match=kind):
        input_pipeline.check(kind, both, both | {"image": expected[None, :, ::-1]})
    parts = programs["parts"].run(0)
    assert parts.keys() == {"read and decode", "resize"} and min(parts.values()) > 0


def test_the_input_pipelines_table_has_what_is_left_of_all():
    parts = {side: {"resize": np.float64(x)} for side, x in (("ours", 0.001), ("theirs", 0.003))}
    found = input_pipeline.table("uint8", {"ours": 0.0035, "theirs": 0.004}, parts)
    assert found["head"] == ["part", "ours, ms", "theirs, ms"]
    assert found["rows"] == [["resize", "1.00", "3.00"], ["all else", "2.50", "1.00"], ["all", "3.50", "4.00"]]


def test_the_command_measures_what_it_is_told_and_writes_the_table(tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--repeats=1", f"--output={tmp_path}"]
    rows = ["ops", "evaluation"]
    done = subprocess.run([*command, *rows], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"RESULTS.md", *(f"{row}.cpu.json" for row in rows)}
    table = (tmp_path / "RESULTS.md").read_text()
    for row in rows:
        line = json.loads((tmp_path / f"{row}.cpu.json").read_text())["lines"][0]
        assert record.figure(line["ours"], line["unit"]) in table
    done = subprocess.run([*command, "inputpipeline"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: no benchmark 'inputpipeline'; did you mean input_pipeline?\n")
