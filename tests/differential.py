"""Ours beside programs that nobody here wrote: `python tests/differential.py` lists every difference.

The hostile messages of data/http, and good ones that look odd, go through our balancer, HAProxy and nginx (those that
are installed), each in front of a backend that takes down every octet and answers only what http.server reads as one
whole request. Of each message is noted what its client was told, how much of it was passed on, and as what. It is
passed on by our balancer and not by another only where ALLOWED gives the reason.

The others run as they come, in HTTP/1.1 towards their backend, with short timeouts. nginx keeps a request back until it
has all of it, HAProxy and ours do not; so messages are sent in one piece.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from balancing import running  # noqa: E402 - both directories have to be on the path first
from conftest import PATIENCE, eventually  # noqa: E402
from fakes import Connection, FakeBackend, read_response  # noqa: E402
from messages import (  # noqa: E402
    HOSTILE_ANSWERS,
    HOSTILE_BODIES,
    HOSTILE_HEADS,
    REWRITTEN,
    NotRead,
    Read,
    head,
    read_by_http_client,
    read_by_http_server,
)
from programs import free_ports  # noqa: E402

SILENCE = 0.7
"""Seconds after which each of them gives up on a message that does not end."""

LAST = head("HTTP/1.1 204 No Content", "Connection: close")
MARKER = head("GET /marker HTTP/1.1", "Host: marker.test")
ASK = head("GET / HTTP/1.1", "Host: a.test", "Connection: close")


# What is sent -----------------------------------------------------------------------------------------------------


class Message(NamedTuple):
    """A request, or an answer to ASK, with the section that it is about: S is RFC 9110, M is RFC 9112."""

    section: str
    name: str
    octets: bytes
    is_answer: bool = False


def _with_body(lines: Sequence[str]) -> bytes:
    """A request of these lines with a body as they announce it."""
    fields = dict(line.lower().split(":", 1) for line in lines if ":" in line)
    chunked = "chunked" in fields.get("transfer-encoding", "")
    return head(*lines) + (b"5\r\nhello\r\n0\r\n\r\n" if chunked else b"x" * int(fields.get("content-length", 0)))


_SECTION_AND_NAME = re.compile(r"([MS] [0-9.]+)? ?(.+)")


def _good_requests() -> Iterator[Message]:
    for rewritten in REWRITTEN:
        section, name = _SECTION_AND_NAME.findall(rewritten.name)[0]
        yield Message(section or "-", name, _with_body(rewritten.lines))
    for section, name, lines in (
        ("M 3.2", "host with an empty label", ["GET / HTTP/1.1", "Host: a..test"]),
        ("S 7.7", "percent sign that escapes nothing", ["GET /100%?100% HTTP/1.1", "Host: a.test"]),
        ("S 9.1", "method of every sign", ["!#$%&'*+-.^_`|~0Az / HTTP/1.1", "Host: a.test"]),
        ("S 10.1.1", "Expect twice", ["GET / HTTP/1.1", "Host: a.test", *["Expect: 100-continue"] * 2]),
    ):
        yield Message(section, name, head(*lines))
    chunked = head("POST / HTTP/1.1", "Host: a.test", "Transfer-Encoding: chunked")
    for section, name, chunks in (
        ("M 7.1", "size in capitals and with zeros", b"000A\r\n0123456789\r\n0\r\n\r\n"),
        ("M 7.1", "last chunk of many zeros", b"5\r\nhello\r\n00000000\r\n\r\n"),
        ("M 7.1.1", "extensions", b'5;a;b=c;d="e;f"\r\nhello\r\n0;a\r\n\r\n'),
        ("M 7.1.1", "blanks around an extension", b"5 ; a = b\r\nhello\r\n0\r\n\r\n"),
        ("M 7.1.2", "trailers", b"5\r\nhello\r\n0\r\nX-A: 1\r\nX-B:\r\n\r\n"),
        ("M 7.1.2", "trailers that matter in a head", b"5\r\nhello\r\n0\r\nContent-Length: 9\r\nHost: b\r\n\r\n"),
    ):
        yield Message(section, name, chunked + chunks)


def _good_answers() -> Iterator[Message]:
    ok = "HTTP/1.1 200 OK"
    for section, name, octets in (
        ("M 4", "no reason", head("HTTP/1.1 200 ", "Content-Length: 0")),
        ("M 4", "neither a reason nor the blank before it", head("HTTP/1.1 200", "Content-Length: 0")),
        ("M 2.3", "HTTP/1.0", head("HTTP/1.0 200 OK", "Content-Length: 0")),
        ("M 2.3", "a later minor version", head("HTTP/1.9 200 OK", "Content-Length: 0")),
        ("S 15", "a status of no known meaning", head("HTTP/1.1 299 Odd", "Content-Length: 0")),
        ("S 15.2", "interim answers", head("HTTP/1.1 103 Early Hints") * 3 + head(ok, "Content-Length: 0")),
        ("M 6.3", "interim with a length", head("HTTP/1.1 100 Continue", "Content-Length: 0") + head(ok) + b"hello"),
        ("M 6.3", "until the close", head(ok) + b"hello"),
        ("M 6.3", "304 with a length", head("HTTP/1.1 304 Not Modified", "Content-Length: 5")),
        ("M 6.3", "204 with a length", head("HTTP/1.1 204 No Content", "Content-Length: 5")),
        ("M 6.3", "204 in chunks", head("HTTP/1.1 204 No Content", "Transfer-Encoding: chunked")),
        ("M 6.3", "octets behind the body", head(ok, "Content-Length: 2") + b"okmore"),
        ("M 6.3", "another answer behind the body", (head(ok, "Content-Length: 2") + b"ok") * 2),
        ("M 7.1.1", "chunk extensions", head(ok, "Transfer-Encoding: chunked") + b"5;a=b\r\nhello\r\n0;c\r\n\r\n"),
        ("M 7.1.2", "trailers", head(ok, "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\nX-A: 1\r\n\r\n"),
        ("M 8", "a length that is not reached", head(ok, "Content-Length: 9") + b"hello"),
        ("M 8", "chunks without an end", head(ok, "Transfer-Encoding: chunked") + b"5\r\nhello\r\n"),
        ("S 5.1", "names of every sign", head(ok, "!#$%&'*+.^_`|~0: x", "Set_Cookie: a", "Content-Length: 0")),
        ("S 5.5", "octets above ASCII", head(ok, "X-A: é", "Content-Length: 0")),
        ("S 7.6.1", "hop-by-hop fields", head(ok, "Connection: X-A", "X-A: 1", "TE: x", "Content-Length: 0")),
        ("S 7.8", "Upgrade", head(ok, "Connection: upgrade", "Upgrade: h2c", "Content-Length: 0")),
    ):
        yield Message(section, f"answer: {name}", octets, is_answer=True)


MESSAGES = [
    *(Message(hostile.section, hostile.name, hostile.octets) for hostile in [*HOSTILE_HEADS, *HOSTILE_BODIES]),
    *(Message(hostile.section, hostile.name, hostile.octets, is_answer=True) for hostile in HOSTILE_ANSWERS),
    *_good_requests(),
    *_good_answers(),
]


# What becomes of it -----------------------------------------------------------------------------------------------


class Reach(IntEnum):
    """How much of a message was passed on. PART is also what http.server or http.client reads as no message."""

    NOTHING = 0
    PART = 1
    WHOLE = 2


class Outcome(NamedTuple):
    told: str
    """The status that the client got; "closed" without an answer, "no head" for one without a status."""

    reach: Reach
    passed: tuple[str, ...]
    """The start line and the framing, Host and hop-by-hop fields of each message that was passed on."""

    def __str__(self) -> str:
        return f"{self.told}, {self.reach.name.lower()}" + "".join(f" [{message}]" for message in self.passed)


_NOTED = frozenset(
    b"host content-length transfer-encoding connection keep-alive proxy-connection te trailer upgrade expect".split()
)
_INTERIM = re.compile(rb"(?:HTTP/1\.1 1(?!01)[0-9]{2}[^\r]*\r\n(?:[^\r]+\r\n)*\r\n)*")
_STATUS = re.compile(rb"HTTP/1\.[0-9] ([0-9]{3})(?![0-9])")
_VERSION = re.compile(rb"\A([^\r\n]* HTTP/1\.)0(?=\r\n)")
_CODING = re.compile(rb"(?i)(?<=\r\ntransfer-encoding: )chunked(?=\r\n)")
_OWN_ANSWERS = ("500", "502", "504")  # none of the answers here has one of these


def _final(octets: bytes) -> bytes:
    """What a client got, without interim answers."""
    interim = _INTERIM.match(octets)
    assert interim
    return octets[interim.end() :]


def _told(octets: bytes) -> str:
    status = _STATUS.match(octets)
    return status[1].decode() if status else "no head" if octets else "closed"


def _noted(octets: bytes) -> str:
    """A head in short, however broken: `GET / HTTP/1.1 | host: a.test`."""
    start, *lines = octets.split(b"\r\n\r\n")[0].split(b"\n")
    fields = [line.strip().partition(b":") for line in lines]
    notes = sorted(name.lower() + b": " + value.strip() for name, _, value in fields if name.lower().strip() in _NOTED)
    return " | ".join(ascii(note.decode("latin-1"))[1:-1] for note in [start.rstrip(b"\r"), *notes])


def _read_request(octets: bytes) -> Read:
    """The request that begins these octets. HAProxy leaves HTTP/1.0 and the coding's capitals as they came."""
    return read_by_http_server(_CODING.sub(b"chunked", _VERSION.sub(rb"\g<1>1", octets)))


def request_outcome(told: str, taken: Sequence[bytes]) -> Outcome:
    """What became of a request of which connections to the backend brought these octets."""
    reach, passed = (Reach.PART if taken else Reach.NOTHING), []
    for octets in taken:
        while octets:
            passed.append(_noted(octets))
            try:
                octets = _read_request(octets).rest
            except NotRead:
                break
            reach = Reach.WHOLE
    return Outcome(told, reach, tuple(passed))


def answer_outcome(octets: bytes) -> Outcome:
    """What became of a backend's answer if its client got these octets."""
    final = _final(octets)
    told = _told(final)
    if told in _OWN_ANSWERS or not final:
        return Outcome(told, Reach.NOTHING, ())
    try:
        read_by_http_client(final)
    except NotRead:
        return Outcome(told, Reach.PART, (_noted(final),))
    return Outcome(told, Reach.WHOLE, (_noted(final),))


# How they differ --------------------------------------------------------------------------------------------------

OURS_STRICTER = "ours is stricter"
THEIRS_STRICTER = "theirs is stricter"
OTHER_STATUS = "same, other status"
OTHER_WORDS = "same, otherwise written"


class Difference(NamedTuple):
    message: Message
    other: str
    kind: str
    ours: Outcome
    theirs: Outcome

    @property
    def allowed(self) -> str:
        """Why we may pass on what the other does not; "" if there is no reason."""
        return ALLOWED.get((self.message.section, self.message.name), "")

    @property
    def is_laxness(self) -> bool:
        return self.kind == THEIRS_STRICTER and not self.allowed

    def __str__(self) -> str:
        words = [self.message.section, self.message.name, self.kind, f"ours {self.ours}", f"{self.other} {self.theirs}"]
        if self.kind == THEIRS_STRICTER:
            words.append(self.allowed or "A LAXNESS OF OURS")
        return "\t".join(words)


_TARGET_OVER_HOST = "M 3.2.2: the Host beside an absolute target is to be ignored and written anew from the target"
_TAB = "M 5.1: a tab around a value is optional white space, to be left out; it is left out"
_TRACE = "S 9.3.8, 7.6.2: TRACE is a method like others for a gateway, which counts Max-Forwards down"
_ASTERISK = "M 3.2.4, S 9.3.7: OPTIONS of the whole server, which its backend is asked for"

ALLOWED: Mapping[tuple[str, str], str] = {
    ("M 3.2.2", "absolute target over Host"): _TARGET_OVER_HOST,
    ("M 3.2.2", "absolute target without a path"): _TARGET_OVER_HOST,
    ("M 3.2.4", "absolute OPTIONS without a path"): _TARGET_OVER_HOST,
    ("M 3.2.4", "asterisk"): _ASTERISK,
    ("S 7.6.2", "Max-Forwards on OPTIONS"): _ASTERISK,
    ("S 7.6.2", "Max-Forwards on TRACE"): _TRACE,
    ("S 7.6.2", "Max-Forwards twice: the smaller holds"): _TRACE,
    ("M 3.2", "IPv6 host"): _TAB,
    ("M 6.2", "a length is written anew"): _TAB,
    ("S 10.1.1", "Expect in HTTP/1.0"): (
        "S 9.3.1, M 6.3: GET may have a body, Content-Length says how long it is, and it goes on in HTTP/1.1"
    ),
    ("S 10.1.1", "Expect twice"): "S 10.1.1, 5.3: Expect is a list, and this one names a single expectation",
    ("S 9.1", "method of every sign"): "S 9.1: a method is any token, and the backend knows which it has",
    ("M 3.2", "host with an empty label"): "M 3.2, RFC 3986 3.2.2: a reg-name may have any number of dots",
    ("S 7.7", "percent sign that escapes nothing"): (
        "S 7.7: path and query go on octet for octet; it is the backend that decodes them"
    ),
    ("M 6.3", "answer: interim with a length"): (
        "M 6.3, S 15.2: an interim answer has no body whatever it says, and the final one follows it"
    ),
    ("S 7.8", "Upgrade"): "S 7.8: the protocol's own fields, like Sec-WebSocket-Key, are for the backend to judge",
    ("S 7.8", "Upgrade in HTTP/1.0"): "S 7.8: Upgrade is to be ignored in HTTP/1.0; it is left out",
}
"""Messages that we pass on and another does not, by section and name: why the RFC is on our side."""


def kind_of_difference(ours: Outcome, theirs: Outcome) -> str:
    """One of the four above; "" where there is none."""
    if ours.reach != theirs.reach:
        return OURS_STRICTER if ours.reach < theirs.reach else THEIRS_STRICTER
    if ours.told != theirs.told:
        return OTHER_STATUS
    return OTHER_WORDS if ours.passed != theirs.passed else ""


def differences(outcomes: Mapping[str, Sequence[Outcome]], other: str) -> list[Difference]:
    """Those between ours and another, in the order of MESSAGES."""
    return [
        Difference(message, other, kind, ours, theirs)
        for message, ours, theirs in zip(MESSAGES, outcomes["ours"], outcomes[other], strict=True)
        if (kind := kind_of_difference(ours, theirs))
    ]


# The proxies ------------------------------------------------------------------------------------------------------

_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"])


def program(name: str) -> str | None:
    """Where it is installed; servers are not on everyone's PATH."""
    return shutil.which(name, path=_PATH)


@contextmanager
def _ours(directory: Path, backend: int) -> Iterator[int]:
    timeouts = {"request_head": SILENCE, "client": SILENCE, "server": SILENCE}
    probes = {"type": "tcp", "interval": 1000}  # one at the start, which sends nothing
    with running(directory, [("127.0.0.1", backend)], timeouts=timeouts, health_check=probes) as balancer:
        yield balancer.port


@contextmanager
def _haproxy(directory: Path, backend: int) -> Iterator[int]:
    [port] = free_ports(1)
    milliseconds = round(SILENCE * 1000)
    config = directory / "haproxy.cfg"
    config.write_text(f"""
global
    nbthread 1
defaults
    mode http
    http-reuse safe
    timeout connect 5s
    timeout http-request {milliseconds}
    timeout client {milliseconds}
    timeout server {milliseconds}
listen front
    bind 127.0.0.1:{port}
    server back 127.0.0.1:{backend}
""")
    with _listening(["haproxy", "-db", "-f", str(config)], directory, port):
        yield port


@contextmanager
def _nginx(directory: Path, backend: int) -> Iterator[int]:
    [port] = free_ports(1)
    milliseconds = round(SILENCE * 1000)
    paths = " ".join(
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = directory / "nginx.conf"
    config.write_text(f"""
        daemon off;
        {"user root;" if os.geteuid() == 0 else ""}
        worker_processes 1;
        pid {directory}/pid;
        error_log stderr error;
        events {{ }}
        http {{
            access_log off;
            {paths}
            upstream back {{ server 127.0.0.1:{backend}; keepalive 8; }}
            server {{
                listen 127.0.0.1:{port};
                client_header_timeout {milliseconds}ms;
                client_body_timeout {milliseconds}ms;
                location / {{
                    proxy_pass http://back;
                    proxy_http_version 1.1;
                    proxy_set_header Connection "";
                    proxy_set_header Host $host;
                    proxy_read_timeout {milliseconds}ms;
                }}
            }}
        }}""")
    with _listening(["nginx", "-p", str(directory), "-e", "stderr", "-c", str(config)], directory, port):
        yield port


@contextmanager
def _listening(command: Sequence[str], directory: Path, port: int) -> Iterator[None]:
    """A program, from when its port takes connections."""
    output = directory / "output"
    found = program(command[0])
    assert found, f"{command[0]} is not installed"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [found, *command[1:]], stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=directory
        )

    def listens() -> bool:
        assert process.poll() is None, f"{command[0]} ended: {output.read_text(errors='replace')}"
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    try:
        eventually(listens)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


Proxy = Callable[[Path, int], AbstractContextManager[int]]
OTHERS: dict[str, Proxy] = {"haproxy": _haproxy, "nginx": _nginx}


def installed() -> list[str]:
    return [name for name in OTHERS if program(name)]


# One message after the other --------------------------------------------------------------------------------------


class Recorder:
    """A backend that takes down every octet of each connection, and answers what http.server reads as whole."""

    def __init__(self) -> None:
        self.answer = LAST
        self._changed = threading.Condition()  # guards the two below
        self._taken: list[bytearray] = []
        self._ended = 0  # connections

    def serve(self, connection: Connection) -> None:
        taken = bytearray()
        with self._changed:
            self._taken.append(taken)
        try:
            while piece := connection.sock.recv(65536):
                taken += piece
                try:
                    request = _read_request(bytes(taken))
                except NotRead:
                    continue
                connection.send(LAST if request.start[1] == "/marker" else self.answer)
                connection.sock.shutdown(socket.SHUT_WR)
        finally:
            with self._changed:
                self._ended += 1
                self._changed.notify_all()

    def taken(self, fake: FakeBackend) -> list[bytes]:
        """What each connection brought since the last call, once they have all ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended == fake.accepted, PATIENCE), "a connection that stays"
            octets = [bytes(taken) for taken in self._taken if taken]
            self._taken.clear()
        return [taken for taken in octets if not taken.startswith(b"GET /marker ")]


def play(proxy: Proxy, directory: Path) -> list[Outcome]:
    """What becomes of each message in front of and behind this proxy, which keeps its files in `directory`."""
    directory.mkdir()
    recorder = Recorder()
    with FakeBackend(recorder.serve) as fake, proxy(directory, fake.port) as port:

        def taken() -> list[bytes]:
            """Connections are accepted in their order: once a last one brought its request, none is on its way."""
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
                sock.sendall(MARKER)
                assert read_response(sock).status == 204
                sock.shutdown(socket.SHUT_WR)
            return recorder.taken(fake)

        outcomes = []
        for message in MESSAGES:
            recorder.answer = message.octets if message.is_answer else LAST
            octets = _answer_to(ASK if message.is_answer else message.octets, port)
            requests = taken()
            if message.is_answer:
                outcomes.append(answer_outcome(octets))
            else:
                outcomes.append(request_outcome(_told(_final(octets)), requests))
        return outcomes


_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


def _answer_to(octets: bytes, port: int) -> bytes:
    """What comes back for these. The client goes once it has a whole answer; until then its end might cancel them."""
    came = b""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        try:
            sock.sendall(octets)
            while piece := sock.recv(65536):
                came += piece
                try:
                    read_by_http_client(_final(came))
                except NotRead:
                    continue
                sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno not in _GONE:
                raise
    return came


def play_all(directory: Path) -> dict[str, list[Outcome]]:
    """The outcomes, message by message, of ours and of the others that are installed; all at the same time."""
    proxies = {"ours": _ours, **{name: OTHERS[name] for name in installed()}}
    with ThreadPoolExecutor(len(proxies), "play") as pool:
        played = {name: pool.submit(play, proxy, directory / name) for name, proxy in proxies.items()}
    return {name: outcomes.result() for name, outcomes in played.items()}


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="lb-differential-") as directory:
        outcomes = play_all(Path(directory))
    laxnesses = 0
    for other in OTHERS:
        if other not in outcomes:
            print(f"# {other} is not installed\n")
            continue
        found = differences(outcomes, other)
        laxnesses += sum(difference.is_laxness for difference in found)
        print(f"# ours and {other}\n", *found, "", sep="\n")
        kinds = Counter(difference.kind for difference in found)
        print(*(f"{number}\t{kind}" for kind, number in kinds.most_common()), "", sep="\n")
    print(f"{len(MESSAGES)} messages, of which was passed on:")
    for name, played in outcomes.items():
        reached = Counter(outcome.reach for outcome in played)
        print(f"{name}\t" + ", ".join(f"{reach.name.lower()} {reached[reach]}" for reach in Reach))
    print(f"{laxnesses} laxnesses of ours")
    return 1 if laxnesses else 0


if __name__ == "__main__":
    sys.exit(main())
