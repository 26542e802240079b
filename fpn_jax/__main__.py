"""The commands of fpn_jax, a line each: python -m fpn_jax."""

import ast
import sys
from pathlib import Path


def commands() -> dict[str, str]:
    """What each command does, by its name: modules that are programs, and their docstrings' first lines."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(x, ast.FunctionDef) and x.name == "main" for x in module.body):
            found[file.stem] = (ast.get_docstring(module) or "").splitlines()[0]
    return found


if __name__ == "__main__":
    for name, line in commands().items():
        print(f"python -m fpn_jax.{name} --help\n    {line}")
    if [word for word in sys.argv[1:] if word not in ("--help", "-h")]:
        sys.exit(f"error: {sys.argv[1]!r} is no command of this form; say python -m fpn_jax.NAME, as above")
