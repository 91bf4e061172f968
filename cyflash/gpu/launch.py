"""Kernels on a device: a variant is compiled or found on disk, loaded once, and launched on a grid of blocks."""
import functools
import threading

from cyflash.gpu import cubins, status

MOST_BLOCKS = 2**31 - 1  # on the first axis of a grid, the only one that is used
# More dynamic shared memory than this a kernel must ask for when it is loaded.
SHARED_WITHOUT_ASKING = 48 * 1024

_loaded: dict = {}
_lock = threading.Lock()


def load(device, variant):
    """The kernel of a variant on a device, a `cupy.RawKernel`: found or compiled the first time it is asked for."""
    kernel = _loaded.get((device, variant))
    if kernel is None:
        path = cubins.path_of(variant)
        cupy = status.cupy()
        with _lock, cupy.cuda.Device(device):
            kernel = cupy.RawModule(path=str(path)).get_function(variant.kernel)
            if variant.shared_bytes > SHARED_WITHOUT_ASKING:
                kernel.max_dynamic_shared_size_bytes = variant.shared_bytes
            _loaded[device, variant] = kernel
    return kernel


def launch(device, variant, grid, params):
    """Queue one launch on CuPy's current stream. params: an array with one element, passed by value."""
    load(device, variant)(grid, (variant.threads,), (params,), shared_mem=variant.shared_bytes)


def grid(variant, plan):
    """As many blocks as there are blocks of query rows in all heads of all sequences, on one axis.

    Raises
    ------
    ValueError
        Where CUDA has no such grid.
    """
    blocks = variant.blocks(plan.B, plan.H, plan.Lq)
    if blocks > MOST_BLOCKS:
        raise ValueError(
            f"q: expected at most {MOST_BLOCKS} blocks of {variant.rows} query rows in a call on the GPU, got {blocks} "
            f"of B={plan.B}, H={plan.H}, Lq={plan.Lq}; split the call"
        )
    return (blocks,)


@functools.cache
def capability(device):
    """The compute capability of a device as a number: 90 for 9.0. NotImplementedError where it is too old."""
    found = status.cupy().cuda.Device(device).compute_capability
    if int(found) < status.LEAST_CAPABILITY:
        raise NotImplementedError(status.too_old(f"cuda:{device}", str(found)))
    return int(found)


def architecture(device):
    """What to compile for: "sm_90a" has the instructions that only compute capability 9.0 has."""
    found = capability(device)
    return "sm_90a" if found == 90 else f"sm_{found}"
