"""What a planted fault is."""
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Fault(NamedTuple):
    """One edit that breaks the sources as a person could."""

    name: str
    file: str  # below the root of the tree
    why: str  # this is a mistake that a person could make
    old: str  # occurs exactly once in the file
    new: str
    tests: str  # files of tests to run first, without "test_" and ".py"
    build: str | None = None  # the SIMD build that is compiled again; None: no module is

    def applied(self, text):
        """The text of the file with the fault in it; ValueError where it does not fit the file any more."""
        count = text.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: expected its old text once in {self.file}, found it {count} times")
        if self.new == self.old:
            raise ValueError(f"{self.name}: expected a new text that differs from the old one")
        return text.replace(self.old, self.new)
