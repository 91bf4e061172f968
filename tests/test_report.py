"""`cyflash report`: the page is whole and self-contained, and page, JSON and CSV have the same numbers."""

import csv
import html
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

import cyflash
from cyflash import report as r
from cyflash.cli import main
from cyflash.quant import LayerScales
from cyflash.quant.calibrator import Calibrator
from cyflash.quant.histogram import Counts
from cyflash.quant.scales import Scales

pytest.importorskip("matplotlib")
from cyflash import report_figures as figures
from cyflash import report_page

H, HK, D = 4, 2, 16
STRANGE = "model.1.<self> & attn"
NAMES = ("model.0.<self> & attn", STRANGE)


def arrays(seed, L=48):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((heads, L, D), dtype=np.float32) for heads in (H, HK, HK))


def observed(observations=4, names=NAMES, **settings):
    calibrator = Calibrator(**settings)
    for n, name in enumerate(names):
        for seed in range(observations):
            calibrator.observe(name, *arrays(100 * n + seed), causal=True)
    return calibrator


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Of everything here: calls are too small for more."""
    cyflash.set_num_threads(1)
    yield
    cyflash.set_num_threads(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """scales.safetensors (searched) and plan.safetensors, with their observations."""
    folder = tmp_path_factory.mktemp("report")
    calibrator = observed()
    calibrator.compute().save(folder / "scales.safetensors")
    planned = observed(smooth_k=False).compute("max")
    layers = dict(planned)
    layers[STRANGE] = LayerScales(parts=(((0,), layers[STRANGE]), ((1,), None)))
    about = planned.about[STRANGE]
    about["parts"] = [{"kv_heads": [0], "rung": "int8", "rel_l1": 0.01, "worst": 0.02, "time": 0.61},
                      {"kv_heads": [1], "rung": "fp32", "rel_l1": 0.0, "worst": 0.0, "time": 1.0}]  # fmt: skip
    settings = {**planned.settings, "target": {"rel_l1": 0.02, "worst": 0.05}}
    Scales(layers, settings=settings, about=planned.about).save(folder / "plan.safetensors")
    for name in ("scales", "plan"):
        calibrator.save(folder / f"{name}.observed.safetensors")
    return folder


class Page(HTMLParser):
    """The tags that are open at the end, ids, links, sections, tables and text of a page."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.tables, self.cell = [], [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.links += [attributes[name] for name in ("src", "href", "xlink:href", "data") if name in attributes]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr" and "table" in self.open:
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def table(self, *headers):
        """The rows, as dicts, of the table that has these columns."""
        for first, *rows in self.tables:
            if set(headers) <= set(first):
                return [dict(zip(first, row, strict=True)) for row in rows]
        raise AssertionError(f"no table with {headers}")


def run(capsys, *arguments):
    """(exit status, what stdout says, what stderr says)"""
    status = main(["report", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture(scope="module", params=["scales", "plan"])
def written(request, folder):
    """(name, text of the page, Page, JSON, CSV): the command has run."""
    name = request.param
    paths = {kind: folder / f"{name}.{kind}" for kind in ("html", "json", "csv")}
    options = [part for kind, path in paths.items() for part in ("-o" if kind == "html" else f"--{kind}", str(path))]
    assert main(["report", str(folder / f"{name}.safetensors"), *options, "--max-rel-l1", "0.008"]) == 0
    text = paths["html"].read_text(encoding="utf-8")
    with open(paths["csv"], newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    return name, text, Page(text), json.loads(paths["json"].read_text()), lines


# The page


def test_the_page_needs_nothing_else(written):
    _, text, page, _, _ = written
    assert "http" not in text and "@import" not in text and "//" not in re.sub(r"base64,[^\"]*", "", text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    inner = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert inner <= set(page.ids)
    assert "None" not in re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", text, flags=re.DOTALL)


def test_every_section_and_figure_is_there_and_described(written):
    name, text, page, got, _ = written
    sections = {attributes["id"] for tag, attributes in page.tags if tag in ("header", "section")}
    assert sections == {"head", "maps", "worst", "front", "values", "terms"} | ({"plan"} if name == "plan" else set())
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawn) == 3 + 1 + len(NAMES) + (name == "plan")
    labels = [attributes["aria-label"] for attributes in drawn]
    assert len(set(labels)) == len(labels) and all(len(label) > 40 for label in labels)
    assert all(attributes["role"] == "img" for attributes in drawn)
    assert f"<h1>Scales: {name}.safetensors</h1>" in text
    assert got["verdict"] in html.unescape(text)
    assert f"Found by method {'output' if name == 'scales' else 'max'} (granularity tensor, smooth_k" in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text and "@media print" in text


def test_colours_and_fonts_are_those_of_the_page(written):
    _, text, *_ = written
    assert figures.INK not in text and figures.PAPER not in text
    assert "currentColor" in text and "var(--paper)" in text
    assert "DejaVu" not in text


def test_names_are_shown_as_they_are(written):
    _, text, page, _, _ = written
    assert "<self>" not in text
    rows = page.table("layer", "head", "RMSE")
    assert {row["layer"] for row in rows} == set(NAMES)


# Its numbers


def percent(x):
    return f"{100 * float(x):.2f}\u00a0%" if float(x) == 0 or float(x) >= 5e-5 else "< 0.01\u00a0%"


def test_page_and_files_have_the_same_numbers(written):
    _, _, page, got, lines = written
    heads = [(layer["layer"], head) for layer in got["layers"] for head in layer["heads"]]
    rows = page.table("layer", "head", "RMSE")
    assert len(heads) == len(lines) == len(rows) == len(NAMES) * H
    for (name, head), line, row in zip(heads, lines, rows, strict=True):
        assert (name, str(head["head"])) == (line["layer"], line["head"]) == (row["layer"], row["head"])
        assert head["setting"] == line["setting"] == row["runs in"]
        columns = {"relative L1": "rel_l1", "worst row": "worst_row", "QK": "qk", "P": "p", "V": "v"}
        for column, key in columns.items():
            assert float(line[key]) == head[key]
            assert row[column] == percent(head[key])
        assert float(line["cosine"]) == head["cosine"] and float(line["rmse"]) == head["rmse"]
        assert row["RMSE"] == f"{head['rmse']:.1e}"
        assert (line["cause"] or None) == head["cause"]
        assert row["cause"] == {"qk": "QK", "p": "P", "v": "V", None: "-"}[head["cause"]]
        for name in "qkv":
            shown = head["saturated"][name]
            assert line[f"saturated_{name}"] == ("" if shown is None else str(shown))
        assert line["fix"] == row["fixed by"] == head["fix"]["rung"]
        assert float(line["fix_rel_l1"]) == head["fix"]["rel_l1"]


def test_the_summary_is_that_of_the_heads(written):
    _, text, page, got, _ = written
    summary, heads = got["summary"], [head for layer in got["layers"] for head in layer["heads"]]
    assert summary["rel_l1"] == pytest.approx(np.mean([layer["error"]["rel_l1"] for layer in got["layers"]]))
    assert summary["worst_head"] == max(head["rel_l1"] for head in heads)
    assert summary["worst_row"] == max(head["worst_row"] for head in heads)
    assert summary["heads"] == len(heads) and summary["layers"] == len(NAMES)
    assert summary["heads_over"] == sum(head["rel_l1"] > 0.008 for head in heads) > 0
    assert summary["observations"] == 4 * len(NAMES)
    assert summary["values"] == 4 * len(NAMES) * 48 * D * (H + 2 * HK)
    assert f"<dd>{percent(summary['rel_l1'])}</dd>" in text and f"<dd>{percent(summary['worst_row'])}</dd>" in text
    rows = page.table("fixed by", "then")
    worst = sorted(heads, key=lambda head: -head["rel_l1"])[: r.WORST]
    assert [row["relative L1"] for row in rows] == [percent(head["rel_l1"]) for head in worst]


def test_the_errors_are_those_of_the_calibration(folder, written):
    name, _, page, got, _ = written
    about = Scales.load(folder / f"{name}.safetensors").about
    for layer in got["layers"]:
        if name == "scales" or layer["layer"] != STRANGE:
            assert layer["error"] == pytest.approx(about[layer["layer"]]["error"]["held_out"])
        assert layer["measured_on"] == "held-out"
    shown = {row["layer"]: row for row in page.table("layer", "in training")}
    for layer in got["layers"]:
        row, errors = shown[layer["layer"]], about[layer["layer"]]["error"]
        assert row["in training"] == percent(errors["training"]["rel_l1"])
        assert row["relative L1"] == percent(layer["error"]["rel_l1"])
        assert sum(int(row[name]) for name in ("heads by QK", "by P", "by V", "in fp32")) == H


def test_what_fixes_a_head_is_the_fastest_rung_under_the_limit(written):
    *_, got, _ = written
    for layer in got["layers"]:
        for head in layer["heads"]:
            good = [row for row in layer["rungs"] if row["heads"][head["head"]]["rel_l1"] <= 0.008]
            if head["rel_l1"] <= 0.008:
                assert head["fix"]["rung"] == "as it is"
            else:
                assert head["fix"]["rung"] == min(good, key=lambda row: row["seconds"])["rung"]


def test_the_front_is_of_all_rungs(written):
    _, _, page, got, _ = written
    assert [row["rung"] for row in got["front"]] == list(got["rungs"])
    for n, row in enumerate(got["front"]):
        own = [layer["rungs"][n] for layer in got["layers"]]
        assert row["rel_l1"] == pytest.approx(np.mean([one["error"]["rel_l1"] for one in own]))
        assert row["time"] == pytest.approx(np.median([one["time"] for one in own]))
        beaten = any(x["rel_l1"] < row["rel_l1"] and x["time"] < row["time"] for x in got["front"])
        assert row["best"] == (not beaten)
    shown = page.table("rung", "speed")
    assert [(row["rung"], row["relative L1"], row["time"]) for row in shown] == [
        (row["rung"], percent(row["rel_l1"]), f"{row['time']:.2f}") for row in got["front"]
    ]


def test_the_histograms_are_those_of_the_calibrator(folder, written):
    name, _, page, got, _ = written
    calibrator = Calibrator.load(folder / f"{name}.observed.safetensors")
    scales = Scales.load(folder / f"{name}.safetensors")
    for layer in got["layers"]:
        for part, values in layer["histograms"].items():
            histogram = calibrator.histogram(layer["layer"], part)
            assert (values["count"], values["max"]) == (histogram.count, histogram.max)
            assert sum(values["counts"]) == histogram.counts.sum()
            assert len(values["edges"]) == len(values["counts"]) + 1
            assert values["edges"][0] <= histogram.max <= values["edges"][-1]
        own, q = scales[layer["layer"]], layer["histograms"]["q"]
        if own.parts is None:
            assert q["scale"] == [own.q_scale, own.q_scale]
            expected = calibrator.histogram(layer["layer"], "q").saturated(own.q_scale)
            assert q["saturated"] == pytest.approx(expected, rel=0.1)  # heads that do not reach the clip are known one by one
            used = "k" if own.k_mean is None else "k_centred"
            assert layer["histograms"][used]["quantised"] == "static"
            assert {"k": "k_centred", "k_centred": "k"}[used] and layer["histograms"]["v"]["quantised"] == "static"
    assert len(page.table("of", "clipped")) == 4 * len(NAMES)


def test_the_plan_is_shown(folder, written):
    name, text, page, got, _ = written
    assert got["planned"] == (name == "plan")
    if name != "plan":
        return
    rows = [row for row in page.table("kv heads", "query heads") if row["layer"] == STRANGE]
    assert [(row["rung"], row["kv heads"], row["query heads"], row["time"]) for row in rows] == [
        ("int8", "0", "0-1", "0.61"),
        ("fp32", "1", "2-3", "1.00"),
    ]
    heads = got["layers"][1]["heads"]
    assert [head["setting"] for head in heads] == ["int8", "int8", "fp32", "fp32"]
    assert [head["cause"] is None for head in heads] == [False, False, True, True]
    assert rows[0]["relative L1"] == percent(max(head["rel_l1"] for head in heads[:2]))
    assert "5\u00a0%, is the plan's target" in html.unescape(text)


# Other scales


def test_scales_by_head_and_in_the_call():
    layer = LayerScales(np.array([1.0, 2, 3, 4])[:, None, None], None, 0.5)
    assert r.static_scales(layer, "q", 4, 2) == {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0}
    assert r.static_scales(layer, "k", 4, 2) == r.static_scales(layer, "k_centred", 4, 2) == {}
    assert r.static_scales(layer, "v", 4, 2) == {0: 0.5, 1: 0.5}
    mean = np.zeros((2, 1, D), np.float32)
    mean[1] = 0.1  # that of head 0 is nothing
    layer = LayerScales(1.0, np.array([1.0, 2.0])[:, None, None], 1.0, k_mean=mean)
    assert r.static_scales(layer, "k", 4, 2) == {0: 1.0}
    assert r.static_scales(layer, "k_centred", 4, 2) == {1: 2.0}
    planned = LayerScales(parts=(((1,), LayerScales(0.5, 0.25, None)), ((0,), None)))
    assert r.static_scales(planned, "q", 4, 2) == {2: 0.5, 3: 0.5}
    assert r.static_scales(planned, "k", 4, 2) == {1: 0.25}


def test_settings_in_words():
    assert r.setting(None) == "fp32"
    assert r.setting(LayerScales(1.0, 1.0, 1.0)) == "int8"
    assert r.setting(LayerScales(1.0, 1.0, 1.0, k_mean=np.zeros(D), fp32_sinks=4)) == "int8, smooth-K, 4 fp32 sinks"
    assert r.setting(LayerScales(1.0, 1.0, None)) == "int8, V per token"
    assert r.setting(LayerScales()) == "int8, smooth-K, Q, K, V per token"
    assert r.setting(LayerScales(1.0, 1.0, None, pv="bf16")) == "int8 QK, bf16 PV"


def test_bins_are_drawn_in_quarters_of_an_octave():
    counts = Counts.zeros(1)
    counts.observe(np.array([0.32, 0.5, 0.51, 0.9, 1.0, 7.9, 0.0], np.float32).reshape(1, 1, -1))
    edges, drawn = r.drawn_bins(counts.histogram())
    assert edges[0] == 0.25 * 2**0.25 and edges[-1] == 8.0
    np.testing.assert_allclose(edges[1:] / edges[:-1], 2**0.25)
    assert drawn.tolist() == [1, 0, 0, 2, 0, 0, 1, 1, *[0] * 10, 1]


def test_drawn_bins_of_nothing():
    edges, drawn = r.drawn_bins(Counts.zeros(2).histogram())
    assert edges.size == drawn.size == 0


def test_one_observation_is_measured_on_itself_and_said_so(tmp_path, capsys):
    calibrator = observed(observations=1)
    calibrator.compute("max").save(tmp_path / "s.safetensors")
    calibrator.save(tmp_path / "else.safetensors")
    status, _, _ = run(
        capsys, tmp_path / "s.safetensors", "--observed", tmp_path / "else.safetensors", "-o", tmp_path / "s.html"
    )
    assert status == 0
    text = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert "no tiles held out" in text and "measured on training tiles" in text


def test_layers_of_one_file_only_are_named(tmp_path):
    calibrator = observed(names=("a", "b"))
    scales = calibrator.compute("max")
    scales = Scales({"b": scales["b"], "c": scales["a"]}, about={"b": scales.about["b"]})
    got = r.describe(scales, calibrator)
    assert [layer["layer"] for layer in got["layers"]] == ["b"]
    assert any("'c'" in note for note in got["notes"]) and any("'a'" in note for note in got["notes"])


def test_of_many_layers_the_worst_histograms_are_shown(folder, written, monkeypatch):
    _, _, _, got, _ = written
    layers = [layer | {"layer": f"layer{n}"} for n in range(12) for layer in got["layers"][:1]]
    layers[5]["error"] = layers[5]["error"] | {"rel_l1": 1.0}
    text = report_page.page(got | {"layers": layers, "planned": False})
    shown = re.findall(r"<h3>(layer\d+)</h3>", text)
    assert len(shown) == report_page.MOST_HISTOGRAMS and "layer5" in shown
    assert len(Page(text).table("of", "clipped")) == 4 * 12


def test_names_are_shortened_to_what_differs():
    assert figures.short_labels(["layer0", "layer1", "layer10"]) == ["0", "1", "10"]
    assert figures.short_labels(["a.10.attn", "a.11.attn"]) == ["10", "11"]
    assert figures.short_labels(["encoder.0", "decoder.0"]) == ["en", "de"]
    assert figures.short_labels(["only"]) == ["only"]
    assert figures.short_labels(["layer", "layer.x"]) == ["layer", "layer.x"]
    assert len(figures.short_labels(["x" * 40])[0]) == figures.LONGEST_LABEL


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (3e-7, "0"), (0.0004, ".04"), (0.0123, "1.2"), (0.0996, "10"), (0.5, "50"), (12.0, "big"),
     (np.inf, "big")],
)  # fmt: skip
def test_numbers_in_cells_are_short(value, shown):
    assert figures._percent(value) == shown


def test_points_are_moved_apart():
    points = np.array([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0], [100.0, 0.0]])
    moved = figures._apart(points.copy(), 15.0)
    gaps = [np.hypot(*(a - b)) for n, a in enumerate(moved) for b in moved[:n]]
    assert min(gaps) > 14.9
    assert np.abs(moved[3] - points[3]).max() < 1


# Errors, each in one line


@pytest.fixture
def broken(folder, tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    observed(names=("other",), observations=1).save(tmp_path / "other.safetensors")
    three = Calibrator()
    three.observe(NAMES[0], *(np.ones((3, 8, D), np.float32) for _ in "qkv"))
    three.save(tmp_path / "three.safetensors")
    rng = np.random.default_rng(0)
    Scales({NAMES[0]: LayerScales(rng.random((4, 1, 1)) + 0.1, 0.1, 0.1)}).save(tmp_path / "four.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{tmp}/none.safetensors",), "none.safetensors"),
        (("{tmp}/text.safetensors",), "text.safetensors"),
        (("{tmp}/four.safetensors",), "four.observed.safetensors: no such file; name the observations"),
        (("{good}", "--observed", "{tmp}/text.safetensors"), "text.safetensors"),
        (("{good}", "--observed", "{tmp}/other.safetensors"), "no layer of the scales"),
        (("{tmp}/four.safetensors", "--observed", "{tmp}/three.safetensors"), "layer 'model.0.<self> & attn'"),
    ],
)
def test_what_cannot_be_read_is_one_line(arguments, said, folder, broken, capsys):
    places = {"tmp": broken, "good": folder / "scales.safetensors"}
    arguments = [argument.format(**places) for argument in arguments]
    status, out, err = run(capsys, *arguments, "-o", broken / "page.html")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("cyflash report: error: ") and said in err
    assert not (broken / "page.html").exists()


def test_where_the_page_cannot_go_is_said_before_measuring(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(r, "describe", lambda *a, **k: pytest.fail("measured"))
    scales = folder / "scales.safetensors"
    for arguments, said in (
        (("-o", tmp_path / "none" / "page.html"), "no folder"),
        (("-o", scales), "ends in .html"),
        (("-o", tmp_path / "page.html", "--json", tmp_path), "cannot be written"),
    ):
        status, _, err = run(capsys, scales, *arguments)
        assert status == 2 and said in err and len(err.splitlines()) == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = run(capsys, scales, "-o", tmp_path / "page.html")
    assert status == 2 and "cyflash report needs matplotlib; install it with: pip install" in err


@pytest.mark.parametrize("option", [("--max-rel-l1", "0"), ("--max-rel-l1", "nan"), ("--threads", "0"), ()])
def test_wrong_use(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", "x.safetensors", *([*option, "-o", "x.html"] if option else [])])
    assert stopped.value.code == 2
