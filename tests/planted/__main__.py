"""Plant each fault in a copy of the sources, and say which test catches it.

    python -m tests.planted                        all of them; hours on one core
    python -m tests.planted --only merge-weight    one; several names, or the beginnings of names
    python -m tests.planted --kind python          those that need no compiler

A fault counts if what it needs builds and README's first example is still computed right. The files of tests that a
fault names run first, then all others, unless --first: a fault that they miss is then "not caught by its own files".
Every test that caught a fault has to pass on the copy without one. The exit status is 1 where a fault that counts is
missed.
"""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.planted.kernel_faults import FAULTS as KERNEL_FAULTS
from tests.planted.python_faults import FAULTS as PYTHON_FAULTS
from tests.planted.workshop import Workshop, files_of

CAUGHT = Path(__file__).with_name("caught.json")


def main():
    options = _options()
    faults = {"python": PYTHON_FAULTS, "kernel": KERNEL_FAULTS, "all": PYTHON_FAULTS + KERNEL_FAULTS}[options.kind]
    if options.only:
        faults = [fault for fault in faults if fault.name.startswith(tuple(options.only))]
    if options.new:
        faults = [fault for fault in faults if fault.name not in _recorded()]
    if not faults:
        sys.exit("no such fault")
    folder = tempfile.mkdtemp(prefix="planted-")
    try:
        shop = Workshop(folder)
        with ThreadPoolExecutor(options.jobs) as jobs:
            results = list(jobs.map(lambda fault: _tried(shop, fault, options), faults))
        _without_a_fault(shop, faults, results)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _report(faults, results, options)
    sys.exit(any(result["verdict"] not in ("caught", "does not count", "not run") for result in results))


def _options():
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="beginnings of the names of faults")
    parser.add_argument("--kind", choices=("all", "python", "kernel"), default="all")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time (default: 1)")
    parser.add_argument("--first", action="store_true", help="run only the files of tests that a fault names")
    parser.add_argument("--new", action="store_true", help=f"leave out those that {CAUGHT.name} has")
    parser.add_argument("--minutes", type=float, help="begin no fault after so many; those left out are not run")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--record", action="store_true", help=f"write which test caught which fault to {CAUGHT.name}")
    options = parser.parse_args()
    options.began = time.monotonic()
    return options


def _recorded():
    """{fault: the test that caught it} of earlier runs."""
    return json.loads(CAUGHT.read_text()) if CAUGHT.exists() else {}


def _without_a_fault(shop, faults, results):
    """The copy without a fault has to pass what caught one: else that is no catch."""
    for build in sorted({fault.build for fault in faults}, key=str):
        caught = [
            result for fault, result in zip(faults, results, strict=True)
            if fault.build == build and result["verdict"] == "caught"
        ]
        tree = shop.copy("unfaulted", build)
        if not shop.readme(tree, build):
            sys.exit(f"README's first example is wrong without a fault (build: {build or 'as installed'})")
        by = [result["by"].partition(" (signal ")[0] for result in caught]
        tests = sorted({one for one in by if one.startswith("tests/")})
        outcome = shop.test(tree, tests, build, stop=False) if tests else None
        for result, one in zip(caught, by, strict=True):
            if outcome is not None and one in outcome.failed:
                result["verdict"] = "fails without it too"
        if outcome is not None and not outcome.passed and not set(tests) & set(outcome.failed):
            sys.exit(f"without a fault {outcome.failed} (build: {build or 'as installed'}):\n{outcome.tail}")
        if outcome is not None:
            said = "pass" if outcome.passed else f"do not all pass:\n{outcome.tail}\n"
            print(f"without a fault {len(tests)} tests that caught one {said} (build: {build or 'as installed'})")


def _tried(shop, fault, options):
    """{"verdict", "by", "seconds"} of one fault."""
    began = time.monotonic()
    ended = options.minutes is not None and began > options.began + 60 * options.minutes
    verdict, by = ("not run", "") if ended else _verdict(shop, fault, options)
    seconds = round(time.monotonic() - began)
    print(f"{fault.name}: {verdict} {by}".rstrip() + f" ({seconds} s)", flush=True)
    return {"verdict": verdict, "by": by, "seconds": seconds}


def _verdict(shop, fault, options):
    tree = shop.copy(fault.name, fault.build)
    path = tree / fault.file
    path.write_text(fault.applied(path.read_text()))
    try:
        if fault.build is not None:
            try:
                shop.compile(tree, fault.build, headers_alone=fault.file.endswith(".h"))
            except subprocess.CalledProcessError as error:
                return "does not count", f"it does not build: {error.stderr.strip()[-200:]}"
        if not shop.readme(tree, fault.build):
            return "does not count", "README's first example is wrong"
        own = fault.tests.split()
        runs = [files_of([name]) for name in own] + ([] if options.first else [shop.others(own)])
        for tests in runs:
            outcome = shop.test(tree, tests, fault.build)
            if not outcome.passed:
                return "caught", outcome.failed[0] if outcome.failed else outcome.tail[-200:]
        return ("not caught by its own files", " ".join(own)) if options.first else ("missed", "")
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def _report(faults, results, options):
    width = max(len(fault.name) for fault in faults)
    print()
    for fault, result in zip(faults, results, strict=True):
        print(f"{fault.name:{width}}  {result['verdict']:14}  {result['by']}")
    counts = {verdict: sum(one["verdict"] == verdict for one in results) for verdict in dict.fromkeys(
        one["verdict"] for one in results
    )}
    print(f"\n{len(faults)} faults: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    found = {
        fault.name: {"file": fault.file, "why": fault.why, "build": fault.build, **result}
        for fault, result in zip(faults, results, strict=True)
    }
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.record:
        known = _recorded() | {name: one["by"] for name, one in found.items() if one["verdict"] == "caught"}
        CAUGHT.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
