"""Clients that stay with the backend that they had, by a cookie; and keys that stay, by the policy `hash`.

What a cookie's value is, and how one is found, is in test_sticky.py; who has which key, in test_hashing.py.
"""

from __future__ import annotations

import math
import re
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from balancer.backend import Admin, Backend
from balancer.balancer import LoadBalancer
from balancer.config import Server, Sticky
from balancing import connect, running
from conftest import PATIENCE, eventually
from fakes import Answer, Connection, FakeBackend, Handler, read_response
from test_certificates import DATA
from test_greeting import change, field
from test_http_mode import QUIET, Gate, leases_come_back, settled
from test_identity import TRUSTED, of, request

STICKY = {"sticky": True}
COOKIE = re.compile(r"lb=([A-Za-z0-9_-]{22}); Path=/; HttpOnly; SameSite=Lax")


def named(name: str, *fields: str, body: bytes = b"", status: str = "200 OK") -> bytes:
    """An answer that says who gives it."""
    lines = [f"HTTP/1.1 {status}", f"X-Backend: {name}", f"Content-Length: {len(body)}", *fields, "", ""]
    return "\r\n".join(lines).encode() + body


@contextmanager
def standing(
    tmp_path: Path, count: int = 3, scripts: Sequence[Handler | Sequence[bytes] | bytes] = (), **keys: Any
) -> Iterator[tuple[LoadBalancer, list[FakeBackend]]]:
    """A balancer before backends that say who they are, unless they have scripts. All is over at the end."""
    with ExitStack() as stack:
        backends = [
            stack.enter_context(FakeBackend(script))
            for script in scripts or [named(str(number)) for number in range(1, count + 1)]
        ]
        entries = [{"host": backend.host, "port": backend.port} for backend in backends]
        with running(tmp_path, entries, **(QUIET | keys)) as balancer:
            settled(balancer)
            yield balancer, backends
            leases_come_back(balancer)


class Browser:
    """A client that keeps the cookie that it is given, on a connection that stays until it is closed."""

    def __init__(self, balancer: LoadBalancer, cookie: str = "") -> None:
        self.balancer = balancer
        self.cookie = cookie
        self.given: list[str] = []  # each Set-Cookie
        self._sock: socket.socket | None = None

    def ask(self, octets: bytes = b"", method: str = "GET") -> Answer:
        if self._sock is None:
            self._sock = connect(self.balancer)
        octets = octets or request().replace(b"GET", method.encode(), 1)
        if self.cookie:
            octets = octets.replace(b"\r\n\r\n", f"\r\nCookie: lb={self.cookie}\r\n\r\n".encode(), 1)
        self._sock.sendall(octets)
        answer = read_response(self._sock, method)
        for line in answer.headers.get_all("Set-Cookie", []):
            match = COOKIE.fullmatch(line)
            if match:
                self.given.append(line)
                self.cookie = match[1]
        if answer.headers["Connection"] == "close":
            self.close()
        return answer

    def who(self) -> str:
        """Who answers."""
        return str(self.ask().headers["X-Backend"])

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def backend(balancer: LoadBalancer, name: str) -> Backend:
    return next(one for one in balancer.pool.backends if one.id == name)


def set_state(balancer: LoadBalancer, name: str, state: Admin) -> None:
    """Have an operator say so, and wait until it holds."""
    balancer.pool.set_admin(backend(balancer, name), state, "test")
    done = threading.Event()
    balancer.reactor.call_soon(done.set)
    assert done.wait(PATIENCE)


# It is set, and it holds ------------------------------------------------------------------------------------------


def test_the_cookie_is_set_once_and_leads_back_from_then_on(tmp_path: Path) -> None:
    with standing(tmp_path, **STICKY) as (balancer, _), Browser(balancer) as browser:
        home = browser.who()
        assert {browser.who() for _ in range(5)} == {home}
        browser.close()
        assert {browser.who() for _ in range(5)} == {home}, "on another connection, too"
        assert len(browser.given) == 1


def test_clients_without_a_cookie_are_balanced_as_ever_and_each_gets_its_own(tmp_path: Path) -> None:
    with standing(tmp_path, **STICKY) as (balancer, _), ExitStack() as stack:
        browsers = [stack.enter_context(Browser(balancer)) for _ in range(6)]
        homes = [browser.who() for browser in browsers]
        assert homes == ["1", "2", "3", "1", "2", "3"]
        assert [browser.who() for browser in browsers] == homes
        assert len({browser.cookie for browser in browsers}) == 3


def test_each_request_of_a_connection_has_its_own_cookie(tmp_path: Path) -> None:
    """A proxy before us sends those of many clients over it, with and without."""
    with standing(tmp_path, **STICKY) as (balancer, _), Browser(balancer) as browser:
        cookies = {}
        for _ in range(3):
            browser.cookie = ""
            home = browser.who()
            cookies[home] = browser.cookie
        for name in "312213":
            browser.cookie = cookies[name]
            assert browser.who() == name
        assert len(browser.given) == 3
        browser.cookie = ""
        assert browser.ask().headers["Set-Cookie"] is not None


def test_the_cookie_names_no_backend(tmp_path: Path) -> None:
    with standing(tmp_path, **STICKY) as (balancer, backends), Browser(balancer) as browser:
        for one in backends:
            browser.ask()
            assert str(one.port) not in browser.given[0]
            assert "127.0.0.1" not in browser.given[0]


def test_it_has_the_name_that_it_was_given_and_stands_beside_others(tmp_path: Path) -> None:
    """What the client sends goes on to the backend as it is; what the backend sets goes to the client."""
    scripts = [named(name, "Set-Cookie: session=abc; Path=/app", "Set-Cookie: lb=theirs") for name in "12"]
    with standing(tmp_path, scripts=scripts, sticky={"cookie": "where"}) as (balancer, backends):
        with connect(balancer) as sock:
            sock.sendall(request("Cookie: lb=mine; session=xyz"))
            first = read_response(sock)
            *theirs, ours = first.headers.get_all("Set-Cookie", [])
            assert theirs == ["session=abc; Path=/app", "lb=theirs"]
            assert ours.startswith("where=")
            cookies = f"Cookie: session=xyz; {ours.split(';')[0]} ; lb=mine"
            sock.sendall(request(cookies))
            again = read_response(sock)
            assert again.headers["X-Backend"] == first.headers["X-Backend"]
            assert again.headers.get_all("Set-Cookie") == theirs
        requests = [one for each in backends for one in each.requests]
    assert [field(one, "Cookie") for one in requests] == [["lb=mine; session=xyz"], [cookies.removeprefix("Cookie: ")]]


def test_over_tls_it_is_secure(tmp_path: Path) -> None:
    tls = {"certificates": [{"cert": str(DATA / "local.pem"), "key": str(DATA / "ec.key")}]}
    context = ssl.create_default_context(cafile=str(DATA / "root.pem"))
    with ExitStack() as stack:
        balancer, _ = stack.enter_context(standing(tmp_path, tls=tls, **STICKY))
        sock = stack.enter_context(connect(balancer))
        client = stack.enter_context(context.wrap_socket(sock, server_hostname="127.0.0.1"))
        client.sendall(request())
        assert read_response(client).headers["Set-Cookie"].endswith("; Path=/; HttpOnly; SameSite=Lax; Secure")


def test_without_being_asked_for_there_is_none(tmp_path: Path) -> None:
    with standing(tmp_path) as (balancer, _), Browser(balancer) as browser:
        assert [browser.who() for _ in range(3)] == ["1", "2", "3"]
        assert browser.given == []


# Every kind of answer ---------------------------------------------------------------------------------------------

LONG = b"x" * 1_000_000
CHUNKED = b"HTTP/1.1 200 OK\r\nX-Backend: 1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
ANSWERS = {
    "HEAD": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b""),
    "304": ("GET", b'HTTP/1.1 304 Not Modified\r\nETag: "a"\r\n\r\n', b""),
    "204": ("DELETE", b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "redirection": ("GET", b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", b""),
    "error": ("GET", named("1", status="500 Internal Server Error", body=b"oh"), b"oh"),
    "dated": ("GET", named("1", "Date: Sat, 21 Nov 2026 00:00:00 GMT", body=b"ok"), b"ok"),
    "long": ("GET", named("1", body=LONG), LONG),
    "chunked": ("GET", CHUNKED, b"hello"),
    "after an interim one": ("GET", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + named("1", body=b"ok"), b"ok"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_any_answer_of_a_backend_sets_it(tmp_path: Path, kind: str) -> None:
    """Once, in its own head and in none that is interim; and an answer to who has one is passed on as it is."""
    method, octets, body = ANSWERS[kind]
    with standing(tmp_path, scripts=[octets], **STICKY) as (balancer, _), connect(balancer) as sock:
        asked = request().replace(b"GET", method.encode(), 1)
        cookie = ""
        for expected in (1, 0):
            sock.sendall(asked.replace(b"\r\n\r\n", f"\r\nCookie: {cookie}\r\n\r\n".encode(), 1))
            with sock.makefile("rb") as file:
                head = file.readline()
                while line := file.readline():
                    head += line
                    if line == b"\r\n":
                        if b" 103 " in head:
                            assert b"Set-Cookie" not in head
                            head = b""
                        else:
                            break
                content = file.read(len(body)) if kind != "chunked" else file.read(15)
            assert content == (CHUNKED[-15:] if kind == "chunked" else body)
            found = re.findall(rb"\r\nSet-Cookie: (lb=[^;]+);", head)
            assert len(found) == expected
            cookie = found[0].decode() if found else ""


def test_an_answer_that_only_a_close_ends_sets_it_too(tmp_path: Path) -> None:
    octets = b"HTTP/1.1 200 OK\r\n\r\nuntil the end"

    def answer(connection: Connection) -> None:
        if connection.read_request():
            connection.send(octets)

    with standing(tmp_path, scripts=[answer], **STICKY) as (balancer, _):
        for version in ("1.1", "1.0"):
            with connect(balancer) as sock:
                sock.sendall(request().replace(b"1.1", version.encode(), 1))
                found = read_response(sock)
                assert found.body == b"until the end"
                assert COOKIE.fullmatch(found.headers["Set-Cookie"])


def test_our_own_answers_set_none(tmp_path: Path) -> None:
    """They come from no backend that a client could stay with."""
    with standing(tmp_path, 1, deny=["192.0.2.1"], **STICKY, **TRUSTED) as (balancer, _):
        set_state(balancer, "1", Admin.MAINT)
        for octets, status in ((request(), 503), (b"\0\r\n\r\n", 400), (of("192.0.2.1"), 403)):
            with Browser(balancer) as browser:
                answer = browser.ask(octets)
                assert (answer.status, answer.headers["Set-Cookie"]) == (status, None)


def test_a_tunnel_leads_to_the_backend_of_the_cookie(tmp_path: Path) -> None:
    """A WebSocket belongs where its page came from."""

    def script(name: str) -> Handler:
        def serve(connection: Connection) -> None:
            while asked := connection.read_request():
                if b"Upgrade: x" in asked:
                    connection.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
                    connection.send(name.encode())
                    return
                connection.send(named(name))

        return serve

    with standing(tmp_path, scripts=[script(name) for name in "123"], **STICKY) as (balancer, _):
        with Browser(balancer) as browser:
            home = browser.who()
        for _ in range(4):
            with connect(balancer) as sock, sock.makefile("rb") as file:
                sock.sendall(request("Connection: Upgrade", "Upgrade: x", f"Cookie: lb={browser.cookie}"))
                said = file.read()
                assert said.endswith(b"\r\n\r\n" + home.encode())
                assert b"Set-Cookie" not in said
        with connect(balancer) as sock, sock.makefile("rb") as file:
            sock.sendall(request("Connection: Upgrade", "Upgrade: x"))
            assert b"\r\nSet-Cookie: lb=" in file.read(), "where it is the first that a client asks for"


# Cookies that are not ours ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cookie",
    [
        "",
        "x",
        "A" * 22,
        "A" * 21,
        "A" * 100_0,
        "127.0.0.1:8001",
        "../../../etc/passwd",
        '"AAAAAAAAAAAAAAAAAAAAAA"',
        "AAAAAAAAAAAAAAAAAAAAAA\x00",
    ],
)
def test_a_forged_cookie_is_ignored_and_another_given(tmp_path: Path, cookie: str) -> None:
    with standing(tmp_path, **STICKY) as (balancer, _), connect(balancer) as sock:
        sock.sendall(request(f"Cookie: lb={cookie}"))
        answer = read_response(sock)
        if "\0" in cookie:
            assert answer.status == 400
        else:
            assert answer.status == 200
            assert COOKIE.fullmatch(answer.headers["Set-Cookie"])


def test_no_change_of_a_letter_leads_anywhere(tmp_path: Path) -> None:
    with standing(tmp_path, **STICKY) as (balancer, _), Browser(balancer) as browser:
        browser.ask()
        cookie = browser.cookie
        for place in range(len(cookie)):
            other = "A" if cookie[place] != "A" else "B"
            browser.cookie = cookie[:place] + other + cookie[place + 1 :]
            assert browser.ask().headers["Set-Cookie"] is not None


def test_the_cookie_of_another_balancer_is_ignored(tmp_path: Path) -> None:
    """Both made up a secret of their own."""
    with standing(tmp_path, **STICKY) as (balancer, backends), Browser(balancer) as browser:
        browser.ask()
        (tmp_path / "other").mkdir()
        entries = [{"host": one.host, "port": one.port} for one in backends]
        with (
            running(tmp_path / "other", entries, **QUIET, **STICKY) as other,
            Browser(other, browser.cookie) as visitor,
        ):
            visitor.ask()
            assert len(visitor.given) == 1
            assert visitor.cookie != browser.cookie


# A backend that is away -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [Admin.DRAIN, Admin.MAINT])
def test_whose_backend_is_away_is_given_another_and_stays_there(tmp_path: Path, state: Admin) -> None:
    with standing(tmp_path, **STICKY) as (balancer, _), Browser(balancer) as browser:
        home = browser.who()
        set_state(balancer, home, state)
        other = browser.who()
        assert other != home
        assert len(browser.given) == 2
        set_state(balancer, home, Admin.READY)
        assert {browser.who() for _ in range(5)} == {other}
        assert len(browser.given) == 2


def test_whose_backend_is_back_before_it_asks_stays(tmp_path: Path) -> None:
    with standing(tmp_path, **STICKY) as (balancer, _), Browser(balancer) as browser:
        home = browser.who()
        set_state(balancer, home, Admin.MAINT)
        set_state(balancer, home, Admin.READY)
        assert browser.who() == home
        assert len(browser.given) == 1


def test_whose_backend_refuses_is_given_another_within_the_same_request(tmp_path: Path) -> None:
    with standing(tmp_path, **STICKY) as (balancer, backends), Browser(balancer) as browser:
        home = browser.who()
        backends[int(home) - 1].close()
        balancer.reactor.call_soon(balancer.upstreams.drop_idle, backend(balancer, home))
        other = browser.who()
        assert other != home
        assert len(browser.given) == 2
        assert browser.who() == other


def test_whose_backend_hangs_up_without_an_answer_is_given_another(tmp_path: Path) -> None:
    """The cookie is of the one that answers, not of the one that was asked first."""
    scripts = [[named("1"), b""], [named("2")]]
    with standing(tmp_path, scripts=scripts, **STICKY) as (balancer, _), Browser(balancer) as browser:
        assert [browser.who() for _ in range(3)] == ["1", "2", "2"]
        assert len(browser.given) == 2


def test_a_kept_connection_that_was_closed_moves_nobody(tmp_path: Path) -> None:
    """The same backend is asked again on a fresh one, and it needs no other cookie."""

    def hang_up_after_each(name: str) -> Handler:
        def serve(connection: Connection) -> None:
            if connection.read_request():
                connection.send(named(name))

        return serve

    scripts = [hang_up_after_each(name) for name in "123"]
    with standing(tmp_path, scripts=scripts, **STICKY) as (balancer, _), Browser(balancer) as browser:
        home = browser.who()
        assert {browser.who() for _ in range(10)} == {home}
        assert len(browser.given) == 1


def test_whose_backend_is_full_is_given_another(tmp_path: Path) -> None:
    gate = Gate(named("1"))
    with FakeBackend(gate) as one, FakeBackend(named("2")) as other, ExitStack() as stack:
        entries = [{"host": one.host, "port": one.port, "max_connections": 1}, {"host": other.host, "port": other.port}]
        balancer = stack.enter_context(running(tmp_path, entries, **QUIET, **STICKY))
        settled(balancer)
        browser, second = (stack.enter_context(Browser(balancer)) for _ in range(2))
        gate.open.set()
        assert browser.who() == "1"
        second.cookie = browser.cookie
        gate.open.clear()
        gate.wait_for_request()
        with connect(balancer) as waiting:
            waiting.sendall(request(f"Cookie: lb={browser.cookie}"))
            gate.wait_for_request()
            assert second.who() == "2"
            assert len(second.given) == 1
            gate.open.set()
            assert read_response(waiting).headers["X-Backend"] == "1"
        leases_come_back(balancer)


# Reloads and restarts ---------------------------------------------------------------------------------------------


def test_clients_stay_through_reloads(tmp_path: Path) -> None:
    """Of other settings, of another policy, and of backends that come and go."""
    with standing(tmp_path, 4, **STICKY) as (balancer, _), ExitStack() as stack:
        browsers = [stack.enter_context(Browser(balancer)) for _ in range(4)]
        homes = {browser: browser.who() for browser in browsers}
        servers = balancer.config.servers
        for changes in (
            {"retries": 1},
            {"algorithm": "random"},
            {"servers": (*reversed(servers[:3]), replace(servers[3], weight=9))},
            {"servers": servers[1:]},
            {"servers": servers},
        ):
            change(balancer, **changes)
            settled(balancer)
            away = {"1"} if changes == {"servers": servers[1:]} else set()
            for browser, home in homes.items():
                if home not in away:
                    assert browser.who() == home, changes
        assert [len(browser.given) for browser in browsers] == [1] * 4


def test_a_backend_that_joins_can_be_stayed_with(tmp_path: Path) -> None:
    with standing(tmp_path, 1, **STICKY) as (balancer, _), FakeBackend(named("new")) as joining:
        change(balancer, servers=(Server("new", joining.host, joining.port),))
        eventually(lambda: all(one.eligible for one in balancer.pool.backends))
        with Browser(balancer) as browser:
            assert [browser.who() for _ in range(3)] == ["new"] * 3
            assert len(browser.given) == 1


def test_an_instance_that_was_started_by_the_load_can_be_stayed_with(tmp_path: Path) -> None:
    """It stands in no configuration."""
    with standing(tmp_path, 1, **STICKY) as (balancer, _), FakeBackend(named("instance")) as instance:
        set_state(balancer, "1", Admin.MAINT)
        balancer._publish([Server("instance", instance.host, instance.port)])
        eventually(lambda: balancer.pool.backends[-1].eligible)
        with Browser(balancer) as browser:
            assert [browser.who() for _ in range(3)] == ["instance"] * 3
            assert len(browser.given) == 1


def test_another_id_is_another_backend(tmp_path: Path) -> None:
    """It moves nobody whose backend is the same, and gives another cookie for it."""
    with standing(tmp_path, 1, **STICKY) as (balancer, _), Browser(balancer) as browser:
        browser.ask()
        change(balancer, servers=(replace(balancer.config.servers[0], id="renamed"),))
        for _ in range(3):
            browser.ask()
        assert len(browser.given) == 2


def test_it_may_be_asked_for_and_be_given_up_while_connections_are_open(tmp_path: Path) -> None:
    with standing(tmp_path) as (balancer, _), Browser(balancer) as browser:
        assert [browser.who() for _ in range(3)] == ["1", "2", "3"]
        change(balancer, sticky=Sticky())
        home = browser.who()
        assert {browser.who() for _ in range(4)} == {home}
        assert len(browser.given) == 1
        change(balancer, sticky=None)
        assert {browser.who() for _ in range(3)} == {"1", "2", "3"}
        assert len(browser.given) == 1


def test_a_secret_file_has_clients_stay_through_a_restart(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret of more than sixteen octets\n")
    keys = {"sticky": {"secret_file": str(secret)}}
    with ExitStack() as stack:
        entries = []
        for number in range(1, 5):
            one = stack.enter_context(FakeBackend(named(str(number))))
            entries.append({"host": one.host, "port": one.port})
        homes = {}
        with running(tmp_path, entries, **QUIET, **keys) as balancer:
            for _ in range(4):
                with Browser(balancer) as browser:
                    home = browser.who()
                    homes[home] = browser.cookie
        with running(tmp_path, entries, **QUIET, **keys) as balancer:
            for home, cookie in homes.items():
                with Browser(balancer, cookie) as browser:
                    assert [browser.who() for _ in range(2)] == [home] * 2
                    assert browser.given == []
        secret.write_text("another secret of sixteen octets")
        with running(tmp_path, entries, **QUIET, **keys) as balancer, Browser(balancer, homes["1"]) as browser:
            browser.ask()
            assert len(browser.given) == 1


# The policy hash --------------------------------------------------------------------------------------------------

HASHED = {"algorithm": "hash", "hash_balance": 1000}
KEYS = [f"key-{number}" for number in range(60)]  # enough that each backend has some, wherever it listens
ASKING = {
    "header:X-User": lambda key: request(f"x-user: {key}"),
    "header:Host": lambda key: request(host=f"{key}.test"),
    "cookie:user": lambda key: request(f"Cookie: a=b; user={key}; c=d"),
    "query:user": lambda key: request(path=f"/path?a=b&user={key}&c=d"),
    "path": lambda key: request(path=f"/{key}?a=b"),
}


def homes(balancer: LoadBalancer, hash_on: str, keys: Sequence[str] = KEYS) -> dict[str, str]:
    """Who answers to each key, asked on one connection."""
    with Browser(balancer) as browser:
        return {key: browser.ask(ASKING[hash_on](key)).headers["X-Backend"] for key in keys}


@pytest.mark.parametrize("hash_on", ASKING)
def test_the_same_key_has_the_same_backend(tmp_path: Path, hash_on: str) -> None:
    """Whatever else is in the request, and whichever connection it comes on."""
    with standing(tmp_path, 4, hash_on=hash_on, **HASHED) as (balancer, _):
        first = homes(balancer, hash_on)
        assert set(first.values()) == {"1", "2", "3", "4"}
        assert homes(balancer, hash_on, KEYS[::-1]) == first


def test_the_path_decides_without_its_query(tmp_path: Path) -> None:
    with standing(tmp_path, 4, hash_on="path", **HASHED) as (balancer, _), Browser(balancer) as browser:
        found = {browser.ask(request(path=f"/same?number={number}")).headers["X-Backend"] for number in range(20)}
        assert len(found) == 1


@pytest.mark.parametrize("how", ["drained", "removed", "refuses"])
def test_a_backend_that_leaves_moves_only_its_own_keys(tmp_path: Path, how: str) -> None:
    with standing(tmp_path, 4, hash_on="query:user", **HASHED) as (balancer, backends):
        before = homes(balancer, "query:user")
        if how == "drained":
            set_state(balancer, "2", Admin.DRAIN)
        elif how == "removed":
            change(balancer, servers=tuple(one for one in balancer.config.servers if one.id != "2"))
        else:
            backends[1].close()
        after = homes(balancer, "query:user")
        assert {key for key in KEYS if before[key] != after[key]} == {key for key in KEYS if before[key] == "2"}
        assert "2" not in after.values()
        assert len({after[key] for key in KEYS if before[key] == "2"}) > 1, "they are spread over all others"


def test_keys_come_home_when_their_backend_does(tmp_path: Path) -> None:
    with standing(tmp_path, 4, hash_on="path", **HASHED) as (balancer, _):
        before = homes(balancer, "path")
        set_state(balancer, "3", Admin.MAINT)
        assert homes(balancer, "path") != before
        set_state(balancer, "3", Admin.READY)
        assert homes(balancer, "path") == before


def test_a_request_without_a_key_goes_by_its_client(tmp_path: Path) -> None:
    """So those without one are spread as well as those with one, and each stays."""
    clients = [f"192.0.2.{last}" for last in range(60)]
    keys = HASHED | TRUSTED | {"hash_on": "cookie:user"}
    with standing(tmp_path, 4, **keys) as (balancer, _), Browser(balancer) as browser:
        first = [browser.ask(of(client)).headers["X-Backend"] for client in clients]
        assert set(first) == {"1", "2", "3", "4"}
        assert [browser.ask(of(client)).headers["X-Backend"] for client in clients] == first
        own = {browser.ask(request()).headers["X-Backend"] for _ in range(5)}
        assert len(own) == 1


@pytest.mark.parametrize("balance", [1, 1.25, 2])
def test_a_key_that_everybody_asks_for_breaks_no_backend(tmp_path: Path, balance: float) -> None:
    """None has more than so many times the average in hand, rounded up, and the key's own has that many."""
    count = 12
    gates = [Gate(named(name)) for name in "1234"]
    keys = {"algorithm": "hash", "hash_on": "query:user", "hash_balance": balance}
    with standing(tmp_path, scripts=gates, **keys) as (balancer, _), ExitStack() as stack:
        socks = [stack.enter_context(connect(balancer)) for _ in range(count)]
        for number, sock in enumerate(socks, 1):
            sock.sendall(request(path="/?user=all"))
            eventually(lambda number=number: balancer.pool.in_hand == number)
        in_hand = [one.active for one in balancer.pool.backends]
        assert sum(in_hand) == count
        assert max(in_hand) == math.ceil(balance * count / 4)
        for gate in gates:
            gate.open.set()
        home, *others = [str(read_response(sock).headers["X-Backend"]) for sock in socks]
        assert sorted(Counter([home, *others]).values()) == sorted(number for number in in_hand if number)
        leases_come_back(balancer)
        assert [*homes(balancer, "query:user", ["all"] * 5).values()] == [home], "once there is room"


def test_a_reload_changes_what_is_hashed_for_connections_that_are_open(tmp_path: Path) -> None:
    with standing(tmp_path, 4, hash_on="query:user", **HASHED) as (balancer, _), Browser(balancer) as browser:

        def spread(**names: str) -> int:
            """Over how many backends requests go that differ in one of the two."""
            asked = [
                request(f"X-User: {names.get('user', number)}", path=f"/?user={names.get('query', number)}")
                for number in range(60)
            ]
            return len({browser.ask(one).headers["X-Backend"] for one in asked})

        assert (spread(query="same"), spread(user="same")) == (1, 4)
        change(balancer, hash_on="header:X-User")
        assert (spread(query="same"), spread(user="same")) == (4, 1)
        change(balancer, algorithm="round_robin")
        assert (spread(query="same"), spread(user="same", query="same")) == (4, 4)


def test_a_cookie_goes_before_a_key(tmp_path: Path) -> None:
    keys = HASHED | STICKY | {"hash_on": "query:user"}
    with standing(tmp_path, 4, **keys) as (balancer, _), Browser(balancer) as browser:
        home = browser.ask(request(path="/?user=first")).headers["X-Backend"]
        for key in KEYS:
            assert browser.ask(request(path=f"/?user={key}")).headers["X-Backend"] == home
        assert len(browser.given) == 1
