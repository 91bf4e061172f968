"""Runs random calls on the compiled modules as they are under valgrind, and says what it saw of them:

    python -m tests.memcheck [--builds baseline avx2] [--seconds 60] [--seed 0]

Memcheck sees reads of memory that was never written, which no sanitizer of GCC does, and what lies beyond a block of
the heap. It knows no AVX-512. Only errors with a compiled module of cyflash on the stack count: Python's start and
OpenMP's runtime have some of their own. Before the calls two errors are planted, which have to be reported, or the run
proves nothing.
"""
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import instrumented

CALLS = Path(__file__).with_name("random_calls.py")
MODULES = re.compile(r"/cyflash/cpu/[^/]+\.so$|/planted\.so$")  # whatever they are called for a version of Python
LEAKS = "Leak_"  # blocks that Python keeps to its end
PLANTED = """
#include <stdlib.h>
long unwritten(long n) { /* takes a branch by what was never written */
    volatile long *x = malloc(8 * n);
    if (x[n / 2] > 0) x[0] = 1;
    return 0;
}
long beyond(long n) {
    volatile long *x = calloc(n, 8);
    return x[n];
}
long clean(long n) {
    volatile long *x = calloc(n, 8);
    if (x[n - 1] > 0) x[0] = 1;
    return 0;
}
"""


def why_not():
    """What is missing here; an empty string when it can run."""
    return " and ".join(f"{name} is not installed" for name in instrumented.missing("valgrind", "gcc"))


def run(*arguments):
    """A script under valgrind: what it printed, and the errors of our modules, each in one line."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = ["valgrind", "-q", "--xml=yes", f"--xml-file={report}", "--num-callers=30"]
        command += ["--error-limit=no", sys.executable, "-P", *map(str, arguments)]
        path = os.pathsep.join([str(instrumented.ROOT / "tests"), *filter(None, sys.path)])
        environment = os.environ | {"PYTHONPATH": path, "PYTHONMALLOC": "malloc", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(command, env=environment, cwd=instrumented.ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"memcheck: FAILED: {' '.join(map(str, arguments))}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        return done.stdout, list(_errors(report))


def _errors(report):
    for error in ElementTree.parse(report).iter("error"):
        frames = list(error.find("stack"))
        ours = [frame for frame in frames if MODULES.search(frame.findtext("obj", ""))]
        if ours and not error.findtext("kind").startswith(LEAKS):
            what = error.findtext("what") or error.findtext("xwhat/text")
            where = ", ".join(
                f"{frame.findtext('fn', '?')} of {Path(frame.findtext('obj')).name}" for frame in ours[:3]
            )
            yield f"{what}: {where}"


def controls():
    """Whether planted errors are reported, and the same without them is not."""
    with instrumented.planted(PLANTED, "gcc", "-O1") as library:
        found = {name: run(__file__, "--control", name, library)[1] for name in ("unwritten", "beyond", "clean")}
    return "uninitialised" in str(found["unwritten"]) and "Invalid read" in str(found["beyond"]) and not found["clean"]


def main():
    asked, how = instrumented.options(__doc__, ["baseline", "avx2"])
    if asked.control:
        return instrumented.call_planted(*asked.control, 1000)
    if why_not():
        sys.exit(f"cannot run: {why_not()}")
    if not controls():
        sys.exit("memcheck: FAILED: planted errors were not reported, or one where there is none")
    printed, errors = run(CALLS, *how)
    print(printed.splitlines()[-1], *errors, sep="\n")
    if errors:
        print(f"again: python -m tests.memcheck {' '.join(map(str, how))}")
    print(f"memcheck: {len(errors)} errors" if errors else "memcheck: no error")
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
