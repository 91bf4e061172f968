"""CPUs that this machine is not, by qemu: the build that each chooses, what it refuses, and the kernels' tests on it.

Skipped with the reason where qemu is not installed; those of AArch64 where `python -m tests.emulated --prepare` was not
run. What the emulator is trusted with is tested too: that it lacks the instructions that the CPU lacks.
"""
import json
import re
import signal
import subprocess

import disassembly
import numpy as np
import pytest
from emulated import __main__ as command
from emulated import aarch64, python, smoke
from emulated.models import MODELS

from cyflash import cpu, reference

BUILT = {"x86_64": {"baseline", "avx2", "avx512"}, "aarch64": {"baseline", "neon"}}  # at least
# the least CPUs that run all tests of the kernels on every build that can be emulated
WHOLE = ("SandyBridge", "Haswell", "cortex-a53", "cortex-a76")


@pytest.fixture
def on(tmp_path):
    """Runs smoke.py on a CPU."""

    def run(name, *arguments):
        if reason := python.why_not(name):
            pytest.skip(reason)
        command = [python.interpreter(name, tmp_path), "-P", smoke.__file__, *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("name", MODELS)
def test_the_right_build_is_chosen_and_the_others_are_refused(on, name):
    done = on(name)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chosen"] == MODELS[name].build
    assert found["chosen"] == found["runnable"][-1] and found["runnable"][0] == "baseline"
    assert set(found["refused"]) == set(cpu.BUILDS) - set(found["runnable"])
    for kind, exact, bound in (("fp32", reference.attention, 2e-6), ("int8", reference.attention_int8, 1e-5)):
        assert np.abs(np.array(found[kind]) - exact(*smoke.qkv(), causal=True)).max() < bound, kind
    assert BUILT[MODELS[name].machine] <= set(found["built"])
    for build, messages in found["refused"].items():
        lacks = [feature for feature in cpu.BUILDS[build] if feature not in found["features"]]
        assert lacks
        reason = f"this machine lacks {', '.join(lacks)}" if build in found["built"] else "not built"
        refused = f"implementation '{build}' cannot be used: {reason}; usable here: {', '.join(found['runnable'])}"
        assert messages == [refused, f"CYFLASH_ISA={build}: {refused}"]


@pytest.mark.parametrize(
    ("name", "refused"), [("IvyBridge", "avx2"), ("Haswell", "avx512"), ("cortex-a72", "neon"), ("a64fx", "neon")],
)
def test_the_emulator_lacks_what_the_cpu_lacks(on, name, refused):
    """A build that is refused dies of its instructions, when it is run regardless."""
    done = on(name, refused)
    assert done.returncode == -signal.SIGILL and "alive" not in done.stdout, done.stderr


@pytest.mark.skipif(bool(aarch64.why_not()), reason=aarch64.why_not())
@pytest.mark.parametrize("name", ["_baseline", "_neon", "detect", "observe"])
def test_no_instruction_above_the_build(name):
    """Of AArch64's modules, on a machine of another kind; test_modules.py does it on its own."""
    if disassembly.disassembler("aarch64") is None:
        pytest.skip("no objdump that knows aarch64 (binutils-aarch64-linux-gnu)")
    (path,) = (path for path in aarch64.modules() if path.name.startswith(f"{name}."))
    build = name.removeprefix("_") if name.startswith("_") else "baseline"
    listed = disassembly.instructions(path, "aarch64")
    assert disassembly.above(listed, build, "aarch64")[:10] == []
    assert disassembly.has_kernels(listed, build, "aarch64") or not name.startswith("_")
    assert bool(disassembly.above(listed, "baseline", "aarch64")) == (name == "_neon"), "the rule notices"


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", WHOLE)
def test_all_tests_of_the_kernels(name):
    if reason := python.why_not(name):
        pytest.skip(reason)
    done = command.run(name, [], capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"\d{3,} passed", done.stdout), done.stdout[-5000:]
