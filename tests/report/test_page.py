"""The page, the Markdown and the JSON: nothing of a sentence is markup, any run has one, however large, and a browser shows it on any screen and on paper."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest
from chromium import Chromium, Page
from run_folders import sentences, step, validation, worse, write_run

from cvmk.report import figures_of, write_report
from cvmk.report.contents import document
from cvmk.report.html import escape, html
from cvmk.report.markdown import escape as markdown_escape
from cvmk.report.markdown import markdown
from cvmk.telemetry.schema import Anomaly, EarlyStop, Event, Note, Resumed, Rollback

EVIL = "<script>alert(1)</script> <img src=x onerror=alert(2)> & \"quotes\" 'single' </style></dd> \u202eright to left \x00\x1b \ud800"
MARKUP = "a | b **bold** [link](http://x) <b>tag</b> ~~gone~~ `code` $x$ # head ![i](j) \\"
_, REFERENCES = sentences(40)


class Elements(HTMLParser):
    """What a browser makes of a page: its elements, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(page: str) -> Elements:
    found = Elements()
    found.feed(page)
    return found


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A run in which everything that somebody else may have written is markup."""
    return write_run(
        tmp_path / "run<b>",
        [step(1), validation(1, 10.0), Note(EVIL), Rollback(1, 0, EVIL, 1)],
        config={"data.folder": EVIL, "validation.metrics": ["bleu"]},
        report={"weights": EVIL, "notes": [EVIL, MARKUP], "environment": {"system": EVIL, "processor": MARKUP}},
        hypotheses=[EVIL, MARKUP, *REFERENCES[2:]],
        teacher=[MARKUP, EVIL, *REFERENCES[2:]],
    )


def test_nothing_that_others_wrote_is_markup(evil: Path) -> None:
    figures = figures_of([evil], bootstrap=50)
    page = html(document(figures))
    found = parsed(page)
    assert not {"script", "img", "iframe", "link", "b<"} & set(found.names) and "alert(1)" in found.text
    assert all(not name.startswith("on") and "javascript:" not in (value or "") for name, value in found.attributes)
    assert not any(value and value.startswith(("http", "//", "data:")) for name, value in found.attributes if name in ("href", "src"))
    assert "run<b>" in found.text and "\x00" not in page and "\u202e" not in page
    page.encode("utf-8")  # no surrogates
    text = markdown(document(figures))
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text and "\x00" not in text
    lines = [line for line in text.splitlines() if "bold" in line]
    assert lines and all("\\*\\*bold\\*\\*" in line and "\\[link\\](" in line for line in lines)


def test_text_is_escaped() -> None:
    assert escape("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert escape("a\x00b\ud800c\u202ed") == "a\ufffdb\ufffdcd"
    assert markdown_escape("a|b\n# c") == "a\\|b \\# c"
    assert markdown_escape("- item") == "\\- item" and markdown_escape("1. one") == "1\\. one"


def test_the_files_of_a_report(evil: Path, tmp_path: Path) -> None:
    paths = write_report(figures_of([evil], bootstrap=50), tmp_path / "out" / "my.report")
    assert [path.name for path in paths] == ["my.report.html", "my.report.md", "my.report.json"]
    values = json.loads(paths[2].read_text(encoding="utf-8"))
    assert values["runs"][0]["name"] == "run<b>" and {one["set"] for one in values["scores"]} == {"validation", "test"}
    assert values["scores"][0]["teacher"]["pairs"][0]["verdict"] in ("better", "worse", "no significant difference")
    assert values["runs"][0]["curves"]["loss"] == [[1, 1, 2.0, 2.0, 2.0]] and values["samples"]
    assert "Infinity" not in paths[2].read_text() and "NaN" not in paths[2].read_text()
    assert [path.read_bytes() for path in write_report(figures_of([evil], bootstrap=50), tmp_path / "again")] == [path.read_bytes() for path in paths]


def pages(figures: Any) -> tuple[str, str]:
    content = document(figures)
    return html(content), markdown(content)


def test_a_run_without_anything(tmp_path: Path) -> None:
    write_run(tmp_path / "begun")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.resolved.json").write_text("{}")
    for text in pages(figures_of([tmp_path / "begun", tmp_path / "bare"], bootstrap=50)):
        assert "not finished" in text and "there are no curves" in text
    (tmp_path / "bare" / "config.resolved.json").write_text("[1]")
    (tmp_path / "bare" / "training_report.json").write_text('{"validation": 7, "parameters": "x", "throughput": [], "notes": 3, "iterations": null}')
    (tmp_path / "bare" / "environment.json").write_text("{")
    (tmp_path / "bare" / "events.jsonl").write_text("")
    for text in pages(figures_of([tmp_path / "bare"], bootstrap=50)):
        assert "is no JSON object" in text


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to everything in a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    found = dict(value) if isinstance(value, dict) else list(value)
    found[path[0]] = replaced(value[path[0]], path[1:], by)
    return found


@pytest.mark.parametrize("name", ["config.resolved.json", "training_report.json", "quantization.json", "events.jsonl"])
def test_whatever_is_damaged_there_is_a_report(tmp_path: Path, name: str) -> None:
    """One value of a file is something else: the report is written all the same."""
    run = write_run(tmp_path / "run", [step(1), validation(10, 10.0), validation(20, 12.0)], hypotheses=REFERENCES[:3], config={"validation.metrics": ["bleu"]})
    (run / "environment.json").write_text('{"cvmk": "1", "packages": {"torch": "2"}}')
    (run / "quantization.json").write_text(json.dumps(QUANTIZED))
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()] if name == "events.jsonl" else json.loads((run / name).read_text())
    random = Random(3)
    for path in random.sample(found := list(places(lines)), min(len(found), 40)):
        odd = random.choice([None, 7, "x", [], {}, [1], True, {"a": None}, -1.5])
        value = replaced(lines, path, odd)
        text = "".join(f"{json.dumps(line)}\n" for line in value) if isinstance(value, list) and name == "events.jsonl" else json.dumps(value)
        (run / name).write_text(text)
        try:
            figures = figures_of([run], bootstrap=50)
            assert all(pages(figures)) and json.dumps(figures.to_json(), allow_nan=False)
        except Exception as error:
            raise AssertionError(f"{path} is {odd!r}") from error


QUANTIZED = {
    "model": "m", "recipe": {"scheme": "w8a8", "method": "gptq"}, "calibration": {"text": "c", "sentences": 7},
    "evaluation": {"sentences": 9, "beam_size": 1, "bootstrap": 50, "confidence": 0.95}, "recovery": None,
    "before": {"scores": [{"metric": "bleu", "value": 3.0, "low": 2.0, "high": 4.0}], "tokens_per_second": 5.0},
    "after": {"scores": [{"metric": "bleu", "value": 2.0, "low": 1.0, "high": 3.0}], "tokens_per_second": 9.0},
    "paired": [{"metric": "bleu", "difference": -1.0, "low": -1.5, "high": -0.5, "p_value": 0.01}],
    "gate": {"metric": "bleu", "max_drop": 0.3, "drop": 1.0, "passed": False}, "sizes": {"float32": 400, "after": 100, "ratio": 0.25},
    "layers": [{"name": "out", "stored": "int8", "bytes": 12, "snr": 30.0, "nearest_snr": None}], "raised": ["out"],
    "trials": [{"raised": 0, "value": 1.0, "drop": 2.0}, {"raised": 1, "value": 2.0, "drop": 1.0}],
    "changed": [{"line": 4, "source": "s", "reference": "r", "before": "b", "after": "<i>"}],
}  # fmt: skip


def test_a_quantised_model_in_the_folder_of_a_run_has_a_section(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "small").mkdir()
    (tmp_path / "run" / "small" / "quantization.json").write_text(json.dumps(QUANTIZED))
    for folder in (tmp_path / "run", tmp_path / "run" / "small"):
        figures = figures_of([folder], bootstrap=50)
        page, text = pages(figures)
        assert "Quantised: small" in page and "&lt;i&gt;" in page and "100 now (0.250)" in page
        assert "w8a8 by gptq" in text and "| bleu | 3.00 | \\[2.00, 4.00\\] | 2.00 |" in text and "not passed" in text
        assert [advice.rule for advice in figures.advice] == ["quantisation-costs"]


def test_scores_that_are_no_number(tmp_path: Path) -> None:
    scores = [{"metric": "bleu", "value": None, "signature": "s", "fallback": False}, {"metric": "new"}, 3]
    odd = validation(10, math.nan, low=math.nan, high=math.nan, scores=scores)
    report = {"weights": "w", "validation": odd.values() | {"value": None}, "test": None}
    write_run(tmp_path / "run", [step(1, loss=math.nan, norm=math.nan), odd], report=report)
    for text in pages(figures_of([tmp_path / "run"], bootstrap=50)):
        assert "nan" not in text.lower().replace("not-finite", "") and "–" in text


def test_a_cut_event_file_and_events_of_the_future(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [step(1), step(2)])
    path = run / "events.jsonl"
    future = '{"time": 1.0, "event": "step", "version": 99, "step": 3}\n{"time": 1.0, "event": "hologram", "step": 3}\n{"half\n'
    path.write_text(path.read_text() + future + '{"time": 1.0, "event": "st')
    figures = figures_of([run], bootstrap=50)
    assert [one.last for one in figures.runs[0].history.curve("loss").bins] == [1, 2]
    for text in pages(figures):
        for told in ("version 99", "hologram", "is cut off", "is no JSON", "What could not be read"):
            assert told in text


def test_what_happened_on_the_way_is_told(tmp_path: Path) -> None:
    events: list[Event] = [step(1), Resumed(1), Anomaly(2, "gradient_norm", 9.0, 1.0), Rollback(9, 1, "the loss is nan", 1), Note("a word")]
    write_run(tmp_path / "run", [*events, EarlyStop(9, "no better")])
    text = pages(figures_of([tmp_path / "run"], bootstrap=50))[1]
    for told in ("resumed once", "1 of gradient norm, of 1", "iteration 9: the loss is nan; back to iteration 1", "- a word", "- no better", "not finished"):
        assert told in text


def test_a_run_that_went_on_after_its_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", hypotheses=REFERENCES)
    lines = (run / "events.jsonl").read_text().splitlines()
    (run / "events.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")  # it was started again
    assert "went on after its training_report.json was written" in pages(figures_of([run], bootstrap=50))[1]


def large(folder: Path, count: int) -> Path:
    """A run of very many events, with long sentences, long notes and a long configuration."""
    long = ["word " * 3000 + str(at) for at in range(12)]
    config = {"data.folder": "y" * 20_000, "validation.metrics": ["bleu"]}
    run = write_run(folder, [Note("x" * 5000)], config=config, hypotheses=long, references=[f"{text} z" for text in long])
    start, *rest = (run / "events.jsonl").read_text().splitlines(keepends=True)
    row = '{"time": 1.0, "event": "step", "version": 1, "step": %d, "learning_rate": %g, "gradient_norm": %g, "tokens_per_second": 1.0, "loss": %.6f}\n'
    with open(run / "events.jsonl", "w", encoding="utf-8") as file:
        file.write(start)
        file.writelines(row % (at, 1 / at, 1 + at % 7, 3 + math.sin(at)) for at in range(1, count + 1))
        file.writelines(rest)
    return run


@pytest.mark.parametrize("count", [20_000, pytest.param(1_000_000, marks=[pytest.mark.exhaustive, pytest.mark.timeout(600)])])
def test_a_huge_run_has_a_small_page(tmp_path: Path, count: int) -> None:
    figures = figures_of([large(tmp_path / "run", count)], bootstrap=50)
    for text in (*pages(figures), json.dumps(figures.to_json())):
        assert len(text.encode("utf-8", "replace")) < 500_000
    bins = figures.runs[0].history.curve("loss").bins
    assert sum(one.count for one in bins) == count and bins[-1].last == count


def test_a_hundred_runs_have_one_page_below_two_megabytes(tmp_path: Path) -> None:
    events: list[Event] = [event for at in range(1, 100) for event in (step(at, loss=2 + math.sin(at)), validation(at, 10 + math.sin(at)))]
    first = write_run(tmp_path / "run0", events, hypotheses=worse(REFERENCES, 3), config={"validation.metrics": ["bleu"]})
    folders = [first]
    for at in range(1, 100):
        folders.append(tmp_path / f"run{at}")
        folders[-1].mkdir()
        for name in ("config.resolved.json", "events.jsonl", "training_report.json"):
            (folders[-1] / name).write_bytes((first / name).read_bytes())
    for text in pages(figures_of(folders, bootstrap=50)):
        assert len(text.encode()) < 2_000_000


# -- in a browser --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    events: list[Event] = [step(at, loss=3 - at / 50, norm=0.1 * at) for at in range(1, 60)]
    events += [validation(10 * at, 10.0 + at) for at in range(1, 6)] + [Note(EVIL)]
    for name, every in (("base", 2), ("a-run-with-a-long-name-that-does-not-break-anything", 4)):
        write_run(folder / name, events, hypotheses=[EVIL, *worse(REFERENCES, every)[1:]], teacher=REFERENCES, config={"model.d_model": 128 * every})
    figures = figures_of([folder / "base", folder / "a-run-with-a-long-name-that-does-not-break-anything"], bootstrap=50)
    return write_report(figures, folder / "out")[0]


def contrast(page: Page) -> Any:
    return page.run((Path(__file__).parents[1] / "helpers" / "contrast.js").read_text())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read(browser: Chromium, written: Path, scheme: str) -> None:
    page = browser.open(written.as_uri(), prefers_color_scheme=scheme)
    assert page.errors == [] and page.run("document.scripts.length") == 0
    assert contrast(page) == []
    assert page.run("getComputedStyle(document.body).backgroundColor") == {"light": "rgb(244, 245, 248)", "dark": "rgb(20, 22, 27)"}[scheme]
    assert page.run("[...document.querySelectorAll('figure > svg')].every(svg => svg.getBoundingClientRect().width > 300 && svg.ariaLabel)")
    strokes = page.run("[...document.querySelectorAll('figure > svg .line')].map(line => getComputedStyle(line).stroke)")
    assert len(set(strokes)) == 2 and "none" not in strokes
    assert page.run("document.querySelectorAll('mark').length > 2 && document.querySelectorAll('del').length > 2")
    assert page.run("[...document.querySelectorAll('nav a')].every(link => document.querySelector(link.getAttribute('href')))")


@pytest.mark.parametrize("width", [320, 390, 800])
def test_the_page_fits_a_narrow_screen(browser: Chromium, written: Path, width: int) -> None:
    page = browser.open(written.as_uri())
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")


def test_the_page_prints(browser: Chromium, written: Path) -> None:
    """Everything that is folded is open on paper, no table is cut, and a dark screen prints black on white."""
    page = browser.open(written.as_uri(), prefers_color_scheme="dark")
    pdf = base64.b64decode(page.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)["data"])
    assert pdf.startswith(b"%PDF")
    page.call("Emulation.setDeviceMetricsOverride", width=700, height=1000, deviceScaleFactor=1, mobile=False)
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.body).color") == "rgb(26, 29, 36)"
    assert page.run("[...document.querySelectorAll('details table')].every(table => table.checkVisibility() && table.getBoundingClientRect().height > 20)")
    assert page.run("[...document.querySelectorAll('table')].every(table => table.getBoundingClientRect().right <= innerWidth)")
