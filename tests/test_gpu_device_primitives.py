"""Each primitive on a GPU: the bits that the machine of gpu_shim/ gives; test_gpu_primitives.py shows them right.

What kernels are made of, so this file comes first: where it fails the others say little.
"""
import gpu_on_device
import gpu_primitives
import numpy as np
import pytest
from gpu_primitives import HOPPER_PRIMITIVES, PRIMITIVES, WIDE

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def device(monkeypatch):
    gpu_on_device.use(monkeypatch)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(name):
    one = PRIMITIVES[name]()
    one.check(one.run())


@pytest.mark.parametrize("name", [name for name in HOPPER_PRIMITIVES if not name.startswith("wgmma")])
def test_primitive_of_hopper(name):
    gpu_on_device.require("9.0")
    one = HOPPER_PRIMITIVES[name]()
    one.check(one.run())


@pytest.mark.parametrize("case", WIDE, ids=gpu_primitives.Wide.title)
def test_wgmma(case):
    """Where the descriptors are wrong this says which would be right."""
    gpu_on_device.require("9.0")
    one = gpu_primitives.wide(case)
    try:
        one.check(one.run())
    except AssertionError as error:
        if gpu_on_device.Device.broken:
            raise
        found = gpu_primitives.descriptors_that_work(case)
        raise AssertionError(f"{error}\ndescriptors that work: {'; '.join(found) or 'none of those tried'}") from None


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_sums_of_products_are_near(name):
    """Numbers that do not add up exactly: tensor cores cut sums off where float32 rounds them."""
    one = gpu_primitives.product(name)
    random = np.random.default_rng(3)
    left, _ = gpu_primitives.NUMBERS[name]
    a, b = random.standard_normal((16, 16)).astype(left), random.standard_normal((16, 8)).astype(left)
    words = gpu_primitives.left_words(a)
    columns = np.ascontiguousarray(b.T).view(np.uint32).reshape(8, 8)
    g, t = np.arange(32) // 4, np.arange(32) % 4
    one.q[0] = np.hstack([words, columns[g, t][:, None], columns[g, t + 4][:, None], np.zeros((32, 4), np.uint32)])
    found = one.run()[0].view(np.float32)
    x, y = a.astype(np.float64), b.astype(np.float64)
    total, size = x @ y, np.abs(x) @ np.abs(y)
    for e, (row, column) in enumerate([(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]):
        off = np.abs(found[:, e] - total[row, column]) / size[row, column]
        assert off.max() <= 16 * 2.0**-23, f"sums are off by {off.max():.3g} of the sizes"
