"""What every test file shares: fixtures that run a test once for each SIMD build, or on one of them."""
import os
import zlib

import pytest
from threadpoolctl import threadpool_limits

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores: a thread that waits must not keep one busy
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread():
    """NumPy's threads only get in the way of small products and of ours."""
    with threadpool_limits(1, "blas"):
        yield


@pytest.fixture(scope="session", autouse=True)
def folder_of_all_processes(tmp_path_factory):
    """Where they share what takes long to make."""
    folder = tmp_path_factory.getbasetemp()
    os.environ["CYFLASH_TEST_FOLDER"] = str(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each process takes tests that are neighbours, which share what takes long to make, and in the end another's."""
    if config.option.dist == "load":  # what `-n 2` means
        from xdist.scheduler import WorkStealingScheduling

        return WorkStealingScheduling(config, log)


def pytest_generate_tests(metafunc):
    if "build" in metafunc.fixturenames:
        import cyflash

        metafunc.parametrize("build", list(cyflash.cpu.BUILDS), indirect=True)


@pytest.fixture
def build(request):
    """The name of a SIMD build, which every call in the test uses; skipped where it does not run."""
    import cyflash

    if reason := cyflash.cpu.why_not(request.param):
        pytest.skip(f"{request.param}: {reason}")
    with cyflash.set_implementation(request.param):
        yield request.param
        assert _build_that_ran() == request.param


@pytest.fixture
def one_build(request):
    """The name of a SIMD build that runs here, which every call in the test uses: another one for other parameters.

    For what hardly depends on the build, but has many cases.
    """
    import cyflash

    names = cyflash.cpu.runnable()
    with cyflash.set_implementation(names[zlib.crc32(request.node.name.encode()) % len(names)]):
        yield cyflash.cpu.name_of(cyflash.cpu.active())


def _build_that_ran():
    import numpy as np

    from cyflash.attention import attend

    x = np.ones((1, 1), np.float32)
    return attend(x, x, x)[2].implementation
