"""What must not change a result: bit for bit within one SIMD build; within the bound for tile sizes and builds."""
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor

import bounds
import cases
import numpy as np
import pytest

import cyflash
from cyflash import FlashAttentionConfig, flash_attention

SHAPES = {  # B, H, Hk, Lq, Lk, D, Dv
    "encoder": (4, 3, 3, 70, 70, 24, 24),
    "one long head": (1, 1, 1, 700, 700, 32, 32),
    "few queries": (1, 2, 1, 3, 3000, 16, 16),
    "decode": (3, 4, 2, 1, 1500, 40, 24),
    "grouped": (2, 8, 2, 65, 130, 33, 17),
}
OPTIONS = ("plain", "causal", "all")


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.fixture(params=OPTIONS)
def call(request, shape):
    """q, k, v and options."""
    B, H, _, Lq, Lk, *_ = shape
    options = {"plain": {}, "causal": {"causal": True}, "all": cases.all_options(B, H, Lq, Lk)}[request.param]
    return cases.arrays(*shape), options


def run(qkv, options, **how):
    return flash_attention(*qkv, **options, **how, return_lse=True)


def test_threads(build, call):
    one = run(*call, num_threads=1)
    for n in (2, 3, 8):
        cases.assert_same_bits(run(*call, num_threads=n), one)


def test_thread_defaults(build, call):
    one = run(*call, num_threads=1)
    cases.assert_same_bits(run(*call), one)
    cyflash.set_num_threads(2)
    try:
        cases.assert_same_bits(run(*call), one)
    finally:
        cyflash.set_num_threads(None)


def test_repeats(build, call):
    first = run(*call, num_threads=2)
    for _ in range(10):
        cases.assert_same_bits(run(*call, num_threads=2), first)


def test_concurrent_callers(build, call):
    first = run(*call)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: run(*call), range(12)):
            cases.assert_same_bits(result, first)


PER_SEQUENCE = ("bias", "mask")


def part(options, b, heads, B, H):
    """The options as sequence b (all when None) and a slice of heads see them."""
    cut = {}
    for name, value in options.items():
        if name in PER_SEQUENCE:
            value = np.broadcast_to(value, (B, H, *value.shape[-2:]))
            value = value[:, heads] if b is None else value[b : b + 1, heads]
        elif name in ("alibi_slopes", "sinks"):
            value = value[heads]
        cut[name] = value
    return cut


def test_batch_splits(build, call, shape):
    """Each sequence alone, and each in another batch, gives the bits it has in this one."""
    (q, k, v), options = call
    B, H = shape[:2]
    out, lse = run((q, k, v), options)
    for b in range(B):
        alone = run((q[b : b + 1], k[b : b + 1], v[b : b + 1]), part(options, b, slice(None), B, H))
        cases.assert_same_bits(alone, (out[b : b + 1], lse[b : b + 1]))
    backwards = [x[::-1] for x in (q, k, v)]
    options = {name: x[::-1] if name in PER_SEQUENCE and len(x) == B else x for name, x in options.items()}
    cases.assert_same_bits(run(backwards, options), (out[::-1], lse[::-1]))


def test_head_splits(build, call, shape):
    """Each kv head with its query heads alone gives the bits it has among others."""
    (q, k, v), options = call
    B, H, Hk = shape[:3]
    out, lse = run((q, k, v), options)
    group = H // Hk
    for kv in range(Hk):
        heads = slice(kv * group, (kv + 1) * group)
        alone = run((q[:, heads], k[:, kv : kv + 1], v[:, kv : kv + 1]), part(options, None, heads, B, H))
        cases.assert_same_bits(alone, (out[:, heads], lse[:, heads]))


def test_neighbours_contents(build, call, shape):
    """What other sequences hold, NaN included, changes nothing."""
    (q, k, v), options = call
    out, lse = run((q, k, v), options)
    if shape[0] == 1:
        q, k, v = (np.concatenate([x, np.full_like(x, np.nan)]) for x in (q, k, v))
        options = {name: np.concatenate([x, x]) if name in PER_SEQUENCE else x for name, x in options.items()}
    else:
        for x in (q, k, v):
            x[1:] = np.nan
    other = run((q, k, v), options)
    cases.assert_same_bits((other[0][:1], other[1][:1]), (out[:1], lse[:1]))
    assert np.isnan(other[0][1:]).any()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("which", ["q", "k", "v", "all", "bias", "mask"])
def test_strides_and_alignment(build, layout, which):
    """Views of any layout, the unused memory around them NaN, give the bits of contiguous arrays."""
    B, H, Hk, Lq, Lk = 2, 4, 2, 37, 45
    arrays = dict(zip("qkv", cases.arrays(B, H, Hk, Lq, Lk, 20, 12), strict=True))
    options = cases.all_options(B, H, Lq, Lk)
    expected = run(arrays.values(), options)
    change = cases.LAYOUTS[layout]
    if which in options:
        options[which] = change(options[which])
    for name in arrays:
        if which in (name, "all"):
            arrays[name] = change(arrays[name])
    cases.assert_same_bits(run(arrays.values(), options), expected)


@pytest.fixture(scope="module")
def sparse_memory():
    """20 GB of addresses, of which only the touched pages exist."""
    reserve_nothing = getattr(mmap, "MAP_NORESERVE", 0x4000)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve_nothing
    return np.frombuffer(mmap.mmap(-1, 20 << 30, flags=flags), np.uint8)


@pytest.mark.skipif(not sys.platform.startswith("linux") or sys.maxsize < 2**32, reason="needs lazy memory")
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("which", ["q", "k", "v", "out", "bias", "mask"])
def test_offsets_beyond_32_bits(build, sparse_memory, which, axis):
    """Batches, heads or rows that lie more than 2^31 elements apart give the bits of neighbours."""
    B, H, L = 2, 2, 33
    arrays = dict(zip("qkv", cases.arrays(B, H, H, L, L, 16), strict=True)) | cases.all_options(B, H, L, L)
    expected = run((), arrays)
    arrays["out"] = np.full_like(expected[0], np.nan)
    x = arrays[which]
    strides = list(x.strides)
    strides[axis] = ((1 << 31) + 4096) * x.itemsize // (x.shape[axis] - 1) // 4096 * 4096 + 4096
    far = np.ndarray(x.shape, x.dtype, sparse_memory, strides=strides)
    far[...] = x
    cases.assert_same_bits(run((), arrays | {which: far}), expected)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, (0, 1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v", "bias", "mask", "bias and mask"])
def test_broadcast_strides(build, which, axis):
    """Stride 0 along an axis gives the bits of the expanded copy."""
    B, H, Lq, Lk = 2, 3, 37, 45
    arrays = dict(zip("qkv", cases.arrays(B, H, H, Lq, Lk, 20, 12), strict=True))
    options = cases.all_options(B, H, Lq, Lk)
    options["mask"][..., 0] = True
    views = arrays | options
    copies = dict(views)
    for name in which.split(" and "):
        x = views[name]
        first = x[tuple(slice(0, 1) if a in np.atleast_1d(axis) else slice(None) for a in range(4))]
        views[name] = np.broadcast_to(first, x.shape)
        copies[name] = views[name].copy()
    cases.assert_same_bits(run((), views), run((), copies))


def test_expanded_bias_and_mask(build):
    """Whether bias and mask come small or expanded makes no difference."""
    q, k, v = cases.arrays(2, 4, 2, 37, 45, 20)
    for name in ("bias for all rows", "bias for all heads", "bias -inf", "mask padding", "mask rows"):
        options = cases.options(name, 2, 4, 37, 45)
        whole = {key: np.broadcast_to(value, (2, 4, 37, 45)).copy() for key, value in options.items()}
        cases.assert_same_bits(run((q, k, v), options), run((q, k, v), whole))


def test_expanded_groups(build):
    """Sharing kv heads gives the bits of repeating them."""
    q, k, v = cases.arrays(2, 6, 2, 37, 45, 20)
    repeated = (q, np.repeat(k, 3, axis=1), np.repeat(v, 3, axis=1))
    cases.assert_same_bits(run((q, k, v), {}), run(repeated, {}))


BLOCKS = [(1, 1), (16, 16), (32, 128), (48, 8), (64, 64), (7, 13), (200, 300), (4096, 4096)]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_tile_sizes_stay_within_the_bound(build, call, shape, blocks):
    (q, k, v), options = call
    causal = options.pop("causal", False)
    config = FlashAttentionConfig(head_dim=shape[5], num_heads=shape[1], causal=causal, block_size_q=blocks[0],
                                  block_size_kv=blocks[1])
    out, lse = flash_attention(q, k, v, **options, config=config, return_lse=True)
    case = bounds.Case(q, k, v, **options, causal=causal)
    case.check(out, lse)
    again = flash_attention(q, k, v, **options, config=config, return_lse=True, num_threads=3)
    cases.assert_same_bits(again, (out, lse))


@pytest.mark.parametrize("blocks", [None, 1, 7, 64, 1000])
def test_reported_tile_sizes_are_those_asked_for_rounded(build, blocks):
    """At least one register's worth, never more than a little above what was asked."""
    from cyflash.attention import attend

    q, k, v = cases.arrays(1, 1, Lq=1100, D=64)
    config = blocks and FlashAttentionConfig(head_dim=64, num_heads=1, block_size_q=blocks, block_size_kv=blocks)
    work = attend(q, k, v, config=config)[2]
    assert (work.block_size_q, work.block_size_kv) == cyflash.cpu.tile_sizes(blocks, blocks)
    assert work.implementation == build
    assert work.tile_bytes > 0


def test_builds_stay_within_the_bound(call):
    """Any two builds differ by less than the sum of their distances to the reference."""
    (q, k, v), options = call
    case = bounds.Case(q, k, v, **options)
    for name in cyflash.cpu.runnable():
        with cyflash.set_implementation(name):
            case.check(*run((q, k, v), options))
