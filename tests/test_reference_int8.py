"""The specification of int8 attention: against float64 attention, against a loop of single numbers; its accuracy."""
import math
from types import SimpleNamespace

import cases
import numpy as np
import pytest

from cyflash import reference_int8
from cyflash.quant import compare, fixtures
from cyflash.reference import attention, attention_int8
from cyflash.reference_int8 import bf16, quantise

B, H, Hk, Lq, Lk, D, Dv = 2, 4, 2, 11, 23, 6, 5
TINY = np.finfo(np.float32).tiny


def inputs(seed=0):
    return cases.arrays(B, H, Hk, Lq, Lk, D, Dv, seed)


def coded(x, granularity="token", mean=None, rows=0):
    """What a QuantizedTensor holds."""
    codes, scale = quantise(x, granularity, None, mean, rows)
    fp32_rows = x[:, :, :rows] if rows else None
    return SimpleNamespace(data=codes.astype(np.int8), scale=scale, mean=mean, fp32_rows=fp32_rows)


def decoded(t):
    x = t.data.astype(np.float64) * t.scale + (0 if t.mean is None else t.mean)
    if t.fp32_rows is not None:
        x[:, :, : t.fp32_rows.shape[2]] = t.fp32_rows
    return x


def smoothed(k, rows=0):
    return coded(k, mean=k.mean(axis=2, keepdims=True), rows=rows)


# Its accuracy


@pytest.mark.parametrize("name", fixtures.ALL)
def test_accuracy_of_the_default_call(name):
    """Beside the aims: what each distribution costs, so that a change of the scheme shows."""
    aim = {"normal": 0.015, "sink6": 0.025, "sink9": 0.025, "llm_like": 0.025, "uniform": 0.001, "diffuse": 0.01,
           "k_channel_bias": 0.015, "fa3_outlier": 0.04, "peaky": 0.025, "student_t": 0.03, "laplace": 0.02}[name]
    q, k, v = fixtures.draw(name)
    assert compare(attention_int8(q, k, v), attention(q, k, v)).rel_l1 <= aim


def test_accuracy_of_bf16_weights():
    q, k, v = fixtures.draw("normal")
    assert compare(attention_int8(q, k, v, pv="bf16"), attention(q, k, v)).rel_l1 <= 0.013


def test_what_each_choice_is_for(monkeypatch):
    """Each part of the scheme helps the distribution that it was made for."""

    def error(name, **options):
        q, k, v = fixtures.draw(name)
        return compare(attention_int8(q, k, v, **options), attention(q, k, v)).rel_l1

    assert error("k_channel_bias", smooth_k=False) > 2 * error("k_channel_bias")
    assert error("fa3_outlier", granularity="tensor") > 2 * error("fa3_outlier")
    assert error("sink9", granularity=("token", "token", "head")) > 2 * error("sink9")
    per_tensor = {"granularity": "tensor"}
    assert error("llm_like", **per_tensor) > 2 * error("llm_like", **per_tensor, fp32_sinks=4)
    parts = error("sink6", block_size=2048)
    monkeypatch.setattr(reference_int8, "PART", 2048)
    assert error("sink6", block_size=2048) > 1.5 * parts


# Its formula


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("align", ["bottom-right", "top-left"])
@pytest.mark.parametrize("name", [*cases.NAMES, "all"])
def test_is_attention_of_the_decoded_operands(name, align, rows):
    """With weights that are not rounded int8 attention is float64 attention of what the codes stand for."""
    q, k, v = inputs()
    options = cases.all_options(B, H, Lq, Lk) if name == "all" else cases.options(name, B, H, Lq, Lk)
    options["causal_align"] = align
    q, k, v = coded(q), smoothed(k, rows), coded(v, rows=rows)
    expected, expected_lse = attention(*map(decoded, (q, k, v)), **options, return_lse=True)
    for size in (1, 4, 16, 100):
        out, lse = attention_int8(q, k, v, **options, pv="fp32", block_size=size, return_lse=True)
        np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-9, atol=1e-12)


def test_all_keys_in_float32_is_attention():
    q, k, v = inputs()
    options = cases.all_options(B, H, Lq, Lk)
    for size in (5, 100):
        out, lse = attention_int8(q, k, v, **options, fp32_sinks=Lk, block_size=size, return_lse=True)
        expected, expected_lse = attention(q, k, v, **options, return_lse=True)
        np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-9, atol=1e-12)


def by_loop(q, k, v, ends, sink, mask, per_token, k_rows, v_rows, pv):
    """One row of one head, a number at a time. q: codes, scale, floats; k and v: codes, scales (and k's mean).

    ends: where the parts that have a row scale of P end.
    """
    (q8, q_scale, q_float), (k8, k_scale, k_mean), (v8, v_scale) = q, k, v
    n, factor = len(k_rows), len(q8) ** -0.5
    m, total, out, codes = -math.inf, 0.0, [0.0] * len(v8[0]), [0] * len(k8)
    for start, end in zip([0, *ends], ends, strict=False):
        block = range(start, end)
        for keys, exact in (([j for j in block if j < n], True), ([j for j in block if j >= n], False)):
            score = {}
            for j in keys:
                if not mask[j]:
                    continue
                if exact:
                    score[j] = factor * sum(float(a) * float(b) for a, b in zip(q_float, k_rows[j], strict=True))
                else:
                    whole = sum(int(a) * int(b) for a, b in zip(q8, k8[j], strict=True))
                    mean = sum(int(a) * q_scale * float(b) for a, b in zip(q8, k_mean, strict=True))
                    score[j] = factor * (whole * q_scale * k_scale[j] + mean)
            if not score:
                continue
            t = max(score.values())
            up = max(m, t)
            total, out = total * math.exp(m - up), [x * math.exp(m - up) for x in out]
            m = up
            omega = max(math.exp(s - t) * v_scale[j] for j, s in score.items()) if per_token else 1.0
            for j, s in score.items():
                total += math.exp(s - m)
                weight, value = math.exp(s - m), v_rows[j] if exact else v8[j] * v_scale[j]
                if not exact and pv == "int8":
                    codes[j] = round(255 * math.exp(s - t) * (v_scale[j] if per_token else 1.0) / omega)
                    weight, value = codes[j] * omega / 255 * math.exp(t - m), v8[j] * (1.0 if per_token else v_scale[j])
                out = [x + weight * float(y) for x, y in zip(out, value, strict=True)]
    total += math.exp(sink - m) if m > -math.inf else 0.0
    if m == -math.inf:
        return out, sink, codes
    return [x / total for x in out], m + math.log(total), codes


@pytest.mark.parametrize("pv", ["int8", "fp32"])
@pytest.mark.parametrize("granularity", ["tensor", "head", "token"])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize(("size", "ends"), [
    (2, [*range(2, Lk, 2), Lk]), (5, [5, 10, 15, 20, 23]), (10, [4, 8, 10, 14, 18, 20, 23]),
    (64, [4, 8, 12, 16, 20, 23]),
])
def test_equals_the_loop(monkeypatch, size, ends, rows, granularity, pv):
    """In parts of four keys where blocks are larger."""
    monkeypatch.setattr(reference_int8, "PART", 4 if size > 5 else 64)
    q, k, v = inputs()
    r = np.random.default_rng(0)
    mask = r.random((B, H, Lq, Lk)) < 0.6
    mask[0, 0, 0] = False
    sinks = r.standard_normal(H).astype(np.float32)
    options = {"mask": mask, "sinks": sinks, "granularity": granularity, "fp32_sinks": rows, "pv": pv}
    quantised_v = coded(v, granularity, rows=rows)  # given, because pv="fp32" would take a float v as it is
    coded_p = {"return_codes": True} if pv == "int8" else {}
    out, lse, *p = attention_int8(q, k, quantised_v, **options, **coded_p, block_size=size, return_lse=True)
    mean = k.mean(axis=2, keepdims=True, dtype=np.float64).astype(np.float32)
    tensors = [coded(q, granularity), coded(k, granularity, mean, rows), quantised_v]
    for t in tensors:
        t.scale = np.broadcast_to(t.scale.astype(float), (*t.data.shape[:-1], 1))[..., 0]
    tq, tk, tv = tensors
    for b, h, i in np.ndindex(B, H, Lq):
        g = h // (H // Hk)
        expected, expected_lse, codes = by_loop(
            (tq.data[b, h, i], tq.scale[b, h, i], q[b, h, i]), (tk.data[b, g], tk.scale[b, g], mean[b, g, 0]),
            (tv.data[b, g], tv.scale[b, g]), ends, float(sinks[h]), mask[b, h, i], granularity == "token",
            k[b, g, :rows], v[b, g, :rows], pv,
        )
        np.testing.assert_allclose(out[b, h, i], expected, rtol=1e-9, atol=1e-12)
        assert math.isclose(lse[b, h, i], expected_lse, rel_tol=1e-9)
        if pv == "int8":
            assert np.array_equal(p[0][b, h, i], codes)


def test_bf16():
    """Half to even at every boundary; infinity from the largest float32."""
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -1 - 2.0**-7])
    assert bf16(x).tolist() == [1, 1 + 2.0**-6, 1 + 2.0**-7, -1 - 2.0**-7]
    assert bf16(np.array([np.inf, np.finfo(np.float32).max])).tolist() == [np.inf, np.inf]
    assert np.isnan(bf16(np.array([np.nan]))).all()
    codes = np.arange(-128.0, 128)
    assert np.array_equal(bf16(codes), codes)


def test_bf16_weights_lie_between():
    """Rounded weights change the result by at most 2^-8 of the weighted mean of |v|; and do change it."""
    q, k, v = inputs()
    exact = attention_int8(q, k, v, pv="fp32")
    rounded = attention_int8(q, k, v, pv="bf16")
    size = attention_int8(q, k, np.abs(v), pv="fp32")
    gap = np.abs(rounded - exact) / size
    assert 2.0**-12 < gap.max() <= 2.0**-7


# Quantisation


@pytest.mark.parametrize("granularity", ["tensor", "head", "token"])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-37, 1.0, 1e37, 3.4e38])
def test_quantisation(granularity, size):
    """No number is more than half a scale away, whatever their size; the scale is never 0, NaN or infinite."""
    x = (np.clip(inputs()[0], -1, 1) * np.float64(size)).astype(np.float32)
    codes, scale = quantise(x, granularity)
    assert scale.dtype == np.float32 and np.isfinite(scale).all() and (scale >= TINY).all()
    assert np.abs(codes).max() <= 127
    error = np.abs(codes.astype(np.float64) * scale - x)
    assert (error <= scale * (0.5 + 127 * 2.0**-22)).all()
    if size >= 1e-35:
        axes = {"tensor": (1, 2, 3), "head": (2, 3), "token": (3,)}[granularity]
        assert (np.abs(codes).max(axis=axes) == 127).all()


def test_fp32_rows_take_no_part_in_scales():
    x = inputs()[1]
    spiked = x.copy()
    spiked[:, :, :3] = 1e6
    for granularity in ("tensor", "head"):
        assert np.array_equal(quantise(spiked, granularity, fp32_sinks=3)[1], quantise(x[:, :, 3:], granularity)[1])
    codes, scale = quantise(spiked, "token", fp32_sinks=3)
    assert not codes[:, :, :3].any() and (scale[:, :, :3] == TINY).all()


def test_static_scales_saturate():
    q, k, v = inputs()
    codes = [quantise(x, "tensor", np.full((1, 1, 1, 1), 0.001, np.float32))[0] for x in (q, k, v)]
    assert (codes[0][q > 0.127] == 127).all() and (codes[0][q < -0.127] == -127).all()
    out = attention_int8(q, k, v, v_scale=0.001, k_scale=0.001, q_scale=0.001, pv="fp32")
    expected = attention(*(0.001 * x for x in codes))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-7)


def test_operands_of_every_kind_agree():
    """Quantised here, as int8 arrays with scales, as an object, and by a `quant`."""
    q, k, v = inputs()
    expected = attention_int8(q, k, v, smooth_k=False)
    a, b, c = coded(q), coded(k), coded(v)
    arrays = attention_int8(a.data, b.data, c.data, q_scale=a.scale, k_scale=b.scale, v_scale=c.scale)
    assert np.array_equal(arrays, expected)
    assert np.array_equal(attention_int8(a, b, c), expected)
    assert np.array_equal(attention_int8(q, b, c), expected)
    quant = SimpleNamespace(q_scale=a.scale, k_scale=b.scale, v_scale=c.scale, k_mean=None, fp32_sinks=0, pv="int8")
    assert np.array_equal(attention_int8(q, k, v, quant=quant), expected)
    assert np.array_equal(attention_int8(a.data, b.data, c.data, quant=quant), expected)

    mean = k.mean(axis=2, keepdims=True, dtype=np.float64).astype(np.float32)
    smooth, b = attention_int8(q, k, v), coded(k, mean=mean)
    assert np.array_equal(attention_int8(a, b, c), smooth)
    quant = SimpleNamespace(q_scale=a.scale, k_scale=b.scale, v_scale=c.scale, k_mean=mean, fp32_sinks=0, pv="bf16")
    assert np.array_equal(attention_int8(q, k, v, quant=quant, pv="int8"), smooth)
    assert np.array_equal(attention_int8(q, k, v, quant=quant), attention_int8(a, b, c, pv="bf16"))
    assert not np.array_equal(smooth, expected)


def test_ranks():
    q, k, v = inputs()
    whole, lse, codes = attention_int8(q, k, v, return_lse=True, return_codes=True)
    assert whole.shape == (B, H, Lq, Dv) and lse.shape == (B, H, Lq) and codes.shape == (B, H, Lq, Lk)
    three = attention_int8(q[1], k[1], v[1], return_lse=True, return_codes=True)
    for x, y in zip(three, (whole, lse, codes), strict=True):
        assert np.array_equal(x, y[1])
    two = attention_int8(q[1, 3], k[1, 1], v[1, 1], return_lse=True, return_codes=True)
    for x, y in zip(two, (whole, lse, codes), strict=True):
        assert np.array_equal(x, y[1, 3])


def test_minus_128():
    q, k, v = (np.full((1, 3, 4), -128, np.int8) for _ in range(3))
    out, lse = attention_int8(q, k, v, q_scale=0.01, k_scale=0.01, v_scale=0.5, scale=1.0, return_lse=True)
    np.testing.assert_allclose(out, -64)
    np.testing.assert_allclose(lse, 4 * 1.28**2 + math.log(3), rtol=1e-6)


def test_nothing_to_see():
    q, k, v = inputs()
    for options in ({"mask": np.zeros((), bool)}, {"bias": np.full((Lq, Lk), -np.inf)}):
        out, lse = attention_int8(q, k, v, **options, sinks=np.ones(H, np.float32), return_lse=True)
        assert not out.any() and (lse == 1).all()
        assert (attention_int8(q, k, v, **options, return_lse=True)[1] == -np.inf).all()
    out, lse, codes = attention_int8(q, k[:, :, :0], v[:, :, :0], return_lse=True, return_codes=True)
    assert out.shape == (B, H, Lq, Dv) and not out.any() and (lse == -np.inf).all() and codes.shape == (B, H, Lq, 0)


def test_nan_in_the_bias_shows_in_its_row():
    q, k, v = inputs()
    bias = np.zeros((Lq, Lk), np.float32)
    bias[4, 7] = np.nan
    for pv in ("int8", "bf16", "fp32"):
        out, lse = attention_int8(q, k, v, bias=bias, pv=pv, return_lse=True)
        clean = np.arange(Lq) != 4
        assert np.isnan(out[:, :, 4]).all() and np.isnan(lse[:, :, 4]).all()
        assert np.array_equal(out[:, :, clean], attention_int8(q, k, v, pv=pv)[:, :, clean])


CODES = np.ones((B, Hk, Lk, D), np.int8)
UNSMOOTHED = SimpleNamespace(data=CODES, scale=np.ones((), np.float32), mean=None, fp32_rows=None)
SETTINGS = SimpleNamespace(q_scale=1.0, k_scale=1.0, v_scale=1.0, k_mean=None, fp32_sinks=0, pv="int8")


@pytest.mark.parametrize(("error", "match", "change"), [
    (ValueError, "k_scale", {"k": CODES}),
    (TypeError, "float64", {"k": CODES.astype(np.float64)}),
    (ValueError, "scale", {"k": UNSMOOTHED, "k_scale": 1.0}),
    (ValueError, "quant", {"quant": SETTINGS, "v_scale": 1.0}),
    (ValueError, "fp32_sinks", {"quant": SETTINGS, "fp32_sinks": 2}),
    (ValueError, "q_scale", {"q_scale": 0.0}),
    (ValueError, "q_scale", {"q_scale": np.inf}),
    (ValueError, "k_scale", {"k_scale": -1.0}),
    (ValueError, "q_scale", {"q_scale": np.ones(H)}),
    (ValueError, "v_scale", {"v_scale": np.ones((3, 1, 1))}),
    (ValueError, "pv", {"pv": "fp16"}),
    (ValueError, "granularity", {"granularity": "row"}),
    (ValueError, "granularity", {"granularity": ("token", "token")}),
    (ValueError, "smooth_k", {"k": UNSMOOTHED, "smooth_k": True}),
    (ValueError, "smooth_k", {"k": SimpleNamespace(**vars(UNSMOOTHED) | {"mean": np.ones((B, Hk, 1, D))}),
                              "smooth_k": False}),
    (ValueError, "fp32_sinks", {"fp32_sinks": Lk + 1}),
    (ValueError, "fp32_sinks", {"k": UNSMOOTHED, "fp32_sinks": 1}),
    (ValueError, "finite", {"q": np.full((B, H, Lq, D), np.nan, np.float32)}),
    (ValueError, "return_codes", {"pv": "bf16", "return_codes": True}),
    (ValueError, "block_size", {"block_size": 0}),
])
def test_errors(error, match, change):
    arguments = dict(zip("qkv", inputs(), strict=True)) | change
    with pytest.raises(error, match=match):
        attention_int8(**arguments)
