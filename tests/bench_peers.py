"""Systems that misbehave, each in one way; the tests enter them into `cyflash bench`, which must refuse them."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cyflash.bench.cases import BF16
from cyflash.bench.decode_systems import CyflashDecode
from cyflash.bench.systems import Candidate, System
from cyflash.reference import attention


class _Peer(System):
    def version(self):
        return "0"

    def candidates(self, case):
        return {"reference": lambda: self._build(case)}

    def _build(self, case):
        arrays, keywords = case.inputs(), case.keywords()
        return Candidate(lambda: self.compute(*arrays, **keywords), np.asarray)

    def compute(self, *arrays, **keywords):
        return attention(*arrays, **keywords).astype(np.float32)


class Honest(_Peer):
    name = "honest"


class OneWrongRow(_Peer):
    name = "one wrong row"

    def compute(self, *arrays, **keywords):
        out = super().compute(*arrays, **keywords)
        out[-1, -1, -1] *= 1.01
        return out


class LowPrecision(_Peer):
    """Products of bfloat16 operands, as some libraries choose by themselves."""

    name = "low precision"

    def compute(self, *arrays, **keywords):
        rounded = ((x.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32) for x in arrays)
        return super().compute(*rounded, **keywords)


class SaysBf16(_Peer):
    """Is more precise than it says: not the system that it is taken for."""

    name = "says bf16"

    @classmethod
    def tolerance(cls, case):
        return BF16


class Bf16(LowPrecision):
    name = "is bf16"

    @classmethod
    def tolerance(cls, case):
        return BF16


class NaNRow(_Peer):
    name = "nan"

    def compute(self, *arrays, **keywords):
        out = super().compute(*arrays, **keywords)
        out[0, 0, 0, 0] = np.nan
        return out


class IgnoresCausal(_Peer):
    name = "ignores causal"

    def compute(self, *arrays, causal, **keywords):
        return super().compute(*arrays, **keywords)


class TwoThreads(_Peer):
    """NumPy releases the GIL in products, so both threads work; the second one stays, and is seen on a busy machine."""

    name = "two threads"

    def __init__(self, threads):
        super().__init__(threads)
        self._second = ThreadPoolExecutor(1)

    def compute(self, *arrays, **keywords):
        other = self._second.submit(_products)
        _products()
        other.result()
        return super().compute(*arrays, **keywords)


class Spins(_Peer):
    """Keeps a core busy when it should sleep."""

    name = "spins"

    def __init__(self, threads):
        super().__init__(threads)
        threading.Thread(target=_spin, daemon=True).start()


class SaysThree(_Peer):
    name = "says three"

    def threads(self):
        return 3


class CannotStart(_Peer):
    name = "cannot start"

    def __init__(self, threads):
        raise OSError("a library of it [/in/this/folder] is missing")


class Dies(_Peer):
    """Ends its process in the middle of the timed rounds."""

    name = "dies"
    timed = False

    def candidates(self, case):
        if case.shape[2] == 512:  # the count of threads
            return super().candidates(case)
        made = super().candidates(case)["reference"]()
        calls = iter(range(10_000))

        def call():
            if next(calls) > 500:
                os._exit(7)
            return made.call()

        return {"reference": lambda: Candidate(call, np.asarray)}


class ForgetsTokens(CyflashDecode):
    """Its int8 caches lose half of their tokens."""

    def _cache(self, case):
        cache = super()._cache(case)
        if case.dtype == "int8":
            cache.truncate(np.array(case.keys) // 2)
        return cache


class NotInstalled(_Peer):
    name = "not installed"
    needs = ("no_module_of_this_name",)


MISBEHAVING = {
    system.name: system
    for system in (OneWrongRow, LowPrecision, NaNRow, IgnoresCausal, TwoThreads, Spins, SaysThree, CannotStart, Dies)
}


def _products():
    x = np.ones((512, 512), np.float32)
    for _ in range(3):
        x @ x


def _spin():
    while True:
        time.sleep(0.001)
        stop = time.perf_counter() + 0.001
        while time.perf_counter() < stop:
            pass
