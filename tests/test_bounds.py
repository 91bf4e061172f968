"""The comparer catches what it must: it is the judge of every kernel test."""
import bounds
import cases
import numpy as np
import pytest

from cyflash import reference

B, H, Lq, Lk, D = 2, 2, 40, 50, 32


@pytest.fixture(scope="module")
def case():
    """Options that leave some rows without a key, and one NaN and one infinity."""
    q, k, v = cases.arrays(B, H, H, Lq, Lk, D)
    q[0, 0, 39, 0] = np.nan
    v[0, 1, 5, 3] = np.inf
    mask = cases.options("mask", B, H, Lq, Lk)["mask"]
    mask[1, 1, 7] = False
    return bounds.Case(q, k, v, mask=mask, causal=True)


@pytest.fixture
def good(case):
    """A sound float32 computation of the case: out, lse."""
    out = bounds.plain_float32(case.q, case.k, case.v, **case.options)
    invisible = case.expected_lse == -np.inf
    out[invisible] = 0
    out[0, 1] = case.expected[0, 1]  # plain NumPy lets the infinity leak through 0 * inf
    return out, case.expected_lse.astype(np.float32)


def test_accepts_float32_arithmetic(case, good):
    report = case.check(*good)
    assert 0 < report.worst < 1 and len(report.where) == 4
    assert report.lse_worst < 1
    assert 0 < report.rms_ratio <= 1.01


def test_accepts_the_rounded_reference(case):
    report = case.check(case.expected.astype(np.float32), case.expected_lse.astype(np.float32))
    assert report.rms_ratio < 1


@pytest.mark.parametrize("name", [*cases.NAMES, "all"])
@pytest.mark.parametrize("D", [1, 7, 64, 300])
def test_bound_holds_for_plain_float32(name, D):
    """And is not so loose that it could never fail: an output wrong by a hundredth lies outside."""
    q, k, v = cases.arrays(1, 2, 1, Lq, Lk, D)
    options = cases.all_options(1, 2, Lq, Lk) if name == "all" else cases.options(name, 1, 2, Lq, Lk)
    case = bounds.Case(q, k, v, **options)
    out = bounds.plain_float32(q, k, v, **options)
    assert case.check(out).worst > 1e-4
    with pytest.raises(AssertionError, match="outside the bound"):
        case.check(out * np.float32(1.01))


def spoil(out, lse, what):
    if what == "missing NaN":
        out[0, 0, 39] = 0
    elif what == "one NaN more":
        out[1, 0, 2, 5] = np.nan
    elif what == "NaN for a hidden row":
        out[1, 1, 7] = np.nan
    elif what == "missing infinity":
        out[np.isinf(out)] = 0
    elif what == "infinity of the other sign":
        out[np.isinf(out)] *= -1
    elif what == "finite to infinity":
        out[1, 0, 0, 0] = np.inf
    elif what == "one element":
        out[1, 1, 30, 31] += 1e-4
    elif what == "a hidden row not zero":
        out[1, 1, 7, 0] = 1e-30
    elif what == "heads swapped":
        out[1] = out[1, ::-1].copy()
    elif what == "rows shifted":
        out[1, 0] = np.roll(out[1, 0], 1, axis=0)
    elif what == "last column stale":
        out[1, 0, :, -1] = 0
    elif what == "lse in base 2":
        lse[1, 0] *= np.float32(np.log2(np.e))
    elif what == "lse of a hidden row":
        lse[1, 1, 7] = 0
    elif what == "one lse":
        lse[1, 0, 20] += 1e-3


@pytest.mark.parametrize("what", [
    "missing NaN", "one NaN more", "NaN for a hidden row", "missing infinity", "infinity of the other sign",
    "finite to infinity", "one element", "a hidden row not zero", "heads swapped", "rows shifted", "last column stale",
    "lse in base 2", "lse of a hidden row", "one lse",
])
def test_catches(case, good, what):
    out, lse = good
    spoil(out, lse, what)
    with pytest.raises(AssertionError):
        case.check(out, lse)


def test_catches_shape_and_dtype(case, good):
    out, _ = good
    with pytest.raises(AssertionError, match="shape"):
        case.check(out[:1])
    with pytest.raises(AssertionError, match="dtype"):
        case.check(out.astype(np.float64))


def test_message_says_where_and_how_far(case, good):
    out, _ = good
    out[1, 0, 4, 9] += 1
    with pytest.raises(AssertionError, match=r"1 of \d+ outside the bound, worst .* at \(1, 0, 4, 9\)"):
        case.check(out)


def test_catches_a_general_loss_of_precision():
    """Everything inside the bound, yet twice as noisy as float32: the RMS rule's business."""
    q, k, v = cases.arrays(1, 2, 2, 64, 64, 64)
    case = bounds.Case(q, k, v)
    noise = case.plain_error * 2
    out = (case.expected + noise).astype(np.float32)
    bounds.compare("out", out, case.expected, case.bounds[0])
    with pytest.raises(AssertionError, match="RMS error"):
        case.check(out)


def test_refuses_to_judge_by_an_infinite_bound():
    q, k, v = (np.full((1, 8), 1e17, np.float32) for _ in "qkv")
    case = bounds.Case(q, np.concatenate([k, -k, 2 * k]), np.concatenate([v, v, v]))
    with pytest.raises(AssertionError, match="cannot judge"):
        case.check(case.expected.astype(np.float32))


@pytest.mark.parametrize("name", [*cases.NAMES, "all"])
def test_every_option_of_the_tests_is_visible(name):
    """A kernel that ignores an option is outside the bound by a factor of a thousand, in out and in lse."""
    q, k, v = cases.arrays(B, H, H, Lq, Lk, D)
    options = cases.all_options(B, H, Lq, Lk) if name == "all" else cases.options(name, B, H, Lq, Lk)
    case = bounds.Case(q, k, v, **options)
    for ignored in options:
        rest = {key: value for key, value in options.items() if key != ignored}
        other, other_lse = reference.attention(q, k, v, **rest, return_lse=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            assert np.nanmax(np.abs(other - case.expected) / case.bounds[0]) > 1000, ignored
            assert np.nanmax(np.abs(other_lse - case.expected_lse) / case.bounds[1]) > 1000, ignored
        with pytest.raises(AssertionError):
            case.check(other.astype(np.float32))
