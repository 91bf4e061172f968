"""What must not change an int8 result: no bit within one SIMD build; within the bound for tile sizes and builds."""
from concurrent.futures import ThreadPoolExecutor

import bounds
import cases
import cases_int8
import numpy as np
import pytest

import cyflash
from cyflash import FlashAttentionConfig, flash_attention_int8
from cyflash.quantized import QuantizedTensor, quantise_call, quantize

SHAPES = {  # B, H, Hk, Lq, Lk, D, Dv
    "encoder": (3, 3, 3, 70, 70, 24, 24),
    "one long head": (1, 1, 1, 200, 700, 32, 32),
    "few queries": (1, 2, 1, 3, 1500, 16, 16),
    "decode": (3, 4, 2, 1, 700, 40, 24),
    "grouped": (2, 8, 2, 65, 130, 33, 17),
}
SETTINGS = {
    "default": {},
    "per tensor": {"granularity": "tensor", "smooth_k": False},
    "per head, sinks": {"granularity": ("head", "head", "token"), "fp32_sinks": 3},
    "bf16": {"pv": "bf16"},
    "fp32, sinks": {"pv": "fp32", "fp32_sinks": 9},
}


PAIRS = [("encoder", "default"), ("encoder", "per head, sinks"), ("one long head", "bf16"), ("few queries", "default"),
         ("decode", "fp32, sinks"), ("grouped", "per tensor"), ("grouped", "bf16"), ("grouped", "default")]


@pytest.fixture(params=PAIRS, ids=": ".join)
def pair(request):
    return request.param


@pytest.fixture
def shape(pair):
    return SHAPES[pair[0]]


@pytest.fixture
def call(pair):
    """q, k, v and arguments; every second pair with all options."""
    B, H, _, Lq, Lk, *_ = shape = SHAPES[pair[0]]
    every = PAIRS.index(pair) % 2 == 0
    return cases.arrays(*shape), SETTINGS[pair[1]] | (cases.all_options(B, H, Lq, Lk) if every else {})


def run(qkv, arguments, **how):
    return flash_attention_int8(*qkv, **arguments, **how, return_lse=True)


def test_threads(build, call):
    one = run(*call, num_threads=1)
    for n in (2, 3, 5):
        cases.assert_same_bits(run(*call, num_threads=n), one)
    cases.assert_same_bits(run(*call), one)


def test_repeats_and_concurrent_callers(build, call):
    first = run(*call, num_threads=2)
    for _ in range(3):
        cases.assert_same_bits(run(*call, num_threads=2), first)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: run(*call), range(6)):
            cases.assert_same_bits(result, first)


PER_SEQUENCE = ("bias", "mask")
PER_HEAD = ("alibi_slopes", "sinks")


def part(arguments, b, heads, B, H):
    """The arguments as sequence b (all when None) and a slice of heads see them."""
    cut = {}
    for name, value in arguments.items():
        if name in PER_SEQUENCE:
            value = np.broadcast_to(value, (B, H, *value.shape[-2:]))
            value = value[:, heads] if b is None else value[b : b + 1, heads]
        elif name in PER_HEAD:
            value = value[heads]
        cut[name] = value
    return cut


def test_batch_splits(build, call, shape):
    """Each sequence alone, and each in another batch, gives its bits in this one: scales and means are its own."""
    (q, k, v), arguments = call
    B, H = shape[:2]
    q, k, v = (x * np.float32(10.0) ** np.arange(B, dtype=np.float32)[:, None, None, None] for x in (q, k, v))
    out, lse = run((q, k, v), arguments)
    for b in range(B):
        alone = run((q[b : b + 1], k[b : b + 1], v[b : b + 1]), part(arguments, b, slice(None), B, H))
        cases.assert_same_bits(alone, (out[b : b + 1], lse[b : b + 1]))
    backwards = {name: x[::-1] if name in PER_SEQUENCE and len(x) == B else x for name, x in arguments.items()}
    cases.assert_same_bits(run((q[::-1], k[::-1], v[::-1]), backwards), (out[::-1], lse[::-1]))


def test_head_splits(build, call, shape):
    """Each kv head with its query heads alone gives the bits it has among others, unless a scale is shared."""
    (q, k, v), arguments = call
    if arguments.get("granularity") == "tensor":
        arguments = arguments | {"granularity": "head"}
    B, H, Hk = shape[:3]
    out, lse = run((q, k, v), arguments)
    for kv in range(Hk):
        heads = slice(kv * (H // Hk), (kv + 1) * (H // Hk))
        alone = run((q[:, heads], k[:, kv : kv + 1], v[:, kv : kv + 1]), part(arguments, None, heads, B, H))
        cases.assert_same_bits(alone, (out[:, heads], lse[:, heads]))


def test_order_of_heads(build, call, shape):
    """Kv heads in reverse, each with its queries: the results in reverse. Also with one scale per sequence."""
    (q, k, v), arguments = call
    B, H, Hk, Lq, Lk = shape[:5]
    order = np.arange(H).reshape(Hk, H // Hk)[::-1].ravel()
    turned = dict(arguments)
    for name in PER_SEQUENCE:
        if name in turned:
            turned[name] = np.broadcast_to(turned[name], (B, H, Lq, Lk))[:, order]
    for name in PER_HEAD:
        if name in turned:
            turned[name] = turned[name][order]
    out, lse = run((q, k, v), arguments)
    cases.assert_same_bits(run((q[:, order], k[:, ::-1], v[:, ::-1]), turned), (out[:, order], lse[:, order]))


def test_expanded_groups(build, call, shape):
    """Sharing kv heads gives the bits of repeating them, where the rows that meet a key together are as few or as many
    for the kernels."""
    (q, k, v), arguments = call
    group, few = shape[1] // shape[2], cyflash.cpu.active().SHAPE["LANES"] // 2
    repeated = (q, np.repeat(k, group, axis=1), np.repeat(v, group, axis=1))
    shared, alone = run((q, k, v), arguments), run(repeated, arguments)
    if (group * shape[3] <= few) == (shape[3] <= few):
        cases.assert_same_bits(alone, shared)
    else:
        np.testing.assert_allclose(alone[0], shared[0], rtol=0, atol=1e-5 * np.abs(shared[0]).max())
        np.testing.assert_allclose(alone[1], shared[1], rtol=1e-6)


def test_ranks(build):
    """One sequence, and one head, without their axes."""
    q, k, v = cases.arrays(1, 1, 1, 30, 70, 20)
    for settings in SETTINGS.values():
        out, lse = run((q, k, v), settings)
        for rank in (2, 3):
            low = run([x.reshape(x.shape[-rank:]) for x in (q, k, v)], settings)
            cases.assert_same_bits(low, (out.reshape(low[0].shape), lse.reshape(low[1].shape)))


# Operands


@pytest.mark.parametrize("granularity", ["head", "token", ("head", "token", "token")], ids=str)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("pv", ["int8", "bf16", "fp32"])
def test_operands_of_every_kind(build, granularity, smooth, n, pv):
    """Quantised in the call, before it, and as int8 arrays with their scales: the same bits."""
    q, k, v = cases.arrays(2, 4, 2, 37, 145, 20, 12)
    options = cases.all_options(2, 4, 37, 145) | {"pv": pv}
    of_q, of_k, of_v = granularity if isinstance(granularity, tuple) else (granularity,) * 3
    a, b, c = quantize(q, of_q), quantize(k, of_k, smooth=smooth, fp32_sinks=n), quantize(v, of_v, fp32_sinks=n)
    values = v if pv == "int8" else c  # a float v would be used itself
    whole = run((q, k, values), options | {"granularity": granularity, "smooth_k": smooth, "fp32_sinks": n})
    cases.assert_same_bits(run((q, b, values), options | {"granularity": granularity}), whole)
    cases.assert_same_bits(run((q, b, c), options | {"granularity": granularity}), whole)
    if n == 0:  # with float keys the queries before quantisation count
        cases.assert_same_bits(run((a, b, c), options), whole)
        cases.assert_same_bits(run((a.data, b, c.data), options | {"q_scale": a.scale, "v_scale": c.scale}), whole)
        if not smooth:
            scales = {"q_scale": a.scale, "k_scale": b.scale, "v_scale": c.scale}
            cases.assert_same_bits(run((a.data, b.data, c.data), options | scales), whole)
            if pv == "int8":
                cases.assert_same_bits(run((q, k, v), options | scales), whole)


def test_scales_per_tensor_are_per_sequence(build):
    q, k, v = (x * np.float32([1, 100])[:, None, None, None] for x in cases.arrays(2, 4, 2, 37, 45, 20, 12))
    codes = [QuantizedTensor(c, s) for c, s, _ in (quantise_call("x", x, "tensor") for x in (q, k, v))]
    assert codes[0].scale.shape == (2, 1, 1, 1)
    expected = run(codes, {})
    cases.assert_same_bits(run((q, k, v), {"granularity": "tensor", "smooth_k": False}), expected)


@pytest.mark.parametrize("shape", [(), (1, 1, 1), (4, 1, 1), (1, 4, 1, 1), (2, 1, 1, 1), (2, 4, 1, 1)], ids=str)
def test_expanded_scales(build, shape):
    """A scale small or expanded to one per head: the same bits."""
    q, k, v = (quantize(x).data for x in cases.arrays(2, 4, 4, 37, 45, 20, 12))
    scale = np.random.default_rng(0).uniform(0.01, 0.02, shape).astype(np.float32)
    whole = np.broadcast_to(scale, (2, 4, 1, 1)).copy()
    small = {name: scale for name in ("q_scale", "k_scale", "v_scale")}
    cases.assert_same_bits(run((q, k, v), small), run((q, k, v), {name: whole for name in small}))


def of_codes(layout, x):
    """int8 codes in a layout; the layouts fill the memory around with NaN, which codes do not have."""
    if x.dtype != np.int8:
        return cases.LAYOUTS[layout](x)
    y = cases.LAYOUTS[layout](x.astype(np.float32))
    if y.base is None:
        return x.copy()
    strides = tuple(s // 4 for s in y.strides) if all(s % 4 == 0 for s in y.strides) else x.strides
    low = sum(min(0, s * (n - 1)) for s, n in zip(strides, x.shape, strict=True))
    high = sum(max(0, s * (n - 1)) for s, n in zip(strides, x.shape, strict=True))
    memory = np.full(high - low + 2, 111, np.int8)
    view = np.lib.stride_tricks.as_strided(memory[1 - low :], x.shape, strides)
    view[...] = x
    return view


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("kind", ["float", "codes", "rows and options"])
def test_strides_and_alignment(build, layout, kind):
    """Views of any layout, the unused memory around them NaN, give the bits of contiguous arrays."""
    B, H, Hk, Lq, Lk = 2, 4, 2, 37, 145
    q, k, v = cases.arrays(B, H, Hk, Lq, Lk, 20, 12)
    options = cases.all_options(B, H, Lq, Lk)
    if kind == "float":
        for pv in ("int8", "bf16", "fp32"):
            changed = [cases.LAYOUTS[layout](x) for x in (q, k, v)]
            arguments = options | {"pv": pv, "fp32_sinks": 5}
            cases.assert_same_bits(run(changed, arguments), run((q, k, v), arguments))
        return
    a, b, c = quantize(q, "token"), quantize(k, "token", smooth=True, fp32_sinks=5), quantize(v, "token", fp32_sinks=5)
    expected = run((a, b, c), options)
    changed = []
    for x in (a, b, c):
        parts = {"data": x.data, "scale": x.scale, "mean": x.mean, "fp32_rows": x.fp32_rows}
        names = ("data",) if kind == "codes" else ("scale", "mean", "fp32_rows")
        for name in names:
            parts[name] = None if parts[name] is None else of_codes(layout, parts[name])
        changed.append(QuantizedTensor(**parts))
    if kind == "rows and options":
        options = options | {name: cases.LAYOUTS[layout](options[name]) for name in ("bias", "mask")}
    cases.assert_same_bits(run(changed, options), expected)


@pytest.mark.parametrize("layout", [name for name in cases.LAYOUTS if name != "read-only"])
def test_output_layouts(build, layout):
    q, k, v = cases.arrays(2, 4, 2, 37, 45, 20, 12)
    expected = run((q, k, v), {})
    out = cases.LAYOUTS[layout](np.full(expected[0].shape, np.nan, np.float32))
    got, lse = run((q, k, v), {}, out=out)
    assert got is out
    cases.assert_same_bits((out, lse), expected)


def test_inputs_are_not_written(build):
    q, k, v = cases.arrays(2, 4, 2, 37, 45, 20, 12)
    tensors = [quantize(q, "token"), quantize(k, "token", smooth=True, fp32_sinks=3), quantize(v, fp32_sinks=3)]
    for operands in ((q, k, v), tensors):
        arrays = [q, k, v, *(y for x in tensors for y in (x.data, x.scale, x.mean, x.fp32_rows) if y is not None)]
        before = [x.copy() for x in arrays]
        run(operands, cases.all_options(2, 4, 37, 45))
        for x, y in zip(arrays, before, strict=True):
            assert np.array_equal(x, y)


# Within the bound


@pytest.mark.parametrize("pv", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_all_keys_in_float32_is_float32_attention(build, name, pv):
    """fp32_sinks = Lk leaves nothing to codes: the bound of `flash_attention`."""
    q, k, v = cases.arrays(*SHAPES["grouped"])
    options = cases.all_options(2, 8, 65, 130) if name == "all" else {}
    out, lse = run((q, k, v), options | {"fp32_sinks": 130, "pv": pv})
    bounds.Case(q, k, v, **options).check(out, lse)


BLOCKS = [(1, 1), (16, 16), (32, 128), (48, 8), (7, 13), (200, 300), (4096, 4096)]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_tile_sizes(build, blocks):
    """Each has its own codes of P, those of the simulation with blocks of that size."""
    for name, settings in SETTINGS.items():
        shape = (1, 4, 2, 30, 130, 33, 17) if name != "default" else (1, 1, 1, 50, 700, 32, 32)
        config = FlashAttentionConfig(head_dim=shape[5], num_heads=shape[1], block_size_q=blocks[0],
                                      block_size_kv=blocks[1])
        q, k, v = cases.arrays(*shape)
        arguments = settings | {"causal": True}
        cases_int8.verify(q, k, v, **arguments, config=config)
        first = run((q, k, v), arguments, config=config)
        cases.assert_same_bits(run((q, k, v), arguments, config=config, num_threads=3), first)


def test_rows_of_a_task_change_no_bit(build):
    """Only the keys of a block are part of the scheme."""
    q, k, v = cases.arrays(1, 2, 1, 200, 300, 24)
    results = []
    for rows in (1, 48, 96, 1000):
        config = FlashAttentionConfig(head_dim=24, num_heads=2, block_size_q=rows, block_size_kv=64)
        results.append(run((q, k, v), {"causal": True}, config=config))
    for result in results[1:]:
        cases.assert_same_bits(result, results[0])


@pytest.mark.parametrize("pv", ["int8", "fp32"])
def test_rows_that_see_nothing_but_float32_keys(build, pv):
    """They have the same bits whether other rows of their panel see more or not: in tasks of any size, which cut panels
    in different places."""
    for Lq, Lk, sinks in ((38, 34, 4), (38, 34, 9), (100, 96, 20), (150, 140, 60)):
        q, k, v = cases.arrays(1, 2, 2, Lq, Lk, 28)
        k += cases.arrays(1, 2, 2, 1, 1, 28)[1]  # a mean
        for options in ({"causal": True, "window": (1, 1)}, {"causal": True}):
            arguments = options | {"fp32_sinks": sinks, "pv": pv}
            results = [run((q, k, v), arguments, config=FlashAttentionConfig(28, 2, rows, 64))
                       for rows in (8, 32, 48, 64, 96, 200)]
            for result in results[1:]:
                cases.assert_same_bits(result, results[0])


def test_builds(call):
    for name in cyflash.cpu.runnable():
        with cyflash.set_implementation(name):
            (q, k, v), arguments = call
            cases_int8.verify(q, k, v, **arguments)
