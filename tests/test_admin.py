"""The operator's port: what each path gives, who may change what, and how it bears clients that mean no good."""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from email.message import Message
from typing import Any

import pytest

from balancer import admin
from balancer.admin import AdminServer, Gate, Refused, Sparing, find_token, is_loopback, page_policy
from balancer.backend import Backend
from balancer.config import AdminPort, ConfigError, Server
from conftest import PATIENCE, eventually
from fakes import Answer, read_response

TOKEN = "correct-horse-battery"
BACKEND = {"id": "1", "host": "127.0.0.1", "port": 8001, "state": "UP"}


class FakeFigures:
    """What there is to read. `sampled` counts."""

    def __init__(self) -> None:
        self.known = {"1": BACKEND, "a/ä": {**BACKEND, "id": "a/ä"}}
        self.sampled = 0
        self.on_status: Callable[[], object] = lambda: None
        self.on_sample: Callable[[], object] = lambda: None

    def status(self) -> dict[str, Any]:
        return {"state": "serving", "note": self.on_status()}

    def backends(self) -> list[dict[str, Any]]:
        return list(self.known.values())

    def backend(self, id: str) -> dict[str, Any] | None:
        return self.known.get(id)

    def events(self) -> list[dict[str, Any]]:
        return [{"at": 1.5, "level": "info", "text": "start"}]

    def prometheus(self) -> str:
        return "# TYPE up gauge\nup 1\n"

    def sample(self) -> None:
        self.sampled += 1
        self.on_sample()


class FakeOperator:
    """Notes what it is asked to do in `done`; `on_change` is called in each change and may raise."""

    def __init__(self) -> None:
        self.status = FakeFigures()
        self.draining = False
        self.done: list[tuple[Any, ...]] = []
        self.on_change: Callable[[], object] = lambda: None

    def explanation(self, id: str) -> dict[str, Any] | None:
        return {"id": id, "tries": []} if id == "r-1" else None

    def explanations(self) -> list[dict[str, Any]]:
        return [{"id": "r-1", "status": 503}]

    def document(self) -> dict[str, Any]:
        return {"servers": []}

    def add(self, entry: Mapping[str, Any], who: str, persist: bool) -> Backend:
        self._note("add", dict(entry), who, persist)
        added = Server(str(entry.get("id", "2")), "127.0.0.1", 8002)
        self.status.known[added.id] = {"id": added.id}
        return Backend(added)

    def change(self, id: str, changes: Mapping[str, Any], who: str, persist: bool) -> None:
        self._note("change", id, dict(changes), who, persist)

    def remove(self, id: str, who: str, persist: bool) -> None:
        self._note("remove", id, who, persist)

    def reload(self, who: str) -> list[str]:
        self._note("reload", who)
        return ["servers[0].weight: 1 -> 2"]

    def _note(self, *what: Any) -> None:
        self.on_change()
        self.done.append(what)


class Port:
    """A running server as its clients and its operator see it."""

    def __init__(self, server: AdminServer, operator: FakeOperator, events: list[tuple[str, str]]) -> None:
        self.server = server
        self.operator = operator
        self.events = events
        self.authority = server.url.removeprefix("http://")

    def connect(self) -> socket.socket:
        host, port = self.server.socket.getsockname()[:2]
        return socket.create_connection((host, port), timeout=PATIENCE)

    def head(self, method: str, path: str, **fields: str) -> bytes:
        """A request's head; a field's name has _ for -, and "" leaves it out."""
        fields = {"Host": self.authority, **fields}
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value]
        return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode()

    def say(self, octets: bytes, method: str = "GET") -> Answer:
        with self.connect() as sock:
            sock.sendall(octets)
            return read_response(sock, method)

    def ask(self, method: str, path: str, **fields: str) -> Answer:
        return self.say(self.head(method, path, **fields), method)

    def change(self, method: str, path: str, body: bytes | dict[str, Any] | None = None, **fields: str) -> Answer:
        """A request with the right token, and a body that is as it should be, unless the fields say otherwise."""
        fields = {"Authorization": f"Bearer {TOKEN}", **fields}
        octets = json.dumps(body).encode() if isinstance(body, dict) else body or b""
        if body is not None:
            fields = {"Content_Type": "application/json", "Content_Length": str(len(octets)), **fields}
        return self.say(self.head(method, path, **fields) + octets, method)


@contextmanager
def serving(token: str = TOKEN, host: str = "127.0.0.1", **options: Any) -> Iterator[Port]:
    events: list[tuple[str, str]] = []
    operator = FakeOperator()
    server = AdminServer(AdminPort(host=host, port=0), token, operator, lambda *event: events.append(event), **options)
    try:
        server.start()
        yield Port(server, operator, events)
    finally:
        server.stop()


@pytest.fixture
def port() -> Iterator[Port]:
    with serving() as port:
        yield port


@pytest.fixture(autouse=True)
def nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """http.server writes each request there, and socketserver each traceback."""
    yield
    assert capfd.readouterr().err == ""


def error(answer: Answer) -> str:
    """The line of an answer that is an error."""
    assert answer.headers["Content-Type"] == "application/json"
    text = json.loads(answer.body)
    assert list(text) == ["error"]
    assert "\n" not in text["error"]
    return text["error"]


# What there is to read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("/api/status", {"state": "serving", "note": None}),
        ("/api/backends", {"backends": [BACKEND, {**BACKEND, "id": "a/ä"}]}),
        ("/api/backends/1", BACKEND),
        ("/api/backends/a%2F%C3%A4", {**BACKEND, "id": "a/ä"}),
        ("/api/events", {"events": [{"at": 1.5, "level": "info", "text": "start"}]}),
        ("/api/requests", {"requests": [{"id": "r-1", "status": 503}]}),
        ("/api/requests/r-1", {"id": "r-1", "tries": []}),
        ("/api/requests/%72-1", {"id": "r-1", "tries": []}),
        ("/api/config", {"servers": []}),
    ],
)
def test_figures_are_json_and_need_no_token(port, path, value):
    answer = port.ask("GET", path)
    assert (answer.status, json.loads(answer.body)) == (200, value)
    assert answer.headers["Content-Type"] == "application/json"


def test_metrics_have_the_media_type_of_the_text_format(port):
    """Prometheus 3 refuses to guess it."""
    answer = port.ask("GET", "/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.body == b"# TYPE up gauge\nup 1\n"


def test_healthz_turns_to_503_as_a_drain_begins(port):
    for draining, status, body in ((False, 200, b"ok\n"), (True, 503, b"draining\n")):
        port.operator.draining = draining
        answer = port.ask("GET", "/healthz")
        assert (answer.status, answer.body) == (status, body)


@pytest.mark.parametrize("fields", [b"", b"Host: whatever.example\r\n", b"Host: \xff\r\n"])
def test_healthz_is_for_whoever_stands_in_front_of_us(port, fields):
    """HAProxy's probe has no Host, and others have the name that they know us by."""
    assert port.say(b"GET /healthz HTTP/1.0\r\n" + fields + b"\r\n").status == 200


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/api/status", "/api/backends/1", "/nothing"])
def test_head_is_get_without_the_body(port, path):
    head, get = port.ask("HEAD", path), port.ask("GET", path)
    assert (head.status, head.body) == (get.status, b"")
    assert head.headers["Content-Length"] == get.headers["Content-Length"] == str(len(get.body))
    assert head.headers["Content-Type"] == get.headers["Content-Type"]


@pytest.mark.parametrize(
    "path", ["/nothing", "/api", "/api/", "/api/backends/", "/api/backends/1/x", "/page.html", "*"]
)
def test_an_unknown_path_is_told_what_there_is(port, path):
    answer = port.ask("GET", path)
    assert answer.status == 404
    assert "/api/status" in error(answer)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/", "GET, HEAD"),
        ("DELETE", "/api/backends", "GET, POST, HEAD"),
        ("PUT", "/api/backends/1", "GET, PATCH, DELETE, HEAD"),
        ("GET", "/api/reload", "POST"),
        ("HEAD", "/api/reload", "POST"),
        ("OPTIONS", "/api/status", "GET, HEAD"),
        ("BREW", "/healthz", "GET, HEAD"),
    ],
)
def test_another_method_is_told_which_there_are(port, method, path, allow):
    answer = port.ask(method, path)
    assert (answer.status, answer.headers["Allow"]) == (405, allow)


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/api/backends/9", 404, 'no backend with the id "9" is there; GET /api/backends lists'),
        ("/api/requests/9", 404, 'no request with the id "9" is kept; GET /api/requests lists'),
        ("/api/backends/%FF", 400, "not percent-encoded UTF-8"),
        ("/api/status?x=1", 400, 'unknown query parameter "x"; there is none'),
        ("/api/backends?persist=1", 400, 'unknown query parameter "persist"; there is none'),
        ("/api/status?x", 400, "NAME=VALUE"),
        ("/?" + "&".join(["a=1"] * 100), 400, "NAME=VALUE"),
    ],
)
def test_what_cannot_be_read_is_explained(port, path, status, words):
    answer = port.ask("GET", path)
    assert answer.status == status
    assert words in error(answer)


# The page ----------------------------------------------------------------------------------------------------------


def test_nothing_from_outside_can_work_in_the_page(port):
    answer = port.ask("GET", "/")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert answer.body == admin.PAGE.read_bytes()
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)


def test_every_script_and_style_of_the_page_is_let_in_by_its_hash(port):
    page = admin.PAGE.read_text(encoding="utf-8")
    policy = port.ask("GET", "/").headers["Content-Security-Policy"]
    for kind in ("script", "style"):
        texts = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        assert len(texts) == len(re.findall(rf"<{kind}\b", page)) >= 1
        for text in texts:
            assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_a_page_without_scripts_allows_none():
    assert "script-src 'none'; style-src 'none'" in page_policy("<p>hello")


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/api/status", "/nothing"])
def test_every_answer_is_neither_kept_nor_guessed_at_nor_framed(port, path):
    fields = port.ask("GET", path).headers
    assert fields["Cache-Control"] == "no-store"
    assert fields["X-Content-Type-Options"] == "nosniff"
    assert fields["Referrer-Policy"] == "no-referrer"
    assert fields["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "frame-ancestors 'none'" in fields["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in fields
    assert "Set-Cookie" not in fields
    assert "Server" not in fields


# Changes -----------------------------------------------------------------------------------------------------------


def test_add_answers_with_the_backend_and_where_it_is(port):
    answer = port.change("POST", "/api/backends", {"id": "x/y", "host": "127.0.0.1", "port": 8002})
    assert (answer.status, json.loads(answer.body)) == (201, {"id": "x/y"})
    assert answer.headers["Location"] == "/api/backends/x%2Fy"
    [(what, entry, who, persist)] = port.operator.done
    assert (what, entry, persist) == ("add", {"id": "x/y", "host": "127.0.0.1", "port": 8002}, False)
    assert re.fullmatch(r"admin 127\.0\.0\.1:[0-9]+", who)


def test_change_passes_on_what_was_sent_and_answers_with_the_backend(port):
    changes = {"state": "drain", "weight": 3, "max_connections": 0}
    answer = port.change("PATCH", "/api/backends/1", changes)
    assert (answer.status, json.loads(answer.body)) == (200, BACKEND)
    [(what, id, given, _, persist)] = port.operator.done
    assert (what, id, given, persist) == ("change", "1", changes, False)


def test_remove_and_reload(port):
    answer = port.change("DELETE", "/api/backends/a%2F%C3%A4")
    assert (answer.status, json.loads(answer.body)) == (200, {"removed": "a/ä"})
    answer = port.change("POST", "/api/reload")
    assert (answer.status, json.loads(answer.body)) == (200, {"changed": ["servers[0].weight: 1 -> 2"]})
    assert [done[0] for done in port.operator.done] == ["remove", "reload"]


@pytest.mark.parametrize(("value", "persist"), [("1", True), ("true", True), ("0", False), ("false", False)])
def test_persist_goes_with_each_change_of_a_backend(port, value, persist):
    port.change("POST", f"/api/backends?persist={value}", {"host": "h", "port": 1})
    port.change("PATCH", f"/api/backends/1?persist={value}", {"weight": 2})
    port.change("DELETE", f"/api/backends/1?persist={value}")
    assert [done[-1] for done in port.operator.done] == [persist] * 3


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("DELETE", "/api/backends/1?persist=yes", "persist must be 1, true, 0, false"),
        ("DELETE", "/api/backends/1?persist=", "persist must be 1, true, 0, false"),
        ("DELETE", "/api/backends/1?persist=1&persist=0", "more than once"),
        ("DELETE", "/api/backends/1?presist=1", 'unknown query parameter "presist"; did you mean "persist"?'),
        ("DELETE", "/api/backends/1?force=1", 'unknown query parameter "force"; there is persist'),
        ("POST", "/api/reload?persist=1", 'unknown query parameter "persist"; there is none'),
    ],
)
def test_a_query_that_says_anything_else_changes_nothing(port, method, path, words):
    answer = port.change(method, path)
    assert answer.status == 400
    assert words in error(answer)
    assert port.operator.done == []


def raising(exception: Exception) -> Callable[[], object]:
    def refuse() -> object:
        raise exception

    return refuse


@pytest.mark.parametrize(
    ("exception", "status", "words"),
    [
        (ConfigError("weight: must be 1 to 256,\nnot 0"), 422, "weight: must be 1 to 256, not 0"),
        (KeyError("9"), 404, 'no backend with the id "9"'),
        (ValueError("backend 9 is the last one"), 409, "backend 9 is the last one"),
        (PermissionError(13, "Permission denied", "servers.json"), 500, "servers.json: Permission denied"),
    ],
)
def test_the_operators_refusals_have_a_status_each(port, exception, status, words):
    port.operator.on_change = raising(exception)
    for answer in (port.change("PATCH", "/api/backends/9", {"weight": 0}), port.change("DELETE", "/api/backends/9")):
        assert answer.status == status
        assert words in error(answer)
    assert port.events == []


def test_a_backend_that_left_in_the_meantime_is_not_there(port):
    port.operator.on_change = port.operator.status.known.clear
    assert port.change("PATCH", "/api/backends/1", {"weight": 2}).status == 404


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "nothing to change; give state, weight and max_connections"),
        ({"wieght": 2}, 422, 'unknown key "wieght"; did you mean "weight"?'),
        ({"host": "x"}, 422, 'unknown key "host"; there is state, weight and max_connections'),
        (b"", 400, "not JSON: line 1, column 1"),
        (b'{"weight": 2', 400, "not JSON: line 1, column 13"),
        (b"\xff{}", 400, "not UTF-8"),
        (b"[" * 60_000, 400, "nested too deeply"),
        (b'{"weight": ' + b"9" * 6000 + b"}", 400, "a number that is too long"),
        (b'{"weight": 1, "weight": 2}', 400, "a key twice"),
        (b"[]", 422, "must be a JSON object"),
        (b'"drain"', 422, "must be a JSON object"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_body_that_is_wrong_changes_nothing(port, body, status, words):
    answer = port.change("PATCH", "/api/backends/1", body)
    assert answer.status == status
    assert words in error(answer)
    assert port.operator.done == []


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"Content_Type": ""}, 415, "send Content-Type: application/json"),
        ({"Content_Type": "text/plain"}, 415, "send Content-Type: application/json"),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415, "send Content-Type: application/json"),
        ({"Content_Length": ""}, 411, "Content-Length"),
        ({"Transfer_Encoding": "chunked"}, 411, "not chunked"),
        ({"Content_Length": "65537"}, 413, "65536"),
        ({"Content_Length": "9" * 18}, 413, "65536"),
        ({"Content_Length": "-1"}, 400, "one number"),
        ({"Content_Length": "1_0"}, 400, "one number"),
        ({"Content_Length": "2, 2"}, 400, "one number"),
        ({"Content_Length": "2\r\nContent-Length: 2"}, 400, "one number"),
    ],
)
def test_a_body_is_taken_in_one_way_only(port, fields, status, words):
    answer = port.change("PATCH", "/api/backends/1", b"{}", **fields)
    assert answer.status == status
    assert words in error(answer)


def test_json_may_name_its_charset(port):
    answer = port.change("PATCH", "/api/backends/1", {"weight": 2}, Content_Type="Application/JSON; charset=utf-8")
    assert answer.status == 200


def test_a_body_that_ends_early_changes_nothing(port):
    with port.connect() as sock:
        fields = {"Authorization": f"Bearer {TOKEN}", "Content_Type": "application/json", "Content_Length": "20"}
        sock.sendall(port.head("PATCH", "/api/backends/1", **fields) + b'{"weight": 2}')
        sock.shutdown(socket.SHUT_WR)
        answer = read_response(sock)
    assert (answer.status, error(answer)) == (400, "the body ended after 13 of 20 octets")
    assert port.operator.done == []


def test_a_body_that_is_refused_does_not_cost_the_client_its_answer(port):
    """A socket that is closed with unread octets resets, and takes the answer along (RFC 9112, 9.6)."""
    with port.connect() as sock:
        length = 1_000_000
        fields = {"Authorization": f"Bearer {TOKEN}", "Content_Type": "application/json"}
        sock.sendall(port.head("POST", "/api/backends", Content_Length=str(length), **fields) + b" " * length)
        assert read_response(sock).status == 413


def test_a_body_is_asked_for_only_when_it_is_wanted(port):
    """RFC 9110, 10.1.1: a client that expects 100 need not send what would be refused."""
    fields = {"Content_Type": "application/json", "Content_Length": "13", "Expect": "100-continue"}
    with port.connect() as sock:
        sock.sendall(port.head("PATCH", "/api/backends/1", **fields))
        assert sock.makefile("rb").readline() == b"HTTP/1.1 401 Unauthorized\r\n"
    with port.connect() as sock, sock.makefile("rb") as file:
        sock.sendall(port.head("PATCH", "/api/backends/1", Authorization=f"Bearer {TOKEN}", **fields))
        assert (file.readline(), file.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")
        sock.sendall(b'{"weight": 2}')
        assert read_response(file).status == 200


# The token ---------------------------------------------------------------------------------------------------------

ALL_CHANGES = [
    ("POST", "/api/backends", {"host": "h", "port": 1}),
    ("PATCH", "/api/backends/1", {"state": "maint"}),
    ("DELETE", "/api/backends/1", None),
    ("POST", "/api/reload", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ALL_CHANGES)
def test_nothing_can_be_changed_where_no_token_is_configured(method, path, body):
    with serving(token="") as port:
        for authorization in ("", "Bearer ", "Bearer", f"Bearer {TOKEN}"):
            answer = port.change(method, path, body, Authorization=authorization)
            assert answer.status == 403
            assert "LB_ADMIN_TOKEN" in error(answer)
            assert "admin.token_file" in error(answer)
        assert port.operator.done == []


@pytest.mark.parametrize(("method", "path", "body"), ALL_CHANGES)
def test_every_change_needs_the_token(port, method, path, body):
    answer = port.change(method, path, body, Authorization="")
    assert answer.status == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer ")
    assert "send Authorization: Bearer TOKEN" in error(answer)
    assert port.operator.done == []


@pytest.mark.parametrize(
    "authorization",
    [
        "Bearer wrong-horse-battery",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN.upper()}",
        f"Bearer x {TOKEN}",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer",
        "Bearer \u00e4\u00f6\u20ac",
        "Bearer \x00",
    ],
)
def test_a_token_that_is_not_the_one_is_refused(port, authorization):
    answer = port.change("POST", "/api/reload", Authorization=authorization)
    assert (answer.status, port.operator.done) == (401, [])


def test_octets_that_are_no_text_are_no_token(port):
    head = port.head("POST", "/api/reload").removesuffix(b"\r\n") + b"Authorization: Bearer \xff\xfe\r\n\r\n"
    assert port.say(head).status == 401


@pytest.mark.parametrize("authorization", [f"bearer {TOKEN}", f"BEARER   {TOKEN} "])
def test_the_scheme_is_a_word_in_any_case(port, authorization):
    """RFC 9110, 11.1."""
    assert port.change("POST", "/api/reload", Authorization=authorization).status == 200


def test_a_token_of_any_characters_is_compared_octet_by_octet():
    with serving(token="schlüssel-€") as port:
        assert port.change("POST", "/api/reload", Authorization="Bearer schlüssel-€").status == 200
        assert port.change("POST", "/api/reload", Authorization="Bearer schlüssel-E").status == 401


def test_the_token_is_compared_in_constant_time(port, monkeypatch):
    compared = []
    compare_digest = hmac.compare_digest

    def compare(given: bytes, token: bytes) -> bool:
        compared.append((given, token))
        return compare_digest(given, token)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert port.change("POST", "/api/reload", Authorization="Bearer wrong").status == 401
    assert port.change("POST", "/api/reload").status == 200
    assert compared == [(b"wrong", TOKEN.encode()), (TOKEN.encode(), TOKEN.encode())]


def test_the_token_is_in_no_answer_and_in_no_line_of_the_log():
    now = [0.0]
    with serving(clock=lambda: now[0]) as port:
        answers = []
        failing = [None, RuntimeError("bug"), ConfigError("wrong"), KeyError("1"), ValueError("not as things are")]
        for exception in failing:
            port.operator.on_change = raising(exception) if exception else lambda: None
            for method, path, body in ALL_CHANGES:
                answers.append(port.change(method, path, body))
                answers.append(port.change(method, path, b"{"))
                answers.append(port.change(method, path, body, Authorization=f"Basic {TOKEN}"))
                answers.append(port.change(method, path, body, Host="evil.example"))
                answers.append(port.change(method, path, body, Origin="http://evil.example"))
                now[0] += admin.QUIET
        answers += [port.ask("GET", path, Authorization=f"Bearer {TOKEN}") for path in admin.PATHS]
        answers.append(port.say(f"nonsense {TOKEN}\r\n\r\n".encode()))
        answers.append(port.say(f"GET /{TOKEN} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()))
        answers.append(port.say(f"GET /{TOKEN} HTTP/9\r\n\r\n".encode()))
        answers.append(port.ask("DELETE", f"/api/backends/{TOKEN}"))
        assert len({answer.status for answer in answers}) > 7
        assert port.events
        for answer in answers:
            assert TOKEN.encode() not in answer.body
            assert TOKEN not in str(answer.headers)
        assert TOKEN not in str(port.events)


def test_a_refused_change_is_a_warning_that_nobody_can_flood_the_log_with():
    now = [100.0]
    with serving(clock=lambda: now[0]) as port:
        for _ in range(20):
            port.change("PATCH", "/api/backends/1", {"weight": 2}, Authorization="Bearer guess")
        [(level, text)] = port.events
        assert level == "warning"
        line = r"admin 127\.0\.0\.1:[0-9]+: PATCH /api/backends/ID was refused: the token is wrong; .*"
        assert re.fullmatch(line, text)
        now[0] += admin.QUIET
        eventually(lambda: len(port.events) == 2, "the rest is told when it is time")
        assert re.fullmatch(line + r" \(the last of 19 since the line before\)", port.events[1][1])


def test_reads_and_mistakes_are_no_warnings(port):
    port.ask("GET", "/api/status", Authorization="Bearer wrong")
    port.ask("GET", "/api/status", Host="evil.example")
    port.change("PATCH", "/api/backends/1", {"wieght": 1})
    port.change("PATCH", "/api/backends/1?persist=2", {"weight": 1})
    assert port.events == []


def test_a_sparing_voice_speaks_again_after_a_while():
    now, lines = [0.0], []
    voice = Sparing("warning", lambda *line: lines.append(line), lambda: now[0])
    voice.flush()
    assert lines == []
    for text in "abc":
        voice.say(text)
    assert lines == [("warning", "a")]
    now[0] += admin.QUIET
    voice.say("d")
    assert lines[1:] == [("warning", "d (the last of 3 since the line before)")]
    now[0] += admin.QUIET
    voice.flush()
    assert len(lines) == 2


# Where the token comes from ----------------------------------------------------------------------------------------


def test_the_environment_wins_over_the_file(tmp_path):
    file = tmp_path / "token"
    file.write_text("\ufeffin-the-file\r\n")
    port = AdminPort(token_file=str(file))
    assert find_token(port, {}) == "in-the-file"
    assert find_token(port, {"LB_ADMIN_TOKEN": " in-the-environment\n"}) == "in-the-environment"
    assert find_token(port, {"LB_ADMIN_TOKEN": "  "}) == "in-the-file"
    missing = AdminPort(token_file=str(tmp_path / "missing"))
    assert find_token(missing, {"LB_ADMIN_TOKEN": "in-the-environment"}) == "in-the-environment"


def test_no_token_is_needed_to_read_on_loopback():
    assert find_token(AdminPort(), {}) == ""


def test_a_port_that_is_off_has_no_token(tmp_path):
    assert find_token(AdminPort(host="", port=0, token_file=str(tmp_path / "missing")), {"LB_ADMIN_TOKEN": "x"}) == ""


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty; make one with: "),
        (" \n\n", "is empty; make one with: "),
        ("seven77", "8 to 1024 visible ASCII characters"),
        ("x" * 1025, "8 to 1024 visible ASCII characters"),
        ("two words here", "8 to 1024 visible ASCII characters"),
        ("line-one-x\nline-two-x", "8 to 1024 visible ASCII characters"),
        ("schlüsselwort", "8 to 1024 visible ASCII characters"),
    ],
)
def test_a_token_file_of_no_use_is_named_and_not_quoted(tmp_path, text, problem):
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_token(AdminPort(token_file=str(file)), {})
    assert str(caught.value).startswith(f"admin.token_file: {file}: ")
    assert problem in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not text.strip() or text.strip() not in str(caught.value)


def test_a_token_file_that_cannot_be_read_is_named(tmp_path):
    for path, problem in ((tmp_path / "missing", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"^admin.token_file: {path}: cannot be read: {problem}; mend that, or"):
            find_token(AdminPort(token_file=str(path)), {})


def test_a_token_in_the_environment_is_looked_at_too():
    with pytest.raises(ConfigError, match=r"^LB_ADMIN_TOKEN: a token is 8 to"):
        find_token(AdminPort(), {"LB_ADMIN_TOKEN": "short"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "lb.example", "::ffff:192.0.2.1"])
def test_a_port_that_others_can_reach_needs_a_token(host):
    with pytest.raises(ConfigError, match=r"^admin\.address: .*:8404 can be reached .* or listen on 127\.0\.0\.1$"):
        find_token(AdminPort(host=host), {})
    assert find_token(AdminPort(host=host), {"LB_ADMIN_TOKEN": TOKEN}) == TOKEN


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "Localhost.", "::ffff:127.0.0.1"])
def test_loopback_in_all_its_spellings(host):
    assert is_loopback(host)
    assert find_token(AdminPort(host=host), {}) == ""


def test_a_token_file_that_anybody_can_read_is_a_warning(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    for mode, warnings in ((0o600, 0), (0o640, 0), (0o644, 1)):
        file.chmod(mode)
        events: list[tuple[str, str]] = []
        address = AdminPort(port=0, token_file=str(file))
        server = AdminServer(address, TOKEN, FakeOperator(), lambda *event, to=events: to.append(event))
        server.start()
        server.stop()
        assert [level for level, _ in events] == ["warning"] * warnings
        assert all(str(file) in text for _, text in events)


# Other origins, other names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        ({}, True),
        ({"Origin": "http://{authority}"}, True),
        ({"Origin": "HTTP://{authority}"}, True),
        ({"Origin": "https://{authority}"}, True),
        ({"Origin": "http://{authority}", "Sec_Fetch_Site": "same-origin"}, True),
        ({"Sec_Fetch_Site": "none"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://127.0.0.1:1"}, False),
        ({"Origin": "http://127.0.0.1"}, False),
        ({"Origin": "http://localhost"}, False),
        ({"Origin": "http://{authority}.evil.example"}, False),
        ({"Origin": "file://{authority}"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://{authority}\r\nOrigin: http://evil.example"}, False),
        ({"Sec_Fetch_Site": "cross-site"}, False),
        ({"Sec_Fetch_Site": "same-site"}, False),
        ({"Origin": "http://{authority}", "Sec_Fetch_Site": "cross-site"}, False),
    ],
)
def test_another_origin_changes_nothing_even_with_the_token(port, fields, may):
    fields = {name: value.replace("{authority}", port.authority) for name, value in fields.items()}
    for method, path, body in ALL_CHANGES:
        answer = port.change(method, path, body, **fields)
        assert (answer.status == 403) is not may
        assert may or "another origin" in error(answer)
    assert len(port.operator.done) == (len(ALL_CHANGES) if may else 0)


def test_a_page_behind_a_forwarded_port_may_change(port):
    fields = {"Host": "localhost:9000", "Origin": "http://localhost:9000", "Sec_Fetch_Site": "same-origin"}
    assert port.change("POST", "/api/reload", **fields).status == 200


def test_no_preflight_is_ever_granted(port):
    answer = port.ask("OPTIONS", "/api/backends/1", Origin="http://evil.example", Access_Control_Request_Method="PATCH")
    assert answer.status == 405
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("path", ["/", "/metrics", "/api/status", "/api/backends/1", "/api/requests", "/api/config"])
def test_a_name_that_was_made_to_lead_here_reads_nothing(port, path):
    """DNS rebinding: its page would be of our origin, as the browser sees it."""
    answer = port.ask("GET", path, Host=f"rebound.example:{port.authority.rpartition(':')[2]}")
    assert answer.status == 403
    assert 'the name "rebound.example"' in error(answer)
    assert "DNS rebinding" in error(answer)


def fields_of(**fields: str) -> Message:
    message = Message()
    for name, value in fields.items():
        message[name] = value
    return message


def admitted(gate: Gate, host: str, **fields: str) -> bool:
    try:
        gate.check_host(fields_of(Host=host, **fields))
    except Refused as refused:
        assert refused.status == 403
        return False
    return True


EVERYWHERE = ["127.0.0.1", "127.0.0.1:8404", "[::1]:8404", "localhost", "LocalHost:9000", "localhost.", "192.0.2.7:80"]
NOWHERE = [
    "evil.example",
    "evil.example:8404",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "0x7f.0.0.1",
]


@pytest.mark.parametrize("address", [AdminPort(), AdminPort("192.0.2.1"), AdminPort("0.0.0.0"), AdminPort("::")])
def test_addresses_and_localhost_are_nobodys_to_rebind(address):
    gate = Gate(address, TOKEN)
    assert [host for host in EVERYWHERE if not admitted(gate, host)] == []
    assert [host for host in NOWHERE if admitted(gate, host)] == []


def test_a_configured_name_is_answered_to():
    gate = Gate(AdminPort("lb.example"), TOKEN)
    assert admitted(gate, "LB.example:8404")
    assert not admitted(gate, "x.lb.example:8404")


def test_names_without_a_dot_are_answered_to_where_others_can_reach_the_port(monkeypatch):
    """Nobody can own such a name; it is a container's or a neighbour's. On loopback none but localhost is of use."""
    monkeypatch.setattr(socket, "gethostname", lambda: "LB1.internal")
    assert admitted(Gate(AdminPort("192.0.2.1"), TOKEN), "lb:8404")
    assert admitted(Gate(AdminPort("192.0.2.1"), TOKEN), "lb1.internal:8404")
    assert not admitted(Gate(AdminPort(), TOKEN), "lb:8404")
    assert not admitted(Gate(AdminPort(), TOKEN), "lb1.internal:8404")


@pytest.mark.parametrize("address", [AdminPort(), AdminPort("192.0.2.1")])
def test_the_token_opens_the_port_by_any_name(address):
    gate = Gate(address, TOKEN)
    assert admitted(gate, "lb.example", Authorization=f"Bearer {TOKEN}")
    assert not admitted(gate, "lb.example", Authorization="Bearer wrong")
    assert not admitted(Gate(AdminPort(), ""), "lb.example", Authorization="Bearer ")


@pytest.mark.parametrize(
    "host", ["", "a b", "x@127.0.0.1", "127.0.0.1:8404:1", "[::1", "::1", "http://127.0.0.1", "\xe4"]
)
def test_a_host_that_is_none_is_a_bad_request(host):
    with pytest.raises(Refused) as caught:
        Gate(AdminPort(), TOKEN).check_host(fields_of(Host=host))
    assert caught.value.status == 400


@pytest.mark.parametrize("fields", [b"", b"Host: localhost\r\nHost: localhost\r\n"])
def test_a_request_has_one_host(port, fields):
    """RFC 9112, 3.2."""
    assert port.say(b"GET /api/status HTTP/1.1\r\n" + fields + b"\r\n").status == 400


# Clients of all kinds ----------------------------------------------------------------------------------------------


def test_a_connection_has_one_request(port):
    """What follows it is read and dropped, so that the answer arrives before the end, and no reset."""
    with port.connect() as sock, sock.makefile("rb") as file:
        request = port.head("GET", "/healthz")
        sock.sendall(request + request + port.head("POST", "/api/reload", Authorization=f"Bearer {TOKEN}"))
        answer = read_response(file)
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
        assert file.read() == b""
    assert port.operator.done == []


@pytest.mark.parametrize("cut", [1, 2, 4, 30])
def test_half_a_request_is_not_acted_on(port, cut):
    """http.server takes the end of the stream for the end of the head."""
    head = port.head("POST", "/api/reload", Authorization=f"Bearer {TOKEN}")
    with port.connect() as sock:
        sock.sendall(head[:-cut])
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    assert port.operator.done == []


@pytest.mark.parametrize(
    ("octets", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST /api/reload\r\n\r\n", 400),
        (b"GET / HTTP/1.1 x\r\n\r\n", 400),
        (b"GET / HTTP/one\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"GET /" + b"x" * 70_000, 431),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 102 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000, 431),
        (b"GET /healthz\r\n\r\n", 200),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_request_is_answered_in_json_too(port, octets, status):
    answer = port.say(octets)
    assert answer.status == status
    assert status == 200 or error(answer)
    assert port.events == []


def test_a_silent_client_is_cut():
    with serving(patience=0.1) as port, port.connect() as silent, port.connect() as half:
        half.sendall(b"GET / HTTP/1.1\r\nHost: ")
        assert silent.recv(1) == b""
        assert half.recv(1) == b""
        assert port.events == []


def test_a_client_that_drips_is_cut():
    """Each octet comes in time, the request never does."""
    with serving(patience=0.1) as port, port.connect() as sock:
        sock.settimeout(0.02)
        sock.sendall(b"GET / HTTP/1.1\r\nX: ")

        def is_cut() -> bool:
            try:
                sock.sendall(b"x")
                return sock.recv(1) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        eventually(is_cut)


def test_a_client_that_takes_no_answer_is_cut():
    with serving(patience=0.1) as port, socket.socket() as sock:
        port.operator.status.on_status = lambda: "x" * 20_000_000
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(port.server.socket.getsockname())
        sock.sendall(port.head("GET", "/api/status"))
        eventually(lambda: not handlers(), "its thread ends")
        assert port.events == []


def handlers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("admin-")]


def test_silent_clients_keep_nobody_out():
    """The one that has waited longest makes room; the number of threads is bounded."""
    with serving(most=8) as port, ExitStack() as stack:
        silent = [stack.enter_context(port.connect()) for _ in range(200)]
        for _ in range(20):
            assert port.ask("GET", "/healthz").status == 200
            assert len(handlers()) <= 16  # some may be about to end
        assert silent[0].recv(1) == b""


def test_a_slow_operator_keeps_no_other_client_waiting(port):
    asked, go_on = threading.Event(), threading.Event()

    def think() -> None:
        asked.set()
        go_on.wait(PATIENCE)

    port.operator.status.on_status = think
    with port.connect() as slow:
        slow.sendall(port.head("GET", "/api/status"))
        assert asked.wait(PATIENCE)
        assert port.ask("GET", "/healthz").status == 200
        go_on.set()
        assert read_response(slow).status == 200


def test_what_is_being_worked_on_is_never_cut(monkeypatch):
    """Neither for its time nor for another client; that one is let go when there is no room."""
    monkeypatch.setattr(admin, "ROOM_PATIENCE", 0.05)
    asked, go_on = threading.Event(), threading.Event()

    def think() -> None:
        asked.set()
        go_on.wait(PATIENCE)

    now = [0.0]
    with serving(clock=lambda: now[0], most=1) as port, port.connect() as sock:
        port.operator.on_change = think
        sock.sendall(port.head("POST", "/api/reload", Authorization=f"Bearer {TOKEN}"))
        assert asked.wait(PATIENCE)
        with port.connect() as other:
            assert other.recv(1) == b""
        now[0] += 1_000_000
        port.server.service_actions()
        go_on.set()
        assert read_response(sock).status == 200


def test_a_client_that_leaves_is_nothing(port):
    asked, go_on = threading.Event(), threading.Event()

    def think() -> str:
        asked.set()
        go_on.wait(PATIENCE)
        return "x" * 1_000_000

    port.operator.status.on_status = think
    with port.connect() as sock:
        sock.sendall(port.head("GET", "/api/status"))
        assert asked.wait(PATIENCE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    go_on.set()
    eventually(lambda: not handlers())
    assert port.events == []


@pytest.mark.parametrize("exception", [RuntimeError("a\nb"), ZeroDivisionError(), KeyError("x"), OSError(5, "broken")])
def test_a_crash_is_an_answer_and_a_line(port, exception):
    port.operator.status.on_status = raising(exception)
    answer = port.ask("GET", "/api/status")
    assert answer.status == 500
    assert type(exception).__name__ in error(answer)
    [(level, text)] = port.events
    assert level == "error"
    assert re.fullmatch(
        rf"admin 127.*: GET /api/status: bug: {type(exception).__name__}: .* \(test_admin.py:\d+\)", text
    )
    assert port.ask("GET", "/healthz").status == 200


def test_a_figure_that_json_cannot_say_is_a_crash_and_no_broken_json(port):
    port.operator.status.on_status = lambda: float("nan")
    assert port.ask("GET", "/api/status").status == 500


def test_a_key_that_is_missing_where_no_id_was_given_is_a_crash(port):
    port.operator.on_change = raising(KeyError("port"))
    assert port.change("POST", "/api/backends", {"host": "h"}).status == 500
    assert port.change("POST", "/api/reload").status == 500


# The server --------------------------------------------------------------------------------------------------------


def test_figures_are_sampled_once_a_second():
    now, operator = [0.0], FakeOperator()
    server = AdminServer(AdminPort(port=0), TOKEN, operator, pytest.fail, clock=lambda: now[0])
    try:
        sampled = []
        for tick in range(40):
            now[0] = tick / 4
            server.service_actions()
            sampled.append(operator.status.sampled)
        assert sampled[::4] == list(range(1, 11))
        now[0] += 100.0  # a suspended machine: what was missed is not made up for
        for _ in range(3):
            server.service_actions()
        assert operator.status.sampled == 11
    finally:
        server.stop()


def test_sampling_goes_on_by_itself_and_survives_a_crash():
    now = [0.0]
    with serving(clock=lambda: now[0]) as port:
        port.operator.status.on_sample = raising(RuntimeError("no figures"))
        eventually(lambda: port.operator.status.sampled == 1)
        now[0] += admin.SAMPLE
        eventually(lambda: port.operator.status.sampled == 2)
        eventually(lambda: port.events)
        assert [level for level, _ in port.events] == ["error"]
        assert "sampling: bug: RuntimeError: no figures" in port.events[0][1]
        assert port.ask("GET", "/healthz").status == 200


def test_a_shortage_of_descriptors_is_waited_out(monkeypatch):
    """The client stays in the backlog and the port readable, so that without a pause the loop would spin."""
    monkeypatch.setattr(admin, "PAUSE", 0.05)

    class Short(socket.socket):
        def accept(self) -> Any:
            raise OSError(errno.EMFILE, "Too many open files")

    server = AdminServer(AdminPort(port=0), "", FakeOperator(), pytest.fail)
    server.socket = Short(fileno=server.socket.detach())
    began = time.monotonic()
    with pytest.raises(OSError, match="Too many open files"):
        server.get_request()
    assert time.monotonic() - began >= 0.05
    server.stop()


def test_stop_ends_open_connections_at_once():
    with ExitStack() as stack:
        with serving() as port:
            silent, half, answered = (stack.enter_context(port.connect()) for _ in range(3))
            half.sendall(b"GET / HT")
            answered.sendall(port.head("GET", "/healthz"))
            assert read_response(answered).status == 200
            eventually(lambda: len(handlers()) == 3)
            began = time.monotonic()
        assert time.monotonic() - began < admin.STOP_PATIENCE / 2
        assert handlers() == []
        assert silent.recv(1) == half.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port.authority.rpartition(":")[2])))


def test_stop_lets_a_change_end_and_answer():
    asked, go_on = threading.Event(), threading.Event()

    def think() -> None:
        asked.set()
        go_on.wait(PATIENCE)

    with serving() as port, port.connect() as sock:
        port.operator.on_change = think
        sock.sendall(port.head("POST", "/api/reload", Authorization=f"Bearer {TOKEN}"))
        assert asked.wait(PATIENCE)
        stop = threading.Thread(target=port.server.stop)
        stop.start()
        eventually(lambda: port.server.socket.fileno() < 0, "the port is closed")
        go_on.set()
        assert read_response(sock).status == 200
        sock.close()
        stop.join(PATIENCE)
        assert not stop.is_alive()


def test_stop_does_not_wait_for_ever_for_an_operator(monkeypatch):
    monkeypatch.setattr(admin, "STOP_PATIENCE", 0.05)
    asked, go_on = threading.Event(), threading.Event()

    def think() -> None:
        asked.set()
        go_on.wait(PATIENCE)

    with serving() as port, port.connect() as sock:
        port.operator.on_change = think
        sock.sendall(port.head("POST", "/api/reload", Authorization=f"Bearer {TOKEN}"))
        assert asked.wait(PATIENCE)
        port.server.stop()
        assert port.events == [("error", "admin: requests that did not end: 1")]
        go_on.set()


def test_stop_may_come_before_start_and_twice():
    server = AdminServer(AdminPort(port=0), "", FakeOperator(), pytest.fail)
    server.stop()
    with serving() as port:
        port.server.stop()


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(OSError, match=f"^cannot listen on 127.0.0.1:{taken}: Address already in use$"):
            AdminServer(AdminPort(port=taken), "", FakeOperator(), pytest.fail)


def test_a_page_that_is_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(admin, "PAGE", tmp_path / "page.html")
    with pytest.raises(OSError, match=r"^cannot read .*page\.html: No such file or directory$"):
        AdminServer(AdminPort(port=0), "", FakeOperator(), pytest.fail)


def test_ipv6():
    with serving(host="::1") as port:
        assert re.fullmatch(r"http://\[::1\]:[0-9]+", port.server.url)
        assert port.change("POST", "/api/reload", Origin=port.server.url).status == 200
        assert re.fullmatch(r"admin \[::1\]:[0-9]+", port.operator.done[0][1])
