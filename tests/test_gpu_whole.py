"""From the public functions to the kernels' source, without a GPU.

Arrays of a fake device, quantisation, the choice of a variant, its Params; and the kernel that was chosen, run by the
machine of gpu_shim/ instead of a model of it.
"""
import sys
from pathlib import Path

import gpu_fake
import gpu_running
import numpy as np
import pytest

import cyflash
from cyflash import flash_attention, flash_attention_int8, reference

B, H, Hk, MANY, Lk, D = 2, 4, 2, 70, 150, 40
AXES = {
    "q": "B H Lq D", "k": "B Hk Lk D", "v": "B Hk Lk D", "out": "B H Lq D", "bias": "B H Lq Lk", "mask": "B H Lq Lk",
    "q_scale": "B H Lq", "k_scale": "B Hk Lk", "v_scale": "B Hk Lk", "slopes": "B H",
}  # fmt: skip
KEYS = {"turned.cu": "B Hk D Keys"}  # of out
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1}


@pytest.fixture(params=["90", "80"])
def gpu(request, monkeypatch):
    """A fake device of this compute capability whose kernels are the real ones."""
    monkeypatch.setattr(gpu_fake, "compute", run)
    gpu = gpu_fake.device(monkeypatch, real_variants=True, capability=request.param)
    gpu.many = ["hopper.cu"] if request.param == "90" else ["mma.cu"]  # what takes many query rows
    return gpu


def run(launch):
    """One launch, with the addresses that the struct's arrays span as all that may be touched."""
    p, variant = launch.params, launch.variant
    sizes = {name: int(p[name]) for name in ("B", "H", "Hk", "Lq", "Lk", "D")}
    sizes["Keys"] = -(-sizes["Lk"] // 16) * 16
    macros = {"QK_TYPE": "F32", "V_TYPE": "F32", "OUT_TYPE": "F32"} | dict(variant.macros)
    kinds = {"q": macros["QK_TYPE"], "k": macros["QK_TYPE"], "v": macros["V_TYPE"], "out": macros["OUT_TYPE"]}
    if launch.source == "turned.cu":
        kinds |= {"v": "I8", "out": "I8"}
    readable = []
    for name, axes in AXES.items():
        axes = KEYS.get(launch.source, axes) if name == "out" else axes
        lengths = [sizes[axis] for axis in axes.split()]
        if p[name] and 0 not in lengths:
            strides = [*map(int, p[f"{name}_stride"]), 1]
            reach = sum(stride * (n - 1) for stride, n in zip(strides, lengths, strict=False))
            size = 1 if name == "mask" else SIZES[kinds.get(name, "F32")]
            assert min(strides) >= 0
            readable += [int(p[name]), int(p[name]) + (reach + 1) * size]
    if p["workspace"]:
        readable += [int(p["workspace"]), int(p["workspace"]) + gpu_fake.room(p["workspace"])]
    if variant.boxes and kinds["v"] == "I8":
        gpu_fake.room(launch.maps[2].address)
    params = gpu_running.Params.from_buffer_copy(p.tobytes())
    gpu_running.launch(variant, launch.grid[0], params, gpu_running.MIXED, 1, readable, (), launch.maps)


def tensors(dtype=np.float32, rows=MANY, keys=Lk, D=D):
    rng = np.random.default_rng(3)
    shapes = (B, H, rows, D), (B, Hk, keys, D), (B, Hk, keys, D)
    return [rng.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes]


def sources(gpu):
    return [one.source for one in gpu.launches]


OPTIONS = {
    "none": {},
    "causal": {"causal": True, "sinks": [0.5, 1.0, -1.0, 3.0]},
    "window": {"window": (60, 3), "softcap": 2.0},
    "top-left": {"causal": True, "causal_align": "top-left", "scale": 0.4},
}


@pytest.mark.parametrize(("dtype", "rows", "name"), [
    *((dtype, MANY, name) for dtype in ("float32", "float16") for name in OPTIONS),
    *(("float16", 3, name) for name in OPTIONS),
    ("bfloat16", MANY, "causal"), ("bfloat16", 16, "window"),
])  # fmt: skip
def test_floats(gpu, name, dtype, rows):
    import ml_dtypes

    q, k, v = tensors(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, rows)
    out, lse = flash_attention(*map(gpu.array, (q, k, v)), return_lse=True, **OPTIONS[name])
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **OPTIONS[name])
    bound = {"float32": 3e-6, "float16": 3e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(out.host.astype(float), expected, rtol=0, atol=bound)
    np.testing.assert_allclose(lse.host, expected_lse, rtol=0, atol=2e-4)
    assert sources(gpu) == (["ffma.cu"] if dtype == "float32" else gpu.many if rows == MANY else FEW)


FEW = ["decode.cu", "merge.cu"]


@pytest.mark.parametrize("rows", [MANY, 3])
@pytest.mark.parametrize("name", ["causal", "window"])
@pytest.mark.parametrize(("dtype", "pv", "how"), [
    ("float32", "int8", {}), ("float32", "int8", {"fp32_sinks": 5}), ("float32", "bf16", {"fp32_sinks": 5}),
    ("float16", "bf16", {}), ("float16", "int8", {"granularity": "head", "smooth_k": False}),
])
def test_int8(gpu, dtype, pv, how, name, rows):
    """Pieces of the keys; smoothed keys, whose mean is put back by `shift`, with softcap before the tanh."""
    q, k, v = tensors(dtype, rows, D=48)
    k += np.asarray(3, dtype)
    given = how | OPTIONS[name]
    out, lse = flash_attention_int8(*map(gpu.array, (q, k, v)), pv=pv, return_lse=True, **given)
    expected, expected_lse = reference.attention_int8(q, k, v, pv=pv, return_lse=True, block_size=64, **given)
    np.testing.assert_allclose(lse.host, expected_lse, rtol=0, atol=5e-4)
    np.testing.assert_allclose(out.host.astype(float), expected, rtol=0, atol=0.03)
    coded = FEW if rows == 3 else ["turned.cu"] * (pv == "int8" and "hopper.cu" in gpu.many) + gpu.many
    assert sources(gpu) == ["ffma.cu"] * ("fp32_sinks" in how) + coded


def test_every_array_option(gpu):
    rng = np.random.default_rng(5)
    for rows in (MANY, 3):
        given = {
            "bias": rng.standard_normal((H, rows, Lk)).astype(np.float32), "mask": rng.random((B, 1, rows, Lk)) < 0.6,
            "alibi_slopes": rng.random((B, H)).astype(np.float32),
        }  # fmt: skip
        for some in ({n: given[n]} for n in given):
            q, k, v = tensors("float16", rows)
            there = {name: gpu.array(x) for name, x in some.items()}
            out, lse = flash_attention(*map(gpu.array, (q, k, v)), return_lse=True, **there)
            expected, expected_lse = reference.attention(q, k, v, return_lse=True, **some)
            np.testing.assert_allclose(out.host.astype(float), expected, rtol=0, atol=3e-3)
            np.testing.assert_allclose(lse.host, expected_lse, rtol=0, atol=2e-4)
    assert sources(gpu) == 3 * gpu.many + 3 * FEW


def test_codes_with_scales_of_tokens(gpu):
    """A cache of codes, with smoothed keys and values on strides of their own."""
    q, k, v = tensors(keys=1100, rows=2, D=64)
    k8, v8 = (cyflash.quantize(x, "token", smooth=x is k) for x in (k, v))
    expected, expected_lse = reference.attention_int8(q, k8, v8, return_lse=True, block_size=64)
    wide = [np.zeros((B, Hk, 1100, 80), np.int8) for _ in range(2)]
    for target, x in zip(wide, (k8, v8), strict=True):
        target[..., :64] = x.data
    there = [
        cyflash.QuantizedTensor(gpu.array(codes)[..., :64], gpu.array(x.scale), gpu.array(x.mean) if x is k8 else None)
        for codes, x in zip(wide, (k8, v8), strict=True)
    ]
    out, lse = flash_attention_int8(gpu.array(q), *there, return_lse=True)
    np.testing.assert_allclose(lse.host, expected_lse, rtol=0, atol=5e-4)
    np.testing.assert_allclose(out.host, expected, rtol=0, atol=0.03)
    assert sources(gpu) == FEW and gpu.launches[0].params["chunks"] == 3


@pytest.mark.parametrize("rows", [MANY, 3])
def test_arrays_as_they_come(gpu, rows):
    """(B, L, H, D) in memory, rows at odd places, an output on strides of its own, no keys."""
    q, k, v = (x.swapaxes(1, 2).copy().swapaxes(1, 2) for x in tensors("float16", rows))
    expected = reference.attention(q, k, v)
    out = gpu.array(np.zeros((B, rows, H, D + 3), np.float16)).transpose(0, 2, 1, 3)[..., 3:]
    odd = np.zeros((*v.shape[:3], D + 1), np.float16)
    odd[..., 1:] = v
    for values, many in ((v, gpu.many), (odd[..., 1:], ["mma.cu"])):
        gpu.launches.clear()
        flash_attention(gpu.array(q), gpu.array(k), gpu.array(values), out=out)
        np.testing.assert_allclose(out.host.astype(float), expected, rtol=0, atol=3e-3)
        assert sources(gpu) == (FEW if rows == 3 else many) and not out.host.base[..., :3].any()
        out.host[...] = np.nan
    gpu.launches.clear()
    out, lse = flash_attention(gpu.array(q), gpu.array(k[:, :, :0]), gpu.array(v[:, :, :0]), return_lse=True)
    assert not out.host.any() and (lse.host == -np.inf).all() and sources(gpu) == (FEW if rows == 3 else ["mma.cu"])


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
    monkeypatch.setattr(gpu_fake, "compute", lambda launch: None)
    monkeypatch.setenv("CYFLASH_CACHE_DIR", str(tmp_path))
    flash_attention(*map(fake.array, tensors("float16")))
    flash_attention(*map(fake.array, tensors("float16", 1)))
    assert [one.variant.kernel for one in fake.launches] == ["cyflash_hopper", "cyflash_decode", "cyflash_merge"]
    assert sorted(fake.loaded) == sorted(map(str, tmp_path.iterdir()))
    for path, one in zip(fake.loaded, fake.launches, strict=True):
        cubin = Path(path).read_bytes()
        assert cubin[:4] == b"\x7fELF" and one.variant.kernel.encode() in cubin and one.variant.arch == "sm_90a"
