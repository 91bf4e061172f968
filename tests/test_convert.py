"""The words that load and store 16-bit floats, on every build: bit for bit as NumPy and ml_dtypes convert."""
import numpy as np
import pytest
from halves import KINDS, dtype_of

import cyflash


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def every_value(dtype):
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def floats_to_store(dtype):
    """Every value of the dtype, the middles between neighbours, the floats beside all of these, specials, any bits."""
    rng = np.random.default_rng(0)
    with np.errstate(invalid="ignore"):
        exact = every_value(dtype).astype(np.float32)
    exact = exact[np.isfinite(exact)]
    ordered = np.sort(exact).astype(np.float64)
    middles = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)
    largest, step = ordered[-1], ordered[-1] - ordered[-2]
    with np.errstate(over="ignore"):
        edges = np.array([largest + step / 2, largest + step, np.inf]).astype(np.float32)
    x = np.concatenate([exact, middles, edges, -edges])
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])
    any_bits = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    denormal = rng.integers(0, 1 << 23, 1 << 12, dtype=np.uint32).view(np.float32)
    return np.concatenate([x, any_bits[~np.isnan(any_bits)], denormal, -denormal, [np.nan, -np.nan]]).astype(np.float32)


def test_every_value_is_loaded(build, kind):
    x = every_value(dtype_of(kind))
    out = np.empty(x.size, np.float32)
    cyflash.cpu.active().load_bits(x.view(np.uint16), out, kind)
    expected = x.astype(np.float32)
    nan = np.isnan(expected)
    assert np.array_equal(out[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    assert nan.sum() > 100 and np.isnan(out[nan]).all()


def test_floats_are_stored_rounded_half_to_even(build, kind):
    dtype = dtype_of(kind)
    x = floats_to_store(dtype)
    out = np.empty(x.size, np.uint16)
    cyflash.cpu.active().store_bits(x, out, kind)
    with np.errstate(over="ignore", under="ignore"):
        expected = x.astype(dtype).view(np.uint16)
    wrong = np.flatnonzero(out != expected)
    assert wrong.size == 0, (x[wrong[:5]], out[wrong[:5]], expected[wrong[:5]])


def test_nan_is_stored_as_a_quiet_nan_of_its_sign(build, kind):
    bits = np.random.default_rng(0).integers(1, 1 << 23, 4096, dtype=np.uint32) | np.uint32(0x7F800000)
    bits[:5] = 0x7F800001, 0x7F802000, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF
    bits[::2] |= np.uint32(1 << 31)
    out = np.empty(bits.size, np.uint16)
    cyflash.cpu.active().store_bits(bits.view(np.float32), out, kind)
    quiet = np.uint16({"fp16": 0x7E00, "bf16": 0x7FC0}[kind])
    assert np.array_equal(out & quiet, np.full(out.size, quiet))
    assert np.array_equal(out >> 15, bits >> 31)


def test_part_of_a_vector_leaves_the_rest_alone(build, kind):
    dtype, module = dtype_of(kind), cyflash.cpu.active()
    x = np.random.default_rng(0).standard_normal(40).astype(dtype)
    for n in range(1, 40):
        floats, bits = np.full(41, 7, np.float32), np.full(41, 7, np.uint16)
        module.load_bits(x[:n].view(np.uint16), floats[:n], kind)
        module.store_bits(x[:n].astype(np.float32), bits[:n], kind)
        assert np.array_equal(floats[:n], x[:n].astype(np.float32)) and (floats[n:] == 7).all()
        assert np.array_equal(bits[:n], x[:n].view(np.uint16)) and (bits[n:] == 7).all()
