"""python -m tests.hostile --seed 0: damaged and hostile files for everything that reads files.

Prints a line for each read that crashes, hangs, takes much memory, or raises what does not name the file; the exit
status is 1 then. --most: how many lengths, bits and places of each file are tried; with 100000 all of them.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]  # the checkout, and its tests


def run(seed, most, only="", timeout=3600):
    """({reader: files read}, [[reader, what, why]]) of a child."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*HERE, *filter(None, sys.path)])}
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        command = [sys.executable, "-m", "hostile.child", str(seed), str(most), only, str(progress)]
        try:
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
            output, end = result.stdout, result.returncode and f"died with {result.returncode}: {result.stderr[-2000:]}"
        except subprocess.TimeoutExpired as error:
            output, end = (error.stdout or b"").decode(), f"took more than {timeout} s"
        found = [json.loads(line) for line in output.splitlines()]
        counts = found.pop() if found and isinstance(found[-1], dict) else {}
        if end:
            found.append(["the process", progress.read_text() if progress.exists() else "at its start", end])
    return counts, found


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--only", default="", help="one reader")
    args = parser.parse_args()
    counts, found = run(args.seed, args.most, args.only)
    for reader, what, why in found:
        again = f"python -m tests.hostile --seed {args.seed} --most {args.most} --only {reader!r}"
        print(f"{reader}: {what}: {why}  # {again}")
    print(f"{sum(counts.values()):,} files: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
    print(f"{len(found)} failures")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
