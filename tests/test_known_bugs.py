"""Bugs that other calibration tools had or have, each as a test that this one does not have it.

Above each test: the tool, and its issue where there is one.
"""
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from calibrating import (
    HISTOGRAM_METHODS,
    METHODS,
    SMALLEST_SCALE,
    bin_ratio,
    bits,
    calibrated,
    clip_of,
    clips,
    copy_of,
    long_tailed,
    normal,
    state,
)

import cyflash
from cyflash.quant import Calibrator, Scales, compare


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of small calls: on a busy machine two threads would wait for each other in each."""
    cyflash.set_num_threads(1)
    yield
    cyflash.set_num_threads(None)


def observation_of(values, seed=0):
    """q, k, v whose q, k and v are each these values in another order, (1, L, D) with D of 8."""
    r = np.random.default_rng(seed)
    values = np.resize(np.asarray(values, np.float32), -(-len(values) // 8) * 8)
    return tuple(r.permutation(values).reshape(1, -1, 8) for _ in "qkv")


# ONNX Runtime 10503, 11020, 21979: every output of every step was kept, 123 GB after 32 samples; 26321: the same again.
def test_memory_does_not_grow_with_the_observations():
    r = np.random.default_rng(0)

    def observe(calibrator, times):
        for _ in range(times):
            q, k, v = r.standard_normal((3, 2, 64, 32), dtype=np.float32)  # 48 KB
            calibrator.observe("layer", q, k, v)

    calibrator = Calibrator(reservoir_mb=1)
    tracemalloc.start()
    try:
        observe(calibrator, 60)  # some 3 MB: the reservoir is full
        before = tracemalloc.get_traced_memory()[0]
        observe(calibrator, 200)  # some 10 MB
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 200_000


# ONNX Runtime: NaN or infinity raised in percentile, infinity in entropy, and NaN vanished without a word in entropy;
# AIMET 3520: "range of [nan, inf] is not finite"; Model-Optimizer 2414: NaN activations of hybrid models.
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_an_error_or_counted_but_never_a_scale(method, value):
    good, bad = [long_tailed(0), long_tailed(1)], long_tailed(2)
    for x in bad:
        x[0, 5, 2] = value
    with pytest.raises(ValueError, match=r"layer.*q.*\(0, 5, 2\)"):
        calibrated(*good, bad)
    calibrator = calibrated(bad, *good, nonfinite="ignore")
    layer = calibrator.compute(method)["layer"]
    assert all(0 < clip < 100 for clip in clips(layer).values())
    assert "3" in str(calibrator.summary()) or "1" in str(calibrator.summary())
    assert calibrator.summary() != calibrated(*good, nonfinite="ignore").summary()
    assert calibrator.histogram("layer", "v").count == 3 * good[0][2].size - 1


# pytorch-quantization, ONNX Runtime: the first batch fixes the width of the bins, and more are appended: 3 084 703, or
# 25 GiB of them; torch 122659 (out of memory) likewise; TensorRT: ranges double and depend on the order.
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["1e-3 N(0, 1) first", "1e-5 and one value of 50"])
def test_a_tiny_first_batch_decides_nothing(tmp_path, method, case):
    r = np.random.default_rng(0)
    tiny, usual = r.standard_normal(1600), r.standard_normal(1600)
    if case == "1e-3 N(0, 1) first":
        seen = [observation_of(1e-3 * tiny), observation_of(usual)]
    else:
        seen = [observation_of(1e-5 * tiny), observation_of(np.r_[1e-5 * usual[:-1], 50.0])]
    one, other = calibrated(*seen, smooth_k=False), calibrated(*seen[::-1], smooth_k=False)
    assert bits(one.compute(method)) == bits(other.compute(method))
    assert state(one, tmp_path) == state(other, tmp_path)


def test_a_tiny_first_batch_takes_no_more_memory(tmp_path):
    r = np.random.default_rng(0)
    sizes = []
    for factor in (1.0, 1e-3, 1e-30):
        calibrator = calibrated(observation_of(factor * r.standard_normal(800)), observation_of([50.0, 1.0] * 400))
        sizes.append(len(state(calibrator, tmp_path)))
        assert len(calibrator.histogram("layer", "k").counts) < 10_000
    assert max(sizes) < 2 * min(sizes)


# ONNX Runtime: values below the least of the first batch were dropped, 100 000 of 101 000 samples.
# AIMET: 512 bins over three times the range of the first batch, and what comes later and lies outside is dropped.
@pytest.mark.parametrize("factors", [(1.0, 1e-4), (1e-4, 1.0), (1.0, 1e4)])
def test_values_outside_the_range_of_the_first_batch_count(factors):
    r = np.random.default_rng(0)
    first, second = (np.float32(factor) * (1 + r.random(n)) for factor, n in zip(factors, (800, 80_000), strict=True))
    calibrator = calibrated(observation_of(first), observation_of(second), smooth_k=False)
    for part in "qkv":
        histogram = calibrator.histogram("layer", part)
        assert histogram.count == 80_800
        assert histogram.counts.sum() + histogram.below + histogram.above == 80_800
        within = histogram.counts[histogram.edges[:-1] < 2 * factors[1]].sum() + histogram.below
        assert within == (80_800 if factors[1] > factors[0] else 80_000)
    clip = clips(calibrator.compute("percentile", percentile=50.0)["layer"])["v"]
    assert 1 < clip / factors[1] < 2


# ONNX Runtime: "setting an array element with a sequence ... inhomogeneous shape" for sequences of unlike lengths.
@pytest.mark.parametrize("method", METHODS)
def test_ragged_lengths(method):
    seen = [normal(seed, Lq=Lq, Lk=Lk) for seed, (Lq, Lk) in enumerate([(1, 1), (7, 130), (1, 64), (300, 300), (2, 1)])]
    calibrator = calibrated(*seen, smooth_k=False)
    for i, part in enumerate("qkv"):
        values = np.concatenate([x[i].ravel() for x in seen])
        assert calibrator.histogram("layer", part).count == len(values)
        assert clips(calibrator.compute("max")["layer"])[part] == pytest.approx(np.abs(values).max(), rel=2e-7)
    assert np.isfinite(cyflash.flash_attention_int8(*seen[1], quant=calibrator.compute(method)["layer"])).all()


# ONNX Runtime: compute_percentile returned two counts in place of the histogram and its edges.
@pytest.mark.parametrize("percentile", [25.0, 50.0, 90.0, 99.0, 99.9])
def test_percentile_is_that_of_numpy_within_a_bin(percentile):
    values = np.random.default_rng(1).standard_t(4, 40_000).astype(np.float32)
    ratio = bin_ratio(calibrated(normal()).histogram("layer", "v"))
    expected = np.percentile(np.abs(values), percentile)
    assert expected / ratio <= clip_of(values, "percentile", percentile=percentile) <= expected * ratio


# ONNX Runtime: 0.5 s for one tensor of 2048 bins, quadratic in them; TensorRT 4023.
def test_entropy_is_done_soon_with_every_bin_full_and_gives_a_clip_of_use():
    r = np.random.default_rng(2)
    spread = 2.0 ** r.uniform(-64, 32, 40_000)  # wherever there are bins
    values = np.r_[spread, r.standard_normal(40_000)].astype(np.float32)
    calibrator = calibrated(observation_of(values), smooth_k=False)
    assert (calibrator.histogram("layer", "v").counts > 0).mean() > 0.9
    clip = clips(calibrator.compute("entropy")["layer"])
    assert all(1 < x <= np.abs(values).max() * (1 + 2e-7) for x in clip.values())


# ONNX Runtime 10261: with its defaults of 128 bins and 128 levels entropy has one candidate, and is min-max.
def test_entropy_is_not_max_under_another_name():
    values = np.random.default_rng(3).standard_t(2, 50_000)
    assert clip_of(values, "entropy") < 0.5 * clip_of(values, "max")


# ONNX Runtime: write_calibration_table stores max(high, low), and not the greatest absolute value.
@pytest.mark.parametrize("method", HISTOGRAM_METHODS)
@pytest.mark.parametrize("sign", [1, -1])
def test_asymmetric_values_use_the_greatest_absolute_value(method, sign):
    values = sign * np.r_[np.random.default_rng(4).uniform(-10, -1, 5000), [0.5, 1.0]]
    clip = clip_of(values, method)
    assert clip == clip_of(np.abs(values), method)
    if method == "max":
        assert clip == pytest.approx(np.abs(values).max(), rel=1e-6)


# TensorRT 2757: counts in float32 stop at 2^24, and the 99.99th percentile was 316.8; modelopt counts so still.
def test_a_thousand_million_values_are_counted_exactly(tmp_path):
    r = np.random.default_rng(5)
    n, doublings = 8 * 12_501, 14
    values = r.standard_t(3, n).astype(np.float32)
    calibrator = calibrated(observation_of(values), smooth_k=False)
    once = calibrator.histogram("layer", "v")
    for _ in range(doublings):
        calibrator.merge(copy_of(calibrator, tmp_path))
    calibrator.observe("layer", *(np.full((1, 1, 8), 0.75, np.float32) for _ in "qkv"))
    many = calibrator.histogram("layer", "v")
    assert many.count == n * 2**doublings + 8 > 10**9
    added = (many.counts - once.counts * 2**doublings).nonzero()[0]
    assert len(added) == 1 and many.edges[added[0]] <= 0.75 < many.edges[added[0] + 1]
    assert many.counts[added[0]] == once.counts[added[0]] * 2**doublings + 8
    np.testing.assert_allclose(np.delete(many.sums, added), np.delete(once.sums, added) * 2**doublings, rtol=1e-15)
    assert calibrator.summary() != []
    clip = clips(calibrator.compute("percentile", percentile=99.99)["layer"])["v"]
    ratio = bin_ratio(once)
    assert np.percentile(np.abs(values), 99.98) / ratio <= clip <= np.percentile(np.abs(values), 99.995) * ratio
    assert calibrator.compute("entropy")["layer"].v_scale > 0


def test_a_calibrator_merged_with_itself_counts_twice(tmp_path):
    one, twice = calibrated(normal(0), normal(1)), calibrated(normal(0), normal(1))
    one.merge(copy_of(one, tmp_path))
    assert state(twice.merge(twice), tmp_path) == state(one, tmp_path)
    assert twice.histogram("layer", "q").count == 4 * normal()[0].size


# torch HistogramObserver: bins of width 0 after a first batch of zeros, and a division by it (39239).
@pytest.mark.parametrize("method", METHODS)
def test_a_first_batch_of_zeros(tmp_path, method):
    zeros = tuple(np.zeros((2, 24, 8), np.float32) for _ in "qkv")
    seen = [normal(0), normal(1)]
    with pytest.raises(ValueError, match=r"layer.*zero"):
        calibrated(zeros, *seen)
    before, after = (calibrated(*x, nonfinite="ignore") for x in ((zeros, *seen), (*seen, zeros)))
    assert state(before, tmp_path) == state(after, tmp_path)
    assert bits(before.compute(method)) == bits(calibrated(*seen, nonfinite="ignore").compute(method))


# pytorch 156414: HistogramObserver merged two histograms with the total of the wrong one.
def test_merged_totals_are_the_sums_of_both():
    parts = [calibrated(normal(seed, Lq=10 + 90 * seed), smooth_k=False) for seed in range(3)]
    before = [[part.histogram("layer", x) for x in "qkv"] for part in parts]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    for i, x in enumerate("qkv"):
        histogram = merged.histogram("layer", x)
        assert histogram.count == sum(each[i].count for each in before) == 2 * 8 * (10 + 100 + 190)
        np.testing.assert_array_equal(histogram.counts, sum(each[i].counts for each in before))
        assert histogram.max == max(each[i].max for each in before)


# Model-Optimizer 2248: zeros of an empty cache made the amax of three layers 0.0. ONNX Runtime: a scale of 0 for zeros.
@pytest.mark.parametrize("method", METHODS)
def test_zeros_never_make_a_scale_of_zero(method):
    mostly = []
    for seed in range(2):
        q, k, v = normal(seed, Lq=50)
        for x in (q, k, v):
            x[:, 1:] = 0
        mostly.append((q, k, v))
    for granularity in ("tensor", "head"):
        calibrator = calibrated(*mostly, granularity=granularity, smooth_k=False)
        for name, clip in clips(calibrator.compute(method, percentile=50.0)["layer"]).items():
            assert (clip >= 127 * SMALLEST_SCALE * 0.999).all() and np.isfinite(clip).all(), name


# modelopt: entropy writes to a view of the histogram that is kept, so what is asked for later differs.
def test_no_method_changes_what_another_finds(tmp_path):
    calibrator = calibrated(long_tailed(0), long_tailed(1))
    saved = state(calibrator, tmp_path)
    fresh = {method: bits(calibrated(long_tailed(0), long_tailed(1)).compute(method)) for method in METHODS}
    for first, second in pairwise((*METHODS, *METHODS[::-1], "entropy", "entropy", "max")):
        assert bits(calibrator.compute(first)) == fresh[first]
        assert bits(calibrator.compute(second)) == fresh[second]
    assert state(calibrator, tmp_path) == saved


# Model-Optimizer 63: statistics were collected as a histogram that the algorithms could not use.
def test_every_method_works_on_the_same_statistics():
    calibrator = calibrated(long_tailed(0), long_tailed(1))
    for method in METHODS:
        assert calibrator.compute(method).settings["method"] == method


# auto-round 2366: the error was that of a running range, but the range exported was the final one.
@pytest.mark.parametrize("method", METHODS)
def test_the_reported_error_is_that_of_the_scales_in_the_file(tmp_path, method):
    calibrator = calibrated(*(long_tailed(seed, Lq=40, D=16) for seed in range(2)))
    scales = Scales.load(calibrator.compute(method).save(tmp_path / "x.safetensors"))
    (tile,) = calibrator.tiles("layer")[1]
    output = cyflash.flash_attention_int8(*tile[:3], quant=scales["layer"], **tile.options)
    error = compare(output, cyflash.reference.attention(*tile[:3], **tile.options))
    assert scales.about["layer"]["error"]["held_out"]["rel_l1"] == pytest.approx(error.rel_l1, rel=1e-4)


# llm-compressor 1294: where a q_scale was missing, that of K was taken for it.
@pytest.mark.parametrize("missing", ["q_scale", "k_scale", "v_scale"])
def test_a_missing_scale_is_never_another_one(tmp_path, missing):
    q, k, v = normal(0)
    scales = calibrated((q, 3 * k, 9 * v), smooth_k=False).compute("max")
    clip = clips(scales["layer"])
    assert clip["q"] == pytest.approx(np.abs(q).max(), rel=2e-7) and clip["q"] < clip["k"] < clip["v"]
    path = scales.save(tmp_path / "whole.safetensors")
    with safetensors.safe_open(path, "numpy") as file:
        metadata, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del held[f"layer.{missing}"]
    cut = tmp_path / "cut.safetensors"
    safetensors.numpy.save_file(held, cut, metadata=metadata)
    with pytest.raises(ValueError, match=rf"layer.*{missing}|{missing}.*layer"):
        Scales.load(cut)


# vLLM: a layer without scales gets 1.0 and a warning.
def test_a_missing_layer_is_an_error():
    scales = calibrated(normal(0), name="enc.1").compute("max")
    with pytest.raises(KeyError, match=r"enc\.2.*enc\.1"):
        scales["enc.2"]
    assert scales.get("enc.2") is None  # a Mapping like any other


# SageAttention: the mean was subtracted from the caller's own K; one mean for all sequences of a batch.
def test_smoothing_leaves_the_keys_alone_and_takes_each_sequence_by_itself():
    q, k, v = normal(0, B=2)
    k += np.array([0, 50], np.float32)[:, None, None, None]
    copy = k.copy()
    calibrator = calibrated((q, k, v), smooth_k=True)
    np.testing.assert_array_equal(k, copy)
    assert calibrator.histogram("layer", "k_centred").max < 8 < calibrator.histogram("layer", "k").max


# SageAttention, some forks: unknown arguments are swallowed.
def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="is_causal"):
        Calibrator().observe("layer", *normal(), is_causal=True)
    with pytest.raises(TypeError):
        Calibrator(heads=3)
    with pytest.raises(TypeError):
        calibrated(normal()).compute("max", clip=3)
