"""What tests of 16-bit floats share: the two dtypes, arrays of them, and the same values in float32."""
import numpy as np
import pytest

KINDS = ("fp16", "bf16")


def dtype_of(kind):
    """The NumPy dtype; the test is skipped where that needs ml_dtypes and it is not installed."""
    if kind == "bf16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype({"fp32": np.float32, "fp16": np.float16}[kind])


def installed():
    """The dtypes of 16 bits that there are here."""
    try:
        import ml_dtypes
    except ImportError:
        return (np.float16,)
    return np.float16, ml_dtypes.bfloat16


def as_kind(kind, *arrays):
    """The arrays, rounded to this dtype."""
    return tuple(x.astype(dtype_of(kind)) for x in arrays)


def exact(*arrays):
    """The same values in float32."""
    with np.errstate(invalid="ignore"):  # NumPy warns of signalling NaN on some CPUs
        return tuple(x.astype(np.float32) for x in arrays)


def assert_same_bits(a, b):
    """Equal dtypes, shapes and bits."""
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()
