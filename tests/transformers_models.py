"""Small random models of transformers whose attention counts, and attention that is broken in one way at a time.

Weights are scaled so that scores have a deviation near 1 and the output of the attention is as large as what else is in
the residual stream. No file is read.
"""
import functools
import itertools

import numpy as np
import torch
import transformers as tf

import cyflash
from cyflash.compat.transformers import masks, register
from cyflash.compat.transformers.attention import attention
from cyflash.compat.transformers.masks import Mask

register()

UNTIED = {"vocab_size": 64, "tie_word_embeddings": False}
COMMON = {**UNTIED, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
WINDOW = 5


def llama():
    return tf.LlamaConfig(**COMMON, **HEADS, **TOKENS)


def mistral():
    return tf.MistralConfig(**COMMON, **HEADS, **TOKENS, sliding_window=WINDOW)


def gemma2():
    return tf.Gemma2Config(
        **COMMON, **HEADS, **TOKENS, sliding_window=WINDOW, attn_logit_softcapping=1.5, query_pre_attn_scalar=16,
        final_logit_softcapping=None,
    )


def gpt2():
    return tf.GPT2Config(**UNTIED, n_embd=64, n_layer=2, n_head=4, n_positions=128, **TOKENS)


def qwen2():
    return tf.Qwen2Config(**COMMON, num_attention_heads=4, num_key_value_heads=1, **TOKENS)


def gpt_oss():
    return tf.GptOssConfig(
        **COMMON, **HEADS, **TOKENS, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )


def bert():
    return tf.BertConfig(**COMMON, num_attention_heads=4, pad_token_id=0)


def t5():
    return tf.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=1,
        pad_token_id=0, eos_token_id=None,
    )


# config -> (class, in what its attention can be broken)
MODELS = {
    llama: (tf.LlamaForCausalLM, ("zero", "causal", "shift")),
    mistral: (tf.MistralForCausalLM, ("zero", "causal", "shift", "window")),
    gemma2: (tf.Gemma2ForCausalLM, ("zero", "causal", "shift", "window", "softcap")),
    gpt2: (tf.GPT2LMHeadModel, ("zero", "causal", "shift")),
    qwen2: (tf.Qwen2ForCausalLM, ("zero", "causal", "shift")),
    gpt_oss: (tf.GptOssForCausalLM, ("zero", "causal", "shift", "window", "s_aux")),
    bert: (tf.BertForMaskedLM, ("zero",)),
    t5: (tf.T5ForConditionalGeneration, ("zero", "causal", "shift", "position_bias")),
}
CONFIGS = {config.__name__: config for config in MODELS}
DECODERS = [name for name in CONFIGS if name not in ("bert", "t5")]
WITHOUT_SDPA = ("gemma2", "gpt_oss")
QUERY_AND_KEY = ("q_proj", "k_proj", "query", "key", "c_attn", "Attention.q", "Attention.k")
OUTPUTS = ("o_proj.weight", "attn.c_proj.weight", "attention.output.dense.weight", "Attention.o.weight")


@functools.cache
def made(name):
    """The model in float32, in eval mode; always the same weights."""
    config = CONFIGS[name]
    model = MODELS[config][0](config()).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for path, x in model.named_parameters():
        if x.ndim < 2 and not path.endswith("sinks"):
            continue
        fan_in = 1 if x.ndim < 2 else x.shape[-2] if "c_" in path or "experts" in path else x.shape[-1]
        x.copy_(torch.randn(x.shape, generator=generator) / fan_in**0.5)
        if any(part in path for part in ("embed", "wte", "wpe", "shared", "relative_attention_bias")):
            x *= x.shape[-1] ** 0.5 * (0.2 if "shared" in path else 1)  # T5's head: a token would repeat itself
        elif any(part in path for part in QUERY_AND_KEY):
            x *= 0.5 if name == "t5" else 1.2  # T5 does not divide scores by anything
        elif path.endswith(OUTPUTS):
            x *= 2
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the other one knows no float64
    return model


def inputs(name, padding=None, batch=2, length=24, seed=0):
    """Arguments of a forward pass; padding: None, "left" or "right", of the second half of the batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 64, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        hidden = slice(0, 7) if padding == "left" else slice(length - 7, None)
        mask[batch // 2 :, hidden] = 0
        ids[mask == 0] = 0
    arguments = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        arguments["decoder_input_ids"] = torch.randint(1, 64, (batch, 12), generator=generator)
    elif padding == "left" and name != "bert":
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return arguments


def logits(model, implementation, arguments):
    """Of the tokens that are none of padding, (tokens, vocabulary), in float64."""
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        out = model(**arguments).logits.double()
    if "decoder_input_ids" in arguments:
        return out.flatten(0, 1).numpy()
    return out[arguments["attention_mask"].bool()].numpy()


def in_float64(name, implementation, arguments):
    model = made(name).double()
    try:
        return logits(model, implementation, arguments)
    finally:
        model.float()  # exactly as it was


def generated(model, implementation, arguments, cache=None, **options):
    """Greedy, or beams with num_beams."""
    model.set_attn_implementation(implementation)
    arguments = {name: arguments[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 20, "do_sample": False} | options
    return model.generate(**arguments, past_key_values=cache, **options)


def rms(x):
    return float(np.sqrt(np.mean(x**2)))


# Attention that is broken in one way, as implementations "broken <way>"


def _broken(way, module, query, key, value, mask, **options):
    if way == "zero":
        B, H, Lq, _ = query.shape
        return query.new_zeros(B, Lq, H, value.shape[3]), None
    if way in options:
        options[way] = None
    elif way == "window" and mask.left >= 0:
        mask = Mask(mask.shape, -1, mask.right, mask.offset, mask.seen, mask.padding)
    elif way == "padding":
        mask = Mask(mask.shape, mask.left, mask.right, mask.offset, mask.seen, None)
    elif way == "causal" and mask.right == 0:
        mask = Mask(mask.shape, -1, -1, mask.offset, mask.shape[3], mask.padding)
    elif way == "shift" and mask.right == 0:
        visible = mask.dense()
        mask = torch.ones_like(visible)
        mask[..., 1:] = visible[..., :-1]
    return attention(module, query, key, value, mask, **options)


def _simulated_int8(module, query, key, value, mask, *, scaling, softcap=None, s_aux=None, position_bias=None, **_):
    """What int8 may do, by the specification, in a model that is computed in float64."""
    keys, options = mask.options()
    options |= {"scale": scaling, "softcap": softcap or 0.0}
    options["sinks"] = None if s_aux is None else s_aux.float().numpy()
    options["bias"] = None if position_bias is None else position_bias.float().numpy()
    q, k, v = (x.float().contiguous().numpy() for x in (query, key[:, :, :keys], value[:, :, :keys]))
    out = cyflash.reference.attention_int8(q, k, v, **options)
    return torch.from_numpy(out).to(query.dtype).transpose(1, 2).contiguous(), None


WAYS = sorted({*itertools.chain(*(ways for _, ways in MODELS.values())), "padding"})
for _way in WAYS:
    tf.AttentionInterface.register(f"broken {_way}", functools.partial(_broken, _way))
    tf.AttentionMaskInterface.register(f"broken {_way}", masks.mask_of)
tf.AttentionInterface.register("simulated int8", _simulated_int8)
tf.AttentionMaskInterface.register("simulated int8", masks.mask_of)
