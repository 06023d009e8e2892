"""A headless Chromium, spoken to over pipes in its own protocol: no driver is needed.

    with Browser() as browser:
        seen = browser.look(path, width=390)
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Seen(NamedTuple):
    """What a page did."""

    errors: list[str]  # on its console
    scroll_width: int  # of all that is in it
    inner_width: int  # of the window
    milliseconds: float  # until it was drawn
    ready: bool  # whether its script came to the end
    requests: list[str]  # what it asked for, itself apart


class Browser:
    def __enter__(self):
        self.folder = tempfile.mkdtemp()
        to_browser, self.out = os.pipe()
        self.inn, from_browser = os.pipe()
        # Chromium reads from 3 and writes to 4.
        command = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                 "--hide-scrollbars", "--no-first-run", f"--user-data-dir={self.folder}"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, "bash", CHROMIUM, *flags], pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.rest, self.number, self.events = b"", 0, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.inn)
        shutil.rmtree(self.folder, ignore_errors=True)

    def message(self) -> dict:
        """The next that the browser says."""
        while b"\0" not in self.rest:
            some = os.read(self.inn, 1 << 20)
            if not some:
                raise EOFError("the browser is gone")
            self.rest += some
        one, _, self.rest = self.rest.partition(b"\0")
        return json.loads(one)

    def ask(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if getattr(self, "session", None):
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise ValueError(f"{method}: {answer['error']}")
        return answer["result"]

    def evaluate(self, expression: str):
        """The value of an expression of JavaScript on the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise ValueError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def look(self, path: Path, width: int, height: int = 900, shot: Path | None = None) -> Seen:
        """Open a page in a window of that width."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 600)
        self.events.clear()
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while all(event["method"] != "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())
        self.evaluate("new Promise(go => requestAnimationFrame(() => requestAnimationFrame(() => go(1))))")
        milliseconds = self.evaluate("performance.now()")
        widths = self.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        if shot:
            picture = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
            shot.write_bytes(base64.b64decode(picture["data"]))
        ready = self.evaluate("document.documentElement.dataset.ready === 'yes'")
        return Seen(self.errors(), *widths, milliseconds, ready, self.requests(path))

    def errors(self) -> list[str]:
        """What has gone wrong on the page so far."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["exception"].get("description", "an exception"))
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                found.append(str([one.get("value") for one in params["args"]]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
        return found

    def requests(self, path: Path) -> list[str]:
        urls = [event["params"]["request"]["url"] for event in self.events
                if event["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if url != path.resolve().as_uri() and not url.startswith("data:")]
