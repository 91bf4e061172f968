"""Everything that RELIABILITY.md has figures of and `pytest` alone does not run, one after the other:

    python -m tests.reliability                    the fast tier, minutes: what .ci/run runs after the tests
    python -m tests.reliability --long             what the published figures come from; hours on two cores
    python -m tests.reliability --long --only fuzz exhaustive_exp --json figures.json

Each part is a command of its own, which is printed and can be run alone. Parts whose tools are not installed are left
out and say why. The exit status is 1 where a part failed.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from cyflash import cpu
from cyflash.cpu import detect

ROOT = Path(__file__).resolve().parents[1]
CANNOT = "cannot run: "  # what a part says whose tools are not there
SECONDS = {False: 900, True: 36000}  # of a part at most, by whether it is long: beyond, it hangs


class Part(NamedTuple):
    fast: str | None  # arguments of the part in the fast tier; None: pytest runs its fast form
    long: str


PARTS = {
    "fuzz": Part("--seed 0 --cases 15000 --seconds 90", "--seed 1 --cases 1000000 --seconds 36000"),
    "hostile": Part("--most 20", "--most 100000"),
    "memcheck": Part("--seconds 20", "--seconds 400"),
    "sanitized": Part("--builds baseline -- tests/test_tails.py tests/test_int8_sums.py", ""),
    "races": Part("--seconds 20", "--builds baseline avx2 --seconds 400"),
    "guarded_tails": Part(None, ""),
    "exhaustive_exp": Part(None, ""),
    "emulated": Part(None, "--cpu SandyBridge --cpu Haswell --cpu cortex-a53 --cpu cortex-a76"),
    "planted": Part(None, ""),
}


class Outcome(NamedTuple):
    command: str
    outcome: str  # "passed", "FAILED" or "not run"
    seconds: int
    lines: list  # that it printed, the last ones


def run(name, arguments, long=False):
    command = [sys.executable, "-m", f"tests.{name}", *arguments.split()]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=SECONDS[long], **pipes)
        printed, status = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        printed, status = (error.stdout or b"").decode() + f"\nhangs: not done in {SECONDS[long]} s", 1
    lines = [line for line in printed.splitlines() if line.strip()]
    absent = status and lines and lines[-1].startswith(CANNOT)
    outcome = "not run" if absent else "FAILED" if status else "passed"
    shown = f"python -m tests.{name} {arguments}".rstrip()
    return Outcome(shown, outcome, round(time.monotonic() - began), lines[-40:])


def table(outcomes):
    found = Table("", "outcome", "seconds", "said last")
    for name, one in outcomes.items():
        found.add_row(name, one.outcome, str(one.seconds), one.lines[-1] if one.lines else "")
    return found


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", type=Path, help="write there what each part printed last, and on what machine")
    options = parser.parse_args()
    outcomes = {}
    for name in options.only or PARTS:
        arguments = PARTS[name].long if options.long else PARTS[name].fast
        if arguments is not None:
            print(f"python -m tests.{name} {arguments}", flush=True)
            outcomes[name] = run(name, arguments, options.long)
            if outcomes[name].outcome == "FAILED":
                print(*outcomes[name].lines, sep="\n", flush=True)
    Console().print(table(outcomes))
    if options.json:
        machine = {"cpu": detect.model(), "builds": cpu.runnable()}
        parts = {name: one._asdict() for name, one in outcomes.items()}
        options.json.write_text(json.dumps({"machine": machine, "parts": parts}, indent=1) + "\n")
    sys.exit(any(one.outcome == "FAILED" for one in outcomes.values()))


if __name__ == "__main__":
    main()
