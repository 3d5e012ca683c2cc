"""Who the client is, as X-Forwarded-For has it; networks; rates and connections, exact and in bounded memory."""

from __future__ import annotations

import ipaddress
import itertools
import random
import socket
import sys
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction

import pytest

from balancer import clients
from balancer.clients import (
    MOST_BUCKETS,
    REMEMBERED,
    Access,
    Connections,
    Networks,
    Rates,
    client_of,
    plain_address,
)

SEED = 20070
PEER = "10.0.0.1"
ONE = "192.0.2.1"
OTHER = "192.0.2.2"
MILLION = 1_000_000


def addresses(rng: random.Random) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Of both families and near each other, so that networks have some of them within and some without."""
    while True:
        yield ipaddress.IPv4Address(0x0A000000 | rng.getrandbits(rng.choice((4, 10, 20))))
        yield ipaddress.IPv6Address((0x20010DB8 << 96) | rng.getrandbits(rng.choice((4, 20, 70, 96))))


# Addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::FFFF:c000:201", "192.0.2.1"),
        ("0:0:0:0:0:ffff:c000:0201", "192.0.2.1"),
        ("2001:DB8:0:0::01", "2001:db8::1"),
        ("::", "::"),
        ("::1", "::1"),
    ],
)
def test_an_address_has_one_spelling(text, plain):
    """RFC 5952 for IPv6; RFC 4291, 2.5.5.2 for what a socket of both families calls an IPv4 client."""
    assert plain_address(text) == plain
    assert plain_address(plain) == plain


NO_ADDRESSES = [
    "",
    " ",
    "unknown",
    "_hidden",
    "localhost",
    "192.0.2",
    "192.0.2.1.1",
    "192.0.2.256",
    "192.0.2.01",
    "0300.0.2.1",
    "0xc0.0.2.1",
    "3221225985",
    "192.0.2.1/32",
    "192.0.2.-1",
    "192.0.2. 1",
    "192.0.2.1\0",
    "\uff1192.0.2.1",
    "192.0.2.\xb2",
    "\udcff",
    ":",
    ":::",
    "1::2::3",
    "12345::",
    "1:2:3:4:5:6:7",
    "1:2:3:4:5:6:7:8:9",
    "::192.0.2.01",
    "::g",
    "[::1",
    "::1]",
]


def test_what_is_no_address_is_refused():
    """Leading zeros mean octal to some (CVE-2021-29921); inet_aton's shorter forms mean nothing here."""
    for text in NO_ADDRESSES:
        with pytest.raises(ValueError):
            pytest.fail(f"{text!r} was taken for {plain_address(text)}")


def test_addresses_of_sockets_are_plain_as_they_are():
    """Or trusted proxies and limits would have to spell each peer anew."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        assert plain_address(sock.getpeername()[0]) == sock.getpeername()[0]
    for _, address in zip(range(300), addresses(random.Random(SEED)), strict=False):
        packed = clients.pack(str(address))
        assert packed == address.packed
        assert plain_address(clients.unpack(packed)) == clients.unpack(packed)


# Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "inside", "outside"),
    [
        (["10.0.0.0/8"], ["10.0.0.0", "10.255.255.255"], ["9.255.255.255", "11.0.0.0", "::a00:1"]),
        (["192.0.2.1"], ["192.0.2.1", "::ffff:192.0.2.1"], ["192.0.2.0", "192.0.2.2"]),
        (["2001:db8::/32"], ["2001:db8::", "2001:DB8:ffff::1"], ["2001:db7::", "2001:db9::", "32.1.13.184"]),
        (["::1"], ["::1"], ["::", "::2", "0.0.0.1", "127.0.0.1"]),
        (["0.0.0.0/0"], ["0.0.0.0", "255.255.255.255"], ["::", "::1"]),
        (["::/0"], ["::", "ffff::", "::1"], ["0.0.0.0", "127.0.0.1", "::ffff:127.0.0.1"]),
        (["::ffff:0:0/96"], ["0.0.0.0", "127.0.0.1", "::ffff:127.0.0.1"], ["::", "::1", "::fffe:0:1"]),
        (["::ffff:10.0.0.0/104"], ["10.1.2.3", "::ffff:10.1.2.3"], ["11.0.0.0", "::"]),
        (["10.0.0.0/9", "10.128.0.0/9", "10.1.0.0/16"], ["10.0.0.0", "10.200.0.0"], ["11.0.0.0"]),
        (["10.0.0.0/24", "10.0.2.0/24"], ["10.0.0.255", "10.0.2.0"], ["10.0.1.0", "10.0.1.255", "10.0.3.0"]),
        ([], [], ["0.0.0.0", "::", "127.0.0.1"]),
    ],
)
def test_networks_hold_what_is_between_their_first_and_last_address(texts, inside, outside):
    networks = Networks(texts)
    for _ in range(2):  # the second time from memory
        assert [address for address in inside if address not in networks] == []
        assert [address for address in outside if address in networks] == []
    assert bool(networks) == bool(texts)


def test_networks_agree_with_ipaddress_on_each_of_many():
    rng = random.Random(SEED)
    for _ in range(30):
        chosen = [
            ipaddress.ip_network((address, rng.randrange(8, address.max_prefixlen + 1)), strict=False)
            for address in itertools.islice(addresses(rng), rng.randrange(1, 40))
        ]
        networks = Networks(map(str, chosen))
        for address in itertools.islice(addresses(rng), 60):
            assert (str(address) in networks) == any(address in network for network in chosen)


@pytest.mark.parametrize("text", ["10.0.0.1/8", "10.0.0.0/33", "::/129", "lb.test", ""])
def test_what_is_no_network_is_refused(text):
    with pytest.raises(ValueError):
        Networks(["10.0.0.0/8", text])


def test_asking_networks_for_what_is_no_address_is_an_error_each_time():
    networks = Networks(["0.0.0.0/0"])
    for _ in range(2):
        with pytest.raises(ValueError, match="'unknown' is not an IP address"):
            assert "unknown" in networks


def test_networks_remember_a_bounded_number_of_addresses_and_stay_right():
    networks = Networks(["10.0.0.0/16"])
    for number in range(3 * REMEMBERED + 5):
        address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        assert address in networks
        assert "10.255.0.1" not in networks
    assert len(networks._known) <= REMEMBERED


@pytest.mark.parametrize(
    ("allow", "deny", "permitted", "refused"),
    [
        ([], [], [ONE, "::1"], []),
        ([], [ONE], [OTHER, "::1"], [ONE]),
        ([ONE], [], [ONE], [OTHER, "::1"]),
        (["192.0.2.0/24"], [ONE], [OTHER], [ONE, "192.0.3.1"]),
        ([ONE], ["192.0.2.0/24"], [], [ONE, OTHER]),
        (["::/0"], [], ["::1"], [ONE]),
    ],
)
def test_denied_is_denied_and_who_is_not_allowed_is_denied_where_any_are_allowed(allow, deny, permitted, refused):
    access = Access(Networks(allow), Networks(deny))
    assert all(access.permits(address) for address in permitted)
    assert not any(access.permits(address) for address in refused)


# X-Forwarded-For --------------------------------------------------------------------------------------------------

TRUSTED = Networks(["10.0.0.0/8", "fd00::/8"])


@pytest.mark.parametrize(
    ("field", "client"),
    [
        ("", PEER),
        ("192.0.2.1", "192.0.2.1"),
        (" \t192.0.2.1\t ", "192.0.2.1"),
        ("192.0.2.1, 10.0.0.2", "192.0.2.1"),
        ("192.0.2.1,10.0.0.2,10.0.0.3", "192.0.2.1"),
        ("127.0.0.1, 10.9.9.9, 192.0.2.1, 10.0.0.2", "192.0.2.1"),  # what stands left of it, the client wrote
        ("10.0.0.3, 10.0.0.2", "10.0.0.3"),  # all trusted: the one that is farthest away
        ("192.0.2.1:4711", "192.0.2.1"),  # as Azure's gateway writes it
        ("2001:db8::1", "2001:db8::1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("192.0.2.1, [fd00::2]:80, fd00::3", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),  # as Node writes it
        ("192.0.2.1, ::ffff:10.0.0.2", "192.0.2.1"),
        ("[::ffff:192.0.2.1]:4711", "192.0.2.1"),
    ],
)
def test_the_client_is_the_first_from_the_right_that_is_no_trusted_proxy(field, client):
    assert client_of(PEER, field, TRUSTED) == client


def test_what_a_peer_that_is_not_trusted_says_means_nothing():
    for field in ("", "127.0.0.1", "10.0.0.1", "10.0.0.1, 10.0.0.2", "unknown"):
        assert client_of(ONE, field, TRUSTED) == ONE
        assert client_of(PEER, field, Networks()) == PEER


NO_ENTRIES = [
    *NO_ADDRESSES,
    "192.0.2.1:",
    "192.0.2.1:http",
    "192.0.2.1:-1",
    "192.0.2.1:\xb2",
    "192.0.2.1:123456",
    "192.0.2.1:80:80",
    "192.0.2.1 10.0.0.2",
    "[192.0.2.1]",
    "[192.0.2.1]:80",
    "[2001:db8::1]:",
    "[2001:db8::1]80",
    "[2001:db8::1] :80",
    "[[2001:db8::1]]",
    "[]",
    "[]:80",
    ":80",
    '"192.0.2.1"',
    'for="[2001:db8::1]"',
    "192.0.2.1;10.0.0.2",
    "\x0b192.0.2.1",
    "\xa0192.0.2.1",
]


def test_an_entry_that_is_no_address_makes_the_one_that_passed_it_on_the_client():
    """Whoever is to the left of it may be made up; dotnet/aspnetcore 36537, lpinca/forwarded-parse 6."""
    for entry in NO_ENTRIES:
        assert client_of(PEER, f"127.0.0.1, {entry}, 10.0.0.2", TRUSTED) == "10.0.0.2", entry
        assert client_of(PEER, f"127.0.0.1,{entry}", TRUSTED) == PEER, entry


def test_a_field_as_long_as_a_head_may_be_is_read_to_its_end():
    field = ",".join(["192.0.2.1", *["10.0.0.2"] * 7000])
    assert client_of(PEER, field, TRUSTED) == ONE
    assert client_of(PEER, "," * 60000, TRUSTED) == PEER


def test_whatever_comes_the_client_is_a_plain_address():
    rng = random.Random(SEED)
    pieces = ["10.0.0.2", "192.0.2.1", "fd00::1", "2001:db8::1", "[", "]", ":", ":80", ",", ", ", " ", "::ffff:", "x"]
    for _ in range(3000):
        client = client_of(PEER, "".join(rng.choices(pieces, k=rng.randrange(12))), TRUSTED)
        assert clients.unpack(clients.pack(client)) == client


# Rates ------------------------------------------------------------------------------------------------------------


def allowed(rates: Rates, address: str, times: list[float]) -> int:
    return sum(rates.take(address, now) == 0.0 for now in times)


class Reference:
    """The bucket as textbooks have it, in exact numbers."""

    def __init__(self, rate: Fraction, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._tokens = Fraction(burst)
        self._last = Fraction(0)

    def take(self, now: Fraction) -> Fraction:
        self._tokens = min(Fraction(self._burst), self._tokens + (now - self._last) * self._rate)
        self._last = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return Fraction(0)


@pytest.mark.parametrize("begin", [0.0, 1.0e4, 3.0e6], ids=["at start", "hours up", "a month up"])
@pytest.mark.parametrize(
    ("rate", "burst", "seconds"),
    [(1, 1, 60), (10, 1, 10), (10, 20, 10), (3, 5, 50), (0.1, 2, 1000), (2.5, 10, 40), (7000, 100, 1), (1 / 3, 1, 300)],
)
def test_who_keeps_asking_is_allowed_the_burst_and_the_rate_and_nothing_else(begin, rate, burst, seconds):
    """From a full bucket, in T seconds: burst + rate * T."""
    rates = Rates(rate, burst)
    times = [begin + seconds * step / 40000 for step in range(40000)]
    due = burst + rate * times[-1] - rate * begin
    assert allowed(rates, ONE, times) in (int(due), int(due + 2e-4))


def test_rates_agree_with_exact_arithmetic_on_any_pattern_of_requests():
    """Times that a float holds exactly: quiet, dense, and idle for long."""
    rng = random.Random(SEED)
    for rate, burst in ((4, 1), (4, 7), (32, 16), (0.5, 3), (1024, 100), (0.125, 1)):
        rates, reference = Rates(rate, burst), Reference(Fraction(rate), burst)
        now = Fraction(rng.randrange(1 << 20))
        for _ in range(3000):
            now += Fraction(rng.choice((0, 0, 1, 7, 200, 5000, 300000)) * rng.randrange(4), 4096)
            assert rates.take(ONE, float(now)) == pytest.approx(float(reference.take(now)), abs=2e-4 / rate)


def test_nothing_adds_up_that_was_rounded():
    """After a million requests at an interval that no float holds, at 100 days: not one too many or too few."""
    rates, rate = Rates(10_000, 5), 10_000
    begin = 8.64e6
    count = sum(rates.take(ONE, begin + step / (2 * rate)) == 0.0 for step in range(400_000))
    assert count == 5 + (400_000 - 1) // 2


@pytest.mark.parametrize(("rate", "burst"), [(0.3, 1), (7, 3), (1000, 10), (1 / 60, 5)])
def test_who_waits_as_long_as_it_is_told_is_allowed_and_who_waits_less_is_not(rate, burst):
    rates = Rates(rate, burst)
    now = 123456.789
    for _ in range(200):
        wait = rates.take(ONE, now)
        if wait:
            assert rates.take(ONE, now + wait * 0.99) > 0
            now += wait
            assert rates.take(ONE, now) == 0.0


def test_a_wait_is_the_seconds_until_the_next_token():
    rates = Rates(2, 3)
    assert [rates.take(ONE, 100.0) for _ in range(3)] == [0.0] * 3
    assert rates.take(ONE, 100.0) == pytest.approx(0.5, abs=1e-3)
    assert rates.take(ONE, 100.4) == pytest.approx(0.1, abs=1e-3)


def test_what_is_refused_costs_nothing():
    rates = Rates(1, 1)
    assert rates.take(ONE, 50.0) == 0.0
    assert allowed(rates, ONE, [50.0 + step / 1000 for step in range(1, 1000)]) == 0
    assert rates.take(ONE, 51.0) == 0.0


def test_each_client_has_a_bucket_of_its_own():
    rates = Rates(1, 2)
    for now in (10.0, 10.1):
        assert rates.take(ONE, now) == rates.take(OTHER, now) == rates.take("2001:db8::1", now) == 0.0
    assert min(rates.take(ONE, 10.2), rates.take(OTHER, 10.2), rates.take("2001:db8::1", 10.2)) > 0


def test_addresses_of_one_ipv6_network_share_a_bucket():
    """A client has its whole /64 to choose addresses from: zulip/zulip 21544, TerminalWitchcraft/actix-ratelimit 22."""
    rates = Rates(1, 2)
    assert rates.take("2001:db8:1:2::1", 10.0) == 0.0
    assert rates.take("2001:db8:1:2:ffff:ffff:ffff:ffff", 10.0) == 0.0
    assert rates.take("2001:db8:1:2:1234::", 10.0) > 0
    assert rates.take("2001:db8:1:3::1", 10.0) == 0.0
    assert len(rates) == 2


def test_ipv4_clients_behind_a_translator_do_not_share_a_bucket():
    """64:ff9b::/96 is the whole of IPv4 in one /64 (RFC 6052, 2.1)."""
    rates = Rates(1, 1)
    assert rates.take("64:ff9b::192.0.2.1", 10.0) == rates.take("64:ff9b::192.0.2.2", 10.0) == 0.0
    assert rates.take("64:ff9b::c000:201", 10.0) > 0


def test_only_who_has_a_full_bucket_is_forgotten_below_the_cap():
    rates = Rates(1, 4)
    for _ in range(3):
        assert rates.take(ONE, 100.0) == 0.0  # full again at 103
    assert rates.take(OTHER, 100.0) == 0.0  # full again at 101
    assert allowed(rates, "192.0.2.3", [102.9] * 10) == 4
    assert len(rates) == 3, "the oldest is not full"
    assert allowed(rates, ONE, [102.9] * 10) == 3, "3.9 tokens"
    assert rates.take("192.0.2.4", 102.9) == 0.0
    assert len(rates) == 3, "OTHER is the oldest, and full"
    rates.take("192.0.2.5", 200.0)
    assert len(rates) == 2, "two are forgotten for one that comes"


def test_at_the_cap_the_oldest_is_forgotten_and_nobody_is_refused_for_it():
    rates = Rates(0.001, 1, most=3)
    names = [f"192.0.2.{number}" for number in range(5)]
    assert [rates.take(name, 10.0) for name in names] == [0.0] * 5
    assert len(rates) == 3
    assert all(rates.take(name, 10.0) > 0 for name in names[2:])
    assert rates.take(names[0], 10.0) == 0.0, "a burst more than its due"


def test_being_refused_does_not_keep_a_client_from_being_forgotten():
    """Or a few that hammer would push out those that keep to their rate."""
    rates = Rates(0.001, 2, most=2)
    rates.take(ONE, 10.0)
    rates.take(ONE, 10.0)
    rates.take(OTHER, 10.0)
    assert rates.take(ONE, 10.0) > 0
    rates.take("192.0.2.3", 10.0)
    assert rates.take(OTHER, 10.0) == 0.0
    assert rates.take(OTHER, 10.0) > 0


def size(rates: Rates) -> int:
    """Octets of its table with all that is in it."""
    buckets = rates._buckets
    return sys.getsizeof(buckets) + sum(sys.getsizeof(part) for item in buckets.items() for part in item)


def test_a_million_clients_at_once_take_the_memory_of_the_cap():
    """All within one second, none of whose buckets fills up again: half of them IPv4, half IPv6."""
    rates = Rates(0.01, 10)
    largest = 0
    for number in range(MILLION // 2):
        rates.take(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 1000.0)
        rates.take(f"2001:db8:{number >> 16:x}:{number & 65535:x}::1", 1000.0)
        if number % 50_000 == 0:
            largest = max(largest, size(rates))
    assert len(rates) == MOST_BUCKETS
    assert max(largest, size(rates)) < 20_000_000


def test_clients_that_come_and_go_take_the_memory_of_those_that_are_here():
    """At 1,000 new ones in a second, and buckets that are full after two, it is never more than some thousands."""
    rates = Rates(0.5, 1)
    longest = 0
    for number in range(50_000):
        rates.take(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 1000 + number / 1000)
        longest = max(longest, len(rates))
    assert longest <= 2001


def test_the_peak_of_memory_is_bounded_too():
    """What is forgotten is freed at once, and the table does not grow for it."""
    rates = Rates(0.01, 1, most=1000)
    names = [f"10.0.{number >> 8}.{number & 255}" for number in range(10_000)]
    tracemalloc.start()
    try:
        for name in names:
            rates.take(name, 1000.0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400_000


# Connections ------------------------------------------------------------------------------------------------------


def test_a_client_has_at_most_so_many_connections_at_once():
    connections = Connections(2)
    assert [connections.open(ONE) for _ in range(3)] == [True, True, False]
    assert connections.open(OTHER)
    connections.close(ONE)
    assert [connections.open(ONE) for _ in range(2)] == [True, False]


def test_without_a_limit_connections_are_counted_all_the_same():
    """A reload may set one, which then holds for those that are here."""
    connections = Connections(0)
    assert all(connections.open(ONE) for _ in range(1000))
    connections.most = 1000
    assert not connections.open(ONE)
    connections.close(ONE)
    assert connections.open(ONE)
    connections.most = 1
    connections.close(ONE)
    assert not connections.open(ONE)


def test_connections_of_one_ipv6_network_are_counted_together():
    connections = Connections(2)
    assert connections.open("2001:db8::1")
    assert connections.open("2001:db8::2")
    assert not connections.open("2001:db8::3")
    assert connections.open("2001:db8:0:1::3")
    connections.close("2001:db8::2")
    assert connections.open("2001:db8::3")


def test_who_has_no_connection_takes_no_memory():
    connections = Connections(10)
    names = [f"10.0.{number >> 8}.{number & 255}" for number in range(10_000)]
    for name in names:
        assert connections.open(name)
        assert connections.open(name)
    assert len(connections) == len(names)
    for name in names:
        connections.close(name)
        connections.close(name)
    assert len(connections) == 0


def test_closing_what_was_not_opened_is_an_error():
    connections = Connections(1)
    with pytest.raises(KeyError):
        connections.close(ONE)
