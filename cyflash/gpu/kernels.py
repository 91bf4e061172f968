"""Which kernels compute a piece of a call, and in which launches.

    float32               ffma.cu
    few query rows        decode.cu, then merge.cu, with a workspace between them
    sm_90a                hopper.cu, given tensor maps; int8 v is transposed by turned.cu first
    anything else         mma.cu; also on sm_90a what `variants.choose` names, no keys, and arrays that no tensor map
                          describes: with other strides it takes the same arrays to the same results

Buffers between launches come from CuPy's pool, at multiples of 512 bytes. The pool gives memory out again in the order
of the stream that it was taken on, so a buffer may be forgotten when what reads it is queued, and not before.
"""
import numpy as np

from cyflash.gpu import arrays, decode, launch, params, status, tensor_maps, variants
from cyflash.plan import UNBOUNDED

COPIED = ("q", "k", "v", "out")  # by kernels, in 16 bytes where their rows allow it


def queue(device, plan, names, pointers):
    """Queue what computes a plan's attention on CuPy's current stream.

    Parameters
    ----------
    device : int
        CuPy's current one.
    plan : Plan
    names : tuple of str
        Names of the dtypes of q and k, of v, and of out.
    pointers : dict
        {name of a pointer of params.py: GPUArray}.

    Returns
    -------
    Variant
        The kernel that reads the keys.

    Raises
    ------
    ValueError
        Where a grid would be larger than CUDA's.
    """
    arch = launch.architecture(device)
    how = {"aligned": _aligned(pointers), "options": _options(plan)}
    few = decode.choose_decode(arch, plan.B, plan.H, plan.Hk, plan.Lq, plan.Lk, plan.D, *names, **how)
    if few is not None:
        return _few_rows(device, plan, pointers, few)
    mapped = arch == "sm_90a" and plan.Lk > 0 and tensor_maps.can_map(*_mapped(names, pointers))
    variant = variants.choose(arch, plan.D, *names, Lq=plan.Lq, mapped=mapped, **how)
    grid = launch.grid(variant, plan)
    if variant.boxes:
        v = _turned(device, plan, pointers["v"]) if names[1] == "int8" else pointers["v"]
        boxes = tensor_maps.boxes(variant, pointers["q"].shadow, pointers["k"].shadow, v.shadow)
        # CUDA copies arguments when a launch is queued, so nothing keeps the maps.
        launch.launch(device, variant, grid, params.filled(plan, pointers), tensor_maps.encoded(boxes))
    else:
        launch.launch(device, variant, grid, params.filled(plan, pointers))
    return variant


def _few_rows(device, plan, pointers, few):
    """Two launches. Both grids are checked before anything is queued."""
    first = launch.grid(few.split, plan, few.split_blocks)
    second = launch.grid(few.merge, plan, few.merge_blocks)
    workspace = arrays.look("workspace", status.cupy().empty(few.workspace_floats, np.float32))
    told = params.filled(plan, pointers | {"workspace": workspace}, few.chunk, few.chunks)
    launch.launch(device, few.split, first, told)
    launch.launch(device, few.merge, second, told)
    return few.split


def _mapped(names, pointers):
    """Shadows of what hopper.cu has tensor maps of, but for the transposed v, whose rows lie as they must."""
    return [pointers[name].shadow for name in ("qk" if names[1] == "int8" else "qkv")]


def _turned(device, plan, v):
    """int8 v as hopper.cu takes it, (B, Hk, D, keys)."""
    variant = variants.turn(launch.architecture(device))
    grid = launch.grid(variant, plan, variants.turn_blocks(plan.B, plan.Hk, plan.Lk, plan.D))
    shape = plan.B, plan.Hk, plan.D, variants.turned_keys(plan.Lk)
    out = arrays.look("v", status.cupy().empty(shape, np.int8))
    launch.launch(device, variant, grid, params.filled(plan, {"v": v, "out": out}))
    return out


def _options(plan):
    """Names of the options that a plan has on, of those that a variant is compiled with or without."""
    on = {
        "EDGES": min(plan.left, plan.right) < UNBOUNDED, "SOFTCAP": plan.softcap > 0,
        "ALIBI": plan.alibi_slopes is not None, "BIAS": plan.bias is not None, "MASK": plan.mask is not None,
    }
    return {name for name, value in on.items() if value}


def _aligned(pointers):
    """Whether all rows that kernels copy begin at multiples of 16 bytes."""
    for name in COPIED:
        shadow = pointers[name].shadow
        if pointers[name].address % 16 or any(
            stride % 16 for stride, length in zip(shadow.strides[:3], shadow.shape[:3], strict=True) if length > 1
        ):
            return False
    return True
