"""One backend: the questions it answers, its streak of results, its average, its endpoints."""

from __future__ import annotations

import socket

import pytest

from balancer.backend import AVERAGE_HALF_LIFE, AVERAGE_SHARE, Admin, Backend, literal_endpoints, resolve
from balancer.config import Server


def make(**settings) -> Backend:
    return Backend(Server(**{"id": "1", "host": "127.0.0.1", "port": 8001, **settings}))


def test_repr_is_a_status_line():
    backend = make(weight=2)
    backend.active = 3
    assert repr(backend) == "<Backend 1 127.0.0.1:8001 up weight=2 active=3>"
    backend = make(id="spare", host="::1", backup=True)
    backend.healthy = False
    assert repr(backend) == "<Backup spare [::1]:8001 down weight=1 active=0>"


@pytest.mark.parametrize(
    ("healthy", "admin", "active", "status", "eligible", "available"),
    [
        (True, Admin.READY, 0, "UP", True, True),
        (True, Admin.READY, 2, "UP", True, False),
        (False, Admin.READY, 0, "DOWN", False, False),
        (True, Admin.DRAIN, 0, "DRAIN", False, False),
        (False, Admin.MAINT, 0, "MAINT", False, False),
    ],
    ids=["up", "full", "down", "drain", "maint"],
)
def test_healthy_admin_full_eligible_and_available_are_separate_questions(
    healthy, admin, active, status, eligible, available
):
    backend = make(max_connections=2)
    backend.healthy, backend.admin, backend.active = healthy, admin, active
    assert (backend.status, backend.eligible, backend.available) == (status, eligible, available)
    assert backend.full is (active == 2)


def test_without_a_limit_it_is_never_full():
    backend = make()
    backend.active = 1_000_000
    assert not backend.full


# Rise and fall ----------------------------------------------------------------------------------------------------

STREAKS = {  # results after a first pass, "+" or "-", and whether it is up after each, with rise 2 and fall 3
    "three in a row": ("---", "UUD"),
    "fail, fail, pass, fail stays up": ("--+-", "UUUU"),
    "a pass clears the whole streak": ("--+---", "UUUUUD"),
    "down stays down": ("-----", "UUDDD"),
    "two passes bring it back": ("---++", "UUDDU"),
    "a fail clears the passes": ("---+-++", "UUDDDDU"),
    "back up, it takes three again": ("---++---", "UUDDUUUD"),
    "now and then": ("-+-+-+-+-+", "UUUUUUUUUU"),
}


@pytest.mark.parametrize(("results", "states"), STREAKS.values(), ids=STREAKS)
def test_rise_and_fall_are_one_streak(results, states):
    """STYLE.md, 7: getting this wrong is the most repeated bug of the field."""
    backend = make()
    backend.observe(True, rise=2, fall=3)
    seen = ""
    for result in results:
        before = backend.healthy
        changed = backend.observe(result == "+", rise=2, fall=3)
        assert changed is (backend.healthy is not before)
        seen += "U" if backend.healthy else "D"
    assert seen == states


@pytest.mark.parametrize(("passed", "changed"), [(True, False), (False, True)])
def test_the_first_result_decides_at_once(passed, changed):
    """HAProxy's init-state: a backend counts as up until its first probe."""
    backend = make()
    assert backend.observe(passed, rise=2, fall=3) is changed
    assert backend.healthy is passed
    assert backend.observe(not passed, rise=2, fall=3) is False


def test_with_rise_and_fall_of_one_each_result_decides():
    backend = make()
    assert [backend.observe(passed, rise=1, fall=1) for passed in (True, False, True, True)] == [0, 1, 1, 0]


def test_failures_in_a_row_are_counted_for_the_log():
    backend = make()
    counts = []
    for passed in (True, False, False, True, False, False, False, False):
        backend.observe(passed, rise=2, fall=3)
        counts.append(backend.failures)
    assert counts == [0, 1, 2, 0, 1, 2, 3, 4]


# The time to an answer --------------------------------------------------------------------------------------------


def test_what_was_never_measured_takes_no_time():
    assert make().expected_time(1000.0) == 0.0


def test_the_average_leans_to_the_newest_and_fades():
    backend = make()
    backend.answered_in(1.0, 100.0)
    assert backend.expected_time(100.0) == 1.0
    backend.answered_in(2.0, 101.0)
    assert backend.expected_time(101.0) == pytest.approx(1.0 + AVERAGE_SHARE)
    assert backend.expected_time(101.0 + AVERAGE_HALF_LIFE) == pytest.approx((1.0 + AVERAGE_SHARE) / 2)


# Endpoints --------------------------------------------------------------------------------------------------------


def test_a_literal_address_needs_no_look_up():
    assert literal_endpoints("127.0.0.1", 80) == ((socket.AF_INET, ("127.0.0.1", 80)),)
    assert literal_endpoints("::1", 80) == ((socket.AF_INET6, ("::1", 80, 0, 0)),)
    assert make().endpoints == ((socket.AF_INET, ("127.0.0.1", 8001)),)


def test_a_name_has_no_endpoints_yet():
    assert make(host="localhost").endpoints == ()


def test_resolve_keeps_the_order_and_drops_repetitions():
    def getaddrinfo(host, port, **options):
        assert (host, port, options["type"]) == ("two.test", 80, socket.SOCK_STREAM)
        six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
        four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        return [six, four, six]

    assert resolve("two.test", 80, getaddrinfo) == (
        (socket.AF_INET6, ("::1", 80, 0, 0)),
        (socket.AF_INET, ("127.0.0.1", 80)),
    )


def test_resolve_lets_the_resolvers_error_through():
    def getaddrinfo(host, port, **options):
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    with pytest.raises(socket.gaierror):
        resolve("nowhere.test", 80, getaddrinfo)
