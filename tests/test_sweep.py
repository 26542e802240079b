"""A sweep plans, runs, resumes and refuses; a Fast R-CNN takes an RPN's proposals; four stages make one detector."""

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from launching import environment

from fpn_jax import cli, common, evaluate, sweep
from fpn_jax.data.proposals import read
from fpn_jax.errors import UserError
from fpn_jax.propose import propose
from fpn_jax.report import report
from fpn_jax.stages import train_stages
from fpn_jax.training import checkpoint, sharding
from fpn_jax.variants import changed, check_unchanged, difference

ROOT = Path(__file__).parent.parent

COST = functools.cache(sweep.cost)  # as every sweep plans all rows anew


@pytest.fixture
def base(tiny_config, scenes_dir, monkeypatch):
    """Six steps of a detector that compiles in seconds, on one device."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda **how: make_mesh(sharding.first_device(), **how))
    monkeypatch.setattr(sweep, "cost", COST)
    tiny_config.update(num_steps=6, batch_size=2, eval_batch_size=2, checkpoint_every=2, eval_every=3, pictures=1)
    tiny_config.update(ema_decay=0.0)
    tiny_config.data.update(data_dir=str(scenes_dir), max_proposals=(32, 16))
    tiny_config.model.detector = "rpn"
    return tiny_config


def ablation(base, *rows, baseline="fpn"):
    return ml_collections.ConfigDict({"title": "Tiny", "baseline": baseline, "base": base, "rows": rows})


ROWS = (
    {"name": "fpn", "note": "all of it", "changes": {}, "published": {"AR100": 44.0}},
    {"name": "bottom_up", "changes": {"model.neck.top_down": False}, "published": {"AR100": 37.4}},
)
FAST = {
    "model.detector": "fast_rcnn",
    "data.proposals_train": "row:fpn",
    "data.proposals_eval": "row:fpn",
}


def test_a_sweep_runs_its_rows_once_and_the_report_reads_them(tmp_path, base, capsys, monkeypatch):
    config, workdir = ablation(base, *ROWS, {"name": "fast", "changes": FAST}), str(tmp_path / "sweep")
    sweep.sweep(config, workdir, 1, ["fast"])  # which needs the proposals of fpn
    out = capsys.readouterr().out
    assert "fpn, seed 0: finished in" in out and "fast, seed 0: finished in" in out and "bottom_up" in out
    assert not (tmp_path / "sweep" / "bottom_up").exists()
    given = sorted(path.name for path in (tmp_path / "sweep/fpn/seed0/proposals").iterdir())
    assert len(given) == 2 and given[0].startswith("scenes_train_step") and given[1].endswith("_16.npz")
    plan = json.loads((tmp_path / "sweep" / "plan.json").read_text())
    assert [row["name"] for row in plan["rows"]] == ["fpn", "bottom_up", "fast"]
    assert plan["rows"][0]["anchors"] == 3 * (16**2 + 8**2 + 4**2 + 2**2 + 1)
    assert plan["rows"][0]["flops"] > plan["rows"][1]["flops"] > 1e5

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/seed0/metrics.json")}
    sweep.sweep(config, workdir, 1)
    assert "fpn, seed 0: finished before" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    analysis = json.loads((tmp_path / "sweep/fast/seed0/eval/val/analysis.json").read_text())
    assert sum(analysis["levels"]["box"]["rois"]) > 0 and analysis["errors"]["count"]["FN"] > 0
    report([workdir])
    page = (tmp_path / "sweep" / "report" / "report.md").read_text()
    assert "bottom_up" in page and "-6.6" in page  # what the paper has for it

    plan = (tmp_path / "sweep" / "plan.json").read_bytes()
    config.base.num_steps = 7
    with pytest.raises(UserError, match=r"fpn/seed0 was run with another num_steps: 6, now 7; set it back, remove"):
        sweep.sweep(config, workdir, 1, ["fpn"])
    with pytest.raises(UserError, match=r"fpn/seed0 was run with another num_steps"):  # its scores would be compared
        sweep.sweep(config, workdir, 1, ["bottom_up"])
    assert (tmp_path / "sweep" / "plan.json").read_bytes() == plan
    config.base.num_steps = 6
    monkeypatch.chdir(tmp_path)  # the same folders, called otherwise
    sweep.sweep(config, "sweep", 1)
    assert "fast, seed 0: finished before" in capsys.readouterr().out


def test_what_needs_a_failed_row_is_not_run(tmp_path, base, capsys, monkeypatch):
    """Its proposals would be those of a run that is not finished, and never be made anew."""

    def fails(config, workdir):
        raise UserError("step 3: the loss is not finite")

    monkeypatch.setattr(sweep, "train", fails)
    base.data.proposals_train = base.data.proposals_eval = "row:rpn"  # said in the base, not in the row
    on_rpn = {"model.detector": "fast_rcnn"}
    rpn = {"name": "rpn", "changes": {"data.proposals_train": "", "data.proposals_eval": ""}, "in_table": False}
    config = ablation(base, rpn, {"name": "fast", "changes": on_rpn}, baseline="fast")
    with pytest.raises(UserError, match="2 runs failed: rpn, seed 0; fast, seed 0"):
        sweep.sweep(config, str(tmp_path), 1, ["fast"])
    errors = capsys.readouterr().err
    assert "error: rpn, seed 0: step 3: the loss is not finite" in errors
    assert "error: fast, seed 0: row rpn failed, whose run it needs" in errors
    assert not (tmp_path / "fast").exists()


def test_a_row_is_refused_for_its_own_faults_alone(tmp_path, base):
    """Rows run in jobs of their own, on machines of their own."""
    many = {"name": "many", "changes": {"batch_size": 3, "mesh.data": 2}}
    with pytest.raises(UserError, match="row many: "):
        sweep.sweep(ablation(base, ROWS[0], many), str(tmp_path), 1, ["many"])
    assert not (tmp_path / "plan.json").exists()
    base.num_steps = 1
    sweep.sweep(ablation(base, ROWS[0], many), str(tmp_path), 1, ["fpn"])
    assert json.loads((tmp_path / "plan.json").read_text())["rows"][1]["name"] == "many"


def test_a_row_that_another_job_runs_is_waited_for(tmp_path, base, capsys, monkeypatch):
    """As two jobs do that need the same row."""
    monkeypatch.setattr(sweep, "_POLL", 0.0)
    other, tries = checkpoint.claim_workdir(str(tmp_path / "run")), []

    def train(config, workdir):
        tries.append(workdir)
        if len(tries) == 3:
            other.close()
        checkpoint.claim_workdir(workdir).close()

    monkeypatch.setattr(sweep, "train", train)
    assert sweep._run(base, str(tmp_path / "run"), "rpn", 0, {"commit": "abc"}) is None
    out = capsys.readouterr().out
    assert len(tries) == 3 and out.count("waiting for it") == 1 and "rpn, seed 0: finished in" in out
    assert json.loads((tmp_path / "run/made_by.json").read_text()) == {"commit": "abc"}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path, base):
    base.num_steps = 40
    path = tmp_path / "ablation.py"
    values = json.dumps({"base": base.to_dict(), "rows": ROWS[:1]})
    path.write_text(
        "import json, ml_collections\n"
        "def get_config():\n"
        f"    values = json.loads({values!r})\n"
        "    rows = tuple(values['rows'])\n"
        "    config = ml_collections.ConfigDict({'title': 'T', 'baseline': 'fpn', 'base': values['base']})\n"
        "    config.rows = rows\n"
        "    return config\n"
    )
    workdir = tmp_path / "sweep"
    command = [sys.executable, "-m", "fpn_jax.sweep", f"--config={path}", f"--workdir={workdir}", "--seeds=1"]
    victim = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=-3, stderr=-3)
    checkpoints, deadline = workdir / "fpn/seed0/checkpoints", time.monotonic() + 200
    while time.monotonic() < deadline and not any(p.name.isdigit() for p in checkpoints.glob("*")):
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (workdir / "fpn/seed0/metrics.json").exists(), "it ended before it could be killed"
    again = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "continuing at step" in again.stderr
    assert (workdir / "fpn/seed0/metrics.json").exists()


@pytest.mark.slow
def test_four_stages_share_their_features(tmp_path, base):
    base.update(num_steps=4, eval_every=0)
    base.model.detector = "faster_rcnn"
    base.model.backbone.norm = "bn"
    from experiments.faster_rcnn_r50_fpn_4step import stages

    base.stages = tuple({"name": s["name"], "changes": s["changes"]} for s in stages(4, 4, (32, 16)))
    sweep.sweep(ablation(base, ROWS[0]), str(tmp_path), 1)
    workdir = tmp_path / "fpn" / "seed0"
    saved = {}
    for name in ("1_rpn", "2_fast_rcnn", "3_rpn", "4_fast_rcnn", "."):
        with checkpoint.Checkpoints(str(workdir / name)) as checkpoints:
            variables, _ = checkpoints.saved_weights("best")
        saved[name] = {kind: flat(variables[kind]) for kind in ("params", "batch_stats")}
    shared = [key for key in saved["."]["params"] if key.split("/")[0] in ("backbone", "neck")]
    assert len(shared) > 20
    for name in ("3_rpn", "4_fast_rcnn", "."):
        for key in shared:
            np.testing.assert_array_equal(saved[name]["params"][key], saved["2_fast_rcnn"]["params"][key])
        for key, value in saved[name]["batch_stats"].items():  # statistics of frozen parts stand still, too
            np.testing.assert_array_equal(value, saved["2_fast_rcnn"]["batch_stats"][key])
    assert any((saved["1_rpn"]["params"][key] != saved["."]["params"][key]).any() for key in shared)
    for name, part in (("3_rpn", "rpn_head"), ("4_fast_rcnn", "box_head")):
        for key in [key for key in saved["."]["params"] if key.startswith(part)]:
            np.testing.assert_array_equal(saved["."]["params"][key], saved[name]["params"][key])
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert evaluate.evaluate(str(workdir), None, "best", 0, None) == metrics


def flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix[:-1]: np.asarray(tree)}
    return {key: x for name, value in tree.items() for key, x in flat(value, f"{prefix}{name}/").items()}


def test_proposals_of_an_rpn_are_saved_and_read(tmp_path, base, monkeypatch, capsys):
    sweep.sweep(ablation(base, ROWS[0]), str(tmp_path), 1)
    workdir = tmp_path / "fpn" / "seed0"
    output = tmp_path / "found.npz"
    flags = [f"--workdir={workdir}", "--split=train", f"--output={output}", "--most=20"]
    command = [sys.executable, "-m", "fpn_jax.propose", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = read(output)
    assert len(table.image_id) == 16 and max(np.diff(table.offsets)) <= 20
    again = read(workdir / "eval" / "val" / "proposals.npz")
    assert len(again.image_id) == 5 and (again.boxes[:, 2:] >= again.boxes[:, :2]).all()


@pytest.mark.parametrize(("before", "seen"), [(0, 0), (10, 20), (30, 30)])  # 0: all
def test_nms_sees_as_many_as_are_asked_for(tmp_path, base, monkeypatch, before, seen):
    base.model.rpn.pre_nms_test = before
    monkeypatch.setattr(checkpoint, "read_config", lambda workdir: base)

    def make_detector(config, classes):
        raise UserError(f"{config.model.rpn.pre_nms_test} before, {config.model.rpn.post_nms_test} after")

    monkeypatch.setattr(common, "make_detector", make_detector)
    monkeypatch.setattr(common.Classes, "read", lambda workdir: None)
    with pytest.raises(UserError, match=f"^{seen} before, 20 after"):
        propose(str(tmp_path), None, tmp_path / "found.npz", 20)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (({"name": "a b", "changes": {}},), r"row 'a b' is there twice or is no plain word"),
        (({"name": "fpn"},), r"rows\[0\] lacks 'name' or 'changes'"),
        (({"name": 1, "changes": {}},), r"rows\[0\] lacks 'name' or 'changes'"),
        (("fpn",), r"rows\[0\] lacks 'name' or 'changes'"),
        (({"name": "fpn", "changes": None},), r"row fpn: changes is None; give a dict"),
        (({"name": "fpn", "changes": {}, "published": 3},), r"row fpn: published is 3; give a dict"),
        (({"name": "fpn", "changes": {"stages": ({"nam": "a"},)}},), r"row fpn: config.stages\[0\] must be"),
        (
            ({"name": "fpn", "changes": {}, "notes": ""},),
            r"row 'fpn' has an unknown 'notes'; keys are changes, in_table",
        ),
        (
            ({"name": "fpn", "changes": {"model.nek.channels": 3}},),
            r"row fpn: the config has no model.nek.channels; did",
        ),
        (({"name": "fpn", "changes": {"model.neck.channels": "3"}},), r"row fpn: model.neck.channels is '3', a str"),
        (
            ({"name": "fpn", "changes": {"model.neck.lateral": False, "model.neck.top_down": False}},),
            r"row fpn: model.neck.lateral and model.neck.top_down are both False",
        ),
        (
            ({"name": "fpn", "changes": {"model.rpn.levels": (2, 3, 4, 5, 7)}},),
            r"row fpn: model.rpn.levels .* no level 7",
        ),
        (({"name": "fpn", "changes": FAST},), r"row fpn: data.proposals_train names row 'fpn', which must come before"),
        *(
            (({"name": "fpn", "changes": {key: value}},), f"row fpn: {message}")
            for key, value, message in (
                ("data.eval_split", "train", "data.eval_split is changed, but rows are compared at the same"),
                ("seed", 7, "seed is changed, but rows are compared at the same; set --config.base.seed"),
                ("optim.name", "lion", "optim.name is 'lion'; choose one of sgd, adamw"),
                ("optim.schedule", "poly", "optim.schedule is 'poly'; choose one of step, cosine, constant"),
                ("optim", {"name": "sgd"}, "optim is a dict; name each key, as in optim.name"),
                ("data.shorter", None, "data.shorter is None: None is not a number"),
            )
        ),
        (({"name": "other", "changes": {}},), r"baseline is 'fpn'; choose one of the rows other"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(tmp_path, base, rows, message):
    with pytest.raises(UserError, match=message):
        sweep.sweep(ablation(base, *rows), str(tmp_path / "sweep"), 1)
    assert not (tmp_path / "sweep").exists()


def test_unknown_rows_and_configs_that_are_no_ablation_are_refused(tmp_path, base):
    with pytest.raises(UserError, match="there is no row 'top_down'; choose some of fpn, bottom_up"):
        sweep.sweep(ablation(base, *ROWS), str(tmp_path / "sweep"), 1, ["top_down"])
    with pytest.raises(UserError, match="--config has no title: it is no ablation"):
        sweep.check_rows(base)


def test_two_configs_can_be_compared(capsys):
    config = cli.load_config(str(ROOT / "experiments/ablations/rpn.py:scenes"))
    sweep._print_difference(config, ["fpn", "bottom_up"])
    assert capsys.readouterr().out.splitlines() == [
        "fpn -> bottom_up: 1 keys differ",
        "  model.neck.top_down  True -> False",
    ]
    sweep._print_difference(config, ["finest"])
    assert "  model.neck.outputs       () -> (2,)" in capsys.readouterr().out
    sweep._print_difference(config, ["fpn", str(ROOT / "experiments/demo.py")])
    assert "num_steps                600 -> 750" in capsys.readouterr().out
    with pytest.raises(UserError, match="'top' is neither a config file nor one of the rows c4"):
        sweep._print_difference(config, ["top"])


def test_changes_leave_the_base_and_take_whole_groups(base):
    other = changed(base, {"model.neck": {"name": "none", "levels": (4,)}, "seed": 5}, "row")
    assert other.model.neck.to_dict() == {"name": "none", "levels": (4,)}
    assert base.model.neck.name == "fpn" and base.seed == 0
    assert ("seed", 0, 5) in difference(base, other)
    resolved = changed(base, {"init_from": "stage:1"}, "row", {"stage:1": "/some/where"})
    assert resolved.init_from == "/some/where"
    with pytest.raises(UserError, match="row: init_from is 'stage:2'; name one that comes before: stage:1"):
        changed(base, {"init_from": "stage:2"}, "row", {"stage:1": "/some/where"})


def test_what_is_missing_here_or_there_has_its_default(base, tmp_path):
    """A dict for a part of the model has fewer keys than the base: what they would say may differ all the same."""
    group = {key: value for key, value in base.model.neck.to_dict().items() if key in ("name", "channels")}
    checkpoint.write_config(str(tmp_path), changed(base, {"model.neck": group}, "row"))
    check_unchanged(base, str(tmp_path))
    with pytest.raises(UserError, match=r"was run with another model, by model\.neck\.\w+, .*; set it back, remove"):
        check_unchanged(changed(base, {"model.neck.lateral": False}, "row"), str(tmp_path))
    stages = {"stages": ({"name": "one", "changes": {"num_steps": 999}},)}
    with pytest.raises(UserError, match="was run with another stages"):
        check_unchanged(changed(base, stages, "row"), str(tmp_path))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}")  # of before config.json told of stages
    check_unchanged(changed(base, stages, "row"), str(tmp_path))
    with pytest.raises(UserError, match=r"no model\.neck\.levels; did you mean (?!model\.neck\.levels)"):
        changed(base, {"model.neck": {"name": "fpn", "channels": 8}, "model.neck.levels": (2,)}, "row")


def test_a_workdir_stays_what_its_stages_made_of_it(base, tmp_path):
    base.stages = ({"name": "one", "changes": {}},)
    checkpoint.write_config(str(tmp_path), base)
    base.stages = (*base.stages, {"name": "two", "changes": {}})
    with pytest.raises(UserError, match=r"was made of the stages one, now config\.stages has one, two; set them back"):
        train_stages(base, str(tmp_path), lambda config, workdir: pytest.fail("a stage was trained"))


def test_the_readmes_own_ablation_is_one(tmp_path):
    readme = (ROOT / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    path = tmp_path / "width.py"
    path.write_text(code)
    assert len([line for line in code.splitlines() if line]) <= 11
    assert list(sweep.check_rows(cli.load_config(str(path)))) == ["d16", "d32", "d64"]
