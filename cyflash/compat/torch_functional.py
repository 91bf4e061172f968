"""torch's multi_head_attention_forward, with another scaled_dot_product_attention inside.

torch shows a TorchFunctionMode this function as a whole and runs it without the mode, which so does not see what is
called inside. Here is the same code among the same names, but for two.
"""
import threading
from types import FunctionType

from torch.nn import functional

globals().update({name: x for name, x in vars(functional).items() if not name.startswith("__")})

context = threading.local()  # .attend: of the sdpa_context that runs the function


def scaled_dot_product_attention(*args, **kwargs):
    return context.attend(*args, **kwargs)


def _check_key_padding_mask(mask, src_len, bsz):
    """As torch's, without the closure of a tensor that torch.compile cannot follow under a mode."""
    if tuple(mask.shape) != (bsz, src_len):
        raise AssertionError(f"key_padding_mask: expected shape {(bsz, src_len)}, got {tuple(mask.shape)}")


multi_head_attention_forward = FunctionType(
    functional.multi_head_attention_forward.__code__, globals(), "multi_head_attention_forward",
    functional.multi_head_attention_forward.__defaults__,
)
multi_head_attention_forward.__kwdefaults__ = functional.multi_head_attention_forward.__kwdefaults__
