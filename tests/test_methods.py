"""The methods that choose a scale from a histogram, against the same question asked of the values themselves.

A clip is 127 * scale: the greatest value that does not saturate.
"""
import calibrating
import numpy as np
import pytest
from calibrating import HISTOGRAM_METHODS, SMALLEST_SCALE, bin_ratio, bits, calibrated, clip_of, clips

from cyflash.quant import Calibrator

rng = np.random.default_rng(5)
SAMPLES = {  # float32, shuffled
    "normal": rng.standard_normal(24_000),
    "uniform": rng.uniform(-1, 1, 24_000),
    "laplace": rng.laplace(size=24_000),
    "student": rng.standard_t(3, 24_000),
    "lognormal": rng.lognormal(0, 1, 24_000),
    "outlier": np.r_[rng.standard_normal(24_000), 300.0],
    "positive": np.abs(rng.standard_normal(12_000)) + 4,
    "few": np.array([0.1, -0.7, 2.5]),
    "half zeros": rng.permutation(np.r_[np.zeros(12_000), rng.standard_normal(12_000)]),
}
SAMPLES = {name: x.astype(np.float32) for name, x in SAMPLES.items()}


@pytest.fixture(params=SAMPLES)
def sample(request):
    return SAMPLES[request.param]


@pytest.fixture(scope="module")
def ratio():
    """The ends of a bin are this factor apart."""
    return bin_ratio(calibrated(calibrating.normal()).histogram("layer", "v"))


def test_max_is_the_greatest_absolute_value(sample):
    assert clip_of(sample, "max") == pytest.approx(float(np.abs(sample).max()), rel=2e-7)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9, 99.99, 99.9999])
def test_percentile_is_that_of_the_values_within_a_bin(sample, percentile, ratio):
    below, above = (np.percentile(np.abs(sample), percentile, method=end) for end in ("lower", "higher"))
    if above == 0:
        pytest.skip("the percentile is 0, which no scale can be")
    clip = clip_of(sample, "percentile", percentile=percentile)
    assert below / ratio <= clip <= above * ratio
    assert clip <= np.abs(sample).max() * (1 + 2e-7)


def test_percentile_100_is_max(sample):
    assert clip_of(sample, "percentile", percentile=100.0) == clip_of(sample, "max")


def test_percentile_grows_with_its_argument(sample):
    clip = [clip_of(sample, "percentile", percentile=p) for p in (10, 50, 75, 90, 99, 99.9, 99.999, 100)]
    assert clip == sorted(clip)


def squared_error(values, clip):
    """Of the values as int8 codes."""
    scale = clip / 127
    codes = np.clip(np.rint(values / scale), -127, 127)
    return np.square(values - codes * scale).mean()


def expected_squared_error(values, clip):
    """That of OCTAV: 4^-8 / 3 * clip^2 for each value within, what is cut off for the others."""
    size = np.abs(values.astype(np.float64))
    return np.where(size <= clip, 4**-8 / 3 * clip**2 * (size > 0), (size - clip) ** 2).mean()


CONTINUOUS = [name for name in SAMPLES if name not in ("few",)]


@pytest.mark.parametrize("method", ["mse", "octav"])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_mse_and_octav_reach_the_least_squared_error_of_real_codes(name, method):
    values = SAMPLES[name].astype(np.float64)
    top = np.abs(values).max()
    candidates = top * 2.0 ** -np.arange(0, 12, 1 / 16)
    best = min(squared_error(values, clip) for clip in candidates)
    assert squared_error(values, clip_of(values, method)) <= 1.04 * best


@pytest.mark.parametrize("name", ["laplace", "student", "lognormal", "outlier"])
def test_octav_stands_where_its_formula_is_least_within_two_bins(name, ratio):
    values = SAMPLES[name]
    top = float(np.abs(values).max())
    candidates = top * 2.0 ** -np.arange(0, 10, 1 / 64)
    errors = np.array([expected_squared_error(values, clip) for clip in candidates])
    clip = clip_of(values, "octav")
    assert expected_squared_error(values, clip) <= 1.01 * errors.min()
    near = candidates[errors <= 1.01 * errors.min()]  # the minimum is flat
    assert near.min() / ratio**2 <= clip <= near.max() * ratio**2


def test_entropy_cuts_a_long_tail_and_keeps_the_body():
    student = SAMPLES["student"]
    assert np.percentile(np.abs(student), 95) < clip_of(student, "entropy") < 0.8 * np.abs(student).max()
    assert 2 < clip_of(SAMPLES["normal"], "entropy") <= np.abs(SAMPLES["normal"]).max() * (1 + 1e-6)
    assert 0.8 < clip_of(SAMPLES["uniform"], "entropy") <= 1 + 1e-6


@pytest.mark.parametrize("method", HISTOGRAM_METHODS)
def test_no_clip_is_beyond_the_greatest_value(sample, method):
    assert 0 < clip_of(sample, method) <= np.abs(sample).max() * (1 + 2e-7)


@pytest.mark.parametrize("method", HISTOGRAM_METHODS)
@pytest.mark.parametrize("power", [-8, 1, 9])
def test_values_times_a_power_of_two_give_scales_times_it_exactly(sample, method, power):
    assert clip_of(sample * np.float32(2.0**power), method) == clip_of(sample, method) * 2.0**power


@pytest.mark.parametrize("method", HISTOGRAM_METHODS)
def test_signs_and_places_of_the_values_make_no_difference(sample, method):
    clip = clip_of(sample, method)
    assert clip_of(-sample, method) == clip_of(np.abs(sample), method) == clip_of(np.sort(sample), method) == clip


@pytest.mark.parametrize("method", HISTOGRAM_METHODS)
def test_q_k_and_v_are_treated_alike(method):
    r = np.random.default_rng(1)
    x = r.standard_t(3, (1, 500, 4)).astype(np.float32)
    clip = clips(calibrated((x, x, x), smooth_k=False).compute(method)["layer"])
    assert clip["q"] == clip["k"] == clip["v"] > 0


@pytest.mark.parametrize("method", HISTOGRAM_METHODS)
def test_a_constant_keeps_its_value(method, ratio):
    for value in (1.0, 127.0, 3e-7, 0.7, 1.999):
        for count in (1, 2, 5000):
            clip = clip_of(np.full(count, value), method)
            assert value / ratio**2 <= clip <= value * (1 + 2e-7), (value, count)


@pytest.mark.parametrize("method", HISTOGRAM_METHODS)
def test_two_values(method, ratio):
    clip = clip_of([1.0, -3.0], method)
    assert 1 / ratio <= clip <= 3 * (1 + 2e-7)


@pytest.mark.parametrize("method", HISTOGRAM_METHODS)
@pytest.mark.parametrize("value", [1e-45, 1e-40, 1e-38, 1e-36])
def test_tiny_values_give_the_smallest_scale_there_is(method, value):
    x = np.array([value, -value, value / 2, 0], np.float32)
    scale = clip_of(x, method) / 127
    assert scale == pytest.approx(SMALLEST_SCALE, rel=1e-6)


@pytest.mark.parametrize("method", HISTOGRAM_METHODS)
def test_huge_values(method, ratio):
    clip = clip_of(np.full(100, 1e30), method)
    assert 1e30 / ratio**2 <= clip <= 1e30 * (1 + 2e-7)
    mixed = clip_of(np.r_[np.ones(1000), 1e30], method)
    assert np.isfinite(mixed) and 0.5 < mixed <= 1e30 * (1 + 2e-7)


@pytest.mark.parametrize("method", HISTOGRAM_METHODS)
def test_the_greatest_value_of_float32(method, ratio):
    """int8 rounds the output beyond float32: that its error is not finite must not stop the calibration."""
    top = float(np.finfo(np.float32).max)
    assert top / ratio**2 <= clip_of(np.full(100, top), method) <= top * (1 + 2e-7)


@pytest.mark.parametrize("method", HISTOGRAM_METHODS)
def test_tiny_and_huge_values_together(method):
    """Values on both sides of every layout of bins: all count, none moves another."""
    x = np.r_[np.full(10, 1e-42), np.ones(1000), np.full(10, 3e37)]
    clip = clip_of(x, method)
    assert 0.5 < clip <= 3e37 * (1 + 2e-7)


@pytest.mark.parametrize("method", HISTOGRAM_METHODS)
def test_per_head_is_each_head_on_its_own(method):
    H, Hk = 4, 2
    q, k, v = calibrating.long_tailed(3, H=H, Hk=Hk, Lq=60)
    for x in (q, k, v):
        x *= 2.0 ** np.arange(len(x), dtype=np.float32)[:, None, None]
    layer = calibrated((q, k, v), granularity="head", smooth_k=False).compute(method)["layer"]
    assert layer.q_scale.shape == (H, 1, 1)
    assert layer.k_scale.shape == layer.v_scale.shape == (Hk, 1, 1)
    for h in range(H):
        alone = calibrated(tuple(x[[i]] for x, i in zip((q, k, v), (h, h // 2, h // 2), strict=True)), smooth_k=False)
        alone = alone.compute(method)["layer"]
        assert layer.q_scale[h, 0, 0] == alone.q_scale
        assert layer.k_scale[h // 2, 0, 0] == alone.k_scale
        assert layer.v_scale[h // 2, 0, 0] == alone.v_scale


def test_the_methods_differ_where_the_data_let_them():
    calibrator = calibrated(*(calibrating.long_tailed(seed, H=4, Lq=256, D=32) for seed in range(2)), smooth_k=False)
    found = [bits(calibrator.compute(method, percentile=99.9))["layer"] for method in calibrating.METHODS]
    assert len(set(found)) == len(found)


# The histogram itself


def test_a_histogram_counts_every_value_in_its_bin():
    q, k, v = calibrating.long_tailed(0, H=3, Lq=100, D=16)
    v[0, 0, :6] = [0, 1e-44, -1e-44, 3e38, -0.0, 1e-36]
    calibrator = calibrated((q, k, v), granularity="head", smooth_k=False)
    for part, x in (("q", q), ("k", k), ("v", v)):
        for head in (None, 0, 1, 2):
            histogram = calibrator.histogram("layer", part, head=head)
            size = np.abs((x if head is None else x[head]).astype(np.float64)).ravel()
            edges, counts = histogram.edges, histogram.counts
            assert edges.dtype == np.float64 and counts.dtype == np.int64
            assert len(edges) == len(counts) + 1 == len(histogram.sums) + 1
            assert (np.diff(edges) > 0).all()
            place = np.searchsorted(edges, size, side="right") - 1  # a bin holds its lower edge
            inside = (place >= 0) & (place < len(counts))
            np.testing.assert_array_equal(counts, np.bincount(place[inside], minlength=len(counts)))
            sums = np.bincount(place[inside], size[inside], minlength=len(counts))
            np.testing.assert_allclose(histogram.sums, sums, rtol=1e-12)
            assert histogram.below == (place < 0).sum()
            assert histogram.above == (place >= len(counts)).sum()
            assert histogram.count == size.size
            assert histogram.max == size.max()


def test_the_layout_of_the_bins_does_not_depend_on_the_data():
    edges = [
        calibrated(tuple(np.float32(factor) * x for x in calibrating.normal())).histogram("layer", "v").edges
        for factor in (1e-30, 1.0, 1e30)
    ]
    np.testing.assert_array_equal(edges[0], edges[1])
    np.testing.assert_array_equal(edges[0], edges[2])


def test_saturated_is_the_share_of_the_values_beyond_the_scale(sample, ratio):
    v = sample.reshape(1, -1, 1)
    calibrator = calibrated((np.ones((1, 1, 1), np.float32), np.ones_like(v), v), smooth_k=False)
    histogram = calibrator.histogram("layer", "v")
    size = np.abs(sample.astype(np.float64))
    for clip in np.percentile(size[size > 0], [1, 30, 50, 90, 99, 99.9]) * 1.001:
        share = histogram.saturated(clip / 127)
        assert (size > clip * ratio).mean() - 1e-12 <= share <= (size > clip / ratio).mean() + 1e-12
    for limit, saturates in ((125.7, False), (127.4, False), (127.6, True)):  # 127.4 is rounded to 127
        assert (histogram.saturated(size.max() / limit) > 0) == saturates


def test_what_a_histogram_gives_cannot_change_the_calibrator():
    calibrator = calibrated(calibrating.normal())
    before = bits(calibrator.compute("octav"))
    histogram = calibrator.histogram("layer", "q")
    for x in (histogram.counts, histogram.sums, histogram.edges):
        try:
            x[...] = 7
        except ValueError:  # read-only is as good as a copy
            continue
    assert bits(calibrator.compute("octav")) == before


def test_keys_are_counted_raw_and_without_the_mean_of_their_observation():
    calibrator = Calibrator()
    centred = []
    for seed, Lk in ((0, 30), (1, 41)):
        q, k, v = calibrating.normal(seed, H=2, Lq=20, Lk=Lk)
        k += np.float32(10 * (1 + seed))
        calibrator.observe("layer", q, k, v)
        centred.append((k - k.mean(axis=1, keepdims=True, dtype=np.float64)).ravel())
    raw, smooth = (calibrator.histogram("layer", part) for part in ("k", "k_centred"))
    assert raw.count == smooth.count == 2 * (30 + 41) * 8
    assert raw.max > 20
    centred = np.abs(np.concatenate(centred))
    assert smooth.max == pytest.approx(centred.max(), rel=1e-5)
    assert smooth.sums.sum() == pytest.approx(centred.sum(), rel=1e-3)


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("maximum", {}, ["method", "max", "octav", "output", "'maximum'"]),
        (None, {}, ["method"]),
        ("percentile", {"percentile": 101.0}, ["percentile", "101"]),
        ("percentile", {"percentile": -1.0}, ["percentile", "-1"]),
        ("percentile", {"percentile": float("nan")}, ["percentile", "nan"]),
        ("output", {"objective": "psnr"}, ["objective", "rel_l1", "rmse", "worst_row", "'psnr'"]),
    ],
)
def test_arguments_are_checked(method, arguments, words):
    calibrator = calibrated(*(calibrating.normal(seed) for seed in range(2)))
    with pytest.raises((TypeError, ValueError)) as error:
        calibrator.compute(method, **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
