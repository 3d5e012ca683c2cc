"""Who the client is: in the log, to the policies, to the limits, and to the backends.

It is told by PROXY headers and X-Forwarded-For from those who may, and told on in both ways. HAProxy is a peer on both
sides. What a header looks like, and what is none, is in test_proxy_protocol.py and test_greeting.py.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from balancer.balancer import LoadBalancer
from balancer.proxy_protocol import Address, Header, parse, v1, v2
from balancing import connect, running
from conftest import PATIENCE, eventually
from fakes import Connection, FakeBackend, read_response
from programs import free_ports
from test_certificates import DATA
from test_greeting import CLIENT, FRONT, NAMED, WITH_TLVS, change, field, greeting, lines, turn_around, who
from test_http_mode import OK, QUIET, Gate, at, leases_come_back, settled
from test_proxy_protocol import HAPROXY, has_ipv6, needs_haproxy

TRUSTED = {"trusted_proxies": ["127.0.0.1", "10.0.0.0/8"]}
CHAIN = [f"192.0.2.{last}" for last in range(1, 4)]


def request(*fields: str, path: str = "/", host: str = "lb.test") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", f"Host: {host}", *fields, "", ""]).encode("latin-1")


def of(client: str, path: str = "/") -> bytes:
    """A request that a proxy passes on for this client."""
    return request(f"X-Forwarded-For: {client}", path=path)


def statuses(sock: socket.socket, *requests: bytes) -> list[int]:
    """Those of the answers to requests that are sent one after the other."""
    with sock.makefile("rb") as answers:
        found = []
        for one in requests:
            sock.sendall(one)
            found.append(read_response(answers).status)
        return found


def told(request: bytes) -> dict[str, list[str]]:
    """What a backend is told of who asks."""
    names = ("For", "Proto", "Host", "Port")
    found = {name: field(request, f"X-Forwarded-{name}") for name in names}
    return found | {"Forwarded": field(request, "Forwarded")}


# X-Forwarded-For --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "client", "passed_on"),
    [
        (["192.0.2.1"], "192.0.2.1:0", "192.0.2.1, 127.0.0.1"),
        (["192.0.2.66, 192.0.2.1"], "192.0.2.1:0", "192.0.2.66, 192.0.2.1, 127.0.0.1"),
        (["192.0.2.66, 192.0.2.1, 10.1.2.3"], "192.0.2.1:0", "192.0.2.66, 192.0.2.1, 10.1.2.3, 127.0.0.1"),
        (["192.0.2.66", "192.0.2.1,10.9.9.9"], "192.0.2.1:0", "192.0.2.66, 192.0.2.1,10.9.9.9, 127.0.0.1"),
        (["10.1.1.1, 10.2.2.2"], "10.1.1.1:0", "10.1.1.1, 10.2.2.2, 127.0.0.1"),
        (["[2001:DB8::1]:4711"], "[2001:db8::1]:0", "[2001:DB8::1]:4711, 127.0.0.1"),
        (["192.0.2.1:4711"], "192.0.2.1:0", "192.0.2.1:4711, 127.0.0.1"),
        (["::ffff:192.0.2.1"], "192.0.2.1:0", "::ffff:192.0.2.1, 127.0.0.1"),
        (["192.0.2.1, 127.0.0.1"], "192.0.2.1:0", "192.0.2.1, 127.0.0.1, 127.0.0.1"),
        (["192.0.2.1, unknown"], "", "192.0.2.1, unknown, 127.0.0.1"),
        (["192.0.2.1, "], "", "192.0.2.1,, 127.0.0.1"),
        ([""], "", "127.0.0.1"),
        ([], "", "127.0.0.1"),
        (["<script>, 192.0.2.1'--"], "", "<script>, 192.0.2.1'--, 127.0.0.1"),
        ([", ".join(["192.0.2.1"] + ["10.0.0.1"] * 1000)], "192.0.2.1:0", None),
    ],
)
def test_the_client_of_a_trusted_proxy_is_read_from_the_right(
    tmp_path: Path, given: list[str], client: str, passed_on: str | None
) -> None:
    """`client` is empty where it is the proxy itself. Whatever came is passed on, the proxy's address behind it."""
    with greeting(tmp_path, proxy_protocol_from=[], **TRUSTED) as (balancer, backend), connect(balancer) as sock:
        own = "{}:{}".format(*sock.getsockname())
        assert statuses(sock, request(*(f"X-Forwarded-For: {value}" for value in given))) == [200]
    assert who(tmp_path) == [client or own]
    [found] = told(backend.requests[0])["For"]
    if passed_on is not None:
        assert found == passed_on


@pytest.mark.parametrize("trusted", [[], ["10.0.0.0/8", "::1"]])
def test_who_is_not_trusted_is_believed_nothing(tmp_path: Path, trusted: list[str]) -> None:
    lies = [
        "X-Forwarded-For: 192.0.2.1",
        "X-Forwarded-Proto: https",
        "X-Forwarded-Host: bank.test",
        "X-Forwarded-Port: 443",
        "Forwarded: for=192.0.2.1;proto=https",
        "X_Forwarded_For: 192.0.2.1",
    ]
    keys = {"trusted_proxies": trusted, "deny": ["192.0.2.1"]}
    with greeting(tmp_path, proxy_protocol_from=[], **keys) as (balancer, backend), connect(balancer) as sock:
        own = "{}:{}".format(*sock.getsockname())
        assert statuses(sock, request(*lies)) == [200]
        port = str(balancer.port)
    assert who(tmp_path) == [own]
    assert told(backend.requests[0]) == {
        "For": ["127.0.0.1"],
        "Proto": ["http"],
        "Host": ["lb.test"],
        "Port": [port],
        "Forwarded": [],
    }
    assert b"192.0.2.1" not in backend.requests[0]


def test_what_a_trusted_proxy_says_of_the_request_is_kept(tmp_path: Path) -> None:
    """It has seen what the client asked for, and we have not; what it leaves out is ours to say."""
    with greeting(tmp_path, proxy_protocol_from=[], **TRUSTED) as (balancer, backend), connect(balancer) as sock:
        truths = ["X-Forwarded-Proto: https", "X-Forwarded-Host: shop.test", "X-Forwarded-Port: 443"]
        assert statuses(sock, request(*truths), request(truths[0]), request()) == [200] * 3
        port = str(balancer.port)
    found = [told(one) for one in backend.requests]
    assert [(one["Proto"], one["Host"], one["Port"]) for one in found] == [
        (["https"], ["shop.test"], ["443"]),
        (["https"], ["lb.test"], [port]),
        (["http"], ["lb.test"], [port]),
    ]


def test_each_request_of_a_proxys_connection_has_a_client_of_its_own(tmp_path: Path) -> None:
    """Also the one that is the proxy's own: it is not taken for that of whoever came before it."""
    with greeting(tmp_path, proxy_protocol_from=[], **TRUSTED) as (balancer, _), connect(balancer) as sock:
        own = "{}:{}".format(*sock.getsockname())
        requests = [*map(of, CHAIN), request(), of(CHAIN[0]), of("unknown"), of(CHAIN[1])]
        assert statuses(sock, *requests) == [200] * len(requests)
    names = [f"{client}:0" for client in CHAIN]
    assert who(tmp_path) == [*names, own, names[0], own, names[1]]


def test_pipelined_requests_have_clients_of_their_own_too(tmp_path: Path) -> None:
    with greeting(tmp_path, proxy_protocol_from=[], **TRUSTED) as (balancer, _), connect(balancer) as sock:
        sock.sendall(b"".join(map(of, CHAIN * 10)))
        with sock.makefile("rb") as answers:
            assert [read_response(answers).status for _ in range(30)] == [200] * 30
    assert who(tmp_path) == [f"{client}:0" for client in CHAIN] * 10


def test_a_request_in_hand_keeps_its_client_through_a_reload(tmp_path: Path) -> None:
    gate = Gate()
    with greeting(tmp_path, gate, proxy_protocol_from=[], **TRUSTED) as (balancer, _), connect(balancer) as sock:
        own = "{}:{}".format(*sock.getsockname())
        sock.sendall(of("192.0.2.1"))
        gate.wait_for_request()
        change(balancer, retries=1)
        gate.open.set()
        assert read_response(sock).status == 200
        assert statuses(sock, request()) == [200]
    assert who(tmp_path) == ["192.0.2.1:0", own]


def test_what_is_no_request_is_not_put_down_to_the_last_client(tmp_path: Path) -> None:
    """Nothing tells whose it is, and the proxy sent it."""
    with greeting(tmp_path, proxy_protocol_from=[], **TRUSTED) as (balancer, _), connect(balancer) as sock:
        own = "{}:{}".format(*sock.getsockname())
        assert statuses(sock, of("192.0.2.1"), b"\0\r\n\r\n") == [200, 400]
    assert who(tmp_path) == ["192.0.2.1:0", own]


def test_a_header_may_name_a_proxy_that_is_trusted(tmp_path: Path) -> None:
    """A balancer of connections, which tells who is connected to it, before a proxy, which tells who asks."""
    with greeting(tmp_path, **TRUSTED) as (balancer, _):
        for proxy, client in (("10.0.0.7", "192.0.2.1:0"), ("192.0.2.7", "192.0.2.7:4711")):
            with connect(balancer) as sock:
                sock.sendall(v2((proxy, 4711), FRONT))
                assert statuses(sock, of("192.0.2.1")) == [200]
                assert who(tmp_path) in ([], [client])
    assert who(tmp_path) == ["192.0.2.1:0", "192.0.2.7:4711"]


# RFC 7239 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_forwarded_is_written_when_asked_for(tmp_path: Path, host: str) -> None:
    """An IPv6 address stands in brackets and quotes (RFC 7239 section 6)."""
    if host == "::1" and not has_ipv6():
        pytest.skip("needs IPv6 on the loopback interface")
    keys = {"listen": {"host": host, "port": 0}, "proxy_protocol_from": [], "forwarded": True}
    with greeting(tmp_path, **keys) as (balancer, backend), connect(balancer) as sock:
        assert statuses(sock, request("Forwarded: for=192.0.2.66"), request(host="a.test:8080")) == [200] * 2
    node = '"[::1]"' if host == "::1" else host
    assert [field(one, "Forwarded") for one in backend.requests] == [
        [f'for={node};host="lb.test";proto=http'],
        [f'for={node};host="a.test:8080";proto=http'],
    ]


def test_forwarded_of_a_trusted_proxy_is_added_to(tmp_path: Path) -> None:
    keys = TRUSTED | {"forwarded": True, "proxy_protocol_from": []}
    with greeting(tmp_path, **keys) as (balancer, backend), connect(balancer) as sock:
        assert statuses(sock, request('Forwarded: for="[2001:db8::1]"', "forwarded: for=10.0.0.7;proto=https")) == [200]
    assert field(backend.requests[0], "Forwarded") == [
        'for="[2001:db8::1]", for=10.0.0.7;proto=https, for=127.0.0.1;host="lb.test";proto=http'
    ]


def test_forwarded_is_not_written_unless_asked_for(tmp_path: Path) -> None:
    with greeting(tmp_path, proxy_protocol_from=[], **TRUSTED) as (balancer, backend), connect(balancer) as sock:
        assert statuses(sock, request(), request("Forwarded: for=192.0.2.1")) == [200] * 2
    assert [field(one, "Forwarded") for one in backend.requests] == [[], []]


# The policies -----------------------------------------------------------------------------------------------------


@contextmanager
def several(tmp_path: Path, count: int, **keys: Any) -> Iterator[tuple[LoadBalancer, list[FakeBackend]]]:
    with ExitStack() as stack:
        backends = [stack.enter_context(FakeBackend(OK)) for _ in range(count)]
        with running(tmp_path, at(*backends), **(QUIET | keys)) as balancer:
            settled(balancer)
            yield balancer, backends


def paths(backend: FakeBackend) -> set[str]:
    return {one.split(b" ")[1].decode() for one in backend.requests}


def test_ip_hash_goes_by_the_client_of_each_request(tmp_path: Path) -> None:
    """Over one connection of a proxy's, in any order; the path tells who it was."""
    clients = [f"192.0.2.{last}" for last in range(60)]
    with several(tmp_path, 4, algorithm="ip_hash", **TRUSTED) as (balancer, backends), connect(balancer) as sock:
        requests = [of(client, f"/{client}") for client in clients * 3]
        assert statuses(sock, *requests) == [200] * 180
        homes = list(map(paths, backends))
    assert sum(map(len, homes)) == 60, "each at one of them"
    assert all(homes)


def test_ip_hash_goes_by_the_client_that_a_header_names(tmp_path: Path) -> None:
    clients = [f"192.0.2.{last}" for last in range(50)]
    with several(tmp_path, 3, algorithm="ip_hash", **NAMED) as (balancer, backends):
        for client in clients * 2:
            with connect(balancer) as sock:
                sock.sendall(v1((client, 4711), FRONT))
                assert statuses(sock, request(path=f"/{client}")) == [200]
        homes = list(map(paths, backends))
    assert sum(map(len, homes)) == 50
    assert all(homes)


def test_the_proxys_own_requests_are_hashed_by_itself(tmp_path: Path) -> None:
    with several(tmp_path, 4, algorithm="ip_hash", **TRUSTED) as (balancer, backends), connect(balancer) as sock:
        requests = [one for client in range(20) for one in (of(f"192.0.2.{client}", "/other"), request(path="/own"))]
        assert statuses(sock, *requests) == [200] * 40
        assert ["/own" in paths(backend) for backend in backends].count(True) == 1


def test_a_kept_connection_follows_a_reload_that_changes_what_is_hashed(tmp_path: Path) -> None:
    """Its key is that of each request, and none is left of what was hashed before."""
    keys = {"algorithm": "hash", "hash_on": "query:key", "hash_balance": 1000}
    with several(tmp_path, 4, **keys) as (balancer, backends), connect(balancer) as sock:
        assert statuses(sock, request(path="/?key=a"), request(path="/?key=b")) == [200] * 2
        change(balancer, algorithm="ip_hash")
        assert statuses(sock, *(request(path="/hashed") for _ in range(3))) == [200] * 3
        with connect(balancer) as other:
            assert statuses(other, *(request(path="/hashed") for _ in range(3))) == [200] * 3
        assert ["/hashed" in paths(backend) for backend in backends].count(True) == 1


# PROXY headers to backends ----------------------------------------------------------------------------------------


class Greeted:
    """A FakeBackend's handler that expects a PROXY header first, to the octet, and then requests or lines."""

    def __init__(self, answer: bytes = OK, context: ssl.SSLContext | None = None) -> None:
        self.seen: list[tuple[Header, bytes]] = []  # the header that each connection began with, and what followed it
        self._answer = answer
        self._context = context

    def __call__(self, connection: Connection) -> None:
        octets = b""
        while (header := parse(octets)) is None:
            piece = connection.sock.recv(1)
            if not piece:
                return
            octets += piece
        if self._context is None:
            self._serve(header, connection.sock)
        else:
            with self._context.wrap_socket(connection.sock, server_side=True) as sock:
                self._serve(header, sock)

    def _serve(self, header: Header, sock: socket.socket) -> None:
        with sock.makefile("rb") as file:
            entry = b""
            while line := file.readline():
                entry += line
                if line in (b"\r\n", b"end\n"):
                    break
            if entry:
                self.seen.append((header, entry))
                sock.sendall(self._answer)
                file.read()  # until the balancer has closed it

    @property
    def sources(self) -> list[Address | None]:
        return [header.source for header, _ in self.seen]


@contextmanager
def telling(
    tmp_path: Path, version: str, handler: Greeted, server: dict[str, Any] | None = None, **keys: Any
) -> Iterator[LoadBalancer]:
    """A balancer before one backend that is told by this version."""
    with FakeBackend(handler) as backend:
        entry = {"host": backend.host, "port": backend.port, "send_proxy": version, **(server or {})}
        with running(tmp_path, [entry], **(QUIET | keys)) as balancer:
            settled(balancer)
            yield balancer
            leases_come_back(balancer)


VERSIONS = pytest.mark.parametrize("version", ["v1", "v2"])


@VERSIONS
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_backend_is_told_the_clients_address_and_ours(tmp_path: Path, version: str, host: str) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("needs IPv6 on the loopback interface")
    backend = Greeted()
    with telling(tmp_path, version, backend, listen={"host": host, "port": 0}) as balancer, connect(balancer) as sock:
        ends = sock.getsockname()[:2], sock.getpeername()[:2]
        assert statuses(sock, request()) == [200]
    [(header, found)] = backend.seen
    assert (header.source, header.destination) == ends
    assert found.startswith(b"GET / HTTP/1.1\r\n")


@VERSIONS
def test_no_connection_to_a_backend_serves_two_clients_or_two_requests(tmp_path: Path, version: str) -> None:
    """It was opened in the name of one of them."""
    backend = Greeted()
    with telling(tmp_path, version, backend) as balancer, ExitStack() as stack:
        socks = [stack.enter_context(connect(balancer)) for _ in range(4)]
        for sock in socks * 3:
            assert statuses(sock, request()) == [200]
        own = [sock.getsockname() for sock in socks]
        assert balancer.upstreams.idle == 0
    assert backend.sources == own * 3


@VERSIONS
def test_a_backend_is_told_who_is_behind_a_trusted_proxy(tmp_path: Path, version: str) -> None:
    """Of its port nothing is known, which is 0. Beside an IPv6 address ours is written as one, too."""
    backend = Greeted()
    clients = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "192.0.2.1"]
    with telling(tmp_path, version, backend, **TRUSTED) as balancer, connect(balancer) as sock:
        assert statuses(sock, *map(of, clients)) == [200] * 4
        ours = sock.getpeername()
    assert backend.sources == [(client, 0) for client in clients]
    assert [header.destination for header, _ in backend.seen] == [ours] * 4


@VERSIONS
def test_a_backend_is_told_of_the_proxy_where_nobody_is_behind_it(tmp_path: Path, version: str) -> None:
    """The client of the request before is somebody else."""
    backend = Greeted()
    with telling(tmp_path, version, backend, **TRUSTED) as balancer, connect(balancer) as sock:
        assert statuses(sock, of("192.0.2.1"), request(), of("junk")) == [200] * 3
        own = sock.getsockname()
    assert backend.sources == [("192.0.2.1", 0), own, own]


@VERSIONS
@pytest.mark.parametrize("received", [v1(CLIENT, FRONT), WITH_TLVS], ids=["v1", "v2"])
def test_whom_a_header_names_is_told_on(tmp_path: Path, version: str, received: bytes) -> None:
    backend = Greeted()
    with telling(tmp_path, version, backend, **NAMED) as balancer, connect(balancer) as sock:
        sock.sendall(received)
        assert statuses(sock, request(), request()) == [200] * 2
    assert backend.sources == [CLIENT] * 2


@VERSIONS
def test_in_tcp_mode_the_header_comes_before_the_first_octet(tmp_path: Path, version: str) -> None:
    backend = Greeted(b"end\n")
    said = b"PROXY TCP4 is what the client says\nend\n"
    with telling(tmp_path, version, backend, mode="tcp") as balancer, connect(balancer) as sock:
        ends = sock.getsockname(), sock.getpeername()
        sock.sendall(said)
        assert sock.recv(100) == b"end\n"
    [(header, found)] = backend.seen
    assert (header.source, header.destination) == ends
    assert found == said


@VERSIONS
def test_tls_to_a_backend_begins_behind_the_header(tmp_path: Path, version: str) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(DATA / "local.pem", DATA / "ec.key")
    backend = Greeted(context=context)
    server = {"tls": {"ca": str(DATA / "root.pem")}}
    with telling(tmp_path, version, backend, server) as balancer, connect(balancer) as sock:
        own = sock.getsockname()
        assert statuses(sock, request(), request()) == [200] * 2
    assert backend.sources == [own] * 2


@VERSIONS
def test_a_request_that_is_sent_again_has_a_header_again(tmp_path: Path, version: str) -> None:
    """The first to get it hangs up without an answer."""

    class HangsUpOnce(Greeted):
        def _serve(self, header: Header, sock: socket.socket) -> None:
            if self.seen:
                super()._serve(header, sock)
            elif request := sock.recv(65536):
                self.seen.append((header, request))

    handler = HangsUpOnce()
    with FakeBackend(handler) as one, FakeBackend(handler) as other:
        entries = [{"host": each.host, "port": each.port, "send_proxy": version} for each in (one, other)]
        with running(tmp_path, entries, **QUIET) as balancer:
            settled(balancer)
            with connect(balancer) as sock:
                own = sock.getsockname()
                assert statuses(sock, request()) == [200]
    assert handler.sources == [own] * 2


@VERSIONS
@pytest.mark.parametrize("kind", ["http", "tcp"])
def test_probes_name_nobody(tmp_path: Path, version: str, kind: str) -> None:
    """LOCAL, and UNKNOWN, which is as near to it as version 1 comes."""
    probes: list[tuple[Header, bytes]] = []

    def handler(connection: Connection) -> None:
        octets = b""
        while piece := connection.sock.recv(1):
            octets += piece
            if octets.endswith(b"\r\n\r\n") and b"GET" in octets:
                connection.send(OK)
                break
        header = parse(octets)
        assert header is not None
        probes.append((header, octets[header.length :]))

    with FakeBackend(handler) as backend:
        entry = {"host": backend.host, "port": backend.port, "send_proxy": version}
        with running(tmp_path, [entry], health_check={"type": kind, "interval": 0.05}) as balancer:
            eventually(lambda: len(probes) >= 2)
            [found] = balancer.pool.backends
            assert found.healthy
            assert found.check.startswith("L7OK" if kind == "http" else "L4OK")
    assert {(header.source, header.destination) for header, _ in probes} == {(None, None)}
    assert {probe.split(b"\r\n")[0] for _, probe in probes} == {b"GET / HTTP/1.1" if kind == "http" else b""}


def test_a_reload_that_asks_for_headers_holds_for_the_next_request(tmp_path: Path) -> None:
    """No connection is used any more that began without one, or in the name of somebody else."""
    begun: list[bytes] = []

    def handler(connection: Connection) -> None:
        with connection.sock.makefile("rb") as file:
            while line := file.readline():
                begun.append(line.split(b" ")[0])
                while line != b"\r\n":
                    line = file.readline()
                connection.send(OK)

    with FakeBackend(handler) as backend, running(tmp_path, at(backend), **QUIET) as balancer:
        settled(balancer)
        [server] = balancer.config.servers
        with connect(balancer) as sock:
            for version in ("", "v1", "", "v1"):
                change(balancer, servers=(replace(server, send_proxy=version),))
                assert statuses(sock, request(), request()) == [200] * 2
        leases_come_back(balancer)
    assert begun == [b"GET", b"GET", b"PROXY", b"PROXY"] * 2


def test_a_connection_that_began_in_one_clients_name_serves_no_other_after_a_reload(tmp_path: Path) -> None:
    """It is in use while headers are no longer asked for."""
    arrived, go_on = threading.Event(), threading.Event()
    connections: list[list[bytes]] = []

    def handler(connection: Connection) -> None:
        served: list[bytes] = []
        with connection.sock.makefile("rb") as file:
            while line := file.readline():
                if line.startswith(b"GET"):
                    served.append(line)
                    connections.append(served)
                elif line == b"\r\n":
                    arrived.set()
                    assert go_on.wait(PATIENCE)
                    connection.send(OK)

    with FakeBackend(handler) as backend, ExitStack() as stack:
        entry = {"host": backend.host, "port": backend.port, "send_proxy": "v1"}
        balancer = stack.enter_context(running(tmp_path, [entry], **QUIET))
        settled(balancer)
        one, other = (stack.enter_context(connect(balancer)) for _ in range(2))
        one.sendall(request(path="/one"))
        assert arrived.wait(PATIENCE)
        [server] = balancer.config.servers
        change(balancer, servers=(replace(server, send_proxy=""),))
        go_on.set()
        assert read_response(one).status == 200
        assert statuses(other, request(path="/other")) == [200]
        leases_come_back(balancer)
    assert connections == [[b"GET /one HTTP/1.1\r\n"], [b"GET /other HTTP/1.1\r\n"]]


# HAProxy on both sides --------------------------------------------------------------------------------------------


@contextmanager
def haproxy(directory: Path, port: int, sections: str) -> Iterator[None]:
    """One that runs with these sections, until it has a listener on `port`."""
    config, output = directory / "haproxy.cfg", directory / "haproxy.out"
    config.write_text(f"""
defaults
    timeout connect 5s
    timeout client 5s
    timeout server 5s
{sections}""")
    with output.open("wb") as file:
        process = subprocess.Popen(
            [str(HAPROXY), "-db", "-f", str(config)], stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )

    def listens() -> bool:
        assert process.poll() is None, output.read_text(errors="replace")
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    try:
        eventually(listens)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


SENDS = {
    "v1": "send-proxy",
    "v2": "send-proxy-v2",
    "tlv": "send-proxy-v2 proxy-v2-options unique-id,crc32c",
}


def before(mode: str, words: str, port: int, balancer: LoadBalancer) -> str:
    return f"""
listen front
    mode {mode}
    bind 127.0.0.1:{port}
    unique-id-format %ci-%ts
    server lb {balancer.host}:{balancer.port} {words} check check-send-proxy inter 50ms
"""


@needs_haproxy
@pytest.mark.parametrize("way", SENDS)
def test_clients_of_an_haproxy_before_us_are_known(tmp_path: Path, way: str) -> None:
    """Each of several at once, by its address and port; and its probes, which are its own, are no clients'."""
    [port] = free_ports(1)
    with greeting(tmp_path) as (balancer, backend), haproxy(tmp_path, port, before("http", SENDS[way], port, balancer)):

        def ask_twice(number: int) -> str:
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
                assert statuses(sock, request(path=f"/{number}"), request(path=f"/{number}")) == [200] * 2
                return "{}:{}".format(*sock.getsockname())

        with ThreadPoolExecutor(4) as threads:
            clients = list(threads.map(ask_twice, range(12)))
    assert len(backend.requests) == 24
    assert sorted(who(tmp_path)) == sorted(clients * 2)
    assert [code for _, code, _ in lines(tmp_path)] == ["--"] * 24


@needs_haproxy
@pytest.mark.parametrize("way", SENDS)
def test_tcp_connections_of_an_haproxy_before_us_are_known(tmp_path: Path, way: str) -> None:
    [port] = free_ports(1)
    with ExitStack() as stack:
        balancer, _ = stack.enter_context(greeting(tmp_path, turn_around, mode="tcp"))
        stack.enter_context(haproxy(tmp_path, port, before("tcp", SENDS[way], port, balancer)))
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock, sock.makefile("rb") as file:
            own = "{}:{}".format(*sock.getsockname())
            sock.sendall(b"abc\n")
            assert file.readline() + file.readline() == b"hello\ncba\n"
    assert own in who(tmp_path)


@needs_haproxy
@pytest.mark.parametrize("mode", ["http", "tcp"])
@VERSIONS
def test_an_haproxy_behind_us_knows_our_clients(tmp_path: Path, version: str, mode: str) -> None:
    """By what it says to them; and our probes pass it."""
    [port] = free_ports(1)
    sections = f"""
listen back
    mode http
    bind 127.0.0.1:{port} accept-proxy
    http-request return status 200 content-type text/plain lf-string "%[src]:%[src_port] %[dst]:%[dst_port]"
"""
    entry = {"host": "127.0.0.1", "port": port, "send_proxy": version}
    probes = {"type": "http", "interval": 0.05, "path": "/health"}
    with ExitStack() as stack:
        stack.enter_context(haproxy(tmp_path, port, sections))
        balancer = stack.enter_context(running(tmp_path, [entry], mode=mode, health_check=probes, **TRUSTED))
        settled(balancer)
        [backend] = balancer.pool.backends
        assert backend.check.startswith("L7OK 200")

        def whom(*requests: bytes) -> list[str]:
            with connect(balancer) as sock, sock.makefile("rb") as answers:
                own = "{}:{}".format(*sock.getsockname())
                found = []
                for one in requests:
                    sock.sendall(one)
                    found.append(read_response(answers).body.decode().replace(own, "ME"))
                return found

        ours = f"{balancer.host}:{balancer.port}"
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda _: whom(request(), request()), range(12)))
        assert answers == [[f"ME {ours}"] * 2] * 12
        if mode == "http":  # port 0 is none to it
            clients = whom(of("192.0.2.1"), of("2001:db8::1"), of("192.0.2.2"))
            assert clients == [f"192.0.2.1: {ours}", f"2001:db8::1: ::ffff:{ours}", f"192.0.2.2: {ours}"]
        assert backend.healthy


@needs_haproxy
@VERSIONS
def test_between_two_haproxies_the_client_is_the_firsts(tmp_path: Path, version: str) -> None:
    front, back = free_ports(2)
    sections = f"""
listen back
    mode http
    bind 127.0.0.1:{back} accept-proxy
    http-request return status 200 content-type text/plain lf-string "%[src]:%[src_port]"
"""
    entry = {"host": "127.0.0.1", "port": back, "send_proxy": version}
    with ExitStack() as stack:
        (tmp_path / "back").mkdir()
        stack.enter_context(haproxy(tmp_path / "back", back, sections))
        balancer = stack.enter_context(running(tmp_path, [entry], **QUIET, **NAMED))
        settled(balancer)
        stack.enter_context(haproxy(tmp_path, front, before("http", SENDS[version], front, balancer)))
        with socket.create_connection(("127.0.0.1", front), PATIENCE) as sock:
            own = "{}:{}".format(*sock.getsockname())
            sock.sendall(request())
            assert read_response(sock).body.decode() == own
    assert own in who(tmp_path)
