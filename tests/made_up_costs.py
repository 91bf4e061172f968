"""Costs without the processes that measure them: for tests of what `cyflash compare` and `evaluate` say about costs.

Each scheme of each layer is measured in a process of its own, which takes half a second to start.
"""
import itertools
import json
from pathlib import Path

from cyflash import measure


class MadeUp:
    """Stands for a `measure.CallProcess` of a scheme; no two have the same time or memory."""

    made = itertools.count(1)
    threads = None  # of the latest one

    def __init__(self, target, **arguments):
        arguments = json.loads(json.dumps(arguments))  # as they reach a process
        assert target == "cyflash.schemes:prepare_call" and arguments.keys() == {"path", "scheme", "num_threads"}
        assert Path(arguments["path"]).is_file()
        number = next(self.made)
        MadeUp.threads = arguments["num_threads"]
        self.memory = measure.Memory(before=50_000_000, peak=50_000_000 + 1000 * number, reset=True)
        self._seconds = 1e-3 * (1 + number / 1000)

    def times(self, seconds):
        return [self._seconds]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass
