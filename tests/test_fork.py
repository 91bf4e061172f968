"""A fork after a call on several threads: children compute, with the same bits, on as many threads, and never hang."""
import ctypes.util
import glob
import importlib.util
import os

import forking
import pytest

from cyflash.cpu import detect

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork") or not os.path.isdir("/proc/self/task"), reason="not Linux"),
    pytest.mark.skipif(not detect.openmp()[0], reason="built without OpenMP: every call has one thread"),
    pytest.mark.timeout(180),
]
run = forking.run


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return forking.harness(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module", autouse=True)
def gnu(tmp_path_factory):
    """Every test but those of other runtimes is of GNU's OpenMP."""
    import cyflash

    if "libgomp" not in str(cyflash.cpu_info()["openmp"]):
        pytest.skip(f"not GNU's OpenMP: {cyflash.cpu_info()['openmp']}")


def test_children_keep_their_threads():
    """Nested ones too, whether or not the child computed before it forked; and the parent goes on."""
    run("""
expected = call()
def great():
    whole(); right(1)
def grand():
    whole(3); in_child(great); right()
def child():
    in_child(grand); whole(); in_child(grand); right()
in_child(child); whole(); in_child(child)
assert idle(1) and call(1) is not None
""")


def test_every_entry_that_uses_threads():
    """In a child of a parent that has used them all."""
    run("""
import cyflash
from cyflash.quant import Calibrator, quantize
y = np.random.default_rng(1).standard_normal((1, 4, 700, 64), dtype=np.float32)
cyflash.set_num_threads(2)
def everything():
    cache = cyflash.KVCache(1, 4, 64, 700, "int8"); cache.append(y, y)
    floats = cyflash.KVCache(1, 4, 64, 700, "fp16"); floats.append(y, y)
    calibrator = Calibrator(); calibrator.observe("a", y[0], y[0], y[0])
    ragged = y[0].transpose(1, 0, 2)
    edges = np.array([0, 200, 700])
    q = quantize(y, "head", smooth=True)
    scales = calibrator.compute("max")["a"]
    return [
        cyflash.flash_attention(y, y, y), cyflash.flash_attention_int8(y, y, y), q.data, q.scale,
        cyflash.flash_attention_int8_varlen(ragged, ragged, ragged, edges, edges),
        cyflash.flash_attention_with_kvcache(y[:, :, :1], cache),
        cyflash.flash_attention_with_kvcache(y[:, :, :1], floats),
        np.array([scales.q_scale, scales.k_scale, scales.v_scale]),
    ]
expected = everything()
def child():
    for one, other in zip(everything(), expected, strict=True):
        assert np.array_equal(one, other)
    assert tasks() == 2
in_child(child); child()
""")


def test_forks_from_other_threads():
    """Of the thread that forks the child has a copy, and of no other."""
    run("""
expected = call()
errors = []
def work(computes):
    try:
        for _ in range(5):
            if computes:
                right()
            in_child(lambda: (whole(), in_child(whole)))
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
assert not errors, errors
""")


FORKS_WHILE_OTHERS_COMPUTE = """
expected = call()
stop, errors = threading.Event(), []
def work():
    while not stop.is_set():
        if not np.array_equal(call(), expected):
            errors.append("other bits")
threads = [threading.Thread(target=work) for _ in range(2)]
[t.start() for t in threads]
def child():
    whole()
    other = threading.Thread(target=whole); other.start(); other.join()
for i in range(int(sys.argv[1])):
    if i % 2:
        right()
    in_child(child)
stop.set(); [t.join() for t in threads]
assert not errors
right()
"""


def test_forks_while_others_compute():
    run(FORKS_WHILE_OTHERS_COMPUTE, 20)


MANY_FORKS = """
expected = call()
for i in range(int(sys.argv[1])):
    if i % 3:
        right()
    in_child(whole)
assert idle(1)
"""


def test_fifty_forks():
    run(MANY_FORKS, 50)


@pytest.mark.slow
def test_a_thousand_forks():
    run(MANY_FORKS, 1000, seconds=500)


@pytest.mark.slow
def test_many_forks_while_others_compute():
    run(FORKS_WHILE_OTHERS_COMPUTE, 500, seconds=500)


def test_a_fork_of_c_code():
    """Which Python's own hooks do not see."""
    run("""
import ctypes
expected = call()
pid = ctypes.PyDLL(None).fork()
if pid == 0:
    signal.alarm(20)
    os._exit(0 if np.array_equal(call(), expected) and tasks() == 2 else 1)
assert os.waitpid(pid, 0)[1] == 0
right()
""")


def test_a_fork_from_a_signal_handler_within_a_call():
    """Parent and child both go on with the call."""
    run("""
import time, cyflash
L, took = 3000, 0
while took < 0.25:  # signals are looked for some times a call only, where it is long enough
    L = 2 * L
    y = np.random.default_rng(0).standard_normal((1, L, 64), dtype=np.float32)
    begun = time.monotonic()
    expected = cyflash.flash_attention(y, y, y, num_threads=2)
    took = time.monotonic() - begun
forked = []
def handler(*_):
    forked.append(os.fork())
signal.signal(signal.SIGALRM, handler)
for part in (0.1, 0.4):
    signal.setitimer(signal.ITIMER_REAL, part * took)
    out = cyflash.flash_attention(y, y, y, num_threads=2)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if forked and forked[-1] == 0:
        same = np.array_equal(out, expected)
        cyflash.set_num_threads(3)  # nothing is left of what the parent's call had taken
        z = y[None, :, :1000].repeat(3, 1)
        cyflash.flash_attention(z, z, z)
        os._exit(0 if same and tasks() == 3 else 1)
    assert np.array_equal(out, expected)
assert forked, "no signal came within a call"
for pid in forked:
    assert os.waitpid(pid, 0)[1] == 0
""")


POOLS = """
import multiprocessing, os, sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
import numpy as np

def work(i):
    import cyflash
    x = np.random.default_rng(i).standard_normal((4, 300, 64), dtype=np.float32)
    return cyflash.flash_attention(x, x, x, num_threads=2), len(os.listdir("/proc/self/task"))

def nested(i):
    "os.fork in a worker of multiprocessing."
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        out, count = work(i)
        os.write(write, out.tobytes()[:4096])
        os._exit(count)
    os.close(write)
    data = os.read(read, 4096)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return data == work(i)[0].tobytes()[:4096] and status

if __name__ == "__main__":
    method = sys.argv[1]
    expected = [work(i)[0] for i in range(6)]
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        for want, (out, count) in zip(expected, pool.map(work, range(6)), strict=True):
            assert np.array_equal(out, want) and count >= 2, count
        # a worker, which has no threads but those of OpenMP, and a child of it that has those too
        assert all(count >= 2 for count in pool.map(nested, range(4)))
    if method == "fork":
        with ThreadPoolExecutor(3) as pool:
            for want, (out, _) in zip(expected, pool.map(work, range(6)), strict=True):
                assert np.array_equal(out, want)
        with ProcessPoolExecutor(2, mp_context=context) as pool:
            for want, (out, count) in zip(expected, pool.map(work, range(6)), strict=True):
                assert np.array_equal(out, want) and count >= 2, count
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(method, tmp_path):
    """Pools, forks within their workers, and concurrent.futures."""
    path = tmp_path / "pools.py"
    path.write_text(POOLS)
    run("import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')" if method == "fork"
        else "import subprocess; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], timeout=50).returncode)",
        path, method, seconds=100)


# Of other libraries that share the OpenMP runtime


def test_threads_of_another_library_before_our_first_call(harness):
    """Its region left threads to the thread that forks: ours never had any."""
    run("""
import ctypes, cyflash
expected = call(1)
other = ctypes.CDLL(sys.argv[1])
assert other.region(2) == 2 and tasks() == 2
def child():
    whole(); assert other.region(2) == 2
in_child(child)
""", harness)


def test_an_import_in_a_child_makes_no_fork_hang(harness):
    """The child has another library's record of threads that it does not have: nothing may wait for them."""
    run("""
import ctypes
other = ctypes.CDLL(sys.argv[1])
assert other.region(2) == 2
def child():
    import cyflash
    assert other.was_forked()
    release = threading.Event()
    waits = threading.Thread(target=release.wait); waits.start()  # so that this is not the only thread
    in_child(lambda: None)
    release.set(); waits.join()
    def compute():  # a thread has a record of its own
        global expected
        expected = call(1); whole(); in_child(whole)
    thread = threading.Thread(target=compute); thread.start(); thread.join()
    assert "expected" in globals()
in_child(child)
assert not other.was_forked()
""", harness)


def test_threads_that_may_be_those_of_a_record_alone(harness):
    """In a process that was forked before the import, the thread of the fork may have a record without threads,
    whatever was called: one call takes two threads and needs one. What it forks has one thread, and says so."""
    run("""
import ctypes
other = ctypes.CDLL(sys.argv[1])
def grandchild():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert np.array_equal(call(2), expected) and tasks() == 1
    assert "had been forked with OpenMP before it imported cyflash" in str(caught[0].message)
def child(before):
    global expected
    import cyflash
    cyflash.flash_attention(x[:1, :8], x[:1, :8], x[:1, :8], num_threads=2)
    assert tasks() == 1
    expected = call(1)
    if not before:
        assert other.region(2) == 2
    in_child(grandchild)
in_child(lambda: child(False))
assert other.region(2) == 2
in_child(lambda: child(True))
""", harness)


@pytest.mark.parametrize("who", [0, 1])
def test_forks_within_a_region(harness, who):
    """Of its master, and of another of its threads: there the child has one thread, and says so once."""
    run("""
import ctypes
expected = call()
other = ctypes.CDLL(sys.argv[1])
def child():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        right(); right(); right(1)
        import cyflash
        assert cyflash.cpu_info()["threads"] == 1
    assert tasks() == 1
    assert [w.category for w in caught] == [RuntimeWarning] and "within a parallel region" in str(caught[0].message)
    in_child(right)
failed = []
@ctypes.CFUNCTYPE(None)
def callback():
    try:
        in_child(child)
    except BaseException as error:
        failed.append(error)
other.call_within(2, int(sys.argv[2]), callback)
assert not failed, failed
right(3); in_child(whole)
""", harness, who)


TORCH = """
def torch_works():
    a = torch.ones(700, 700)
    return float((a @ a).sum() + torch.exp(a * 1.0).sum())
def compare():
    assert torch_works() == sum_of_torch
"""


@pytest.mark.parametrize("first", ["torch", "cyflash"])
def test_torch(first):
    """Imported before or after, with threads of its own before the fork, and in the child."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    run(TORCH + """
if sys.argv[1] == "torch":
    import torch, cyflash
else:
    import cyflash, torch
torch.set_num_threads(2)
sum_of_torch = torch_works()
expected = call(1)
shared = len([1 for line in {l.split()[-1] for l in open("/proc/self/maps")} if "libgomp" in line]) == 1
if shared:  # else torch has a runtime of its own, which nobody prepares
    in_child(lambda: (right(), compare()))
in_child(lambda: whole())
right(); compare()
in_child(lambda: (right(), in_child(right)))
for _ in range(5):
    compare(); right(); in_child(right)
""", first)


def test_dataloader_workers():
    """Of torch, forked in each epoch from a parent that trains and computes attention; the workers do too."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    run("""
import torch, cyflash
from torch.utils.data import DataLoader, Dataset
torch.set_num_threads(2)
class Data(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        y = np.random.default_rng(i).standard_normal((2, 100, 64), dtype=np.float32)
        return torch.from_numpy(cyflash.flash_attention(y, y, y, num_threads=2))
expected = torch.stack([Data()[i] for i in range(8)])
layer = torch.nn.Linear(64, 64)
for epoch in range(2):
    for i, batch in enumerate(DataLoader(Data(), batch_size=4, num_workers=2, multiprocessing_context="fork")):
        assert torch.equal(batch, expected[4 * i : 4 * i + 4])
        layer(batch).square().mean().backward()
        z = batch.numpy()[0]
        cyflash.flash_attention(z, z, z, num_threads=2)
""")


# Where threads cannot be ended

ONE_THREAD = """
import cyflash
expected = call()
in_child(lambda: None)
def child():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        right(); right(3); right(1)
        assert cyflash.cpu_info()["threads"] == 1
    assert tasks() == 1, tasks()
    assert len(caught) == 1 and caught[0].category is RuntimeWarning, [str(w.message) for w in caught]
    assert sys.argv[1] in str(caught[0].message), caught[0].message
    in_child(right)
in_child(child)
whole() if tasks() == 1 else right()
in_child(child)
"""


def test_switched_off():
    """Then a child has one thread after a call on several, and says so once; and all of them before one."""
    run(ONE_THREAD, "CYFLASH_ATFORK=0", CYFLASH_ATFORK="0")
    run("import cyflash; expected = call(1); in_child(whole)", CYFLASH_ATFORK="0")


def llvm():
    """Files of LLVM's OpenMP: under its own name, and under GNU's."""
    found = {ctypes.util.find_library("omp") or "", *glob.glob("/usr/lib*/llvm*/lib/lib[g]*omp.so")}
    return [pytest.param(path, id=os.path.basename(path)) for path in sorted(found) if path]


@pytest.mark.parametrize("library", llvm() or [pytest.param("", marks=pytest.mark.skip("LLVM's OpenMP is not here"))])
def test_other_runtimes_are_left_alone(library, harness):
    """LLVM's, in the place of GNU's: its own way to end threads aborts in the child."""
    run("""
import ctypes
other = ctypes.CDLL(sys.argv[2])
assert not other.can_end_threads()
""" + ONE_THREAD, "not GNU's", harness, LD_PRELOAD=library)


# The handlers


def test_the_runtime_is_found(harness):
    run("import ctypes; assert ctypes.CDLL(sys.argv[1]).can_end_threads()", harness)


def test_handlers_go_with_their_library(harness):
    """Unloaded, it leaves none behind that a fork would jump to."""
    run("""
import _ctypes, ctypes
ctypes.CDLL("libgomp.so.1")
other = ctypes.CDLL(sys.argv[1])
assert other.handlers() == 0
in_child(lambda: None)
_ctypes.dlclose(other._handle)
assert not any("harness" in line for line in open("/proc/self/maps")), "still loaded"
in_child(lambda: None)
""", harness)


def test_handlers_outlive_a_subinterpreter():
    """They are the process's, whichever interpreter imported the module."""
    pytest.importorskip("_testcapi")
    run("""
import _testcapi
from importlib.util import find_spec
path = find_spec("cyflash.cpu.detect").origin.replace("detect", "team")
load = f'''
import importlib.machinery, importlib.util
spec = importlib.util.spec_from_file_location("team", {path!r})
try:
    team = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(team)
    team.prepare_forks(True, True)
except ImportError as error:  # not more than one interpreter has it
    assert "interpreter" in str(error), error
'''
for _ in range(2):
    assert _testcapi.run_in_subinterp(load) == 0
in_child(lambda: None)
exec(load)
expected = call()
assert _testcapi.run_in_subinterp(load) == 0
in_child(whole)
""")


# Signals


def test_ctrl_c_in_a_child():
    """Ends its call and no more: it computes afterwards, and so does the parent."""
    run("""
expected = call()
y = np.zeros((1, 60000, 64), np.float32)
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    import cyflash
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(40)
    try:
        os.write(write, b"r")
        cyflash.flash_attention(y, y, y, num_threads=2)
    except KeyboardInterrupt:
        os._exit(0 if np.array_equal(call(), expected) and tasks() == 2 else 1)
    os._exit(2)
assert os.read(read, 1) == b"r"
time.sleep(0.5)
os.kill(pid, signal.SIGINT)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert status == 0, status
whole()
""")


def test_the_checks_notice():
    """Of the scripts above: a child that hangs, wrong bits and missing threads each fail them."""
    said = run("""
expected = call()
for work in (
    lambda: time.sleep(60), lambda: whole() or whole(), lambda: globals().update(expected=expected + 1) or right(),
):
    try:
        in_child(work, 2)
    except AssertionError as error:
        print(error)
""")
    assert said.splitlines() == ["the child hung", "the child ended with 1", "the child ended with 1"]
