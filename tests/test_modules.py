"""The compiled modules: no instruction above their build, none imported without need, and inputs never written."""
import os
import platform
import re
import shutil
import subprocess
import sys

import cases
import numpy as np
import pytest

import cyflash

x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="x86 instructions")
needs_objdump = pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")

# Names of instructions beyond SSE2, which every x86-64 has, as far as they have no VEX form that starts with v.
BEYOND_SSE2 = re.compile(
    r"^(pshufb|palignr|pabs[bwd]|phadd|phsub|pmulhrsw|pmaddubsw|psign|haddp|hsubp|addsubp|lddqu|movs[hl]dup|movddup|pblend|blend|"
    r"dpp[sd]|round[ps][sd]|ptest|pmulld|pmuldq|p(max|min)(s[bd]|u[wd])|pmov[sz]x|packusdw|pcmp[eg][qt]q|insertps|extractps|"
    r"pinsr[bdq]|pextr[bdq]|mpsadbw|popcnt|crc32|andn|bextr|bls|bzhi|pdep|pext(?!rw)|mulx|rorx|sarx|shlx|shrx|aes|pclmul)"
)
AVX512_REGISTERS = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]")
# Dot products of AVX-512 VNNI; AVX-VNNI has them in the VEX encoding, which objdump marks with a prefix of its own.
BF16 = "vdpbf16|vcvtne.*ps2bf16|tdp|tile"
MUST_NOT = {
    "baseline": lambda name, operands: name.startswith("v") or name == "{vex}" or BEYOND_SSE2.match(name)
    or (name == "pextrw" and "(" in operands),  # to a register it is SSE2, to memory SSE4.1
    "avx2": lambda name, operands: AVX512_REGISTERS.search(operands) or re.match(r"vpdp|\{vex\}", name),
    "avxvnni": lambda name, operands: AVX512_REGISTERS.search(operands) or name.startswith("vpdp"),
    "avx512": lambda name, operands: re.match(rf"vpdp|\{{vex\}}|{BF16}", name),
    "avx512_vnni": lambda name, operands: re.match(rf"\{{vex\}}|{BF16}", name),
    "avx512_bf16": lambda name, operands: re.match(r"\{vex\}|tdp|tile", name),
}
MUST = {
    "baseline": "mulps", "avx2": "vpmaddwd.*%ymm", "avxvnni": "vpdpbusd.*%ymm", "avx512": "vpmaddwd.*%zmm",
    "avx512_vnni": "vpdpbusd.*%zmm", "avx512_bf16": "vdpbf16ps.*%zmm",
}  # fmt: skip


def instructions(path):
    """(name, operands) of every instruction."""
    command = ["objdump", "-d", "--no-show-raw-insn", path]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if match := re.match(r"\s+[0-9a-f]+:\s+(?:(?:lock|repz?|repnz|data16|cs|notrack|bnd)\s+)*(\S+)\s*(.*)", line):
            yield match.groups()


def module_path(build):
    folder = os.path.dirname(cyflash.cpu.__file__)
    (path,) = (os.path.join(folder, name) for name in os.listdir(folder) if re.match(rf"_{build}\..*(so|pyd)$", name))
    return path


@x86
@needs_objdump
@pytest.mark.parametrize("name", MUST_NOT)
def test_no_instruction_above_the_build(name):
    """Of every module that was built, also of those that this machine cannot run."""
    if not cyflash.cpu_info()["builds"][name]["built"]:
        pytest.skip(f"{name} was not built")
    listed = list(instructions(module_path(name)))
    assert any(re.search(MUST[name], " ".join(i)) for i in listed), "this is not the kernel"
    above = {" ".join(i) for i in listed if MUST_NOT[name](*i)}
    assert not above, sorted(above)[:10]


@x86
@needs_objdump
@pytest.mark.parametrize(("judge", "module"), [
    ("baseline", "avx2"), ("baseline", "avx512"), ("avx2", "avx512"), ("avx2", "avxvnni"), ("avxvnni", "avx512_vnni"),
    ("avx512", "avx512_vnni"), ("avx512", "avxvnni"), ("avx512_vnni", "avx512_bf16"),
])
def test_the_disassembly_notices(judge, module):
    """Each rule fails on the module of a build above."""
    if not cyflash.cpu_info()["builds"][module]["built"]:
        pytest.skip(f"{module} was not built")
    assert any(MUST_NOT[judge](*i) for i in instructions(module_path(module)))


@x86
@needs_objdump
def test_detection_runs_anywhere():
    """The module that probes the processor is itself of the baseline."""
    folder = os.path.dirname(cyflash.cpu.__file__)
    (path,) = (os.path.join(folder, name) for name in os.listdir(folder) if re.match(r"detect\..*(so|pyd)$", name))
    above = {" ".join(i) for i in instructions(path) if MUST_NOT["baseline"](*i) and i[0] != "verr"}
    assert not above, sorted(above)[:10]


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
