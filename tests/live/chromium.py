"""Drives Debian's Chromium, without a window, over the DevTools protocol on a pipe.

No driver, no port, no package: what a browser can do is asked for in JSON (chromedevtools.github.io/devtools-protocol).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.users import HEADERS
from tests.waiting import wait_until

ANSWER_SECONDS = 60.0
FLAGS = [
    "--headless=new",
    "--no-sandbox",  # root has none; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-first-run",
    "--remote-debugging-pipe",
]
# The browser wants its pipe at the descriptors 3 and 4, which are others' in this process.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(word), fcntl.F_DUPFD_CLOEXEC, 10) for word in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class BrowserError(Exception):
    """The browser refuses, does not answer, or a script in a page has thrown."""


class Tab:
    """One page; made by `open_tab`. ``events`` are what the browser tells of it, oldest first."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._read_fd, self._write_fd, self._unread = read_fd, write_fd, b""
        self._number = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        # As a browser sends it once somebody has typed it in.
        self.call("Network.setExtraHTTPHeaders", headers=HEADERS)

    def call(self, method: str, **parameters: Any) -> Any:  # noqa: ANN401 - JSON
        """Call a method of the protocol and return its result; raises BrowserError."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            answer = self._read(deadline, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def open(self, url: str) -> None:
        """Open a page and wait until it is loaded."""
        self.events = [event for event in self.events if event["method"] != "Page.loadEventFired"]
        if error := self.call("Page.navigate", url=url).get("errorText"):
            raise BrowserError(f"{url}: {error}")
        self.wait_for_event("Page.loadEventFired")

    def wait_for_event(self, method: str) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._read(deadline, method))

    def evaluate(self, expression: str) -> Any:  # noqa: ANN401 - JSON
        """Return what a JavaScript expression, or a promise of it, comes to."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise BrowserError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait_until(self, expression: str, timeout_seconds: float = ANSWER_SECONDS) -> float:
        """Wait until an expression is true; returns after how many seconds it was."""
        what = lambda: f"{expression}; {self.read_text()[:1000]}"  # noqa: E731
        return wait_until(lambda: self.evaluate(expression), what, timeout_seconds)

    def read_text(self) -> str:
        """Return the text that a reader sees."""
        return str(self.evaluate("document.body.innerText"))

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key; text of one letter is typed."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        event = {"key": key, "modifiers": modifiers, "windowsVirtualKeyCode": codes.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text: str) -> None:
        """Type a text, a key at a time."""
        for letter in text:
            self.press(letter)

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Give the page a size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def prefer(self, **features: str) -> None:
        """Let the reader prefer something: ``color_scheme="dark"``."""
        wanted = [{"name": f"prefers-{name.replace('_', '-')}", "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=wanted)

    def make_status_view(self, path: Path, whole: bool = True) -> None:
        """Write a PNG of the page, the part beyond the window as well."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def list_problems(self) -> list[str]:
        """Return what the browser has complained about: errors of scripts, violations of policies, failed requests."""
        self.evaluate("1")  # so that what came before is read
        texts = []
        for event in self.events:
            found = event.get("params", {})
            if event["method"] == "Log.entryAdded":
                texts.append(f"{found['entry']['source']}: {found['entry']['text']}")
            elif event["method"] == "Runtime.exceptionThrown":
                texts.append(f"exception: {found['exceptionDetails']}")
            elif event["method"] == "Runtime.consoleAPICalled":
                texts.append(f"console: {found['args']}")
        return texts

    def list_requests(self) -> list[str]:
        """Return the addresses that have been asked for."""
        sent = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [str(found["request"]["url"]) for found in sent]

    def _read(self, deadline: float, awaited: str) -> dict[str, Any]:
        while b"\0" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read_fd], [], [], left)[0]:
                raise BrowserError(f"no answer in time: {awaited}")
            data = os.read(self._read_fd, 1 << 20)
            if not data:
                raise BrowserError(f"the browser has ended while {awaited} was awaited")
            self._unread += data
        message, _, self._unread = self._unread.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


def find_chromium() -> str | None:
    return shutil.which("chromium")


@contextmanager
def open_tab() -> Iterator[Tab]:
    """Start a browser with a profile of its own, and one page in it; both are gone on the way out."""
    program = find_chromium()
    if program is None:
        raise BrowserError("there is no chromium: Debian's package has it")
    from_us, to_browser = os.pipe()
    from_browser, to_us = os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        words = [sys.executable, "-c", _START, str(from_us), str(to_us), program, *FLAGS, f"--user-data-dir={profile}"]
        with subprocess.Popen(
            words, pass_fds=(from_us, to_us), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=profile
        ) as browser:
            os.close(from_us)
            os.close(to_us)
            try:
                yield Tab(from_browser, to_browser)
            finally:
                os.close(to_browser)  # which ends it
                try:
                    browser.wait(10)
                except subprocess.TimeoutExpired:
                    browser.kill()
                os.close(from_browser)
