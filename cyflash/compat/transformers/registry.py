"""`register`: the names "cyflash" and "cyflash-int8" in the tables of transformers."""
import functools
import sys

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import generic

from cyflash.compat.transformers import layers
from cyflash.compat.transformers.attention import attention, attention_int8
from cyflash.compat.transformers.masks import mask_of

FUNCTIONS = {"cyflash": attention, "cyflash-int8": attention_int8}


def register(model=None, *, int8=None):
    """Make "cyflash" and "cyflash-int8" values of `attn_implementation`, for models on the CPU.

    Call it once before a model is made or switched. Called again, it only changes what `int8` says.

    Parameters
    ----------
    model : PreTrainedModel, optional
        Switch this model as well: to "cyflash-int8" with what `int8` says, for its own layers only, or, where that is
        None, to "cyflash".
    int8 : Scales, path of their file, or mapping, optional
        How "cyflash-int8" quantises. Scales need `model`, whose layers they name; `capture` finds them. A mapping holds
        options of `flash_attention_int8`, among granularity, smooth_k, fp32_sinks and pv; without a model they are of
        all models that have none of their own. Default: the defaults of `flash_attention_int8`.

    Raises
    ------
    TypeError, ValueError
        For another `int8`; for Scales that name layers which the model does not have: both are listed.
    FileNotFoundError
        For a file that is not there.

    Notes
    -----
    Both functions and their masks read tensors of float32, float16 and bfloat16 where they are; neither causal, nor a
    sliding window, nor padding becomes a (Lq, Lk) array: rules reach the kernels as rules, padding as one (B, 1, 1, Lk)
    mask. Rows that see no key, those of padding on the left, give 0 where eager attention gives a mean over what is
    hidden; nothing reads them. Other patterns, such as packed sequences, become dense masks of bool.

    Softcap (Gemma-2), sinks (`s_aux`: gpt-oss), position_bias (T5) and grouped heads are honoured. What is not raises
    NotImplementedError with the argument's name: gradients, dropout in training, output_attentions, head_mask, tensors
    on a GPU, continuous batching, and any argument that is not known here.

    transformers takes every name with "flash" in it for a package of GPU kernels that it has to load; `register`
    replaces the function that says so, `is_flash_attention_requested`, by one that knows better.

    Where torch and cyflash share one OpenMP, as on Linux, `torch.set_num_threads` is the default of cyflash as well.

    "cyflash-int8" quantises what an ordinary cache holds anew for each token; a `Cache` keeps codes.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> from cyflash.compat.transformers import register
    >>> register()
    >>> config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
    ...                     intermediate_size=32, attn_implementation="cyflash")
    >>> with torch.no_grad():
    ...     BertModel(config).eval()(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 32])
    """
    how = None if int8 is None else layers.checked_how(int8, model)
    register_names()
    if model is None:
        layers.default = how or {}
        return
    for settings in layers.own_settings(model).values():
        settings.how = how
    model.set_attn_implementation("cyflash" if how is None else "cyflash-int8")


def register_names():
    """The part that is the same in each call of `register`."""
    _tell_from_flash_attention()
    for name, function in FUNCTIONS.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask_of)


def _tell_from_flash_attention():
    """Have `is_flash_attention_requested` say no for our names, wherever it was imported to."""
    original = generic.is_flash_attention_requested
    if hasattr(original, "knows_cyflash"):
        return

    @functools.wraps(original)
    def is_flash_attention_requested(config=None, requested_attention_implementation=None, version=None):
        asked = requested_attention_implementation if config is None else config._attn_implementation
        if asked in FUNCTIONS and None in (config, requested_attention_implementation):
            return False
        return original(config, requested_attention_implementation, version)

    is_flash_attention_requested.knows_cyflash = True
    for module in tuple(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(original.__name__) is original:
            module.__dict__[original.__name__] = is_flash_attention_requested
