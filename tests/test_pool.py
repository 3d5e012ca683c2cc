"""The pool: who may get work, how much each has, who is told of a change."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from balancer.backend import Admin, Backend
from balancer.config import Server
from balancer.pickers import LeastConnections, Picker, RoundRobin
from balancer.pool import Pool, ordinal
from conftest import PATIENCE


class First:
    """Always the first, and a note of what was offered."""

    def __init__(self) -> None:
        self.offers: list[Sequence[Backend]] = []

    def pick(self, candidates: Sequence[Backend], client: str) -> Backend:
        self.offers.append(candidates)
        return candidates[0]


def backend(name: str, **settings) -> Backend:
    return Backend(Server(name, "127.0.0.1", 8000, **settings))


def pool_of(*backends: Backend, picker: Picker | None = None, **options) -> Pool:
    return Pool(backends, picker or RoundRobin(), **options)


def leased(pool: Pool, count: int = 1, tried: Sequence[Backend] = ()) -> str:
    """The ids of the next leases; "-" for none. They are not released."""
    found = [pool.lease("127.0.0.1", tried) for _ in range(count)]
    return "".join(one.id if one else "-" for one in found)


def fail(pool: Pool, *backends: Backend) -> None:
    """Take them down, whatever the number of failures that takes."""
    for one in backends:
        while one.healthy:
            pool.report(one, False, "L4CON refused")


def pass_(pool: Pool, *backends: Backend) -> None:
    for one in backends:
        while not one.healthy:
            pool.report(one, True, "L4OK in 0 ms")


# Leases -----------------------------------------------------------------------------------------------------------


def test_a_lease_counts_work_until_it_is_released():
    a = backend("a")
    pool = pool_of(a)
    assert pool.lease("127.0.0.1") is a
    assert pool.lease("127.0.0.1") is a
    assert a.active == 2
    pool.release(a)
    assert a.active == 1


def test_the_picker_gets_the_client_and_decides():
    class ByClient:
        def pick(self, candidates: Sequence[Backend], client: str) -> Backend:
            return candidates[int(client)]

    pool = pool_of(backend("a"), backend("b"), picker=ByClient())
    assert [pool.lease(client).id for client in ("1", "0", "1")] == ["b", "a", "b"]


def test_without_a_backend_that_is_available_there_is_no_lease():
    a = backend("a")
    pool = pool_of(a)
    fail(pool, a)
    assert pool.lease("127.0.0.1") is None
    assert a.active == 0
    assert pool_of().lease("127.0.0.1") is None


def test_repr_is_a_status_line():
    a, b = backend("a"), backend("b")
    pool = pool_of(a, b)
    fail(pool, a)
    assert repr(pool) == "<Pool 1 of 2 available>"


def test_the_same_offer_as_long_as_nothing_changes():
    """Pickers keep what they prepared for a set, and know it by its identity."""
    a, b = backend("a"), backend("b")
    picker = First()
    pool = pool_of(a, b, backend("c"), picker=picker)
    leased(pool, 2)
    pool.report(b, True, "L7OK 200 in 1 ms")
    pool.report(b, False, "L7TOUT")
    pool.release(a)
    leased(pool)
    assert len({id(offer) for offer in picker.offers}) == 1
    fail(pool, b)
    leased(pool)
    assert picker.offers[-1] is not picker.offers[0]


def test_a_retry_is_never_given_what_was_tried():
    a, b, c = backend("a"), backend("b"), backend("c")
    pool = pool_of(a, b, c)
    assert leased(pool, 1, [a]) in "bc"
    assert leased(pool, 3, [a, c]) == "bbb"
    assert leased(pool, 1, [a, b, c]) == "-"
    fail(pool, b)
    assert leased(pool, 1, [a, c]) == "-"


def test_round_robin_goes_on_where_it_was_after_a_retry():
    pool = pool_of(*(backends := [backend(name) for name in "abc"]))
    assert leased(pool) == "a"
    assert leased(pool, 1, backends[:1]) == "b"
    assert leased(pool, 4) == "cabc"


# Many threads -----------------------------------------------------------------------------------------------------


def in_threads(work: Callable[[], object], threads: int = 8) -> None:
    """`work` in so many threads, all begun at the same moment."""
    barrier = threading.Barrier(threads)

    def run() -> None:
        barrier.wait(PATIENCE)
        work()

    with ThreadPoolExecutor(threads) as executor:
        for done in [executor.submit(run) for _ in range(threads)]:
            done.result(PATIENCE)


def test_round_robin_is_strict_over_leases_of_many_threads():
    backends = [backend(name) for name in "abcd"]
    pool = pool_of(*backends)
    in_threads(lambda: leased(pool, 500))
    assert [one.active for one in backends] == [1000] * 4


def test_least_connections_is_exact_over_leases_of_many_threads():
    """Whatever the threads do, no backend ever has two more in hand than another when a lease is given."""
    backends = [backend(name) for name in "abc"]
    worst = []

    class Watching(LeastConnections):
        def pick(self, candidates: Sequence[Backend], client: str) -> Backend:
            chosen = super().pick(candidates, client)
            worst.append(chosen.active - min(one.active for one in candidates))
            return chosen

    pool = pool_of(*backends, picker=Watching(random.Random(3)))

    def work() -> None:
        for _ in range(100):
            held = [pool.lease("127.0.0.1") for _ in range(3)]
            for one in held:
                pool.release(one)

    in_threads(work)
    assert set(worst) == {0}
    assert [one.active for one in backends] == [0, 0, 0]
    in_threads(lambda: leased(pool, 300))
    assert [one.active for one in backends] == [800] * 3


def test_weighted_least_connections_is_exact():
    backends = [backend("a", weight=1), backend("b", weight=2), backend("c", weight=5)]
    pool = pool_of(*backends, picker=LeastConnections(random.Random(3)))
    in_threads(lambda: leased(pool, 100))
    assert [one.active for one in backends] == [100, 200, 500]


def test_no_backend_has_more_than_its_limit_whatever_the_threads_do():
    backends = [backend("a", max_connections=2), backend("b", max_connections=3)]
    pool = pool_of(*backends, picker=LeastConnections(random.Random(3)))
    seen = Counter()

    def work() -> None:
        for _ in range(300):
            one = pool.lease("127.0.0.1")
            if one is None:
                seen["none"] += 1
                continue
            assert one.active <= one.max_connections
            pool.release(one)

    in_threads(work)
    assert [one.active for one in backends] == [0, 0]
    assert Counter(leased(pool, 8)) == {"a": 2, "b": 3, "-": 3}


# Full -------------------------------------------------------------------------------------------------------------


def test_one_that_is_full_is_passed_over_until_something_is_released():
    a, b = backend("a", max_connections=1), backend("b")
    pool = pool_of(a, b)
    assert leased(pool, 4) == "abbb"
    pool.release(a)
    assert "a" in leased(pool, 2)


def test_only_full_tells_whether_waiting_makes_sense():
    a, b = backend("a", max_connections=1), backend("b", max_connections=1)
    pool = pool_of(a, b)
    assert not pool.only_full()
    assert leased(pool, 3) == "ab-"
    assert pool.only_full()
    fail(pool, a)
    assert pool.only_full()
    fail(pool, b)
    assert not pool.only_full()
    pass_(pool, b)
    pool.release(b)
    assert not pool.only_full()


def test_a_retry_is_not_given_one_that_is_full():
    a, b = backend("a"), backend("b", max_connections=1)
    pool = pool_of(a, b)
    assert leased(pool, 2, [a]) == "b-"


# Backups ----------------------------------------------------------------------------------------------------------


def test_backups_serve_only_while_no_other_is_there():
    a, b, spare, other = backend("a"), backend("b"), backend("s", backup=True), backend("t", backup=True)
    pool = pool_of(a, spare, b, other)
    assert leased(pool, 4) == "abab"
    fail(pool, a)
    assert leased(pool, 2) == "bb"
    pool.set_admin(b, Admin.DRAIN, "a test")
    assert sorted(leased(pool, 4)) == list("sstt")
    pass_(pool, a)
    assert leased(pool, 2) == "aa"


def test_a_tier_that_is_only_full_does_not_spill_into_the_backups():
    """What waits in the queue is served soon; a backup may be a page that says sorry."""
    a, spare = backend("a", max_connections=1), backend("s", backup=True)
    pool = pool_of(a, spare)
    assert leased(pool, 2) == "a-"
    assert pool.only_full()
    fail(pool, a)
    assert leased(pool) == "s"


def test_a_retry_comes_to_the_backups_when_all_others_were_tried():
    a, b, spare = backend("a"), backend("b"), backend("s", backup=True)
    pool = pool_of(a, b, spare)
    assert leased(pool, 1, [a]) == "b"
    assert leased(pool, 1, [a, b]) == "s"


# Health and operators ---------------------------------------------------------------------------------------------


class Told:
    """A listener that keeps what it was told."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str, str]] = []

    def __call__(self, one: Backend, reason: str) -> None:
        self.changes.append((one.id, one.status, reason))


def test_a_change_is_told_with_its_reason_and_nothing_else_is():
    a, told = backend("a"), Told()
    pool = pool_of(a, fall=3, rise=2, on_change=told, clock=lambda: 1234.5)
    for passed in (True, False, False, True, False):
        pool.report(a, passed, "L7OK 200 in 1 ms" if passed else "L7STS 500")
    assert (told.changes, a.changed_at, a.check) == ([], None, "L7STS 500")
    for passed in (False, False, False, True, True, True):
        pool.report(a, passed, "L7OK 200 in 1 ms" if passed else "L4CON refused")
    assert told.changes == [("a", "DOWN", "L4CON refused, 3rd failure"), ("a", "UP", "L7OK 200 in 1 ms")]
    assert (a.changed_at, a.check) == (1234.5, "L7OK 200 in 1 ms")


def test_who_comes_down_gets_no_work_and_who_comes_back_does():
    a, b = backend("a"), backend("b")
    pool = pool_of(a, b)
    fail(pool, a)
    assert leased(pool, 3) == "bbb"
    pass_(pool, a)
    assert Counter(leased(pool, 10)) == {"a": 5, "b": 5}


@pytest.mark.parametrize("word", [Admin.DRAIN, Admin.MAINT])
def test_an_operator_takes_a_backend_out_and_it_keeps_what_it_has(word):
    a, b, told = backend("a"), backend("b"), Told()
    pool = pool_of(a, b, on_change=told)
    assert leased(pool) == "a"
    pool.set_admin(a, word, "an operator")
    pool.set_admin(a, word, "an operator")
    assert leased(pool, 2) == "bb"
    assert a.active == 1
    pool.set_admin(a, Admin.READY, "an operator")
    assert "a" in leased(pool, 2)
    assert told.changes == [
        ("a", word.name, f"set to {word.value} by an operator"),
        ("a", "UP", "set to ready by an operator"),
    ]


def test_the_listener_may_call_the_pool():
    """It is told after the lock was let go."""
    a, b = backend("a"), backend("b")
    leases = []
    pool = pool_of(a, b, on_change=lambda one, reason: leases.append(leased(pool)))
    done = threading.Thread(target=lambda: (fail(pool, a), pool.set_admin(b, Admin.MAINT, "a test")), daemon=True)
    done.start()
    done.join(PATIENCE)
    assert not done.is_alive()
    assert leases == ["b", "-"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (10, "10th"), (11, "11th"), (12, "12th"), (13, "13th"),
     (21, "21st"), (22, "22nd"), (101, "101st"), (111, "111th"), (1012, "1012th")],
)  # fmt: skip
def test_ordinals(number, text):
    assert ordinal(number) == text


# Another configuration --------------------------------------------------------------------------------------------


def server(number: int, **settings) -> Server:
    return Server(str(number), "127.0.0.1", 8000 + number, **settings)


def started_with(*servers: Server, **options) -> Pool:
    return Pool([Backend(one) for one in servers], options.pop("picker", None) or RoundRobin(), **options)


def test_who_stays_is_the_same_backend_with_all_that_is_known_of_it():
    pool = started_with(server(1), server(2))
    one, two = pool.backends
    pool.lease("127.0.0.1")
    fail(pool, two)
    added, left = pool.replace([server(2, weight=5), server(1, max_connections=7)])
    assert (list(added), list(left)) == ([], [])
    assert pool.backends[0] is two
    assert pool.backends[1] is one
    assert (two.healthy, two.weight, one.active, one.max_connections) == (False, 5, 1, 7)


def test_it_is_the_address_that_makes_it_the_same():
    pool = started_with(server(1))
    [one] = pool.backends
    pool.replace([Server("blue", "127.0.0.1", 8001)])
    assert pool.backends == (one,)
    assert one.id == "blue"


def test_one_that_is_added_is_down_until_its_first_probe_has_passed():
    """HAProxy's `init-state down` for servers that come later: nobody knows yet whether it answers."""
    pool = started_with(server(1))
    [added], _ = pool.replace([server(1), server(2)])
    assert (added.id, added.status) == ("2", "DOWN")
    assert leased(pool, 4) == "1111"
    pool.report(added, True, "L7OK 200 in 1 ms")
    assert "2" in leased(pool, 2), "one good probe is enough"


def test_one_that_leaves_gets_no_work_and_is_gone_with_the_last_that_it_has():
    told: list[str] = []
    pool = started_with(server(1), server(2), on_left=lambda backend: told.append(backend.id))
    two = pool.backends[1]
    assert leased(pool, 4) == "1212"
    _, left = pool.replace([server(1)])
    assert (list(left), list(pool.leaving), two.status, two.eligible) == ([two], [two], "DRAIN", False)
    assert leased(pool, 3) == "111"
    pool.release(two)
    assert (list(pool.leaving), told) == ([two], [])
    pool.release(two)
    assert (list(pool.leaving), told) == ([], ["2"])
    assert pool.in_hand == 5


def test_one_that_leaves_idle_is_gone_at_once():
    told: list[str] = []
    pool = started_with(server(1), server(2), on_left=lambda backend: told.append(backend.id))
    pool.replace([server(1)])
    assert (list(pool.leaving), told) == ([], ["2"])


def test_what_it_has_counted_stays_in_the_sums():
    pool = started_with(server(1), server(2))
    pool.backends[1].tally.add(200, 5, 7, 0.1)
    pool.replace([server(1)])
    assert (pool.departed.responses[2], pool.departed.octets_out) == (1, 7)


def test_a_probe_that_ends_late_brings_back_nobody_who_left():
    pool = started_with(server(1), server(2))
    two = pool.backends[1]
    leased(pool, 2)
    fail(pool, two)
    pool.replace([server(1)])
    pool.report(two, True, "L7OK 200 in 1 ms")
    assert two.status == "DRAIN"
    assert not two.healthy


def test_one_that_returns_while_it_drains_is_the_same_and_is_probed_first():
    pool = started_with(server(1), server(2))
    two = pool.backends[1]
    leased(pool, 2)
    pool.replace([server(1)])
    [added], _ = pool.replace([server(1), server(2)])
    assert added is two
    assert (list(pool.leaving), two.status, two.active) == ([], "DOWN", 1)
    pool.report(two, True, "L7OK 200 in 1 ms")
    pool.release(two)
    assert (two.status, two.active) == ("UP", 0)


def test_an_operators_word_outlives_a_reload():
    pool = started_with(server(1), server(2))
    pool.set_admin(pool.backends[0], Admin.MAINT, "me")
    pool.replace([server(1, weight=3), server(2), server(3)])
    assert pool.backends[0].status == "MAINT"


@pytest.mark.parametrize("others", [[], [4], [4, 5]])
def test_round_robin_goes_on_where_it_was(others):
    """However often the set is replaced, and whoever comes and goes beside them, those that stay take strict turns."""
    pool = started_with(server(1), server(2), server(3))
    seen = ""
    for number in range(40):
        pool.replace([server(1), server(2), server(3), *(server(other) for other in others if number % 2)])
        for backend in pool.backends:
            if not backend.healthy:
                pool.report(backend, True, "L4OK in 0 ms")
        seen += leased(pool, 2)
    seen = seen.replace("4", "").replace("5", "")
    assert seen == ("123" * len(seen))[: len(seen)]


def test_another_policy_and_other_counts_apply_from_the_next_time():
    pool = started_with(server(1), server(2))
    assert leased(pool, 2) == "12"
    pool.configure(picker=First(), fall=1)
    assert leased(pool, 2) == "11"
    pool.report(pool.backends[1], True, "L4OK in 0 ms")
    pool.report(pool.backends[1], False, "L4CON refused")
    assert pool.backends[1].status == "DOWN"


def test_a_limit_that_is_raised_makes_room_at_once():
    pool = started_with(server(1, max_connections=1))
    assert leased(pool, 2) == "1-"
    pool.replace([server(1, max_connections=2)])
    assert leased(pool, 2) == "1-"


def test_standings_are_one_object_until_something_changes():
    pool = started_with(server(1, max_connections=2), server(2))
    first = pool.standings()
    leased(pool, 2)
    assert pool.standings() is first
    leased(pool, 2)
    assert pool.standings() is not first, "one is full"
    second = pool.standings()
    fail(pool, pool.backends[1])
    assert [one.status for one in pool.standings()] == ["UP", "DOWN"]
    assert [one.status for one in second] == ["UP", "UP"]


def test_downtime_is_counted_when_it_is_over():
    now = [1000.0]
    pool = started_with(server(1), clock=lambda: now[0])
    [one] = pool.backends
    fail(pool, one)
    now[0] += 12
    assert one.tally.downtime == 0
    pass_(pool, one)
    assert (one.tally.up_down, one.tally.downtime) == (1, 12)
