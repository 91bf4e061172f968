"""Without memory a call raises MemoryError, leaks nothing, and leaves nothing behind; see failing_allocations.py."""
import json
import subprocess
import sys

import allocator
import failing_allocations
import pytest

import cyflash

pytestmark = pytest.mark.skipif(bool(allocator.why_not()), reason=allocator.why_not() or "can run")


def fail_every_allocation(build, folder, *names):
    command = [sys.executable, "-P", "-X", "faulthandler", failing_allocations.__file__, build, *names]
    environment = allocator.environment(folder)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-5000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(outcomes):
    for outcome in outcomes:
        assert outcome["allocations"] > 0, outcome
        assert not outcome["wrong"], (outcome["call"], outcome["wrong"][:5])


def test_every_allocation_fails_once(tmp_path):
    outcomes = fail_every_allocation(cyflash.cpu.runnable()[-1], tmp_path)
    assert [outcome["call"] for outcome in outcomes] == list(failing_allocations.CALLS)
    check(outcomes)


@pytest.mark.slow
def test_on_every_build(build, tmp_path):
    check(fail_every_allocation(build, tmp_path))
