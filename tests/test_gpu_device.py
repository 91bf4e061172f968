"""The public functions on a real GPU against the specification: `pytest -m gpu`.

Skipped, with the reason, where there is none. Arrays are CuPy's, and torch's where it is installed with CUDA.
"""
import functools
import subprocess
import sys

import numpy as np
import pytest

import cyflash
from cyflash import flash_attention, flash_attention_int8, reference

pytestmark = pytest.mark.gpu

H, Hk = 4, 2
LENGTHS = [(128, 128), (1, 300), (77, 131), (130, 64), (65, 0)]
TOLERANCES = {"float32": 5e-6, "float16": 4e-3, "bfloat16": 3e-2}  # of outputs that are averages of normal numbers
OPTIONS = ["none", "causal", "causal top-left", "window", "scale", "softcap", "bias", "mask", "alibi", "sinks", "all"]


@pytest.fixture(scope="module")
def cupy():
    status = cyflash.gpu_status()
    if not status.available:
        pytest.skip(status.reason)
    return __import__("cupy")


def dtype_of(name):
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


@functools.cache
def tensors(D, Lq, Lk, B=2):
    rng = np.random.default_rng(D)
    return tuple(
        rng.standard_normal((B, heads, L, D), dtype=np.float32) for heads, L in ((H, Lq), (Hk, Lk), (Hk, Lk))
    )


def option(name, Lq, Lk):
    rng = np.random.default_rng(1)
    bias = rng.standard_normal((H, Lq, Lk)).astype(np.float32)
    bias[rng.random(bias.shape) < 0.1] = -np.inf
    every = {
        "causal": {"causal": True},
        "causal top-left": {"causal": True, "causal_align": "top-left"},
        "window": {"window": (20, 3)},
        "scale": {"scale": 0.4},
        "softcap": {"softcap": 1.5},
        "bias": {"bias": bias},
        "mask": {"mask": rng.random((2, 1, Lq, Lk)) < 0.8},
        "alibi": {"alibi_slopes": np.linspace(0.05, 0.4, H, dtype=np.float32)},
        "sinks": {"sinks": np.linspace(-1, 3, H, dtype=np.float32)},
    }
    if name == "all":
        return functools.reduce(dict.__or__, every.values())
    return every.get(name, {})


def sent(cupy, options):
    return {name: cupy.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


def close(found, expected, tolerance):
    """Also in where NaN and infinity are."""
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("D", [16, 40, 64, 80, 128, 200, 256])
def test_head_dims_and_lengths(cupy, dtype, D):
    for Lq, Lk in LENGTHS:
        q, k, v = (x.astype(dtype_of(dtype)) for x in tensors(D, Lq, Lk))
        out, lse = flash_attention(*map(cupy.asarray, (q, k, v)), causal=True, return_lse=True)
        expected, expected_lse = reference.attention(q, k, v, causal=True, return_lse=True)
        assert out.dtype == q.dtype
        close(cupy.asnumpy(out), expected, TOLERANCES[dtype])
        close(cupy.asnumpy(lse), expected_lse, 1e-4)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(cupy, dtype, name):
    for Lq, Lk in LENGTHS:
        q, k, v = (x.astype(dtype_of(dtype)) for x in tensors(64, Lq, Lk))
        options = option(name, Lq, Lk)
        out, lse = flash_attention(*map(cupy.asarray, (q, k, v)), return_lse=True, **sent(cupy, options))
        expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
        close(cupy.asnumpy(out), expected, TOLERANCES[dtype])
        close(cupy.asnumpy(lse), expected_lse, 1e-4)


@pytest.mark.parametrize("pv", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_int8(cupy, pv, name):
    for how in ({}, {"fp32_sinks": 4}, {"granularity": ("tensor", "head", "token"), "smooth_k": False}):
        q, k, v = tensors(64, 77, 131)
        options = option(name, 77, 131)
        out, lse = flash_attention_int8(
            *map(cupy.asarray, (q, k, v)), pv=pv, return_lse=True, **how, **sent(cupy, options)
        )
        expected, expected_lse = reference.attention_int8(q, k, v, pv=pv, return_lse=True, **how, **options)
        close(cupy.asnumpy(out), expected, {"int8": 0.02, "bf16": 0.02, "fp32": 1e-4}[pv])
        close(cupy.asnumpy(lse), expected_lse, 2e-4)


@pytest.mark.parametrize("D", [16, 40, 64, 128, 256])
def test_head_dims_of_int8(cupy, D):
    for Lq, Lk in LENGTHS[:-1]:
        q, k, v = tensors(D, Lq, Lk)
        out = flash_attention_int8(*map(cupy.asarray, (q, k, v)), causal=True)
        close(cupy.asnumpy(out), reference.attention_int8(q, k, v, causal=True), 0.02)


def test_codes_and_quantised_tensors(cupy):
    q, k, v = tensors(64, 77, 131)
    k8, v8 = cyflash.quantize(cupy.asarray(k), "token", smooth=True), cyflash.quantize(cupy.asarray(v), "head")
    there = [cyflash.quantize(k, "token", smooth=True), cyflash.quantize(v, "head")]
    assert abs(cupy.asnumpy(k8.data).astype(int) - there[0].data).max() <= 1
    close(cupy.asnumpy(flash_attention_int8(cupy.asarray(q), k8, v8)), reference.attention_int8(q, *there), 0.02)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_strides_and_out(cupy, dtype):
    packed = cupy.asarray(np.random.default_rng(2).standard_normal((2, 100, 3, H, 64)).astype(dtype_of(dtype)))
    q, k, v = (packed[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    out = cupy.empty((2, 100, H, 64), packed.dtype).transpose(0, 2, 1, 3)
    assert flash_attention(q, k, v, out=out) is out
    close(cupy.asnumpy(out), reference.attention(*map(cupy.asnumpy, (q, k, v))), TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_what_is_hidden_does_not_leak(cupy, dtype):
    q, k, v = (x.astype(dtype_of(dtype)) for x in tensors(64, 70, 200))
    k[:, :, 150:], v[:, :, 150:] = np.nan, np.inf
    mask = np.arange(200) < 150
    out = flash_attention(*map(cupy.asarray, (q, k, v)), mask=cupy.asarray(mask))
    close(cupy.asnumpy(out), reference.attention(q, k[:, :, :150], v[:, :, :150]), TOLERANCES[dtype])
    k, v = k[:, :, :150].copy(), v[:, :, :150]
    k[0, 0, 3, 0] = np.nan
    assert bool(cupy.isnan(flash_attention(*map(cupy.asarray, (q, k, v)))[0, :2]).all())


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tensors_of_torch(cupy, dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch is installed without CUDA")
    q, k, v = (torch.from_numpy(x).to("cuda", getattr(torch, dtype)) for x in tensors(64, 77, 131))
    for function, bound in ((flash_attention, TOLERANCES[dtype]), (flash_attention_int8, 0.03)):
        with torch.cuda.stream(torch.cuda.Stream()):
            out, lse = function(q, k, v, causal=True, return_lse=True)
        torch.cuda.synchronize()
        assert out.dtype == q.dtype and out.is_cuda and lse.dtype == torch.float32
        expected = reference.attention(*(x.double().cpu().numpy() for x in (q, k, v)), causal=True)
        close(out.double().cpu().numpy(), expected, bound)


def test_streams_do_not_wait_for_each_other(cupy):
    """Each stream gets what its own calls compute, however they overlap."""
    cases = [tuple(cupy.asarray(x) for x in tensors(64, 128 + n, 512)) for n in range(8)]
    expected = [cupy.asnumpy(flash_attention(*case)) for case in cases]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in cases]
    cupy.cuda.Device().synchronize()
    outputs = []
    for _ in range(20):
        for stream, case in zip(streams, cases, strict=True):
            with stream:
                outputs.append(flash_attention(*case))
    cupy.cuda.Device().synchronize()
    for i, out in enumerate(outputs):
        np.testing.assert_array_equal(cupy.asnumpy(out), expected[i % len(cases)])


def test_memory_is_the_output(cupy):
    """Nothing of the size of the scores, or of the inputs, is allocated."""
    q, k, v = (cupy.zeros((1, 8, 8192, 64), cupy.float16) for _ in range(3))
    flash_attention(q, k, v)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    out = flash_attention(q, k, v)
    assert pool.total_bytes() - before <= out.nbytes + 2**20


def test_the_same_bits_again(cupy):
    case = [cupy.asarray(x.astype(np.float16)) for x in tensors(128, 300, 700)]
    first = flash_attention(*case, causal=True)
    for _ in range(5):
        assert bool((flash_attention(*case, causal=True) == first).all())


def test_another_process_finds_the_kernel(cupy, tmp_path, monkeypatch):
    monkeypatch.setenv("CYFLASH_CACHE_DIR", str(tmp_path))
    code = "import cupy, cyflash; x = cupy.ones((64, 64), 'f'); cupy.asnumpy(cyflash.flash_attention(x, x, x))"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True)
        assert len(list(tmp_path.iterdir())) == 1
