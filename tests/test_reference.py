"""The specification itself, against results worked out by hand and against a loop over single numbers."""
import math

import numpy as np
import pytest

from cyflash.reference import attention


def by_loop(q, k, v, *, causal=False, causal_align="bottom-right", scale=None, window=None, softcap=0.0, bias=None,
            mask=None, alibi_slopes=None, sinks=None):
    """Attention of (B, H, L, D) arrays, one number at a time, with no array operation."""
    B, H, Lq, D = q.shape
    Hk, Lk, Dv = k.shape[1], k.shape[2], v.shape[3]
    out, lse = np.zeros((B, H, Lq, Dv)), np.full((B, H, Lq), -np.inf)
    for b, h, i in np.ndindex(B, H, Lq):
        kv = h * Hk // H
        position = i + Lk - Lq if causal_align == "bottom-right" else i
        total, value = 0.0, [0.0] * Dv
        if sinks is not None:
            total += math.exp(sinks[h])
        for j in range(Lk):
            if causal and j > position:
                continue
            if window is not None and window[0] != -1 and j < position - window[0]:
                continue
            if window is not None and window[1] != -1 and j > position + window[1]:
                continue
            if mask is not None and not mask[b, h, i, j]:
                continue
            score = sum(q[b, h, i, d] * k[b, kv, j, d] for d in range(D)) * (D**-0.5 if scale is None else scale)
            if softcap:
                score = softcap * math.tanh(score / softcap)
            if bias is not None:
                score += bias[b, h, i, j]
            if alibi_slopes is not None:
                score -= alibi_slopes[b, h] * abs(position - j)
            weight = math.exp(score)
            total += weight
            for d in range(Dv):
                value[d] += weight * v[b, kv, j, d]
        if total > 0:
            out[b, h, i] = [x / total for x in value]
            lse[b, h, i] = math.log(total)
    return out, lse


def arrays(B=2, H=4, Hk=2, Lq=5, Lk=7, D=3, Dv=2, seed=0):
    r = np.random.default_rng(seed)
    return r.normal(size=(B, H, Lq, D)), r.normal(size=(B, Hk, Lk, D)), r.normal(size=(B, Hk, Lk, Dv))


R = np.random.default_rng(1)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "causal_align": "top-left"},
    "scale": {"scale": -0.7},
    "window": {"window": (2, 1)},
    "window left": {"window": (1, -1)},
    "window right": {"window": (-1, 0), "causal_align": "top-left"},
    "softcap": {"softcap": 0.8},
    "bias": {"bias": R.normal(size=(2, 4, 5, 7))},
    "bias -inf": {"bias": np.where(R.random((2, 4, 5, 7)) < 0.5, -np.inf, 0.3)},
    "mask": {"mask": R.random((2, 4, 5, 7)) < 0.5},
    "alibi": {"alibi_slopes": R.random((2, 4))},
    "sinks": {"sinks": R.normal(size=4)},
    "all": {"causal": True, "scale": 2.0, "window": (3, 3), "softcap": 1.5, "bias": R.normal(size=(2, 4, 5, 7)),
            "mask": R.random((2, 4, 5, 7)) < 0.7, "alibi_slopes": R.random((2, 4)), "sinks": R.normal(size=4)},
}


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (5, 5)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_loop(name, lengths):
    Lq, Lk = lengths
    options = dict(OPTIONS[name])
    for whole in ("bias", "mask"):
        if whole in options:
            options[whole] = np.resize(options[whole], (2, 4, Lq, Lk))
    q, k, v = arrays(Lq=Lq, Lk=Lk)
    out, lse = attention(q, k, v, **options, return_lse=True)
    with np.errstate(invalid="ignore"):
        expected, expected_lse = by_loop(q, k, v, **options)
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_uniform_weights_average_the_values():
    out, lse = attention(np.zeros((2, 3)), np.ones((4, 3)), np.arange(4.0)[:, None], return_lse=True)
    assert out.tolist() == [[1.5], [1.5]]
    np.testing.assert_allclose(lse, math.log(4))


def test_two_keys_by_hand():
    """Scores 0 and log 3: weights 1/4 and 3/4."""
    q, k, v = np.array([[2.0]]), np.array([[0.0], [math.log(3) / 2]]), np.array([[8.0, 0.0], [0.0, 4.0]])
    out, lse = attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(out, [[2.0, 3.0]], rtol=1e-15)
    np.testing.assert_allclose(lse, [math.log(4)], rtol=1e-15)
    np.testing.assert_allclose(attention(q, k, v, sinks=[math.log(4)]), [[1.0, 1.5]], rtol=1e-15)
    np.testing.assert_allclose(attention(q, k, v, bias=[[math.log(3), 0.0]]), [[4.0, 2.0]], rtol=1e-15)
    np.testing.assert_allclose(attention(q, k, v, scale=2), [[0.8, 3.6]], rtol=1e-15)
    assert attention(q, k, v, mask=[[True, False]]).tolist() == [[8.0, 0.0]]


def test_order_softcap_before_bias():
    """Capped to 1 first, then raised by 5: the other order would leave both scores near 1."""
    q, k, v = np.array([[1.0]]), np.array([[100.0], [100.0]]), np.array([[0.0], [1.0]])
    out = attention(q, k, v, softcap=1.0, bias=[[0.0, 5.0]])
    np.testing.assert_allclose(out, [[1 / (1 + math.exp(-5))]], rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"causal": True}, ["11100", "11110", "11111"]),
        ({"causal": True, "causal_align": "top-left"}, ["10000", "11000", "11100"]),
        ({"window": (1, 0)}, ["01100", "00110", "00011"]),
        ({"window": (0, 1), "causal_align": "top-left"}, ["11000", "01100", "00110"]),
        ({"window": (0, 1), "causal": True}, ["00100", "00010", "00001"]),
        ({"window": (-1, 1)}, ["11110", "11111", "11111"]),
        ({"window": (2, -1)}, ["11111", "01111", "00111"]),
    ],
    ids=str,
)
def test_visible_keys(options, seen):
    """With zero queries and unit vectors as values the output shows the visible keys."""
    out = attention(np.zeros((3, 2)), np.zeros((5, 2)), np.eye(5), **options)
    expected = np.array([[float(c) for c in row] for row in seen])
    np.testing.assert_allclose(out, expected / expected.sum(axis=1, keepdims=True), rtol=1e-15)


def test_more_queries_than_keys_leaves_leading_rows_empty():
    out, lse = attention(np.zeros((4, 2)), np.zeros((2, 2)), np.eye(2), causal=True, return_lse=True)
    assert out.tolist() == [[0, 0], [0, 0], [1, 0], [0.5, 0.5]]
    assert lse[:2].tolist() == [-np.inf, -np.inf]


@pytest.mark.parametrize("options", [{"mask": np.zeros((1, 1), bool)}, {"bias": np.full((1, 1), -np.inf)}, {}], ids=str)
def test_rows_that_see_nothing(options):
    """Masked keys that hold NaN, or no keys at all."""
    n = 3 if options else 0
    q, k, v = np.ones((2, 4)), np.full((n, 4), np.nan), np.full((n, 5), np.nan)
    out, lse = attention(q, k, v, **options, return_lse=True)
    assert out.shape == (2, 5) and not out.any() and lse.tolist() == [-np.inf] * 2
    out, lse = attention(q, k, v, **options, sinks=[0.25], return_lse=True)
    assert not out.any() and lse.tolist() == [0.25] * 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_numbers_reach_only_the_rows_that_see_them(bad):
    q, k, v = arrays()
    mask = np.ones((5, 7), bool)
    mask[[0, 2], 3] = False
    see = [1, 3, 4]
    k_bad, v_bad = k.copy(), v.copy()
    k_bad[:, :, 3], v_bad[:, :, 3, 1] = np.nan, bad
    expected = attention(q, k, v, mask=mask)
    expected[:, :, see, 1] = bad
    np.testing.assert_allclose(attention(q, k, v_bad, mask=mask), expected, rtol=1e-14)
    expected[:, :, see] = np.nan
    np.testing.assert_allclose(attention(q, k_bad, v, mask=mask), expected, rtol=1e-14)


def test_lowest_finite_bias_is_not_a_mask():
    out = attention(np.zeros((1, 2)), np.zeros((4, 2)), np.arange(4.0)[:, None], bias=np.finfo(np.float32).min)
    assert out.tolist() == [[1.5]]


def test_infinite_score_gives_nan():
    out, lse = attention(np.ones((1, 1)), np.array([[np.inf], [0.0]]), np.ones((2, 1)), return_lse=True)
    assert np.isnan(out).all() and lse[0] == np.inf


def test_scores_of_minus_infinity_weigh_nothing():
    """Visible all the same: what else such a key holds is multiplied by 0, and 0 * NaN is NaN."""
    q, k, v = np.ones((1, 1)), np.array([[-np.inf], [0.0]]), np.array([[5.0, np.nan], [1.0, 2.0]])
    out, lse = attention(q, k, v, return_lse=True)
    assert out[0, 0] == 1 and np.isnan(out[0, 1]) and lse[0] == 0
    out, lse = attention(q, k[:1], v[:1, :1], return_lse=True)
    assert out[0, 0] == 0 and lse[0] == -np.inf


def test_shapes_agree():
    """A batch of one, heads without a batch and a single head give the same numbers."""
    q, k, v = arrays(B=1, H=1, Hk=1)
    whole = attention(q, k, v, return_lse=True)
    for axes in (0, (0, 1)):
        out, lse = attention(q.squeeze(axes), k.squeeze(axes), v.squeeze(axes), return_lse=True)
        assert np.array_equal(out, whole[0].squeeze(axes)) and np.array_equal(lse, whole[1].squeeze(axes))


def test_query_heads_share_kv_heads_in_runs():
    q, k, v = arrays(H=6, Hk=2)
    repeated = attention(q, np.repeat(k, 3, axis=1), np.repeat(v, 3, axis=1))
    assert np.array_equal(attention(q, k, v), repeated)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_any_float_dtype(dtype):
    q, k, v = (x.astype(dtype) for x in arrays())
    out = attention(q, k, v)
    assert out.dtype == np.float64
    assert np.array_equal(out, attention(*(x.astype(np.float64) for x in (q, k, v))))


def test_inputs_are_not_written():
    q, k, v = arrays()
    bias, mask = np.full((5, 7), -np.inf), np.zeros((5, 7), bool)
    for x in (q, k, v, bias, mask):
        x.flags.writeable = False
    attention(q, k, v, bias=bias, mask=mask, causal=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": np.zeros((5, 7))}, TypeError, "mask: .*bias="),
        ({"bias": np.zeros((5, 7), bool)}, TypeError, "bias: .*bool"),
        ({"bias": np.zeros((5, 6))}, ValueError, r"bias: .*\(2, 4, 5, 7\)"),
        ({"q": np.zeros((2, 4, 5, 3), int)}, TypeError, "q: .*int"),
        ({"k": np.zeros((2, 3, 7, 3)), "v": np.zeros((2, 3, 7, 3))}, ValueError, "k: .*divides"),
        ({"k": np.zeros((2, 2, 7, 4))}, ValueError, "k: "),
        ({"v": np.zeros((2, 2, 6, 4))}, ValueError, "v: "),
        ({"v": np.zeros((2, 7, 4))}, ValueError, "rank"),
        ({"window": (-2, 0)}, ValueError, "window: "),
        ({"window": 3}, ValueError, "window: "),
        ({"softcap": -1.0}, ValueError, "softcap: "),
        ({"softcap": math.nan}, ValueError, "softcap: "),
        ({"alibi_slopes": np.zeros(2)}, ValueError, "alibi_slopes: "),
        ({"sinks": np.zeros((2, 4))}, ValueError, "sinks: "),
        ({"causal_align": "centre"}, ValueError, "causal_align: "),
    ],
    ids=str,
)
def test_errors(change, error, message):
    call = dict(zip("qkv", arrays(), strict=True)) | change
    with pytest.raises(error, match=message):
        attention(**call)


def test_no_heads_at_all():
    out, lse = attention(*(np.zeros((2, 0, 4, 8)),) * 3, return_lse=True)
    assert out.shape == (2, 0, 4, 8) and lse.shape == (2, 0, 4)
