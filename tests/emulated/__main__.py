"""python -m tests.emulated --cpu CPU: the tests of the kernels on a CPU that qemu emulates.

    python -m tests.emulated --list                              the CPUs, and what is missing to run each
    python -m tests.emulated --prepare                           what AArch64 takes, into build/aarch64
    python -m tests.emulated --cpu Haswell --cpu cortex-a76      all tests of the kernels on these
    python -m tests.emulated --cpu max -- -k int8 tests/test_attention.py      as pytest is told

Nothing is measured: an emulated CPU tells what instructions give, not how fast. The exit status is 0 if all tests pass.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from emulated import aarch64, python
from emulated.models import MODELS

# Files whose tests meet what a SIMD build does: the rest is Python, which is the same on every CPU.
KERNEL_TESTS = (
    "test_attention", "test_convert", "test_half", "test_half_observe", "test_half_quantise", "test_implementation",
    "test_int8_codes", "test_int8_invariance", "test_int8_options", "test_int8_special_values", "test_int8_sums",
    "test_int8_tails", "test_int8_varlen", "test_invariance", "test_kvcache_attention", "test_merge", "test_modules",
    "test_options", "test_paged", "test_quantise", "test_skipping", "test_special_values", "test_split", "test_tails",
    "test_varlen",
)
LEFT_OUT = {
    "test_implementation.py::test_features_agree_with_the_kernel": "that kernel knows the CPU that emulates",
    "test_implementation.py::test_fma_rate_is_plausible": "a rate of the emulator",
}
# vmaskmovps of AVX2, which reads the lanes that it is told: qemu reads the others too, which may lie beyond memory
MASKED_LOADS = [
    f"test_skipping.py::test_never_touches[{name}]"
    for name in ("pages_of_a_cache", "beyond_the_ends", "beyond_the_ends_int8", "quantising", "converting")
]
SECONDS_OF_A_TEST = 3600  # an emulated CPU is some thirty times slower than the one that emulates it


def run(cpu, arguments, **options):
    """pytest on this CPU; returns the process. arguments: files and options, by default all tests of the kernels."""
    files = arguments or [f"tests/{name}.py" for name in KERNEL_TESTS]
    masked = MASKED_LOADS if MODELS[cpu].build == "avx2" else []
    left_out = [f"--deselect=tests/{name}" for name in (*LEFT_OUT, *masked)]
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("CYFLASH_ISA", "PYTEST_"))}
    if MODELS[cpu].machine == "x86_64":
        settings["OPENBLAS_CORETYPE"] = "Prescott"  # NumPy's may take an emulated CPU for one that it is not, and die
    settings["PYTHONSAFEPATH"] = "1"  # tests start processes here, where the modules of this machine are
    with tempfile.TemporaryDirectory() as folder:
        command = [python.interpreter(cpu, folder), "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-o", f"timeout={SECONDS_OF_A_TEST}", *left_out, *files]
        return subprocess.run(command, cwd=aarch64.REPOSITORY, env=settings, **options)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.emulated", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cpu", action="append", choices=list(MODELS), default=[], help="may be given several times")
    parser.add_argument("--list", action="store_true", help="what can be emulated here")
    parser.add_argument("--prepare", action="store_true", help="download and compile what AArch64 takes")
    parser.add_argument("pytest", nargs="*", help="after --: what pytest is told; else all tests of the kernels")
    chosen = parser.parse_args()
    if chosen.prepare:
        aarch64.prepare()
    if chosen.list:
        for cpu, model in MODELS.items():
            print(f"{cpu:12} {model.machine:8} {model.build:9} {python.why_not(cpu) or 'ready'}")
    for cpu in chosen.cpu:
        if reason := python.why_not(cpu):
            sys.exit(f"python -m tests.emulated: {cpu}: {reason}")
    if not (chosen.cpu or chosen.list or chosen.prepare):
        parser.error("one of --cpu, --list and --prepare is wanted")
    failed = False
    for cpu in chosen.cpu:
        started = time.monotonic()
        done = run(cpu, chosen.pytest)
        failed = failed or done.returncode != 0
        print(f"{cpu}: {'FAILED' if done.returncode else 'passed'} in {time.monotonic() - started:.0f} s", flush=True)
        if done.returncode:
            print(f"again: python -m tests.emulated --cpu {cpu} -- {' '.join(chosen.pytest)}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
