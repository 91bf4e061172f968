"""The kernels of few query rows, keys in chunks and their merge, on the machine of gpu_shim/."""
import gpu_cases
import numpy as np
import pytest
from gpu_cases import CODED, OPTIONS, check_shift, dtype, everything, mean_and_shift, options, pairs
from gpu_running import EARLY, LATE

from cyflash.gpu.decode import choose_decode, keys_of_chunk

KINDS = [kind for kind in gpu_cases.KINDS if kind != "float32"]
SIZES = dict(B=2, H=6, Hk=2, Lq=2, Lk=700, D=64)  # 6 rows of a tile of 16; 2 chunks, the second with 188 keys
LENGTHS = 2, 6, 2, 700
SHORT = keys_of_chunk(700, 64)


class Few(gpu_cases.Problem):
    """A problem that these kernels solve."""

    def run(self, **arguments):
        return super().run(few=True, **arguments)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("option", OPTIONS)
def test_option(kind, option):
    """Each option alone; and kernels that ignored it would be found out."""
    Few(kind, **SIZES).check_option(*options(*LENGTHS)[option], schedules=(EARLY, LATE))


def test_all_options_together(kind):
    """And no option is ignored among the others."""
    every, others = everything(*LENGTHS)
    problem = Few(kind, **SIZES)
    result = problem.check(**every)
    for without in others.values():
        problem.differs(result, **without)


def test_heads_share_keys(kind):
    """Query heads 0 to 2 read key and value head 0: not every other one."""
    problem = Few(kind, **SIZES)
    result = problem.check()
    result.out, result.lse = result.out[:, [0, 3, 1, 4, 2, 5]], result.lse[:, [0, 3, 1, 4, 2, 5]]
    problem.differs(result)


def test_output_types():
    """Codes become any of them; odd columns as even ones."""
    for name in CODED:
        problem = Few(name, **{**SIZES, "D": 37})
        results = []
        for problem.out in map(dtype, ("float32", "float16", "bfloat16")):
            results.append(problem.run().out)
        for result in results:
            np.testing.assert_array_equal(result.astype(float), results[0].astype(result.dtype).astype(float))


@pytest.mark.parametrize("Lk", [1, 2, 31, 32, 33, 127, 129, SHORT - 1, SHORT, SHORT + 1, 1025, 3000])
def test_keys(kind, Lk):
    problem = Few(kind, H=2, Lq=1, Lk=Lk, D=64)
    problem.check()
    problem.check(causal=True, window=(Lk // 2, 0))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 16, 20])
def test_heads_of_a_group_are_rows(group):
    """More than 16 rows are two tiles."""
    Few("float16", B=2, H=2 * group, Hk=2, Lq=1, Lk=300, D=32).check()
    Few("int8", H=2 * group, Hk=2, Lq=3, Lk=300, D=32).check(causal=True)


@pytest.mark.parametrize("Lq", [1, 7, 16])
def test_rows(kind, Lq):
    Few(kind, H=2, Hk=2, Lq=Lq, Lk=600, D=64).check(causal=True)


@pytest.mark.parametrize("kind, D", pairs(KINDS, [1, 20, 40, 72, 96, 128, 144, 192, 256]))
def test_head_dim(kind, D):
    """Beyond 128 two warps share the keys."""
    Few(kind, H=4, Lq=1, Lk=600, D=D).check(window=(350, -1))


def test_rings_are_used_more_than_once(kind):
    """Eight tiles a warp, four stages."""
    Few(kind, H=2, Lq=1, Lk=1100, D=16).check()


def test_rows_not_at_multiples_of_16_bytes(kind):
    problem = Few(kind, H=2, Lq=2, Lk=600, D=40)
    for n, x in enumerate(problem.arrays):
        wide = np.zeros((*x.shape[:3], 43), x.dtype)
        wide[..., 3:] = x
        problem.arrays[n] = wide[..., 3:]
    problem.check(causal=True)


def test_no_keys(kind):
    result = Few(kind, H=2, Lq=2, Lk=0, D=32).run()
    assert (result.out == 0).all() and (result.lse == -np.inf).all()
    result = Few(kind, H=2, Lq=2, Lk=0, D=32).run(sinks=np.float32([1, -3]))
    assert (result.out == 0).all() and (result.lse == np.float32([[[1], [-3]]])).all()


def test_rows_that_see_nothing(kind):
    mask = np.zeros((2, 700), bool)
    mask[1, 600:640] = True  # nothing of the first chunk
    Few(kind, **SIZES).check(mask=mask)
    Few(kind, **SIZES).check(mask=mask, sinks=np.float32([0, 1, 2, 3, 4, 5]))
    Few(kind, H=2, Lq=9, Lk=5, D=32).check(causal=True)


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("name", CODED)
def test_scales_by_strides(name, granularity):
    problem = Few(name, **SIZES, granularity=granularity)
    assert problem.scales["q_scale"].strides[2] == 0
    problem.check()


@pytest.mark.parametrize("name", ["int8-float16", "int8-bfloat16"])
def test_shift(name):
    """What smoothing takes from K is given back as one number of each row: in the LSE, against sinks, under softcap."""
    problem = Few(name, **SIZES)
    mean, shift = mean_and_shift(problem, 3, 0.2)
    for more in ({}, dict(sinks=np.float32([0, 1, 2, 3, 4, 5])), dict(softcap=2.0)):
        check_shift(problem, problem.run(scale=0.2, shift=shift, **more), mean, scale=0.2, **more)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("schedule", [EARLY, LATE])
def test_hidden_values_do_not_leak(name, schedule):
    """NaN and infinity in keys and values reach the rows that see them, and no other."""
    problem = Few(name, **SIZES)
    _, k, v = problem.arrays
    k[0, 0, 100], k[1, 1, 540, 3] = np.nan, np.nan
    v[0, 0, 120, 5], v[0, 1, 690, :4], v[1, 0, 64, 31] = np.nan, np.inf, -np.inf
    v[1, 1, 60, 2], v[1, 1, 70, 2] = np.inf, -np.inf
    mask = np.random.default_rng(3).random((2, 6, 2, 700)) < 0.5
    for more in (dict(causal=True), dict(causal=True, window=(45, 0)), dict(mask=mask), {},
                 dict(bias=np.where(mask, 0, -np.inf).astype(np.float32))):
        problem.judge(**more)(problem.run(schedule=schedule, **more))


def test_chunks_out_of_sight_are_not_read():
    """The machine raises where a kernel reads outside the arrays; hidden chunks are NaN in K and V here."""
    problem = Few("float16", H=2, Lq=1, Lk=3000, D=64)
    problem.arrays[1][:, :, :2000] = problem.arrays[2][:, :, :2000] = np.nan
    result = problem.run(window=(100, 0), causal=True)
    assert np.isfinite(result.out).all()
    assert result.products < 200, "a product of a tile that no row sees"


def test_same_bits(kind):
    """A sequence, a head and a schedule change no bit."""
    problem = Few(kind, **SIZES)
    whole = problem.run(causal=True)
    again = problem.run(causal=True, schedule=LATE)
    assert (whole.out == again.out).all() and (whole.lse == again.lse).all()
    one = Few(kind, **SIZES)
    one.arrays = [x[1:, h] for x, h in zip(problem.arrays, (slice(3, 6), slice(1, 2), slice(1, 2)), strict=True)]
    heads = dict(q_scale=slice(3, 6), k_scale=slice(1, 2), v_scale=slice(1, 2))
    one.scales = {name: x[1:, heads[name]] for name, x in problem.scales.items()}
    part = one.run(causal=True)
    assert (part.out[0] == whole.out[1, 3:]).all() and (part.lse[0] == whole.lse[1, 3:]).all()


def test_chunks_depend_on_keys_and_head_dim_only():
    chosen = [choose_decode(arch, B, 8 * B, Hk, 1, 9000, 128, "float16")
              for arch in ("sm_80", "sm_90a") for B in (1, 7) for Hk in (1, 8)]
    assert {(one.chunk, one.chunks) for one in chosen} == {(256, 36)}
    for D in (1, 64, 128, 256):
        for Lk in (1, 1000, 10**5, 2**30 - 1):
            assert keys_of_chunk(Lk, D) % 128 == 0
    one = choose_decode("sm_80", 2, 24, 2, 3, 1100, 40, "int8", "float16", "float32")
    assert (one.chunk, one.chunks, one.split_blocks, one.merge_blocks) == (1024, 2, 2 * 2 * 2 * 3, 2 * 24 * 3)
    assert one.workspace_floats == 2 * 24 * 3 * 2 * (64 + 2)


def test_not_chosen():
    assert choose_decode("sm_80", 1, 8, 8, 17, 600, 64, "float16") is None
    assert choose_decode("sm_80", 1, 8, 8, 1, 600, 64, "float32") is None
    with pytest.raises(ValueError, match="D: expected 1 to 256, got 257"):
        choose_decode("sm_80", 1, 8, 8, 1, 600, 257, "float16")


SHAPE = dict(H=2, Lq=2, Lk=1200, D=64)  # 3 chunks; a warp has 4, 4 and 1 or 2 tiles
LARGE = dict(H=2, Lq=2, Lk=500, D=192)
WAIT = "copy_wait<2 * STAGES - 1>();\n        team_barrier();  // "
LATER = "copy_wait<2 * STAGES>();\n        team_barrier();  // "
COMMIT = "    }\n    copy_commit();\n}\nDEVICE void copy_v", "        copy_commit();\n    }\n}\nDEVICE void copy_v"
STEEP = dict(alibi_slopes=np.float32([0.3, 0.01]))
BUGS = {  # name: (kind, shape, options, (file, old, new))
    "K is not waited for": ("float16", SHAPE, {}, ("decode.cu", WAIT + "K", LATER + "K")),
    "V is not waited for": ("bfloat16", SHAPE, {}, ("decode.cu", WAIT + "V", LATER + "V")),
    "Q is not waited for": ("float16", SHAPE, {}, ("decode.cu", "wait<2 * STAGES>()", "wait<2 * STAGES + 1>()")),
    "an empty group is left out": ("float16", SHAPE, {}, ("decode.cu", *COMMIT)),
    "no barrier after Q": ("float16", SHAPE, {}, ("decode.cu", "barrier();  // Q", "// Q")),
    # legal as long as there is the barrier: one warp is a little late
    "no barrier after K": (
        "float16", LARGE, {}, ("decode.cu", WAIT + "K", "if (member) warp_barrier();\n" + WAIT[:28] + "// ")),
    "no barrier after V": ("int8", SHAPE, {}, ("decode.cu", "team_barrier();  // V", "// V")),
    "K is overwritten": ("float16", LARGE, {}, ("decode.cu", "team_barrier();  // all have done with K", "")),
    "V is overwritten": ("float16", LARGE, {}, ("decode.cu", "team_barrier();  // all have done with V", "")),
    "a warp for a team": ("float16", LARGE, {}, ("decode.cu", "if (TEAM == 1) {", "if (true) {")),
    "no barrier before the join": ("float16", SHAPE, {}, ("decode.cu", "barrier();  // the teams'", "// the teams'")),
    "a ring is never closed": ("float16", SHAPE, {}, ("decode.cu", "ring + RING ? ring :", "ring + RING ? stage :")),
    "a chunk a key too long": ("float16", SHAPE, {}, ("decode.cu", "p.chunk - 1);", "p.chunk);")),
    "a chunk a tile too short": ("float16", SHAPE, {}, ("decode.cu", "p.chunk - 1);", "p.chunk - 33);")),
    "chunks begin a tile late": ("float16", SHAPE, {}, ("decode.cu", "p, 0), first);", "p, 0), first + 32);")),
    "the last chunk is left out": (
        "float16", SHAPE, {}, ("merge.cu", "(part + 1ll) * p.chunks / PARTS", "(part + 1ll) * (p.chunks - 1) / PARTS")),
    "a run begins a chunk late": (
        "float16", SHAPE, {}, ("merge.cu", "long)part * p.chunks / PARTS", "long)part * p.chunks / PARTS + 1")),
    "O of one chunk, state of another": (
        "float16", SHAPE, {}, ("merge.cu", "o + (long long)c * D", "o + (p.chunks - 1ll - c) * D")),
    "chunks are not weighted": (
        "float16", SHAPE, dict(scale=2.0), ("merge.cu", "rescale<EXACT>(state[2 * c], stand_in(m), unit)", "1.f")),
    "teams are not weighted": (
        "float16", SHAPE, dict(scale=2.0), ("decode.cu", "rescale<EXACT>(state[0], stand_in(highest), unit)", "1.f")),
    "O of chunks that nobody sees": (
        "float16", SHAPE, dict(window=(80, -1)), ("merge.cu", "seen ? x[e] : 0.f, share", "x[e], share")),
    "no barrier before the sum": ("float16", SHAPE, {}, ("merge.cu", "barrier();  // the runs'", "// the runs'")),
    "no barrier after the maxima": ("float16", SHAPE, {}, ("merge.cu", "barrier();  // the warps'", "// the warps'")),
    "O is never rescaled": (
        "float16", SHAPE, dict(scale=1.0), ("decode.cu", "o[0][i] *= rows[0].alpha[i / 2 % 2];", ";")),
    "all rows are of one head": (
        "float16", SHAPE, STEEP, ("decode.cu", "make_head(p, part.b, row.h)", "make_head(p, part.b, 0)")),
    "no swizzle": ("float16", SHAPE, {}, ("tiles.cuh", "mask = (1 << n) - 1", "mask = 0")),
    "keys after the last one": (
        "float16", {**SHAPE, "Lk": 1190}, {}, ("options.cuh", "key >= p.Lk", "key > p.Lk")),
    "rows after the last one": (
        "float16", {**SHAPE, "Lk": 1190}, {}, ("tiles.cuh", "first + i < rows - row", "first + i <= rows - row")),
    "rows of the group after the last one": (
        "float16", SHAPE, {}, ("decode.cu", "if (part.row + r >= part.rows) break;", "")),
    "columns after the last one": (
        "float16", {**SHAPE, "D": 40}, {}, ("tiles.cuh", "max(columns - (chunk + c) * EACH, 0)", "EACH")),
    "channels after the last one": (
        "float16", {**SHAPE, "D": 40}, {}, ("merge.cu", "if (channel + e >= p.D) break;", "")),
    "causal by one": (
        "float16", SHAPE, dict(causal=True), ("options.cuh", "key - i > head.high", "key - i > head.high + 1")),
    "half of a row's maximum": (
        "float16", SHAPE, dict(scale=3.0), ("weights.cuh", "return fmaxf(x, shuffle_xor(x, 2))", "return x")),
}


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug):
    kind, shape, more, *changes = BUGS[bug]
    with pytest.raises(AssertionError):
        Few(kind, **shape).check(changes=tuple(changes), **more)
