"""The Calibrator: what it counts, what it leaves out, what it refuses, and that order and division change nothing."""
import gc
import itertools
import json
import math
import tracemalloc
import weakref

import calibrating
import cases
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from calibrating import METHODS, bits, calibrated, clips, copy_of, joined, long_tailed, normal, state
from hypothesis import given, settings
from hypothesis import strategies as st

import cyflash
from cyflash.quant import Calibrator, Scales
from cyflash.reference import heads

GRANULARITIES = ("tensor", "head")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of small calls: on a busy machine two threads would wait for each other in each."""
    cyflash.set_num_threads(1)
    yield
    cyflash.set_num_threads(None)


# Order and division


def ragged(n=6, H=4, Hk=2, D=8, Dv=6):
    """Observations of unlike lengths and sizes, with options that go with them."""
    r = np.random.default_rng(9)
    for seed in range(n):
        Lq, Lk = int(r.integers(1, 40)), int(r.integers(5, 60))
        q, k, v = (np.float32(10.0 ** r.uniform(-3, 3)) * x for x in normal(seed, H, Hk, Lq, Lk, D, Dv))
        k += np.float32(3 * seed)
        yield (q, k, v), {"mask": r.random((Lq, Lk)) < 0.7, "causal": True, "bias": cases._float(r, H, Lq, Lk)}


OBSERVATIONS = list(ragged())


def observing(chosen, **arguments):
    calibrator = Calibrator(**arguments)
    for i in chosen:
        qkv, options = OBSERVATIONS[i]
        calibrator.observe("a", *qkv, **options)
        if i % 2:
            calibrator.observe("b", *qkv, **options)
    return calibrator


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    """{granularity: (saved state, bits of each method)} of the observations one after another in one calibrator."""
    folder, found = tmp_path_factory.mktemp("in_order"), {}
    for granularity in GRANULARITIES:
        calibrator = observing(range(len(OBSERVATIONS)), granularity=granularity, smooth_k=True)
        found[granularity] = state(calibrator, folder), {m: bits(calibrator.compute(m)) for m in METHODS}
    return found


@pytest.mark.parametrize("granularity", GRANULARITIES)
@settings(max_examples=8, deadline=None)
@given(
    places=st.permutations(range(len(OBSERVATIONS))),
    owners=st.lists(st.integers(0, 2), min_size=len(OBSERVATIONS), max_size=len(OBSERVATIONS)),
    merging=st.permutations(range(3)),
)
def test_any_order_and_any_split_give_the_same_bits(tmp_path_factory, in_order, granularity, places, owners, merging):
    parts = [
        observing([i for i in places if owners[i] == owner], granularity=granularity, smooth_k=True)
        for owner in range(3)
    ]
    merged = joined([parts[i] for i in merging])
    saved, scales = in_order[granularity]
    assert merged.layers == ("a", "b")
    assert state(merged, tmp_path_factory.mktemp("merged")) == saved
    assert bits(merged.compute("octav")) == scales["octav"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_reversed_and_merged_in_threes_for_every_method(in_order, granularity):
    n = len(OBSERVATIONS)
    arguments = {"granularity": granularity, "smooth_k": True}
    backwards = observing(reversed(range(n)), **arguments)
    nested = joined([observing([4, 1], **arguments), joined([observing([i], **arguments) for i in (5, 0, 3)]),
                     observing([2], **arguments)])
    for method in METHODS:
        expected = in_order[granularity][1][method]
        assert bits(backwards.compute(method)) == expected, method
        assert bits(nested.compute(method)) == expected, method


def test_granularities_and_layers_of_the_test_above_differ(in_order):
    for method in METHODS:
        found = [scales[method][name] for _, scales in in_order.values() for name in ("a", "b")]
        assert len(set(found)) == len(found), method


@pytest.mark.parametrize("smooth_k", ["auto", True, False])
@pytest.mark.parametrize("fp32_sinks", [0, 3])
def test_order_with_every_way_of_treating_keys(tmp_path, smooth_k, fp32_sinks):
    arguments = {"smooth_k": smooth_k, "fp32_sinks": fp32_sinks}
    one = observing([0, 1, 2, 3], **arguments)
    other = observing([3, 0], **arguments).merge(observing([2, 1], **arguments))
    assert state(one, tmp_path) == state(other, tmp_path)
    assert bits(one.compute("mse")) == bits(other.compute("mse"))


def test_a_full_reservoir_keeps_the_same_tiles_in_any_order(tmp_path):
    r = np.random.default_rng(2)
    observations = [long_tailed(seed, H=2, Lq=int(r.integers(5, 300)), D=32) for seed in range(24)]  # 4 to 230 KB each
    arguments = {"reservoir_mb": 1, "smooth_k": False}
    one = calibrated(*observations, **arguments)
    saved, (training, held_out) = state(one, tmp_path), one.tiles("layer")
    kept = sum(tile.q.nbytes + tile.k.nbytes + tile.v.nbytes for tile in (*training, *held_out))
    assert 0.2 * 2**20 < kept <= 2**20
    assert sum(x.nbytes for qkv in observations for x in qkv) > 1.4 * 2**20  # some were left out
    for _ in range(6):
        order = r.permutation(len(observations))
        cuts = sorted(r.integers(0, len(observations), 2))
        parts = [calibrated(*(observations[i] for i in part), **arguments) for part in np.split(order, cuts)]
        assert state(joined(parts), tmp_path) == saved


@pytest.mark.parametrize("option", ["mask", "bias"])
def test_the_same_arrays_under_another_mask_or_bias_are_another_observation(option):
    qkv = normal(0)
    calibrator = Calibrator()
    for diagonal in (3, 4, 4):
        mask = np.tri(24, 24, diagonal, bool)
        calibrator.observe("layer", *qkv, **{option: mask if option == "mask" else mask.astype(np.float32)})
    training, held_out = calibrator.tiles("layer")
    assert len(training) == len(held_out) == 1
    assert calibrator.compute()["layer"].q_scale > 0


def test_the_seed_chooses_the_tiles(tmp_path):
    observations = [normal(seed, Lq=400, D=32) for seed in range(12)]  # 300 KB each
    kept = set()
    for seed in range(4):
        training, _ = calibrated(*observations, reservoir_mb=1, seed=seed).tiles("layer")
        kept.add(b"".join(tile.q.tobytes() for tile in training))
    assert len(kept) > 1
    again = [state(calibrated(*observations, reservoir_mb=1, seed=3), tmp_path) for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_batch_is_as_many_observations(tmp_path, granularity):
    B, H, Hk, Lq, Lk = 3, 4, 2, 12, 30
    q, k, v = normal(4, H, Hk, Lq, Lk, B=B)
    k += 10 * np.arange(B, dtype=np.float32)[:, None, None, None]
    r = np.random.default_rng(0)
    options = {"mask": r.random((B, 1, 1, Lk)) < 0.6, "bias": cases._float(r, B, H, Lq, Lk), "causal": True}
    batch, singly = Calibrator(granularity), Calibrator(granularity)
    batch.observe("layer", q, k, v, **options)
    for b in (2, 0, 1):
        own = {"mask": options["mask"][b], "bias": options["bias"][b], "causal": True}
        singly.observe("layer", q[b], k[b], v[b], **own)
    assert state(batch, tmp_path) == state(singly, tmp_path)
    for method in METHODS:
        assert bits(batch.compute(method)) == bits(singly.compute(method))


def test_a_mask_for_the_whole_batch_is_that_of_each_sequence(tmp_path):
    q, k, v = normal(4, B=2, Lk=30)
    mask = np.arange(30) < 17
    batch, singly = Calibrator(), Calibrator()
    batch.observe("layer", q, k, v, mask=mask)
    for b in range(2):
        singly.observe("layer", q[b], k[b], v[b], mask=mask)
    assert bits(batch.compute("output")) == bits(singly.compute("output"))


def test_one_head_may_come_without_its_axis(tmp_path):
    q, k, v = normal(4, H=1)
    assert state(calibrated((q[0], k[0], v[0])), tmp_path) == state(calibrated((q, k, v)), tmp_path)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_strides_make_no_difference(tmp_path, layout):
    B = 2 if "batch" in layout else None
    first, second = (normal(seed, H=4, Hk=2, Lq=20, Lk=33, B=B) for seed in range(2))
    expected = calibrated(first, second)
    got = calibrated(tuple(map(cases.LAYOUTS[layout], first)), tuple(map(cases.LAYOUTS[layout], second)))
    assert state(got, tmp_path) == state(expected, tmp_path)
    assert bits(got.compute("output")) == bits(expected.compute("output"))


def test_threads_make_no_difference(tmp_path):
    qkv = long_tailed(0, H=8, Lq=700, D=64)
    saved = []
    for threads in (2, 5, 1):
        cyflash.set_num_threads(threads)
        saved.append(state(calibrated(qkv, long_tailed(1, H=8, Lq=20, D=64)), tmp_path))
    assert saved[0] == saved[1] == saved[2]


# What is left to the caller


def test_inputs_are_not_written():
    qkv = normal(0, H=4, Hk=2, Lk=40)
    options = {"mask": np.random.default_rng(0).random((24, 40)) < 0.5, "bias": np.zeros((24, 40), np.float32),
               "alibi_slopes": np.full(4, 0.1, np.float32), "sinks": np.ones(4, np.float32)}
    arrays = (*qkv, *options.values())
    copies = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    calibrator = Calibrator(fp32_sinks=2, smooth_k=True)
    calibrator.observe("layer", *qkv, **options)
    calibrator.observe("layer", *normal(1, H=4, Hk=2, Lk=40), **options)
    for method in METHODS:
        calibrator.compute(method)
    for x, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, copy)


def test_arrays_are_not_kept():
    calibrator = Calibrator()
    qkv = normal()
    mask = np.ones((24, 24), bool)
    alive = [weakref.ref(x) for x in (*qkv, mask)]
    calibrator.observe("layer", *qkv, mask=mask)
    del qkv, mask
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_arrays_written_over_afterwards_change_nothing(tmp_path):
    first, second, mask = normal(0), normal(1), np.ones((24, 24), bool)
    expected = calibrated(first, second, options={"mask": mask})
    saved, scales = state(expected, tmp_path), bits(expected.compute())
    got = calibrated(first, second, options={"mask": mask})
    for x in (*first, *second):
        x[...] = 1e6
    mask[...] = False
    assert state(got, tmp_path) == saved
    assert bits(got.compute()) == scales


def test_what_tiles_gives_is_what_was_seen():
    observations = [normal(seed, H=4, Hk=2, Lq=20, Lk=30, Dv=5) for seed in range(4)]
    mask = np.random.default_rng(0).random((4, 20, 30)) < 0.8
    calibrator = calibrated(*observations, options={"causal": True, "softcap": 3.0, "mask": mask})
    training, held_out = calibrator.tiles("layer")
    assert len(training) == len(held_out) == 2
    exact = [cyflash.flash_attention(*qkv, causal=True, softcap=3.0, mask=mask) for qkv in observations]
    for tile in (*training, *held_out):
        for x, shape in zip(tile[:3], ((4, None, 8), (2, None, 8), (2, None, 5)), strict=True):
            assert x.dtype == np.float32 and x.flags.c_contiguous
            assert (x.shape[0], x.shape[2]) == (shape[0], shape[2])
        got = cyflash.flash_attention(*tile[:3], **tile.options)
        rows = np.concatenate(exact, axis=1)
        nearest = np.abs(rows[:, None] - got[:, :, None]).max(axis=-1).min(axis=-1)  # every row is one of the whole
        assert nearest.max() < 1e-5
    together = np.concatenate([tile.v.ravel() for tile in (*training, *held_out)])
    assert np.isin(together, np.concatenate([v.ravel() for *_, v in observations])).all()
    assert not np.isin(training[0].v, held_out[0].v).any()


@pytest.mark.parametrize("Lk", [1, 40])
def test_a_tile_of_more_rows_than_keys_sees_what_the_call_saw(Lk):
    options = {"causal": True, "causal_align": "top-left", "alibi_slopes": np.float32([0.3, 0.1])}
    qkv = normal(0, Lq=600, Lk=Lk)
    (tile,), _ = calibrated(qkv, options=options).tiles("layer")
    rows = [np.flatnonzero((qkv[0][0] == row).all(axis=1))[0] for row in tile.q[0] if row.any()]
    whole = cyflash.flash_attention(*qkv, **options)
    np.testing.assert_allclose(
        cyflash.flash_attention(*tile[:3], **tile.options)[:, : len(rows)], whole[:, rows], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_make_room_for_biases_of_every_pair(heads, causal):
    calibrator = Calibrator(reservoir_mb=2)
    r = np.random.default_rng(0)
    for seed in range(6):
        bias = r.standard_normal((heads, 700, 700), dtype=np.float32)
        calibrator.observe("layer", *normal(seed, H=4, Lq=700), bias=bias, causal=causal)
    tiles = [tile for half in calibrator.tiles("layer") for tile in half]
    assert len(tiles) >= 4
    for tile in tiles:
        assert tile.nbytes <= 2e6 / 4
        assert tile.k.any(axis=2).all() and tile.q.any(axis=2).all()


# What nothing sees

UNSEEN = {  # H, Hk, Lq, Lk, options
    "causal, fewer queries, top-left": (2, 2, 10, 30, {"causal": True, "causal_align": "top-left"}),
    "causal, more queries": (2, 2, 30, 10, {"causal": True}),
    "window, fewer queries": (2, 2, 8, 40, {"window": (3, 0)}),
    "window, more queries": (2, 2, 40, 8, {"window": (2, 3)}),
    "window top-left": (4, 2, 40, 12, {"window": (2, 0), "causal_align": "top-left"}),
    "padding": (4, 2, 12, 20, {"mask": np.arange(20) < 13}),
    "mask with rows": (2, 2, 12, 20, {"mask": (np.arange(12) % 3 > 0)[:, None] & (np.arange(20) % 2 > 0)}),
    "mask of each head": (4, 2, 12, 20, {"mask": np.random.default_rng(3).random((4, 12, 20)) < 0.08}),
    "causal and mask": (4, 2, 16, 16, {"causal": True, "mask": np.arange(16) % 4 > 0}),
    "bias": (2, 1, 12, 20, {"bias": np.where(np.random.default_rng(4).random((2, 12, 20)) < 0.07, 0.5, -np.inf)
                            .astype(np.float32)}),
    "bias and mask": (2, 2, 12, 20, {"bias": np.where(np.arange(20) < 11, 0, -np.inf).astype(np.float32),
                                     "mask": np.arange(20) > 3}),
}  # fmt: skip


def seen(q, k, v, options):
    """(rows of q that see a key, (H, Lq); keys that a row of their group sees, (Hk, Lk))."""
    visible = np.array([head.visible for head in heads(q, k, v, **options)])
    group = len(q) // len(k)
    return visible.any(axis=2), visible.any(axis=1).reshape(len(k), group, -1).any(axis=1)


def with_unseen(qkv, options, value):
    q, k, v = (x.copy() for x in qkv)
    rows, keys = seen(q, k, v, options)
    q[~rows], k[~keys], v[~keys] = value, -value, value
    return (q, k, v), (~rows).sum(), (~keys).sum()


@pytest.mark.parametrize("case", UNSEEN)
@pytest.mark.parametrize(("granularity", "smooth_k"), [("tensor", False), ("head", True)])
def test_what_nothing_sees_counts_for_nothing(case, granularity, smooth_k):
    H, Hk, Lq, Lk, options = UNSEEN[case]
    observations = [long_tailed(seed, H=H, Hk=Hk, Lq=Lq, Lk=Lk) for seed in range(2)]
    arguments = {"granularity": granularity, "smooth_k": smooth_k, "options": options}
    plain = calibrated(*observations, **arguments)
    poisoned = [with_unseen(qkv, options, 1e6) for qkv in observations]
    assert sum(rows + keys for _, rows, keys in poisoned) > 0
    poisoned = calibrated(*(qkv for qkv, _, _ in poisoned), **arguments)
    for part in ("q", "k", "k_centred", "v"):
        a, b = (c.histogram("layer", part) for c in (plain, poisoned))
        np.testing.assert_array_equal(a.counts, b.counts, err_msg=part)
        assert (a.count, a.max) == (b.count, b.max), part
    for method in ("max", "percentile", "octav"):
        assert bits(plain.compute(method)) == bits(poisoned.compute(method)), method


@pytest.mark.parametrize("case", UNSEEN)
def test_what_nothing_sees_does_not_decide_the_search(case):
    H, Hk, Lq, Lk, options = UNSEEN[case]
    observations = [long_tailed(seed, H=H, Hk=Hk, Lq=Lq, Lk=Lk) for seed in range(2)]
    poisoned = [with_unseen(qkv, options, 1e6)[0] for qkv in observations]
    plain, other = (calibrated(*x, smooth_k=False, options=options).compute() for x in (observations, poisoned))
    assert bits(plain) == bits(other)


@pytest.mark.parametrize("case", UNSEEN)
def test_all_that_something_sees_counts(case):
    H, Hk, Lq, Lk, options = UNSEEN[case]
    q, k, v = normal(0, H=H, Hk=Hk, Lq=Lq, Lk=Lk)
    rows, keys = seen(q, k, v, options)
    calibrator = calibrated((q, k, v), smooth_k=False, options=options)
    for part, x, counted in (("q", q, rows), ("k", k, keys), ("v", v, keys)):
        histogram = calibrator.histogram("layer", part)
        assert histogram.count == x[counted].size
        assert histogram.max == np.abs(x[counted]).max()
    mean = calibrated((q, k, v), smooth_k=True, options=options).compute("max")["layer"].k_mean
    expected = [k[h, keys[h]].mean(axis=0, keepdims=True, dtype=np.float64) for h in range(Hk)]
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("Lq, Lk", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("option", ["mask", "bias"])
def test_a_mask_or_bias_beside_no_keys_or_no_queries(option, Lq, Lk):
    q, k, v = (np.zeros((2, L, 8), np.float32) for L in (Lq, Lk, Lk))
    x = np.zeros((2, Lq, Lk), bool if option == "mask" else np.float32)
    calibrator = calibrated((q, k, v), options={option: x})
    assert calibrator.histogram("layer", "q").count == calibrator.histogram("layer", "k").count == 0


def test_an_observation_in_which_nothing_is_seen_adds_nothing():
    qkv, other = normal(0), normal(1)
    calibrator = Calibrator(smooth_k=False)
    calibrator.observe("layer", *qkv, mask=np.ones((24, 24), bool))
    before = bits(calibrator.compute("mse"))
    calibrator.observe("layer", *other, mask=np.zeros((24, 24), bool))
    assert bits(calibrator.compute("mse")) == before


# Settings


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fp32_sinks_are_left_out_of_the_scales_of_k_and_v(n, granularity):
    qkv, spiked = ([x.copy() for x in normal(0, Lq=30)] for _ in range(2))
    for x in spiked[1:]:
        x[:, :n] = 1e5
    arguments = {"granularity": granularity, "fp32_sinks": n, "smooth_k": False}
    plain, other = (calibrated(x, **arguments) for x in (qkv, spiked))
    for method in ("max", "percentile", "octav"):
        scales = plain.compute(method)
        assert bits(scales) == bits(other.compute(method))
        assert scales["layer"].fp32_sinks == n
    assert plain.histogram("layer", "k").count == plain.histogram("layer", "v").count == 2 * (30 - n) * 8
    assert plain.histogram("layer", "q").count == 2 * 30 * 8
    spiked[1][:, n] = 1e5  # the next key does count
    assert clips(calibrated(spiked, **arguments).compute("max")["layer"])["k"].max() == pytest.approx(1e5)


def test_fp32_sinks_beside_a_sequence_no_longer_than_they():
    calibrator = calibrated(normal(0, Lq=3), normal(1, Lq=40), normal(2, Lq=40), fp32_sinks=4)
    assert calibrator.histogram("layer", "v").count == 2 * 2 * 36 * 8
    layer = calibrator.compute()["layer"]
    assert np.isfinite(cyflash.flash_attention_int8(*normal(3, Lq=40), quant=layer)).all()


def test_sequences_of_nothing_but_fp32_sinks_say_why_there_is_no_scale():
    calibrator = calibrated(normal(0, Lq=3), normal(1, Lq=5), fp32_sinks=8)
    with pytest.raises(ValueError, match="k: expected a sequence of more keys than fp32_sinks=8, got 5 at most"):
        calibrator.compute("max")


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_keys_in_fp32_have_to_be_finite_too(tmp_path, part, value):
    bad = dict(zip("qkv", normal(9, Lq=40), strict=True))
    bad[part][1, 2, 3] = value
    observations = [normal(seed, Lq=40) for seed in range(3)]
    calibrator = calibrated(*observations, fp32_sinks=4)
    before = state(calibrator, tmp_path)
    with pytest.raises(ValueError, match=rf"{part}: .* got {value} at \(1, 2, 3\), 1 in all"):
        calibrator.observe("layer", **bad)
    assert state(calibrator, tmp_path) == before
    calibrator = calibrated(*observations, tuple(bad.values()), fp32_sinks=4, nonfinite="ignore")
    assert calibrator.summary()[0][f"{part}_nonfinite"] == 1
    assert sum(map(len, calibrator.tiles("layer"))) == 3
    assert bits(copy_of(calibrator, tmp_path).compute()) == bits(calibrator.compute())


@pytest.mark.filterwarnings("error")
def test_no_step_of_the_search_is_beyond_float32():
    observations = [tuple(x / np.abs(x).max() * np.float32(3.4e38) for x in normal(seed)) for seed in range(2)]
    scales = calibrated(*observations, options={"scale": 1e-38}).compute()["layer"]
    assert all(np.isfinite(clip).all() for clip in clips(scales).values())


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("ladder", [False, True])
def test_scales_of_one_head_without_its_axis_fit_the_calls_that_were_observed(granularity, ladder):
    observations = [tuple(x[0] for x in normal(seed, H=1)) for seed in range(3)]
    calibrator = calibrated(*observations, granularity=granularity, smooth_k=True)
    layer = (calibrator.plan(rel_l1=1.0, worst=10.0) if ladder else calibrator.compute("max"))["layer"]
    assert layer.k_mean is not None
    got = cyflash.flash_attention_int8(*observations[0], quant=layer)
    expected = cyflash.flash_attention_int8(*(x[None] for x in observations[0]), quant=layer)
    assert np.array_equal(got, expected[0])


def test_smooth_k_on_gives_the_mean_of_all_keys_seen_and_the_scale_of_what_remains():
    r = np.random.default_rng(0)
    offset = 20 * r.standard_normal((2, 1, 8)).astype(np.float32)
    observations = [normal(seed, Lk=20 + 31 * seed) for seed in range(3)]
    observations = [(q, k + offset, v) for q, k, v in observations]
    layer = calibrated(*observations, smooth_k=True).compute("max")["layer"]
    keys = np.concatenate([k for _, k, _ in observations], axis=1).astype(np.float64)
    assert layer.k_mean.shape == (2, 1, 8) and layer.k_mean.dtype == np.float32
    np.testing.assert_allclose(layer.k_mean, keys.mean(axis=1, keepdims=True), rtol=1e-6)
    own = [np.abs(k - k.mean(axis=1, keepdims=True, dtype=np.float64)).max() for _, k, _ in observations]
    assert clips(layer)["k"] == pytest.approx(max(own), rel=1e-5)
    off = calibrated(*observations, smooth_k=False).compute("max")["layer"]
    assert off.k_mean is None
    assert clips(off)["k"] == pytest.approx(np.abs(keys).max(), rel=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_k_mean_is_exact_to_the_fixed_point(size):
    seen = [(q, np.float32(size) * (5 + k), v) for q, k, v in map(normal, range(3))]
    layer = calibrated(*seen, smooth_k=True).compute("max")["layer"]
    expected = np.concatenate([k for _, k, _ in seen], axis=1).astype(np.float64).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(layer.k_mean, expected, rtol=1e-6, atol=2**-24)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_smoothed_keys_of_any_size_stay_within_their_scale(size):
    """Where the mean is beyond the fixed point, what is left of the keys is counted all the same."""
    q, k, v = normal(0)
    k = np.float32(size) * (5 + k)
    layer = calibrated((np.float32(1 / size) * q, k, v), smooth_k=True).compute("max")["layer"]
    assert np.isfinite(layer.k_mean).all()
    assert clips(layer)["k"] == pytest.approx(np.abs(k - layer.k_mean).max(), rel=1e-5)


def test_smooth_k_auto_smooths_where_it_pays_only():
    plain = [long_tailed(seed, H=2, Lq=64, D=16) for seed in range(4)]
    offset = np.float32(30)
    biased = [(q, k + offset, v) for q, k, v in plain]
    for method in ("max", "output"):
        assert calibrated(*biased).compute(method)["layer"].k_mean is not None
    scales = calibrated(*plain).compute("output")
    forced = {on: calibrated(*plain, smooth_k=on).compute("output") for on in (True, False)}
    errors = {on: x.about["layer"]["error"]["training"]["rel_l1"] for on, x in forced.items()}
    assert scales.about["layer"]["error"]["training"]["rel_l1"] <= 1.02 * min(errors.values())


def test_compute_says_how_it_came_about():
    observations = [normal(seed, H=4, Hk=2, Lq=20, Lk=30, Dv=5) for seed in range(3)]
    calibrator = calibrated(*observations, granularity="head", fp32_sinks=2, seed=5, options={"causal": True})
    scales = calibrator.compute("percentile", percentile=99.5)
    assert isinstance(scales, Scales)
    expected = {"method": "percentile", "percentile": 99.5, "fp32_sinks": 2, "smooth_k": "auto", "seed": 5}
    assert {name: scales.settings[name] for name in expected} == expected
    assert scales.settings["granularity"] in ("head", ["head"] * 3)
    about = scales.about["layer"]
    assert about.items() >= {"heads": 4, "kv_heads": 2, "head_dim": 8, "v_head_dim": 5, "observations": 3}.items()
    assert about["options"]["causal"] is True
    keys = 3 * 2 * 28  # visible beyond the sinks: all
    assert about["values"] == {"q": 3 * 4 * 20 * 8, "k": keys * 8, "v": keys * 5}
    assert about["tiles"] == {"training": 2, "held_out": 1}
    for part in ("training", "held_out"):
        assert 0 < about["error"][part]["rel_l1"] < 1
    json.dumps([scales.settings, scales.about])
    assert calibrator.compute("output", objective="rmse").settings["objective"] == "rmse"
    assert calibrator.compute().settings["method"] == "output"


def test_layers_and_summary(tmp_path):
    calibrator = Calibrator()
    assert calibrator.layers == () and calibrator.summary() == []
    for name, n in (("layer10", 1), ("layer2", 3), ("a", 2)):
        for seed in range(n):
            calibrator.observe(name, *normal(seed))
    assert calibrator.layers == ("a", "layer2", "layer10")
    summary = calibrator.summary()
    assert all(isinstance(row, dict) for row in summary)
    for row, name, n in zip(summary, calibrator.layers, (2, 3, 1), strict=True):
        values = list(_leaves(row))
        assert name in values and n in values
    json.dumps(summary)
    assert list(calibrator.compute("max")) == ["a", "layer2", "layer10"]


def _leaves(x):
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list | tuple):
        for item in x:
            yield from _leaves(item)
    else:
        yield x


def test_progress_is_told_after_each_layer():
    calibrator = Calibrator()
    for name in ("b10", "b9"):
        for seed in range(2):
            calibrator.observe(name, *normal(seed))
    for call, arguments in ((calibrator.compute, {}), (calibrator.plan, {"rel_l1": 0.5, "worst": 5.0})):
        told = []
        call(progress=told.append, **arguments)
        assert told == ["b9", "b10"]


# NaN, infinity, zeros


@pytest.mark.parametrize("part", "qkv")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, "zeros"])
def test_raise_names_what_is_wrong_and_changes_nothing(tmp_path, part, value):
    calibrator = calibrated(normal(0), normal(1), name="blocks.3")
    saved = state(calibrator, tmp_path)
    arrays = dict(zip("qkv", normal(2), strict=True))
    if value == "zeros":
        arrays[part][...] = 0
        words = ["blocks.3", f"{part}:", "ignore"]
    else:
        arrays[part][1, 7, 3] = value
        words = ["blocks.3", f"{part}:", "(1, 7, 3)", str(value), "ignore"]
    with pytest.raises(ValueError) as error:
        calibrator.observe("blocks.3", **arrays)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert state(calibrator, tmp_path) == saved
    with pytest.raises(ValueError):
        calibrator.observe("new", **arrays)
    assert state(calibrator, tmp_path) == saved


def test_a_batch_with_one_bad_sequence_changes_nothing(tmp_path):
    calibrator = calibrated(normal(0))
    saved = state(calibrator, tmp_path)
    q, k, v = normal(1, B=3)
    v[2, 1, 3, 5] = np.nan
    with pytest.raises(ValueError, match=r"v.*\(2, 1, 3, 5\)"):
        calibrator.observe("layer", q, k, v)
    assert state(calibrator, tmp_path) == saved


def test_ignore_counts_what_is_not_finite_and_uses_the_rest(tmp_path):
    clean = [normal(seed) for seed in range(3)]
    q, k, v = normal(3)
    v.ravel()[3:40] = np.nan
    v.ravel()[50:61] = np.inf
    zeroed = np.where(np.isfinite(v), v, 0)
    calibrator = calibrated(*clean, (q, k, v), nonfinite="ignore", smooth_k=False)
    expected = calibrated(*clean, (q, k, zeroed), nonfinite="ignore", smooth_k=False)
    got, want = (c.histogram("layer", "v") for c in (calibrator, expected))
    above_zero = want.edges[:-1] > 0
    np.testing.assert_array_equal(got.counts[above_zero], want.counts[above_zero])
    assert got.count == 4 * v.size - 37 - 11
    for method in ("max", "mse", "octav"):
        assert bits(calibrator.compute(method)) == bits(expected.compute(method))
    (row,) = calibrator.summary()
    counted = list(_leaves(row))
    assert {37, 11} <= set(counted) or 48 in counted
    again = joined([calibrated((q, k, v), nonfinite="ignore", smooth_k=False),
                    calibrated(*clean[::-1], nonfinite="ignore", smooth_k=False)])
    assert state(again, tmp_path) == state(calibrator, tmp_path)
    output = calibrator.compute()
    assert np.isfinite(output.about["layer"]["error"]["held_out"]["rel_l1"])


@pytest.mark.parametrize("part", "qkv")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_ignore_with_smoothed_keys(part, value):
    arrays = dict(zip("qkv", normal(3), strict=True))
    arrays[part][0, 2] = value
    calibrator = calibrated(normal(0), normal(1), nonfinite="ignore", smooth_k=True)
    calibrator.observe("layer", **arrays)
    for method in METHODS:
        layer = calibrator.compute(method)["layer"]
        assert np.isfinite(layer.k_mean).all()
        assert all(0 < clip < 10 for clip in clips(layer).values())


def test_ignore_counts_tensors_of_zeros():
    q, k, v = normal(3)
    calibrator = calibrated(normal(0), normal(1), nonfinite="ignore")
    before = calibrator.summary()
    expected = {part: calibrator.histogram("layer", part).counts for part in "kv"}
    calibrator.observe("layer", q, k, np.zeros_like(v))
    assert calibrator.summary() != before
    np.testing.assert_array_equal(calibrator.histogram("layer", "v").counts, expected["v"])
    assert (clips(calibrator.compute("percentile", percentile=50.0)["layer"])["v"]) > 0.1


def test_only_zeros_give_no_scale_of_zero():
    q, k, v = normal(3)
    calibrator = calibrated((q, k, np.zeros_like(v)), nonfinite="ignore")
    try:
        layer = calibrator.compute("max")["layer"]
    except ValueError as error:
        assert "layer" in str(error) and "v" in str(error)
    else:
        assert np.isfinite(layer.v_scale) and layer.v_scale >= calibrating.SMALLEST_SCALE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", "qkv")
def test_a_head_of_zeros_among_others(method, part):
    observations = []
    for seed in range(2):
        arrays = dict(zip("qkv", normal(seed, H=3), strict=True))
        arrays[part][1] = 0
        observations.append(tuple(arrays.values()))
    layer = calibrated(*observations, granularity="head", smooth_k=False).compute(method)["layer"]
    for name in calibrating.SCALES:
        scale = getattr(layer, name)
        assert np.isfinite(scale).all() and (scale >= calibrating.SMALLEST_SCALE).all()
    assert np.isfinite(cyflash.flash_attention_int8(*observations[0], quant=layer)).all()


# Files


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_calibrator_goes_on_where_its_file_stopped(tmp_path, granularity):
    arguments = {"granularity": granularity, "smooth_k": True, "fp32_sinks": 2, "seed": 3, "reservoir_mb": 2}
    whole = observing([0, 1, 2, 3], **arguments)
    loaded = Calibrator.load(observing([0, 1], **arguments).save(tmp_path / "first.safetensors"))
    for i in (2, 3):
        qkv, options = OBSERVATIONS[i]
        for name in ("a", "b")[: 1 + i % 2]:
            loaded.observe(name, *qkv, **options)
    assert state(loaded, tmp_path) == state(whole, tmp_path)
    assert loaded.summary() == whole.summary()
    for method in ("octav", "output"):
        assert bits(loaded.compute(method)) == bits(whole.compute(method))
    assert loaded.merge(observing([4], **arguments)).compute("max")["a"] is not None


def test_what_was_left_out_is_in_the_file(tmp_path):
    q, k, v = normal(0)
    calibrator = Calibrator(nonfinite="ignore")
    q[0, 0, 0], k[0, 0, :2] = np.nan, np.inf
    calibrator.observe("a", q, k, np.zeros_like(v))
    calibrator.observe("a", *normal(1))
    (row,) = calibrator.summary()
    assert (row["q_nonfinite"], row["k_nonfinite"], row["v_all_zero"]) == (1, 2, 1)
    assert copy_of(calibrator, tmp_path).summary() == [row]


@pytest.mark.parametrize("method", METHODS)
def test_a_file_alone_gives_the_same_scales(tmp_path, method):
    calibrator = calibrated(*(long_tailed(seed, H=4, Hk=2) for seed in range(3)), options={
        "window": (9, 0), "softcap": 5.0, "scale": 0.5, "causal": True, "causal_align": "top-left",
        "alibi_slopes": np.linspace(0, 0.2, 4, dtype=np.float32), "sinks": np.arange(4, dtype=np.float32),
        "mask": np.random.default_rng(0).random((4, 24, 24)) < 0.9,
        "bias": np.random.default_rng(1).standard_normal((24, 24), dtype=np.float32),
    })  # fmt: skip
    scales, again = (c.compute(method) for c in (calibrator, copy_of(calibrator, tmp_path)))
    assert bits(scales) == bits(again)
    assert scales.about == again.about and scales.settings == again.settings


def test_an_empty_calibrator_can_be_saved_and_merged(tmp_path):
    empty = Calibrator.load(Calibrator(fp32_sinks=3).save(tmp_path / "empty.safetensors"))
    assert empty.layers == ()
    full = observing([0, 1], fp32_sinks=3)
    saved = state(full, tmp_path)
    assert state(full.merge(empty), tmp_path) == saved
    assert state(empty.merge(full), tmp_path) == saved


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    return observing([0, 1, 2]).save(tmp_path_factory.mktemp("artefact") / "state.safetensors")


def test_a_truncated_file_is_refused(tmp_path, artefact):
    whole = artefact.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut\.safetensors"):
            Calibrator.load(path)


def rewritten(artefact, path, change_tensors=None, change_metadata=None):
    with safetensors.safe_open(artefact, "numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change_tensors:
        change_tensors(tensors)
    if change_metadata:
        change_metadata(metadata)
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    return path


def _newer(metadata):
    found = 0
    for name, text in metadata.items():
        if name == "schema":
            metadata[name], found = "1000", found + 1
        elif text.startswith("{"):
            inner = json.loads(text)
            if "schema" in inner:
                metadata[name], found = json.dumps(inner | {"schema": 1000}), found + 1
    assert found == 1


def test_a_file_of_a_newer_version_is_refused(tmp_path, artefact):
    path = rewritten(artefact, tmp_path / "new.safetensors", change_metadata=_newer)
    with pytest.raises(ValueError, match=r"new\.safetensors.*1000"):
        Calibrator.load(path)


def test_a_bit_that_flipped_is_noticed(tmp_path, artefact):
    path, data, r = tmp_path / "damaged.safetensors", artefact.read_bytes(), np.random.default_rng(0)
    for place in r.integers(len(data), size=60):
        damaged = bytearray(data)
        damaged[place] ^= 1 << r.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged\.safetensors: "):
            Calibrator.load(path)


def test_a_file_rewritten_unchanged_is_read(tmp_path, artefact):
    path = rewritten(artefact, tmp_path / "same.safetensors")
    assert state(Calibrator.load(path), tmp_path) == state(Calibrator.load(artefact), tmp_path)


def test_a_damaged_file_is_refused(tmp_path, artefact):
    whole = artefact.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for place in np.linspace(begin, len(whole) - 1, 12).astype(int):
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged\.safetensors: "):
            Calibrator.load(path)


def test_a_file_without_one_of_its_tensors_is_refused(tmp_path, artefact):
    with safetensors.safe_open(artefact, "numpy") as file:
        names = list(file.keys())
    for name in names[:: max(1, len(names) // 12)]:
        path = rewritten(artefact, tmp_path / "less.safetensors", lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(ValueError, match=r"less\.safetensors"):
            Calibrator.load(path)


def test_a_file_with_a_tensor_of_another_shape_is_refused(tmp_path, artefact):
    with safetensors.safe_open(artefact, "numpy") as file:
        names = [name for name in file.keys() if file.get_tensor(name).size > 1]  # noqa: SIM118
    for name in names[:: max(1, len(names) // 12)]:
        def shorten(tensors, name=name):
            tensors[name] = tensors[name].ravel()[:-1].copy()

        path = rewritten(artefact, tmp_path / "short.safetensors", shorten)
        with pytest.raises(ValueError, match=r"short\.safetensors"):
            Calibrator.load(path)


def test_other_files_are_refused(tmp_path, artefact):
    def no_json(metadata):
        for name, text in metadata.items():
            if text.startswith("{"):
                metadata[name] = text[:-5]

    with pytest.raises(ValueError, match="bad"):
        Calibrator.load(rewritten(artefact, tmp_path / "bad.safetensors", change_metadata=no_json))
    capture = cyflash.capture.save_capture(tmp_path / "capture.safetensors", normal())
    with pytest.raises(ValueError, match=r"capture\.safetensors"):
        Calibrator.load(capture)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        Calibrator.load(tmp_path / "none.safetensors")
    for call in (Calibrator.load, Calibrator().save):
        with pytest.raises(ValueError, match=r"\.npz.*\.safetensors"):
            call(tmp_path / "x.npz")
    scales = Calibrator.load(artefact).compute("max").save(tmp_path / "scales.safetensors")
    with pytest.raises(ValueError, match=r"scales\.safetensors"):
        Calibrator.load(scales)
    with pytest.raises(ValueError, match=r"state\.safetensors"):
        Scales.load(artefact)


def test_a_file_that_exists_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.safetensors"
    first = Calibrator().save(path).read_bytes()
    assert observing([0]).save(path) == path
    assert path.read_bytes() != first
    with pytest.raises(OSError):
        observing([0]).save(tmp_path / "no such folder" / "x.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


# Bad input

SIZES = {"H": 4, "Hk": 2, "Lq": 10, "Lk": 12, "D": 8, "Dv": 6}
OPTIONS = {"causal": True, "window": (8, -1), "softcap": 3.0, "scale": 0.3, "causal_align": "top-left",
           "alibi_slopes": np.full(4, 0.1, np.float32), "sinks": np.ones(4, np.float32)}  # fmt: skip
CHANGED = {
    "number of heads": ({"H": 2}, {"alibi_slopes": np.full(2, 0.1), "sinks": np.ones(2)}, ["head", "4", "2"]),
    "number of kv heads": ({"Hk": 4}, {}, ["head", "2", "4"]),
    "head_dim": ({"D": 16}, {}, ["head_dim", "8", "16"]),
    "head_dim of v": ({"Dv": 8}, {}, ["6", "8"]),
    "causal": ({}, {"causal": False}, ["causal", "True", "False"]),
    "causal_align": ({}, {"causal_align": "bottom-right"}, ["causal_align", "top-left", "bottom-right"]),
    "window": ({}, {"window": (9, -1)}, ["window", "8", "9"]),
    "softcap": ({}, {"softcap": 0.0}, ["softcap", "3.0"]),
    "scale": ({}, {"scale": None}, ["scale", "0.3"]),
    "alibi_slopes": ({}, {"alibi_slopes": np.full(4, 0.2)}, ["alibi_slopes"]),
    "no sinks": ({}, {"sinks": None}, ["sinks"]),
}


def with_options(**changes):
    options = OPTIONS | changes
    return {name: np.float32(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


@pytest.mark.parametrize("change", CHANGED)
def test_what_changes_within_a_layer_is_refused(tmp_path, change):
    sizes, options, words = CHANGED[change]
    calibrator = calibrated(normal(0, **SIZES), name="enc.5", options=with_options())
    saved = state(calibrator, tmp_path)
    other = normal(1, **(SIZES | sizes)), with_options(**options)
    with pytest.raises(ValueError) as error:
        calibrator.observe("enc.5", *other[0], **other[1])
    assert all(word in str(error.value) for word in ("enc.5", *words)), str(error.value)
    assert state(calibrator, tmp_path) == saved
    with pytest.raises(ValueError, match=r"enc\.5"):
        calibrator.merge(calibrated(other[0], name="enc.5", options=other[1]))
    assert state(calibrator, tmp_path) == saved
    calibrator.observe("enc.6", *other[0], **other[1])  # another layer may differ
    assert calibrator.layers == ("enc.5", "enc.6")


def test_the_same_options_written_otherwise_are_the_same():
    calibrator = calibrated(normal(0, **SIZES), options=with_options())
    same = with_options(alibi_slopes=[np.float32(0.1)] * 4, window=[8, -1], causal=np.True_, sinks=[1.0] * 4)
    calibrator.observe("layer", *normal(1, **SIZES), **same)


def test_lengths_masks_and_biases_may_change():
    calibrator = Calibrator()
    calibrator.observe("layer", *normal(0, Lq=10, Lk=12), mask=np.ones((10, 12), bool))
    calibrator.observe("layer", *normal(1, Lq=1, Lk=30), bias=np.zeros((1, 30), np.float32))
    calibrator.observe("layer", *normal(2, Lq=1, Lk=1))
    assert calibrator.compute()["layer"]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": [[1.0]]}, TypeError, ["q"]),
        ({"k": np.ones((2, 12, 8))}, TypeError, ["k", "float32", "float64"]),
        ({"v": np.ones((2, 12, 6), np.int8)}, TypeError, ["v", "int8"]),
        ({"k": np.ones((2, 12, 4), np.float32)}, ValueError, ["k", "(2, 12, 4)"]),
        ({"v": np.ones((2, 11, 6), np.float32)}, ValueError, ["v", "(2, 11, 6)"]),
        ({"k": np.ones((3, 12, 8), np.float32), "v": np.ones((3, 12, 6), np.float32)}, ValueError, ["k", "3"]),
        ({"window": (-2, 0)}, ValueError, ["window"]),
        ({"softcap": -1.0}, ValueError, ["softcap"]),
        ({"causal_align": "left"}, ValueError, ["causal_align", "left"]),
        ({"mask": np.ones(12, np.float32)}, TypeError, ["mask", "bias"]),
        ({"mask": np.ones(11, bool)}, ValueError, ["mask", "(11,)"]),
        ({"bias": np.ones((3, 3), np.float32)}, ValueError, ["bias", "(3, 3)"]),
        ({"alibi_slopes": np.ones(3, np.float32)}, ValueError, ["alibi_slopes"]),
        ({"sinks": np.ones(3, np.float32)}, ValueError, ["sinks"]),
        ({"name": 3}, (TypeError, ValueError), ["name", "3"]),
        ({"name": ""}, ValueError, ["name"]),
        ({"name": "a\nb"}, ValueError, ["name", "printable"]),
        ({"granularity": "head"}, TypeError, ["granularity"]),
    ],
)
def test_bad_arguments_of_observe(tmp_path, change, error, words):
    calibrator = Calibrator()
    arguments = {"name": "layer", **dict(zip("qkv", normal(0, **SIZES), strict=True))} | change
    saved = state(calibrator, tmp_path)
    with pytest.raises(error) as caught:
        calibrator.observe(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert state(calibrator, tmp_path) == saved


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"granularity": "token"}, "'token'"),
        ({"granularity": None}, "None"),
        ({"fp32_sinks": -1}, "-1"),
        ({"fp32_sinks": 1.5}, "1.5"),
        ({"smooth_k": "yes"}, "'yes'"),
        ({"reservoir_mb": -1}, "-1"),
        ({"reservoir_mb": 0}, "0"),
        ({"reservoir_mb": math.nan}, "nan"),
        ({"nonfinite": "drop"}, "'drop'"),
        ({"seed": "a"}, "'a'"),
    ],
)
def test_bad_settings(settings, word):
    (name,) = settings
    with pytest.raises((TypeError, ValueError)) as error:
        Calibrator(**settings)
    assert name in str(error.value) and word in str(error.value)


def test_an_empty_calibrator_has_nothing_to_compute():
    for call in (Calibrator().compute, Calibrator().plan, lambda: Calibrator().compute("max")):
        with pytest.raises(ValueError, match="observe"):
            call()


def test_output_needs_two_different_observations():
    one, same = calibrated(normal(0), name="enc.1"), calibrated(normal(0), normal(0), name="enc.1")
    for calibrator in (one, same):
        with pytest.raises(ValueError, match=r"enc\.1.*two"):
            calibrator.compute()
        with pytest.raises(ValueError, match=r"enc\.1.*two"):
            calibrator.plan()
        assert calibrator.compute("max")["enc.1"].q_scale > 0
    assert calibrated(normal(0), normal(1)).compute()["layer"].q_scale > 0


def test_a_reservoir_of_nothing_leaves_the_other_methods(tmp_path):
    calibrator = calibrated(normal(0), normal(1), reservoir_mb=1e-4)  # no tile fits
    assert calibrator.tiles("layer") == ([], [])
    assert calibrator.compute("max").about["layer"]["error"] in (None, {"training": None, "held_out": None})
    with pytest.raises(ValueError, match="reservoir_mb"):
        calibrator.compute()


@pytest.mark.parametrize(
    "name", ["layer\u00b2", "1\u00b2", "\u0663", "9" * 5000, "a/tile/x/q", "a.parts.0", "__metadata__"]
)
def test_names_of_any_kind(tmp_path, name):
    calibrator = calibrated(normal(0), normal(1), name=name)
    calibrator.observe("a", *normal(2))
    assert set(copy_of(calibrator, tmp_path).layers) == {name, "a"}
    scales = calibrator.compute("max")
    assert Scales.load(scales.save(tmp_path / "s.safetensors")) == scales


@pytest.mark.parametrize("name", ["a\n", "\0", "\u3000", "\ud800"])
def test_names_that_scales_cannot_have_are_refused_at_once(name):
    calibrator = Calibrator()
    with pytest.raises(ValueError, match="name: expected the name of a layer, printable"):
        calibrator.observe(name, *normal(0))
    assert calibrator.layers == ()


def test_unknown_layers_are_named_beside_those_there_are():
    calibrator = calibrated(normal(0), normal(1), name="enc.1")
    for call in (calibrator.tiles, lambda name: calibrator.histogram(name, "q"), calibrator.compute("max").__getitem__):
        with pytest.raises((KeyError, ValueError)) as error:
            call("enc.2")
        assert "enc.2" in str(error.value) and "enc.1" in str(error.value)
    for part, head in (("p", None), ("q", 2), ("q", -1), ("q", "a")):
        with pytest.raises(ValueError, match="part: " if part == "p" else "head: "):
            calibrator.histogram("enc.1", part, head=head)


@pytest.mark.parametrize(
    "settings",
    [{"granularity": "head"}, {"fp32_sinks": 1}, {"smooth_k": True}, {"seed": 1}, {"nonfinite": "ignore"},
     {"reservoir_mb": 1}],
)  # fmt: skip
def test_calibrators_with_other_settings_do_not_merge(tmp_path, settings):
    (name,) = settings
    calibrator = calibrated(normal(0))
    saved = state(calibrator, tmp_path)
    with pytest.raises(ValueError, match=name):
        calibrator.merge(calibrated(normal(1), **settings))
    with pytest.raises(TypeError, match="Calibrator"):
        calibrator.merge({})
    assert state(calibrator, tmp_path) == saved


def test_merging_leaves_the_other_as_it_was(tmp_path):
    one, other = calibrated(normal(0)), calibrated(normal(1), long_tailed(2))
    saved, scales = state(other, tmp_path), bits(other.compute())
    one.merge(other)
    one.observe("layer", *normal(3))
    assert state(other, tmp_path) == saved and bits(other.compute()) == scales


# Memory


def test_memory_of_32_layers_of_32_heads():
    """Statistics alone: the tiles are limited by reservoir_mb."""
    qkv = [normal(seed, H=32, Lq=4, D=128) for seed in range(2)]
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        calibrator = Calibrator("head")
        for layer in range(32):
            for x in qkv:
                calibrator.observe(f"layer{layer}", *x)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    tiles = sum(
        x.nbytes for name in calibrator.layers for tile in itertools.chain(*calibrator.tiles(name)) for x in tile[:3]
    )
    assert tiles > 0
    assert held - tiles < 128e6, f"{(held - tiles) / 1e6:.0f} MB"


def test_the_reservoir_keeps_to_its_size_and_long_observations_still_have_tiles():
    calibrator = calibrated(*(normal(seed, H=2, Lq=3000, D=64) for seed in range(2)), reservoir_mb=4)  # 4.4 MB each
    training, held_out = calibrator.tiles("layer")
    assert sum(x.nbytes for tile in (*training, *held_out) for x in tile[:3]) <= 4 * 2**20
    assert training and held_out


def test_keys_that_are_quantised_in_the_call_cannot_do_without_smoothing():
    with pytest.raises(ValueError, match=r"^smooth_k: a k with granularity 'token' is smoothed in the call"):
        Calibrator(("head", "token", "head"), smooth_k=False)
    for smooth_k in ("auto", True):
        assert Calibrator(("head", "token", "head"), smooth_k=smooth_k).smooth_k == smooth_k
