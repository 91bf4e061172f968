"""compute-sanitizer over every kind of kernel: no access beyond arrays, no race in shared memory, no wrong barrier."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_on_device
import gpu_sanitized
import pytest

pytestmark = pytest.mark.gpu

ERRORS = 9  # exit status where it found any
FOLDERS = ("/usr/local/cuda*", "/opt/cuda*")  # where toolkits are installed
# racecheck and synccheck follow shared memory: public functions would add CuPy's own kernels.
WATCHED = {"memcheck": list(gpu_sanitized.KINDS),
           "racecheck": [kind for kind in gpu_sanitized.KINDS if kind != "public functions"],
           "synccheck": ["mma", "decode", "hopper", "hopper of codes"]}


def sanitizer():
    """The program, or None."""
    places = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for pattern in FOLDERS:
        places += sorted(Path("/").glob(pattern[1:]), reverse=True)
    places += [Path(place) / "nvidia" / folder for place in sys.path for folder in ("cu13", "cuda_sanitizer_api")]
    found = shutil.which("compute-sanitizer")
    candidates = [place / folder / "compute-sanitizer" for place in places for folder in ("bin", "compute-sanitizer")]
    return found or next((str(path) for path in candidates if os.access(path, os.X_OK) and path.is_file()), None)


def require(kind):
    gpu_on_device.require("9.0" if "hopper" in kind else None)
    if sanitizer() is None:
        pytest.skip(f"compute-sanitizer is neither on PATH nor in {', '.join(FOLDERS)}, CUDA_HOME or CUDA_PATH")


@pytest.mark.parametrize(("tool", "kind"), [(tool, kind) for tool, kinds in WATCHED.items() for kind in kinds])
def test_clean(tool, kind):
    require(kind)
    script = Path(gpu_sanitized.__file__)
    command = [sanitizer(), "--tool", tool, "--error-exitcode", str(ERRORS), "--print-limit", "6", sys.executable, "-P",
               str(script), kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{tool} did not end: {(error.stdout or b'')[-1500:]}") from None
    output = done.stdout + done.stderr
    if "not supported" in output and "done: " not in output:
        pytest.skip(f"compute-sanitizer: {next(line for line in output.splitlines() if 'not supported' in line)}")
    found = [line for line in output.splitlines() if line.startswith("=========")]
    assert done.returncode == 0, "\n".join([f"exit status {done.returncode}", *found[:60], output[-1500:]])
    assert "done: " in output, output[-1500:]
