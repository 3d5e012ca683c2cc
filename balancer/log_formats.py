"""What a line of the log looks like, in each of the formats that a configuration can name.

A record of one exchange, or of one connection in TCP mode, is a plain tuple, because that is the fastest thing to
build. Its positions are those of `Exchange`. An event is a line of its own: a start, a change of state, an error.

text     for people with `tail -f`
haproxy  what syslog makes of HAProxy's own line (its manual, 8.2.2 and 8.2.3), for `halog` and whatever else reads it
json     one object a line, the unit of each time in its name

No line can be forged by what a client or a backend sends. Characters that could end a line or steer a terminal are
escaped, and so are the quotes inside the quoted request line: as \\xNN in text, which is how nginx does it, as #NN in
haproxy, which is how HAProxy does it.

A line costs 0.5 to 1.2 us of the thread that logs it: parts that come again and again are therefore kept ready-made.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from json import JSONEncoder
from typing import Generic, NamedTuple, TypeVar

Exchange = tuple[
    float,  # 0 when it ended: seconds since the epoch
    str,  # 1 client, "ip:port"
    bytes,  # 2 request line as received; b"" in TCP mode
    int,  # 3 status; 0 when none was sent, and in TCP mode
    int,  # 4 octets sent to the client
    str,  # 5 backend's id; "-" when there is none
    float,  # 6 seconds from the first octet until the head was whole; 0.0 in TCP mode; in 6 to 9: -1.0 when not reached
    float,  # 7 until a backend was had: the end of the wait in the queue
    float,  # 8 until the connection to the backend stood
    float,  # 9 until the answer's head was there
    float,  # 10 until the end
    str,  # 11 two letters: what ended it, and where; "--" when all went well
    int,  # 12 how many backends were tried
    str,  # 13 the request's id; "" when it has none
    int,  # 14 octets received from the client
    int,  # 15 client connections at that moment
    int,  # 16 leases of all backends
    int,  # 17 leases of this backend
    int,  # 18 how many waited before it in the queue
]
Event = tuple[float, str, str]  # seconds since the epoch, level, text


K = TypeVar("K")


class Kept(dict[K, str], Generic[K]):
    """Parts of lines by what they are made of. `part[key]` takes half of what asking an `lru_cache` takes."""

    def __init__(self, make: Callable[[K], str], most: int) -> None:
        self._make = make
        self._most = most

    def __missing__(self, key: K) -> str:
        if len(self) >= self._most:
            self.clear()
        self[key] = part = self._make(key)
        return part


def kept(most: int) -> Callable[[Callable[[K], str]], Kept[K]]:
    """Keep so many of what a function makes."""
    return lambda make: Kept(make, most)


class Format(NamedTuple):
    """How records become lines, without their line ends."""

    exchange: Callable[[Exchange], str]
    event: Callable[[Event], str]


def _phases(*moments: int) -> list[int]:
    """From moments, all counted from the same beginning, to times from each to the next; -1 for what was not reached.

    A moment before the one that it follows is of an earlier try. The moments are rounded, and not the times, so that
    these never add up to more than the whole.
    """
    times: list[int] = []
    before = 0
    for moment in moments:
        if moment < before:
            break
        times.append(moment - before)
        before = moment
    return times + [-1] * (len(moments) - len(times))


# text -------------------------------------------------------------------------------------------------------------


def text_exchange(record: Exchange) -> str:
    """One line for people:
    `2026-11-20 20:37:20.123 INFO 127.0.0.1:54321 "GET / HTTP/1.1" 200 34 backend=1 0.8ms code=-- tries=1`;
    in TCP mode `tcp 517/34`, octets from and to the client, in place of request line, status and octets.
    """
    (
        ended, client, line, status, octets_out, backend, _, _, _, _, total, code, tries,
        name, octets_in, _, _, _, _,
    ) = record  # fmt: skip
    if line or status:
        what = f'"{_request[line]}" {_number[status] if status else "-"} {octets_out}'
    else:
        what = f"tcp {octets_in}/{octets_out}"
    text = (
        f"{_date[int(ended * 1000)]} INFO {client} {what} backend={backend} {_tenths[int(total * 10_000 + 0.5)]}ms "
        f"code={code} tries={_number[tries]}"
    )
    return f"{text} id={_quotable(name).replace(' ', '_')}" if name else text


def text_event(event: Event) -> str:
    """One line for people: `2026-11-20 20:37:20.123 WARNING backend 1 is DOWN: L4CON refused, 3rd failure`."""
    moment, level, text = event
    return f"{_date[int(moment * 1000)]} {level.upper()} {_printable(text)}"


@kept(16)
def _date(milliseconds: int) -> str:
    """Local time, `2026-11-20 20:37:20.123`."""
    return f"{_second[milliseconds // 1000]}.{milliseconds % 1000:03d}"


@kept(4)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


@kept(1024)
def _tenths(number: int) -> str:
    """Tenths as a number with one digit behind the point."""
    return f"{number / 10:.1f}"


_number: Kept[int] = Kept(str, 1024)


@kept(256)
def _request(line: bytes) -> str:
    """A request line, fit for quotes. What is asked for once is mostly asked for again."""
    text = line.decode("ascii", "surrogateescape")
    if text.isprintable() and '"' not in text and "\\" not in text:
        return text  # the pattern takes twice as long to find nothing
    return _UNQUOTABLE.sub(_escaped, text)


_UNQUOTABLE = re.compile(r"[^ !#-\[\]-~]")  # all but printable ASCII, and the quote and the backslash of it


def _quotable(text: str) -> str:
    if not _UNQUOTABLE.search(text):
        return text
    return _UNQUOTABLE.sub(_escaped, text)


def _printable(text: str) -> str:
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(char if char.isprintable() and char != "\\" else _escape(char) for char in text)


def _escaped(match: re.Match[str]) -> str:
    return _escape(match[0])


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # an octet that was not ASCII, by way of "surrogateescape"
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# haproxy ----------------------------------------------------------------------------------------------------------


FRONTEND = "lb"
BACKEND = "servers"
"""The names of the two halves, as HAProxy has names for its proxies."""

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")  # in no locale


def haproxy_exchange(record: Exchange) -> str:
    """HAProxy's line, as its `option httplog` makes it, behind the head that a syslog daemon writes:
    `Nov 20 20:37:20 host haproxy[123]: 127.0.0.1:54321 [20/Nov/2026:20:37:20.122] lb servers/1 0/0/0/1/1 200 34 - -
    ---- 1/1/0/0/0 0/0 "GET / HTTP/1.1"`, all in one; in TCP mode as its `option tcplog` makes it.
    """
    (
        ended, client, line, status, octets_out, backend, head, leased, connected, answered, total, code, tries,
        _, _, sessions, in_hand, leases, queued,
    ) = record  # fmt: skip
    if not line and not status:
        return _haproxy_tcp(record)
    if leased < 0.0 and code[1] == "Q":
        leased = total  # a wait that nothing but its end came of is a wait, too
    times = _timers[
        int(head * 1000 + 0.5),
        int(leased * 1000 + 0.5),
        int(connected * 1000 + 0.5),
        int(answered * 1000 + 0.5),
        int(total * 1000 + 0.5),
    ]
    return (
        f"{_syslog_head[int(ended)]}{_bare(client) if client[0] == '[' else client} "
        f"[{_haproxy_date[int((ended - total) * 1000)]}] {_server[backend, code]} {times} {status or -1} {octets_out} "
        f'- - {code}-- {_load[sessions, in_hand, leases, tries, queued]} "{_haproxy_request[line]}"'
    )


def _haproxy_tcp(record: Exchange) -> str:
    """`... 127.0.0.1:54321 [20/Nov/2026:20:37:20.122] lb servers/1 0/0/1 34 -- 1/1/0/0/0 0/0`."""
    (
        ended, client, _, _, octets_out, backend, _, leased, connected, _, total, code, tries,
        _, _, sessions, in_hand, leases, queued,
    ) = record  # fmt: skip
    if leased < 0.0 and code[1] == "Q":
        leased = total
    times = _timers[int(leased * 1000 + 0.5), int(connected * 1000 + 0.5), int(total * 1000 + 0.5)]
    return (
        f"{_syslog_head[int(ended)]}{_bare(client)} [{_haproxy_date[int((ended - total) * 1000)]}] "
        f"{_server[backend, code]} {times} {octets_out} {code} {_load[sessions, in_hand, leases, tries, queued]}"
    )


def haproxy_event(event: Event) -> str:
    """`Nov 20 20:37:20 host haproxy[123]: lb WARNING backend 1 is DOWN: L4CON refused`.

    `halog` takes for an exchange what has its date in the seventh field, where this has its level.
    """
    moment, level, text = event
    return f"{_syslog_head[int(moment)]}{FRONTEND} {level.upper()} {_printable(text)}"


def _bare(client: str) -> str:
    """`::1:54321` for `[::1]:54321`: HAProxy writes no brackets."""
    return client.replace("[", "", 1).replace("]", "", 1)


@kept(4)
def _syslog_head(seconds: int) -> str:
    """What a syslog daemon puts in front. The tag is that of HAProxy's process, which is what readers look for."""
    date = time.localtime(seconds)
    host = re.sub(r"[^!-~]", "", socket.gethostname().partition(".")[0]) or "localhost"
    clock = f"{date.tm_hour:02d}:{date.tm_min:02d}:{date.tm_sec:02d}"
    return f"{_MONTHS[date.tm_mon - 1]} {date.tm_mday:2d} {clock} {host} haproxy[{os.getpid()}]: "


@kept(16)
def _haproxy_date(milliseconds: int) -> str:
    """Local time, `20/Nov/2026:20:37:20.122`."""
    return f"{_haproxy_second[milliseconds // 1000]}.{milliseconds % 1000:03d}"


@kept(16)
def _haproxy_second(seconds: int) -> str:
    date = time.localtime(seconds)
    clock = f"{date.tm_hour:02d}:{date.tm_min:02d}:{date.tm_sec:02d}"
    return f"{date.tm_mday:02d}/{_MONTHS[date.tm_mon - 1]}/{date.tm_year}:{clock}"


@kept(1024)
def _server(of: tuple[str, str]) -> str:
    """Frontend, backend and server, by backend and code. What is refused within its head has come to no backend."""
    backend, code = of
    if backend != "-":
        return f"{FRONTEND} {BACKEND}/{backend}"
    return f"{FRONTEND} {FRONTEND if code[1] == 'R' else BACKEND}/<NOSRV>"


@kept(2048)
def _timers(milliseconds: tuple[int, ...]) -> str:
    """The times from each of these moments to the next, and the last of them, which is the whole."""
    return "/".join(map(str, [*_phases(*milliseconds[:-1]), milliseconds[-1]]))


@kept(2048)
def _load(of: tuple[int, int, int, int, int]) -> str:
    """actconn/feconn/beconn/srv_conn/retries srv_queue/backend_queue.

    A retry goes to another backend, which HAProxy marks with "+". There is one queue for all backends.
    """
    sessions, in_hand, leases, tries, queued = of
    retries = f"+{tries - 1}" if tries > 1 else "0"
    return f"{sessions}/{sessions}/{in_hand}/{leases}/{retries} 0/{queued}"


_HAPROXY_ENCODED = re.compile(r"[^ !$-~]")  # all but printable ASCII, and the quote and the "#" of it


@kept(256)
def _haproxy_request(line: bytes) -> str:
    """A request line as HAProxy quotes it (its manual, 8.6)."""
    text = line.decode("ascii", "surrogateescape") or "<BADREQ>"
    if text.isprintable() and '"' not in text and "#" not in text:
        return text
    return _HAPROXY_ENCODED.sub(lambda match: f"#{ord(match[0]) & 0xFF:02X}", text)


# json -------------------------------------------------------------------------------------------------------------


def json_exchange(record: Exchange) -> str:
    """One object. `head_ms`, `queue_ms`, `connect_ms` and `answer_ms` follow each other, as HAProxy's timers do.

    null: a time that was not reached, a status that was not sent, a request in TCP mode, no backend, no id. What is
    not ASCII in a request line stands as in the text format.
    """
    (
        ended, client, line, status, octets_out, backend, head, leased, connected, answered, total, code, tries,
        name, octets_in, sessions, in_hand, leases, queued,
    ) = record  # fmt: skip
    if leased < 0.0 and code[1] == "Q":
        leased = total
    times = _json_times[
        int(head * 10_000 + 0.5),
        int(leased * 10_000 + 0.5),
        int(connected * 10_000 + 0.5),
        int(answered * 10_000 + 0.5),
    ]
    return (
        f'{{"time":"{_json_date[int(ended * 1000)]}","level":"info","client":"{client}",'
        f'"request":{_json_request[line]},"status":{status or "null"},'
        f'"octets_in":{octets_in},"octets_out":{octets_out},"backend":{_json_backend[backend]},'
        f'{times},"total_ms":{total * 1000:.1f},{_json_load[code, tries, sessions, in_hand, leases, queued]},'
        f'"id":{_json(name) if name else "null"}}}'
    )


def json_event(event: Event) -> str:
    """`{"time":"2026-11-20T19:37:20.123Z","level":"warning","event":"backend 1 is DOWN: L4CON refused"}`."""
    moment, level, text = event
    return f'{{"time":"{_json_date[int(moment * 1000)]}","level":"{level}","event":{_json(text)}}}'


@kept(16)
def _json_date(milliseconds: int) -> str:
    """Universal time, `2026-11-20T19:37:20.123Z`."""
    return f"{_json_second[milliseconds // 1000]}.{milliseconds % 1000:03d}Z"


@kept(4)
def _json_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


@kept(2048)
def _json_times(tenths: tuple[int, ...]) -> str:
    """The times from each of these moments to the next, all in tenths of a millisecond."""
    head, queue, connect, answer = [each / 10 if each >= 0 else "null" for each in _phases(*tenths)]
    return f'"head_ms":{head},"queue_ms":{queue},"connect_ms":{connect},"answer_ms":{answer}'


@kept(2048)
def _json_load(of: tuple[str, int, int, int, int, int]) -> str:
    code, tries, sessions, in_hand, leases, queued = of
    return (
        f'"code":"{code}","tries":{tries},"connections":{sessions},"active":{in_hand},"backend_active":{leases},'
        f'"queued_before":{queued}'
    )


@kept(256)
def _json_request(line: bytes) -> str:
    return _json(line.decode("ascii", "backslashreplace")) if line else "null"


@kept(1024)
def _json_backend(backend: str) -> str:
    return _json(backend) if backend != "-" else "null"


_json_string = JSONEncoder().encode
_SURROGATES = re.compile("[\ud800-\udfff]")


def _json(text: str) -> str:
    """A JSON string in ASCII. Half of a surrogate pair is none that every reader would take, so it is escaped twice."""
    return _json_string(text if text.isascii() else _SURROGATES.sub(_escaped, text))


FORMATS = {
    "text": Format(text_exchange, text_event),
    "haproxy": Format(haproxy_exchange, haproxy_event),
    "json": Format(json_exchange, json_event),
}
