"""Runs the tests of the kernels on a build with AddressSanitizer and UndefinedBehaviorSanitizer:

    python -m tests.sanitized [--builds baseline avx2 ...] [TESTS ...]

The first error ends the run. Signed overflow counts as one (Python's own flags would define it: -fno-wrapv). What the
sanitizers cannot see is left to guarded_tails.py: masked loads and stores of AVX-512 beyond an array.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import instrumented

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-wrapv")
LIBRARIES = ("libasan.so", "libubsan.so")

# Python frees next to nothing when it ends, and tests ask for more memory than there is on purpose.
ASAN_OPTIONS = "detect_leaks=0:allocator_may_return_null=1:abort_on_error=0"
UBSAN_OPTIONS = "print_stacktrace=1"

TESTS = (
    "tails", "options", "special_values", "split", "invariance", "varlen", "merge", "half", "half_quantise",
    "half_observe", "quantise", "quantized", "kvcache", "kvcache_attention", "paged", "int8_tails", "int8_options",
    "int8_codes", "int8_sums", "int8_special_values", "int8_invariance", "int8_varlen", "methods", "convert", "large",
)


def environment(folder):
    libraries = [instrumented.runtime("gcc", name) for name in LIBRARIES]
    return instrumented.environment(
        folder, LD_PRELOAD=" ".join(map(str, libraries)), ASAN_OPTIONS=ASAN_OPTIONS, UBSAN_OPTIONS=UBSAN_OPTIONS,
        PYTHONMALLOC="malloc", OMP_WAIT_POLICY="passive",
    )


def why_not():
    """What is missing here; an empty string when it can run."""
    if reason := instrumented.why_not():
        return reason
    if instrumented.missing("gcc"):
        return "gcc is not installed"
    absent = [name for name in LIBRARIES if instrumented.runtime("gcc", name) is None]
    return f"gcc has no {', '.join(absent)}: install its libasan and libubsan" if absent else ""


def build(builds, name="sanitized"):
    return instrumented.build(name, FLAGS, builds, link=FLAGS[:1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="arguments of pytest; default: the tests of the kernels")
    parser.add_argument("--builds", nargs="+", default=["baseline", "avx2"], help="SIMD builds (default: these two)")
    arguments = parser.parse_args()
    if why_not():
        sys.exit(f"cannot run: {why_not()}")
    folder = build(arguments.builds)
    tests = arguments.tests or [f"tests/test_{name}.py" for name in TESTS]
    start = time.monotonic()
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    status = subprocess.run(command, cwd=instrumented.ROOT, env=environment(folder)).returncode
    outcome = "no error" if status == 0 else "FAILED"
    print(f"sanitized: {outcome}, builds {' '.join(arguments.builds)}, {time.monotonic() - start:.0f} s")
    sys.exit(status)


if __name__ == "__main__":
    main()
