"""Every option alone, in pairs and all together against the reference; and none of them is ignored."""
import itertools

import bounds
import cases
import numpy as np
import pytest

from cyflash import FlashAttentionConfig, flash_attention

B, H, Hk, D, Dv = 2, 4, 2, 24, 20
LENGTHS = [(40, 50), (50, 40), (97, 97)]
ALONE = ("causal", "scale", "window", "softcap", "bias", "mask", "alibi", "sinks")


def inputs(Lq, Lk):
    return cases.arrays(B, H, Hk, Lq, Lk, D, Dv)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", cases.NAMES)
def test_alone(build, name, lengths):
    q, k, v = inputs(*lengths)
    cases.verify(q, k, v, **cases.options(name, B, H, *lengths))


@pytest.mark.parametrize("ignored", cases.ARGUMENTS)
def test_none_is_ignored(build, ignored):
    """With everything on, leaving one option out moves the result by a thousand times the bound."""
    q, k, v = inputs(40, 50)
    options = cases.all_options(B, H, 40, 50) | {"causal_align": "top-left"}
    case = bounds.Case(q, k, v, **options)
    out, lse = flash_attention(q, k, v, **options, return_lse=True)
    case.check(out, lse)
    rest = {name: value for name, value in options.items() if name != ignored}
    other, other_lse = flash_attention(q, k, v, **rest, return_lse=True)
    for actual, changed, bound in zip((out, lse), (other, other_lse), case.bounds, strict=True):
        seen = np.isfinite(lse) & np.isfinite(other_lse)
        gap = np.abs(actual - changed)[seen] / bound[seen]
        assert gap.max() > 1000
    bounds.Case(q, k, v, **rest).check(other, other_lse)


@pytest.mark.parametrize("names", list(itertools.combinations(ALONE, 2)), ids="+".join)
def test_pairs(build, names):
    q, k, v = inputs(40, 50)
    options = {}
    for name in names:
        options |= cases.options(name, B, H, 40, 50)
    cases.verify(q, k, v, **options)


@pytest.mark.parametrize("align", ["bottom-right", "top-left"])
@pytest.mark.parametrize("lengths", [*LENGTHS, (1, 300), (300, 1), (13, 500), (260, 300)], ids=str)
def test_all_together(build, lengths, align):
    q, k, v = inputs(*lengths)
    cases.verify(q, k, v, **cases.all_options(B, H, *lengths), causal_align=align)


BROADCASTS = [
    (), (1,), (50,), (40, 1), (40, 50), (4, 1, 1), (4, 1, 50), (1, 40, 50), (4, 40, 50), (2, 1, 1, 1), (2, 1, 1, 50),
    (2, 1, 40, 1), (2, 4, 1, 50), (1, 4, 40, 50), (2, 1, 40, 50), (2, 4, 40, 1), (2, 4, 40, 50),
]
WINDOWS = [
    (0, 0), (0, -1), (-1, 0), (3, 0), (0, 3), (5, 2), (17, 33), (1000, 0), (1000, 1000), (-1, 2), (-1, -1),
]


@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
@pytest.mark.parametrize("name", ["bias", "mask"])
def test_broadcasts(build, name, shape):
    q, k, v = inputs(40, 50)
    r = np.random.default_rng(len(shape))
    value = r.random(shape) < 0.6 if name == "mask" else r.standard_normal(shape, dtype=np.float32)
    cases.verify(q, k, v, **{name: np.asarray(value)})


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("name", ["bias", "mask", "sinks", "alibi_slopes"])
def test_low_ranks(build, name, rank):
    """(Lq, Lk) for one head, (H, Lq, Lk) for several; slopes and sinks keep their axis of heads."""
    heads = H if rank == 3 else 1
    q, k, v = (x.reshape(x.shape[-rank:]) for x in cases.arrays(1, heads, Lq=40, Lk=50, D=D, Dv=Dv))
    r = np.random.default_rng(0)
    lead = (H,) if rank == 3 else ()
    values = {
        "bias": r.standard_normal((*lead, 40, 50), dtype=np.float32),
        "mask": r.random((*lead, 40, 50)) < 0.6,
        "sinks": r.standard_normal(heads, dtype=np.float32),
        "alibi_slopes": r.random(heads, dtype=np.float32),
    }
    cases.verify(q, k, v, **{name: values[name]})


@pytest.mark.parametrize("lengths", [(7, 7), (50, 50), (40, 60), (60, 40), (1, 30), (30, 1), (130, 200)], ids=str)
@pytest.mark.parametrize("align", ["bottom-right", "top-left"])
@pytest.mark.parametrize("causal", [False, True])
def test_windows(build, lengths, align, causal):
    """Every kind of window, from nothing but self to wider than the sequence."""
    q, k, v = cases.arrays(1, 2, 1, *lengths, 8)
    for window in WINDOWS:
        cases.verify(q, k, v, window=window, causal=causal, causal_align=align)


def test_unbounded_window_is_no_window(build):
    q, k, v = inputs(40, 50)
    plain = flash_attention(q, k, v, return_lse=True)
    cases.assert_same_bits(flash_attention(q, k, v, window=(-1, -1), return_lse=True), plain)
    cases.assert_same_bits(flash_attention(q, k, v, window=None, return_lse=True), plain)


def test_causal_caps_the_window_on_the_right(build):
    q, k, v = inputs(40, 50)
    capped = flash_attention(q, k, v, causal=True, window=(9, 5), return_lse=True)
    cases.assert_same_bits(capped, flash_attention(q, k, v, window=(9, 0), return_lse=True))


@pytest.mark.parametrize("softcap", [1e-3, 0.5, 5.0, 50.0, 1e4, 1e30])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0, 100.0])
def test_softcap_at_every_scale(build, softcap, size):
    """From the range where tanh(x) = x to deep saturation, where NumPy's tanh is exact and the RMS rule unfair."""
    q, k, v = inputs(40, 50)
    q *= np.float32(size)
    out, lse = flash_attention(q, k, v, softcap=softcap, return_lse=True)
    bounds.Case(q, k, v, softcap=softcap).check(out, lse)


@pytest.mark.parametrize("sink", [-1e4, -30.0, 0.0, 5.0, 30.0, 1e4, -np.inf])
def test_sinks_of_every_size(build, sink):
    q, k, v = inputs(40, 50)
    cases.verify(q, k, v, sinks=np.array([sink, 0.0, 1.0, sink], np.float32), causal=True)


def test_sinks_are_neither_scaled_nor_capped(build):
    """exp(4) against four scores of 0: weight of the values 4 / (4 + exp(4))."""
    q, k, v = np.zeros((1, 1, 3), np.float32), np.ones((1, 4, 3), np.float32), np.ones((1, 4, 2), np.float32)
    out = flash_attention(q, k, v, scale=0.01, softcap=0.5, sinks=np.array([4.0], np.float32))
    np.testing.assert_allclose(out, 4 / (4 + np.exp(4.0)), rtol=1e-6)


def test_numbers_per_head_may_come_as_lists(build):
    q, k, v = inputs(40, 50)
    lists = {"sinks": [0.5, -1.0, 2.0, 0.0], "alibi_slopes": [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]}
    arrays = {name: np.array(value, np.float32) for name, value in lists.items()}
    expected = flash_attention(q, k, v, **arrays, return_lse=True)
    cases.assert_same_bits(flash_attention(q, k, v, **lists, return_lse=True), expected)


@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0, 100.0, -0.05])
def test_alibi_slopes(build, slope):
    for lengths in LENGTHS:
        for align in ("bottom-right", "top-left"):
            slopes = np.array([slope, 0.3, 0.0, slope], np.float32)
            cases.verify(*inputs(*lengths), alibi_slopes=slopes, causal_align=align)


@pytest.mark.parametrize("scale", [0.0, 1.0, -1.0, 1e-6, 3.0, np.float32(0.25), 2])
def test_scales(build, scale):
    cases.verify(*inputs(40, 50), scale=scale)


def test_default_scale(build):
    q, k, v = inputs(40, 50)
    cases.assert_same_bits([flash_attention(q, k, v)], [flash_attention(q, k, v, scale=D**-0.5)])


def test_options_from_config(build):
    """Every field counts, and a given argument wins."""
    q, k, v = inputs(40, 50)
    config = FlashAttentionConfig(head_dim=D, num_heads=H, block_size_q=48, block_size_kv=32, causal=True, scale=0.7)
    given = flash_attention(q, k, v, config=config, return_lse=True)
    bounds.Case(q, k, v, causal=True, scale=0.7).check(*given)
    changed = flash_attention(q, k, v, config=config, causal=False, scale=0.2, return_lse=True)
    bounds.Case(q, k, v, scale=0.2).check(*changed)
