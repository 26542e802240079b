"""python -m fpn_jax names the commands."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_command_is_named_with_what_it_does():
    done = subprocess.run([sys.executable, "-m", "fpn_jax"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    programs = [f.stem for f in (ROOT / "fpn_jax").glob("*.py") if "cli.run(main" in f.read_text()]
    assert sorted(lines[::2]) == sorted(f"python -m fpn_jax.{name} --help" for name in programs)
    wrong = subprocess.run([*done.args, "train"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode and "'train' is no command of this form" in wrong.stderr
    assert all(line.startswith("    ") and line.endswith((".", "data")) for line in lines[1::2])
