"""One call's tasks on a Dask cluster: submitted, combined as a tree, waited for with a progress bar.

Every input of a task is in its specification or is the result of another task, so that what a lost worker held is
computed again; nothing is scattered. Results that no task waits for any more are let go while others still run.
"""
import concurrent.futures
import contextlib
import time

import dask
import distributed
from dask.base import is_dask_collection

from cyflash.output import progress_bar

__all__ = ["Cluster"]

POLL_SECONDS = 0.1
LOOK_SECONDS = 2.0  # between two looks at who works
FAN_IN = 4  # results that one task combines


class Cluster:
    """Submits the tasks of one call.

    Parameters
    ----------
    client : distributed.Client or None
        None: the one made last.
    what : str
        What the progress bar says.
    progress : bool
        Whether there is one.
    timeout : float
        Seconds to wait for a worker while there is none.
    """

    def __init__(self, client, what, progress, timeout):
        self.client = _checked_client(client)
        if not isinstance(progress, bool):
            raise ValueError(f"progress: expected True or False, got {progress!r}")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ValueError(f"timeout: expected seconds above 0, got {timeout!r}")
        self._what, self._progress, self._timeout = what, progress, timeout
        self._address = self.client.scheduler.address if self.client.scheduler else "of this client"
        self._waiting = []

    @contextlib.contextmanager
    def errors(self):
        """A lost scheduler or a task that kills its workers, as one RuntimeError that says so."""
        try:
            yield self
        except distributed.KilledWorker as error:
            raise RuntimeError(
                f"client: the task {error.task} was lost with {error.allowed_failures + 1} workers, one after the "
                "other; perhaps they have too little memory for it: pass smaller pieces, or give workers more"
            ) from error
        except Exception as error:
            if not self._alive():
                raise RuntimeError(
                    f"client: the scheduler at {self._address} is gone ({_short(error)}); start one and call again"
                ) from error
            if isinstance(error, concurrent.futures.CancelledError):
                raise RuntimeError(
                    f"client: data that this call reads are gone from the cluster ({_short(error)}): what was "
                    "scattered to a worker that died cannot be computed again; submit or load it as a task instead"
                ) from error
            raise
        finally:
            self._waiting.clear()

    def submit(self, function, *arguments):
        """A Future of function(*arguments), which may be Futures."""
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 PB"}):  # arrays belong there
            future = self.client.submit(function, *arguments, pure=False)
        return self._counted(future)

    def futures(self, held):
        """The Futures of Futures, of what is delayed, and of what the caller holds, in order."""
        delayed = [x for x in held if is_dask_collection(x)]
        computed = iter(self.client.compute(delayed))
        return [
            self._counted(next(computed)) if is_dask_collection(x)
            else x if isinstance(x, distributed.Future) else self.submit(_same, x)
            for x in held
        ]  # fmt: skip

    def _counted(self, future):
        self._waiting.append(future)
        return future

    def tree(self, combine, futures, fan_in=FAN_IN):
        """The Future of combine(*results), a few at a time, always the same ones together. The list is emptied."""
        while len(futures) > 1:
            pieces = [futures[i : i + fan_in] for i in range(0, len(futures), fan_in)]
            futures[:] = [self.submit(combine, *piece) if len(piece) > 1 else piece[0] for piece in pieces]
        return futures.pop()

    def results(self, futures):
        """What the futures hold, in order, when all are done; the first error of any."""
        with _bar(self._what, len(self._waiting), self._progress) as advance:
            looked = seen = time.monotonic()
            while open_ones := [one for one in futures if not one.done()]:
                with contextlib.suppress(TimeoutError):
                    distributed.wait(open_ones[0], timeout=POLL_SECONDS)
                self._raise_failure(futures)
                advance(self._let_go())
                if time.monotonic() > looked + LOOK_SECONDS:
                    looked = time.monotonic()
                    seen = looked if self.client.nthreads() else seen
                    if looked > seen + self._timeout:
                        raise RuntimeError(
                            f"client: the cluster at {self._address} has had no worker for {self._timeout:g} s; start "
                            "some, or pass a greater timeout"
                        )
            self._raise_failure(futures)
            advance(self._let_go())
        return self.client.gather(futures)

    def _raise_failure(self, futures):
        """What went wrong, and not only that something else could not go on."""
        for statuses in (("error",), ("cancelled", "lost")):
            for one in (*self._waiting, *futures):
                if one.status in statuses:
                    one.result()

    def _let_go(self):
        """Forget the tasks that are done, so that the cluster may; how many these were."""
        done = [one for one in self._waiting if one.done()]
        self._waiting = [one for one in self._waiting if not one.done()]
        return len(done)

    def _alive(self):
        try:
            return self.client.status == "running" and self.client.nthreads() is not None
        except Exception:  # of many kinds, by what had begun when the scheduler went
            return False


@contextlib.contextmanager
def _bar(what, total, shown):
    """A function that advances a bar on stderr, where that is a terminal."""
    if not shown:
        yield lambda count: None
        return
    with progress_bar() as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def _checked_client(client):
    if client is None:
        try:
            client = distributed.default_client()
        except ValueError:
            raise ValueError(
                "client: expected a distributed.Client, got None, and no client is connected; make one with "
                "Client(LocalCluster()) or Client('tcp://SCHEDULER:8786')"
            ) from None
    if not isinstance(client, distributed.Client):
        raise TypeError(f"client: expected a distributed.Client, got {type(client).__name__}")
    if client.asynchronous:
        raise ValueError("client: expected one that waits, got Client(asynchronous=True); make one without it")
    if client.status != "running":
        raise RuntimeError(f"client: expected a connected one, got one that is {client.status}; make a new Client")
    return client


def _same(x):
    return x


def _short(error):
    return " ".join(str(error).split())[:160] or type(error).__name__
