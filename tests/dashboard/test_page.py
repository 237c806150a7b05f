"""The page in a real browser: it follows a training, zooms, shows the runs that are chosen, and outlives its server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from chromium import Chromium, Page
from event_logs import EPOCH, start, steps, validation, write

from cvmk.telemetry.schema import Anomaly, End, Interruption, Iterations, Rollback, Serving, ServingStarted

Served = Callable[..., AbstractContextManager[str]]
CONTRAST = Path(__file__).parents[1] / "helpers/contrast.js"
SAMPLES = [{"source": "A man rides.", "reference": "Ein Mann reitet.", "hypothesis": "Ein <b>Mann</b> fährt."}]
LOSS = "document.querySelector('figure[data-key=loss]')"
BOX = f"(() => {{ const box = {LOSS}.querySelector('.plot').getBoundingClientRect(); return [box.left, box.top, box.width, box.height]; }})()"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs of 100 iterations."""
    write(tmp_path / "one", start(), *steps(range(1, 101)), validation(100, 31.0, samples=SAMPLES, best=True))
    write(tmp_path / "two", start(), *steps(range(1, 101), loss=50.0), Rollback(100, 90, "the loss is 9 times as large", 1, 0.5))
    return tmp_path


def fresh(browser: Chromium, url: str, **media: str) -> Page:
    """The page with nothing chosen yet, which waits a tenth as long between its questions."""
    page = browser.open(url, **media)
    page.run("localStorage.clear()")
    page.call(
        "Page.addScriptToEvaluateOnNewDocument",
        source="{ const real = setTimeout; window.setTimeout = (call, wait) => real(call, wait > 5000 ? wait : wait / 10); }",
    )
    page.call("Page.reload")
    return page


def opened(browser: Chromium, url: str, **media: str) -> Page:
    page = fresh(browser, url, **media)
    page.wait(f"document.readyState === 'complete' && {LOSS} && state.dataset.state === 'open'")
    return page


def cells(page: Page, run: int) -> list[str]:
    return list(page.run(f"[...document.querySelectorAll('#runs tr')[{run}].cells].map((cell) => cell.innerText.trim())"))


def rows(page: Page) -> list[list[str]]:
    """The table behind the chart of the loss."""
    page.run(f"{LOSS}.querySelector('details').open = true")
    page.wait(f"{LOSS}.querySelector('tbody tr')")
    return list(page.run(f"[...{LOSS}.querySelectorAll('tr')].map((row) => [...row.cells].map((cell) => cell.innerText))"))


def pixels(page: Page, place: int) -> int:
    """Pixels of a run's colour in the chart of the loss."""
    return int(
        page.run(f"""(() => {{
        const canvas = {LOSS}.querySelector('canvas');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        const hex = getComputedStyle(document.documentElement).getPropertyValue('--run-{place}').trim().slice(1);
        const colour = [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
        let count = 0;
        for (let at = 0; at < data.length; at += 4) if (data[at + 3] > 200 && colour.every((value, part) => Math.abs(value - data[at + part]) < 8)) count += 1;
        return count; }})()""")
    )


def drag(page: Page, begin: float, end: float) -> None:
    """Over the chart of the loss, from one share of its width to another."""
    page.run(f"{LOSS}.scrollIntoView({{block: 'center'}})")
    left, top, width, height = page.run(BOX)
    for kind, share in (("mouseMoved", begin), ("mousePressed", begin), ("mouseMoved", (begin + end) / 2), ("mouseMoved", end), ("mouseReleased", end)):
        page.call(
            "Input.dispatchMouseEvent", type=kind, x=left + share * width, y=top + height / 2, button="left", buttons=int(kind != "mouseReleased"), clickCount=1
        )


def test_it_follows_a_training(browser: Chromium, tmp_path: Path, served: Served) -> None:
    """From before its first event to its end, through a restart that goes on from a checkpoint and a log that is set aside."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.resolved.json").write_text("{}")
    with served(run) as url:
        page = fresh(browser, url)
        page.wait("document.getElementById('nothing')?.innerText.startsWith('No numbers yet')")
        page.wait("document.querySelector('#runs tr').cells[1].innerText === 'no events yet'")
        write(run / "teacher", start(), *steps(range(1, 8)))
        page.wait(f"document.querySelectorAll('#runs input:checked').length === 2 && {LOSS}", 20)  # there is nothing else to see yet
        page.run("document.querySelectorAll('#runs input')[1].click()")
        write(run, start(), *steps(range(1, 21)))
        page.wait(f"{LOSS} && document.querySelector('#runs tr').cells[2].innerText === '20 of 1,000'")
        assert rows(page)[-1] == ["20", "5"] and pixels(page, 0) > 100
        (run / "events.jsonl").rename(run / "events.1.jsonl")
        write(run, *steps((21, 22)), Interruption(22), begin=EPOCH + 30)
        page.wait("document.querySelector('#runs tr').cells[1].innerText === 'interrupted'")
        write(run, start(20), *steps(range(21, 31), loss=1.0), validation(30, 12.5, samples=SAMPLES, best=True), begin=EPOCH + 1000)
        page.wait("document.querySelector('figure[data-key=\"validation/bleu\"]')")
        assert rows(page)[-1] == ["30", "1"] and cells(page, 0)[4] == "BLEU 12.5"
        page.wait("document.querySelector('#sample-list').innerText.includes('Ein <b>Mann</b> fährt.')")
        assert page.run("[...document.querySelectorAll('#marks tr')].map((row) => row.cells[3].innerText)") == [
            "resumed at iteration 20",
            "interrupted at iteration 22",
        ]
        write(run, End({}))
        page.wait("document.querySelector('#runs tr').cells[1].innerText === 'finished'")
        assert page.errors == []


def test_a_service_is_shown_over_time(browser: Chromium, tmp_path: Path, served: Served) -> None:
    reports = [Serving(1.0, 3, {"OK": 10}, models={"m": {"translations": 9, "decode_seconds": 0.02}}) for _ in range(5)]
    write(tmp_path / "service", ServingStarted({"m": {}}), *reports)
    with served(tmp_path) as url:
        page = fresh(browser, url)
        page.wait("document.querySelectorAll('#charts figure:not([hidden])').length === 4")  # those that are 0 throughout are left out
        titles = page.run("[...document.querySelectorAll('#charts figure:not([hidden]) figcaption')].map((one) => one.innerText.split('\\n')[0])")
        assert [title.split("  ")[0] for title in titles] == ["Requests", "Open sessions", "Translations: m", "Time of a translation: m"], titles
        assert page.run("[...document.querySelectorAll('[name=axis]')].map((radio) => [radio.value, radio.checked, radio.disabled])") == [
            ["step", False, True], ["time", True, False],
        ]  # fmt: skip
        write(tmp_path / "run", start(), *steps(range(1, 11)))
        page.wait(f"{LOSS} && !document.querySelector('[name=axis]').disabled && document.querySelector('[name=axis]').checked")
        assert page.errors == []


def test_zoom_and_reset(browser: Chromium, runs: Path, served: Served) -> None:
    """By mouse and by keys; what is zoomed stays while training goes on."""
    with served(runs) as url:
        page = opened(browser, url)
        assert rows(page)[1][0] != "20" and page.run("reset.disabled")
        drag(page, 0.3, 0.5)
        page.wait("!reset.disabled && shown.innerText.includes(' to ')")
        low, high = (int(end) for end in page.run("shown.innerText").split(" to "))
        assert 14 <= low < 30 and 40 < high < 56
        places = [int(row[0]) for row in rows(page)[1:]]
        assert low - 1 <= places[0] <= low + 1 and high - 1 <= places[-1] <= high + 1 and places == sorted(places)
        write(runs / "one", *steps(range(101, 111)), begin=EPOCH + 200)
        page.wait("document.querySelector('#runs tr').cells[2].innerText.startsWith('110')")
        assert page.run("shown.innerText") == f"{low} to {high}"
        left, top, width, height = page.run(BOX)
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + 0.5 * width, y=top + 0.4 * height)
        page.wait(f"!{LOSS}.querySelector('.tip').hidden && {LOSS}.querySelector('.tip').innerText.includes('two')")
        assert page.run("[...document.querySelectorAll('figure:not([hidden])')].every((one) => !one.querySelector('.cursor').hidden)")  # in all charts
        page.run("reset.click()")
        page.wait(f"reset.disabled && shown.innerText === '' && [...{LOSS}.querySelectorAll('tbody tr')].at(-1).innerText.startsWith('110')")
        page.run(f"{LOSS}.querySelector('.plot').focus()")
        page.press("End")
        page.wait(f"{LOSS}.querySelector('[aria-live]').innerText.startsWith('iteration 110: one 0.909')")
        assert "iteration 110" in page.run(f"{LOSS}.querySelector('.tip').innerText")
        page.press("ArrowLeft", times=10)
        page.wait(f"{LOSS}.querySelector('[aria-live]').innerText.startsWith('iteration 100: one 1, two 50')")
        page.type("+")
        page.wait("!reset.disabled")
        page.type("0")
        page.wait("reset.disabled")
        assert page.errors == []


def test_runs_are_chosen_and_the_choice_is_kept(browser: Chromium, runs: Path, served: Served) -> None:
    with served(runs) as url:
        page = opened(browser, url)
        page.wait("document.querySelectorAll('#runs input:checked').length === 2")
        assert pixels(page, 0) > 100 and pixels(page, 1) > 100 and rows(page)[0] == ["Iteration", "one", "two"]
        page.run("document.querySelectorAll('#runs input')[1].click()")
        page.wait(f"[...{LOSS}.querySelectorAll('th')].length === 2")
        assert pixels(page, 0) > 100 and pixels(page, 1) == 0
        page.call("Page.reload")
        page.wait(f"document.readyState === 'complete' && {LOSS} && document.querySelectorAll('#runs input:checked').length === 1")
        assert pixels(page, 1) == 0
        page.run("all.click(); all.checked || all.click()")
        page.wait("document.querySelectorAll('#runs input:checked').length === 2")
        page.wait(f"[...{LOSS}.querySelectorAll('canvas')].length")
        page.run("all.click()")
        page.wait("document.getElementById('nothing').innerText === 'No run is chosen.'")
        assert page.errors == []


def test_the_server_goes_and_comes_back(browser: Chromium, runs: Path, served: Served) -> None:
    with served(runs) as url:
        page = opened(browser, url)
        port = int(url.rpartition(":")[2])
    page.wait("state.dataset.state === 'waiting' && state.innerText.includes('does not answer')")
    assert page.run("state.getAttribute('role')") == "status" and pixels(page, 0) > 100
    write(runs / "one", *steps((101,)), begin=EPOCH + 200)
    with served(runs, port=port):
        page.wait("state.dataset.state === 'open' && document.querySelector('#runs tr').cells[2].innerText.startsWith('101')")


def test_axis_smoothing_scale_and_anomalies(browser: Chromium, tmp_path: Path, served: Served) -> None:
    """Of 3000 iterations, with one spike, which is never lost."""
    losses = [2.0 + number % 2 for number in range(3000)]
    losses[1234] = 400.0
    run = write(
        tmp_path / "run",
        start(),
        Iterations(1, losses, [1e-3] * 3000, [1.0] * 3000, [10] * 3000, [1.0] * 3000, [0.1] * 3000),
        Anomaly(1235, "loss", 400.0, 2.5, 90.0),
    )
    with served(run) as url:
        page = opened(browser, url)
        page.run(f"{LOSS}.querySelector('.plot').focus()")
        page.press("Home")
        page.wait(f"{LOSS}.querySelector('.tip').innerText.includes('2 to 3')")
        said = f"""(() => {{
            const plot = {LOSS}.querySelector('.plot');
            plot.dispatchEvent(new KeyboardEvent('keydown', {{ key: 'ArrowRight' }}));
            return plot.querySelector('.tip').innerText; }})()"""
        assert any("to 400" in page.run(said) for _ in range(600))
        assert "anomaly at 1235: loss 400, usually 2.5, 90.0 deviations away" in page.run("marks.innerText")
        page.run(f"{LOSS}.querySelector('button').click()")
        assert page.run(f"{LOSS}.querySelector('button').getAttribute('aria-pressed')") == "true" and pixels(page, 0) > 100
        page.run("smoothing.value = 0.9; smoothing.dispatchEvent(new Event('input'))")
        page.wait("document.getElementById('smoothing-value').innerText === '0.90'")
        page.press("End")
        page.wait(f"{LOSS}.querySelector('.tip b').innerText.startsWith('2.')")
        page.run("document.querySelector('[value=time]').click()")
        page.wait(f"{LOSS}.querySelector('.tip').hidden && document.querySelector('figure[data-key=data_wait]')")
        page.run(f"{LOSS}.querySelector('details').open = true")
        page.wait(f"{LOSS}.querySelector('th')?.innerText === 'Time'")
        assert rows(page)[-1][0] == "1 s" and rows(page)[1][0].startswith("−49:")  # a second each, before the event
        assert page.errors == []


def test_light_and_dark_without_sight_or_mouse_and_on_a_narrow_window(browser: Chromium, runs: Path, served: Served) -> None:
    """All text can be read (WCAG's contrast of 4.5), all controls have names, Tab reaches the charts visibly."""
    with served(runs) as url:
        page = opened(browser, url, prefers_color_scheme="light")
        page.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        ground = "getComputedStyle(document.body).backgroundColor"
        light = page.run(ground)
        assert page.run(CONTRAST.read_text()) == [] and pixels(page, 0) > 100
        page.emulate(prefers_color_scheme="dark")
        page.wait(f"{ground} !== {light!r}")
        page.wait("document.getAnimations().length === 0")
        assert page.run(CONTRAST.read_text()) == [] and pixels(page, 0) > 100
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        named = {(node["role"]["value"], node["name"]["value"]) for node in nodes if "role" in node and "name" in node}
        for node in (
            ("checkbox", "one"), ("checkbox", "Run"), ("radio", "iterations"), ("slider", "Smoothing"), ("button", "Log scale for Loss"), ("group", "Loss"),
            ("button", "Reset zoom"), ("region", "Loss"), ("rowheader", "one"), ("heading", "What happened"), ("group", "Loss: values"),
        ):  # fmt: skip
            assert node in named, (node, sorted(named))
        assert all(name for role, name in named if role in ("button", "checkbox", "radio", "slider", "textbox"))
        page.run("document.querySelector('[name=axis]').focus()")
        for _ in range(6):
            page.press("Tab")
            if page.run(f"document.activeElement === {LOSS}.querySelector('.plot')"):
                break
        assert page.run(f"document.activeElement === {LOSS}.querySelector('.plot') && getComputedStyle(document.activeElement).outlineStyle !== 'none'")
        page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        page.run("new Promise(requestAnimationFrame)")
        assert page.run("document.documentElement.scrollWidth") <= 360
        assert page.errors == []
