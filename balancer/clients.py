"""Who the client is, and what it may do: networks, X-Forwarded-For, rates, connections at once.

No socket in here, no lock and no clock: all is called on the reactor's thread, much of it once for each request.

Facts and rules:
- An address is text in the spelling that `plain_address` gives: one spelling for each address, and IPv4 as IPv4, also
  where a socket for both families calls it ::ffff:192.0.2.1. Sockets spell theirs so, but for that.
- Whoever sends X-Forwarded-For may write what it likes; each proxy adds the address that it saw at the right end. So
  it is read from the right, for as long as the one that said it is trusted, and an entry that is no address ends it.
- What is remembered is bounded, however many addresses come.
- Limits count an IPv6 client as its /64: whoever has one address has the 2**64 of its network too (RFC 6177), and
  could be a new client with each request. In 64:ff9b::/96 each address is an IPv4 client behind a translator
  (RFC 6052), counted by itself.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

REMEMBERED = 16384  # addresses of which it is known whether they are in a set of networks
MOST_BUCKETS = 65536  # clients whose rate is watched: some 16 MB
SLACK = 1e-4  # of a token: more than a float is rounded by within 100 days at 10,000 requests per second

MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, before the octets of an IPv4 address (RFC 4291, 2.5.5.2)
_TRANSLATED = bytes.fromhex("0064ff9b") + bytes(8)  # 64:ff9b::/96
_WITH_PORT = re.compile(r"\[([^\]]*:[^\]]*)\](?::[0-9]{1,5})?|([^:]*):[0-9]{1,5}")


# Addresses --------------------------------------------------------------------------------------------------------


def plain_address(text: str) -> str:
    """An IP address in the one spelling that is used everywhere. Raises ValueError."""
    packed = pack(text)
    return unpack(packed) if ":" in text else text


def pack(text: str) -> bytes:
    """An IP address as its 4 or 16 octets. Raises ValueError."""
    try:
        return unmapped(inet_pton(AF_INET6, text)) if ":" in text else inet_pton(AF_INET, text)
    except OSError:
        raise ValueError(f"{text!r} is not an IP address") from None


def unpack(packed: bytes) -> str:
    """The address of these 4 or 16 octets."""
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)


def unmapped(packed: bytes) -> bytes:
    """The 4 octets of an IPv4 address where these 16 stand for one, else the 16."""
    return packed[12:] if packed.startswith(MAPPED) else packed


class Networks:
    """A set of networks: `address in networks`.

    texts: networks or addresses of either family; raises ValueError for what is neither. An IPv4 address is in no
    IPv6 network, not even in ::/0.
    """

    __slots__ = ("_known", "_ranges")

    def __init__(self, texts: Iterable[str] = ()) -> None:
        networks = [_plain_network(text) for text in texts]
        ipv4 = collapse_addresses([network for network in networks if isinstance(network, IPv4Network)])
        ipv6 = collapse_addresses([network for network in networks if isinstance(network, IPv6Network)])
        self._ranges = {4: _ranges(ipv4), 16: _ranges(ipv6)}  # by the octets of an address
        self._known: dict[str, bool] = {}

    def __bool__(self) -> bool:
        return any(firsts for firsts, _ in self._ranges.values())

    def __contains__(self, address: str) -> bool:
        try:
            return self._known[address]
        except KeyError:
            return self._look_up(address)

    def _look_up(self, address: str) -> bool:
        packed = pack(address)
        firsts, lasts = self._ranges[len(packed)]
        place = bisect_right(firsts, packed) - 1
        found = place >= 0 and packed <= lasts[place]
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[address] = found
        return found


def _plain_network(text: str) -> IPv4Network | IPv6Network:
    network = ip_network(text)
    mapped = network.network_address.ipv4_mapped if isinstance(network, IPv6Network) else None
    if mapped and network.prefixlen >= 96:
        return IPv4Network((int(mapped), network.prefixlen - 96))
    return network


def _ranges(networks: Iterator[IPv4Network] | Iterator[IPv6Network]) -> tuple[list[bytes], list[bytes]]:
    """The first and the last addresses of networks that are in order and apart."""
    both = [(network.network_address.packed, network.broadcast_address.packed) for network in networks]
    return [first for first, _ in both], [last for _, last in both]


class Access:
    """Who may come: nobody in `deny`, and where `allow` names any, nobody else."""

    __slots__ = ("_allow", "_deny", "_everybody")

    def __init__(self, allow: Networks, deny: Networks) -> None:
        self._allow = allow
        self._deny = deny
        self._everybody = not allow

    def permits(self, address: str) -> bool:
        return address not in self._deny and (self._everybody or address in self._allow)


# Through other proxies --------------------------------------------------------------------------------------------


def client_of(peer: str, forwarded_for: str, trusted: Networks) -> str:
    """The address of the client: the first one from the right that is not a trusted proxy's.

    peer: who is connected to us. forwarded_for: the X-Forwarded-For fields in their order, joined by commas; it says
    something only where the peer is trusted. When all in it are trusted, the leftmost is the client; an entry that is
    no address, an empty one too, makes the one client that passed it on.
    """
    client = peer
    end = len(forwarded_for)
    while end > 0 and client in trusted:
        start = forwarded_for.rfind(",", 0, end)
        try:
            client = _listed_address(forwarded_for[start + 1 : end].strip(" \t"))
        except ValueError:
            break
        end = start
    return client


def _listed_address(entry: str) -> str:
    """The address in `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]` or `[2001:db8::1]:80`."""
    dressed = _WITH_PORT.fullmatch(entry) if ":" in entry else None
    return plain_address(dressed[1] or dressed[2] if dressed else entry)


# Limits -----------------------------------------------------------------------------------------------------------


def _counted(address: str) -> str | bytes:
    """What stands for a client where clients are counted."""
    if ":" not in address:
        return address
    packed = inet_pton(AF_INET6, address)
    return packed if packed.startswith(_TRANSLATED) else packed[:8]


class Rates:
    """A token bucket for each client: `burst` requests at once, and `rate` per second in the long run.

    T seconds after its bucket was full, a client that kept asking was allowed burst + rate * T requests, rounded down:
    neither one more nor one less. What is refused costs it nothing.

    rate: above 0. burst: 1 or more. most: clients that are remembered. Of these, who has a full bucket is forgotten as
    others come. At the cap that may not be enough: then who was allowed something the longest ago is forgotten, too,
    and may take up to a burst more than its due. Nobody is refused for the number of the others.
    """

    # A bucket is the one number at which it will be full again, in time that is counted in tokens (seconds * rate): a
    # request moves that on by exactly 1, so that nothing adds up that was rounded.
    __slots__ = ("_buckets", "_most", "_rate", "_spare")

    def __init__(self, rate: float, burst: int, most: int = MOST_BUCKETS) -> None:
        self._rate = rate
        self._spare = burst - 1  # tokens that may be missing from a bucket that has one
        self._most = most
        self._buckets: OrderedDict[str | bytes, float] = OrderedDict()  # who was allowed something last is last

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, address: str, now: float) -> float:
        """0.0 where the client may have its request, else the seconds after which it may.

        now: monotonic seconds.
        """
        client = _counted(address) if ":" in address else address
        at = now * self._rate
        full = self._buckets.get(client)
        if full is None:
            self._forget(at)
            full = at
        elif full < at:
            full = at
        missing = full - at - self._spare
        if missing > SLACK:
            return missing / self._rate
        self._buckets[client] = full + 1
        self._buckets.move_to_end(client)
        return 0.0

    def _forget(self, at: float) -> None:
        """Make room for one more: two are forgotten for each that comes, as long as theirs are full, so it shrinks."""
        buckets = self._buckets
        for _ in range(2):
            oldest = next(iter(buckets), None)
            if oldest is None or (buckets[oldest] > at and len(buckets) < self._most):
                return
            del buckets[oldest]


class Connections:
    """How many connections each client has open. Who has none takes no memory.

    most: for one client, 0 for no limit; may be changed at any time, and who has more keeps them.
    """

    __slots__ = ("_open", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: dict[str | bytes, int] = {}

    def __len__(self) -> int:
        """Clients with connections."""
        return len(self._open)

    def open(self, address: str) -> bool:
        """Count one more, or return False where the client has as many as it may. Each that counts is to be closed."""
        client = _counted(address)
        count = self._open.get(client, 0)
        if count >= self.most > 0:
            return False
        self._open[client] = count + 1
        return True

    def close(self, address: str) -> None:
        """Count one less."""
        client = _counted(address)
        count = self._open[client] - 1
        if count:
            self._open[client] = count
        else:
            del self._open[client]
