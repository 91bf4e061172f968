"""The oracle of the cache tests itself: its rows, the calls it is compared by, and that its comparers can fail."""
import cases
import numpy as np
import pytest
from caching import DV, HK, D, H, Oracle, check, dense, judge, of_row, same_bits, tokens

from cyflash import LayerScales, flash_attention, reference

INT8 = {
    "token": {},
    "k_mean": {"k_mean": np.full((HK, 1, D), 0.5, np.float32)},
    "static": {"k_scale": np.full((HK, 1, 1), 0.03, np.float32), "v_scale": np.float32(0.03)},
    "fp32_sinks": {"fp32_sinks": 4},
    "quant": {"quant": LayerScales(0.03, 0.03, 0.02, k_mean=np.full((HK, 1, D), 0.5), fp32_sinks=3, pv="bf16")},
}


def filled(lengths, dtype="float32", **settings):
    oracle = Oracle(len(lengths), dtype, **settings)
    _, k, v = tokens(max(lengths), len(lengths))
    oracle.append(k, v, lengths=lengths)
    return oracle


def test_tokens_are_prefixes():
    for short, long in zip(tokens(7, 2), tokens(30, 2), strict=True):
        assert np.array_equal(short, long[:, :, :7])


def test_rows_are_what_was_appended():
    _, k, v = tokens(50, 3)
    oracle = Oracle(3)
    oracle.append(k[:, :, :20], v[:, :, :20], lengths=[20, 0, 7])
    oracle.append(k[:2, :, 20:30], v[:2, :, 20:30], rows=[2, 0])
    assert oracle.lengths.tolist() == [30, 0, 17]
    assert np.array_equal(oracle.rows[0][0], np.concatenate([k[0, :, :20], k[1, :, 20:30]], axis=1))
    oracle.reorder([2, 2, 0])
    oracle.truncate([3], rows=[0])
    assert oracle.lengths.tolist() == [3, 17, 30]
    oracle.fork(1, 9)
    oracle.free(1)
    oracle.reset([2])
    assert {row: oracle.length(row) for row in oracle.rows} == {0: 3, 2: 0, 9: 17}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_rows_are_rounded_once(dtype):
    oracle = filled([20], dtype)
    _, k, _ = tokens(20)
    error = np.abs(oracle.rows[0][0] - k[0])
    assert 0 < error.max() <= 2.0**-8 * np.abs(k).max()


def test_dense_agrees_with_the_reference(one_build):
    q, _, _ = tokens(30)
    for length in (40, 30, 1, 0):
        oracle = filled([length])
        for options in ({}, {"causal": False}, {"window": (9, 0)}, {"softcap": 0.5}):
            judge(oracle, 0, q[0], *dense(oracle, 0, q[0], **options), **options)


@pytest.mark.parametrize("pv", [None, "int8", "bf16", "fp32"])
@pytest.mark.parametrize("name", INT8)
def test_dense_int8_agrees_with_the_simulation(one_build, name, pv):
    q, _, _ = tokens(30)
    for length in (40, 2):
        oracle = filled([length], "int8", **INT8[name])
        judge(oracle, 0, q[0], *dense(oracle, 0, q[0], pv=pv), pv=pv)


def test_check_cuts_options_and_finds_a_wrong_row():
    n, Lq, lengths = 3, 5, [12, 40, 31]
    q, _, _ = tokens(Lq, n)
    oracle, queries = filled(lengths), [5, 2, 3]
    options = cases.all_options(n, H, Lq, 40)
    out, lse = np.zeros((n, H, Lq, DV), np.float32), np.full((n, H, Lq), -np.inf, np.float32)
    for i, (length, valid) in enumerate(zip(lengths, queries, strict=True)):
        own = {name: x[i, :, :valid, :length] if name in ("bias", "mask") else x for name, x in options.items()}
        k, v = oracle.rows[i]
        out[i, :, :valid], lse[i, :, :valid] = flash_attention(q[i, :, :valid], k, v, **own, return_lse=True)
    check(oracle, [0, 1, 2], q, out, lse, queries, **options)
    for name in cases.ARGUMENTS:
        if name in options:
            rest = {other: x for other, x in options.items() if other != name} | {"causal": name != "causal"}
            with pytest.raises(AssertionError):
                check(oracle, [0, 1, 2], q, out, lse, queries, bits=False, **rest)
    for index in ((1, 0, 0), (2, 3, 2), (0, 0, 4), (1, 2, 3)):
        wrong = out.copy()
        wrong[index] += np.float32(1e-3)
        with pytest.raises(AssertionError):
            check(oracle, [0, 1, 2], q, wrong, lse, queries, **options)


def test_options_of_a_row():
    slopes, mask = np.arange(8.0).reshape(2, 4), np.arange(9) < 4
    own = of_row({"alibi_slopes": slopes, "mask": mask, "scale": 0.1}, 1, (2, 4, 3, 9), 2, 7)
    assert own["alibi_slopes"].tolist() == [4, 5, 6, 7] and own["mask"].shape == (4, 2, 7) and own["scale"] == 0.1


def test_same_bits_sees_the_sign_of_zero_and_nan():
    zero = np.zeros(3, np.float32)
    for other in (-zero, zero * np.float32(np.nan), zero.astype(np.float16), zero[:2]):
        with pytest.raises(AssertionError):
            same_bits([other], [zero])
    same_bits([zero * np.float32(np.nan)], [zero * np.float32(np.nan)])


def test_a_window_keeps_what_the_next_query_sees():
    oracle = Oracle(1, window=(10, 0))
    _, k, v = tokens(40)
    for start, stop in ((0, 5), (5, 25), (25, 26)):
        assert oracle.room(0, 32) == 32 - min(oracle.length(0), 10)
        oracle.append(k[:, :, start:stop], v[:, :, start:stop])
    assert oracle.first[0] == 15
    assert oracle.can_truncate(0, 25) and not oracle.can_truncate(0, 24)
    expected = reference.attention(k[0], k[0, :, :26], v[0, :, :26], causal=True, window=(10, 0))
    q = k[0]
    np.testing.assert_allclose(dense(oracle, 0, q)[0], expected, atol=1e-5)
