# cython: auto_pickle=False
# The threads that compute a call: shared with calls that run at the same time (share.h), and ended before a fork, so
# that it does not lose them (fork.h). For tests also the floating-point environment of each (environment.h).

from cython.parallel cimport prange
from libc.stdint cimport uint64_t

cdef extern from "share.h" nogil:
    int take(int most, int budget)
    void give(int n)

cdef extern from "fork.h" nogil:
    int survive_forks(int ending, int loaded)
    void starts_threads()
    int threads_lost()

cdef extern from "environment.h" nogil:
    uint64_t read_environment()
    void c_set_environment "set_environment" (uint64_t value)


cdef class Team:
    """`with team as n:` takes n threads for the computation within, and gives them back.

    most: how many of them are kept busy. budget: threads of the process, which calls share; 0 if the caller said how
    many, who then has them. A thread at a time uses a team.
    """
    cdef readonly int most
    cdef readonly int budget
    cdef int taken

    def __init__(self, int most, int budget=0):
        self.most, self.budget = most, budget

    def at_most(self, Py_ssize_t n):
        """A team for a part of the work, which keeps n threads busy."""
        return Team(<int> min(n, <Py_ssize_t> self.most), self.budget)

    def __enter__(self):
        self.taken = take(1 if threads_lost() else self.most, self.budget)
        if self.taken > 1:
            starts_threads()
        return self.taken

    def __exit__(self, *error):
        give(self.taken)


def prepare_forks(bint ending, bint loaded):
    """Register what has to be done at a fork, once in a process.

    ending: whether threads of OpenMP may be ended. loaded: whether the process had OpenMP before it had this module.
    """
    if survive_forks(ending, loaded):
        raise MemoryError("cannot register handlers of fork")


def lost():
    """Whether this process was forked from one whose threads could not be ended: then calls have one thread."""
    return bool(threads_lost())


# For tests.


def environments(int threads):
    """The floating-point environment of each thread of a region: MXCSR on x86, FPCR << 32 | FPSR on ARM."""
    cdef uint64_t found[64]
    cdef int t
    threads = min(threads, 64)
    for t in prange(threads, nogil=True, schedule="static", chunksize=1, num_threads=threads):
        found[t] = read_environment()
    return [found[t] for t in range(threads)]


def set_environment(uint64_t value):
    """Set that of the calling thread."""
    c_set_environment(value)
