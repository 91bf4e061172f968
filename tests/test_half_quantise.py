"""Quantising float16 and bfloat16: everything as for the same values in float32, without ever holding these."""
import subprocess
import sys
import textwrap
from unittest import mock

import cases
import numpy as np
import pytest
from halves import KINDS, as_kind, assert_same_bits, dtype_of, exact

import cyflash
from cyflash import arrays, cpu, reference
from cyflash.cpu.team import Team
from cyflash.quant import QuantizedTensor, quantize
from cyflash.quantized import GRANULARITIES, Encoding, quantise_call


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def random(*shape, seed=0):
    r = np.random.default_rng([seed, *shape])
    return (r.standard_normal(shape) * 3 + r.standard_normal(shape[-1]) * 5).astype(np.float32)


def assert_same_tensors(a, b):
    assert a.granularity == b.granularity
    assert_same_bits(a.data, b.data)
    for name in ("scale", "mean", "fp32_rows"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert_same_bits(one, other)


# The passes


@pytest.mark.parametrize("D", [*range(1, 71), 100, 129])
def test_every_tail(build, kind, D):
    (x,) = as_kind(kind, random(2, 2, 1 + 7 * D % 40, D))
    for options in ({"granularity": "token"}, {"granularity": "head", "smooth": True, "fp32_sinks": 1}):
        assert_same_tensors(quantize(x, **options), quantize(*exact(x), **options))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("shape", [(7, 5), (3, 700, 16), (2, 3, 40, 64)])
def test_every_option(build, kind, granularity, smooth, sinks, shape):
    (x,) = as_kind(kind, random(*shape))
    options = {"smooth": smooth, "fp32_sinks": sinks}
    expected = quantize(*exact(x), granularity, **options)
    assert_same_tensors(quantize(x, granularity, **options), expected)
    assert_same_tensors(
        quantize(x, granularity, scale=expected.scale, **options),
        quantize(*exact(x), granularity, scale=expected.scale, **options),
    )


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_layout(build, kind, layout):
    (x,) = as_kind(kind, random(2, 3, 20, 24))
    expected = quantize(*exact(x), "token", smooth=True)
    given = cases.LAYOUTS[layout](x)
    assert given.dtype == x.dtype
    assert_same_tensors(quantize(given, "token", smooth=True), expected)


def test_any_bits(build, kind):
    """Denormals, the largest values and everything between, as static and dynamic scales meet them."""
    bits = np.random.default_rng(0).integers(0, 1 << 16, (4, 64, 48), dtype=np.uint16)
    x = bits.view(dtype_of(kind))
    with np.errstate(invalid="ignore"):
        x = np.where(np.isfinite(x), x, x.dtype.type(0))
    for granularity in GRANULARITIES:
        assert_same_tensors(quantize(x, granularity), quantize(*exact(x), granularity))
    for scale in (1.2e-38, 1e-6, 1.0, 1e30):
        assert_same_tensors(quantize(x, scale=scale), quantize(*exact(x), scale=scale))


def test_a_call_counts_what_saturates(build, kind):
    (x,) = as_kind(kind, random(2, 2, 300, 40))
    scale = np.full((1, 1, 1, 1), 0.05, np.float32)
    counts = [np.zeros(1, np.intp) for _ in range(2)]
    results = [
        quantise_call("q", y, "tensor", scale=scale, fp32_sinks=5, saturated=count)
        for y, count in zip((x, *exact(x)), counts, strict=True)
    ]
    assert_same_bits(results[0][0], results[1][0])
    assert counts[0] == counts[1] and 0 < counts[0] < x.size


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(build, kind, threads):
    (x,) = as_kind(kind, random(1, 2, 3000, 64))
    for one, other in zip(
        quantise_call("k", x, "head", smooth=True), quantise_call("k", x, "head", smooth=True, threads=Team(threads)),
        strict=True,
    ):
        assert_same_bits(one, other)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pv", ["int8", "bf16"])
def test_signalling_nan_raises_and_warns_of_nothing(kind, pv):
    (x,) = as_kind(kind, random(2, 40, 16))
    v = x.copy()
    v.view(np.uint16)[1, 3, 5] = {"fp16": 0x7C01, "bf16": 0x7F81}[kind]
    with pytest.raises(ValueError, match=r"v: expected finite values, got nan at \(1, 3, 5\)"):
        cyflash.flash_attention_int8(x, x, v, pv=pv)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_raises_with_its_place(build, kind, value):
    (x,) = as_kind(kind, random(2, 3, 300, 20))
    x[1, 2, 281, 19] = value
    for granularity in GRANULARITIES:
        for smooth in (False, True):
            with pytest.raises(ValueError, match=rf"x: expected finite values, got {value} at \(1, 2, 281, 19\)"):
                quantize(x, granularity, smooth=smooth)


def test_empty(build, kind):
    for shape in ((0, 8), (0, 4, 8), (2, 0, 8)):
        x = np.zeros(shape, dtype_of(kind))
        assert_same_tensors(quantize(x, "token", smooth=True), quantize(*exact(x), "token", smooth=True))


def test_inputs_stay_and_sinks_are_copies(kind):
    (x,) = as_kind(kind, random(3, 20, 8))
    x.flags.writeable = False
    before = x.tobytes()
    t = quantize(x, fp32_sinks=2)
    assert x.tobytes() == before
    assert t.fp32_rows.dtype == np.float32 and np.array_equal(t.fp32_rows, x[:, :2].astype(np.float32))


def test_saved_and_loaded(tmp_path, kind):
    t = quantize(*as_kind(kind, random(3, 20, 8)), "token", smooth=True, fp32_sinks=2)
    assert_same_tensors(QuantizedTensor.load(t.save(tmp_path / "x.safetensors")), t)


# Memory

MEMORY = """
import numpy as np, {imports}
from cyflash.cpu.team import Team
from cyflash.quantized import quantise_call

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))

x = np.ones((1, 4, 1 << 15, 128), {dtype})  # 32 MB
codes = np.ones(x.shape, np.int8)
quantise_call("k", x[:, :, :100], "token", smooth=True, threads=Team(3))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
quantise_call("k", {argument}, "token", smooth=True, threads=Team(3), codes=codes)
print(status("VmHWM") - before)
"""


def extra_megabytes(kind, argument):
    dtype_of(kind)
    dtype = {"fp16": "np.float16", "bf16": "ml_dtypes.bfloat16"}[kind]
    script = textwrap.dedent(MEMORY).format(
        imports="ml_dtypes" if kind == "bf16" else "sys", dtype=dtype, argument=argument,
    )
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_no_float32_copy_is_made(kind):
    assert extra_megabytes(kind, "x") < 8
    assert extra_megabytes(kind, "x.astype(np.float32)") > 60, "the measurement does not see a copy"


# dtypes by name


@pytest.mark.parametrize("dtype", [np.float64, ">f4", ">f2", np.int16, np.uint16, np.int8, bool, "c8"])
def test_other_dtypes_are_refused(dtype):
    x = np.ones((3, 4), dtype)
    with pytest.raises(TypeError, match=r"x: expected float32 \(or float16, bfloat16\), got .*write x.astype") as info:
        quantize(x)
    assert np.dtype(dtype).name in str(info.value)
    assert ("foreign byte order" in str(info.value)) == (str(dtype)[0] == ">")


def test_big_endian_bfloat16_is_refused():
    with pytest.raises(TypeError, match="bfloat16 in foreign byte order"):
        quantize(np.ones((3, 4), np.uint16).view(dtype_of("bf16").newbyteorder(">")))


@pytest.mark.parametrize(("kind", "names"), {
    "fp32": ("fp32", "float32", "f4", "single", np.float32, np.dtype("float32"), "=f4"),
    "fp16": ("fp16", "float16", "f2", "half", np.float16, np.dtype("float16")),
    "int8": ("int8", "i1", np.int8, np.dtype("int8")),
    "bf16": ("bf16", "bfloat16"),
}.items())
def test_dtype_arguments(kind, names):
    expected = np.dtype(np.int8) if kind == "int8" else dtype_of(kind)
    for name in names:
        found = arrays.checked_dtype("dtype", name)
        assert type(found) is type(expected) and found == expected and arrays.kind_of(found) == kind


def test_dtype_arguments_of_ml_dtypes_and_torch():
    bfloat16 = dtype_of("bf16")
    assert arrays.checked_dtype("dtype", bfloat16) == arrays.checked_dtype("dtype", bfloat16.type) == bfloat16
    torch = pytest.importorskip("torch")
    for theirs, ours in ((torch.float32, "fp32"), (torch.half, "fp16"), (torch.bfloat16, "bf16"), (torch.int8, "int8")):
        assert arrays.kind_of(arrays.checked_dtype("dtype", theirs)) == ours
    with pytest.raises(TypeError, match=r"dtype: expected float32, float16, bfloat16 or int8, got float64"):
        arrays.checked_dtype("dtype", torch.float64)
    with pytest.raises(TypeError, match=r"got torch\.quint8"):
        arrays.checked_dtype("dtype", torch.quint8)


@pytest.mark.parametrize("dtype", [None, "float64", float, int, "uint8", ">f4", ">f2", "fp8", "", 3, "f4,f4", object])
def test_other_dtype_arguments_are_refused(dtype):
    with pytest.raises(TypeError, match="cache: expected float32, float16, bfloat16 or int8, got"):
        arrays.checked_dtype("cache", dtype)


def test_bfloat16_without_ml_dtypes_names_the_extra():
    with mock.patch.dict(sys.modules, {"ml_dtypes": None}):
        for name in ("bf16", "bfloat16"):
            with pytest.raises(ImportError, match=rf"dtype: '{name}' needs ml_dtypes; .*cyflash-attn\[bf16\]"):
                arrays.checked_dtype("dtype", name)
        assert quantize(np.ones((3, 4), np.float16)).data.dtype == np.int8


def test_ml_dtypes_is_not_imported_without_need():
    script = "import sys, cyflash, cyflash.quant; sys.exit('ml_dtypes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_passes_refuse_other_dtypes():
    x = np.ones((1, 1, 3, 4))
    with pytest.raises(KeyError):
        cpu.active().encode([Encoding(x, np.empty(x.shape, np.int8), None, np.ones((1, 1, 3), np.float32))], 1)




# The simulation of int8 attention


@pytest.mark.parametrize("options", [{}, {"pv": "bf16"}, {"pv": "fp32", "fp32_sinks": 3}], ids=str)
def test_the_specification_takes_16_bits(kind, options):
    qkv = as_kind(kind, *cases.arrays(1, 4, 2, 10, 30, 8))
    expected = reference.attention_int8(*exact(*qkv), **options)
    assert_same_bits(reference.attention_int8(*qkv, **options), expected)
    mixed = (qkv[0], *exact(*qkv[1:]))
    assert_same_bits(reference.attention_int8(*mixed, **options), expected)
    with pytest.raises(TypeError, match=r"expected float32 \(or float16, bfloat16\) or int8 arrays, got float64"):
        reference.attention_int8(qkv[0], qkv[1], qkv[2].astype(np.float64), **options)
