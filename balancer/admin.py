"""The operator's port: a page, figures, and changes, over plain HTTP. What is done is done by an `Operator`.

One request to a connection (`Connection: close`): a page that polls each second needs no more, and nothing that a
request leaves unread can be taken for the next one. Each connection has a thread of its own, at most MOST at a time,
and a deadline that `service_actions` keeps: a client that is silent, that drips or that does not read is cut. When all
are taken, the one that has waited longest makes room, so that silent ones never lock an operator out.

Who may do what:
- Reading needs no token. Changing does, and is refused where none is configured. It comes as
  `Authorization: Bearer TOKEN`; there are no cookies, so a browser never sends it by itself.
- A port that other machines can reach is not opened without a token (`find_token`). LB_ADMIN_TOKEN wins over
  `admin.token_file`, as flags win over the file; the file is not read then. An empty LB_ADMIN_TOKEN is none.
- A change is refused when a browser says that another site's page asks for it (Origin, Sec-Fetch-Site).
- DNS rebinding: a page whose own name was made to lead here is, to a browser, of this origin, and could read all that
  needs no token. Such a page needs a name with a dot that its author owns. So a request is refused unless its Host is
  an address, `localhost` or the name in `admin.address`. A port that other machines can reach also answers to this
  machine's name and to names without a dot (a container's). By any other name the token has to come along, and no
  such page has it. The port in Host does not matter: behind a forwarded one it is another.
- `/healthz` tells nothing worth hiding, and whoever stands in front of us may ask by any name or none.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import hmac
import io
import ipaddress
import json
import math
import os
import re
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol
from urllib.parse import parse_qsl, quote, unquote

from balancer.backend import Backend
from balancer.config import AdminPort, ConfigError, format_address
from balancer.listener import PAUSE, SHORT_OF_DESCRIPTORS, bind

PAGE = Path(__file__).with_name("page.html")
TOKEN_VARIABLE = "LB_ADMIN_TOKEN"
TOKEN = re.compile("[!-~]{8,1024}")

LARGEST_HEAD = 65536
LARGEST_BODY = 65536
MOST = 64
"""Connections at a time."""
PATIENCE = 10.0
"""Seconds a client is given to send its request, and again to take the answer."""
LINGER = 1.0
"""Seconds a client is given to hang up after its answer."""
ROOM_PATIENCE = 1.0
STOP_PATIENCE = 2.0
POLL = 0.25
SAMPLE = 1.0
QUIET = 10.0
"""Seconds from one line about refused changes to the next."""
NEVER = math.inf

HOW_TO_TOKEN = 'make one with: python3 -c "import secrets; print(secrets.token_urlsafe())"'


# What the port needs of the balancer -------------------------------------------------------------------------------


class Figures(Protocol):
    """What there is to read, as plain values for JSON."""

    def status(self) -> Mapping[str, Any]: ...
    def backends(self) -> Sequence[Mapping[str, Any]]: ...
    def backend(self, id: str, /) -> Mapping[str, Any] | None: ...
    def events(self) -> Sequence[Mapping[str, Any]]: ...
    def prometheus(self) -> str: ...
    def sample(self) -> None: ...


class Operator(Protocol):
    """What an operator may ask for and do. Any method may be called from several threads at once.

    `who` is for the log. Changes raise ConfigError for a value that is wrong, KeyError for an id that no backend has,
    ValueError for what cannot be done as things are, and OSError where the file cannot be written. All but KeyError
    have a text for people.
    """

    @property
    def status(self) -> Figures: ...
    @property
    def draining(self) -> bool: ...
    def explanation(self, id: str, /) -> Mapping[str, Any] | None: ...
    def explanations(self) -> Sequence[Mapping[str, Any]]: ...
    def document(self) -> Mapping[str, Any]: ...
    def add(self, entry: Mapping[str, Any], /, who: str, persist: bool) -> Backend: ...
    def change(self, id: str, changes: Mapping[str, Any], /, who: str, persist: bool) -> None: ...
    def remove(self, id: str, /, who: str, persist: bool) -> None: ...
    def reload(self, who: str) -> Sequence[str]: ...


OnEvent = Callable[[str, str], None]


# The token ---------------------------------------------------------------------------------------------------------


def find_token(admin: AdminPort, environ: Mapping[str, str]) -> str:
    """The token that changes need, "" for none. Raises ConfigError, also where there has to be one."""
    if not admin.host:
        return ""
    if given := environ.get(TOKEN_VARIABLE, "").strip():
        return _checked_token(given, TOKEN_VARIABLE)
    if admin.token_file:
        return _checked_token(_read_token(admin.token_file), f"admin.token_file: {admin.token_file}")
    if not is_loopback(admin.host):
        raise ConfigError(
            f"admin.address: {format_address(admin.host, admin.port)} can be reached from other machines, and there is "
            f"no token; set {TOKEN_VARIABLE} or admin.token_file, or listen on 127.0.0.1"
        )
    return ""


def _read_token(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            return file.read(4096).strip()
    except OSError as error:
        raise ConfigError(
            f"admin.token_file: {path}: cannot be read: {error.strerror}; mend that, or set {TOKEN_VARIABLE} instead"
        ) from None


def _checked_token(token: str, source: str) -> str:
    if not token:
        raise ConfigError(f"{source}: is empty; {HOW_TO_TOKEN}")
    if not TOKEN.fullmatch(token):
        raise ConfigError(f"{source}: a token is 8 to 1024 visible ASCII characters without a space; {HOW_TO_TOKEN}")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there, as far as the host's spelling tells."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


# Answers -----------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    status: int
    kind: str  # media type
    body: bytes
    fields: Mapping[str, str] = {}


class Refused(Exception):
    """A request that is answered with an error; the text is one line for people."""

    def __init__(self, status: int, text: str, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.fields = fields or {}


def in_json(value: Any, status: int = 200, fields: Mapping[str, str] | None = None) -> Answer:
    body = json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n"
    return Answer(status, "application/json", body.encode(), fields or {})


def in_error(status: int, text: str, fields: Mapping[str, str] | None = None) -> Answer:
    return in_json({"error": " ".join(text.split())}, status, fields)


def in_text(text: str, status: int = 200, kind: str = "text/plain; charset=utf-8") -> Answer:
    return Answer(status, kind, text.encode("utf-8", "replace"))


COMMON_FIELDS = {
    "Connection": "close",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""On every answer; an answer's own fields win."""

_INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1\s*>", re.DOTALL | re.IGNORECASE)


def page_policy(page: str) -> str:
    """The Content-Security-Policy under which the scripts and styles that stand in the page work, and nothing else."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind.lower()].append(f"'sha256-{digest}'")
    script, style = (" ".join(dict.fromkeys(hashes[kind])) or "'none'" for kind in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )


# What can be asked for ---------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A request that was let in."""

    id: str  # "" where the path has none
    who: str
    persist: bool
    body: Mapping[str, Any]


CHANGES = ("state", "weight", "max_connections")


class Api:
    """What each path does. Raises Refused."""

    def __init__(self, operator: Operator, page: str) -> None:
        self._operator = operator
        policy = {"Content-Security-Policy": page_policy(page)}
        self._page = Answer(200, "text/html; charset=utf-8", page.encode(), policy)

    def page(self, call: Call) -> Answer:
        return self._page

    def metrics(self, call: Call) -> Answer:
        return in_text(self._operator.status.prometheus(), kind="text/plain; version=0.0.4; charset=utf-8")

    def health(self, call: Call) -> Answer:
        return in_text("draining\n", 503) if self._operator.draining else in_text("ok\n")

    def status(self, call: Call) -> Answer:
        return in_json(self._operator.status.status())

    def backends(self, call: Call) -> Answer:
        return in_json({"backends": self._operator.status.backends()})

    def backend(self, call: Call) -> Answer:
        return in_json(self._shown(call.id))

    def events(self, call: Call) -> Answer:
        return in_json({"events": self._operator.status.events()})

    def requests(self, call: Call) -> Answer:
        return in_json({"requests": self._operator.explanations()})

    def request(self, call: Call) -> Answer:
        explanation = self._operator.explanation(call.id)
        if explanation is None:
            raise Refused(404, f"{_named('request', call.id)} is kept; GET /api/requests lists those that are")
        return in_json(explanation)

    def config(self, call: Call) -> Answer:
        return in_json(self._operator.document())

    def add(self, call: Call) -> Answer:
        with self._refusals(call):
            id = self._operator.add(call.body, call.who, call.persist).id
        return in_json(self._shown(id), 201, {"Location": f"/api/backends/{quote(id, safe='')}"})

    def change(self, call: Call) -> Answer:
        if not call.body:
            raise Refused(422, f"there is nothing to change; give {_choices(CHANGES)}")
        for key in call.body:
            if key not in CHANGES:
                raise Refused(422, f"unknown key {_unknown(key, CHANGES)}")
        with self._refusals(call):
            self._operator.change(call.id, call.body, call.who, call.persist)
        return in_json(self._shown(call.id))

    def remove(self, call: Call) -> Answer:
        with self._refusals(call):
            self._operator.remove(call.id, call.who, call.persist)
        return in_json({"removed": call.id})

    def reload(self, call: Call) -> Answer:
        with self._refusals(call):
            return in_json({"changed": self._operator.reload(call.who)})

    def _shown(self, id: str) -> Mapping[str, Any]:
        return self._operator.status.backend(id) or _no_backend(id)

    @contextmanager
    def _refusals(self, call: Call) -> Iterator[None]:
        """What the operator's errors mean in HTTP."""
        try:
            yield
        except ConfigError as error:
            raise Refused(422, str(error)) from None
        except KeyError:
            if not call.id:
                raise
            _no_backend(call.id)
        except ValueError as error:
            raise Refused(409, str(error)) from None
        except OSError as error:  # the file that was to be written
            raise Refused(500, f"{error.filename or 'the system'}: {error.strerror or error}") from None


def _no_backend(id: str) -> NoReturn:
    raise Refused(404, f"{_named('backend', id)} is there; GET /api/backends lists those that are")


def _named(what: str, id: str) -> str:
    return f"no {what} with the id {json.dumps(id[:64])}"


def _unknown(word: str, words: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word[:64].lower(), words, n=1)
    return f"{json.dumps(word[:40])}; " + (f'did you mean "{near[0]}"?' if near else f"there is {_choices(words)}")


def _choices(words: tuple[str, ...]) -> str:
    *most, end = words or ("none",)
    return f"{', '.join(most)} and {end}" if most else end


class Route(NamedTuple):
    method: str
    path: str  # ID stands for one segment
    act: Callable[[Api, Call], Answer]
    has_body: bool = False
    can_persist: bool = False
    by_any_name: bool = False  # whatever Host says

    @property
    def changes(self) -> bool:
        return self.method != "GET"

    def match(self, path: str) -> str | None:
        """The ID in a path, still encoded, and "" where there is none to be; None when the path is another."""
        stem, has_id, _ = self.path.partition("ID")
        id = path.removeprefix(stem)
        if has_id:
            return id if id and id != path and "/" not in id else None
        return "" if path == self.path else None


ROUTES = (
    Route("GET", "/", Api.page),
    Route("GET", "/metrics", Api.metrics),
    Route("GET", "/healthz", Api.health, by_any_name=True),
    Route("GET", "/api/status", Api.status),
    Route("GET", "/api/backends", Api.backends),
    Route("GET", "/api/backends/ID", Api.backend),
    Route("GET", "/api/events", Api.events),
    Route("GET", "/api/requests", Api.requests),
    Route("GET", "/api/requests/ID", Api.request),
    Route("GET", "/api/config", Api.config),
    Route("POST", "/api/backends", Api.add, has_body=True, can_persist=True),
    Route("PATCH", "/api/backends/ID", Api.change, has_body=True, can_persist=True),
    Route("DELETE", "/api/backends/ID", Api.remove, can_persist=True),
    Route("POST", "/api/reload", Api.reload),
)
PATHS = tuple(dict.fromkeys(route.path for route in ROUTES))


def find_route(method: str, path: str) -> tuple[Route, str]:
    """The route, and the ID in the path. HEAD goes where GET goes. Raises Refused."""
    found = {route.method: (route, id) for route in ROUTES if (id := route.match(path)) is not None}
    if not found:
        raise Refused(404, f"there is nothing at this path; there is {_choices(PATHS)}")
    if "GET" in found:
        found["HEAD"] = found["GET"]
    if method not in found:
        raise Refused(405, f"this path takes {_choices(tuple(found))}", {"Allow": ", ".join(found)})
    route, id = found[method]
    try:
        return route, unquote(id, errors="strict")
    except UnicodeDecodeError:
        raise Refused(400, "the id in the path is not percent-encoded UTF-8") from None


_PERSIST = {"1": True, "true": True, "0": False, "false": False}


def find_persist(route: Route, query: str) -> bool:
    """What the query says of `persist`. Raises Refused for anything else that it says."""
    known: tuple[str, ...] = ("persist",) if route.can_persist else ()
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=8) if query else []
    except ValueError:
        raise Refused(400, "the query must be NAME=VALUE pairs with & between them") from None
    for name, _ in pairs:
        if name not in known:
            raise Refused(400, f"unknown query parameter {_unknown(name, known)}")
    if len(pairs) > 1:
        raise Refused(400, "persist is given more than once")
    value = pairs[0][1] if pairs else "0"
    if value not in _PERSIST:
        raise Refused(400, f"persist must be {', '.join(_PERSIST)}")
    return _PERSIST[value]


# Who may ------------------------------------------------------------------------------------------------------------

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9_.-]+))(?::[0-9]{1,5})?")


class Gate:
    """Who may read and who may change: see the head of this file. Methods raise Refused."""

    def __init__(self, address: AdminPort, token: str) -> None:
        self._token = token.encode()
        self._open = not is_loopback(address.host)
        self._names = {"localhost", address.host.lower().rstrip(".")}
        if self._open:
            self._names.add(socket.gethostname().lower())

    def check_host(self, fields: Message) -> None:
        given = fields.get_all("Host", [])
        match = _HOST.fullmatch(given[0].strip()) if len(given) == 1 else None
        if not match:
            raise Refused(400, "a request needs one Host: the name or address that this port was reached by")
        literal, name = match.groups()
        if not literal and not self._is_known(name.lower().removesuffix(".")) and not self._has_token(fields):
            raise Refused(
                403,
                f'this port does not answer to the name "{name[:100]}", which could be any site\'s (DNS rebinding); '
                "use its address or localhost, put the name in admin.address, or send the token",
            )

    def _is_known(self, name: str) -> bool:
        if name in self._names or (self._open and "." not in name):
            return True
        try:
            ipaddress.IPv4Address(name)
        except ValueError:
            return False
        return True

    def check_change(self, fields: Message) -> None:
        """May the client change anything? Its Host has been checked."""
        host = fields["Host"].strip().lower()
        # A page may be behind a proxy that adds TLS; what counts is that it came from here.
        same = all(origin.lower() in (f"http://{host}", f"https://{host}") for origin in fields.get_all("Origin", []))
        if not same or any(site not in ("same-origin", "none") for site in fields.get_all("Sec-Fetch-Site", [])):
            raise Refused(403, "a page of another origin asks for this change; use the page of this port itself")
        if not self._token:
            raise Refused(
                403,
                "changes need a token, and none is configured; "
                f"start the balancer with {TOKEN_VARIABLE} set, or with admin.token_file",
            )
        if not self._has_token(fields):
            problem = "wrong" if "Authorization" in fields else "missing"
            raise Refused(
                401,
                f"the token is {problem}; send Authorization: Bearer TOKEN",
                {"WWW-Authenticate": 'Bearer realm="load balancer"'},
            )

    def _has_token(self, fields: Message) -> bool:
        scheme, _, given = fields.get("Authorization", "").partition(" ")
        # Field values are read as ISO-8859-1, so this gives back the octets as they came.
        same = hmac.compare_digest(given.strip().encode("latin-1"), self._token)
        return same and scheme.lower() == "bearer" and bool(self._token)


class Sparing:
    """Says at most one line in QUIET seconds; of those between it keeps the last, and their number."""

    def __init__(self, level: str, on_event: OnEvent, clock: Callable[[], float]) -> None:
        self._level = level
        self._on_event = on_event
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows
        self._text = ""
        self._count = 0
        self._due = -math.inf

    def say(self, text: str) -> None:
        with self._lock:
            self._text = text
            self._count += 1
        self.flush()

    def flush(self) -> None:
        """Say what is unsaid, if it is time."""
        with self._lock:
            now = self._clock()
            if not self._count or now < self._due:
                return
            text, count, self._count = self._text, self._count, 0
            self._due = now + QUIET
        self._on_event(self._level, text if count == 1 else f"{text} (the last of {count} since the line before)")


# HTTP --------------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """One request and its answer. An OSError that it raises is a client that has gone, or was cut."""

    server: AdminServer
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # so that even a request of HTTP/0.9 is answered with a head
    request_version = "HTTP/1.1"
    command = ""
    expects_continue = False

    def handle(self) -> None:
        head = self._read_head()
        if len(head) > LARGEST_HEAD:
            self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif head and self._parse(head):
            self._send(self._answer())

    def _read_head(self) -> bytes:
        """A whole head, or one that is too long already; b"" when the client left before its end.

        http.server takes the end of the stream for the end of the head. Half a request must not be acted on.
        """
        head = bytearray()
        while len(head) <= LARGEST_HEAD:
            line = self.rfile.readline(LARGEST_HEAD + 1 - len(head))
            if not line:
                return b""
            head += line
            if line in (b"\r\n", b"\n"):
                break
        return bytes(head)

    def _parse(self, head: bytes) -> bool:
        line, _, fields = head.partition(b"\n")
        self.raw_requestline = line
        stream, self.rfile = self.rfile, io.BytesIO(fields)
        try:
            return self.parse_request()
        finally:
            self.rfile = stream

    def _answer(self) -> Answer:
        server = self.server
        route: Route | None = None
        who = f"admin {format_address(*self.client_address[:2])}"
        path, _, query = self.path.partition("?")
        try:
            route, id = find_route(self.command, path)
            if not route.by_any_name:
                server.gate.check_host(self.headers)
            if route.changes:
                server.gate.check_change(self.headers)
            call = Call(id, who, find_persist(route, query), self._read_body() if route.has_body else {})
            server.allow(self.connection, NEVER)
            return route.act(server.api, call)
        except Refused as refused:
            if route and route.changes and refused.status in (401, 403):
                # The path as it came could be of any length and hold anything, even a token.
                server.refusals.say(f"{who}: {route.method} {route.path} was refused: {refused}")
            return in_error(refused.status, str(refused), refused.fields)
        except Exception as error:
            server.crashes.say(f"{who}: {route.method} {route.path}: {describe(error)}" if route else describe(error))
            return in_error(500, f"internal error, {type(error).__name__}; the log says more")

    def _read_body(self) -> dict[str, Any]:
        """The JSON object in the request's body. Raises Refused."""
        fields = self.headers
        if fields.get_content_type() != "application/json":
            raise Refused(415, "the body must be JSON; send Content-Type: application/json")
        lengths = fields.get_all("Content-Length", [])
        if "Transfer-Encoding" in fields or not lengths:
            raise Refused(411, "the body must come with Content-Length, not chunked")
        if len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", lengths[0].strip()):
            raise Refused(400, "Content-Length must be one number of octets")
        length = int(lengths[0])
        if length > LARGEST_BODY:
            raise Refused(413, f"the body is larger than {LARGEST_BODY} octets")
        if self.expects_continue:
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
        body = self.rfile.read(length)
        if len(body) < length:
            raise Refused(400, f"the body ended after {len(body)} of {length} octets")
        return parse_object(body)

    def handle_expect_100(self) -> bool:
        """The body is asked for when it is wanted: not by a request that is refused."""
        self.expects_continue = True
        return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the parser of http.server refuses. Its own text repeats what the client sent."""
        phrase = HTTPStatus(code).phrase.lower()
        self._send(in_error(code, f"{phrase}: send an HTTP/1.1 request, its head at most {LARGEST_HEAD} octets long"))

    def _send(self, answer: Answer) -> None:
        self.server.allow(self.connection, self.server.patience)
        self.send_response_only(answer.status)
        fields = {"Date": self.date_time_string(), "Content-Type": answer.kind, "Content-Length": str(len(answer.body))}
        for name, value in {**COMMON_FIELDS, **fields, **answer.fields}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: stderr is not ours, and the operator logs what was changed."""


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises Refused."""
    try:
        value = json.loads(body.decode(), object_pairs_hook=_distinct)
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Refused(400, f"the body is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    except ValueError:
        raise Refused(400, "the body has a number that is too long") from None
    if not isinstance(value, dict):
        raise Refused(422, 'the body must be a JSON object, such as {"state": "drain"}')
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise Refused(400, "the body has a key twice; keep one")
    return made


def describe(error: Exception) -> str:
    """One line that names the error and the place in the code."""
    *_, place = traceback.extract_tb(error.__traceback__)
    text = " ".join(str(error).split())
    return f"bug: {type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


class AdminServer(ThreadingHTTPServer):
    """The operator's port. The constructor binds it; raises OSError with a line for people.

    token     what changes need; "": there are none
    on_event  is told (level, text) from any thread
    patience  seconds that a client is given to send its request, and again to take the answer
    most      connections at a time
    """

    daemon_threads = True

    def __init__(
        self,
        address: AdminPort,
        token: str,
        operator: Operator,
        on_event: OnEvent,
        *,
        patience: float = PATIENCE,
        most: int = MOST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__((address.host, address.port), Handler, bind_and_activate=False)
        self.socket.close()  # socketserver knows IPv4 only
        try:
            page = PAGE.read_text(encoding="utf-8")
        except OSError as error:
            raise OSError(f"cannot read {PAGE}: {error.strerror}") from None
        self.socket = bind(address.host, address.port)
        host, port = self.socket.getsockname()[:2]
        self.url = f"http://{format_address(host, port)}"
        self.api = Api(operator, page)
        self.gate = Gate(address, token)
        self.refusals = Sparing("warning", on_event, clock)
        self.crashes = Sparing("error", on_event, clock)
        self.patience = patience
        self._token_file = address.token_file
        self._operator = operator
        self._on_event = on_event
        self._most = most
        self._clock = clock
        self._sample_due = clock()
        self._room = threading.Condition()  # guards the two that follow; notified when a connection was closed
        self._deadlines: dict[socket.socket, float] = {}  # of each open connection
        self._handlers: list[threading.Thread] = []  # those that have not ended, and perhaps some that have
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._token_file and _others_can_read(self._token_file):
            self._on_event("warning", f"{self._token_file}: anybody here can read the token; chmod o-r the file")
        self._thread = threading.Thread(target=self.serve_forever, args=(POLL,), name="admin", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the port, let changes under way end, and end every connection and thread. May be called twice."""
        self._stopping.set()
        if self._thread:
            with suppress(OSError):  # not on macOS, where the poll has to end by itself
                self.socket.shutdown(socket.SHUT_RDWR)
            self.shutdown()
            self._thread.join()
            self._thread = None
        self.server_close()
        for deadline in (sys.float_info.max, NEVER):  # first those that wait for a client, then those at work too
            self._cut_overdue(deadline)
            until = time.monotonic() + STOP_PATIENCE
            for handler in self._handlers:
                handler.join(max(0.0, until - time.monotonic()))
        if left := sum(handler.is_alive() for handler in self._handlers):
            self._on_event("error", f"admin: requests that did not end: {left}")

    def allow(self, request: socket.socket, seconds: float) -> None:
        """The connection is cut unless it has ended, or was given more time, in so many seconds."""
        with self._room:
            self._deadlines[request] = self._clock() + seconds

    # What follows is called by socketserver: on the thread "admin", or on a connection's own where it is said.

    def service_actions(self) -> None:
        now = self._clock()
        self._cut_overdue(now)
        self.refusals.flush()
        self.crashes.flush()
        if now >= self._sample_due:
            due = self._sample_due + SAMPLE
            self._sample_due = due if due > now else now + SAMPLE
            try:
                self._operator.status.sample()
            except Exception as error:  # without this thread there would be no port any more
                self.crashes.say(f"sampling: {describe(error)}")

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            request, address = self.socket.accept()
        except OSError as error:
            if error.errno in SHORT_OF_DESCRIPTORS:
                self._stopping.wait(PAUSE)  # the client stays in the backlog, and select would say so at once
            raise
        request.setblocking(True)  # on macOS it inherits the listener's mode
        return request, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give the connection a thread, for which another may have to go."""
        name = f"admin-{client_address[1]}"
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name=name, daemon=True
        )
        with self._room:
            if len(self._deadlines) >= self._most:
                longest = min(self._deadlines, key=self._deadlines.__getitem__)
                if self._deadlines[longest] < NEVER:
                    _cut(longest)
                if not self._room.wait_for(lambda: len(self._deadlines) < self._most, ROOM_PATIENCE):
                    request.close()
                    return
            self._deadlines[request] = self._clock() + self.patience
            self._handlers = [handler for handler in self._handlers if handler.is_alive()]
        thread.start()
        self._handlers.append(thread)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """On the connection's own thread."""
        try:
            self.finish_request(request, client_address)
            self._linger(request)
        except OSError:
            return  # the client has gone, or was cut
        except Exception:
            self.handle_error(request, client_address)
        finally:
            self.close_request(request)

    def _linger(self, request: socket.socket) -> None:
        """Let the client read its answer: closing a socket with unread octets resets the connection (RFC 9112, 9.6)."""
        self.allow(request, LINGER)
        request.shutdown(socket.SHUT_WR)
        while request.recv(LARGEST_BODY):
            continue

    def close_request(self, request: Any) -> None:
        """On the connection's own thread. The lock keeps `_cut` from a descriptor that is another's by then."""
        with self._room:
            self._deadlines.pop(request, None)
            request.close()
            self._room.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """On either kind of thread, while the error is being handled."""
        error = sys.exc_info()[1]
        if isinstance(error, Exception):
            self.crashes.say(f"admin {format_address(*client_address[:2])}: {describe(error)}")

    def _cut_overdue(self, now: float) -> None:
        with self._room:
            for request, deadline in self._deadlines.items():
                if deadline <= now:
                    _cut(request)


def _cut(request: socket.socket) -> None:
    """Wake the connection's thread, which ends. The lock is held, so that it is not closed meanwhile."""
    with suppress(OSError):  # it has gone by itself
        request.shutdown(socket.SHUT_RDWR)


def _others_can_read(path: str) -> bool:
    try:
        return bool(os.stat(path).st_mode & stat.S_IROTH)
    except OSError:  # it was not needed, or is gone since
        return False
