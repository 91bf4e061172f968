"""The public functions on a real GPU against the specification: `pytest -m gpu`.

Skipped, with the reason, where there is none. Arrays are CuPy's, and torch's where it is installed with CUDA.
"""
import functools
import os
import subprocess
import sys
from pathlib import Path

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
    torch.cuda.synchronize()
    for function, bound in ((flash_attention, TOLERANCES[dtype]), (flash_attention_int8, 0.03)):
        with torch.cuda.stream(torch.cuda.Stream()):
            out, lse = function(q, k, v, causal=True, return_lse=True)
        torch.cuda.synchronize()
        assert out.dtype == q.dtype and out.is_cuda and lse.dtype == torch.float32
        expected = reference.attention(*(x.double().cpu().numpy() for x in (q, k, v)), causal=True)
        close(out.double().cpu().numpy(), expected, bound)


def test_a_stream_of_torch_is_in_order(cupy):
    """Operands that the stream is still making when the call is queued on it; and what it does with the result."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch is installed without CUDA")
    given = [torch.from_numpy(x).to("cuda", torch.float16) for x in tensors(64, 128, 512)]
    expected = flash_attention(*given)
    late, large = [torch.zeros_like(x) for x in given], torch.ones(6000, 6000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(20):
            large = large @ large * 1e-4
        for to, source in zip(late, given, strict=True):
            to.copy_(source)
        doubled = flash_attention(*late) * 2
        for x in late:
            x.fill_(float("nan"))
    torch.cuda.synchronize()
    assert torch.equal(doubled, expected * 2)


CALLS = {  # name: (dtype, Lq, Lk, function)
    "float32": ("float32", 128, 512, flash_attention),
    "float16": ("float16", 130, 700, flash_attention),
    "bfloat16": ("bfloat16", 130, 700, flash_attention),
    "few rows": ("float16", 2, 3000, flash_attention),
    "int8": ("float16", 130, 700, flash_attention_int8),
    "int8, few rows": ("float16", 2, 3000, flash_attention_int8),
    "int8, pv in 16 bits": ("float16", 130, 700, functools.partial(flash_attention_int8, pv="bf16")),
    "int8 with sinks in float32": ("float32", 130, 700, functools.partial(flash_attention_int8, fp32_sinks=4)),
}


@pytest.fixture(params=CALLS)
def call(request, cupy):
    """A function of a number, which chooses inputs."""
    dtype, Lq, Lk, function = CALLS[request.param]

    def arguments(n):
        return [cupy.asarray(x.astype(dtype_of(dtype))) for x in tensors(64, Lq + (n if Lq > 16 else 0), Lk + n)]

    return functools.partial(function, causal=True), arguments


def test_streams_do_not_wait_for_each_other(cupy, call):
    """Each stream gets what its own calls compute, however they overlap."""
    function, arguments = call
    cases = [arguments(n) for n in range(8)]
    expected = [cupy.asnumpy(function(*case)) for case in cases]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in cases]
    cupy.cuda.Device().synchronize()
    outputs = []
    for _ in range(20):
        for stream, case in zip(streams, cases, strict=True):
            with stream:
                outputs.append(function(*case))
    cupy.cuda.Device().synchronize()
    for i, out in enumerate(outputs):
        np.testing.assert_array_equal(cupy.asnumpy(out), expected[i % len(cases)])


def test_the_same_bits_again(cupy, call):
    function, arguments = call
    case = arguments(0)
    first = cupy.asnumpy(function(*case))
    for _ in range(5):
        np.testing.assert_array_equal(cupy.asnumpy(function(*case)), first)


def allocated(cupy, call):
    """(bytes that a call takes from the device while it runs, its result)."""
    call()  # compiled, loaded
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    out = call()
    return pool.total_bytes() - before, out


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_is_the_output(cupy, dtype):
    """Nothing of the size of the scores, or of the inputs, is allocated."""
    q, k, v = (cupy.zeros((1, 8, 8192, 64), dtype) for _ in range(3))
    found, out = allocated(cupy, lambda: flash_attention(q, k, v))
    assert found <= out.nbytes + 2**20


@pytest.mark.parametrize("codes", [False, True])
def test_memory_of_few_rows(cupy, codes):
    """The output, and what chunks of keys leave."""
    from cyflash.gpu.decode import choose_decode
    from cyflash.gpu.launch import architecture

    B, heads, kv, Lk, D = 4, 32, 8, 16384, 128
    q, k, v = (cupy.zeros((B, h, L, D), np.float16) for h, L in ((heads, 1), (kv, Lk), (kv, Lk)))
    function, kind = flash_attention, "float16"
    if codes:
        function, kind = flash_attention_int8, "int8"
        q, k, v = (cyflash.quantize(x, "token") for x in (q, k, v))
    found, out = allocated(cupy, lambda: function(q, k, v))
    chosen = choose_decode(architecture(0), B, heads, kv, 1, Lk, D, kind, out="float32" if codes else None)
    # scales that are spread to tokens are views
    assert found <= out.nbytes + 4 * chosen.workspace_floats + 2**20


def test_memory_of_codes(cupy):
    """The output; and where codes of values are transposed, those."""
    q, k, v = (cyflash.quantize(cupy.zeros((1, 8, 8192, 128), np.float16), "token") for _ in range(3))
    found, out = allocated(cupy, lambda: flash_attention_int8(q, k, v))
    assert found <= out.nbytes + v.data.nbytes + 2**20


FIND = "import cupy, cyflash; x = cupy.asarray([[1.0] * 64] * 64, 'f'); cupy.asnumpy(cyflash.flash_attention(x, x, x))"
NO_COMPILER = "import cyflash.gpu.build as builder; builder.build = None; "


def test_another_process_finds_the_kernel(cupy, tmp_path, monkeypatch):
    """Compiled once; the second process compiles nothing."""
    monkeypatch.setenv("CYFLASH_CACHE_DIR", str(tmp_path))
    root = Path(cyflash.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])))
    for code in (FIND, NO_COMPILER + FIND):
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(list(tmp_path.iterdir())) == 1
