"""Choosing the SIMD build: by what the machine can run, by CYFLASH_ISA, by set_implementation; what cpu_info says."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

import cyflash
from cyflash import cpu
from cyflash.attention import attend
from cyflash.cpu import detect


def in_a_fresh_process(code, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith("CYFLASH")} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def pretend(monkeypatch, *features):
    """That every build was compiled, for a machine with these features."""
    monkeypatch.setattr(detect, "features", lambda: frozenset(features))
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: name)


X86 = [feature for name, needs in cpu.BUILDS.items() if name != "neon" for feature in needs]


@pytest.mark.parametrize(
    "features, best",
    [
        ((), "baseline"),
        (("avx2",), "baseline"),
        (("fma",), "baseline"),
        (("avx2", "fma", "f16c"), "avx2"),
        (("avx2", "fma", "f16c", "avx512f"), "avx2"),
        (("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq"), "avx2"),
        (("avx2", "fma", "f16c", "avxvnni"), "avxvnni"),
        (cpu.BUILDS["avx512"], "avx512"),
        ((*cpu.BUILDS["avx512"], "avxvnni"), "avx512"),
        ((*cpu.BUILDS["avx512"], "avx512_bf16"), "avx512"),
        (cpu.BUILDS["avx512_vnni"], "avx512_vnni"),
        (X86, "avx512_bf16"),
        (("crc32",), "baseline"),
        (("asimdrdm", "atomics", "crc32"), "baseline"),
        (("asimddp", "asimdrdm", "atomics"), "baseline"),
        (cpu.BUILDS["neon"], "neon"),
    ],
)
def test_the_best_build_for_the_features(monkeypatch, features, best):
    pretend(monkeypatch, *features)
    assert cpu.runnable()[-1] == best


def test_a_build_the_machine_cannot_run_is_refused_and_named(monkeypatch):
    pretend(monkeypatch, "fma", "f16c")
    with pytest.raises(RuntimeError, match=r"'avx2' cannot be used: this machine lacks avx2; usable here: baseline"):
        cyflash.set_implementation("avx2")


def test_a_build_that_was_not_compiled_is_refused(monkeypatch):
    monkeypatch.setitem(cpu.BUILDS, "imaginary", ())
    with pytest.raises(RuntimeError, match="'imaginary' cannot be used: not built"):
        cyflash.set_implementation("imaginary")


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"expected one of baseline, .*got 'avx1024'"):
        cyflash.set_implementation("avx1024")


def test_the_machine_is_asked_once(monkeypatch):
    """In a virtual machine a CPUID takes 10 us and more; choosing a build asked for hundreds of them."""
    found = detect.features()
    monkeypatch.setattr(detect, "read_cpuid", lambda *leaf: pytest.fail("it is asked again"))
    assert detect.features() == found
    assert cpu.runnable()


def test_set_implementation_restores():
    before = cyflash.cpu_info()["implementation"]
    with cyflash.set_implementation("baseline"):
        assert cyflash.cpu_info()["implementation"] == "baseline"
        with cyflash.set_implementation(cpu.runnable()[-1]):
            assert cyflash.cpu_info()["implementation"] == cpu.runnable()[-1]
        assert cyflash.cpu_info()["implementation"] == "baseline"
    assert cyflash.cpu_info()["implementation"] == before


def test_set_implementation_restores_after_an_error():
    before = cpu.active()
    with pytest.raises(KeyError), cyflash.set_implementation("baseline"):
        raise KeyError
    assert cpu.active() is before


def test_without_with_the_choice_stays():
    before = cpu.name_of(cpu.active())
    cyflash.set_implementation("baseline")
    try:
        assert cyflash.cpu_info()["implementation"] == "baseline"
        cyflash.set_implementation(None)
        if "CYFLASH_ISA" not in os.environ:
            assert cyflash.cpu_info()["implementation"] == cpu.runnable()[-1]
    finally:
        cyflash.set_implementation(before)


@pytest.mark.parametrize("name", cpu.runnable())
def test_environment_forces_a_build(name):
    done = in_a_fresh_process("import cyflash; print(cyflash.cpu_info()['implementation'])", CYFLASH_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_environment_with_an_unknown_name_raises():
    done = in_a_fresh_process("import cyflash; cyflash.cpu_info()", CYFLASH_ISA="mmx")
    assert done.returncode != 0
    assert "ValueError: CYFLASH_ISA=mmx" in done.stderr


def test_other_builds_are_never_imported():
    code = """
import sys, numpy as np, cyflash
x = np.ones((4, 8), np.float32)
cyflash.flash_attention(x, x, x)
print(sorted(name for name in sys.modules if name.startswith("cyflash.cpu._")))
"""
    done = in_a_fresh_process(code, CYFLASH_ISA="baseline")
    assert done.stdout.strip() == "['cyflash.cpu._baseline']", done.stderr


def test_cpu_info_is_consistent():
    info = cyflash.cpu_info()
    assert set(info["builds"]) == set(cpu.BUILDS)
    assert info["builds"][info["implementation"]] == {"built": True, "runs": True, "reason": ""}
    for name, build in info["builds"].items():
        assert build["runs"] == (build["reason"] == "") == (name in cpu.runnable())
    assert info["cores"] >= 1 and info["threads"] >= 1


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs /proc/cpuinfo")
@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="feature names of x86-64 and AArch64")
def test_features_agree_with_the_kernel():
    kernel_names = {"avxvnni": "avx_vnni"}
    names, begin = (detect.FEATURES, "flags") if os.uname().machine == "x86_64" else (detect.ARM_FEATURES, "Features")
    with open("/proc/cpuinfo") as file:
        flags = set(next(line for line in file if line.startswith(begin)).split(":")[1].split())
    for feature in names:
        assert (feature in detect.features()) == (kernel_names.get(feature, feature) in flags), feature


@pytest.mark.parametrize("name", cpu.runnable())
def test_fma_rate_is_plausible(name):
    module = cpu.load(name)
    rate = module.fma_rate(0.02)
    lanes_times_two = 2 * module.SHAPE["LANES"]
    # from one multiply-add in 20 cycles at 1 GHz to four a cycle at 8 GHz: a removed or miscounted loop is far outside
    assert lanes_times_two * 1e9 / 20 < rate < lanes_times_two * 4 * 8e9


def test_tile_sizes_are_whole_panels_and_register_tiles(build):
    shape = cpu.active().SHAPE
    assert cpu.tile_sizes(10**9)[0] == cpu.MAX_BLOCK_SIZE_Q // shape["PANEL"] * shape["PANEL"]
    for block_size_q in (1, 47, 48, 64, 1000):
        for block_size_kv in (1, 8, 63, 64, 100, 5000):
            Br, Bc = cpu.tile_sizes(block_size_q, block_size_kv)
            assert Br % shape["PANEL"] == 0 and block_size_q <= Br < block_size_q + shape["PANEL"]
            assert Bc % shape["ROWS"] == 0
            assert Bc == min(-(-block_size_kv // shape["ROWS"]) * shape["ROWS"], cpu.MAX_BLOCK_SIZE_KV)


def test_every_build_gives_the_same_within_the_bound():
    r = np.random.default_rng(0)
    q, k, v = (r.standard_normal((3, 70, 40), dtype=np.float32) for _ in range(3))
    results = []
    for name in cpu.runnable():
        with cyflash.set_implementation(name):
            results.append(cyflash.flash_attention(q, k, v, causal=True))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=0, atol=5e-6)


def test_a_call_uses_one_build_though_another_thread_changes_it(monkeypatch):
    """Its tiles are those of the build that runs: another's need not be whole panels of it."""
    builds = itertools.cycle(cpu.load(name) for name in reversed(cpu.runnable()))
    q, k, v = np.random.default_rng(0).standard_normal((3, 100, 8), dtype=np.float32)
    config = cyflash.FlashAttentionConfig(head_dim=8, block_size_q=1, block_size_kv=1)
    expected = [attend(q, k, v, config=config)[2] for name in cpu.runnable() if cyflash.set_implementation(name)]
    cyflash.set_implementation(None)
    monkeypatch.setattr(cpu, "active", lambda: next(builds))
    for _ in cpu.runnable():
        assert attend(q, k, v, config=config)[2] in expected
