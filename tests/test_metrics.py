"""Counts, the last minutes of them, and Prometheus's text."""

from __future__ import annotations

import math
import random
import sys
import threading
import time

import pytest

from balancer.metrics import (
    BOUNDS,
    NOTHING,
    POINTS,
    STEP,
    Exposition,
    History,
    Lately,
    Tally,
    labels,
    percentile,
)
from conftest import PATIENCE


@pytest.fixture
def parsed():
    """An independent parser of Prometheus's text: the samples of each family by its name."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")

    def parse(text: object) -> dict:
        return {family.name: family for family in parser.text_string_to_metric_families(str(text))}

    return parse


# Tally ------------------------------------------------------------------------------------------------------------


def fields(tally: Tally) -> dict[str, object]:
    return {name: getattr(tally, name) for name in Tally.__slots__}


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0), (0.0005, 0), (0.00051, 1), (0.001, 1), (1.0, 10), (60.0, 15), (60.1, 16), (1e9, 16)],
)
def test_an_exchange_falls_into_the_bucket_whose_bound_it_does_not_exceed(seconds, bucket):
    """Prometheus: `le` is an inclusive bound."""
    tally = Tally()
    tally.add(200, 0, 0, seconds)
    assert tally.buckets.index(1) == bucket
    assert sum(tally.buckets) == 1


def test_what_an_exchange_adds():
    tally = Tally()
    tally.add(204, 10, 200, 0.25)
    tally.add(404, 0, 30, 0.5)
    tally.add(0, 1, 0, 1.0, "CH")
    assert tally.responses == [1, 0, 1, 0, 1, 0]
    assert (tally.octets_in, tally.octets_out, tally.seconds) == (11, 230, 1.75)
    assert (tally.requests, tally.errors) == (3, 0)


@pytest.mark.parametrize(
    ("status", "code", "errors", "response_errors"),
    [
        (200, "--", 0, 0),
        (500, "--", 1, 0),  # the backend's own
        (502, "SH", 1, 1),
        (502, "PH", 1, 1),
        (504, "sH", 1, 1),
        (503, "SC", 1, 0),
        (200, "SD", 1, 1),  # the answer was cut
        (0, "SD", 1, 1),  # a TCP connection that the backend reset
        (101, "KD", 1, 0),  # cut by a stop
        (400, "PR", 0, 0),
        (408, "cR", 0, 0),
        (200, "CD", 0, 0),  # the client went away
        (0, "CH", 0, 0),
        (0, "cD", 0, 0),
    ],
)
def test_errors_are_what_went_wrong_through_no_fault_of_the_clients(status, code, errors, response_errors):
    tally = Tally()
    tally.add(status, 0, 0, 0.1, code)
    assert (tally.errors, tally.response_errors) == (errors, response_errors)


def test_merging_adds_every_field():
    one, other = Tally(), Tally()
    for number, name in enumerate(Tally.__slots__, start=1):
        if isinstance(getattr(other, name), list):
            setattr(other, name, [number] * len(getattr(other, name)))
        else:
            setattr(other, name, number)
    one.merge(other)
    assert fields(one) == fields(other)
    one.merge(other)
    assert one.octets_in == 2 * other.octets_in
    assert one.buckets == [2 * count for count in other.buckets]
    assert one.buckets is not other.buckets


def test_counting_costs_a_small_part_of_what_a_request_costs():
    """65,000 requests a second leave 15 us for each; the bound leaves room for a machine that is busy otherwise."""
    tally = Tally()
    count = 20_000

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(count):
            tally.add(200, 0, 34, 0.0007, "--")
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) / count < 3e-6


# Percentiles ------------------------------------------------------------------------------------------------------


def test_no_exchanges_have_no_percentile():
    assert percentile(Tally().buckets, 0.5) is None


def test_within_a_bucket_exchanges_are_spread_evenly():
    tally = Tally()
    for _ in range(4):
        tally.add(200, 0, 0, 0.03)  # in the bucket from 20 to 50 ms
    assert percentile(tally.buckets, 0.5) == pytest.approx(0.035)
    assert percentile(tally.buckets, 1.0) == pytest.approx(0.05)


def test_beyond_the_last_bound_that_bound_is_told():
    """As Prometheus's histogram_quantile does."""
    tally = Tally()
    tally.add(200, 0, 0, 4000.0)
    assert percentile(tally.buckets, 0.99) == BOUNDS[-1]


@pytest.mark.parametrize("seed", range(20))
def test_a_percentile_lies_in_the_bucket_of_the_true_one(seed):
    """Brute force: sort all the times, and take the one at that place."""
    chance = random.Random(seed)
    times = [chance.lognormvariate(-4, 2) for _ in range(chance.randrange(1, 400))]
    tally = Tally()
    for seconds in times:
        tally.add(200, 0, 0, seconds)
    times.sort()
    for share in (0.01, 0.25, 0.5, 0.9, 0.99, 1.0):
        true = min(times[math.ceil(share * len(times)) - 1], BOUNDS[-1])
        lower = max((bound for bound in BOUNDS if bound < true), default=0.0)
        upper = min(bound for bound in BOUNDS if bound >= true)
        found = percentile(tally.buckets, share)
        assert found is not None
        assert lower <= found <= upper, (share, true)


# History ----------------------------------------------------------------------------------------------------------


class Watched:
    """A history, the tallies it is shown, and the clock."""

    def __init__(self, *keys: str) -> None:
        self.now = 1000.0
        self.history = History(self.now)
        self.tallies = {key: Tally() for key in keys}
        self.sample(0.0)

    def sample(self, after: float = 1.0) -> None:
        self.now += after
        self.history.sample(self.now, self.tallies.values())

    def lately(self, key: str) -> Lately:
        return self.history.lately(self.tallies[key])

    def seconds(self, count: int, **requests: int) -> None:
        """So many seconds, in each of which each key has so many requests of 30 ms."""
        for _ in range(count):
            for key, number in requests.items():
                for _ in range(number):
                    self.tallies[key].add(200, 2, 100, 0.03)
            self.sample()


def test_rates_are_those_of_the_last_five_seconds():
    watched = Watched("a")
    watched.seconds(20, a=50)
    watched.seconds(5, a=10)
    lately = watched.lately("a")
    assert lately.requests_per_s == pytest.approx(10)
    assert (lately.octets_in_per_s, lately.octets_out_per_s) == (pytest.approx(20), pytest.approx(1000))
    watched.seconds(5)
    assert watched.lately("a").requests_per_s == 0


def test_a_rate_is_there_after_the_first_second():
    watched = Watched("a")
    watched.seconds(1, a=7)
    assert watched.lately("a").requests_per_s == pytest.approx(7)


def test_a_rate_is_right_however_late_the_samples_are():
    watched = Watched("a")
    for pause in (0.5, 3.0, 1.0, 0.25, 1.75):
        for _ in range(int(pause * 100)):
            watched.tallies["a"].add(200, 0, 0, 0.001)
        watched.sample(pause)
    assert watched.lately("a").requests_per_s == pytest.approx(100)


def test_errors_have_a_rate_of_their_own():
    watched = Watched("a")
    for _ in range(5):
        watched.tallies["a"].add(503, 0, 0, 0.001, "SC")
        watched.tallies["a"].add(200, 0, 0, 0.001, "SD")
        watched.tallies["a"].add(200, 0, 0, 0.001)
        watched.sample()
    assert watched.lately("a").errors_per_s == pytest.approx(2)
    assert watched.lately("a").errors[-1] == pytest.approx(2)
    assert watched.lately("a").requests[-1] == pytest.approx(3)


def test_what_is_not_known_did_nothing():
    watched = Watched("a")
    assert watched.history.lately(Tally()) is NOTHING
    assert watched.lately("a") == NOTHING._replace(
        latency=[None, None, None], requests=[0.0] * POINTS, errors=[0.0] * POINTS
    )


def test_a_series_has_a_point_for_each_five_seconds_of_the_last_five_minutes():
    watched = Watched("a")
    assert POINTS * STEP == 300
    watched.seconds(5, a=4)
    watched.seconds(5, a=2)
    watched.seconds(3, a=9)  # a step that is not over
    series = watched.lately("a").requests
    assert len(series) == POINTS
    assert series[-3:] == [0.0, 4.0, 2.0]
    watched.seconds(305)
    assert watched.lately("a").requests == [0.0] * POINTS


def test_the_points_of_a_series_keep_to_their_steps_when_samples_come_late():
    """Samples 1.1 s apart see the end of a step up to 1.1 s late, which must not add up."""
    watched = Watched("a")
    for _ in range(273):  # 300.3 s
        for _ in range(11):
            watched.tallies["a"].add(200, 0, 0, 0.001)
        watched.sample(1.1)
    series = watched.lately("a").requests
    assert 0.0 not in series
    assert all(point == pytest.approx(10, rel=0.01) for point in series)


def test_a_time_without_samples_is_filled_with_its_average():
    """A process that was stopped (SIGSTOP, a busy machine) samples late."""
    watched = Watched("a")
    watched.seconds(5, a=1)
    for _ in range(100):
        watched.tallies["a"].add(200, 0, 0, 0.03)
    watched.sample(20.0)
    assert watched.lately("a").requests[-6:] == [0.0, 1.0, 5.0, 5.0, 5.0, 5.0]
    assert watched.lately("a").latency[0] == pytest.approx(0.035, rel=0.01)
    watched.sample(1e6)
    assert watched.lately("a").requests == [0.0] * POINTS


def test_percentiles_are_those_of_the_last_minute():
    watched = Watched("a")
    for _ in range(100):
        watched.tallies["a"].add(200, 0, 0, 3.0)
    watched.seconds(60, a=1)
    before = watched.lately("a").latency
    watched.seconds(10, a=1)
    after = watched.lately("a").latency
    assert before[0] is not None
    assert before[0] > 2.0
    assert after == [pytest.approx(0.035), pytest.approx(0.047), pytest.approx(0.0497)]
    watched.seconds(70)
    assert watched.lately("a").latency == [None, None, None]


def test_the_whole_is_the_sum_of_all():
    watched = Watched("a", "b")
    watched.seconds(10, a=3, b=5)
    whole = watched.history.whole()
    assert whole.requests_per_s == pytest.approx(8)
    assert whole.requests[-2:] == [8.0, 8.0]
    assert whole.latency[0] == pytest.approx(0.035)


def test_what_has_gone_is_forgotten_but_stays_in_the_whole():
    watched = Watched("a", "b")
    watched.seconds(10, a=3, b=5)
    gone = watched.tallies.pop("b")
    watched.seconds(5, a=3)
    assert watched.history.lately(gone) is NOTHING
    assert watched.history.whole().requests[-3:] == [8.0, 8.0, 3.0]
    assert watched.history.whole().requests_per_s == pytest.approx(3)


def test_what_was_counted_before_the_first_sample_is_no_burst():
    """A backend that was away for a while and returns has its counts with it."""
    watched = Watched("a")
    watched.tallies["b"] = Tally()
    for _ in range(1000):
        watched.tallies["b"].add(200, 0, 0, 0.03)
    watched.sample()
    watched.seconds(5, b=2)
    assert watched.lately("b").requests_per_s == pytest.approx(2)
    assert max(watched.history.whole().requests) < 3
    assert watched.history.whole().requests_per_s == pytest.approx(2)


def test_reading_while_another_thread_counts_and_samples_raises_nothing():
    watched = Watched(*"abcdefgh")
    all_of_them = list(watched.tallies.values())
    ended = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for round_ in range(300):
                for tally in watched.tallies.values():
                    tally.add(200, 1, 1, 0.01)
                watched.tallies = dict(list(watched.tallies.items())[: 4 + round_ % 5])
                watched.tallies.setdefault(str(round_), Tally())
                watched.sample(1.0)
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    worker = threading.Thread(target=work, name="sampler")
    worker.start()
    try:
        while not ended.is_set():
            for tally in all_of_them:
                assert len(watched.history.lately(tally).requests) == POINTS
            assert watched.history.whole().requests_per_s >= 0
    finally:
        worker.join(PATIENCE)
        sys.setswitchinterval(interval)
    assert failures == []


def test_a_thousand_tallies_are_sampled_quickly():
    """Once a second on a thread of the balancer's, it must leave the reactor in peace; measured: 5 ms, when idle 1."""
    watched = Watched(*map(str, range(1000)))

    def cost() -> float:
        for tally in watched.tallies.values():
            tally.add(200, 1, 1, 0.01)
        began = time.perf_counter()
        watched.sample()
        return time.perf_counter() - began

    assert min(cost() for _ in range(5)) < 0.1


# Exposition -------------------------------------------------------------------------------------------------------


def test_a_family_as_it_is_written():
    text = Exposition()
    text.counter("lb_things_total", "Things.", [(labels(kind="a", server="1"), 3), (labels(kind="b", server="1"), 4)])
    text.gauge("lb_level", "Level.", [("", 0.5)])
    assert str(text) == (
        "# HELP lb_things_total Things.\n"
        "# TYPE lb_things_total counter\n"
        'lb_things_total{kind="a",server="1"} 3\n'
        'lb_things_total{kind="b",server="1"} 4\n'
        "# HELP lb_level Level.\n"
        "# TYPE lb_level gauge\n"
        "lb_level 0.5\n"
    )


@pytest.mark.parametrize(
    "value",
    ["plain", 'a"b', "back\\slash", "line\nfeed", "\\n", '\\"', "ü€😀", "{a},=", "#", "\\", '"'],
)
def test_any_label_comes_back_as_it_was(parsed, value):
    text = Exposition()
    text.gauge("lb_level", "Level.", [(labels(server=value), 1)])
    [sample] = parsed(text)["lb_level"].samples
    assert sample.labels == {"server": value}


@pytest.mark.parametrize("help_", ["two\nlines", "back\\slash", 'a "quote"', "\\n"])
def test_any_help_comes_back_as_it_was(parsed, help_):
    text = Exposition()
    text.gauge("lb_level", help_, [("", 1)])
    assert parsed(text)["lb_level"].documentation == help_


@pytest.mark.parametrize(
    "value", [0, 1, 2**63, -5, 0.0, 1e-9, 123456789.123456, 1e300, math.inf, -math.inf, True, False]
)
def test_any_number_comes_back_as_it_was(parsed, value):
    text = Exposition()
    text.gauge("lb_level", "Level.", [("", value)])
    [sample] = parsed(text)["lb_level"].samples
    assert sample.value == value


def test_no_number_is_nan(parsed):
    text = Exposition()
    text.gauge("lb_level", "Level.", [("", math.nan)])
    assert "lb_level NaN\n" in str(text)
    assert math.isnan(parsed(text)["lb_level"].samples[0].value)


@pytest.mark.parametrize("at", ["", labels(server="b1")], ids=["without labels", "with labels"])
def test_a_histogram_is_cumulative_and_its_last_bucket_is_the_count(parsed, at):
    tally = Tally()
    for seconds in (0.0001, 0.004, 0.004, 7.0, 100.0):
        tally.add(200, 0, 0, seconds)
    text = Exposition()
    text.histogram("lb_request_duration_seconds", "Seconds.", [(at, tally.buckets, tally.seconds)])
    family = parsed(text)["lb_request_duration_seconds"]
    assert family.type == "histogram"
    buckets = {sample.labels["le"]: sample.value for sample in family.samples if sample.name.endswith("_bucket")}
    assert [float(bound) for bound in buckets] == [*BOUNDS, math.inf]
    assert (buckets["0.0005"], buckets["0.005"], buckets["10"], buckets["+Inf"]) == (1, 3, 4, 5)
    assert list(buckets.values()) == sorted(buckets.values())
    rest = {sample.name: sample.value for sample in family.samples if "le" not in sample.labels}
    assert rest == {
        "lb_request_duration_seconds_sum": pytest.approx(107.0081),
        "lb_request_duration_seconds_count": 5,
    }
    assert all(sample.labels.get("server", "b1") == "b1" for sample in family.samples)
