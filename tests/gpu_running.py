"""Runs the GPU kernels on NumPy arrays: their source, compiled by g++ over the machine of gpu_shim/, on the CPU.

Or, where `where` is a device (gpu_on_device.py), what NVRTC makes of it, there; what is launched, with which Params, is
the same.
"""
import ctypes
import functools
import math
import os
import subprocess
from pathlib import Path

import numpy as np
from gpu_folder import once

import cyflash
from cyflash.gpu import decode, tensor_maps, variants

KERNELS = Path(cyflash.__file__).parent / "gpu"
SHIM = Path(__file__).parent / "gpu_shim"
COMPILER = (os.environ.get("CXX", "g++"), "-std=c++17", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused")
LATE, EARLY, MIXED = 0, 1, 2  # schedules of machine.h
UNBOUNDED = 1 << 62
POINTERS = ("q", "k", "v", "out", "lse", "bias", "mask", "slopes", "sinks", "q_scale", "k_scale", "v_scale", "shift",
            "workspace")
GUARD = 64  # elements beside an output that must stay as they are
SOURCES = [KERNELS, SHIM.parent]  # where .cu files are: the kernels, and gpu_primitives.cu of the tests


class KernelError(AssertionError):
    """The machine found something wrong: a deadlock, an address outside, divergence."""


class Params(ctypes.Structure):
    """struct Params of params.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((f"{name}_stride", ctypes.c_longlong * 3) for name in ["q", "k", "v", "out"]),
        *((f"{name}_stride", ctypes.c_longlong * 4) for name in ("bias", "mask")),
        *((f"{name}_scale_stride", ctypes.c_longlong * 3) for name in "qkv"),
        ("slopes_stride", ctypes.c_longlong * 2),
        *((name, ctypes.c_longlong) for name in ("offset", "left", "right")),
        *((name, ctypes.c_int) for name in ["B", "H", "Hk", "Lq", "Lk", "D"]),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("chunk", ctypes.c_int),
        ("chunks", ctypes.c_int),
    ]


class TensorMap(ctypes.Structure):
    """struct TensorMap of gpu_shim/hopper.cuh."""

    _fields_ = [
        ("base", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("size", "columns", "rows", "heads", "batches", "box_columns", "box_rows")),
        *((name, ctypes.c_longlong) for name in ("row_stride", "head_stride", "batch_stride")),
    ]

    @classmethod
    def of(cls, box):
        return cls(box.address, box.size, *box.shape, *box.box, *box.strides)


def command(*arguments):
    done = subprocess.run([*COMPILER, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


@functools.cache
def machine():
    """The machine without a kernel: a library, which those of kernels load."""
    sources = [path for path in SHIM.glob("*.cpp") if path.name != "run.cpp"]
    return once(".so", lambda path: command("-O2", "-shared", *sources, "-o", path), "machine")


@functools.cache
def library(source, macros, changes=()):
    """The compiled kernel. changes: (file, old, new) of text that is replaced in its source, old being there once."""
    loaded = ctypes.CDLL(str(once(".so", lambda path: compile_kernel(path, source, macros, changes),
                                  source, macros, changes)))
    loaded.run.restype = ctypes.c_char_p
    assert loaded.params_size() == ctypes.sizeof(Params)
    return loaded


def compile_kernel(to, source, macros, changes):
    place = to.with_suffix(".sources")
    place.mkdir(exist_ok=True)
    paths = [path for source in SOURCES for path in source.iterdir()
             if path.suffix in (".cu", ".cuh", ".h") and not (SHIM / path.name).exists()]
    if unknown := {file for file, *_ in changes} - {path.name for path in paths}:
        raise ValueError(f"changes of {unknown}, which is none of {sorted(path.name for path in paths)}")
    for path in paths:
        text = path.read_text()
        for file, old, new in changes:
            if file == path.name:
                if text.count(old) != 1:
                    raise ValueError(f"{file} has {text.count(old)} times: {old}")
                text = text.replace(old, new)
        (place / path.name).write_text(text)
    flags = [f"-D{name}={value}" for name, value in macros]
    command("-Og", "-shared", f'-DSOURCE="{source}"', *flags, "-x", "c++", "-I", place, "-I", SHIM, SHIM / "run.cpp",
            "-x", "none", machine(), "-o", to)


def of_kernel(change, variant):
    """Whether a change of text is one of this kernel's source, or of a file that kernels share."""
    return change[0] == variant.source or not change[0].endswith(".cu")


class Result:
    """out and lse of a run, and what the machine counted."""

    def __init__(self, out, lse, variant, counts):
        self.out, self.lse = out, lse
        self.variant, self.Bc = variant, dict(variant.macros).get("BLOCK_K", 32)  # decode.cu: KEYS
        self.matrix_reads, self.conflicts, self.products = counts


class Shim:
    """Where kernels run: here, one block after another, by the machine of gpu_shim/."""

    def arch(self, asked):
        """What variants are chosen for, where a test asks for this."""
        return asked

    def takes_maps(self, arch):
        """Whether kernels that take tensor maps are chosen where they can be."""
        return arch == "sm_90a"

    def place(self, x):
        """The array as kernels get it, of the same shape and strides; nothing may read it."""
        return x

    def fetch(self, placed, x):
        """What kernels wrote to placed = place(x), into x."""

    def release(self):
        """Nothing that was placed is used any more."""

    def launch(self, variant, blocks, params, schedule, seed, readable, changes, boxes=()):
        """Run one kernel; return what the machine counted."""
        loaded = library(variant.source, variant.macros, tuple(one for one in changes if of_kernel(one, variant)))
        ranges = (ctypes.c_void_p * len(readable))(*readable)
        maps = (TensorMap * len(boxes))(*map(TensorMap.of, boxes))
        error = loaded.run(ctypes.byref(params), maps, blocks, variant.threads, variant.shared_bytes, schedule, seed,
                           ranges, len(readable) // 2)
        if error:
            raise KernelError(error.decode())
        counts = (ctypes.c_long * 3)()
        loaded.counts(counts)
        return tuple(counts)


where = Shim()


def turned(v, seed, changes=()):
    """v (B, Hk, Lk, D) of codes as `variants.turn` transposes it; v and the result are placed."""
    B, Hk, Lk, D = v.shape
    out = where.place(np.full((B, Hk, D, variants.turned_keys(Lk)), 77, np.int8))
    params = Params(v=v.ctypes.data, out=out.ctypes.data, B=B, Hk=Hk, Lk=Lk, D=D)
    params.v_stride[:], params.out_stride[:] = v.strides[:3], out.strides[:3]
    readable = np.lib.array_utils.byte_bounds(v)
    where.launch(variants.turn(), variants.turn_blocks(B, Hk, Lk, D), params, EARLY, seed, readable, changes)
    return out


def run(q, k, v, *, causal=False, causal_align="bottom-right", scale=None, window=None, softcap=0.0, bias=None,
        mask=None, alibi_slopes=None, sinks=None, q_scale=None, k_scale=None, v_scale=None, shift=None, out_dtype=None,
        schedule=EARLY, seed=1, changes=(), arch="sm_80", few=False):
    """Attention of (B, H, L, D) arrays by the kernel that `variants.choose` names. Scales: (B, H, L) by strides.

    few: by the kernels of few rows instead, which `decode.choose_decode` names.
    """
    try:
        return _run(q, k, v, causal=causal, causal_align=causal_align, scale=scale, window=window, softcap=softcap,
                    bias=bias, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, q_scale=q_scale, k_scale=k_scale,
                    v_scale=v_scale, shift=shift, out_dtype=np.dtype(out_dtype or q.dtype), schedule=schedule,
                    seed=seed, changes=changes, arch=where.arch(arch), few=few)
    finally:
        where.release()


def _run(q, k, v, *, causal, causal_align, scale, window, softcap, bias, mask, alibi_slopes, sinks, q_scale, k_scale,
         v_scale, shift, out_dtype, schedule, seed, changes, arch, few):
    (B, H, Lq, D), (_, Hk, Lk, _) = q.shape, k.shape
    q, k, v, bias, mask, alibi_slopes, sinks, q_scale, k_scale, v_scale, shift = (
        None if x is None else where.place(x)
        for x in (q, k, v, bias, mask, alibi_slopes, sinks, q_scale, k_scale, v_scale, shift)
    )
    on = {
        "EDGES": causal or window is not None, "SOFTCAP": softcap > 0, "ALIBI": alibi_slopes is not None,
        "BIAS": bias is not None, "MASK": mask is not None,
    }
    aligned = all(x.ctypes.data % 16 == 0 and all(s % 16 == 0 for s in x.strides[:3]) for x in (q, k, v))
    kernel = dict(aligned=aligned, options={name for name in on if on[name]})
    names = D, q.dtype.name, v.dtype.name, out_dtype.name
    split = decode.choose_decode(arch, B, H, Hk, Lq, Lk, *names, **kernel) if few else None
    mapped = where.takes_maps(arch) and Lk > 0 and tensor_maps.can_map(q, k, v)
    variant = split.split if few else variants.choose(arch, *names, Lq=Lq, mapped=mapped, **kernel)

    guarded = np.full(B * H * Lq * D + 2 * GUARD, 77, out_dtype)
    written = where.place(guarded)
    out = written[GUARD:-GUARD].reshape(B, H, Lq, D)
    lse = np.full((B, H, Lq), 77, np.float32)
    placed_lse = where.place(lse)
    rows = (B, H, Lq, Lk)
    bias = None if bias is None else np.broadcast_to(bias, rows, subok=True)
    mask = None if mask is None else np.broadcast_to(mask, rows, subok=True)
    slopes = None if alibi_slopes is None else np.broadcast_to(alibi_slopes, (B, H), subok=True)
    left, right = (-1, -1) if window is None else window
    right = 0 if causal else right

    params = Params(
        lse=placed_lse.ctypes.data, B=B, H=H, Hk=Hk, Lq=Lq, Lk=Lk, D=D, softcap=softcap,
        scale=1 / math.sqrt(D) if scale is None else scale, offset=Lk - Lq if causal_align == "bottom-right" else 0,
        left=UNBOUNDED if left == -1 else left, right=UNBOUNDED if right == -1 else right,
    )
    readable = []
    for name, x in dict(q=q, k=k, v=v, out=out, bias=bias, mask=mask, slopes=slopes, q_scale=q_scale, k_scale=k_scale,
                        v_scale=v_scale).items():
        if x is None:
            continue
        setattr(params, name, x.ctypes.data)
        strides = getattr(params, f"{name}_stride")
        strides[:] = [s // x.itemsize for s in x.strides[: len(strides)]]
        if x.size:
            readable += np.lib.array_utils.byte_bounds(x)
    for name, x in dict(sinks=sinks, shift=shift).items():
        setattr(params, name, None if x is None else x.ctypes.data)

    values = turned(v, seed, changes) if variant.boxes and v.dtype == np.int8 else v
    boxes = tensor_maps.boxes(variant, q, k, values)
    launches = [(variant, variant.blocks(B, H, Lq))]
    if few:
        workspace = np.full(split.workspace_floats + 2 * GUARD, np.nan, np.float32)
        space = where.place(workspace)
        params.chunk, params.chunks = split.chunk, split.chunks
        params.workspace = space[GUARD:].ctypes.data
        readable += np.lib.array_utils.byte_bounds(space[GUARD:-GUARD])
        launches = [(split.split, split.split_blocks), (split.merge, split.merge_blocks)]
    counts = np.zeros(3, int)
    for one, blocks in launches:
        counts += where.launch(one, blocks, params, int(schedule), seed, readable, changes, boxes)
    where.fetch(written, guarded)
    where.fetch(placed_lse, lse)
    if few:
        where.fetch(space, workspace)
        beside = np.concatenate([workspace[:GUARD], workspace[-GUARD:]])
        assert np.isnan(beside).all(), "wrote outside the workspace"
    beside = np.concatenate([guarded[:GUARD], guarded[-GUARD:]])
    assert (beside == guarded.dtype.type(77)).all(), "wrote outside the output"
    return Result(guarded[GUARD:-GUARD].reshape(B, H, Lq, D), lse, variant, counts)
