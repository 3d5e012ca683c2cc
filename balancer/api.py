"""What can be asked of the balancer and done to it, path by path. It is done by an `Operator`.

Everything under /api is JSON, and so is every error: {"error": "one line for people"}. A change of a backend that comes
with `?persist=1` is also written to the file.

400  the request, its query or its body cannot be read
404  no such path, backend or request
405  not by this method
409  it cannot be done as things are; or it was done, and could not be written to the file
411, 413, 415  the body comes without a length, is too large, or is of another type
422  a value in the body, or in the file to be loaded again, is wrong
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.message import Message
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs, quote, unquote

from balancer.backend import Backend
from balancer.checks import choices, nearest, shown
from balancer.config import ConfigError

LARGEST_BODY = 65536
CHANGES = ("state", "weight", "max_connections")
SWITCH = {"1": True, "true": True, "0": False, "false": False}


class Figures(Protocol):
    """What there is to read, as plain values for JSON. `sample` is called several times a second."""

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


class Call(NamedTuple):
    """A request that was let in."""

    id: str  # "" where the path has none
    who: str
    persist: bool
    body: Mapping[str, Any]


class Answer(NamedTuple):
    status: int
    kind: str  # media type
    body: bytes
    fields: Mapping[str, str] = {}


def in_json(value: Any, status: int = 200, fields: Mapping[str, str] = {}) -> Answer:
    body = json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n"
    return Answer(status, "application/json", body.encode(), fields)


class Refused(Exception):
    """A request that is answered with an error; the text is for people."""

    def __init__(self, status: int, text: str, fields: Mapping[str, str] = {}) -> None:
        super().__init__(" ".join(text.split()))
        self.status = status
        self.fields = fields

    def answer(self) -> Answer:
        return in_json({"error": str(self)}, self.status, self.fields)


class Api:
    """What each path does. Methods that are given a call raise Refused."""

    def __init__(self, operator: Operator, page: Answer) -> None:
        self.operator = operator
        self.figures = operator.status
        self.page = page

    def answer(self, route: Route, id: str, who: str, query: str, body: bytes) -> Answer:
        """What comes of a request that was let in."""
        try:
            call = Call(id, who, find_persist(route, query), parse_object(body) if route.has_body else {})
            return route.act(self, call)
        except Refused as refused:
            return refused.answer()

    def metrics(self, call: Call) -> Answer:
        text = self.figures.prometheus()
        return Answer(200, "text/plain; version=0.0.4; charset=utf-8", text.encode())

    def health(self, call: Call) -> Answer:
        status, text = (503, b"draining\n") if self.operator.draining else (200, b"ok\n")
        return Answer(status, "text/plain; charset=utf-8", text)

    def backend(self, call: Call) -> Answer:
        return in_json(self._shown(call.id))

    def request(self, call: Call) -> Answer:
        explanation = self.operator.explanation(call.id)
        if explanation is None:
            raise _missing("request", call.id, "kept")
        return in_json(explanation)

    def add(self, call: Call) -> Answer:
        with _refusals(call):
            id = self.operator.add(call.body, call.who, call.persist).id
        return in_json(self._shown(id), 201, {"Location": f"/api/backends/{quote(id, safe='')}"})

    def change(self, call: Call) -> Answer:
        if not call.body:
            raise Refused(422, f"there is nothing to change; give {choices(CHANGES, 'and')}")
        for key in call.body:
            if key not in CHANGES:
                raise Refused(422, f"unknown key {_unknown(key, CHANGES)}")
        with _refusals(call):
            self.operator.change(call.id, call.body, call.who, call.persist)
        return in_json(self._shown(call.id))

    def remove(self, call: Call) -> Answer:
        with _refusals(call):
            self.operator.remove(call.id, call.who, call.persist)
        return in_json({"removed": call.id})

    def reload(self, call: Call) -> Answer:
        with _refusals(call):
            return in_json({"changed": self.operator.reload(call.who)})

    def _shown(self, id: str) -> Mapping[str, Any]:
        found = self.figures.backend(id)
        if found is None:
            raise _missing("backend", id, "there")
        return found


@contextmanager
def _refusals(call: Call) -> Iterator[None]:
    """What the operator's errors mean in HTTP."""
    try:
        yield
    except ConfigError as error:
        raise Refused(422, str(error)) from None
    except KeyError:
        if not call.id:
            raise
        raise _missing("backend", call.id, "there") from None
    except ValueError as error:
        raise Refused(409, str(error)) from None
    except OSError as error:
        raise Refused(500, f"{error.filename or 'the system'}: {error.strerror or error}") from None


def _missing(what: str, id: str, how: str) -> Refused:
    return Refused(404, f"no {what} with the id {shown(id)} is {how}; GET /api/{what}s lists those that are")


def _unknown(word: str, words: Sequence[str]) -> str:
    near = nearest(word, words)
    return f"{shown(word)}; " + (f'did you mean "{near}"?' if near else f"there is {choices(words or ['none'], 'and')}")


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


ROUTES = (
    Route("GET", "/", lambda api, _: api.page),
    Route("GET", "/metrics", Api.metrics),
    Route("GET", "/healthz", Api.health, by_any_name=True),
    Route("GET", "/api/status", lambda api, _: in_json(api.figures.status())),
    Route("GET", "/api/backends", lambda api, _: in_json({"backends": api.figures.backends()})),
    Route("GET", "/api/backends/ID", Api.backend),
    Route("GET", "/api/events", lambda api, _: in_json({"events": api.figures.events()})),
    Route("GET", "/api/requests", lambda api, _: in_json({"requests": api.operator.explanations()})),
    Route("GET", "/api/requests/ID", Api.request),
    Route("GET", "/api/config", lambda api, _: in_json(api.operator.document())),
    Route("POST", "/api/backends", Api.add, has_body=True, can_persist=True),
    Route("PATCH", "/api/backends/ID", Api.change, has_body=True, can_persist=True),
    Route("DELETE", "/api/backends/ID", Api.remove, can_persist=True),
    Route("POST", "/api/reload", Api.reload),
)
PATHS = tuple(dict.fromkeys(route.path for route in ROUTES))


def find_route(method: str, path: str) -> tuple[Route, str]:
    """The route, and the ID in the path. HEAD goes where GET goes. Raises Refused."""
    found = {}
    for route in ROUTES:
        if match := re.fullmatch(route.path.replace("ID", "([^/]+)"), path):
            found[route.method] = route, "".join(match.groups())
    if not found:
        raise Refused(404, f"there is nothing at this path; there is {choices(PATHS, 'and')}")
    if "GET" in found:
        found["HEAD"] = found["GET"]
    if method not in found:
        raise Refused(405, f"this path takes {choices(found, 'and')}", {"Allow": ", ".join(found)})
    route, id = found[method]
    try:
        return route, unquote(id, errors="strict")
    except UnicodeDecodeError:
        raise Refused(400, "the id in the path is not percent-encoded UTF-8") from None


def find_persist(route: Route, query: str) -> bool:
    """What the query says of `persist`. Raises Refused for anything else that it says."""
    known = ("persist",) if route.can_persist else ()
    try:
        given = parse_qs(query, keep_blank_values=True, strict_parsing=True, max_num_fields=8) if query else {}
    except ValueError:
        raise Refused(400, "the query must be NAME=VALUE pairs with & between them") from None
    for name in given:
        if name not in known:
            raise Refused(400, f"unknown query parameter {_unknown(name, known)}")
    value, *more = given.get("persist", ["0"])
    if more or value not in SWITCH:
        raise Refused(400, f"persist must be {', '.join(SWITCH)}, and be there no more than once")
    return SWITCH[value]


def body_length(fields: Message) -> int:
    """How many octets of JSON there are to read. Raises Refused."""
    if fields.get_content_type() != "application/json":
        raise Refused(415, "the body must be JSON; send Content-Type: application/json")
    length = ", ".join(fields.get_all("Content-Length", [])).strip()
    if not length or "Transfer-Encoding" in fields:
        raise Refused(411, "the body must come with Content-Length, not chunked")
    if not re.fullmatch("[0-9]{1,18}", length):
        raise Refused(400, "Content-Length must be one number of octets")
    if int(length) > LARGEST_BODY:
        raise Refused(413, f"the body is larger than {LARGEST_BODY} octets")
    return int(length)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises Refused."""
    try:
        value = json.loads(body.decode(), object_pairs_hook=_distinct)
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Refused(400, f"the body is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError):
        raise Refused(400, "the body is nested too deeply, or has a number that is too long") from None
    if not isinstance(value, dict):
        raise Refused(422, 'the body must be a JSON object, such as {"state": "drain"}')
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise Refused(400, "the body has a key twice; keep one")
    return made
