"""servers.json and flags become values that are already right, or one line that says what is not.

Each object of the file has a table from key to check. A check is given the value as JSON had it and its place, and
returns the value to use or raises the ConfigError that the place words. A new key is a field in a dataclass and a
line in a table. Seconds and octets throughout; the defaults are those of the dataclasses.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from balancer import checks
from balancer.checks import ConfigError as ConfigError  # noqa: PLC0414 - it is found here by those who load
from balancer.checks import Place
from balancer.checks import format_address as format_address  # noqa: PLC0414 - of an address in a configuration

_NO_SERVERS = 'must not be empty; name at least one server, such as {"host": "127.0.0.1", "port": 8001}'
DEFAULT_FILE = "servers.json"
COMMAND_LINE = "command line"
POLICIES = ("round_robin", "least_connections", "random", "ip_hash", "power_of_two", "least_time", "hash")
LARGEST_FILE = 16 * 1024 * 1024


@dataclass(frozen=True)
class BackendTls:
    """How connections to a backend are encrypted, and by what it is known."""

    ca: str = ""  # file of certificates to trust; "": the system's
    server_name: str = ""  # that its certificate must have; "": its host
    verify: bool = True


@dataclass(frozen=True)
class Server:
    """One entry of "servers": a backend as it was configured."""

    id: str
    host: str
    port: int
    weight: int = 1
    backup: bool = False
    max_connections: int = 0  # 0: no limit
    command: tuple[str, ...] = ()  # placeholders such as {port} not yet replaced
    tls: BackendTls | None = None
    send_proxy: str = ""  # the version of the PROXY protocol by which it is told who the client is: "v1" or "v2"

    @property
    def address(self) -> str:
        return format_address(self.host, self.port)


@dataclass(frozen=True)
class HealthCheck:
    path: str = "/"
    interval: float = 2.0
    timeout: float = 2.0
    rise: int = 2
    fall: int = 3
    expect: tuple[tuple[int, int], ...] = ((200, 399),)  # inclusive ranges of statuses that pass
    type: str = "http"
    follows_mode: bool = field(default=True, repr=False, compare=False)  # no type was given: it is that of Config.mode


@dataclass(frozen=True)
class Timeouts:
    connect: float = 5.0
    handshake: float = 10.0
    request_head: float = 10.0
    client_idle: float = 60.0
    client: float = 60.0
    server: float = 60.0
    tunnel: float = 3600.0
    queue: float = 5.0
    no_backend: float = 0.0
    drain_delay: float = 0.0
    drain: float = 30.0


@dataclass(frozen=True)
class Limits:
    connections: int = 0  # 0: as many as the descriptors allow
    head_bytes: int = 65536
    fields: int = 128
    request_line_bytes: int = 16384
    queue: int = 1024
    body_bytes: int = 0  # 0: no limit, here and in what follows
    client_connections: int = 0
    client_rate: float = 0.0  # requests per second
    client_burst: int = 0  # 0: what comes in a second


@dataclass(frozen=True)
class Certificate:
    cert: str  # file: the certificate, then those of its chain
    key: str


@dataclass(frozen=True)
class Tls:
    """How connections from clients are encrypted."""

    certificates: tuple[Certificate, ...]  # the first is for clients that name no host
    min_version: str = "1.2"
    redirect_from: str = ""  # address of a listener that sends clients of plain HTTP here


@dataclass(frozen=True)
class Sticky:
    """Clients stay with the backend that they had, by a cookie."""

    cookie: str = "lb"
    secret_file: str = ""  # what the cookie is signed with; "": something that this run makes up


@dataclass(frozen=True)
class Log:
    file: str = "load_balancer.log"  # "": none
    format: str = "text"
    level: str = "info"
    slow: float = 1.0  # seconds from which on a request is kept to be explained
    max_bytes: int = 50_000_000
    backups: int = 3


@dataclass(frozen=True)
class AdminPort:
    """Where the operator's port listens, and the file that its token is in, "" for none."""

    host: str = "127.0.0.1"  # "": it is off
    port: int = 8404
    token_file: str = ""
    asked_for: bool = False  # by key or flag: then it is an error when the port is taken


@dataclass(frozen=True)
class Scaling:
    """Backends that the balancer starts and stops by the load, all with one command."""

    command: tuple[str, ...]
    ports: tuple[int, int]  # the first and the last that instances are given
    min: int = 1
    max: int = 8
    target_active: float = 10.0  # requests in hand for each instance
    idle_stop: float = 300.0  # seconds without need after which an instance is stopped
    pause: float = 5.0  # seconds from one step to the next
    start_timeout: float = 30.0  # seconds that an instance is given to answer its first probe
    host: str = "127.0.0.1"


@dataclass(frozen=True)
class Config:
    servers: tuple[Server, ...]
    host: str = "127.0.0.1"
    port: int = 8080
    mode: str = "http"
    algorithm: str = "round_robin"  # a policy's name, or the absolute path of a .py file
    hash_on: str = ""  # what "hash" goes by: "header:NAME", "cookie:NAME", "query:NAME" or "path"
    hash_balance: float = 1.25  # no backend has more than so many times the average in hand
    sticky: Sticky | None = None
    retries: int = 3
    health_check: HealthCheck = HealthCheck()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    log: Log = Log()
    admin: AdminPort = AdminPort()
    scaling: Scaling | None = None
    tls: Tls | None = None
    trusted_proxies: tuple[str, ...] = ()  # networks, here and in what follows
    proxy_protocol_from: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()  # none: everybody
    deny: tuple[str, ...] = ()
    forwarded: bool = False  # is the field of RFC 7239 written, too?
    source: str = COMMAND_LINE  # or the file's name
    base: Path = Path()  # the directory that relative paths start at


def _algorithm(value: Any, at: Place) -> str:
    if not checks.string(value, at).endswith(".py"):
        return str(checks.one_of(POLICIES, also="a .py file")(value, at))
    path = checks.file(value, at)
    if not os.path.isfile(path):
        raise at.wrong(f"there is no file {path}; a relative path starts at {at.base.absolute()}")
    return path


def _backend_tls(value: Any, at: Place) -> BackendTls | None:
    if type(value) is bool:
        return BackendTls() if value else None
    if not isinstance(value, dict):
        raise at.wrong(f"must be true, false or an object, not {checks.kind(value)}")
    found: BackendTls = checks.object_of(_BACKEND_TLS, BackendTls)(value, at)
    return found


def _certificates(value: Any, at: Place) -> tuple[Certificate, ...]:
    if type(value) is not list:
        raise at.wrong('must be a list such as [{"cert": "site.pem", "key": "site.key"}], not ' + checks.kind(value))
    if not value:
        raise at.wrong('must not be empty; name at least one, such as {"cert": "site.pem", "key": "site.key"}')
    check = checks.object_of({"cert": checks.named_file, "key": checks.named_file}, Certificate, needs=("cert", "key"))
    return tuple(check(item, at.item(index)) for index, item in enumerate(value))


def _sticky(value: Any, at: Place) -> Sticky | None:
    if type(value) is bool:
        return Sticky() if value else None
    if not isinstance(value, dict):
        raise at.wrong(f"must be true, false or an object, not {checks.kind(value)}")
    found: Sticky = checks.object_of(_STICKY, Sticky)(value, at)
    return found


def _admin_address(value: Any, at: Place) -> dict[str, Any]:
    if checks.string(value, at) == "off":
        return {"host": "", "port": 0, "asked_for": True}
    found = checks.split_address(value)
    if not found:
        raise at.wrong(f'must be HOST:PORT, [IPV6]:PORT, PORT or "off", not {checks.shown(value)}')
    return {"host": checks.host(found[0], at), "port": checks.whole(0, 65535)(int(found[1]), at), "asked_for": True}


def _admin(address: Mapping[str, Any] | None = None, token_file: str = "") -> AdminPort:
    return AdminPort(**(address or {}), token_file=token_file)


def _scaling(value: Any, at: Place) -> Scaling:
    scaling: Scaling = checks.object_of(_SCALING, Scaling, needs=("command", "ports"))(value, at)
    if not any("{port}" in word for word in scaling.command):
        raise at.key("command").wrong('must have the word "{port}", or all instances would listen on the same port')
    if scaling.min > scaling.max:
        raise at.key("min").wrong(f"must be at most max, which is {scaling.max}, not {scaling.min}")
    room = scaling.ports[1] - scaling.ports[0] + 1
    if room < scaling.max:
        raise at.key("ports").wrong(f"has room for {room} instances, and max is {scaling.max}; widen the range")
    return scaling


def _servers(value: Any, at: Place) -> tuple[Server, ...]:
    if type(value) is not list:
        raise at.wrong(f"must be a list, not {checks.kind(value)}")
    places = [at.item(index) for index in range(len(value))]
    entries = [_SERVER(entry, place) for entry, place in zip(value, places, strict=True)]
    return _distinct([Server(**{"id": str(n), **entry}) for n, entry in enumerate(entries, 1)], places)


def _distinct(servers: Sequence[Server], places: Sequence[Place]) -> tuple[Server, ...]:
    for what in ("id", "address"):
        seen: dict[str, Place] = {}
        for server, place in zip(servers, places, strict=True):
            value = getattr(server, what)
            if (other := seen.setdefault(value, place)) is not place:
                raise place.wrong(f"the {what} {checks.shown(value)} is that of {other.path} too; give each its own")
    return tuple(servers)


_COUNT = checks.whole(0, 1_000_000)
_PORT = checks.whole(1, 65535)
_BACKEND_TLS = {"ca": checks.file, "server_name": checks.host, "verify": checks.boolean}
_SERVER = checks.object_of(
    {
        "id": checks.identity,
        "host": checks.host,
        "port": _PORT,
        "weight": checks.whole(1, 256),
        "backup": checks.boolean,
        "max_connections": _COUNT,
        "command": checks.command,
        "tls": _backend_tls,
        "send_proxy": checks.one_of(("", "v1", "v2")),
    },
    needs=("host", "port"),
)
_LISTEN = {"host": checks.host, "port": checks.whole(0, 65535)}
_HEALTH_CHECK = {
    "path": checks.url_path,
    "interval": checks.seconds(),
    "timeout": checks.seconds(),
    "rise": checks.whole(1, 100),
    "fall": checks.whole(1, 100),
    "expect": checks.expect,
    "type": checks.one_of(("http", "tcp")),
}
_TIMEOUTS = {
    **dict.fromkeys(("connect", "handshake", "request_head", "client_idle", "client"), checks.seconds()),
    **dict.fromkeys(("server", "tunnel", "drain"), checks.seconds()),
    **dict.fromkeys(("queue", "no_backend", "drain_delay"), checks.seconds(0)),
}
_LIMITS = {
    "connections": _COUNT,
    "head_bytes": checks.whole(1024, 1 << 24),
    "fields": checks.whole(1, 10_000),
    "request_line_bytes": checks.whole(64, 1 << 24),
    "queue": _COUNT,
    "body_bytes": checks.whole(0, 1 << 50),
    "client_connections": _COUNT,
    "client_rate": checks.number(0, 1_000_000),
    "client_burst": _COUNT,
}
_TLS = {
    "certificates": _certificates,
    "min_version": checks.one_of(("1.2", "1.3")),
    "redirect_from": checks.listen_address,
}
_STICKY = {"cookie": checks.cookie_name, "secret_file": checks.file}
_LOG = {
    "file": checks.file,
    "format": checks.one_of(("text", "haproxy", "json")),
    "level": checks.one_of(("debug", "info", "warning", "error")),
    "slow": checks.seconds(),
    "max_bytes": checks.whole(1000, 10**12),
    "backups": checks.whole(0, 1000),
}
_ADMIN = {"address": _admin_address, "token_file": checks.file}
_SCALING = {
    "command": checks.command,
    "ports": checks.ports,
    "min": checks.whole(0, 1000),
    "max": checks.whole(1, 1000),
    "target_active": checks.number(0.01, 1_000_000),
    "idle_stop": checks.seconds(),
    "pause": checks.seconds(),
    "start_timeout": checks.seconds(),
    "host": checks.host,
}
_TOP = {
    "servers": _servers,
    "mode": checks.one_of(("http", "tcp")),
    "algorithm": _algorithm,
    "hash_on": checks.hash_on,
    "hash_balance": checks.number(1, 1000),
    "sticky": _sticky,
    "retries": checks.whole(0, 100),
    "listen": checks.object_of(_LISTEN),
    "health_check_url": _HEALTH_CHECK["path"],
    "health_check_interval": _HEALTH_CHECK["interval"],
    "health_check": checks.object_of(_HEALTH_CHECK),
    "timeouts": checks.object_of(_TIMEOUTS, Timeouts),
    "limits": checks.object_of(_LIMITS, Limits),
    "log": checks.object_of(_LOG, Log),
    "admin": checks.object_of(_ADMIN, _admin),
    "scaling": _scaling,
    "tls": checks.object_of(_TLS, Tls, needs=("certificates",)),
    "trusted_proxies": checks.networks,
    "proxy_protocol_from": checks.networks,
    "allow": checks.networks,
    "deny": checks.networks,
    "forwarded": checks.boolean,
}
_SHORT_FORMS = {"health_check_url": "path", "health_check_interval": "interval"}
_NUMERAL = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,9})?")
_FLAGS = {  # the flag, the field of Config it goes to ("" for Config itself), the key there, its check
    "host": ("", "host", _LISTEN["host"]),
    "port": ("", "port", _LISTEN["port"]),
    "mode": ("", "mode", _TOP["mode"]),
    "algorithm": ("", "algorithm", _TOP["algorithm"]),
    "interval": ("health_check", "interval", _HEALTH_CHECK["interval"]),
    "log_file": ("log", "file", _LOG["file"]),
    "log_level": ("log", "level", _LOG["level"]),
    "log_format": ("log", "format", _LOG["format"]),
    "admin": ("admin", "", _ADMIN["address"]),  # the check gives several fields
}


def load(path: Path) -> Config:
    """The configuration in a file. Raises ConfigError."""
    at = Place(str(path), path.absolute().parent)
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
        if len(data) > LARGEST_FILE:
            raise at.wrong(f"is larger than {LARGEST_FILE} octets")
        return parse(data.decode(), at.source, at.base)
    except OSError as error:
        raise at.wrong(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise at.wrong(f"line {line}: octet 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def parse(text: str, source: str, base: Path) -> Config:
    """The configuration in a file's text; `source` is its name and `base` its directory. Raises ConfigError."""
    at = Place(source, base)
    document = checks.document(text.removeprefix("\ufeff"), at)
    if type(document) is list:
        document = {"servers": document}
    if not isinstance(document, dict):
        raise at.wrong(f"must be a list of servers or an object, not {checks.kind(document)}")
    given = checks.object_of(_TOP)(document, at)
    if not given.setdefault("servers", ()) and "scaling" not in given:
        raise at.key("servers").wrong(_NO_SERVERS if "servers" in document else "the key is missing")
    health_check = given.pop("health_check", {})
    for short, key in _SHORT_FORMS.items():
        if short in given:
            if key in health_check:
                raise at.key(short).wrong(f"health_check.{key} says the same; keep one of them")
            health_check[key] = given.pop(short)
    probe = HealthCheck(**health_check, follows_mode="type" not in health_check)
    given.update(given.pop("listen", {}))
    return _settled(Config(**given, health_check=probe, source=source, base=base))


def from_addresses(addresses: Sequence[str]) -> Config:
    """Backends as `HOST:PORT`, `[IPV6]:PORT`, `:PORT` or `PORT`; their ids are "1", "2"... Raises ConfigError."""
    source, base = COMMAND_LINE, Path.cwd()
    if not addresses:
        raise ConfigError(f"{source}: {_NO_SERVERS}")
    places = [Place(source, base, checks.shown(address)) for address in addresses]
    servers = []
    for number, (address, place) in enumerate(zip(addresses, places, strict=True), 1):
        found = checks.split_address(address)
        if not found:
            raise place.wrong("must be HOST:PORT, [IPV6]:PORT or PORT")
        host = checks.host(found[0], replace(place, path=f"host in {place.path}"))
        port = _PORT(int(found[1]), replace(place, path=f"port in {place.path}"))
        servers.append(Server(str(number), host, port))
    return Config(_distinct(servers, places), source=source, base=base)


def override(config: Config, **flags: str | float | None) -> Config:
    """The configuration with the flags of the command line in it; None is a flag that was not given.

    Flags: host, port, mode, algorithm, interval, log_file, log_level, log_format, admin, tls_cert and tls_key, which go
    together; numbers may be text. Relative paths in them start at the working directory. Raises ConfigError.
    """
    tls = {key: flags.pop(f"tls_{key}", None) for key in ("cert", "key")}
    if any(value is not None for value in tls.values()):
        for key, value in tls.items():
            if value is None:
                raise ConfigError(f"--tls-{key}: is missing; a certificate and its key go together")
        certificate = {key: checks.named_file(value, Place(f"--tls-{key}", Path.cwd())) for key, value in tls.items()}
        former = config.tls or Tls(())
        config = replace(config, tls=replace(former, certificates=(Certificate(**certificate),)))
    for flag, value in flags.items():
        if value is None:
            continue
        section, key, check = _FLAGS[flag]
        if flag in ("port", "interval") and isinstance(value, str) and _NUMERAL.fullmatch(value):
            value = float(value) if "." in value else int(value)
        checked = check(value, Place(f"--{flag.replace('_', '-')}", Path.cwd()))
        change = {key: checked} if key else checked
        config = replace(config, **({section: replace(getattr(config, section), **change)} if section else change))
    return _settled(config)


def find(explicit: str | None, beside: Path) -> Path:
    """The file to load: `--config`, else servers.json in the working directory, else the one in directory `beside`."""
    if explicit is not None:
        if not os.path.exists(explicit):
            raise ConfigError(f"--config: there is no file {checks.shown(explicit)}")
        return Path(explicit)
    for path in (Path(DEFAULT_FILE), beside / DEFAULT_FILE):
        if path.exists():
            return path
    places = checks.choices(dict.fromkeys((str(Path.cwd()), str(beside))))
    raise ConfigError(f"{DEFAULT_FILE}: not found in {places}; give --config FILE, or backends as HOST:PORT")


def refuse_contradictions(config: Config) -> None:
    """Raise ConfigError where two settings cannot both be. For when the flags are in: they may mend it, or cause it."""
    at = Place(config.source, config.base)
    if config.algorithm == "hash" and config.mode == "tcp":
        raise at.key("algorithm").wrong('"hash" needs to read requests, which mode "tcp" does not; "ip_hash" does not')
    if config.algorithm == "hash" and not config.hash_on:
        raise at.key("hash_on").wrong('is missing; "hash" goes by something such as "header:X-User", or by "path"')
    if config.mode == "tcp":
        for name, what in (("hash_on", config.hash_on), ("sticky", config.sticky), ("forwarded", config.forwarded)):
            if what:
                raise at.key(name).wrong('needs to read requests, which mode "tcp" does not; remove it')
        if config.tls and config.tls.redirect_from:
            raise at.key("tls").key("redirect_from").wrong('is for requests, which mode "tcp" does not read; remove it')
    _refuse_clashes(config, at)


def _refuse_clashes(config: Config, at: Place) -> None:
    """Two would be at one address."""
    own, operators = (config.host, config.port), (config.admin.host, config.admin.port)
    if _meet(operators, own):
        clash = f"{format_address(*operators)} is where clients connect"
        raise at.key("admin").key("address").wrong(f'{clash}; give one of the two another port, or "off" here')
    taken = [("the balancer itself", own), ("the operator's port (admin.address)", operators)]
    for server in config.servers:
        for owner, address in taken:
            if _meet((server.host, server.port), address):
                clash = f"backend {server.id} at {server.address} is {owner}"
                raise at.wrong(f"{clash}; give one of the two another port")
    if config.scaling is None:
        return
    low, high = config.scaling.ports
    taken += [(f"backend {server.id}", (server.host, server.port)) for server in config.servers]
    for owner, address in taken:
        if low <= address[1] <= high and _meet((config.scaling.host, address[1]), address):
            clash = f"{low}-{high} has port {address[1]} in it, where {owner} is"
            raise at.key("scaling").key("ports").wrong(f"{clash}; choose a range without it")


def _meet(one: tuple[str, int], other: tuple[str, int]) -> bool:
    """Whether two addresses are one, as far as can be told without looking a name up. Port 0 is any free one."""
    return 0 < one[1] == other[1] and (_leads_to(one[0], other[0]) or _leads_to(other[0], one[0]))


def _leads_to(host: str, listening: str) -> bool:
    """Whether who connects to a host of this machine reaches what listens on another: 127.0.0.1 and 0.0.0.0."""
    if host == listening or listening not in ("0.0.0.0", "::"):
        return host == listening
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (address.is_loopback or address.is_unspecified) and (listening == "::" or address.version == 4)


def describe(config: Config) -> str:
    """What would run, as a text for people that ends in a newline."""
    rows = [("id", "address", "weight", "limit", "role", "command")]
    for server in config.servers:
        limit, role = str(server.max_connections or "-"), "backup" if server.backup else "active"
        command = checks.shown(" ".join(server.command)) if server.command else "-"
        rows.append((server.id, server.address, str(server.weight), limit, role, command))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] if config.servers else []
    probe, log, admin, scaling = config.health_check, config.log, config.admin, config.scaling
    expected = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in probe.expect)
    question = f"GET {probe.path} wants {expected}" if probe.type == "http" else "TCP connect"
    lines = [
        f"configuration  {config.source}",
        f"listens on     {format_address(config.host, config.port)}, mode {config.mode}",
        f"algorithm      {config.algorithm}, {config.retries} retries",
        f"backends       {len(config.servers)}",
        *table,
        *([f"scaling        {_scaling_in_words(scaling)}"] if scaling else []),
        f"health check   {question}, every {probe.interval:.9g} s, timeout {probe.timeout:.9g} s, "
        f"up after {probe.rise}, down after {probe.fall}",
        f"timeouts in s  {', '.join(f'{name} {value:.9g}' for name, value in asdict(config.timeouts).items())}",
        *([f"tls            {_tls_in_words(config.tls)}"] if config.tls else []),
        *_access_in_words(config),
        f"log            {f'{log.file} ({log.format}, {log.level})' if log.file else 'none'}",
        f"admin          {format_address(admin.host, admin.port) if admin.host else 'off'}"
        + (f", token in {admin.token_file}" if admin.host and admin.token_file else ""),
    ]
    return "\n".join(lines) + "\n"


def _tls_in_words(tls: Tls) -> str:
    files = ", ".join(certificate.cert for certificate in tls.certificates)
    redirect = f", plain HTTP is redirected from {tls.redirect_from}" if tls.redirect_from else ""
    return f"{files}; {tls.min_version} or later{redirect}"


def _access_in_words(config: Config) -> list[str]:
    networks = {name: getattr(config, name) for name in ("trusted_proxies", "proxy_protocol_from", "allow", "deny")}
    return [f"{name.replace('_', ' '):14} {', '.join(value)}" for name, value in networks.items() if value]


def _scaling_in_words(scaling: Scaling) -> str:
    command, ports = checks.shown(" ".join(scaling.command)), "{}-{}".format(*scaling.ports)
    return (
        f"{scaling.min} to {scaling.max} of {command} on {scaling.host}, ports {ports}, "
        f"{scaling.target_active:.9g} requests each, a step every {scaling.pause:.9g} s, "
        f"{scaling.start_timeout:.9g} s to start, stopped after {scaling.idle_stop:.9g} s idle"
    )


def _settled(config: Config) -> Config:
    """Probes are of the mode's kind unless the file says otherwise."""
    probe = config.health_check
    return replace(config, health_check=replace(probe, type=config.mode)) if probe.follows_mode else config
