"""Cases that crash or hang, in place of `run.one`: for the test that these are failures."""
import os
import signal
import time


def crash(seed, case, build, tally):
    tally["cases"] += 1
    if case == 3:
        os.kill(os.getpid(), signal.SIGSEGV)


def hang(seed, case, build, tally):
    tally["cases"] += 1
    if case == 3:
        time.sleep(3600)
