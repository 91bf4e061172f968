"""Bad input of int8 attention: a clear error that names the argument, what was expected, what came and the way out."""
import cases
import numpy as np
import pytest

import cyflash
from cyflash import FlashAttentionConfig, flash_attention_int8
from cyflash.quant import LayerScales, QuantizedTensor, quantize

B, H, Hk, Lq, Lk, D = 2, 4, 2, 10, 12, 8
F32 = np.float32
FLOATS = dict(zip("qkv", cases.arrays(B, H, Hk, Lq, Lk, D), strict=True))
Q, K, V = (quantize(x, "token") for x in FLOATS.values())
TENSORS = {"q": Q, "k": K, "v": V}
SMOOTH_K = quantize(FLOATS["k"], "token", smooth=True)
K3, V3 = (quantize(FLOATS[name], "token", fp32_sinks=3) for name in "kv")


def cast(name, dtype):
    return {name: FLOATS[name].astype(dtype)}


def coded(name, scale=0.02):
    """One operand as int8 codes; without a scale if that is None."""
    return {name: TENSORS[name].data} | ({} if scale is None else {f"{name}_scale": scale})


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


SCALES = {  # what a scale may not be, for (B, Hk, Lk, D)
    "zero": (ValueError, 0.0, ["positive finite", "got 0.0"]),
    "negative": (ValueError, -0.1, ["positive", "got -0.1"]),
    "nan": (ValueError, np.nan, ["finite", "got nan"]),
    "inf": (ValueError, np.inf, ["finite", "got inf"]),
    "denormal": (ValueError, 1e-39, ["at least 1.18e-38", "got 1e-39"]),
    "beyond float32": (ValueError, 1e39, ["got 1e+39"]),
    "one zero among others": (ValueError, np.array([[[0.5]], [[0.0]]]), ["got 0.0 at (1, 0, 0)"]),
    "one nan among tokens": (ValueError, np.where(np.arange(Lk) == 7, np.nan, 1).reshape(Lk, 1), ["got nan at (7, 0)"]),
    "one axis, per head": (ValueError, ones(Hk), ["(H, 1, 1)", "got shape (2,)", "np.reshape({}, (-1, 1, 1))"]),
    "one axis, per token": (ValueError, ones(Lk), ["(B, H, L, 1)", "got shape (12,)", "np.reshape({}, (-1, 1))"]),
    "one axis, one number": (ValueError, [0.1], ["got shape (1,)", "np.reshape({}, (-1, 1, 1))"]),
    "of the query heads": (ValueError, ones(H, 1, 1), ["(2, 2, 12, 8)", "got shape (4, 1, 1)", "does not broadcast"]),
    "of another length": (ValueError, ones(1, 1, Lk + 1, 1), ["(1, 1, 13, 1)", "does not broadcast"]),
    "per channel": (ValueError, ones(1, 1, 1, D), ["(1, 1, 1, 8)", "the same for all channels"]),
    "five axes": (ValueError, ones(1, 1, 1, 1, 1), ["(1, 1, 1, 1, 1)", "does not broadcast"]),
    "no heads": (ValueError, ones(0, 1, 1), ["(0, 1, 1)", "does not broadcast"]),
    "text": (TypeError, "0.1", ["number", "'0.1'"]),
    "bool": (TypeError, True, ["number", "True"]),
    "list of text": (TypeError, [["a"]], ["number"]),
    "integers": (TypeError, ones(Hk, 1, 1, dtype="i8"), ["float32 or float64", "i8", "{}.astype(np.float32)"]),
    "float16": (TypeError, ones(Hk, 1, 1, dtype="f2"), ["float32 or float64", "f2", "{}.astype(np.float32)"]),
    "big-endian": (TypeError, ones(Hk, 1, 1, dtype=">f4"), [">f4"]),
    "masked": (TypeError, np.ma.ones((Hk, 1, 1)), ["plain array", "MaskedArray"]),
}


def wrong_dtypes():
    for name in "qkv":
        for dtype in ("f8", "u1", "i2", "i4", "c8", "?"):
            dtype = np.dtype(dtype)
            yield f"{name} {dtype.name}", TypeError, cast(name, dtype), [
                f"{name}: expected float32 (or float16, bfloat16), int8 or a QuantizedTensor, got {dtype.name}",
                f"{name}.astype(np.float32)",
            ]
        yield f"{name} big-endian", TypeError, cast(name, ">f4"), [f"{name}: expected float32", "byte order (>f4)"]
        yield f"{name} a list", TypeError, {name: [[1.0]]}, [f"{name}: expected a NumPy array, got list"]
        yield f"{name} None", TypeError, {name: None}, [f"{name}: expected", "NoneType"]
        yield f"{name} masked", TypeError, {name: np.ma.array(FLOATS[name])}, [f"{name}: expected a plain array"]
        masked = coded(name) | {name: np.ma.array(TENSORS[name].data)}
        yield f"{name} masked codes", TypeError, masked, [f"{name}: expected a plain array"]


def wrong_scales():
    for name, (error, scale, parts) in SCALES.items():
        for x in "kv":
            argument = f"{x}_scale"
            parts_of_x = [f"{argument}: expected", *(part.format(argument) for part in parts)]
            yield f"{argument} {name}, float", error, {argument: scale}, parts_of_x
            yield f"{argument} {name}, int8", error, coded(x, scale), parts_of_x
    yield "q_scale of the kv heads", ValueError, {"q_scale": ones(Hk, 1, 1)}, ["q_scale: expected", "(2, 4, 10, 8)"]
    for shape in ((4, 1, 1), (13, 1), (1,)):
        quant = {"quant": LayerScales(v_scale=np.ones(shape))}
        yield f"quant's of {shape}", ValueError, quant, ["quant.v_scale: expected", "(2, 2, 12, 8)", str(shape)]


def scales_that_conflict():
    for x in "qkv":
        argument = f"{x}_scale"
        yield f"{x} int8 alone", ValueError, coded(x, None), [
            f"{argument}: expected the scale of the int8 array {x}, got None", f"write {argument}=", "QuantizedTensor",
        ]
        yield f"{x} int8, quant without", ValueError, coded(x, None) | {"quant": LayerScales()}, [
            f"quant.{argument}: expected the scale of the int8 array {x}", f"LayerScales({argument}=",
        ]
        for scale in (0.1, TENSORS[x].scale):  # the tensor's own is no exception
            yield f"{argument} beside a QuantizedTensor, {np.size(scale)}", ValueError, {
                x: TENSORS[x], argument: scale,
            }, [f"{argument}: expected None", f"{x} is a QuantizedTensor with its own scale"]
        for how, operand in (("float", {}), ("int8", coded(x)), ("QuantizedTensor", {x: TENSORS[x]})):
            quant = {"quant": LayerScales(0.1, 0.1, 0.1), argument: 0.1}
            yield f"{argument} beside quant, {how}", ValueError, operand | quant, [
                f"{argument}: expected None beside quant", "pass one of the two",
            ]
        for another, scale in (("another", 0.5), ("another of one shape", 2 * TENSORS[x].scale)):
            yield f"{x} QuantizedTensor, quant of {another} {argument}", ValueError, {
                x: TENSORS[x], "quant": LayerScales(**{argument: scale}),
            }, [f"quant: expected the scale that {x} was quantised with", f"quant.{argument}"]


def choices():
    for pv in ("fp16", "INT8", "uint8", 8, True, ["int8"]):
        yield f"pv {pv!r}", ValueError, {"pv": pv}, ["pv: expected one of 'int8', 'bf16', 'fp32'", repr(pv)]
    for one in ("row", "Token", "channel", 1, {"q": "head"}):
        yield f"granularity {one!r}", ValueError, {"granularity": one}, [
            "granularity: expected one of 'tensor', 'head', 'token'", repr(one),
        ]
    for several in (("tensor",), ("token", "token"), ["head"] * 4, ()):
        yield f"granularity {several!r}", ValueError, {"granularity": several}, [
            "granularity: expected one or three for (q, k, v)", repr(several),
        ]
    yield "granularity with None", ValueError, {"granularity": ("head", None, "token")}, ["granularity: ", "got None"]
    yield "granularity of codes", ValueError, TENSORS | {"granularity": "row"}, ["granularity: ", "'row'"]
    for smooth in (1, 0, "yes", np.array(True)):
        yield f"smooth_k {smooth!r}", ValueError, {"smooth_k": smooth}, [
            "smooth_k: expected True, False or None", repr(smooth),
        ]
    for quant in ({}, 0.1, LayerScales, (0.1, 0.1, 0.1)):
        yield f"quant {quant!r}", TypeError, {"quant": quant}, ["quant: expected a LayerScales", type(quant).__name__]


def means():
    other = SMOOTH_K.mean + F32(1)
    true, false = {"smooth_k": True}, {"smooth_k": False}
    cases_of_means = {
        "smooth an int8 k": (coded("k") | true, ["smooth_k: ", "int8 k", "quantize(k, smooth=True)", "float32"]),
        "smooth a tensor without": ({"k": K} | true, ["smooth_k: expected a k", "smooth=True", "without a mean"]),
        "a tensor's mean refused": ({"k": SMOOTH_K} | false, ["smooth_k: expected True or None", "k carries a mean"]),
        "quant's mean refused": ({"quant": LayerScales(k_mean=other)} | false, ["smooth_k: ", "quant carries a mean"]),
        "quant's mean of codes refused": (
            coded("k", None) | {"quant": LayerScales(k_scale=0.1, k_mean=other)} | false,
            ["smooth_k: ", "quant carries"],
        ),
        "quant without the mean": ({"quant": LayerScales(k_scale=0.1)} | true, ["smooth_k: ", "k_mean is None"]),
        "quant of another mean": ({"k": SMOOTH_K, "quant": LayerScales(k_mean=other)}, ["quant: ", "k_mean"]),
        "quant's mean, tensor without": ({"k": K, "quant": LayerScales(k_mean=other)}, ["quant: ", "k_mean"]),
        "k_mean of other heads": (
            {"quant": LayerScales(k_mean=np.zeros((3, 1, D)))},
            ["quant.k_mean: expected", "(2, 2, 1, 8)", "got (3, 1, 8)"],
        ),
        "k_mean of other channels": ({"quant": LayerScales(k_mean=np.zeros(D + 1))}, ["quant.k_mean: ", "got (9,)"]),
        "a mean of q": ({"q": quantize(FLOATS["q"], smooth=True)}, ["q: expected", "without a mean", "for k"]),
        "a mean of v": ({"v": quantize(FLOATS["v"], smooth=True)}, ["v: expected", "without a mean", "for k"]),
    }
    for name, (change, parts) in cases_of_means.items():
        yield name, ValueError, change, parts


def float_rows():
    for n in (-1, 1.0, 2.5, True, "3", np.float32(2)):
        yield f"fp32_sinks {n!r}", ValueError, {"fp32_sinks": n}, ["fp32_sinks: expected an integer", repr(n)]
    many = ["fp32_sinks: expected at most the 12 keys of k (2, 2, 12, 8), got 13"]
    yield "more than keys", ValueError, {"fp32_sinks": Lk + 1}, many
    contradicted = {"quant": LayerScales(fp32_sinks=2), "fp32_sinks": 3}
    yield "against quant", ValueError, contradicted, ["fp32_sinks: expected quant's 2 or None, got 3"]
    yield "against quant's default", ValueError, {"quant": LayerScales(), "fp32_sinks": 1}, ["quant's 0 or None, got 1"]
    for x, carrying in (("k", K3), ("v", V3)):
        way_out = f"cyflash.quant.quantize({x}, fp32_sinks=3)"
        needed = [f"fp32_sinks: the first 3 rows of {x}", "float32", "int8", way_out]
        yield f"{x} int8", ValueError, coded(x) | {"fp32_sinks": 3}, needed
        quant = LayerScales(**{f"{x}_scale": 0.1}, fp32_sinks=3)
        yield f"{x} int8, quant", ValueError, coded(x, None) | {"quant": quant}, needed
        for n, tensor in ((3, TENSORS[x]), (2, carrying), (0, carrying)):
            own = 0 if tensor.fp32_rows is None else 3
            parts = [f"fp32_sinks: {x} was quantised with fp32_sinks={own}, got {n}", "the same number"]
            yield f"{n} for {x} of {own}", ValueError, {x: tensor, "fp32_sinks": n}, parts
            quant = {"quant": LayerScales(fp32_sinks=n)}
            yield f"quant's {n} for {x} of {own}", ValueError, {x: tensor} | quant, parts
    for n, k, v in ((0, K, V3), (0, SMOOTH_K, V3), (3, K3, V), (2, quantize(FLOATS["k"], fp32_sinks=2), V3)):
        yield f"k of {n}, v of {3 if v is V3 else 0}, {k.mean is None}", ValueError, {"k": k, "v": v}, [
            "fp32_sinks: ", "was quantised with", "quantise k and v with the same number",
        ]
    yield "k of rows, v int8", ValueError, {"k": K3} | coded("v"), ["fp32_sinks: the first 3 rows of v", "int8"]
    q = quantize(FLOATS["q"], fp32_sinks=1)
    yield "rows of q", ValueError, {"q": q}, ["q: expected a QuantizedTensor without fp32_rows"]


def shapes():
    codes = np.zeros((3, 2, 2, 2, 2), np.int8)
    yield "five axes of codes", ValueError, {"k": codes, "k_scale": 0.1}, ["k: expected 2 or 3 or 4", "(3, 2, 2, 2, 2)"]
    yield "one axis", ValueError, {"q": codes[0, 0, 0, 0], "q_scale": 0.1}, ["q: expected 2 or 3 or 4", "(2,)"]
    yield "axes of a tensor", ValueError, {"k": quantize(FLOATS["k"][0])}, ["k: expected 4 dimensions", "(2, 12, 8)"]
    yield "batch of a tensor", ValueError, {"v": quantize(FLOATS["v"][:1])}, ["v: expected", "(1, 2, 12, 8)"]
    yield "heads", ValueError, {"k": zero_codes(B, 3, Lk, D), "k_scale": 0.1}, ["k: expected", "divides q's 4", "3"]
    yield "head_dim", ValueError, {"k": zero_codes(B, Hk, Lk, D + 1), "k_scale": 0.1}, ["k: expected", "D=8"]
    yield "length", ValueError, {"v": zero_codes(B, Hk, Lk + 1, D), "v_scale": 0.1}, ["v: expected", "(2, 2, 13, 8)"]
    dropout = {"config": FlashAttentionConfig(head_dim=D, num_heads=H, dropout_p=0.1)}
    yield "dropout of config", NotImplementedError, dropout, ["dropout_p"]
    yield "dropout", TypeError, {"dropout_p": 0.0}, ["dropout_p"]


def zero_codes(*shape):
    return np.zeros(shape, np.int8)


KINDS = (wrong_dtypes, wrong_scales, scales_that_conflict, choices, means, float_rows, shapes)
CASES = {
    f"{kind.__name__}: {name}": (error, change, parts) for kind in KINDS for name, error, change, parts in kind()
}
assert len(CASES) == sum(len(list(kind())) for kind in KINDS), "names are not unique"


@pytest.mark.parametrize("name", CASES)
def test_bad_arguments(name):
    """The error says so, nothing is written, and the next call is none the worse."""
    error, change, parts = CASES[name]
    out = np.full((B, H, Lq, D), 7, F32)
    with pytest.raises(error) as caught:
        flash_attention_int8(**(FLOATS | change), out=out)
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))
    assert (out == 7).all()


def test_the_same_arguments_rightly_used():
    """What the cases above change is accepted in itself: it is the change that raises."""
    for change in ({}, {"k": SMOOTH_K, "smooth_k": True}, {"k": K3, "v": V3}, {"k": K3, "v": V3, "fp32_sinks": 3},
                   TENSORS, coded("q") | coded("k") | coded("v"), {"quant": LayerScales(0.1, 0.1, 0.1)},
                   {"k_scale": ones(Hk, 1, 1), "v_scale": ones(Lk, 1), "q_scale": [[[0.1]]]},
                   {"k": K, "quant": LayerScales(k_scale=K.scale)}, {"granularity": ["tensor", "head", "token"]}):
        assert np.isfinite(flash_attention_int8(**(FLOATS | change))).all()


@pytest.mark.parametrize("text", [str, np.str_])
def test_text_of_any_kind(text):
    """A NumPy string is a string."""
    for pv in ("int8", "bf16", "fp32"):
        expected = flash_attention_int8(**FLOATS, pv=pv, granularity="head")
        result = flash_attention_int8(**FLOATS, pv=text(pv), granularity=text("head"))
        cases.assert_same_bits([result], [expected])
        quant = LayerScales(0.1, 0.1, 0.1, pv=text(pv))
        assert np.isfinite(flash_attention_int8(**FLOATS, quant=quant)).all()


def test_out_over_codes():
    """Codes and the output in one piece of memory."""
    memory = np.zeros(4 * B * H * Lq * D, np.int8)
    out = memory.view(F32).reshape(B, H, Lq, D)
    codes = memory[: out.size].reshape(out.shape)
    for change in ({"q": codes, "q_scale": 0.1}, {"q": QuantizedTensor(codes, 0.1)}):
        with pytest.raises(ValueError, match="out: expected memory of its own, got an array that overlaps q"):
            flash_attention_int8(**(FLOATS | change), out=out)
    with pytest.raises(TypeError, match="out: expected float32, got int8"):
        flash_attention_int8(**FLOATS, out=zero_codes(B, H, Lq, D))


@pytest.mark.parametrize("part", ["mean", "fp32_rows"])
def test_out_over_what_a_tensor_was_made_of(part):
    """No error, as a QuantizedTensor keeps a copy, and no other result: later heads do not read what former wrote."""
    q, k, v = cases.arrays(1, 4, 1, 300, 300, 16)
    k, v = quantize(k, smooth=True, fp32_sinks=300), quantize(v, fp32_sinks=300)
    if part == "mean":
        k, v = (QuantizedTensor(x.data, 0.02, x.mean) for x in (k, v))
    expected = flash_attention_int8(q, k, v)
    memory = np.zeros(expected.shape, F32)
    x = memory[:, :1, : getattr(k, part).shape[2]]
    x[...] = getattr(k, part)
    k = QuantizedTensor(k.data, k.scale, **({"mean": k.mean, "fp32_rows": k.fp32_rows} | {part: x}))
    cases.assert_same_bits([flash_attention_int8(q, k, v, out=memory, num_threads=1)], [expected])


def test_codes_beyond_float32():
    """Where codes are decoded, what is beyond float32 becomes its largest: no warning, no error about the floats."""
    lowest = {"q": np.full((1, 2, D), -128, np.int8), "q_scale": 1e37, "k": np.zeros((1, 5, D), F32)}
    out = flash_attention_int8(**lowest, v=FLOATS["v"][0, :1, :5], fp32_sinks=2)
    assert np.isfinite(out).all()
    v = {"v": np.full((1, 1, D), 127, np.int8), "v_scale": float(np.finfo(F32).max)}
    out = flash_attention_int8(FLOATS["q"][0], np.zeros((1, 1, D), F32), **v, pv="fp32")
    assert (out == np.finfo(F32).max).all()


def test_every_build_refuses_the_same(build):
    for change in (cast("q", "f8"), {"k_scale": 0.0}, coded("v", None), {"k": K, "v": V3}):
        with pytest.raises((TypeError, ValueError), match=r"expected|fp32_sinks"):
            flash_attention_int8(**(FLOATS | change))
    assert cyflash.cpu_info()["implementation"] == build
