"""Who may ask at the operator's port, by which name, and who may change anything there."""

from __future__ import annotations

import hmac
import socket
from collections.abc import Iterator
from email.message import Message

import pytest

from balancer import admin, api
from balancer.api import Refused
from balancer.config import AdminPort, ConfigError
from balancer.gate import Gate, find_token, is_loopback
from operating import ALL_CHANGES, TOKEN, Port, error, raising, serving


@pytest.fixture
def port() -> Iterator[Port]:
    with serving() as port:
        yield port


@pytest.fixture(autouse=True)
def nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """http.server writes each request there, and socketserver each traceback."""
    yield
    assert capfd.readouterr().err == ""


# The token ---------------------------------------------------------------------------------------------------------


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
        answers += [port.ask("GET", path, Authorization=f"Bearer {TOKEN}") for path in api.PATHS]
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


# Other origins, other names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [b"", b"Host: whatever.example\r\n", b"Host: \xff\r\n"])
def test_healthz_is_for_whoever_stands_in_front_of_us(port, fields):
    """HAProxy's probe has no Host, and others have the name that they know us by."""
    assert port.say(b"GET /healthz HTTP/1.0\r\n" + fields + b"\r\n").status == 200


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


EVERYWHERE = [
    "127.0.0.1",
    "127.0.0.1:8404",
    "[::1]:8404",
    "localhost",
    "LocalHost:9000",
    "localhost.",
    "192.0.2.7:80",
    "127.0.0.1.",
]
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
