"""Whether a client is let in: one rule after the other, and what of them outlives a change of the configuration."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from balancer.admission import Admission
from balancer.clients import MOST_BUCKETS, unpack
from balancer.config import Config, parse
from balancer.http1 import CHUNKED, HeadLimits, HttpError, Request, RequestReader

CLIENT, OTHER, PROXY = "192.0.2.1", "192.0.2.2", "10.0.0.1"
NOW = 1000.0


def config(**keys: Any) -> Config:
    return parse(json.dumps({"servers": [{"host": "h", "port": 1}], **keys}), "test", Path("/nowhere"))


def admission(former: Admission | None = None, limits: dict[str, Any] | None = None, **keys: Any) -> Admission:
    made = Admission(config(limits=limits or {}, **keys), former)
    made.begin()
    return made


def request(*fields: str, trusts: bool = True) -> Request:
    reader = RequestReader(PROXY.encode(), b"http", b"lb.test:80", HeadLimits(), trusts=trusts)
    lines = ["POST / HTTP/1.1", "Host: a.test", *fields, "", ""]
    found = reader.read("\r\n".join(lines).encode("latin-1"))
    assert found is not None
    return found[0]


def status(refusal: HttpError | None) -> int:
    return 0 if refusal is None else refusal.status


# Who asks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "fields", "client"),
    [
        (PROXY, [], PROXY),
        (PROXY, [f"X-Forwarded-For: {CLIENT}"], CLIENT),
        (PROXY, ["X-Forwarded-For: 198.51.100.9", f"x-forwarded-for: {CLIENT}", "X-Forwarded-For: 10.9.9.9"], CLIENT),
        (PROXY, ["X-Forwarded-For: [2001:DB8::1]:443"], "2001:db8::1"),
        (PROXY, ["X-Forwarded-For: ::ffff:192.0.2.1"], CLIENT),
        (PROXY, ["X-Forwarded-For: "], PROXY),
        (PROXY, [f"X-Forwarded-For: {CLIENT}, unknown"], PROXY),
        (PROXY, ["X-Forwarded-For: \xb9\xb2.0.2.1"], PROXY),
        (PROXY, [f"X_Forwarded_For: {CLIENT}", f"Forwarded: for={CLIENT}", f"X-Real-IP: {CLIENT}"], PROXY),
    ],
)
def test_the_client_is_who_a_trusted_proxy_says(peer: str, fields: list[str], client: str) -> None:
    assert admission(trusted_proxies=["10.0.0.0/8"]).client(peer, request(*fields)) == client


def test_the_client_is_the_peer_where_nobody_is_trusted() -> None:
    given = request(f"X-Forwarded-For: {CLIENT}", trusts=False)
    assert admission().client(PROXY, given) == PROXY
    assert admission(trusted_proxies=["10.0.0.2"]).client(PROXY, given) == PROXY


def test_a_proxy_that_is_trusted_no_longer_is_not_believed() -> None:
    """Its connection was opened when it was, so that its requests still have the field."""
    assert admission(trusted_proxies=["10.0.0.2"]).client(PROXY, request(f"X-Forwarded-For: {CLIENT}")) == PROXY


# Whether it may ask -----------------------------------------------------------------------------------------------


def test_without_rules_nothing_is_looked_at() -> None:
    rules = admission()
    assert not rules.looks_at_requests
    assert rules.refusal(CLIENT, NOW) is rules.body_refusal(request("Content-Length: 999999999999")) is None
    assert not rules.counts(CLIENT)


@pytest.mark.parametrize(
    ("limits", "keys"),
    [
        ({"body_bytes": 1}, {}),
        ({"client_rate": 0.1}, {}),
        ({}, {"allow": ["::1"]}),
        ({}, {"deny": ["::1"]}),
        ({}, {"trusted_proxies": ["::1"]}),
    ],
)
def test_each_rule_about_requests_has_them_looked_at(limits: dict[str, Any], keys: dict[str, Any]) -> None:
    assert admission(limits=limits, **keys).looks_at_requests


def test_connections_alone_are_no_reason_to_look_at_requests() -> None:
    assert not admission(limits={"client_connections": 1}).looks_at_requests


def test_who_is_denied_is_told_so() -> None:
    rules = admission(deny=[CLIENT])
    refusal = rules.refusal(CLIENT, NOW)
    assert refusal is not None
    assert (refusal.status, refusal.reason, refusal.fields) == (403, "this address is not let in", ())
    assert rules.refusal(OTHER, NOW) is None


@pytest.mark.parametrize(
    ("limits", "waits"),
    [
        ({"client_rate": 4}, [0, 0, 0, 0, 1]),
        ({"client_rate": 0.25}, [0, 4]),
        ({"client_rate": 2.5}, [0, 0, 0, 1]),
        ({"client_rate": 0.1, "client_burst": 3}, [0, 0, 0, 10]),
        ({"client_rate": 1000, "client_burst": 1}, [0, 1]),
        ({"client_burst": 1}, [0, 0, 0]),
    ],
)
def test_requests_beyond_the_rate_are_told_when_to_come_back(limits: dict[str, Any], waits: list[int]) -> None:
    """Retry-After is in whole seconds (RFC 9110 section 10.2.3), and who waits as long is let in."""
    rules = admission(limits=limits)
    for wait in waits:
        refusal = rules.refusal(CLIENT, NOW)
        if not wait:
            assert refusal is None
        else:
            assert refusal is not None
            assert (refusal.status, refusal.fields) == (429, (f"Retry-After: {wait}",))
            assert rules.refusal(CLIENT, NOW + wait) is None
    assert rules.refusal(OTHER, NOW) is None


def test_who_is_denied_has_no_bucket() -> None:
    """Whoever is kept out does not fill the memory of those who are not."""
    rules = admission(limits={"client_rate": 1}, deny=["198.51.100.0/24"])
    for last in range(256):
        assert status(rules.refusal(f"198.51.100.{last}", NOW)) == 403
    assert rules._rates is not None
    assert len(rules._rates) == 0


@pytest.mark.parametrize(
    ("field", "refused"),
    [
        ("Content-Length: 1000", 0),
        ("Content-Length: 1001", 413),
        ("Content-Length: 999999999999999999", 413),
        ("Content-Length: 0", 0),
        ("Transfer-Encoding: chunked", 0),
    ],
)
def test_a_body_is_refused_by_the_length_that_it_names(field: str, refused: int) -> None:
    refusal = admission(limits={"body_bytes": 1000}).body_refusal(request(field))
    assert status(refusal) == refused
    assert refusal is None or refusal.reason == "a body may have at most 1000 octets here"


def test_chunks_name_no_length() -> None:
    assert request("Transfer-Encoding: chunked").length == CHUNKED


# Connections ------------------------------------------------------------------------------------------------------


def test_connections_are_counted_where_there_is_a_limit_and_for_whom_it_holds() -> None:
    rules = admission(limits={"client_connections": 1}, trusted_proxies=[PROXY])
    assert rules.counts(CLIENT)
    assert not rules.counts(PROXY)
    assert rules.connected(CLIENT)
    assert not rules.connected(CLIENT)
    assert rules.connected(OTHER)
    rules.disconnected(CLIENT)
    assert rules.connected(CLIENT)


# Another configuration --------------------------------------------------------------------------------------------


def test_a_rate_that_is_the_same_goes_on() -> None:
    """A reload gives nobody a burst."""
    limits = {"client_rate": 1, "client_burst": 2}
    former = admission(limits=limits)
    assert [status(former.refusal(CLIENT, NOW)) for _ in range(3)] == [0, 0, 429]
    rules = admission(former, limits=limits | {"body_bytes": 5}, deny=[OTHER])
    assert [status(rules.refusal(one, NOW)) for one in (CLIENT, OTHER)] == [429, 403]


@pytest.mark.parametrize("limits", [{"client_rate": 2, "client_burst": 2}, {"client_rate": 1, "client_burst": 3}])
def test_a_rate_that_is_another_begins_anew(limits: dict[str, Any]) -> None:
    former = admission(limits={"client_rate": 1, "client_burst": 2})
    assert [status(former.refusal(CLIENT, NOW)) for _ in range(3)] == [0, 0, 429]
    rules = admission(former, limits=limits)
    burst = limits["client_burst"]
    assert [status(rules.refusal(CLIENT, NOW)) for _ in range(burst + 1)] == [0] * burst + [429]


def test_a_burst_that_is_what_it_was_without_being_named_is_the_same() -> None:
    former = admission(limits={"client_rate": 1})
    assert [status(former.refusal(CLIENT, NOW)) for _ in range(2)] == [0, 429]
    assert status(admission(former, limits={"client_rate": 1, "client_burst": 1}).refusal(CLIENT, NOW)) == 429


def test_a_rate_may_be_taken_away_and_come_again() -> None:
    former = admission(limits={"client_rate": 1})
    assert [status(former.refusal(CLIENT, NOW)) for _ in range(2)] == [0, 429]
    free = admission(former)
    assert [status(free.refusal(CLIENT, NOW)) for _ in range(9)] == [0] * 9
    again = admission(free, limits={"client_rate": 1})
    assert [status(again.refusal(CLIENT, NOW)) for _ in range(2)] == [0, 429]


def test_connections_that_are_open_count_on_whatever_the_limit_becomes() -> None:
    former = admission(limits={"client_connections": 3})
    assert [former.connected(CLIENT) for _ in range(4)] == [True, True, True, False]
    fewer = admission(former, limits={"client_connections": 1})
    fewer.disconnected(CLIENT)
    fewer.disconnected(CLIENT)
    assert not fewer.connected(CLIENT)
    none = admission(fewer)
    assert not none.counts(CLIENT)
    none.disconnected(CLIENT)
    again = admission(none, limits={"client_connections": 1})
    assert [again.connected(CLIENT) for _ in range(2)] == [True, False]


# Very many clients ------------------------------------------------------------------------------------------------


def test_very_many_clients_take_bounded_memory() -> None:
    """Behind a trusted proxy, each with an address of its own, which every rule looks at. That is the costliest way for
    them to come; test_clients has a million of them.
    """
    rules = admission(
        limits={"client_rate": 1, "client_connections": 5},
        trusted_proxies=["10.0.0.0/8"],
        allow=["0.0.0.0/0"],
        deny=["::1"],
    )
    given = request(f"X-Forwarded-For: {CLIENT}")
    tracemalloc.start()
    try:
        for number in range(0x0B000000, 0x0B000000 + MOST_BUCKETS + MOST_BUCKETS // 8):
            address = unpack(number.to_bytes(4, "big"))
            given.forwarded_for = address.encode()
            client = rules.client(PROXY, given)
            assert rules.refusal(client, NOW) is None
        memory, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert client == address
    assert rules._rates is not None
    assert len(rules._rates) == MOST_BUCKETS
    assert peak < 40_000_000
    assert memory < 40_000_000
