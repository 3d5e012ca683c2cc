"""load_balancer.log: its lines in each format, its file through every misfortune, its thread."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from balancer import journal
from balancer.journal import Exchange, Journal
from balancer.log_formats import (
    FORMATS,
    haproxy_event,
    haproxy_exchange,
    json_event,
    json_exchange,
    text_event,
    text_exchange,
)
from conftest import eventually

DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
FULL = Path("/dev/full")  # on Linux: each write to it fails with ENOSPC


def exchange(
    *,
    ended: float = 1_000_000_000.125,
    client: str = "127.0.0.1:54321",
    line: bytes = b"GET /x HTTP/1.1",
    status: int = 200,
    bytes_out: int = 34,
    backend: str = "1",
    total: float = 0.00081,
    code: str = "--",
    tries: int = 1,
    request_id: str = "",
    bytes_in: int = 0,
    moments: tuple[float, float, float, float] = (0.0, 0.0, 0.0001, 0.0007),  # head, leased, connected, answered
    load: tuple[int, int, int, int] = (1, 1, 1, 0),  # connections, leases of all, of this backend, queued before
) -> Exchange:
    return (ended, client, line, status, bytes_out, backend, *moments, total, code, tries, request_id, bytes_in, *load)


class Clock:
    """Seconds, as many as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "load_balancer.log"


def lines(path: Path) -> list[str]:
    """The lines without their dates; each must have one and be whole."""
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    for line in text.splitlines():
        assert re.match(DATE + " ", line), line
    return [line[24:] for line in text.splitlines()]


# Lines: text ------------------------------------------------------------------------------------------------------


def test_line_of_an_exchange_has_the_fields_in_the_order_of_the_conventions():
    """date, level, client, request, status, bytes, backend, milliseconds, code, tries."""
    text = text_exchange(exchange())
    assert re.fullmatch(
        DATE + r' INFO 127\.0\.0\.1:54321 "GET /x HTTP/1\.1" 200 34 backend=1 0\.8ms code=-- tries=1', text
    )


def test_milliseconds_of_the_date_are_those_of_the_end_and_seconds_follow_each_other():
    assert text_exchange(exchange(ended=1_000_000_000.125))[19:23] == ".125"
    assert text_exchange(exchange(ended=1_000_000_000.0))[19:23] == ".000"
    first, second = (text_exchange(exchange(ended=1_000_000_000.5 + n))[17:19] for n in (0, 1))
    assert (int(first) + 1) % 60 == int(second)


def test_request_id_is_there_only_when_there_is_one():
    assert "id=" not in text_exchange(exchange())
    assert text_exchange(exchange(request_id="f00d")).endswith("tries=1 id=f00d")


def test_request_id_cannot_forge_fields_or_lines():
    """It may be what a client sent as X-Request-ID."""
    assert text_exchange(exchange(request_id='a b\r\n"')).endswith(r"id=a_b\x0d\x0a\x22")


def test_tcp_connection_has_octets_of_both_ways_in_place_of_the_request():
    text = text_exchange(exchange(line=b"", status=0, bytes_in=517, bytes_out=4096, total=2.5))
    assert text[24:] == "INFO 127.0.0.1:54321 tcp 517/4096 backend=1 2500.0ms code=-- tries=1"


def test_exchange_without_an_answer_has_a_dash_for_its_status():
    text = text_exchange(exchange(status=0, bytes_out=0, backend="-", code="CR", tries=0))
    assert '"GET /x HTTP/1.1" - 0 backend=- ' in text


def test_refused_request_without_a_line_is_not_taken_for_tcp():
    assert ' "" 408 34 ' in text_exchange(exchange(line=b"", status=408, code="cR"))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b'GET /" 200 1 "', r"GET /\x22 200 1 \x22"),
        (b"GET /\\x22", r"GET /\x5cx22"),
        (b"GET /\r\n2026-01-01 00:00:00.000 INFO", r"GET /\x0d\x0a2026-01-01 00:00:00.000 INFO"),
        (b"GET /\x00\x1b[2J\x7f", r"GET /\x00\x1b[2J\x7f"),
        ("GET /ä".encode(), r"GET /\xc3\xa4"),
        (b"GET /\xff", r"GET /\xff"),
        ("GET /\u2028\u202e".encode(), r"GET /\xe2\x80\xa8\xe2\x80\xae"),
        (b"GET /~!#[]{}|^` HTTP/1.1", "GET /~!#[]{}|^` HTTP/1.1"),
    ],
)
def test_request_line_cannot_forge_a_line_or_steer_a_terminal(raw: bytes, shown: str):
    assert f' "{shown}" 200 ' in text_exchange(exchange(line=raw))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one\n2026-01-01 00:00:00.000 INFO two", r"one\x0a2026-01-01 00:00:00.000 INFO two"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\\nb", r"a\x5cnb"),
        ("nel\x85 line\u2028 right\u202e", r"nel\x85 line\u2028 right\u202e"),
        ("octets \udcff\udcc3", r"octets \xff\xc3"),
        ("beyond \U000e0001", r"beyond \U000e0001"),
        ('"quoted" Gerät 東京', '"quoted" Gerät 東京'),
    ],
)
def test_event_is_one_line_of_printable_characters(text: str, shown: str):
    assert text_event((1_000_000_000.0, "info", text))[24:] == f"INFO {shown}"


# Lines: haproxy ---------------------------------------------------------------------------------------------------

SYSLOG_HEAD = r"[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d [!-~]+ haproxy\[\d+\]: "


def behind_the_head(line: str) -> str:
    found = re.match(SYSLOG_HEAD, line)
    assert found, line
    return line[found.end() :]


def local(hour: int, minute: int, second: float) -> float:
    """A moment of 20 November 2026, local time; a tenth of a millisecond later, lest a float fall short of it."""
    return time.mktime((2026, 11, 20, hour, minute, int(second), 0, 0, -1)) + second % 1 + 0.0001


REFUSED = (-1.0, -1.0, -1.0, -1.0)


@pytest.mark.parametrize(
    ("accepted", "total", "fields", "line"),
    [
        (
            (23, 50, 37.888),
            0.001,
            {"client": "127.0.0.1:56376", "bytes_out": 149, "moments": (0.0, 0.0, 0.0, 0.001)},
            "127.0.0.1:56376 [20/Nov/2026:23:50:37.888] lb servers/s1 0/0/0/1/1 200 149 - - ---- 1/1/0/0/0 0/0 "
            '"GET /x HTTP/1.1"',
        ),
        (
            (23, 50, 37.990),
            0.001,
            {"client": "[::1]:60822", "line": b"GET /v6 HTTP/1.1", "bytes_out": 149, "moments": (0.0, 0.0, 0.0, 0.001)},
            "::1:60822 [20/Nov/2026:23:50:37.990] lb servers/s1 0/0/0/1/1 200 149 - - ---- 1/1/0/0/0 0/0 "
            '"GET /v6 HTTP/1.1"',
        ),
        (
            (23, 50, 38.092),
            0.001,
            {
                "client": "127.0.0.1:56380",
                "line": b'GET /a"b#c{d}|e\xc3\xa4\x7f\x80\\~^` HTTP/1.1',
                "bytes_out": 149,
                "moments": (0.0, 0.0, 0.0, 0.001),
            },
            "127.0.0.1:56380 [20/Nov/2026:23:50:38.092] lb servers/s1 0/0/0/1/1 200 149 - - ---- 1/1/0/0/0 0/0 "
            '"GET /a#22b#23c{d}|e#C3#A4#7F#80\\~^` HTTP/1.1"',
        ),
        (
            (23, 50, 38.395),
            1.001,
            {
                "client": "127.0.0.1:56402",
                "line": b"",
                "status": 408,
                "bytes_out": 0,
                "backend": "-",
                "code": "cR",
                "tries": 0,
                "moments": REFUSED,
            },
            "127.0.0.1:56402 [20/Nov/2026:23:50:38.395] lb lb/<NOSRV> -1/-1/-1/-1/1001 408 0 - - cR-- 1/1/0/0/0 0/0 "
            '"<BADREQ>"',
        ),
        (
            (23, 50, 39.899),
            1.001,
            {"client": "127.0.0.1:56446", "status": 504, "bytes_out": 198, "code": "sH", "moments": (0, 0, 0, -1)},
            "127.0.0.1:56446 [20/Nov/2026:23:50:39.899] lb servers/s1 0/0/0/-1/1001 504 198 - - sH-- 1/1/0/0/0 0/0 "
            '"GET /x HTTP/1.1"',
        ),
        (
            (23, 50, 41.204),
            0.3,
            {
                "client": "127.0.0.1:42060",
                "line": b"GET /queued HTTP/1.1",
                "status": 503,
                "bytes_out": 217,
                "backend": "-",
                "code": "sQ",
                "tries": 0,
                "moments": (0.0, -1.0, -1.0, -1.0),
                "load": (2, 1, 0, 1),
            },
            "127.0.0.1:42060 [20/Nov/2026:23:50:41.204] lb servers/<NOSRV> 0/300/-1/-1/300 503 217 - - sQ-- "
            '2/2/1/0/0 0/1 "GET /queued HTTP/1.1"',
        ),
        (
            (23, 58, 27.715),
            0.002,
            {"client": "127.0.0.1:45896", "bytes_out": 149, "tries": 2, "moments": (0.0, 0.0, 0.0, 0.001)},
            "127.0.0.1:45896 [20/Nov/2026:23:58:27.715] lb servers/s1 0/0/0/1/2 200 149 - - ---- 1/1/0/0/+1 0/0 "
            '"GET /x HTTP/1.1"',
        ),
        (
            (23, 58, 28.631),
            0.0,
            {
                "client": "127.0.0.1:49878",
                "status": 503,
                "bytes_out": 217,
                "backend": "-",
                "code": "SC",
                "tries": 0,
                "moments": (0.0, -1.0, -1.0, -1.0),
            },
            "127.0.0.1:49878 [20/Nov/2026:23:58:28.631] lb servers/<NOSRV> 0/-1/-1/-1/0 503 217 - - SC-- 1/1/0/0/0 0/0 "
            '"GET /x HTTP/1.1"',
        ),
        (
            (23, 58, 26.801),
            0.001,
            {
                "client": "127.0.0.1:59382",
                "line": b"",
                "status": 0,
                "bytes_out": 146,
                "moments": (0.0, 0.001, 0.001, -1.0),
                "load": (2, 0, 0, 0),
            },
            "127.0.0.1:59382 [20/Nov/2026:23:58:26.801] lb servers/s1 1/0/1 146 -- 2/2/0/0/0 0/0",
        ),
        (
            (23, 58, 29.536),
            0.0,
            {
                "client": "127.0.0.1:41764",
                "line": b"",
                "status": 0,
                "bytes_out": 0,
                "backend": "-",
                "code": "SC",
                "tries": 0,
                "moments": (0.0, -1.0, -1.0, -1.0),
            },
            "127.0.0.1:41764 [20/Nov/2026:23:58:29.536] lb servers/<NOSRV> -1/-1/0 0 SC 1/1/0/0/0 0/0",
        ),
    ],
    ids=["ordinary", "ipv6", "escaped", "408", "504", "queued-in-vain", "retried", "503", "tcp", "tcp-503"],
)
def test_line_is_the_one_that_haproxy_wrote_of_such_an_exchange(
    accepted: tuple[int, int, float], total: float, fields: dict[str, Any], line: str
):
    """The lines are HAProxy 2.6.12's, caught from its `log`, with `option httplog` and `option tcplog`."""
    record = exchange(
        **{"ended": local(*accepted) + total, "total": total, "backend": "s1", "load": (1, 0, 0, 0), **fields}
    )
    assert behind_the_head(haproxy_exchange(record)) == line


def test_the_head_is_the_one_that_a_syslog_daemon_writes():
    """`Feb  6 12:14:14 host haproxy[14389]: `, the moment when it was logged, the day padded with a blank."""
    ended = time.mktime((2027, 2, 6, 12, 14, 14, 0, 0, -1)) + 0.5
    line = haproxy_exchange(exchange(ended=ended, total=2.0))
    assert re.match(
        rf"Feb  6 12:14:14 \S+ haproxy\[{os.getpid()}\]: 127\.0\.0\.1:54321 \[06/Feb/2027:12:14:12\.500\]", line
    )


def test_status_that_was_not_sent_is_minus_one():
    """As HAProxy has it for a client that went away before there was an answer."""
    record = exchange(status=0, bytes_out=0, code="CH", moments=(0.0, 0.0, 0.0, -1.0))
    assert "/-1/1 -1 0 - - CH-- " in haproxy_exchange(record)


def test_times_never_add_up_to_more_than_the_whole():
    """`halog` takes the rest for the time of the data, and complains when that is negative."""
    record = exchange(moments=(0.0006, 0.0012, 0.0018, 0.0024), total=0.0024)
    assert " 1/0/1/0/2 " in haproxy_exchange(record)


@pytest.mark.parametrize("name", FORMATS)
def test_no_format_has_a_line_end_or_a_control_in_its_line(name: str):
    hostile = bytes(range(256))
    text = FORMATS[name].exchange(exchange(line=hostile, request_id=hostile.decode("ascii", "surrogateescape")))
    text += FORMATS[name].event((1_000_000_000.0, "info", hostile.decode("ascii", "surrogateescape") + "\u2028\x85"))
    assert text.isprintable()
    assert text.splitlines() == [text]


def test_event_is_a_line_that_cannot_be_taken_for_an_exchange():
    """What `halog` looks at is whether the seventh field begins with "[" and a day."""
    line = haproxy_event((local(1, 2, 3), "warning", "[20/Nov/2026:01:02:03.000] lb servers/1 0/0/0/0/0 200 1\nx"))
    assert line.startswith("Nov 20 01:02:03 ")
    assert behind_the_head(line) == r"lb WARNING [20/Nov/2026:01:02:03.000] lb servers/1 0/0/0/0/0 200 1\x0ax"
    assert line.split()[6] == "WARNING"


# Lines: json ------------------------------------------------------------------------------------------------------


def test_object_has_a_name_for_each_field_and_a_unit_for_each_time():
    record = exchange(
        ended=1_000_000_000.125,
        moments=(0.001, 0.0035, 0.004, 0.0097),
        total=0.0128,
        request_id="f00d-1",
        bytes_in=512,
        load=(7, 5, 3, 2),
    )
    assert json.loads(json_exchange(record)) == {
        "time": "2001-09-09T01:46:40.125Z",
        "level": "info",
        "client": "127.0.0.1:54321",
        "request": "GET /x HTTP/1.1",
        "status": 200,
        "octets_in": 512,
        "octets_out": 34,
        "backend": "1",
        "head_ms": 1.0,
        "queue_ms": 2.5,
        "connect_ms": 0.5,
        "answer_ms": 5.7,
        "total_ms": 12.8,
        "code": "--",
        "tries": 1,
        "connections": 7,
        "active": 5,
        "backend_active": 3,
        "queued_before": 2,
        "id": "f00d-1",
    }


def test_what_was_not_reached_is_null_and_its_name_is_there_all_the_same():
    record = exchange(line=b"", status=0, backend="-", code="SC", tries=0, moments=(0.0, -1.0, -1.0, -1.0))
    made = json.loads(json_exchange(record))
    nulls = [name for name, value in made.items() if value is None]
    assert nulls == ["request", "status", "backend", "queue_ms", "connect_ms", "answer_ms", "id"]
    assert made.keys() == json.loads(json_exchange(exchange())).keys()


def test_wait_in_vain_is_a_time_in_the_queue():
    record = exchange(code="sQ", moments=(0.001, -1.0, -1.0, -1.0), total=0.301)
    made = json.loads(json_exchange(record))
    assert (made["queue_ms"], made["connect_ms"]) == (300.0, None)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ('"},{"event":"forged\n', '"},{"event":"forged\n'),
        ("Gerät 東京 \U0001f600", "Gerät 東京 \U0001f600"),
        ("octets \udcff\udcc3", r"octets \xff\xc3"),
        ("half of a pair \ud83d", r"half of a pair \ud83d"),
    ],
)
def test_object_is_valid_whatever_is_in_it(text: str, read: str):
    """RFC 8259 section 8.2: half of a surrogate pair is read differently by everybody, or by nobody."""
    assert json.loads(json_event((1_000_000_000.0, "info", text))) == {
        "time": "2001-09-09T01:46:40.000Z",
        "level": "info",
        "event": read,
    }
    assert json.loads(json_exchange(exchange(request_id=text, backend=text)))["id"] == read


def test_octets_of_a_request_that_are_not_ascii_stand_as_in_the_text_format():
    made = json.loads(json_exchange(exchange(line=b'GET /\xff\x00"\\')))
    assert made["request"] == 'GET /\\xff\x00"\\'


# The thread -------------------------------------------------------------------------------------------------------


def test_what_was_appended_before_stop_is_in_the_file_in_order(path: Path):
    log = Journal(str(path))
    log.start()
    for number in range(3 * journal.BATCH + 7):
        log.exchange(exchange(bytes_out=number))
    log.event("info", "the last")
    log.stop()
    *exchanges, last = lines(path)
    assert [int(line.split()[6]) for line in exchanges] == list(range(3 * journal.BATCH + 7))
    assert last == "INFO the last"


def test_lines_come_by_themselves_while_it_runs(path: Path):
    log = Journal(str(path))
    log.start()
    try:
        log.exchange(exchange())
        eventually(lambda: len(lines(path)) == 1, "the line is in the file")
    finally:
        log.stop()


def test_records_of_many_threads_are_all_written_once(path: Path):
    log = Journal(str(path))
    log.start()

    def append(first: int) -> None:
        for number in range(first, first + 500):
            log.exchange(exchange(bytes_out=number))

    threads = [threading.Thread(target=append, args=(500 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.stop()
    assert sorted(int(line.split()[6]) for line in lines(path)) == list(range(2000))


def test_thread_is_named_and_gone_after_stop(path: Path):
    log = Journal(str(path))
    log.start()
    assert "journal" in [thread.name for thread in threading.enumerate()]
    log.stop()
    assert "journal" not in [thread.name for thread in threading.enumerate()]
    log.stop()  # once more does nothing


def test_an_exchange_is_a_line_at_once_which_waits_for_the_thread(path: Path):
    """Nobody who logs waits for a disk."""
    log = Journal(str(path))
    log.exchange(exchange())
    assert [line.split()[3] for line in log._waiting] == ["127.0.0.1:54321"]
    assert not path.exists()


@pytest.mark.parametrize("settings", [{"path": ""}, {"level": "error"}])
def test_what_is_not_written_is_not_made_into_lines(path: Path, settings: dict[str, str]):
    log = Journal(**{"path": str(path), **settings})
    log.exchange(("nonsense",))  # type: ignore[arg-type]
    assert not log._waiting
    assert not log.events


@pytest.mark.parametrize("name", FORMATS)
def test_a_record_that_was_built_wrongly_is_told_and_the_log_goes_on(path: Path, name: str):
    log = Journal(str(path), format=name)
    log.start()
    log.exchange(("nonsense", "\n") * 7)  # type: ignore[arg-type]
    log.exchange(exchange())
    log.stop()
    first, second = path.read_text().splitlines()
    assert "no line can be made of ('nonsense', " in first
    assert "127.0.0.1:54321" in second


# Levels, echo -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "written"),
    [
        ("debug", ["DEBUG d", "INFO i", "WARNING w", "ERROR e", "INFO 127.0.0.1:54321"]),
        ("info", ["INFO i", "WARNING w", "ERROR e", "INFO 127.0.0.1:54321"]),
        ("warning", ["WARNING w", "ERROR e"]),
        ("error", ["ERROR e"]),
    ],
)
def test_level_is_the_least_that_is_written_and_exchanges_are_info(path: Path, level: str, written: list[str]):
    log = Journal(str(path), level=level)
    log.start()
    for name in journal.LEVELS:
        log.event(name, name[0])
    log.exchange(exchange())
    log.stop()
    assert [" ".join(line.split()[:2]) for line in lines(path)] == written


def test_echo_is_given_the_events_and_not_the_exchanges(path: Path):
    echo = io.StringIO()
    log = Journal(str(path), level="warning", echo=echo)
    log.start()
    log.event("info", "below the level")
    log.event("warning", "backend 1 is DOWN")
    log.exchange(exchange())
    log.stop()
    assert re.fullmatch(DATE + " WARNING backend 1 is DOWN\n", echo.getvalue())


def test_without_a_path_only_the_echo_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    echo = io.StringIO()
    log = Journal("", echo=echo)
    log.start()
    log.exchange(exchange())
    log.event("info", "started")
    log.stop()
    assert echo.getvalue().endswith("INFO started\n")
    assert list(tmp_path.iterdir()) == []


def test_echo_that_was_closed_does_not_end_the_log(path: Path):
    """`python lb.py | head -1`: the pipe's reader goes."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115
    log = Journal(str(path), echo=stream)
    log.start()
    log.event("info", "one")
    log.stop()
    with pytest.raises(BrokenPipeError):
        stream.close()
    assert lines(path) == ["INFO one"]


def test_echo_without_the_characters_is_given_escapes(path: Path):
    octets = io.BytesIO()
    log = Journal(str(path), echo=io.TextIOWrapper(octets, encoding="ascii"))
    log.start()
    log.event("info", "Gerät")
    log.stop()
    assert octets.getvalue().endswith(b"INFO Ger\\xe4t\n")


# The last events --------------------------------------------------------------------------------------------------


def test_events_are_kept_whatever_the_level_of_the_file():
    log = Journal("", level="error")
    for level in journal.LEVELS:
        log.event(level, level[0])
    assert [event[1:] for event in log.latest_events()] == [("info", "i"), ("warning", "w"), ("error", "e")]


def test_the_last_events_are_kept_and_no_more():
    log = Journal("")
    for number in range(journal.EVENTS + 10):
        log.event("info", str(number))
    kept = [int(text) for _, _, text in log.latest_events()]
    assert kept == list(range(10, journal.EVENTS + 10))


def test_events_can_be_copied_while_others_are_added():
    log = Journal("")
    done = threading.Event()

    def add() -> None:
        for number in range(20_000):
            log.event("info", str(number))
        done.set()

    thread = threading.Thread(target=add)
    thread.start()
    while not done.is_set():
        numbers = [int(text) for _, _, text in log.latest_events()]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
    thread.join()


# Changed while it runs --------------------------------------------------------------------------------------------

AS_IT_WAS = {"level": "info", "max_bytes": 0, "backups": 0, "format": "text"}


@pytest.fixture
def running(path: Path):
    """A journal whose clock stands still, so that no look at where its path leads ever falls due."""
    log = Journal(str(path), clock=Clock())
    log.start()
    yield log
    log.stop()


def test_what_was_logged_before_a_change_goes_to_the_old_file_in_the_old_format(
    running: Journal, path: Path, tmp_path: Path
):
    other = tmp_path / "other.log"
    for number in range(3 * journal.BATCH + 7):
        running.exchange(exchange(bytes_out=number))
    running.configure(**{**AS_IT_WAS, "path": str(other), "format": "json"})
    running.exchange(exchange(bytes_out=-1))
    running.event("info", "after")
    running.stop()
    assert [int(line.split()[6]) for line in lines(path)] == list(range(3 * journal.BATCH + 7))
    first, second = map(json.loads, other.read_text().splitlines())
    assert (first["octets_out"], second["event"]) == (-1, "after")


def test_format_changes_within_a_file_that_is_not_opened_again(running: Journal, path: Path):
    """Renamed, so that it shows where the lines go: to the file that was open."""
    running.event("info", "before")
    path.rename(path.with_suffix(".old"))
    running.configure(**{**AS_IT_WAS, "path": str(path), "format": "json"})
    running.event("info", "after")
    running.stop()
    before, after = path.with_suffix(".old").read_text().splitlines()
    assert before.endswith("INFO before")
    assert json.loads(after)["event"] == "after"
    assert not path.exists()


def test_nothing_is_lost_or_doubled_by_changes_while_others_log(running: Journal, path: Path, tmp_path: Path):
    total = 20_000

    def append() -> None:
        for number in range(total):
            running.exchange(exchange(bytes_out=number))

    thread = threading.Thread(target=append)
    thread.start()
    changes = 0
    while thread.is_alive():
        changes += 1
        running.configure(**{**AS_IT_WAS, "path": str(tmp_path / f"{changes % 3}.log")})
    thread.join()
    running.stop()
    files = [path, *(tmp_path / f"{number}.log" for number in range(3))]
    found = [int(line.split()[6]) for file in files if file.exists() for line in lines(file)]
    assert sorted(found) == list(range(total))


def test_level_changes_for_exchanges_and_events(running: Journal, path: Path):
    running.configure(**{**AS_IT_WAS, "path": str(path), "level": "warning"})
    running.event("info", "not this")
    running.exchange(exchange())
    running.event("warning", "this")
    running.configure(**{**AS_IT_WAS, "path": str(path), "level": "debug"})
    running.event("debug", "this too")
    running.exchange(exchange())
    running.stop()
    assert [" ".join(line.split()[:2]) for line in lines(path)] == [
        "WARNING this",
        "DEBUG this",
        "INFO 127.0.0.1:54321",
    ]


def test_log_is_switched_off_and_on(running: Journal, path: Path, tmp_path: Path):
    running.event("info", "one")
    running.configure(**{**AS_IT_WAS, "path": ""})
    running.event("info", "two")
    running.exchange(exchange())
    running.configure(**{**AS_IT_WAS, "path": str(path)})
    running.event("info", "three")
    running.stop()
    assert lines(path) == ["INFO one", "INFO three"]


def test_limits_of_size_change(tmp_path: Path, path: Path, running: Journal):
    running.configure(**{**AS_IT_WAS, "path": str(path), "max_bytes": 200, "backups": 1})
    for number in range(5):
        running.event("info", f"{number} {'x' * 60}")
        running.configure(**{**AS_IT_WAS, "path": str(path), "max_bytes": 200, "backups": 1})
    running.stop()
    assert [line.split()[1] for line in lines(path)] == ["4"]
    assert [line.split()[1] for line in lines(path.with_suffix(".log.1"))] == ["2", "3"]


def test_path_that_cannot_be_opened_changes_nothing(running: Journal, path: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        running.configure(str(tmp_path / "missing" / "lb.log"), "error", 0, 0, "json")
    running.event("info", "as before")
    running.exchange(exchange())
    running.stop()
    assert [" ".join(line.split()[:3]) for line in lines(path)] == [
        "INFO as before",
        'INFO 127.0.0.1:54321 "GET',
    ]


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_what_a_full_disk_did_not_take_goes_to_the_new_file(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path.symlink_to(FULL)
    log = Journal(str(path))
    log.start()
    for number in range(journal.BATCH + 5):
        log.event("info", str(number))
    log.configure(**{**AS_IT_WAS, "path": str(tmp_path / "other.log")})
    log.event("info", "after")
    log.stop()
    *shown, last = lines(tmp_path / "other.log")
    assert shown == [*(f"INFO {number}" for number in range(journal.BATCH + 5)), "INFO after"]
    assert re.fullmatch(
        rf"ERROR {path}: could not be written for \d\.\d s: No space left on device; 0 lines were lost", last
    )
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_file_that_takes_nothing_refuses_the_change(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pipe that nobody empties, a disk that hangs: whoever changes the configuration must not hang with it."""
    monkeypatch.setattr(journal, "PATIENCE", 0.05)
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = Journal(str(path))
    log.start()
    try:
        for _ in range(20):
            log.event("info", "x" * 10_000)  # more than a pipe holds
        eventually(lambda: log._writing.locked() and not log._waiting, "the writer is stuck")
        with pytest.raises(OSError, match="does not take what is written to it"):
            log.configure(**{**AS_IT_WAS, "path": str(tmp_path / "other.log")})
    finally:
        os.set_blocking(reader, True)
        emptied = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(reader, 65536), b"")])
        emptied.start()
        monkeypatch.undo()
        log.stop()
        emptied.join()
        os.close(reader)
    assert not (tmp_path / "other.log").exists()


def test_change_before_the_start_counts_from_the_start(path: Path, tmp_path: Path):
    log = Journal(str(path))
    log.configure(str(tmp_path / "other.log"), "warning", 0, 0, "json")
    log.start()
    log.exchange(exchange())
    log.event("error", "one")
    log.stop()
    assert not path.exists()
    assert json.loads((tmp_path / "other.log").read_text())["event"] == "one"


# The file: opened, moved, rotated ---------------------------------------------------------------------------------


def test_path_that_cannot_be_opened_is_an_error_at_start(tmp_path: Path):
    log = Journal(str(tmp_path / "missing" / "load_balancer.log"))
    with pytest.raises(FileNotFoundError) as raised:
        log.start()
    assert raised.value.strerror == "No such file or directory"
    log.stop()


def test_lines_are_appended_to_what_is_there(path: Path):
    for text in ("first run", "second run"):
        log = Journal(str(path))
        log.start()
        log.event("info", text)
        log.stop()
    assert lines(path) == ["INFO first run", "INFO second run"]


class Rounds:
    """A journal whose writer's rounds the test calls itself, a second apart."""

    def __init__(self, path: Path, **options: int) -> None:
        self.clock = Clock()
        self.log = Journal(str(path), clock=self.clock, **options)

    def write(self, *texts: str, later: float = 1.0) -> None:
        self.clock.now += later
        for text in texts:
            self.log.event("info", text)
        self.log.round()


@pytest.fixture
def rounds(path: Path):
    made = []

    def make(path: Path = path, **options: int) -> Rounds:
        made.append(Rounds(path, **options))
        return made[-1]

    yield make
    for each in made:
        each.log._file.close()


def test_file_that_was_moved_away_is_opened_again_within_a_second(path: Path, rounds):
    """What logrotate does."""
    it = rounds()
    it.write("before")
    path.rename(path.with_suffix(".old"))
    it.write("not looked yet", later=0.5)
    it.write("after")
    assert lines(path.with_suffix(".old")) == ["INFO before", "INFO not looked yet"]
    assert lines(path) == ["INFO after"]


def test_file_that_was_deleted_or_replaced_is_opened_again(path: Path, rounds):
    it = rounds()
    it.write("before")
    path.unlink()
    it.write("after")
    assert lines(path) == ["INFO after"]
    path.with_suffix(".other").touch()
    path.with_suffix(".other").rename(path)
    it.write("once more")
    assert lines(path) == ["INFO once more"]


def test_reopen_does_not_wait_for_the_second(path: Path, rounds):
    """For SIGUSR1."""
    it = rounds()
    it.write("before")
    path.rename(path.with_suffix(".old"))
    it.log.reopen()
    it.write("after", later=0.0)
    assert lines(path) == ["INFO after"]


def test_signal_has_the_file_opened_again_and_no_line_is_lost(path: Path, running: Journal):
    """What logrotate's postrotate does: rename, then a signal."""
    before = signal.signal(signal.SIGUSR1, lambda number, frame: running.reopen())
    try:
        for number in range(100):
            running.exchange(exchange(bytes_out=number))
        path.rename(path.with_suffix(".old"))
        signal.raise_signal(signal.SIGUSR1)
        for number in range(100, 200):
            running.exchange(exchange(bytes_out=number))
        eventually(path.exists, "the path leads to a file")
        running.stop()
    finally:
        signal.signal(signal.SIGUSR1, before)
    shown = [*(lines(path.with_suffix(".old"))), *lines(path)]
    assert [int(line.split()[6]) for line in shown] == list(range(200))


def test_file_is_rotated_before_it_grows_beyond_its_size(tmp_path: Path, path: Path, rounds):
    it = rounds(max_bytes=200, backups=2)
    for number in range(10):
        it.write(f"{number} {'x' * 60}")
    shown = {name.name: [line.split()[1] for line in lines(name)] for name in tmp_path.iterdir()}
    assert shown == {
        "load_balancer.log": ["8", "9"],
        "load_balancer.log.1": ["6", "7"],
        "load_balancer.log.2": ["4", "5"],
    }
    assert all(name.stat().st_size <= 200 for name in tmp_path.iterdir())


def test_size_of_a_file_that_was_there_counts(tmp_path: Path, path: Path, rounds):
    path.write_text("x" * 199 + "\n")
    rounds(max_bytes=200).write("one")
    assert lines(path) == ["INFO one"]
    assert (tmp_path / "load_balancer.log.1").stat().st_size == 200


def test_without_backups_the_file_is_emptied(tmp_path: Path, path: Path, rounds):
    it = rounds(max_bytes=200, backups=0)
    for number in range(5):
        it.write(f"{number} {'x' * 60}")
    assert [line.split()[1] for line in lines(path)] == ["4"]
    assert list(tmp_path.iterdir()) == [path]


def test_file_that_was_emptied_in_place_is_not_rotated_early(tmp_path: Path, path: Path, rounds):
    """What logrotate's copytruncate does."""
    it = rounds(max_bytes=200)
    it.write("x" * 60, "y" * 60)
    os.truncate(path, 0)
    it.write("one")
    assert lines(path) == ["INFO one"]
    assert list(tmp_path.iterdir()) == [path]


def test_link_is_written_through_and_never_rotated(tmp_path: Path, path: Path, rounds):
    """/dev/stdout is one: to rename it would break the machine."""
    path.symlink_to(tmp_path / "target")
    it = rounds(max_bytes=100)
    for number in range(5):
        it.write(f"{number} {'x' * 60}")
    assert len(lines(tmp_path / "target")) == 5
    assert path.is_symlink()


def test_file_that_cannot_be_rotated_grows_on_and_says_so(tmp_path: Path, path: Path, rounds):
    (tmp_path / "load_balancer.log.1").mkdir()
    it = rounds(max_bytes=200, backups=1)
    for number in range(3):
        it.write(f"{number} {'x' * 60}")
    it.write()
    *told, warning = lines(path)
    assert [line.split()[1] for line in told] == ["0", "1", "2"]
    assert warning == f"WARNING {path}: cannot be rotated and grows on: Is a directory"


# The file: misfortunes --------------------------------------------------------------------------------------------


def test_a_writer_that_cannot_write_does_not_spin_however_much_waits(path: Path, rounds):
    """A balancer whose directory was deleted took a whole core once there was a batch to write."""
    it = rounds(path=path.parent / "logs" / "lb.log")
    path = path.parent / "logs" / "lb.log"
    it.write(*map(str, range(3 * journal.BATCH)))
    assert it.log.pause_after(0) == journal.LONGEST_PAUSE
    path.parent.mkdir()
    it.write()
    assert it.log.pause_after(journal.BATCH) == 0.0, "it can write again, and there is more"


def test_directory_that_vanished_and_came_back(path: Path, rounds, capsys: pytest.CaptureFixture[str]):
    it = rounds(path=path.parent / "logs" / "lb.log")
    path = path.parent / "logs" / "lb.log"
    path.parent.mkdir()
    it.write("before")
    shutil.rmtree(path.parent)
    it.write("one")
    it.write("two")
    waiting = (
        f"{path}: cannot be written: No such file or directory; the last {journal.WAITING} lines are kept until it can"
    )
    assert capsys.readouterr().err == waiting + "\n"
    path.parent.mkdir()
    it.write()
    it.write()
    it.write()
    assert lines(path) == [
        "INFO one",
        "INFO two",
        f"ERROR {path}: could not be written for 2.0 s: No such file or directory; 0 lines were lost",
    ]
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_full_disk_keeps_the_newest_and_counts_the_rest(
    path: Path, rounds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(journal, "WAITING", 3)
    path.symlink_to(FULL)
    it = rounds()
    it.write("0", "1")  # the batch in hand is kept besides
    for number in range(2, 8):
        it.write(str(number), later=0.1)
    assert capsys.readouterr().err.count("No space left on device") == 1
    path.unlink()
    it.write()
    it.write()
    it.write()
    assert lines(path) == [
        "INFO 0",
        "INFO 1",
        "INFO 5",
        "INFO 6",
        "INFO 7",
        f"ERROR {path}: could not be written for 1.6 s: No space left on device; 3 lines were lost",
    ]


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_full_disk_at_the_stop_is_told_on_stderr(path: Path, capsys: pytest.CaptureFixture[str]):
    path.symlink_to(FULL)
    log = Journal(str(path))
    log.start()
    for _ in range(journal.BATCH + 5):
        log.event("info", "x")
    log.stop()
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"{path}: {journal.BATCH + 5} lines were lost: No space left on device"
    )


def test_line_cut_by_a_full_disk_is_finished_in_the_same_file_and_begun_again_in_another(path: Path):
    """A short write, and then none: what a disk does that is full."""
    file = journal.LogFile(str(path), 0, 0, lambda text: None)
    file.open()
    real = os.write
    room = 10

    def write(fd: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        written, room = real(fd, data[:room]), 0
        return written

    file.unwritten = b"first\nsecond\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal.os, "write", write)
        for _ in range(2):
            with pytest.raises(OSError):
                file.flush()
    assert path.read_bytes() == b"first\nseco"
    file.flush()
    assert path.read_bytes() == b"first\nsecond\n"

    file.unwritten = b"third\nfourth\n"
    with pytest.MonkeyPatch.context() as patch:
        room = 9
        patch.setattr(journal.os, "write", write)
        with pytest.raises(OSError):
            file.flush()
    path.unlink()
    file.follow()
    file.flush()
    assert path.read_bytes() == b"fourth\n"
    file.close()


def test_writer_that_was_stuck_says_that_lines_were_lost(path: Path, monkeypatch: pytest.MonkeyPatch, rounds):
    monkeypatch.setattr(journal, "WAITING", 3)
    it = rounds()
    for number in range(10):
        it.log.event("info", str(number))
    it.write()
    it.write()
    *kept, last = lines(path)
    assert kept == ["INFO 5", "INFO 6", "INFO 7", "INFO 8", "INFO 9"]
    assert last == f"ERROR {path}: was not written fast enough; uncounted lines were lost"
