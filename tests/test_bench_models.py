"""`cyflash bench --transformers`: every row is measured, and is what it says. No time is judged."""

import contextlib
import gc
import importlib.util
import io
import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import cyflash
from cyflash.bench import models, models_systems, race
from cyflash.bench.models_cases import Encoder, Sentences, Step
from cyflash.bench.models_systems import CyflashModels, TorchModels, prepared
from cyflash.bench.sentences import sentences
from cyflash.cli import main

WEIGHTS = importlib.util.find_spec(models.WEIGHTS) is not None
ENCODER = Encoder(tokens=40, layers=2, heads=2, D=32)
STEP = Step(keys=70, layers=2, heads=4, kv_heads=2, D=32)
WAYS = {
    "cyflash": (ENCODER, {"attention": "cyflash"}), "int8": (ENCODER, {"attention": "cyflash-int8"}),
    "step": (STEP, {"attention": "cyflash"}), "step fp32": (STEP, {"attention": "cyflash", "kept": "fp32"}),
    "step bf16": (STEP, {"attention": "cyflash", "kept": "bf16"}),
    "step int8": (STEP, {"attention": "cyflash", "kept": "int8"}),
    "step of bf16": (replace(STEP, dtype="bfloat16"), {"attention": "cyflash", "kept": "bf16"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(status, JSON document, stdout) of the fixed list in miniature."""
    printed, path = io.StringIO(), tmp_path_factory.mktemp("bench") / "bench.json"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(race, "_thread_faults", lambda counts: [])
        patch.setattr(models, "ENCODERS", (ENCODER,))
        patch.setattr(models, "STEPS", (STEP,))
        patch.setattr(models, "SENTENCES", Sentences(n=6))
        arguments = ["--rounds", "3", "--threads", "1", "--json", str(path)]
        status = main(["--traceback", "bench", "--transformers", *arguments])
    return status, json.loads(path.read_text()), printed.getvalue()


def test_every_row_is_measured(whole):
    status, document, printed = whole
    assert status == 0
    rows = {row["what"]: row for row in document["suite"]}
    titles = [ENCODER.title(), STEP.title(), replace(STEP, with_cache=True).title()]
    ways = [["cyflash", "cyflash int8"], ["cyflash", *(f"cyflash {x} cache" for x in models.CACHES)]]
    expected = [f"{titles[0]}, {way}: vs sdpa" for way in ways[0]]
    expected += [f"{titles[1]}, {way}: vs sdpa" for way in ways[1]]
    expected += [f"{titles[2]}, {way}: vs sdpa" for way in ways[1][1:]]
    name = Sentences(n=6).title()
    if WEIGHTS:
        expected += [f"{name}, {way}: vs sdpa" for way in ways[0]]
        expected += [f"{name}, int8: {which} cosine" for which in ("mean", "least")]
    else:
        expected.append(name)
    assert list(rows) == expected
    for what, row in rows.items():
        assert row["spread"] is not None or not WEIGHTS, row
        assert "error" in row["note"] or "cosine" in what or not WEIGHTS
    if WEIGHTS:
        assert 0.9995 < rows[f"{name}, int8: least cosine"]["spread"]["value"] < 1
    assert "models of transformers" not in printed and "vs sdpa" in printed


def test_systems_and_errors(whole):
    _, document, _ = whole
    assert set(document["systems"]["1"]) == {"cyflash", "torch"}
    for result in document["comparisons"]:
        for label, entry in result["entries"].items():
            error = entry["error"]["rel_l1"]
            if "int8" in label:
                assert 1e-4 < error < 0.06
            elif "bf16" in label:
                assert 1e-4 < error < 0.01
            else:
                assert error < 1e-4


@pytest.fixture
def no_grad():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def candidate(case, **how):
    return prepared(case.question()).candidate(replace(case, **how))


@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_judged(way, no_grad):
    """Those of every layer's attention; a model whose attention does nothing is found out."""
    case, how = WAYS[way]
    asked, expected = replace(case, **how), case.expected()
    made = candidate(case, **how)
    output = made.read(made.call())
    assert output.shape == ((2, 1, 40, 2, 32) if case is ENCODER else (2, 1, 1, 4, 32))
    assert CyflashModels.tolerance(asked).accepts(expected.error(output))
    for wrong in (np.zeros_like(output), output[::-1], 1.1 * output):
        assert not CyflashModels.tolerance(asked).accepts(expected.error(wrong))


def test_torch_is_judged_alike(no_grad):
    for case in (ENCODER, STEP):
        made = candidate(case, attention="sdpa")
        error = case.expected().error(made.read(made.call()))
        assert TorchModels.tolerance(replace(case, attention="sdpa")).accepts(error)


def test_what_is_timed_is_attention(no_grad, monkeypatch):
    """Not the rest of the model; with the cache's update where that is asked for. By a clock that only these move."""
    now, model = [0], prepared(STEP)

    def moves(function, ticks):
        def moved(*args, **options):
            now[0] += ticks
            return function(*args, **options)

        return moved

    asked = replace(STEP, attention="cyflash", kept="fp32")
    alone, both = model.candidate(asked), model.candidate(replace(asked, with_cache=True))
    monkeypatch.setattr(models_systems, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    attend = moves(cyflash.flash_attention_with_kvcache, 1)
    monkeypatch.setattr(cyflash, "flash_attention_with_kvcache", attend)
    monkeypatch.setattr(cyflash.KVCache, "append", moves(cyflash.KVCache.append, 100))
    for layer in model.model.model.layers:
        monkeypatch.setattr(layer.mlp, "forward", moves(layer.mlp.forward, 10000))
    for made, expected in ((alone, 2), (both, 202), (alone, 2)):
        made.call()
        assert made.seconds() == expected
    assert now[0] > 60000
    assert model._cache(asked).get_seq_length() == STEP.keys  # every call begins with the same cache


def test_a_model_is_shared_while_it_is_in_use(no_grad, monkeypatch):
    made, system = [], CyflashModels.__new__(CyflashModels)
    monkeypatch.setattr(models_systems, "prepared", lambda case: made.append(case) or prepared(case))
    system._models = weakref.WeakValueDictionary()
    candidates = [system._build(replace(ENCODER, attention=name)) for name in ("cyflash", "cyflash-int8")]
    assert made == [ENCODER]
    del candidates
    gc.collect()
    system._build(replace(ENCODER, attention="cyflash"))
    assert made == [ENCODER] * 2


def test_sentences_are_different_and_of_many_lengths():
    made = sentences(200)
    lengths = [len(x.split()) for x in made]
    assert len(set(made)) == 200 and sentences(10) == made[:10]
    assert min(lengths) < 10 and max(lengths) > 30
    assert all(x[0].isupper() and x.endswith(".") for x in made)


def test_it_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(CyflashModels, "needs", ("nothing_of_that_name",))
    assert main(["bench", "--transformers", "--rounds", "1"]) == 2
    said = capsys.readouterr().err
    assert "nothing_of_that_name not installed; write pip install 'cyflash-attn[transformers]'" in said
