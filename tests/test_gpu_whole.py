"""From the public functions to the kernels' source, without a GPU.

Arrays of a fake device, quantisation, the choice of a variant, its Params; and the kernel that was chosen, run by the
machine of gpu_shim/ instead of a model of it.
"""
import ctypes
import sys

import gpu_fake
import gpu_running
import numpy as np
import pytest

from cyflash import flash_attention, flash_attention_int8, reference

B, H, Hk, Lq, Lk, D = 1, 2, 1, 70, 90, 40


@pytest.fixture
def gpu(monkeypatch):
    """A fake device whose kernels are the real ones."""
    monkeypatch.setattr(gpu_fake, "compute", run)
    return gpu_fake.device(monkeypatch, real_variants=True)


def run(params, variant):
    """One launch, with the addresses that the struct's arrays span as all that may be touched."""
    sizes = {name: int(params[name]) for name in ("B", "H", "Hk", "Lq", "Lk", "D")}
    macros = dict(variant.macros)
    ranges = []
    for name, shape in {
        "q": "B H Lq D", "k": "B Hk Lk D", "v": "B Hk Lk D", "out": "B H Lq D", "bias": "B H Lq Lk",
        "mask": "B H Lq Lk", "q_scale": "B H Lq", "k_scale": "B Hk Lk", "v_scale": "B Hk Lk", "slopes": "B H",
    }.items():  # fmt: skip
        if params[name]:
            strides = [int(stride) for stride in params[f"{name}_stride"]]
            reach = sum(s * (sizes[axis] - 1) for s, axis in zip(strides, shape.split(), strict=False))
            reach += sizes["D"] - 1 if shape.endswith(" D") else 0
            kind = {"q": "QK_TYPE", "k": "QK_TYPE", "v": "V_TYPE", "out": "OUT_TYPE"}.get(name)
            size = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1}[macros.get(kind, "F32")] if name != "mask" else 1
            ranges += [int(params[name]), int(params[name]) + (reach + 1) * size]
    loaded = gpu_running.library(variant.source, variant.macros, ())
    copy = np.array([params])
    error = loaded.run(
        copy.ctypes.data_as(ctypes.c_void_p), variant.blocks(sizes["B"], sizes["H"], sizes["Lq"]), variant.threads,
        variant.shared_bytes, 1, 1, (ctypes.c_void_p * len(ranges))(*ranges), len(ranges) // 2,
    )
    assert not error, error.decode()


def tensors(dtype=np.float32):
    rng = np.random.default_rng(3)
    shapes = (B, H, Lq, D), (B, Hk, Lk, D), (B, Hk, Lk, D)
    return [rng.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("float16", 2e-3)])
def test_floats(gpu, dtype, bound):
    q, k, v = tensors(dtype)
    options = {"causal": True, "sinks": [0.5, 1.0]}
    out, lse = flash_attention(*map(gpu.array, (q, k, v)), return_lse=True, **options)
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **options)
    np.testing.assert_allclose(out.host.astype(float), expected, rtol=0, atol=bound)
    np.testing.assert_allclose(lse.host, expected_lse, rtol=0, atol=2e-4)


def test_a_call_compiles_its_kernel(monkeypatch, tmp_path):
    """From arrays to the file that is loaded: the compiler, too, is the real one."""
    from cupy.cuda import nvrtc

    from cyflash.gpu import cubins

    nvrtc.getVersion()  # finds its library, with the help of the real CuPy
    path_of = cubins.path_of
    fake = gpu_fake.device(monkeypatch, real_variants=True)

    def kept(variant):
        path = path_of(variant)
        fake.variants[str(path)] = variant
        return path

    monkeypatch.setattr(cubins, "path_of", kept)
    monkeypatch.setattr(sys.modules["cupy"].cuda, "nvrtc", nvrtc)
    monkeypatch.setattr(gpu_fake, "compute", lambda params, variant: None)
    monkeypatch.setenv("CYFLASH_CACHE_DIR", str(tmp_path))
    flash_attention(*map(fake.array, tensors("float16")))
    (path,) = tmp_path.iterdir()
    assert fake.loaded == [str(path)] and path.read_bytes()[:4] == b"\x7fELF"
    assert fake.launches[0].variant.arch == "sm_90a"


@pytest.mark.parametrize(("pv", "how"), [("int8", {}), ("int8", {"softcap": 2.0}), ("bf16", {"fp32_sinks": 5})])
def test_int8(gpu, pv, how):
    """Smoothed keys, whose mean is put back by `shift`; with softcap before the tanh."""
    q, k, v = tensors()
    k += 3
    out, lse = flash_attention_int8(*map(gpu.array, (q, k, v)), pv=pv, return_lse=True, **how)
    expected, expected_lse = reference.attention_int8(q, k, v, pv=pv, return_lse=True, block_size=64, **how)
    np.testing.assert_allclose(lse.host, expected_lse, rtol=0, atol=2e-4)
    np.testing.assert_allclose(out.host, expected, rtol=0, atol=0.02)
