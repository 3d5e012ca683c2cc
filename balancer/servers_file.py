"""servers.json written: a configuration as its document, and a file's text with a server added, removed or changed.

A file belongs to who wrote it. So it is not read and dumped again: the places of the servers in its text are found, and
only what was asked for is spliced in or cut out there. Indentation, order, spacing and line ends of all the rest stay,
and what is added copies them from its neighbours.

A server without an "id" has its position as its id. One that stands behind a removed one is therefore given its id in
the text, so that it keeps it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from balancer.config import BackendTls, Config, Scaling, Server, Sticky, Tls, format_address, load, parse

_BOM = "\ufeff"
_NOT_IN_FILE = ("source", "base", "follows_mode", "asked_for")  # fields that tell of a setting's origin
_Absent = Mapping[str, type[Any]]  # keys whose object may be left out, None being their default, and its dataclass
_SERVER_ABSENT: _Absent = {"tls": BackendTls}
_CONFIG_ABSENT: _Absent = {"scaling": Scaling, "sticky": Sticky, "tls": Tls}


# A configuration as a document -----------------------------------------------------------------------------------


def settings(config: Config) -> dict[str, Any]:
    """Every key of servers.json with the value that it has, defaults included; what is off is None, "" or "off"."""
    found: dict[str, Any] = _plain(config)
    found["listen"] = {"host": found.pop("host"), "port": found.pop("port")}
    admin = config.admin
    found["admin"]["address"] = format_address(admin.host, admin.port) if admin.host else "off"
    del found["admin"]["host"], found["admin"]["port"]
    found["health_check"]["expect"] = ",".join(map(_range, config.health_check.expect))
    if config.scaling:
        found["scaling"]["ports"] = "{}-{}".format(*config.scaling.ports)
    return found


def document(config: Config) -> dict[str, Any]:
    """The configuration as the object of a servers.json, without what is default.

    `parse(json.dumps(document(config)), config.source, config.base)` is an equal configuration. Files are named by
    their absolute paths, and each server has its id.
    """
    found, usual = settings(config), settings(Config(servers=()))
    servers = [_unlike(server, _defaults(Server), _SERVER_ABSENT) for server in found.pop("servers")]
    if config.admin.asked_for:
        del usual["admin"]["address"]
    if config.health_check.follows_mode:
        del found["health_check"]["type"]
    else:
        del usual["health_check"]["type"]
    return {"servers": servers, **_unlike(found, usual, _CONFIG_ABSENT)}


def _plain(value: Any) -> Any:
    """The value as JSON has it. Whole numbers of seconds are written without a fraction."""
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value) if each.name not in _NOT_IN_FILE}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _range(statuses: tuple[int, int]) -> str:
    low, high = statuses
    return str(low) if low == high else f"{low}-{high}"


def _defaults(kind: type[Any]) -> dict[str, Any]:
    return {each.name: _plain(each.default) for each in fields(kind) if each.default is not MISSING}


def _unlike(found: Mapping[str, Any], usual: Mapping[str, Any], absent: _Absent) -> dict[str, Any]:
    """What differs, and of an object within only what differs in it; true for one that is there with all as usual."""
    different: dict[str, Any] = {}
    for key, value in found.items():
        if isinstance(value, dict):
            is_extra = usual.get(key) is None
            inner = _unlike(value, _defaults(absent[key]) if is_extra else usual[key], {})
            if inner or is_extra:
                different[key] = inner or True
        elif key not in usual or value != usual[key]:
            different[key] = value
    return different


# The text of a file ----------------------------------------------------------------------------------------------


def edited(
    text: str,
    *,
    remove: Iterable[str] = (),
    change: Mapping[str, Mapping[str, Any]] | None = None,
    add: Iterable[Mapping[str, Any]] = (),
) -> str:
    """The text of a servers.json with servers removed, changed and added, in this order; all else is as it was.

    `remove` names ids; `change` maps an id to keys and their values, written over or added to what the entry has; `add`
    has whole entries, which go to the end. The text is one that `config.parse` accepts; whether the result is, too, is
    for the caller to see. Raises KeyError for an id that is not there.
    """
    body = text.removeprefix(_BOM)
    bom = text[: len(text) - len(body)]
    for server in remove:
        body = _without(body, server)
    for server, changes in (change or {}).items():
        for key, value in changes.items():
            servers = _find_servers(body)
            body = _with_member(body, servers.entries[servers.place(server)].value_at, key, value)
            server = str(value) if key == "id" else server
    for entry in add:
        body = _with_entry(body, entry)
    return bom + body


class _Part(NamedTuple):
    """A member of an object or an item of a list, and its place in the text."""

    begin: int
    key: str  # "" in a list
    key_end: int
    value_at: int
    value: Any
    end: int


class _Servers(NamedTuple):
    """The list of servers and its place in the text."""

    opening: int  # the place of its bracket; -1 where scaling is all there is, and the key is left out
    entries: list[_Part]
    closing: int

    def place(self, server: str) -> int:
        ids = [str(entry.value.get("id", number)) for number, entry in enumerate(self.entries, 1)]
        if server not in ids:
            raise KeyError(server)
        return ids.index(server)


class _Style(NamedTuple):
    """How an object is laid out; of what stands between its members, the last is repeated for further ones."""

    keys: Sequence[str]
    opening: str
    gaps: Sequence[str]  # from one member to the next, with the comma
    closing: str
    colons: Sequence[str]  # from key to value

    @property
    def compact(self) -> bool:
        return self.colons[-1] == ":"

    def value(self, value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":") if self.compact else None)

    def object(self, entry: Mapping[str, Any]) -> str:
        """The entry in this style, its keys in the order that they have here as far as they are here."""
        text = "{" + self.opening
        order = {"id": -1} | {key: place for place, key in enumerate(self.keys)}
        for place, key in enumerate(sorted(entry, key=lambda key: order.get(key, len(order)))):
            gap = self.gaps[min(place, len(self.gaps)) - 1] if place else ""
            text += f"{gap}{json.dumps(key)}{self.colons[min(place, len(self.colons) - 1)]}{self.value(entry[key])}"
        return text + self.closing + "}"


_INLINE = _Style((), "", (", ",), "", (": ",))
_COMPACT = _Style((), "", (",",), "", (":",))

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_LINE_START = re.compile(r"\r?\n([ \t]*)\Z")


def _past_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match
    return match.end()


def _parts(text: str, opening: int) -> tuple[list[_Part], int]:
    """What is in the object or list whose bracket stands at `opening`, and the place of the one that closes it."""
    parts = []
    at = _past_space(text, opening + 1)
    while text[at] not in "]}":
        begin, key, key_end = at, "", at
        if text[opening] == "{":
            key, key_end = _DECODER.raw_decode(text, at)
            at = _past_space(text, _past_space(text, key_end) + 1)
        value, end = _DECODER.raw_decode(text, at)
        parts.append(_Part(begin, key, key_end, at, value, end))
        at = _past_space(text, end)
        if text[at] == ",":
            at = _past_space(text, at + 1)
    return parts, at


def _gaps(text: str, parts: Sequence[_Part]) -> list[str]:
    return [text[one.end : next_one.begin] for one, next_one in pairwise(parts)]


def _gap_after(start: str, compact: bool) -> str:
    """What to write after a part that is the only one, when `start` stands between the bracket and it."""
    return f",{start}" if "\n" in start else "," if compact else ", "


def _style(text: str, opening: int) -> _Style:
    """The style of the object that begins at `opening`."""
    parts, closing = _parts(text, opening)
    colons = [text[part.key_end : part.value_at] for part in parts]
    first, last = text[opening + 1 : parts[0].begin], text[parts[-1].end : closing]
    gaps = _gaps(text, parts) or [_gap_after(first, compact=colons[-1] == ":")]
    return _Style([part.key for part in parts], first, gaps, last, colons)


def _with_member(text: str, opening: int, key: str, value: Any) -> str:
    """With one key of the object at `opening` set: where it stands, or as the last; a new "id" goes to the front."""
    parts, _ = _parts(text, opening)
    style = _style(text, opening)
    for part in parts:
        if part.key == key:
            same = style.value(value) == style.value(part.value)  # as it was written then: perhaps on several lines
            return text if same else text[: part.value_at] + style.value(value) + text[part.end :]
    if key == "id":
        member = f"{json.dumps(key)}{style.colons[0]}{style.value(value)}{style.gaps[0]}"
        return text[: parts[0].begin] + member + text[parts[0].begin :]
    member = f"{style.gaps[-1]}{json.dumps(key)}{style.colons[-1]}{style.value(value)}"
    return text[: parts[-1].end] + member + text[parts[-1].end :]


def _find_servers(text: str) -> _Servers:
    opening = _past_space(text, 0)
    if text[opening] == "{":
        members, _ = _parts(text, opening)
        opening = {member.key: member.value_at for member in members}.get("servers", -1)
    return _Servers(opening, *_parts(text, opening)) if opening >= 0 else _Servers(-1, [], -1)


def _without(text: str, server: str) -> str:
    opening, entries, closing = servers = _find_servers(text)
    place = servers.place(server)
    for number, entry in reversed([*enumerate(entries, 1)][place + 1 :]):
        if "id" not in entry.value:
            text = _with_member(text, entry.value_at, "id", number)
    gone = entries[place]
    if len(entries) == 1:
        return text[: opening + 1] + text[closing:]
    if place == 0:
        return text[: gone.begin] + text[entries[1].begin :]
    before = text[entries[place - 1].end : gone.begin]
    if place == len(entries) - 1:
        return text[: entries[place - 1].end] + text[gone.end :]
    after = text[gone.end : entries[place + 1].begin]
    gap = max(before, after, key=lambda gap: gap.count("\n"))  # where the author began a line, one begins still
    return text[: entries[place - 1].end] + gap + text[entries[place + 1].begin :]


def _with_entry(text: str, entry: Mapping[str, Any]) -> str:
    opening, entries, closing = _find_servers(text)
    if opening < 0:
        text = _with_member(text, _past_space(text, 0), "servers", [])
        opening, entries, closing = _find_servers(text)
    if not entries:
        return text[: opening + 1] + _first_entry(text, entry) + text[closing:]
    last = entries[-1]
    style = _style(text, last.value_at)
    start = text[opening + 1 : entries[0].begin]
    *_, gap = (_gap_after(start, style.compact), *_gaps(text, entries))
    return text[: last.end] + gap + style.object(entry) + text[last.end :]


def _first_entry(text: str, entry: Mapping[str, Any]) -> str:
    """What stands in the brackets of the object's "servers" when there is just this one."""
    top = _style(text, _past_space(text, 0))
    inline = (_COMPACT if top.compact else _INLINE).object(entry)
    line = _LINE_START.search(top.opening)
    return f"{line[0]}{line[1]}{inline}{line[0]}" if line else inline


# The file ---------------------------------------------------------------------------------------------------------


def rewrite(
    path: Path,
    *,
    remove: Collection[str] = (),
    change: Mapping[str, Mapping[str, Any]] | None = None,
    add: Collection[Mapping[str, Any]] = (),
) -> None:
    """Edit the file as `edited` does its text, if it is right before and after.

    Raises ConfigError where it is not, KeyError for an id that is not there, OSError with a line for people.
    """
    load(path)
    text = edited(path.read_bytes().decode(), remove=remove, change=change, add=add)
    parse(text, str(path), path.absolute().parent)
    write(path, text)


def write(path: Path, text: str) -> None:
    """Replace a file's text at once: whoever reads meanwhile has the old one or this one whole.

    A symbolic link stays, and its target is replaced. Mode and owner stay, the owner as far as we may set it. Raises
    OSError with a line for people.
    """
    target = os.path.realpath(path)
    directory, name = os.path.split(target)
    data = text.encode()
    try:
        status = os.stat(target)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=directory)
        try:
            with open(descriptor, "wb") as file:
                _take_after(descriptor, status)
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from None
    _sync_directory(directory)


def _take_after(descriptor: int, status: os.stat_result) -> None:
    """Give a file the owner and the mode of another, in this order: a change of owner clears bits of the mode."""
    for user, group in ((status.st_uid, status.st_gid), (-1, status.st_gid)):
        try:
            os.fchown(descriptor, user, group)
            break
        except PermissionError:  # only root gives files away, and others to their own groups at most
            continue
    os.fchmod(descriptor, stat.S_IMODE(status.st_mode))


def _sync_directory(directory: str) -> None:
    """Have the new name survive a loss of power. Some file systems refuse; the file is written all the same."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
