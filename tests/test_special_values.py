"""Rows that see nothing, NaN and infinity seen and unseen, huge and tiny numbers."""
import bounds
import cases
import numpy as np
import pytest

from cyflash import flash_attention, reference

LENGTHS = range(1, 41)
F32 = np.finfo(np.float32)


def zeros_and_lse(result, rows, lse=-np.inf):
    assert not result[0][rows].any() and not np.signbit(result[0][rows]).any()
    assert (result[1][rows] == lse).all()


def test_rows_that_see_nothing(build):
    """By a mask, by -inf in the bias, by both halves, by causal and by a window: all the same zeros."""
    q, k, v = cases.arrays(2, 2, 2, 60, 50, 16)
    hide = np.ones((60, 50), bool)
    hide[[0, 3, 17, 48, 59]] = False
    bias = np.where(hide, np.float32(0), np.float32(-np.inf))
    left = np.arange(50) < 25
    expected = flash_attention(q, k, v, mask=hide, return_lse=True)
    bounds.Case(q, k, v, mask=hide).check(*expected)
    zeros_and_lse(expected, np.s_[:, :, [0, 3, 17, 48, 59]])
    cases.assert_same_bits(flash_attention(q, k, v, bias=bias, return_lse=True), expected)
    halves = flash_attention(q, k, v, mask=hide | left, bias=np.where(left, bias, np.float32(0)), return_lse=True)
    cases.assert_same_bits(halves, expected)
    causal = flash_attention(q, k, v, causal=True, return_lse=True)
    zeros_and_lse(causal, np.s_[:, :, :10])
    assert np.isfinite(causal[1][:, :, 10:]).all()
    window = flash_attention(q, k, v, window=(2, 2), causal_align="top-left", return_lse=True)
    zeros_and_lse(window, np.s_[:, :, 52:])
    assert np.isfinite(window[1][:, :, :52]).all()
    sinks = np.array([1.5, -2.0], np.float32)
    with_sinks = flash_attention(q, k, v, mask=hide, sinks=sinks, return_lse=True)
    for h in range(2):
        zeros_and_lse(with_sinks, np.s_[:, h, [0, 3, 17, 48, 59]], sinks[h])


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (130, 300)], ids=str)
@pytest.mark.parametrize("how", ["mask", "bias", "mask of one", "NaN everywhere"])
def test_nothing_visible_at_all(build, shape, how):
    q, k, v = cases.arrays(1, 2, 1, *shape, 8)
    if how == "NaN everywhere":
        q[...] = k[...] = v[...] = np.nan
    option = {"bias": np.full(shape, -np.inf, np.float32)} if how == "bias" else {"mask": np.zeros(shape, bool)}
    if how == "mask of one":
        option = {"mask": np.zeros((), bool)}
    out = np.full(q.shape, np.nan, np.float32)
    zeros_and_lse(flash_attention(q, k, v, **option, out=out, return_lse=True), ...)


@pytest.mark.parametrize("D", [1, 8, 33])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_hidden_values_and_keys_do_not_leak(build, D, bad):
    """At every length and in every position of the hidden key, by mask, bias and causal order."""
    for L in LENGTHS:
        q, k, v = cases.arrays(1, 1, 1, 5, L, D)
        for j in {0, L // 2, L - 1}:
            hide = np.arange(L) != j
            clean = flash_attention(q, k, v, mask=hide, return_lse=True)
            spoiled_k, spoiled_v = k.copy(), v.copy()
            spoiled_k[:, :, j] = spoiled_v[:, :, j] = bad
            cases.assert_same_bits(flash_attention(q, spoiled_k, spoiled_v, mask=hide, return_lse=True), clean)
            bias = np.where(hide, np.float32(0), np.float32(-np.inf))
            cases.assert_same_bits(flash_attention(q, spoiled_k, spoiled_v, bias=bias, return_lse=True), clean)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_causal_and_window_hide_bad_numbers(build, bad):
    """Row i of a partly visible tile is clean though its neighbours see NaN."""
    L = 130
    q, k, v = cases.arrays(1, 1, 1, L, L, 16)
    left, right = {"window": (9, -1)}, {"window": (-1, 4)}
    for j in (0, 1, 63, 64, 77, 129):
        for options in ({"causal": True}, {"window": (3, 5)}, left, right, {"causal": True, "window": (20, -1)}):
            clean = flash_attention(q, k, v, **options)
            spoiled_k, spoiled_v = k.copy(), v.copy()
            spoiled_k[:, :, j] = np.nan
            spoiled_v[:, :, j] = bad
            case = bounds.Case(q, spoiled_k, spoiled_v, **options)
            out, lse = flash_attention(q, spoiled_k, spoiled_v, **options, return_lse=True)
            case.check(out, lse)
            unaware = ~np.isnan(case.expected_lse[0, 0])
            assert unaware.sum() < L and (unaware.any() or j == 0 or options in (left, right))
            assert np.array_equal(out[0, 0, unaware], clean[0, 0, unaware])


@pytest.mark.parametrize("D", [1, 8, 33])
@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_visible_bad_numbers_show(build, D, where, bad):
    """At every length, whichever part of a vector the key falls into. Scores are kept apart from -inf by NaN's rule."""
    for L in LENGTHS:
        for j in {0, L // 2, L - 1}:
            arrays = dict(zip("qkv", cases.arrays(1, 1, 1, L, L, D), strict=True))
            arrays["q"] = np.abs(arrays["q"])  # so that an infinite key has a score of one sign
            arrays["k"] = np.abs(arrays["k"])
            arrays[where][0, 0, j, D // 2] = bad
            out, lse = flash_attention(**arrays, return_lse=True)
            case = bounds.Case(**arrays)
            if np.isposinf(case.expected_lse).any():  # the formula's lse is inf, a running maximum's is NaN
                assert np.isnan(case.expected[np.isposinf(case.expected_lse)]).all()
                lse = None
            case.check(out, lse)


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_scores_of_minus_infinity(build, options):
    """Visible keys of weight 0; a value that is NaN shows through them."""
    q, k, v = (np.abs(x) for x in cases.arrays(1, 1, 1, 30, 30, 8))
    k[0, 0, [3, 17]] = -np.inf
    v[0, 0, 17, 2] = np.nan
    cases.verify(q, k, v, **options)
    k[...] = -np.inf
    zeros_and_lse(flash_attention(q, k, np.abs(cases.arrays(1, 1, 1, 30, 30, 8)[2]), return_lse=True), ...)


def test_all_keys_nan(build):
    for L in LENGTHS:
        q, k, v = cases.arrays(1, 1, 1, 3, L, 8)
        k[...] = np.nan
        out, lse = flash_attention(q, k, v, return_lse=True)
        assert np.isnan(out).all() and np.isnan(lse).all()


def test_nan_and_infinity_in_the_bias(build):
    q, k, v = cases.arrays(1, 1, 1, 6, 20, 8)
    bias = np.zeros((6, 20), np.float32)
    bias[1, 19] = np.nan
    bias[3, 4] = np.inf
    out, lse = flash_attention(q, k, v, bias=bias, return_lse=True)
    assert np.isnan(out[0, 0, [1, 3]]).all() and np.isnan(lse[0, 0, 1]) and not np.isfinite(lse[0, 0, 3])
    rows = np.s_[:, :, [0, 2, 4, 5]]
    plain, plain_lse = flash_attention(q, k, v, return_lse=True)
    cases.assert_same_bits((out[rows], lse[rows]), (plain[rows], plain_lse[rows]))


def test_nan_in_the_bias_of_a_hidden_key(build):
    """The mask wins: what is hidden by it may hold anything."""
    q, k, v = cases.arrays(1, 1, 1, 6, 20, 8)
    mask = np.ones((6, 20), bool)
    mask[2, 5] = mask[4, :] = False
    bias = np.where(mask, np.float32(0.5), np.float32(np.nan))
    expected = flash_attention(q, k, v, bias=np.full((6, 20), 0.5, np.float32), mask=mask, return_lse=True)
    cases.assert_same_bits(flash_attention(q, k, v, bias=bias, mask=mask, return_lse=True), expected)


@pytest.mark.parametrize("size", [90.0, 1e3, 1e5, 1e20, 1e37])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_beyond_the_range_of_exp(build, size, sign):
    """exp(score) overflows or underflows, exp(score - max) does not; scores are exact, so the bound stays small."""
    r = np.random.default_rng(3)
    q = np.ones((1, 1, 40, 1), np.float32)
    k = (np.float32(size * sign) * (1 + r.integers(0, 5, (1, 1, 70, 1)) / 64)).astype(np.float32)
    v = cases.arrays(1, 1, Lq=70, D=9)[2]
    out, lse = flash_attention(q, k, v, scale=1.0, return_lse=True)
    case = bounds.Case(q, k, v, scale=1.0)
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    if size <= 1e3:
        case.check(out, lse)
    else:  # one hot: ties of the largest score share the weight
        np.testing.assert_allclose(out, case.expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(lse, case.expected_lse, rtol=1e-6)


def test_running_maximum_rises_and_falls(build):
    """Keys sorted by score, in both directions: every block rescales all the former, or none."""
    k = np.linspace(-200, 200, 500, dtype=np.float32).reshape(1, 1, 500, 1)
    q, v = np.array([-1.0, 1.0, 0.5, 0.0], np.float32).reshape(1, 1, 4, 1), cases.arrays(1, 1, Lq=500, D=5)[2]
    cases.verify(q, k, v, scale=1.0)
    cases.verify(q, k[:, :, ::-1], v, scale=1.0)


def test_rows_of_the_lowest_number_are_uniform(build):
    """finfo.min is how some mask; as a whole row it means nothing, so every key weighs the same."""
    q, k, v = cases.arrays(1, 2, 2, 30, 64, 8)
    bias = np.zeros((30, 64), np.float32)
    bias[::3] = F32.min
    out, lse = flash_attention(q, k, v, bias=bias, return_lse=True)
    mean = v.mean(axis=2, dtype=np.float64)
    for h in range(2):
        np.testing.assert_allclose(out[0, h, ::3], np.broadcast_to(mean[0, h], (10, 8)), atol=1e-6)
    assert (lse[0, :, ::3] == F32.min).all()
    rest = [i for i in range(30) if i % 3]
    bounds.Case(q[:, :, rest], k, v).check(out[:, :, rest], lse[:, :, rest])


def test_lowest_number_hides_a_key_beside_others(build):
    q, k, v = cases.arrays(1, 2, 2, 30, 64, 8)
    hide = np.random.default_rng(0).random((30, 64)) < 0.5
    hide[:, 0] = True
    bias = np.where(hide, np.float32(0), F32.min)
    out, lse = flash_attention(q, k, v, bias=bias, return_lse=True)
    bounds.Case(q, k, v, mask=hide).check(out, lse)


def test_lowest_number_with_other_options(build):
    """Adding ALiBi to finfo.min must neither overflow to -inf and empty the row nor give NaN."""
    q, k, v = cases.arrays(1, 1, 1, 30, 64, 8)
    bias = np.full((30, 64), F32.min, np.float32)
    slopes = np.array([0.5], np.float32)
    out, lse = flash_attention(q, k, v, bias=bias, alibi_slopes=slopes, causal=True, return_lse=True)
    for i in range(30):
        np.testing.assert_allclose(out[0, 0, i], v[0, 0, : i + 35].mean(axis=0, dtype=np.float64), atol=1e-6)
    assert (lse == F32.min).all()


@pytest.mark.parametrize("size", [1e-38, 1e-40, 1e-44])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_denormals(build, size, where):
    """Neither flushed nor slow paths that differ: a mean of denormals is a denormal."""
    arrays = dict(zip("qkv", cases.arrays(1, 1, 1, 20, 64, 8), strict=True))
    arrays[where] = (arrays[where] * size).astype(np.float32)
    cases.verify(**arrays)
    if where == "v":
        assert flash_attention(**arrays).any() or size < 1e-43


@pytest.mark.parametrize("size", [1e30, 3e38])
def test_huge_values(build, size):
    """A weighted mean of values near the largest number is finite."""
    q, k, v = cases.arrays(1, 1, 1, 20, 64, 8)
    v = (np.clip(v, -1, 1) * np.float32(size)).astype(np.float32)
    out = flash_attention(q, k, v)
    if size < 1e38:
        bounds.Case(q, k, v).check(out)
    else:
        assert not np.isnan(out).any()


def test_zero_keys_are_uniform(build):
    q, k, v = cases.arrays(1, 1, 1, 20, 64, 8)
    out, lse = flash_attention(q, np.zeros_like(k), v, return_lse=True)
    np.testing.assert_allclose(out[0, 0], np.broadcast_to(v[0, 0].mean(axis=0), (20, 8)), atol=1e-6)
    np.testing.assert_allclose(lse, np.log(64), rtol=1e-6)


def test_infinite_and_nan_sinks(build):
    """A sink of infinity takes all weight, one of NaN shows; a row that sees no key has output 0 beside either."""
    q, k, v = cases.arrays(1, 3, 3, 6, 20, 8)
    options = {"mask": np.arange(6)[:, None] != 2, "sinks": np.array([np.inf, np.nan, 0.5], np.float32)}
    out, lse = flash_attention(q, k, v, **options, return_lse=True)
    expected, expected_lse = reference.attention(q, k, v, **options, return_lse=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)
    assert not out[0, 0].any() and (lse[0, 0] == np.inf).all()
    assert np.isnan(out[0, 1, [0, 1, 3, 4, 5]]).all() and not out[0, 1, 2].any() and np.isnan(lse[0, 1]).all()


@pytest.mark.parametrize("softcap", [1e-37, 1e-40, 1e-60, 1e-300])
def test_tiny_softcap_is_not_none(build, softcap):
    """All scores are as good as 0, so every key weighs the same."""
    q, k, v = cases.arrays(1, 1, 1, 20, 64, 8)
    cases.verify(q, k, v, softcap=softcap)


def test_rounding_that_goes_one_way(build):
    """Where all weights and values are the same, every addition of a sum errs in one direction."""
    for Lk, value in ((207, -0.7346458), (247, 0.060968876), (1000, 1.1), (128, 0.3)):
        q, k, v = cases.arrays(1, 2, 1, 40, Lk, 15)
        q, k, v = np.float32(1e-20) * q, np.float32(1e-20) * k, np.full_like(v, value)
        out, lse = flash_attention(q, k, v, return_lse=True)
        bounds.Case(q, k, v).check(out, lse)
