"""A user's mistake on the command line is one line on stderr that says what to do, and exit status 2."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fpn_jax import cli
from fpn_jax.errors import UserError

ROOT = Path(__file__).parent.parent
SHOW = """
from fpn_jax import cli
config = cli.config_flag()
def main(argv):
    cli.check_required(config=config.value)
    print(config.value.batch_size, config.value.data.shorter, config.value.optim.learning_rate)
cli.run(main)
"""


def show(*arguments, cwd=ROOT):
    command = [sys.executable, "-c", SHOW, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})


def test_a_pipe_that_is_closed_ends_a_command_without_a_word():
    """As `| head -1` closes it; few lines are noticed at the end alone, many while they are written."""
    for lines in (1, 50_000):
        body = f"from fpn_jax import cli\ndef main(argv):\n for _ in range({lines}): print('so much')\ncli.run(main)"
        piped = f"{shlex.quote(sys.executable)} -c {shlex.quote(body)} | true; exit ${{PIPESTATUS[0]}}"
        environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
        slow = piped.replace("def main(argv):", "import time\ndef main(argv):\n time.sleep(0.5)")  # true has ended
        done = subprocess.run(["bash", "-c", slow], capture_output=True, text=True, env=environment)
        assert (done.stderr, done.returncode) == ("", 128 + signal.SIGPIPE)


def test_of_a_value_given_twice_the_last_counts():
    once, twice = "--config.data.shorter=(96,)", "--config.data.shorter=(64, 80)"
    done = show("--config=experiments/demo.py", twice, "--config.batch_size=2", once, "--config.batch_size=3")
    assert done.stdout.split(" ", 1)[0] == "3" and "(96,)" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((), ["--config="]),
        (("--config.data.data_dir=x",), ["--config.data.data_dir", "--config= is missing", "experiments/"]),
        (("--config", "experiments/demo.py", "--config.lr=0.1"), ["--config.optim.learning_rate?"]),
        (("--config=experiments/demo.py", "--config.optim.wd=0.1"), ["--config.optim.weight_decay?"]),
        (("--config=experiments/demo.py", "--config.momentun=0.1"), ["--config.optim.momentum?"]),
        (("--config=experiments/demo.py", "--config.zzzz=1"), ["--config.zzzz", "the keys are accumulate, batch_size"]),
        (("--config=nope.py",), ["nope.py", "experiments/"]),
        (("--config=README.md",), ["README.md"]),
        (("--config=experiments/demo.py", "--config.batch_sizee=4"), ["batch_sizee", "--config.batch_size?"]),
        (("--config=experiments/demo.py", "--config.optim.learning_rat=4"), ["--config.optim.learning_rate?"]),
        (("--config=experiments/demo.py", "--config.learning_rate=4"), ["--config.optim.learning_rate?"]),
        (("--config=experiments/demo.py", "--config.batch_size=many"), ["batch_size", "many"]),
        (("--config=experiments/demo.py", "--cofnig=4"), ["--cofnig", "--config?"]),
        (("--config=experiments/demo.py", "--config.batch_size=4", "8"), ["'8' is no flag", "without spaces"]),
        (
            ("--config=experiments/demo.py", "--config.model.neck.extra_level=maybe"),
            ["extra_level=maybe: Non-boolean argument to boolean flag, maybe; give"],
        ),
        (("--config=experiments/ablations/rpn.py:nope",), ["there is no size 'nope'", "correct it"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(arguments, names):
    done = show(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    for name in names:
        assert name in done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1", "defines no get_config(); see the experiments/ folder"),
        ("import nowhere_at_all", "cannot be loaded (No module named 'nowhere_at_all'); install it, or correct it"),
        (
            "import experiments.nowhere",
            "cannot be loaded (No module named 'experiments.nowhere'); start it in the folder",
        ),
        ("x = 1 / 0", "cannot be loaded (ZeroDivisionError: division by zero); correct it"),
    ],
)
def test_what_is_wrong_with_a_config_file_is_told(tmp_path, text, told):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=re.escape(f"--config={tmp_path}/mine.py {told}")):
        cli.load_config(f"{tmp_path}/mine.py")


def test_help_lists_the_flags_of_the_program_and_no_others():
    for module, own in (("train", ["config", "workdir"]), ("evaluate", None), ("predict", None), ("report", None)):
        command = [sys.executable, "-m", f"fpn_jax.{module}", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert f"python -m fpn_jax.{module}" in done.stdout and "--workdir=\n" in done.stdout
        found = re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE)
        # What the program's own lines define, in their order.
        source = (ROOT / "fpn_jax" / f"{module}.py").read_text()
        defined = re.findall(r"cli\.(?:flag\(\s*\"(\w+)\"|config_flag)", source)
        assert found == [name or "config" for name in defined]
        assert own is None or found == own
    done = subprocess.run([sys.executable, "-m", "benchmarks.ops", "-h"], cwd=ROOT, capture_output=True, text=True)
    assert re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE) == ["quick", "output", "repeats"]  # those all share


def test_overrides_arrive_and_the_folder_does_not_matter(tmp_path):
    config = f"--config={ROOT}/experiments/demo.py"
    done = show(config, "--config.batch_size=4", "--config.data.shorter=(64, 96)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 (64, 96) ")


def test_the_interpreter_is_named_as_it_can_be_typed_here(tmp_path, monkeypatch):
    system, here = tmp_path / "usr" / "python", tmp_path / "project" / ".venv" / "bin" / "python"
    for path in (system, here):
        path.parent.mkdir(parents=True)
    system.write_text("")
    system.chmod(0o755)
    here.symlink_to(system)
    monkeypatch.setattr(sys, "executable", str(here))
    monkeypatch.setenv("PATH", str(system.parent))  # another python, though the environment's is a link to it
    monkeypatch.chdir(tmp_path / "project")
    assert cli.interpreter() == ".venv/bin/python"
    monkeypatch.chdir(tmp_path / "usr")
    assert cli.interpreter() == str(here)
    monkeypatch.setenv("PATH", str(here.parent))  # activated
    assert cli.interpreter() == "python"
