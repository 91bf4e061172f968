"""Plain NumPy attention, the baseline of comparisons, does what the reference does, option by option and together."""

import itertools

import numpy as np
import pytest

from cyflash import reference
from cyflash.plain import plain_attention

OPTIONS = {
    "causal": dict(causal=True),
    "top-left": dict(causal=True, causal_align="top-left"),
    "scale": dict(scale=0.7),
    "window": dict(window=(2, 1)),
    "left": dict(window=(3, -1)),
    "softcap": dict(softcap=0.8),
    "alibi": dict(alibi_slopes=np.array([0.5, 0.25, 1.0, 0.125], np.float32)),
    "sinks": dict(sinks=np.array([0.0, 2.0, -1.0, 0.5], np.float32)),
}


def arrays(q_shape, kv_shape, Dv):
    rng = np.random.default_rng(1)
    shapes = q_shape, kv_shape, (*kv_shape[:-1], Dv)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def check(qkv, options):
    got = plain_attention(*qkv, **options)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, reference.attention(*qkv, **options), rtol=2e-5, atol=2e-6)
    return got


@pytest.mark.parametrize("q_shape", [(9, 8), (4, 9, 8), (2, 4, 9, 8)])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_shapes_and_grouped_heads(q_shape, heads):
    kv_shape = (*q_shape[:-2], 13, 8)
    if len(q_shape) > 2:
        kv_shape = (*q_shape[:-3], heads, 13, 8)
    check(arrays(q_shape, kv_shape, 5), {})


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("Lk", [9, 13, 6])
def test_every_option_works_and_matters(name, Lk):
    qkv = arrays((2, 4, 9, 8), (2, 2, Lk, 8), 8)
    assert not np.allclose(check(qkv, OPTIONS[name]), plain_attention(*qkv), atol=1e-3)


@pytest.mark.parametrize("names", list(itertools.combinations(OPTIONS, 3)))
def test_options_combine(names):
    options = {}
    for name in names:
        options |= OPTIONS[name]
    check(arrays((2, 4, 9, 8), (2, 4, 13, 8), 8), options)


@pytest.mark.parametrize("shape", [(13,), (9, 13), (9, 1), (4, 9, 13), (4, 1, 13), (2, 1, 9, 13), (2, 4, 9, 13)])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("more", [{}, OPTIONS["causal"] | OPTIONS["alibi"] | OPTIONS["softcap"] | OPTIONS["sinks"]])
def test_bias_and_mask_of_every_shape(shape, heads, more):
    rng = np.random.default_rng(2)
    qkv = arrays((2, 4, 9, 8), (2, heads, 13, 8), 5)
    bias = rng.standard_normal(shape).astype(np.float32)
    bias[rng.random(shape) < 0.2] = -np.inf
    mask = rng.random(shape) < 0.6
    plain = plain_attention(*qkv, **more)
    for options in (dict(bias=bias), dict(mask=mask), dict(bias=bias, mask=mask)):
        assert not np.allclose(check(qkv, options | more), plain, atol=1e-3)


def test_bias_and_mask_of_one_head():
    qkv = arrays((9, 8), (13, 8), 5)
    check(qkv, dict(bias=np.linspace(0, 3, 13, dtype=np.float32), mask=np.arange(9)[:, None] >= np.arange(13)))


def test_slopes_by_batch():
    slopes = np.linspace(0.1, 0.8, 8, dtype=np.float32).reshape(2, 4)
    check(arrays((2, 4, 9, 8), (2, 2, 9, 8), 8), dict(alibi_slopes=slopes))


def test_rows_that_see_nothing_are_zero():
    got = check(arrays((1, 4, 9, 8), (1, 4, 4, 8), 8), dict(causal=True))  # five queries stand before the first key
    assert not got[:, :, :5].any()
    assert got[:, :, 5:].any()
    check(arrays((1, 4, 3, 8), (1, 4, 0, 8), 8), {})


def test_the_inputs_are_not_written():
    qkv = arrays((4, 9, 8), (4, 9, 8), 8)
    before = [x.copy() for x in qkv]
    plain_attention(*qkv, causal=True, softcap=1.0)
    for x, y in zip(qkv, before, strict=True):
        np.testing.assert_array_equal(x, y)
