"""What is kept of a request that failed, was retried or was slow, and how it is told."""

from __future__ import annotations

import pytest

from balancer import explain
from balancer.backend import Admin, Backend
from balancer.config import Server
from balancer.explain import Incident, Incidents, Standing, Trail, as_text, in_words


def backend(name: str, **state: object) -> Backend:
    made = Backend(Server(name, "127.0.0.1", 8000 + int(name)))
    for key, value in state.items():
        setattr(made, key, value)
    return made


def incident(number: int = 1, code: str = "SC", steps: tuple = (), standings: tuple = (), told: str = "") -> Incident:
    record = (
        1_800_000_000.0 + number, "127.0.0.1:5000", b"GET /a HTTP/1.1", 503, 10, "-",
        0.001, -1.0, -1.0, -1.0, 0.25, code, 2, f"id-{number}", 0, 1, 0, 0, 0,
    )  # fmt: skip
    return Incident(record, "round_robin", told, 100.0, steps, standings)


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({}, ""),
        ({"healthy": False, "check": "L4CON refused"}, "down: L4CON refused"),
        ({"admin": Admin.DRAIN}, "set to drain by an operator"),
        ({"admin": Admin.MAINT, "healthy": False}, "set to maint by an operator"),
        ({"max_connections": 3, "active": 3}, "full: 3 of 3 in hand"),
        ({"max_connections": 3, "active": 2}, ""),
        ({"backup": True}, "a backup, and others are up"),
    ],
)
def test_each_reason_to_pass_a_backend_over_has_its_words(state, why):
    assert Standing.of(backend("1", **state)).passed_over((), backups_count=False) == why


def test_the_time_since_when_it_is_down_is_told(monkeypatch):
    monkeypatch.setattr(explain, "clock_time", lambda moment: f"<{moment}>")
    down = backend("1", healthy=False, check="L7STS 500", changed_at=12.0)
    assert Standing.of(down).passed_over((), backups_count=True) == "down since <12.0>: L7STS 500"


def test_what_was_tried_is_passed_over_for_that():
    one = backend("1", healthy=False)
    assert Standing.of(one).passed_over([one], backups_count=False) == "tried already"


def test_a_standing_is_how_it_was_then():
    one = backend("1")
    standing = Standing.of(one)
    one.healthy = False
    assert standing.passed_over((), backups_count=False) == ""


def test_backups_count_where_nobody_else_is_left():
    first, spare = backend("1"), backend("2", backup=True)
    trail = Trail()
    standings = (Standing.of(first), Standing.of(spare))
    trail.note(100.01, "L4CON refused", "1", [first], standings)
    [step] = explain.explanation(incident(steps=tuple(trail.steps)))["steps"]
    assert step["backends"] == [
        {"id": "1", "state": "UP", "passed_over": "tried already"},
        {"id": "2", "state": "UP", "passed_over": None},
    ]


def test_steps_tell_when_and_how_long_since_the_one_before():
    trail = Trail()
    trail.note(100.011, "first", "1", [], ())
    trail.note(100.031, "second", "", [], ())
    steps = explain.explanation(incident(steps=tuple(trail.steps)))["steps"]
    assert [(step["what"], step["at_ms"], step["took_ms"], step["backend"]) for step in steps] == [
        ("first", 11.0, 10.0, "1"),  # the request's head took the first millisecond
        ("second", 31.0, 20.0, None),
    ]


def test_it_is_found_by_its_id_until_many_of_its_kind_have_come():
    incidents = Incidents()
    incidents.keep(incident(0, code="SH"))
    for number in range(1, explain.KEPT + 2):
        incidents.keep(incident(number, code="PR"))
    assert incidents.find("id-1") is None, "pushed out by others of its kind"
    assert incidents.find("id-0")["code"] == "SH", "which push out no other"
    assert incidents.find("id-2")["ended"] == "the balancer refused it, in the request's head"
    assert incidents.find("nonsense") is None


def test_the_latest_come_first():
    incidents = Incidents()
    for number, code in ((1, "SH"), (3, "PR"), (2, "SH")):
        incidents.keep(incident(number, code=code))
    assert [one["id"] for one in incidents.latest()] == ["id-3", "id-2", "id-1"]


@pytest.mark.parametrize("who", explain.ENDED_BY)
@pytest.mark.parametrize("where", explain.ENDED_IN)
def test_every_code_has_words(who, where):
    words = in_words(who + where)
    assert words.startswith(explain.ENDED_BY[who])
    assert words.endswith(explain.ENDED_IN[where])


def test_it_reads_as_a_text():
    one, two = backend("1"), backend("2", healthy=False, check="L4CON refused")
    trail = Trail()
    trail.note(100.02, "L4CON refused", "1", [one], (Standing.of(one), Standing.of(two)))
    text = as_text(explain.explanation(incident(steps=tuple(trail.steps), told="no backend could be reached")))
    head, *lines = text.splitlines()
    assert head.startswith("request id-1, ")
    assert head.endswith(': "GET /a HTTP/1.1" of 127.0.0.1:5000')
    assert lines == [
        "  status 503, code SC: the backend refused, or broke off, while connecting; 250.0 ms",
        "  the reason: no backend could be reached",
        "  head after 1.0 ms, total after 250.0 ms",
        "  policy round_robin, backend -, 2 tried",
        "  at 20.0 ms, after 19.0 ms: backend 1: L4CON refused",
        "    backend 1: tried already",
        "    backend 2: down: L4CON refused",
    ]
