"""What a second reader found: each was so once, and must not be so again."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from backend_server import Backend, serving
from balancer.backend import Admin
from balancer.config import BackendTls, Server
from balancer.explain import as_text
from balancer.upstream import Upstream
from balancing import connect, log_lines, running
from conftest import PATIENCE, eventually
from fakes import FakeBackend, read_response

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
GET = b"GET / HTTP/1.1\r\nHost: lb.test\r\n\r\n"


def ask(sock: socket.socket, *fields: str, path: str = "/"):
    lines = [f"GET {path} HTTP/1.1", "Host: lb.test", *fields, "", ""]
    sock.sendall("\r\n".join(lines).encode())
    return read_response(sock)


def changed(balancer, **settings):
    """Reload with other settings, and wait until the reactor goes by them."""
    balancer.reconfigure(replace(balancer.wanted, **settings), "test")
    done = threading.Event()
    balancer.reactor.call_soon(done.set)
    assert done.wait(PATIENCE)


def test_a_refused_upload_ends_however_much_still_comes(tmp_path):
    """Each segment behind a 413 was taken for a piece of the body, answered, logged, and given more time."""
    with (
        FakeBackend(OK) as fake,
        running(tmp_path, [("127.0.0.1", fake.port)], limits={"body_bytes": 1000}) as balancer,
        connect(balancer) as sock,
    ):
        sock.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n")
        assert read_response(sock).status == 413
        for _ in range(20):
            sock.sendall(b"garbage\r\n")
        eventually(lambda: len(log_lines(tmp_path)) > 1, "its line")
    assert sum('"POST / HTTP/1.1"' in line for line in log_lines(tmp_path)) == 1


def test_after_a_request_by_a_proxy_the_next_one_is_its_own(tmp_path):
    with (
        FakeBackend(OK) as fake,
        running(tmp_path, [("127.0.0.1", fake.port)], trusted_proxies=["127.0.0.1"]) as balancer,
    ):
        with connect(balancer) as sock:
            ask(sock, "X-Forwarded-For: 203.0.113.7", path="/a")
            ask(sock, path="/b")
            changed(balancer, trusted_proxies=())
            ask(sock, "X-Forwarded-For: 203.0.113.7", path="/c")
        assert b"203.0.113.7" not in fake.requests[-1]
    clients = [line.split()[3].rpartition(":")[0] for line in log_lines(tmp_path) if '"GET ' in line]
    assert clients == ["203.0.113.7", "127.0.0.1", "127.0.0.1"]


def test_a_connection_that_was_in_hand_is_not_kept_when_it_should_have_been_encrypted(tmp_path):
    with (
        FakeBackend(OK) as fake,
        running(
            tmp_path, [("127.0.0.1", fake.port)], health_check={"interval": 60}, timeouts={"connect": 0.3}
        ) as balancer,
    ):
        with connect(balancer) as sock:
            ask(sock)
            [server] = balancer.wanted.servers
            changed(balancer, servers=(replace(server, tls=BackendTls(verify=False)),))
            ask(sock, path="/secret")
        assert not any(b"/secret" in request for request in fake.requests)


def test_limits_of_heads_follow_a_reload(tmp_path):
    long = b"HTTP/1.1 200 OK\r\nX-Long: %b\r\nContent-Length: 2\r\n\r\nok" % (b"x" * 3000)
    with (
        FakeBackend(long) as fake,
        running(tmp_path, [("127.0.0.1", fake.port)]) as balancer,
        connect(balancer) as sock,
    ):
        assert ask(sock).status == 200
        changed(balancer, limits=replace(balancer.wanted.limits, head_bytes=2048))
        assert ask(sock).status == 502
        changed(balancer, limits=replace(balancer.wanted.limits, head_bytes=65536))
    with FakeBackend(OK) as fake, running(tmp_path, [("127.0.0.1", fake.port)]) as balancer, connect(balancer) as sock:
        many = [f"X-{number}: 1" for number in range(20)]
        assert ask(sock, *many).status == 200
        changed(balancer, limits=replace(balancer.wanted.limits, fields=10))
        assert ask(sock, *many).status == 431


def test_a_refused_request_is_not_logged_with_the_backend_of_the_one_before_it(tmp_path):
    with ExitStack() as stack:
        hangs_up = stack.enter_context(FakeBackend(lambda connection: connection.read_request()))
        answers = stack.enter_context(FakeBackend(OK))
        settings = {"limits": {"client_rate": 0.001, "client_burst": 1}, "health_check": {"type": "tcp"}}
        balancer = stack.enter_context(
            running(tmp_path, [("127.0.0.1", hangs_up.port), ("127.0.0.1", answers.port)], **settings)
        )
        with connect(balancer) as sock:
            assert ask(sock).status == 200
            assert ask(sock).status == 429
    assert [line.split("backend=")[1].split()[0] for line in log_lines(tmp_path) if '"GET ' in line] == ["2", "-"]


def test_a_denied_address_holds_no_connection(tmp_path):
    """It could keep idle ones, and with TLS half a handshake, until nobody else had a place."""
    with (
        FakeBackend(OK) as fake,
        running(tmp_path, [("127.0.0.1", fake.port)], deny=["127.0.0.1"]) as balancer,
        connect(balancer) as sock,
    ):
        assert read_response(sock).status == 403
        eventually(lambda: sock.recv(1) == b"", "it is closed")


@pytest.mark.parametrize("settings", [{"limits": {"client_connections": 3}}, {"deny": ["127.0.0.1"]}])
def test_who_only_begins_a_handshake_is_counted_too(tmp_path, settings):
    data = Path(__file__).parent / "data" / "certificates"
    tls = {"certificates": [{"cert": str(data / "local.pem"), "key": str(data / "ec.key")}]}
    with FakeBackend(OK) as fake, running(tmp_path, [("127.0.0.1", fake.port)], tls=tls, **settings) as balancer:
        with ExitStack() as stack:
            opened = [stack.enter_context(connect(balancer)) for _ in range(5)]
            most = 0 if "deny" in settings else 3
            eventually(lambda: len(balancer.listener.sessions) == most, "the others were closed")
            closed = sum(sock.recv(1, socket.MSG_DONTWAIT) == b"" for sock in opened[most:])
            assert closed == 5 - most
        eventually(lambda: not balancer.listener.sessions, "all have gone")


def test_the_id_that_the_client_sees_is_the_one_that_explains(tmp_path):
    named = b"HTTP/1.1 200 OK\r\nX-Request-Id: from-backend\r\nContent-Length: 2\r\n\r\nok"
    with ExitStack() as stack:
        hangs_up = stack.enter_context(FakeBackend(lambda connection: connection.read_request()))
        answers = stack.enter_context(FakeBackend(named))
        backends = [("127.0.0.1", hangs_up.port), ("127.0.0.1", answers.port)]
        balancer = stack.enter_context(running(tmp_path, backends, health_check={"type": "tcp"}))
        with connect(balancer) as sock:
            assert ask(sock).headers["X-Request-Id"] == "from-backend"
        eventually(lambda: balancer._front.incidents.find("from-backend"), "it is kept")
        found = balancer._front.incidents.find("from-backend")
    assert found is not None
    assert found["tries"] == 2


def test_an_explanation_steers_no_terminal(tmp_path):
    with FakeBackend(OK) as fake, running(tmp_path, [("127.0.0.1", fake.port)]) as balancer:
        with connect(balancer) as sock:
            sock.sendall(b"GET /\x1b]0;owned\x07\x1b[2J HTTP/1.1\r\nHost: a\r\n\r\n")
            answer = read_response(sock)
        find = balancer._front.incidents.find
        eventually(lambda: find(answer.headers["X-Request-Id"]), "it is kept")
        found = find(answer.headers["X-Request-Id"])
    assert found is not None
    text = as_text(found)
    assert "\\x1b]0;owned\\x07" in text
    assert all(line.isprintable() for line in text.splitlines())


def test_instances_that_the_load_has_started_stick_too(tmp_path):
    with serving(Backend(name="1")) as one, serving(Backend(name="2")) as two:
        first = {"host": "127.0.0.1", "port": one.port}
        with running(tmp_path, [first], sticky=True) as balancer:
            balancer._publish([Server("auto", "127.0.0.1", two.port)])
            eventually(lambda: len(balancer._front.sticks) == 2, "the instance has a cookie")
            with connect(balancer) as sock:
                eventually(lambda: ask(sock).headers["X-Backend"] == "2", "it serves")
                cookie = next(value for value, backend in balancer._front.sticks.items() if backend.id == "auto")
                answers = [ask(sock, f"Cookie: lb={cookie}") for _ in range(4)]
            assert {answer.headers["X-Backend"] for answer in answers} == {"2"}
            assert not any("Set-Cookie" in answer.headers for answer in answers)


def test_a_change_that_waits_for_another_begins_with_what_that_has_left(tmp_path):
    """An operator's change that met a reload took the whole of it back."""
    with FakeBackend(OK) as fake, running(tmp_path, [("127.0.0.1", fake.port)]) as balancer:
        entered, go_on = threading.Event(), threading.Event()

        def slow(config):
            entered.set()
            assert go_on.wait(PATIENCE)
            return replace(config, retries=1)

        reload = threading.Thread(target=balancer.reconfigure, args=(slow, "file"))
        change = threading.Thread(target=balancer._control.change, args=("1", {"weight": 7}, "operator", False))
        reload.start()
        assert entered.wait(PATIENCE)
        change.start()
        go_on.set()
        reload.join()
        change.join()
        assert (balancer.wanted.retries, balancer.wanted.servers[0].weight) == (1, 7)


def test_the_redirecting_listener_follows_a_reload_and_can_be_explained(tmp_path):
    data = Path(__file__).parent / "data" / "certificates"
    tls = {
        "certificates": [{"cert": str(data / "local.pem"), "key": str(data / "ec.key")}],
        "redirect_from": "127.0.0.1:0",
    }
    with FakeBackend(OK) as fake, running(tmp_path, [("127.0.0.1", fake.port)], tls=tls) as balancer:
        redirect = balancer._listeners[1].address
        with closing(socket.create_connection(redirect, timeout=PATIENCE)) as sock:
            answer = ask(sock)
            assert (answer.status, answer.headers["Location"]) == (308, f"https://lb.test:{balancer.port}/")
            find = balancer._front.incidents.find
            eventually(lambda: find(answer.headers["X-Request-Id"]), "it is kept")
        changed(balancer, deny=("127.0.0.0/8",))
        with closing(socket.create_connection(redirect, timeout=PATIENCE)) as sock:
            assert read_response(sock).status == 403


DATED = OK.replace(b"\r\n\r\n", b"\r\nDate: Sat, 21 Nov 2026 05:00:00 GMT\r\n\r\n")  # to one without we would add it


@pytest.mark.parametrize("earlier", [0, 2], ids=["the first of its connection", "known"])
def test_a_post_that_is_refused_is_refused_before_its_body(tmp_path, earlier):
    log = {"file": str(tmp_path / "lb.log"), "format": "json"}
    limits = {"client_rate": 0.001, "client_burst": 2}
    post = b"POST / HTTP/1.1\r\nHost: lb.test\r\nContent-Length: 5\r\n\r\nhello"
    with (
        FakeBackend(DATED) as fake,
        running(tmp_path, [("127.0.0.1", fake.port)], log=log, limits=limits) as balancer,
    ):
        for _ in range(2 - earlier):
            with connect(balancer) as other:
                assert ask(other).status == 200
        with connect(balancer) as sock:
            for status in [*[200] * earlier, 429]:
                sock.sendall(post)
                assert read_response(sock).status == status
    *_, refused = [one for one in map(json.loads, log_lines(tmp_path)) if "client" in one]
    assert (refused["status"], refused["octets_in"]) == (429, 0)


def answering(connection):
    """Of what it is asked for, it cuts off /cut, answers /chunked in chunks, and anything else as it should."""
    while request := connection.read_request():
        if b" /cut " in request:
            return
        if b" /chunked " in request:
            connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
        else:
            connection.send(DATED[:-2] if request.startswith(b"HEAD ") else DATED)


@pytest.mark.parametrize(
    "message",
    [
        GET,
        GET.replace(b"GET", b"HEAD"),
        GET.replace(b"/ ", b"/chunked "),
        GET.replace(b"/ ", b"/cut "),
        GET.replace(b"/ ", b"/gone "),
        GET.replace(b"Host", b"Ho st"),
        GET[:-2],
        b"POST / HTTP/1.1\r\nHost: lb.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: lb.test\r\nContent-Length: 5\r\n\r\nhel",
        b"POST /cut HTTP/1.1\r\nHost: lb.test\r\nContent-Length: 5\r\n\r\nhello",
    ],
    ids=["get", "head", "chunked", "cut", "gone", "bad", "half a head", "chunked post", "half a body", "cut post"],
)
@pytest.mark.parametrize(
    "before", [GET, b"POST / HTTP/1.1\r\nHost: lb.test\r\nContent-Length: 5\r\n\r\nhello"], ids=["get", "post"]
)
def test_whatever_follows_a_plain_exchange_is_logged_as_on_a_connection_of_its_own(tmp_path, message, before):
    """A plain exchange does not clear what it leaves behind."""
    records = []
    for number, earlier in enumerate(([], [before] * 3)):
        directory = tmp_path / str(number)
        directory.mkdir()
        log = {"file": str(directory / "lb.log"), "format": "json"}
        quiet = {"type": "tcp", "interval": 60}
        with (
            FakeBackend(answering) as fake,
            running(directory, [("127.0.0.1", fake.port)], log=log, health_check=quiet) as balancer,
            connect(balancer) as other,
            connect(balancer) as sock,
        ):
            assert ask(other).status == 200  # which leaves a connection to the backend
            for each in earlier:
                sock.sendall(each)
                assert read_response(sock).status == 200
            if b" /gone " in message:
                balancer.pool.set_admin(balancer.pool.backends[0], Admin.MAINT, "test")
            sock.sendall(message)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
            ask(other)
            assert all(request.startswith((b"GET ", b"HEAD ", b"POST ")) for request in fake.requests)
        made = [json.loads(line) for line in log_lines(directory)]
        *_, last, _ = [one for one in made if "client" in one]
        records.append({key: value if not key.endswith("_ms") else value is None for key, value in last.items()})
        for key in "client", "time", "id":
            records[-1][key] = bool(records[-1][key])
    assert records[0] == records[1]


def test_a_connection_that_was_read_to_its_end_is_not_looked_at_when_it_is_given_to_another_at_once(
    tmp_path, monkeypatch
):
    """A look is a system call and an exception, and of many long answers each one's connection was looked at."""
    looks = []
    asked, answer = threading.Event(), threading.Event()

    def answers_when_told(connection):
        while connection.read_request():
            asked.set()
            assert answer.wait(PATIENCE)
            connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
            sent.set()

    def look(upstream: Upstream) -> bool:
        looks.append(upstream)
        return False

    sent, held, go_on = threading.Event(), threading.Event(), threading.Event()
    with (
        FakeBackend(answers_when_told) as fake,
        running(tmp_path, [("127.0.0.1", fake.port)], health_check={"type": "tcp", "interval": 60}) as balancer,
        connect(balancer) as one,
        connect(balancer) as other,
    ):
        monkeypatch.setattr(Upstream, "is_stale", look)
        one.sendall(GET)
        assert asked.wait(PATIENCE)

        def hold() -> None:
            held.set()
            assert go_on.wait(PATIENCE)

        balancer.reactor.call_soon(hold)
        assert held.wait(PATIENCE)
        answer.set()
        assert sent.wait(PATIENCE)
        other.sendall(GET)  # both are there when the reactor looks again
        go_on.set()
        assert read_response(one).status == read_response(other).status == 200
        assert len(fake.requests) == 2
        eventually(lambda: not balancer.pool.in_hand, "both leases are given back")
        assert balancer.upstreams.idle == 1
        assert looks == []
