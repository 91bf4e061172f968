"""Python on CPUs that this machine has not: qemu's user mode runs it, and the tests with it (python -m tests.emulated).

    models.py      the CPUs, and the SIMD build that each has to choose
    python.py      an interpreter for each of them
    aarch64.py     what one of AArch64 takes: libraries, packages, cyflash cross-compiled
    smoke.py       what is looked at on every CPU within seconds (tests/test_emulated.py)
"""
