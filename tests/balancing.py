"""A balancer within the test's own process, made as servers.json would make it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from balancer.balancer import LoadBalancer
from balancer.config import parse
from conftest import PATIENCE


@contextmanager
def running(
    tmp_path: Path, backends: Sequence[tuple[str, int] | dict[str, Any]], **keys: Any
) -> Iterator[LoadBalancer]:
    """A balancer on a free port with these backends, ids 1, 2, 3 ...; `keys` are those of servers.json.

    The log is `tmp_path / "lb.log"`. It is stopped at the end, and what is still in hand then is cut.
    """
    servers = [
        {"id": number, **(backend if isinstance(backend, dict) else {"host": backend[0], "port": backend[1]})}
        for number, backend in enumerate(backends, 1)
    ]
    log = {"file": str(tmp_path / "lb.log")}
    settings = {"servers": servers, "listen": {"port": 0}, "log": log, "admin": {"address": "off"}, **keys}
    balancer = LoadBalancer(parse(json.dumps(settings), "test", tmp_path))
    balancer.start()
    try:
        yield balancer
    finally:
        balancer.stop(patience=0.0)


def connect(balancer: LoadBalancer) -> socket.socket:
    """A client's connection to it, which gives up when the suite's patience is over."""
    return socket.create_connection((balancer.host, balancer.port), timeout=PATIENCE)


def log_lines(tmp_path: Path) -> list[str]:
    """The log's lines so far. It is complete once the balancer has stopped."""
    return (tmp_path / "lb.log").read_text().splitlines()
