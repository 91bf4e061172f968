"""The kernel for compute capability 9.0 on the machine of gpu_shim/: judged, with planted bugs, and compiled."""
import gpu_compiling
import numpy as np
import pytest
from gpu_cases import Problem
from gpu_running import EARLY, LATE, MIXED

from cyflash.gpu import tensor_maps, variants

SCHEDULES = (EARLY, LATE, MIXED)
KINDS = ("float16", "bfloat16", "int8-float16", "int8-bfloat16", "int8")
OPTIONS = {
    "causal": dict(causal=True),
    "top-left": dict(causal=True, causal_align="top-left"),
    "window": dict(window=(60, 20)),
    "softcap": dict(softcap=1.0),
    "sinks": dict(sinks=np.array([1.0, -1.0], np.float32)),
    "alibi": dict(alibi_slopes=np.array([0.1, 0.3], np.float32)),
    "scale": dict(scale=-0.3),
}


def check(problem, changes=(), seeds=(1,), **options):
    """Run under each schedule and judge."""
    results = [problem.run(arch="sm_90a", schedule=schedule, seed=seed, changes=changes, **options)
               for seed in seeds for schedule in SCHEDULES]
    judge = problem.judge(results[0].Bc, **options)
    for result in results:
        assert result.variant.source == "hopper.cu"
        judge(result)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [dict(D=128), dict(H=2, Lq=130, Lk=300, D=128), dict(B=2, H=2, Lq=33, Lk=517, D=64),
                                   dict(Lq=70, Lk=90, D=48), dict(Lq=5, Lk=200, D=256)], ids=str)
def test_shapes(kind, shape):
    if kind == "int8" and shape["D"] > 128:
        assert variants.choose("sm_90a", 256, "int8", out="float32", mapped=True).source == "mma.cu"
    else:
        check(Problem(kind, **shape))


@pytest.mark.parametrize("kind", ["float16", "int8"])
@pytest.mark.parametrize("option", OPTIONS)
def test_options(kind, option):
    check(Problem(kind, H=2, Lq=70, Lk=300, D=64), **OPTIONS[option])


@pytest.mark.parametrize("kind", ["float16", "int8-float16"])
def test_masks_and_biases(kind):
    rng = np.random.default_rng(0)
    problem = Problem(kind, H=2, Lq=70, Lk=300, D=64)
    check(problem, mask=rng.random((1, 1, 70, 300)) < 0.5)
    check(problem, bias=rng.standard_normal((1, 2, 70, 300)).astype(np.float32))


@pytest.mark.parametrize("options", [dict(causal=True), dict(window=(50, 3))], ids=str)
def test_hidden_values_do_not_leak(options):
    problem = Problem("float16", Lq=130, Lk=300, D=128)
    v = problem.arrays[2]
    v[..., 250:260, 3], v[..., 200, 7], v[..., 270, 7] = np.nan, np.inf, -np.inf
    check(problem, **options)


BUGS = {  # name: (kind, (file, old, new)...)
    "the wrong parity of K": (
        "float16",
        ("hopper.cu", "mbarrier_wait(K_EMPTY + 8 * i, parity(n) ^ 1)", "mbarrier_wait(K_EMPTY + 8 * i, parity(n))"),
    ),
    "a parity that never changes": ("float16", ("hopper.cu", "return n / STAGES & 1;", "return 0;")),
    "too few bytes": ("float16", ("hopper.cu", "COUNT * PANEL_BYTES);", "COUNT * PANEL_BYTES - 128);")),
    "too many bytes": ("float16", ("hopper.cu", "COUNT * PANEL_BYTES);", "COUNT * PANEL_BYTES + 128);")),
    "V is copied before it is free": ("float16", ("hopper.cu", "mbarrier_wait(V_EMPTY + 8 * i, parity(n) ^ 1);", "")),
    "K is copied before it is free": ("float16", ("hopper.cu", "mbarrier_wait(K_EMPTY + 8 * i, parity(n) ^ 1);", "")),
    "a warp's release counts for all": (
        "float16",
        ("hopper.cu", "mbarrier_init(V_EMPTY + 8 * i, GROUPS * 4)", "mbarrier_init(V_EMPTY + 8 * i, 1)"),
    ),
    "K is not waited for": ("float16", ("hopper.cu", "mbarrier_wait(K_FULL + 8 * stage(n), parity(n));", "")),
    "V is not waited for": (
        "float16",
        ("hopper.cu",
         "    const u32 at = AT_V + stage(n) * V_BYTES;\n    mbarrier_wait(V_FULL + 8 * stage(n), parity(n));",
         "    const u32 at = AT_V + stage(n) * V_BYTES;"),
    ),
    "scores are read too early": (
        "float16",
        ("hopper.cu", "wgmma_wait<CODED_P ? 0 : 1>(sums);", "wgmma_wait<2>(sums);"),
    ),
    "O is read too early": (
        "float16",
        ("hopper.cu", "                wgmma_wait<0>(o);\n                release", "                release"),
    ),
    "V is released too early": (
        "float16",
        ("hopper.cu",
         "                wgmma_wait<0>(o);\n                release(V_EMPTY + 8 * stage(n - 1));",
         "                release(V_EMPTY + 8 * stage(n - 1));\n                wgmma_wait<0>(o);"),
    ),
    "steps of V by one row": (
        "float16",
        ("hopper.cu", "onward(v, step * 16 * V_PITCH)", "onward(v, step * 2 * V_PITCH)"),
    ),
    "panels of V": ("float16", ("hopper.cu", "operand<V_PITCH>(at, Bc * V_PITCH)", "operand<V_PITCH>(at, 1024)")),
    "panels of Q": ("float16", ("hopper.cu", "onward(q, panel * Br * PITCH", "onward(q, panel * Bc * PITCH / 2")),
    "rows of the other group": ("float16", ("hopper.cu", "operand<PITCH>(group * 64 * PITCH)", "operand<PITCH>(0)")),
    "codes in another order": ("int8", ("turned.cu", "i / 4 * 2 + i % 4 / 2 * 8 + i % 2", "i")),
    "scales are not waited for": (
        "int8",
        ("hopper.cu", "CODES ? 33 : 1", "1"),
        ("hopper.cu", "        mbarrier_arrive(full);\n", ""),
    ),
    "V's scales for K's": ("int8", ("hopper.cu", "rows, scales + Bc * 4)", "rows, scales)")),
    "turns that never come": ("float16", ("hopper.cu", "if (group == 1) give_turn(0);", "")),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug):
    kind, *changes = BUGS[bug]
    with pytest.raises(AssertionError):
        check(Problem(kind, H=1, Lq=128, Lk=700, D=128), changes=tuple(changes), seeds=range(1, 5))


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize(
    "options", [(), ("EDGES",), ("EDGES", "BIAS"), ("EDGES", "MASK"), ("EDGES", "SOFTCAP"), ("ALIBI",)], ids=str)
@pytest.mark.parametrize(
    "types", [("float16",) * 3, ("int8", "float16", "float16"), ("int8", "int8", "float32")], ids=str)
def test_compiled(D, options, types):
    variant = variants.choose("sm_90a", D, *types, mapped=True, options=options)
    if variant.source != "hopper.cu":
        pytest.skip("mma.cu takes it")
    compiled = gpu_compiling.compiled(variant)
    assert compiled.spilled == 0
    assert "C75" not in compiled.log  # registers that stay, products in series
    assert compiled.registers == 168  # 65536 / 384 rounded down to 8: before warpgroups exchange them
    assert variant.shared_bytes <= 227 * 1024
    found = " ".join(gpu_compiling.opcodes(compiled.cubin))
    product = "IGMMA" if types[0] == "int8" else "HGMMA"
    for name in (product, "UTMALDG.4D", "SYNCS.PHASECHK", "SYNCS.ARRIVE", "USETMAXREG"):
        assert name in found


def test_maps():
    x = np.zeros((2, 3, 40, 64), np.float16)
    assert tensor_maps.can_map(x, x.transpose(0, 2, 1, 3))
    assert not tensor_maps.can_map(np.broadcast_to(x[:1], x.shape))
    assert not tensor_maps.can_map(x[:, :, ::-1])
    assert not tensor_maps.can_map(x[..., 1:])
    calls = []
    maps = tensor_maps.encoded([tensor_maps.box(x, 128)], lambda *a: calls.append(a) or 0)
    assert maps.itemsize == 128 and maps.shape == (1,)
    assert list(calls[0][4]) == [64, 40, 3, 2] and list(calls[0][5]) == [128, 5120, 15360]
    assert list(calls[0][6]) == [64, 128, 1, 1]
    with pytest.raises(RuntimeError, match="error 1"):
        tensor_maps.encoded([tensor_maps.box(x, 128)], lambda *a: 1)
