"""flash_attention without options: every shape, head size and length, and the arrays it returns or fills."""
import bounds
import cases
import numpy as np
import pytest

from cyflash import flash_attention


@pytest.mark.parametrize("axes", [(0, 1), 0, ()], ids=["(L, D)", "(H, L, D)", "(B, H, L, D)"])
def test_ranks(build, axes):
    q, k, v = (x.squeeze(axes) for x in cases.arrays(1, 1, Lq=37, Lk=53, D=24, Dv=40))
    out, lse = flash_attention(q, k, v, return_lse=True)
    assert out.shape == (*q.shape[:-1], 40) and lse.shape == q.shape[:-1]
    assert out.dtype == lse.dtype == np.float32
    bounds.Case(q, k, v).check(out, lse)


def test_rank_does_not_change_bits(build):
    q, k, v = cases.arrays(1, 1, Lq=37, Lk=53, D=24, Dv=40)
    whole = flash_attention(q, k, v, return_lse=True)
    for axes in (0, (0, 1)):
        out, lse = flash_attention(q.squeeze(axes), k.squeeze(axes), v.squeeze(axes), return_lse=True)
        cases.assert_same_bits((out, lse), (whole[0].squeeze(axes), whole[1].squeeze(axes)))


def test_return_lse_does_not_change_the_output(build):
    q, k, v = cases.arrays(2, 2)
    out = flash_attention(q, k, v)
    assert isinstance(out, np.ndarray)
    cases.assert_same_bits([out], [flash_attention(q, k, v, return_lse=True)[0]])


HEAD_DIMS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 40, 59, 64, 72, 80, 96, 111, 128, 160, 192, 256, 333, 512)
VALUE_DIMS = ((1, 64), (64, 1), (32, 48), (48, 32), (80, 33), (7, 130), (130, 7), (64, 512), (512, 3), (192, 128))
LENGTHS = (
    (1, 1), (1, 130), (130, 1), (2, 3), (15, 16), (17, 15), (47, 48), (48, 49), (49, 47), (64, 64), (96, 97), (97, 113),
    (128, 128), (255, 257), (3, 1025), (1025, 3), (1, 5000), (700, 600),
)


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dims(build, D):
    cases.verify(*cases.arrays(1, 2, Lq=50, Lk=67, D=D))


@pytest.mark.parametrize(("D", "Dv"), VALUE_DIMS)
def test_value_dim_differs(build, D, Dv):
    cases.verify(*cases.arrays(1, 2, Lq=50, Lk=67, D=D, Dv=Dv))


@pytest.mark.parametrize(("Lq", "Lk"), LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(build, Lq, Lk, causal):
    cases.verify(*cases.arrays(1, 1, Lq=Lq, Lk=Lk, D=20), causal=causal)


@pytest.mark.parametrize(("H", "Hk"), [(1, 1), (2, 1), (4, 2), (6, 2), (6, 3), (5, 5), (8, 1), (12, 4)])
@pytest.mark.parametrize("Lq", [1, 5, 40])
def test_grouped_queries(build, H, Hk, Lq):
    """Query head h reads kv head h // (H // Hk)."""
    cases.verify(*cases.arrays(2, H, Hk, Lq=Lq, Lk=45, D=16))


@pytest.mark.parametrize(("D", "L"), [(64, 2048), (128, 1024), (256, 400), (512, 400)])
def test_long(build, D, L):
    cases.verify(*cases.arrays(1, 1, Lq=L, D=D))
    cases.verify(*cases.arrays(1, 1, Lq=L, D=D), causal=True)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 2, 0, 8), (0, 2, 5, 8)], ids=str)
@pytest.mark.parametrize("Lk", [0, 5])
def test_no_queries(build, shape, Lk):
    k = np.ones((*shape[:-2], Lk, 8), np.float32)
    given = np.empty((*shape[:-1], 3), np.float32)
    for out in (None, given):
        got, lse = flash_attention(np.ones(shape, np.float32), k, k[..., :3], out=out, return_lse=True)
        assert got.shape == given.shape and lse.shape == shape[:-1]
        assert got is given or out is None


@pytest.mark.parametrize("lead", [(), (2,), (3, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (1, 1)}, {"softcap": 2.0}], ids=str)
def test_no_keys(build, lead, options):
    """Output 0 and lse -inf, or the sink, written into what held something else."""
    q, k = np.ones((*lead, 7, 8), np.float32), np.ones((*lead, 0, 8), np.float32)
    out = np.full((*lead, 7, 3), np.nan, np.float32)
    got, lse = flash_attention(q, k, k[..., :3], **options, out=out, return_lse=True)
    assert got is out and not out.any()
    assert lse.shape == (*lead, 7) and (lse == -np.inf).all()
    sinks = np.arange(1, 1 + (lead[-1] if lead else 1), dtype=np.float32)
    out, lse = flash_attention(q, k, k[..., :3], **options, sinks=sinks, return_lse=True)
    assert not out.any() and np.array_equal(lse, np.broadcast_to(sinks[:, None] if lead else sinks, lse.shape))


def test_no_keys_with_bias_and_mask(build):
    q, k = np.ones((2, 7, 8), np.float32), np.ones((2, 0, 8), np.float32)
    out, lse = flash_attention(q, k, k, bias=np.zeros((7, 0), np.float32), mask=np.ones((7, 0), bool), return_lse=True)
    assert not out.any() and (lse == -np.inf).all()


@pytest.mark.parametrize("Lk", [1, 2, 4, 8, 16, 64, 256])
@pytest.mark.parametrize("D", [1, 16, 33])
def test_exact_where_arithmetic_is(build, Lk, D):
    """Equal scores, a power of two of keys and whole values: every step is exact, so the mean must be."""
    r = np.random.default_rng(Lk)
    v = r.integers(-100, 100, (2, Lk, D)).astype(np.float32)
    out = flash_attention(np.zeros((2, 9, 5), np.float32), np.ones((2, Lk, 5), np.float32), v)
    assert np.array_equal(out, np.broadcast_to(v.mean(axis=1, keepdims=True, dtype=np.float64), out.shape))


@pytest.mark.parametrize("layout", [name for name in cases.LAYOUTS if name != "read-only"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "Lk": 30}], ids=["plain", "empty rows"])
def test_out(build, layout, options):
    """Any memory layout; every element is written, and nothing around it."""
    options = dict(options)
    q, k, v = cases.arrays(2, 3, Lq=50, Lk=options.pop("Lk", 60), D=20, Dv=28)
    expected = flash_attention(q, k, v, **options, return_lse=True)
    given = cases.LAYOUTS[layout](np.full(expected[0].shape, 7, np.float32))
    given[...] = np.nan
    base = given
    while isinstance(base.base, np.ndarray):
        base = base.base
    around = base.copy(order="K")
    out, lse = flash_attention(q, k, v, **options, out=given, return_lse=True)
    assert out is given
    cases.assert_same_bits((out, lse), expected)
    given[...] = np.nan
    assert base.tobytes(order="A") == around.tobytes(order="A"), "memory outside `out` was written"


def test_returns_new_arrays_each_time(build):
    q, k, v = cases.arrays(1, 2)
    first = flash_attention(q, k, v, return_lse=True)
    second = flash_attention(2 * q, k, v, return_lse=True)
    assert not any(np.shares_memory(a, b) for a in first for b in (*second, q, k, v))
    assert not np.array_equal(first[0], second[0])


def test_exponential_is_unbiased(build):
    """Keys of score 0 and -x show e^-x / (1 + e^-x): the mean error over many x is that of a wrong coefficient."""
    x = np.random.default_rng(0).uniform(0.1, 1.4, (40_000, 1)).astype(np.float32)
    k, v = np.array([[0], [-1]], np.float32), np.array([[0], [1]], np.float32)
    out = flash_attention(x, k, v, scale=1.0)
    expected = np.exp(-x.astype(np.float64)) / (1 + np.exp(-x.astype(np.float64)))
    error = (out - expected) / expected / bounds.EPS
    assert abs(error.mean()) < 0.15 and np.abs(error).max() < 3
