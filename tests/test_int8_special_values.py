"""Int8 attention: rows that see nothing, NaN in the bias, extreme scales, scores, means and codes, wrong input."""
import cases
import cases_int8
import numpy as np
import pytest

from cyflash import flash_attention_int8, reference

F32 = np.finfo(np.float32)
PV = ("int8", "bf16", "fp32")


def run(*qkv, **arguments):
    return flash_attention_int8(*qkv, **arguments, return_lse=True)


@pytest.mark.parametrize("pv", PV)
def test_rows_that_see_nothing(build, pv):
    """By a mask, by -inf in the bias, by both halves, by causal and by a window: all the same zeros."""
    q, k, v = cases.arrays(2, 2, 2, 60, 50, 16)
    rows = [0, 3, 17, 48, 59]
    hide = np.ones((60, 50), bool)
    hide[rows] = False
    bias = np.where(hide, np.float32(0), np.float32(-np.inf))
    left = np.arange(50) < 25
    expected = run(q, k, v, mask=hide, pv=pv)
    assert not expected[0][:, :, rows].any() and not np.signbit(expected[0][:, :, rows]).any()
    assert (expected[1][:, :, rows] == -np.inf).all()
    cases.assert_same_bits(run(q, k, v, bias=bias, pv=pv), expected)
    halves = {"mask": hide | left, "bias": np.where(left, bias, np.float32(0))}
    cases.assert_same_bits(run(q, k, v, **halves, pv=pv), expected)
    out, lse = run(q, k, v, causal=True, pv=pv)
    assert not out[:, :, :10].any() and (lse[:, :, :10] == -np.inf).all() and np.isfinite(lse[:, :, 10:]).all()
    out, lse = run(q, k, v, window=(2, 2), causal_align="top-left", pv=pv, sinks=[1.5, -2.0])
    assert not out[:, :, 52:].any() and (lse[:, 0, 52:] == 1.5).all() and (lse[:, 1, 52:] == -2).all()


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (130, 300)], ids=str)
@pytest.mark.parametrize("how", ["mask", "bias", "mask of one"])
def test_nothing_visible_at_all(build, shape, how):
    q, k, v = cases.arrays(1, 2, 1, *shape, 8)
    option = {"bias": np.full(shape, -np.inf, np.float32)} if how == "bias" else {"mask": np.zeros(shape, bool)}
    option = {"mask": np.zeros((), bool)} if how == "mask of one" else option
    for n in (0, 1):
        out, lse = run(q, k, v, **option, fp32_sinks=n, out=np.full(q.shape, np.nan, np.float32))
        assert not out.any() and (lse == -np.inf).all()


@pytest.mark.parametrize("pv", PV)
def test_nan_and_infinity_in_the_bias(build, pv):
    """They show in their row, at every length, and in no other."""
    for Lk in (1, 5, 20, 150):
        q, k, v = cases.arrays(1, 1, 1, 6, Lk, 8)
        bias = np.zeros((6, Lk), np.float32)
        bias[1, Lk - 1] = np.nan
        bias[3, Lk // 2] = np.inf
        out, lse = run(q, k, v, bias=bias, pv=pv)
        assert np.isnan(out[0, 0, [1, 3]]).all() and np.isnan(lse[0, 0, 1]) and not np.isfinite(lse[0, 0, 3])
        rows = np.s_[:, :, [0, 2, 4, 5]]
        plain, plain_lse = run(q, k, v, bias=np.zeros_like(bias), pv=pv)
        cases.assert_same_bits((out[rows], lse[rows]), (plain[rows], plain_lse[rows]))


@pytest.mark.parametrize("pv", PV)
def test_nan_in_the_bias_of_a_hidden_key(build, pv):
    """The mask wins: what is hidden by it may hold anything."""
    q, k, v = cases.arrays(1, 1, 1, 6, 200, 8)
    mask = np.ones((6, 200), bool)
    mask[2, 5] = mask[3, 130:] = mask[4, :] = False
    bias = np.where(mask, np.float32(0.5), np.float32(np.nan))
    expected = run(q, k, v, bias=np.full((6, 200), 0.5, np.float32), mask=mask, pv=pv)
    cases.assert_same_bits(run(q, k, v, bias=bias, mask=mask, pv=pv), expected)


@pytest.mark.parametrize("n", [0, 3])
def test_infinite_and_nan_sinks(build, n):
    """A sink of infinity takes all weight, one of NaN shows; a row that sees no key has output 0 beside either."""
    q, k, v = cases.arrays(1, 3, 3, 6, 20, 8)
    options = {"mask": np.arange(6)[:, None] != 2, "sinks": np.array([np.inf, np.nan, 0.5], np.float32)}
    out, lse = run(q, k, v, **options, fp32_sinks=n)
    expected, expected_lse = reference.attention_int8(q, k, v, **options, fp32_sinks=n, return_lse=True)
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)
    assert not out[0, 0].any() and np.isnan(out[0, 1, [0, 1, 3, 4, 5]]).all() and not out[0, 1, 2].any()


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("size", [90.0, 1e3, 1e5, 1e20, 1e36])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_beyond_the_range_of_exp(build, size, sign, pv):
    """exp(score) overflows or underflows, exp(score - max) does not."""
    r = np.random.default_rng(3)
    q = np.ones((1, 1, 40, 1), np.int8)
    k = (sign * (100 + r.integers(0, 5, (1, 1, 150, 1)))).astype(np.int8)
    v = cases.arrays(1, 1, Lq=150, D=9)[2]
    scales = {"q_scale": 1.0, "k_scale": np.float32(size / 100)}
    out, lse = run(q, k, v, **scales, scale=1.0, pv=pv)
    expected, expected_lse = reference.attention_int8(q, k, v, **scales, scale=1.0, pv=pv, return_lse=True)
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)
    if size <= 1e3:
        cases_int8.verify(q, k, v, **scales, scale=1.0, pv=pv)
    else:  # one hot: ties of the largest score share the weight; blocks without one have none
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pv", PV)
def test_running_maximum_rises_and_falls(build, pv):
    """Keys sorted by score, in both directions: every block rescales all the former, or none."""
    k = np.linspace(-200, 200, 500, dtype=np.float32).reshape(1, 1, 500, 1)
    q, v = np.array([-1.0, 1.0, 0.5, 0.0], np.float32).reshape(1, 1, 4, 1), cases.arrays(1, 1, Lq=500, D=5)[2]
    for keys in (k, k[:, :, ::-1]):
        for n in (0, 200):
            cases_int8.verify(q, keys, v, scale=1.0, pv=pv, fp32_sinks=n)


def test_rows_of_the_lowest_number_are_uniform(build):
    """finfo.min is how some mask; as a whole row it means nothing, so every key weighs the same."""
    q, k, v = cases.arrays(1, 2, 2, 30, 200, 8)
    bias = np.zeros((30, 200), np.float32)
    bias[::3] = F32.min
    out, lse = run(q, k, v, bias=bias)
    mean = v.mean(axis=2, dtype=np.float64)
    for h in range(2):
        np.testing.assert_allclose(out[0, h, ::3], np.broadcast_to(mean[0, h], (10, 8)), atol=5e-3)
    assert (lse[0, :, ::3] == F32.min).all()
    rest = [i for i in range(30) if i % 3]
    plain = run(q, k, v, bias=np.zeros_like(bias))
    cases.assert_same_bits((out[:, :, rest], lse[:, :, rest]), (plain[0][:, :, rest], plain[1][:, :, rest]))


@pytest.mark.parametrize("pv", PV)
def test_lowest_number_hides_a_key_beside_others(build, pv):
    """In a block of such keys only, they weigh nothing against the other blocks."""
    q, k, v = cases.arrays(1, 2, 2, 30, 300, 8)
    hide = np.random.default_rng(0).random((30, 300)) < 0.5
    hide[:, 0] = True
    hide[:, 100:] &= np.arange(30)[:, None] % 2 == 0
    bias = np.where(hide, np.float32(0), F32.min)
    expected = run(q, k, v, bias=np.where(hide, np.float32(0), np.float32(-np.inf)), pv=pv)
    cases.assert_same_bits(run(q, k, v, bias=bias, pv=pv), expected)


@pytest.mark.parametrize("pv", PV)
def test_codes_of_minus_128(build, pv):
    """As data of -128 has no counterpart, a sum may be 128 x 128 times the head size."""
    r = np.random.default_rng(0)
    for shape in ((1, 20, 128), (1, 150, 33)):
        lowest = np.full(shape, -128, np.int8)
        mixed = r.choice(np.array([-128, 127], np.int8), shape)
        fills = ((lowest, lowest, lowest), (mixed, lowest, mixed), (lowest, mixed, lowest), (mixed, mixed, mixed))
        for q, k, v in fills:
            cases_int8.verify(q, k, v, q_scale=0.01, k_scale=0.01, v_scale=1.0, pv=pv)
        out = run(lowest, lowest, lowest, q_scale=0.01, k_scale=0.01, v_scale=1.0, pv=pv)[0]
        np.testing.assert_allclose(out, -128, rtol=1e-5)


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-38, 1e-36, 1e20])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_zeros_and_extreme_sizes(build, size, where, pv):
    """Scales are never 0 or infinite, so that nothing becomes NaN; zeros stay zeros."""
    arrays = dict(zip("qkv", cases.arrays(1, 1, 1, 20, 150, 8), strict=True))
    arrays[where] = (arrays[where] * size).astype(np.float32)
    scale = 1e-20 if size == 1e20 and where != "v" else None
    for granularity in ("token", "tensor"):
        cases_int8.verify(**arrays, scale=scale, pv=pv, granularity=granularity)
    out, lse = run(**arrays, scale=scale, pv=pv)
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    if size == 0:
        assert not out.any() if where == "v" else np.allclose(lse, np.log(150), rtol=1e-6)


@pytest.mark.parametrize("pv", PV)
def test_constant_arrays_and_one_token(build, pv):
    q, k, v = (np.full((2, 50, 16), x, np.float32) for x in (0.5, -3.0, 2.5))
    out, lse = run(q, k, v, pv=pv)
    np.testing.assert_allclose(out, 2.5, rtol=1e-6 if pv != "bf16" else 4e-3)
    np.testing.assert_allclose(lse, np.log(50) + 16 * 0.5 * -3 / 4, rtol=1e-6)
    out, lse = run(q[:, :1], k[:, :1], v[:, :1], pv=pv)  # one key that is its own mean
    np.testing.assert_allclose(out, 2.5, rtol=1e-6)
    np.testing.assert_allclose(lse, -6, rtol=1e-6)


@pytest.mark.parametrize("mean", [100.0, 1e4, 1e6])
def test_large_means(build, mean):
    """What all keys share takes no precision from scores, however large, unless softcap needs them whole."""
    q, k, v = cases.arrays(1, 2, 1, 40, 150, 16)
    shift = np.zeros((1, 1, 1, 16), np.float32)
    shift[..., :4] = mean
    cases_int8.verify(q, k + shift, v)
    cases_int8.verify(q, k + shift, v, fp32_sinks=3, sinks=np.array([0.5, 1.0], np.float32), few=mean < 1e3)
    plain = flash_attention_int8(q, k, v)
    assert np.abs(flash_attention_int8(q, k + np.float32(100), v) - plain).max() < 2e-3
    cases_int8.verify(q, k + shift, v, softcap=20.0, sinks=np.array([0.5, 1.0], np.float32), few=mean < 1e3)


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("softcap", [1e-37, 1e-3, 0.5, 50.0, 1e30])
def test_softcap_at_every_scale(build, softcap, pv):
    q, k, v = cases.arrays(1, 2, 1, 40, 150, 16)
    for size in (0.1, 10.0, 100.0):
        cases_int8.verify(np.float32(size) * q, k, v, softcap=softcap, pv=pv, few=size < 100)


@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0, 1e-6, 3.0])
def test_scales(build, scale):
    for n in (0, 9):
        cases_int8.verify(*cases.arrays(1, 2, 1, 40, 150, 16), scale=scale, fp32_sinks=n)


def test_huge_values(build):
    """As far as their sums are finite."""
    q, k, v = cases.arrays(1, 1, 1, 20, 150, 8)
    v = (np.clip(v, -1, 1) * np.float32(1e36)).astype(np.float32)
    for granularity in ("token", "tensor"):
        cases_int8.verify(q, k, v, granularity=granularity)
        assert np.isfinite(flash_attention_int8(q, k, v, granularity=granularity)).all()
    for most, granularity in ((3.4e38, "tensor"), (1.6e38, "token")):  # 255 times the scale of a token is finite
        one = np.full((1, 1, 1, 8), most, np.float32)
        for pv in PV[::2]:
            out = flash_attention_int8(q, k[:, :, :1], one, pv=pv, granularity=granularity)
            np.testing.assert_allclose(out, most, rtol=1e-6)


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("pv", PV)
def test_nan_and_infinity_in_the_input_raise(build, where, bad, pv):
    """Wherever they are, hidden or not, with the position."""
    arrays = dict(zip("qkv", cases.arrays(1, 2, 2, 20, 150, 8), strict=True))
    arrays[where][0, 1, 17, 5] = bad
    for options in ({}, {"mask": np.zeros((), bool)}, {"granularity": "tensor"}, {"fp32_sinks": 20},
                    {"fp32_sinks": 150}, {f"{where}_scale": 0.1}):
        with pytest.raises(ValueError, match=rf"^{where}: .*\(0, 1, 17, 5\)"):
            flash_attention_int8(**arrays, **options, pv=pv)


def test_scales_that_meet_in_the_middle(build):
    """Keys of 1e36 and queries of 1e-36 have ordinary scores: their scales are multiplied before anything else."""
    q, k, v = cases.arrays(1, 2, 1, 40, 150, 16)
    plain = flash_attention_int8(q, k, v)
    for up in (1e30, 1e36):
        out = flash_attention_int8(q / np.float32(up), k * np.float32(up), v)
        np.testing.assert_allclose(out, plain, atol=5e-3)  # at 1e36 some scales of q are the smallest there is


def test_the_largest_values_stay_finite_in_bfloat16(build):
    """What is finite rounds to something finite, or a hidden value would leak: there is no 0 * inf."""
    q, k, v = cases.arrays(1, 2, 1, 20, 30, 16)
    v[:, :, 5] = np.finfo(np.float32).max
    mask = np.arange(30) != 5
    hidden = v.copy()
    hidden[:, :, 5] = 0.0
    got, expected = (flash_attention_int8(q, k, x, mask=mask, pv="bf16") for x in (v, hidden))
    np.testing.assert_array_equal(got, expected)
