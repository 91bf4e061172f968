"""The faults of tests/planted still fit the sources. That tests catch them is shown by `python -m tests.planted`."""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests.planted, which is run from the root

from tests.planted.__main__ import CAUGHT  # noqa: E402
from tests.planted.fault import Fault  # noqa: E402
from tests.planted.kernel_faults import FAULTS as KERNEL_FAULTS  # noqa: E402
from tests.planted.python_faults import FAULTS as PYTHON_FAULTS  # noqa: E402

FAULTS = PYTHON_FAULTS + KERNEL_FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_sources(fault):
    assert fault.applied((ROOT / fault.file).read_text()) != (ROOT / fault.file).read_text()
    for name in fault.tests.split():
        assert (ROOT / f"tests/test_{name}.py").is_file(), name


def test_a_fault_that_fits_no_more_is_an_error():
    fault = Fault("one", "a.py", "", "old", "new", "")
    for text in ("", "old old"):
        with pytest.raises(ValueError, match="expected its old text once"):
            fault.applied(text)
    assert fault.applied("an old one") == "an new one"


def test_names_are_different_and_those_that_were_caught_exist():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)
    assert set(json.loads(CAUGHT.read_text())) <= set(names)


def test_kernel_faults_have_a_build_and_others_have_none():
    for fault in FAULTS:
        assert (fault.build is not None) == fault.file.endswith((".pxi", ".pyx", ".h")), fault.name
