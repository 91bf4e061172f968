"""Arrays of other libraries, of the real packages: the bits that NumPy arrays give, the same kind out, no copies, and
errors that say the way out."""
import doctest
import subprocess
import sys

import numpy as np
import pytest

import cyflash
from cyflash import (
    FlashAttention,
    FlashAttentionConfig,
    KVCache,
    LayerScales,
    QuantizedTensor,
    flash_attention,
    flash_attention_int8,
    flash_attention_int8_varlen,
    flash_attention_varlen,
    flash_attention_with_kvcache,
    merge_states,
    quantize,
    reference,
    scaled_dot_product_attention,
)
from cyflash.compat import flash_attn
from cyflash.foreign import as_numpy, maker, same_kind
from cyflash.quant import Calibrator, compare, evaluate, load_capture, save_capture

LIBRARIES = ("torch", "jax", "dlpack", "array", "namespace")
NO_BFLOAT16 = ("dlpack", "namespace")
DTYPES = ("float32", "float16", "bfloat16")


class DLPack:
    """An array of which only DLPack is known."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


class Array:
    """An array of which only NumPy's protocol is known."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return self.x


class Namespaced(DLPack):
    """An array of a library with Python's array API."""

    @property
    def shape(self):
        return self.x.shape

    def __array_namespace__(self, api_version=None):
        return Namespaced

    @classmethod
    def from_dlpack(cls, x):
        return cls(np.from_dlpack(x))


CLASSES = {"dlpack": DLPack, "array": Array, "namespace": Namespaced}


def made(library, x):
    """x as an array of this library, in the same memory where it can be."""
    if library == "torch":
        torch = pytest.importorskip("torch")
        if x.dtype.name == "bfloat16":
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)
    if library == "jax":
        return pytest.importorskip("jax").numpy.asarray(x)
    return CLASSES[library](x)


def read(library, x):
    """A result as a NumPy array, after checking whose it is."""
    if library == "torch":
        torch = sys.modules["torch"]
        assert type(x) is torch.Tensor and x.device.type == "cpu"
        if x.dtype == torch.bfloat16:
            return x.view(torch.int16).numpy().view(dtype("bfloat16"))
        return x.numpy()
    if library == "jax":
        assert isinstance(x, sys.modules["jax"].Array)
        return np.asarray(x)
    if library == "namespace":
        assert type(x) is Namespaced
        return x.x
    assert type(x) is np.ndarray
    return x


def dtype(name):
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def random(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32).astype(dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def qkv(dtype=np.float32):
    return random(2, 4, 9, 16, dtype=dtype), random(2, 2, 12, 16, dtype=dtype), random(2, 2, 12, 8, dtype=dtype)


# Every public function: {name: function of (a function that makes an array of the library, of the dtype)} -> results

MASK = np.random.default_rng(1).random((2, 4, 9, 12)) > 0.3
BIAS = random(9, 12, seed=1)
CU = np.array([0, 4, 9], np.int32), np.array([0, 5, 12], np.int32)


def _flash(of, dtype, **options):
    q, k, v = map(of, qkv(dtype))
    return flash_attention(q, k, v, **options, return_lse=True)


def _options(of, dtype):
    return _flash(
        of, dtype, mask=of(MASK), bias=of(BIAS), alibi_slopes=of(random(4, seed=2)), sinks=of(random(4, seed=3)),
        window=(7, 1), softcap=5.0,
    )


def _engine(of, dtype):
    engine = FlashAttention(FlashAttentionConfig.new(16, 4))
    found = engine.forward_multi_head(*map(of, qkv(dtype)), mask=of(MASK))
    return found.output, found.logsumexp


def _int8(of, dtype):
    q, k, v = qkv(dtype)
    return flash_attention_int8(of(q), of(k), of(v), q_scale=of(np.full((4, 1, 1), 0.03, np.float32)), mask=of(MASK))


def _codes(of, dtype):
    q, k, v = qkv(dtype)
    k, v = quantize(of(k), "token", smooth=True, fp32_sinks=2), quantize(of(v), "head", fp32_sinks=2)
    again = QuantizedTensor(v.data, v.scale, None, v.fp32_rows)
    assert again.granularity == "head" and again.nbytes == v.nbytes
    held = [y for x in (k, again) for y in (x.data, x.scale, x.mean, x.fp32_rows) if y is not None]
    return flash_attention_int8(of(q), k, again), k.dequantize(), *held


def _ragged(dtype):
    return random(9, 4, 16, dtype=dtype), random(12, 2, 16, dtype=dtype), random(12, 2, 16, dtype=dtype)


def _varlen(of, dtype):
    masks = [of(MASK[0, :, :4, :5]), None]
    return flash_attention_varlen(*map(of, _ragged(dtype)), *map(of, CU), mask=masks, return_lse=True)


def _int8_varlen(of, dtype):
    per_head = of(np.full((2, 1), 0.03, np.float32))
    return flash_attention_int8_varlen(*map(of, _ragged(dtype)), *map(of, CU), k_scale=per_head)


def _cache(of, dtype):
    q, k, v = qkv(dtype)
    scales = {"granularity": "head", "k_scale": of(np.full((2, 1, 1), 0.03)), "v_scale": 0.03}
    cache = KVCache(2, 2, 16, 32, "int8", v_head_dim=8, **scales)
    cache.append(of(k[:, :, :5]), of(v[:, :, :5]), rows=of(np.array([1, 0])), lengths=of(np.array([5, 4])))
    return flash_attention_with_kvcache(of(q), cache, of(k), of(v), mask=of(MASK[..., :1]), return_lse=True)


def _merged(of, dtype):
    q, k, v = map(of, qkv(dtype))
    out, lse = flash_attention(q, k, v, return_lse=True)
    return merge_states(out, lse, out, lse)


def _sdpa(of, dtype):
    return scaled_dot_product_attention(*map(of, qkv(dtype)), attn_mask=of(MASK), enable_gqa=True)


def _dense(dtype):
    return (x.swapaxes(1, 2) for x in qkv(dtype))


def _flash_attn(of, dtype):
    out, lse, none = flash_attn.flash_attn_func(
        *map(of, _dense(dtype)), causal=True, alibi_slopes=of(random(4, seed=2)), return_attn_probs=True
    )
    assert none is None
    return out, lse


def _packed(of, dtype):
    x = random(2, 7, 3, 4, 16, dtype=dtype)
    both = flash_attn.flash_attn_kvpacked_func(of(x[:, :, 0]), of(x[:, :, 1:]), causal=True)
    rows, cu = x.reshape(14, 3, 4, 16), of(np.array([0, 5, 14]))
    return (
        flash_attn.flash_attn_qkvpacked_func(of(x)), both,
        flash_attn.flash_attn_varlen_func(of(rows[:, 0]), of(rows[:, 1]), of(rows[:, 2]), cu, cu, 9, 9),
        flash_attn.flash_attn_varlen_kvpacked_func(of(rows[:, 0]), of(rows[:, 1:]), cu, cu, 9, 9),
        flash_attn.flash_attn_varlen_qkvpacked_func(of(rows), cu, 9),
    )


def _with_kvcache(of, dtype):
    q, k, v = _dense(dtype)
    return flash_attn.flash_attn_with_kvcache(of(q), of(k), of(v), cache_seqlens=of(np.array([7, 9])))


FUNCTIONS = {
    "plain": _flash, "options": _options, "engine": _engine, "int8": _int8, "QuantizedTensor": _codes,
    "varlen": _varlen, "int8 varlen": _int8_varlen, "kvcache": _cache, "merge": _merged, "sdpa": _sdpa,
    "flash_attn": _flash_attn, "packed": _packed, "flash_attn cache": _with_kvcache,
}  # fmt: skip


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


# NumPy has no bfloat16 in DLPack.
KINDS = [(one, kind) for one in LIBRARIES for kind in DTYPES if kind != "bfloat16" or one not in NO_BFLOAT16]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("library", "kind"), KINDS)
def test_the_same_bits_and_the_same_kind(library, kind, name):
    expected = as_tuple(FUNCTIONS[name](lambda x: x, dtype(kind)))
    assert all(x.any() for x in expected)
    found = as_tuple(FUNCTIONS[name](lambda x: made(library, x), dtype(kind)))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert same_bits(read(library, a), b)


def test_every_option_of_these_calls_counts():
    """Else the test above could not tell whether it arrived."""
    q, k, v = qkv()
    whole = {
        "mask": MASK, "bias": BIAS, "alibi_slopes": random(4, seed=2), "sinks": random(4, seed=3), "window": (7, 1),
        "softcap": 5.0,
    }  # fmt: skip
    expected = flash_attention(q, k, v, **whole)
    for name in whole:
        less = {other: x for other, x in whole.items() if other != name}
        assert np.abs(flash_attention(q, k, v, **less) - expected).max() > 1e-3, name
    assert np.abs(scaled_dot_product_attention(q, k, v, enable_gqa=True) - _sdpa(lambda x: x, np.float32)).max() > 0.01


@pytest.mark.parametrize("library", ("torch", "jax"))
def test_results_that_are_numpys(library):
    """The specification is float64, which JAX has only on request; metrics are numbers."""
    q, k, v = qkv()
    mine = [made(library, x) for x in (q, k, v)]
    out, lse = reference.attention(*mine, mask=made(library, MASK), return_lse=True)
    expected, expected_lse = reference.attention(q, k, v, mask=MASK, return_lse=True)
    assert same_bits(out, expected) and same_bits(lse, expected_lse)
    codes = quantize(mine[1])
    assert same_bits(reference.attention_int8(mine[0], codes, mine[2]), reference.attention_int8(q, quantize(k), v))
    assert compare(flash_attention(*mine), mine[0][..., :8]) == compare(flash_attention(q, k, v), q[..., :8])
    rows, expected = (evaluate(*x, schemes=["cyflash fp32"], causal=True, num_threads=1) for x in (mine, (q, k, v)))
    assert [row["rel_l1"] for row in rows] == [row["rel_l1"] for row in expected]


@pytest.mark.parametrize("library", ("torch", "jax"))
@pytest.mark.parametrize("kind", DTYPES)
def test_calibrators_see_the_same(library, kind):
    tables = []
    for of in (lambda x: x, lambda x: made(library, x)):
        calibrator = Calibrator("head")
        for seed in range(2):
            q, k, v = (of(random(2, 4, 30, 16, dtype=dtype(kind), seed=3 * seed + n)) for n in range(3))
            calibrator.observe("layer", q, k, v, mask=of(np.tri(30, dtype=bool)))
        tables.append(calibrator.compute()["layer"])
    a, b = tables
    assert np.ptp(a.q_scale) > 0
    assert all(same_bits(getattr(a, name), getattr(b, name)) for name in ("q_scale", "k_scale", "v_scale"))


def test_captures_and_scales_take_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    q, k, v = qkv()
    path = save_capture(tmp_path / "x.npz", {"a": [torch.from_numpy(x) for x in (q, k, v)]}, causal=True)
    assert same_bits(np.asarray(load_capture(path)["a"][1]), k)
    scales = LayerScales(torch.full((4, 1, 1), 0.5), torch.tensor(0.25, dtype=torch.float64), k_mean=torch.ones(16))
    assert scales.q_scale.shape == (4, 1, 1) and scales.k_scale == 0.25 and same_bits(scales.k_mean, np.ones(16, "f4"))
    codes = quantize(torch.from_numpy(k), "token", smooth=True)
    assert same_bits(QuantizedTensor.load(codes.save(tmp_path / "k.safetensors")).mean, codes.mean.numpy())


def test_the_first_array_decides():
    torch = pytest.importorskip("torch")
    q, k, v = qkv()
    expected = flash_attention(q, k, v)
    assert type(flash_attention(q, torch.from_numpy(k), torch.from_numpy(v))) is np.ndarray
    found = flash_attention(v=v, k=torch.from_numpy(k), q=torch.from_numpy(q))
    assert same_bits(read("torch", found), expected)
    codes = quantize(torch.from_numpy(k))
    assert type(flash_attention_int8(q, codes, v)) is np.ndarray
    assert type(flash_attention_int8(quantize(torch.from_numpy(q)), k, v)) is torch.Tensor


# No copies


VIEWS = {
    "whole": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2),
    "offset": lambda x: x[1:, 3:],
    "strided": lambda x: x[:, ::2],
    "strided last axis": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1, :, :1].expand(3, 10, 4, 32),
    "empty": lambda x: x[:0],
    "a number": lambda x: x[0, 0, 0, 0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", [*DTYPES, "int8", "bool"])
def test_tensors_are_views(kind, view):
    torch = pytest.importorskip("torch")
    dtype(kind)
    x = VIEWS[view](torch.from_numpy(random(3, 10, 4, 32)).to(getattr(torch, kind)))
    seen = as_numpy("x", x)
    assert seen.shape == x.shape and seen.dtype.name == kind
    assert not x.numel() or seen.strides == tuple(n * x.element_size() for n in x.stride())
    assert not x.numel() or seen.__array_interface__["data"][0] == x.data_ptr()
    back = maker(x)(seen)
    assert back.dtype == x.dtype and back.shape == x.shape
    assert not x.numel() or back.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("view", ["transposed", "offset", "strided", "strided last axis", "expanded", "empty"])
def test_attention_of_views(view):
    torch = pytest.importorskip("torch")
    x = VIEWS[view](torch.from_numpy(random(3, 10, 4, 32)))
    expected = flash_attention(*(x.contiguous().numpy() for _ in range(3)), causal=True)
    assert same_bits(read("torch", flash_attention(x, x, x, causal=True)), expected)


def test_jax_arrays_are_views():
    jax = pytest.importorskip("jax")
    for kind in DTYPES:
        x = jax.numpy.asarray(random(3, 4)).astype(kind)
        seen = as_numpy("x", x)
        assert seen.dtype.name == kind and seen.ctypes.data == x.unsafe_buffer_pointer()


@pytest.mark.parametrize("kind", DTYPES)
def test_out_is_written_and_returned(kind):
    torch = pytest.importorskip("torch")
    q, k, v = qkv(dtype(kind))
    expected = flash_attention(q, k, v)
    given = made("torch", np.zeros((2, 4, 9, 16), dtype(kind)))[..., ::2]  # strided
    q, k, v = (made("torch", x) for x in (q, k, v))
    out, lse = flash_attention(q, k, v, out=given, return_lse=True)
    assert out is given and type(lse) is torch.Tensor
    assert same_bits(read("torch", given.contiguous()), expected)
    mine = np.empty_like(expected)
    assert flash_attention(q, k, v, out=mine) is mine and same_bits(mine, expected)
    with pytest.raises(ValueError, match="out: expected memory of its own, got an array that overlaps q"):
        flash_attention(q[..., :8], k[..., :8], v, out=q[..., :8])
    with pytest.raises(TypeError, match=f"out: expected {kind}, got int8"):
        flash_attention(q, k, v, out=torch.zeros(2, 4, 9, 8, dtype=torch.int8))
    with pytest.raises(ValueError, match="out: expected elements that do not overlap"):
        flash_attention(q, k, v, out=given[:1, :1, :1, :1].expand(2, 4, 9, 8))


def test_out_is_told_to_autograd():
    """What a gradient needs was overwritten: torch finds out by the tensor's version."""
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in qkv())
    weight = torch.ones(2, 4, 9, 8, requires_grad=True)
    kept = weight * 2
    loss = kept.square().sum()
    with torch.no_grad():
        flash_attention(q, k, v, out=kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # has no versions
        q = q + 0
        out = torch.empty(2, 4, 9, 8)
        assert flash_attention(q, k, v, out=out) is out


def test_caches_are_written_in_place():
    torch = pytest.importorskip("torch")
    caches = [torch.zeros(1, 20, 2, 16) for _ in range(2)]
    q, k, v = (torch.from_numpy(random(1, 3, heads, 16)) for heads in (4, 2, 2))
    flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=torch.tensor([5]))
    assert torch.equal(caches[0][:, 5:8], k) and torch.equal(caches[1][:, 5:8], v) and not caches[0][:, 8:].any()


def test_arrays_of_jax_cannot_be_written():
    jax = pytest.importorskip("jax")
    q, k, v = (jax.numpy.asarray(x) for x in qkv())
    with pytest.raises(ValueError, match="out: expected a writable array, got a read-only one"):
        flash_attention(q, k, v, out=jax.numpy.zeros((2, 4, 9, 8)))


# Errors


def _torch_cases():
    torch = pytest.importorskip("torch")
    x = torch.ones(9, 16)
    grad = torch.ones(9, 16, requires_grad=True)
    yield "gradient", grad, ValueError, ["without gradient", "q.detach()", "torch.no_grad()"]
    yield "gradient of bfloat16", grad.bfloat16(), ValueError, ["without gradient", "q.detach()"]
    yield "parameter", torch.nn.Parameter(x), ValueError, ["without gradient"]
    yield "meta", x.to("meta"), TypeError, ["in the host's memory", "the device meta", "q.cpu()"]
    yield "meta bfloat16", x.to("meta").bfloat16(), TypeError, ["in the host's memory", "the device meta"]
    yield "sparse", x.to_sparse(), TypeError, ["dense", "torch.sparse_coo", "q.to_dense()"]
    yield "sparse bfloat16", x.bfloat16().to_sparse_csr(), TypeError, ["dense", "torch.sparse_csr", "q.to_dense()"]
    yield "mkldnn", x.to_mkldnn(), TypeError, ["dense", "torch._mkldnn", "q.to_dense()"]
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([x, x[:3]], layout=layout)
        yield f"nested {layout}", nested, TypeError, ["nested", "q.values()", "flash_attention_varlen", "cu_seqlens"]
    codes = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    yield "quantised", codes, TypeError, ["quantised", "torch.qint8", "q.dequantize()", "q.int_repr()"]
    yield "conjugate", torch.ones(9, 16, dtype=torch.complex64).conj(), TypeError, ["conjugate", "q.resolve_conj()"]
    negative = torch.ones(9, 16, dtype=torch.complex64).conj().imag
    yield "negative", negative, TypeError, ["negative", "q.resolve_neg()"]
    yield "float8", x.to(torch.float8_e4m3fn), TypeError, ["that NumPy can see", "torch.float8_e4m3fn"]
    yield "float64", x.double(), TypeError, ["expected float32 (or float16, bfloat16), got float64"]
    yield "codes", x.to(torch.int8), TypeError, ["expected float32 (or float16, bfloat16), got int8"]
    yield "a wrong shape", x[0], ValueError, ["q: expected 2 or 3 or 4 dimensions, got 1"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_cannot_be_read():
    k = np.ones((9, 16), np.float32)
    names = []
    for name, x, error, words in _torch_cases():
        names.append(name)
        with pytest.raises(error) as caught:
            flash_attention(x, k, k)
        assert str(caught.value).startswith("q: expected"), (name, caught.value)
        assert not [word for word in words if word not in str(caught.value)], (name, caught.value)
    assert len(set(names)) == len(names) > 15


def test_gradients_are_refused_only_while_they_are_computed():
    torch = pytest.importorskip("torch")
    x = torch.ones(9, 16, requires_grad=True)
    for other in ("k", "bias"):
        arguments = {name: torch.ones(9, 16) for name in "qkv"} | {"bias": torch.zeros(9, 9)}
        arguments[other].requires_grad_()
        with pytest.raises(ValueError, match=f"{other}: expected a tensor without gradient.*{other}.detach()"):
            flash_attention(**arguments)
    with torch.no_grad():
        found = flash_attention(x, x, x)
    assert not found.requires_grad and torch.equal(found, flash_attention(*[x.detach()] * 3))


def test_tensors_without_values():
    """Of transformations, which call functions with tensors that have no memory."""
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with pytest.raises(TypeError, match="q: expected a tensor that NumPy can see"):
        torch.func.vmap(lambda x: flash_attention(x, x, x))(torch.ones(2, 9, 16))
    with FakeTensorMode(), pytest.raises(TypeError, match="q: expected a tensor that NumPy can see, got FakeTensor"):
        flash_attention(*[torch.ones(9, 16)] * 3)


def test_tracers_of_jax():
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((4, 9, 16))

    def attention(x):
        return flash_attention(x, x, x)

    for transformed in (jax.jit(attention), jax.vmap(attention), jax.grad(lambda x: attention(x).sum())):
        with pytest.raises(TypeError, match=r"q: expected an array with values, got \w+Tracer.*jax.pure_callback"):
            transformed(x)
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    found = jax.jit(lambda x: jax.pure_callback(attention, result, x))(x)  # the way out
    assert same_bits(np.asarray(found), np.asarray(attention(x)))


SHARDED = """
import jax, numpy as np, cyflash
devices = jax.devices("cpu")
x = jax.device_put(np.ones((2, 8, 16), np.float32), devices[1])
assert cyflash.flash_attention(x, x, x).devices() == {devices[1]}
mesh = jax.sharding.Mesh(np.array(devices), ("heads",))
x = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("heads")))
try:
    cyflash.flash_attention(x, x, x)
except TypeError as error:
    print(error)
"""


def test_jax_arrays_of_several_devices():
    pytest.importorskip("jax")
    import os

    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("q: expected an array on one CPU device, got one on cpu:0, cpu:1; pass jax")


class Elsewhere(DLPack):
    """On a device that is neither the CPU nor CUDA."""

    def __dlpack_device__(self):
        return 8, 0


class Odd(DLPack):
    """DLPack that fails, and nothing else."""

    def __dlpack__(self, **options):
        raise BufferError("such a dtype has no code")


def test_other_libraries_errors():
    x = np.ones((9, 16), np.float32)
    with pytest.raises(TypeError, match=r"k: expected an array in the host's memory, got Elsewhere.*numbers 8; copy"):
        flash_attention(x, Elsewhere(x), x)
    with pytest.raises(TypeError, match="v: expected an array that NumPy can see, got Odd: such a dtype has no code"):
        flash_attention(x, x, Odd(x))
    with pytest.raises(TypeError, match="q: expected a NumPy array, got object"):
        flash_attention(object(), x, x)
    with pytest.raises(TypeError, match="positional"):
        flash_attention(*[DLPack(x)] * 4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'slope'"):
        flash_attention(DLPack(x), x, x, slope=1)


def test_bfloat16_without_ml_dtypes(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"q: 'bfloat16' needs ml_dtypes; install it with: pip install"):
        flash_attention(*[torch.ones(9, 16).bfloat16()] * 3)


def test_tensors_on_cuda_without_cupy(monkeypatch):
    """The reason is that of gpu_status. The tensor is one that says it is on CUDA: there may be no GPU here."""
    torch = pytest.importorskip("torch")

    class OnCUDA(torch.Tensor):
        is_cuda = True

        def get_device(self):
            return 0

    OnCUDA.__module__ = "torch"
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    x = torch.ones(9, 16).as_subclass(OnCUDA)
    with pytest.raises(cyflash.GPUUnavailableError, match="CuPy is not installed; install it with:") as caught:
        flash_attention(x, x, x)
    assert str(caught.value) == cyflash.gpu_status().reason
    with pytest.raises(TypeError, match=r"k: expected an array on the GPU as q is.*k.cuda\(\).*q.cpu\(\)"):
        flash_attention(x, torch.ones(9, 16), x)
    with pytest.raises(TypeError, match=r"q: expected an array on the GPU as v is.*cupy.asarray\(q\).*v.cpu\(\)"):
        flash_attention(np.ones((9, 16), np.float32), torch.ones(9, 16), x)
    with pytest.raises(NotImplementedError, match=r"lse_b: expected an array in the host's memory.*lse_b.cpu\(\)"):
        merge_states(torch.ones(9, 16), torch.ones(9), torch.ones(9, 16), x[:, 0])


# Compilers, and what is not imported


def test_torch_compile_leaves_calls_alone():
    torch = pytest.importorskip("torch")
    if sys.platform == "win32":
        pytest.skip("torch.compile needs a compiler there")
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def function(x):
        return flash_attention(x.sin(), x, x, causal=True) + 1

    x = torch.from_numpy(random(2, 9, 16))
    found = torch.compile(function, backend=backend)(x)
    assert torch.equal(found, function(x))
    assert len(graphs) == 2 and "sin" in graphs[0] and not any("numpy" in name for graph in graphs for name in graph)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="flash_attention"):
        torch.compile(function, backend=backend, fullgraph=True)(x)


def test_no_library_is_imported():
    code = (
        "import sys, numpy as np, cyflash; x = np.ones((9, 16), np.float32); cyflash.flash_attention(x, x, x); "
        "print([name for name in ('torch', 'jax', 'ml_dtypes', 'cupy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_examples_in_docstrings_are_found():
    for module, name in ((cyflash.merge, "merge_states"), (cyflash.attention, "flash_attention_int8")):
        found = {test.name: test for test in doctest.DocTestFinder().find(module)}
        assert found[f"{module.__name__}.{name}"].examples
        assert doctest.testmod(module) == (0, sum(len(test.examples) for test in found.values()))


def test_a_function_is_as_it_was():
    """Name, signature, docstring; and positional and named arguments arrive as they were given."""

    def function(a, b=2, *, c=3):
        """What it does."""
        return a, b, c

    wrapped = same_kind(function)
    assert wrapped.__doc__ == "What it does." and wrapped.__name__ == "function" and wrapped.__wrapped__ is function
    assert wrapped(1) == (1, 2, 3) and wrapped(1, c=5, b=4) == (1, 4, 5)
    x = np.ones(3)
    for a, b, c in (wrapped(DLPack(x), "b", c=[x]), wrapped(c=[x], b="b", a=DLPack(x))):
        assert type(a) is np.ndarray and a.ctypes.data == x.ctypes.data and b == "b" and c[0] is x
