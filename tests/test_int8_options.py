"""Every option of int8 attention alone and together against the simulation, random calls, and none of them is ignored.

Tolerances are derived, not chosen: see bounds_int8.py.
"""
import itertools

import bounds_int8
import cases
import cases_int8
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_property import broadcast_shapes, layout, shapes

import cyflash
from cyflash import FlashAttentionConfig, reference
from cyflash.quantized import LayerScales, QuantizedTensor, quantize

B, H, Hk, Lq, Lk, D, Dv = 2, 2, 1, 40, 50, 24, 20
PV = ("int8", "bf16", "fp32")
GRANULARITIES = ("tensor", "head", "token")


def inputs(Lq=Lq, Lk=Lk):
    return cases.arrays(B, H, Hk, Lq, Lk, D, Dv)


@pytest.mark.parametrize("name", cases.NAMES)
def test_alone(build, name):
    for lengths, pv in (((90, 150), "int8"), ((40, 50), "bf16"), ((50, 40), "fp32")):
        cases_int8.verify(*inputs(*lengths), **cases.options(name, B, H, *lengths), pv=pv)


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("lengths", [(40, 50), (1, 300), (150, 1), (13, 300), (110, 150)], ids=str)
def test_all_together(build, lengths, pv):
    q, k, v = inputs(*lengths)
    options = cases.all_options(B, H, *lengths) | {"pv": pv}
    cases_int8.verify(q, k, v, **options)
    cases_int8.verify(q, k, v, **options, causal_align="top-left", fp32_sinks=min(4, lengths[1]))


@pytest.mark.parametrize("of_q", GRANULARITIES)
def test_granularities(build, of_q):
    q, k, v = inputs(20, 50)
    for of_k, of_v in itertools.product(GRANULARITIES, repeat=2):
        cases_int8.verify(q, k, v, granularity=(of_q, of_k, of_v), smooth_k=False)
        cases_int8.verify(q, k, v, granularity=(of_q, of_k, of_v), fp32_sinks=3)


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantised_values_in_every_arithmetic(build, granularity, pv):
    """With bf16 and fp32 a float v without a scale is used itself; one that is quantised by its codes."""
    q, k, v = inputs()
    cases_int8.verify(q, k, quantize(v, granularity), pv=pv)
    cases_int8.verify(q, quantize(k, granularity, fp32_sinks=3), quantize(v, granularity, fp32_sinks=3), pv=pv)
    cases_int8.verify(q, k, v, v_scale=0.02, pv=pv)


@pytest.mark.parametrize("pv", PV)
def test_keys_in_float32(build, pv):
    """Within a block and its parts, at their edges, beyond them, and all keys."""
    q, k, v = inputs(10, 300)
    for n in (1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 255, 256, 257, 299, 300):
        options = {"causal": True, "sinks": np.zeros(H, np.float32)} if n % 2 else {}
        cases_int8.verify(q, k, v, fp32_sinks=n, pv=pv, **options)


# None is ignored


def changes(q, k, v, with_it, without):
    """The largest change of the output that an option makes, in units of both results' bounds."""
    results = []
    for arguments in (with_it, without):
        out, lse, _, size = cases_int8.run(q, k, v, **arguments)
        case = cases_int8.case(q, k, v, block_size=size, **arguments)
        case.check(out, lse)
        bound = [bounds_int8.judge(part, case.call, size) for part in case.parts]
        results.append((out, np.array([x.bound for x in bound]).reshape(out.shape)))
    (a, bound_a), (b, bound_b) = results
    return float((np.abs(a - b) / (bound_a + bound_b)).max())


@pytest.mark.parametrize("ignored", cases.ARGUMENTS)
def test_options_of_attention_are_not_ignored(build, ignored):
    q, k, v = inputs()
    options = cases.all_options(B, H, Lq, Lk) | {"causal_align": "top-left"}
    rest = {name: value for name, value in options.items() if name != ignored}
    assert changes(q, k, v, options, rest) > 10


SCALES = {"q_scale": np.float32(0.02), "k_scale": np.full((Hk, 1, 1), 0.02, np.float32),
          "v_scale": np.full((B, Hk, Lk, 1), 0.02, np.float32)}
INT8_OPTIONS = {
    **{name: ({name: scale}, {}) for name, scale in SCALES.items()},
    "granularity of q": ({"granularity": ("tensor", "token", "token")}, {}),
    "granularity of k": ({"granularity": ("token", "head", "token")}, {}),
    "granularity of v": ({"granularity": ("token", "token", "tensor")}, {}),
    "smooth_k": ({"smooth_k": False}, {}),
    "smooth_k with a static scale": ({"k_scale": 0.1, "smooth_k": True}, {"k_scale": 0.1}),
    "fp32_sinks": ({"fp32_sinks": 5}, {}),
    "pv=bf16": ({"pv": "bf16"}, {}),
    "pv=fp32": ({"pv": "fp32"}, {"pv": "bf16"}),
    "quant.q_scale": ({"quant": LayerScales(0.02)}, {"quant": LayerScales()}),
    "quant.k_scale": ({"quant": LayerScales(None, 0.02)}, {"smooth_k": False}),
    "quant.v_scale": ({"quant": LayerScales(None, None, 0.02)}, {"quant": LayerScales()}),
    "quant.k_mean": ({"quant": LayerScales(k_mean=np.ones((Hk, 1, D)))}, {"quant": LayerScales()}),
    "quant.fp32_sinks": ({"quant": LayerScales(fp32_sinks=5)}, {"quant": LayerScales()}),
    "quant.pv": ({"quant": LayerScales(pv="bf16")}, {"quant": LayerScales()}),
    "pv over quant": ({"quant": LayerScales(pv="bf16"), "pv": "int8"}, {"quant": LayerScales(pv="bf16")}),
}


@pytest.mark.parametrize("name", INT8_OPTIONS)
def test_options_of_int8_are_not_ignored(build, name):
    """Each moves the result beyond what roundings and flipped codes explain, to where the simulation has it."""
    q, k, v = inputs()
    k = k + np.float32(3) * k[:, :, :1]  # a common part, so that smoothing matters
    assert changes(q, k, v, *INT8_OPTIONS[name]) > 1


@pytest.mark.parametrize("which", ["data", "scale", "mean", "fp32_rows"])
@pytest.mark.parametrize("name", ["k", "v"])
def test_parts_of_a_quantized_tensor_are_not_ignored(build, name, which):
    if (name, which) == ("v", "mean"):
        pytest.skip("values have no mean")
    arrays = dict(zip("qkv", inputs(), strict=True))
    tensors = {x: quantize(arrays[x], "token", smooth=x == "k", fp32_sinks=3) for x in "kv"}
    x = tensors[name]
    parts = {part: getattr(x, part) for part in ("data", "scale", "mean", "fp32_rows")}
    parts[which] = parts[which] + arrays["k"][:, :, :1] if which == "mean" else parts[which][:, :, ::-1].copy()
    parts["data"][:, :, :3] = 0
    changed = tensors | {name: QuantizedTensor(**parts)}
    first = cases_int8.run(arrays["q"], **tensors)[0]
    cases_int8.verify(arrays["q"], **tensors)
    cases_int8.verify(arrays["q"], **changed)
    assert np.abs(cases_int8.run(arrays["q"], **changed)[0] - first).max() > 1e-2


# Hard cases


@pytest.mark.parametrize("pv", PV)
def test_rows_that_see_nothing_of_some_blocks(build, pv):
    """Masks that leave rows whole blocks, one key of a block, or nothing at all."""
    q, k, v = inputs(30, 400)
    r = np.random.default_rng(0)
    blocks = r.random((30, 400 // 8)) < 0.3
    mask = np.repeat(blocks, 8, axis=1)
    mask[::7] = False
    mask[::7, r.integers(0, 400)] = True
    mask[5] = mask[11] = False
    bias = np.where(np.repeat(r.random((30, 50)) < 0.5, 8, axis=1), np.float32(-np.inf), np.float32(0))
    for options in ({"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias, "causal": True, "window": (100, 20)}):
        report = cases_int8.verify(q, k, v, **options, pv=pv)
        assert report.worst < 1
    out, lse, *_ = cases_int8.run(q, k, v, mask=mask, pv=pv, fp32_sinks=4)
    assert not out[:, :, [5, 11]].any() and (lse[:, :, [5, 11]] == -np.inf).all()
    sinks = np.arange(H, dtype=np.float32)
    out, lse, *_ = cases_int8.run(q, k, v, mask=mask, pv=pv, sinks=sinks)
    assert not out[:, :, [5, 11]].any() and (lse[:, :, [5, 11]] == sinks[:, None]).all()


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("which", ["q", "k", "v", "all"])
def test_scales_a_million_times_apart(build, which, pv):
    """Norms of tokens from 1e-3 to 1e3, in random order and beside each other."""
    arrays = dict(zip("qkv", inputs(40, 300), strict=True))
    r = np.random.default_rng(1)
    for name in arrays if which == "all" else which:
        x = arrays[name]
        arrays[name] = (x * 10.0 ** r.integers(-3, 4, (*x.shape[:-1], 1))).astype(np.float32)
    scale = 0.01 if which in ("q", "k") else 1e-5 if which == "all" else None
    cases_int8.verify(**arrays, pv=pv, scale=scale)
    cases_int8.verify(**arrays, pv=pv, scale=scale, causal=True, fp32_sinks=2)


@pytest.mark.parametrize("pv", PV)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 1000), (5, 0), (0, 5), (0, 0)], ids=str)
def test_short_and_empty(build, lengths, pv):
    if pv == "bf16":
        lengths = lengths[0], min(lengths[1], 500)  # one chunk: of several, test_split.py
    q, k, v = inputs(*lengths)
    cases_int8.verify(q, k, v, pv=pv)
    out, lse, *_ = cases_int8.run(q, k, v, pv=pv, sinks=np.ones(H, np.float32))
    assert out.shape == (B, H, lengths[0], Dv)
    if lengths[1] == 0:
        assert not out.any() and (lse == 1).all()


def test_lse_is_that_of_the_decoded_operands(build):
    """Smoothing needs no correction afterwards: float64 attention of what the codes stand for has the same."""
    q, k, v = inputs(40, 300)
    k = k + np.float32(50) * k[:, :, :1]
    a, b, c = quantize(q, "token"), quantize(k, "head", smooth=True), quantize(v, "tensor")
    for options in ({}, {"softcap": 5.0}, {"sinks": np.ones(H, np.float32)}, cases.all_options(B, H, 40, 300)):
        lse = cases_int8.run(a, b, c, **options)[1]
        decoded = (x.data.astype(np.float64) * x.scale + (0 if x.mean is None else x.mean) for x in (a, b, c))
        expected = reference.attention(*decoded, **options, return_lse=True)[1]
        np.testing.assert_allclose(lse, expected, rtol=1e-5, atol=1e-4)


# Random calls


@st.composite
def calls(draw):
    """(q, k, v), arguments: operands of every kind, options of both kinds."""
    B, H, Hk, Lq, Lk, D, Dv = draw(shapes())
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([0.01, 1.0, 4.0]))
    arrays = [np.float32(size) * cases.arrays(B, H, Hk, Lq, Lk, D, Dv, seed=i)[i] for i in range(3)]
    for i, change in enumerate(draw(st.tuples(layout, layout, layout))):
        arrays[i] = cases.LAYOUTS[change](arrays[i]) if change else arrays[i]
    arguments = {"pv": draw(st.sampled_from([None, *PV]))}
    granularity = [draw(st.sampled_from(GRANULARITIES)) for _ in range(3)]
    arguments["granularity"] = draw(st.sampled_from([None, granularity[0], tuple(granularity)]))
    n = draw(st.sampled_from([0, 0, 1, 5, 40]))
    n = min(n, Lk)
    operands = dict(zip("qkv", arrays, strict=True))
    for name, of in zip("qkv", granularity, strict=True):
        kind = draw(st.sampled_from(["float", "static", "tensor", "int8"]))
        if kind == "int8" and n and name != "q":
            kind = "tensor"
        if kind == "static":
            arguments[f"{name}_scale"] = float(np.float32(size * draw(st.sampled_from([0.005, 0.02, 0.1]))))
        elif kind == "tensor":
            smooth = name == "k" and draw(st.booleans())
            operands[name] = quantize(operands[name], of, smooth=smooth, fp32_sinks=n if name != "q" else 0)
        elif kind == "int8":
            x = quantize(operands[name], of)
            codes = np.where(r.random(x.shape) < 0.01, np.int8(-128), x.data)
            operands[name], arguments[f"{name}_scale"] = codes, x.scale
    if isinstance(operands["k"], np.ndarray) and operands["k"].dtype == np.float32:
        arguments["smooth_k"] = draw(st.sampled_from([None, True, False]))
    arguments["fp32_sinks"] = n
    return operands, arguments | draw(options(B, H, Lq, Lk, r))


@st.composite
def options(draw, B, H, Lq, Lk, r):
    """Options of `flash_attention`."""
    chosen = {}
    if draw(st.booleans()):
        chosen["causal"] = draw(st.booleans())
    if draw(st.booleans()):
        chosen["causal_align"] = draw(st.sampled_from(["bottom-right", "top-left"]))
    if draw(st.booleans()):
        chosen["scale"] = draw(st.floats(-1, 1))
    if draw(st.booleans()):
        chosen["window"] = (draw(st.integers(-1, 160)), draw(st.integers(-1, 160)))
    if draw(st.booleans()):
        chosen["softcap"] = draw(st.sampled_from([0.0, 0.5, 3.0, 50.0]))
    if draw(st.booleans()):
        shape = draw(broadcast_shapes((B, H, Lq, Lk)))
        hidden = r.random(shape) < draw(st.sampled_from([0, 0.3]))
        chosen["bias"] = np.where(hidden, -np.inf, r.standard_normal(shape)).astype(np.float32)
    if draw(st.booleans()):
        shape = draw(broadcast_shapes((B, H, Lq, Lk)))
        chosen["mask"] = np.asarray(r.random(shape) < draw(st.sampled_from([0.1, 0.5, 0.95])))
    if draw(st.booleans()):
        chosen["alibi_slopes"] = r.random(draw(st.sampled_from([(H,), (B, H)]))).astype(np.float32)
    if draw(st.booleans()):
        chosen["sinks"] = r.standard_normal(H).astype(np.float32)
    return chosen


block = st.one_of(st.none(), st.integers(1, 200))


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls(), st.sampled_from(cyflash.cpu.runnable()), st.integers(1, 3), st.tuples(block, block))
def test_any_call(call, build, threads, blocks):
    operands, arguments = call
    q = operands["q"]
    config = None
    if None not in blocks:
        config = FlashAttentionConfig(head_dim=q.shape[-1], num_heads=q.shape[1], block_size_q=blocks[0],
                                      block_size_kv=blocks[1])
    with cyflash.set_implementation(build):
        cases_int8.verify(**operands, **arguments, config=config, num_threads=threads)
