"""Every script in examples/ runs, in a copy of the folder: what a script writes beside itself is thrown away."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def imported(script):
    """Names of the top-level packages that the script imports, wherever in it."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_there_are_examples():
    assert "quickstart.py" in SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(name, tmp_path):
    missing = sorted({package for package in imported(EXAMPLES / name) if importlib.util.find_spec(package) is None})
    if missing:
        pytest.skip(f"{name} needs {', '.join(missing)}")
    folder = shutil.copytree(EXAMPLES, tmp_path / "examples")
    environment = os.environ | {"MPLBACKEND": "Agg", "CYFLASH_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, folder / name], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout
    assert "Traceback" not in run.stderr
