"""The kernels' exponentials and tanh on all 2^32 floats: the largest error, and what special values give.

    python -m tests.exhaustive_exp                     every SIMD build that runs here; minutes for each
    python -m tests.exhaustive_exp --build avx2 --function exp --json figures.json

The functions of softmax.pxi, int8.pxi and change.pxi, called as the tiles call them (`elementary` in inspect.pxi):

    exp      e^x for the softmax; its argument is a score less the greatest one, so x <= 0
    codes    255 e^x for codes of P; x <= 0 as well
    tanh     of softcap; any x

The reference is NumPy's float64 exp and tanh, which are within 4 units in the last place of a float64, so 2^-27 of one
of a float32: no figure below changes by as much as its last digit. Where |x| is small or large it is their series, or
their limit. What a run reports at the end is computed again with 50 decimal digits, and must be the same.

An error is given in ULP (the distance between two float32 around the true value; between denormals it is 2^-149), and
as a share of a bound. Since x log2(e) is rounded before the power of two is taken, the relative error of exp grows with
|x|:

    |error| <= (3.1 + 1.23 |x|) 2^-24 e^x + 2^-149     exp: 1.4 of the polynomial, the rest of its evaluation;
                                                       |x| of rounding x log2(e), 0.23 |x| of log2(e) as a float
    |error| <= (51 + 1.23 |x|) 2^-24 255 e^x + 2^-149  codes: 49 of the polynomial
    |error| <= 3.8 2^-24 |tanh x| + 2^-149             tanh

Where 0 < x, exp and codes are not defined, and only NaN is looked at.
"""
import argparse
import decimal
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

CHUNK = 1 << 20
F32 = np.finfo(np.float32)


def exp(x):
    """e^x; its series where the next term is below 2^-53, which is as exact and takes less time."""
    if (np.abs(x) < 2.0**-17).all():
        return 1 + x * (1 + x / 2)
    if (x < -110).all():  # less than half of the least denormal
        return np.zeros_like(x)
    return np.exp(x)


def tanh(x):
    """tanh(x), in the same way."""
    if (np.abs(x) < 2.0**-13).all():
        return x - x * x * x / 3
    if (np.abs(x) > 20).all():
        return np.sign(x)
    return np.tanh(x)


FUNCTIONS = {"exp": exp, "codes": lambda x: 255 * exp(x), "tanh": tanh}
BOUNDS = {"exp": (3.1, 1.23), "codes": (51.0, 1.23), "tanh": (3.8, 0.0)}  # the coefficients of 2^-24 and |x| above


class Found(NamedTuple):
    """Of some floats: the largest errors, and where."""

    ulp: float    # largest error in units of the last place,
    at: float     # of this x
    share: float  # largest error as a share of the bound,
    where: float  # of this x

    def worse(self, other):
        ulp, at = max((self.ulp, self.at), (other.ulp, other.at), key=lambda x: x[0])
        return Found(ulp, at, *max((self.share, self.where), (other.share, other.where), key=lambda x: x[0]))


NONE = Found(0.0, 0.0, 0.0, 0.0)


def computed(module, function, x):
    """By the kernels of a build; any number of floats."""
    step = module.SHAPE["ROWS"] * module.SHAPE["LANES"]
    padded = np.zeros(-(-len(x) // step) * step, np.float32)
    padded[: len(x)] = x
    out = np.empty_like(padded)
    module.elementary(function, padded, out)
    return out[: len(x)]


def judge(module, function, x):
    """A `Found` for an array of floats; AssertionError where a special value gives something else than it should."""
    nan = np.isnan(x)
    if function != "tanh" and not nan.any() and (x > 0).all():
        return NONE
    out = computed(module, function, x)
    assert np.isnan(out[nan]).all(), f"{function}({hex(x[nan].view(np.uint32)[0])}): expected NaN"
    defined = ~nan if function == "tanh" else x <= 0
    if not defined.all():
        x, out = x[defined], out[defined]
    if not len(x):
        return NONE
    exact = x.astype(np.float64)
    true = FUNCTIONS[function](exact)
    bad = ~np.isfinite(out)
    assert not bad.any(), f"{function}({x[bad][0]!r}): expected {true[bad][0]!r}, got {out[bad][0]!r}"
    if function != "tanh":
        assert not np.signbit(out).any(), f"{function}: a result has a sign"
        lost = out[x == -np.inf]
        assert not lost.any(), f"{function}(-inf): expected 0, got {lost}"
        one, expected = out[x == 0], {"exp": 1, "codes": 255}[function]
        assert (one == expected).all(), f"{function}(0): expected {expected}, got {one}"
    else:
        assert (np.signbit(out) == np.signbit(x))[x != 0].all(), "tanh: a result has another sign than x"
    error = np.abs(out - true)
    unit = np.maximum((np.abs(true).view(np.uint64) & np.uint64(0x7FF << 52)).view(np.float64), float(F32.tiny))
    ulp = error / (unit * 2.0**-23)
    fixed, growing = BOUNDS[function]
    with np.errstate(invalid="ignore"):  # inf * 0
        relative = fixed + (growing * np.abs(exact) if growing else 0.0)
        bound = np.where(true == 0, 0.0, relative * 2.0**-24 * np.abs(true)) + float(F32.smallest_subnormal)
    share = error / bound
    i, j = int(np.argmax(ulp)), int(np.argmax(share))
    return Found(float(ulp[i]), float(x[i]), float(share[j]), float(x[j]))


# Ends of ranges of |x|; each is the first float of a chunk.
PLACES = {"|x| < 1": 1.0, "1 <= |x| < 16": 16.0, "16 <= |x| < 88": 88.0, "88 <= |x|": np.inf}


def error_in_decimal(module, function, x):
    """The error at one float in units of the last place, by 50 decimal digits."""
    with decimal.localcontext(decimal.Context(prec=50, Emin=-10**6)):
        exact = decimal.Decimal(x)
        power = (exact * (1 if function != "tanh" else 2)).exp()
        true = {"exp": power, "codes": 255 * power, "tanh": (power - 1) / (power + 1)}[function]
        unit = decimal.Decimal(2) ** (max(math.frexp(float(true))[1] - 1, -126) - 23)
        return float(abs(decimal.Decimal(float(computed(module, function, np.float32([x]))[0])) - true) / unit)


def every_float(module, function, say=None):
    """All 2^32: {range of |x|: Found}."""
    found = {}
    for number in range((1 << 32) // CHUNK):
        begin = number * CHUNK
        x = np.arange(begin, begin + CHUNK, dtype=np.uint32).view(np.float32)
        one = judge(module, function, x)
        size = abs(float(x[0]))
        place = next((name for name, limit in PLACES.items() if size < limit), "inf, NaN")
        found[place] = found.get(place, NONE).worse(one)
        if say and number % 512 == 511:
            say(f"{(number + 1) * CHUNK / 2**32:.0%}", end=" ", flush=True)
    return found


def stratified(per_binade=4096, seed=0):
    """Some floats of every exponent and sign, and all near the ends of each and of what is computed in another way."""
    r = np.random.default_rng(seed)
    top = np.arange(512, dtype=np.uint32)[:, None] << 23
    ends = np.arange(64, dtype=np.uint32)
    low = [r.integers(0, 1 << 23, (512, per_binade), dtype=np.uint32), np.tile(ends, (512, 1)),
           np.tile((1 << 23) - 1 - ends, (512, 1))]
    around = np.float32([-87.3365, -88.0, -103.2789, -103.972, -104.0, -138.6, -0.625, 0.625, -9.0, 9.0])
    near = around.view(np.uint32)[:, None] + np.arange(-5000, 5000, dtype=np.int64)[None, :]
    return np.concatenate([(top | part).ravel() for part in low] + [near.ravel().astype(np.uint32)]).view(np.float32)


def main():
    import cyflash

    parser = argparse.ArgumentParser(prog="python -m tests.exhaustive_exp", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", choices=cyflash.cpu.BUILDS, help="default: all that run here")
    parser.add_argument("--function", choices=FUNCTIONS, help="default: all")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    figures, worst = {}, 0.0
    for build in [args.build] if args.build else cyflash.cpu.runnable():
        module = cyflash.cpu.load(build)
        for function in [args.function] if args.function else FUNCTIONS:
            found = every_float(module, function, print if sys.stdout.isatty() else None)
            for place, one in found.items():
                print(f"{build:12} {function:6} {place:15} {one.ulp:8.3f} ULP at {one.at!r:24} "
                      f"{one.share:.3f} of the bound at {one.where!r}", flush=True)
                again = error_in_decimal(module, function, one.at) if math.isfinite(one.at) else one.ulp
                assert abs(again - one.ulp) < 1e-6 * (1 + one.ulp), f"the reference errs: {again} ULP at {one.at!r}"
                figures.setdefault(build, {}).setdefault(function, {})[place] = one._asdict()
                worst = max(worst, one.share)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print("every error is within the bound" if worst <= 1 else f"OUTSIDE the bound: {worst}")
    return worst > 1


if __name__ == "__main__":
    sys.exit(main())
