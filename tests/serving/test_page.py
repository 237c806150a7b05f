"""The web page in a real browser: typing, revising, a server that goes and comes back, errors, and who cannot see it or has no mouse."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from chromium import Chromium, Page
from http_served import http_served

from cvmk.config.serve import ServeConfig
from cvmk.inference import Translator
from cvmk.serving.application import Application
from cvmk.streaming import Retranslation, Stream
from cvmk.text.tokenizers.fallback import FallbackTokenizer

TOKEN = "0123456789abcdef"
CONTRAST = Path(__file__).parents[1] / "helpers/contrast.js"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


@pytest.fixture
def config(serve_config: Callable[..., ServeConfig]) -> ServeConfig:
    return serve_config((("en", "de"), ("de", "en")), model={"max_length": 300})


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights writes random bytes; here each of its pieces is a word."""
    monkeypatch.setattr(FallbackTokenizer, "decode", lambda self, ids: " ".join(f"w{piece}" for piece in ids))


def limited(config: ServeConfig, table: str, **keys: Any) -> ServeConfig:
    return config.model_copy(update={table: getattr(config, table).model_copy(update=keys)})


def said(config: ServeConfig, text: str, *, closed: bool = False) -> tuple[str, str]:
    """What a stream of the English model makes of a text: committed and tentative."""
    with Stream(Translator(config.models["en-de"].path), Retranslation(mask=0)) as stream:
        updates = [*stream.append(text), *(stream.close() if closed else [])]
    committed = [update.committed for update in updates if update.final]
    return " ".join(committed), updates[-1].tentative if not updates[-1].final else ""


def opened(browser: Chromium, url: str, **media: str) -> Page:
    """The page, connected, from English to German, with the cursor in the text."""
    page = browser.open(url, **media)
    page.wait("document.getElementById('source').options.length")
    page.run("(() => { const source = document.getElementById('source'); source.value = 'en'; source.dispatchEvent(new Event('change')); })()")
    page.wait("state.dataset.state === 'open' && model.textContent === 'en-de'")
    page.run("document.getElementById('text').focus()")
    return page


def expect(page: Page, committed: str, tentative: str = "") -> None:
    page.wait(f"committed.innerText.trim() === {committed!r} && tentative.textContent.trim() === {tentative!r}")


def test_typing(browser: Chromium, config: ServeConfig) -> None:
    """What is written is what a stream says, tentative until the sentence ends; the last word counts once nothing is typed for a while."""
    text = "A man rides a horse. Two horses"
    with http_served(lambda: Application(config), web=True) as server:
        page = opened(browser, server.url)
        page.type(text)
        expect(page, *said(config, f"{text} "))
        first = said(config, "A man rides a horse. T")[0]
        assert page.run("committed.children.length") == 1 and page.run("committed.firstChild.textContent") == first
        page.press("Enter", control=True)  # ends the sentence
        expect(page, said(config, text, closed=True)[0])
        assert page.run("document.getElementById('text').value") == text
        assert page.run("latency.textContent").endswith(" ms") and page.run("state.textContent") == "Connected"
        assert page.run("[document.getElementById('text').lang, output.lang].join()") == "en,de"
        assert page.errors == []


def test_revising(browser: Chromium, config: ServeConfig) -> None:
    """Of the sentence that goes on, and of one that was final: that is translated again, and what is before it stays."""
    with http_served(lambda: Application(config), web=True) as server:
        page = opened(browser, server.url)
        page.type("A man rides. Two horses ride a man ")
        expect(page, *said(config, "A man rides. Two horses ride a man "))
        page.press("Backspace", times=len("ride a man "))
        expect(page, *said(config, "A man rides. Two horses "))
        page.type("ride. A horse")
        expect(page, *said(config, "A man rides. Two horses ride. A horse "))
        page.run("window.kept = committed.children[0]; document.getElementById('text').setSelectionRange(13, 16)")
        page.type("Three")  # in place of "Two"
        expect(page, *said(config, "A man rides. Three horses ride. A horse "))
        assert page.run("committed.children[0] === window.kept")
        page.run("document.getElementById('text').setSelectionRange(2, 2)")
        page.type("tall ")
        expect(page, *said(config, "A tall man rides. Three horses ride. A horse "))
        page.run("document.getElementById('clear').click()")
        expect(page, "")
        page.run("document.getElementById('text').focus()")
        page.type("🐎 A horse 👩‍👩‍👧 rides. A")
        expect(page, *said(config, "🐎 A horse 👩‍👩‍👧 rides. A "))
        page.press("Backspace", times=3)
        page.type("! Two")
        expect(page, *said(config, "🐎 A horse 👩‍👩‍👧 rides! Two "))
        assert page.errors == []


@pytest.mark.parametrize("seed", range(2))
def test_any_changes(browser: Chromium, config: ServeConfig, seed: int) -> None:
    """Whatever is changed, however fast, and in whatever order answers come: in the end the page says what a stream says of the text."""
    random = Random(seed)
    text = "A man rides. Two horses ride a man! We ride. And horses 🐎 "
    with http_served(lambda: Application(config), web=True) as server:
        page = opened(browser, server.url)
        for _ in range(40):
            begin = random.randrange(len(text) + 1)
            end = min(len(text), begin + random.choice((0, 0, 1, 5)))
            text = text[:begin] + random.choice(("", "a", ". A", " horses ", "\n", "? B", "👩‍👧 ")) + text[end:]
            page.run(f"(() => {{ const text = document.getElementById('text'); text.value = {text!r}; text.dispatchEvent(new Event('input')); }})()")
            time.sleep(random.choice((0, 0, 0.002, 0.01, 0.05)))
        whole = f"{text} " if text[-1:].strip() else text  # the last word counts after a while
        committed, tentative = said(config, whole)
        page.wait(f"committed.innerText.split(/\\s+/).join(' ').trim() === {' '.join(committed.split())!r} && tentative.textContent.trim() === {tentative!r}")
        assert page.errors == []


def test_a_long_text_is_pasted(browser: Chromium, config: ServeConfig) -> None:
    text = "".join(f"A man rides horse {number}.\n" for number in range(300))
    with http_served(lambda: Application(config), web=True) as server:
        page = opened(browser, server.url)
        page.call("Input.insertText", text=text)
        page.wait("committed.children.length === 300")
        assert page.run("committed.innerText").split("\n")[7] == said(config, "A man rides horse 7.", closed=True)[0]


def test_the_server_is_restarted(browser: Chromium, config: ServeConfig) -> None:
    """What was final stays as it is; what was not is sent again, with what was typed meanwhile."""
    with http_served(lambda: Application(config), web=True) as server:
        port = server.port
        page = opened(browser, server.url)
        page.type("A man rides. Two horses ")
        expect(page, *said(config, "A man rides. Two horses "))
        page.run("window.kept = committed.children[0]")
    page.wait("state.dataset.state === 'waiting'")
    assert "trying again" in page.run("state.textContent")
    page.type("ride a man. A ho")
    assert page.run("committed.innerText.trim()") == said(config, "A man rides. T")[0]
    with http_served(lambda: Application(config), port=port, web=True):
        page.wait("state.dataset.state === 'open'")
        page.type("rse ")
        expect(page, *said(config, "A man rides. Two horses ride a man. A horse "))
        assert page.run("committed.children[0] === window.kept")


def test_keys(browser: Chromium, config: ServeConfig, tmp_path: Path) -> None:
    """The page asks for one, says when it is wrong, and goes on with a right one. It is in no address."""
    (tmp_path / "keys").write_text(f"alice = {TOKEN}\n")
    with http_served(lambda: Application(limited(config, "security", keys=str(tmp_path / "keys"))), web=True) as server:
        page = browser.open(server.url)
        page.wait("!document.getElementById('key-form').hidden && document.activeElement.id === 'key'")
        page.type("wrong\n")
        page.wait("!error.hidden && document.getElementById('error-text').textContent.includes('The key was not accepted')")
        page.run("document.getElementById('key').focus()")
        page.type(f"{TOKEN}\n")
        page.wait("state.dataset.state === 'open' && error.hidden && document.getElementById('key-form').hidden")
        assert TOKEN not in page.run("JSON.stringify([location.href, performance.getEntries().map((entry) => entry.name), {...localStorage}])")


def test_a_busy_server(browser: Chromium, config: ServeConfig) -> None:
    """It says so in words, and connects by itself when there is room."""
    with http_served(lambda: Application(limited(config, "limits", sessions_per_client=1)), web=True) as server:
        first = opened(browser, server.url)
        second = browser.open(server.url)
        second.wait("!error.hidden && document.getElementById('error-text').textContent.startsWith('The server is busy')")
        first.call("Page.navigate", url="about:blank")
        second.wait("state.dataset.state === 'open' && error.hidden")
        first.call("Page.navigateToHistoryEntry", entryId=first.call("Page.getNavigationHistory")["entries"][1]["id"])
        first.wait("!error.hidden")  # it comes back, and asks again


def test_swapping_and_remembering(browser: Chromium, config: ServeConfig) -> None:
    with http_served(lambda: Application(config), web=True) as server:
        page = opened(browser, server.url)
        assert page.run("[...source.options].map((option) => option.textContent)") == ["Detect language", "German", "English"]
        assert page.run("[...target.options].map((option) => option.value)") == ["de"]
        page.type("A man rides. ")
        expect(page, *said(config, "A man rides. "))
        translation = page.run("output.innerText.trim()")
        page.run("swap.click()")
        page.wait("model.textContent === 'de-en'")
        assert page.run("[source.value, target.value, document.getElementById('text').value]") == ["de", "en", translation]
        page.call("Page.reload")
        page.wait("document.readyState === 'complete' && model.textContent === 'de-en'")
        page.run("(() => { source.value = 'auto'; source.dispatchEvent(new Event('change')); document.getElementById('text').focus(); })()")
        page.run("(() => { target.value = 'de'; target.dispatchEvent(new Event('change')); document.getElementById('text').value = ''; })()")
        page.type("the men ride their horses through the street ")
        page.wait("detected.textContent === 'English' && tentative.textContent")


def test_light_and_dark(browser: Chromium, config: ServeConfig, tmp_path: Path) -> None:
    """As the system has it, or as chosen, which is kept. All text can be read: WCAG's contrast of 4.5."""
    ground, contrasts = "getComputedStyle(document.body).backgroundColor", CONTRAST.read_text()
    with http_served(lambda: Application(config), web=True) as server:
        page = opened(browser, server.url, prefers_color_scheme="light")
        page.type("A man rides. Two horses ")
        page.wait("tentative.textContent")
        light = page.run(ground)
        assert page.run(contrasts) == []
        page.screenshot(tmp_path / "light.png")
        page.emulate(prefers_color_scheme="dark")
        page.wait(f"{ground} !== {light!r} && theme.getAttribute('aria-pressed') === 'true'")
        assert page.run(contrasts) == []
        page.screenshot(tmp_path / "dark.png")
        page.run("theme.click()")
        page.wait(f"{ground} === {light!r} && theme.getAttribute('aria-pressed') === 'false'")
        page.call("Page.reload")
        page.wait(f"document.readyState === 'complete' && {ground} === {light!r}")
        page.run("localStorage.clear()")


def test_without_sight_or_mouse(browser: Chromium, config: ServeConfig) -> None:
    """Everything has a name, only what is final is announced, and Tab goes everywhere, visibly."""
    with http_served(lambda: Application(config), web=True) as server:
        page = opened(browser, server.url)
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        named = {(node["role"]["value"], node["name"]["value"]) for node in nodes if "role" in node and "name" in node}
        for node in (
            ("textbox", "Text to translate"), ("combobox", "Language of your text"), ("combobox", "Language of the translation"), ("button", "Copy"),
            ("button", "Clear"), ("button", "Swap the languages"), ("button", "Dark colours"), ("region", "Your text"), ("region", "Translation"),
            ("group", "Translation"), ("heading", "Live translation"),
        ):  # fmt: skip
            assert node in named
        assert all(name for role, name in named if role in ("button", "textbox", "combobox"))
        live = "[...document.querySelectorAll('[aria-live], [role=status], [role=alert], output')].map((element) => element.id)"
        assert page.run(live) == ["error", "committed", "state"]
        assert page.run("tentative.closest('[aria-live], [role=status], [role=alert]')") is None
        page.press("Tab", shift=True, times=3)
        seen = []
        for _ in range(8):
            look = "getComputedStyle(document.activeElement.closest('.pane:focus-within:has(textarea:focus, #output:focus)') ?? document.activeElement)"
            seen.append(page.run("document.activeElement.id"))
            assert page.run(f"{look}.outlineStyle !== 'none' || {look}.boxShadow !== 'none'"), seen
            page.press("Tab")
        assert seen == ["theme", "source", "clear", "text", "swap", "target", "copy", "output"]


def test_a_narrow_window(browser: Chromium, config: ServeConfig) -> None:
    with http_served(lambda: Application(config), web=True) as server:
        page = opened(browser, server.url)
        page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
        page.type("A man rides. Two horses ")
        page.wait("tentative.textContent")
        assert page.run("document.documentElement.scrollWidth") <= 360
