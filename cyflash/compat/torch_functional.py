"""torch's multi_head_attention_forward, with another scaled_dot_product_attention inside.

torch shows a TorchFunctionMode this function as a whole and runs it without the mode, which so does not see what is
called inside. Here is the same code among the same names, but for that one.
"""
import threading
from types import FunctionType

from torch.nn import functional

globals().update({name: x for name, x in vars(functional).items() if not name.startswith("__")})

context = threading.local()  # .attend: of the sdpa_context that runs the function


def scaled_dot_product_attention(*args, **kwargs):
    return context.attend(*args, **kwargs)


multi_head_attention_forward = FunctionType(
    functional.multi_head_attention_forward.__code__, globals(), "multi_head_attention_forward",
    functional.multi_head_attention_forward.__defaults__,
)
multi_head_attention_forward.__kwdefaults__ = functional.multi_head_attention_forward.__kwdefaults__
