"""python -m tests.gpu_session --out DIR: all that needs a GPU, tested and timed, in half an hour.

It has to be installed, without a network if need be: Python 3.11 or later; cupy-cuda12x or cupy-cuda13x 14.2 or later
with NVRTC and CUDA's headers (the extra [ctk], or a CUDA toolkit); numpy, scipy, ml_dtypes, rich, safetensors,
threadpoolctl, pytest. It runs from a checkout: the C extensions are built in place where they are missing, which takes
a C compiler, Cython and setuptools. Each of these is used where it is there, and otherwise said to be missing: torch
with CUDA, triton, compute-sanitizer.

In DIR: report.txt (what is printed), report.json, tests.jsonl (a line for each test), log.txt (what failed, in full). A
session that is cut off is gone on with by the same command; --fresh begins anew. The exit status is 0 if everything
passed, 1 if something failed or there was no time for it, 2 if nothing could be run.
"""
import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

HERE = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]  # the checkout, and its tests
sys.path[:0] = HERE
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*HERE, os.environ.get("PYTHONPATH")]))

from gpu_session import bench, machine, tests  # noqa: E402
from gpu_session.report import Report  # noqa: E402

SHARES = {"primitives": 0.1, "bench": 0.35, "kernels": 0.3, "public": 0.1, "sanitizer": 0.15}
PARTS = ("machine", *SHARES)
FILES = {
    "primitives": ["test_gpu_device_primitives.py"],
    "kernels": ["test_gpu_device_hopper.py", "test_gpu_device_decode.py", "test_gpu_device_kernels.py"],
    "public": ["test_gpu_device.py"],
    "sanitizer": ["test_gpu_device_sanitizer.py"],
}


def arguments(given):
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu_session", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where the report goes, or is gone on with")
    add("--minutes", type=float, default=28.0, help="of the whole session, which parts share (default: %(default)g)")
    add("--parts", default=",".join(PARTS), help="some of these, in this order: %(default)s")
    add("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 2) // 2)),
        help="processes of tests beside each other; the GPU is shared by them (default: %(default)s)")
    add("--seconds", type=float, default=60.0, help="for a test, after which it has failed (default: %(default)g)")
    add("--fresh", action="store_true", help="forget what DIR has")
    add("--dry", action="store_true", help="without a GPU: a few cases of every part, on a pretended one")
    found = parser.parse_args(given)
    found.parts = found.parts.split(",")
    for name in found.parts:
        if name not in PARTS:
            parser.error(f"--parts: expected some of {', '.join(PARTS)}; got {name!r}")
    return found


def main(given=None):
    options = arguments(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started
    report = Report(options.out, options.fresh)
    begin = time.monotonic()
    report.say(f"cyflash on a GPU: {', '.join(options.parts)}; {options.minutes:g} minutes at most")
    if options.dry:
        report.say("REHEARSAL: no GPU is used; kernels run on the machine of the tests")
    require_cache(report)
    report.title("machine")
    if not machine.built(report):
        report.say("nothing can be run")
        return 2
    if "machine" in options.parts:
        machine.describe(report, options.dry)
    status, error = machine.ask(machine.QUESTIONS["cyflash"], options.dry)
    if error or not status["available"]:
        report.say(f"nothing can be run: {error or status['reason']}")
        return 2
    outcomes = {}
    for name in options.parts:
        if name != "machine":
            outcomes[name] = run_part(name, report, options, begin)
    report.title("end")
    report.say(*(f"{name}: {'passed' if good else 'FAILED, or not complete'}" for name, good in outcomes.items()))
    report.keep("outcomes", outcomes)
    return 0 if all(outcomes.values()) else 1


def require_cache(report):
    """Compiled kernels are kept for the processes to come, where they can be."""
    place = Path(os.environ.get("CYFLASH_CACHE_DIR") or Path.home() / ".cache" / "cyflash").expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / "written").touch()
        (place / "written").unlink()
    except OSError as error:
        os.environ["CYFLASH_CACHE_DIR"] = tempfile.mkdtemp(prefix="cyflash-cache-")
        report.say(f"{place} cannot be written ({error}); compiled kernels go to {os.environ['CYFLASH_CACHE_DIR']}")


def run_part(name, report, options, begin):
    """Run one part within its share of the time that is left; whether it passed."""
    later = options.parts[options.parts.index(name):]
    left = begin + options.minutes * 60 - time.monotonic()
    share = left * SHARES[name] / sum(SHARES[one] for one in later)
    report.title(f"{name}, {share:.0f} s at most")
    deadline = time.monotonic() + share
    try:
        if name == "bench":
            return bench.run(report, deadline, dry=options.dry)
        limit = share if name == "sanitizer" else options.seconds
        return tests.run(report, deadline, names=FILES[name], jobs=options.jobs, limit=limit, dry=options.dry,
                         only=few if options.dry else None)
    except Exception as error:  # the parts after it can still be run
        import traceback

        report.say(f"{name} ended: {type(error).__name__}: {error}")
        report.add_log(name, traceback.format_exc())
        return False


def few(ids):
    """Of each function's tests the first one, but a few that are large."""
    first = {}
    for one in ids:
        first.setdefault(one.partition("[")[0], one)
    return [one for one in first.values() if not any(name in one for name in LARGE)]


LARGE = ("test_memory", "test_streams", "test_long", "test_another_process", "test_large_head_dim", "test_head_dim",
         "test_option", "test_all_options", "test_each_option", "test_a_sequence", "test_hidden", "test_rows_of")

if __name__ == "__main__":
    sys.exit(main())
