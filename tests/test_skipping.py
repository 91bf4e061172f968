"""Skipped tiles are never read, and nothing beyond the ends of the arrays is: shown with inaccessible pages."""
import os
import signal
import subprocess
import sys

import guarded
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")


def run(scenario, build):
    command = [sys.executable, guarded.__file__, scenario.__name__, build]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("scenario", guarded.SCENARIOS, ids=lambda f: f.__name__)
def test_never_touches(build, scenario):
    result = run(scenario, build)
    assert result.returncode == 0 and "finished" in result.stdout, (result.returncode, result.stderr)


@pytest.mark.parametrize("scenario", guarded.CONTROLS, ids=lambda f: f.__name__)
def test_touching_is_noticed(build, scenario):
    result = run(scenario, build)
    assert "alive" in result.stdout and result.returncode in (-signal.SIGSEGV, -signal.SIGBUS), result
