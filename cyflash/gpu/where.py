"""Where the arrays of a call live. It is asked of every call, so it imports nothing and looks at types first."""
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
    if hasattr(x, "__dlpack_device__"):
        return int(x.__dlpack_device__()[0]) in CUDA
    return hasattr(x, "__cuda_array_interface__")


def call_is_on_gpu(q, k, v, others):
    """Whether a call is for the GPU, which it is where one of its arrays is there.

    Parameters
    ----------
    q, k, v
        The operands.
    others : dict
        {name: value} of all other arguments that may be arrays.

    Returns
    -------
    bool

    Raises
    ------
    TypeError
        Where some arrays are on a GPU and others are not.
    """
    if type(q) is type(k) is type(v) is np.ndarray and PLAIN.issuperset(map(type, others.values())):
        return False  # the usual case, without ceremony
    arguments = {"q": q, "k": k, "v": v, **others}
    there = next((name for name, x in arguments.items() if type(x) not in PLAIN and on_gpu(x)), None)
    if there is None:
        return False
    for name, x in arguments.items():
        if _is_array(x) and not on_gpu(x):
            raise TypeError(
                f"{name}: expected an array on the GPU as {there} is, got {type(x).__name__} in the host's memory; "
                f"write cupy.asarray({name}), or bring {there} to the host: cupy.asnumpy({there})"
            )
    return True


def _is_array(x):
    if (type(x).__module__, type(x).__name__) == QUANTIZED:
        return True
    # An array with one element and no axes is a number.
    return type(x) not in PLAIN - {np.ndarray} and hasattr(x, "__array__") and getattr(x, "ndim", 0) > 0
