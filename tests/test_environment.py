"""The floating-point environment: imports and calls leave it as it was, in all threads, and no bit depends on it."""
import ast
import glob
import os
import platform
import shutil
import subprocess
import sysconfig

import cases
import forking
import numpy as np
import pytest

import cyflash
from cyflash.cpu import team
from cyflash.quant import Calibrator, quantize

X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("aarch64", "arm64")
pytestmark = pytest.mark.skipif(not (X86 or ARM), reason="no environment of this CPU is read")

# MXCSR: flags 0x3f, DAZ 0x40, masks of traps 0x1f80, rounding 0x6000, FTZ 0x8000. FPCR, above FPSR: rounding bits 22
# and 23, FZ 24.
DEFAULT, FLAGS = (0x1F80, 0x3F) if X86 else (0, 0xFFFFFFFF)
OTHERS = {
    "denormals flushed": 0x9FC0, "rounded down": 0x3F80, "rounded up": 0x5F80, "rounded to zero": 0x7F80,
    "everything else": 0xFFC0,
} if X86 else {
    "denormals flushed": 1 << 56, "rounded down": 2 << 54, "rounded up": 1 << 54, "rounded to zero": 3 << 54,
    "everything else": 7 << 54,
}  # fmt: skip


def own():
    """That of this thread, without flags."""
    return team.environments(1)[0] & ~FLAGS


@pytest.fixture
def other(request):
    """Another environment, while the test runs."""
    try:
        team.set_environment(OTHERS[request.param])
        yield OTHERS[request.param]
    finally:
        team.set_environment(DEFAULT)


every_other = pytest.mark.parametrize("other", OTHERS, indirect=True)


def inputs():
    """q, k, v with denormals in each, whose products count, and ordinary numbers; and x, longer, without."""
    q, k, v = cases.arrays(1, 2, Lq=70, Lk=150, D=64)
    small, large = np.float32(2.0**-128), np.float32(2.0**125)
    q[..., :8] *= small
    k[..., :8] *= large
    q[..., 8:16] *= large
    k[..., 8:16] *= small
    v[..., :20] *= np.float32(2.0**-130)
    return q, k, v, np.random.default_rng(0).standard_normal((1, 2, 1100, 64), dtype=np.float32)


def everything(q, k, v, x):
    """What every public entry that computes returns, on one thread and on two. Numbers that Python computes, in the
    caller's environment, are left out: a default scale, and scales shared by tokens."""
    found = []
    for n in (1, 2):
        cyflash.set_num_threads(n)
        how = {"scale": 0.1, "num_threads": n}
        found += [
            *cyflash.flash_attention(q, k, v, return_lse=True, **how),
            *cyflash.flash_attention(q[:, :, :1], k, v, return_lse=True, softcap=4.0, **how),
            cyflash.flash_attention(*(y.astype(np.float16) for y in (x[:, :, :300],) * 3), causal=True, **how),
            cyflash.flash_attention(x[:, :, :1], x, x, **how),
            cyflash.flash_attention_int8(x[:, :, :90], x[:, :, :300], x[:, :, :300], **how),
            cyflash.flash_attention_int8(x[:, :, :1], x, x, pv="fp32", **how),
        ]
        for dtype in ("fp16", "int8"):
            cache = cyflash.KVCache(1, 2, 64, 1100, dtype)
            cache.append(x, x)
            found.append(cyflash.flash_attention_with_kvcache(x[:, :, :2], cache, **how))
        codes = quantize(x, "token", smooth=True)
        calibrator = Calibrator()
        calibrator.observe("a", x[0, :, :300], x[0, :, :300], x[0, :, :300])
        found += [codes.data, codes.scale, codes.mean, calibrator]
    cyflash.set_num_threads(None)
    return found


def numbers(found):
    """Of `everything`, as arrays: scales from what was observed are computed in Python, now."""
    for y in found:
        scales = y.compute("max")["a"] if isinstance(y, Calibrator) else None
        yield y if scales is None else np.array([scales.q_scale, scales.k_scale, scales.v_scale])


@every_other
def test_calls_leave_the_environment_and_do_not_depend_on_it(one_build, other):
    """In the calling thread and in OpenMP's, whose environment is that of whoever started them."""
    team.set_environment(DEFAULT)
    expected = everything(*inputs())
    before = team.environments(2)
    data = inputs()
    team.set_environment(other)
    found = everything(*data)
    assert own() == other
    after = team.environments(2)
    team.set_environment(DEFAULT)
    assert after[1] & ~FLAGS == before[1] & ~FLAGS == DEFAULT
    for i, (one, two) in enumerate(zip(numbers(found), numbers(expected), strict=True)):
        assert np.array_equal(one, two, equal_nan=one.dtype.kind == "f"), i


def test_calls_leave_the_default(build):
    team.set_environment(DEFAULT)
    before = team.environments(2)
    everything(*inputs())
    assert [e & ~FLAGS for e in team.environments(2)] == [e & ~FLAGS for e in before] == [DEFAULT] * 2


def test_kernels_leave_flags_too(build):
    """Those that say what a computation met, such as overflow and invalid; that it was inexact any arithmetic says."""
    q, k, v, _ = inputs()
    k[..., -1, :] = np.inf
    cyflash.flash_attention(q, k, v, num_threads=2)  # nothing else is imported or started by the next one
    team.set_environment(DEFAULT)
    stored = cyflash.attention.floats(k, v, ("fp32", "fp32"))
    call = cyflash.attention.describe(q, k, v, (q, k, v), None, kinds=("fp32", "fp32"), num_threads=1)
    team.set_environment(DEFAULT)
    where = cyflash.attention._dense(1, 70, 150, 80)
    cyflash.cpu.active().forward(
        q, "fp32", stored, *where, None, call.out, "fp32", None, call.plan, False, False, call.Br, call.Bc, 1
    )
    assert team.environments(1)[0] & ~(0x20 if X86 else 0x10) == DEFAULT
    assert np.isnan(call.out).any(), "nothing was invalid"


def test_workers_that_were_started_in_another_environment():
    """Their first region came from a thread that flushes denormals: what they compute does not show it."""
    forking.run("""
import cyflash
from cyflash.cpu import team
OTHER, DEFAULT, FLAGS = (int(a) for a in sys.argv[1:])
y = np.random.default_rng(0).standard_normal((4, 100, 64), dtype=np.float32)
tiny = (y * np.float32(2.0**-130)).astype(np.float32)
expected = cyflash.flash_attention(y, y, tiny, num_threads=1)
assert np.count_nonzero(expected) > 0.9 * expected.size and abs(expected).max() < 2.0**-126
team.set_environment(OTHER)
assert [e & ~FLAGS for e in team.environments(2)] == [OTHER] * 2
out = cyflash.flash_attention(y, y, tiny, num_threads=2)
assert [e & ~FLAGS for e in team.environments(2)] == [OTHER] * 2
team.set_environment(DEFAULT)
assert np.array_equal(out, expected)
assert np.array_equal(cyflash.flash_attention(y, y, tiny, num_threads=2), expected)
assert [e & ~FLAGS for e in team.environments(2)] == [DEFAULT, OTHER]
""", OTHERS["denormals flushed"], DEFAULT, FLAGS)


@pytest.mark.skipif(not X86, reason="traps cannot be set on every ARM")
def test_traps_of_the_caller():
    """Who has invalid operations raise SIGFPE gets NaN from a call as everybody else does."""
    forking.run("""
import cyflash
from cyflash.cpu import team
y = np.random.default_rng(0).standard_normal((2, 100, 64), dtype=np.float32)
y[:, 50] = np.inf
expected = cyflash.flash_attention(y, y, y, num_threads=2)
assert np.isnan(expected).any()
team.set_environment(0x1f80 & ~0x80)
out = cyflash.flash_attention(y, y, y, num_threads=2)
kept = team.environments(1)[0]
team.set_environment(0x1f80)
assert kept & ~0x3f == 0x1f80 & ~0x80
assert np.array_equal(out, expected, equal_nan=True)
""")


def test_denormals_are_kept(build):
    """In each operand, compared with float64; but in bfloat16's own product, which x86 defines to flush them."""
    q, k, v, _ = inputs()
    out, lse = cyflash.flash_attention(q, k, v, scale=1.0, return_lse=True)
    exact, exact_lse = cyflash.reference.attention(q, k, v, scale=1.0, return_lse=True)
    assert np.allclose(lse, exact_lse, rtol=1e-4, atol=1e-4)
    assert np.allclose(out[..., 20:], exact[..., 20:], rtol=1e-3, atol=1e-4)
    assert abs(exact[..., :20]).max() < np.finfo(np.float32).tiny
    assert np.allclose(out[..., :20].astype(float) * 2.0**130, exact[..., :20] * 2.0**130, rtol=1e-3, atol=1e-4)
    without = [x.copy() for x in (q, k, v)]
    for x in without:
        x[abs(x) < np.finfo(np.float32).tiny] = 0
    flushed = cyflash.reference.attention(*without, scale=1.0)
    assert abs(exact - flushed)[..., 20:].max() > 0.1, "denormals did not matter"
    one = np.full((1, 1, 64), 2.0**-140, np.float32)
    assert np.array_equal(cyflash.flash_attention(one, one, one), one)
    half = np.full((1, 1, 64), 2.0**-20, np.float16)
    assert np.array_equal(cyflash.flash_attention(half, half, half), half)


@pytest.mark.parametrize("value", [DEFAULT, OTHERS["rounded up"]])
def test_import_leaves_the_environment(value):
    """Of every module; read before by the one that can, loaded by itself. Threads of OpenMP start after the import."""
    forking.run("""
import importlib.machinery, importlib.util
path, value, flags = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
loader = importlib.machinery.ExtensionFileLoader("team", path)
reader = importlib.util.module_from_spec(importlib.util.spec_from_file_location("team", path, loader=loader))
loader.exec_module(reader)
reader.set_environment(value)
import cyflash, cyflash.quant, cyflash.cpu.observe
for name in cyflash.cpu.runnable():
    cyflash.cpu.load(name)
found = reader.environments(2)
assert [e & ~flags for e in found] == [value] * 2, found
reader.set_environment(value ^ 1 << (15 if value < 1 << 16 else 24 + 32))
assert (reader.environments(1)[0] & ~flags) != value, "the reader does not see a change"
""", team.__file__, value, FLAGS)


def modules():
    folder = os.path.dirname(team.__file__)
    return sorted(path for end in ("so", "pyd") for path in glob.glob(os.path.join(folder, f"*.{end}")))


def starts(path):
    """How many functions run when a library is loaded: GCC's own, and one that sets FTZ and DAZ with -ffast-math."""
    text = subprocess.run(["readelf", "-SW", path], capture_output=True, text=True, check=True).stdout
    sizes = [line.split("]", 1)[1].split()[4] for line in text.splitlines() if " .init_array " in line]
    return sum(int(size, 16) for size in sizes) // 8


needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")


@needs_readelf
@pytest.mark.parametrize("path", modules(), ids=os.path.basename)
def test_no_module_was_linked_with_fast_math(path):
    assert starts(path) <= 1


def settings_of_setup():
    """FLAGS and LINK_FLAGS of setup.py, without running it."""
    path = os.path.join(os.path.dirname(__file__), "..", "setup.py")
    with open(path, encoding="utf-8") as file:
        lines = ast.parse(file.read()).body
    found = {line.targets[0].id: line.value for line in lines if isinstance(line, ast.Assign)}
    return [ast.literal_eval(found[name]) for name in ("FLAGS", "LINK_FLAGS")]


@needs_readelf
@pytest.mark.skipif(not X86, reason="where GCC links crtfastm")
@pytest.mark.parametrize("theirs", ["-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-Ofast -ffast-math"])
def test_flags_of_the_user_do_not_make_it_fast_math(theirs, tmp_path):
    """CFLAGS stand before ours, when a module is compiled and when it is linked."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None or "Free Software" not in subprocess.run(
        [compiler, "--version"], capture_output=True, text=True
    ).stdout:
        pytest.skip("no GCC")
    flags, link_flags = settings_of_setup()
    source, shared = tmp_path / "one.c", tmp_path / "one.so"
    source.write_text("#ifdef __FAST_MATH__\n#error fast\n#endif\nint nan(float x) { return x != x; }\n")

    def build(flags, link_flags):
        subprocess.run([compiler, *theirs.split(), "-fPIC", *flags, "-c", source, "-o", tmp_path / "one.o"], check=True)
        command = [compiler, "-shared", *theirs.split(), tmp_path / "one.o", *link_flags, "-o", shared]
        subprocess.run(command, check=True)
        return starts(str(shared))

    plain = build(flags, ["-O0", "-fno-fast-math", "-fno-unsafe-math-optimizations"])
    assert build(flags, link_flags) == plain
    if build(flags, []) == plain:
        pytest.skip("this GCC links no crtfastm into shared libraries")
