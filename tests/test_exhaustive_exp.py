"""exp and tanh of every build on floats of every exponent; all 2^32 of them: `python -m tests.exhaustive_exp`."""
import exhaustive_exp
import numpy as np
import pytest

import cyflash


@pytest.fixture(scope="module")
def floats():
    return exhaustive_exp.stratified(1024)


@pytest.mark.parametrize("function", exhaustive_exp.FUNCTIONS)
def test_within_the_bound(build, function, floats):
    found = exhaustive_exp.judge(cyflash.cpu.active(), function, floats)
    assert 0.5 < found.share <= 1, found  # the bound is no larger than it has to be
    again = exhaustive_exp.error_in_decimal(cyflash.cpu.active(), function, found.at)
    assert again == pytest.approx(found.ulp, rel=1e-6)


class Fault:
    """A build whose function is wrong at one float."""

    def __init__(self, module, where, value):
        self.module, self.SHAPE, self.where, self.value = module, module.SHAPE, np.float32(where), np.float32(value)

    def elementary(self, function, x, out):
        self.module.elementary(function, x, out)
        out[x.view(np.uint32) == self.where.view(np.uint32)] = self.value


@pytest.mark.parametrize("function, x, value", [
    ("exp", -1.0, 0.3678796), ("exp", 0.0, 0.99999994), ("exp", -np.inf, 1e-45), ("exp", np.nan, 0.0),
    ("exp", -100.0, 0.0), ("exp", -50.0, -1.9e-22), ("exp", -200.0, np.nan), ("codes", -1.0, 93.8085),
    ("codes", 0.0, 254.99998), ("tanh", 0.5, 0.4621174), ("tanh", 9.5, 0.9999996), ("tanh", -1e-40, 1e-40),
    ("tanh", np.inf, np.nan),
])
def test_one_wrong_result_is_noticed(function, x, value, floats):
    module = cyflash.cpu.active()
    some = np.append(floats[:1000], np.float32(x))
    assert exhaustive_exp.judge(module, function, some).share <= 1
    try:
        found = exhaustive_exp.judge(Fault(module, x, value), function, some)
    except AssertionError:
        return
    assert found.share > 1
