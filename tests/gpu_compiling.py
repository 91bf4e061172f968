"""Compiles variants by NVRTC, without a GPU: what the compiler says of registers and spills, and the machine code."""
import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import cyflash

KERNELS = Path(cyflash.__file__).parent / "gpu"


class Compiled(NamedTuple):
    """One compiled kernel."""

    cubin: bytes
    log: str
    registers: int
    spilled: int  # bytes of spill stores and loads, and of stack frame


def compiled(variant):
    """Compile a `Variant` for its arch."""
    from cupy.cuda import nvrtc

    headers = sorted(path for path in KERNELS.iterdir() if path.suffix in (".cuh", ".h"))
    program = nvrtc.createProgram((KERNELS / variant.source).read_text(), variant.source,
                                  tuple(path.read_bytes() for path in headers),
                                  tuple(path.name.encode() for path in headers))
    macros = [f"-D{name}={value}" for name, value in variant.macros]
    try:
        nvrtc.compileProgram(program, ("--std=c++17", "--ptxas-options=-v", f"-arch={variant.arch}", *macros))
        log = nvrtc.getProgramLog(program)
        cubin = nvrtc.getCUBIN(program) + b"\0"
    except nvrtc.NVRTCError as error:
        raise AssertionError(f"{variant}: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
    stack, stores, loads = map(int, re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log).groups())
    return Compiled(cubin, log, int(re.search(r"Used (\d+) registers", log)[1]), stack + stores + loads)


def opcodes(cubin):
    """{opcode with its modifiers: times} of the machine code."""
    spec = importlib.util.find_spec("nvidia.cu13") or importlib.util.find_spec("nvidia.cuda_nvdisasm")
    tool = next(path for place in spec.submodule_search_locations for path in Path(place).glob("bin/nvdisasm"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found = {}
    for name in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][A-Z0-9_.]*)", text, re.M):
        found[name] = found.get(name, 0) + 1
    return found
