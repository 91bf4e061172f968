"""The attention functions "cyflash" and "cyflash-int8", as `transformers.AttentionInterface` calls them.

    query, key, value, mask, what the model passes -> options of cyflash -> attend or attend_int8 (attention.py), or
    flash_attention_with_kvcache where keys and values are those of a Cache (cache.py)

The mask that is passed is what counts, as it is for transformers' eager attention. What cannot be honoured raises.
"""

import torch
from transformers.utils import output_capturing

import cyflash
from cyflash.attention import attend, attend_int8
from cyflash.compat.transformers.held import Held
from cyflash.compat.transformers.layers import settings_of
from cyflash.compat.transformers.masks import Mask
from cyflash.compat.transformers.tensors import as_array, as_float32

# What models pass on to all their parts, and attention does not depend on.
HARMLESS = {
    "position_ids", "cache_position", "use_cache", "return_dict", "output_hidden_states", "output_router_logits",
    "num_items_in_batch", "deterministic",
}  # fmt: skip
INSTEAD = {
    "head_mask": "use attn_implementation='eager', or prune the heads",
    "layer_head_mask": "use attn_implementation='eager', or prune the heads",
    "cache": "continuous batching keeps its own pages; call generate, with a Cache of cyflash.compat.transformers",
    "cu_seq_lens_q": "leave it out: packed sequences are told apart by position_ids",
    "cu_seq_lens_k": "leave it out: packed sequences are told apart by position_ids",
}


def attention(module, query, key, value, attention_mask, **options):
    """"cyflash": in the precision of the arrays. Returns ((B, Lq, H, Dv), None)."""
    run = _uncompiled if torch.compiler.is_compiling() else _attend
    return run(False, module, query, key, value, attention_mask, **options)


def attention_int8(module, query, key, value, attention_mask, **options):
    """"cyflash-int8": both products in int8."""
    run = _uncompiled if torch.compiler.is_compiling() else _attend
    return run(True, module, query, key, value, attention_mask, **options)


def _attend(
    int8, module, query, key, value, attention_mask, *, dropout=0.0, scaling=None, is_causal=None, softcap=None,
    sliding_window=None, s_aux=None, position_bias=None, **others,
):
    _require_nothing_else(others, dropout)
    settings = settings_of(module)
    keys, options = _visible(module, query, key, attention_mask, is_causal, sliding_window)
    if position_bias is not None:
        bias = as_float32("position_bias", position_bias)[..., :keys]
        options["bias"] = bias if "bias" not in options else bias + options["bias"]
    if s_aux is not None:
        options["sinks"] = as_float32("s_aux", s_aux)
    options |= {"scale": scaling, "softcap": softcap or 0.0}

    q = as_array("query", query)
    B, H, Lq, _ = q.shape
    result = torch.empty((B, Lq, H, value.shape[3]), dtype=query.dtype)
    out = as_array("output", result).swapaxes(1, 2)
    if isinstance(key, Held):
        settings.require_no_capture()
        how = {"pv": settings.pv_of(key.layer)} if int8 else {}
        key.require_whole(value, keys)
        cyflash.flash_attention_with_kvcache(q, key.layer.kv, out=out, **how, **options)
        return result, None
    k, v = (as_array(name, x)[:, :, :keys] for name, x in (("key", key), ("value", value)))
    settings.observe(q, k, v, options)
    if int8:
        attend_int8(q, k, v, out=out, out_is_new=True, **settings.int8(), **options)
    else:
        attend(q, k, v, out=out, out_is_new=True, **options)
    return result, None


_uncompiled = torch.compiler.disable(_attend)  # NumPy arrays and compiled modules: a graph breaks here


def _require_nothing_else(others, dropout):
    if dropout:
        raise NotImplementedError(
            f"dropout: expected 0, got {dropout}: cyflash has no dropout and no backward pass; call model.eval()"
        )
    asked = output_capturing._active_collector.get() or {}
    if others.pop("output_attentions", None) or any(name.endswith("attentions") for name in asked):
        raise NotImplementedError(
            "output_attentions: the weights are never held; use attn_implementation='eager' to look at them"
        )
    for name, value in others.items():
        if value is not None and value is not False and name not in HARMLESS:
            way_out = INSTEAD.get(name, "use attn_implementation='eager'")
            raise NotImplementedError(f"{name}: cyflash's attention cannot honour it; {way_out}")


def _visible(module, query, key, mask, is_causal, sliding_window):
    """(keys, {...}): how many keys to attend to, with which of the options causal, window, mask and bias."""
    B, H, Lq, Lk = *query.shape[:3], key.shape[2]
    if mask is None:
        return _without_mask(module, Lq, Lk, is_causal, sliding_window)
    if isinstance(mask, Mask) and mask.made_dense is None and mask.sizes == (B, 1, Lq, Lk):
        return mask.options()
    if mask.ndim != 4 or any(n not in (1, whole) for n, whole in zip(mask.shape, (B, H, Lq, Lk), strict=True)):
        raise ValueError(
            f"attention_mask: expected a shape that broadcasts to (B, H, Lq, Lk) = {(B, H, Lq, Lk)}, got "
            f"{tuple(mask.shape)}"
        )
    if isinstance(mask, Mask):
        if mask.made_dense is None:  # of one sequence, for all
            return mask.options()
        mask = mask.made_dense
    if mask.dtype == torch.bool:
        return Lk, {"causal": False, "mask": as_array("attention_mask", mask)}
    return Lk, {"causal": False, "bias": as_float32("attention_mask", mask)}


def _without_mask(module, Lq, Lk, is_causal, sliding_window):
    """Models that leave the mask out rely on `is_causal`, which a single query does not need."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and Lq > 1
    if causal and Lq != Lk:
        raise ValueError(
            f"attention_mask: expected one for {Lq} queries and {Lk} keys of causal attention, got None: without it "
            "nothing says where the queries stand; see transformers.masking_utils.create_causal_mask"
        )
    if sliding_window is not None and sliding_window < Lk:
        raise ValueError(
            f"attention_mask: expected one with sliding_window={sliding_window} and {Lk} keys, got None; see "
            "transformers.masking_utils.create_sliding_window_causal_mask"
        )
    return Lk, {"causal": causal}
