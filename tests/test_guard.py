"""No exchange costs more than it did: work is counted, not timed, so that a busy machine changes nothing.

What is bounded here is what the program costs. Where a change makes it cost less, lower the number that it beats;
raise one only for a feature that is worth it to every request. `python tests/counting.py`, by each version of Python,
prints what the numbers are.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from balancer.log_formats import FORMATS
from counting import (
    GET,
    VERSION,
    WORKS,
    CCalls,
    Counting,
    Instructions,
    PythonCalls,
    Rates,
    Work,
    no_strace,
    on_journal,
    on_reactor,
    system_calls,
)

SLACK = 0.2
"""What counts may be above their bounds, for each exchange: a few things happen with time, whatever is asked."""

# All of these are for each exchange. Those of works are of the reactor's thread: `get` is a small request with three
# fields on a connection that is kept alive, `varied` has twenty and a path and a cookie that are all different, `post`
# has a body of 10 KB, `new` is a `get` with a connection of its own, `tcp` is a line and its echo through a tunnel.
# Those of formats are of a line, made and written.

SYSTEM_CALLS = {
    "get": {"receive": 2, "send": 2, "poll": 2},
    "varied": {"receive": 2, "send": 2, "poll": 2},
    "post": {"receive": 2, "send": 2, "poll": 3},  # what cannot be sent twice looks before it is sent, once for a batch
    "new": {"receive": 2, "send": 2, "poll": 3, "accept4": 2, "getsockname": 1, "epoll_ctl": 1, "close": 1},
    "tcp": {"receive": 2, "send": 2, "poll": 2},
}
"""Of the real program. A kind that is not named must not occur."""

WITH_TIME = {"futex": 0.5, "memory": 0.5}
"""System calls that depend on the other threads, and on what the allocator has at hand: not one for each exchange."""

PYTHON_CALLS = {"get": 19, "varied": 25, "post": 21, "new": 57, "tcp": 4, "text": 7.8, "haproxy": 6.3, "json": 12}
"""Of functions that are written in Python, the standard library's too; the most of any version.

Once a millisecond there is a date to be made for the log, here for nearly each exchange.
"""

C_CALLS = {"get": 31, "varied": 45, "post": 37, "new": 63, "tcp": 14, "text": 8.3, "haproxy": 6, "json": 11.3}
"""Of functions that are written in C; the most of any version."""

INSTRUCTIONS = {
    "3.10": {
        "get": 1125,
        "varied": 1465,
        "post": 1215,
        "new": 2180,
        "tcp": 294,
        "text": 198,
        "haproxy": 225,
        "json": 246,
    },
    "3.11": {
        "get": 1145,
        "varied": 1492,
        "post": 1245,
        "new": 2250,
        "tcp": 316,
        "text": 216,
        "haproxy": 243,
        "json": 276,
    },
    "3.12": {
        "get": 1080,
        "varied": 1412,
        "post": 1170,
        "new": 2100,
        "tcp": 288,
        "text": 198,
        "haproxy": 227,
        "json": 248,
    },
    "3.13": {
        "get": 1055,
        "varied": 1380,
        "post": 1147,
        "new": 2010,
        "tcp": 287,
        "text": 188,
        "haproxy": 213,
        "json": 240,
    },
}
"""Of the interpreter, by its version."""

ROOM = 1.1
"""By how much instructions may be more: a branch here and there is no matter, a loop over octets is."""


def excess(found: Rates, bounds: dict[str, float]) -> Rates:
    """What is above its bound."""
    return {name: rate for name, rate in found.items() if rate > bounds.get(name, 0) + SLACK}


def check(counted: dict[type[Counting], Rates], row: str) -> None:
    assert sum(counted[PythonCalls].values()) <= PYTHON_CALLS[row] + SLACK, counted[PythonCalls]
    assert sum(counted[CCalls].values()) <= C_CALLS[row] + SLACK, counted[CCalls]
    if VERSION in INSTRUCTIONS:
        assert sum(counted[Instructions].values()) <= INSTRUCTIONS[VERSION][row] * ROOM, counted[Instructions]


@pytest.fixture(scope="module")
def strace() -> None:
    if why := no_strace():
        pytest.skip(why)


def policy(directory: Path, expression: str) -> str:
    """A policy of one's own, which chooses by that expression."""
    (directory / "policy.py").write_text(f"import os\ndef select_server(backends, client):\n    return {expression}\n")
    return "policy.py"


# The bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.program
@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_an_exchange_takes_no_more_system_calls(work: Work, tmp_path: Path):
    found = system_calls(work, tmp_path)
    assert not excess(found, SYSTEM_CALLS[work.name] | WITH_TIME), found


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_an_exchange_takes_no_more_calls_and_instructions(work: Work, tmp_path: Path):
    check(on_reactor(work, tmp_path), work.name)


@pytest.mark.parametrize("format", FORMATS)
def test_a_line_of_the_log_takes_no_more_calls_and_instructions(format: str, tmp_path: Path):
    check(on_journal(format, tmp_path), format)


# The guard itself -------------------------------------------------------------------------------------------------


@pytest.mark.program
@pytest.mark.usefixtures("strace")
def test_one_more_system_call_for_each_exchange_is_seen(tmp_path: Path):
    found = system_calls(GET, tmp_path, "--algorithm", policy(tmp_path, "os.getppid() and backends[0]"))
    assert excess(found, SYSTEM_CALLS["get"] | WITH_TIME) == {"getppid": pytest.approx(1, abs=0.1)}


def test_one_more_call_for_each_exchange_is_seen_and_many_more_instructions_too(tmp_path: Path):
    plain = on_reactor(GET, tmp_path, algorithm=policy(tmp_path, "backends[0]"))
    expression = "(lambda: backends[len(())]" + " and backends[0]" * 100 + ")()"
    more = on_reactor(GET, tmp_path, algorithm=policy(tmp_path, expression))
    for kind in PythonCalls, CCalls:
        assert sum(more[kind].values()) == pytest.approx(sum(plain[kind].values()) + 1, abs=SLACK)
    assert sum(more[Instructions].values()) > sum(plain[Instructions].values()) * ROOM
