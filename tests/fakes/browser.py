"""A headless Chromium on pages of this machine, driven through its DevTools protocol; no network beyond loopback."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import websocket
from ending import ended

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-sync", "--disable-component-update", "--disable-default-apps",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--remote-debugging-port=0",
)  # fmt: skip
START_SECONDS, PAGE_SECONDS = 60.0, 90.0


def program() -> str:
    """Path of the browser; '' if none is installed."""
    return next(filter(None, map(shutil.which, NAMES)), "")


class Page:
    """One page."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=PAGE_SECONDS, suppress_origin=True)
        self._numbers = itertools.count(1)
        self._call("Page.enable")

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def size(self, width: int, height: int) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self._call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def text(self) -> str:
        """What one can read, words separated by single spaces."""
        return " ".join(str(self.run("document.body ? document.body.innerText : ''")).split())

    def open(self, address: str, *expected: str) -> str:
        """The text of a page, as soon as it contains what is expected."""
        self._call("Page.navigate", url="about:blank")  # an address that differs after the # would load nothing
        self._call("Page.navigate", url=address)
        return self.wait(*expected)

    def wait(self, *expected: str) -> str:
        deadline = time.monotonic() + PAGE_SECONDS
        while missing := [words for words in expected if words not in self.text()]:
            assert time.monotonic() < deadline, f"{missing} not in the page:\n{self.text()}"
            time.sleep(0.1)
        return self.text()

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """A fresh browser, which has seen no page yet."""
    assert program(), "no Chromium: apt-get install chromium"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with ended(process):
            deadline = time.monotonic() + START_SECONDS
            while not (port_file := Path(profile, "DevToolsActivePort")).exists() or not port_file.read_text():
                assert process.poll() is None and time.monotonic() < deadline, "the browser does not start"
                time.sleep(0.1)
            port = int(port_file.read_text().split()[0])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=START_SECONDS) as answer:
                pages = [found for found in json.load(answer) if found["type"] == "page"]
            page = Page(pages[0]["webSocketDebuggerUrl"])
            page.size(2000, 1000)
            yield page
