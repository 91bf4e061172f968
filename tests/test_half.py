"""Attention of float16 and bfloat16 arrays: what float32 attention of the same values gives, rounded to q's dtype.

That to the bit, but where the CPU multiplies bfloat16: there results of three bfloat16 arrays lie within their bound.
"""
import itertools
import subprocess
import sys
import textwrap
from unittest import mock

import bounds_half
import cases
import numpy as np
import pytest
from halves import KINDS, as_kind, assert_same_bits, dtype_of, exact

import cyflash
from cyflash import FlashAttention, FlashAttentionConfig, flash_attention, flash_attention_int8, quantize

ALL_KINDS = ("fp32", *KINDS)
MIXED = [kinds for kinds in itertools.product(ALL_KINDS, repeat=3) if set(kinds) != {"fp32"}]
SHAPES = {  # B, H, Hk, Lq, Lk, D, Dv
    "encoder": (2, 2, 2, 70, 70, 24, 24),
    "long": (1, 1, 1, 200, 700, 32, 32),
    "few queries": (1, 2, 1, 3, 3000, 16, 16),
    "decode": (3, 4, 2, 1, 1500, 40, 24),
    "grouped": (2, 8, 2, 65, 130, 33, 17),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def mixed(kinds, *shape):
    """q, k, v of these kinds."""
    return tuple(as_kind(kind, x)[0] for kind, x in zip(kinds, cases.arrays(*shape), strict=True))


def is_native(build, *qkv):
    """Whether the products are in bfloat16."""
    return build == "avx512_bf16" and all(x.dtype.name == "bfloat16" for x in qkv)


def rounded(x, dtype):
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def verify(build, q, k, v, **options):
    """Compare with the reference; and, to the bit, with float32 attention wherever products are in float32."""
    out, lse = flash_attention(q, k, v, **options, return_lse=True)
    native = is_native(build, q, k, v)
    report = bounds_half.Case(q, k, v, native=native, **options).check(out, lse)
    if not native:
        expected, expected_lse = flash_attention(*exact(q, k, v), **options, return_lse=True)
        assert_same_bits(out, rounded(expected, q.dtype))
        assert_same_bits(lse, expected_lse)
    return report


# Every option, dtype and size


@pytest.mark.parametrize("name", ["none", *cases.NAMES, "all"])
def test_every_option(build, kind, name):
    B, H, Lq, Lk = 2, 4, 60, 150
    options = {"none": dict, "all": lambda: cases.all_options(B, H, Lq, Lk)}.get(
        name, lambda: cases.options(name, B, H, Lq, Lk)
    )()
    verify(build, *as_kind(kind, *cases.arrays(B, H, 2, Lq, Lk, 40, 24)), **options)


@pytest.mark.parametrize("name", cases.NAMES)
def test_no_option_is_ignored(build, kind, name):
    """Without it the result would be another, by more than the bound."""
    B, H, Lq, Lk = 1, 2, 40, 90
    qkv = as_kind(kind, *cases.arrays(B, H, 1, Lq, Lk, 24))
    options = cases.options(name, B, H, Lq, Lk)
    out = flash_attention(*qkv, **options)
    with pytest.raises(AssertionError):
        bounds_half.Case(*qkv, native=is_native(build, *qkv)).check(out)


@pytest.mark.parametrize("name", ["none", "causal", "all"])
def test_every_shape(build, kind, shape, name):
    B, H, _, Lq, Lk, *_ = shape
    options = {"none": {}, "causal": {"causal": True}, "all": cases.all_options(B, H, Lq, Lk)}[name]
    verify(build, *as_kind(kind, *cases.arrays(*shape)), **options)


@pytest.mark.parametrize("kinds", MIXED, ids="-".join)
def test_dtypes_may_differ(build, kinds):
    """The output has q's."""
    for shape in ((1, 4, 2, 50, 70, 20, 12), (2, 2, 1, 1, 300, 33, 17)):
        qkv = mixed(kinds, *shape)
        verify(build, *qkv)
        assert flash_attention(*qkv, causal=True).dtype == qkv[0].dtype


@pytest.mark.parametrize("D", [*range(1, 70), *range(70, 161, 9)])
def test_every_head_dim(build, kind, D):
    """With lengths that move with it."""
    verify(build, *as_kind(kind, *cases.arrays(1, 2, 1, 1 + 37 * D % 60, 1 + 53 * D % 140, D, 1 + 29 * D % 40)))


@pytest.mark.parametrize("D", [1, 3, 16, 33])
def test_every_length_beside_nan(build, kind, D):
    """Arrays that end where others, all NaN, begin."""
    q, k, v = (x[0] for x in as_kind(kind, *cases.arrays(1, 1, Lq=132, D=D, seed=1)))
    for L in range(1, 131, 3):
        Lk = 1 + 7 * L % 131
        spoiled = [np.full_like(x, np.nan) for x in (q, k, v)]
        parts = [x[:, :n] for x, n in zip(spoiled, (L, Lk, Lk), strict=True)]
        for part, x in zip(parts, (q, k, v), strict=True):
            part[...] = x[:, : part.shape[1]]
        verify(build, *parts)


def test_two_and_three_axes(build, kind):
    q, k, v = as_kind(kind, *cases.arrays(1, 2, 2, 20, 30, 16))
    expected, lse = flash_attention(q, k, v, return_lse=True)
    three = flash_attention(q[0], k[0], v[0], return_lse=True)
    assert_same_bits(three[0], expected[0]), assert_same_bits(three[1], lse[0])
    two = flash_attention(q[0, 1], k[0, 1], v[0, 1], return_lse=True)
    assert_same_bits(two[0], expected[0, 1]), assert_same_bits(two[1], lse[0, 1])


@pytest.mark.parametrize(("Lq", "Lk"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend_to(build, kind, Lq, Lk):
    q, k, v = (np.ones((2, n, 8), dtype_of(kind)) for n in (Lq, Lk, Lk))
    out, lse = flash_attention(q, k, v, return_lse=True)
    assert out.dtype == q.dtype and out.shape == q.shape and not out.any()
    assert lse.dtype == np.float32 and (lse == -np.inf).all()


def test_the_classes(build, kind):
    q, k, v = (x[0] for x in as_kind(kind, *cases.arrays(1, 2, 2, 20, 30, 16)))
    attention = FlashAttention(FlashAttentionConfig.new(16, 2))
    expected, lse = flash_attention(q, k, v, return_lse=True)
    result = attention.forward_multi_head(q, k, v)
    assert_same_bits(result.output, expected), assert_same_bits(result.logsumexp, lse)
    verify(build, q, k, v)


def test_tile_sizes(build, kind):
    """Results of any are within the bound, and those of 16 bits are those of float32."""
    q, k, v = as_kind(kind, *cases.arrays(1, 2, 2, 100, 300, 32))
    for Br, Bc in ((1, 1), (32, 64), (64, 17), (200, 512)):
        config = FlashAttentionConfig(head_dim=32, num_heads=2, block_size_q=Br, block_size_kv=Bc)
        out, lse = flash_attention(q, k, v, config=config, return_lse=True)
        native = is_native(build, q, k, v)
        bounds_half.Case(q, k, v, native=native).check(out, lse)
        if not native:
            assert_same_bits(out, rounded(flash_attention(*exact(q, k, v), config=config), q.dtype))


# Strides, and where results go


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_strides_change_nothing(build, kind, layout):
    qkv = as_kind(kind, *cases.arrays(2, 2, 2, 50, 70, 24))
    expected = flash_attention(*qkv, causal=True, return_lse=True)
    given = [cases.LAYOUTS[layout](x) for x in qkv]
    assert all(x.dtype == qkv[0].dtype for x in given)
    for result, x in zip(flash_attention(*given, causal=True, return_lse=True), expected, strict=True):
        assert_same_bits(result, x)


@pytest.mark.parametrize("layout", [name for name in cases.LAYOUTS if name != "read-only"])
def test_out(build, kind, layout):
    """Any layout of q's dtype is written, and nothing else."""
    qkv = as_kind(kind, *cases.arrays(2, 2, 2, 50, 70, 24, 13))
    expected = flash_attention(*qkv)
    out = cases.LAYOUTS[layout](np.full_like(expected, 7))
    assert flash_attention(*qkv, out=out) is out
    assert_same_bits(out, expected)


def test_out_of_another_dtype_is_refused(kind):
    q, k, v = as_kind(kind, *cases.arrays(1, 1, Lq=5, D=4))
    for dtype in {np.dtype(np.float32), np.dtype(np.float64), dtype_of("fp16"), dtype_of("bf16")} - {q.dtype}:
        out = np.full(q.shape, 7, dtype)
        with pytest.raises(TypeError, match=rf"out: expected .*{q.dtype.name}.*got {dtype.name}"):
            flash_attention(q, k, v, out=out)
        assert (out == 7).all()
    with pytest.raises(TypeError, match=r"out: expected .*float32.*got "):
        flash_attention(*exact(q), k, v, out=np.empty_like(q))


def test_inputs_are_not_written(build, kind):
    qkv = as_kind(kind, *cases.arrays(1, 2, 1, 20, 30, 16))
    before = [x.copy() for x in qkv]
    for x in qkv:
        x.flags.writeable = False
    flash_attention(*qkv, causal=True)
    for x, y in zip(qkv, before, strict=True):
        assert_same_bits(x, y)


# Invariance


@pytest.mark.parametrize("name", ["none", "causal", "all"])
def test_threads_and_batches_change_nothing(build, kind, shape, name):
    B, H, _, Lq, Lk, *_ = shape
    qkv = as_kind(kind, *cases.arrays(*shape))
    options = {"none": {}, "causal": {"causal": True}, "all": cases.all_options(B, H, Lq, Lk)}[name]
    expected = flash_attention(*qkv, **options, num_threads=1, return_lse=True)
    for threads in (2, 5):
        for result, x in zip(
            flash_attention(*qkv, **options, num_threads=threads, return_lse=True), expected, strict=True
        ):
            assert_same_bits(result, x)
    for b in range(B):
        own = {n: x[b : b + 1] if n in ("bias", "mask") and x.ndim == 4 and len(x) == B else x
               for n, x in options.items()}
        result = flash_attention(*(x[b : b + 1] for x in qkv), **own, return_lse=True)
        assert_same_bits(result[0], expected[0][b : b + 1]), assert_same_bits(result[1], expected[1][b : b + 1])


# Special values


def test_one_key_gives_its_value(build, kind):
    """Whatever its value: the weight is 1. All numbers of the dtype, NaN and infinities too."""
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(64, 1, 1024)
    v = bits.view(dtype_of(kind))
    q, k = as_kind(kind, *cases.arrays(64, 1, 1, 3, 1, 8)[:2])
    out = flash_attention(q, k, v[:, None])
    with np.errstate(invalid="ignore"):
        expected = np.broadcast_to(v[:, None], out.shape).astype(np.float32)
        out = out.astype(np.float32)
    if is_native(build, q, k, v):  # takes denormals for 0
        denormal = np.abs(expected) < np.finfo(np.float32).tiny
        assert (np.abs(out[denormal]) <= np.abs(expected[denormal])).all()
        out[denormal] = expected[denormal]
    np.testing.assert_array_equal(out, expected)


def test_values_are_rounded_half_to_even_and_to_infinity(build, kind):
    """Float32 values beside one key: the output is what astype makes of them."""
    dtype = dtype_of(kind)
    x = np.arange(0, 1 << 16, 37, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        x = x[np.isfinite(x)].astype(np.float32)
        step = np.maximum(np.abs(x), np.float32(1e-38)) * np.float32(2.0 ** -bounds_half.BITS[dtype.name])
        limit = bounds_half.infinite_from(dtype)
        edges = np.float32([limit, np.nextafter(limit, 0), -limit, 3e38, -3e38, np.inf, 0.0, 1e-8, -1e-40])
        values = np.concatenate([x, x + step, x - step / 2, edges])
        expected = values.astype(dtype)
    q, k = as_kind(kind, *cases.arrays(1, 1, 1, 4, 1, 8)[:2])
    out = flash_attention(q, k, values.reshape(1, 1, 1, -1))
    np.testing.assert_array_equal(out.astype(np.float32), np.broadcast_to(expected.astype(np.float32), out.shape))
    assert np.isinf(expected).sum() >= 4


@pytest.mark.parametrize("size", ["largest", "least", "denormal"])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_the_ends_of_the_range(build, kind, where, size):
    info = np.finfo(np.float16) if kind == "fp16" else pytest.importorskip("ml_dtypes").finfo(dtype_of(kind))
    unit = {"largest": info.max, "least": info.tiny, "denormal": info.smallest_subnormal * info.dtype.type(4)}[size]
    arrays = dict(zip("qkv", cases.arrays(1, 2, 1, 40, 70, 16), strict=True))
    if size == "largest" and where != "v":  # scores of a few units, but products of the greatest size
        other = {"q": "k", "k": "q"}[where]
        arrays[other] = arrays[other] / np.float32(unit)
    arrays[where] = np.clip(arrays[where], -1, 1) * np.float32(unit)
    if where == "v" and size == "largest" and kind == "bf16":
        arrays["v"] /= 128  # the kernel sums 70 of them in float32, whose largest number is hardly larger
    verify(build, **dict(zip("qkv", as_kind(kind, *arrays.values()), strict=True)))


def test_means_of_the_largest_value_stay_finite(build):
    q, k = as_kind("fp16", *cases.arrays(1, 2, 2, 60, 300, 16)[:2])
    v = np.full(k.shape, np.finfo(np.float16).max, np.float16)
    out = flash_attention(q, k, v)
    np.testing.assert_array_equal(out, np.finfo(np.float16).max)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_hidden_values_do_not_leak(build, kind, bad):
    """At every length and place of the hidden key, by mask, bias and causal order; for few queries and many."""
    for Lq, L in itertools.product((1, 5, 50), (1, 2, 7, 16, 17, 33, 64, 65, 130)):
        q, k, v = as_kind(kind, *cases.arrays(1, 1, 1, Lq, L, 9))
        for j in {0, L // 2, L - 1}:
            hide = np.arange(L) != j
            bias = np.where(hide, np.float32(0), np.float32(-np.inf))
            spoiled_k, spoiled_v = k.copy(), v.copy()
            spoiled_k[:, :, j] = spoiled_v[:, :, j] = bad
            for option in ({"mask": hide}, {"bias": bias}):
                clean = flash_attention(q, k, v, **option, return_lse=True)
                spoiled = flash_attention(q, spoiled_k, spoiled_v, **option, return_lse=True)
                for result, x in zip(spoiled, clean, strict=True):
                    assert_same_bits(result, x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_causal_and_window_hide_bad_numbers(build, kind, bad):
    L = 130
    q, k, v = as_kind(kind, *cases.arrays(1, 1, 1, L, L, 16))
    for j in (0, 1, 63, 64, 77, 129):
        for options in ({"causal": True}, {"window": (3, 5)}):
            clean = flash_attention(q, k, v, **options)
            spoiled_k, spoiled_v = k.copy(), v.copy()
            spoiled_k[:, :, j], spoiled_v[:, :, j] = np.nan, bad
            out, lse = flash_attention(q, spoiled_k, spoiled_v, **options, return_lse=True)
            case = bounds_half.Case(q, spoiled_k, spoiled_v, native=is_native(build, q, k, v), **options)
            case.check(out, lse)
            unaware = ~np.isnan(case.expected_lse[0, 0])
            assert unaware.sum() < L and (unaware.any() or j == 0)
            assert_same_bits(out[0, 0, unaware], clean[0, 0, unaware])


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_visible_bad_numbers_show(build, kind, where, bad):
    for Lq, L, D in itertools.product((1, 5, 50), (1, 2, 7, 16, 17, 33, 65, 130), (1, 8, 33)):
        arrays = dict(zip("qkv", as_kind(kind, *cases.arrays(1, 1, 1, Lq, L, D)), strict=True))
        arrays["q"], arrays["k"] = np.abs(arrays["q"]), np.abs(arrays["k"])  # an infinite score has one sign
        rows = Lq if where == "q" else L
        for j in {0, rows // 2, rows - 1}:
            spoiled = arrays | {where: arrays[where].copy()}
            spoiled[where][0, 0, j, D // 2] = bad
            case = bounds_half.Case(**spoiled, native=is_native(build, *spoiled.values()))
            out, lse = flash_attention(**spoiled, return_lse=True)
            if np.isposinf(case.expected_lse).any():  # the formula's lse is inf, a running maximum's is NaN
                assert np.isnan(case.expected[np.isposinf(case.expected_lse)]).all()
                lse = None
            case.check(out, lse)


def test_rows_that_see_nothing(build, kind):
    q, k, v = as_kind(kind, *cases.arrays(1, 2, 2, 60, 50, 16))
    hide = np.ones((60, 50), bool)
    hide[[0, 3, 17, 59]] = False
    out, lse = flash_attention(q, k, v, mask=hide, return_lse=True)
    assert not out[:, :, [0, 3, 17, 59]].any() and (lse[:, :, [0, 3, 17, 59]] == -np.inf).all()
    verify(build, q, k, v, mask=hide)
    verify(build, q, k, v, causal=True)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_scores_beyond_the_range_of_exp(build, kind, size):
    """Scores are exact, so the bound stays small."""
    r = np.random.default_rng(3)
    q, v = np.ones((1, 1, 40, 1), np.float32), cases.arrays(1, 1, Lq=70, D=9)[2]
    k = np.float32(size) * (1 + r.integers(0, 5, (1, 1, 70, 1)) / 64).astype(np.float32)
    verify(build, *as_kind(kind, q, k, v), scale=1.0)


# int8 attention

INT8 = {
    "defaults": {},
    "bf16": {"pv": "bf16"},
    "fp32": {"pv": "fp32"},
    "head": {"granularity": "head", "smooth_k": False},
    "tensor": {"granularity": "tensor", "smooth_k": True},
    "sinks in float32": {"fp32_sinks": 5},
    "sinks and bf16": {"fp32_sinks": 17, "pv": "bf16", "granularity": ("token", "head", "tensor")},
    "static": {"q_scale": 0.03, "k_scale": 0.03, "v_scale": 0.03, "smooth_k": False},
}


@pytest.mark.parametrize("name", INT8)
@pytest.mark.parametrize("options", ["none", "all"])
def test_int8_of_every_kind(build, kind, name, options):
    """To the bit: codes and scales are those of the values in float32, and so is all that follows."""
    for shape in ((2, 4, 2, 60, 150, 40, 24), (1, 4, 1, 1, 300, 33, 17)):
        B, H, _, Lq, Lk, *_ = shape
        given = cases.all_options(B, H, Lq, Lk) if options == "all" else {}
        qkv = as_kind(kind, *cases.arrays(*shape))
        out, lse = flash_attention_int8(*qkv, **INT8[name], **given, return_lse=True)
        expected, expected_lse = flash_attention_int8(*exact(*qkv), **INT8[name], **given, return_lse=True)
        assert_same_bits(out, rounded(expected, qkv[0].dtype))
        assert_same_bits(lse, expected_lse)


@pytest.mark.parametrize("kinds", MIXED, ids="-".join)
def test_int8_of_dtypes_that_differ(kinds):
    qkv = mixed(kinds, 1, 2, 1, 40, 70, 20, 12)
    for options in ({"fp32_sinks": 3}, {"pv": "fp32"}):
        expected = flash_attention_int8(*exact(*qkv), **options)
        assert_same_bits(flash_attention_int8(*qkv, **options), rounded(expected, qkv[0].dtype))


def test_int8_of_floats_beside_codes(build, kind):
    """The usual call of a server: q in 16 bits, k and v quantised; and the other way round."""
    q, k, v = as_kind(kind, *cases.arrays(1, 4, 2, 30, 50, 16))
    tensors = quantize(k, "token", smooth=True, fp32_sinks=2), quantize(v, "token", fp32_sinks=2)
    expected = flash_attention_int8(*exact(q), *tensors)
    assert_same_bits(flash_attention_int8(q, *tensors), rounded(expected, q.dtype))
    codes = quantize(q, "token")
    assert_same_bits(flash_attention_int8(codes, k, v), flash_attention_int8(codes, *exact(k, v)))


def test_int8_counts_what_saturates(kind):
    from cyflash.quant import LayerScales, watch

    qkv = as_kind(kind, *cases.arrays(1, 2, 2, 40, 70, 16))
    counts = []
    for arrays in (qkv, exact(*qkv)):
        scales = {"layer": LayerScales(0.01, 0.01, 0.01)}
        with watch(scales) as w:
            flash_attention_int8(*arrays, quant=scales["layer"])
        counts.append(w.counts)
    assert counts[0] == counts[1] and counts[0]["layer"]["q"][0] > 0


def test_int8_of_a_plan(kind):
    """A layer in parts, one of them not quantised; heads that are views, and heads that are copied."""
    from cyflash.quant import LayerScales

    q, k, v = as_kind(kind, *cases.arrays(1, 8, 4, 40, 70, 16))
    for coded, others in (([0, 1], [2, 3]), ([0, 1, 3], [2])):
        planned = LayerScales(parts=[(coded, LayerScales(0.03, 0.03, 0.03)), (others, None)])
        out, lse = flash_attention_int8(q, k, v, quant=planned, return_lse=True)
        expected, expected_lse = flash_attention_int8(*exact(q, k, v), quant=planned, return_lse=True)
        rows = [2 * head + i for head in coded for i in (0, 1)]
        assert_same_bits(out[:, rows], rounded(expected[:, rows], q.dtype))
        assert_same_bits(lse[:, rows], expected_lse[:, rows])
        rows = [2 * head + i for head in others for i in (0, 1)]
        assert_same_bits(out[:, rows], flash_attention(q[:, rows], k[:, others], v[:, others]))


# Errors


@pytest.mark.parametrize("function", [flash_attention, flash_attention_int8])
@pytest.mark.parametrize("dtype", ["f8", ">f4", ">f2", "i4", "u2", "c8", "?"])
@pytest.mark.parametrize("name", "qkv")
def test_other_dtypes_are_refused(function, name, dtype):
    arrays = dict(zip("qkv", as_kind("fp16", *cases.arrays(1, 1, Lq=5, D=4)), strict=True))
    arrays[name] = arrays[name].astype(dtype)
    with pytest.raises(TypeError, match=rf"{name}: expected float32.*float16.*bfloat16.* got {np.dtype(dtype).name}"):
        function(**arrays)


def test_float16_needs_no_ml_dtypes():
    qkv = as_kind("fp16", *cases.arrays(1, 1, Lq=5, D=4))
    with mock.patch.dict(sys.modules, {"ml_dtypes": None}):
        assert flash_attention(*qkv).dtype == np.float16


# Memory

MEMORY = """
import numpy as np, {imports}
import cyflash

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))

L, D = 1 << 17, 32
q, k, v = (np.ones((n, L, D), {dtype}) for n in (2, 1, 1))  # 16, 8 and 8 MB
out = np.ones_like(q)
cyflash.set_implementation("{build}")
cyflash.{function}(q[:, :100], k[:, :100], v[:, :100], window=(30, 0), num_threads=3)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
cyflash.{function}({arguments}, window=(30, 0), num_threads=3, out=out)
print(status("VmHWM") - before)
"""


def extra_megabytes(build, kind, arguments="q, k, v", function="flash_attention"):
    dtype_of(kind)
    dtype = {"fp32": "np.float32", "fp16": "np.float16", "bf16": "ml_dtypes.bfloat16"}[kind]
    imports = "ml_dtypes" if kind == "bf16" else "sys"
    script = textwrap.dedent(MEMORY).format(
        imports=imports, dtype=dtype, build=build, arguments=arguments, function=function
    )
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_nothing_is_converted_whole(build, kind):
    assert extra_megabytes(build, kind) < 8
    assert extra_megabytes(build, kind, "q, k.astype(np.float32), v") > 12, "the measurement does not see a copy"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_int8_converts_nothing_whole(kind):
    """Beside codes and scales there is no more than beside float32 arrays, of which nothing is a copy."""
    build = cyflash.cpu.name_of(cyflash.cpu.active())
    of_float32 = extra_megabytes(build, "fp32", function="flash_attention_int8")
    assert extra_megabytes(build, kind, function="flash_attention_int8") < of_float32 + 4
