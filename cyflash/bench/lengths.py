"""`--lengths`: fp32, every way to int8 and all peers at lengths from 128 to 8192, for the curves of `--html`."""

from dataclasses import replace

from cyflash.bench.cases import Case
from cyflash.bench.int8 import WAYS
from cyflash.bench.race import Entry, run_race, team
from cyflash.bench.report import Bar, title
from cyflash.bench.systems import INT8_SYSTEMS, SYSTEMS

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
HEAD_DIM = 64
ALL_SYSTEMS = SYSTEMS | INT8_SYSTEMS


def run(outcome, systems, threads, environments, limit, progress):
    """Adds a race for each length and thread count to the outcome."""
    bar = Bar(progress, "lengths", len(LENGTHS) * len(threads), limit)
    for count in threads:
        with team(systems, count, environments) as (workers, failures):
            outcome.add_team(count, workers, failures)
            for length in LENGTHS:
                case = Case((1, 1, length, HEAD_DIM))
                entries = [Entry(name, worker, case) for name, worker in workers.items()]
                entries += [Entry(label, workers["cyflash"], replace(case, int8=way)) for label, way in WAYS.items()]
                result = run_race(entries, limit, workers["cyflash"], bar.next(title(case)), dots=True)
                outcome.int8.append(result)
