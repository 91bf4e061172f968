"""Arrays as int8 codes: what quantize promises, what is kept and saved, and every error."""
import doctest
import os

import cases
import numpy as np
import pytest
import safetensors.numpy

import cyflash.quantized
from cyflash.cpu.team import Team
from cyflash.quant import LayerScales, QuantizedTensor, quantize
from cyflash.quantized import GRANULARITIES, checked_scale, quantise_call

F32 = np.float32
MAX, TINY = np.finfo(F32).max, np.finfo(F32).tiny
SHAPES = ((7, 5), (3, 7, 16), (2, 3, 40, 24))


def random(*shape, seed=0):
    r = np.random.default_rng([seed, *shape])
    return (r.standard_normal(shape) * np.exp(r.standard_normal((*shape[:-1], 1))) + 2).astype(F32)


def scale_shape(shape, granularity):
    return {"tensor": (), "head": (*shape[:-2], 1, 1), "token": (*shape[:-1], 1)}[granularity]


def assert_close(t, x):
    """Half a step, and the rounding of x - mean and of the inverse of the scale."""
    slack = 4 * np.finfo(F32).eps * (abs(x) + (0 if t.mean is None else abs(t.mean)))
    assert (abs(t.dequantize().astype(float) - x) <= 0.50003 * t.scale + slack).all()


def assert_equal(a, b):
    np.testing.assert_array_equal(a.data, b.data)
    assert a.granularity == b.granularity
    for name in ("scale", "mean", "fp32_rows"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype == F32 and one.shape == other.shape
            np.testing.assert_array_equal(one, other)


# quantize


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("sinks", [0, 3])
def test_every_element_is_within_half_a_step(build, shape, granularity, smooth, sinks):
    x = random(*shape)
    t = quantize(x, granularity, smooth=smooth, fp32_sinks=sinks)
    assert t.shape == shape and t.ndim == len(shape) and t.data.dtype == np.int8
    assert t.scale.shape == scale_shape(shape, granularity) and t.scale.dtype == F32 and t.granularity == granularity
    assert (t.mean is not None) == smooth and (t.fp32_rows is not None) == bool(sinks)
    assert_close(t, x)
    # nothing saturates, and the whole range is used
    centred = (x - t.mean if smooth else x)[..., sinks:, :]
    axis = {"tensor": None, "head": (-2, -1), "token": -1}[granularity]
    np.testing.assert_array_equal(abs(t.data[..., sinks:, :].astype(int)).max(axis), 127)
    own = t.scale[..., sinks:, :] if granularity == "token" else t.scale
    np.testing.assert_array_equal(own, (abs(centred).max(axis, keepdims=t.scale.ndim > 0) / F32(127)).astype(F32))
    if smooth:
        np.testing.assert_allclose(t.mean, x.mean(-2, keepdims=True, dtype=float), rtol=1e-5, atol=1e-6)
    if sinks:
        np.testing.assert_array_equal(t.fp32_rows, x[..., :sinks, :])
        np.testing.assert_array_equal(t.dequantize()[..., :sinks, :], x[..., :sinks, :])
        assert not t.data[..., :sinks, :].any()


def test_builds_agree_bit_for_bit():
    x = random(2, 3, 300, 37)
    results = []
    for name in cyflash.cpu.runnable():
        with cyflash.set_implementation(name):
            results.append([quantize(x, g, smooth=s) for g in GRANULARITIES for s in (False, True)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_equal(a, b)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_strides_change_no_bit_and_are_kept(layout):
    x = random(2, 3, 40, 24)
    y = cases.LAYOUTS[layout](x)
    for granularity in GRANULARITIES:
        t = quantize(y, granularity, smooth=True, fp32_sinks=1)
        assert_equal(t, quantize(x, granularity, smooth=True, fp32_sinks=1))
        assert np.argsort(t.data.strides).tolist() == np.argsort(np.abs(np.empty_like(y, order="K").strides)).tolist()


def test_threads_change_no_bit():
    x = random(2, 4, 700, 64)
    results = []
    for threads in (1, 2, 5):
        cyflash.set_num_threads(threads)
        results.append([quantize(x, g, smooth=True) for g in GRANULARITIES])
    cyflash.set_num_threads(None)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_equal(a, b)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.7, 1e-45, 1e-39, -1e-38, 1e-30, MAX, -MAX])
@pytest.mark.parametrize("L", [1, 9])
def test_constants(build, granularity, smooth, value, L):
    """Zeros, denormals, the largest floats, one token: the scale stays a normal number, and nothing becomes NaN."""
    x = np.full((2, L, 5), value, F32)
    t = quantize(x, granularity, smooth=smooth)
    assert np.isfinite(t.scale).all() and (t.scale >= TINY).all()
    if smooth:
        np.testing.assert_array_equal(t.dequantize(), x)
    else:
        assert (abs(t.dequantize() - x) <= max(abs(F32(value)) * F32(1e-6), TINY / 2)).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_no_tokens_or_only_float_ones(build, granularity, sinks):
    for shape in ((sinks, 4), (2, sinks, 4), (0, 2, sinks, 4), (2, 0, sinks, 4)):
        x = np.ones(shape, F32)
        t = quantize(x, granularity, smooth=True, fp32_sinks=sinks)
        assert t.scale.shape == scale_shape(shape, granularity) and (t.scale == TINY).all()
        np.testing.assert_array_equal(t.dequantize(), x)


def test_float_tokens_have_no_part_in_scales():
    x = random(2, 3, 40, 24)
    x[:, :, :4] *= 1e4
    for granularity in GRANULARITIES:
        t = quantize(x, granularity, fp32_sinks=4)
        assert t.scale.max() < 1 < 100 * quantize(x, "tensor").scale
        assert_close(t, x)


def test_smoothing_makes_a_common_part_free():
    x = random(2, 3, 200, 24)
    shifted = x + 1000 * random(24, seed=1)
    plain, smooth = (quantize(shifted, "head", smooth=s) for s in (False, True))
    assert smooth.scale.max() < plain.scale.min() / 20
    assert_close(smooth, shifted)


@pytest.mark.parametrize("shape", [(), (1, 1, 1, 1), (3, 1, 1), (2, 1, 1, 1), (2, 3, 1, 1), (40, 1), (2, 3, 40, 1)])
@pytest.mark.parametrize("dtype", [F32, np.float64])
@pytest.mark.parametrize("sinks", [0, 3])
def test_static_scales_saturate(build, shape, dtype, sinks):
    x = random(2, 3, 40, 24)
    scale = np.random.default_rng(0).uniform(0.005, 0.02, shape).astype(dtype)
    t = quantize(x, scale=scale, fp32_sinks=sinks)
    assert t.scale.shape == shape and t.scale.dtype == F32
    expected = np.clip(np.rint(x * (1 / t.scale)), -127, 127).astype(np.int8)
    expected[:, :, :sinks] = 0
    np.testing.assert_array_equal(t.data, expected)
    assert t.data.max() == 127 and t.data.min() == -127
    assert t.granularity == ("token" if 40 in shape else "head" if t.scale.size > 1 else "tensor")


def test_static_scales_of_every_kind_of_number():
    x = random(3, 7, 16)
    expected = quantize(x, scale=np.array(0.5, F32))
    for scale in (0.5, F32(0.5), np.float64(0.5), np.float16(0.5), [[[0.5]]], np.full((1, 1), 0.5)):
        t = quantize(x, scale=scale)
        np.testing.assert_array_equal(t.data, expected.data)
        assert t.scale == F32(0.5) and t.scale.dtype == F32
    assert quantize(x, scale=1).scale == 1
    assert quantize(x, scale=[[[1]], [[2.0]], [[3]]]).granularity == "head"


def test_static_scale_and_smoothing_together():
    x = random(3, 70, 16)
    t = quantize(x, scale=0.25, smooth=True)
    np.testing.assert_array_equal(t.mean, quantize(x, smooth=True).mean)
    np.testing.assert_array_equal(t.data, np.clip(np.rint((x - t.mean) * F32(4)), -127, 127))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("options", [{}, {"smooth": True}, {"fp32_sinks": 2}, {"scale": 0.1}])
def test_inputs_are_never_written(granularity, options):
    x = random(2, 3, 40, 24)
    copy = x.copy()
    if "scale" in options:
        granularity, options = "tensor", {"scale": np.full((3, 1, 1), 0.1, F32)}
    t = quantize(x, granularity, **options)
    np.testing.assert_array_equal(x, copy)
    x.flags.writeable = False
    assert_equal(quantize(x, granularity, **options), t)
    assert not any(np.shares_memory(y, x) for y in (t.data, t.scale, t.mean, t.fp32_rows) if y is not None)
    if "scale" in options:
        options["scale"][...] = 7
        assert (t.scale == F32(0.1)).all()


def test_bytes_that_are_kept():
    x = random(2, 8, 512, 64)
    assert x.nbytes / quantize(x, "tensor").nbytes > 3.9
    assert x.nbytes / quantize(x, "head").nbytes > 3.9
    assert x.nbytes / quantize(x, "token").nbytes >= 0.98 * 4 * 64 / (64 + 4)
    t = quantize(x, "token", smooth=True, fp32_sinks=4)
    assert t.nbytes == x.size + 4 * (2 * 8 * 512 + 2 * 8 * 64 + 2 * 8 * 4 * 64)
    assert t.nbytes == t.data.nbytes + t.scale.nbytes + t.mean.nbytes + t.fp32_rows.nbytes


# A call's own


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("sinks", [0, 3])
def test_a_call_quantises_each_sequence_as_quantize_does(build, granularity, smooth, sinks):
    x = random(2, 3, 40, 24)
    codes, scale, mean = quantise_call("k", x, granularity, smooth=smooth, fp32_sinks=sinks, threads=Team(3))
    assert codes.flags.c_contiguous and codes.dtype == np.int8
    shape = {"tensor": (2, 1, 1, 1), "head": (2, 3, 1, 1), "token": (2, 3, 40, 1)}[granularity]
    assert scale.shape == shape and scale.dtype == F32
    for b in range(2):
        t = quantize(x[b], granularity, smooth=smooth, fp32_sinks=sinks)
        np.testing.assert_array_equal(codes[b], t.data)
        np.testing.assert_array_equal(scale[b].ravel(), t.scale.ravel())
        assert (mean is None) == (t.mean is None)
        if smooth:
            np.testing.assert_array_equal(mean[b], t.mean)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_call_with_a_given_mean_or_scale(granularity):
    x = random(2, 3, 40, 24)
    t = quantize(x, "token", smooth=True)
    codes, scale, mean = quantise_call("k", x, granularity, mean=t.mean)
    own = quantise_call("k", x, granularity, smooth=True)
    for a, b in zip((codes, scale, mean), own, strict=True):
        np.testing.assert_array_equal(a, b)
    static = np.full((3, 1, 1), 0.05, F32)[None]
    codes, scale, mean = quantise_call("k", x, granularity, scale=static, mean=t.mean[:1, :1])
    assert scale is static and mean.shape == (2, 3, 1, 24)
    np.testing.assert_array_equal(codes, np.clip(np.rint((x - t.mean[:1, :1]) * (1 / static)), -127, 127))


# Values that are not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("options", [{}, {"smooth": True}, {"fp32_sinks": 18}, {"scale": 0.5}])
def test_a_value_that_is_not_finite_is_named(build, value, granularity, options):
    x = random(2, 4, 20, 8)
    x[0, 3, 17, 5] = x[1, 0, 2, 3] = value
    if "scale" in options:
        granularity = "tensor"
    for y, place in ((x, "(0, 3, 17, 5)"), (x[0], "(3, 17, 5)"), (x[0, 3], "(17, 5)")):
        with pytest.raises(ValueError) as caught:
            quantize(y, granularity, **options)
        assert str(caught.value).startswith(f"x: expected finite values, got {value} at {place}")
    options = {key: np.full((1, 1, 1, 1), y, F32) if key == "scale" else y for key, y in options.items()}
    with pytest.raises(ValueError, match=rf"^k: expected finite values, got {value} at \(0, 3, 17, 5\)"):
        quantise_call("k", x, granularity, **options)
    with pytest.raises(ValueError, match=rf"^k: expected finite values, got {value} at \(3, 17, 5\)"):
        quantise_call("k", x[:1], granularity, **options, ndim=3)


# QuantizedTensor


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("options", [{}, {"smooth": True}, {"fp32_sinks": 2}, {"smooth": True, "fp32_sinks": 7}])
def test_save_and_load(tmp_path, shape, granularity, options):
    t = quantize(np.asfortranarray(random(*shape)), granularity, **options)
    path = t.save(tmp_path / "k.safetensors")
    back = QuantizedTensor.load(str(path))
    assert_equal(back, t)
    np.testing.assert_array_equal(back.dequantize(), t.dequantize())
    assert os.listdir(tmp_path) == [path.name]


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = quantize(random(3, 4)).save(tmp_path / "k.safetensors")
    before = path.read_bytes()

    def fail(arrays, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        quantize(random(5, 4)).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"x\.npz: expected a file that ends in \.safetensors"):
        quantize(random(3, 4)).save(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        QuantizedTensor.load(tmp_path / "x.npz")
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        QuantizedTensor.load(path)
    path.write_bytes(b"no arrays")
    with pytest.raises(ValueError, match=r"not a readable \.safetensors"):
        QuantizedTensor.load(path)
    safetensors.numpy.save_file({"w": np.ones(3, F32)}, path)
    with pytest.raises(ValueError, match=r"expected a file that QuantizedTensor.save wrote, got one with \['w'\]"):
        QuantizedTensor.load(path)
    metadata = {"format": "cyflash.QuantizedTensor"}
    for wrong in ({"data": np.ones((3, 4), F32), "scale": np.ones((), F32)}, {"data": np.ones((3, 4), np.int8)}):
        safetensors.numpy.save_file(wrong, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"x\.safetensors: .*(expected int8|scale)"):
            QuantizedTensor.load(path)


def test_codes_from_elsewhere():
    codes = np.array([[[-128, 0], [1, 127]], [[2, 3], [4, 5]]], np.int8)
    for scale, granularity in ((0.5, "tensor"), ([[[0.5]], [[2.0]]], "head"), (np.ones((2, 2, 1)), "token")):
        t = QuantizedTensor(codes, scale)
        assert t.data is codes and t.granularity == granularity and t.scale.dtype == F32
        np.testing.assert_array_equal(t.dequantize(), codes * np.asarray(scale, F32))
        assert QuantizedTensor(codes, scale, granularity=granularity).granularity == granularity
    assert "granularity='token'" in repr(t) and "(2, 2, 2)" in repr(t) and f"nbytes={t.nbytes}" in repr(t)


def test_only_the_codes_are_the_callers_memory():
    data, scale = np.zeros((2, 7, 4), np.int8), np.ones((2, 1, 1), F32)
    mean, rows = random(2, 1, 4), random(2, 3, 4)
    t = QuantizedTensor(data, scale, mean, rows)
    kept = [x.copy() for x in (t.scale, t.mean, t.fp32_rows)]
    for x in (scale, mean, rows):
        x[...] = 7
    for x, y in zip((t.scale, t.mean, t.fp32_rows), kept, strict=True):
        assert np.array_equal(x, y)
    assert t.data is data


def test_dequantizing_stays_finite():
    x = np.array([[MAX, -MAX, 0.0]], F32)
    np.testing.assert_array_equal(quantize(x).dequantize(), x)
    t = QuantizedTensor(np.array([[127, -127]], np.int8), MAX, mean=np.array([[-MAX, -MAX]]))
    np.testing.assert_array_equal(t.dequantize(), [[0, -MAX]])


def test_nothing_can_be_reassigned():
    t = quantize(random(3, 4))
    for name in ("data", "scale", "mean", "granularity"):
        with pytest.raises(AttributeError):
            setattr(t, name, None)
    with pytest.raises(AttributeError):
        LayerScales(0.1).pv = "fp32"


# LayerScales


def test_layer_scales_keep_float32():
    k_mean = [[[1, 2]], [[3, 4]]]
    s = LayerScales(0.5, [[[0.25]], [[0.5]]], np.full((2, 7, 1), 0.1), k_mean=k_mean, fp32_sinks=4, pv="bf16")
    assert [x.shape for x in (s.q_scale, s.k_scale, s.v_scale, s.k_mean)] == [(), (2, 1, 1), (2, 7, 1), (2, 1, 2)]
    assert all(x.dtype == F32 for x in (s.q_scale, s.k_scale, s.v_scale, s.k_mean))
    assert (s.fp32_sinks, s.pv) == (4, "bf16")
    empty = LayerScales()
    assert (empty.q_scale, empty.k_scale, empty.v_scale, empty.k_mean, empty.fp32_sinks, empty.pv) == (
        None, None, None, None, 0, "int8"
    )  # fmt: skip
    with pytest.raises(TypeError):
        LayerScales(0.1, 0.1, 0.1, 0.1)


# Errors

X = np.ones((2, 3, 40, 8), F32)
CODES = np.ones((2, 3, 40, 8), np.int8)
BAD_SCALES = {
    "zero": (ValueError, 0.0, ["positive", "got 0.0"]),
    "negative": (ValueError, -0.5, ["positive", "got -0.5"]),
    "nan": (ValueError, np.nan, ["finite", "got nan"]),
    "inf": (ValueError, np.inf, ["finite", "got inf"]),
    "denormal": (ValueError, 1e-39, ["at least 1.18e-38", "got 1e-39"]),
    "beyond float32": (ValueError, 1e39, ["finite", "got 1e+39"]),
    "one of several": (ValueError, np.array([[[1.0]], [[0.0]], [[1.0]]]), ["got 0.0 at (1, 0, 0)"]),
    "bool": (TypeError, True, ["number", "True"]),
    "bool array": (TypeError, np.ones((3, 1, 1), bool), ["float32", "b1"]),
    "integer array": (TypeError, np.ones((3, 1, 1), int), ["float32 or float64", "i8"]),
    "float16 array": (TypeError, np.ones((3, 1, 1), np.float16), ["float32 or float64", "f2", "astype(np.float32)"]),
    "big-endian": (TypeError, np.ones((3, 1, 1), ">f4"), [">f4"]),
    "complex": (TypeError, 1j, ["number", "1j"]),
    "text": (TypeError, "0.1", ["number", "'0.1'"]),
    "a list of text": (TypeError, ["a"], ["number", "['a']"]),
    "uneven": (TypeError, [[1.0], [1.0, 2.0]], ["number"]),
    "masked": (TypeError, np.ma.ones((3, 1, 1)), ["MaskedArray"]),
}
BAD_SHAPES = {
    "per head in one axis": ((3,), ["(H, 1, 1)", "got shape (3,)", "np.reshape({}, (-1, 1, 1))"]),
    "per token in one axis": ((40,), ["got shape (40,)", "np.reshape({}, (-1, 1))"]),
    "one in one axis": ((1,), ["got shape (1,)", "np.reshape({}, (-1, 1, 1))"]),
    "per channel": ((8,), ["got shape (8,)"]),
    "per channel of each head": ((2, 3, 1, 8), ["(2, 3, 1, 8)", "same for all channels"]),
    "of every element": ((2, 3, 40, 8), ["(2, 3, 40, 8)", "same for all channels"]),
    "other heads": ((4, 1, 1), ["(2, 3, 40, 8)", "(4, 1, 1)", "does not broadcast"]),
    "other tokens": ((2, 3, 41, 1), ["(2, 3, 41, 1)", "does not broadcast"]),
    "five axes": ((1, 1, 1, 1, 1), ["(1, 1, 1, 1, 1)", "does not broadcast"]),
}


def assert_raises(error, parts, function, *args, **options):
    with pytest.raises(error) as caught:
        function(*args, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", BAD_SCALES)
def test_bad_scales(name):
    error, scale, parts = BAD_SCALES[name]
    assert_raises(error, ["scale: expected", *parts], quantize, X, scale=scale)
    assert_raises(error, ["scale: expected", *parts], QuantizedTensor, CODES, scale)
    assert_raises(error, ["k_scale: expected", *parts], checked_scale, "k_scale", scale, X.shape)
    assert_raises(error, ["v_scale: expected", *parts], LayerScales, v_scale=scale)


@pytest.mark.parametrize("name", BAD_SHAPES)
def test_scales_of_bad_shapes(name):
    shape, parts = BAD_SHAPES[name]
    scale = np.full(shape, 0.1)
    assert_raises(ValueError, ["scale: expected", *(p.format("scale") for p in parts)], quantize, X, scale=scale)
    assert_raises(ValueError, ["scale: expected", *(p.format("scale") for p in parts)], QuantizedTensor, CODES, scale)
    parts = ["k_scale: expected", *(p.format("k_scale") for p in parts)]
    assert_raises(ValueError, parts, checked_scale, "k_scale", scale, X.shape)


def test_one_axis_for_a_single_head():
    parts = ["(L, 1) per token", "got shape (40,)", "np.reshape(scale, (-1, 1))"]
    assert_raises(ValueError, parts, quantize, X[0, 0], scale=np.ones(40))
    assert quantize(X[0, 0], scale=[0.5]).granularity == "tensor"
    parts = ["q_scale: expected", "np.reshape(q_scale, (-1, 1, 1))"]
    assert_raises(ValueError, parts, LayerScales, [0.1, 0.2])


ERRORS = {
    "float64": (TypeError, ["x: expected float32", "got float64", "astype"], quantize, [X.astype(float)], {}),
    "big-endian": (TypeError, ["x: expected float32", ">f4"], quantize, [X.astype(">f4")], {}),
    "int8": (TypeError, ["x: expected float32", "int8"], quantize, [CODES], {}),
    "a list": (TypeError, ["x: expected a NumPy array", "list"], quantize, [[1.0]], {}),
    "one axis": (ValueError, ["x: expected 2 or 3 or 4 dimensions", "(8,)"], quantize, [X[0, 0, 0]], {}),
    "five axes": (ValueError, ["x: expected 2 or 3 or 4 dimensions"], quantize, [X[None]], {}),
    "no channels": (ValueError, ["x: expected a head_dim of at least 1", "(2, 0)"], quantize, [X[0, 0, :2, :0]], {}),
    "granularity": (ValueError, ["granularity: expected one of 'tensor', 'head', 'token', got 'channel'"],
                    quantize, [X, "channel"], {}),
    "granularity None": (ValueError, ["granularity: expected", "None"], quantize, [X, None], {}),
    "smooth": (ValueError, ["smooth: expected True or False, got 1"], quantize, [X], {"smooth": 1}),
    "too many sinks": (ValueError, ["fp32_sinks: expected at most the 40", "41"], quantize, [X], {"fp32_sinks": 41}),
    "negative sinks": (ValueError, ["fp32_sinks: expected", "-1"], quantize, [X], {"fp32_sinks": -1}),
    "half a sink": (ValueError, ["fp32_sinks: expected", "1.5"], quantize, [X], {"fp32_sinks": 1.5}),
    "sinks True": (ValueError, ["fp32_sinks: expected", "True"], quantize, [X], {"fp32_sinks": True}),
    "head beside a number": (ValueError, ["scale: expected", "(2, 3, 1, 1)", "'head'", "per tensor"],
                             quantize, [X, "head"], {"scale": 0.1}),
    "token beside heads": (ValueError, ["scale: expected", "(2, 3, 40, 1)", "'token'", "(3, 1, 1)", "per head"],
                           quantize, [X, "token"], {"scale": np.ones((3, 1, 1))}),
    "head beside tokens": (ValueError, ["scale: expected", "'head'", "per token"],
                           quantize, [X, "head"], {"scale": np.ones((40, 1))}),
    "tensor beside heads": (ValueError, ["scale: expected", "'tensor'", "per head"],
                            QuantizedTensor, [CODES, np.ones((3, 1, 1))], {"granularity": "tensor"}),
    "float data": (TypeError, ["data: expected int8, got float32", "quantize"], QuantizedTensor, [X, 1.0], {}),
    "unsigned data": (TypeError, ["data: expected int8, got uint8"], QuantizedTensor, [CODES.view("u1"), 1.0], {}),
    "data of one axis": (ValueError, ["data: expected 2 or 3 or 4"], QuantizedTensor, [CODES[0, 0, 0], 1.0], {}),
    "no scale": (TypeError, ["scale: expected", "None"], QuantizedTensor, [CODES, None], {}),
    "mean of another shape": (ValueError, ["mean: expected shape (2, 3, 1, 8)", "(8,)"],
                              QuantizedTensor, [CODES, 1.0], {"mean": np.ones(8, F32)}),
    "mean of float64": (TypeError, ["mean: expected float32"],
                        QuantizedTensor, [CODES, 1.0], {"mean": np.ones((2, 3, 1, 8))}),
    "mean of nan": (ValueError, ["mean: expected finite values, got nan at (0, 0, 0, 0)"],
                    QuantizedTensor, [CODES, 1.0], {"mean": np.full((2, 3, 1, 8), np.nan, F32)}),
    "too many rows": (ValueError, ["fp32_rows: expected shape (2, 3, 40, 8)", "(2, 3, 41, 8)"],
                      QuantizedTensor, [CODES, 1.0], {"fp32_rows": np.ones((2, 3, 41, 8), F32)}),
    "rows of other heads": (ValueError, ["fp32_rows: expected shape (2, 3, 2, 8)", "(2, 2, 2, 8)"],
                            QuantizedTensor, [CODES, 1.0], {"fp32_rows": np.ones((2, 2, 2, 8), F32)}),
    "a number for rows": (TypeError, ["fp32_rows: expected"], QuantizedTensor, [CODES, 1.0], {"fp32_rows": 4}),
    "pv": (ValueError, ["pv: expected one of 'int8', 'bf16', 'fp32', got 'fp16'"], LayerScales, [], {"pv": "fp16"}),
    "pv None": (ValueError, ["pv: expected", "None"], LayerScales, [], {"pv": None}),
    "negative sinks of a layer": (ValueError, ["fp32_sinks: expected", "-2"], LayerScales, [], {"fp32_sinks": -2}),
    "k_mean per token": (ValueError, ["k_mean: expected", "(1, D)", "(40, 8)"],
                         LayerScales, [], {"k_mean": np.ones((40, 8))}),
    "k_mean a number": (ValueError, ["k_mean: expected", "()"], LayerScales, [], {"k_mean": 1.0}),
    "k_mean of inf": (ValueError, ["k_mean: expected finite", "inf"], LayerScales, [], {"k_mean": [[np.inf, 1.0]]}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    error, parts, function, args, options = ERRORS[name]
    assert_raises(error, parts, function, *args, **options)


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(cyflash.quantized)
    assert result.failed == 0 and result.attempted > 5
