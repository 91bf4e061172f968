"""Calibrator.observe with float16 and bfloat16: what it keeps of them is what it keeps of the values in float32."""
import subprocess
import sys
import textwrap

import calibrating
import cases
import numpy as np
import pytest
from calibrating import calibrated, state
from halves import KINDS, as_kind, assert_same_bits, dtype_of, exact


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def assert_same_states(folder, observations, options=None, **settings):
    """Of calibrators that saw 16 bits, and the same values in float32."""
    ours = calibrated(*observations, options=options, **settings)
    theirs = calibrated(*(exact(*qkv) for qkv in observations), options=options, **settings)
    assert state(ours, folder) == state(theirs, folder)
    return ours


def observations(kind, **sizes):
    return [as_kind(kind, *calibrating.long_tailed(seed, **sizes)) for seed in range(4)]


@pytest.mark.parametrize("granularity", ["tensor", "head", ("head", "token", "tensor")])
@pytest.mark.parametrize("fp32_sinks", [0, 3])
@pytest.mark.parametrize("smooth_k", ["auto", True])
def test_every_setting(tmp_path, kind, granularity, fp32_sinks, smooth_k):
    settings = dict(granularity=granularity, fp32_sinks=fp32_sinks, smooth_k=smooth_k)
    ours = assert_same_states(tmp_path, observations(kind, H=4, Hk=2, Lk=31, Dv=5), {"causal": True}, **settings)
    assert all(tile.q.dtype == tile.k.dtype == tile.v.dtype == np.float32 for tile in ours.tiles("layer")[0])


@pytest.mark.parametrize("D", [1, 2, 3, 4, 5, 7, 16, 33, 511, 512, 513, 1300])
def test_every_tail(tmp_path, kind, D):
    assert_same_states(tmp_path, observations(kind, H=1, Lq=6, D=D))


@pytest.mark.parametrize("options", ["mask", "mask rows", "bias -inf", "window", "alibi"])
def test_what_is_not_seen_is_left_out(tmp_path, kind, options):
    seen = [as_kind(kind, *calibrating.normal(seed, H=2, Lq=20, Lk=20, B=1)) for seed in range(2)]
    assert_same_states(tmp_path, seen, cases.options(options, 1, 2, 20, 20))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_strides_make_no_difference(tmp_path, kind, layout):
    qkv = as_kind(kind, *calibrating.normal(B=2))
    given = tuple(cases.LAYOUTS[layout](x) for x in qkv)
    assert given[0].dtype == qkv[0].dtype
    assert state(calibrated(given), tmp_path) == state(calibrated(exact(*qkv)), tmp_path)


def test_dtypes_may_differ(tmp_path):
    q, k, v = calibrating.normal(H=2, Lq=30)
    (q,), (k,) = as_kind("bf16", q), as_kind("fp16", k)
    assert_same_states(tmp_path, [(q, k, v), (q, v, k.astype(np.float32))])


@pytest.mark.filterwarnings("error")
def test_any_bits(tmp_path, kind):
    """Denormals and the largest values too; NaN and infinities are counted and left out."""
    bits = np.random.default_rng(0).integers(0, 1 << 16, (3, 2, 40, 24), dtype=np.uint16)
    ours = assert_same_states(tmp_path, [tuple(bits.view(dtype_of(kind)))], nonfinite="ignore")
    assert all(ours.summary()[0][f"{part}_nonfinite"] > 0 for part in "qkv")
    finite = np.where((bits & 0x7C00) == 0x7C00, 0, bits).astype(np.uint16)  # for bfloat16 this leaves out some more
    assert_same_states(tmp_path, [tuple(finite.view(dtype_of(kind)))])


@pytest.mark.parametrize("method", calibrating.METHODS)
def test_the_scales_are_the_same(kind, method):
    seen = observations(kind, H=2, Lq=40)
    ours, theirs = calibrated(*seen), calibrated(*(exact(*qkv) for qkv in seen))
    assert calibrating.bits(ours.compute(method)) == calibrating.bits(theirs.compute(method))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_what_is_not_finite_is_named(kind, part, value):
    qkv = list(as_kind(kind, *calibrating.normal()))
    qkv[part][1, 3, 5] = value
    with pytest.raises(ValueError, match=rf"{'qkv'[part]}: expected finite values .* got {value} at \(1, 3, 5\), 1 in"):
        calibrated(tuple(qkv))


def test_zeros_are_named(kind):
    q, k, v = as_kind(kind, *calibrating.normal())
    with pytest.raises(ValueError, match="v: expected values other than 0"):
        calibrated((q, k, np.zeros_like(v)))


def test_other_dtypes_are_refused():
    q, k, v = calibrating.normal()
    with pytest.raises(TypeError, match=r"layer 'layer': k: expected float32 \(or float16, bfloat16\), got float64"):
        calibrated((q, k.astype(np.float64), v))
    with pytest.raises(TypeError, match=r"v: expected .* foreign byte order"):
        calibrated((q, k, v.astype(">f2")))


def test_inputs_are_not_written(kind):
    qkv = as_kind(kind, *calibrating.normal())
    before = [x.copy() for x in qkv]
    for x in qkv:
        x.flags.writeable = False
    calibrated(qkv)
    for x, y in zip(qkv, before, strict=True):
        assert_same_bits(x, y)


MEMORY = """
import numpy as np, {imports}
from cyflash.quant import Calibrator

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))

x = np.ones((4, 1 << 15, 128), {dtype})  # 32 MB
calibrator = Calibrator(reservoir_mb=1, fp32_sinks=4)
calibrator.observe("layer", *3 * [x[:, :100]])
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
calibrator.observe("layer", *3 * [{argument}])
print(status("VmHWM") - before)
"""


def extra_megabytes(kind, argument):
    dtype_of(kind)
    dtype = {"fp16": "np.float16", "bf16": "ml_dtypes.bfloat16"}[kind]
    imports = "ml_dtypes" if kind == "bf16" else "sys"
    script = textwrap.dedent(MEMORY).format(imports=imports, dtype=dtype, argument=argument)
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_no_float32_copy_is_made(kind):
    assert extra_megabytes(kind, "x") < 8
    assert extra_megabytes(kind, "x.astype(np.float32)") > 60, "the measurement does not see a copy"


