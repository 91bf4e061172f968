"""flash_attention_int8_varlen: bit for bit a loop of flash_attention_int8, each sequence with its own scales."""
import cases_int8
import hypothesis
import numpy as np
import pytest
import ragged
from caching import numpy_dtype, same_bits
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from ragged import BATCHES, DV, HK, D, H, all_options, bounds_of, draw, loop, of_sequence, sequence

import cyflash
from cyflash import FlashAttentionConfig, LayerScales, flash_attention_int8, flash_attention_int8_varlen, quantize

MEAN = np.linspace(-1, 1, HK * D, dtype=np.float32).reshape(HK, 1, D)
PER_HEAD = LayerScales(np.full((H, 1, 1), 0.03), np.full((HK, 1, 1), 0.03), np.full((HK, 1, 1), 0.02), k_mean=MEAN,
                       fp32_sinks=2)
SETTINGS = {
    "default": {},
    "not smoothed": {"smooth_k": False},
    "tensor": {"granularity": "tensor"},
    "head": {"granularity": "head"},
    "three": {"granularity": ("tensor", "head", "token")},
    "tensor, not smoothed": {"granularity": ("token", "tensor", "head"), "smooth_k": False},
    "bf16": {"pv": "bf16"},
    "fp32": {"pv": "fp32"},
    "static": {"q_scale": 0.03, "k_scale": 0.03, "v_scale": 0.02},
    "static v": {"v_scale": 0.02, "pv": "bf16"},
    "static k, smoothed": {"k_scale": 0.02, "smooth_k": True},
    "quant": {"quant": LayerScales(0.03, None, 0.02, pv="fp32")},
    "quant's mean": {"quant": LayerScales(k_mean=np.full((HK, 1, D), 0.5))},
    "quant per head": {"quant": PER_HEAD},
}


@pytest.fixture(params=BATCHES)
def batch(request):
    return BATCHES[request.param]


@pytest.fixture(params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


def run(call, **arguments):
    return flash_attention_int8_varlen(*call, **arguments, return_lse=True)


def equals_the_loop(call, **arguments):
    result = run(call, **arguments)
    same_bits(result, loop(flash_attention_int8, *call, **arguments))
    return result


def test_batches(build, batch):
    call = draw(batch)
    equals_the_loop(call)
    equals_the_loop(call, causal=True, granularity="tensor")
    equals_the_loop(call, **all_options(batch))
    equals_the_loop(call, **all_options(batch), causal_align="top-left", pv="bf16")


def test_settings(one_build, settings):
    for which in ("mixed", "without queries", "without keys", "decode"):
        batch = BATCHES[which]
        equals_the_loop(draw(batch), **settings)
        equals_the_loop(draw(batch), **settings, **all_options(batch))


@pytest.mark.parametrize("name", ragged.NAMES)
def test_options(one_build, name):
    for which in ("mixed", "more queries than keys", "without keys"):
        batch = BATCHES[which]
        equals_the_loop(draw(batch), **ragged.options(name, batch))


@pytest.mark.parametrize("pv", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("sinks", [0, 1, 3, 16, 64, 100])
def test_first_tokens_of_each_sequence_in_float32(one_build, sinks, pv):
    """All tokens, of sequences with fewer."""
    batch = [(40, 150), (2, 1), (17, 100), (0, 40), (3, 64), (5, 0)]
    call = draw(batch)
    result = run(call, fp32_sinks=sinks, pv=pv, causal=True)
    for i, (_, Lk) in enumerate(batch):
        rows = slice(call[3][i], call[3][i + 1])
        alone = flash_attention_int8(*sequence(*call, i), fp32_sinks=min(sinks, Lk), pv=pv, causal=True,
                                     return_lse=True)
        same_bits([x[rows] for x in result], [x.swapaxes(0, 1) for x in alone])


@pytest.mark.parametrize("pv", ["int8", "bf16", "fp32"])
def test_more_first_tokens_than_there_are(one_build, pv):
    """All tokens of all sequences, also where the whole batch has fewer."""
    for batch in ([(3, 2)], [(4, 3), (2, 0), (1, 1)], [(5, 0)], []):
        call = draw(batch)
        result = run(call, fp32_sinks=9, pv=pv, causal=True)
        same_bits(run(call, quant=LayerScales(fp32_sinks=9, pv=pv), causal=True), result)
        for i, (_, Lk) in enumerate(batch):
            rows = slice(call[3][i], call[3][i + 1])
            alone = flash_attention_int8(*sequence(*call, i), fp32_sinks=Lk, pv=pv, causal=True, return_lse=True)
            same_bits([x[rows] for x in result], [x.swapaxes(0, 1) for x in alone])


def test_against_the_simulation(one_build, settings):
    batch = [(20, 60), (1, 150), (13, 9)]
    call = draw(batch)
    for options in ({"causal": True}, all_options(batch)):
        out, lse = run(call, **settings, **options)
        for i in range(len(batch)):
            own = of_sequence(options, i)
            q, k, v = sequence(*call, i)
            rows = slice(call[3][i], call[3][i + 1])
            size = cases_int8.run(q, k, v, **settings, **own)[3]
            case = cases_int8.case(np.ascontiguousarray(q), np.ascontiguousarray(k), np.ascontiguousarray(v),
                                   block_size=size, **settings, **own)
            case.check(out[rows].swapaxes(0, 1), lse[rows].swapaxes(0, 1))


@pytest.mark.parametrize("granularity", ["tensor", "head", "token"])
@pytest.mark.parametrize("smooth", [True, False])
def test_scales_and_means_are_those_of_the_sequence(one_build, granularity, smooth):
    """A neighbour a thousand times larger, and far off its mean, changes no bit."""
    batch = [(30, 40), (20, 50)]
    q, k, v, cu_q, cu_k = draw(batch)
    arguments = {"granularity": granularity, "smooth_k": smooth}
    before = run((q, k, v, cu_q, cu_k), **arguments)
    for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k)):
        x[cu[1] :] = 1000 * x[cu[1] :] + 500
    after = run((q, k, v, cu_q, cu_k), **arguments)
    same_bits([x[:30] for x in after], [x[:30] for x in before])
    assert not np.array_equal(after[0][30:], before[0][30:])


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "default"])
def test_no_setting_is_ignored(one_build, name):
    call = draw([(40, 50), (30, 60)])
    call[1][...] += 3  # a common part, so that smoothing matters
    out, other = run(call, **SETTINGS[name])[0], run(call)[0]
    for rows in (slice(0, 40), slice(40, 70)):
        assert np.median(np.abs(out - other)[rows]) > 1e-4


@pytest.mark.parametrize("ignored", ["causal", "scale", "window", "softcap", "bias", "mask", "alibi_slopes", "sinks"])
def test_no_option_is_ignored(one_build, ignored):
    batch = [(40, 50), (30, 44)]
    call = draw(batch)
    options = all_options(batch) | ragged.options("mask", batch) | {"window": (9, 3)}
    rest = {name: value for name, value in options.items() if name != ignored}
    out, other = run(call, **options)[0], run(call, **rest)[0]
    for rows in (slice(0, 40), slice(40, 70)):
        assert np.abs(out - other)[rows].max() > 0.02


def test_codes(one_build):
    """int8 arrays beside one scale each; output in float32."""
    batch = BATCHES["mixed"]
    q, k, v, cu_q, cu_k = draw(batch)
    codes = [np.clip(np.rint(40 * x), -127, 127).astype(np.int8) for x in (q, k, v)]
    scales = {"q_scale": 0.025, "k_scale": 0.025, "v_scale": 0.025}
    out, _ = equals_the_loop((*codes, cu_q, cu_k), **scales, **all_options(batch))
    assert out.dtype == np.float32
    equals_the_loop((q, codes[1], codes[2], cu_q, cu_k), k_scale=0.025, v_scale=0.025, causal=True)


def test_static_scales_of_any_shape(one_build):
    """A number, (H, 1) per head and (total, H, 1) per token, of floats and of codes."""
    batch = BATCHES["without queries"]
    q, k, v, cu_q, cu_k = draw(batch)
    r = np.random.default_rng(0)
    for of in (lambda x: (), lambda x: (x.shape[1], 1), lambda x: (*x.shape[:2], 1)):
        scales = [(0.02 + 0.02 * r.random(of(x))).astype(np.float32) for x in (q, k, v)]
        codes = [np.clip(np.rint(x / s), -127, 127).astype(np.int8) for x, s in zip((q, k, v), scales, strict=True)]
        for arrays in ((q, k, v), codes):
            given = dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True))
            out, lse = run((*arrays, cu_q, cu_k), **given, causal=True)
            for i in range(len(batch)):
                own = {}
                for name, s, cu in zip(given, scales, (cu_q, cu_k, cu_k), strict=True):
                    token = s.ndim == 3
                    own[name] = s[cu[i] : cu[i + 1]].swapaxes(0, 1) if token else s[:, None] if s.ndim else float(s)
                alone = flash_attention_int8(*sequence(*arrays, cu_q, cu_k, i), **own, causal=True, return_lse=True)
                rows = slice(cu_q[i], cu_q[i + 1])
                same_bits((out[rows], lse[rows]), [x.swapaxes(0, 1) for x in alone])


def test_threads_and_repeats(build):
    batch = [(3, 900), (200, 200), (1, 1), (0, 5), (64, 30), (1, 2000)]
    call = draw(batch)
    for arguments in ({}, {"granularity": "tensor", "causal": True}, {"pv": "bf16", **all_options(batch)}):
        expected = run(call, **arguments, num_threads=1)
        for threads in (2, 3, 8):
            same_bits(run(call, **arguments, num_threads=threads), expected)
        same_bits(run(call, **arguments), expected)


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 2), (5, 5)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (16, 33), (64, 64), (40, 128)], ids=str)
def test_heads_and_widths(one_build, heads, sizes):
    batch = [(7, 40), (1, 90), (0, 3), (33, 20)]
    equals_the_loop(draw(batch, heads, sizes), causal=True, fp32_sinks=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit(one_build, dtype):
    *arrays, cu_q, cu_k = draw(BATCHES["mixed"])
    call = (*(x.astype(numpy_dtype(dtype)) for x in arrays), cu_q, cu_k)
    out, _ = equals_the_loop(call, causal=True)
    assert out.dtype == call[0].dtype


def test_layouts_out_and_config(one_build):
    call = draw(BATCHES["mixed"])
    expected, lse = run(call, causal=True)
    heads_first = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in call[:3]]
    same_bits(run((*heads_first, *call[3:]), causal=True), (expected, lse))
    out = np.full_like(expected, np.nan)
    assert flash_attention_int8_varlen(*call, causal=True, out=out) is out
    same_bits([out], [expected])
    config = FlashAttentionConfig(head_dim=D, num_heads=H, causal=True, scale=0.3, block_size_kv=128)
    same_bits(run(call, config=config), loop(flash_attention_int8, *call, config=config))


def test_packed_qkv(one_build):
    cu = bounds_of([30, 0, 45])
    packed = np.random.default_rng(0).standard_normal((75, 3, H, D), dtype=np.float32)
    q, k, v = packed.transpose(1, 0, 2, 3)
    same_bits(run((q, k, v, cu, cu), causal=True), run((q.copy(), k.copy(), v.copy(), cu, cu), causal=True))


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(ragged.calls((np.float32, np.float16)), st.sampled_from(list(SETTINGS)),
       st.sampled_from(cyflash.cpu.runnable()), st.integers(1, 3))
def test_any_call(call, settings, build, threads):
    arrays, options = call
    if "per head" in settings or "mean" in settings:
        settings = "default"  # theirs are of other heads
    with cyflash.set_implementation(build):
        result = run(arrays, **SETTINGS[settings], **options, num_threads=threads)
        same_bits(result, loop(flash_attention_int8, *arrays, **SETTINGS[settings], **options))


# Bad input: what is the same as without int8 is in test_varlen.py; that both look is shown by a few


def bad():
    q, k, v, cu_q, cu_k = draw([(5, 6), (3, 4)])
    good = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}

    def of(name, error, parts, **change):
        return pytest.param(good | change, error, parts, id=name)

    def with_nan(name):
        x = good[name].copy()
        x[7, 1, 3] = np.nan
        return {name: x}

    yield of("decreases", ValueError, ["cu_seqlens_q: expected"], cu_seqlens_q=np.array([0, 4, 3]))
    yield of("starts at 1", ValueError, ["cu_seqlens_k: expected"], cu_seqlens_k=np.array([1, 4, 10]))
    yield of("exceeds", ValueError, ["cu_seqlens_k: expected", "11"], cu_seqlens_k=np.array([0, 4, 11]))
    yield of("of more sequences", ValueError, ["cu_seqlens_"], cu_seqlens_k=np.array([0, 4, 5, 10]))
    yield of("bias an array", TypeError, ["bias: expected", "list"], bias=np.zeros((5, 6), np.float32))
    yield of("mask too few", ValueError, ["mask: expected", "2"], mask=[None])
    yield of("q rank", ValueError, ["q: expected"], q=q[None])
    yield of("k float64", TypeError, ["k: expected", "float64"], k=k.astype(np.float64))
    for name in "qkv":
        yield of(f"{name} nan", ValueError, [f"{name}: expected finite", "nan", "(7, 1, 3)"], **with_nan(name))
        yield of(f"{name} codes without scale", ValueError, [f"{name}_scale"],
                 **{name: np.ones(good[name].shape, np.int8)})
        yield of(f"{name}_scale zero", ValueError, [f"{name}_scale: expected", "0.0"], **{f"{name}_scale": 0.0})
    yield of("k quantised", (TypeError, ValueError), ["k: expected"], k=quantize(k))
    yield of("q_scale of another shape", ValueError, ["q_scale: expected", "(3, 1)"], q_scale=np.ones((3, 1)))
    yield of("k_scale per channel", ValueError, ["k_scale: expected"], k_scale=np.ones((1, 1, D)))
    yield of("v_scale of one axis", ValueError, ["v_scale: expected"], v_scale=np.ones(HK))
    yield of("granularity", ValueError, ["granularity: expected", "'row'"], granularity="row")
    yield of("smooth_k", ValueError, ["smooth_k: expected", "'yes'"], smooth_k="yes")
    yield of("fp32_sinks", ValueError, ["fp32_sinks: expected", "-1"], fp32_sinks=-1)
    yield of("pv", ValueError, ["pv: expected", "'fp16'"], pv="fp16")
    yield of("quant", TypeError, ["quant: expected"], quant={})
    yield of("quant and scale", ValueError, ["q_scale"], quant=LayerScales(0.1, 0.1, 0.1), q_scale=0.1)
    yield of("out over q", ValueError, ["out", "overlap"], out=q, v=np.zeros((10, HK, D), np.float32))
    yield of("dropout", TypeError, ["dropout_p"], dropout_p=0.1)


@pytest.mark.parametrize(("call", "error", "parts"), list(bad()))
def test_bad_arguments(call, error, parts):
    out = call.setdefault("out", np.full((8, H, DV), 7, np.float32))
    before = out.copy()
    with pytest.raises(error) as caught:
        flash_attention_int8_varlen(**call)
    for words in parts:
        assert words in str(caught.value), (words, str(caught.value))
    assert np.array_equal(out, before)


PLANNED = LayerScales(parts=[([0], LayerScales(pv="bf16", fp32_sinks=2)), ([1], None)])


@pytest.mark.parametrize("which", BATCHES)
def test_a_planned_layer(one_build, which):
    """Heads of a layer that differ: the parts of quant, as in single calls."""
    equals_the_loop(draw(BATCHES[which]), quant=PLANNED, causal=True)


@pytest.mark.parametrize("name", ragged.NAMES)
def test_options_of_a_planned_layer(one_build, name):
    equals_the_loop(draw(BATCHES["mixed"]), quant=PLANNED, **ragged.options(name, BATCHES["mixed"]))
