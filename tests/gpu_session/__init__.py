"""Everything that needs a GPU, in one command and half an hour: `python -m tests.gpu_session --out DIR`.

    __main__.py    the command: parts one after another, each within its share of the time
    report.py      report.txt and report.json in DIR, complete after every line: a session that is cut off keeps all
    processes.py   a process with a time limit, of which nothing is left running
    machine.py     what there is: GPU, driver, versions, compilers; and the C extensions, which it builds
    tests.py       `pytest -m gpu` in processes of some tests each: what hangs or crashes costs one test
    recorder.py    in those processes: a line for each test as it begins and ends
    bench.py       the cases of `cyflash bench --gpu`, each in its own process; targets beside what was measured

Nothing in here imports CuPy or touches the GPU: processes do.
"""
