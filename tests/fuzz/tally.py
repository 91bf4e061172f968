"""What the cases of a run were worth: how many outputs were compared, and how many of these could show nothing."""
import collections

import numpy as np

LOOSE = 0.1  # a bound beyond this share of the greatest value says little
LIMITS = {"blind rows": 0.25, "zero outputs": 0.35, "loose cases": 0.15, "refused": 0.01}


class Tally(collections.Counter):
    """Counts of one run; `worst`: the largest error / bound of each kind of call, and its case: near 1 for
    results of 16 bits, of which most of the bound is their own rounding."""

    def __init__(self):
        super().__init__()
        self.worst, self.case = {}, None

    def add(self, name, out, lse, bound=None, v=None, ratio=0.0):
        """A result that was compared with its bound (None: with the bits of another one)."""
        name += " of 16 bits" if out.dtype.itemsize == 2 else ""
        self["rows"] += lse.size
        self["blind rows"] += int(np.count_nonzero(lse == -np.inf))
        self["outputs"] += out.size
        self["zero outputs"] += out.size - int(np.count_nonzero(out))
        self["compared"] += 1
        if bound is not None and bound.size:
            with np.errstate(invalid="ignore"):
                largest = np.max(np.abs(v), initial=0.0, where=np.isfinite(v))
                self["loose cases"] += bool(np.median(bound) > LOOSE * largest > 0)
        if ratio >= self.worst.get(name, (0.0,))[0]:
            self.worst[name] = float(ratio), self.case

    def merge(self, counts, worst):
        self.update(counts)
        for name, found in worst.items():
            self.worst[name] = max(self.worst.get(name, found), found)

    def problems(self):
        """Why this run shows less than it seems to, if it does; short runs are not judged."""
        if self["cases"] < 300:
            return []
        of = {"blind rows": "rows", "zero outputs": "outputs", "loose cases": "compared", "refused": "cases"}
        shares = {name: self[name] / max(self[whole], 1) for name, whole in of.items()}
        found = [f"{name}: {x:.1%} of {of[name]}, at most {LIMITS[name]:.0%}" for name, x in shares.items()
                 if x > LIMITS[name]]
        found += [f"no case of {name}" for name in ENTRIES if not self[f"entry {name}"]]
        return found

    def lines(self):
        """The figures of a run, as text."""
        yield f"{self['cases']:,} cases of {self['problems']:,} problems, {self['outputs']:,} outputs"
        yield f"compared with the reference {self['compared']:,}, with the bits of another call {self['same bits']:,}"
        for prefix in ("entry ", "build "):
            names = sorted(name for name in self if name.startswith(prefix))
            yield prefix + ", ".join(f"{name.removeprefix(prefix)} {self[name]:,}" for name in names)
        yield ("rows that see nothing {:.1%}, zero outputs {:.1%}, loose bounds {:.1%}".format(
            self["blind rows"] / max(self["rows"], 1), self["zero outputs"] / max(self["outputs"], 1),
            self["loose cases"] / max(self["compared"], 1)))
        yield "largest error / bound: " + ", ".join(
            f"{name} {ratio:.2f} (case {case})" for name, (ratio, case) in sorted(self.worst.items()))


ENTRIES = ("attention", "sdpa", "merge", "int8", "varlen", "int8 varlen", "cache")
