"""docs/accuracy.md has the figures that examples/accuracy_tables.py prints."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tables(text):
    """{(title, row, column): figure} of Markdown tables."""
    found = {}
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        lines = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in table.splitlines()]
        (title, *columns), _, *rows = lines
        for label, *cells in rows:
            found |= {(title, label, column): float(cell) for column, cell in zip(columns, cells, strict=True)}
    return found


def test_the_tables_of_the_document_are_those_of_the_script(capsys):
    runpy.run_path(str(ROOT / "examples/accuracy_tables.py"), run_name="__main__")
    made, documented = tables(capsys.readouterr().out), tables((ROOT / "docs/accuracy.md").read_text())
    assert len(made) > 80 and list(documented) == list(made)
    for place, figure in made.items():
        # rounding to two digits, and the order of sums, which builds differ in
        assert documented[place] == pytest.approx(figure, rel=0.1 if figure > 1e-5 else 0.5), place
