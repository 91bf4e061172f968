"""How many threads a call gets, and where the number comes from."""

import os
import subprocess
import sys

import numpy as np
import pytest
import threadpoolctl

import cyflash
from cyflash.cpu import detect, threads

needs_openmp = pytest.mark.skipif(not detect.openmp()[0], reason="built without OpenMP: every call has one thread")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("CYFLASH_NUM_THREADS", raising=False)
    yield
    cyflash.set_num_threads(None)


@pytest.fixture
def limits(monkeypatch):
    """Sets the three limits that the default is made of."""

    def set_limits(affinity, cgroup, openmp):
        monkeypatch.setattr(threads, "affinity", lambda: affinity)
        monkeypatch.setattr(threads, "cgroup_quota", lambda: cgroup)
        monkeypatch.setattr(detect, "openmp", lambda: (True, 201511, openmp))

    return set_limits


@pytest.mark.parametrize(
    "affinity, cgroup, openmp, expected", [(8, None, 8, 8), (4, 6, 8, 4), (8, 2, 8, 2), (8, 6, 3, 3)]
)
def test_the_default_is_the_smallest_limit(limits, affinity, cgroup, openmp, expected):
    limits(affinity, cgroup, openmp)
    assert threads.count() == expected
    assert cyflash.cpu_info()["threads"] == expected


@pytest.mark.parametrize(
    "affinity, openmp, set_to, limit", [(8, 8, None, None), (8, 2, None, 2), (8, 8, "8", 8), (2, 8, "8", 8)]
)
def test_the_limit_of_openmp_is_named_only_where_it_is_one(limits, monkeypatch, affinity, openmp, set_to, limit):
    """Unset, it is the number of processors; OMP_NUM_THREADS sets it, and so may other libraries at any time."""
    limits(affinity, None, openmp)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_to:
        monkeypatch.setenv("OMP_NUM_THREADS", set_to)
    assert threads.limits()["omp_num_threads"] == limit


def test_each_setting_wins_over_the_one_before(limits, monkeypatch):
    limits(2, 2, 2)
    monkeypatch.setenv("CYFLASH_NUM_THREADS", "5")
    assert threads.count() == 5
    cyflash.set_num_threads(6)
    assert threads.count() == 6
    assert threads.count(7) == 7
    cyflash.set_num_threads(None)
    assert threads.count() == 5


def test_without_openmp_there_is_one_thread(monkeypatch):
    monkeypatch.setattr(detect, "openmp", lambda: (False, 0, 1))
    assert threads.count() == threads.count(4) == 1
    assert cyflash.cpu_info()["openmp"] is None


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", True, [2]])
def test_bad_counts_are_refused(n):
    with pytest.raises(ValueError, match="num_threads: expected an integer of at least 1"):
        cyflash.set_num_threads(n)
    x = np.ones((300, 64), np.float32)
    with pytest.raises(ValueError, match="num_threads"):
        cyflash.flash_attention(x, x, x, num_threads=n)
    with pytest.raises(ValueError, match="num_threads"):
        cyflash.flash_attention(x[:1], x[:1], x[:1], num_threads=n)


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5"])
def test_a_bad_environment_variable_is_named(monkeypatch, value):
    monkeypatch.setenv("CYFLASH_NUM_THREADS", value)
    with pytest.raises(ValueError, match="CYFLASH_NUM_THREADS: expected an integer of at least 1"):
        threads.count()


@needs_openmp
def test_threadpoolctl_limits_the_default():
    x = np.ones((1, 1), np.float32)
    cyflash.flash_attention(x, x, x)
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert cyflash.cpu_info()["threads"] == 1


@needs_openmp
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_call_runs_on_as_many_threads_as_asked(n):
    """Counted from outside: the OpenMP runtime keeps a pool of n threads, the caller among them."""
    code = f"""
import os, numpy as np, cyflash
x = np.ones((64, 512, 64), np.float32)
before = len(os.listdir("/proc/self/task"))
cyflash.flash_attention(x, x, x, num_threads={n})
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(n - 1), done.stderr


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_cgroup_v2_quota_is_rounded_down(tmp_path):
    write(tmp_path / "a" / "b", cpu__max="765000 100000")
    assert threads.quota_of(str(tmp_path), "0::/a/b\n") == 7


def test_cgroup_v2_ancestors_count_and_max_is_no_limit(tmp_path):
    write(tmp_path / "a", cpu__max="200000 100000")
    write(tmp_path / "a" / "b", cpu__max="max 100000")
    assert threads.quota_of(str(tmp_path), "0::/a/b\n") == 2


def test_cgroup_less_than_one_cpu_is_one(tmp_path):
    write(tmp_path, cpu__max="50000 100000")
    assert threads.quota_of(str(tmp_path), "0::/\n") == 1


def test_cgroup_v1_quota(tmp_path):
    write(tmp_path / "cpu" / "box", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    groups = "5:memory:/other\n4:cpu,cpuacct:/box\n"
    assert threads.quota_of(str(tmp_path), groups) == 3


def test_cgroup_v1_without_limit(tmp_path):
    write(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert threads.quota_of(str(tmp_path), "4:cpu:/\n") is None


def test_cgroup_names_may_be_of_any_bytes(tmp_path):
    (tmp_path / "cgroup").write_bytes(b"0::/\xff\xc3\xa9\n")
    groups = threads.read(str(tmp_path), "cgroup")
    write(tmp_path / os.fsdecode(b"\xff\xc3\xa9"), cpu__max="200000 100000")
    assert threads.quota_of(str(tmp_path), groups) == 2


def test_no_cgroup_files_no_limit(tmp_path):
    assert threads.quota_of(str(tmp_path), "0::/gone\n") is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no CPU affinity here")
def test_affinity_is_asked_anew():
    cpus = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cpus)})
        assert cyflash.cpu_info()["threads"] == 1
    finally:
        os.sched_setaffinity(0, cpus)
