"""The GPU kernels' source, run on the CPU by the machine of gpu_shim/, against the float64 reference."""
import zlib

import gpu_running
import numpy as np
import pytest
from gpu_cases import (
    CODED,
    KINDS,
    OPTIONS,
    Problem,
    check_shift,
    dtype,
    everything,
    mean_and_shift,
    options,
    pairs,
)
from gpu_running import EARLY, LATE

SIZES = dict(B=2, H=4, Hk=2, Lq=70, Lk=133, D=32)
LENGTHS = 2, 4, 70, 133


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("option", OPTIONS)
def test_option(kind, option):
    """Each option alone; and a kernel that ignored it would be found out."""
    schedule = (EARLY, LATE)[zlib.crc32((kind + option).encode()) % 2]
    Problem(kind, **SIZES).check_option(*options(*LENGTHS)[option], schedules=(schedule,))


def test_all_options_together(kind):
    """And no option is ignored among the others."""
    every, others = everything(*LENGTHS)
    problem = Problem(kind, **SIZES)
    result = problem.check(**every)
    for without in others.values():
        problem.differs(result, **without)


def test_heads_share_keys(kind):
    """Query heads 0 and 1 read key and value head 0: not 0 and 2."""
    problem = Problem(kind, **SIZES)
    result = problem.check()
    result.out, result.lse = result.out[:, [0, 2, 1, 3]], result.lse[:, [0, 2, 1, 3]]
    problem.differs(result)


@pytest.mark.parametrize("kind, D", pairs(KINDS, [1, 16, 20, 40, 64, 96, 128, 192, 256]))
def test_head_dim(kind, D):
    Problem(kind, H=2, Lq=40, Lk=70, D=D).check()


@pytest.mark.parametrize("kind, D", pairs(KINDS, [1, 20, 40, 64, 96, 128], 1))
def test_head_dim_of_many_rows(kind, D):
    """Blocks of more rows, where registers allow it."""
    Problem(kind, H=2, Lq=140, Lk=100, D=D).check(causal=True)


@pytest.mark.parametrize("D", [224, 256])
def test_large_head_dim_with_options(kind, D):
    Problem(kind, H=2, Lq=40, Lk=70, D=D).check(softcap=3.0, causal=True)


@pytest.mark.parametrize("Lq, Lk", [(1, 1), (1, 65), (63, 64), (64, 63), (65, 129), (130, 7), (16, 128)])
def test_tails(kind, Lq, Lk):
    Problem(kind, H=2, Lq=Lq, Lk=Lk, D=32).check()
    Problem(kind, H=2, Lq=Lq, Lk=Lk, D=32).check(causal=True)


def test_no_keys(kind):
    problem = Problem(kind, H=2, Lq=5, Lk=0, D=32)
    result = problem.run()
    assert (result.out == 0).all() and (result.lse == -np.inf).all()
    result = problem.run(sinks=np.float32([1, -3]))
    assert (result.out == 0).all() and (result.lse == np.float32([[[1], [-3]]])).all()


def test_rows_that_see_nothing(kind):
    mask = np.zeros((70, 133), bool)
    mask[::3, 5:9] = True
    Problem(kind, **SIZES).check(mask=mask)
    Problem(kind, **SIZES).check(mask=mask, sinks=np.float32([0, 1, 2, 3]))
    Problem(kind, H=2, Lq=100, Lk=30, D=32).check(causal=True)


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("name", CODED)
def test_scales_by_strides(name, granularity):
    """Shared scales have strides of 0, and count for the right head."""
    problem = Problem(name, **SIZES, granularity=granularity)
    assert problem.scales["q_scale"].strides[2] == 0
    problem.check()


@pytest.mark.parametrize("name", CODED)
def test_output_types(name):
    """Codes become any of them; odd columns as even ones."""
    problem = Problem(name, **{**SIZES, "D": 37})
    results = []
    for problem.out in map(dtype, ("float32", "float16", "bfloat16")):
        results.append(problem.run().out)
    for result in results:
        np.testing.assert_array_equal(result.astype(float), results[0].astype(result.dtype).astype(float))


def test_shift():
    """What smoothing takes from K is given back as one number of each row: in the LSE, against sinks, under softcap."""
    problem = Problem("int8-bfloat16", **SIZES)
    mean, shift = mean_and_shift(problem, 2, 0.2)
    for more in ({}, dict(sinks=np.float32([0, 1, 2, 3])), dict(softcap=2.0), dict(softcap=2.0, causal=True)):
        check_shift(problem, problem.run(scale=0.2, shift=shift, **more), mean, scale=0.2, **more)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("schedule", [EARLY, LATE])
def test_hidden_values_do_not_leak(name, schedule):
    """NaN and infinity in keys and values reach the rows that see them, and no other."""
    problem = Problem(name, **SIZES)
    _, k, v = problem.arrays
    k[0, 0, 100], k[1, 1, 40, 3] = np.nan, np.nan
    v[0, 0, 120, 5], v[0, 1, 90, :4], v[1, 0, 64, 31] = np.nan, np.inf, -np.inf
    v[1, 1, 60, 2], v[1, 1, 70, 2] = np.inf, -np.inf
    mask = np.random.default_rng(3).random((70, 133)) < 0.5
    for more in (dict(causal=True), dict(causal=True, window=(15, 0)), dict(mask=mask), {},
                 dict(bias=np.where(mask, 0, -np.inf).astype(np.float32))):
        problem.judge(**more)(problem.run(schedule=schedule, **more))


def test_infinite_and_nan_sinks(kind):
    """A sink of infinity takes all weight, one of NaN shows; a row that sees no key has output 0 beside either."""
    problem = Problem(kind, H=3, Hk=3, Lq=6, Lk=9, D=16)
    mask = np.broadcast_to(np.arange(6)[:, None] != 2, (6, 9))
    result = problem.run(mask=mask, sinks=np.float32([np.inf, np.nan, 0.5]))
    out, lse = result.out.astype(np.float32), result.lse
    assert not out[0, 0].any() and (lse[0, 0] == np.inf).all()
    assert not out[0, :, 2].any() and np.isnan(lse[0, 1]).all() and lse[0, 2, 2] == 0.5
    assert np.isnan(out[0, 1, [0, 1, 3, 4, 5]]).all() and np.isfinite(out[0, 2]).all()


def test_rows_of_the_least_number(kind):
    """finfo.min is how some mask; as a whole row it means nothing, so every key weighs the same."""
    bias = np.zeros((70, 133), np.float32)
    bias[4:9] = np.finfo(np.float32).min
    problem = Problem(kind, **SIZES)
    result = problem.run(bias=bias)
    mean = np.repeat(problem.floats()[2].mean(axis=2, keepdims=True), 2, axis=1)
    np.testing.assert_allclose(result.out[:, :, 4:9].astype(float), np.broadcast_to(mean, (2, 4, 5, 32)), atol=0.01)
    assert (result.lse[:, :, 4:9] == np.finfo(np.float32).min).all()


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_visible_values_of_no_weight(name):
    """A NaN value is seen even where its weight is 0 in float32."""
    problem = Problem(name, Lq=20, Lk=40, D=16)
    problem.arrays[2][0, 0, 25, 3] = np.nan
    bias = np.zeros(40, np.float32)
    bias[25] = -300
    result = problem.run(bias=bias)
    assert np.isnan(result.out[..., 3].astype(np.float32)).all()
    assert np.isfinite(result.out[..., :3].astype(np.float32)).all()


def test_unaligned_rows(kind):
    """Rows that do not begin at multiples of 16 bytes are copied element by element."""
    problem = Problem(kind, **{**SIZES, "D": 37})
    problem.check()
    problem.check(causal=True)


def test_strides(kind):
    """(B, L, H, D) memory, seen as (B, H, L, D)."""
    problem = Problem(kind, **SIZES)
    problem.arrays = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in problem.arrays]
    problem.check(causal=True)


def test_bias_and_mask_strides(kind):
    bias = np.random.default_rng(1).standard_normal((133, 70)).astype(np.float32).T
    Problem(kind, **SIZES).check(bias=bias, mask=(bias > -1))


def test_any_priority(kind):
    """The same bits, whichever warp runs first and whenever copies land."""
    problem = Problem(kind, Lq=70, Lk=200, D=64)
    late = problem.run(schedule=LATE)
    for seed in range(2, 5):
        early = problem.run(schedule=EARLY, seed=seed)
        np.testing.assert_array_equal(early.out.view(np.uint8), late.out.view(np.uint8))


def test_large_scores(kind):
    problem = Problem(kind, Lq=40, Lk=100, D=32)
    problem.check(scale=30.0)


def test_params_size():
    """The struct of the tests is the kernels' struct."""
    variant = gpu_running.variants.choose("sm_80", 64, "float32")
    gpu_running.library(variant.source, variant.macros, ())
