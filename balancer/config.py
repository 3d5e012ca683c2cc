"""servers.json and flags become values that are already right, or one line that says what is not.

Each object of the file has a table from key to check. A check is given the value as JSON had it and its place, and
returns the value to use or raises the ConfigError that the place words. A new key is a field in a dataclass and a
line in a table. Seconds and octets throughout; the defaults are those of the dataclasses.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

_NO_SERVERS = 'must not be empty; name at least one server, such as {"host": "127.0.0.1", "port": 8001}'
DEFAULT_FILE = "servers.json"
POLICIES = ("round_robin", "least_connections", "random", "ip_hash", "power_of_two", "least_time")
PLACEHOLDERS = ("python", "port", "host", "id")
LARGEST_FILE = 16 * 1024 * 1024
LONGEST_PATH = 4096
LONGEST_WAIT = 1_000_000  # seconds, 11 days: epoll counts milliseconds in 31 bits, which is 24 days
SHORTEST_WAIT = 0.001  # seconds: less than a microsecond would turn SO_RCVTIMEO into "for ever"


class ConfigError(Exception):
    """A mistake of the user's; its text is one line: file, place, what is wrong and how to mend it."""


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
    retries: int = 3
    health_check: HealthCheck = HealthCheck()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    log: Log = Log()
    admin: AdminPort = AdminPort()
    scaling: Scaling | None = None
    source: str = "command line"  # or the file's name
    base: Path = Path()  # the directory that relative paths start at


def format_address(host: str, port: int) -> str:
    """`127.0.0.1:8001`, `[::1]:8001`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True)
class _Place:
    """Where a value stands: what an error about it begins with, and where relative paths in it start."""

    source: str  # "servers.json", "command line", "--port"
    base: Path
    path: str = ""  # "servers[0].port"; the whole when empty

    def key(self, name: str) -> _Place:
        shown = name if name.isidentifier() and len(name) <= 40 else _shown(name)
        return replace(self, path=f"{self.path}.{shown}" if self.path else shown)

    def item(self, index: int) -> _Place:
        return replace(self, path=f"{self.path}[{index}]")

    def wrong(self, what: str) -> ConfigError:
        return ConfigError(": ".join(part for part in (self.source, self.path, what) if part))


def _shown(value: object) -> str:
    """The value as JSON writes it, on one line and never long."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=not (isinstance(value, str) and value.isprintable()))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _kind(value: object) -> str:
    """The value with the name of its type before it: `the string "8080"`."""
    names: dict[type, str] = {str: "the string ", int: "the number ", float: "the number "}
    return names.get(type(value), "") + _shown(value)


def _choices(words: Iterable[str], last: str = "or") -> str:
    *most, end = words
    return f"{', '.join(most)} {last} {end}" if most else end


def _nearest(word: str, words: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word[:64].lower(), list(words), n=1)), None)


# Checks. Types are compared with `is`, because a bool is an int to Python and not to JSON.
_Check = Callable[[Any, _Place], Any]


class _Object(dict[str, Any]):
    """A JSON object that remembers a key it was given more than once."""

    repeated: str | None = None

    @classmethod
    def of(cls, pairs: list[tuple[str, Any]]) -> _Object:
        made = cls(pairs)
        if len(made) < len(pairs):
            made.repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        return made


def _object(table: Mapping[str, _Check], make: Callable[..., Any] = dict, needs: Sequence[str] = ()) -> _Check:
    """An object with some of the table's keys, which become the keyword arguments of `make`."""

    def check(value: Any, at: _Place) -> Any:
        if not isinstance(value, dict):
            raise at.wrong(f"must be an object, not {_kind(value)}")
        if isinstance(value, _Object) and value.repeated is not None:
            raise at.key(value.repeated).wrong("the key stands here twice; keep one")
        for key in value:
            if key not in table:
                near = _nearest(key, table)
                mend = f'did you mean "{near}"?' if near else f"the keys here are {_choices(table, 'and')}"
                raise at.key(key).wrong(f"unknown key; {mend}")
        for key in needs:
            if key not in value:
                raise at.wrong(f'"{key}" is missing')
        return make(**{key: table[key](item, at.key(key)) for key, item in value.items()})

    return check


def _whole(low: int, high: int) -> _Check:
    def check(value: Any, at: _Place) -> int:
        if type(value) is not int:
            raise at.wrong(f"must be a whole number, not {_kind(value)}")
        if not low <= value <= high:
            raise at.wrong(f"must be {low} to {high}, not {_shown(value)}")
        return value

    return check


def _seconds(low: float = SHORTEST_WAIT) -> _Check:
    return _number(low, LONGEST_WAIT, " of seconds", " seconds")


def _number(low: float, high: float, of_what: str = "", unit: str = "") -> _Check:
    def check(value: Any, at: _Place) -> float:
        if type(value) not in (int, float):
            raise at.wrong(f"must be a number{of_what}, not {_kind(value)}")
        if not low <= value <= high:
            raise at.wrong(f"must be {low} to {high}{unit}, not {_shown(value)}")
        return float(value)

    return check


def _boolean(value: Any, at: _Place) -> bool:
    if type(value) is not bool:
        raise at.wrong(f"must be true or false, not {_kind(value)}")
    return value


def _string(value: Any, at: _Place) -> str:
    if type(value) is not str:
        raise at.wrong(f"must be a string, not {_kind(value)}")
    return value


def _one_of(words: Sequence[str], also: str = "") -> _Check:
    def check(value: Any, at: _Place) -> str:
        word = _string(value, at)
        if word not in words:
            near = _nearest(word, words)
            known = _choices([*map(_shown, words), *([also] if also else [])])
            raise at.wrong(f"must be {known}, not {_shown(word)}" + (f'; did you mean "{near}"?' if near else ""))
        return word

    return check


def _file(value: Any, at: _Place) -> str:
    """An absolute path; the empty string stays empty."""
    path = _string(value, at)
    if len(path) > LONGEST_PATH or not path.isprintable():
        raise at.wrong(f"must be at most {LONGEST_PATH} printable characters, not {_shown(path)}")
    return os.path.abspath(at.base / path) if path else ""


def _algorithm(value: Any, at: _Place) -> str:
    if not _string(value, at).endswith(".py"):
        return str(_one_of(POLICIES, also="a .py file")(value, at))
    path = _file(value, at)
    if not os.path.isfile(path):
        raise at.wrong(f"there is no file {path}; a relative path starts at {at.base.absolute()}")
    return path


def _id(value: Any, at: _Place) -> str:
    text = str(value) if type(value) is int else value
    if type(text) is not str or not re.fullmatch(r"\S{1,64}", text) or not text.isprintable():
        raise at.wrong(f"must be a whole number or 1 to 64 characters without white space, not {_kind(value)}")
    return text


_LABEL = "[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*\.?")
_LITERAL = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")


def _host(value: Any, at: _Place) -> str:
    """A host name (RFC 1123, and the underscore that container names have) or an IP address, each in one spelling.

    A name whose last label is a number can only be a mistyped IPv4 address.
    """
    is_literal = ":" in _string(value, at) or value.rpartition(".")[2].isdecimal()
    try:
        if is_literal and _LITERAL.fullmatch(value):
            return str(ipaddress.ip_address(value))
        if is_literal or not _NAME.fullmatch(value.lower()):
            raise ValueError(value)
    except ValueError:
        raise at.wrong(f"must be a host name or an IP address and nothing else, not {_shown(value)}") from None
    return str(value.lower())


def _split_address(value: str) -> tuple[str, str] | None:
    """Host and port of `HOST:PORT`, `[IPV6]:PORT`, `:PORT` or `PORT`, neither looked at; None for anything else."""
    match = re.fullmatch(r"(?:(?:\[(.*:.*)\]|([^:]*)):)?([0-9]{1,9})", value)
    return (match[1] or match[2] or "127.0.0.1", match[3]) if match else None


def _admin_address(value: Any, at: _Place) -> dict[str, Any]:
    if _string(value, at) == "off":
        return {"host": "", "port": 0, "asked_for": True}
    found = _split_address(value)
    if not found:
        raise at.wrong(f'must be HOST:PORT, [IPV6]:PORT, PORT or "off", not {_shown(value)}')
    return {"host": _host(found[0], at), "port": _whole(0, 65535)(int(found[1]), at), "asked_for": True}


def _admin(address: Mapping[str, Any] | None = None, token_file: str = "") -> AdminPort:
    return AdminPort(**(address or {}), token_file=token_file)


def _ports(value: Any, at: _Place) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", _string(value, at))
    low, high = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= low <= high <= 65535:
        raise at.wrong(f'must be a range of ports such as "9001-9100", not {_shown(value)}')
    return low, high


def _scaling(value: Any, at: _Place) -> Scaling:
    scaling: Scaling = _object(_SCALING, Scaling, needs=("command", "ports"))(value, at)
    if not any("{port}" in word for word in scaling.command):
        raise at.key("command").wrong('must have the word "{port}", or all instances would listen on the same port')
    if scaling.min > scaling.max:
        raise at.key("min").wrong(f"must be at most max, which is {scaling.max}, not {scaling.min}")
    room = scaling.ports[1] - scaling.ports[0] + 1
    if room < scaling.max:
        raise at.key("ports").wrong(f"has room for {room} instances, and max is {scaling.max}; widen the range")
    return scaling


def _url_path(value: Any, at: _Place) -> str:
    if re.match(r"https?://", _string(value, at), re.IGNORECASE):
        raise at.wrong(f'must be a path such as "/health", not the full URL {_shown(value)}; "servers" has the hosts')
    if not value.startswith("/"):
        raise at.wrong(f"must start with a slash, not {_shown(value)}")
    if not re.fullmatch("[!-~]+", value):
        raise at.wrong(f"must be visible ASCII characters, percent-encode the others, not {_shown(value)}")
    return str(value)


_STATUS = "[1-5](?:[0-9][0-9]|xx)"
_STATUSES = re.compile(rf"({_STATUS})(?:-({_STATUS}))?")


def _expect(value: Any, at: _Place) -> tuple[tuple[int, int], ...]:
    """`200`, `200-204`, `2xx-3xx`, `2xx,404` as inclusive ranges."""
    ranges = []
    for part in (str(value) if type(value) is int else _string(value, at)).lower().split(","):
        match = _STATUSES.fullmatch(part.strip())
        low, high = (match[1], match[2] or match[1]) if match else ("1", "0")
        ranges.append((int(low.replace("xx", "00")), int(high.replace("xx", "99"))))
    if any(low > high for low, high in ranges):
        raise at.wrong(f'must be statuses such as "200", "200-204", "2xx-3xx" or "2xx,404", not {_shown(value)}')
    return tuple(ranges)


def _command(value: Any, at: _Place) -> tuple[str, ...]:
    """Words for exec. Braces that hold no single word belong to the command, as in awk's `{print $1}`."""
    if type(value) is not list:
        raise at.wrong(f'must be a list of words such as ["{{python}}", "server.py"], not {_kind(value)}')
    if not value or value[0] == "":
        raise at.wrong("is empty; its first word must be a program")
    for index, word in enumerate(value):
        if re.search("[\0\ud800-\udfff]", _string(word, at.item(index))):
            raise at.item(index).wrong(f"must have no NUL and no lone surrogate, not {_shown(word)}")
        for name in re.findall(r"\{(\w+)\}", word):
            if name not in PLACEHOLDERS:
                known = _choices((f"{{{known}}}" for known in PLACEHOLDERS), "and")
                raise at.item(index).wrong(f"unknown placeholder {_shown(name)}; there are {known}")
    return tuple(value)


def _servers(value: Any, at: _Place) -> tuple[Server, ...]:
    if type(value) is not list:
        raise at.wrong(f"must be a list, not {_kind(value)}")
    places = [at.item(index) for index in range(len(value))]
    entries = [_SERVER(entry, place) for entry, place in zip(value, places, strict=True)]
    return _distinct([Server(**{"id": str(n), **entry}) for n, entry in enumerate(entries, 1)], places)


def _distinct(servers: Sequence[Server], places: Sequence[_Place]) -> tuple[Server, ...]:
    for what in ("id", "address"):
        seen: dict[str, _Place] = {}
        for server, place in zip(servers, places, strict=True):
            value = getattr(server, what)
            if (other := seen.setdefault(value, place)) is not place:
                raise place.wrong(f"the {what} {_shown(value)} is that of {other.path} too; give each its own")
    return tuple(servers)


_COUNT = _whole(0, 1_000_000)
_PORT = _whole(1, 65535)
_SERVER = _object(
    {
        "id": _id,
        "host": _host,
        "port": _PORT,
        "weight": _whole(1, 256),
        "backup": _boolean,
        "max_connections": _COUNT,
        "command": _command,
    },
    needs=("host", "port"),
)
_LISTEN = {"host": _host, "port": _whole(0, 65535)}
_HEALTH_CHECK = {
    "path": _url_path,
    "interval": _seconds(),
    "timeout": _seconds(),
    "rise": _whole(1, 100),
    "fall": _whole(1, 100),
    "expect": _expect,
    "type": _one_of(("http", "tcp")),
}
_TIMEOUTS = {
    **dict.fromkeys(("connect", "request_head", "client_idle", "client", "server", "tunnel", "drain"), _seconds()),
    **dict.fromkeys(("queue", "no_backend", "drain_delay"), _seconds(0)),
}
_LIMITS = {
    "connections": _COUNT,
    "head_bytes": _whole(1024, 1 << 24),
    "fields": _whole(1, 10_000),
    "request_line_bytes": _whole(64, 1 << 24),
    "queue": _COUNT,
}
_LOG = {
    "file": _file,
    "format": _one_of(("text", "haproxy", "json")),
    "level": _one_of(("debug", "info", "warning", "error")),
    "slow": _seconds(),
    "max_bytes": _whole(1000, 10**12),
    "backups": _whole(0, 1000),
}
_ADMIN = {"address": _admin_address, "token_file": _file}
_SCALING = {
    "command": _command,
    "ports": _ports,
    "min": _whole(0, 1000),
    "max": _whole(1, 1000),
    "target_active": _number(0.01, 1_000_000),
    "idle_stop": _seconds(),
    "pause": _seconds(),
    "start_timeout": _seconds(),
    "host": _host,
}
_TOP = {
    "servers": _servers,
    "mode": _one_of(("http", "tcp")),
    "algorithm": _algorithm,
    "retries": _whole(0, 100),
    "listen": _object(_LISTEN),
    "health_check_url": _HEALTH_CHECK["path"],
    "health_check_interval": _HEALTH_CHECK["interval"],
    "health_check": _object(_HEALTH_CHECK),
    "timeouts": _object(_TIMEOUTS, Timeouts),
    "limits": _object(_LIMITS, Limits),
    "log": _object(_LOG, Log),
    "admin": _object(_ADMIN, _admin),
    "scaling": _scaling,
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
    at = _Place(str(path), path.absolute().parent)
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
    at = _Place(source, base)
    document = _json(text.removeprefix("\ufeff"), at)
    if type(document) is list:
        document = {"servers": document}
    if not isinstance(document, dict):
        raise at.wrong(f"must be a list of servers or an object, not {_kind(document)}")
    given = _object(_TOP)(document, at)
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
    source, base = "command line", Path.cwd()
    if not addresses:
        raise ConfigError(f"{source}: {_NO_SERVERS}")
    places = [_Place(source, base, _shown(address)) for address in addresses]
    servers = []
    for number, (address, place) in enumerate(zip(addresses, places, strict=True), 1):
        found = _split_address(address)
        if not found:
            raise place.wrong("must be HOST:PORT, [IPV6]:PORT or PORT")
        host = _host(found[0], replace(place, path=f"host in {place.path}"))
        port = _PORT(int(found[1]), replace(place, path=f"port in {place.path}"))
        servers.append(Server(str(number), host, port))
    return Config(_distinct(servers, places), source=source, base=base)


def override(config: Config, **flags: str | float | None) -> Config:
    """The configuration with the flags of the command line in it; None is a flag that was not given.

    Flags: host, port, mode, algorithm, interval, log_file, log_level, log_format, admin; numbers may be text. Relative
    paths in them start at the working directory. Raises ConfigError.
    """
    for flag, value in flags.items():
        if value is None:
            continue
        section, key, check = _FLAGS[flag]
        if flag in ("port", "interval") and isinstance(value, str) and _NUMERAL.fullmatch(value):
            value = float(value) if "." in value else int(value)
        checked = check(value, _Place(f"--{flag.replace('_', '-')}", Path.cwd()))
        change = {key: checked} if key else checked
        config = replace(config, **({section: replace(getattr(config, section), **change)} if section else change))
    return _settled(config)


def find(explicit: str | None, beside: Path) -> Path:
    """The file to load: `--config`, else servers.json in the working directory, else the one in directory `beside`."""
    if explicit is not None:
        if not os.path.exists(explicit):
            raise ConfigError(f"--config: there is no file {_shown(explicit)}")
        return Path(explicit)
    for path in (Path(DEFAULT_FILE), beside / DEFAULT_FILE):
        if path.exists():
            return path
    places = _choices(dict.fromkeys((str(Path.cwd()), str(beside))))
    raise ConfigError(f"{DEFAULT_FILE}: not found in {places}; give --config FILE, or backends as HOST:PORT")


def refuse_clashes(config: Config) -> None:
    """Raise ConfigError where two would be at one address. For when the flags are in: they may mend it, or cause it."""
    at = _Place(config.source, config.base)
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
        command = _shown(" ".join(server.command)) if server.command else "-"
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
        f"log            {f'{log.file} ({log.format}, {log.level})' if log.file else 'none'}",
        f"admin          {format_address(admin.host, admin.port) if admin.host else 'off'}"
        + (f", token in {admin.token_file}" if admin.host and admin.token_file else ""),
    ]
    return "\n".join(lines) + "\n"


def _scaling_in_words(scaling: Scaling) -> str:
    ports = "{}-{}".format(*scaling.ports)
    return (
        f"{scaling.min} to {scaling.max} of {_shown(' '.join(scaling.command))} on {scaling.host}, ports {ports}, "
        f"{scaling.target_active:.9g} requests each, a step every {scaling.pause:.9g} s, "
        f"{scaling.start_timeout:.9g} s to start, stopped after {scaling.idle_stop:.9g} s idle"
    )


def _settled(config: Config) -> Config:
    """Probes are of the mode's kind unless the file says otherwise."""
    probe = config.health_check
    return replace(config, health_check=replace(probe, type=config.mode)) if probe.follows_mode else config


# Slips that the parser names in terms of its grammar only, and not in every Python alike.
_SLIPS = (
    (re.compile(r",\s*[\]}]"), "a comma before the closing bracket; remove it"),
    (re.compile(r"//|/\*|#"), "JSON has no comments; remove it"),
    (re.compile("'"), 'JSON wants double quotes, not "\'"'),
    (re.compile(r"\Z"), "the text ends too early; a bracket or a quote is not closed"),
)


def _json(text: str, at: _Place) -> Any:
    if not text.strip():
        raise at.wrong('is empty; the least there can be is [{"host": "127.0.0.1", "port": 8001}]')
    try:
        return json.loads(text, object_pairs_hook=_Object.of, parse_int=_integer)
    except RecursionError:
        raise at.wrong("is nested too deeply") from None
    except json.JSONDecodeError as error:
        read = text[: error.pos].rstrip()
        start = len(read) - 1 if read.endswith(",") and text[error.pos :].lstrip()[:1] in ("]", "}") else error.pos
        what = next((slip for pattern, slip in _SLIPS if pattern.match(text, start)), None)
        what = what or re.sub(r"(:| at| starting at)\s*$", "", error.msg).lower()
        where = json.JSONDecodeError("", text, start)
        raise at.wrong(f"line {where.lineno}, column {where.colno}: not JSON: {what}") from None


def _integer(digits: str) -> float:
    """A number as int, or as float (infinity) when it is so long that int refuses it."""
    return int(digits) if len(digits) <= 1000 else float(digits)
