"""The compiled modules: no instruction above their build, none imported without need, and inputs never written."""
import os
import platform
import re
import subprocess
import sys
import sysconfig

import cases
import disassembly
import numpy as np
import pytest

import cyflash

MACHINE = {"x86_64": "x86", "amd64": "x86", "aarch64": "aarch64", "arm64": "aarch64"}.get(platform.machine().lower())
needs_objdump = pytest.mark.skipif(
    MACHINE is None or disassembly.disassembler(MACHINE) is None,
    reason=f"no objdump (binutils) that knows {platform.machine()}",
)
# rules that have to fail on the module of a build above theirs
BUILDS_ABOVE = {
    "x86": [
        ("baseline", "avx2"), ("baseline", "avx512"), ("avx2", "avx512"), ("avx2", "avxvnni"),
        ("avxvnni", "avx512_vnni"), ("avx512", "avx512_vnni"), ("avx512", "avxvnni"), ("avx512_vnni", "avx512_bf16"),
    ],
    "aarch64": [("baseline", "neon")],
}


def module_path(name):
    folder = os.path.dirname(cyflash.cpu.__file__)
    (path,) = (os.path.join(folder, file) for file in os.listdir(folder) if re.match(rf"{name}\..*(so|pyd)$", file))
    return path


def test_every_build_has_a_rule():
    for rules in (disassembly.MUST_NOT, disassembly.MUST):
        assert set().union(*rules.values()) == set(cyflash.cpu.BUILDS)


@needs_objdump
@pytest.mark.parametrize("name", disassembly.MUST_NOT.get(MACHINE, ()))
def test_no_instruction_above_the_build(name):
    """Of every module that was built, also of those that this machine cannot run."""
    if not cyflash.cpu_info()["builds"][name]["built"]:
        pytest.skip(f"{name} was not built")
    listed = disassembly.instructions(module_path(f"_{name}"), MACHINE)
    assert disassembly.has_kernels(listed, name, MACHINE), "this is not the kernel"
    assert disassembly.above(listed, name, MACHINE)[:10] == []


@needs_objdump
@pytest.mark.parametrize(("judge", "module"), BUILDS_ABOVE.get(MACHINE, ()))
def test_the_disassembly_notices(judge, module):
    """Each rule fails on the module of a build above."""
    if not cyflash.cpu_info()["builds"][module]["built"]:
        pytest.skip(f"{module} was not built")
    listed = disassembly.instructions(module_path(f"_{module}"), MACHINE)
    assert disassembly.above(listed, judge, MACHINE)


@needs_objdump
@pytest.mark.parametrize("name", ["detect", "observe"])
def test_what_every_cpu_loads_runs_on_any(name):
    """The module that probes the processor, and the other one that is not chosen by what it finds."""
    listed = disassembly.instructions(module_path(name), MACHINE)
    # verr: what objdump makes of data between functions
    assert [i for i in disassembly.above(listed, "baseline", MACHINE) if not i.startswith("verr ")][:10] == []


def python(script, **environment):
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("forced", ["baseline", "avx2"])
def test_only_the_forced_build_is_imported(forced):
    """Neither by import, nor by a call, nor by looking at what there is."""
    if not cyflash.cpu_info()["builds"].get(forced, {}).get("runs"):
        pytest.skip(f"{forced} does not run here")
    script = (
        "import sys, numpy as np, cyflash\n"
        "x = np.ones((3, 4), np.float32); cyflash.flash_attention(x, x, x)\n"
        "cyflash.cpu.runnable(); print(cyflash.cpu_info()['implementation'])\n"
        "print(*[m for m in sys.modules if m.startswith('cyflash.cpu._')])"
    )
    code, text = python(script, CYFLASH_ISA=forced)
    assert code == 0, text
    assert text.split() == [forced, f"cyflash.cpu._{forced}"]


def test_unknown_build_by_environment():
    script = "import numpy as np, cyflash; x = np.ones((3, 4), np.float32); cyflash.flash_attention(x, x, x)"
    code, text = python(script, CYFLASH_ISA="nonsense")
    assert code != 0 and "CYFLASH_ISA" in text and "nonsense" in text and "baseline" in text


def test_set_implementation(monkeypatch):
    monkeypatch.delenv("CYFLASH_ISA", raising=False)
    before = cyflash.cpu_info()["implementation"]
    assert before in cyflash.cpu.runnable()
    with cyflash.set_implementation("baseline"):
        assert cyflash.cpu_info()["implementation"] == "baseline"
        with cyflash.set_implementation(None):
            assert cyflash.cpu_info()["implementation"] == cyflash.cpu.runnable()[-1]
        assert cyflash.cpu_info()["implementation"] == "baseline"
    assert cyflash.cpu_info()["implementation"] == before
    with pytest.raises(ValueError, match=r"baseline.*nonsense"):
        cyflash.set_implementation("nonsense")
    assert cyflash.cpu_info()["implementation"] == before


def test_missing_builds_raise():
    for name, status in cyflash.cpu_info()["builds"].items():
        if not status["runs"]:
            with pytest.raises(RuntimeError, match=name):
                cyflash.set_implementation(name)


def test_inputs_are_never_written(build):
    options = cases.all_options(2, 4, 40, 50)
    arrays = dict(zip("qkv", cases.arrays(2, 4, 2, 40, 50, 24), strict=True)) | options
    arrays = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in arrays.items()}
    copies = {name: x.copy() for name, x in arrays.items() if isinstance(x, np.ndarray)}
    cyflash.flash_attention(**arrays)
    for name, x in copies.items():
        assert np.array_equal(arrays[name], x), name
    for name in copies:
        arrays[name].flags.writeable = False
    cyflash.flash_attention(**arrays)


def test_floating_point_state_is_left_alone(build):
    """Denormals are neither flushed during a call nor afterwards."""
    cyflash.flash_attention(*cases.arrays(1, 2, Lq=300), num_threads=2)
    assert np.float32(1e-38) / np.float32(4) > 0
    assert sys.float_info.min / 4 > 0


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python is not free-threaded")
def test_no_module_brings_the_gil_back():
    """Python turns it on, with a warning, at the import of a module that does not declare that it can do without."""
    modules = ", ".join(f"cyflash.cpu._{build}" for build in cyflash.cpu.runnable())
    program = f"import sys; import cyflash, cyflash.cpu.observe, {modules}; print(sys._is_gil_enabled())"
    environment = {name: x for name, x in os.environ.items() if name != "PYTHON_GIL"}
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("False\n", "")
