"""A Cache of cyflash in generate: the same texts as with transformers' own caches, each token taken in once, by beams,
drafts, padded batches and sliding windows; and errors where it is not understood."""
import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tf = pytest.importorskip("transformers")

from transformers_models import DECODERS, WINDOW, generated, inputs, logits, made, rms  # noqa: E402

import cyflash  # noqa: E402
from cyflash.compat.transformers import Cache, capture, register  # noqa: E402
from cyflash.quant import LayerScales, Scales  # noqa: E402

SLIDING = {"mistral": [True, True], "gemma2": [True, False], "gpt_oss": [True, False]}
NAMES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drafting(model):
    """A model that agrees with `model` now and then."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    for x in other.parameters():
        x += 0.05 * torch.randn(x.shape, generator=generator)
    other.set_attn_implementation("eager")
    other.generation_config.num_assistant_tokens, other.generation_config.assistant_confidence_threshold = 5, 0.0
    return other


# Texts


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_text_is_the_same(name, padding):
    arguments, cache = inputs(name, padding), Cache(made(name), 64, "fp32")
    expected = generated(made(name), "eager", arguments)
    assert torch.equal(generated(made(name), "cyflash", arguments, cache), expected)
    assert cache.get_seq_length() == 24 + 20 - 1
    assert cache.is_sliding == SLIDING.get(name, [False, False])


@pytest.mark.parametrize("name", DECODERS)
def test_beams_reorder(name, monkeypatch):
    orders, original = [], cyflash.KVCache.reorder
    monkeypatch.setattr(cyflash.KVCache, "reorder", lambda self, rows: (orders.append(rows), original(self, rows)))
    arguments = inputs(name, "left")
    expected = generated(made(name), "eager", arguments, num_beams=3)
    found = generated(made(name), "cyflash", arguments, Cache(made(name), 64, "fp32"), num_beams=3)
    assert torch.equal(found, expected)
    assert any(not np.array_equal(rows, range(6)) for rows in orders)  # else nothing was asked of it


@pytest.mark.parametrize("name", DECODERS)
def test_assisted_decoding_crops(name, monkeypatch):
    dropped, original = [], cyflash.KVCache.truncate
    monkeypatch.setattr(
        cyflash.KVCache, "truncate", lambda self, n: (dropped.append(int(self.lengths[0] - n[0])), original(self, n))
    )
    arguments, model = inputs(name, batch=1), made(name)
    expected = generated(model, "eager", arguments)
    cache = Cache(model, 128, "fp32")
    assert torch.equal(generated(model, "cyflash", arguments, cache, assistant_model=drafting(model)), expected)
    assert max(dropped) > 1
    found = generated(model, "cyflash", arguments, Cache(model, 128, "fp32"), prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_prompts_in_chunks_and_conversations(name):
    arguments, model, cache = inputs(name, batch=1), made(name), Cache(made(name), 64, "fp32")
    expected = generated(model, "eager", arguments)
    assert torch.equal(generated(model, "cyflash", arguments, cache, prefill_chunk_size=7), expected)
    longer = {"input_ids": torch.cat([expected, torch.tensor([[5, 9, 2]])], dim=1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    again = generated(model, "cyflash", longer, cache, max_new_tokens=5)  # goes on with what it holds
    assert torch.equal(again, generated(model, "eager", longer, max_new_tokens=5))


def test_encoder_and_decoder():
    arguments, model = inputs("t5", "right"), made("t5")
    for beams in (1, 3):
        caches = tf.EncoderDecoderCache(Cache(model, 40, "fp32"), Cache(model, 40, "fp32"))
        expected = generated(model, "eager", arguments, num_beams=beams)
        assert torch.equal(generated(model, "cyflash", arguments, caches, num_beams=beams), expected)
        assert caches.cross_attention_cache.get_seq_length() == 24


def test_layers_that_read_another_ones():
    """Gemma-3n: the last layers have no keys and values of their own."""
    config = tf.Gemma3nTextConfig(
        vocab_size=64, vocab_size_per_layer_input=64, hidden_size=64, hidden_size_per_layer_input=8, head_dim=16,
        intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=WINDOW,
        laurel_rank=4, activation_sparsity_pattern=[0.0] * 4, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model, arguments = tf.Gemma3nForCausalLM(config).eval().requires_grad_(False), inputs("gemma2", "left")
    cache = Cache(model, 64, "fp32")
    expected = generated(model, "eager", arguments)
    assert torch.equal(generated(model, "cyflash", arguments, cache), expected)
    assert [hasattr(layer, "kv") for layer in cache.layers] == [True, True, False, False]


# What it holds


@pytest.mark.parametrize("dtype", ["int8", "bf16", "fp16", "fp32"])
def test_each_token_is_taken_in_once(dtype, monkeypatch):
    """A prompt by one append to each layer, then one token by each; codes of the first stay as they are."""
    appended, original = [], cyflash.KVCache.append
    monkeypatch.setattr(
        cyflash.KVCache, "append", lambda self, k, v: (appended.append(k.shape[2]), original(self, k, v))
    )
    model, arguments = made("llama"), inputs("llama")
    cache = Cache(model, 64, dtype)
    last_logits(model, arguments, cache)
    before = [{name: x.copy() for name, x in layer.kv._rows.pool.arrays.items()} for layer in cache.layers]
    for token in range(5):
        last_logits(model, {"input_ids": torch.full((2, 1), token)}, cache)
    assert appended == [24, 24] + [1, 1] * 5
    for layer, kept in zip(cache.layers, before, strict=True):
        for name, x in layer.kv._rows.pool.arrays.items():
            first = np.s_[:, :, :6] if dtype == "int8" and name == "v" else np.s_[:, :, :24]  # v: 4 tokens in a word
            assert np.array_equal(x[first], kept[name][first])
            assert kept[name][first].any()


@pytest.mark.parametrize("dtype", ["int8", "bf16", "fp16"])
def test_rounding_is_that_of_the_cache(dtype):
    """Logits of the last token, against those with a float32 cache."""
    model, arguments = made("llama"), inputs("llama", "left", length=40)
    exact, found = (last_logits(model, arguments, Cache(model, 64, x)) for x in ("fp32", dtype))
    error = rms(found - exact) / rms(exact)
    assert 1e-5 < error < {"int8": 0.03, "bf16": 0.01, "fp16": 1e-3}[dtype]


def last_logits(model, arguments, cache, implementation="cyflash"):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**arguments, past_key_values=cache).logits[:, -1].double().numpy()


def test_int8_is_read_alike_by_both_names():
    model, arguments = made("gemma2"), inputs("gemma2", "left")
    texts = [generated(model, name, arguments, Cache(model, 64)) for name in ("cyflash", "cyflash-int8")]
    assert torch.equal(*texts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_16_bits(dtype):
    model = copy.deepcopy(made("llama")).to(dtype)
    arguments = inputs("llama", "left")
    exact = last_logits(model, arguments, tf.DynamicCache())
    for kept in ("fp32", "bf16", "int8"):
        found = last_logits(model, arguments, Cache(model, 64, kept))
        assert rms(found - exact) < 0.04 * rms(exact)


def test_sliding_layers_stay_small():
    model = made("gemma2")
    cache = Cache(model, 1000, "fp32")
    generated(model, "cyflash", inputs("gemma2", batch=1), cache, max_new_tokens=60)
    sliding, full = (layer.kv for layer in cache.layers)
    assert sliding.window == (WINDOW - 1, 0)
    assert sliding.lengths[0] == full.lengths[0] == 83
    assert sliding.capacity < 83
    assert full.capacity == 1000
    assert sliding._rows.first[0] >= 83 - WINDOW
    assert cache.nbytes == sliding.nbytes + full.nbytes


def test_mistral_goes_beyond_max_length():
    """All layers slide: nothing has to hold all tokens."""
    model, arguments = made("mistral"), inputs("mistral")
    found = generated(model, "cyflash", arguments, Cache(model, 30, "fp32"))
    assert torch.equal(found, generated(model, "eager", arguments))


def test_a_short_cache_of_a_sliding_layer():
    """max_length below the window: nothing is given up, and it is the limit."""
    model = made("mistral")
    cache = Cache(model, 4, "fp32")
    model.set_attn_implementation("cyflash")
    model(torch.ones(1, 4, dtype=int), past_key_values=cache)
    with pytest.raises(ValueError, match="max_length: expected at least the 5 tokens"):
        model(torch.ones(1, 1, dtype=int), past_key_values=cache)


def test_rows_come_and_go():
    """As with transformers' own cache; and `reset` allows any batch."""
    model, arguments = made("gemma2"), inputs("gemma2", "left", batch=3)
    ours, theirs = Cache(model, 64, "fp32"), tf.DynamicCache(config=model.config)
    token, mask = torch.tensor([[7], [8], [7], [8]]), arguments["attention_mask"]
    rows = torch.tensor([2, 0])
    found = []
    for cache in (ours, theirs):
        last_logits(model, arguments, cache)
        cache.batch_select_indices(rows)
        cache.batch_repeat_interleave(2)
        assert cache.layers[1].keys.shape[0] == 4
        seen = torch.cat([mask[rows].repeat_interleave(2, 0), torch.ones(4, 1, dtype=int)], dim=1)
        found.append(last_logits(model, {"input_ids": token, "attention_mask": seen}, cache))
    assert abs(found[0] - found[1]).max() < 1e-5
    assert abs(found[0][0] - found[0][2]).max() > 0.1
    assert ours.batch_size == 4
    ours.reset()
    assert ours.get_seq_length() == 0 and ours.batch_size == -1
    assert abs(last_logits(model, inputs("gemma2"), ours) - last_logits(model, inputs("gemma2"), None)).max() < 1e-5


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_rows_that_were_chosen_are_those_rows(dtype):
    """To the bit, as if the batch had been these rows from the beginning; and on their own from then on."""
    model, arguments = made("gemma2"), inputs("gemma2", batch=3)
    found = {"fp32_sinks": 2, "k_scale": 0.05, "v_scale": 0.05} if dtype == "int8" else None
    scales = found and {name: LayerScales(**found) for name in NAMES}
    chosen, direct = Cache(model, 64, dtype, scales), Cache(model, 64, dtype, scales)
    last_logits(model, arguments, chosen)
    chosen.batch_select_indices(torch.tensor([2, 0]))
    chosen.batch_repeat_interleave(2)
    last_logits(model, {name: x[[2, 2, 0, 0]] for name, x in arguments.items()}, direct)
    for step in range(3):
        token = {"input_ids": torch.tensor([[7], [8], [9], [step]])}
        assert np.array_equal(*(last_logits(model, token, cache) for cache in (chosen, direct)))


# Scales


def scales(**how):
    return Scales({name: LayerScales(0.05, 0.05, 0.05 + 0.01 * i, **how) for i, name in enumerate(NAMES)})


def test_scales_of_the_layers():
    model, found = copy.deepcopy(made("llama")), scales(fp32_sinks=2, pv="bf16")
    cache = Cache(model, 64, scales=dict(reversed([*found.items()])))  # by name, not by order
    generated(model, "cyflash", inputs("llama"), cache)
    for layer, name in zip(cache.layers, NAMES, strict=True):
        assert layer.quant is found[name]
        assert layer.kv._format.v_scale.ravel()[0] == found[name].v_scale
        assert layer.kv._format.fp32_sinks == 2
    register(model, int8=found)
    bound = Cache(model, 64)
    assert [layer.quant for layer in bound.layers] == list(found.values())
    generated(model, "cyflash-int8", inputs("llama"), bound)
    with pytest.raises(ValueError, match=r"past_key_values: expected the scales of the layer 'model.layers.0"):
        generated(model, "cyflash-int8", inputs("llama"), Cache(model, 64, scales=scales()))
    assert Cache(model, 64, "bf16").layers[0].quant is None


def test_calibrated_scales_are_near():
    model, arguments = copy.deepcopy(made("llama")), inputs("llama", length=40)
    with torch.no_grad(), capture(model) as calibrator:
        for seed in range(4):
            model(**inputs("llama", length=40, seed=seed))
    exact = last_logits(model, arguments, Cache(model, 64, "fp32"))
    register(model, int8=calibrator.compute("max"))
    found = last_logits(model, arguments, Cache(model, 64), "cyflash-int8")
    assert 1e-3 < rms(found - exact) / rms(exact) < 0.06


def test_pv_of_register_reaches_the_cache(monkeypatch):
    seen, original = [], cyflash.flash_attention_with_kvcache
    monkeypatch.setattr(
        cyflash, "flash_attention_with_kvcache",
        lambda *args, **options: (seen.append(options.get("pv")), original(*args, **options))[1],
    )  # fmt: skip
    model = made("llama")
    try:
        register(int8={"pv": "fp32"})
        last_logits(model, inputs("llama"), Cache(model, 64), "cyflash-int8")
        last_logits(model, inputs("llama"), Cache(model, 64), "cyflash")
        register(int8={"granularity": "head"})
        with pytest.raises(ValueError, match="granularity: expected None with a Cache"):
            last_logits(model, inputs("llama"), Cache(model, 64), "cyflash-int8")
    finally:
        register()
    assert seen == ["fp32", "fp32", None, None]


def test_scales_that_do_not_fit():
    model = made("llama")
    with pytest.raises(ValueError, match="scales: expected None with dtype bfloat16"):
        Cache(model, 64, "bf16", scales=scales())
    with pytest.raises(TypeError, match="scales: expected Scales or a mapping"):
        Cache(model, 64, scales={NAMES[0]: 1.0})
    with pytest.raises(TypeError, match="model: expected the model beside scales"):
        Cache(model.config, 64, scales=scales())
    for names in (NAMES[:1], [*NAMES, "model.layers.2.self_attn"], ["a", "b"]):
        with pytest.raises(ValueError, match=r"scales: expected one .* \[0, 1\], of model.layers.0.self_attn"):
            Cache(model, 64, scales={name: LayerScales(1, 1, 1) for name in names})


# Errors


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_other_attention_raises(implementation):
    with pytest.raises(RuntimeError, match=r"past_key_values: .*'cyflash' or 'cyflash-int8' alone.*set_attn_impl"):
        generated(made("llama"), implementation, inputs("llama"), Cache(made("llama"), 64))


def test_int8_attention_needs_an_int8_cache():
    with pytest.raises(ValueError, match=r"past_key_values: expected a Cache of dtype 'int8' .* got one of float32"):
        generated(made("llama"), "cyflash-int8", inputs("llama"), Cache(made("llama"), 64, "fp32"))


def test_too_long():
    with pytest.raises(ValueError, match="max_length: expected at least the 31 tokens of this sequence, got 30"):
        generated(made("llama"), "cyflash", inputs("llama"), Cache(made("llama"), 30))


def test_cropping():
    model, cache = made("mistral"), Cache(made("mistral"), 64, "fp32")
    last_logits(model, inputs("mistral"), cache)
    cache.crop(-3)
    assert cache.get_seq_length() == 21
    cache.crop(0)
    with pytest.raises(ValueError, match=r"tokens_to_remove: .* got 3"):
        cache.crop(3)
    for token in range(8):
        last_logits(model, {"input_ids": torch.full((2, 1), token)}, cache)
    with pytest.raises(ValueError, match="window"):
        cache.crop(-5)
    full = Cache(made("llama"), 64, "fp32")
    last_logits(made("llama"), inputs("llama"), full)
    full.crop(-100)
    assert full.get_seq_length() == 0


def test_a_state_that_is_over():
    """Keys that were handed out before a later token came."""
    cache, x = Cache(made("llama"), 64, "fp32"), torch.randn(1, 2, 4, 16)
    keys, values = cache.update(x, x, 0)
    cache.update(x, x, 0)
    attend = tf.AttentionInterface()["cyflash"]
    q = torch.randn(1, 4, 4, 16)
    with pytest.raises(ValueError, match="key: expected all 8 tokens of the Cache, got 4 of an earlier state"):
        attend(torch.nn.Module(), q, keys, values, None)
    keys, values = cache.update(x, x, 1)
    with pytest.raises(ValueError, match="value: expected the values of the same layer"):
        attend(torch.nn.Module(), q, keys, x, None)
    assert "Held(keys of Layer(KVCache(batch=1" in repr(keys)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="model: expected a PreTrainedModel or its config, got str"):
        Cache("llama", 64)
    with pytest.raises(ValueError, match="max_length: expected an integer of at least 1, got 0"):
        Cache(made("llama"), 0)
    with pytest.raises(TypeError, match="dtype: expected float32, float16, bfloat16 or int8, got 'fp8'"):
        Cache(made("llama"), 64, "fp8")
    config = tf.Qwen3NextConfig(num_hidden_layers=4)
    with pytest.raises(NotImplementedError, match=r"model: .* full_attention and sliding_attention, got 'linear_att"):
        Cache(config, 64)


def test_numbers_that_int8_cannot_hold():
    cache, x = Cache(made("llama"), 64), torch.randn(1, 2, 4, 16)
    with pytest.raises(ValueError, match="k"):
        cache.update(x * torch.nan, x, 0)
    cache.update(x, x, 0)
    assert cache.get_seq_length() == 4


def test_chunked_prompt_and_logits_of_a_padded_batch():
    """Right padding within a cache: tokens behind it are hidden by the mask, wherever they are."""
    model, arguments = made("llama"), inputs("llama", "right")
    cache = Cache(model, 64, "fp32")
    model.set_attn_implementation("cyflash")
    found = logits_of(model, arguments, cache)
    assert abs(found - logits(model, "eager", arguments)).max() < 1e-5


def logits_of(model, arguments, cache):
    with torch.no_grad():
        out = model(**arguments, past_key_values=cache).logits.double()
    return out[arguments["attention_mask"].bool()].numpy()
