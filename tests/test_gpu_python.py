"""The GPU path without a GPU: what is checked, what is launched, what is compiled and kept."""
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import gpu_fake
import numpy as np
import pytest

import cyflash
from cyflash import FlashAttentionConfig, GPUUnavailableError, flash_attention, flash_attention_int8, reference
from cyflash.gpu import arrays, build, cubins, kernels, launch, params, status, tensor_maps, variants
from cyflash.plan import UNBOUNDED, make_plan
from cyflash.quant import LayerScales, watch

B, H, Hk, Lq, Lk, D = 2, 4, 2, 10, 13, 8
MANY = 20  # query rows that are not few
F32 = np.float32
RNG = np.random.default_rng(0)
BIAS = RNG.standard_normal((H, MANY, Lk)).astype(F32)
BIAS[1, 2, 3] = -np.inf
MASK = RNG.random((B, 1, MANY, Lk)) < 0.7
MASK[0, :, 4] = False
SLOPES, SINKS = np.linspace(0.1, 0.5, H, dtype=F32), np.linspace(-1, 2, H, dtype=F32)

OPTIONS = {
    "none": {},
    "causal": {"causal": True},
    "causal top-left": {"causal": True, "causal_align": "top-left"},
    "window": {"window": (3, 1)},
    "window of one side": {"window": (-1, 0), "causal_align": "top-left"},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 0.7},
    "bias": {"bias": BIAS},
    "bias of keys": {"bias": BIAS[0, 0]},
    "bias transposed": {"bias": np.asfortranarray(BIAS)},
    "mask": {"mask": MASK},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi of sequences": {"alibi_slopes": np.stack([SLOPES, 2 * SLOPES])},
    "sinks": {"sinks": SINKS},
    "strided sinks": {"sinks": np.repeat(SINKS, 2)[::2]},
    "all": {
        "causal": True, "window": (6, -1), "scale": 0.4, "softcap": 2.0, "bias": BIAS, "mask": MASK,
        "alibi_slopes": SLOPES, "sinks": SINKS,
    },
}  # fmt: skip


def options(name, rows=Lq):
    """One of OPTIONS for so many query rows."""
    return {key: x[..., :rows, :] if np.shape(x)[-2:-1] == (MANY,) else x for key, x in OPTIONS[name].items()}


@pytest.fixture
def gpu(monkeypatch):
    return gpu_fake.device(monkeypatch)


def dtype_of(name):
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


def tensors(dtype=F32, Lk=Lk, seed=0, Lq=Lq, D=D):
    rng = np.random.default_rng(seed)
    shapes = (B, H, Lq, D), (B, Hk, Lk, D), (B, Hk, Lk, D)
    return [rng.standard_normal(shape, dtype=F32).astype(dtype) for shape in shapes]


def there(gpu, options):
    """Options with their arrays on the GPU."""
    return {name: gpu.array(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


# --- The whole call, computed from what was launched ------------------------------------------------------------------


MACHINES = [("90", MANY), ("90", Lq), ("80", MANY), ("80", Lq)]  # compute capability, query rows


def kernels_of(capability, rows, kind, pv, name):
    """Which sources compute a piece."""
    if kind == "float32":
        return ["ffma.cu"]
    if rows == Lq:
        return ["decode.cu", "merge.cu"]
    if capability == "80" or name == "all" or (pv == "int8" and name.startswith(("bias", "mask"))):
        return ["mma.cu"]
    return ["turned.cu", "hopper.cu"] if pv == "int8" else ["hopper.cu"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("capability", "rows"), MACHINES)
def test_options_reach_the_kernel(monkeypatch, capability, rows, name, dtype):
    gpu = gpu_fake.device(monkeypatch, capability=capability)
    q, k, v = tensors(dtype_of(dtype), Lq=rows)
    given = options(name, rows)
    out, lse = flash_attention(*map(gpu.array, (q, k, v)), return_lse=True, **there(gpu, given))
    expected, expected_lse = reference.attention(q, k, v, return_lse=True, **given)
    assert type(out) is gpu_fake.FakeArray and out.dtype == q.dtype and lse.dtype == F32
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(out.host.astype(float), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse.host, expected_lse, rtol=0, atol=1e-5)
    assert [one.source for one in gpu.launches] == kernels_of(capability, rows, dtype, dtype, name)
    assert gpu.launches[0].kinds.startswith("_".join([dtype] * 2))
    assert {one.variant.arch for one in gpu.launches} == {{"80": "sm_80", "90": "sm_90a"}[capability]}


@pytest.mark.parametrize("pv", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("how", [
    {}, {"fp32_sinks": 3}, {"granularity": ("tensor", "head", "token"), "smooth_k": False}, {"fp32_sinks": Lk},
    {"q_scale": 0.03, "k_scale": np.full((Hk, 1, 1), 0.04, F32), "v_scale": 0.03, "smooth_k": True},
])
@pytest.mark.parametrize(("capability", "rows"), MACHINES[:3])
def test_options_of_int8_reach_the_kernel(monkeypatch, capability, rows, name, how, pv):
    """The weights' roundings are the kernel's, so the output is compared more coarsely than the LSE."""
    gpu = gpu_fake.device(monkeypatch, capability=capability)
    q, k, v = tensors(Lq=rows, D=16)
    given = options(name, rows)
    out, lse = flash_attention_int8(
        *map(gpu.array, (q, k, v)), pv=pv, return_lse=True, **there(gpu, how), **there(gpu, given)
    )
    expected, expected_lse = reference.attention_int8(q, k, v, pv=pv, return_lse=True, **how, **given)
    np.testing.assert_allclose(lse.host, expected_lse, rtol=0, atol=1e-5)
    np.testing.assert_allclose(out.host, expected, rtol=0, atol={"int8": 0.02, "bf16": 0.02, "fp32": 1e-5}[pv])
    sinks = how.get("fp32_sinks", 0)
    coded = kernels_of(capability, rows, "float32" if pv == "fp32" else "int8", pv, name)
    assert [one.source for one in gpu.launches] == ["ffma.cu"] * (sinks > 0) + coded * (sinks < Lk)


@pytest.mark.parametrize("rows", [Lq, MANY])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_int8_of_16_bits(gpu, dtype, rows):
    q, k, v = tensors(dtype_of(dtype), Lq=rows, D=16)
    for pv, second in (("int8", "int8"), ("bf16", dtype)):
        gpu.launches.clear()
        out = flash_attention_int8(*map(gpu.array, (q, k, v)), pv=pv)
        assert out.dtype == q.dtype
        expected = f"int8_{second}" if rows == Lq else f"int8_{second}_{dtype}"
        assert expected in {one.kinds for one in gpu.launches}
        np.testing.assert_allclose(out.host.astype(float), reference.attention_int8(q, k, v, pv=pv), rtol=0, atol=0.03)


# --- Which kernels ----------------------------------------------------------------------------------------------------


def run_of(gpu, *arrays, function=flash_attention, **more):
    """The sources that a call launches, and what it says that it ran; the result is right."""
    from cyflash.attention import attend, attend_int8

    gpu.launches.clear()
    hosts = [x.host.copy() for x in arrays]
    out, _, work = (attend if function is flash_attention else attend_int8)(*arrays, **more)
    expected = (reference.attention if function is flash_attention else reference.attention_int8)(*hosts, **more)
    np.testing.assert_allclose(out.host.astype(float), expected, rtol=0, atol=0.03)
    return [one.source for one in gpu.launches], work.implementation


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_chunks_of_keys(gpu, dtype):
    """What the first of two kernels leaves is where the second one looks for it, and theirs alone."""
    q, k, v = tensors(Lk=2500)
    given = {"causal": True, "window": (1700, -1), "sinks": SINKS, "return_lse": True}
    if dtype == "int8":
        out, lse = flash_attention_int8(*map(gpu.array, (q, k, v)), **there(gpu, given))
        expected, expected_lse = reference.attention_int8(q, k, v, **given)
    else:
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        out, lse = flash_attention(*map(gpu.array, (q, k, v)), **there(gpu, given))
        expected, expected_lse = reference.attention(q, k, v, **given)
    np.testing.assert_allclose(out.host.astype(float), expected, rtol=0, atol=0.01)
    np.testing.assert_allclose(lse.host, expected_lse, rtol=0, atol=2e-5)
    split, merge = gpu.launches
    assert split.params.tobytes() == merge.params.tobytes()
    assert (split.params["chunk"], split.params["chunks"]) == (1024, 3)
    assert (split.grid, merge.grid) == ((B * Hk * 3 * 2,), (B * H * Lq,))  # 20 rows of a group are two tiles


def test_what_a_tensor_map_cannot_describe(monkeypatch):
    """It takes mma.cu, on compute capability 9.0 too, and the call says so."""
    gpu = gpu_fake.device(monkeypatch, real_variants=True)
    mma = ["mma.cu"], "cyflash_mma sm_90a"
    q, k, v = map(gpu.array, tensors("float16", Lq=MANY, D=16))
    assert run_of(gpu, q, k, v) == (["hopper.cu"], "cyflash_hopper sm_90a")
    broadcast = gpu.array(np.broadcast_to(k.host[:, :1], k.shape))
    backward = gpu.array(k.host[:, :, ::-1])
    shifted = gpu.array(np.zeros((B, Hk, Lk, 24), np.float16)[..., 1:17])
    overlapping = gpu.array(np.lib.stride_tricks.as_strided(v.host, v.shape, (*v.strides[:2], 16, 2)))
    for other in (broadcast, backward, shifted, overlapping):
        for given in ((q, other, v), (q, k, other)):
            assert run_of(gpu, *given) == mma
    q, none = gpu.array(q.host[:1, :1]), gpu.array(k.host[:1, :1, :0])
    assert tensor_maps.can_map(none.host) and run_of(gpu, q, none, none) == mma


def test_rows_of_one_key_lie_anywhere(monkeypatch):
    """Strides of an axis with one element are nobody's business."""
    gpu = gpu_fake.device(monkeypatch, real_variants=True)
    q, k, v = (gpu.array(x[:1, :1]) for x in tensors("float16", Lq=MANY))
    k, v = (gpu.array(np.lib.stride_tricks.as_strided(x.host, (1, 1, 1, D), (6, -2, 2, 2))) for x in (k, v))
    assert run_of(gpu, q, k, v)[0] == ["hopper.cu"]


def test_transposed_values_come_from_anywhere(monkeypatch):
    """Tensor maps are of the transposed v, so v itself needs none."""
    gpu = gpu_fake.device(monkeypatch, real_variants=True)
    q, k, v = (gpu.array(RNG.integers(-127, 128, x.shape, np.int8)) for x in tensors(Lq=MANY, Lk=200, D=16))
    scales = {"q_scale": 0.02, "k_scale": 0.03, "v_scale": 0.01, "function": flash_attention_int8}
    wide = np.zeros((B, Hk, 200, 21), np.int8)
    wide[..., 3:19] = v.host
    for values in (v, gpu.array(wide[..., 3:19]), gpu.array(np.broadcast_to(v.host[:, :1], v.shape))):
        assert run_of(gpu, q, k, values, **scales) == (["turned.cu", "hopper.cu"], "cyflash_hopper sm_90a")
    assert run_of(gpu, q, gpu.array(wide[..., 3:19]), v, **scales)[0] == ["mma.cu"]


def test_a_call_says_all_that_ran(monkeypatch):
    gpu = gpu_fake.device(monkeypatch, real_variants=True)
    ran = run_of(gpu, *map(gpu.array, tensors(D=16)), function=flash_attention_int8, fp32_sinks=2)
    assert ran == (["ffma.cu", "decode.cu", "merge.cu"], "cyflash_ffma sm_90a, cyflash_decode sm_90a")


def test_maps_are_encoded_once(gpu, monkeypatch):
    calls = []
    monkeypatch.setattr(tensor_maps, "_encoder", lambda: encoder)

    def encoder(*arguments):
        calls.append(arguments)
        return gpu_fake.encode(*arguments)

    q, k, v = map(gpu.array, tensors("float16", Lq=MANY))
    for _ in range(3):
        flash_attention(q, k, v)
    assert len(calls) == 3 and len(gpu.launches) == 3
    flash_attention(q, k, gpu.array(v.host.copy()))
    assert len(calls) == 6


def test_a_driver_without_tensor_maps(gpu, monkeypatch):
    q, k, v = map(gpu.array, tensors("float16", Lq=MANY))
    monkeypatch.setattr(tensor_maps, "_encoder", lambda: lambda *arguments: 1)
    with pytest.raises(RuntimeError, match=r"cuTensorMapEncodeTiled returned error 1 for Box\(address=.*shape=\(8, 20"):
        flash_attention(q, k, v)
    monkeypatch.undo()
    tensor_maps._encoder.cache_clear()
    for driver in (SimpleNamespace(), None):
        def of_machine(driver=driver):
            if driver is None:
                raise OSError("libcuda.so.1: cannot open shared object file")
            return driver

        monkeypatch.setattr(tensor_maps, "_driver", of_machine)
        with pytest.raises(GPUUnavailableError, match=r"driver has no cuTensorMapEncodeTiled.*a driver of CUDA 12"):
            tensor_maps.encoded([])


# --- More of whole calls ----------------------------------------------------------------------------------------------


def test_codes_with_scales_are_not_copied(gpu):
    q, k, v = (gpu.array(RNG.integers(-127, 128, x.shape, np.int8)) for x in tensors())
    scales = {
        "q_scale": RNG.random((B, H, Lq, 1), F32) / 9, "k_scale": RNG.random((Hk, 1, 1), F32) / 9, "v_scale": 0.02,
    }
    out = flash_attention_int8(q, k, v, **there(gpu, scales))
    assert out.dtype == F32
    expected = reference.attention_int8(q.host, k.host, v.host, **scales)
    np.testing.assert_allclose(out.host, expected, rtol=0, atol=0.03)
    one, _ = gpu.launches
    assert [one.params[name] for name in "qkv"] == [x.data.ptr for x in (q, k, v)]
    assert one.params["q_scale_stride"].tolist() == [H * Lq, Lq, 1]
    assert one.params["k_scale_stride"].tolist() == [0, 1, 0] and one.params["v_scale_stride"].tolist() == [0, 0, 0]
    assert one.params["shift"] == 0


def test_nothing_finite_comes_of_nan(gpu):
    q, k, v = tensors()
    k[0, 1, 3, 2] = np.nan
    q[1, 2, 5, 0] = np.inf
    out = flash_attention_int8(*map(gpu.array, (q, k, v)), smooth_k=False).host
    assert np.isnan(out[0, 2:]).all() and np.isnan(out[1, 2, 5]).all()
    assert np.isfinite(out[0, :2]).all() and np.isfinite(np.delete(out[1, 2], 5, axis=0)).all()


def test_unlike_kinds_are_computed_in_float32(gpu):
    q, k, v = tensors()
    k, v = k.astype(np.float16), v.astype(dtype_of("bfloat16"))
    out = flash_attention(*map(gpu.array, (q.astype(np.float16), k, v)))
    assert out.dtype == np.float16 and gpu.launches[0].kinds == "float32_float32_float32"
    np.testing.assert_allclose(out.host, reference.attention(q.astype(np.float16), k, v), rtol=0, atol=2e-3)


@pytest.mark.parametrize("lead", [(), (H,)])
def test_fewer_axes(gpu, lead):
    q, k, v = (x[0] if lead else x[0, 0] for x in tensors())
    out, lse = flash_attention(*map(gpu.array, (q, k, v)), return_lse=True, causal=True)
    assert out.shape == q.shape and lse.shape == q.shape[:-1]
    np.testing.assert_allclose(out.host, reference.attention(q, k, v, causal=True), rtol=0, atol=1e-6)


def test_strides_are_used_in_place(gpu):
    """(B, L, H, D) in memory, one array for q, k and v, and an output with strides of its own."""
    packed = gpu.array(RNG.standard_normal((B, Lq, 4, H, D)).astype(F32))
    q, k, v, out = (packed[:, :, i].transpose(0, 2, 1, 3) for i in range(4))
    copies = [x.host.copy() for x in (q, k, v)]
    assert flash_attention(q, k, v, out=out) is out
    np.testing.assert_allclose(out.host, reference.attention(*copies), rtol=0, atol=1e-6)
    assert gpu.launches[0].params["q_stride"].tolist() == [Lq * 4 * H * D, D, 4 * H * D]
    assert dict(gpu.launches[0].variant.macros)["ALIGNED"] == 1
    odd = gpu.array(RNG.standard_normal((B, H, Lq, D + 1)).astype(F32))[..., 1:]
    flash_attention(odd, odd, odd)
    assert dict(gpu.launches[1].variant.macros)["ALIGNED"] == 0


def test_empty(gpu):
    q, k, v = tensors(Lk=0)
    out, lse = flash_attention(*map(gpu.array, (q, k, v)), sinks=[1.0, 2.0, 3.0, 4.0], return_lse=True)
    assert not out.host.any() and (lse.host == F32([1, 2, 3, 4])[:, None]).all()
    out, lse = flash_attention_int8(*map(gpu.array, (q, k, v)), return_lse=True)
    assert not out.host.any() and (lse.host == -np.inf).all()
    launches = len(gpu.launches)
    out = flash_attention(*(gpu.array(x[:, :, :0]) for x in tensors()))
    assert out.shape == (B, H, 0, D) and len(gpu.launches) == launches


def test_config_and_engine(gpu):
    q, k, v = tensors()
    config = FlashAttentionConfig(D, H, causal=True, scale=0.2)
    expected = reference.attention(q, k, v, causal=True, scale=0.2)
    out = flash_attention(*map(gpu.array, (q, k, v)), config=config)
    np.testing.assert_allclose(out.host, expected, rtol=0, atol=1e-6)
    result = cyflash.FlashAttention(config).forward_multi_head(*map(gpu.array, (q, k, v)))
    np.testing.assert_allclose(result.output.host, expected, rtol=0, atol=1e-6)
    assert result.implementation == "float32_float32_float32 sm_90a" and result.block_size_q == 64


def test_layer_scales(gpu):
    q, k, v = tensors()
    layer = LayerScales(0.03, np.full((Hk, 1, 1), 0.04), 0.03, k_mean=np.full((Hk, 1, D), 0.1), fp32_sinks=2)
    out = flash_attention_int8(*map(gpu.array, (q, k, v)), quant=layer)
    np.testing.assert_allclose(out.host, reference.attention_int8(q, k, v, quant=layer), rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["none", "all"])
def test_planned_layers(gpu, name, dtype):
    """Against the CPU path, which computes part by part too; runs of heads that lie beside each other are calls."""
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((B, h, L, D)).astype(dtype_of(dtype)) for h, L in ((8, Lq), (4, Lk), (4, Lk)))
    planned = LayerScales(parts=[
        ([0, 2, 3], LayerScales(None, np.full((3, 1, 1), 0.04), None, fp32_sinks=2)), ([1], None),
    ])  # fmt: skip
    options = {} if name == "none" else {
        "causal": True, "bias": np.resize(BIAS, (1, 8, Lq, Lk)), "mask": MASK[:, :, :Lq],
        "sinks": np.linspace(0, 1, 8, dtype=F32), "alibi_slopes": np.linspace(0.1, 0.5, 8, dtype=F32),
    }  # fmt: skip
    out, lse = flash_attention_int8(
        *map(gpu.array, (q, k, v)), quant=planned, return_lse=True, **there(gpu, options)
    )
    expected, expected_lse = flash_attention_int8(q, k, v, quant=planned, return_lse=True, **options)
    np.testing.assert_allclose(lse.host, expected_lse, rtol=0, atol=1e-3)
    np.testing.assert_allclose(out.host.astype(float), expected.astype(float), rtol=0, atol=0.03)
    few = ["decode.cu", "merge.cu"]
    exact = ["ffma.cu"] if dtype == "float32" else few
    assert out.dtype == q.dtype
    assert [one.source for one in gpu.launches] == 2 * ["ffma.cu", *few] + exact
    with pytest.raises(ValueError, match="pv: expected None beside a planned layer"):
        flash_attention_int8(*map(gpu.array, (q, k, v)), quant=planned, pv="int8")
    with pytest.raises(ValueError, match=r"quant\.parts: expected the 2 kv heads"):
        flash_attention_int8(*map(gpu.array, tensors()), quant=planned)


def test_watching(gpu):
    """What saturates is counted as on the CPU, also where a part is run in pieces."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((B, 4, L, D)).astype(F32) for L in (Lq, Lk, Lk))
    part = LayerScales(0.01, np.float32([0.01, 0.005, 0.02])[:, None, None], 0.01)
    for layer in (LayerScales(0.005, 0.006, 0.007), LayerScales(parts=[([0, 1, 3], part), ([2], None)])):
        found = []
        for arguments in ((q, k, v), map(gpu.array, (q, k, v))):
            with watch({"layer": layer}) as watching:
                flash_attention_int8(*arguments, quant=layer)
            found.append(watching.counts)
        assert found[0] == found[1] and found[0]["layer"]["k"][0] > 0


# --- Quantised arrays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "head", "token"])
@pytest.mark.parametrize("options", [{}, {"smooth": True, "fp32_sinks": 2}, {"smooth": True}, {"scale": 0.02}])
def test_quantize_on_the_gpu(gpu, granularity, options):
    """The same codes and scales as on the CPU."""
    if "scale" in options and granularity != "tensor":
        options = {"scale": RNG.random((Hk, 1 if granularity == "head" else Lk, 1), F32)}
    x = tensors()[1][0]
    found = cyflash.quantize(gpu.array(x), granularity, **there(gpu, options))
    expected = cyflash.quantize(x, granularity, **options)
    assert found.granularity == expected.granularity and found.nbytes == expected.nbytes
    assert abs(found.data.host.astype(int) - expected.data).max() <= (1 if "smooth" in options else 0)
    for name in ("scale", "mean", "fp32_rows"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            ours = getattr(ours, "host", ours)
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-7)
    step = np.max(expected.scale) * ("smooth" in options) + 1e-6
    np.testing.assert_allclose(found.dequantize().host, expected.dequantize(), rtol=0, atol=step)


def test_quantised_tensors(gpu, tmp_path):
    q, k, v = tensors()
    made = {n: {"granularity": "token", "smooth": n == "k", "fp32_sinks": 2} for n in "kv"}
    k8, v8 = (cyflash.quantize(gpu.array(x), **made[n]) for n, x in (("k", k), ("v", v)))
    k8_there, v8_there = (cyflash.quantize(x, **made[n]) for n, x in (("k", k), ("v", v)))
    for pv, bound in (("int8", 0.02), ("bf16", 0.02), ("fp32", 1e-5)):
        out = flash_attention_int8(gpu.array(q), k8, v8, pv=pv)
        expected = reference.attention_int8(q, k8_there, v8_there, pv=pv)
        np.testing.assert_allclose(out.host, expected, rtol=0, atol=bound)
    path = k8.save(tmp_path / "k.safetensors")
    assert (type(k8).load(path).data == k8.data.host).all()
    with pytest.raises(TypeError, match="k: expected an array on the GPU as q is, got QuantizedTensor"):
        flash_attention_int8(gpu.array(q), k8_there, v8)


def test_quant_beside_a_quantised_tensor(gpu):
    q, k, v = map(gpu.array, tensors())
    k8 = cyflash.quantize(k, scale=gpu.array(np.full((Hk, 1, 1), 0.04, F32)))
    flash_attention_int8(q, k8, v, quant=LayerScales(None, np.full((Hk, 1, 1), 0.04)))
    with pytest.raises(ValueError, match="quant: expected the scale that k was quantised with"):
        flash_attention_int8(q, k8, v, quant=LayerScales(None, 0.05))


def test_bad_quantised_arrays(gpu):
    codes, good = gpu.array(np.zeros((Hk, Lk, D), np.int8)), gpu.array(np.ones((Hk, Lk, 1), F32))
    tensor = cyflash.QuantizedTensor(codes, good)
    assert tensor.granularity == "token" and tensor.shape == (Hk, Lk, D)
    for kind, words, arguments in (
        (TypeError, "data: expected int8, got float32", (good, 1.0)),
        (TypeError, "mean: expected float32, got int8", (codes, 1.0, codes)),
        (ValueError, "mean: expected shape", (codes, 1.0, good)),
        (ValueError, "scale: expected a number", (codes, gpu.array(np.ones((Hk, 3, 1), F32)))),
        (TypeError, "mean: expected an array on a GPU", (codes, 1.0, np.zeros((Hk, 1, D), F32))),
    ):
        with pytest.raises(kind, match=words):
            cyflash.QuantizedTensor(*arguments)
    with pytest.raises(ValueError, match="x: expected finite values"):
        cyflash.quantize(gpu.array(np.full((Lk, D), np.nan, F32)))


# --- Launches ---------------------------------------------------------------------------------------------------------


def test_what_is_launched(gpu):
    q, k, v = map(gpu.array, tensors())
    flash_attention(q, k, v, window=(5, -1))
    (one,) = gpu.launches
    assert (one.grid, one.block, one.shared) == ((B * H,), (128,), one.variant.shared_bytes)
    sizes = {name: int(one.params[name]) for name in ("B", "H", "Hk", "Lq", "Lk", "D", "offset", "left", "right")}
    assert sizes == {
        "B": B, "H": H, "Hk": Hk, "Lq": Lq, "Lk": Lk, "D": D, "offset": Lk - Lq, "left": 5, "right": 1 << 62,
    }  # fmt: skip
    assert one.params["lse"] == one.params["bias"] == one.params["sinks"] == 0
    assert one.params["scale"] == F32(1 / math.sqrt(D))


def test_a_variant_is_loaded_once(gpu):
    q, k, v = map(gpu.array, tensors())
    flash_attention(q, k, v)
    flash_attention(q, k, v, scale=0.5)
    assert len(gpu.loaded) == 1
    flash_attention(q, k, v, causal=True)
    assert len(gpu.loaded) == 2 and len(gpu.launches) == 3


def test_each_device_loads_its_own(gpu):
    for number in (0, 1):
        flash_attention(*(gpu.array(x, number) for x in tensors()))
    assert len(gpu.loaded) == 2


def test_a_grid_has_limits():
    plan = SimpleNamespace(B=2**20, H=2**10, Lq=64, Lk=7)
    assert launch.grid(variant(rows=64), plan) == (2**30,)
    plan.Lq = 65
    words = r"q: expected a call that takes at most 2147483647 blocks.*got 2147483648 of doubled for B=1048576.*split"
    with pytest.raises(ValueError, match=words):
        launch.grid(variant(rows=64), plan)


@pytest.mark.parametrize(("kind", "source", "shape"), [
    ("float16", "hopper.cu", (2**20, 2**12, 2**12, MANY, 20)),
    ("float32", "ffma.cu", (2**20, 2**12, 2**12, 1, 20)),
    ("float16", "decode.cu", (2**20, 2**6, 2**6, 1, 2**20)),   # chunks of all heads
    ("float16", "merge.cu", (2**16, 2**12, 2**4, 16, 20)),     # rows of all heads
    ("int8", "hopper.cu", (2**20, 2**12, 2**3, MANY, 20)),
    ("int8", "turned.cu", (2**10, 2**5, 2**5, MANY, 2**24)),   # 16 keys of a channel for each thread
])
def test_a_call_of_too_many_blocks(gpu, monkeypatch, kind, source, shape):
    """Nothing is launched or allocated, whichever of its launches it is."""
    batch, heads, kv, rows, keys = shape
    size = np.dtype(kind).itemsize

    def seen(heads, length):
        shape, strides = (batch, heads, length, 16), (16, 16, 16 * size, size)
        host = np.lib.stride_tricks.as_strided(np.zeros(16, kind), shape, strides)
        return arrays.GPUArray(host.view(arrays.Shadow), None, 0, None)

    plan = SimpleNamespace(
        B=batch, H=heads, Hk=kv, Lq=rows, Lk=keys, D=16, scale=1.0, softcap=0.0, offset=0, left=UNBOUNDED,
        right=UNBOUNDED, alibi_slopes=None, bias=None, mask=None,
    )
    named = {"q": seen(heads, rows), "k": seen(kv, keys), "v": seen(kv, keys), "out": seen(heads, rows)}
    monkeypatch.setattr(sys.modules["cupy"], "empty", None)
    monkeypatch.setattr(variants, "choose", gpu_fake.chosen)
    name = f"cyflash_{source.removesuffix('.cu').replace('turned', 'turn')}"
    with pytest.raises(ValueError, match=f"q: expected a call that takes at most 2147483647 blocks.* of {name} for B="):
        kernels.queue(0, plan, (kind, kind, "float32" if kind == "int8" else kind), named)
    assert not gpu.launches


def test_params_have_the_layout_of_the_header(tmp_path):
    """Sizes and offsets of params.h, as the C++ compiler has them."""
    fields = [name for name in params.PARAMS.names]
    line = '    printf("{0} %zu %zu\\n", offsetof(Params, {0}), sizeof(Params::{0}));\n'
    prints = "".join(line.format(name) for name in fields)
    source = tmp_path / "layout.cpp"
    source.write_text(
        f'#include <cstddef>\n#include <cstdio>\n#include "{build.FOLDER / "params.h"}"\n'
        f'int main() {{\n{prints}    printf("all %zu 0\\n", sizeof(Params));\n}}\n'
    )
    program = tmp_path / "layout"
    subprocess.run(["g++", "-std=c++17", source, "-o", program], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    found = {name: (int(offset), int(size)) for name, offset, size in map(str.split, lines)}
    assert found.pop("all") == (params.PARAMS.itemsize, 0)
    assert found == {name: (params.PARAMS.fields[name][1], params.PARAMS[name].itemsize) for name in fields}
    declared = re.sub(r"//.*", "", (build.FOLDER / "params.h").read_text())
    assert sum(piece.count(",") + 1 for piece in re.findall(r"[^;{}]+;", declared)) == len(fields)


# --- Bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "k on the host": (
        TypeError, {"k": np.zeros((B, Hk, Lk, D), F32)}, ["k: expected an array on the GPU as q", "cupy.asarray(k)"]
    ),
    "q on the host": (
        TypeError, {"q": np.zeros((B, H, Lq, D), F32)}, ["q: expected an array on the GPU as k is", "ndarray"]
    ),
    "bias on the host": (TypeError, {"bias": np.zeros((Lq, Lk), F32)}, ["bias: expected an array on the GPU"]),
    "sinks on the host": (TypeError, {"sinks": np.zeros(H, F32)}, ["sinks: expected an array on the GPU"]),
    "out on the host": (TypeError, {"out": np.zeros((B, H, Lq, D), F32)}, ["out: expected an array on the GPU"]),
    "two devices": (
        ValueError, {"v": ((B, Hk, Lk, D), F32, 1)}, ["v: expected an array on cuda:0 as q is, got one on cuda:1"]
    ),
    "mask elsewhere": (ValueError, {"mask": ((Lq, Lk), bool, 1)}, ["mask: expected an array on cuda:0", "cuda:1"]),
    "float64": (TypeError, {"q": ((B, H, Lq, D), "f8")}, ["q: expected float32 (or float16, bfloat16), got float64"]),
    "int8": (TypeError, {"q": ((B, H, Lq, D), "i1")}, ["q: expected float32", "int8"]),
    "a list": (TypeError, {"v": [1.0]}, ["v: expected an array on a GPU, got list"]),
    "one axis": (ValueError, {"q": ((D,), F32)}, ["q: expected 2 or 3 or 4 dimensions, got 1"]),
    "head_dim of 257": (
        NotImplementedError, {n: ((1, 4, 257), F32) for n in "qkv"}, ["q: a head_dim of at most 256", "257"]
    ),
    "Dv": (NotImplementedError, {"v": ((B, Hk, Lk, D + 8), F32)}, ["v: a head_dim other than q's", "16 and 8"]),
    "shape of k": (ValueError, {"k": ((B, Hk, Lk, D + 1), F32)}, ["k: expected (B, Hk, Lk, D)", "D=8"]),
    "strided": (ValueError, {"q": "strided"}, ["q: expected a contiguous last axis", "cupy.ascontiguousarray(q)"]),
    "dropout": (NotImplementedError, {"dropout_p": 0.1}, ["dropout_p: dropout is not implemented"]),
    "num_threads": (ValueError, {"num_threads": 2}, ["num_threads: expected None with arrays on a GPU, got 2"]),
    "bias of float16": (TypeError, {"bias": ((Lq, Lk), "f2")}, ["bias: expected float32, got float16"]),
    "mask of float32": (TypeError, {"mask": ((Lq, Lk), F32)}, ["mask: expected bool", "float32", "bias"]),
    "bias shape": (ValueError, {"bias": ((Lk, Lq), F32)}, ["bias: expected a shape that broadcasts", "(13, 10)"]),
    "sinks shape": (ValueError, {"sinks": ((Hk,), F32)}, ["sinks: expected shape (4,)", "(2,)"]),
    "sinks of words": (TypeError, {"sinks": ["a"] * H}, ["sinks: expected"]),
    "window": (ValueError, {"window": 3}, ["window: expected (left, right)"]),
    "out dtype": (TypeError, {"out": ((B, H, Lq, D), "f2")}, ["out: expected float32, got float16"]),
    "out shape": (ValueError, {"out": ((B, H, Lq, D + 1), F32)}, ["out: expected shape q.shape[:-1]"]),
    "out is q": (ValueError, {"out": "q"}, ["out: expected memory of its own, got an array that overlaps q"]),
    "config": (ValueError, {"config": FlashAttentionConfig(D + 1, H)}, ["config: expected head_dim 8"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(gpu, name):
    kind, changed, words = BAD[name]
    arguments = dict(zip("qkv", map(gpu.array, tensors()), strict=True))
    for key, x in changed.items():
        if isinstance(x, tuple) and isinstance(x[0], tuple):
            shape, dtype, *number = x
            x = gpu.array(np.zeros(shape, dtype), *number)
        elif isinstance(x, str) and x == "strided":
            x = gpu.array(np.zeros((B, H, D, Lq), F32)).swapaxes(2, 3)
        elif isinstance(x, str) and x == "q":
            x = arguments["q"]
        arguments[key] = x
    with pytest.raises(kind) as caught:
        flash_attention(**arguments)
    for word in words:
        assert word in str(caught.value)
    assert not gpu.launches


def test_codes_without_a_scale(gpu):
    q, k, v = (gpu.array(x.astype(np.int8)) for x in tensors())
    with pytest.raises(ValueError, match="q_scale: expected the scale of the int8 array q, got None"):
        flash_attention_int8(q, k, v)
    with pytest.raises(TypeError, match="k_scale: expected an array on the GPU"):
        flash_attention_int8(q, k, v, q_scale=0.1, k_scale=np.ones((Hk, 1, 1), F32), v_scale=0.1)
    with pytest.raises(TypeError, match="k_scale: expected float32 on a GPU, got float64"):
        flash_attention_int8(q, k, v, q_scale=0.1, k_scale=gpu.array(np.ones((Hk, 1, 1))), v_scale=0.1)
    with pytest.raises(ValueError, match="k_scale: expected a number"):
        flash_attention_int8(q, k, v, q_scale=0.1, k_scale=gpu.array(np.ones((3, 1, 1), F32)), v_scale=0.1)


BAD_OF_INT8 = {
    "float64": (TypeError, {"q": ((B, H, Lq, D), "f8")}, "q: expected float32 .*int8 or a Quantized.* got float64"),
    "head_dim": (NotImplementedError, {n: ((4, 257), F32) for n in "qkv"}, "q: a head_dim of at most 256 .*got 257"),
    "Dv": (NotImplementedError, {"v": ((B, Hk, Lk, 2 * D), F32)}, "v: a head_dim other than q's .*got 16 and 8"),
    "two devices": (ValueError, {"k": ((B, Hk, Lk, D), F32, 1)}, "k: expected an array on cuda:0 as q .*copy it there"),
    "scale elsewhere": (
        ValueError, {"q_scale": ((H, 1, 1), F32, 1)}, "q_scale: expected an array on cuda:0 as q is, got one on"),
    "num_threads": (ValueError, {"num_threads": 1}, "num_threads: expected None with arrays on a GPU, got 1"),
    "dropout": (TypeError, {"dropout_p": 0.1}, "unexpected keyword argument 'dropout_p'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OF_INT8)
def test_bad_input_of_int8(gpu, name):
    kind, changed, words = BAD_OF_INT8[name]
    arguments = dict(zip("qkv", map(gpu.array, tensors()), strict=True))
    for key, x in changed.items():
        arguments[key] = gpu.array(np.ones(*x[:2]), *x[2:]) if isinstance(x, tuple) else x
    with pytest.raises(kind, match=words):
        flash_attention_int8(**arguments)
    assert not gpu.launches


def test_what_belongs_together_is_on_one_device(gpu):
    q, k, v = map(gpu.array, tensors())
    codes, scale = gpu.array(np.ones(k.shape, np.int8)), gpu.array(np.ones((Hk, 1, 1), F32))
    far = gpu.array(np.ones((Hk, 1, 1), F32), 1)
    mean, rows = (gpu.array(np.ones((B, Hk, n, D), F32), 1) for n in (1, 2))
    words = "expected an array on cuda:0 as {} is, got one on cuda:1; copy it there first"
    for name, of, call in (
        ("scale", "data", lambda: cyflash.QuantizedTensor(codes, far)),
        ("mean", "data", lambda: cyflash.QuantizedTensor(codes, scale, mean)),
        ("fp32_rows", "data", lambda: cyflash.QuantizedTensor(codes, 1.0, None, rows)),
        ("scale", "x", lambda: cyflash.quantize(k, scale=far)),
        ("quant.k_scale", "q", lambda: flash_attention_int8(q, k, v, quant=LayerScales(0.1, far, 0.1))),
    ):
        with pytest.raises(ValueError, match=f"{name}: {words.format(of)}"):
            call()
    flash_attention_int8(q, k, v, quant=LayerScales(0.1, scale, 0.1))


PATH_OF = cubins.path_of


def looking_in(folder, gpu, monkeypatch):
    """q, k, v of a call that looks for its kernels in a folder."""
    monkeypatch.setattr(cubins, "path_of", PATH_OF)
    monkeypatch.setenv(cubins.VARIABLE, str(folder))
    monkeypatch.setattr(build, "build", lambda variant, texts: build.Built(b"code", ""))
    return map(gpu.array, tensors())


def test_a_call_without_nvrtc(gpu, monkeypatch, tmp_path):
    def absent():
        raise RuntimeError("libnvrtc.so not found")

    q, k, v = looking_in(tmp_path, gpu, monkeypatch)
    monkeypatch.setattr(sys.modules["cupy"].cuda.nvrtc, "getVersion", absent)
    with pytest.raises(GPUUnavailableError, match=r"NVRTC.*libnvrtc.so not found.*install it with: pip"):
        flash_attention(q, k, v)


def test_a_call_that_cannot_keep_its_kernel(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    q, k, v = looking_in(tmp_path / "file" / "cache", gpu, monkeypatch)
    with pytest.raises(OSError, match=r"compiled kernels cannot be kept in .*; set CYFLASH_CACHE_DIR to a"):
        flash_attention(q, k, v)


def test_an_old_device(gpu, monkeypatch):
    monkeypatch.setattr(gpu_fake.Context, "compute_capability", "75")
    with pytest.raises(NotImplementedError, match=r"cuda:0 has compute capability 7.5; the kernels need 8.0 or later"):
        flash_attention(*map(gpu.array, tensors()))


def test_nothing_reads_a_shadow():
    """At an address that is not mapped: a read would end this process."""
    seen = arrays._seen("x", 4096, (B, H, Lq, D), None, np.dtype(F32), 0, None)
    assert repr(seen).count("Shadow(") == 1 and seen.address == 4096 and seen.strides == (H * Lq * D, Lq * D, D, 1)
    bias, mask = (arrays._seen("x", 4096, (Lq, Lk), None, np.dtype(t), 0, None).shadow for t in (F32, bool))
    slopes = arrays._seen("x", 4096, (H,), None, np.dtype(F32), 0, None).shadow
    k = arrays._seen("k", 8192, (B, Hk, Lk, D), None, np.dtype(F32), 0, None).shadow
    made = make_plan(seen.shadow, k, k, bias=bias, mask=mask, alibi_slopes=slopes, sinks=slopes)
    assert "Shadow(shape=(2, 4, 10, 13)" in repr(made)


def test_other_functions_say_that_they_are_of_the_host(gpu):
    q, k, v = (gpu.array(x[0].swapaxes(0, 1)) for x in tensors())
    lengths = np.array([0, Lq]), np.array([0, Lk])
    with pytest.raises(NotImplementedError, match=r"q: expected an array in the host's memory.*cupy.asnumpy\(q\)"):
        cyflash.flash_attention_varlen(q, k, v, *lengths)
    with pytest.raises(NotImplementedError, match="query: expected an array in the host's memory"):
        cyflash.scaled_dot_product_attention(q, k, v)
    host = [x.host for x in (q, k, v)]
    heads_first = [x.swapaxes(0, 1)[None] for x in host]
    there = [gpu.array(x) for x in heads_first]
    cache, paged = cyflash.KVCache(1, Hk, D, 16), cyflash.PagedKVCache(4, 16, Hk, D)
    cache.append(*heads_first[1:])
    numbers, scale = gpu.array(np.array([0, Lk])), gpu.array(np.ones((Hk, 1, 1), F32))
    mask = gpu.array(np.ones((Lq, Lq), bool))
    for name, call in (
        ("k", lambda: cache.append(*there[1:])),
        ("q", lambda: cyflash.flash_attention_with_kvcache(there[0], cache)),
        ("k", lambda: cyflash.flash_attention_with_kvcache(heads_first[0], cache, *there[1:])),
        ("rows", lambda: cyflash.flash_attention_with_kvcache(heads_first[0], cache, rows=numbers[:1])),
        ("lengths", lambda: cache.truncate(numbers[:1])),
        ("rows", lambda: paged.reorder(numbers[:1])),
        ("k_scale", lambda: cyflash.KVCache(1, Hk, D, 16, dtype="int8", k_scale=scale, v_scale=1.0)),
        ("q", lambda: cyflash.flash_attention_int8_varlen(q, k, v, *lengths)),
        ("cu_seqlens_k", lambda: cyflash.flash_attention_varlen(*host, lengths[0], numbers)),
        ("out_a", lambda: cyflash.merge_states(there[0], there[0][..., 0], there[0], there[0][..., 0])),
        ("attn_mask", lambda: cyflash.scaled_dot_product_attention(*3 * [heads_first[0]], attn_mask=mask)),
        ("scale", lambda: cyflash.quantize(heads_first[1], scale=scale)),
        ("scale", lambda: cyflash.QuantizedTensor(np.ones((Hk, Lk, D), np.int8), scale)),
        ("quant.k_scale", lambda: flash_attention_int8(*heads_first, quant=LayerScales(0.1, scale, 0.1))),
    ):
        with pytest.raises(NotImplementedError, match=rf"^{name}: .*the host's memory.*cupy.asnumpy\({name}\)"):
            call()


# --- Other libraries' arrays ------------------------------------------------------------------------------------------


class Tensor:
    """What is used of torch.Tensor."""

    def __init__(self, host, bf16=False):
        self.host, self.word = host, "bfloat16" if bf16 else str(host.dtype)
        self.shape, self.device = host.shape, "cuda:0"
        self.dtype = type("dtype", (), {"__str__": lambda _: f"torch.{self.word}"})()

    requires_grad = False

    def dequantize(self):
        raise AssertionError

    def stride(self):
        return tuple(stride // self.host.itemsize for stride in self.host.strides)

    def data_ptr(self):
        return self.host.ctypes.data

    def get_device(self):
        return 0

    def __dlpack_device__(self):
        return 2, 0


Tensor.__module__ = "torch"


@pytest.fixture
def torch(monkeypatch):
    module = types.ModuleType("torch")
    module.float32 = "torch.float32"
    module.is_grad_enabled = lambda: True
    module.cuda = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=77))

    def empty(shape, dtype, device):
        word = str(dtype).removeprefix("torch.")
        return Tensor(np.ones(shape, np.uint16 if word == "bfloat16" else word), word == "bfloat16")

    module.empty = empty
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def test_tensors_of_torch(gpu, torch):
    q, k, v = tensors()
    out, lse = flash_attention(*map(Tensor, (q, k, v)), mask=Tensor(MASK[:, :, :Lq]), return_lse=True)
    assert type(out) is type(lse) is Tensor
    np.testing.assert_allclose(out.host, reference.attention(q, k, v, mask=MASK[:, :, :Lq]), rtol=0, atol=1e-6)
    assert [one.id for one in gpu.launches[0].streams] == [77]


def test_what_tensors_must_not_be(gpu, torch):
    q, k, v = map(Tensor, tensors())
    v.requires_grad = True
    with pytest.raises(ValueError, match=r"v: expected a tensor without gradient.*pass v\.detach\(\)"):
        flash_attention(q, k, v)
    k.word = "float8_e4m3fn"
    with pytest.raises(TypeError, match=r"k: expected a dtype that NumPy has, or bfloat16, got torch\.float8_e4m3fn"):
        flash_attention(q, k, v)


def test_bfloat16_of_torch(gpu, torch):
    q, k, v = (x.astype(dtype_of("bfloat16")) for x in tensors())
    arguments = [Tensor(x.view(np.uint16), bf16=True) for x in (q, k, v)]
    for function, bound in ((flash_attention, 0.02), (flash_attention_int8, 0.04)):
        out = function(*arguments)
        assert out.word == "bfloat16"
        np.testing.assert_allclose(gpu_fake.floats(out.host), reference.attention(q, k, v), rtol=0, atol=bound)


class Described:
    """An array of a library that has the CUDA array interface, and no more."""

    def __init__(self, host, **changes):
        self.host, self.changes = host, changes

    @property
    def __cuda_array_interface__(self):
        return {**self.host.__array_interface__, "version": 3, **self.changes}


class Namespaced(Described):
    def __array_namespace__(self):
        return SimpleNamespace(from_dlpack=lambda x: ("theirs", x))


def test_the_cuda_array_interface(gpu):
    q, k, v = tensors()
    out = flash_attention(Described(q), Described(k, stream=5), Described(v))
    np.testing.assert_allclose(out.host, reference.attention(q, k, v), rtol=0, atol=1e-6)
    assert gpu_fake.Context.waited.id == 5
    kind, out = flash_attention(*map(Namespaced, (q, k, v)))
    assert kind == "theirs" and isinstance(out, gpu_fake.FakeArray)
    with pytest.raises(TypeError, match="k: expected a plain array, got one with a mask"):
        flash_attention(Described(q), Described(k, mask=k), Described(v))
    with pytest.raises(ValueError, match="out: expected a writable array"):
        out = np.empty_like(q)
        flash_attention(*map(Described, (q, k, v)), out=Described(out, data=(out.ctypes.data, True)))


def test_dlpack(gpu):
    class Exported:
        def __init__(self, host):
            self.host = host

        def __dlpack_device__(self):
            return 2, 0

        def __dlpack__(self):
            raise AssertionError("CuPy asks")

        def of_dlpack(self):
            return gpu_fake.FakeArray(self.host)

    q, k, v = tensors()
    out = flash_attention(*map(Exported, (q, k, v)))
    np.testing.assert_allclose(out.host, reference.attention(q, k, v), rtol=0, atol=1e-6)


# --- Whether there is a GPU -------------------------------------------------------------------------------------------


def test_status_of_this_machine():
    found = cyflash.gpu_status()
    assert isinstance(found.available, bool) and found.reason and found.cupy


def test_status_with_a_gpu(gpu):
    assert cyflash.gpu_status() == (True, "Fake, compute capability 9.0", "Fake", "9.0", "14.2.0", "13.0")


def test_status_says_what_is_missing(gpu, monkeypatch):
    cupy = sys.modules["cupy"]

    def fails(code):
        def call():
            raise type("CUDARuntimeError", (RuntimeError,), {"status": code})("cudaError")

        return call

    def no_nvrtc():
        raise RuntimeError("libnvrtc.so not found")

    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", no_nvrtc)
    reason = cyflash.gpu_status().reason
    assert "NVRTC, which compiles the kernels, was not found (libnvrtc.so not found); install" in reason
    monkeypatch.setattr(gpu_fake.Context, "compute_capability", "75")
    assert cyflash.gpu_status().reason == "Fake has compute capability 7.5; the kernels need 8.0 or later"
    for code, words in ((35, "no NVIDIA driver"), (100, "no GPU that this process"), (2, "CUDA does not start")):
        monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", fails(code))
        assert words in cyflash.gpu_status().reason
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    assert "no GPU that this process may use" in cyflash.gpu_status().reason


def test_status_of_a_broken_cupy(monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "cupy":
                raise PermissionError(13, "Permission denied", "cache")

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    finder = Finder()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.setattr(status.importlib.util, "find_spec", lambda name: "there")
    found = cyflash.gpu_status()
    assert not found.available and "CuPy does not import: [Errno 13] Permission denied" in found.reason


def test_status_without_cupy(monkeypatch, torch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    found = cyflash.gpu_status()
    assert not found.available
    assert "CuPy is not installed; install it with: pip install 'cyflash-attn[gpu-" in found.reason
    with pytest.raises(GPUUnavailableError, match="CuPy is not installed"):
        flash_attention(*map(Tensor, tensors()))


# --- Compiling and keeping --------------------------------------------------------------------------------------------

KERNEL = """
#include "part.cuh"
extern "C" __global__ void doubled(float* x) { x[threadIdx.x] = FACTOR * part(x[threadIdx.x]); }
"""
TEXTS = {"doubled.cu": KERNEL, "part.cuh": "__device__ float part(float x) { return x + 1.f; }"}


def variant(arch="sm_80", macros=(("FACTOR", 2),), rows=1):
    return variants.Variant("doubled.cu", "doubled", macros, arch, 32, 0, rows)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_a_kernel_is_compiled_without_a_gpu(arch):
    built = build.build(variant(arch), TEXTS)
    assert built.cubin[:4] == b"\x7fELF" and b"doubled" in built.cubin
    assert "0 bytes spill stores" in built.log and f"for '{arch}'" in built.log


def test_a_compile_error_says_everything():
    with pytest.raises(build.KernelCompileError) as caught:
        build.build(variant(macros=(("FACTOR", "nothing_of_that_name"), ("D", 64))), TEXTS)
    for word in (
        "kernel doubled of doubled.cu (FACTOR=nothing_of_that_name, D=64) does not compile for sm_80",
        "options: --std=c++17", "-arch=sm_80", "-DD=64", 'identifier "nothing_of_that_name" is undefined',
    ):  # fmt: skip
        assert word in str(caught.value)


def test_every_kernel_has_its_sources():
    texts = build.sources(SimpleNamespace(source="params.h"))
    assert "struct Params" in texts["params.h"]


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A folder to keep kernels in, and how often something was compiled."""
    count = []
    monkeypatch.setenv(cubins.VARIABLE, str(tmp_path / "kept" / "here"))
    monkeypatch.setattr(build, "sources", lambda variant: TEXTS)
    monkeypatch.setattr(status, "nvrtc", lambda: (None, (13, 0)))

    def fake(variant, texts):
        count.append(variant)
        return build.Built(repr(variant).encode(), "")

    monkeypatch.setattr(build, "build", fake)
    return count


def test_a_kernel_is_compiled_once(cache):
    first = cubins.path_of(variant())
    assert cubins.path_of(variant()) == first and len(cache) == 1
    assert first.read_bytes() == repr(variant()).encode()
    assert cubins.path_of(variant("sm_90a")) != first and len(cache) == 2
    assert not list(first.parent.glob("*.part"))


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data + b"x"])
def test_a_damaged_file_is_not_used(cache, damage):
    path = cubins.path_of(variant())
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert cubins.path_of(variant()) == path and len(cache) == 2
    assert path.read_bytes() == whole


def test_the_key_changes_with_everything():
    keys = {
        cubins.key(texts, options, version)
        for texts in (TEXTS, TEXTS | {"part.cuh": "// other"}, {"doubled.cu": KERNEL}, {"doubled.cu": KERNEL, "p": ""})
        for options in (("-arch=sm_80",), ("-arch=sm_90a",), ("-arch=sm_80", "-DD=64"), ("-arch=sm_80-DD=64",))
        for version in ((13, 0), (12, 9))
    }
    assert len(keys) == 4 * 4 * 2


def test_a_file_appears_whole(cache, monkeypatch):
    """A process that ends while it writes leaves nothing under the file's name."""
    def stops(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stops)
    with pytest.raises(KeyboardInterrupt):
        cubins.path_of(variant())
    assert not list(cubins.folder().iterdir())


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_a_folder_that_cannot_be_written(cache, monkeypatch, error):
    def refuses(*args, **kwargs):
        raise error

    monkeypatch.setattr(cubins.tempfile, "mkstemp", refuses)
    with pytest.raises(type(error), match=r"compiled kernels cannot be kept in .*here.*set CYFLASH_CACHE_DIR to a fol"):
        cubins.path_of(variant())


def test_a_kept_kernel_is_used_where_nothing_can_be_written(cache, monkeypatch):
    path = cubins.path_of(variant())
    monkeypatch.setattr(cubins.tempfile, "mkstemp", None)
    assert cubins.path_of(variant()) == path


def test_a_cache_below_a_file(cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(cubins.VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(NotADirectoryError, match="set CYFLASH_CACHE_DIR"):
        cubins.path_of(variant())


def test_a_user_without_a_home(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(cubins.VARIABLE, raising=False)
    monkeypatch.setattr(cubins.Path, "home", homeless)
    with pytest.raises(RuntimeError, match=r"cannot be kept: Could not determine home.*set CYFLASH_CACHE_DIR to"):
        cubins.folder()


def test_where_kernels_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv(cubins.VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cubins.folder() == tmp_path / ".cache" / "cyflash"
    monkeypatch.setenv(cubins.VARIABLE, "~/other")
    assert cubins.folder() == Path(tmp_path / "other")


@pytest.mark.parametrize(("capability", "arch"), [
    ("80", "sm_80"), ("87", "sm_86"), ("89", "sm_89"), ("90", "sm_90a"), ("120", "sm_120"), ("121", "sm_120"),
])  # fmt: skip
def test_what_kernels_are_compiled_for(monkeypatch, capability, arch):
    """A compiler that does not know a device compiles for an earlier one of the same family."""
    gpu_fake.device(monkeypatch, capability=capability)
    assert launch.architecture(0) == arch


def test_a_compiler_that_is_too_old(monkeypatch):
    gpu = gpu_fake.device(monkeypatch, capability="130")
    q = gpu.array(np.ones((4, 8), np.float32))
    with pytest.raises(GPUUnavailableError, match=r"NVRTC 13.0 does not compile for cuda:0.*13\.0; install a newer"):
        flash_attention(q, q, q)
