"""A headless Chromium over the Chrome DevTools protocol: `with Chromium() as browser: page = browser.open(url)`."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

import pytest
from websockets.sync.client import ClientConnection, connect

_FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync
    --disable-dev-shm-usage --disable-extensions --remote-debugging-port=0 --window-size=1200,760""".split()


def chromium() -> str:
    """Its path; the test is skipped where there is none, but fails under CVMK_REQUIRE_CHROMIUM=1."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        assert os.environ.get("CVMK_REQUIRE_CHROMIUM") != "1", "Chromium is not installed: apt-get install chromium"
        pytest.skip("Chromium is not installed (Debian's package is chromium)")
    return found


class Chromium:
    def __enter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="cvmk-chromium-")
        command = [chromium(), *_FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        self._pages: list[Page] = []
        port = Path(self._folder) / "DevToolsActivePort"
        wait_for(lambda: port.is_file() and port.read_text().count("\n") >= 1, "Chromium to start", 30)
        self._address = f"http://127.0.0.1:{port.read_text().split()[0]}"
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # with its children; there is nothing to be saved
        self._process.wait()
        for page in self._pages:
            page.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, url: str, **media: str) -> Page:
        """A new page that has loaded; `media` are features such as prefers_color_scheme="dark"."""
        request = urllib.request.Request(f"{self._address}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request, timeout=10) as response:
            page = Page(json.load(response)["webSocketDebuggerUrl"])
        self._pages.append(page)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.emulate(**media)
        page.call("Page.navigate", url=url)
        page.wait("document.readyState === 'complete'")
        return page


class Page:
    """A tab. What it logs as an error, and what its policy forbids, is in `errors`."""

    def __init__(self, address: str) -> None:
        self._open = contextlib.ExitStack()
        self._connection: ClientConnection = self._open.enter_context(connect(address, max_size=None, compression=None, close_timeout=0.1))
        self._numbers = itertools.count(1)
        self.errors: list[str] = []

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._open.close()

    def call(self, method: str, **parameters: Any) -> Any:
        """The result of a command of the protocol."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=30))
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        what = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(what["exceptionDetails"].get("exception", {}).get("description") or what["exceptionDetails"]["text"])
        elif message.get("method") == "Log.entryAdded" and what["entry"]["level"] == "error":
            self.errors.append(what["entry"]["text"])

    def emulate(self, **media: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": name.replace("_", "-"), "value": value} for name, value in media.items()])

    def run(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 15) -> None:
        """Until the expression is true."""
        wait_for(lambda: self.run(f"Boolean({expression})"), expression, seconds, lambda: self.run("document.body?.innerText"))

    def type(self, text: str) -> None:
        """Text into what has the focus, a key a character."""
        for char in text:
            self.call("Input.dispatchKeyEvent", type="keyDown", text=char if char != "\n" else "\r", key=char if char != "\n" else "Enter")
            self.call("Input.dispatchKeyEvent", type="keyUp", key=char if char != "\n" else "Enter")

    def press(self, key: str, *, control: bool = False, shift: bool = False, times: int = 1) -> None:
        """A key by its name, such as "Backspace" or "Tab"."""
        codes = {"Backspace": 8, "Tab": 9, "Enter": 13, "Space": 32, "Home": 36, "End": 35, "ArrowLeft": 37, "ArrowRight": 39}
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], modifiers=2 * control + 8 * shift)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def wait_for(condition: Any, what: str, seconds: float, told: Any = lambda: "") -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s for {what}: {told()}"
        time.sleep(0.02)
