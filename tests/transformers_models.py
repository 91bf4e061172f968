"""Small random models of transformers whose attention counts: weights are scaled so that scores and values are of the
size of what else is in the residual stream. No file is read."""
import functools

import torch
import transformers as tf

COMMON = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
WINDOW = 5


def _gemma():
    return tf.Gemma2Config(
        **COMMON, **HEADS, **NO_TOKENS, sliding_window=WINDOW, attn_logit_softcapping=1.5, query_pre_attn_scalar=16,
        final_logit_softcapping=None,
    )


def _gpt_oss():
    return tf.GptOssConfig(
        **COMMON, **HEADS, **NO_TOKENS, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )


# name -> (class, its config, what its attention depends on beside being there)
MODELS = {
    "llama": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**COMMON, **HEADS, **NO_TOKENS), {"causal"}),
    "mistral": (
        tf.MistralForCausalLM, lambda: tf.MistralConfig(**COMMON, **HEADS, **NO_TOKENS, sliding_window=WINDOW),
        {"causal", "window"},
    ),
    "gemma2": (tf.Gemma2ForCausalLM, _gemma, {"causal", "window", "softcap"}),
    "gpt2": (
        tf.GPT2LMHeadModel,
        lambda: tf.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=128, **NO_TOKENS), {"causal"},
    ),
    "qwen2": (
        tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**COMMON, num_attention_heads=4, num_key_value_heads=2, **NO_TOKENS),
        {"causal"},
    ),
    "gpt_oss": (tf.GptOssForCausalLM, _gpt_oss, {"causal", "window", "s_aux"}),
    "bert": (tf.BertForMaskedLM, lambda: tf.BertConfig(**COMMON, num_attention_heads=4, pad_token_id=0), set()),
    "t5": (
        tf.T5ForConditionalGeneration,
        lambda: tf.T5Config(
            vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=1,
            pad_token_id=0, eos_token_id=None, is_gated_act=False,
        ),
        {"causal", "position_bias"},
    ),
}  # fmt: skip
DECODERS = ("llama", "mistral", "gemma2", "gpt2", "qwen2", "gpt_oss")
WITHOUT_SDPA = ("gemma2", "gpt_oss")


@functools.cache
def made(name, dtype=torch.float32):
    """The model, in eval mode; always the same weights."""
    cls, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = cls(config()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for path, x in model.named_parameters():
        if x.ndim >= 2:
            fan_in = x.shape[0] if "c_" in path or "experts" in path else x.shape[-1]
            x.copy_(torch.randn(x.shape, generator=generator) / fan_in**0.5)
        elif path.endswith("sinks"):
            x.copy_(torch.randn(x.shape, generator=generator))
    for path, x in model.named_parameters():
        if path.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight", "shared.weight", "embeddings.weight")):
            x *= x.shape[-1] ** 0.5 / 2
        elif "relative_attention_bias" in path:
            x *= 4
        elif any(part in path for part in ("q_proj", "k_proj", "query", "key", "SelfAttention.q", "EncDecAttention.q")):
            x *= 1.2 if "SelfAttention" not in path and "EncDec" not in path else 0.3
        elif path.endswith(("o_proj.weight", "attn.c_proj.weight", "attention.output.dense.weight", "Attention.o.weight")):
            x *= 2
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the other one knows no float64
    return model.to(dtype)


def with_attention(model, implementation):
    model.set_attn_implementation(implementation)
    return model


def tokens(batch=2, length=24, seed=0):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(name, padding=None, batch=2, length=24, seed=0):
    """Arguments of a forward pass; padding: None, "left" or "right", of the second half of the batch."""
    ids = tokens(batch, length, seed)
    mask = torch.ones_like(ids)
    if padding:
        hidden = slice(0, 7) if padding == "left" else slice(length - 7, None)
        mask[batch // 2 :, hidden] = 0
        ids[mask == 0] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        made["decoder_input_ids"] = tokens(batch, 12, seed + 1)
    elif padding == "left" and name != "bert":
        made["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return made


def logits(model, implementation, arguments):
    """Of the tokens that are none of padding, as one array (tokens, vocabulary) in float64."""
    with_attention(model, implementation)
    with torch.no_grad():
        out = model(**arguments).logits.double()
    if "decoder_input_ids" in arguments:
        return out.flatten(0, 1).numpy()
    return out[arguments["attention_mask"].bool()].numpy()
