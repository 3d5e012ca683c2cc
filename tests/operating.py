"""The operator's port with a stand-in for the balancer behind it, and what its clients say to it."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from balancer.admin import AdminServer
from balancer.backend import Backend
from balancer.config import AdminPort, Server
from conftest import PATIENCE
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


def error(answer: Answer) -> str:
    """The line of an answer that is an error."""
    assert answer.headers["Content-Type"] == "application/json"
    text = json.loads(answer.body)
    assert list(text) == ["error"]
    assert "\n" not in text["error"]
    return text["error"]


def raising(exception: Exception) -> Callable[[], object]:
    def refuse() -> object:
        raise exception

    return refuse


ALL_CHANGES = [
    ("POST", "/api/backends", {"host": "h", "port": 1}),
    ("PATCH", "/api/backends/1", {"state": "maint"}),
    ("DELETE", "/api/backends/1", None),
    ("POST", "/api/reload", None),
]
