"""The comparer of 16-bit results catches what it must."""
import bounds
import bounds_half
import cases
import numpy as np
import pytest
from halves import KINDS, as_kind, dtype_of, exact

B, H, Lq, Lk, D = 1, 2, 40, 130, 32


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def sound(case):
    """What a correct kernel gives: float32 arithmetic, rounded to q's dtype."""
    weights = bounds_half.round_to_bfloat16 if case.native else None
    plain = bounds.plain_float32(case.case.q, case.case.k, case.case.v, **case.case.options, weights=weights)
    plain[case.expected_lse == -np.inf] = 0
    with np.errstate(over="ignore", invalid="ignore"):
        return plain.astype(case.dtype), case.expected_lse.astype(np.float32)


@pytest.mark.parametrize("name", [*cases.NAMES, "all"])
def test_bound_holds_and_could_fail(kind, name):
    """Of float32 arithmetic that is rounded at its end; two units of the last place more lie outside."""
    qkv = as_kind(kind, *cases.arrays(B, H, 1, Lq, Lk, D))
    options = cases.all_options(B, H, Lq, Lk) if name == "all" else cases.options(name, B, H, Lq, Lk)
    case = bounds_half.Case(*qkv, **options)
    out, lse = sound(case)
    assert 0.3 < case.check(out, lse).worst <= 1
    up = np.ldexp(4.0, np.frexp(out.astype(np.float64))[1] - 1 - bounds_half.BITS[case.dtype.name])
    with pytest.raises(AssertionError, match="outside the bound"):
        case.check((out.astype(np.float64) + up).astype(case.dtype))


def test_bound_of_products_in_bfloat16():
    """Weights rounded to bfloat16 fit the bound of those, and not the other."""
    qkv = as_kind("bf16", *cases.arrays(B, H, 1, Lq, Lk, D))
    case = bounds_half.Case(*qkv, native=True)
    out, lse = sound(case)
    assert 0.3 < case.check(out, lse).worst <= 1
    with pytest.raises(AssertionError):
        bounds_half.Case(*qkv).check(out, lse)
    with pytest.raises(AssertionError):
        case.check((out.astype(np.float64) * 1.02).astype(case.dtype))


def test_truncation_is_noticed(kind):
    """Rounding towards zero errs by up to a unit of the last place."""
    case = bounds_half.Case(*as_kind(kind, *cases.arrays(B, H, 1, Lq, Lk, D)))
    out, _ = sound(case)
    wide = np.abs(out.astype(np.float64)) > np.abs(case.expected)
    towards_zero = (out.view(np.uint16) - wide.astype(np.uint16)).view(case.dtype)
    with pytest.raises(AssertionError, match="outside the bound"):
        case.check(towards_zero)


def test_another_dtype_is_refused(kind):
    case = bounds_half.Case(*as_kind(kind, *cases.arrays(B, H, 1, Lq, Lk, D)))
    with pytest.raises(AssertionError, match="dtype"):
        case.check(case.expected.astype(np.float32))


def test_a_float32_query_among_halves_is_judged_as_float32():
    q, k, v = cases.arrays(B, H, 1, Lq, Lk, D)
    case = bounds_half.Case(q, *as_kind("fp16", k, v))
    out, lse = sound(case)
    case.check(out, lse)
    with pytest.raises(AssertionError, match="outside"):
        case.check(out.astype(np.float16).astype(np.float32), lse)


@pytest.mark.parametrize(("value", "right", "wrong"), [
    (65519.0, 65504.0, np.inf), (65521.0, np.inf, 65504.0), (-1e6, -np.inf, np.inf), (-1e6, -np.inf, -65504.0),
    (6e4, 6e4, np.inf), (2.9e-8, 0.0, 2**-24), (3.1e-8, 2**-24, 0.0), (np.nan, np.nan, np.inf),
    (np.inf, np.inf, 65504.0),
])
def test_edges_of_float16(value, right, wrong):
    q, k = as_kind("fp16", *cases.arrays(1, 1, Lq=1, Lk=1, D=4)[:2])
    case = bounds_half.Case(q, k, np.full((1, 1, 1, 1), value, np.float32))
    case.check(np.full((1, 1, 1, 1), right, np.float16))
    with pytest.raises(AssertionError):
        case.check(np.full((1, 1, 1, 1), wrong, np.float16))


def test_half_units_are_those_of_the_dtypes(kind):
    dtype = dtype_of(kind)
    x = np.arange(0x7F80 if kind == "bf16" else 0x7C00, dtype=np.uint16).view(dtype).astype(np.float64)
    np.testing.assert_array_equal(bounds_half.half_unit(x[:-1], dtype), np.diff(x) / 2)
    limit = np.float32(bounds_half.infinite_from(dtype))
    assert limit == x[-1] + (x[-1] - x[-2]) / 2
    with np.errstate(over="ignore"):
        assert np.isinf(limit.astype(dtype)) and np.isfinite(np.nextafter(limit, np.float32(0)).astype(dtype))


def test_weights_are_rounded_as_bfloat16_is():
    x = np.random.default_rng(0).random(1000, np.float32)
    np.testing.assert_array_equal(bounds_half.round_to_bfloat16(x), exact(*as_kind("bf16", x))[0])
