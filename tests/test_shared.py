"""Judges are shared by what they are given, and by nothing less."""
import numpy as np
import pytest
import sharing


class Judge(metaclass=sharing.Shared):
    made = 0

    def __init__(self, *arrays, **options):
        Judge.made += 1
        self.arrays, self.options = arrays, options


@pytest.fixture
def x():
    return np.arange(6, dtype=np.float32).reshape(2, 3)


def test_the_same_bytes_are_one_judge(x):
    first, made = Judge(x, x, bias=x, causal=True), Judge.made
    assert Judge(x.copy(), np.asfortranarray(x), bias=x.copy(), causal=True) is first and Judge.made == made


def test_anything_else_is_another_one(x):
    y = x.copy()
    y[1, 2] = np.nextafter(y[1, 2], 9)
    negative = np.zeros((2, 3), np.float32)
    given = [
        ((x, x), {}), ((x, y), {}), ((y, x), {}), ((x,), {}), ((x, x.reshape(3, 2)), {}), ((x, x.view(np.int32)), {}),
        ((x, x), {"bias": x}), ((x, x), {"bias": y}), ((x, x), {"mask": x}), ((x, x), {"scale": 1.0}), ((x, x, x), {}),
        ((x, x), {"scale": 1}), ((x, x), {"scale": True}), ((x,), {"scale": x}), ((negative,), {}), ((-negative,), {}),
        ((x.view(np.uint32),), {}), ((x.astype(np.float64),), {}), ((x, x), {"scale": np.float32(1)}),
    ]  # fmt: skip
    judges = [Judge(*arrays, **options) for arrays, options in given]
    assert len(set(map(id, judges))) == len(given)


def test_a_judge_keeps_what_it_was_given(x):
    judge = Judge(x, bias=x)
    x[0, 0] = 77
    assert judge.arrays[0][0, 0] == judge.options["bias"][0, 0] == 0


def test_few_are_kept_and_large_ones_never(x, monkeypatch):
    monkeypatch.setattr(sharing, "MOST_KEPT", 2)
    first = Judge(x)
    Judge(x, scale=2), Judge(x, scale=3)
    assert Judge(x) is not first
    monkeypatch.setattr(sharing, "LARGEST", 23)
    assert Judge(x) is not Judge(x)
