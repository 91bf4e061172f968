"""What the machine of gpu_shim/ shows of ffma.cu and mma.cu, on a GPU: the tests of test_gpu_kernels.py themselves.

On compute capability 9.0 twice: with hopper.cu where it is chosen, and with mma.cu alone.
"""
import gpu_on_device
import pytest
import test_gpu_kernels

pytestmark = pytest.mark.gpu

globals().update({name: x for name, x in vars(test_gpu_kernels).items() if name.startswith("test_") or name == "kind"})
del globals()["test_params_size"]  # of the machine


@pytest.fixture(autouse=True, params=["chosen", "mma"])
def device(request, monkeypatch):
    gpu_on_device.require("9.0" if request.param == "mma" else None)
    given = request.node.callspec.params
    if request.param == "mma" and "float32" in (given.get("kind"), given.get("name")):
        pytest.skip("float32 takes ffma.cu either way")
    gpu_on_device.use(monkeypatch, mapped=request.param == "chosen")
