"""The CPU path: which SIMD build of the kernels runs, and with which tile sizes.

    detect.pyx     what the CPU and the operating system can run (compiled for any CPU)
    threads.py     how many threads a call gets
    simd/*.h       the vocabulary of each build; simd.h picks one; vocabulary.pxi is how Cython sees it
    kernel.pxi     the algorithm on one panel of query rows, in that vocabulary; it includes a file for each step:
                     block.pxi                          keys and values of a block, as the products read them
                     product.pxi, int8.pxi, bf16.pxi    the products in float32, of codes and of bfloat16
                     few.pxi                            both products where query rows are few, as in decoding
                     change.pxi, softmax.pxi            what changes a score; weights
    floats.pxi     arrays of float32, float16 and bfloat16, read as floats
    quantise.pxi   from floats to codes; pack.pxi: from codes to what the products read
    store.pxi      new tokens into the pages of a cache
    driver.pxi     tasks, chunks of keys, threads, scratch; the entry `forward`
    inspect.pxi    windows into the kernels for tests and benchmarks
    team.pyx       the threads of a call: shared by calls (share.h), kept at a fork (fork.h)
    observe.pyx    histograms, sums and fingerprints for calibration (compiled for any CPU)
    _<build>.pyx   two lines that compile the kernels for one build

A build is imported only when this machine can run it: its module may contain its instructions anywhere.
"""
import importlib
import importlib.util
import os
import re

from cyflash.cpu import threads  # first: it looks at what was loaded before the others

# isort: split
from cyflash.cpu import detect

AVX512 = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")

# build: the CPU features that it needs. The last one that is built and that this machine can run is used.
BUILDS = {
    "baseline": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avxvnni": ("avx2", "fma", "f16c", "avxvnni"),
    "avx512": AVX512,
    "avx512_vnni": (*AVX512, "avx512_vnni"),
    "avx512_bf16": (*AVX512, "avx512_vnni", "avx512_bf16"),
    "neon": ("asimddp", "asimdrdm", "atomics", "crc32"),  # all that Armv8.2 with the dot product adds for a compiler
}

# Keys of a block, when the caller does not say. A task's working set is PANEL * 4 bytes * (D queries + D outputs + Bc
# scores) and streams Bc * D * 8 bytes of keys and values: at PANEL = 48, D = 64, Bc = 128 that is 24 + 24 KB of the
# 48 KB first-level cache of a Zen 5. Codes take a quarter of that and bfloat16 half, and each block costs a pass over
# the output, which weighs more beside faster products: 256 is faster there, for codes by 1 to 2 %.
BLOCK_SIZE_KV = 128
LONG_BLOCK_SIZE_KV = 256

# Query rows of a task are one panel; where keys or values are converted four, so that a block is converted for all of
# them (bfloat16 at D = 64, D = 128: 1.36, 1.49 times as fast as float32 with one panel, 1.65, 1.80 with four, 1.70,
# 1.82 with eight).
CONVERTING_PANELS = 4

# A block is summed before it is added to what earlier blocks gave, so its length decides the rounding error; and beyond
# this its scores (512 x 48 x 4 bytes = 96 KB) are far out of the first-level cache.
MAX_BLOCK_SIZE_KV = 512

# A task runs to its end before Ctrl-C is answered, and needs a thread to itself: it must not grow into the whole call.
MAX_BLOCK_SIZE_Q = 1024

_active = None


def why_not(name):
    """Why build `name` cannot be used here; an empty string when it can."""
    if importlib.util.find_spec(f"cyflash.cpu._{name}") is None:
        return "not built"
    missing = [feature for feature in BUILDS[name] if feature not in detect.features()]
    return f"this machine lacks {', '.join(missing)}" if missing else ""


def runnable():
    """Names of the SIMD builds that are built and run on this machine, the best last."""
    return tuple(name for name in BUILDS if not why_not(name))


def load(name):
    """The module of SIMD build `name`: ValueError for an unknown name, RuntimeError where it cannot be used."""
    if name not in BUILDS:
        raise ValueError(f"implementation: expected one of {', '.join(BUILDS)} or None, got {name!r}")
    reason = why_not(name)
    if reason:
        raise RuntimeError(
            f"implementation {name!r} cannot be used: {reason}; usable here: {', '.join(runnable())}"
        )
    return importlib.import_module(f"cyflash.cpu._{name}")


def _choose():
    forced = os.environ.get("CYFLASH_ISA")
    if not forced:
        return load(runnable()[-1])
    try:
        return load(forced)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"CYFLASH_ISA={forced}: {error}") from None


def active():
    """The build module in use: the best that runs here, or the one named by CYFLASH_ISA or `set_implementation`."""
    global _active
    if _active is None:
        _active = _choose()
    return _active


def name_of(module):
    """The build's name, as in BUILDS."""
    return module.__name__.rpartition("._")[2]


class _Restore:
    """What `set_implementation` returns: as a context manager it restores what was in use before."""

    def __init__(self, previous):
        self._previous = previous

    def __enter__(self):
        return self

    def __exit__(self, *error):
        global _active
        _active = self._previous


def set_implementation(name):
    """Force one SIMD build for fp32 and int8, for the whole process.

    Parameters
    ----------
    name : {"baseline", "avx2", "avxvnni", "avx512", "avx512_vnni", "avx512_bf16", "neon"} or None
        None chooses automatically again: CYFLASH_ISA when it is set, else the best build that runs here.

    Returns
    -------
    context manager
        Leaving it restores what was in use before. Without `with`, the choice stays.

    Raises
    ------
    ValueError
        For an unknown name.
    RuntimeError
        For a build that is not built, or that this machine cannot run.

    Examples
    --------
    >>> import cyflash
    >>> with cyflash.set_implementation("baseline"):
    ...     cyflash.cpu_info()["implementation"]
    'baseline'
    """
    global _active
    chosen = _choose() if name is None else load(name)
    restore = _Restore(_active)
    _active = chosen
    return restore


def tile_sizes(block_size_q=None, block_size_kv=None, build=None):
    """(Br, Bc): query rows of a task and keys of a block, as used.

    Sizes that the caller gives are rounded up to whole panels of query rows and whole register tiles of keys, and down
    to the largest of these within MAX_BLOCK_SIZE_Q and MAX_BLOCK_SIZE_KV. Without them they are constants of the build,
    so that results do not depend on the machine's caches.
    """
    return tile_sizes_of(active() if build is None else load(build), block_size_q, block_size_kv)


def tile_sizes_of(module, block_size_q=None, block_size_kv=None, kind="fp32", converts=False):
    """`tile_sizes` of a build that is already chosen: the active one may change in another thread meanwhile.

    kind: what the first product multiplies, "fp32", "bf16" or "int8". Of codes, a block that is longer than PART_KEYS
    is a multiple of it. converts: a block of keys or values is converted before it is used.
    """
    panel, rows, part = (module.SHAPE[name] for name in ("PANEL", "ROWS", "PART_KEYS"))
    if block_size_q is None:
        Br = panel * (CONVERTING_PANELS if converts else 1)
    else:
        Br = min(-(-block_size_q // panel), MAX_BLOCK_SIZE_Q // panel) * panel
    if block_size_kv is None:
        return Br, BLOCK_SIZE_KV if kind == "fp32" else LONG_BLOCK_SIZE_KV
    if kind == "int8" and block_size_kv > part:
        rows = part
    return Br, min(-(-block_size_kv // rows) * rows, MAX_BLOCK_SIZE_KV)


def tile_bytes(Br, Bc, D, Dv=None, build=None):
    """Bytes of scratch that one thread allocates for tiles of Br query rows and Bc keys."""
    module = active() if build is None else load(build)
    return module.tile_bytes(Br, Bc, D, D if Dv is None else Dv)


def _cache_sizes():
    """Bytes of this machine's first CPU's data caches, as Linux reports them; None where it does not say."""
    sizes = {"l1d": None, "l2": None, "l3": None}
    folder = "/sys/devices/system/cpu/cpu0/cache"
    for entry in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        try:
            level, kind, size = (threads.read(os.path.join(folder, entry), name) for name in ("level", "type", "size"))
        except OSError:
            continue
        unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
        key = {"1": "l1d", "2": "l2", "3": "l3"}.get(level)
        if key and kind != "Instruction":
            sizes[key] = int(size.rstrip("KM")) * unit
    return sizes


def _openmp_runtime():
    """Version and library file of the OpenMP runtime that the kernels use, or None when they were built without."""
    built, version, _ = detect.openmp()
    if not built:
        return None
    library = "library unknown"
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            files = {line.split(maxsplit=5)[5].strip() for line in maps if ".so" in line and "/" in line}
        runtimes = sorted(name for name in files if re.match(r"lib[gi]?omp", os.path.basename(name)))
        library = ", ".join(runtimes) or library
    return f"OpenMP {version}, {library}"


def cpu_info():
    """What was built, what runs here and what is used.

    Returns
    -------
    dict
        implementation : name of the SIMD build in use
        builds : {name: {"built": bool, "runs": bool, "reason": str}}
        features, model : of the CPU
        caches : {"l1d", "l2", "l3"}: bytes, or None where the system does not say
        cores : logical CPUs of the machine
        threads : how many a call gets now, by default
        thread_limits : {"affinity", "cgroup", "omp_num_threads", "cyflash_num_threads", "set_num_threads"}: int or None
        openmp : the OpenMP runtime, or None when built without it (one thread)

    Raises
    ------
    ValueError, RuntimeError
        For a CYFLASH_ISA or CYFLASH_NUM_THREADS that cannot be used.

    Examples
    --------
    >>> import cyflash
    >>> cyflash.cpu_info()["builds"]["baseline"]["runs"]
    True
    """
    reasons = {name: why_not(name) for name in BUILDS}
    return {
        "implementation": name_of(active()),
        "builds": {
            name: {"built": reason != "not built", "runs": not reason, "reason": reason}
            for name, reason in reasons.items()
        },
        "features": sorted(detect.features()),
        "model": detect.model(),
        "caches": _cache_sizes(),
        "cores": os.cpu_count(),
        "threads": threads.count(),
        "thread_limits": threads.limits(),
        "openmp": _openmp_runtime(),
    }
