"""The policies, each on its own: candidates and a client go in, one of the candidates comes out."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import cycle
from pathlib import Path

import pytest

from balancer.backend import AVERAGE_HALF_LIFE, Backend
from balancer.config import POLICIES, Server
from balancer.hashing import Hash
from balancer.pickers import (
    FEW,
    Custom,
    IpHash,
    LeastConnections,
    LeastTime,
    Picker,
    PowerOfTwo,
    Random,
    Ranking,
    RoundRobin,
    make_picker,
)


class Dice(random.Random):
    """A random source that says what the test gave it, again and again."""

    def __new__(cls, *values: float) -> Dice:
        return super().__new__(cls)

    def __init__(self, *values: float) -> None:
        super().__init__()
        self._values = cycle(values)

    def random(self) -> float:
        return next(self._values)


def backends(*weights: int) -> tuple[Backend, ...]:
    """Backends "1", "2"... of these weights."""
    return tuple(
        Backend(Server(str(number), "127.0.0.1", 8000 + number, weight)) for number, weight in enumerate(weights, 1)
    )


def picks(picker: Picker, candidates: Sequence[Backend], count: int, client: str = "127.0.0.1") -> list[str]:
    return [picker.pick(candidates, client).id for _ in range(count)]


class Leases:
    """Gives out and takes back as the pool does."""

    def __init__(self, picker: LeastConnections | LeastTime, candidates: Sequence[Backend]) -> None:
        self.picker = picker
        self.candidates = candidates
        self.out: list[Backend] = []

    def take(self, tried: Collection[Backend] = ()) -> Backend:
        offered = [backend for backend in self.candidates if backend not in tried] if tried else self.candidates
        return self.lease(self.picker.pick(offered, ""))

    def lease(self, backend: Backend) -> Backend:
        backend.active += 1
        self.out.append(backend)
        return backend

    def give_back(self, backend: Backend) -> None:
        self.out.remove(backend)
        backend.active -= 1
        self.picker.released(backend)


# Round robin ------------------------------------------------------------------------------------------------------


def test_round_robin_is_strict():
    assert picks(RoundRobin(), backends(1, 1, 1), 7) == list("1231231")


@pytest.mark.parametrize("weights", [(5, 1, 1), (3, 2, 1), (1, 100), (7, 7, 7, 1), (256, 1), (2, 3, 5, 7, 11, 13)])
def test_weights_are_exact_over_a_cycle_and_smooth_within_it(weights):
    """At no moment has a backend had a whole turn more or less than its share."""
    total = sum(weights)
    sequence = picks(RoundRobin(), backends(*weights), 3 * total)
    for number, weight in enumerate(weights, 1):
        had = 0
        for turns, name in enumerate(sequence, 1):
            had += name == str(number)
            assert abs(had - turns * weight / total) <= 1.0
        assert had == 3 * weight


def test_it_stays_strict_among_those_who_stay():
    one, two, three = backends(1, 1, 1)
    picker = RoundRobin()
    assert picks(picker, (one, two, three), 4) == list("1231")
    assert picks(picker, (one, three), 4) == list("3131")


@pytest.mark.parametrize("away", [1, 2, 3, 10, 1001])
def test_one_that_was_away_makes_up_for_nothing(away):
    """Weighted round robin with counters sends a burst to whoever returns."""
    one, two, three = backends(1, 1, 1)
    picker = RoundRobin()
    picks(picker, (one, two, three), 5)
    picks(picker, (one, three), away)
    sequence = picks(picker, (one, two, three), 30)
    assert all(set(sequence[at : at + 3]) == {"1", "2", "3"} for at in range(2, 27))
    assert Counter(sequence)["2"] <= 11


def test_one_that_joins_gets_no_burst_and_is_not_forgotten():
    *old, new = backends(1, 1, 1, 1)
    picker = RoundRobin()
    picks(picker, tuple(old), 3001)
    sequence = picks(picker, (*old, new), 8)
    assert sorted(sequence) == sorted("11223344")


def test_flapping_does_not_shift_the_others():
    """The set changes at every pick; who is always there is still picked in turn."""
    one, two, three = backends(1, 1, 1)
    picker = RoundRobin()
    sequence = []
    for number in range(300):
        sequence += picks(picker, (one, two, three) if number % 2 else (one, two), 1)
    counts = Counter(sequence)
    assert abs(counts["1"] - counts["2"]) <= 1
    assert counts["3"] <= 100


def test_positions_outlive_the_picker():
    """They are on the backends, so that a reload loses none of them."""
    candidates = backends(1, 1, 1)
    assert picks(RoundRobin(), candidates, 2) == ["1", "2"]
    assert picks(RoundRobin(), candidates, 3) == ["3", "1", "2"]


def test_one_that_joins_with_a_new_picker_gets_no_burst():
    """A reload that changes the policy and adds a backend: the others' positions are far ahead of nothing."""
    candidates = backends(1, 1, 1)
    picks(RoundRobin(), candidates[:2], 1000)
    assert sorted(picks(RoundRobin(), candidates, 6)) == list("112233")


def test_a_retry_among_fewer_leaves_the_order_intact():
    candidates = backends(1, 1, 1)
    picker = RoundRobin()
    assert picks(picker, candidates, 1) == ["1"]
    assert picks(picker, candidates[1:], 1) == ["2"]
    assert picks(picker, candidates, 4) == ["3", "1", "2", "3"]


@pytest.mark.parametrize("seed", range(4))
def test_whoever_came_or_went_meanwhile_the_earliest_turn_is_next(seed):
    """Weights that are equal, that differ and become equal again; one that fills up at each pick and comes back.

    However the order is kept, nobody who is picked may have had a later turn than another.
    """
    chance = random.Random(seed)
    everyone = backends(*[1] * 5)
    picker = RoundRobin()
    for _ in range(400):
        for backend in everyone:
            backend.weight = chance.choice((1, 2, 3)) if chance.random() < 0.1 else 1
        candidates = tuple(sorted(chance.sample(everyone, chance.randint(1, 5)), key=everyone.index))
        for _ in range(chance.choice((1, 1, 2, 7, 20))):
            chosen = picker.pick(candidates, "")
            had = chosen.turn - RoundRobin.STRIDE // chosen.weight
            assert all(had <= backend.turn for backend in candidates)


@pytest.mark.parametrize("seed", range(4))
def test_equal_weights_are_served_strictly_in_turn_after_whatever_history(seed):
    """Each has one turn in six, always in the same order; how the order is kept shows nowhere."""
    chance = random.Random(seed)
    everyone = backends(*[1] * 6)
    picker = RoundRobin()
    for number in range(300):
        everyone[0].weight = 3 if number % 5 == 0 else 1
        picks(picker, chance.sample(everyone, chance.randint(1, 6)), chance.randint(1, 9))
        everyone[0].weight = 1
        candidates = list(everyone)
        picks(picker, candidates, 2 * len(everyone))  # until whoever was behind has caught up
        order = picks(picker, candidates, 6)
        assert sorted(order) == list("123456")
        assert picks(picker, candidates, 18) == 3 * order


def test_one_that_is_full_at_each_pick_has_its_turn_when_it_is_back():
    """With one connection each, the set changes with every lease and release."""
    everyone = backends(1, 1, 1)
    picker = RoundRobin()
    sequence = picks(picker, everyone, 1)
    for _ in range(8):
        free = [backend for backend in everyone if backend.id != sequence[-1]]
        sequence += picks(picker, free, 1)
    assert sequence == list("123123123")


def test_weights_that_are_changed_and_changed_back_leave_it_strict():
    candidates = backends(1, 1, 1)
    picker = RoundRobin()
    assert picks(picker, candidates, 4) == list("1231")
    candidates[0].weight = 4
    assert 37 <= picks(picker, list(candidates), 60).count("1") <= 41
    candidates[0].weight = 1
    sequence = picks(picker, list(candidates), 30)
    assert Counter(sequence) == {"1": 10, "2": 10, "3": 10}
    assert sequence == 10 * sequence[:3]


# Least connections, random, power of two --------------------------------------------------------------------------


def test_least_connections_takes_the_least_for_its_weight():
    one, two, three = candidates = backends(1, 2, 4)
    one.active, two.active, three.active = 1, 3, 3
    assert picks(LeastConnections(Dice(0.5)), candidates, 1) == ["3"]
    three.active = 5
    assert picks(LeastConnections(Dice(0.5)), candidates, 1) == ["1"]


@pytest.mark.parametrize(("chance", "picked"), [(0.0, "1"), (0.4, "2"), (0.999, "3")])
def test_least_connections_breaks_ties_at_random(chance, picked):
    candidates = backends(1, 1, 1, 1)
    candidates[3].active = 1
    assert picks(LeastConnections(Dice(chance)), candidates, 1) == [picked]


def test_random_goes_by_weight():
    hundredths = [(number + 0.5) / 100 for number in range(100)]
    assert Counter(picks(Random(Dice(*hundredths)), backends(1, 7, 2), 100)) == {"1": 10, "2": 70, "3": 20}


def test_random_notices_that_the_set_has_changed():
    one, two, three = backends(1, 1, 1)
    picker = Random(Dice(0.999))
    assert picks(picker, (one, two, three), 1) == ["3"]
    assert picks(picker, (one, two), 1) == ["2"]


def test_power_of_two_takes_the_less_loaded_of_two_different_ones():
    candidates = backends(1, 1, 1)
    for backend, active in zip(candidates, (2, 1, 0), strict=True):
        backend.active = active
    assert picks(PowerOfTwo(Dice(0.0, 0.0)), candidates, 1) == ["2"]  # 1 and 2
    assert picks(PowerOfTwo(Dice(0.5, 0.5)), candidates, 1) == ["3"]  # 2 and 3
    assert picks(PowerOfTwo(Dice(0.999, 0.0)), candidates, 1) == ["3"]  # 3 and 1
    assert picks(PowerOfTwo(Dice(0.999)), candidates[:1], 1) == ["1"]


def test_power_of_two_counts_load_by_weight():
    light, heavy = candidates = backends(1, 4)
    light.active, heavy.active = 1, 3
    assert picks(PowerOfTwo(Dice(0.0)), candidates, 1) == ["2"]


def test_power_of_two_is_nearly_even():
    """Mitzenmacher 2001: the most loaded of n is log log n above the average."""
    candidates = backends(*[1] * 20)
    picker = PowerOfTwo(random.Random(7))
    for _ in range(2000):
        picker.pick(candidates, "").active += 1
    assert max(backend.active for backend in candidates) <= 104


# Least connections among many -------------------------------------------------------------------------------------

MANY = 5 * FEW


def load(backend: Backend) -> float:
    return backend.active / backend.weight


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), tuple(range(1, 41))], ids=["equal", "few-weights", "all-differ"])
@pytest.mark.parametrize("in_hand", [5, MANY, 20 * MANY])
def test_least_connections_is_exact_among_many(weights, in_hand):
    """Whatever came between: retries, one that was leased without asking, a set that changed and changed back."""
    everyone = backends(*(weights[number % len(weights)] for number in range(MANY)))
    chance = random.Random(in_hand)
    leases = Leases(LeastConnections(random.Random(1)), everyone)
    for turn in range(2000):
        tried = chance.sample(everyone, chance.randrange(1, 4)) if turn % 7 == 0 else []
        least = min(load(backend) for backend in leases.candidates if backend not in tried)
        chosen = leases.take(tried)
        assert (chosen.active - 1) / chosen.weight == least
        assert chosen not in tried
        if turn % 11 == 0:
            leases.lease(chance.choice(everyone))
        if turn % 200 == 0:
            leases.candidates = tuple(chance.sample(everyone, chance.randrange(2, MANY)))
        while len(leases.out) > in_hand:
            leases.give_back(chance.choice(leases.out))


@pytest.mark.parametrize(("chance", "picked"), [(0.0, "1"), (0.5, "21"), (0.999, "40")])
def test_least_connections_breaks_ties_at_random_among_many(chance, picked):
    assert picks(LeastConnections(Dice(chance)), backends(*[1] * MANY), 3) == [picked] * 3


def test_idle_backends_share_at_random_among_many():
    """One request at a time: whoever was just released is as likely as any other. Chi-squared, six deviations."""
    leases = Leases(LeastConnections(random.Random(5)), backends(*[1] * MANY))
    counts: Counter[str] = Counter()
    for _ in range(40 * MANY):
        backend = leases.take()
        leases.give_back(backend)
        counts[backend.id] += 1
    assert sum((counts[str(number)] - 40) ** 2 / 40 for number in range(1, MANY + 1)) < MANY + 6 * (2 * MANY) ** 0.5


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[Backend]:
    """Whose score was reckoned: the work that a pick or a release is."""
    looked_at: list[Backend] = []
    begin = Ranking.__init__

    def counting(ranking: Ranking, score: Callable[[Backend], float], rng: random.Random) -> None:
        begin(ranking, lambda backend: (looked_at.append(backend), score(backend))[1], rng)

    monkeypatch.setattr(Ranking, "__init__", counting)
    return looked_at


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3, 4, 5)], ids=["equal", "weights"])
@pytest.mark.parametrize("policy", [LeastConnections, LeastTime])
def test_a_lease_among_a_thousand_is_little_work(scored, policy, weights):
    """Counted, not timed: a lease and a release look at a few of them, once they are ranked."""
    candidates = backends(*(weights[number % len(weights)] for number in range(1000)))
    leases = Leases(policy(random.Random(1)), candidates)
    for _ in range(2000):
        leases.take()
        if len(leases.out) > 64:
            leases.give_back(leases.out[0])
    scored.clear()
    for _ in range(1000):
        leases.take()
        leases.give_back(leases.out[0])
    assert len(scored) <= 6 * 1000


def test_a_retry_among_many_forgets_nothing(scored):
    leases = Leases(LeastConnections(random.Random(1)), backends(*[1] * 1000))
    first = [leases.take() for _ in range(3)]
    scored.clear()
    for _ in range(5):
        assert leases.take(tried=first) not in first
        leases.take()
    assert len(scored) <= 15


def test_levels_that_nobody_stands_on_do_not_pile_up():
    """Weights that all differ make as many loads as there are numbers in hand, and peaks leave them all behind."""
    leases = Leases(LeastConnections(random.Random(1)), backends(*range(1, MANY + 1)))
    for _ in range(1000):
        leases.take()
    while leases.out:
        leases.give_back(leases.out[0])
    for _ in range(2 * MANY):
        leases.take()
    assert len(leases.picker._ranking._heap) <= 3 * MANY


# Hash of the address ----------------------------------------------------------------------------------------------

CLIENTS = [f"10.{number // 250}.{number % 250}.7" for number in range(2000)] + ["::1", "fe80::1"]


def homes(candidates: Sequence[Backend]) -> dict[str, str]:
    picker = IpHash()
    return {client: picker.pick(candidates, client).id for client in CLIENTS}


def test_ip_hash_keeps_a_client_where_it_is():
    assert len(set(picks(IpHash(), backends(1, 1, 1), 10, "10.1.2.3"))) == 1


def test_a_backend_that_leaves_moves_only_its_own_clients():
    everyone = backends(1, 2, 3, 1, 1)
    before, after = homes(everyone), homes(everyone[:2] + everyone[3:])
    assert all(after[client] == home for client, home in before.items() if home != "3")
    assert {after[client] for client, home in before.items() if home == "3"} == {"1", "2", "4", "5"}


def test_a_backend_that_joins_takes_clients_and_moves_no_other():
    everyone = backends(1, 1, 1, 1)
    before, after = homes(everyone[:3]), homes(everyone)
    assert {after[client] for client in CLIENTS if after[client] != before[client]} == {"4"}


def test_the_order_of_the_backends_decides_nothing():
    everyone = backends(1, 2, 3)
    assert homes(everyone) == homes(everyone[::-1])


def test_clients_are_spread_by_weight():
    """Schindelhauer and Schomaker's weighted rendezvous: 1 to 3 here, exact to a few percent."""
    counts = Counter(homes(backends(1, 3, 1)).values())
    for name, share in (("1", 0.2), ("2", 0.6), ("3", 0.2)):
        assert counts[name] / len(CLIENTS) == pytest.approx(share, abs=0.03)


def test_more_clients_than_are_remembered(monkeypatch):
    monkeypatch.setattr(IpHash, "REMEMBERED", 10)
    everyone = backends(1, 1, 1)
    first = homes(everyone)
    monkeypatch.undo()
    assert first == homes(everyone)


def test_ip_hash_follows_a_set_that_changes_and_changes_back():
    everyone = backends(1, 1, 1)
    picker = IpHash()
    home = picker.pick(everyone, "10.1.2.3")
    others = tuple(backend for backend in everyone if backend is not home)
    assert picker.pick(others, "10.1.2.3") in others
    assert picker.pick(everyone, "10.1.2.3") is home


@pytest.mark.parametrize("octet", [b"\0", b"\xff"])
def test_the_extreme_hashes_are_drawn_like_any_other(monkeypatch, octet):
    class Extreme:
        def __init__(self, data: bytes, digest_size: int) -> None:
            self.size = digest_size

        def digest(self) -> bytes:
            return octet * self.size

    monkeypatch.setattr(hashlib, "blake2b", Extreme)
    assert picks(IpHash(), backends(1, 2), 1) == ["2"]


# Least time -------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def timed(clock: Clock, *seconds: float) -> tuple[Backend, ...]:
    made = backends(*[1] * len(seconds))
    for backend, time in zip(made, seconds, strict=True):
        backend.answered_in(time, clock())
    return made


def test_least_time_prefers_who_answers_sooner():
    clock = Clock()
    assert picks(LeastTime(Dice(0.0), clock), timed(clock, 0.3, 0.1, 0.2), 1) == ["2"]


def test_least_time_counts_the_work_in_hand():
    clock = Clock()
    slow, quick = candidates = timed(clock, 0.3, 0.1)
    quick.active = 3  # three in hand, and the fourth: 0.4
    assert picks(LeastTime(Dice(0.0), clock), candidates, 1) == ["1"]
    slow.active = 1
    assert picks(LeastTime(Dice(0.0), clock), candidates, 1) == ["2"]


def test_least_time_goes_by_weight():
    clock = Clock()
    candidates = timed(clock, 0.3, 0.1)
    candidates[0].weight = 4
    assert picks(LeastTime(Dice(0.0), clock), candidates, 1) == ["1"]


def test_least_time_tries_who_was_never_measured():
    clock = Clock()
    (known,) = timed(clock, 0.001)
    assert picks(LeastTime(Dice(0.0), clock), (known, backends(1, 1)[1]), 1) == ["2"]


def test_least_time_sends_one_request_to_find_out():
    """One that was never measured and hangs would otherwise draw everything."""
    clock = Clock()
    (known,) = timed(clock, 0.01)
    new = backends(1, 1)[1]
    picker = LeastTime(Dice(0.0), clock)
    for _ in range(10):
        picker.pick((known, new), "").active += 1
    assert (known.active, new.active) == (9, 1)


def test_least_time_does_not_take_a_long_silence_for_speed():
    clock = Clock()
    quick, hangs = candidates = timed(clock, 0.01, 0.01)
    clock.now += 100 * AVERAGE_HALF_LIFE
    picker = LeastTime(Dice(0.0), clock)
    for _ in range(100):
        chosen = picker.pick(candidates, "")
        if chosen is hangs:
            hangs.active += 1
        else:
            quick.answered_in(0.01, clock.now)
    assert hangs.active <= 16


def test_least_time_gives_who_was_slow_once_another_chance():
    clock = Clock()
    slow, quick = candidates = timed(clock, 0.8, 0.1)
    clock.now += 4 * AVERAGE_HALF_LIFE
    quick.answered_in(0.1, clock.now)
    assert picks(LeastTime(Dice(0.0), clock), candidates, 1) == [slow.id]


def test_least_time_breaks_ties_by_connections():
    clock = Clock()
    idle, busy = backends(1, 1)
    busy.active = 1
    assert picks(LeastTime(Dice(0.999), clock), (busy, idle), 1) == [idle.id]


def wait(backend: Backend, now: float) -> float:
    return backend.expected_time(now) * (backend.active + 1) / backend.weight


def test_least_time_among_many_is_exact_to_a_twentieth():
    """Answers come, some hang, some are not asked for so long that their averages reach the floor."""
    clock = Clock()
    chance = random.Random(4)
    candidates = backends(*(1 + number % 3 for number in range(MANY)))
    for backend in candidates:
        backend.answered_in(chance.uniform(0.01, 0.5), clock())
    leases = Leases(LeastTime(random.Random(1), clock), candidates)
    for turn in range(4000):
        clock.now += 5.0 if turn % 100 == 0 else 0.01
        least = min(wait(backend, clock.now) for backend in candidates)
        chosen = leases.take()
        chosen.active -= 1
        at_most = 2 ** (1 / LeastTime.STEPS) * 2 ** (LeastTime.MOMENT / AVERAGE_HALF_LIFE)
        assert wait(chosen, clock.now) <= least * at_most * 1.0001
        chosen.active += 1
        while len(leases.out) > 30:
            done = chance.choice(leases.out)
            done.answered_in(chance.uniform(0.01, 0.5), clock())
            leases.give_back(done)


def test_least_time_asks_each_of_many_once_to_find_out():
    clock = Clock()
    leases = Leases(LeastTime(random.Random(1), clock), backends(*[1] * MANY))
    for _ in range(MANY):
        leases.take()
    assert [backend.active for backend in leases.candidates] == [1] * MANY
    leases.candidates[6].answered_in(0.5, clock())
    leases.give_back(leases.candidates[6])
    assert [leases.take().id for _ in range(20)] == ["7"] * 20


def test_least_time_goes_by_connections_among_many_that_are_never_measured():
    """TCP mode has no head to wait for."""
    leases = Leases(LeastTime(random.Random(1), Clock()), backends(*[1] * MANY))
    chance = random.Random(2)
    for _ in range(20 * MANY):
        least = min(backend.active for backend in leases.candidates)
        assert leases.take().active - 1 == least
        while len(leases.out) > 4 * MANY:
            leases.give_back(chance.choice(leases.out))


def test_least_time_among_many_does_not_take_a_long_silence_for_speed():
    clock = Clock()
    *quick, hangs = candidates = timed(clock, *[0.01] * MANY)
    clock.now += 100 * AVERAGE_HALF_LIFE
    leases = Leases(LeastTime(random.Random(1), clock), candidates)
    for _ in range(50 * MANY):
        clock.now += 0.001
        chosen = leases.take()
        if chosen is not hangs:
            chosen.answered_in(0.01, clock.now)
            leases.give_back(chosen)
    assert hangs.active <= 17  # of 16 times the wait, and one more within a step
    assert all(backend.active == 0 for backend in quick)


def test_least_time_may_be_told_of_answers_hours_after_it_was_asked():
    """Where only one backend is left, nobody asks; a power of two overflows after three hours of that."""
    clock = Clock()
    leases = Leases(LeastTime(random.Random(1), clock), timed(clock, *[0.1] * MANY))
    for _ in range(10):
        last = leases.take()
    clock.now += 24 * 3600
    last.answered_in(0.05, clock.now)
    leases.give_back(last)
    assert leases.take() in leases.candidates


# A user's own -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def custom(tmp_path: Path, reports: list[str]) -> Callable[[str], Custom]:
    """A policy from the text of its file."""

    def write(text: str) -> Custom:
        path = tmp_path / "my_policy.py"
        path.write_text(text)
        return Custom(path, reports.append)

    return write


def test_a_users_policy_sees_backends_and_client(custom, reports):
    picker = custom(
        "def select_server(backends, client):\n"
        "    if client == '10.0.0.1':\n"
        "        return max(backends, key=lambda backend: (backend.weight, backend.id))\n"
        "    return min(backends, key=lambda backend: (backend.active, backend.port))\n"
    )
    candidates = backends(1, 3, 2)
    candidates[0].active = 1
    assert picker.pick(candidates, "10.0.0.1").id == "2"
    assert picker.pick(candidates, "10.0.0.2").id == "2"
    candidates[1].active = 2
    assert picker.pick(candidates, "10.0.0.2").id == "3"
    assert reports == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return None", "returned None, which is no available backend"),
        ("return 'web'", "returned 'web', which is no available backend"),
        ("return backends", "which is no available backend"),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero"),
        ("return backends[99]", "raised IndexError: tuple index out of range"),
    ],
    ids=["none", "text", "all", "raises", "index"],
)
def test_a_mistake_in_it_is_told_once_and_round_robin_answers(custom, reports, body, problem):
    picker = custom(f"def select_server(backends, client):\n    {body}\n")
    assert picks(picker, backends(1, 1, 1), 5) == list("12312")
    assert len(reports) == 1
    assert reports[0].startswith("policy my_policy.py: select_server ")
    assert problem in reports[0]
    assert reports[0].endswith("; round robin answers instead")


def test_a_backend_that_is_not_offered_is_no_answer(custom, reports):
    """It may have kept one from an earlier call, which is down by this time."""
    picker = custom("kept = []\ndef select_server(backends, client):\n    kept.extend(backends)\n    return kept[0]\n")
    one, two = backends(1, 1)
    assert picks(picker, (one, two), 1) == ["1"]
    assert picks(picker, (two,), 2) == ["2", "2"]
    assert len(reports) == 1


def test_a_mistake_now_and_then_costs_only_that_request(custom, reports):
    picker = custom("def select_server(backends, client):\n    return backends[int(client)]\n")
    candidates = backends(1, 1, 1)
    assert [picker.pick(candidates, client).id for client in ("2", "x", "1")] == ["3", "1", "2"]
    assert len(reports) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def select_server(", "cannot be loaded: SyntaxError: "),
        ("import no_such_module", "cannot be loaded: ModuleNotFoundError: "),
        ("raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
        ("", "must have a function select_server(backends, client)"),
        ("select_server = 7", "must have a function select_server(backends, client)"),
    ],
    ids=["syntax", "import", "exit", "empty", "no-function"],
)
def test_a_file_that_is_of_no_use_is_refused_in_one_line(custom, text, problem):
    with pytest.raises(ValueError) as caught:
        custom(text)
    message = str(caught.value)
    assert problem in message
    assert "my_policy.py: " in message
    assert "\n" not in message


# Their names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_each_policy_of_the_configuration_picks(name, tmp_path):
    picker = make_picker(name, tmp_path, pytest.fail, random.Random(1), Clock())
    candidates = backends(1, 2, 3)
    assert all(picker.pick(candidates, "127.0.0.1") in candidates for _ in range(20))


def test_the_bound_of_hash_is_as_configured(tmp_path):
    candidates = backends(1, 1)
    for balance, others in ((1.0, 1), (1000.0, 0)):
        picker = make_picker("hash", tmp_path, pytest.fail, hash_balance=balance)
        assert isinstance(picker, Hash)
        home = picker.pick(candidates, "x")
        home.active += 1
        assert (picker.pick(candidates, "x") is not home) == others
        home.active -= 1


def test_a_file_is_found_below_the_base(tmp_path):
    (tmp_path / "last.py").write_text("def select_server(backends, client):\n    return backends[-1]\n")
    assert picks(make_picker("last.py", tmp_path, pytest.fail), backends(1, 1, 1), 2) == ["3", "3"]
    assert picks(make_picker(str(tmp_path / "last.py"), Path("/"), pytest.fail), backends(1, 1), 1) == ["2"]
