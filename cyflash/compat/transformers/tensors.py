"""Tensors of torch on the CPU as NumPy arrays: the same memory, read or written in place.

Between the products of a model nothing of this is in the processor's caches, so what has to be asked of every tensor is
asked once: by `numpy()`, which says no where a question is due.
"""
import numpy as np
import torch


def as_array(name, tensor):
    """The memory of a tensor as a NumPy array with its shape and strides; bfloat16 is that of ml_dtypes."""
    if tensor.dtype is not torch.bfloat16:
        try:
            return tensor.numpy()
        except (RuntimeError, TypeError):  # on another device, or with a gradient
            pass
    if tensor.device.type != "cpu":
        raise NotImplementedError(
            f"{name}: expected a tensor on the CPU, got one on {tensor.device}; write model.to('cpu'), or use another "
            "attn_implementation there"
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name}: expected a tensor without gradient, since cyflash has no backward pass, got one that requires "
            f"grad; call the model within torch.no_grad() or torch.inference_mode(), or write {name}.detach()"
        )
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_bfloat16())
    return tensor.numpy()


def as_float32(name, tensor):
    """The same in float32: a copy where it is of another type."""
    return as_array(name, tensor).astype(np.float32, copy=False)


def _bfloat16():
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError("bfloat16 needs ml_dtypes; install it with: pip install 'cyflash-attn[bf16]'") from None
    return np.dtype(ml_dtypes.bfloat16)
