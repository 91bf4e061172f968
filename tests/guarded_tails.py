"""Every head size with every length, all arrays beside inaccessible memory (guarded.py), and so is what a call makes,
its scratch among that (allocator.py):

    python -m tests.guarded_tails [--builds avx2 ...] [--kinds fp32 int8 ...] [--thin]

D = 1..160 with L = 1..130, each with a full and with few query rows, with and without options by turns, all arrays once
flush with the page after them and once with that before; and some D with keys that are cut into chunks. Each build runs
in a process of its own: SIGSEGV ends it, and the last line that it printed says where it was. --thin: each D and each L
once.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import allocator

HEAD_DIMS, LENGTHS = range(1, 161), range(1, 131)
IN_CHUNKS = [(D, 4096 + D) for D in range(1, 161, 23)]  # where rows are few: their results are in the scratch
KINDS = ("fp32", "fp16", "bf16", "int8")


def shapes(thin):
    """(D, L) of a sweep."""
    if thin:
        return [(D, 1 + 37 * D % len(LENGTHS)) for D in HEAD_DIMS] + IN_CHUNKS
    return [(D, L) for D in HEAD_DIMS for L in LENGTHS] + IN_CHUNKS


class Sweep:
    """The calls of one build."""

    def __init__(self, kind):
        import guarded

        self.kind = kind
        self.given, self.made = ([guarded.Fence(1 << 22) for _ in range(16)] for _ in range(2))

    def shape(self, D, L):
        """Calls of one shape; returns how many."""
        import cases

        Lq = L if (D + L) % 2 else 1 + (5 * L + D) % 9
        Dv = 1 + (D + 3 * L) % 160 if L % 3 else D
        q, k, v = (x[0] for x in cases.arrays(1, 2, 1, Lq, L, D, Dv))
        options = cases.all_options(1, 2, Lq, L) if (D // 2 + L) % 2 else {}
        options = {name: x[0] if name in ("bias", "mask") else x for name, x in options.items()}
        for at_end in (True, False):
            self.call(q, k, v, options, at_end, D + L)
        return 2

    def call(self, q, k, v, options, at_end, number):
        import guarded
        import numpy as np

        import cyflash
        from cyflash.arrays import checked_dtype

        if self.kind in ("fp16", "bf16"):
            q, k, v = (x.astype(checked_dtype("kind", self.kind)) for x in (q, k, v))
        arguments = {"q": q, "k": k, "v": v}
        if self.kind == "int8":
            kind, n = ("float", "codes", "tensors")[number % 3], min((0, 1, 9)[number % 4 % 3], k.shape[-2])
            arguments = guarded._operands(kind, n, q, k, v) | {"pv": ("int8", "bf16", "fp32")[number % 5 % 3]}
        put = iter(self.given)
        arguments = {name: guarded._fenced(put, x, at_end) for name, x in (arguments | options).items()}
        out = np.full((*q.shape[:-1], v.shape[-1]), np.nan, q.dtype)
        out = next(put).put(out, at_end)
        if self.kind == "int8":
            with guarded._fencing_what_is_made(self.made, at_end):
                _, lse = cyflash.flash_attention_int8(**arguments, out=out, return_lse=True)
        else:
            _, lse = cyflash.flash_attention(**arguments, out=out, return_lse=True)
        assert np.isfinite(out.astype(np.float32)).all(), "not all of the output was written"
        assert not np.isnan(lse).any()


def child(build, kinds, thin):
    import halves

    import cyflash

    kinds = [kind for kind in kinds if kind != "bf16" or len(halves.installed()) == 2]
    cyflash.set_num_threads(1)
    calls = {}
    with cyflash.set_implementation(build):
        if not allocator.why_not():
            scratch = allocator.Allocator()
            scratch.watch({f"cyflash/cpu/_{build}.": 1})
            scratch.fence(1)
        for kind in kinds:
            sweep, calls[kind] = Sweep(kind), 0
            for D, L in shapes(thin):
                if not thin:
                    print(f"{build} {kind} D={D} L={L}", flush=L == 1)
                try:
                    calls[kind] += sweep.shape(D, L)
                except Exception:
                    print(f"again: {build} {kind} D={D} L={L}", flush=True)
                    raise
    print(json.dumps(calls), flush=True)


def run(build, kinds, thin):
    """(calls or None, what to say)"""
    command = [sys.executable, "-P", "-X", "faulthandler", __file__, "--child", "--builds", build, "--kinds", *kinds]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryDirectory() as folder:
        if not allocator.why_not():
            environment = allocator.environment(folder)
        result = subprocess.run(command + ["--thin"] * thin, capture_output=True, text=True, env=environment)
    lines = result.stdout.splitlines()
    if result.returncode == 0:
        return json.loads(lines[-1]), ""
    how = "SIGSEGV" if result.returncode in (-signal.SIGSEGV, -signal.SIGBUS) else f"status {result.returncode}"
    return None, f"{how} after {lines[-1:]}\n{result.stderr[-3000:]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builds", nargs="+", help="default: all that run here")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["fp32", "int8"])
    parser.add_argument("--thin", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.builds[0], arguments.kinds, arguments.thin)
    from cyflash import cpu

    failures = 0
    for build in arguments.builds or cpu.runnable():
        start = time.monotonic()
        calls, problem = run(build, arguments.kinds, arguments.thin)
        failures += calls is None
        print(f"{build}: {calls or problem}, {time.monotonic() - start:.0f} s", flush=True)
    print("guarded tails:", "FAILED" if failures else "nothing was touched outside")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
