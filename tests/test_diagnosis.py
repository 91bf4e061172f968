"""Where the error of a layer comes from: planted causes are found, every number is what a direct computation gives."""

import doctest
import json

import numpy as np
import pytest

from cyflash import flash_attention_int8, reference
from cyflash.quant import LayerScales, compare, quantize
from cyflash.quant import diagnosis as d
from cyflash.quant.tiles import Tile


def tile(H=2, Hk=2, R=40, T=70, D=16, seed=0, **options):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for shape in ((H, R, D), (Hk, T, D), (Hk, T, D)))
    return Tile(q, k, v, options)


def maxima(tiles, **fields):
    """Per-tensor scales that saturate nothing."""
    scales = {f"{name}_scale": max(float(np.abs(getattr(x, name)).max()) for x in tiles) / 127 for name in "qkv"}
    return LayerScales(**scales | fields)


def causes(tiles, layer):
    return [head["cause"] for head in d.diagnose(tiles, layer)["heads"]]


# Planted causes


@pytest.mark.parametrize(("operand", "cause"), [("q", "qk"), ("k", "qk"), ("v", "v")])
@pytest.mark.parametrize("factor", [20, 1 / 20])  # too coarse, and saturating
def test_a_bad_scale_is_found(operand, cause, factor):
    tiles = [tile(), tile(seed=1)]
    good = maxima(tiles)
    scales = {f"{name}_scale": float(getattr(good, f"{name}_scale")) for name in "qkv"}
    scales[f"{operand}_scale"] *= factor
    heads = d.diagnose(tiles, LayerScales(**scales))["heads"]
    for head in heads:
        assert head["cause"] == cause
        others = [head[name] for name in d.CAUSES if name != cause]
        assert head[cause] > 4 * max(others)
        assert 0.5 * head[cause] < head["rel_l1"] < 1.5 * head[cause]
        assert (head["saturated"][operand] > 0.2) == (factor < 1)


def test_weights_that_round_to_nothing_are_found():
    """One key takes nearly all of the weight and has no value: what the others bring is lost when P is rounded. A scale
    per token of V would save it: it is part of what is rounded."""
    x = tile(T=64)
    q, k, v = np.zeros_like(x.q), np.zeros_like(x.k), x.v.copy()
    q[..., 0], k[:, 0, 0], v[:, 0] = 1, 6.5, 0
    tiles = [Tile(q, k, v, {"scale": 1.0})]
    assert max(head["p"] for head in d.diagnose(tiles, LayerScales())["heads"]) < 0.01
    for head in d.diagnose(tiles, LayerScales(v_scale=float(np.abs(v).max()) / 127))["heads"]:
        assert head["cause"] == "p"
        assert head["p"] > 0.5
        assert head["qk"] < 1e-5


def test_only_the_head_with_the_bad_scale_is_blamed():
    tiles = [tile(H=4, Hk=2)]
    good = maxima(tiles)
    q_scale = np.full((4, 1, 1), good.q_scale)
    v_scale = np.full((2, 1, 1), good.v_scale)
    q_scale[2], v_scale[0] = 30 * q_scale[2], 30 * v_scale[0]
    got = d.diagnose(tiles, LayerScales(q_scale, good.k_scale, v_scale))["heads"]
    assert [head["cause"] for head in got[:3]] == ["v", "v", "qk"]
    assert [head["kv_head"] for head in got] == [0, 0, 1, 1]
    assert max(got[3][name] for name in d.CAUSES) < 0.05


# Definitions


@pytest.mark.parametrize(
    "fields", [{}, {"fp32_sinks": 3}, {"k_mean": np.full((2, 1, 16), 0.3, np.float32)}, {"v_scale": None}]
)
@pytest.mark.parametrize("options", [{}, {"causal": True, "scale": 0.7}])
def test_the_split_against_a_direct_computation(fields, options):
    tiles = [tile(H=4, **options), tile(H=4, seed=1, R=31, T=64, **options)]
    layer = maxima(tiles, **fields)
    got = d.diagnose(tiles, layer)["heads"]
    errors = {cause: np.zeros(4) for cause in d.CAUSES}
    size = np.zeros(4)
    for x in tiles:
        exact = reference.attention(x.q, x.k, x.v, **options)
        n, mean = layer.fp32_sinks, 0 if layer.k_mean is None else layer.k_mean
        q = quantize(x.q, scale=layer.q_scale).dequantize()
        k = quantize(x.k - mean, scale=layer.k_scale).dequantize() + mean
        k[:, :n] = x.k[:, :n]
        by_scale = {} if layer.v_scale is None else {"scale": layer.v_scale}
        v = quantize(x.v, "tensor" if by_scale else "token", **by_scale, fp32_sinks=n)
        qk = reference.attention(q, k, x.v, **options)
        if n:  # the float q meets the float keys: compare only what the integers make of it
            qk = reference.attention_int8(x.q, x.k, x.v, quant=scores_only(layer), **options)
        p = reference.attention_int8(x.q, x.k, v, quant=scores_only(layer, pv="int8"), **options)
        p -= reference.attention_int8(x.q, x.k, v, quant=scores_only(layer), **options)
        differences = {"qk": qk - exact, "p": p, "v": reference.attention(x.q, x.k, v.dequantize(), **options) - exact}
        for cause, difference in differences.items():
            errors[cause] += np.abs(difference).sum(axis=(1, 2))
        size += np.abs(exact).sum(axis=(1, 2))
    for cause in d.CAUSES:
        assert [head[cause] for head in got] == pytest.approx(errors[cause] / size, rel=2e-3), cause


def scores_only(layer, pv="fp32"):
    return LayerScales(
        layer.q_scale, layer.k_scale, None, k_mean=layer.k_mean, fp32_sinks=layer.fp32_sinks, pv=pv
    )  # fmt: skip


def test_the_errors_are_those_of_compare():
    x = tile(causal=True)
    layer = maxima([x])
    output = flash_attention_int8(x.q, x.k, x.v, causal=True, quant=layer)
    exact = reference.attention(x.q, x.k, x.v, causal=True)
    got = d.diagnose([x], layer)
    assert got["error"] == compare(output, exact)._asdict()
    for n, head in enumerate(got["heads"]):
        assert head["head"] == n
        expected = compare(output[n], exact[n])._asdict()
        assert {name: head[name] for name in ("rel_l1", "cosine", "rmse", "max_abs", "worst_row")} == {
            name: expected[name] for name in ("rel_l1", "cosine", "rmse", "max_abs", "worst_row")
        }


def test_tiles_are_pooled():
    tiles = [tile(), tile(seed=1, R=11)]
    layer = maxima(tiles)
    pooled = d.diagnose(tiles, layer)["heads"]
    alone = [d.diagnose([x], layer)["heads"] for x in tiles]
    sizes = [np.abs(x).sum(axis=(1, 2)) for x in d.exact_outputs(tiles)]
    for n, head in enumerate(pooled):
        for name in ("rel_l1", *d.CAUSES):
            weighted = sum(own[n][name] * size[n] for own, size in zip(alone, sizes, strict=True))
            assert head[name] == pytest.approx(weighted / sum(size[n] for size in sizes))
        assert head["worst_row"] == max(own[n]["worst_row"] for own in alone)
        assert head["max_abs"] == max(own[n]["max_abs"] for own in alone)


def test_parts_that_are_not_rounded_have_no_blame():
    tiles = [tile()]
    layer = maxima(tiles)
    exact_v = d.diagnose(tiles, scores_only(layer))["heads"]
    assert all(head["p"] == head["v"] == 0.0 < head["qk"] for head in exact_v)
    bf16 = d.diagnose(tiles, scores_only(layer, pv="bf16"))["heads"]
    assert all(head["v"] == 0.0 < head["p"] < 0.01 for head in bf16)
    assert all(head["saturated"]["v"] is None for head in bf16)


def test_saturated_shares_are_counted_per_head():
    tiles = [tile(H=4), tile(H=4, seed=1)]
    mean = np.full((2, 1, 16), 0.5, np.float32)
    layer = LayerScales(0.01, np.array([0.01, 0.02])[:, None, None], 0.005, k_mean=mean, fp32_sinks=2)
    got = d.diagnose(tiles, layer)["heads"]
    for n, head in enumerate(got):
        q = np.concatenate([x.q[n] for x in tiles])
        k = np.concatenate([(x.k - mean)[n // 2, 2:] for x in tiles])
        v = np.concatenate([x.v[n // 2, 2:] for x in tiles])
        assert head["saturated"] == {
            "q": np.mean(np.abs(q) > 127.5 * np.float32(0.01)),
            "k": np.mean(np.abs(k) > 127.5 * layer.k_scale[n // 2]),
            "v": np.mean(np.abs(v) > 127.5 * np.float32(0.005)),
        }


# Planned layers


def test_a_planned_layer_is_its_parts():
    rng = np.random.default_rng(5)
    options = {
        "causal": True, "alibi_slopes": np.linspace(0.1, 0.4, 6, dtype=np.float32),
        "sinks": np.linspace(-1, 1, 6, dtype=np.float32), "bias": rng.standard_normal((6, 40, 70), dtype=np.float32),
        "mask": rng.random((1, 40, 70)) < 0.9,
    }  # fmt: skip
    x = tile(H=6, Hk=3, **options)
    first, second = maxima([x]), LayerScales(np.full((2, 1, 1), 0.2, np.float32), 0.1, 0.1, pv="bf16")
    planned = LayerScales(parts=(((0,), first), ((1,), second), ((2,), None)))
    got = d.diagnose([x], planned)
    output = flash_attention_int8(x.q, x.k, x.v, quant=planned, **options)
    exact = reference.attention(x.q, x.k, x.v, **options)
    assert got["error"] == compare(output, exact)._asdict()
    whole = {0: d.diagnose([x], first)["heads"], 1: d.diagnose([x], LayerScales(0.2, 0.1, 0.1, pv="bf16"))["heads"]}
    for n, head in enumerate(got["heads"][:4]):
        assert head == whole[n // 2][n]
    for head in got["heads"][4:]:
        assert head["cause"] is None
        assert head["qk"] == head["p"] == head["v"] == 0.0 < head["rel_l1"] < 1e-6
        assert head["saturated"] == {"q": None, "k": None, "v": None}


# What else could be done


def test_every_rung_is_there_and_those_without_an_effect_are_the_layer_itself():
    tiles = [tile()]
    layer = maxima(tiles, k_mean=np.zeros((2, 1, 16), np.float32), fp32_sinks=4)
    rungs = d.alternatives(layer, tiles)
    assert list(rungs) == list(d.RUNGS)
    assert [name for name, x in rungs.items() if x is layer] == ["as it is", "smooth-K", "fp32 sinks"]
    assert rungs["fp32"] is None
    assert rungs["V per token"].v_scale is None and rungs["V per token"].q_scale == layer.q_scale
    assert rungs["bf16 PV"].pv == "bf16"


def test_rungs_have_scales_for_what_is_left():
    training = [tile(), tile(seed=1)]
    for x in training:
        x.k[:, :4] *= 50  # sinks
        x.k[:, 4:] += 3  # a common part
        x.v[:, :4] *= 20
    layer = maxima(training)
    rungs = d.alternatives(layer, training)
    mean = np.concatenate([x.k for x in training], axis=1).mean(axis=1, keepdims=True)
    smooth, sinks, both = (rungs[name] for name in ("smooth-K", "fp32 sinks", "all three"))
    np.testing.assert_allclose(smooth.k_mean, mean, rtol=1e-5)
    assert smooth.k_scale == pytest.approx(max(np.abs(x.k - mean).max() for x in training) / 127, rel=1e-5)
    assert smooth.v_scale == layer.v_scale
    assert sinks.fp32_sinks == both.fp32_sinks == 4
    assert sinks.k_scale == pytest.approx(max(np.abs(x.k[:, 4:]).max() for x in training) / 127, rel=1e-6)
    assert sinks.v_scale == pytest.approx(max(np.abs(x.v[:, 4:]).max() for x in training) / 127, rel=1e-6)
    assert both.k_scale == pytest.approx(max(np.abs((x.k - mean)[:, 4:]).max() for x in training) / 127, rel=1e-5)
    assert both.v_scale is None and both.q_scale == layer.q_scale


def test_scales_by_head_stay_so():
    tiles = [tile(Hk=2)]
    tiles[0].k[1] *= 8
    layer = LayerScales(0.03, np.array([0.03, 0.24], np.float32)[:, None, None], 0.03)
    scale = d.alternatives(layer, tiles)["smooth-K"].k_scale
    assert scale.shape == (2, 1, 1)
    assert 6 < scale[1] / scale[0] < 10


def test_a_planned_layer_gets_rungs_for_all_of_its_heads():
    tiles = [tile(H=4)]
    planned = LayerScales(parts=(((0,), maxima(tiles)), ((1,), None)))
    rungs = d.alternatives(planned, tiles)
    assert rungs["as it is"] is planned
    assert rungs["smooth-K"].q_scale.shape == (4, 1, 1)
    rows = d.measure(tiles, rungs, rounds=1, seconds=0)
    assert all(len(row["heads"]) == 4 for row in rows)


def test_measured_rungs_and_the_cheapest_good_one():
    tiles = [tile(R=64, T=64)]
    tiles[0].k[:, :] += np.float32(20) * np.sign(tiles[0].k[:, :1])  # only smooth-K helps
    layer = maxima(tiles)
    rows = d.measure(tiles, d.alternatives(layer, tiles), rounds=1, seconds=0)
    by_name = {row["rung"]: row for row in rows}
    assert [row["rung"] for row in rows] == list(d.RUNGS)
    assert by_name["as it is"]["error"] == d.diagnose(tiles, layer)["error"]
    assert by_name["smooth-K"]["error"]["rel_l1"] < 0.3 * by_name["as it is"]["error"]["rel_l1"]
    assert by_name["fp32"]["error"]["rel_l1"] < 1e-5 and by_name["fp32"]["time"] == 1.0
    for row in rows:
        assert row["seconds"] > 0 and row["time"] == row["seconds"] / by_name["fp32"]["seconds"]
        assert max(head["rel_l1"] for head in row["heads"]) == row["error"]["worst_head"]
    limit = 1.01 * by_name["smooth-K"]["heads"][0]["rel_l1"]
    good = [row for row in rows if row["heads"][0]["rel_l1"] <= limit]
    assert d.cheapest_under(rows, 0, limit) is min(good, key=lambda row: row["seconds"])
    assert d.cheapest_under(rows[:1], 0, limit) is None
    json.dumps([rows, d.diagnose(tiles, layer)], allow_nan=False)


def test_a_layer_without_tiles_is_refused():
    for call in (lambda: d.diagnose([], LayerScales()), lambda: d.alternatives(LayerScales(), [])):
        with pytest.raises(ValueError, match="tiles: expected at least one"):
            call()
    with pytest.raises(ValueError, match="tiles: expected at least one"):
        d.measure([], {"fp32": None})


def test_scales_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="q_scale"):
        d.diagnose([tile()], LayerScales(np.ones((3, 1, 1), np.float32), 0.1, 0.1))


def test_docstring_examples():
    assert doctest.testmod(d).failed == 0
