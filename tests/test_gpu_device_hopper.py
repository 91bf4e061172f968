"""What the machine of gpu_shim/ shows of hopper.cu, on a GPU: the tests of test_gpu_hopper.py; and V transposed."""
import gpu_on_device
import gpu_running
import numpy as np
import pytest
import test_gpu_hopper

from cyflash.gpu import variants

pytestmark = pytest.mark.gpu
OF_THE_MACHINE = ("test_planted_bugs_are_caught", "test_compiled", "test_maps")

globals().update({name: x for name, x in vars(test_gpu_hopper).items()
                  if name.startswith("test_") and name not in OF_THE_MACHINE})


@pytest.fixture(autouse=True)
def device(monkeypatch):
    gpu_on_device.require("9.0")
    return gpu_on_device.use(monkeypatch)


@pytest.mark.parametrize("Lk, D", [(1, 16), (64, 64), (133, 40), (1000, 128)])
def test_turned(device, Lk, D):
    """V of codes transposed: every byte."""
    v = np.random.default_rng(1).integers(-127, 128, (2, 3, Lk, D), np.int8)
    expected = np.zeros((2, 3, D, variants.turned_keys(Lk)), np.int8)
    order = np.array([i // 4 * 2 + i % 4 // 2 * 8 + i % 2 for i in range(16)])
    padded = np.zeros((2, 3, expected.shape[3], D), np.int8)
    padded[:, :, :Lk] = v
    groups = padded.reshape(2, 3, -1, 16, D)[:, :, :, order]
    expected[...] = groups.reshape(padded.shape).swapaxes(2, 3)
    try:
        placed = gpu_running.turned(device.place(v), 1)
        found = np.empty(placed.shape, np.int8)
        device.fetch(placed, found)
    finally:
        device.release()
    np.testing.assert_array_equal(found, expected)


def test_long(device):
    """Many turns of the rings, many blocks on every multiprocessor."""
    for kind in test_gpu_hopper.KINDS:
        problem = test_gpu_hopper.Problem(kind, B=1, H=4, Hk=2, Lq=1500, Lk=3001, D=128)
        test_gpu_hopper.check(problem, causal=True)
