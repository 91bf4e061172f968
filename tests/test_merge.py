"""merge_states: parts put together are the whole, in any order; -inf, +inf and NaN; bad input."""
import warnings

import bounds
import cases
import numpy as np
import pytest

from cyflash import flash_attention, merge_states, reference

LN2 = np.float32(np.log(2))
F32 = np.float32


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def split(q, k, v, begins, base="e", **options):
    """Correctly rounded (out, lse) of each part of the keys; bias and mask are cut, the first part has the sinks."""
    parts = []
    for n, (begin, end) in enumerate(zip(begins, [*begins[1:], k.shape[-2]], strict=True)):
        own = {name: cut(x, begin, end) if name in ("bias", "mask") else x for name, x in options.items()}
        if n:
            own.pop("sinks", None)
        out, lse = reference.attention(q, k[..., begin:end, :], v[..., begin:end, :], **own, return_lse=True)
        parts.append((out.astype(F32), (lse if base == "e" else lse / np.log(2)).astype(F32)))
    return parts


def cut(x, begin, end):
    return x if x.shape[-1] == 1 else x[..., begin:end]


def merged(parts, **options):
    """From the left."""
    state = parts[0]
    for part in parts[1:]:
        state = merge_states(*state, *part, **options)
    return state


def tolerance(parts):
    """Of (out, lse) merged from correctly rounded parts: each merge rounds weights a few times and the LSE once."""
    lse = np.array([lse for _, lse in parts])
    top = np.abs(np.where(np.isfinite(lse), lse, 0)).max(axis=0)
    each = 4 * len(parts) * bounds.EPS * (2 + top)
    out = np.max([np.abs(out) for out, _ in parts], axis=0)
    return each[..., None] * out + bounds.TINY, each


def assert_near(actual, expected, allowed):
    for name, a, b, bound in zip(("out", "lse"), actual, expected, allowed, strict=True):
        bounds.compare(name, a, b, bound)


OPTIONS = ("scale", "softcap", "bias", "bias -inf", "mask", "mask rows", "sinks")
SPLITS = {
    "halves": [0, 25], "first key": [0, 1], "last key": [0, 49], "many": list(range(0, 50, 3)), "one by one": range(50),
    "an empty part": [0, 20, 20, 30], "empty ends": [0, 0, 50], "all in one": [0],
}


@pytest.mark.parametrize("base", ["e", 2])
@pytest.mark.parametrize("begins", SPLITS.values(), ids=SPLITS)
def test_parts_make_the_whole(begins, base):
    q, k, v = cases.arrays(2, 4, 2, 7, 50, 16, 12)
    out, lse = reference.attention(q, k, v, return_lse=True)
    parts = split(q, k, v, list(begins), base)
    state = merged(parts, lse_base=base)
    assert_near(state, (out, lse if base == "e" else lse / np.log(2)), tolerance(parts))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    q, k, v = cases.arrays(2, 4, 2, 40, 50, 16)
    options = cases.options(name, 2, 4, 40, 50)
    parts = split(q, k, v, [0, 11, 13, 41], **options)
    assert_near(merged(parts), reference.attention(q, k, v, **options, return_lse=True), tolerance(parts))


def test_sinks_in_exactly_one_part():
    """Which part has them makes no difference; in two they count twice."""
    q, k, v = cases.arrays(1, 4, 4, 9, 50, 16)
    sinks = cases.options("sinks", 1, 4, 9, 50)
    whole = reference.attention(q, k, v, **sinks, return_lse=True)
    without, with_sinks = split(q, k, v, [0, 30]), []
    for begin, end in ((0, 30), (30, 50)):
        out, lse = reference.attention(q, k[..., begin:end, :], v[..., begin:end, :], **sinks, return_lse=True)
        with_sinks.append((out.astype(F32), lse.astype(F32)))
    for parts in ((with_sinks[0], without[1]), (without[0], with_sinks[1])):
        assert_near(merged(parts), whole, tolerance(parts))
    twice = merged(with_sinks)
    assert (np.abs(twice[1] - whole[1]) > 1000 * tolerance(with_sinks)[1]).all()


def test_sink_alone():
    """A part that saw no key but carries the sink: output 0, and the sink weighs in the denominator."""
    q, k, v = cases.arrays(1, 4, 4, 9, 50, 16)
    sinks = np.array([-1, 0, 2, 5], F32)
    out, lse = flash_attention(q, k[:, :, :0], v[:, :, :0], sinks=sinks, return_lse=True)
    parts = [(out, lse), *split(q, k, v, [0])]
    assert_near(merged(parts), reference.attention(q, k, v, sinks=sinks, return_lse=True), tolerance(parts))


def test_our_own_parts():
    """What flash_attention returns for parts, ragged causal ones too, merges to one call within the call's bound."""
    q, k, v = cases.arrays(2, 4, 2, 40, 200, 32)
    case = bounds.Case(q, k, v, causal=True)
    seen = flash_attention(q, k[:, :, :160], v[:, :, :160], return_lse=True)
    rest = flash_attention(q, k[:, :, 160:], v[:, :, 160:], causal=True, return_lse=True)
    state = merge_states(*seen, *rest)
    for a, b, bound in zip(state, (case.expected, case.expected_lse), case.bounds, strict=True):
        assert (np.abs(a - b) <= 2 * bound).all()


def test_commutes():
    q, k, v = cases.arrays(2, 4, 2, 40, 50, 16)
    a, b = split(q, k, v, [0, 13], **cases.options("bias -inf", 2, 4, 40, 50))
    cases.assert_same_bits(merge_states(*a, *b), merge_states(*b, *a))


def test_associates():
    q, k, v = cases.arrays(2, 4, 2, 40, 50, 16)
    parts = split(q, k, v, [0, 1, 30], **cases.options("mask rows", 2, 4, 40, 50))
    a, b, c = parts
    left, right = merge_states(*merge_states(*a, *b), *c), merge_states(*a, *merge_states(*b, *c))
    assert_near(left, right, tolerance(parts))
    shuffled = list(np.random.default_rng(0).permutation(50))
    parts = split(q, k, v, list(range(50)))
    assert_near(merged([parts[i] for i in shuffled]), merged(parts), tolerance(parts))


def state(lse, out=1.0, shape=(3, 5, 4)):
    return np.full(shape, out, F32), np.full(shape[:-1], lse, F32)


@pytest.mark.parametrize("base", ["e", 2])
@pytest.mark.parametrize("what", [0.0, 7.0, np.nan, np.inf])
def test_nothing_seen(what, base):
    """Rows without a key weigh nothing, whatever their output holds; where there are no others, 0 and -inf."""
    rng = np.random.default_rng(0)
    empty, full = state(-np.inf, what), (rng.standard_normal((3, 5, 4), F32), rng.standard_normal((3, 5), F32))
    for parts in ((empty, full), (full, empty)):
        cases.assert_same_bits(merge_states(*parts[0], *parts[1], lse_base=base), full)
    out, lse = merge_states(*empty, *empty, lse_base=base)
    assert (out == 0).all() and (lse == -np.inf).all()


def test_rows_are_independent():
    """A row of each kind in one call: what is not finite in one reaches no other."""
    lse_a = np.array([0, -np.inf, -np.inf, np.nan, np.inf, 0, 3e38, -3e38], F32)
    lse_b = np.array([0, 1, -np.inf, 0, 0, np.nan, -3e38, 3e38], F32)
    out_a, out_b = np.full((8, 2), 2, F32), np.full((8, 2), 4, F32)
    out, lse = merge_states(out_a, lse_a, out_b, lse_b)
    expected = np.array([3, 4, 0, np.nan, 2, np.nan, 2, 4], F32)
    assert np.array_equal(out, np.repeat(expected[:, None], 2, 1), equal_nan=True)
    assert np.array_equal(lse, np.array([LN2, 1, -np.inf, np.nan, np.inf, np.nan, 3e38, 3e38], F32), equal_nan=True)


@pytest.mark.parametrize("base", ["e", 2])
def test_infinity_and_nan_go_through(base):
    for other in (-np.inf, 0.0, np.inf):
        for parts in ((state(np.inf, np.nan), state(other)), (state(other), state(np.inf, np.nan))):
            out, lse = merge_states(*parts[0], *parts[1], lse_base=base)
            assert np.isnan(out).all() and (lse == np.inf).all()
    for other in (-np.inf, 0.0, np.inf, np.nan):
        for parts in ((state(np.nan), state(other)), (state(other), state(np.nan))):
            out, lse = merge_states(*parts[0], *parts[1], lse_base=base)
            assert np.isnan(lse).all() and (np.isnan(out).all())
    out, lse = merge_states(*state(0.0, np.nan), *state(1.0), lse_base=base)
    assert np.isnan(out).all() and np.isfinite(lse).all()


def test_base_is_not_ignored():
    a, b = state(3.0, 1.0), state(5.0, 2.0)
    out, lse = merge_states(*a, *b, lse_base=2)
    assert np.allclose(out, 1.8) and np.allclose(lse, np.log2(2**3 + 2**5))
    out, lse = merge_states(*a, *b)
    weight = 1 / (1 + np.exp(-2))
    assert np.allclose(out, 1 + weight) and np.allclose(lse, np.logaddexp(3, 5))


def test_a_lost_weight_is_exact():
    """Where one part's weight is below float32, the other's output comes back to the bit."""
    a, b = (np.random.default_rng(0).standard_normal((6, 4), F32), np.full(6, 100, F32)), state(-100.0, 5.0, (6, 4))
    cases.assert_same_bits(merge_states(*a, *b), a)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit(dtype):
    """Computed in float32 and rounded once."""
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), dtype, dtype))
    q, k, v = cases.arrays(2, 4, 2, 7, 50, 16)
    (out_a, lse_a), (out_b, lse_b) = split(q, k, v, [0, 20])
    out_a, out_b = out_a.astype(dtype), out_b.astype(dtype)
    out, lse = merge_states(out_a, lse_a, out_b, lse_b)
    wide, same = merge_states(out_a.astype(F32), lse_a, out_b.astype(F32), lse_b)
    assert out.dtype == dtype and np.array_equal(out, wide.astype(dtype)) and np.array_equal(lse, same)


def test_shapes_and_strides():
    """Two axes, ragged batches, LSE of other libraries as a transposed view, nothing at all."""
    a, b = state(1.0, shape=(5, 4)), state(2.0, shape=(5, 4))
    assert merge_states(*a, *b)[0].shape == (5, 4)
    rng = np.random.default_rng(0)
    out_a, out_b = (rng.standard_normal((6, 9, 4), F32).swapaxes(0, 1) for _ in range(2))
    lse_a, lse_b = (rng.standard_normal((6, 9), F32).T for _ in range(2))
    copies = [np.ascontiguousarray(x) for x in (out_a, lse_a, out_b, lse_b)]
    cases.assert_same_bits(merge_states(out_a, lse_a, out_b, lse_b), merge_states(*copies))
    out, lse = merge_states(*state(0.0, shape=(0, 4)), *state(0.0, shape=(0, 4)))
    assert out.shape == (0, 4) and lse.shape == (0,)


def test_inputs_are_not_written():
    a, b = state(0.0), state(-np.inf)
    for x in (*a, *b):
        x.flags.writeable = False
    out, lse = merge_states(*a, *b)
    assert not any(np.shares_memory(x, y) for x in (out, lse) for y in (*a, *b))


def bad(**change):
    (out_a, lse_a), (out_b, lse_b) = state(0.0), state(0.0)
    return {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b} | change


BAD = {
    "a list": (TypeError, {"out_a": [[1.0]]}, ["out_a: expected a NumPy array", "list"]),
    "no lse": (TypeError, {"lse_b": None}, ["lse_b: ", "NoneType"]),
    "float64": (TypeError, {"out_a": np.zeros((3, 5, 4))}, ["out_a: expected float32", "got float64", "astype"]),
    "big-endian": (TypeError, {"out_b": np.zeros((3, 5, 4), ">f4")}, ["out_b: expected float32", ">f4"]),
    "lse float64": (TypeError, {"lse_a": np.zeros((3, 5))}, ["lse_a: expected float32", "got float64", "astype"]),
    "unlike dtypes": (TypeError, {"out_b": np.zeros((3, 5, 4), "f2")}, ["out_b: expected float32 as out_a", "float16"]),
    "one axis": (ValueError, {"out_a": np.zeros(4, F32)}, ["out_a: expected (..., Lq, Dv)", "(4,)"]),
    "unlike shapes": (ValueError, {"out_b": np.zeros((3, 5, 5), F32)}, ["out_b: ", "(3, 5, 4)", "(3, 5, 5)"]),
    "lse with a last axis": (ValueError, {"lse_a": np.zeros((3, 5, 1), F32)}, ["lse_a: ", "(3, 5)", "(3, 5, 1)"]),
    "lse transposed": (ValueError, {"lse_b": np.zeros((5, 3), F32)}, ["lse_b: ", "(5, 3)", "lse_b.swapaxes(-1, -2)"]),
    "base 10": (ValueError, {"lse_base": 10}, ['lse_base: expected "e" or 2, got 10']),
    "base True": (ValueError, {"lse_base": True}, ["lse_base: ", "True"]),
    "base in words": (ValueError, {"lse_base": "2"}, ["lse_base: ", "'2'"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, change, parts = BAD[name]
    with pytest.raises(error) as caught:
        merge_states(**bad(**change))
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))
