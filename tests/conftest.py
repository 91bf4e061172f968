"""What every test file shares: a fixture that runs a test once for each SIMD build, on that build."""
import pytest
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="session", autouse=True)
def one_blas_thread():
    """NumPy's threads only get in the way of small products and of ours."""
    with threadpool_limits(1, "blas"):
        yield


def pytest_generate_tests(metafunc):
    if "build" in metafunc.fixturenames:
        import cyflash

        metafunc.parametrize("build", list(cyflash.cpu_info()["builds"]), indirect=True)


@pytest.fixture
def build(request):
    """The name of a SIMD build, which every call in the test uses; skipped where it does not run."""
    import cyflash

    status = cyflash.cpu_info()["builds"][request.param]
    if not status["runs"]:
        pytest.skip(f"{request.param}: {status['reason']}")
    with cyflash.set_implementation(request.param):
        yield request.param
        assert _build_that_ran() == request.param


def _build_that_ran():
    import numpy as np

    from cyflash.attention import attend

    x = np.ones((1, 1), np.float32)
    return attend(x, x, x)[2].implementation
