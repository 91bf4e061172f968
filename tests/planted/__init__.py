"""Planted bugs: faults that are put into a copy of the sources one at a time, to see that the tests find each.

    fault.py            what a fault is
    python_faults.py    those of Python files: nothing is rebuilt
    kernel_faults.py    those of the kernels: one SIMD build is compiled again
    workshop.py         copies of the tree: a fault put in, a module compiled, tests run
    __main__.py         `python -m tests.planted`: all of it, a table, and JSON
    caught.json         which test caught which fault first
"""
