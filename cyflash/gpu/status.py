"""Whether this process has a GPU that the kernels run on, and why not. CuPy is imported when that is asked."""
import importlib.util
from typing import NamedTuple

LEAST_CAPABILITY = 80  # compute capability 8.0: cp.async, bfloat16 and int8 products of whole warps

INSTALL = "install it with: pip install 'cyflash-attn[gpu-cuda13]' (or gpu-cuda12, as the driver is)"
# Of cudaError_t: what the first call of the runtime says where there is nothing to run on.
DRIVER_TOO_OLD, NO_DEVICE = 35, 100


class GPUUnavailableError(RuntimeError):
    """There is no GPU, or something that it takes is not installed; the message says what.

    Examples
    --------
    >>> import cyflash
    >>> issubclass(cyflash.GPUUnavailableError, RuntimeError)
    True
    """


class GPUStatus(NamedTuple):
    """What `gpu_status` found. `reason` says why not, or which GPU would be used."""

    available: bool
    reason: str
    device: str | None = None
    compute_capability: str | None = None  # "9.0"
    cupy: str | None = None
    nvrtc: str | None = None


def gpu_status():
    """Whether attention can run on a GPU in this process, and why not.

    Returns
    -------
    GPUStatus
        A named tuple: `available`, a bool; `reason`, a sentence; and as far as they could be found `device` (its name),
        `compute_capability` ("9.0"), `cupy` and `nvrtc` (their versions).

    Notes
    -----
    Asks CuPy's current device. Never raises; imports CuPy, which `import cyflash` and calls with NumPy arrays do not.

    Examples
    --------
    >>> import cyflash
    >>> status = cyflash.gpu_status()
    >>> isinstance(status.available, bool), bool(status.reason)
    (True, True)
    """
    found = {}
    try:
        _look(found)
    except GPUUnavailableError as error:
        return GPUStatus(False, str(error), **found)
    return GPUStatus(True, f"{found['device']}, compute capability {found['compute_capability']}", **found)


def cupy():
    """The module CuPy; GPUUnavailableError where it is not installed or does not import."""
    try:
        import cupy
    except Exception as error:  # of a broken installation any; OSError where it cannot make its own cache folder
        if importlib.util.find_spec("cupy") is None:
            raise GPUUnavailableError(f"CuPy is not installed; {INSTALL}") from error
        raise GPUUnavailableError(f"CuPy does not import: {error}") from error
    return cupy


def nvrtc():
    """CuPy's module of NVRTC, the compiler of kernels, and its version; GPUUnavailableError where it is not there."""
    module = cupy().cuda.nvrtc
    try:
        return module, module.getVersion()
    except Exception as error:  # the library is looked for at the first call, and each way fails with its own error
        raise GPUUnavailableError(f"NVRTC, which compiles the kernels, was not found ({error}); {INSTALL}") from error


def _look(found):
    """Fill in what GPUStatus says; GPUUnavailableError at the first thing that is missing."""
    module = cupy()
    found["cupy"] = module.__version__
    try:
        count = module.cuda.runtime.getDeviceCount()
        if count:
            device = module.cuda.Device()
            capability = str(device.compute_capability)
            found["device"] = _text(module.cuda.runtime.getDeviceProperties(device.id)["name"])
    except Exception as error:  # CUDARuntimeError, of a module that has moved between versions of CuPy
        raise GPUUnavailableError(_why(error)) from error
    if not count:
        raise GPUUnavailableError(_why(None))
    found["compute_capability"] = f"{capability[:-1]}.{capability[-1]}"
    if int(capability) < LEAST_CAPABILITY:
        raise GPUUnavailableError(too_old(found["device"], capability))
    found["nvrtc"] = ".".join(map(str, nvrtc()[1]))


def too_old(device, capability):
    """Why a GPU of this capability ("75") is not used."""
    least = f"{LEAST_CAPABILITY // 10}.{LEAST_CAPABILITY % 10}"
    return f"{device} has compute capability {capability[:-1]}.{capability[-1]}; the kernels need {least} or later"


def _why(error):
    status = getattr(error, "status", NO_DEVICE if error is None else None)
    if status == DRIVER_TOO_OLD:
        return "no NVIDIA driver was found, or it is older than this CuPy needs"
    if status == NO_DEVICE:
        return "there is an NVIDIA driver but no GPU that this process may use (CUDA_VISIBLE_DEVICES can hide them)"
    return f"CUDA does not start: {error}"


def _text(name):
    return name.decode() if isinstance(name, bytes) else str(name)
