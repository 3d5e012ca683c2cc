"""What the values of a servers.json may be. A check is given the value as JSON had it and its place, and returns the
value to use or raises the ConfigError that the place words, with the mend where there is one.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LONGEST_PATH = 4096
LONGEST_WAIT = 1_000_000  # seconds, 11 days: epoll counts milliseconds in 31 bits, which is 24 days
SHORTEST_WAIT = 0.001  # seconds: less than a microsecond would turn SO_RCVTIMEO into "for ever"
PLACEHOLDERS = ("python", "port", "host", "id")


class ConfigError(Exception):
    """A mistake of the user's; its text is one line: file, place, what is wrong and how to mend it."""


def format_address(host: str, port: int) -> str:
    """`127.0.0.1:8001`, `[::1]:8001`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True)
class Place:
    """Where a value stands: what an error about it begins with, and where relative paths in it start."""

    source: str  # "servers.json", "command line", "--port"
    base: Path
    path: str = ""  # "servers[0].port"; the whole when empty

    def key(self, name: str) -> Place:
        spelt = name if name.isidentifier() and len(name) <= 40 else shown(name)
        return replace(self, path=f"{self.path}.{spelt}" if self.path else spelt)

    def item(self, index: int) -> Place:
        return replace(self, path=f"{self.path}[{index}]")

    def wrong(self, what: str) -> ConfigError:
        return ConfigError(": ".join(part for part in (self.source, self.path, what) if part))


def shown(value: object) -> str:
    """The value as JSON writes it, on one line and never long."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=not (isinstance(value, str) and value.isprintable()))
    return text if len(text) <= 60 else f"{text[:57]}..."


def kind(value: object) -> str:
    """The value with the name of its type before it: `the string "8080"`."""
    names: dict[type, str] = {str: "the string ", int: "the number ", float: "the number "}
    return names.get(type(value), "") + shown(value)


def choices(words: Iterable[str], last: str = "or") -> str:
    *most, end = words
    return f"{', '.join(most)} {last} {end}" if most else end


def nearest(word: str, words: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word[:64].lower(), list(words), n=1)), None)


# Checks. Types are compared with `is`, because a bool is an int to Python and not to JSON.
Check = Callable[[Any, Place], Any]


class JsonObject(dict[str, Any]):
    """A JSON object that remembers a key it was given more than once."""

    repeated: str | None = None

    @classmethod
    def of(cls, pairs: list[tuple[str, Any]]) -> JsonObject:
        made = cls(pairs)
        if len(made) < len(pairs):
            made.repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        return made


def object_of(table: Mapping[str, Check], make: Callable[..., Any] = dict, needs: Sequence[str] = ()) -> Check:
    """An object with some of the table's keys, which become the keyword arguments of `make`."""

    def check(value: Any, at: Place) -> Any:
        if not isinstance(value, dict):
            raise at.wrong(f"must be an object, not {kind(value)}")
        if isinstance(value, JsonObject) and value.repeated is not None:
            raise at.key(value.repeated).wrong("the key stands here twice; keep one")
        for key in value:
            if key not in table:
                near = nearest(key, table)
                mend = f'did you mean "{near}"?' if near else f"the keys here are {choices(table, 'and')}"
                raise at.key(key).wrong(f"unknown key; {mend}")
        for key in needs:
            if key not in value:
                raise at.wrong(f'"{key}" is missing')
        return make(**{key: table[key](item, at.key(key)) for key, item in value.items()})

    return check


def whole(low: int, high: int) -> Check:
    def check(value: Any, at: Place) -> int:
        if type(value) is not int:
            raise at.wrong(f"must be a whole number, not {kind(value)}")
        if not low <= value <= high:
            raise at.wrong(f"must be {low} to {high}, not {shown(value)}")
        return value

    return check


def seconds(low: float = SHORTEST_WAIT) -> Check:
    return number(low, LONGEST_WAIT, " of seconds", " seconds")


def number(low: float, high: float, of_what: str = "", unit: str = "") -> Check:
    def check(value: Any, at: Place) -> float:
        if type(value) not in (int, float):
            raise at.wrong(f"must be a number{of_what}, not {kind(value)}")
        if not low <= value <= high:
            raise at.wrong(f"must be {low} to {high}{unit}, not {shown(value)}")
        return float(value)

    return check


def boolean(value: Any, at: Place) -> bool:
    if type(value) is not bool:
        raise at.wrong(f"must be true or false, not {kind(value)}")
    return value


def string(value: Any, at: Place) -> str:
    if type(value) is not str:
        raise at.wrong(f"must be a string, not {kind(value)}")
    return value


def one_of(words: Sequence[str], also: str = "") -> Check:
    def check(value: Any, at: Place) -> str:
        word = string(value, at)
        if word not in words:
            near = nearest(word, words)
            known = choices([*map(shown, words), *([also] if also else [])])
            raise at.wrong(f"must be {known}, not {shown(word)}" + (f'; did you mean "{near}"?' if near else ""))
        return word

    return check


def file(value: Any, at: Place) -> str:
    """An absolute path; the empty string stays empty."""
    path = string(value, at)
    if len(path) > LONGEST_PATH or not path.isprintable():
        raise at.wrong(f"must be at most {LONGEST_PATH} printable characters, not {shown(path)}")
    return os.path.abspath(at.base / path) if path else ""


def named_file(value: Any, at: Place) -> str:
    path = file(value, at)
    if not path:
        raise at.wrong("must name a file")
    return path


_LABEL = "[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*\.?")
_LITERAL = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")


def host(value: Any, at: Place) -> str:
    """A host name (RFC 1123, and the underscore that container names have) or an IP address, each in one spelling.

    A name whose last label is a number can only be a mistyped IPv4 address.
    """
    is_literal = ":" in string(value, at) or value.rpartition(".")[2].isdecimal()
    try:
        if is_literal and _LITERAL.fullmatch(value):
            return str(ipaddress.ip_address(value))
        if is_literal or not _NAME.fullmatch(value.lower()):
            raise ValueError(value)
    except ValueError:
        raise at.wrong(f"must be a host name or an IP address and nothing else, not {shown(value)}") from None
    return str(value.lower())


def split_address(value: str) -> tuple[str, str] | None:
    """Host and port of `HOST:PORT`, `[IPV6]:PORT`, `:PORT` or `PORT`, neither looked at; None for anything else."""
    match = re.fullmatch(r"(?:(?:\[(.*:.*)\]|([^:]*)):)?([0-9]{1,9})", value)
    return (match[1] or match[2] or "127.0.0.1", match[3]) if match else None


def listen_address(value: Any, at: Place) -> str:
    """`HOST:PORT` in the spelling of format_address; the empty string stays empty."""
    if value == "":
        return ""
    found = split_address(string(value, at))
    if not found:
        raise at.wrong(f"must be HOST:PORT, [IPV6]:PORT or PORT, not {shown(value)}")
    return format_address(host(found[0], at), whole(0, 65535)(int(found[1]), at))


def networks(value: Any, at: Place) -> tuple[str, ...]:
    if type(value) is not list:
        raise at.wrong(f'must be a list of networks such as ["10.0.0.0/8", "::1"], not {kind(value)}')
    return tuple(network(item, at.item(index)) for index, item in enumerate(value))


def network(value: Any, at: Place) -> str:
    try:
        return str(ipaddress.ip_network(string(value, at)))
    except ValueError as error:
        if "host bits set" in str(error):
            mend = ipaddress.ip_network(value, strict=False)
            raise at.wrong(f'{shown(value)} is an address within a network; did you mean "{mend}"?') from None
    raise at.wrong(f'must be a network such as "10.0.0.0/8" or an address, not {shown(value)}')


TOKEN = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"


def hash_on(value: Any, at: Place) -> str:
    if string(value, at) and not re.fullmatch(rf"path|query:[!-~]+|(header|cookie):{TOKEN}", value):
        raise at.wrong(f'must be "header:NAME", "cookie:NAME", "query:NAME" or "path", not {shown(value)}')
    return str(value)


def cookie_name(value: Any, at: Place) -> str:
    if not re.fullmatch(TOKEN, string(value, at)):
        raise at.wrong(f'must be a name such as "lb", not {shown(value)}')
    return str(value)


def ports(value: Any, at: Place) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})-([0-9]{1,5})", string(value, at))
    low, high = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= low <= high <= 65535:
        raise at.wrong(f'must be a range of ports such as "9001-9100", not {shown(value)}')
    return low, high


def url_path(value: Any, at: Place) -> str:
    if re.match(r"https?://", string(value, at), re.IGNORECASE):
        raise at.wrong(f'must be a path such as "/health", not the full URL {shown(value)}; "servers" has the hosts')
    if not value.startswith("/"):
        raise at.wrong(f"must start with a slash, not {shown(value)}")
    if not re.fullmatch("[!-~]+", value):
        raise at.wrong(f"must be visible ASCII characters, percent-encode the others, not {shown(value)}")
    return str(value)


_STATUS = "[1-5](?:[0-9][0-9]|xx)"
_STATUSES = re.compile(rf"({_STATUS})(?:-({_STATUS}))?")


def expect(value: Any, at: Place) -> tuple[tuple[int, int], ...]:
    """`200`, `200-204`, `2xx-3xx`, `2xx,404` as inclusive ranges."""
    ranges = []
    for part in (str(value) if type(value) is int else string(value, at)).lower().split(","):
        match = _STATUSES.fullmatch(part.strip())
        low, high = (match[1], match[2] or match[1]) if match else ("1", "0")
        ranges.append((int(low.replace("xx", "00")), int(high.replace("xx", "99"))))
    if any(low > high for low, high in ranges):
        raise at.wrong(f'must be statuses such as "200", "200-204", "2xx-3xx" or "2xx,404", not {shown(value)}')
    return tuple(ranges)


def identity(value: Any, at: Place) -> str:
    text = str(value) if type(value) is int else value
    if type(text) is not str or not re.fullmatch(r"\S{1,64}", text) or not text.isprintable():
        raise at.wrong(f"must be a whole number or 1 to 64 characters without white space, not {kind(value)}")
    return text


def command(value: Any, at: Place) -> tuple[str, ...]:
    """Words for exec. Braces that hold no single word belong to the command, as in awk's `{print $1}`."""
    if type(value) is not list:
        raise at.wrong(f'must be a list of words such as ["{{python}}", "server.py"], not {kind(value)}')
    if not value or value[0] == "":
        raise at.wrong("is empty; its first word must be a program")
    for index, word in enumerate(value):
        if re.search("[\0\ud800-\udfff]", string(word, at.item(index))):
            raise at.item(index).wrong(f"must have no NUL and no lone surrogate, not {shown(word)}")
        for name in re.findall(r"\{(\w+)\}", word):
            if name not in PLACEHOLDERS:
                known = choices((f"{{{known}}}" for known in PLACEHOLDERS), "and")
                raise at.item(index).wrong(f"unknown placeholder {shown(name)}; there are {known}")
    return tuple(value)


# Slips that the parser names in terms of its grammar only, and not in every Python alike.
_SLIPS = (
    (re.compile(r",\s*[\]}]"), "a comma before the closing bracket; remove it"),
    (re.compile(r"//|/\*|#"), "JSON has no comments; remove it"),
    (re.compile("'"), 'JSON wants double quotes, not "\'"'),
    (re.compile(r"\Z"), "the text ends too early; a bracket or a quote is not closed"),
)


def document(text: str, at: Place) -> Any:
    if not text.strip():
        raise at.wrong('is empty; the least there can be is [{"host": "127.0.0.1", "port": 8001}]')
    try:
        return json.loads(text, object_pairs_hook=JsonObject.of, parse_int=_integer)
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
