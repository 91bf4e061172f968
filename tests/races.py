"""Runs calls on several threads on a build with ThreadSanitizer, and says which races it saw:

    python -m tests.races [--builds baseline ...] [--seconds 60] [--seed 0]

Needs clang with its OpenMP runtime, whose Archer tells ThreadSanitizer what OpenMP orders: with GCC's runtime correct
programs are reported. Before the calls a race is planted, which has to be reported, or the run proves nothing.
"""
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import instrumented

CALLS = Path(__file__).with_name("random_calls.py")
FLAGS = ("-fsanitize=thread", "-fopenmp")
NAMES = ("clang-14", "clang", *(f"clang-{n}" for n in range(13, 25)))
PLANTED = """
#include <omp.h>
long planted(long n) {
    long total = 0;
    #pragma omp parallel for num_threads(2)
    for (long i = 0; i < n; i++) total += i;
    return total;
}
long ordered(long n) {
    long total = 0;
    #pragma omp parallel for num_threads(2) reduction(+:total)
    for (long i = 0; i < n; i++) total += i;
    return total;
}
"""


def compiler():
    return next((name for name in NAMES if shutil.which(name)), None)


def libraries():
    """{name: path or None} of what has to be there beside the compiler."""
    tsan = instrumented.runtime(compiler(), f"libclang_rt.tsan-{os.uname().machine}.so")
    found = {"tsan": tsan, "libomp.so": None, "libarcher.so": None}
    for folder in [] if tsan is None else tsan.parents:  # LLVM's own lib, some folders above
        for name in ("libomp.so", "libarcher.so"):
            if found[name] is None and (folder / name).exists():
                found[name] = folder / name
    return found


def why_not():
    """What is missing here; an empty string when it can run."""
    if compiler() is None:
        return "clang is not installed"
    if reason := instrumented.why_not():
        return reason
    absent = [name for name, path in libraries().items() if path is None]
    if absent:
        return f"{compiler()} has no {', '.join(absent)}: on Debian `apt install libomp-14-dev libclang-rt-14-dev`"
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        return "this Python has no shared library to link an interpreter with"
    return "" if shutil.which("setarch") else "setarch is not installed"


def environment(folder):
    found = libraries()
    packages = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    return instrumented.environment(
        folder, packages, OMP_TOOL_LIBRARIES=str(found["libarcher.so"]),
        TSAN_OPTIONS="ignore_noninstrumented_modules=1:exitcode=66", LD_LIBRARY_PATH=str(found["libomp.so"].parent),
    )


def interpreter(folder):
    """A Python that has the sanitizer's runtime linked in: preloaded, it ends before it begins on some systems."""
    source, program = folder.parent / "python.c", folder.parent / "python"
    source.write_text("#include <Python.h>\nint main(int n, char **v) { return Py_BytesMain(n, v); }\n")
    of = sysconfig.get_config_var
    command = [compiler(), "-fsanitize=thread", f"-I{sysconfig.get_path('include')}", str(source), f"-L{of('LIBDIR')}"]
    command += [f"-lpython{of('LDVERSION')}", f"-Wl,-rpath,{of('LIBDIR')}", "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def run(*arguments, folder):
    """A script in a process with the sanitizer, at addresses that it can use."""
    command = ["setarch", "-R", str(folder.parent / "python"), *map(str, arguments)]
    return subprocess.run(command, env=environment(folder), cwd=instrumented.ROOT, capture_output=True, text=True)


def controls(folder):
    """Whether a planted race is reported, and the same without it is not."""
    with instrumented.planted(PLANTED, compiler(), *FLAGS, "-g", "-O1") as library:
        planted, ordered = (run(__file__, "--control", name, library, folder=folder) for name in ("planted", "ordered"))
    return planted.returncode == 66 and "data race" in planted.stderr and ordered.returncode == 0


def main():
    asked, how = instrumented.options(__doc__, ["baseline"])
    if asked.control:
        return instrumented.call_planted(*asked.control, 100000)
    if why_not():
        sys.exit(f"cannot run: {why_not()}")
    folder = instrumented.build("races", FLAGS, asked.builds, compiler=compiler(), link=FLAGS)
    interpreter(folder)
    if not controls(folder):
        sys.exit("races: FAILED: the planted race was not reported, or one where there is none")
    result = run(CALLS, *how, folder=folder)
    print(result.stdout, result.stderr[-20000:], sep="")
    if result.returncode:
        print(f"again: python -m tests.races {' '.join(map(str, how))}")
    print("races: none seen" if result.returncode == 0 else "races: FAILED")
    sys.exit(result.returncode)


if __name__ == "__main__":
    main()
