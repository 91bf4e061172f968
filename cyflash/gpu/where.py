"""Where the arrays of a call live. No framework is imported to find that out."""
import numpy as np

CUDA = (2, 13)  # DLPack's names of a CUDA device, and of memory that moves between host and device
QUANTIZED = "cyflash.quantized", "QuantizedTensor"
# What most arguments are: no more is asked of these.
PLAIN = frozenset((np.ndarray, type(None), bool, int, float, str, tuple, list))


def on_gpu(x):
    """Whether `x` is an array in a GPU's memory. No framework is imported for that, and none is asked about NumPy's."""
    kind = type(x)
    if kind in PLAIN or isinstance(x, (np.ndarray, np.generic)):
        return False
    if (kind.__module__, kind.__name__) == QUANTIZED:  # a QuantizedTensor is where its codes are
        return on_gpu(x.data)
    if kind.__module__.partition(".")[0] == "cupy":
        return True
    if _is_tensor(kind):
        return x.is_cuda
    if hasattr(x, "__dlpack_device__"):
        try:
            return int(x.__dlpack_device__()[0]) in CUDA
        except BufferError:  # of JAX: spread over several devices; whoever reads it says so
            return False
    return hasattr(x, "__cuda_array_interface__")


def require_all_on_gpu(arguments):
    """Raise where some of the arrays among {name: value} are on a GPU and others are not."""
    there = next((name for name, x in arguments.items() if on_gpu(x)), None)
    for name, x in arguments.items():
        if there is not None and _is_array(x) and not on_gpu(x):
            raise TypeError(
                f"{name}: expected an array on the GPU as {there} is, got {type(x).__name__} in the host's memory; "
                f"write {to_gpu(name, x)}, or bring {there} to the host: {to_host(there, arguments[there])}"
            )


def to_host(name, x):
    """What to write for a copy of the GPU array x in the host's memory."""
    return f"{name}.cpu()" if _is_tensor(type(x)) else f"cupy.asnumpy({name})"


def to_gpu(name, x):
    """What to write for a copy of x on the GPU."""
    return f"{name}.cuda()" if _is_tensor(type(x)) else f"cupy.asarray({name})"


def _is_tensor(kind):
    return kind.__module__.partition(".")[0] == "torch" and hasattr(kind, "is_cuda")


def _is_array(x):
    if (type(x).__module__, type(x).__name__) == QUANTIZED:
        return True
    # An array with one element and no axes is a number.
    return type(x) not in PLAIN - {np.ndarray} and hasattr(x, "__array__") and getattr(x, "ndim", 0) > 0
