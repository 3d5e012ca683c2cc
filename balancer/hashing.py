"""The policy `hash`: requests with the same key go to the same backend, as long as that has not too much in hand.

Rendezvous hashing (Thaler and Ravishankar 1998): each backend draws a number for the key, the highest wins, and the
others follow in the order of their draws. Whoever leaves moves only its own keys, to all others alike; whoever joins
takes keys and moves no other. Weights bend the draws (Schindelhauer and Schomaker 2005).

Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018): a key that everybody asks for must not
break its backend. With what is about to be given out, nobody gets more than the factor times its share of all that is
in hand, rounded up; the next in the key's order is taken.

Neither depends on the process or on the order of the backends, so that a restart and a second balancer agree.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b

from balancer.backend import Backend
from balancer.sticky import cookie_values

_MASK = 2**64 - 1
_LONG_KEY = 64  # characters; what is longer is remembered by its hash


class Hash:
    """A picker. `factor` is 1 or more; one as large as the number of backends lets every key stay at home.

    It has to know what is in hand: the pool calls `leased` and `released` under its lock.
    """

    def __init__(self, factor: float = 1.25) -> None:
        self._factor = Fraction(repr(factor)).as_integer_ratio()  # integers, so that the bound is exact
        self._field = _Field(())
        self._seen: Sequence[Backend] = ()

    def pick(self, candidates: Sequence[Backend], key: str) -> Backend:
        field = self._field
        if candidates is not field.candidates:
            field = _Field(candidates)
            if candidates is self._seen:  # what a retry may still choose from comes only once
                self._field = field
            self._seen = candidates
        return field.pick(key, *self._factor)

    def leased(self, backend: Backend) -> None:
        self._field.count(backend, 1)

    def released(self, backend: Backend) -> None:
        self._field.count(backend, -1)


class _Field:
    """A set of candidates: what they have in hand together, and in which order they are for the keys of late."""

    REMEMBERED = 32768  # places in remembered orders

    def __init__(self, candidates: Sequence[Backend]) -> None:
        self.candidates = candidates
        self._in_hand = sum(backend.active for backend in candidates)
        self._weight = sum(backend.weight for backend in candidates)
        self._members = frozenset(candidates)
        self._classes: dict[int, tuple[list[Backend], list[int]]] = {}  # by weight: backends, and their seeds
        for backend in candidates:
            backends, seeds = self._classes.setdefault(backend.weight, ([], []))
            backends.append(backend)
            seeds.append(_seed(backend.address))
        # The beginnings of keys' orders, as far as they were needed; those not asked for lately are forgotten.
        self._orders: dict[str, list[Backend]] = {}
        self._older: dict[str, list[Backend]] = {}
        self._room = self.REMEMBERED

    def count(self, backend: Backend, change: int) -> None:
        if backend in self._members:
            self._in_hand += change

    def pick(self, key: str, numerator: int, denominator: int) -> Backend:
        """The first in the key's order with less in hand than numerator / denominator of its share allows."""
        if len(key) > _LONG_KEY:
            key = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()
        allowed = numerator * (self._in_hand + 1)
        weight = denominator * self._weight
        order = self._orders.get(key) or self._recall(key)
        for backend in order:
            if backend.active * weight < allowed * backend.weight:
                return backend
        while len(order) < len(self.candidates):
            known = len(order)
            order = self._remember(key, self._order(key, known * 8))
            for backend in order[known:]:
                if backend.active * weight < allowed * backend.weight:
                    return backend
        return order[0]  # only where leases are not counted: somebody always has less than the average and one more

    def _recall(self, key: str) -> list[Backend]:
        return self._remember(key, self._older.get(key) or self._order(key, 1))

    def _remember(self, key: str, order: list[Backend]) -> list[Backend]:
        if self._room < len(order):
            self._older = self._orders
            self._orders = {}
            self._room = self.REMEMBERED
        self._room -= len(order)
        self._orders[key] = order
        return order

    def _order(self, key: str, count: int) -> list[Backend]:
        """The first `count` of the key's order. Logarithms are only drawn of those that may be among them."""
        point = _point(key)
        first: list[tuple[float, Backend]] = []
        for weight, (backends, seeds) in self._classes.items():
            draws = [seed * point & _MASK for seed in seeds]
            first.extend(
                (math.log((draws[index] + 0.5) / 2**64) / weight, backends[index])
                for index in heapq.nlargest(count, range(len(draws)), key=draws.__getitem__)
            )
        first.sort(key=lambda entry: entry[0], reverse=True)
        return [backend for _, backend in first[:count]]


def _point(text: str) -> int:
    """An odd number of 64 bits. Multiplied modulo 2**64, one of a backend and one of a key make the draw."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") | 1


_seed = lru_cache(maxsize=4096)(_point)  # of the addresses, which are asked for whenever the set of candidates changes


def key_of(hash_on: str, target: bytes, fields: bytes) -> str:
    """What a request is hashed by; "" where it has no such thing.

    hash_on: "header:NAME", "cookie:NAME", "query:NAME" or "path", as the configuration has it. target: of the request
    line, in origin or absolute form. fields: well-formed, each with CRLF before it, as in a head. Where a name comes
    several times the first counts. Nothing is decoded: the key is the octets, one character for each.
    """
    return _reader(hash_on)(target, fields).decode("latin-1")


@lru_cache(maxsize=16)
def _reader(hash_on: str) -> Callable[[bytes, bytes], bytes]:
    kind, _, name = hash_on.partition(":")
    octets = name.encode()
    if kind == "header":
        field = re.compile(rb"\r\n(?i:" + re.escape(octets) + rb"):([^\r]*)")
        return lambda target, fields: _first(field, fields).strip(b" \t")
    if kind == "cookie":
        return lambda target, fields: next(cookie_values(fields, octets), b"")
    if kind == "query":
        parameter = re.compile(rb"&" + re.escape(octets) + rb"=([^&]*)")
        return lambda target, fields: _first(parameter, b"&" + target.partition(b"?")[2])
    if hash_on == "path":
        return lambda target, fields: _AUTHORITY.sub(b"", target.partition(b"?")[0]) or b"/"
    raise ValueError(f'"{hash_on}" is nothing to hash on')


_AUTHORITY = re.compile(rb"\A(?i:https?)://[^/]*")


def _first(pattern: re.Pattern[bytes], octets: bytes) -> bytes:
    found = pattern.search(octets)
    return found[1] if found else b""
