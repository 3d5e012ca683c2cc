"""A browser in the hands of a test: the part of W3C WebDriver that these tests need, spoken to chromedriver.

Needs Debian's packages chromium and chromium-driver, and nothing beyond the standard library.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import PATIENCE, RUN_MARK, eventually, processes

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
MISSING = " and ".join(name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if path is None)
"""What has to be installed before there can be a browser; "" when nothing is."""

FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
START_PATIENCE = 3 * PATIENCE  # a browser has some hundred megabytes to read before it says anything

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id (WebDriver, section 12.1)
BACKSPACE, TAB, ENTER, ESCAPE, SPACE = "\ue003", "\ue004", "\ue007", "\ue00c", " "

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class WebDriverError(Exception):
    """The driver's answer to a command that failed: its error code and message."""


def command(method: str, url: str, body: Mapping[str, Any] | None = None, within: float = PATIENCE) -> Any:
    """The `value` that the driver answers with. Raises WebDriverError."""
    data = json.dumps(body or {}).encode() if method == "POST" else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with _OPENER.open(request, timeout=within) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        with error:
            value = json.load(error)["value"]
        raise WebDriverError(f"{value['error']}: {value['message']}") from None


class Browser:
    """One tab. Elements are named by CSS selectors, and looked for anew each time; the first one is meant."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, url: str) -> None:
        """Go there, and wait until the page is loaded."""
        self._post("url", url=url)

    def reload(self) -> None:
        self._post("refresh")

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function of JavaScript returns; promises are waited for."""
        return self._post("execute/sync", script=script, args=arguments)

    def text(self, selector: str) -> str:
        """An element's text as it is seen: "" where it is hidden."""
        return str(
            self.run(
                "const e = document.querySelector(arguments[0]); return e.checkVisibility() ? e.innerText : ''",
                selector,
            )
        )

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that match, as they are seen."""
        return list(self.run("return Array.from(document.querySelectorAll(arguments[0]), e => e.innerText)", selector))

    def shown(self, selector: str) -> bool:
        """Does anything that matches take up room?"""
        return bool(
            self.run(
                "return Array.from(document.querySelectorAll(arguments[0])).some(e => e.getClientRects().length)",
                selector,
            )
        )

    def click(self, selector: str) -> None:
        """As a mouse does: it fails where something else lies above the element."""
        self._post(f"element/{self._find(selector)}/click")

    def fill(self, selector: str, text: str) -> None:
        """Replace what a field holds, as pasting does; the field has the focus then."""
        focus = "const e = document.querySelector(arguments[0]); e.focus(); e.select();"
        assert self.run(f"{focus} return e === document.activeElement", selector), f"{selector} takes no focus"
        self.devtools("Input.insertText", text=text)

    def press(self, *keys: str) -> None:
        """Press keys one after the other; the focused element gets them."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._post("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def devtools(self, name: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol, for what WebDriver has no word for."""
        return self._post("goog/cdp/execute", cmd=name, params=parameters)

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """Make the page this large, in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)

    def prefer(self, scheme: str) -> None:
        """Prefer light or dark, as the system's setting would."""
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the whole page, or of what is in sight."""
        picture = self.devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))

    def complaints(self) -> list[str]:
        """Exceptions in the page, and violations of its policy, since the last call. An answer of 404 is neither."""
        entries = self._post("se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE" and entry["source"] != "network"]

    def close(self) -> None:
        command("DELETE", self._session)

    def _find(self, selector: str) -> str:
        found: str = self._post("element", using="css selector", value=selector)[ELEMENT]
        return found

    def _post(self, path: str, **body: Any) -> Any:
        return command("POST", f"{self._session}/{path}", body)


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """A headless Chromium with a profile of its own in `directory`, ended with all its processes.

    Its helper processes come and go as it likes, so they do not carry the mark by which tests find what they left
    behind; they have a process group instead, which is ended as a whole.
    """
    environment = {name: value for name, value in os.environ.items() if name != RUN_MARK}
    environment["HOME"] = environment["XDG_CONFIG_HOME"] = environment["XDG_CACHE_HOME"] = str(directory)
    output = directory / "chromedriver"
    with output.open("wb") as out:
        driver = subprocess.Popen(
            [str(DRIVER), "--port=0"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        pattern = re.compile(r"successfully on port (\d+)")
        started = eventually(lambda: pattern.search(output.read_text()), "chromedriver", within=START_PATIENCE)
        flags = [*FLAGS, f"--user-data-dir={directory / 'profile'}", *(["--no-sandbox"] if os.getuid() == 0 else [])]
        wanted = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": flags},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        url = f"http://127.0.0.1:{started[1]}/session"
        session = command("POST", url, {"capabilities": {"alwaysMatch": wanted}}, within=START_PATIENCE)
        page = Browser(f"{url}/{session['sessionId']}")
        yield page
        page.close()
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    eventually(lambda: not [name for _, _, name in processes() if str(directory) in name], "the end of the browser")
