"""transformers with attn_implementation "cyflash" and "cyflash-int8": the logits and texts of eager attention; rules,
not dense masks; and an error for whatever cannot be honoured."""
import copy
import doctest
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402
from transformers_models import (  # noqa: E402
    CONFIGS,
    DECODERS,
    MODELS,
    WINDOW,
    WITHOUT_SDPA,
    generated,
    in_float64,
    inputs,
    llama,
    logits,
    made,
    rms,
)

import cyflash  # noqa: E402
from cyflash.compat.transformers import attention as module_under_test  # noqa: E402
from cyflash.compat.transformers import layers, register  # noqa: E402
from cyflash.compat.transformers.masks import Mask, mask_of, visible_sides  # noqa: E402
from cyflash.quant import LayerScales, Scales  # noqa: E402

PADDINGS = [None, "left", "right"]
BROKEN = [(config.__name__, way) for config, (_, ways) in MODELS.items() for way in ways]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def plain_defaults():
    yield
    register()


def tolerance(name, padding=None):
    """Of the logits' difference from eager's: twice what sdpa's is; where a model has no sdpa, twice what eager's is
    from the same model in float64."""
    arguments = inputs(name, padding)
    eager = logits(made(name), "eager", arguments)
    if name not in WITHOUT_SDPA:
        return 2 * abs(logits(made(name), "sdpa", arguments) - eager).max()
    arguments = inputs(name)  # padding makes NaN in float64
    return 2 * abs(logits(made(name), "eager", arguments) - in_float64(name, "eager", arguments)).max()


def tolerance_int8(name):
    """Of the difference from the simulation of int8: the RMS of what int8 costs."""
    arguments = inputs(name)
    return rms(in_float64(name, "simulated int8", arguments) - in_float64(name, "eager", arguments))


# Logits


@pytest.mark.parametrize(("name", "way"), BROKEN)
def test_models_notice(name, way):
    """What the next tests rest on: attention broken in one way moves the logits by 100 x every tolerance."""
    arguments = inputs(name)
    moved = abs(logits(made(name), f"broken {way}", arguments) - logits(made(name), "eager", arguments)).max()
    assert moved > 100 * tolerance(name)
    assert moved > 100 * tolerance_int8(name)


@pytest.mark.parametrize(("name", "padding"), [
    *((name, "left") for name in CONFIGS), ("bert", "right"), ("t5", "right"),  # causal models never look to the right
])
def test_models_notice_padding(name, padding):
    arguments = inputs(name, padding)
    moved = abs(logits(made(name), "broken padding", arguments) - logits(made(name), "eager", arguments)).max()
    assert moved > 100 * tolerance(name, padding)
    assert moved > 100 * tolerance_int8(name)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_eager(name, padding):
    arguments = inputs(name, padding)
    difference = logits(made(name), "cyflash", arguments) - logits(made(name), "eager", arguments)
    assert abs(difference).max() <= tolerance(name, padding)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_int8_is_what_the_simulation_says(name, padding):
    arguments = inputs(name, padding)
    expected = in_float64(name, "simulated int8", arguments)
    found = logits(made(name), "cyflash-int8", arguments)
    assert abs(found - expected).max() <= tolerance_int8(name)
    assert rms(found - logits(made(name), "eager", arguments)) < 0.03 * rms(expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("implementation", ["cyflash", "cyflash-int8"])
def test_models_of_16_bits(dtype, implementation):
    """Against the model with the same rounded weights in float32: what the 16 bits of everything else cost as well."""
    dtype = getattr(torch, dtype)
    model, arguments = copy.deepcopy(made("mistral")).to(dtype), inputs("mistral", "left")
    expected = logits(copy.deepcopy(model).float(), "eager", arguments)
    eager = rms(logits(model, "eager", arguments) - expected)
    found = rms(logits(model, implementation, arguments) - expected)
    assert 0 < found < (1.5 * eager if implementation == "cyflash" else 1.5 * eager + 0.03 * rms(expected))


# Text


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_greedy_text_is_the_same(name, padding):
    padding = "right" if padding and name == "t5" else padding
    arguments = inputs(name, padding)
    expected = generated(made(name), "eager", arguments)
    assert len(expected[:, -20:].unique()) >= 4  # a text, not one word
    assert torch.equal(generated(made(name), "cyflash", arguments), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_text_of_int8_is_that_of_the_simulation(name):
    arguments, model = inputs(name, batch=1), made(name)
    found = generated(model, "cyflash-int8", arguments, max_new_tokens=8)
    model.double()
    try:
        assert torch.equal(generated(model, "simulated int8", arguments, max_new_tokens=8), found)
    finally:
        model.float()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_other_caches_of_transformers(name):
    """A static cache has more places than tokens; chunks of a prompt begin behind others; without a cache."""
    arguments, model = inputs(name, "left"), made(name)
    expected = generated(model, "eager", arguments)
    static = tf.StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(generated(model, "cyflash", arguments, static), expected)
    assert torch.equal(generated(model, "cyflash", arguments, prefill_chunk_size=7), expected)
    assert torch.equal(generated(model, "cyflash", arguments, use_cache=False), expected)


def test_packed_sequences_do_not_see_each_other():
    """position_ids that begin again: a pattern that becomes a dense mask."""
    ids = inputs("llama", batch=1)["input_ids"]
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    model = made("llama")
    model.set_attn_implementation("cyflash")
    packed = model(ids, position_ids=positions, use_cache=False).logits[0]
    alone = torch.cat([model(ids[:, :10]).logits[0], model(ids[:, 10:]).logits[0]])
    assert abs(packed - alone).max() < 1e-5
    assert abs(packed - model(ids, use_cache=False).logits[0]).max() > 0.1


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_ones_own(kind):
    """(B, 1, Lq, Lk): of bool, or added to the scores."""
    arguments, generator = inputs("llama"), torch.Generator().manual_seed(2)
    visible = torch.rand(2, 1, 24, 24, generator=generator) < 0.5
    visible |= torch.eye(24, dtype=torch.bool)
    added = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    if kind == "float":
        added = added + visible * torch.randn(visible.shape, generator=generator)
    model = made("llama")
    model.set_attn_implementation("eager")
    expected = model(arguments["input_ids"], attention_mask=added).logits
    model.set_attn_implementation("cyflash")
    found = model(arguments["input_ids"], attention_mask=visible if kind == "bool" else added).logits
    assert abs(found - expected).max() < 1e-5


# What the kernels are told


def calls(monkeypatch, function="attend"):
    """A list that grows by (shape of q, shape of k, options) with each call."""
    seen, original = [], getattr(module_under_test, function)

    def watched(q, k, *v, **options):
        seen.append((q.shape, getattr(k, "shape", None), options))
        return original(q, k, *v, **options)

    monkeypatch.setattr(module_under_test, function, watched)
    return seen


@pytest.mark.parametrize(("name", "windows"), [
    ("llama", [None, None]), ("mistral", [(WINDOW - 1, 0)] * 2), ("gemma2", [(WINDOW - 1, 0), None]),
    ("gpt_oss", [(WINDOW - 1, 0), None]), ("gpt2", [None, None]), ("qwen2", [None, None]),
])
def test_rules_reach_the_kernels_as_rules(name, windows, monkeypatch):
    """A prompt and the tokens after it, without padding: causal and windows, and never a mask."""
    seen = calls(monkeypatch)
    generated(made(name), "cyflash", inputs(name), max_new_tokens=4)
    assert len(seen) == 8
    for call, (q, _, options) in enumerate(seen):
        assert q[2] == (24 if call < 2 else 1)
        assert options["causal"] is True
        assert options["window"] == windows[call % 2]
        assert options.keys() <= {"causal", "window", "scale", "softcap", "sinks", "out", "out_is_new"}


@pytest.mark.parametrize(("name", "padding"), [("mistral", "left"), ("llama", "right"), ("bert", "right")])
def test_padding_is_one_row_of_a_mask(name, padding, monkeypatch):
    seen = calls(monkeypatch)
    logits(made(name), "cyflash", inputs(name, padding))
    assert len(seen) == 2
    for _, _, options in seen:
        assert options["causal"] is (name != "bert")
        assert options["mask"].shape == (2, 1, 1, 24)


def test_a_static_cache_is_read_as_far_as_it_is_filled(monkeypatch):
    seen = calls(monkeypatch)
    static = tf.StaticCache(config=made("llama").config, max_cache_len=64)
    generated(made("llama"), "cyflash", inputs("llama"), static, max_new_tokens=3)
    assert [k[2] for _, k, _ in seen] == [24, 24, 25, 25, 26, 26]
    assert all("mask" not in options for _, _, options in seen)


def test_nothing_is_copied(monkeypatch):
    """The arrays are the tensors' memory, transposed as the model has them; the output is written where it stays."""
    seen, tensors, original = [], [], module_under_test.attend

    def watched(q, k, v, *, out, **options):
        seen.append([q, k, v, out])
        return original(q, k, v, out=out, **options)

    def remembering(module, query, key, value, mask, **options):
        result = module_under_test.attention(module, query, key, value, mask, **options)
        tensors.append([query, key, value, result[0].transpose(1, 2)])
        return result

    monkeypatch.setattr(module_under_test, "attend", watched)
    tf.AttentionInterface.register("remembering", remembering)
    tf.AttentionMaskInterface.register("remembering", mask_of)
    for dtype in (torch.float32, torch.bfloat16):
        logits(copy.deepcopy(made("llama")).to(dtype), "remembering", inputs("llama"))
    assert len(seen) == 4
    for arrays, sources in zip(seen, tensors, strict=True):
        for x, tensor in zip(arrays, sources, strict=True):
            assert x.ctypes.data == tensor.data_ptr()
            assert x.shape == tuple(tensor.shape)
            assert [step // x.itemsize for step in x.strides] == list(tensor.stride())


# Masks


def expected_mask(q_length, kv_length, q_offset, kv_offset, function, padding=None):
    return masking_utils.sdpa_mask(
        2, q_length, kv_length, q_offset, kv_offset, function, padding, allow_is_causal_skip=False
    )


FUNCTIONS = {
    "causal": (masking_utils.causal_mask_function, (-1, 0)),
    "bidirectional": (masking_utils.bidirectional_mask_function, (-1, -1)),
    "window": (masking_utils.sliding_window_causal_mask_function(3), (2, 0)),
    "window both ways": (masking_utils.sliding_window_bidirectional_mask_function(3), (3, 3)),
    "two windows": (
        masking_utils.and_masks(
            masking_utils.sliding_window_overlay(3), masking_utils.sliding_window_causal_mask_function(4)
        ),
        (2, 0),
    ),
    "chunks": (masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=int)), None),
    "either": (masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 2), None),
    "a model's own": (lambda b, h, q, k: (q + k) % 2 == 0, None),
}
PLACES = {
    "whole": (6, 6, 0, 0), "later": (2, 6, 4, 0), "given up": (2, 4, 7, 5), "room": (3, 9, 2, 0), "one": (1, 6, 5, 0),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_is_what_transformers_says(name, place, padded):
    """As a dense tensor, for whoever looks at it; and as the options that the kernels get."""
    function, sides = FUNCTIONS[name]
    sizes = PLACES[place]
    padding = torch.ones(2, sizes[2] + sizes[0], dtype=torch.bool)
    padding[1, :3] = False
    padding = padding if padded else None
    expected = expected_mask(*sizes, function, padding)
    found = mask_of(2, *sizes, function, padding)
    assert visible_sides(function) == sides
    known = sides is not None and (sides[1] <= 0 or place != "room")
    assert isinstance(found, Mask) is known
    assert found.shape == expected.shape == (2, 1, *sizes[:2])
    if known:
        keys, options = found.options()
        x = np.eye(sizes[1], dtype=np.float32)[None, None].repeat(2, 0)
        q = np.zeros((2, 1, sizes[0], sizes[1]), np.float32)
        weights = cyflash.flash_attention(q, x[:, :, :keys], x[:, :, :keys], **options)
        assert np.array_equal(weights > 0, expected.numpy())
    assert torch.equal(found | torch.zeros((), dtype=torch.bool), expected)


def test_a_mask_that_was_written_to_counts_as_written():
    mask = mask_of(2, 4, 4)
    mask[:, :, 3, 0] = False
    assert not mask.dense()[0, 0, 3, 0]
    x = torch.randn(2, 4, 4, 16)
    module = torch.nn.Module()
    found, _ = module_under_test.attention(module, x, x, x, mask)
    plain, _ = module_under_test.attention(module, x, x, x, mask.dense().clone())
    untouched, _ = module_under_test.attention(module, x, x, x, mask_of(2, 4, 4))
    assert torch.equal(found, plain)
    assert not torch.equal(found, untouched)
    assert repr(mask) == "Mask((2, 1, 4, 4), left=-1, right=0, offset=0)"


# Without masks


def test_models_without_masks_rely_on_is_causal():
    q, k = torch.randn(1, 4, 6, 16), torch.randn(1, 4, 9, 16)
    module = torch.nn.Module()

    def near(found, **options):
        expected = torch.nn.functional.scaled_dot_product_attention(*options.pop("qkv"), **options)
        assert abs(found[0].transpose(1, 2) - expected).max() < 1e-6

    near(module_under_test.attention(module, q, q, q, None), qkv=(q, q, q), is_causal=True)
    near(module_under_test.attention(module, q, k, k, None, is_causal=False), qkv=(q, k, k))
    near(module_under_test.attention(module, q[:, :, :1], k, k, None), qkv=(q[:, :, :1], k, k))
    module.is_causal = False
    near(module_under_test.attention(module, q, k, k, None), qkv=(q, k, k))
    near(module_under_test.attention(module, q, q, q, None, is_causal=True), qkv=(q, q, q), is_causal=True)
    with pytest.raises(ValueError, match="attention_mask: expected one for 6 queries and 9 keys"):
        module_under_test.attention(module, q, k, k, None, is_causal=True)
    with pytest.raises(ValueError, match="attention_mask: expected one with sliding_window=4"):
        module_under_test.attention(module, q, k, k, None, sliding_window=4)


# int8 as `register` says


def options_given(monkeypatch, model, **how):
    seen = calls(monkeypatch, "attend_int8")
    register(**how)
    logits(model, "cyflash-int8", inputs("llama"))
    return [{name: options.get(name) for name in (*layers.OPTIONS, "quant")} for _, _, options in seen]


def test_int8_options(monkeypatch):
    nothing = dict.fromkeys((*layers.OPTIONS, "quant"))
    assert options_given(monkeypatch, made("llama")) == [nothing] * 2
    how = {"granularity": "head", "smooth_k": False, "fp32_sinks": 2, "pv": "bf16"}
    assert options_given(monkeypatch, made("llama"), int8=how) == [nothing | how] * 2


def scales_for(model, **how):
    names = [name for name in dict(model.named_modules()) if name.endswith("self_attn")]
    return Scales({name: LayerScales(0.03 + 0.001 * i, 0.03, 0.03, **how) for i, name in enumerate(names)})


def test_int8_scales_of_a_model(monkeypatch, tmp_path):
    model, other = copy.deepcopy(made("llama")), made("llama")
    scales = scales_for(model)
    register(model, int8=scales.save(tmp_path / "scales.safetensors"))
    assert model.config._attn_implementation == "cyflash-int8"
    seen = calls(monkeypatch, "attend_int8")
    logits(copy.deepcopy(model), "cyflash-int8", inputs("llama"))
    assert [options["quant"].q_scale for _, _, options in seen] == [np.float32(0.03), np.float32(0.031)]
    logits(other, "cyflash-int8", inputs("llama"))  # another model has none of this
    assert "quant" not in seen[-1][2]
    register(model)
    assert model.config._attn_implementation == "cyflash"
    model.set_attn_implementation("cyflash-int8")
    logits(model, "cyflash-int8", inputs("llama"))
    assert "quant" not in seen[-1][2]


def test_int8_that_does_not_fit():
    model = copy.deepcopy(made("llama"))
    with pytest.raises(ValueError, match=r"model: expected the model .* register\(model"):
        register(int8=scales_for(model))
    with pytest.raises(ValueError, match=r"layers, model.layers.0.self_attn, .*; got those of encoder.layer.0"):
        register(model, int8=Scales({"encoder.layer.0": LayerScales(1, 1, 1)}))
    with pytest.raises(TypeError, match=r"int8: expected Scales, the path of their file, or a mapping.*got float"):
        register(model, int8=0.5)
    with pytest.raises(ValueError, match=r"int8: expected options among granularity.*got 'q_scale'"):
        register(int8={"q_scale": 1})
    with pytest.raises(FileNotFoundError):
        register(model, int8="nowhere.safetensors")
    register(model, int8=Scales({"model.layers.0.self_attn": LayerScales(1, 1, 1)}))
    with pytest.raises(ValueError, match=r"scales of the layer 'model.layers.1.self_attn'; there are those of"):
        logits(model, "cyflash-int8", inputs("llama"))


# What cannot be honoured


def test_attentions_cannot_be_looked_at():
    for name in ("llama", "gpt2", "bert", "t5"):
        made(name).set_attn_implementation("cyflash")
        with pytest.raises(NotImplementedError, match=r"output_attentions: .*eager"), torch.no_grad():
            made(name)(**inputs(name), output_attentions=True)
    made("llama")(**inputs("llama"), output_hidden_states=True, output_attentions=False)


def test_no_gradients():
    model = copy.deepcopy(made("llama")).requires_grad_(True)
    model.set_attn_implementation("cyflash")
    with pytest.raises(NotImplementedError, match=r"query: .*torch.no_grad\(\).*query.detach\(\)"):
        model(**inputs("llama"))
    with torch.inference_mode():
        model(**inputs("llama"))


def test_no_dropout():
    config = llama()
    config.attention_dropout = 0.1
    model = tf.LlamaForCausalLM(config).requires_grad_(False)
    model.set_attn_implementation("cyflash")
    model.eval()(**inputs("llama"))
    model.train()
    with pytest.raises(NotImplementedError, match=r"dropout: expected 0, got 0.1: .*model.eval\(\)"):
        model(**inputs("llama"))


@pytest.mark.parametrize(("name", "value", "message"), [
    ("head_mask", torch.ones(4), "head_mask: .*eager"),
    ("cu_seq_lens_q", torch.tensor([0, 4]), "cu_seq_lens_q: .*position_ids"),
    ("cache", object(), "cache: .*continuous batching"),
    ("score_mod", max, "score_mod: cyflash's attention cannot honour it"),
])
def test_unknown_arguments(name, value, message):
    x = torch.randn(1, 4, 4, 16)
    module_under_test.attention(torch.nn.Module(), x, x, x, None, **{name: None}, use_cache=True, position_ids=x)
    with pytest.raises(NotImplementedError, match=message):
        module_under_test.attention(torch.nn.Module(), x, x, x, None, **{name: value})


@pytest.mark.parametrize("shape", [(24, 24), (3, 1, 24, 24), (2, 1, 24, 25), (2, 24)])
def test_masks_of_a_wrong_shape(shape):
    q = torch.randn(2, 4, 24, 16)
    with pytest.raises(ValueError, match=r"attention_mask: expected .* \(2, 4, 24, 24\), got"):
        module_under_test.attention(torch.nn.Module(), q, q, q, torch.ones(shape, dtype=torch.bool))


def test_other_tensors():
    x = torch.randn(1, 4, 4, 16)
    with pytest.raises(NotImplementedError, match=r"query: expected a tensor on the CPU, got one on meta.*model.to"):
        module_under_test.attention(torch.nn.Module(), x.to("meta"), x, x, None)
    with pytest.raises(TypeError, match="float64"):
        module_under_test.attention(torch.nn.Module(), *[x.double()] * 3, None)


# Names


def test_the_name_is_not_taken_for_flash_attention():
    """transformers looks for "flash" in names; gpt-oss would take a kernel of its own instead, T5 would refuse."""
    from transformers.utils import generic

    for name, config in CONFIGS.items():
        made_so = MODELS[config][0]._from_config(config(), attn_implementation="cyflash")
        assert made_so.config._attn_implementation == "cyflash", name
    later = importlib.import_module("transformers.models.falcon.modeling_falcon")  # a module that asks, imported since
    for module in (generic, masking_utils, later):
        function = module.is_flash_attention_requested
        assert not function(requested_attention_implementation="cyflash-int8")
        assert function(requested_attention_implementation="flash_attention_2")
        assert not function(requested_attention_implementation=None)
        with pytest.raises(ValueError, match="ambiguous"):
            function(config=made("llama").config, requested_attention_implementation="cyflash")


def test_compiled_models_break_the_graph_at_attention():
    model, arguments = copy.deepcopy(made("mistral")), inputs("mistral", "left")
    expected = logits(model, "cyflash", arguments)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        found = compiled(**arguments).logits.double()[arguments["attention_mask"].bool()].numpy()
    assert abs(found - expected).max() < 1e-5


# Documents


@pytest.mark.parametrize("name", ["registry", "cache", "capture"])
def test_examples_of_the_docstrings(name):
    module = importlib.import_module(f"cyflash.compat.transformers.{name}")
    found = doctest.testmod(module)
    assert found.attempted > 5 and not found.failed


def test_the_readme_runs(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = readme.partition("## Models of transformers")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.S)
    made("llama").save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    names = {"FOLDER": tmp_path / "model", "tokens": inputs("llama", "left"), "texts": inputs("llama", batch=4)}
    exec(block, names)
    assert names["text"].shape[1] > 24
    assert names["model"].config._attn_implementation == "cyflash-int8"
    assert list(Scales.load("scales.safetensors")) == [f"model.layers.{i}.self_attn" for i in range(2)]
