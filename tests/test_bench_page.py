"""`cyflash bench --html`: the page says what was measured, needs nothing else, and fits a desktop and a phone."""

import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import bench_outcomes
import pytest

from cyflash.bench import lengths
from cyflash.cli import main

pytest.importorskip("matplotlib")
from cyflash.bench import page_figures
from cyflash.bench.page import page

SHAPES = ((1, 1, 2048, 64), (8, 12, 128, 32))


@pytest.fixture(scope="module")
def whole():
    return bench_outcomes.outcome(caches=True)


@pytest.fixture(scope="module")
def text(whole):
    return page(whole)


class Tags(HTMLParser):
    VOID = ("meta", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.ids = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("href", "src", "xlink:href") if attributes.get(name)]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(text):
    tags = Tags(text)
    assert not tags.open
    assert len(set(tags.ids)) == len(tags.ids)
    assert all(link.startswith("#") and link[1:] in tags.ids for link in tags.links)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "$" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S)
    assert "prefers-color-scheme: dark" in text


def test_figures_are_images_with_words_in_colours_of_the_page(text):
    images = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(images) == 2 + 2 + 2 + 1
    for image in images:
        ElementTree.fromstring(image.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))
        assert re.search(r'role="img" aria-label="[^"]{40,}"', image)
        assert "currentColor" in image and page_figures.INK not in image


def test_every_number_is_that_of_the_outcome(whole, text):
    for race in whole.int8:
        for label in race.timings:
            assert f">{race.gflops(label):.0f}</td>" in text
        for peer in race.peers():
            spread = race.ratio(peer, "cyflash")
            assert f"{spread.value:.2f} x" in text and f"{spread.low:.2f} to {spread.high:.2f}" in text
    longest = whole.int8[len(lengths.LENGTHS) - 1]
    for label, timing in longest.timings.items():
        assert f"<td class=\"\">{longest.ratio('cyflash', label).value:.2f} x</td>" in text
        assert f"{timing.error.rel_l1:.1e}" in text
    verdict = re.search(r'class="verdict ">(.*?)</p>', text)[1]
    fastest = longest.ratio("onnxruntime", "cyflash").value
    assert verdict.startswith(f"{longest.gflops('cyflash'):.0f} GFLOP/s in fp32 at (1, 1, 8192, 64), 1 thread")
    assert f"{fastest:.2f} times as fast as onnxruntime, the fastest peer in fp32" in verdict
    assert "1.96 x" in text and "Made-up CPU" in text and "jax: not installed" in text
    speed = whole.caches[0].ratio("cyflash", "cyflash int8").value
    assert f"cyflash int8 {speed:.2f}" in text  # what the figure of caches says


def test_sections_are_those_that_have_something_to_show():
    sections = {"lengths", "peers", "accuracy", "caches", "rows", "terms", "head"}

    def shown(outcome):
        return set(Tags(page(outcome)).ids) & sections

    assert shown(bench_outcomes.outcome(threads=(1,), caches=True)) == sections
    assert shown(bench_outcomes.outcome((1,), SHAPES, rows=False)) == {"peers", "terms", "head"}
    only_caches = bench_outcomes.outcome((), caches=True, rows=False)
    assert shown(only_caches) == {"caches", "terms", "head"}
    three = [(2, 4, length, 32) for length in (64, 128, 256)]
    assert shown(bench_outcomes.outcome((1,), three, rows=False)) == {"lengths", "peers", "terms", "head"}


def test_failures_are_said_and_texts_are_escaped():
    text = page(bench_outcomes.outcome((1,), SHAPES, failures=("torch",)))
    assert text.count("Failed: torch") == 2 and "made up &lt;b&gt;" in text and "<b>:" not in text
    assert 'class="verdict over"' in text and "&lt;why&gt;" in text
    text = page(bench_outcomes.outcome((1,), SHAPES, failures=tuple(bench_outcomes.FP32)))
    assert "Nothing was timed." in text


def test_a_busy_machine_is_said(whole, text):
    assert "The machine was busy" not in text
    busy = bench_outcomes.outcome((1,), SHAPES)
    busy.systems[1]["cyflash"] = busy.systems[1]["cyflash"] | {"threads": {"busy": 1, "cpu_over_wall": 0.5}}
    assert "The machine was busy: cyflash got 0.50 of 1 cores." in page(busy)


def test_systems_look_the_same_in_all_figures_and_differ():
    labels = [*bench_outcomes.FP32, *bench_outcomes.BF16, *bench_outcomes.INT8]
    looks = page_figures.looks(labels)
    assert len(set(looks.values())) == len(labels)
    assert len({look.colour for look in looks.values()}) == len(labels)


def test_a_run_writes_its_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lengths, "LENGTHS", (16, 32, 64))
    path, numbers = tmp_path / "speed.html", tmp_path / "speed.json"
    arguments = ["--threads", "1", "--rounds", "2", "--systems", "numpy", "--json", str(numbers)]
    assert main(["bench", "--html", str(path), *arguments]) == 0
    assert capsys.readouterr().out.endswith(f"Page: {path}\n")
    document = json.loads(numbers.read_text())
    assert document["arguments"]["lengths"] is True  # what --html alone asks for
    assert [race["entries"]["cyflash"]["case"]["shape"][2] for race in document["int8"]] == [16, 32, 64]
    text = path.read_text()
    for race in document["int8"]:
        assert f"{race['entries']['numpy']['ratio_to_cyflash']['value']:.2f} x" in text
    assert main(["bench", "--html", str(path), "--shapes", "1,1,32,16", *arguments]) == 0
    assert json.loads(numbers.read_text())["arguments"]["lengths"] is False
    assert "(1, 1, 32, 16)" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--html", "x.txt"], "x.txt: expected a name that ends in .html"),
        (["--html", "none/x.html"], "none/x.html: no folder none"),
        (["--html", "x.html", "--gpu"], "--html: is not for --gpu"),
        (["--html", "x.html", "--lengths", "--shapes", "1,1,8,8"], "--lengths measures a fixed list"),
    ],
)
def test_bad_arguments(arguments, text, capsys):
    assert main(["bench", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "--html", "x.html"]) == 2
    assert "--html needs matplotlib; install it with: pip install 'cyflash-attn[plot]'" in capsys.readouterr().err


def test_it_fits_a_desktop_and_a_phone(text, tmp_path):
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("there is no chromium here")
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in (1280, 390):
            view = browser.new_page(viewport={"width": width, "height": 800})
            view.goto(path.as_uri())
            assert view.evaluate("document.documentElement.scrollWidth") == width
            widths = view.evaluate("[...document.querySelectorAll('figure svg')].map(x => x.clientWidth)")
            assert len(widths) == 7 and all(300 < own <= min(width, 600) for own in widths)
        browser.close()
