"""Readers and variants in a process of their own: with little memory, and an end to every read.

A read must raise ValueError or OSError (TypeError where its documentation says so) with the file's name in it, within
`SECONDS`, and take no more memory than its share; where the variant is not fatal it may also succeed.
"""
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import tracemalloc
from pathlib import Path

from hostile import variants
from hostile.readers import READERS

SECONDS = 5            # for one read
ADDRESSES = 512 << 20  # bytes that the process may have more than after its imports
SHARE = 8 << 20        # bytes that one read may take beyond 20 times the file and what the valid file takes


class Slow(BaseException):
    """Nothing that a reader could catch."""


def _slow(*_):
    raise Slow


def kinds(reader, data, r, most):
    """All variants of a reader's valid file."""
    yield from variants.no_files()
    yield from variants.cut_and_flipped(r, data, most)
    if reader.name.endswith(".safetensors"):
        header, _ = variants.parts(data)
        yield from variants.hostile_headers(header.get("__metadata__", {}))
        if reader.text:
            yield from some(r, variants.tampered_text(data, reader.text), most)
            yield from some(r, variants.tampered_tensors(data, reader.text), most)
    elif reader.name.endswith(".json"):
        yield from some(r, variants.tampered_json(data), most)
    else:
        yield from variants.hostile_npz(bombs=reader.packed)


def some(r, found, most):
    found = list(found)
    return found if len(found) <= most else r.sample(found, most)


def peak_of(read, path):
    """(what was raised, bytes at most) of a read."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read(path)
        error = None
    except Slow:
        error = Slow()
    except BaseException as one:
        error = one
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return error, tracemalloc.get_traced_memory()[1] - before


def wrong(reader, label, path, error, fatal, peak, allowed):
    """Why an outcome is none that is promised, or None."""
    if error is None:
        return "was read" if fatal and (not reader.absent or os.path.exists(path)) else None
    if isinstance(error, Slow):
        return f"took more than {SECONDS} s"
    if isinstance(error, MemoryError) and Path(path).name in str(error) and "('pages',)" in label:
        return None  # pages that nobody wrote are not in a file: a cache may have any number of them
    if not isinstance(error, (ValueError, OSError, TypeError)) or isinstance(error, UnicodeError):
        return f"{type(error).__name__}: {str(error)[:150]}"
    if Path(path).name not in str(error) and Path(path).parent.name not in str(error):
        return f"{type(error).__name__} that does not name the file: {str(error)[:150]}"
    if peak > allowed:
        return f"took {peak:,} bytes"
    return None


def main(seed, most, only, progress):
    signal.signal(signal.SIGALRM, _slow)
    tracemalloc.start()
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else None
    if pages:
        limit = pages * resource.getpagesize() + ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts, r = {}, random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, reader in READERS.items():
            if only and name != only:
                continue
            path = os.path.join(folder, "files", reader.name)
            os.mkdir(os.path.dirname(path))
            reader.make(path)
            data = Path(path).read_bytes()
            error, base = peak_of(reader.read, path)
            assert error is None, f"{name}: the valid file: {error!r}"
            counts[name] = 0
            for label, made, fatal in kinds(reader, data, r, most):
                Path(progress).write_text(f"{name}: {label}")
                remove(path)
                if callable(made):
                    made(path)
                else:
                    Path(path).write_bytes(made)
                size = 0
                with contextlib.suppress(OSError):
                    size = os.stat(path).st_size
                error, peak = peak_of(reader.read, path)
                if why := wrong(reader, label, path, error, fatal, peak, base + SHARE + 20 * min(size, 1 << 26)):
                    print(json.dumps([name, label, why]), flush=True)
                counts[name] += 1
                if os.path.exists("pickles-are-run"):
                    print(json.dumps([name, label, "ran code"]), flush=True)
                    os.unlink("pickles-are-run")
            shutil.rmtree(os.path.dirname(path))
    print(json.dumps(counts), flush=True)


def remove(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
