"""Skipped tiles are never read, and nothing beyond the ends of the arrays is: shown with inaccessible pages."""
import os
import signal
import subprocess
import sys

import guarded
import pytest

from cyflash import cpu

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
DEAD = {-signal.SIGSEGV, -signal.SIGBUS}


def run(scenario):
    """({build: exit status of the scenario}, what was said) for every build that runs here."""
    command = [sys.executable, guarded.__file__, scenario.__name__, *cpu.runnable()]
    path = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) == 2}, done.stdout + done.stderr


@pytest.mark.parametrize("scenario", guarded.SCENARIOS, ids=lambda f: f.__name__)
def test_never_touches(scenario):
    found, said = run(scenario)
    assert found == dict.fromkeys(cpu.runnable(), 0), said


@pytest.mark.parametrize("scenario", guarded.CONTROLS, ids=lambda f: f.__name__)
def test_touching_is_noticed(scenario):
    found, said = run(scenario)
    assert tuple(found) == cpu.runnable() and set(found.values()) <= DEAD, said
    assert said.count("alive\n") == len(found), said
