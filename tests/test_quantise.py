"""The passes that quantise, on every SIMD build, bit for bit against plain NumPy float32."""
from itertools import pairwise

import cases
import numpy as np
import pytest

from cyflash import cpu
from cyflash.quantized import Encoding

F32 = np.float32
MAX, TINY = np.finfo(F32).max, np.finfo(F32).tiny
RUN = 256  # rows that are summed one after another
UNIT = F32(1 / (2 * RUN))


def random(*shape, seed=0):
    r = np.random.default_rng([seed, *shape])
    return (r.standard_normal(shape) * 3 + r.standard_normal(shape[-1]) * 5).astype(F32)
# Layouts that the passes read; callers copy the others.
COPIED = ("columns first", "fortran", "reversed columns", "every other column", "off by 1 byte")
IN_PLACE = [name for name in cases.LAYOUTS if name not in COPIED]


# The same in NumPy


def expected_mean(x, skip):
    """(B, H, D): sums of runs in float32, in units that cannot overflow, merged in float64; then into the range."""
    L = x.shape[2]
    starts = [*range(0, skip, RUN), *range(skip, L, RUN), L]
    total = np.zeros(x[:, :, 0].shape)
    for start, stop in pairwise(starts):
        total += np.cumsum(x[:, :, start:stop] * UNIT, axis=2, dtype=F32)[:, :, -1]
    return np.clip(total / (float(UNIT) * L), x.min(2), x.max(2)).astype(F32)


@np.errstate(over="ignore")
def largest(x, mean, axis):
    return np.abs(x - mean[:, :, None]).max(axis, initial=0)


@np.errstate(over="ignore")
def expected_codes(x, mean, scale, skip):
    codes = np.clip(np.rint((x - mean[:, :, None]) * (F32(1) / scale[..., None])), -127, 127).astype(np.int8)
    codes[:, :, :skip] = 0
    return codes


def expected_scale(x, mean, skip):
    """(B, H, L): each token's own."""
    scale = np.maximum(np.minimum(largest(x, mean, 3), MAX) / F32(127), TINY)
    scale[:, :, :skip] = TINY
    return scale


# What is tested


def find_range(x, skip=0, mean=None, smooth=False, threads=1):
    """(mean or None, greatest |x - mean| of each head); None where a value is not finite."""
    B, H, _, D = x.shape
    if smooth:
        mean = np.full((B, H, D), np.nan, F32)
    top = np.full((B, H), np.nan, F32)
    return (mean, top) if cpu.active().find_range(x, skip, smooth, mean, top, threads) else None


def encode(x, scale=None, mean=None, skip=0, threads=1):
    """(codes, scales); None where a value is not finite."""
    codes = np.full(x.shape, 99, np.int8)
    found = np.full(x.shape[:3], np.nan, F32) if scale is None else None
    (count,) = cpu.active().encode([Encoding(x, codes, mean, scale, found, skip)], threads)
    return (codes, scale if found is None else found) if count >= 0 else None


def verify(x, skip=0, static=0.03):
    """Both passes, every way to call them."""
    assert np.isfinite(x).all()
    zero = np.zeros_like(x[:, :, 0])
    own, top = find_range(x, skip, smooth=True)
    np.testing.assert_array_equal(own, expected_mean(x, skip))
    np.testing.assert_array_equal(top, largest(x[:, :, skip:], own, (2, 3)))
    for mean in (None, own, own[::-1] + F32(1)):
        centre = zero if mean is None else mean
        same, top = find_range(x, skip, mean=mean)
        assert same is mean
        np.testing.assert_array_equal(top, largest(x[:, :, skip:], centre, (2, 3)))
        codes, scale = encode(x, mean=mean, skip=skip)
        np.testing.assert_array_equal(scale, expected_scale(x, centre, skip))
        np.testing.assert_array_equal(codes, expected_codes(x, centre, scale, skip))
        given = np.broadcast_to(F32(static), x.shape[:3])
        np.testing.assert_array_equal(encode(x, given, mean, skip)[0], expected_codes(x, centre, given, skip))


@pytest.mark.parametrize("D", range(1, 71))
def test_every_tail(build, D):
    """The lengths move with D, so that all up to 40 occur with all remainders of D."""
    for L in {1 + (7 * D + 13 * n) % 40 for n in range(4)}:
        verify(random(2, 1, L, D), skip=L % 3)


@pytest.mark.parametrize("D", [1, 8, 15, 16, 17, 33, 64])
def test_every_length(build, D):
    for L in range(1, 41):
        verify(random(1, 1, L, D))


@pytest.mark.slow
@pytest.mark.parametrize("D", range(1, 71))
def test_every_length_of_every_width(build, D):
    for L in range(1, 41):
        verify(random(2, 1, L, D), skip=(D + L) % 4 if L > 3 else 0)


@pytest.mark.parametrize("L", [255, 256, 257, 513, 700])
def test_long_sequences_and_skipped_rows(build, L):
    for skip in (0, 1, 4, 100, 255, 256, 257, 300, L):
        verify(random(1, 2, L, 21), skip=min(skip, L))


@pytest.mark.parametrize("D", [128, 129, 160, 256])
def test_wide_rows(build, D):
    verify(random(1, 2, 37, D), skip=2)


def test_all_magnitudes(build):
    """From the least denormal to the largest float, zeros of both signs, ranges beyond float32."""
    r = np.random.default_rng(0)
    sizes = np.ldexp(1 + r.random((1, 4, 64, 40)), r.integers(-149, 127, (1, 4, 64, 1))).astype(F32)
    x = np.where(r.random(sizes.shape) < 0.5, sizes, -sizes)
    x[0, 1, ::3] = 0.0
    x[0, 1, ::5] = -0.0
    x[0, 2, :, ::2] = MAX
    x[0, 2, :, 1::2] = -MAX
    x[0, 3, ::2] = MAX
    x[0, 3, 1::2] = -MAX
    verify(x)
    verify(x, static=TINY)
    verify(x, static=MAX)
    verify(x * F32(1e-40), skip=1)


def test_sums_of_the_largest_floats_stay_finite(build):
    for value in (MAX, -MAX):
        x = np.full((1, 1, 3 * RUN + 5, 5), value)
        mean, top = find_range(x, smooth=True)
        assert (mean == value).all() and (top == 0).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1 / 3, 1e-45, 1e-39, 3e38])
@pytest.mark.parametrize("L", [1, 3, 100, 1000])
def test_the_mean_of_equal_values_is_that_value(build, value, L):
    mean, top = find_range(np.full((1, 1, L, 3), value, F32), smooth=True)
    assert (mean == F32(value)).all() and (top == 0).all()


def test_halves_round_to_even_and_beyond_127_saturates(build):
    x = np.arange(-400, 401, dtype=F32)[None, None, None] / 2
    one = np.ones((1, 1, 1), F32)
    codes = encode(x, one)[0]
    assert [int(c) for c in codes[0, 0, 0, 395:406]] == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2]
    np.testing.assert_array_equal(codes, expected_codes(x, np.zeros((1, 1, 801), F32), one, 0))
    far = np.array([[[[1e30, -1e30, 3e9, -3e9, 128.4, -128.6, 127.5, -127.5]]]], F32)
    for scale in (one, one * TINY):
        assert encode(far, scale)[0].tolist() == [[[[127, -127] * 4]]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("D", [1, 4, 15, 16, 33, 67])
def test_one_value_that_is_not_finite_is_noticed(build, value, D):
    """Wherever it stands: in a tail, in a skipped row, in any lane; with either kind of scale."""
    clean = random(1, 1, 19, D)
    given = np.ones((1, 1, 19), F32)
    for n in range(0, clean.size, 1 + clean.size // 60):
        x = clean.copy()
        x.flat[n] = value
        for skip in (0, 3, 19):
            assert find_range(x, skip) is find_range(x, skip, smooth=True) is None
            assert encode(x, skip=skip) is encode(x, given, skip=skip) is None


def test_differences_beyond_float32_are_finite_values(build):
    """x - mean may overflow where x does not: that is no error."""
    x = np.array([[[[MAX, -MAX, 1.0]]]], F32)
    mean = np.array([[[-MAX, MAX, 0.0]]], F32)
    assert find_range(x, mean=mean)[1] == np.inf
    codes, scale = encode(x, mean=mean)
    assert codes.tolist() == [[[[127, -127, 0]]]] and scale == MAX / F32(127)


def everything(x, **options):
    mean, top = find_range(x, smooth=True, **options)
    return mean, top, *encode(x, mean=mean, **options), encode(x, np.full(x.shape[:3], 0.05, F32), **options)[0]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("L", [3, 700])
def test_bits_do_not_depend_on_threads(build, L, skip):
    x = random(2, 3, L, 24)
    expected = everything(x, skip=skip)
    for threads in (2, 3, 8, 100):
        assert_same(everything(x, skip=skip, threads=threads), expected)


def test_bits_do_not_depend_on_the_batch(build):
    x = random(3, 4, 300, 24)
    whole = everything(x)
    for b in range(3):
        for h in range(4):
            assert_same(everything(x[b : b + 1, h : h + 1]), [y[b : b + 1, h : h + 1] for y in whole])


@pytest.mark.parametrize("layout", IN_PLACE)
def test_bits_do_not_depend_on_strides(build, layout):
    x = random(2, 3, 300, 24)
    y = cases.LAYOUTS[layout](x)
    assert_same(everything(y), everything(x))


def test_scales_and_means_may_be_broadcast_and_outputs_strided(build):
    x = random(2, 3, 20, 24)
    scale = np.broadcast_to(np.array([0.1, 0.02, 0.5], F32)[:, None], (2, 3, 20))
    mean = np.broadcast_to(random(24), (2, 3, 24))
    codes = np.full((2, 20, 3, 30), 99, np.int8)
    view = codes.transpose(0, 2, 1, 3)[..., :24]
    assert cpu.active().encode([Encoding(x, view, mean, scale)], 1) == [0]
    np.testing.assert_array_equal(view, expected_codes(x, mean, scale, 0))
    assert (codes[..., 24:] == 99).all()
    found = np.full((20, 2, 3), np.nan, F32)
    assert cpu.active().encode([Encoding(x, view, mean, None, found.transpose(1, 2, 0))], 2) == [0]
    np.testing.assert_array_equal(found.transpose(1, 2, 0), expected_scale(x, mean, 0))


@pytest.mark.parametrize("L, D", [(1, 1), (3, 5), (16, 16), (37, 64), (66, 67), (260, 20), (515, 130)])
def test_what_is_packed_while_it_is_encoded_is_what_the_packers_make_of_codes(build, L, D):
    x, module = random(2, 3, L, D), cpu.active()
    rows = encode(x)[0]
    padded, where = -(-L // 16) * 16, (np.arange(2)[:, None], np.zeros(2, np.intp), np.full(2, L))
    keys = [np.full((2, 3, padded, -(-D // 4) * 4), 99, np.int8) for _ in range(2)]
    corrections = [np.full((2, 3, padded), 99, np.int32) for _ in range(2)]
    values = [np.full((2, 3, padded // 4, -(-D // 16) * 16), 99, np.int32) for _ in range(2)]
    module.pack_keys(rows, keys[0], corrections[0], *where, 2)
    module.pack_values(rows, values[0], *where, 2)
    found = [np.empty(x.shape[:3], F32) for _ in range(2)]
    how = [
        Encoding(x, keys[1], None, None, found[0], packing="keys", correction=corrections[1]),
        Encoding(x, values[1], None, None, found[1], packing="values"),
    ]
    assert module.encode(how, 3) == [0, 0]
    for pair in (keys, corrections, values, found):
        np.testing.assert_array_equal(*pair)
    np.testing.assert_array_equal(corrections[0][:, :, :L], -128 * rows.sum(3, dtype=np.int32))


def test_arrays_that_are_encoded_together_keep_their_own_counts(build):
    shapes = ((1, 2, 300, 8), (2, 1, 5, 70), (1, 1, 600, 3))
    arrays = [random(*shape) for shape in shapes]
    arrays[1][1, 0, 4, 69] = np.inf
    scales = [np.full(shape[:3], 0.005, F32) for shape in shapes]
    how = [
        Encoding(x, np.empty(x.shape, np.int8), None, scale, counted=n != 2)
        for n, (x, scale) in enumerate(zip(arrays, scales, strict=True))
    ]
    saturated = int((np.abs(np.rint(arrays[0] * (F32(1) / F32(0.005)))) > 127).sum())
    assert saturated > 0
    assert cpu.active().encode(how, 3) == [saturated, -1, 0]
    for n in (0, 2):
        mean = np.zeros_like(arrays[n][:, :, 0])
        np.testing.assert_array_equal(how[n].codes, expected_codes(arrays[n], mean, scales[n], 0))
