"""Nothing beside an array is touched, whatever the head size and the length: see guarded_tails.py."""
import sys

import guarded_tails
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")


def test_each_head_dim_and_each_length(build):
    shapes = guarded_tails.shapes(thin=True)
    assert {D for D, _ in shapes} == set(range(1, 161)) and {L for _, L in shapes} > set(range(1, 131))
    calls, problem = guarded_tails.run(build, ["fp32", "int8"], thin=True)
    assert calls == dict.fromkeys(("fp32", "int8"), 2 * len(shapes)), problem


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_lengths_of_all_head_dims(build):
    calls, problem = guarded_tails.run(build, ["fp32", "int8"], thin=False)
    assert calls == dict.fromkeys(("fp32", "int8"), 2 * len(guarded_tails.shapes(thin=False))), problem
