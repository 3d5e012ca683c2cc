"""Who may read at the operator's port, and who may change anything.

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

import hmac
import ipaddress
import re
import socket
from collections.abc import Mapping
from email.message import Message
from pathlib import Path

from balancer.api import Refused, Route
from balancer.config import AdminPort, ConfigError, format_address

VARIABLE = "LB_ADMIN_TOKEN"
TOKEN = re.compile("[!-~]{8,1024}")
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[0-9]+(?:\.[0-9]+){3}\.?|([A-Za-z0-9_.-]+))(?::[0-9]{1,5})?")
"""An address, or a name, which is the one group."""


def find_token(admin: AdminPort, environ: Mapping[str, str]) -> str:
    """The token that changes need, "" for none. Raises ConfigError, also where there has to be one."""
    if not admin.host:
        return ""
    token, source = environ.get(VARIABLE, "").strip(), VARIABLE
    if not token and admin.token_file:
        source = f"admin.token_file: {admin.token_file}"
        try:
            with open(admin.token_file, encoding="utf-8-sig", errors="replace") as file:
                token = file.read(4096).strip()
        except OSError as error:
            raise ConfigError(
                f"{source}: cannot be read: {error.strerror}; mend that, or set {VARIABLE} instead"
            ) from None
    elif not token:
        if is_loopback(admin.host):
            return ""
        raise ConfigError(
            f"admin.address: {format_address(admin.host, admin.port)} can be reached from other machines, and there is "
            f"no token; set {VARIABLE} or admin.token_file, or listen on 127.0.0.1"
        )
    if not TOKEN.fullmatch(token):
        problem = "a token is 8 to 1024 visible ASCII characters without a space" if token else "is empty"
        raise ConfigError(
            f'{source}: {problem}; make one with: python3 -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return token


def anybody_can_read(path: str) -> bool:
    """Whether every user of this machine can."""
    try:
        return bool(Path(path).stat().st_mode & 0o004)
    except OSError:  # it was not needed, or is gone since
        return False


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there, as far as the host's spelling tells."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


class Gate:
    """Looks at the head of a request. Methods raise Refused."""

    def __init__(self, address: AdminPort, token: str) -> None:
        self._token = token.encode()
        self._open = not is_loopback(address.host)
        self._names = {"localhost", address.host.lower().rstrip(".")}
        if self._open:
            self._names.add(socket.gethostname().lower())

    def check(self, route: Route, fields: Message) -> None:
        if not route.by_any_name:
            self.check_host(fields)
        if route.changes:
            self.check_change(fields)

    def check_host(self, fields: Message) -> None:
        """May it be asked by this name?"""
        given = fields.get_all("Host", [])
        match = HOST.fullmatch(given[0].strip()) if len(given) == 1 else None
        if not match:
            raise Refused(400, "a request needs one Host: the name or address that this port was reached by")
        if match[1] is None:
            return
        name = match[1].lower().removesuffix(".")
        if name not in self._names and not (self._open and "." not in name) and not self._has_token(fields):
            raise Refused(
                403,
                f'this port does not answer to the name "{name[:100]}", which could be any site\'s (DNS rebinding); '
                "use its address or localhost, put the name in admin.address, or send the token",
            )

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
                f"start the balancer with {VARIABLE} set, or with admin.token_file",
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
