"""How many threads a call gets.

By default min(CPU affinity, cgroup quota, OMP_NUM_THREADS); CYFLASH_NUM_THREADS, then `set_num_threads`, then a call's
`num_threads` override it. Calls that run at the same time share the default: see `Team`. A fork after a call on several
threads is prepared for (fork.h); where it cannot be, calls in the child have one thread.
"""
import functools
import math
import operator
import os
import warnings


def _openmp_is_loaded():
    """Whether this process has GNU's OpenMP, as far as the system says."""
    try:
        with open("/proc/self/maps", "rb") as file:
            return b"libgomp" in file.read()
    except OSError:
        return True


_LOADED = _openmp_is_loaded()  # before the modules below, which need it

from cyflash.cpu import detect, team  # noqa: E402

_chosen = None
_warned = False


def checked(name, value):
    """`value` as a positive int, or ValueError."""
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, bool):
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return count


def set_num_threads(n):
    """Set how many threads later calls use, for the whole process.

    Parameters
    ----------
    n : int or None
        At least 1. None returns to the default. A call's own `num_threads` wins.

    Raises
    ------
    ValueError
        For anything else.

    Examples
    --------
    >>> import cyflash
    >>> cyflash.set_num_threads(1)
    >>> cyflash.cpu_info()["threads"]
    1
    >>> cyflash.set_num_threads(None)
    """
    global _chosen
    _chosen = None if n is None else checked("num_threads", n)


def affinity():
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def quota_of(root, groups):
    """The cgroup CPU quota in whole CPUs, rounded down but at least 1, or None without one.

    root: where cgroups are mounted. groups: the text of /proc/self/cgroup, "id:controllers:path" a line. A quota of any
    ancestor holds as well, so the smallest counts.
    """
    smallest = math.inf
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = os.path.join(root, "cpu" if controllers else "", path.lstrip("/"))
        while len(folder) >= len(root.rstrip("/")):
            smallest = min(smallest, _quota_in(folder))
            folder = os.path.dirname(folder.rstrip("/"))
    return None if smallest == math.inf else max(1, int(smallest))


def _quota_in(folder):
    try:
        if os.path.exists(os.path.join(folder, "cpu.max")):  # cgroup v2
            quota, period = read(folder, "cpu.max").split()
        else:
            quota, period = read(folder, "cpu.cfs_quota_us"), read(folder, "cpu.cfs_period_us")
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf


def read(folder, name):
    """The text of a small file of the system."""
    with open(os.path.join(folder, name), encoding="utf-8", errors="surrogateescape") as file:
        return file.read().strip()


@functools.cache
def cgroup_quota():
    """This process's cgroup CPU quota in whole CPUs, or None."""
    try:
        return quota_of("/sys/fs/cgroup", read("/proc/self", "cgroup"))
    except OSError:
        return None


def _from_environment():
    value = os.environ.get("CYFLASH_NUM_THREADS")
    if not value:
        return None
    return checked("CYFLASH_NUM_THREADS", int(value) if value.strip().isdecimal() else value)


def limits():
    """Everything that the default is made of; None where a limit is not set."""
    # asked anew each time: threadpoolctl and omp_set_num_threads change OpenMP's while the process runs
    (has_openmp, _, openmp_limit), processors = detect.openmp(), affinity()
    has_limit = has_openmp and (openmp_limit < processors or "OMP_NUM_THREADS" in os.environ)
    return {
        "affinity": processors,
        "cgroup": cgroup_quota(),
        "omp_num_threads": openmp_limit if has_limit else None,
        "cyflash_num_threads": _from_environment(),
        "set_num_threads": _chosen,
    }


def count(num_threads=None):
    """Threads of a call that passes `num_threads`, if it is alone; one when built without OpenMP, and where a fork has
    lost them."""
    if num_threads is not None:
        wanted = checked("num_threads", num_threads)
    else:
        known = limits()
        wanted = known["set_num_threads"] or known["cyflash_num_threads"]
        if wanted is None:
            wanted = min(n for n in (known["affinity"], known["cgroup"], known["omp_num_threads"]) if n is not None)
    if wanted > 1 and team.lost():
        _warn()
    return wanted if detect.openmp()[0] and not team.lost() else 1


def for_call(most, num_threads=None):
    """The Team of a call that keeps `most` threads busy: all of them if `num_threads` says so, else its share."""
    if num_threads is not None:
        return team.Team(min(most, count(num_threads)))
    budget = 1 if most == 1 else count()
    return team.Team(min(most, budget), budget)


def _warn():
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "cyflash: this process was forked when its parent had threads of OpenMP that could not be ended "
            f"({_why_not_ended()}), and has lost them: calls run on one thread. Start processes by 'spawn' or "
            "'forkserver', or before the first call",
            RuntimeWarning,
            stacklevel=3,
        )


def _why_not_ended():
    if not _ENDING:
        return "CYFLASH_ATFORK=0"
    return (
        "the fork came from within a parallel region, or its parent had been forked with OpenMP before it imported "
        "cyflash, or the OpenMP library is not GNU's of GCC 9 or later"
    )


_ENDING = os.environ.get("CYFLASH_ATFORK") != "0"
team.prepare_forks(_ENDING, _LOADED)
