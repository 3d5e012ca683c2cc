"""The policy `hash`: whose key goes where, how much one backend may get, and what a request's key is."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Sequence
from fractions import Fraction

import pytest

from balancer import hashing
from balancer.backend import Backend
from balancer.config import Server
from balancer.hashing import Hash, key_of

KEYS = [f"user-{number}" for number in range(3000)]
AT_HOME = 1000.0  # a factor that lets every key stay at home


def backends(*weights: int) -> tuple[Backend, ...]:
    """Backends "1", "2"... of these weights."""
    return tuple(
        Backend(Server(str(number), "127.0.0.1", 8000 + number, weight)) for number, weight in enumerate(weights, 1)
    )


def homes(candidates: Sequence[Backend]) -> dict[str, str]:
    """Who gets each key when nobody has anything in hand."""
    picker = Hash()
    return {key: picker.pick(candidates, key).id for key in KEYS}


class Leases:
    """Gives out and takes back as the pool does."""

    def __init__(self, candidates: Sequence[Backend], factor: float = 1.25) -> None:
        self.picker = Hash(factor)
        self.candidates = candidates
        self.out: list[Backend] = []

    def take(self, key: str, tried: Collection[Backend] = ()) -> Backend:
        offered = [backend for backend in self.candidates if backend not in tried] if tried else self.candidates
        return self._lease(self.picker.pick(offered, key))

    def take_unasked(self, backend: Backend) -> Backend:
        """The only one left is leased without asking the picker."""
        return self._lease(backend)

    def _lease(self, backend: Backend) -> Backend:
        backend.active += 1
        self.picker.leased(backend)
        self.out.append(backend)
        return backend

    def give_back(self, backend: Backend) -> None:
        self.out.remove(backend)
        backend.active -= 1
        self.picker.released(backend)

    def give_back_all(self) -> None:
        while self.out:
            self.give_back(self.out[-1])


@pytest.fixture
def reckoned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys whose order was reckoned, rather than remembered."""
    keys: list[str] = []
    reckon = hashing._Field._order

    def noted(field: hashing._Field, key: str, count: int) -> list[Backend]:
        keys.append(key)
        return reckon(field, key, count)

    monkeypatch.setattr(hashing._Field, "_order", noted)
    return keys


# Where a key is at home -------------------------------------------------------------------------------------------


def test_a_key_stays_where_it_is():
    candidates = backends(1, 1, 1, 1)
    picker = Hash()
    for key in KEYS[:50]:
        assert len({picker.pick(candidates, key).id for _ in range(3)}) == 1


def test_a_second_balancer_and_the_next_run_agree():
    """Pinned: a release that hashed otherwise would send every key elsewhere."""
    candidates = backends(1, 2, 3, 1)
    assert "".join(Hash().pick(candidates, key).id for key in KEYS[:20]) == "33333243143234324134"


def test_the_order_of_the_backends_decides_nothing():
    everyone = backends(1, 2, 3, 2)
    assert homes(everyone) == homes(everyone[::-1])


def test_one_that_leaves_moves_only_its_own_keys_and_to_all_others_alike():
    everyone = backends(1, 1, 1, 1, 1)
    before, after = homes(everyone), homes(everyone[:2] + everyone[3:])
    moved = Counter(after[key] for key, home in before.items() if home == "3")
    assert all(after[key] == home for key, home in before.items() if home != "3")
    for name in "1245":
        assert moved[name] / moved.total() == pytest.approx(1 / 4, abs=0.06)


def test_one_that_joins_takes_keys_and_moves_no_other():
    everyone = backends(1, 1, 2, 3)
    before, after = homes(everyone[:3]), homes(everyone)
    assert {after[key] for key in KEYS if after[key] != before[key]} == {"4"}


def test_a_weight_that_grows_takes_keys_and_moves_no_other():
    before, after = homes(backends(1, 1, 2)), homes(backends(1, 1, 3))
    assert {after[key] for key in KEYS if after[key] != before[key]} == {"3"}


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 3, 1), (2, 5), (1, 2, 3, 4)])
def test_keys_are_spread_by_weight(weights):
    """Schindelhauer and Schomaker's weighted rendezvous; Pearson's chi-squared, at one in ten thousand."""
    counts = Counter(homes(backends(*weights)).values())
    expected = [len(KEYS) * weight / sum(weights) for weight in weights]
    assert sum((counts[str(n)] - e) ** 2 / e for n, e in enumerate(expected, 1)) < 22


def test_keys_are_spread_over_many_backends():
    """Chi-squared again: 199 degrees of freedom, six standard deviations."""
    counts = Counter(homes(backends(*[1] * 200)).values())
    expected = len(KEYS) / 200
    found = sum((counts[str(number)] - expected) ** 2 / expected for number in range(1, 201))
    assert 199 - 6 * math.sqrt(2 * 199) < found < 199 + 6 * math.sqrt(2 * 199)


@pytest.mark.parametrize("key", ["", "\xff\x00", "ä", "\ud800", "x" * 100_000])
def test_any_text_is_a_key(key):
    candidates = backends(1, 1, 1)
    assert Hash().pick(candidates, key) is Hash().pick(candidates[::-1], key)


# How much one may get ---------------------------------------------------------------------------------------------


def bound(backend: Backend, candidates: Sequence[Backend], factor: Fraction) -> int:
    """ceil(factor * its share of what is in hand), as Mirrokni, Thorup and Zadimoghaddam have it."""
    in_hand = sum(each.active for each in candidates)
    return math.ceil(factor * in_hand * backend.weight / sum(each.weight for each in candidates))


@pytest.mark.parametrize("factor", ["1", "1.1", "1.25", "2", "7.3"])
@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 2, 7), (3,) * 30, (1,) * 90 + (5,) * 10], ids=len)
def test_nobody_gets_more_than_the_factor_allows(factor, weights):
    """Some keys are asked for far more than others, and as much comes to an end as begins."""
    candidates = backends(*weights)
    leases = Leases(candidates, float(factor))
    chance = random.Random(3)
    for turn in range(1500):
        one = leases.take(f"key-{int(chance.paretovariate(0.5)) % 50}")
        assert one.active <= bound(one, candidates, Fraction(factor))
        if turn > 300:
            leases.give_back(chance.choice(leases.out))


def test_the_next_in_the_keys_order_is_taken():
    """Whose turn it is when the ones before are full is the one who would have the key if they were away."""
    candidates = backends(1, 2, 1, 1, 3, 1, 1, 1, 2, 1)
    order = []
    others = candidates
    while others:
        order.append(Hash().pick(others, "hot"))
        others = tuple(backend for backend in others if backend not in order)
    leases = Leases(candidates, 1.0)
    seen = [leases.take("hot") for _ in range(2 * sum(backend.weight for backend in candidates))]
    assert list(dict.fromkeys(seen)) == order
    assert [backend.active / backend.weight for backend in candidates] == [2.0] * 10


def test_a_key_comes_home_once_there_is_room():
    leases = Leases(backends(1, 1, 1))
    home = leases.take("hot")
    away = leases.take("hot")
    assert away is not home
    leases.give_back(home)
    leases.give_back(away)
    assert leases.take("hot") is home


def test_a_large_factor_lets_every_key_stay_at_home():
    leases = Leases(backends(1, 1, 1), AT_HOME)
    assert len({leases.take("hot") for _ in range(100)}) == 1


def test_what_was_leased_without_asking_counts():
    """Where only one is left to try, the pool takes it, and the picker is told."""
    one, two, three = candidates = backends(1, 1, 1)
    leases = Leases(candidates, 1.0)
    for key in KEYS[:10]:
        leases.take(key)
    for _ in range(9):
        leases.take_unasked(three)
    leases.take("hot", tried=[three])
    assert (one.active, two.active) in {(4, 4), (3, 4), (4, 3)}
    for _ in range(12):
        one_more = leases.take("hot")
        assert one_more.active <= bound(one_more, candidates, Fraction(1))


def test_what_others_have_in_hand_does_not_count():
    """One that left the candidates may still have much in hand; it makes no room with those who stay."""
    *candidates, other = backends(1, 1, 1, 1)
    leases = Leases((*candidates, other), 1.0)
    for key in KEYS[:8]:
        leases.take(key)
    leases.candidates = tuple(candidates)
    for key in KEYS[:20]:
        one = leases.take(key)
        assert one.active <= bound(one, candidates, Fraction(1))
    while other.active:
        leases.give_back(other)
    for _ in range(20):
        one = leases.take("hot")
        assert one.active <= bound(one, candidates, Fraction(1))


def test_work_that_was_in_hand_before_counts():
    """A reload that changes the policy finds backends at work."""
    one, two = candidates = backends(1, 1)
    one.active = 10
    leases = Leases(candidates)
    assert {leases.take(key) for key in KEYS[:6]} == {two}


def test_where_nobody_counts_the_key_stays_at_home():
    """A pool that does not tell would leave everyone full in the picker's eyes."""
    candidates = backends(1, 1, 1)
    picker = Hash()
    home = picker.pick(candidates, "hot")
    picker.pick(candidates, "hot")
    for backend in candidates:
        backend.active = 50
    assert picker.pick(candidates, "hot") is home


# What is remembered -----------------------------------------------------------------------------------------------


def test_an_order_is_reckoned_once(reckoned):
    candidates = backends(1, 1, 1)
    leases = Leases(candidates, AT_HOME)
    for _ in range(10):
        for key in KEYS[:5]:
            leases.take(key)
    assert Counter(reckoned) == {KEYS[0]: 2, **dict.fromkeys(KEYS[1:5], 1)}  # the first set comes as a retry's would


def test_among_many_a_hot_key_is_not_reckoned_at_each_turn(reckoned):
    """Counted work, not time: 300 leases of one key over 1,000 backends, each of which may have one in hand."""
    leases = Leases(backends(*[1] * 1000))
    for _ in range(3):
        assert len({leases.take("hot") for _ in range(300)}) == 300
        leases.give_back_all()
    assert len(reckoned) <= 6


def test_a_retry_does_not_make_it_forget(reckoned):
    candidates = backends(1, 1, 1, 1)
    leases = Leases(candidates, AT_HOME)
    for key in KEYS[:100] * 2:
        leases.take(key)
    reckoned.clear()
    for key in KEYS[:100]:
        assert leases.take(key, tried=[leases.take(key)]) is not leases.out[-2]
    assert Counter(reckoned) == dict.fromkeys(KEYS[:100], 1)  # each among the three others only


def test_keys_that_come_often_are_remembered_while_any_number_of_others_pass(reckoned, monkeypatch):
    monkeypatch.setattr(hashing._Field, "REMEMBERED", 10)
    leases = Leases(backends(1, 1, 1), AT_HOME)
    first = [leases.take("often") for _ in range(2)]
    found = [leases.take(key) for number in range(500) for key in (KEYS[number], "often")]
    assert set(found[1::2]) == set(first)
    assert Counter(reckoned)["often"] == 2
    field = leases.picker._field
    assert len(field._orders) + len(field._older) <= 20
    monkeypatch.undo()
    again = Leases(leases.candidates, AT_HOME)
    assert found[::2] == [again.take(key) for key in KEYS[:500]]


def test_the_memory_is_bounded_in_places_too(monkeypatch):
    monkeypatch.setattr(hashing._Field, "REMEMBERED", 200)
    leases = Leases(backends(*[1] * 100))
    for number in range(400):
        leases.take(KEYS[number % 40])
    field = leases.picker._field
    orders = [*field._orders.values(), *field._older.values()]
    assert sum(map(len, orders)) <= 2 * (200 + 100)


def test_long_keys_are_not_kept():
    leases = Leases(backends(1, 1, 1), AT_HOME)
    long = ["k" * 16_000 + str(number) for number in range(60)]
    assert len({leases.take(key).id for key in long}) == 3
    assert max(map(len, leases.picker._field._orders)) <= 64


def test_the_set_may_change_and_change_back():
    everyone = backends(1, 1, 1)
    picker = Hash()
    (home,) = {picker.pick(everyone, "x") for _ in range(3)}
    others = tuple(backend for backend in everyone if backend is not home)
    assert {picker.pick(others, "x") for _ in range(3)} < set(others)
    assert picker.pick(tuple(everyone), "x") is home


# A request's key --------------------------------------------------------------------------------------------------


def block(*fields: bytes) -> bytes:
    """As they stand in a head."""
    return b"".join(b"\r\n" + field for field in fields) + b"\r\n"


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ([b"X-User: anna"], "anna"),
        ([b"Accept: */*", b"x-uSER:anna", b"Via: x"], "anna"),
        ([b"X-User: \t an na \t"], "an na"),
        ([b"X-User: anna", b"X-User: bert"], "anna"),
        ([b"X-User: \xe4\xff"], "\xe4\xff"),
        ([b"X-User: a:b=c; d"], "a:b=c; d"),
        ([b"X-User:"], ""),
        ([b"X-User2: anna"], ""),
        ([b"My-X-User: anna"], ""),
        ([b"A: X-User: anna"], ""),
        ([], ""),
    ],
)
def test_the_key_is_a_field(fields, key):
    assert key_of("header:X-User", b"/", block(*fields)) == key


def test_signs_of_a_fields_name_mean_themselves():
    assert key_of("header:X.User", b"/", block(b"X-User: anna", b"X.User: bert")) == "bert"


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ([b"Cookie: sid=12; lb=x"], "12"),
        ([b"Cookie: a=b", b"cookie: lb=x; sid=12=="], "12=="),
        ([b"Cookie: sid=1; sid=2"], "1"),
        ([b"Cookie: SID=12"], ""),
        ([b"Cookie: xsid=12"], ""),
        ([b"X: sid=12"], ""),
        ([], ""),
    ],
)
def test_the_key_is_a_cookie(fields, key):
    assert key_of("cookie:sid", b"/?sid=9", block(*fields)) == key


@pytest.mark.parametrize(
    ("target", "key"),
    [
        (b"/?user=anna", "anna"),
        (b"/a/b?x=y&user=anna&z", "anna"),
        (b"/?user=anna&user=bert", "anna"),
        (b"/?user=a%20b+c=d?e", "a%20b+c=d?e"),
        (b"http://host/?user=anna", "anna"),
        (b"/?x=/?user=anna", ""),
        (b"/?x=1?user=anna", ""),
        (b"/&user=anna", ""),
        (b"/user=anna", ""),
        (b"/?USER=anna", ""),
        (b"/?xuser=anna", ""),
        (b"/?user", ""),
        (b"/?user=", ""),
        (b"/", ""),
        (b"*", ""),
    ],
)
def test_the_key_is_a_parameter_of_the_query(target, key):
    assert key_of("query:user", target, block(b"Host: x")) == key


def test_signs_of_a_parameters_name_mean_themselves():
    assert key_of("query:u[]", b"/?u=1&u[]=2", b"") == "2"


@pytest.mark.parametrize(
    ("target", "key"),
    [
        (b"/a/b.html", "/a/b.html"),
        (b"/a/b.html?x=y?z", "/a/b.html"),
        (b"/a%2Fb/../c;v=1", "/a%2Fb/../c;v=1"),
        (b"http://host:80/a/b.html?x", "/a/b.html"),
        (b"HTTPS://host/", "/"),
        (b"http://host", "/"),
        (b"http://host?x", "/"),
        (b"/http://host/a", "/http://host/a"),
        (b"//host/a", "//host/a"),
        (b"?x", "/"),
        (b"*", "*"),
    ],
)
def test_the_key_is_the_path(target, key):
    assert key_of("path", target, block(b"Host: x")) == key


@pytest.mark.parametrize("hash_on", ["", "paths", "path:x", "body:x", "X-User"])
def test_nothing_else_can_be_hashed_on(hash_on):
    with pytest.raises(ValueError, match="is nothing to hash on"):
        key_of(hash_on, b"/", b"")
