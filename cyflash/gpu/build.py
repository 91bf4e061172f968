"""Kernels from source to machine code: NVRTC with sources and headers from this folder, for an explicit architecture.

No GPU, driver or CUDA header is needed: what is compiled here for a GPU is compiled by the same call in tests.
"""
from pathlib import Path
from typing import NamedTuple

from cyflash.gpu import status

FOLDER = Path(__file__).parent
# -v: registers and spills of each kernel are in the log.
OPTIONS = ("--std=c++17", "--ptxas-options=-v")


class Built(NamedTuple):
    """A compiled kernel, and what the compiler said: registers, shared memory, spills."""

    cubin: bytes
    log: str


class KernelCompileError(RuntimeError):
    """A kernel does not compile; the message has its name, its macros, the options and the compiler's log."""


def sources(variant, folder=FOLDER):
    """{file name: text} of what a variant is compiled from: its .cu file first, then every header beside it."""
    headers = sorted(path for path in folder.iterdir() if path.suffix in (".h", ".cuh"))
    return {path.name: path.read_text() for path in (folder / variant.source, *headers)}


def options(variant):
    """The compiler's options: what all kernels have, the architecture, and the macros of the variant."""
    macros = (f"-D{name}={value}" for name, value in variant.macros)
    return (*OPTIONS, f"-arch={variant.arch}", *macros)


def build(variant, texts=None):
    """Compile one kernel.

    Parameters
    ----------
    variant : Variant
        Of variants.py: the file, the kernel's name, macros, the architecture.
    texts : dict, optional
        Of `sources`, which are read where it is not given.

    Returns
    -------
    Built

    Raises
    ------
    KernelCompileError
        With kernel, variant, options and log.
    GPUUnavailableError
        Where CuPy or NVRTC is not there.
    """
    nvrtc, _ = status.nvrtc()
    texts = sources(variant) if texts is None else texts
    (name, source), *headers = texts.items()
    flags = options(variant)
    program = nvrtc.createProgram(
        source, name, tuple(text.encode() for _, text in headers), tuple(header.encode() for header, _ in headers)
    )
    try:
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError as error:
            raise KernelCompileError(_failure(variant, flags, error, nvrtc.getProgramLog(program))) from error
        # CuPy leaves out the last byte of the image, which tools that read it look for.
        return Built(nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def _failure(variant, flags, error, log):
    macros = ", ".join(f"{name}={value}" for name, value in variant.macros) or "no macros"
    return (
        f"kernel {variant.kernel} of {variant.source} ({macros}) does not compile for {variant.arch}: {error}\n"
        f"options: {' '.join(flags)}\n{log.strip() or 'the compiler gave no log'}"
    )
