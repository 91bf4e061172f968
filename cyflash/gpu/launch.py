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


def launch(device, variant, grid, *arguments):
    """Queue one launch on CuPy's current stream. arguments: arrays with one element each, passed by value."""
    load(device, variant)(grid, (variant.threads,), arguments, shared_mem=variant.shared_bytes)


def grid(variant, plan, blocks=None):
    """The grid of a launch, on one axis.

    blocks: how many; as many as there are blocks of query rows in all heads of all sequences where it is not given.

    Raises
    ------
    ValueError
        Where CUDA has no such grid.
    """
    if blocks is None:
        blocks = variant.blocks(plan.B, plan.H, plan.Lq)
    if blocks > MOST_BLOCKS:
        raise ValueError(
            f"q: expected a call that takes at most {MOST_BLOCKS} blocks on the GPU, got {blocks} of {variant.kernel} "
            f"for B={plan.B}, H={plan.H}, Lq={plan.Lq}, Lk={plan.Lk}; split it by sequences or heads"
        )
    return (blocks,)


@functools.cache
def capability(device):
    """The compute capability of a device as a number: 90 for 9.0. NotImplementedError where it is too old."""
    found = status.cupy().cuda.Device(device).compute_capability
    if int(found) < status.LEAST_CAPABILITY:
        raise NotImplementedError(status.too_old(f"cuda:{device}", str(found)))
    return int(found)


@functools.cache
def architecture(device):
    """What to compile for: "sm_90a" has the instructions that only compute capability 9.0 has.

    What is compiled for a capability runs on later ones with the same first number, so a compiler that is older than
    the device will do. GPUUnavailableError where it knows none of them.
    """
    found = capability(device)
    if found == 90:
        return "sm_90a"
    nvrtc, version = status.nvrtc()
    known = [arch for arch in nvrtc.getSupportedArchs() if arch // 10 == found // 10 and arch <= found]
    if not known:
        raise status.GPUUnavailableError(
            f"NVRTC {'.'.join(map(str, version))} does not compile for cuda:{device}, which has compute capability "
            f"{found // 10}.{found % 10}; install a newer one: pip install -U 'cyflash-attn[gpu-cuda13]'"
        )
    return f"sm_{max(known)}"
