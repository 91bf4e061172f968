"""A cache of transformers over `cyflash.KVCache`: tokens are converted or quantised once, when they come.

    generate -> Cache.update -> Layer.update: KVCache.append, and returns two `Held` -> the attention function reads the
    KVCache that they name

Keys and values reach an attention function as tensors and nothing else does, so what `update` returns are tensors that
name the layer; transformers offers no other way from a cache to attention that works with unchanged models.
"""
from collections.abc import Mapping

import numpy as np
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin, DummyLayer, get_layer_types_and_kwargs

import cyflash
from cyflash import arrays
from cyflash.compat.transformers.held import Held
from cyflash.compat.transformers.layers import settings_of
from cyflash.compat.transformers.tensors import as_array
from cyflash.quantized import LayerScales
from cyflash.storing import checked_count

ROOM = 2  # of a sliding layer at first, in windows; a prompt that is longer makes more


class Cache(TransformersCache):
    """Keys and values of a model, for `past_key_values`, in half or a quarter of the memory.

    Parameters
    ----------
    model : PreTrainedModel or PreTrainedConfig
        Says how many layers there are and which have a sliding window.
    max_length : int
        Tokens of a sequence, the prompt and what is generated. Layers with a sliding window keep only what the window
        needs, and take any number.
    dtype : {"int8", "bf16", "fp16", "fp32"}, default "int8"
        What is kept, whatever the model computes in.
    scales : Scales or mapping of str to LayerScales, optional
        With "int8", calibrated ones, by the names of the layers: k_scale, v_scale, k_mean and fp32_sinks of what is
        kept, q_scale and pv of the calls that read it. Default: those that `register(model, int8=...)` gave the model,
        else a scale that is found for each token of each head.

    Attributes
    ----------
    layers : list
        As in every cache of transformers.
    nbytes : int
        Of what is held.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit; scales for other layers are named. While it is used: where max_length would be
        exceeded, for NaN and infinities with "int8".
    NotImplementedError
        For models with layers that are no attention, by their kind.

    Notes
    -----
    It is read by attn_implementation "cyflash" and "cyflash-int8" (int8 only); with any other it raises. Beams reorder
    it without a copy, assisted decoding crops it, padded batches keep their padding, which the mask hides. Sizes of the
    arrays are taken from the first tokens, so that a Cache can be made before the batch is known; `reset` allows
    another one.

    Where a sliding layer has given up tokens, `crop` can take back what the last forward pass appended, as assisted
    decoding does, and raises for more.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from cyflash.compat.transformers import Cache, register
    >>> register()
    >>> config = LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=4, num_key_value_heads=2, attn_implementation="cyflash")
    >>> model = LlamaForCausalLM(config).eval()
    >>> cache = Cache(model, max_length=20, dtype="int8")
    >>> model.generate(torch.tensor([[1, 2, 3]]), past_key_values=cache, max_new_tokens=5, do_sample=False,
    ...                pad_token_id=0, eos_token_id=None).shape
    torch.Size([1, 8])
    >>> cache.get_seq_length()
    7
    """

    def __init__(self, model, max_length, dtype="int8", scales=None):
        config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"model: expected a PreTrainedModel or its config, got {type(model).__name__}")
        max_length, dtype = checked_count("max_length", max_length), arrays.checked_dtype("dtype", dtype)
        kinds, sizes = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        quants = _quants(None if model is config else model, scales, dtype, kinds)
        super().__init__([
            _layer(kind, size, max_length, dtype, quant)
            for kind, size, quant in zip(kinds, sizes, quants, strict=True)
        ])

    @property
    def nbytes(self):
        return sum(layer.kv.nbytes for layer in self.layers if getattr(layer, "kv", None) is not None)


class Layer(CacheLayerMixin):
    """Keys and values of one layer.

    Attributes
    ----------
    kv : KVCache or None
        None until the first tokens come, and after `reset`.
    quant : LayerScales or None
    """

    is_croppable = True

    def __init__(self, max_length, dtype, quant, sliding_window):
        self.max_length, self.kept, self.quant, self.sliding_window = max_length, dtype, quant, sliding_window
        self.is_sliding = sliding_window is not None
        self.kv = self.dtype = None

    def __repr__(self):
        return f"Layer({self.kv!r})"

    # As transformers asks for it

    @property
    def is_initialized(self):
        return self.kv is not None

    @property
    def batch_size(self):
        return -1 if self.kv is None else self.kv.batch

    @property
    def keys(self):
        return self._held()[0]

    @property
    def values(self):
        return self._held()[1]

    def lazy_initialization(self, key_states, value_states):
        B, Hk, _, D = key_states.shape
        self.dtype = key_states.dtype
        capacity, window = self.max_length, None
        if self.is_sliding and self.sliding_window < capacity:
            window = (self.sliding_window - 1, 0)
            capacity = min(capacity, ROOM * self.sliding_window)
        self.kv = cyflash.KVCache(
            B, Hk, D, capacity, self.kept, v_head_dim=value_states.shape[3], quant=self.quant, window=window,
            grow=window is not None,
        )

    def update(self, key_states, value_states, *args, **kwargs):
        k, v = as_array("key_states", key_states), as_array("value_states", value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length() + k.shape[2]
        if self.kv.window is None and length > self.max_length:
            raise ValueError(
                f"max_length: expected at least the {length} tokens of this sequence, got {self.max_length}; make the "
                "Cache with more"
            )
        self.kv.append(k, v)
        return self._held()

    def _held(self):
        if self.kv is None:
            return None, None
        shape = self.kv.batch, self.kv.kv_heads, self.get_seq_length()
        sizes = {"keys": self.kv.head_dim, "values": self.kv.v_head_dim}
        return tuple(Held(self, part, (*shape, size), self.dtype) for part, size in sizes.items())

    def get_seq_length(self):
        return 0 if self.kv is None else int(self.kv.lengths.max(initial=0))

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0

    def get_max_length(self):
        return -1 if self.is_sliding else self.max_length

    def reset(self):
        self.kv = self.dtype = None

    def reorder_cache(self, beam_idx):
        if self.kv is not None:
            self.kv.reorder(beam_idx.numpy(force=True))

    def crop(self, tokens_to_remove):
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected 0 or, to remove n tokens, -n, got {tokens_to_remove}")
        if self.kv is not None and tokens_to_remove:
            self.kv.truncate(np.maximum(self.kv.lengths + tokens_to_remove, 0))

    def batch_repeat_interleave(self, repeats):
        if self.kv is not None:
            self.kv = self.kv._with_rows(np.repeat(np.arange(self.kv.batch), repeats))

    def batch_select_indices(self, indices):
        if self.kv is not None:
            self.kv = self.kv._with_rows(np.arange(self.kv.batch)[indices.numpy(force=True)])


def _layer(kind, sizes, max_length, dtype, quant):
    """The layer of a kind as transformers' configs name it."""
    if kind == "dummy":  # has no attention, or that of another layer
        return DummyLayer()
    if kind not in ("full_attention", "sliding_attention"):
        raise NotImplementedError(
            f"model: a Cache holds layers of full_attention and sliding_attention, got {kind!r}; use a cache of "
            "transformers"
        )
    return Layer(max_length, dtype, quant, sizes.get("sliding_window"))


def _quants(model, scales, dtype, kinds):
    """The LayerScales of each layer, or None."""
    if scales is not None and dtype != arrays.INT8:
        raise ValueError(f"scales: expected None with dtype {dtype.name}, got {scales!r}; they are for 'int8'")
    if scales is None and model is not None and dtype == arrays.INT8:
        scales = next((x.how for x in map(settings_of, model.modules()) if x.how and not isinstance(x.how, dict)), None)
    if scales is None:
        return [None] * len(kinds)
    if not isinstance(scales, Mapping) or not all(isinstance(x, LayerScales) for x in scales.values()):
        raise TypeError(f"scales: expected Scales or a mapping of names to LayerScales, got {scales!r}")
    if model is None:
        raise TypeError("model: expected the model beside scales, which name its layers, got its config")
    names = {name: module.layer_idx for name, module in model.named_modules() if hasattr(module, "layer_idx")}
    found = {names.get(name): quant for name, quant in scales.items()}
    needed = {i for i, kind in enumerate(kinds) if kind != "dummy"}
    if len(found) < len(scales) or found.keys() != needed:
        raise ValueError(
            f"scales: expected one LayerScales for each of the layers {sorted(needed)}, of {', '.join(names)}; got "
            f"{', '.join(scales)}"
        )
    return [found.get(i) for i in range(len(kinds))]
