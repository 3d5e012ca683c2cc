"""What one `lb.py` asks another that is running, at its operator's port: nothing that needs a token."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from urllib.parse import quote

from balancer.config import AdminPort, Config, ConfigError, format_address, parse
from balancer.explain import as_text

PATIENCE = 5.0  # seconds


class Unreachable(Exception):
    """Nobody answers there; the text says where and why."""


def explanation(admin: AdminPort, request_id: str) -> str:
    """What became of a request, as a text. Raises Unreachable, and LookupError where the id is not known there."""
    status, found = _get(admin, f"/api/requests/{quote(request_id, safe='')}")
    if status == 404:
        raise LookupError(
            f"no request {request_id} is kept at {_address(admin)}; only the latest that failed, were retried or slow"
        )
    return as_text(found)


def running_config(config: Config) -> Config:
    """The configuration that runs at the operator's port of this one. Raises Unreachable."""
    _, document = _get(config.admin, "/api/config")
    try:
        return parse(json.dumps(document), _address(config.admin), config.base)
    except ConfigError as error:  # another version, or no balancer at all
        raise Unreachable(f"what runs at {error}") from None


def _address(admin: AdminPort) -> str:
    return format_address(admin.host, admin.port)


def _get(admin: AdminPort, path: str) -> tuple[int, Any]:
    if not admin.host:
        raise Unreachable("the operator's port is off; give --admin HOST:PORT, where the balancer has its own")
    connection = http.client.HTTPConnection(admin.host, admin.port, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, socket.timeout):
            reason = "no answer in time"
        raise Unreachable(f"no balancer answers at {_address(admin)}: {reason}") from None
    finally:
        connection.close()
