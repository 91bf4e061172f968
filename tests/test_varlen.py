"""flash_attention_varlen: sequences of any lengths in one array, bit for bit a loop of single calls."""
import bounds
import cases
import numpy as np
import pytest
import ragged
from caching import numpy_dtype, same_bits
from ragged import BATCHES, DV, HK, D, H, all_options, bounds_of, draw, loop, of_sequence, sequence

from cyflash import FlashAttentionConfig, flash_attention, flash_attention_varlen


@pytest.fixture(params=BATCHES)
def batch(request):
    return BATCHES[request.param]


def run(call, **options):
    return flash_attention_varlen(*call, **options, return_lse=True)


def verify(call, how=(), **options):
    """Compare with the loop to the bit, and with the reference under the bound."""
    out, lse = run(call, **options, **dict(how))
    q, k, v, cu_q, cu_k = call
    assert out.shape == (len(q), q.shape[1], v.shape[2]) and lse.shape == q.shape[:2] and lse.dtype == np.float32
    same_bits((out, lse), loop(flash_attention, *call, **options))
    for i in range(len(cu_q) - 1):
        rows = slice(cu_q[i], cu_q[i + 1])
        case = bounds.Case(*sequence(q, k, v, cu_q, cu_k, i), **of_sequence(options, i))
        case.check(out[rows].swapaxes(0, 1), lse[rows].swapaxes(0, 1), rms=False)
    return out, lse


def test_batches(build, batch):
    call = draw(batch)
    verify(call)
    verify(call, causal=True)
    verify(call, **all_options(batch))
    verify(call, **all_options(batch), causal_align="top-left")


@pytest.mark.parametrize("name", ragged.NAMES)
def test_options(one_build, name):
    for which in ("mixed", "without queries", "without keys", "more queries than keys"):
        batch = BATCHES[which]
        verify(draw(batch), **ragged.options(name, batch))


@pytest.mark.parametrize("ignored", ["causal", "scale", "window", "softcap", "bias", "mask", "alibi_slopes", "sinks",
                                     "causal_align"])
def test_no_option_is_ignored(one_build, ignored):
    batch = [(40, 50), (30, 44), (20, 64)]
    call = draw(batch)
    options = all_options(batch) | ragged.options("mask", batch) | {"window": (7, 3), "causal_align": "top-left"}
    rest = {name: value for name, value in options.items() if name != ignored}
    (out, _), (other, _) = run(call, **options), run(call, **rest)
    for i in range(3):
        rows = slice(call[3][i], call[3][i + 1])
        bound = bounds.Case(*sequence(*call, i), **of_sequence(options, i)).bounds[0]
        gap = np.abs(out[rows] - other[rows]).swapaxes(0, 1) / bound
        assert gap.max() > 100, f"sequence {i}"


def test_each_sequence_has_its_own_slopes_bias_and_mask(one_build):
    """Swapped between two sequences of one size they give another result."""
    batch = [(20, 30), (20, 30)]
    call = draw(batch)
    for name in ("alibi batch", "bias", "mask"):
        options = ragged.options(name, batch)
        ((key, value),) = options.items()
        out, other = run(call, **options)[0], run(call, **{key: value[::-1]})[0]
        assert np.abs(out - other)[:20].max() > 1e-2 and np.abs(out - other)[20:].max() > 1e-2


def test_rows_without_a_key(one_build):
    call = draw([(4, 0), (3, 2)])
    out, lse = run(call)
    assert not out[:4].any() and (lse[:4] == -np.inf).all() and np.isfinite(lse[4:]).all()
    sinks = np.arange(H, dtype=np.float32)
    out, lse = run(call, sinks=sinks)
    assert not out[:4].any() and (lse[:4] == sinks).all()


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 2), (5, 5), (34, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (16, 33), (64, 64), (40, 128)], ids=str)
def test_heads_and_widths(one_build, heads, sizes):
    batch = [(7, 40), (1, 90), (0, 3), (33, 20)]
    verify(draw(batch, heads, sizes), causal=True)


def test_threads_and_repeats(build):
    batch = [(3, 900), (200, 200), (1, 1), (0, 5), (64, 30), (1, 2000)]
    call = draw(batch)
    options = all_options(batch)
    for given in ({}, {"causal": True}, options):
        expected = run(call, **given, num_threads=1)
        for threads in (2, 3, 8):
            same_bits(run(call, **given, num_threads=threads), expected)
        same_bits(run(call, **given), expected)


def test_neighbours_change_nothing(one_build):
    """A sequence alone, and among others of any length and content, NaN included."""
    batch = [(30, 40), (1, 500), (20, 17)]
    call = draw(batch)
    alone = [run((*(x.swapaxes(0, 1) for x in sequence(*call, i)), bounds_of(pair[:1]), bounds_of(pair[1:])))
             for i, pair in enumerate(batch)]
    out, lse = run(call)
    for i, one in enumerate(alone):
        rows = slice(call[3][i], call[3][i + 1])
        same_bits((out[rows], lse[rows]), one)
    q, k, v, cu_q, cu_k = call
    k[cu_k[1] :], v[cu_k[1] :], q[cu_q[1] :] = np.nan, np.nan, np.nan
    out, lse = run(call)
    same_bits((out[:30], lse[:30]), alone[0])
    assert np.isnan(out[30:]).all()


def test_a_thousandfold_difference_of_lengths(one_build):
    """One long sequence among many short ones."""
    batch = [(2, 2)] * 20 + [(4, 4000)] + [(2, 2)] * 20
    call = draw(batch, sizes=(16, 16))
    expected = loop(flash_attention, *call, causal=True)
    for threads in (1, 2, 7):
        same_bits(run(call, causal=True, num_threads=threads), expected)


@pytest.mark.parametrize("kind", [list, tuple, np.int32, np.int64, np.uint32, np.int16])
def test_kinds_of_cu_seqlens(one_build, kind):
    call = draw(BATCHES["mixed"])
    expected = run(call, causal=True)
    for which in (3, 4):
        cu = call[which].tolist()
        changed = kind(cu) if kind in (list, tuple) else np.array(cu, kind)
        try:
            got = run((*call[:which], changed, *call[which + 1 :]), causal=True)
        except TypeError as error:  # a list may be refused, as other arguments refuse it; integers may not
            assert kind in (list, tuple) and "cu_seqlens" in str(error)
        else:
            same_bits(got, expected)


@pytest.mark.parametrize("layout", ["heads first", "padded rows", "every other row", "off by 4 bytes", "off by 1 byte",
                                    "read-only", "strided last axis", "fortran", "reversed rows"])
@pytest.mark.parametrize("which", ["q", "k", "v", "all"])
def test_strides_and_alignment(one_build, layout, which):
    """Views of any layout give the bits of contiguous arrays."""
    call = draw(BATCHES["mixed"])
    expected = run(call, causal=True)
    change = {
        "heads first": lambda x: np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1),
        "strided last axis": cases.LAYOUTS["every other column"],
        "reversed rows": lambda x: np.flip(np.flip(x, 0).copy(), 0),
        "every other row": lambda x: np.repeat(x, 2, axis=0)[::2],
    }.get(layout) or cases.LAYOUTS[layout]
    arrays = [change(x) if which in (name, "all") else x for name, x in zip("qkv", call[:3], strict=True)]
    same_bits(run((*arrays, *call[3:]), causal=True), expected)


def test_packed_qkv(one_build):
    """q, k and v as views of one array (total, 3, H, D), as packed projections have them."""
    cu = bounds_of([30, 0, 45])
    packed = np.random.default_rng(0).standard_normal((75, 3, H, D), dtype=np.float32)
    q, k, v = packed.transpose(1, 0, 2, 3)
    same_bits(run((q, k, v, cu, cu), causal=True), run((q.copy(), k.copy(), v.copy(), cu, cu), causal=True))


def test_inputs_are_not_written(one_build):
    batch = BATCHES["mixed"]
    call, options = draw(batch), all_options(batch)
    everything = [*call, *options["bias"], *(x for x in options["mask"] if x is not None), options["alibi_slopes"]]
    before = [x.copy() for x in everything]
    for x in everything:
        x.flags.writeable = False
    run(call, **options)
    for x, y in zip(everything, before, strict=True):
        assert np.array_equal(x, y)


def test_out_and_lse(one_build):
    call = draw(BATCHES["without queries"])
    expected, lse = run(call, causal=True)
    assert np.array_equal(flash_attention_varlen(*call, causal=True), expected)
    for out in (np.full_like(expected, np.nan), np.full((H, len(call[0]), DV), np.nan, np.float32).swapaxes(0, 1)):
        got, got_lse = run(call, causal=True, out=out)
        assert got is out
        same_bits((out, got_lse), (expected, lse))


def test_config(one_build):
    call = draw(BATCHES["mixed"])
    config = FlashAttentionConfig(head_dim=D, num_heads=H, causal=True, scale=0.3)
    plain = FlashAttentionConfig(head_dim=D, num_heads=H)
    same_bits(run(call, config=config), loop(flash_attention, *call, config=config))
    same_bits(run(call, config=config, causal=False, scale=0.1), run(call, config=plain, scale=0.1))
    for blocks in ((16, 16), (32, 128)):
        config = FlashAttentionConfig(head_dim=D, num_heads=H, block_size_q=blocks[0], block_size_kv=blocks[1])
        out, lse = run(call, config=config)
        for i in range(len(call[3]) - 1):
            rows = slice(call[3][i], call[3][i + 1])
            bounds.Case(*sequence(*call, i)).check(out[rows].swapaxes(0, 1), lse[rows].swapaxes(0, 1), rms=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit(one_build, dtype):
    *arrays, cu_q, cu_k = draw(BATCHES["mixed"])
    call = (*(x.astype(numpy_dtype(dtype)) for x in arrays), cu_q, cu_k)
    out, lse = run(call, **all_options(BATCHES["mixed"]))
    assert out.dtype == call[0].dtype and lse.dtype == np.float32
    same_bits((out, lse), loop(flash_attention, *call, **all_options(BATCHES["mixed"])))


def test_nan_and_infinity_stay_where_they_are(one_build):
    call = draw([(20, 20), (20, 20)])
    call[1][7], call[2][7] = np.nan, np.inf
    verify(call, causal=True)
    out, _ = run(call, causal=True)
    assert np.isfinite(out[:7]).all() and np.isnan(out[7:20]).all() and np.isfinite(out[20:]).all()
    mask = [np.arange(20) != 7, None]
    assert np.isfinite(run(call, mask=mask)[0]).all()


# Bad input


def bad():
    q, k, v, cu_q, cu_k = draw([(5, 6), (3, 4)])
    good = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}

    def of(name, error, parts, **change):
        return pytest.param(good | change, error, parts, id=name)

    for side, total in (("q", 8), ("k", 10)):
        name = f"cu_seqlens_{side}"
        yield of(f"{name} decreases", ValueError, [f"{name}: expected", "4"], **{name: np.array([0, 4, 3])})
        yield of(f"{name} decreases between", ValueError, [f"{name}: expected"],
                 cu_seqlens_q=np.array([0, 5, 3, 8] if side == "q" else [0, 5, 5, 8]),
                 cu_seqlens_k=np.array([0, 6, 3, 10] if side == "k" else [0, 6, 6, 10]))
        yield of(f"{name} starts at 1", ValueError, [f"{name}: expected", "0", "1"], **{name: np.array([1, 5, total])})
        yield of(f"{name} starts below 0", ValueError, [f"{name}: expected", "-1"], **{name: np.array([-1, 5, total])})
        yield of(f"{name} exceeds", ValueError, [f"{name}: expected", str(total), str(total + 1)],
                 **{name: np.array([0, 5, total + 1])})
        yield of(f"{name} exceeds by far", ValueError, [f"{name}: expected"], **{name: np.array([0, 5, 2**62])})
        yield of(f"{name} wraps", ValueError, [f"{name}: expected"], **{name: np.array([0, 2**63, 5], np.uint64)})
        yield of(f"{name} empty", ValueError, [f"{name}: expected"], **{name: np.array([], np.int32)})
        yield of(f"{name} of two axes", ValueError, [f"{name}: expected", "(1, 3)"],
                 **{name: np.array([[0, 5, total]])})
        yield of(f"{name} floats", TypeError, [f"{name}: expected", "float64"], **{name: np.array([0.0, 5.0, total])})
        yield of(f"{name} bools", TypeError, [f"{name}: expected", "bool"], **{name: np.array([False, True, True])})
        yield of(f"{name} None", TypeError, [f"{name}: expected"], **{name: None})
        yield of(f"{name} a number", (TypeError, ValueError), [f"{name}: expected"], **{name: 8})
        yield of(f"{name} of more sequences", ValueError, ["cu_seqlens_", "3", "4"],
                 **{name: np.array([0, 2, 5, total])})
    yield of("q rank", ValueError, ["q: expected", "(1, 8, 4, 24)"], q=q[None])
    yield of("q rank 2", ValueError, ["q: expected", "(8, 24)"], q=q[:, 0])
    yield of("k rank", ValueError, ["k: expected", "(1, 10, 2, 24)"], k=k[None])
    yield of("v rank", ValueError, ["v: expected", "(10, 20)"], v=v[:, 0])
    yield of("heads do not divide", ValueError, ["k", "expected", "4", "3"], k=np.repeat(k[:, :1], 3, 1),
             v=np.repeat(v[:, :1], 3, 1))
    yield of("heads of v", ValueError, ["v: expected"], v=v[:, :1])
    yield of("head_dim", ValueError, ["k", "expected", "24"], k=k[..., :23])
    yield of("length of v", ValueError, ["v: expected", "10"], v=v[:9])
    for name in "qkv":
        yield of(f"{name} float64", TypeError, [f"{name}: expected", "float64"],
                 **{name: good[name].astype(np.float64)})
        yield of(f"{name} list", TypeError, [f"{name}: expected", "list"], **{name: [[[1.0]]]})
        yield of(f"{name} big-endian", TypeError, [f"{name}: expected", ">f4"], **{name: good[name].astype(">f4")})
    for name, dtype in (("bias", np.float32), ("mask", bool)):
        one = np.ones((5, 6), dtype)
        yield of(f"{name} an array", TypeError, [f"{name}: expected", "list"], **{name: one})
        yield of(f"{name} too few", ValueError, [f"{name}: expected", "2", "1"], **{name: [one]})
        yield of(f"{name} too many", ValueError, [f"{name}: expected", "2", "3"], **{name: [one, None, None]})
        yield of(f"{name} of another size", ValueError, [name, "(5, 6)", "1"], **{name: [None, one]})
        yield of(f"{name} of another dtype", TypeError, [name, "int64"], **{name: [one.astype(np.int64), None]})
        yield of(f"{name} of four axes", ValueError, [name, "(1, 1, 5, 6)"], **{name: [one[None, None], None]})
    yield of("slopes", ValueError, ["alibi_slopes: expected", "(2,)"], alibi_slopes=np.zeros(HK, np.float32))
    yield of("slopes of three", ValueError, ["alibi_slopes: expected", "(3, 4)"],
             alibi_slopes=np.zeros((3, H), np.float32))
    yield of("sinks", ValueError, ["sinks: expected", "(2, 4)"], sinks=np.zeros((2, H), np.float32))
    yield of("window", ValueError, ["window: expected", "4"], window=4)
    yield of("softcap", ValueError, ["softcap: expected"], softcap=-1.0)
    yield of("scale", ValueError, ["scale: expected"], scale=float("inf"))
    yield of("causal_align", ValueError, ["causal_align"], causal_align="left")
    yield of("out shape", ValueError, ["out: expected", "(8, 4, 24)"], out=np.zeros((8, H, D), np.float32))
    yield of("out dtype", TypeError, ["out: expected", "float64"], out=np.zeros((8, H, DV)))
    yield of("out over q", ValueError, ["out", "overlap"], out=q, v=np.zeros((10, HK, D), np.float32))
    yield of("threads", ValueError, ["num_threads: expected"], num_threads=0)
    yield of("config", ValueError, ["config", "head_dim"], config=FlashAttentionConfig(head_dim=8))
    yield of("config type", TypeError, ["config: expected"], config={})
    yield of("dropout", NotImplementedError, ["dropout_p"], config=FlashAttentionConfig(head_dim=D, dropout_p=0.1))
    yield of("unknown", TypeError, ["max_seqlen"], max_seqlen=8)


@pytest.mark.parametrize(("call", "error", "parts"), list(bad()))
def test_bad_arguments(call, error, parts):
    out = call.setdefault("out", np.full((8, H, DV), 7, np.float32))
    before = out.copy()
    with pytest.raises(error) as caught:
        flash_attention_varlen(**call)
    for words in parts:
        assert words in str(caught.value), (words, str(caught.value))
    assert np.array_equal(out, before)
