"""A real browser without a window, over the Chrome DevTools Protocol: what a test does with a page, and what the page said.

``find_browser`` looks for Chromium or Chrome on the path. Every message of the console, every exception and every refused
request is kept in ``complaints``; ``requests`` has the address of everything that the page asked for.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# software WebGL, and what a container lacks: a sandbox as root, a large /dev/shm
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
_START_SECONDS = 300.0  # both only against a hang
_WAIT_SECONDS = 300.0


def find_browser() -> str | None:
    """The browser's program, None where there is none."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


class Page:
    """One page: navigate, evaluate, move the mouse, type, take pictures."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result; events that come meanwhile are kept."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=_WAIT_SECONDS))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                result: dict[str, Any] = message["result"]
                return result
            self._keep(message)

    def open(self, url: str, *, width: int = 1200, height: int = 900, until: str | None = None) -> float:
        """Load a page; seconds until ``until`` (an expression) became true, or until it was loaded."""
        self.resize(width, height)
        started = time.perf_counter()
        self.command("Page.navigate", url=url)
        self.wait(until or "document.readyState === 'complete'")
        return time.perf_counter() - started

    def resize(self, width: int, height: int) -> None:
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, a promise's once it is settled."""
        found = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression in the page is true."""
        end = time.monotonic() + _WAIT_SECONDS
        while not self.evaluate(f"Boolean({expression})"):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {expression}; the page said {self.complaints}")
            time.sleep(0.01)

    def move(self, x: float, y: float) -> None:
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def type_into(self, selector: str, text: str) -> None:
        """Replace what a field holds, as from a keyboard."""
        self.evaluate(
            f"(() => {{ const field = document.querySelector({json.dumps(selector)}); field.focus(); field.select(); }})()"
        )
        if text:
            self.command("Input.insertText", text=text)
        else:
            for kind in ("keyDown", "keyUp"):
                self.command("Input.dispatchKeyEvent", type=kind, key="Delete", code="Delete", windowsVirtualKeyCode=46)

    def emulate(self, *, media: str = "", scheme: str = "light") -> None:
        """A medium (``print``) and a colour scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", media=media, features=features)

    def screenshot(self, *, whole: bool = False) -> bytes:
        """PNG of what is in view, or of the whole page."""
        found = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        """The page on paper."""
        return base64.b64decode(self.command("Page.printToPDF", printBackground=False, preferCSSPageSize=True)["data"])

    def _keep(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(str(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.complaints.append(parameters["entry"]["text"])
            case "Page.javascriptDialogOpening":
                self.complaints.append(f"dialog: {parameters['message']}")
                # nobody waits for the answer: a command may be under way
                number = next(self._numbers)
                accept = {"id": number, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                self._connection.send(json.dumps(accept))
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"][:200])


@contextlib.contextmanager
def browser_page(program: str) -> Iterator[Page]:
    """A fresh browser with one empty page; ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        log = Path(profile) / "log"
        with (
            log.open("wb") as output,
            subprocess.Popen([program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"], stderr=output) as process,
        ):
            try:
                with connect(_page_address(log, process), max_size=None, open_timeout=_START_SECONDS) as connection:
                    yield Page(connection)
            finally:
                process.kill()


def _page_address(log: Path, process: subprocess.Popen[bytes]) -> str:
    """The address that the browser writes to its log for the browser itself, turned into that of its one page."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(rb"DevTools listening on (ws://\S+)", log.read_bytes()):
            with connect(found[1].decode(), open_timeout=_START_SECONDS) as browser:
                browser.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
                targets = json.loads(browser.recv(timeout=_START_SECONDS))["result"]["targetInfos"]
            pages = [target["targetId"] for target in targets if target["type"] == "page"]
            if pages:
                return f"{found[1].decode().partition('/devtools/')[0]}/devtools/page/{pages[0]}"
        time.sleep(0.02)
    raise RuntimeError(f"the browser did not start: {log.read_text(errors='replace')[-2000:]}")
