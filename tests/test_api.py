"""What can be asked for and done at the operator's port, path by path, and what is told of a mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from balancer.config import ConfigError
from operating import BACKEND, Port, error, raising, serving


@pytest.fixture
def port() -> Iterator[Port]:
    with serving() as port:
        yield port


@pytest.fixture(autouse=True)
def nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """http.server writes each request there, and socketserver each traceback."""
    yield
    assert capfd.readouterr().err == ""


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


def test_a_figure_that_json_cannot_say_is_a_crash_and_no_broken_json(port):
    port.operator.status.on_status = lambda: float("nan")
    assert port.ask("GET", "/api/status").status == 500


def test_a_key_that_is_missing_where_no_id_was_given_is_a_crash(port):
    port.operator.on_change = raising(KeyError("port"))
    assert port.change("POST", "/api/backends", {"host": "h"}).status == 500
    assert port.change("POST", "/api/reload").status == 500


# Bodies ------------------------------------------------------------------------------------------------------------


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
