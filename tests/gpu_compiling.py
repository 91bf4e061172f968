"""Variants as NVRTC compiles them, without a GPU: registers, spills, and the machine code."""
import collections
import importlib.util
import pickle
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from gpu_folder import once

from cyflash.gpu import build


class Compiled(NamedTuple):
    """One compiled kernel."""

    cubin: bytes
    log: str
    registers: int
    spilled: int  # bytes of spill stores and loads, and of stack frame


def compiled(variant):
    """Compile a `Variant` for its arch, once for all processes of a run."""
    path = once(".cubin", lambda path: path.write_bytes(pickle.dumps(tuple(build.build(variant)))),
                "nvrtc", build.options(variant), variant.source)
    cubin, log = pickle.loads(path.read_bytes())
    stack, stores, loads = map(int, re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log).groups())
    return Compiled(cubin, log, int(re.search(r"Used (\d+) registers", log)[1]), stack + stores + loads)


def opcodes(cubin):
    """{opcode with its modifiers: times} of the machine code."""
    return collections.Counter(listing(cubin))


def listing(cubin):
    """Opcodes with their modifiers in the order of the machine code."""
    spec = importlib.util.find_spec("nvidia.cu13") or importlib.util.find_spec("nvidia.cuda_nvdisasm")
    tool = next(path for place in spec.submodule_search_locations for path in Path(place).glob("bin/nvdisasm"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", "-ndf", file.name], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][A-Z0-9_.]*)", text, re.M)
