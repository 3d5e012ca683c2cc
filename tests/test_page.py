"""The operator's page in a real browser, before a stand-in for the operator's port and before the balancer itself."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from balancer.admin import page_policy
from conftest import PATIENCE, eventually
from fakes import FakeBackend, hang_up
from programs import LB, ROOT, Program, started, write_settings
from webdriver import BACKSPACE, ENTER, ESCAPE, MISSING, SPACE, TAB, Browser, browser

PAGE = ROOT / "balancer" / "page.html"
TOKEN = "correct-horse"
NONE = "\N{EN DASH}"
PHONE, DESK = (390, 844), (1280, 900)

pytestmark = [
    pytest.mark.program,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING} (Debian's chromium and chromium-driver)"),
]


# A stand-in for the operator's port -------------------------------------------------------------------------------


def backend(name: str, port: int = 9001, **changes: Any) -> dict[str, Any]:
    """A backend as the API shows it."""
    return {
        "id": name,
        "host": "10.0.0.7",
        "port": port,
        "address": f"10.0.0.7:{port}",
        "weight": 1,
        "backup": False,
        "max_connections": 0,
        "state": "UP",
        "admin": "ready",
        "healthy": True,
        "check": "L7OK 200 in 3 ms",
        "changed_at": None,
        "leaving": False,
        "scaled": False,
        "active": 0,
        "idle": 2,
        "sessions_total": 0,
        "requests_total": 0,
        "requests_per_s": 0.0,
        "errors_total": 0,
        "errors_per_s": 0.0,
        "octets_in_total": 0,
        "octets_out_total": 0,
        "responses": {"none": 0, "1xx": 0, "2xx": 0, "3xx": 0, "4xx": 0, "5xx": 0},
        "latency_ms": {"p50": None, "p90": None, "p99": None},
        "average_ms": None,
        "connect_errors_total": 0,
        "response_errors_total": 0,
        "retries_total": 0,
        "redispatches_total": 0,
        "check_failures_total": 0,
        "up_down_total": 0,
        "downtime_s": 0.0,
        "history": {"requests_per_s": [0.0] * 60, "errors_per_s": [0.0] * 60},
        **changes,
    }


def waves(height: float, dip: int = 60) -> list[float]:
    """Five minutes of a rate that goes up and down, and stands still from step `dip` on."""
    return [round(height * (1 + 0.3 * ((at * 7) % 11 - 5) / 5), 1) if at < dip else 0.0 for at in range(60)]


def status() -> dict[str, Any]:
    """What GET /api/status says of a balancer that has seen some traffic and has one of its backends down."""
    latency = {"p50": 3.24, "p90": 8.06, "p99": 143.4}
    backends = [
        backend(
            "b1",
            9001,
            weight=3,
            active=5,
            max_connections=100,
            requests_total=91_234,
            requests_per_s=41.26,
            latency_ms=latency,
        )
        | {"history": {"requests_per_s": waves(41), "errors_per_s": [0.0] * 60}},
        backend("b2", 9002, active=2, requests_total=40_511, requests_per_s=20.44, errors_total=17, errors_per_s=0.2)
        | {"latency_ms": {"p50": 4.0, "p90": 12.0, "p99": 1143.0}}
        | {"history": {"requests_per_s": waves(20), "errors_per_s": [0.0] * 40 + [6.0, 8.0] + [0.0] * 17 + [0.4]}},
        backend("b3", 9003, state="DOWN", healthy=False, check="L4CON refused", requests_total=812, errors_total=3)
        | {"changed_at": time.time() - 125}
        | {"history": {"requests_per_s": waves(19, dip=33), "errors_per_s": [0.0] * 60}},
        backend(
            "b4", 9004, state="DRAIN", admin="drain", active=1, check="L7OK 204 in 1 ms", leaving=True, scaled=True
        ),
        backend("spare", 9005, state="MAINT", admin="maint", backup=True, check="not probed yet"),
    ]
    return {
        "version": "1.0",
        "url": "http://127.0.0.1:8080",
        "mode": "http",
        "algorithm": "round_robin",
        "source": "servers.json",
        "state": "serving",
        "started_at": time.time() - 273_900,
        "uptime_s": 273_900.0,
        "can_change": True,
        "log": "load_balancer.log",
        "config_error": None,
        "restart_needed": [],
        "warnings": [],
        "connections": {"current": 64, "limit": 10_000, "total": 1_822},
        "active": 8,
        "queue": 1,
        "idle_upstreams": 12,
        "requests_total": 132_557,
        "requests_per_s": 61.7,
        "errors_total": 20,
        "errors_per_s": 0.2,
        "octets_in_total": 52_000_000,
        "octets_out_total": 12_400_000_000,
        "octets_in_per_s": 24_680.0,
        "octets_out_per_s": 5_790_000.0,
        "responses": {"none": 2, "1xx": 0, "2xx": 132_100, "3xx": 400, "4xx": 37, "5xx": 18},
        "latency_ms": latency,
        "history": {
            "step_s": 5,
            "requests_per_s": waves(61),
            "errors_per_s": [0.0] * 40 + [6.0, 8.0] + [0.0] * 17 + [0.4],
        },
        "scaling": None,
        "backends": backends,
    }


def events() -> list[dict[str, Any]]:
    now = time.time()
    return [
        {"at": now - 900, "level": "info", "text": "start: listening on http://127.0.0.1:8080, 5 backends"},
        {"at": now - 125, "level": "warning", "text": "backend b3 is DOWN: L4CON refused, 3rd failure"},
        {"at": now - 60, "level": "info", "text": "backend b4 is DRAIN: set to drain by 127.0.0.1:50111"},
    ]


def incidents() -> list[dict[str, Any]]:
    head = {"client": "127.0.0.1:50000", "backend": None}
    return [
        {**head, "id": "a41f-7", "at": time.time() - 40, "request": "GET /orders/17?full=1 HTTP/1.1", "status": 503}
        | {"code": "sQ", "total_ms": 5000.4},
        {**head, "id": "a41f-6", "at": time.time() - 95, "request": "POST /orders HTTP/1.1", "status": 502}
        | {"code": "SH", "total_ms": 12.5, "backend": "b2"},
    ]


def explanation() -> dict[str, Any]:
    """What GET /api/requests/a41f-7 says: see explain.py."""
    down = {"id": "b3", "state": "DOWN", "passed_over": "down since 2026-11-20 20:37:20: L4CON refused"}
    could = [{"id": name, "state": "UP", "passed_over": None} for name in ("b1", "b2")]
    return incidents()[0] | {
        "ended": "the backend, or the queue, was too slow, in the queue",
        "told": "no backend was free in time",
        "policy": "round_robin",
        "tries": 1,
        "times_ms": {"head": 0.1, "leased": 0.2, "connected": None, "answered": None, "total": 5000.4},
        "steps": [
            {"at_ms": 1.2, "took_ms": 1.1, "what": "L4CON refused", "backend": "b2", "backends": [*could, down]},
            {
                "at_ms": 5000.3,
                "took_ms": 4999.1,
                "what": "waited in the queue in vain",
                "backend": None,
                "backends": [down],
            },
        ],
        "backends": [*could, down],
    }


class Change(NamedTuple):
    """A request that was to change something."""

    method: str
    path: str
    query: str
    authorization: str | None
    body: Any


class FakePort:
    """Serves the page and answers as the operator's port would. What it answers is its tests' to change."""

    def __init__(self) -> None:
        self.connections: set[socket.socket] = set()
        self.reset()
        page = PAGE.read_text()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 1.0  # seconds for which a connection that a browser opened ahead of need may say nothing

            def do_GET(self) -> None:
                if self.path == "/":
                    self._send(200, page, "text/html; charset=utf-8")
                elif not fake.away:
                    self._json(*fake.answer(self.path))

            def change(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                target = urlsplit(self.path)
                self._json(
                    *fake.change(Change(self.command, target.path, target.query, self.headers["Authorization"], body))
                )

            do_POST = do_PATCH = do_DELETE = change  # noqa: N815

            def _json(self, code: int, value: Any) -> None:
                self._send(code, json.dumps(value), "application/json")

            def _send(self, code: int, body: str, kind: str) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Security-Policy", page_policy(page))
                self.end_headers()
                with suppress(OSError):  # the browser went to another page
                    self.wfile.write(body.encode())

            def log_message(self, format: str, *args: Any) -> None:
                """No word of it: the tests look at what was asked."""

        class Server(ThreadingHTTPServer):
            daemon_threads = False  # so that closing waits for them

            def get_request(self) -> tuple[socket.socket, Any]:
                connection, address = super().get_request()
                fake.connections.add(connection)
                return connection, address

            def close_request(self, request: Any) -> None:
                fake.connections.discard(request)
                super().close_request(request)

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), name="fake-port")
        self._thread.start()

    def reset(self) -> None:
        self.status = status()
        self.events = events()
        self.incidents = incidents()
        self.changes: list[Change] = []
        self.refusal: tuple[int, str] | None = None  # of every change
        self.away = False  # hangs up on every question

    def hang_up(self) -> None:
        """On the connections that a browser keeps for later."""
        for connection in list(self.connections):
            hang_up(connection)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def backend(self, name: str) -> dict[str, Any]:
        return next(one for one in self.status["backends"] if one["id"] == name)

    def answer(self, path: str) -> tuple[int, Any]:
        answers = {
            "/api/status": self.status,
            "/api/events": {"events": self.events},
            "/api/requests": {"requests": self.incidents},
            "/api/requests/a41f-7": explanation(),
        }
        return (200, answers[path]) if path in answers else (404, {"error": f"{path}: not kept, or not any longer"})

    def change(self, asked: Change) -> tuple[int, Any]:
        self.changes.append(asked)
        if self.refusal:
            return self.refusal[0], {"error": self.refusal[1]}
        if asked.authorization != f"Bearer {TOKEN}":
            return 401, {"error": "this is not the token"}
        if asked.method == "POST":
            added = backend(asked.body["id"], asked.body["port"], state="DOWN", healthy=False)
            self.status["backends"].append(added)
            return 201, added
        one = self.backend(unquote(asked.path.rpartition("/")[2]))
        if asked.method == "DELETE":
            self.status["backends"].remove(one)
            return 200, {"removed": one["id"]}
        one["weight"] = asked.body.get("weight", one["weight"])
        one["admin"] = asked.body.get("state", one["admin"])
        one["state"] = "UP" if one["admin"] == "ready" else one["admin"].upper()
        return 200, one


# The browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all: it takes a second to start."""
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="module")
def port(chromium: Browser) -> Iterator[FakePort]:
    fake = FakePort()
    yield fake
    fake.close()


@pytest.fixture
def page(chromium: Browser, port: FakePort) -> Iterator[Browser]:
    """The page, open and filled, on a desk; no token is known to it."""
    port.reset()
    chromium.resize(*DESK)
    chromium.prefer("light")
    visit(chromium, port.url)
    yield chromium
    complaints = chromium.complaints()
    leave(chromium, f"{port.url}empty")
    port.hang_up()
    assert not complaints


def visit(page: Browser, url: str) -> None:
    page.open(url)
    eventually(lambda: page.text("#live").startswith("live"), "the first figures")


def leave(page: Browser, url: str) -> None:
    """Forget the token, and ask nothing any more, so that no connection is left for the next test to see.

    The way to a page of the same origin and back is the shortest: the browser starts no process for it.
    """
    page.run("sessionStorage.clear()")
    page.open(url)


def refresh(page: Browser) -> None:
    """Ask now, as when somebody comes back to the page; an answer to it is what the page shows then."""
    page.run("document.dispatchEvent(new Event('visibilitychange'))")


def unlock(page: Browser) -> None:
    page.fill("#token", TOKEN)
    page.press(ENTER)
    eventually(lambda: page.shown("#unlocked"), "the controls")


def row(page: Browser, name: str) -> str:
    """A selector of the row of a backend."""
    return f"#rows > tr:nth-child({page.texts('#rows [data-is=id]').index(name) + 1})"


def cells(page: Browser, name: str) -> dict[str, str]:
    """The figures and words of a backend's row by their names."""
    return dict(
        page.run(
            "return Object.fromEntries(Array.from(document.querySelectorAll(arguments[0] + ' [data-is]'),"
            " e => [e.dataset.is, e.textContent]))",
            row(page, name),
        )
    )


def focused(page: Browser) -> str:
    """What has the focus, by its label, id or text."""
    named = "e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.id || e.textContent"
    return str(page.run(f"const e = document.activeElement; return {named}"))


def keep(page: Browser, tmp_path: Path, name: str) -> None:
    """A screenshot for whoever wants to look: in the test's directory, or in that of LB_SCREENSHOTS."""
    page.screenshot(Path(os.environ.get("LB_SCREENSHOTS", tmp_path)) / f"{name}.png")


# What it shows ----------------------------------------------------------------------------------------------------


def test_the_balancers_own_figures_are_the_apis(page, tmp_path):
    assert page.text("h1") == "Load balancer http://127.0.0.1:8080"
    assert page.text("header p") == "SERVING http · round_robin · servers.json · up 3 d 4 h · lb 1.0"
    assert page.texts(".figures > div") == [
        "Requests\n61.7 /s\n132,557 in all",
        "Errors\n0.20 /s\n20 in all",
        "Latency over a minute, ms\n3.2\np50\n8.1\np90\n143\np99",
        "Connections\n64\nof 10,000, 1,822 in all",
        "Active\n8\n12 kept idle",
        "Queue\n1",
        "In\n24.7 kB/s\n52.0 MB in all",
        "Out\n5.79 MB/s\n12.4 GB in all",
    ]
    assert page.text("#answers") == "unanswered 2 · 1xx 0 · 2xx 132,100 · 3xx 400 · 4xx 37 · 5xx 18"
    assert page.text("#peak") == "peak 79.3/s, now"
    assert page.text("#summary") == "2 UP · 1 DOWN · 1 DRAIN · 1 MAINT"
    assert page.run("return document.title") == "1 DOWN: http://127.0.0.1:8080 - load balancer"
    keep(page, tmp_path, "wide-light")


def test_each_row_says_what_the_api_says_of_its_backend(page, port):
    assert (
        cells(page, "b2").items()
        >= {
            "state": "UP",
            "id": "b2",
            "address": "10.0.0.7:9002",
            "mark": "",
            "check": "L7OK 200 in 3 ms",
            "since": "the start",
            "weight": "1",
            "active": "2",
            "most": "",
            "requests": "20.4",
            "requestsTotal": "40,511",
            "errors": "0.20",
            "errorsTotal": "17",
            "p50": "4.0",
            "p90": "12",
            "p99": "1,143",
        }.items()
    )
    assert cells(page, "b1").items() >= {"weight": "3", "most": "of 100", "p99": "143"}.items()
    down = cells(page, "b3")
    since = page.run(
        "return new Date(arguments[0] * 1000).toTimeString().slice(0, 8)", port.backend("b3")["changed_at"]
    )
    assert (down["state"], down["check"], down["p50"]) == ("DOWN", "L4CON refused", NONE)
    assert down["since"].endswith(since)
    assert (cells(page, "b4")["state"], cells(page, "b4")["mark"]) == ("DRAIN", "leaving · scaled")
    assert (cells(page, "spare")["state"], cells(page, "spare")["mark"]) == ("MAINT", "backup")


def test_a_sparkline_has_its_shape_in_words_too(page):
    assert page.run(
        "return arguments[0].map(s => document.querySelector(s + ' svg').getAttribute('aria-label'))",
        [".wide", row(page, "b3")],
    ) == [
        "Requests per second in the last 5 minutes: 64.7 now, 79.3 at most; errors 8.0 at most",
        "Requests per second in the last 5 minutes: 0 now, 24.7 at most; no errors",
    ]


def test_rates_of_all_backends_are_drawn_to_one_scale(page, port):
    """So that rows can be compared: half the rate is half the height."""
    port.backend("b1")["history"] = {"requests_per_s": [0.0, 100.0], "errors_per_s": [0.0, 0.0]}
    port.backend("b2")["history"] = {"requests_per_s": [0.0, 50.0], "errors_per_s": [0.0, 0.5]}
    refresh(page)
    line, wrong = f"{row(page, 'b2')} .line", f"{row(page, 'b2')} .errors"
    drawn = "return document.querySelector(arguments[0]).getAttribute('d')"
    eventually(lambda: page.run(drawn, line) == "M58 20.0L59 10.0", "half the height")
    assert page.run(drawn, wrong) == "M58 20L58 20.0L59 18.4L59 20Z", "the smallest rate of errors is seen"
    assert page.run(drawn, f"{row(page, 'b1')} .errors") == ""


def test_figures_are_changed_in_place_every_second(page, port):
    page.run("document.querySelectorAll('#rows *').forEach(e => { e.marked = true })")
    port.backend("b1").update(requests_total=91_300, active=77, latency_ms={"p50": None, "p90": None, "p99": None})
    port.status["queue"] = 1_042
    eventually(lambda: page.text("#queue") == "1,042", "the next second")
    assert cells(page, "b1").items() >= {"requestsTotal": "91,300", "active": "77", "p99": NONE}.items()
    assert page.run("return Array.from(document.querySelectorAll('#rows *')).every(e => e.marked)")


def test_rows_come_go_and_change_places_as_backends_do(page, port):
    first, second, *rest = port.status["backends"]
    port.status["backends"] = [backend("b0", 9000), *rest[:2], first]
    refresh(page)
    eventually(lambda: page.texts("#rows [data-is=id]") == ["b0", "b3", "b4", "b1"], "the order of the API")
    twin = backend("b1", 9001, leaving=True)
    port.status["backends"] = [first, twin, second]
    refresh(page)
    eventually(lambda: page.texts("#rows [data-is=id]") == ["b1", "b1", "b2"], "one that leaves beside its successor")
    assert page.texts("#rows .name") == ["b1\n10.0.0.7:9001", "b1 leaving\n10.0.0.7:9001", "b2\n10.0.0.7:9002"]


def test_a_filter_leaves_the_rows_that_have_all_its_words(page, port):
    def visible() -> list[str]:
        return page.texts("#rows tr:not([hidden]) [data-is=id]")

    for words, names in (("down", ["b3"]), ("9002", ["b2"]), (" L7ok  B1 ", ["b1"]), ("backup", ["spare"]), ("b9", [])):
        page.fill("#filter", words)
        assert visible() == names, words
        assert page.text("#matches") == f"{len(names)} of 5"
    assert page.shown("#no-backends")
    page.fill("#filter", "down")
    port.backend("b1").update(state="DOWN")
    refresh(page)
    eventually(lambda: visible() == ["b1", "b3"], "a backend that has gone down")
    page.fill("#filter", "x")
    page.press(BACKSPACE)
    assert visible() == ["b1", "b2", "b3", "b4", "spare"]
    assert page.text("#matches") == ""


def test_what_there_is_none_of_is_not_shown_or_said_so(page, port):
    assert not page.shown("#scaling")
    unlock(page)
    assert page.text("#persist-label") == "write to servers.json too"
    scaling = {"instances": 2, "starting": 0, "min": 0, "max": 4, "last_step": None}
    port.status.update(backends=[], source="command line", scaling=scaling, log="")
    port.incidents = []
    page.reload()
    eventually(lambda: page.text("#no-backends") == "There is no backend.", "the empty table")
    assert page.text("#scaling") == "Scaling: instances 2, starting 0, min 0, max 4"
    assert page.text("#no-incidents") == "None so far."
    assert page.text("#log") == ""
    assert page.shown("#add")
    assert not page.shown("#persist-label"), "there is no file"


def test_a_config_error_is_shown_until_it_is_mended(page, port):
    assert not page.shown(".banner")
    line = 'servers.json: servers[0].port: must be 1 to 65535, not "<b>80801</b>"'
    ending = "site.pem: the certificate of site.test ends on 2026-12-01; have it renewed"
    port.status.update(config_error=line, restart_needed=["listen: 127.0.0.1:8080 to 0.0.0.0:80"], warnings=[ending])
    refresh(page)
    eventually(lambda: page.shown("#config-error"), "the error")
    assert page.text("#config-error") == f"The changed configuration is not in use: {line}"
    assert page.texts("#restart li") == ["listen: 127.0.0.1:8080 to 0.0.0.0:80"]
    assert page.texts("#warnings li") == [ending]
    port.status.update(config_error=None, restart_needed=[], warnings=[])
    refresh(page)
    eventually(lambda: not page.shown(".banner"), "calm")


def test_a_lost_connection_is_said_and_found_again(page, port):
    seen = page.text("#live").removeprefix("live, ")
    port.away = True
    refresh(page)
    eventually(lambda: page.shown("#lost"), "the loss")
    assert re.fullmatch(r"Connection lost, last seen \d\d:\d\d:\d\d. Trying again every second.", page.text("#lost"))
    assert page.text("#lost")[len("Connection lost, last seen ") :][:8] >= seen or seen.startswith("23:59")
    assert page.text("#live") == "not connected"
    assert page.run("return document.title").startswith("Connection lost")
    assert cells(page, "b1")["requests"] == "41.3", "what was known last"
    port.away = False
    port.status["queue"] = 7
    eventually(lambda: page.text("#queue") == "7", "figures again")
    assert not page.shown("#lost")


def test_nothing_is_asked_while_nobody_looks(page):
    """document.hidden: another tab is in front, or the telephone is in a pocket."""
    page.run("""
        window.asked = 0; window.waiting = new Map();
        const ask = fetch, begin = setTimeout, end = clearTimeout;
        window.fetch = (...words) => { asked += 1; return ask(...words); };
        window.setTimeout = (work, ms) => {
            const id = begin(() => { waiting.delete(id); work(); }, ms);
            waiting.set(id, ms);
            return id;
        };
        window.clearTimeout = (id) => { waiting.delete(id); end(id); };
        window.look = (hidden) => {
            Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
            document.dispatchEvent(new Event("visibilitychange"));
        };
        look(false);
    """)
    eventually(lambda: page.run("return Array.from(waiting.values())") == [1000], "a round, and the next one planned")
    page.run("look(true); asked = 0")
    eventually(lambda: page.run("return waiting.size") == 0, "that nothing is planned")
    assert page.run("return asked") == 0
    page.run("look(false)")
    assert page.run("return asked") >= 2


def test_events_are_listed_newest_first_and_a_new_one_is_read_out(page, port):
    """Only events are: a screen reader that reads every figure out is switched off."""
    texts = [event["text"] for event in reversed(port.events)]
    assert page.texts("#event-list li > span:last-child") == texts
    assert page.texts("#event-list .pill") == ["info", "warning", "info"]
    assert page.run("return document.getElementById('announcement').textContent") == "", "nothing, of what is past"
    port.events.append({"at": time.time(), "level": "warning", "text": "backend b2 is DOWN: L7TOUT, 3rd failure"})
    refresh(page)
    eventually(lambda: len(page.texts("#event-list li")) == 4, "the event")
    assert page.texts("#event-list li > span:last-child") == ["backend b2 is DOWN: L7TOUT, 3rd failure", *texts]
    assert (
        page.run("return document.getElementById('announcement').textContent")
        == "backend b2 is DOWN: L7TOUT, 3rd failure"
    )
    live = "[aria-live], [role=status], [role=alert], output"
    spoken = page.run("return Array.from(document.querySelectorAll(arguments[0]), e => e.id || e.className)", live)
    assert set(spoken) == {"announcement", "banners", "token-problem", "addition-problem", "matches", "problem"}


def test_events_are_kept_within_bounds_and_begin_anew_with_another_balancer(page, port):
    at = time.time()
    port.events = [{"at": at + number, "level": "info", "text": f"event {number}"} for number in range(500)]
    refresh(page)
    eventually(lambda: page.run("return document.querySelectorAll('#event-list li').length") == 500, "500 events")
    port.events = [*port.events[40:], *({"at": at + 900, "level": "info", "text": f"late {n}"} for n in range(40))]
    refresh(page)
    eventually(lambda: page.text("#event-list li:first-child > span:last-child") == "late 39", "the last")
    assert page.run("return document.querySelectorAll('#event-list li').length") == 500
    assert (
        page.run("return document.querySelector('#event-list li:last-child > span:last-child').textContent")
        == "event 40"
    )
    port.events = [{"at": at + 2000, "level": "info", "text": "start"}]
    refresh(page)
    eventually(lambda: page.texts("#event-list li > span:last-child") == ["start"], "its first event alone")


def test_a_failure_is_explained_in_words(page):
    assert page.texts("#incidents td:nth-child(2)") == [
        "GET /orders/17?full=1 HTTP/1.1\nno backend · a41f-7",
        "POST /orders HTTP/1.1\nbackend b2 · a41f-6",
    ]
    assert page.texts("#incidents td:nth-child(4)") == ["5,000", "13"]
    page.click("#incidents button")
    eventually(lambda: page.shown(".facts"), "the explanation")
    facts = dict(zip(page.texts(".facts dt"), page.texts(".facts dd"), strict=True))
    assert facts.pop("When")
    assert facts == {
        "Request": "GET /orders/17?full=1 HTTP/1.1",
        "Client": "127.0.0.1:50000",
        "Answer": "503; sQ: the backend, or the queue, was too slow, in the queue",
        "Was told": "no backend was free in time",
        "Backend": "none, 1 tried",
        "Policy": "round_robin",
        "Times": "head 0.1 ms, leased 0.2 ms, total 5,000 ms",
    }
    assert page.texts(".steps > li") == [
        "at 1.2 ms, after 1.1 ms: backend b2: L4CON refused\n"
        "b1, b2: could be chosen\nb3: down since 2026-11-20 20:37:20: L4CON refused",
        "at 5,000 ms, after 4,999 ms: waited in the queue in vain\nb3: down since 2026-11-20 20:37:20: L4CON refused",
    ]
    page.press(ESCAPE)
    eventually(lambda: not page.shown("#explanation"), "the page")
    assert focused(page) == "Explain GET /orders/17?full=1 HTTP/1.1, request a41f-7"
    page.click("#incidents tr:nth-child(2) button")
    eventually(
        lambda: page.texts("#explanation .problem") == ["/api/requests/a41f-6: not kept, or not any longer"], "why not"
    )
    page.press(ESCAPE)


# What it changes --------------------------------------------------------------------------------------------------


def test_a_click_on_drain_drains(page, port):
    unlock(page)
    page.click(f"{row(page, 'b1')} [data-state=drain]")
    eventually(lambda: cells(page, "b1")["state"] == "DRAIN", "its state")
    assert port.changes == [Change("PATCH", "/api/backends/b1", "", f"Bearer {TOKEN}", {"state": "drain"})]
    pressed = page.run(
        "return Array.from(document.querySelectorAll(arguments[0]), e => e.getAttribute('aria-pressed'))",
        f"{row(page, 'b1')} [data-state]",
    )
    assert pressed == ["false", "true", "false"]
    page.click("#persist")
    page.click(f"{row(page, 'b1')} [data-state=maint]")
    eventually(lambda: cells(page, "b1")["state"] == "MAINT", "its state")
    page.click(f"{row(page, 'b1')} [data-state=ready]")
    eventually(lambda: cells(page, "b1")["state"] == "UP", "its state")
    assert [(change.body, change.query) for change in port.changes[1:]] == [
        ({"state": "maint"}, "persist=1"),
        ({"state": "ready"}, "persist=1"),
    ]


def test_a_weight_is_changed_where_it_stands(page, port):
    unlock(page)
    field, problem = f"{row(page, 'b1')} input", f"{row(page, 'b1')} .problem"
    page.fill(field, "7")
    page.press(ENTER)
    eventually(lambda: port.changes, "the change")
    assert port.changes == [Change("PATCH", "/api/backends/b1", "", f"Bearer {TOKEN}", {"weight": 7})]
    port.refusal = (422, "backends.b1.weight: <i>too heavy</i>")
    page.fill(field, "8")
    page.press(TAB)
    eventually(lambda: page.text(problem) == "backends.b1.weight: <i>too heavy</i>", "what is wrong")
    eventually(
        lambda: page.run("return document.querySelector(arguments[0]).value", field) == "7", "the weight as it is"
    )
    page.fill(field, "1000")
    page.press(ENTER)
    assert page.run("return document.querySelector(arguments[0]).validity.rangeOverflow", field)
    assert len(port.changes) == 2, "what cannot be right is not asked"


def test_a_removal_is_asked_about_first(page, port):
    unlock(page)
    page.click(f"{row(page, 'b2')} .remove")
    assert page.text("#removal h2") == "Remove backend b2 at 10.0.0.7:9002?"
    assert focused(page) == "Cancel"
    page.press(ENTER)
    eventually(lambda: not page.shown("#removal"), "the page")
    assert focused(page) == "Remove backend b2"
    assert not port.changes
    page.press(ENTER)
    page.click("#removal .grave")
    eventually(lambda: page.texts("#rows [data-is=id]") == ["b1", "b3", "b4", "spare"], "its end")
    assert port.changes == [Change("DELETE", "/api/backends/b2", "", f"Bearer {TOKEN}", None)]
    assert focused(page) == "backends", "for the button that had the focus is gone"


def test_a_backend_is_added(page, port):
    unlock(page)
    page.click("#add")
    page.fill("#new-host", "10.0.0.9")
    page.fill("#new-port", "9009")
    page.fill("#new-id", "b9")
    port.refusal = (409, "10.0.0.9:9009: this address is backend b1's")
    page.press(ENTER)
    eventually(lambda: page.text("#addition-problem") == "10.0.0.9:9009: this address is backend b1's", "what is wrong")
    port.refusal = None
    page.fill("#new-weight", "2")
    page.click("#addition .chief")
    eventually(lambda: "b9" in page.texts("#rows [data-is=id]"), "its row")
    assert not page.shown("#addition")
    assert [change.body for change in port.changes] == [
        {"host": "10.0.0.9", "port": 9009, "weight": 1, "id": "b9"},
        {"host": "10.0.0.9", "port": 9009, "weight": 2, "id": "b9"},
    ]
    assert port.changes[1][:4] == ("POST", "/api/backends", "", f"Bearer {TOKEN}")
    page.click("#add")
    assert page.run(
        "return [document.getElementById('new-host').value, document.getElementById('addition-problem').textContent]"
    ) == ["", ""]
    page.press(ESCAPE)


def test_without_a_token_nothing_can_be_changed(page, port):
    assert page.shown("#unlock")
    assert not page.shown(".guarded")
    port.status["can_change"] = False
    refresh(page)
    eventually(lambda: page.shown("#read-only"), "that it only reads")
    assert not page.shown("#unlock")
    assert not page.shown(".guarded")


def test_a_wrong_token_is_said_beside_its_field_and_locks_the_controls(page, port):
    page.fill("#token", "guess")
    page.press(ENTER)
    page.click(f"{row(page, 'b1')} [data-state=drain]")
    eventually(lambda: page.text("#token-problem") == "this is not the token", "what is wrong")
    assert focused(page) == "token"
    assert not page.shown(".guarded")
    assert page.run("return sessionStorage.length") == 0
    assert port.backend("b1")["state"] == "UP"


def test_a_token_lasts_as_long_as_the_tab_and_can_be_locked_away(page):
    unlock(page)
    assert page.run("return [localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    eventually(lambda: page.shown("#unlocked"), "the controls")
    page.click("#lock")
    assert not page.shown(".guarded")
    assert page.run("return sessionStorage.length") == 0


def test_an_operator_is_told_when_the_balancer_did_not_answer(page, port, monkeypatch):
    unlock(page)

    def hang_up(asked: Change) -> tuple[int, Any]:
        raise ConnectionAbortedError

    monkeypatch.setattr(port, "change", hang_up)
    monkeypatch.setattr(port.server, "handle_error", lambda request, address: None)
    page.click(f"{row(page, 'b1')} [data-state=drain]")
    eventually(lambda: page.text(f"{row(page, 'b1')} .problem").startswith("The balancer did not answer"), "the truth")


# By keyboard, by ear, on every screen -----------------------------------------------------------------------------


def test_everything_is_reached_by_keyboard_in_the_order_of_the_page(page, port):
    unlock(page)
    port.status["backends"] = port.status["backends"][:1]
    refresh(page)
    eventually(lambda: page.texts("#rows [data-is=id]") == ["b1"], "one row")
    page.reload()
    eventually(lambda: page.shown("#incidents button"), "the page")
    order = []
    for _ in range(14):
        page.press(TAB)
        order.append(focused(page))
        assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid", order
    assert order == [
        "To the backends",
        "lock",
        "filter",
        "persist",
        "add",
        "Weight of backend b1",
        "Ready backend b1",
        "Drain backend b1",
        "Maint backend b1",
        "Remove backend b1",
        "requests",
        "Explain GET /orders/17?full=1 HTTP/1.1, request a41f-7",
        "Explain POST /orders HTTP/1.1, request a41f-6",
        "events",
    ]


def test_focus_and_what_is_being_typed_survive_every_update(page, port):
    unlock(page)
    page.run("document.querySelector(arguments[0]).focus()", f"{row(page, 'b2')} [data-state=drain]")
    port.status["backends"] = [backend("b0", 9000), *reversed(port.status["backends"])]
    refresh(page)
    eventually(lambda: "b0" in page.texts("#rows [data-is=id]"), "the row above")
    assert focused(page) == "Drain backend b2"
    page.press(SPACE)
    eventually(lambda: cells(page, "b2")["state"] == "DRAIN", "the work of the key")
    assert focused(page) == "Drain backend b2"
    page.fill(f"{row(page, 'b1')} input", "12")
    port.backend("b1").update(weight=5, active=99)
    port.backend("b3").update(weight=6)
    refresh(page)
    eventually(lambda: cells(page, "b1")["active"] == "99", "the update")
    value = "return document.querySelector(arguments[0]).value"
    assert page.run(value, f"{row(page, 'b1')} input") == "12"
    assert page.run(value, f"{row(page, 'b3')} input") == "6", "a field that nobody types in follows"
    assert focused(page) == "Weight of backend b1"


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_screen_reader_finds_a_table_and_a_name_for_everything(page, size):
    """Chromium's own accessibility tree: layout by grid would take the table's roles away, were they not written."""
    unlock(page)
    page.resize(*size, phone=size is PHONE)

    def names() -> dict[str, list[str]]:
        """By the role."""
        found: dict[str, list[str]] = {}
        for node in page.devtools("Accessibility.getFullAXTree")["nodes"]:
            if not node["ignored"]:
                found.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
        return found

    eventually(lambda: len(names()["rowheader"]) == 5, "the rows below the edge of the screen")
    found = names()
    assert found["table"] == ["Backends", "Last failures and slow requests"]
    assert [name.split()[0] for name in found["rowheader"]] == ["b1", "b2", "b3", "b4", "spare"]
    assert len(found["columnheader"]) >= 12
    assert len(found["row"]) >= 6
    assert found["button"].count("Drain backend b1") == 1
    for role in ("button", "spinbutton", "searchbox", "checkbox", "table", "image", "region", "dialog"):
        assert all(found.get(role, [])), (role, found.get(role))
    assert len(found["image"]) == 6


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(page, port, tmp_path, scheme):
    """4.5 to 1 (WCAG 2.2, 1.4.3), as the reader's system asks for light or dark."""
    port.status.update(config_error="servers.json: line 3: a comma is missing", restart_needed=["mode: http to tcp"])
    port.events.append({"at": time.time(), "level": "error", "text": "cannot write the log"})
    page.prefer(scheme)
    unlock(page)
    refresh(page)
    eventually(lambda: page.shown("#config-error") and page.shown("#event-list .error"), "all there is to see")
    ground, worst = page.run("""
        const channels = (text) => text.match(/[\\d.]+/g).map(Number);
        const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
        const ground = (e) => {
            const colour = channels(getComputedStyle(e).backgroundColor);
            return colour[3] === 0 ? ground(e.parentElement) : colour;
        };
        const worst = [21, ""];
        for (const e of document.querySelectorAll("body *")) {
            const text = Array.from(e.childNodes).some((node) => node.nodeType === 3 && node.data.trim());
            if (!text && e.tagName !== "INPUT" || !e.getClientRects().length) continue;
            const pair = [light(channels(getComputedStyle(e).color)), light(ground(e))].sort((a, b) => b - a);
            const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
            if (ratio < worst[0]) worst.splice(0, 2, ratio, e.outerHTML);
        }
        return [light(ground(document.body)), worst];
    """)
    assert worst[0] >= 4.5, worst
    assert ground > 0.8 if scheme == "light" else ground < 0.05
    keep(page, tmp_path, f"everything-{scheme}")


def test_no_state_is_told_by_colour_alone(page):
    pills = "#rows [data-is=state]"
    assert page.texts(pills) == ["UP", "UP", "DOWN", "DRAIN", "MAINT"]
    colour = "return Array.from(document.querySelectorAll(arguments[0]), e => getComputedStyle(e).color)"
    assert len(set(page.run(colour, pills))) == 4


@pytest.mark.parametrize("size", [(320, 640), (820, 1180), (1216, 800)], ids=lambda size: str(size[0]))
def test_nothing_is_wider_than_the_screen(page, port, size):
    port.backend("b2").update(check="L7RSP " + "x" * 90, address="[fd00:1234:5678:9abc:def0:1234:5678:9abc]:65535")
    port.backend("b3").update(requests_total=10**12, requests_per_s=123_456.7, errors_total=10**9)
    port.status.update(
        url="http://balancer." + "long." * 12 + "example:8080", config_error="servers.json: " + "y" * 200
    )
    port.events.append({"at": time.time(), "level": "error", "text": "z" * 200})
    port.incidents.insert(0, {**port.incidents[0], "id": "i" * 60, "request": "GET /" + "w" * 300})
    page.resize(*size, phone=size[0] < 500)
    page.reload()
    eventually(lambda: page.shown("#rows tr"), "the rows")
    for unlocked in (False, True):
        if unlocked:
            unlock(page)
        widths = page.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1] == size[0]
    outside = page.run("""
        return Array.from(document.querySelectorAll("#rows :is(span, small, button, input)"))
            .filter((e) => {
                const one = e.getBoundingClientRect(), cell = e.closest("td, th").getBoundingClientRect();
                return e.getClientRects().length && (one.right > cell.right + 1 || one.left < cell.left - 1);
            })
            .map((e) => e.outerHTML);
    """)
    assert not outside, "it runs over its neighbour"


def test_a_phone_gets_one_column_of_cards(page, tmp_path):
    page.resize(*PHONE, phone=True)
    lefts = page.run("return Array.from(document.querySelectorAll('#rows tr'), e => e.getBoundingClientRect().left)")
    assert len(set(lefts)) == 1
    assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [390, 390]
    unlock(page)
    page.click(f"{row(page, 'b1')} [data-state=drain]")
    eventually(lambda: cells(page, "b1")["state"] == "DRAIN", "the work of a thumb")
    keep(page, tmp_path, "phone")


# Hostile and many -------------------------------------------------------------------------------------------------


def test_markup_in_any_text_does_nothing(page, port):
    """Ids, probe results, log lines and request lines are partly a stranger's. Every one of them arrives as text."""
    evil = "\"'><img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    unlock(page)
    port.status.update(version=evil, url=evil, mode=evil, algorithm=evil, source=evil, log=evil, config_error=evil)
    port.status.update(restart_needed=[evil], scaling={evil: evil}, state=evil)
    port.status["backends"] = [backend(evil, address=evil, check=evil, state=evil, admin=evil, host=evil)]
    port.events = [{"at": time.time(), "level": evil, "text": evil}]
    port.incidents = [{**incidents()[0], "id": "a41f-7", "at": 1.0, "request": evil, "code": evil, "backend": evil}]
    page.reload()
    eventually(lambda: page.shown("#incidents button"), "it all")
    page.click("#rows tr [data-state=drain]")
    eventually(lambda: port.changes, "the change")
    assert unquote(port.changes[0].path) == f"/api/backends/{evil}"
    page.click("#incidents button")
    eventually(lambda: page.shown(".facts"), "the explanation")
    page.press(ESCAPE)
    page.click("#rows .remove")
    assert page.text("#removal h2") == f"Remove backend {evil} at {evil}?"
    page.press(ESCAPE)
    assert page.run("return document.querySelectorAll('img, body script ~ script, [onerror]').length") == 0
    assert page.run("return document.title") == f"{evil} - load balancer"


def test_the_page_brings_all_it_needs_and_nothing_that_runs_by_itself():
    """One file: the policy that is sent with it allows this one script and this one style, by their hashes."""
    page = PAGE.read_text()
    assert page.count("<script") == page.count("<script>") == 1
    assert page.count("<style") == page.count("<style>") == 1
    markup = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.DOTALL)
    assert not re.search(r"\s(on\w+|style|src|srcset|action)=", markup)
    assert not re.search(
        r"https?:|//|@import|url\(|innerHTML|insertAdjacentHTML|outerHTML|document\.write|\beval\b",
        re.sub(r"\s//.*", "", page),
    )


def test_a_thousand_backends_are_updated_within_the_blink_of_an_eye(page, port):
    """Within the 50 ms from which on a browser calls a task long, or thrice that where the machine has other work."""
    history = {"requests_per_s": waves(40), "errors_per_s": [0.0] * 60}
    port.status["backends"] = many = [backend(f"b{number}", 1000 + number, history=history) for number in range(1000)]
    unlock(page)
    refresh(page)
    eventually(lambda: page.text("#summary") == "1,000 UP", "a thousand rows")
    page.run("""
        window.long = 0;
        const add = (list) => { for (const task of list.getEntries()) long += task.duration; };
        new PerformanceObserver(add).observe({ type: "longtask" });
    """)
    lengths = []
    for turn in range(1, 4):
        for number, one in enumerate(many):
            one.update(requests_total=turn * 1000 + number, requests_per_s=turn + number / 10, active=turn)
        port.status["queue"] = turn
        refresh(page)
        shown = "return document.getElementById('queue').textContent"
        eventually(lambda: page.run(shown) == str(turn), "the next figures")  # noqa: B023
        # A task is told of after it has ended, and the picture after it is part of it.
        lengths.append(
            page.run(
                "return new Promise((done) => requestAnimationFrame(() => setTimeout(() => { done(long); long = 0; })))"
            )
        )
    assert cells(page, "b0")["requestsTotal"] == "3,000"
    page.run("document.querySelector('#rows tr:last-child').scrollIntoView()")
    eventually(lambda: cells(page, "b999")["requestsTotal"] == "3,999", "figures of a row that comes in sight")
    assert min(lengths) < 150, lengths
    page.fill("#filter", "b77 up")
    assert page.text("#matches") == "11 of 1,000"


# Before the balancer itself ---------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def get(program: Program, path: str) -> int:
    """The status of an answer from the balancer."""
    connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=PATIENCE)
    with closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


def asked(url: str, path: str) -> Any:
    """What the API says."""
    with urllib.request.urlopen(url + path, timeout=PATIENCE) as answer:
        return json.load(answer)


def number(text: str) -> float | None:
    """The first number in a text; None where the page says that there is none."""
    found = re.match(r"[0-9][0-9,.]*", text)
    return float(found[0].replace(",", "")) if found else None


def is_rounded(text: str, value: float | None) -> bool:
    """Does the page show this value, with one decimal at least below 10, and as a whole number at least above?"""
    shown = number(text)
    if shown is None or value is None:
        return shown is value
    return abs(shown - value) <= (0.051 if value < 10 else 0.501)


def differences(page: Browser, url: str) -> list[tuple[str, str, object]]:
    """What the page shows now and the API says otherwise: name, as shown, as it is."""
    own, rows = page.run("""
        const text = (e) => e.textContent;
        const own = Object.fromEntries(Array.from(document.querySelectorAll(".figures [id]"), (e) => [e.id, text(e)]));
        const parts = (row) => Array.from(row.querySelectorAll("[data-is]"), (e) => [e.dataset.is, text(e)]);
        return [own, Array.from(document.querySelectorAll("#rows tr"), (row) => Object.fromEntries(parts(row)))];
    """)
    status = asked(url, "api/status")
    words = []
    figures = [
        ("requests", own["requests-total"], status["requests_total"]),
        ("requests/s", own["requests-rate"], status["requests_per_s"]),
        ("errors", own["errors-total"], status["errors_total"]),
        ("errors/s", own["errors-rate"], status["errors_per_s"]),
        ("connections", own["connections"], status["connections"]["current"]),
        ("active", own["active"], status["active"]),
        ("queue", own["queue"], status["queue"]),
        *((share, own[share], ms) for share, ms in status["latency_ms"].items()),
    ]
    for shown, one in zip(rows, status["backends"], strict=True):
        words += [(name, shown[name], one[name]) for name in ("id", "address", "state", "check")]
        figures += [
            ("requests", shown["requestsTotal"], one["requests_total"]),
            ("requests/s", shown["requests"], one["requests_per_s"]),
            ("errors", shown["errorsTotal"], one["errors_total"]),
            ("errors/s", shown["errors"], one["errors_per_s"]),
            ("weight", shown["weight"], one["weight"]),
            ("active", shown["active"], one["active"]),
            *((share, shown[share], ms) for share, ms in one["latency_ms"].items()),
        ]
    return [word for word in words if word[1] != word[2]] + [
        figure for figure in figures if not is_rounded(figure[1], figure[2])
    ]


def test_the_figures_of_a_running_balancer_are_the_apis_and_a_click_on_drain_drains(chromium, tmp_path, monkeypatch):
    monkeypatch.setenv("LB_ADMIN_TOKEN", TOKEN)
    chromium.resize(*DESK)
    chromium.prefer("light")
    with FakeBackend(OK) as one, FakeBackend(OK) as two:
        servers = [{"id": f"b{at}", "host": each.host, "port": each.port} for at, each in enumerate((one, two), 1)]
        write_settings(tmp_path, {"servers": servers, "listen": {"port": 0}, "health_check_interval": 60})
        with started(LB, "--admin", "127.0.0.1:0", directory=tmp_path) as program:
            assert program.first_line
            url = eventually(lambda: re.search(r"lb: status page (\S+/)\n", program.out), "the third line")[1]

            def is_measured() -> bool:
                assert get(program, "/work") == get(program, "/work") == 200
                return asked(url, "api/status")["latency_ms"]["p50"] is not None

            eventually(is_measured, "figures of what was asked")
            visit(chromium, url)
            eventually(lambda: differences(chromium, url) == [], "the API's figures")
            counts = [number(cells(chromium, name)["requestsTotal"]) for name in ("b1", "b2")]
            assert counts == [sum(b"/work" in request for request in each.requests) for each in (one, two)]

            unlock(chromium)
            chromium.click(f"{row(chromium, 'b1')} [data-state=drain]")
            eventually(lambda: cells(chromium, "b1")["state"] == "DRAIN", "its state")
            assert [backend["state"] for backend in asked(url, "api/backends")["backends"]] == ["DRAIN", "UP"]
            assert [get(program, "/later") for _ in range(10)] == [200] * 10
            assert not [request for request in one.requests if b"/later" in request]
            eventually(lambda: differences(chromium, url) == [], "the API's figures")

            chromium.click(f"{row(chromium, 'b2')} [data-state=maint]")
            eventually(lambda: cells(chromium, "b2")["state"] == "MAINT", "its state")
            assert get(program, "/nobody") == 503
            chromium.reload()
            eventually(lambda: chromium.texts("#incidents button") == ["GET /nobody HTTP/1.1"], "the failure")
            chromium.click("#incidents button")
            eventually(lambda: chromium.shown(".steps"), "the explanation")
            assert chromium.texts(".steps ul li") == [
                "b1: set to drain by an operator",
                "b2: set to maint by an operator",
            ]
            chromium.press(ESCAPE)
            keep(chromium, tmp_path, "balancer")
            assert not chromium.complaints()
            leave(chromium, "about:blank")
