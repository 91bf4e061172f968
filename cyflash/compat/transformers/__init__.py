"""Models of transformers on the CPU with the attention, the int8 and the caches of cyflash.

    registry.py    register: attn_implementation="cyflash" and "cyflash-int8"
    attention.py   the functions of these names, over masks.py (rules instead of dense masks) and tensors.py
    cache.py       Cache, for past_key_values: fp32, bf16, fp16 or int8, over held.py (what a model passes on of it)
    capture.py     capture: a model's queries, keys and values for a Calibrator
    layers.py      what is kept with a model's modules: names, scales, who watches

It needs the extra: pip install 'cyflash-attn[transformers]'.
"""
try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"cyflash.compat.transformers needs torch and transformers ({error}); install them with: "
        "pip install 'cyflash-attn[transformers]'"
    ) from error

from cyflash.compat.transformers.cache import Cache
from cyflash.compat.transformers.capture import capture
from cyflash.compat.transformers.registry import register

__all__ = ["Cache", "capture", "register"]
