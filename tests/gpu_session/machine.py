"""What the machine has: one line for each fact, each found in a process of its own that may fail."""
import json
import os
import platform
import shutil

from gpu_session import processes
from gpu_session.processes import python

LIMIT = 90.0      # seconds of a question: the first import of torch can take a minute
BUILDING = 420.0  # of the C extensions
MARK = "cyflash-fact "

QUESTIONS = {
    "GPU": """
import cupy
device, properties = cupy.cuda.Device(), cupy.cuda.runtime.getDeviceProperties(0)
name = properties["name"]
attributes = device.attributes
answer = dict(
    name=name.decode() if isinstance(name, bytes) else name, compute_capability=device.compute_capability,
    multiprocessors=attributes.get("MultiProcessorCount"), clock_khz=attributes.get("ClockRate"),
    memory_bytes=properties.get("totalGlobalMem"), l2_bytes=attributes.get("L2CacheSize"),
    driver=cupy.cuda.runtime.driverGetVersion(), runtime=cupy.cuda.runtime.runtimeGetVersion())
""",
    "CuPy and NVRTC": """
import cupy
from cupy.cuda import nvrtc
answer = dict(cupy=cupy.__version__, nvrtc=nvrtc.getVersion())
""",
    "CuPy's own kernels": """
import cupy
answer = float(cupy.arange(8, dtype="f").sum())
""",
    "cyflash": """
import cyflash
answer = cyflash.gpu_status()._asdict() | dict(version=cyflash.__version__, file=cyflash.__file__)
""",
    "torch": """
import torch
answer = dict(torch=torch.__version__, cuda=torch.version.cuda, available=torch.cuda.is_available(),
    cudnn=torch.backends.cudnn.version())
""",
    "triton": "import triton\nanswer = triton.__version__",
    "numpy": "import numpy, ml_dtypes\nanswer = dict(numpy=numpy.__version__, ml_dtypes=ml_dtypes.__version__)",
    "pytest": "import pytest\nanswer = pytest.__version__",
}
TOOLS = ("nvidia-smi", "compute-sanitizer", "nvcc", "g++", "gcc")


def ask(code, dry=False):
    """(answer, error): what a piece of Python leaves in `answer`, which must be JSON."""
    before = "import gpu_pretend; gpu_pretend.install()\n" if dry else ""
    code = f"import json\n{before}{code}\nprint({MARK!r} + json.dumps(answer, default=str))"
    done = processes.run(python("-P", "-c", code), LIMIT)
    for line in done.output.splitlines():
        if line.startswith(MARK):
            return json.loads(line[len(MARK):]), None
    return None, f"{done.why()}: {done.tail(1)}"


def describe(report, dry=False):
    """Say and keep what there is."""
    found = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()}
    for name in ("python", "system", "cores"):
        report.say(f"{name}: {found[name]}")
    smi = shutil.which("nvidia-smi")
    if smi:
        done = processes.run([smi, "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.sm,"
                              "temperature.gpu", "--format=csv"], LIMIT)
        found["nvidia-smi"] = done.output
        report.say(done.output.strip())
    for name in TOOLS:
        report.say(f"{name}: {shutil.which(name) or 'not on PATH'}")
    for name, code in QUESTIONS.items():
        answer, error = ask(code, dry)
        found[name] = {"error": error} if error else answer
        report.say(f"{name}: {error or json.dumps(answer, default=str)}")
    report.keep("machine", found)
    return found


def built(report):
    """Whether cyflash imports here; builds its C extensions where they are missing, which takes a compiler and Cython.
    """
    _, error = ask("import cyflash\nanswer = 1")
    if not error:
        return True
    report.say(f"cyflash does not import ({error}); its C extensions are built now: setup.py build_ext --inplace")
    done = processes.run(python("setup.py", "build_ext", "--inplace"), BUILDING)
    report.add_log("setup.py build_ext --inplace", done.output)
    _, error = ask("import cyflash\nanswer = 1")
    report.say(f"built in {done.seconds:.0f} s: {done.why()}; " + (error or "cyflash imports"))
    if error:
        report.say(done.tail())
    return not error
