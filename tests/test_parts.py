"""Planned layers: each part of the heads has the bits of a call of its own, whatever the options and the layout."""
import cases
import numpy as np
import pytest

import cyflash
from cyflash import FlashAttentionConfig, LayerScales, flash_attention, flash_attention_int8
from cyflash.attention import attend, attend_int8
from cyflash.parts import _gathered, _of_heads

B, HK, GROUP, LQ, LK, D, DV = 2, 5, 2, 37, 70, 24, 17
H = HK * GROUP
SHAPE = (B, H, HK, LQ, LK, D, DV)


def per_head(heads, value):
    return (value * np.linspace(0.5, 1.5, heads, dtype=np.float32))[:, None, None]


MEAN = np.random.default_rng(0).standard_normal((2, 1, D), dtype=np.float32)
PLANS = {
    "one rung each": (
        ((0, 4), LayerScales(per_head(4, 0.02), per_head(2, 0.03), per_head(2, 0.02))),
        ((1,), None),
        ((2, 3), LayerScales(0.02, 0.04, None, k_mean=MEAN, fp32_sinks=3, pv="bf16")),
    ),
    "uneven": (((0, 1, 4), LayerScales(0.02, per_head(3, 0.03), 0.02)), ((2, 3), LayerScales())),
    "all in one": ((tuple(range(HK)), LayerScales(per_head(H, 0.02), 0.03, per_head(HK, 0.02), fp32_sinks=2)),),
    "all in fp32": ((range(HK), None),),
    "every other": (((1, 3), None), ((0, 2, 4), LayerScales(pv="fp32"))),
}
OPTIONS = {"none": {}} | {name: cases.options(name, B, H, LQ, LK) for name in cases.NAMES}
OPTIONS["all"] = cases.all_options(B, H, LQ, LK)
OPTIONS["bias of a head"] = {"bias": np.random.default_rng(1).standard_normal((H, 1, LK), dtype=np.float32)}
OPTIONS["bias that is broadcast"] = {"bias": np.broadcast_to(OPTIONS["bias of a head"]["bias"], (B, H, LQ, LK))}
OPTIONS["mask that is broadcast"] = {"mask": np.broadcast_to(np.arange(LK) % 3 > 0, (H, LQ, LK))}
OPTIONS["lists"] = {"alibi_slopes": [0.1 * h for h in range(H)], "sinks": [0.5 * h for h in range(H)]}


def query_heads(kv_heads, group):
    return [head for kv in kv_heads for head in range(kv * group, (kv + 1) * group)]


def of_heads(options, heads, H):
    """Options as a call of these heads alone takes them."""
    cut = dict(options)
    for name in ("bias", "mask"):
        if name in cut and cut[name].ndim > 2 and cut[name].shape[-3] == H:
            cut[name] = cut[name][..., heads, :, :]
    if "sinks" in cut:
        cut["sinks"] = np.float32(cut["sinks"])[heads]
    if "alibi_slopes" in cut:
        cut["alibi_slopes"] = np.float32(cut["alibi_slopes"])[..., heads]
    return cut


def one_by_one(plan, q, k, v, **options):
    """(out, lse) by a call for each part, on copies of its heads."""
    H, Hk = q.shape[-3], k.shape[-3]
    out, lse = np.empty((*q.shape[:-1], v.shape[-1]), np.float32), np.empty(q.shape[:-1], np.float32)
    for kv_heads, layer in plan:
        heads = query_heads(kv_heads, H // Hk)
        qkv = q[..., heads, :, :], k[..., list(kv_heads), :, :], v[..., list(kv_heads), :, :]
        cut = of_heads(options, heads, H)
        how = {} if layer is None else {"quant": layer}
        run = flash_attention if layer is None else flash_attention_int8
        out[..., heads, :, :], lse[..., heads, :] = run(*map(np.ascontiguousarray, qkv), **cut, **how, return_lse=True)
    return out, lse


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["one rung each", "uneven"])
def test_every_option(name, option):
    q, k, v = cases.arrays(*SHAPE)
    planned = LayerScales(parts=PLANS[name])
    actual = flash_attention_int8(q, k, v, quant=planned, **OPTIONS[option], return_lse=True)
    cases.assert_same_bits(actual, one_by_one(PLANS[name], q, k, v, **OPTIONS[option]))


@pytest.mark.parametrize("name", PLANS)
def test_every_build(build, name):
    q, k, v = cases.arrays(*SHAPE, seed=1)
    actual = flash_attention_int8(q, k, v, quant=LayerScales(parts=PLANS[name]), causal=True, return_lse=True)
    cases.assert_same_bits(actual, one_by_one(PLANS[name], q, k, v, causal=True))


def test_one_part_is_the_plain_call():
    q, k, v = cases.arrays(*SHAPE)
    ((_, layer),) = PLANS["all in one"]
    options = OPTIONS["all"]
    planned = flash_attention_int8(q, k, v, quant=LayerScales(parts=PLANS["all in one"]), **options, return_lse=True)
    cases.assert_same_bits(planned, flash_attention_int8(q, k, v, quant=layer, **options, return_lse=True))
    in_fp32 = flash_attention_int8(q, k, v, quant=LayerScales(parts=PLANS["all in fp32"]), **options, return_lse=True)
    cases.assert_same_bits(in_fp32, flash_attention(q, k, v, **options, return_lse=True))


@pytest.mark.parametrize("group", [1, 3])
def test_three_axes(group):
    q, k, v = (x[0] for x in cases.arrays(1, 4 * group, 4, 20, 30, 16))
    plan = (((0, 3), LayerScales(k_scale=per_head(2, 0.02))), ((1, 2), LayerScales(pv="bf16")))
    options = {"bias": np.random.default_rng(0).standard_normal((4 * group, 20, 30), dtype=np.float32)}
    actual = flash_attention_int8(q, k, v, quant=LayerScales(parts=plan), **options, return_lse=True)
    cases.assert_same_bits(actual, one_by_one(plan, q, k, v, **options))


@pytest.mark.parametrize("group", [1, 2])
def test_heads_that_begin_and_end_as_evenly_spaced_ones(group):
    """0, 2, 3, 6 are as many as 0, 2, 4, 6."""
    q, k, v = cases.arrays(2, 7 * group, 7, 20, 30, 16)
    plan = (((0, 2, 3, 6), LayerScales(pv="fp32")), ((1, 4, 5), None))
    actual = flash_attention_int8(q, k, v, quant=LayerScales(parts=plan), return_lse=True)
    cases.assert_same_bits(actual, one_by_one(plan, q, k, v))


@pytest.mark.parametrize("layer", [None, LayerScales(), LayerScales(np.full((1, 1, 1), 0.02, np.float32), 0.03, 0.02)])
def test_one_head_with_two_axes(layer):
    q, k, v = (x[0, 0] for x in cases.arrays(1, 1, 1, 20, 30, 16))
    out = np.empty((20, 16), np.float32)
    options = {"bias": np.ones((20, 30), np.float32), "sinks": [0.5], "causal": True}
    planned = LayerScales(parts=[([0], layer)])
    actual = flash_attention_int8(q, k, v, quant=planned, **options, out=out, return_lse=True)
    assert actual[0] is out and actual[1].shape == (20,)
    expected = one_by_one(planned.parts, q[None], k[None], v[None], **options)
    cases.assert_same_bits(actual, (x[0] for x in expected))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_layout(layout):
    q, k, v = cases.arrays(*SHAPE)
    expected = one_by_one(PLANS["one rung each"], q, k, v)
    other = tuple(cases.LAYOUTS[layout](x) for x in (q, k, v))
    planned = LayerScales(parts=PLANS["one rung each"])
    cases.assert_same_bits(flash_attention_int8(*other, quant=planned, return_lse=True), expected)
    out = np.empty((B, LQ, DV, H), np.float32).transpose(0, 3, 1, 2)
    assert flash_attention_int8(*other, quant=planned, out=out) is out
    cases.assert_same_bits([out], expected[:1])


def test_config_and_threads_are_honoured():
    q, k, v = cases.arrays(*SHAPE)
    planned = LayerScales(parts=PLANS["one rung each"])
    one = flash_attention_int8(q, k, v, quant=planned, num_threads=1, return_lse=True)
    cases.assert_same_bits(flash_attention_int8(q, k, v, quant=planned, num_threads=3, return_lse=True), one)

    config = FlashAttentionConfig(head_dim=D, num_heads=H, block_size_q=16, block_size_kv=32, causal=True, scale=0.3)
    actual = flash_attention_int8(q, k, v, quant=planned, config=config, return_lse=True)
    cases.assert_same_bits(actual, one_by_one(planned.parts, q, k, v, config=config))
    with pytest.raises(NotImplementedError, match="dropout_p"):
        flash_attention_int8(q, k, v, quant=planned, config=config.with_dropout(0.1))


def test_work_is_that_of_all_parts():
    q, k, v = cases.arrays(*SHAPE)
    *_, work = attend_int8(q, k, v, quant=LayerScales(parts=PLANS["one rung each"]), causal=True)
    *_, whole = attend(q, k, v, causal=True)
    assert work.flops == whole.flops and work.implementation == whole.implementation
    parts = [attend(q[:, :2], k[:, :1], v[:, :1])[2], attend_int8(q[:, :2], k[:, :1], v[:, :1], pv="bf16")[2]]
    assert work.tile_bytes >= max(part.tile_bytes for part in parts)


def test_evenly_spaced_heads_are_views():
    x, room = np.arange(2 * 6 * 4 * 3, dtype=np.float32).reshape(2, 6, 4, 3), np.empty((2, 6, 4, 3), np.float32)
    for heads in ((0,), (5,), (1, 2, 3), (0, 2, 4), (1, 5), tuple(range(6))):
        for taken in (_gathered(x, heads, room), _of_heads(x, heads)):
            assert np.shares_memory(taken, x) and np.array_equal(taken, x[:, list(heads)]), heads
    for taken in (_gathered(x, (0, 1, 3), room), _of_heads(x, (0, 1, 3))):
        assert not np.shares_memory(taken, x) and np.array_equal(taken, x[:, [0, 1, 3]])


def test_masks_that_are_broadcast_are_not_expanded():
    row = np.arange(6 * 3, dtype=np.float32).reshape(6, 1, 3)
    x = np.broadcast_to(row, (2, 6, 1000, 3))
    uneven = _of_heads(x, (0, 1, 3))
    assert np.array_equal(uneven, x[:, [0, 1, 3]]) and uneven.strides[0] == uneven.strides[2] == 0
    same = _of_heads(np.broadcast_to(row[:1], (6, 5, 3)), (0, 1, 3))
    assert same.shape == (3, 5, 3) and same.strides[0] == same.strides[1] == 0


def test_inputs_are_not_written():
    q, k, v = cases.arrays(*SHAPE)
    options = OPTIONS["all"]
    given = [x for x in (q, k, v, *options.values()) if isinstance(x, np.ndarray)]
    copies = [x.copy() for x in given]
    for x in given:
        x.flags.writeable = False
    flash_attention_int8(q, k, v, quant=LayerScales(parts=PLANS["uneven"]), **options)
    assert all(np.array_equal(*pair) for pair in zip(given, copies, strict=True))


def test_nan_is_an_error_only_where_it_is_quantised():
    q, k, v = cases.arrays(*SHAPE)
    k[0, 3, 5, 2] = np.nan
    planned = LayerScales(parts=[((0, 1, 2, 4), LayerScales()), ((3,), None)])
    out = flash_attention_int8(q, k, v, quant=planned)
    assert np.isnan(out[0, 6:8]).all() and np.isfinite(np.delete(out, (6, 7), axis=1)).all()
    planned = LayerScales(parts=[((0, 1, 2), None), ((3, 4), LayerScales())])
    with pytest.raises(ValueError, match=r"k: expected finite.*\(0, 0, 5, 2\).*in quant.parts\[1\], kv heads 3, 4"):
        flash_attention_int8(q, k, v, quant=planned)


def test_parts_are_kept_plain_and_immutable():
    layer = LayerScales(0.1)
    planned = LayerScales(parts=[[np.array([0, 2]), layer], (range(1, 2), None)])
    assert planned.parts == (((0, 2), layer), ((1,), None))
    assert all(type(head) is int for heads, _ in planned.parts for head in heads)
    with pytest.raises(AttributeError):
        planned.parts = None
    assert LayerScales(0.1).parts is None


WRONG = {
    "no sequence": (TypeError, {"parts": {0: None}}, "expected a sequence of"),
    "empty": (TypeError, {"parts": ()}, "expected a sequence of"),
    "no pair": (TypeError, {"parts": [(0, None, None)]}, r"as parts\[0\]"),
    "a number": (TypeError, {"parts": [(0, None)]}, r"parts\[0\]: expected kv heads"),
    "a bool": (TypeError, {"parts": [([True], None)]}, r"parts\[0\]: expected kv heads"),
    "a float": (TypeError, {"parts": [([0.0], None)]}, r"parts\[0\]: expected kv heads"),
    "no heads": (ValueError, {"parts": [([], None)]}, r"parts\[0\]: expected kv heads"),
    "negative": (ValueError, {"parts": [([-1, 0], None)]}, r"got \(-1, 0\)"),
    "descending": (ValueError, {"parts": [([1, 0], None)]}, "ascending"),
    "twice in one": (ValueError, {"parts": [([0, 0], None)]}, "ascending"),
    "twice": (ValueError, {"parts": [([0, 1], None), ([1], None)]}, r"parts\[1\]: .* got 1 also in parts\[0\]"),
    "one missing": (ValueError, {"parts": [([0, 2], None)]}, "got none with 1"),
    "no scales": (TypeError, {"parts": [([0], 0.1)]}, "expected a LayerScales or None"),
    "nested": (
        ValueError, {"parts": [([0], LayerScales(parts=[([0], None)]))]}, "without parts of its own",
    ),
    "k_scale of other heads": (
        ValueError, {"parts": [([0, 1], LayerScales(k_scale=per_head(3, 0.1))), ([2], None)]}, r"k_scale .* 2 kv heads",
    ),
    "k_mean of other heads": (
        ValueError, {"parts": [([0], LayerScales(k_mean=np.ones((2, 1, 4))))]}, r"k_mean .* 1 kv heads",
    ),
    "q_scale of other heads": (
        ValueError, {"parts": [([0, 1], LayerScales(per_head(3, 0.1)))]}, "multiple of 2 query heads",
    ),
    "q_scale beside": (ValueError, {"q_scale": 0.1, "parts": [([0], None)]}, "q_scale: expected its default beside"),
    "k_mean beside": (ValueError, {"k_mean": np.ones((1, 4)), "parts": [([0], None)]}, "k_mean: expected its default"),
    "fp32_sinks beside": (ValueError, {"fp32_sinks": 1, "parts": [([0], None)]}, "fp32_sinks: expected its default"),
    "pv beside": (ValueError, {"pv": "bf16", "parts": [([0], None)]}, "pv: expected its default"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_parts(name):
    kind, arguments, message = WRONG[name]
    with pytest.raises(kind, match=message):
        LayerScales(**arguments)


@pytest.mark.parametrize("beside", [
    {"q_scale": 0.1}, {"k_scale": 0.1}, {"v_scale": 0.1}, {"granularity": "head"}, {"smooth_k": False},
    {"fp32_sinks": 0}, {"pv": "int8"},
])
def test_nothing_else_says_how_to_quantise(beside):
    q, k, v = cases.arrays(*SHAPE)
    (name,) = beside
    with pytest.raises(ValueError, match=rf"{name}: expected None beside a planned layer, whose quant\.parts"):
        flash_attention_int8(q, k, v, quant=LayerScales(parts=PLANS["uneven"]), **beside)


@pytest.mark.parametrize("name", "qkv")
def test_arrays_are_floats(name):
    arrays = dict(zip("qkv", cases.arrays(*SHAPE), strict=True))
    planned = LayerScales(parts=PLANS["uneven"])
    codes = np.ones(arrays[name].shape, np.int8)
    for wrong, got in ((codes, "int8"), (cyflash.quantize(arrays[name]), "QuantizedTensor"),
                       (arrays[name].astype(np.float64), "float64"), (arrays[name].tolist(), "list")):
        message = rf"{name}: expected an array of float32 .* beside .*quant\.parts.*got {got}"
        with pytest.raises(TypeError, match=message):
            flash_attention_int8(**arrays | {name: wrong}, quant=planned)


def test_other_errors():
    q, k, v = cases.arrays(*SHAPE)
    uneven = LayerScales(parts=PLANS["uneven"])
    with pytest.raises(ValueError, match=r"quant\.parts: expected the 5 kv heads of k .* got a plan of 2"):
        flash_attention_int8(q, k, v, quant=LayerScales(parts=[((0, 1), None)]))
    with pytest.raises(ValueError, match=r"bias: expected a shape that broadcasts"):
        flash_attention_int8(q, k, v, quant=uneven, bias=np.ones((3, LQ, LK), np.float32))
    with pytest.raises(ValueError, match=r"sinks: expected shape \(10,\)"):
        flash_attention_int8(q, k, v, quant=uneven, sinks=[1.0, 2.0])
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        square = cases.arrays(*SHAPE[:6])
        flash_attention_int8(*square, quant=uneven, out=square[0])
    with pytest.raises(ValueError, match=r"quant.q_scale: expected .*\(in quant.parts\[0\], kv heads 0, 1, 2, 3, 4"):
        wrong = LayerScales(parts=[(range(5), LayerScales(per_head(20, 0.1)))])
        flash_attention_int8(q, k, v, quant=wrong)
    with pytest.raises(NotImplementedError, match="planned layer"):
        cyflash.reference.attention_int8(q, k, v, quant=uneven)

