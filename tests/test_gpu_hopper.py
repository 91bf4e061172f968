"""The kernel for compute capability 9.0 on the machine of gpu_shim/: judged, and with planted bugs.

Where mma.cu is chosen in its place tests say so, and test_gpu_kernels.py judges that.
"""
import itertools

import numpy as np
import pytest
from gpu_cases import CODED, OPTIONS, Problem, check_shift, dtype, everything, mean_and_shift, options, pairs
from gpu_running import EARLY, LATE, MIXED

from cyflash.gpu import tensor_maps, variants

SCHEDULES = (EARLY, LATE, MIXED)
KINDS = ("float16", "bfloat16", "int8-float16", "int8-bfloat16", "int8")
SIZES = dict(B=2, H=4, Hk=2, Lq=70, Lk=300, D=64)
LENGTHS = 2, 4, 70, 300
# Beyond EDGES this kernel takes at most one option, of these, by head_dim up to 64, 128 and 256; mma.cu takes others.
TAKES = {
    "float16": ("SOFTCAP ALIBI BIAS MASK", "SOFTCAP ALIBI BIAS MASK", "SOFTCAP ALIBI BIAS"),
    "int8-float16": ("SOFTCAP ALIBI BIAS MASK", "SOFTCAP ALIBI BIAS MASK", "SOFTCAP ALIBI"),
    "int8": ("SOFTCAP ALIBI", "SOFTCAP ALIBI", None),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def takes(kind, D, flags):
    """Whether this kernel is meant to take them."""
    busy, names = set(flags) - {"EDGES"}, TAKES[kind.replace("bfloat", "float")][(D > 64) + (D > 128)]
    return names is not None and len(busy) <= 1 and busy <= set(names.split())


@pytest.mark.parametrize("D", [8, 64, 65, 128, 129, 256])
def test_chosen(kind, D):
    """This kernel or mma.cu, by what the array is and which options are on."""
    types = Problem(kind, Lq=1, Lk=1, D=1).names
    for n in range(len(variants.FLAGS) + 1):
        for flags in itertools.combinations(variants.FLAGS, n):
            expected = "hopper.cu" if takes(kind, D, flags) else "mma.cu"
            assert variants.choose("sm_90a", D, *types, mapped=True, options=flags).source == expected, flags
            assert variants.choose("sm_90a", D, *types, options=flags).source == "mma.cu"
            assert variants.choose("sm_120", D, *types, mapped=True, options=flags).source == "mma.cu"


def run(problem, source="hopper.cu", schedules=SCHEDULES, changes=(), seeds=(1,), **arguments):
    """Run under each schedule, by this kernel."""
    results = [problem.run(arch="sm_90a", schedule=schedule, seed=seed, changes=changes, **arguments)
               for seed in seeds for schedule in schedules]
    assert {result.variant.source for result in results} == {source}
    return results


def check(problem, changes=(), seeds=(1,), source="hopper.cu", **options):
    """Run under each schedule and judge."""
    results = run(problem, source, changes=changes, seeds=seeds, **options)
    judge = problem.judge(results[0].Bc, **options)
    for result in results:
        judge(result)
    return results[0]


@pytest.mark.parametrize("shape", [dict(D=128), dict(H=2, Lq=130, Lk=300, D=128), dict(B=2, H=2, Lq=33, Lk=517, D=64),
                                   dict(Lq=5, Lk=200, D=256)], ids=str)
def test_shapes(kind, shape):
    check(Problem(kind, **shape), source="hopper.cu" if takes(kind, shape["D"], ()) else "mma.cu")


@pytest.mark.parametrize("kind, D", pairs(KINDS, [16, 48, 80, 112, 144, 208]))
def test_head_dim(kind, D):
    """Columns of the last box that lie outside the array are 0, and not written."""
    problem = Problem(kind, H=2, Hk=2, Lq=20, Lk=150, D=D)
    check(problem, source="hopper.cu" if takes(kind, D, ()) else "mma.cu", causal=True)


@pytest.mark.parametrize("option", OPTIONS)
def test_options(kind, option):
    """Each option alone; and a kernel that ignored it would be found out."""
    arguments, without = options(*LENGTHS)[option]
    number = OPTIONS.index(option) + KINDS.index(kind)
    taken = kind != "int8" or not {"bias", "mask"} & set(arguments)
    problem = Problem(kind, **SIZES)
    results = run(problem, "hopper.cu" if taken else "mma.cu", (SCHEDULES[number % 3],), **arguments)
    problem.judge(results[0].Bc, **arguments)(results[0])
    problem.differs(results[0], **without)


def test_all_options_together(kind):
    """Are too many for this kernel."""
    every, _ = everything(*LENGTHS)
    assert not takes(kind, 64, variants.FLAGS)
    assert run(Problem(kind, **SIZES), "mma.cu", (EARLY,), **every)


def test_options_that_share_a_variant(kind):
    """Those that this kernel takes together, none of which is ignored among the others."""
    every, others = everything(*LENGTHS)
    names = ("causal", "window", "sinks", "scale", "alibi_slopes")
    problem = Problem(kind, **SIZES)
    result = check(problem, **{name: every[name] for name in names})
    for left_out in names:
        problem.differs(result, **{name: others[left_out][name] for name in names if name in others[left_out]})


def test_heads_share_keys(kind):
    """Query heads 0 and 1 read key and value head 0: not 0 and 2."""
    problem = Problem(kind, **SIZES)
    result = check(problem)
    result.out, result.lse = result.out[:, [0, 2, 1, 3]], result.lse[:, [0, 2, 1, 3]]
    problem.differs(result)


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("name", CODED)
def test_scales_by_strides(name, granularity):
    problem = Problem(name, **SIZES, granularity=granularity)
    assert problem.scales["q_scale"].strides[2] == 0
    check(problem)


@pytest.mark.parametrize("name", CODED)
def test_output_types(name):
    problem = Problem(name, **SIZES)
    results = []
    for problem.out in map(dtype, ("float32", "float16", "bfloat16")):
        results.append(run(problem, schedules=(EARLY,))[0].out)
    for result in results:
        np.testing.assert_array_equal(result.astype(float), results[0].astype(result.dtype).astype(float))


@pytest.mark.parametrize("name", ["int8-float16", "int8-bfloat16"])
def test_shift(name):
    """What smoothing takes from K is given back as one number of each row: in the LSE, against sinks, under softcap."""
    problem = Problem(name, **SIZES)
    mean, shift = mean_and_shift(problem, 2, 0.2)
    for more in ({}, dict(sinks=np.float32([0, 1, 2, 3])), dict(softcap=2.0, causal=True)):
        for result in run(problem, scale=0.2, shift=shift, **more):
            check_shift(problem, result, mean, scale=0.2, **more)


def test_shift_of_codes():
    """With int8 v: the LSE and, under softcap, the weights are those of scores with what was taken."""
    problem = Problem("int8", **SIZES)
    _, shift = mean_and_shift(problem, 2, 0.2)
    (plain,) = run(problem, schedules=(EARLY,), scale=0.2)
    (moved,) = run(problem, schedules=(LATE,), scale=0.2, shift=shift)
    np.testing.assert_array_equal(plain.out, moved.out)
    np.testing.assert_allclose(moved.lse, plain.lse + shift, atol=1e-5)
    small = Problem("int8-float16", **SIZES)
    small.arrays[:2], small.arrays[2] = problem.arrays[:2], problem.floats()[2].astype(np.float16)
    small.scales = {name: problem.scales[name] for name in ("q_scale", "k_scale")}
    both = [run(one, schedules=(EARLY,), scale=0.2, shift=shift, softcap=2.0)[0] for one in (problem, small)]
    np.testing.assert_allclose(both[0].lse, both[1].lse, atol=1e-5)
    np.testing.assert_allclose(both[0].out, both[1].out.astype(np.float32), atol=0.02)


# V at its places of (130, 300), tiles of 128 keys, 64 query rows a consumer: which tile is the first that may leak.
LEAKS = {
    "first tile": (dict(window=(-1, 30), causal_align="top-left"), (5, 60)),
    "second tile": (dict(window=(-1, 30), causal_align="top-left"), (140, 150)),
    "last tile": (dict(causal=True), (250, 290)),
    "first and last tile": (dict(window=(50, 3)), (100, 120, 270)),
    "last tile of one consumer": (dict(causal=True), (298,)),
}


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int8-float16", "int8-bfloat16"])
@pytest.mark.parametrize("where", LEAKS)
def test_hidden_values_do_not_leak(name, where):
    """NaN and infinity in keys and values reach the rows that see them, and no other."""
    more, keys = LEAKS[where]
    problem = Problem(name, Lq=130, Lk=300, D=128)
    _, k, v = problem.arrays
    v[..., keys[0], 3], v[..., keys[-1], 7], v[..., keys[-1], 100] = np.nan, np.inf, -np.inf
    v[..., keys[0], 100] = np.inf
    if k.dtype != np.int8:
        k[..., keys[-1], 5] = np.nan
    result = check(problem, **more)
    seen = np.isfinite(result.out.astype(np.float32))
    assert seen.any() and not seen.all(), "no row sees such a value, or every one does"


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int8-float16"])
@pytest.mark.parametrize("where", [0, 90, 200])
def test_masked_values_do_not_leak(name, where):
    """The same where a mask or a bias hides keys: any tile may leak."""
    problem = Problem(name, Lq=70, Lk=300, D=64)
    v = problem.arrays[2]
    v[..., where, 3], v[..., where + 50, 7] = np.nan, -np.inf
    mask = np.random.default_rng(3).random((70, 300)) < 0.5
    check(problem, mask=mask)
    check(problem, bias=np.where(mask, 0, -np.inf).astype(np.float32))
    check(problem)  # without an option all rows see them


def test_rows_that_see_nothing(kind):
    taken = "mma.cu" if kind == "int8" else "hopper.cu"
    mask = np.zeros((70, 300), bool)
    mask[::3, 140:150] = True
    check(Problem(kind, **SIZES), source=taken, mask=mask)
    check(Problem(kind, **SIZES), source=taken, mask=mask, sinks=np.float32([0, 1, 2, 3]))
    check(Problem(kind, H=2, Lq=200, Lk=90, D=64), causal=True)  # of the first block none sees a key


def test_no_keys(kind):
    """There is nothing to copy by tensor maps: mma.cu takes them."""
    problem = Problem(kind, H=2, Lq=5, Lk=0, D=64)
    for result in run(problem, "mma.cu", (EARLY,)):
        assert (result.out == 0).all() and (result.lse == -np.inf).all()
    for result in run(problem, "mma.cu", (EARLY,), sinks=np.float32([1, -3])):
        assert (result.out == 0).all() and (result.lse == np.float32([[[1], [-3]]])).all()


def test_infinite_and_nan_sinks(kind):
    problem = Problem(kind, H=3, Hk=3, Lq=6, Lk=9, D=64)
    for result in run(problem, sinks=np.float32([np.inf, np.nan, 0.5]), schedules=(EARLY,)):
        out, lse = result.out.astype(np.float32), result.lse
        assert not out[0, 0].any() and (lse[0, 0] == np.inf).all()
        assert np.isnan(out[0, 1]).all() and np.isnan(lse[0, 1]).all() and np.isfinite(out[0, 2]).all()


def test_strides(kind):
    """Boxes of (B, L, H, D) memory, of every other row, and of rows with something between them."""
    problem = Problem(kind, **SIZES)
    q, k, v = problem.arrays
    wide = np.full((2, 2, 300, 96), 77, k.dtype)
    wide[..., 16:80] = k
    between = np.full((2, 2, 600, 64), 77, v.dtype)
    between[:, :, ::2] = v
    problem.arrays = [np.ascontiguousarray(q.swapaxes(1, 2)).swapaxes(1, 2), wide[..., 16:80], between[:, :, ::2]]
    check(problem, causal=True)


@pytest.mark.parametrize("name", ["float16", "int8-bfloat16", "int8"])
def test_arrays_without_tensor_maps(name):
    """Two heads with one broadcast K, rows in another order, rows at any address: mma.cu takes them."""
    problem = Problem(name, H=2, Hk=2, Lq=70, Lk=150, D=64)
    q, k, v = problem.arrays
    scale = problem.scales.get("k_scale")
    if scale is not None:
        problem.scales["k_scale"] = np.broadcast_to(scale[:, :1], scale.shape)
    problem.arrays = [q, np.broadcast_to(k[:, :1], k.shape), v]
    check(problem, source="mma.cu", causal=True)
    back = Problem(name, H=2, Hk=2, Lq=70, Lk=150, D=64)
    back.arrays[2] = np.ascontiguousarray(back.arrays[2][:, :, ::-1])[:, :, ::-1]
    check(back, source="mma.cu", causal=True)
    check(Problem(name, Lq=20, Lk=40, D=37), source="mma.cu")


def test_same_bits(kind):
    """Whichever warp runs first and whenever copies land."""
    problem = Problem(kind, Lq=130, Lk=400, D=64)
    first, *others = run(problem, seeds=(1, 2))
    for other in others:
        np.testing.assert_array_equal(first.out.view(np.uint8), other.out.view(np.uint8))
        np.testing.assert_array_equal(first.lse, other.lse)


RELEASE = "release(V_EMPTY + 8 * stage(n - 1));\n"
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
    "scores are read too early": ("float16", ("hopper.cu", "wgmma_wait<1>(sums);", "wgmma_wait<2>(sums);")),
    "O is read too early": (
        "float16", ("hopper.cu", "wgmma_wait<0>(o);\n            }\n", "}\n")),
    "sums of codes are read too early": (
        "int8", ("hopper.cu", "wgmma_wait<0>(codes);\n            } else", "} else")),
    "a tile is worth what the next one is": (
        "int8", ("hopper.cu", "add_codes(o, codes, step);", "add_codes(o, codes, step_of(rows));")),
    "V is released too early": (
        "float16",
        ("hopper.cu", "            worked_out(rows.l[0] + rows.l[1]);\n", f"            {RELEASE}"),
        ("hopper.cu", f"            {RELEASE}            if constexpr (TYPE == I8) {{\n                add_codes",
         "            if constexpr (TYPE == I8) {\n                add_codes"),
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


SHAPE = dict(H=2, Lq=130, Lk=300, D=64)
CAUSAL = dict(causal=True)
BUGS_AT_EDGES = {  # name: (kind, shape, options, (file, old, new)...)
    "keys after the last one": ("float16", SHAPE, {}, ("options.cuh", "key >= p.Lk", "key > p.Lk")),
    "scales after the last one": ("int8", SHAPE, {}, ("hopper.cu", "key < keys ?", "key <= keys ?")),
    "codes after the last one": ("int8", SHAPE, {}, ("turned.cu", "if (key < p.Lk)", "if (key <= p.Lk)")),
    "rows after the last one": ("float16", SHAPE, {}, ("hopper.cu", "if (r >= p.Lq)", "if (r > p.Lq)")),
    "columns after the last one": (
        "float16", {**SHAPE, "D": 40}, {}, ("hopper.cu", "if (channel >= p.D)", "if (channel > p.D)")),
    "causal by one": ("float16", SHAPE, CAUSAL, ("options.cuh", "key - i > head.high", "key - i > head.high + 1")),
    "a tile too few": (
        "float16", SHAPE, CAUSAL, ("options.cuh", "high = last_key(p, last_row)", "high = last_key(p, last_row) - Bc")),
    "an edge taken for whole": (
        "float16", SHAPE, CAUSAL, ("options.cuh", "Bc + Bc - 1 > work.whole_to", "Bc > work.whole_to")),
    "half of a row's maximum": (
        "float16", SHAPE, dict(scale=3.0), ("weights.cuh", "return fmaxf(x, shuffle_xor(x, 2))", "return x")),
    "the wrong head's K": (
        "float16", {**SHAPE, "Hk": 2}, {}, ("options.cuh", "work.h / (p.H / p.Hk)", "0")),
    "another swizzle of K": (
        "int8", SHAPE, {}, ("hopper.cu", "k = operand<PITCH>(AT_K", "k = operand<192 - PITCH>(AT_K")),
    "another swizzle of V": ("int8", SHAPE, {}, ("hopper.cu", "operand<TURNED_PITCH>(AT_V", "operand<128>(AT_V")),
}
LOOK = "mbarrier_wait(V_FULL + 8 * stage(n), parity(n));\n    return warpgroup_any"
BUGS_WITH_NAN = {  # where hidden values are NaN: (file, old, new)
    "leaks": ("hopper.cu", "if (!CAREFUL || ", "if (true || !CAREFUL || "),
    "a consumer looks at half of a tile": ("hopper.cu", "V_BYTES, 128>(AT_V", "V_BYTES / 2, 128>(AT_V"),
    "V is not waited for to look at it": ("hopper.cu", LOOK, LOOK.split("\n")[1]),
    "threads decide alone": ("hopper.cu", ", LOOKS + group);", ", LOOKS + group) && thread_index() % 2;"),
    "no swizzle": ("tiles.cuh", "mask = (1 << n) - 1", "mask = 0"),
    "weak swizzle": ("tiles.cuh", "PITCH % 128 == 0 ? 3 :", "PITCH % 128 == 0 ? 2 :"),
    "the other consumer's rows": ("hopper.cu", "(group * 64 + thread_index() / 32 % 4 * 16) * PITCH",
                                  "(thread_index() / 32 % 4 * 16) * PITCH"),
    "the last tile's values twice": ("hopper.cu", "group, n);\n    write(", "group, n > 0 ? n - 1 : n);\n    write("),
    "K is not released": ("hopper.cu", "        release(K_EMPTY + 8 * i);\n", ""),
    "V is not released": ("hopper.cu", "        release(V_EMPTY + 8 * i);\n", ""),
    "no rescaling": ("hopper.cu", "o[e] *= rows.alpha[e / 2 % 2];", ";"),
    "seen and weights in one": ("hopper.cu", "pack_seen(seen, s);", "pack_weights(seen, s);"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug):
    kind, *changes = BUGS[bug]
    with pytest.raises(AssertionError):
        check(Problem(kind, H=1, Lq=128, Lk=700, D=128), changes=tuple(changes), seeds=range(1, 5))


@pytest.mark.parametrize("bug", BUGS_AT_EDGES)
def test_planted_bugs_at_edges_are_caught(bug):
    kind, shape, more, *changes = BUGS_AT_EDGES[bug]
    with pytest.raises(AssertionError):
        check(Problem(kind, **shape), changes=tuple(changes), **more)


def check_with_nan(**how):
    """Tiles that are multiplied by mma.sync: from the second one on, the last one, all of them."""
    for more, places in (
        (dict(window=(500, 0)), [(180, 105), (660, 5)]),
        (dict(causal=True), [(690, 5)]),
        (dict(bias=np.where(np.arange(700) == 30, -300, 0).astype(np.float32)), [(30, 5)]),  # seen, weight 0
    ):
        problem = Problem("float16", Lq=128, Lk=700, D=128)
        for key, channel in places:
            problem.arrays[2][..., key, channel] = np.nan
        check(problem, **more, **how)


def test_values_that_are_nan():
    check_with_nan(seeds=(1, 2))


@pytest.mark.parametrize("bug", BUGS_WITH_NAN)
def test_planted_bugs_with_nan_are_caught(bug):
    with pytest.raises(AssertionError):
        check_with_nan(changes=(BUGS_WITH_NAN[bug],), seeds=range(1, 5))


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
