"""A headless Chromium, driven over pipes by its DevTools protocol: no driver, no port."""

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


class Browser:
    """One tab. ``requests`` are the addresses that it has asked for."""

    def __init__(self, profile: Path) -> None:
        ours, self.answers, self.requests = [*os.pipe(), *os.pipe()], b"", []
        self.read, self.write = ours[2], ours[1]
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run", "about:blank"]
        script = f'exec "$0" "$@" 3<&{ours[0]} 4>&{ours[3]}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, str(CHROMIUM), *flags],
            pass_fds=(ours[0], ours[3]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(ours[0])
        os.close(ours[3])
        self.session, self.number = None, 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        os.close(self.write)  # Chromium ends when nobody is there
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.read)

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and wait for its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        return self.wait(lambda answer: answer.get("id") == self.number)["result"]

    def wait(self, wanted: Any) -> Any:
        """The next message for which ``wanted`` is true."""
        while True:
            while b"\0" not in self.answers:
                block = os.read(self.read, 1 << 20)
                assert block, "the browser has ended"
                self.answers += block
            line, self.answers = self.answers.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if wanted(answer):
                assert "error" not in answer, answer["error"]
                return answer

    def open(self, page: Path, width: int, dark: bool = False, touch: bool = False) -> None:
        """Load a file in a window of ``width`` pixels."""
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": touch}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.call("Page.navigate", url=page.as_uri())
        self.wait(lambda answer: answer.get("method") == "Page.loadEventFired")

    def open_alone(self, page: Path, width: int, dark: bool) -> None:
        """Load a file, for fingers where it is narrow: it needs no network, fits, and has the colours of the theme."""
        self.requests.clear()
        self.open(page, width, dark, touch=width == 390)
        assert [address.partition(":")[0] for address in self.requests] == ["file"], "one file, no network"
        assert self.js("document.documentElement.scrollWidth") == width, "nothing sticks out"
        paper, ink = self.js(
            "[[document.body, document.documentElement].map(e => getComputedStyle(e).backgroundColor)"
            ".find(colour => !colour.endsWith(' 0)')), getComputedStyle(document.body).color]"
        )
        brightness = [sum(map(int, re.findall(r"\d+", colour))) for colour in (paper, ink)]
        assert brightness[0] < 100 < 600 < brightness[1] if dark else brightness[1] < 100 < 600 < brightness[0]

    def js(self, expression: str) -> Any:
        """The value of an expression, as JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def middle(self, selector: str) -> dict[str, float]:
        """Where the first line of an element is, after scrolling to it."""
        self.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        self.rest()
        box = f"document.querySelector({selector!r}).getClientRects()[0]"
        return self.js(f"(b => ({{x: b.x + b.width / 2, y: b.y + b.height / 2}}))({box})")

    def hover(self, selector: str) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self.middle(selector))

    def tap(self, selector: str) -> None:
        at = self.middle(selector)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[at])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.rest()

    def rest(self) -> None:
        """Let the page take in what has happened: it is drawn twice."""
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def screenshot(self, file: Path, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))
