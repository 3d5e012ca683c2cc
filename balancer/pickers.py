"""The policies: which of the available backends gets the next piece of work.

A picker is a tiny object that proposes. `pick(candidates, client)` is given a non-empty sequence of available
backends and the client's address as text, and returns one of them. It runs under the pool's lock, so it needs none of
its own and must not block. A retry asks again with fewer candidates. As long as nobody joins, leaves or fills up, the
pool passes the very same object, so whatever a picker prepares for a set of candidates is kept until that changes.
Positions live on the backends (`turn`, `active`, `average`), so a reload or another policy loses none of them.

A picker may also have `leased(backend)`, `released(backend)`, or both. The pool calls them under its lock once
`active` has changed, for whichever backend and whoever chose it.
"""

from __future__ import annotations

import hashlib
import heapq
import importlib.util
import math
import random
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import Protocol

from balancer.backend import Backend
from balancer.hashing import Hash

Candidates = Sequence[Backend]

FEW = 8  # backends that are looked at one by one sooner than kept in order


class Picker(Protocol):
    """What the pool asks for the next backend."""

    def pick(self, candidates: Candidates, client: str) -> Backend: ...


class RoundRobin:
    """Smooth weighted round robin, strict: equal weights give 1 2 3 1 2 3.

    Each backend has a next turn in virtual time, and a pick moves it on by the inverse of its weight; the earliest
    turn is next (earliest deadline first, as in Envoy: O(log n), and independent of how often the set changes). Where
    all weights are equal, whoever had its turn is last in the order, and no order has to be kept.
    """

    STRIDE = math.lcm(*range(1, 21)) * 2  # divisible by the weights people use, so that ties are exact

    def __init__(self) -> None:
        self._seen: Candidates | None = None
        self._heap: list[tuple[int, int, Backend]] = []
        self._next: Callable[[], Backend] | None = None  # round a ring, where all strides are equal: no heap is needed
        self._stride = 0  # all of them
        self._now = 0

    def pick(self, candidates: Candidates, client: str) -> Backend:
        if candidates is not self._seen:
            self._arrange(candidates)
        if self._next is not None:
            backend = self._next()
            backend.turn += self._stride
            return backend
        turn, place, backend = self._heap[0]
        self._now = turn
        backend.turn = turn + self.STRIDE // backend.weight
        heapq.heapreplace(self._heap, (backend.turn, place, backend))
        return backend

    def _arrange(self, candidates: Candidates) -> None:
        # The latest pick, whoever made it: positions are the backends' own, and this picker may be new to them.
        self._now = max(self._now, *(backend.turn - self.STRIDE // backend.weight for backend in candidates))
        for backend in candidates:
            if backend.turn <= self._now - self.STRIDE // backend.weight or not backend.turn:
                # It was away for more than a turn: it joins half a turn from here, and makes up for nothing.
                backend.turn = self._now + self.STRIDE // (2 * backend.weight)
        self._heap = [(backend.turn, place, backend) for place, backend in enumerate(candidates)]
        self._heap.sort()
        self._stride = self.STRIDE // candidates[0].weight
        regular = all(backend.weight == candidates[0].weight for backend in candidates)
        self._next = None
        if regular and self._heap[-1][0] - self._heap[0][0] <= self._stride:
            self._next = cycle([backend for _, _, backend in self._heap]).__next__
        self._seen = candidates


class Ranking:
    """Many backends in the order of a score, for policies that want the least.

    Those with the same score stand on one level, and a heap of the levels tells the lowest: O(log n) for each change,
    amortised. Nobody says that a score has risen; that is found out once the backend's turn seems to have come. That
    it has fallen would go unnoticed: `released` has to be called.
    """

    def __init__(self, score: Callable[[Backend], float], rng: random.Random) -> None:
        self._score = score
        self._rng = rng
        self._seen: Candidates | None = None
        self.forget()

    def forget(self) -> None:
        self._ranked: Candidates | None = None
        self._levels: dict[float, list[Backend]] = {}  # by score; some are empty
        self._heap: list[float] = []  # the scores of the levels
        self._places: dict[Backend, tuple[float, int]] = {}  # the level, and the index there

    def least(self, candidates: Candidates) -> Backend | None:
        """Whoever scores least, ties at random; None for candidates that are shown for the first time.

        What a retry may still choose from comes only once, and is no reason to forget the others.
        """
        if candidates is not self._ranked:
            if candidates is not self._seen:
                self._seen = candidates
                return None
            self._rank(candidates)
        while True:
            lowest = self._heap[0]
            level = self._levels[lowest]
            if not level:
                heapq.heappop(self._heap)
                del self._levels[lowest]
                continue
            backend = level[int(self._rng.random() * len(level))]
            score = self._score(backend)
            if score <= lowest:
                return backend
            self._move(backend, score)
            if len(self._heap) > 2 * len(candidates):  # mostly of empty levels, too high up to be ever the lowest
                self._rank(candidates)

    def released(self, backend: Backend) -> None:
        """It has less in hand than before."""
        place = self._places.get(backend)
        if place is not None:
            score = self._score(backend)
            if score < place[0]:
                self._move(backend, score)

    def _rank(self, candidates: Candidates) -> None:
        self.forget()
        for backend in candidates:
            self._enter(backend, self._score(backend))
        self._ranked = candidates

    def _move(self, backend: Backend, score: float) -> None:
        old, index = self._places[backend]
        level = self._levels[old]
        last = level.pop()
        if last is not backend:
            level[index] = last
            self._places[last] = (old, index)
        self._enter(backend, score)

    def _enter(self, backend: Backend, score: float) -> None:
        level = self._levels.get(score)
        if level is None:
            level = self._levels[score] = []
            heapq.heappush(self._heap, score)
        self._places[backend] = (score, len(level))
        level.append(backend)


class LeastConnections:
    """The fewest pieces of work in hand for its weight; ties at random, so that idle backends share."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._ranking = Ranking(lambda backend: backend.active / backend.weight, rng)
        self.released = self._ranking.released  # for the pool

    def pick(self, candidates: Candidates, client: str) -> Backend:
        if len(candidates) > FEW and (found := self._ranking.least(candidates)):
            return found
        least = math.inf
        ties: list[Backend] = []
        for backend in candidates:
            load = backend.active / backend.weight
            if load < least:
                least = load
                ties = [backend]
            elif load == least:
                ties.append(backend)
        return ties[0] if len(ties) == 1 else ties[int(self._rng.random() * len(ties))]


class Random:
    """Any of them, as often as its weight says."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._seen: Candidates | None = None
        self._bounds: list[int] = []

    def pick(self, candidates: Candidates, client: str) -> Backend:
        if candidates is not self._seen:
            self._bounds = list(accumulate(backend.weight for backend in candidates))
            self._seen = candidates
        return candidates[bisect(self._bounds, self._rng.random() * self._bounds[-1])]


class PowerOfTwo:
    """The less loaded of two taken at random (Mitzenmacher 2001): nearly as even as all, at the cost of two."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, candidates: Candidates, client: str) -> Backend:
        count = len(candidates)
        first = int(self._rng.random() * count)
        if count == 1:
            return candidates[first]
        second = int(self._rng.random() * (count - 1))
        one, other = candidates[first], candidates[second + (second >= first)]
        return one if one.active * other.weight <= other.active * one.weight else other


class IpHash:
    """Rendezvous hashing of the client's address: a backend that leaves moves only its own clients.

    Each backend draws a number from the hash of (its address, client), the highest wins; weights bend the draw as in
    Schindelhauer and Schomaker's weighted rendezvous. Hashes do not depend on the process, so restarts change nothing.
    """

    REMEMBERED = 16384  # clients whose backend is not computed again

    def __init__(self) -> None:
        self._seen: Candidates | None = None
        self._homes: dict[str, Backend] = {}

    def pick(self, candidates: Candidates, client: str) -> Backend:
        if candidates is not self._seen or len(self._homes) >= self.REMEMBERED:
            self._homes = {}
            self._seen = candidates
        home = self._homes.get(client)
        if home is None:
            home = self._homes[client] = max(candidates, key=lambda backend: self._draw(backend, client))
        return home

    @staticmethod
    def _draw(backend: Backend, client: str) -> float:
        digest = hashlib.blake2b(f"{backend.address}\n{client}".encode(), digest_size=8).digest()
        # 52 bits and a half: exact in a float, so that the quotient is never 1, whose logarithm is 0.
        return -backend.weight / math.log(((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52)


class LeastTime:
    """The least expected wait: a decaying average of the time to the answer's head, times the work in hand.

    One that was never measured comes first, and once it was asked it comes last: until it answers, nothing speaks for
    asking it more. All averages decay at one rate, so the order is the same whatever the moment they are reckoned for.
    Only the floor, below which none of them decays, asks for a newer moment now and then.
    """

    UNKNOWN = 1e9  # seconds that each piece of work takes a backend that was never measured
    MOMENT = 1.0  # seconds for which averages are reckoned for the same moment
    STEPS = 16  # for each doubling of the wait: among many, those within 4% share

    def __init__(self, rng: random.Random, clock: Callable[[], float] = time.monotonic) -> None:
        self._rng = rng
        self._clock = clock
        self._moment = -math.inf
        self._ranking = Ranking(self._step, rng)

    def pick(self, candidates: Candidates, client: str) -> Backend:
        now = self._clock()
        if now - self._moment > self.MOMENT:
            self._moment = now
            self._ranking.forget()
        if len(candidates) > FEW and (found := self._ranking.least(candidates)):
            return found
        least = math.inf
        ties: list[Backend] = []
        for backend in candidates:
            wait = self._wait(backend)
            if wait < least:
                least = wait
                ties = [backend]
            elif wait == least:
                ties.append(backend)
        return ties[0] if len(ties) == 1 else ties[int(self._rng.random() * len(ties))]

    def released(self, backend: Backend) -> None:
        if backend.average_at - self._moment <= self.MOMENT:  # else the order is made anew before it is asked
            self._ranking.released(backend)

    def _wait(self, backend: Backend) -> float:
        if not backend.average_at:
            return self.UNKNOWN * backend.active / backend.weight
        return backend.expected_time(self._moment) * (backend.active + 1) / backend.weight

    def _step(self, backend: Backend) -> float:
        return round(self.STEPS * math.log2(self._wait(backend) + 1e-9))


class Custom:
    """A user's own policy: a Python file with `def select_server(backends, client)`.

    It is given the available backends (each with `id`, `host`, `port`, `weight`, `active`, `average`) and the
    client's address, and returns one of them. A mistake in it costs no request: it is reported once, and round robin
    answers instead. Raises ValueError with a line for people when the file cannot be used at all.
    """

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self._path = path
        self._report: Callable[[str], None] | None = report
        self._fallback = RoundRobin()
        self._select = self._load(path)

    @staticmethod
    def _load(path: Path) -> Callable[[Candidates, str], Backend]:
        spec = importlib.util.spec_from_file_location("lb_policy", path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{path}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # whatever a user's file may raise
            raise ValueError(f"{path}: cannot be loaded: {type(error).__name__}: {error}") from None
        select = getattr(module, "select_server", None)
        if not callable(select):
            raise ValueError(f"{path}: must have a function select_server(backends, client)")
        return select  # type: ignore[no-any-return]

    def pick(self, candidates: Candidates, client: str) -> Backend:
        try:
            chosen = self._select(candidates, client)
            if any(chosen is backend for backend in candidates):
                return chosen
            problem = f"returned {chosen!r}, which is no available backend"
        except Exception as error:  # a user's file may raise anything, and no request may pay for it
            problem = f"raised {type(error).__name__}: {error}"
        if self._report is not None:
            self._report(f"policy {self._path.name}: select_server {problem}; round robin answers instead")
            self._report = None
        return self._fallback.pick(candidates, client)


def make_picker(
    algorithm: str,
    base: Path,
    report: Callable[[str], None],
    rng: random.Random | None = None,
    clock: Callable[[], float] = time.monotonic,
    hash_balance: float = 1.25,
) -> Picker:
    """The picker of a policy's name, or of a `.py` file below `base`; ValueError where that file is of no use."""
    rng = rng or random.Random()
    if algorithm.endswith(".py"):
        return Custom(base / algorithm, report)
    table: dict[str, Callable[[], Picker]] = {
        "round_robin": RoundRobin,
        "least_connections": lambda: LeastConnections(rng),
        "random": lambda: Random(rng),
        "ip_hash": IpHash,
        "power_of_two": lambda: PowerOfTwo(rng),
        "least_time": lambda: LeastTime(rng, clock),
        "hash": lambda: Hash(hash_balance),
    }
    return table[algorithm]()
