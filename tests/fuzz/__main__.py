"""python -m tests.fuzz --seconds 60 --seed 0: random calls against the reference; a failure is a line that repeats it.

A case is drawn from the seed and its number alone: entry point, SIMD build, shapes, dtypes, options, strides, tiles and
threads. `--case K` runs one of them here, with its traceback; --build forces the build of all. At the end are the
figures of the run. The exit status is 1 where something failed, or where too many cases could show nothing.
"""
import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not keep a core busy,
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # and NumPy's only get in the way of small products
HERE = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]  # the checkout, and its tests
sys.path[:0] = HERE


def main():
    from fuzz import run
    from fuzz.tally import Tally

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="at most so many")
    parser.add_argument("--case", type=int, help="this one only")
    parser.add_argument("--build", help="a SIMD build instead of the one that each case draws")
    args = parser.parse_args()
    if args.case is not None:
        with run.small_work():
            run.one(args.seed, args.case, args.build, Tally())
        print("passed")
        return 0
    tally, failures = run.many(args.seed, args.seconds, args.cases, args.build)
    for line in (f"seed {args.seed}", *tally.lines()):
        print(line)
    problems = tally.problems()
    for line in problems:
        print(f"shows too little: {line}")
    print(f"{len(failures)} failures")
    return 1 if failures or problems else 0


if __name__ == "__main__":
    sys.exit(main())
