"""sdpa_context: torch's function by cyflash, eager and compiled, in torch's own modules; what is refused; threads.

Before a result is compared, what the test is about is shown to move it: leaving an option out, or the attention.
"""
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as bound_before  # noqa: E402

import cyflash  # noqa: E402
from cyflash.compat import torch as compat  # noqa: E402
from cyflash.compat.torch import sdpa_context  # noqa: E402
from cyflash.quant import LayerScales, Scales  # noqa: E402

TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about nested tensors


def random(*shape, dtype=torch.float32, seed=0):
    x = np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)
    return torch.from_numpy(x).to(dtype)


def bools(*shape):
    keep = torch.from_numpy(np.random.default_rng(shape).random(shape) > 0.4)
    keep[..., 0] = True
    return keep


@pytest.fixture
def calls(monkeypatch):
    """What cyflash was called with."""
    seen, real = [], compat._compute

    def spy(*arguments):
        seen.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(compat, "_compute", spy)
    return seen


@pytest.fixture(autouse=True)
def no_gradients():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    assert torch.backends.mha.get_fastpath_enabled() and not compat._of_thread.contexts


def near(found, expected, tolerance):
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found.double() - expected.double()).abs().max()) <= tolerance


# One function with options

QKV = ((2, 4, 9, 16), (2, 4, 12, 16), (2, 4, 12, 8))
GQA = ((2, 4, 9, 16), (2, 2, 12, 16), (2, 2, 12, 8))
FEW_KEYS = ((2, 4, 12, 16), (2, 4, 9, 16), (2, 4, 9, 8))

# {name: (shapes, options, those without the one that the case is about)}; {} is without any
CASES = {
    "is_causal": (QKV, {"is_causal": True}, {}),
    "is_causal with fewer keys": (FEW_KEYS, {"is_causal": True}, {}),
    "scale": (QKV, {"scale": 0.9}, {}),
    "bool mask": (QKV, {"attn_mask": bools(2, 4, 9, 12)}, {}),
    "padding": (QKV, {"attn_mask": bools(2, 1, 1, 12)}, {}),
    "expanded mask": (QKV, {"attn_mask": bools(2, 1, 1, 12).expand(2, 4, 9, 12)}, {}),
    "transposed mask": (QKV, {"attn_mask": bools(12, 9).t()}, {}),
    "float mask": (QKV, {"attn_mask": 2 * random(4, 9, 12)}, {}),
    "float mask with infinity": (QKV, {"attn_mask": torch.where(bools(9, 12), 0.0, -torch.inf)}, {}),
    "heads": (GQA, {"enable_gqa": True, "is_causal": True}, {"enable_gqa": True}),
    "heads and mask": (GQA, {"enable_gqa": True, "attn_mask": bools(2, 1, 9, 12), "scale": 0.4},
                       {"enable_gqa": True, "scale": 0.4}),
    "one head": (((4, 9, 16), (4, 12, 16), (4, 12, 8)), {"attn_mask": bools(9, 12)}, {}),
    "five axes": (((3, 2, 4, 9, 16), (3, 1, 4, 12, 16), (1, 2, 4, 12, 8)), {"is_causal": True}, {}),
}  # fmt: skip


def inputs(shapes, dtype):
    """Strided, as models have them: heads are an axis further in."""
    return [random(*shape, dtype=dtype, seed=n).transpose(-2, -3).contiguous().transpose(-2, -3)
            for n, shape in enumerate(shapes)]  # fmt: skip


def as_masks_are(options, dtype):
    return {name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for name, x in options.items()}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_option(calls, name, dtype):
    shapes, options, less = CASES[name]
    options, tolerance = as_masks_are(options, dtype), TOLERANCES[dtype]
    q, k, v = inputs(shapes, dtype)
    exact = F.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)), **{n: x.double() if n == "attn_mask" and x.dtype == dtype else x
                                             for n, x in options.items()}
    )  # fmt: skip
    with sdpa_context():
        found = F.scaled_dot_product_attention(q, k, v, **options)
        without = F.scaled_dot_product_attention(q, k, v, **less)
    assert len(calls) == 2 and all(call[0].data_ptr() == q.data_ptr() for call in calls)
    assert (without.double() - exact).abs().max() > 20 * tolerance
    assert found.dtype == dtype and near(found.double(), exact, tolerance)
    assert near(found, F.scaled_dot_product_attention(q, k, v, **options), 2 * tolerance)


class Attention(nn.Module):
    """What models of today do."""

    def __init__(self, heads=4, kv_heads=2, head_dim=16):
        super().__init__()
        self.sizes, self.head_dim = (heads, kv_heads, kv_heads), head_dim
        self.qkv = nn.Linear(32, head_dim * sum(self.sizes))
        self.out = nn.Linear(head_dim * heads, 32)

    def forward(self, x, **options):
        split = self.qkv(x).split([n * self.head_dim for n in self.sizes], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in split)
        found = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        return self.out(found.transpose(1, 2).flatten(-2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x, **options):
        for layer in self.layers:
            x = x + layer(x, **options)
        return x


def compiled(function, graphs):
    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    return torch.compile(function, fullgraph=True, backend=backend)


OPTIONS = {"is_causal": True}, {"attn_mask": bools(2, 1, 1, 20)}, {"attn_mask": 3 * random(20, 20)}, {"scale": 0.6}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_a_compiled_model_gives_the_same_numbers(calls, options, dtype):
    model, x, options = Model().to(dtype).eval(), 2 * random(2, 20, 32, dtype=dtype), as_masks_are(options, dtype)
    graphs = []
    fast = compiled(model, graphs)
    before = fast(x, **options)
    assert len(graphs) == 1 and not calls
    with sdpa_context():
        expected = model(x, **options)
        moved = (model(x) - expected).abs().max()
        calls.clear()
        found = fast(x, **options)
        assert len(calls) == 2  # the operator ran
    assert moved > 2 * TOLERANCES[dtype] and torch.equal(found, expected)
    assert len(graphs) == 2 and sum("cyflash.attention" in name for name in graphs[1]) == 2
    calls.clear()
    assert torch.equal(fast(x, **options), before) and len(graphs) == 2 and not calls  # without it, as it was


@pytest.mark.slow
def test_inductor(calls):
    """torch.compile's own backend, with lengths that change."""
    model, graph = Model().eval(), []
    fast = torch.compile(model, fullgraph=True, dynamic=True)
    with sdpa_context():
        for length in (20, 33, 47):
            x = random(2, length, 32)
            assert near(fast(x, is_causal=True), model(x, is_causal=True), 1e-5) and not graph


def test_the_operator_obeys_its_rules():
    """Its schema, its shapes and strides without values, and that it is not differentiable, by torch's own checks."""
    q, k, v = inputs(GQA, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
    exact = (None, True, None, True, "exact", None, None, 1)
    for options in (exact, (bools(9, 12), False, 0.3, True, "int8", "bf16", None, None)):
        torch.library.opcheck(torch.ops.cyflash.attention.default, (q, k, v, *options), test_utils=tests)
    q = inputs(((3, 2, 4, 9, 16), (3, 1, 4, 12, 16), (1, 2, 4, 12, 8)), torch.bfloat16)
    arguments = (*q, None, False, None, False, "exact", None, None, None)
    torch.library.opcheck(torch.ops.cyflash.attention.default, arguments, test_utils=tests)


def test_exported_programs_have_the_operator(calls):
    model, x = Model().eval(), random(2, 20, 32)
    with sdpa_context():
        program = torch.export.export(model, (x,), {"is_causal": True})
        expected = model(x, is_causal=True)
    assert sum("cyflash.attention" in str(node.target) for node in program.graph.nodes) == 2
    calls.clear()
    assert torch.equal(program.module()(x, is_causal=True), expected) and len(calls) == 2


# torch's own modules


def _modules():
    torch.manual_seed(0)
    layer = {"d_model": 64, "nhead": 4, "batch_first": True}
    encoder = nn.TransformerEncoderLayer(**layer).eval()
    heads = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2, enable_nested_tensor=False).eval()
    decoder = nn.TransformerDecoderLayer(**layer).eval()
    odd = nn.MultiheadAttention(64, 4, kdim=24, vdim=40, add_bias_kv=True, add_zero_attn=True).eval()
    causal, padding = nn.Transformer.generate_square_subsequent_mask(10), ~bools(2, 10)
    attention = {"need_weights": False}
    # {name: (function of x and options, options, calls)}
    return {
        "MultiheadAttention": (lambda x, **o: heads(x, x, x, **attention, **o)[0], {"key_padding_mask": padding}, 1),
        "MultiheadAttention, causal": (
            lambda x, **o: heads(x, x, x, **attention, **o)[0], {"attn_mask": causal, "is_causal": True}, 1),
        "other sizes": (
            lambda x, **o: odd(x, x[:12, :, :24], x[:12, :, :40], **attention, **o)[0],
            {"key_padding_mask": ~bools(10, 2)}, 1),
        "TransformerEncoderLayer": (encoder, {"src_key_padding_mask": padding}, 1),
        "TransformerEncoder": (stack, {"mask": causal, "is_causal": True}, 2),
        "TransformerDecoderLayer": (
            lambda x, **o: decoder(x, x.flip(1), **o), {"memory_key_padding_mask": padding, "tgt_mask": causal}, 2),
    }  # fmt: skip


MODULES = _modules()


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torch(calls, monkeypatch, name):
    """In eval mode, where torch would run fused layers: these call no scaled_dot_product_attention."""
    function, options, count = MODULES[name]
    x = 2 * random(2, 10, 64)
    expected = function(x, **options)
    assert not calls
    with sdpa_context():
        found = function(x, **options)
        assert len(calls) == count
        moved = (function(x) - found).abs().max()
        graphs = []
        again = compiled(lambda x: function(x, **options), graphs)(x)
        assert sum("cyflash.attention" in one for one in graphs[0]) == count
    assert moved > 1e-3 and near(found, expected, 1e-5) and near(again, found, 1e-6)
    monkeypatch.setattr(compat, "_compute", lambda q, k, v, *rest: torch.zeros(*q.shape[:-1], v.shape[-1]))
    with sdpa_context():
        assert (function(x, **options) - expected).abs().max() > 1e-2  # it was this attention


def test_a_padded_encoder_with_nested_tensors(calls):
    """torch cuts padding off where its fused layers run, so the rows that count are compared."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, batch_first=True), 2).eval()
    x, padding = 2 * random(2, 10, 64), torch.arange(10) >= torch.tensor([[6], [10]])
    expected = encoder(x, src_key_padding_mask=padding)
    with sdpa_context():
        found = encoder(x, src_key_padding_mask=padding)
        assert len(calls) == 2 and (encoder(x) - found).abs().max() > 1e-2
    assert near(found[~padding], expected[~padding], 1e-5)


def test_weights_that_are_asked_for_are_torchs(calls):
    function, x = nn.MultiheadAttention(64, 4, batch_first=True).eval(), random(2, 10, 64)
    expected = function(x, x, x)
    with sdpa_context():
        found = function(x, x, x)
    assert not calls and all(near(a, b, 1e-6) for a, b in zip(found, expected, strict=True))


# int8


def test_int8_is_that_of_flash_attention_int8(calls):
    q, k, v = (random(2, 4, 40, 32, seed=n) for n in range(3))
    layer = LayerScales(0.02, 0.03, 0.025, fp32_sinks=2)
    settings = {
        "token": ({}, {}), "bf16": ({"pv": "bf16"}, {"pv": "bf16"}), "static": ({"scales": layer}, {"quant": layer}),
    }  # fmt: skip
    results = {}
    for name, (given, meant) in settings.items():
        with sdpa_context("int8", **given):
            results[name] = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        expected = cyflash.flash_attention_int8(q, k, v, causal=True, **meant)
        assert torch.equal(results[name], expected)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    errors = {name: float((x - exact).abs().sum() / exact.abs().sum()) for name, x in results.items()}
    assert len(set(errors.values())) == 3 and all(1e-5 < error < 0.05 for error in errors.values()), errors


@pytest.mark.parametrize("compiles", [False, True])
def test_scales_of_layers(calls, tmp_path, compiles):
    model, x = Model().eval(), random(2, 20, 32)
    layers = [LayerScales(0.01, 0.011, 0.012), LayerScales(0.03, 0.02, 0.02)]
    names = ["layers.0", "layers.1"]
    scales = Scales(dict(zip(names, layers, strict=True)))
    swapped = Scales(dict(zip(names, layers[::-1], strict=True)))
    graphs = []
    run = compiled(model, graphs) if compiles else model
    results = []
    for given in (scales, swapped, scales.save(tmp_path / "scales.safetensors"), layers[0]):
        context = sdpa_context("int8", scales=given, **({} if given is layers[0] else {"model": model}))
        for _ in range(2):  # a context may be used again
            calls.clear()
            with context:
                results.append(run(x, is_causal=True))
            used = [float(compat._layer_of[call[-2]].q_scale) for call in calls]
            wanted = [0.03, 0.01] if given is swapped else [0.01, 0.01] if given is layers[0] else [0.01, 0.03]
            assert used == pytest.approx(wanted)
    a, again, b, _, c, _, d, _ = results
    assert torch.equal(a, again) and torch.equal(a, c)
    assert (a - b).abs().max() > 1e-3 and (a - d).abs().max() > 1e-4
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_layers_that_run_elsewhere():
    """Another thread runs the same model; a call outside of the layers says so; an error in a layer ends it."""
    model, x = Model().eval(), random(2, 20, 32)
    layer = LayerScales(0.01, 0.01, 0.01)
    context = sdpa_context("int8", scales=Scales({"layers.0": layer, "layers.1": layer}), model=model)
    expected, found = model(x), []
    with context:
        other = threading.Thread(target=lambda: found.append(model(x)))
        other.start()
        other.join()
        assert not context._running
        with pytest.raises(RuntimeError, match=r"within a layer of the scales, got one outside.*layers.0, layers.1"):
            F.scaled_dot_product_attention(*[random(2, 4, 9, 16)] * 3)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(x[..., :3])
        assert not context._running and not torch.equal(model(x), expected)
    assert near(found[0], expected, 1e-6)


# What is refused


def _refused():
    q = random(2, 4, 9, 16)
    grad = q.clone().requires_grad_()
    yield "dropout", (q, q, q), {"dropout_p": 0.1}, "dropout is not implemented, got dropout_p=0.1.*model.eval()"
    for n, name in enumerate(("query", "key", "value")):
        arguments = [q, q, q]
        arguments[n] = grad
        yield f"gradient of {name}", arguments, {}, r"gradients are not computed.*torch.no_grad\(\)"
    yield "gradient of the mask", (q, q, q), {"attn_mask": torch.zeros(9, 9, requires_grad=True)}, "gradients are not"
    yield "float64", [q.double()] * 3, {}, "expected float32, float16 or bfloat16.*torch.float64"
    yield "subclass", [q.as_subclass(type("Mine", (torch.Tensor,), {}))] * 3, {}, "expected plain tensors, got Mine"
    nested = torch.nested.nested_tensor([random(9, 4, 16), random(5, 4, 16)], layout=torch.jagged).transpose(1, 2)
    yield "nested", [nested] * 3, {}, "expected plain tensors, got NestedTensor"


REFUSED = [name for name, *_ in _refused()]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured(calls, name):
    arguments, options, words = next(rest for one, *rest in _refused() if one == name)
    with torch.enable_grad():
        torch.manual_seed(0)
        expected = F.scaled_dot_product_attention(*arguments, **options)
        words = f"scaled_dot_product_attention: .*{words}"
        with sdpa_context(), pytest.raises(NotImplementedError, match=words) as error:
            F.scaled_dot_product_attention(*arguments, **options)
        assert "fallback='torch'" in str(error.value)
        torch.manual_seed(0)
        with sdpa_context(fallback="torch"):
            found = F.scaled_dot_product_attention(*arguments, **options)
        assert not calls and found.requires_grad == expected.requires_grad
        if not found.is_nested:
            assert torch.equal(found, expected)
        with sdpa_context(fallback="torch"):
            F.scaled_dot_product_attention(*[random(2, 4, 9, 16)] * 3)
        assert len(calls) == 1  # others are still ours


def test_unlike_dtypes_and_masks():
    q = random(2, 4, 9, 16)
    with sdpa_context():
        with pytest.raises(NotImplementedError, match=r"the same for query, key and value.*float32, torch\.bfloat16"):
            F.scaled_dot_product_attention(q, q.bfloat16(), q)
        with pytest.raises(NotImplementedError, match=r"attn_mask of bool, float32 or .*got torch\.float16"):
            F.scaled_dot_product_attention(q, q, q, random(9, 9).half())
        with pytest.raises(ValueError, match="attn_mask: expected None with is_causal=True"):
            F.scaled_dot_product_attention(q, q, q, bools(9, 9), is_causal=True)
        with pytest.raises(ValueError, match="attn_mask: expected a shape that broadcasts"):
            F.scaled_dot_product_attention(q, q, q, bools(9, 8))
        with pytest.raises(ValueError, match="pass enable_gqa=True"):
            F.scaled_dot_product_attention(q, q[:, :2], q[:, :2])


def test_gradients_in_a_compiled_model():
    model, x = Model(), random(2, 20, 32)
    with torch.enable_grad(), sdpa_context(), pytest.raises(Exception, match="gradients are not computed"):
        compiled(model, [])(x)
    graphs = []
    with torch.enable_grad(), sdpa_context(fallback="torch"):
        compiled(model, graphs)(x).sum().backward()
    assert model.layers[0].qkv.weight.grad.any() and not any("cyflash" in name for name in graphs[0])


def test_other_devices_are_torchs(calls):
    q = torch.empty(2, 4, 9, 16, device="meta")
    with sdpa_context():
        assert F.scaled_dot_product_attention(q, q, q).device.type == "meta"
    assert not calls


def test_fused_layers_say_so():
    """Where somebody turned them on again."""
    encoder, x = nn.TransformerEncoderLayer(64, 4, batch_first=True).eval(), random(2, 10, 64)
    for fallback in ("error", "torch"):
        with sdpa_context(fallback=fallback):
            torch.backends.mha.set_fastpath_enabled(True)
            if fallback == "torch":
                assert compiled(encoder, [])(x).shape == x.shape
            else:
                with pytest.raises(Exception, match="_transformer_encoder_layer_fwd: this fused layer"):
                    compiled(encoder, [])(x)


OF_A = Scales({"a": LayerScales(1.0)})
OF_ANOTHER = Scales({"layers.0": LayerScales(1.0), "h.1": LayerScales(1.0)})
ARGUMENTS = {
    "precision": (ValueError, {"precision": "fp8"}, "precision: expected 'exact' or 'int8', got 'fp8'"),
    "fallback": (ValueError, {"fallback": None}, "fallback: expected 'error' or 'torch', got None"),
    "scales without int8": (ValueError, {"scales": LayerScales(1.0)}, "scales: expected None with precision='exact'"),
    "pv without int8": (ValueError, {"pv": "bf16"}, "pv: expected None with precision='exact'"),
    "pv": (ValueError, {"precision": "int8", "pv": "fp16"}, "pv: expected one of 'int8', 'bf16', 'fp32', got 'fp16'"),
    "num_threads": (ValueError, {"num_threads": 0}, "num_threads: expected"),
    "scales": (TypeError, {"precision": "int8", "scales": 0.1}, "scales: expected a LayerScales, a Scales or the path"),
    "no model": (TypeError, {"precision": "int8", "scales": OF_A}, "model: expected the torch.nn.Module"),
    "model alone": (TypeError, {"model": nn.Linear(1, 1)}, "model: expected None without the Scales of layers"),
    "another model": (
        ValueError, {"precision": "int8", "scales": OF_ANOTHER, "model": Model()},
        "scales: expected names of the model's submodules, got layers that are none: h.1; the model has layers,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    error, options, words = ARGUMENTS[name]
    with pytest.raises(error) as caught:
        sdpa_context(**options)
    assert str(caught.value).startswith(words)


def test_pv_beside_scales():
    q = random(2, 4, 40, 16)
    results = []
    for pv in ("int8", "fp32"):
        with sdpa_context("int8", scales=LayerScales(0.03, 0.03, 0.03, pv="int8"), pv=pv):
            results.append(F.scaled_dot_product_attention(q, q, q))
    assert not torch.equal(*results)


# Contexts


def test_every_name_is_seen_and_all_is_as_it_was_afterwards(calls):
    q = random(2, 4, 9, 16)
    before = F.scaled_dot_product_attention
    for function in (F.scaled_dot_product_attention, bound_before, torch._C._nn.scaled_dot_product_attention):
        calls.clear()
        with sdpa_context():
            found = function(q, q, q)
        assert len(calls) == 1 and near(found, function(q, q, q), 3e-6) and len(calls) == 1
    with pytest.raises(ZeroDivisionError), sdpa_context():
        assert not torch.backends.mha.get_fastpath_enabled()
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is before
    F.scaled_dot_product_attention(q, q, q)
    assert len(calls) == 1


def test_contexts_within_each_other(calls):
    """The innermost counts, also for what it hands over, and within multi_head_attention_forward."""
    q, heads = random(2, 4, 9, 16), nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x = random(2, 9, 64)
    with sdpa_context():
        with sdpa_context("int8", fallback="torch"):
            F.scaled_dot_product_attention(q, q, q)
            heads(x, x, x, need_weights=False)
            F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
            assert [call[7] for call in calls] == ["int8", "int8"]
        F.scaled_dot_product_attention(q, q, q)
        assert calls[-1][7] == "exact" and not torch.backends.mha.get_fastpath_enabled()
        with pytest.raises(NotImplementedError):
            F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
    context = sdpa_context()
    with context, pytest.raises(RuntimeError, match="expected one that nobody is in, got one that was entered already"):
        context.__enter__()
    with context:
        F.scaled_dot_product_attention(q, q, q)
    assert len(calls) == 4


def test_threads_have_contexts_of_their_own(calls):
    """Without one a thread is torch's; two with different ones at the same time get what they asked for."""
    q = random(2, 4, 64, 32)
    expected = {None: F.scaled_dot_product_attention(q, q, q)}
    for precision in ("exact", "int8"):
        with sdpa_context(precision):
            expected[precision] = F.scaled_dot_product_attention(q, q, q)
    assert not torch.equal(expected["exact"], expected["int8"]) and not torch.equal(expected["exact"], expected[None])
    calls.clear()
    barrier, wrong = threading.Barrier(3), []

    def run(precision):
        with torch.no_grad():
            for _ in range(20):
                barrier.wait()
                if precision is None:
                    found = F.scaled_dot_product_attention(q, q, q)
                else:
                    with sdpa_context(precision):
                        found = F.scaled_dot_product_attention(q, q, q)
                if not torch.equal(found, expected[precision]):
                    wrong.append(precision)

    threads = [threading.Thread(target=run, args=(precision,)) for precision in (None, "exact", "int8")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(calls) == 40


def test_fused_layers_stay_off_when_they_were():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_context():
            pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_num_threads_arrives(calls):
    q = random(2, 4, 9, 16)
    with sdpa_context(num_threads=2):
        F.scaled_dot_product_attention(q, q, q)
    assert calls[0][-1] == 2
