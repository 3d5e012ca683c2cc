"""What the balancer tells of itself: the API's objects, and Prometheus's text."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from balancer.backend import Admin, Backend
from balancer.config import Config, Limits, Log, Server
from balancer.metrics import POINTS, Tally
from balancer.pickers import RoundRobin
from balancer.pool import Pool
from balancer.status import Status
from balancer.version import __version__
from conftest import PATIENCE

EPOCH = 1_790_000_000.0


class World:
    """A balancer that only its figures are there of, with the clocks in the hand; the pool is a real one."""

    def __init__(self, *servers: Server, mode: str = "http", **config) -> None:
        self.now = 0.0
        self.config = Config(servers, mode=mode, log=Log(file="lb.log"), **config)
        self.mode = mode
        self.pool = Pool(map(Backend, servers), RoundRobin(), rise=1, fall=1, clock=self.clock)
        self.upstreams = SimpleNamespace(waiting=0, idle=0)
        self.listener = SimpleNamespace(sessions=set(), most=1000, accepted=0)
        self.url = f"{mode}://127.0.0.1:8080"
        self.config_error: str | None = None
        self.restart_needed: tuple[str, ...] = ()
        self.draining = False
        self.front = SimpleNamespace(tally=Tally())
        self.recorded: list[tuple[float, str, str]] = []
        self.scaled: dict | None = None
        self.status = Status(
            self,
            self.front,
            SimpleNamespace(latest_events=lambda: list(self.recorded)),
            can_change=True,
            scaling=lambda: self.scaled,
            clock=self.clock,
            ticks=lambda: self.now,
        )
        self.status.sample()

    def clock(self) -> float:
        return EPOCH + self.now

    def __getitem__(self, backend_id: str) -> Backend:
        [found] = [one for one in (*self.pool.backends, *self.pool.leaving) if one.id == backend_id]
        return found

    def pass_time(self, seconds: float) -> None:
        """Second by second, as the balancer has it sampled."""
        for _ in range(int(seconds)):
            self.now += 1.0
            self.status.sample()

    def exchange(self, backend_id: str = "", status: int = 200, code: str = "--", seconds: float = 0.03) -> None:
        """One that has ended, at a backend or with a refusal."""
        tally = self[backend_id].tally if backend_id else self.front.tally
        if backend_id:
            leased = self.pool.lease("127.0.0.1", [one for one in self.pool.backends if one.id != backend_id])
            assert leased is self[backend_id]
        tally.add(status, 10, 100, seconds, code)
        if backend_id:
            self.pool.release(self[backend_id])


def server(name: str, port: int = 8001, **settings) -> Server:
    return Server(name, "127.0.0.1", port, **settings)


@pytest.fixture
def world() -> World:
    return World(server("b1", 8001), server("b2", 8002, weight=3, max_connections=50), limits=Limits(queue=77))


class Scrape:
    """Prometheus's text, read by an independent parser."""

    def __init__(self, text: str) -> None:
        parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
        self.families = list(parser.text_string_to_metric_families(text))
        self.samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }
        self.count = sum(len(family.samples) for family in self.families)

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[(name, *sorted(labels.items()))]

    def of_server(self, name: str, server: str, **labels: str) -> float:
        return self(f"haproxy_server_{name}", proxy="servers", server=server, **labels)

    def of_backend(self, name: str, **labels: str) -> float:
        return self(f"haproxy_backend_{name}", proxy="servers", **labels)

    def of_frontend(self, name: str, **labels: str) -> float:
        return self(f"haproxy_frontend_{name}", proxy="lb", **labels)


def scrape(world: World) -> Scrape:
    return Scrape(world.status.prometheus())


# The API's objects ------------------------------------------------------------------------------------------------


def test_the_whole_as_the_api_tells_it(world):
    world.listener.sessions |= {1, 2, 3}
    world.listener.accepted = 40
    world.upstreams.waiting = 4
    world.upstreams.idle = 5
    world.scaled = {"min": 1}
    world.restart_needed = ("listen: takes a restart",)
    leased = world.pool.lease("127.0.0.1")
    world.pass_time(2)
    told = world.status.status()
    backends = told.pop("backends")
    assert [one["id"] for one in backends] == ["b1", "b2"]
    assert told == {
        "version": __version__,
        "url": "http://127.0.0.1:8080",
        "mode": "http",
        "algorithm": "round_robin",
        "source": "command line",
        "state": "serving",
        "started_at": EPOCH,
        "uptime_s": 2.0,
        "can_change": True,
        "log": "lb.log",
        "config_error": None,
        "restart_needed": ["listen: takes a restart"],
        "connections": {"current": 3, "limit": 1000, "total": 40},
        "active": 1,
        "queue": 4,
        "idle_upstreams": 5,
        "requests_total": 0,
        "requests_per_s": 0.0,
        "errors_total": 0,
        "errors_per_s": 0.0,
        "octets_in_total": 0,
        "octets_out_total": 0,
        "octets_in_per_s": 0,
        "octets_out_per_s": 0,
        "responses": {"none": 0, "1xx": 0, "2xx": 0, "3xx": 0, "4xx": 0, "5xx": 0},
        "latency_ms": {"p50": None, "p90": None, "p99": None},
        "history": {"step_s": 5.0, "requests_per_s": [0.0] * POINTS, "errors_per_s": [0.0] * POINTS},
        "warnings": [],
        "scaling": {"min": 1},
    }
    world.pool.release(leased)


def test_a_backend_as_the_api_tells_it(world):
    backend = world["b2"]
    world.pool.report(backend, False, "L7STS 500")
    world.pass_time(10)
    world.pool.report(backend, True, "L7OK 200 in 3 ms")
    world.pool.set_admin(backend, Admin.DRAIN, "a test")
    backend.answered_in(0.0123, 1.0)
    backend.idle.append("a connection")
    backend.tally.connect_errors = 4
    told = world.status.backend("b2")
    assert told == {
        "id": "b2",
        "host": "127.0.0.1",
        "port": 8002,
        "address": "127.0.0.1:8002",
        "weight": 3,
        "backup": False,
        "max_connections": 50,
        "state": "DRAIN",
        "admin": "drain",
        "healthy": True,
        "check": "L7OK 200 in 3 ms",
        "changed_at": EPOCH + 10,
        "leaving": False,
        "scaled": False,
        "active": 0,
        "idle": 1,
        "sessions_total": 0,
        "requests_total": 0,
        "requests_per_s": 0.0,
        "errors_total": 0,
        "errors_per_s": 0.0,
        "octets_in_total": 0,
        "octets_out_total": 0,
        "responses": {"none": 0, "1xx": 0, "2xx": 0, "3xx": 0, "4xx": 0, "5xx": 0},
        "latency_ms": {"p50": None, "p90": None, "p99": None},
        "average_ms": 12.3,
        "connect_errors_total": 4,
        "response_errors_total": 0,
        "retries_total": 0,
        "redispatches_total": 0,
        "check_failures_total": 1,
        "up_down_total": 1,
        "downtime_s": 10.0,
        "history": {"requests_per_s": [0.0] * POINTS, "errors_per_s": [0.0] * POINTS},
    }
    assert world.status.backends()[1] == told
    assert world.status.backend("b3") is None


def test_everything_told_is_json(world):
    world.exchange("b1")
    world.pass_time(7)
    world.recorded.append((EPOCH, "info", "start"))
    told = [world.status.status(), world.status.backends(), world.status.backend("b1"), world.status.events()]
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_counts_rates_and_percentiles_are_those_of_what_happened(world):
    for _ in range(10):
        for _ in range(6):
            world.exchange("b1", seconds=0.03)
        world.exchange("b2", 500, seconds=0.3)
        world.exchange("", 503, "SC", seconds=0.0001)
        world.pass_time(1)
    told = world.status.status()
    assert told["requests_total"] == 80
    assert told["errors_total"] == 20
    assert told["responses"] == {"none": 0, "1xx": 0, "2xx": 60, "3xx": 0, "4xx": 0, "5xx": 20}
    assert (told["octets_in_total"], told["octets_out_total"]) == (800, 8000)
    assert (told["requests_per_s"], told["errors_per_s"]) == (8.0, 2.0)
    assert (told["octets_in_per_s"], told["octets_out_per_s"]) == (80, 800)
    assert told["latency_ms"]["p50"] == pytest.approx(35)
    assert told["history"]["requests_per_s"][-2:] == [8.0, 8.0]
    assert told["history"]["errors_per_s"][-2:] == [2.0, 2.0]
    b1, b2 = told["backends"]
    assert (b1["requests_total"], b1["requests_per_s"], b1["errors_total"], b1["sessions_total"]) == (60, 6.0, 0, 60)
    assert (b2["requests_total"], b2["requests_per_s"], b2["errors_total"], b2["errors_per_s"]) == (10, 1.0, 10, 1.0)
    assert b2["latency_ms"]["p99"] == pytest.approx(497, abs=1)
    assert b1["history"]["requests_per_s"][-1] == 6.0


def test_latency_is_unknown_again_when_nothing_happened_for_a_minute(world):
    world.exchange("b1")
    world.pass_time(5)
    assert world.status.status()["latency_ms"]["p50"] is not None
    world.pass_time(65)
    assert world.status.status()["latency_ms"] == {"p50": None, "p90": None, "p99": None}


def test_it_samples_once_a_second_however_often_it_is_asked_to(world):
    """http.server calls service_actions after each request, too."""
    for _ in range(10):
        world.exchange("b1")
        for _ in range(10):
            world.now += 0.1
            world.status.sample()
    assert world.status.status()["requests_per_s"] == pytest.approx(1.0, abs=0.2)


def test_a_drain_and_a_configuration_with_a_mistake_are_told(world):
    world.draining = True
    world.config_error = "servers.json: servers[0].port: must be 1 to 65535, not 0"
    told = world.status.status()
    assert told["state"] == "draining"
    assert told["config_error"] == world.config_error


def test_events_are_told_as_they_were_logged(world):
    world.recorded += [(EPOCH + 0.12345, "info", "start"), (EPOCH + 1, "warning", "backend b1 is DOWN")]
    assert world.status.events() == [
        {"at": EPOCH + 0.123, "level": "info", "text": "start"},
        {"at": EPOCH + 1, "level": "warning", "text": "backend b1 is DOWN"},
    ]


def test_what_still_goes_on_counts_as_downtime(world):
    world.pool.report(world["b1"], False, "L4CON refused")
    world.pass_time(7)
    assert world.status.backend("b1")["downtime_s"] == 7.0
    world.pool.report(world["b1"], True, "L4OK in 0 ms")
    world.pass_time(7)
    assert world.status.backend("b1")["downtime_s"] == 7.0


def test_a_backend_that_leaves_is_told_of_until_its_work_has_ended(world):
    leased = world.pool.lease("127.0.0.1")
    name = leased.id
    other = "b2" if name == "b1" else "b1"
    world.pool.replace([entry for entry in world.config.servers if entry.id == other])
    told = world.status.backends()
    assert [(one["id"], one["state"], one["leaving"]) for one in told] == [(other, "UP", False), (name, "DRAIN", True)]
    assert world.status.backend(name)["active"] == 1
    world.pool.release(leased)
    assert world.status.backend(name) is None


def test_an_id_is_the_configured_ones_while_another_with_it_leaves(world):
    """The entry b1 got another port: at that address it is another backend."""
    leased = [world.pool.lease("127.0.0.1") for _ in range(4)]
    world.pool.replace([server("b1", 9001), server("b2", 8002)])
    assert world.status.backend("b1")["port"] == 9001
    assert [one["port"] for one in world.status.backends()] == [9001, 8002, 8001]
    found = scrape(world)
    assert found.count == len(found.samples), "Prometheus refuses a text with a sample that comes twice"
    assert found.of_server("status", "b1", state="DOWN") == 1
    for one in leased:
        world.pool.release(one)


# Prometheus -------------------------------------------------------------------------------------------------------


def known_load(world: World) -> None:
    for status, count in ((200, 5), (301, 2), (404, 3), (500, 1)):
        for _ in range(count):
            world.exchange("b1", status, seconds=0.03)
    world.exchange("b2", 0, "CH", seconds=2.5)
    world.exchange("b2", 200, "SD", seconds=0.3)
    world.exchange("", 400, "PR", seconds=0.0001)
    world.exchange("", 408, "cR", seconds=10.0)
    world.exchange("", 503, "SC", seconds=5.0)


def test_metrics_have_the_true_counts_of_a_known_load(world):
    known_load(world)
    world.listener.accepted = 9
    world.listener.sessions |= {1, 2}
    found = scrape(world)
    responses = {"other": 1, "1xx": 0, "2xx": 6, "3xx": 2, "4xx": 5, "5xx": 2}
    assert {code: found.of_frontend("http_responses_total", code=code) for code in responses} == responses
    assert found.of_frontend("http_requests_total") == 16
    assert found.of_frontend("request_errors_total") == 2
    assert found.of_frontend("bytes_in_total") == 160
    assert found.of_frontend("bytes_out_total") == 1600
    assert found.of_frontend("connections_total") == 9
    assert found.of_frontend("current_sessions") == 2
    assert found.of_frontend("limit_sessions") == 1000
    assert found.of_frontend("denied_connections_total") == 0
    responses = {"other": 1, "1xx": 0, "2xx": 6, "3xx": 2, "4xx": 3, "5xx": 2}
    assert {code: found.of_backend("http_responses_total", code=code) for code in responses} == responses
    assert found.of_backend("http_requests_total") == 14
    assert found.of_backend("sessions_total") == 13
    assert found.of_backend("bytes_out_total") == 1300
    assert found.of_backend("response_errors_total") == 1
    assert found.of_server("http_responses_total", "b1", code="2xx") == 5
    assert found.of_server("http_responses_total", "b2", code="other") == 1
    assert found.of_server("sessions_total", "b1") == 11
    assert found.of_server("bytes_in_total", "b2") == 20
    assert found("lb_request_errors_total", server="b1") == 1
    assert found("lb_request_errors_total", server="b2") == 1
    assert found("lb_request_duration_seconds_count", server="b1") == 11
    assert found("lb_request_duration_seconds_sum", server="b2") == pytest.approx(2.8)
    assert found("lb_request_duration_seconds_bucket", server="b2", le="0.5") == 1
    assert found("lb_request_duration_seconds_bucket", server="b2", le="+Inf") == 2


def test_the_frontends_counts_and_the_apis_are_the_same(world):
    known_load(world)
    found, told = scrape(world), world.status.status()
    assert found.of_frontend("http_requests_total") == told["requests_total"]
    assert found.of_frontend("bytes_in_total") == told["octets_in_total"]
    assert found.of_frontend("bytes_out_total") == told["octets_out_total"]
    for kind, count in told["responses"].items():
        assert found.of_frontend("http_responses_total", code="other" if kind == "none" else kind) == count


def test_a_state_is_1_and_the_others_are_0(world):
    def states(name: str) -> dict[str, float]:
        found = scrape(world)
        return {state: found.of_server("status", name, state=state) for state in ("UP", "DOWN", "DRAIN", "MAINT")}

    assert states("b1") == {"UP": 1, "DOWN": 0, "DRAIN": 0, "MAINT": 0}
    world.pool.report(world["b1"], False, "L4CON refused")
    assert states("b1") == {"UP": 0, "DOWN": 1, "DRAIN": 0, "MAINT": 0}
    world.pool.set_admin(world["b1"], Admin.DRAIN, "a test")
    assert states("b1") == {"UP": 0, "DOWN": 0, "DRAIN": 1, "MAINT": 0}
    world.pool.set_admin(world["b1"], Admin.MAINT, "a test")
    assert states("b1") == {"UP": 0, "DOWN": 0, "DRAIN": 0, "MAINT": 1}
    assert states("b2") == {"UP": 1, "DOWN": 0, "DRAIN": 0, "MAINT": 0}


def test_what_a_server_is_at_the_moment(world):
    backend = world["b2"]
    backend.idle += [1, 2]
    leased = [world.pool.lease("127.0.0.1", [world["b1"]]) for _ in range(3)]
    backend.tally.connect_errors, backend.tally.response_errors = 1, 2
    backend.tally.retries, backend.tally.redispatches = 3, 4
    world.pass_time(20)
    world.pool.report(world["b1"], False, "L4CON refused")
    world.pass_time(5)
    found = scrape(world)
    assert found.of_server("current_sessions", "b2") == 3
    assert found.of_server("weight", "b2") == 3
    assert found.of_server("limit_sessions", "b2") == 50
    assert found.of_server("idle_connections_current", "b2") == 2
    assert found.of_server("current_queue", "b2") == 0
    assert found.of_server("connection_errors_total", "b2") == 1
    assert found.of_server("response_errors_total", "b2") == 2
    assert found.of_server("retry_warnings_total", "b2") == 3
    assert found.of_server("redispatch_warnings_total", "b2") == 4
    assert found.of_server("check_last_change_seconds", "b2") == 25
    assert found.of_server("check_last_change_seconds", "b1") == 5
    assert found.of_server("check_failures_total", "b1") == 1
    assert found.of_server("check_up_down_total", "b1") == 1
    assert found.of_server("downtime_seconds_total", "b1") == 5
    for one in leased:
        world.pool.release(one)


def test_no_limit_is_nan(world):
    """As HAProxy's exporter has it."""
    found = scrape(world)
    assert math.isnan(found.of_server("limit_sessions", "b1"))
    assert math.isnan(found.of_server("queue_limit", "b1"))
    assert math.isnan(found.of_backend("limit_sessions"))
    world.pool.replace([server("b1", 8001, max_connections=20), server("b2", 8002, max_connections=50)])
    assert scrape(world).of_backend("limit_sessions") == 70


def test_what_the_backend_as_a_whole_is_at_the_moment():
    world = World(
        server("b1", 8001, weight=2),
        server("b2", 8002, weight=3),
        server("b3", 8003, weight=4, backup=True),
        limits=Limits(queue=77),
    )
    leased = world.pool.lease("127.0.0.1")
    world.upstreams.waiting = 6
    found = scrape(world)
    assert (found.of_backend("active_servers"), found.of_backend("backup_servers")) == (2, 1)
    assert found.of_backend("weight") == 5
    assert found.of_backend("current_sessions") == 7
    assert (found.of_backend("current_queue"), found.of_backend("queue_limit")) == (6, 77)
    world.pool.set_admin(world["b1"], Admin.DRAIN, "a test")
    world.pool.report(world["b2"], False, "L4CON refused")
    found = scrape(world)
    assert (found.of_backend("active_servers"), found.of_backend("backup_servers")) == (0, 1)
    assert found.of_backend("weight") == 4
    assert found.of_backend("status", state="UP") == 1
    world.pool.release(leased)


def test_the_whole_is_down_when_the_last_server_is_and_not_before(world):
    """HAProxy's management guide, 9.1: chkdown and downtime of a backend are not the sums of its servers'."""
    world.pool.report(world["b1"], False, "L4CON refused")
    world.status.backend_changed()
    world.pass_time(10)
    found = scrape(world)
    assert (found.of_backend("status", state="UP"), found.of_backend("check_up_down_total")) == (1, 0)
    assert found.of_backend("downtime_seconds_total") == 0
    world.pool.report(world["b2"], False, "L4CON refused")
    world.status.backend_changed()
    world.pass_time(3)
    found = scrape(world)
    assert (found.of_backend("status", state="UP"), found.of_backend("status", state="DOWN")) == (0, 1)
    assert found.of_backend("check_up_down_total") == 1
    assert found.of_backend("downtime_seconds_total") == 3
    assert found.of_backend("check_last_change_seconds") == 3
    world.pool.report(world["b1"], True, "L4OK in 0 ms")
    world.status.backend_changed()
    world.pass_time(4)
    found = scrape(world)
    assert found.of_backend("status", state="UP") == 1
    assert found.of_backend("downtime_seconds_total") == 3
    assert found.of_backend("check_last_change_seconds") == 4
    assert found.of_backend("check_failures_total") == 2


def test_a_balancer_without_servers_is_up():
    """As HAProxy has it; ours has none while all scaled instances sleep."""
    found = scrape(World())
    assert found.of_backend("status", state="UP") == 1
    assert found.of_backend("active_servers") == 0


def test_what_the_process_tells(world):
    world.pass_time(12)
    found = scrape(world)
    assert found("haproxy_process_start_time_seconds") == EPOCH
    assert found("haproxy_process_uptime_seconds") == 12
    assert found("haproxy_process_build_info", version=__version__) == 1
    assert found("lb_config_last_reload_successful") == 1
    world.config_error = "servers.json: no such file"
    assert scrape(world)("lb_config_last_reload_successful") == 0


def test_no_count_goes_backwards_when_a_backend_leaves(world):
    known_load(world)
    leased = world.pool.lease("127.0.0.1", [world["b2"]])
    before = scrape(world)
    world.pool.replace([server("b2", 8002)])
    while_it_leaves = scrape(world)
    world.pool.release(leased)
    after = scrape(world)
    assert len(world.pool.leaving) == 0
    sums = [key for key in before.samples if key[0].endswith("_total") and "server" not in dict(key[1:])]
    assert len(sums) > 25
    for key in sums:
        assert before.samples[key] == while_it_leaves.samples[key] == after.samples[key], key
    assert ("haproxy_server_weight", ("proxy", "servers"), ("server", "b1")) not in after.samples


def test_a_backend_that_left_and_returns_is_not_counted_twice(world):
    known_load(world)
    before = scrape(world)
    world.pool.replace([server("b2", 8002)])
    world.pool.replace([server("b1", 8001), server("b2", 8002)])
    assert scrape(world).of_backend("http_requests_total") == before.of_backend("http_requests_total")


def test_tcp_mode_has_no_http_figures():
    """HAProxy has them for proxies in HTTP mode only."""
    world = World(server("b1"), mode="tcp")
    world["b1"].tally.add(0, 517, 34, 1.0)
    world["b1"].tally.add(0, 5, 3, 1.0, "SD")
    text = world.status.prometheus()
    assert "_http_" not in text
    found = Scrape(text)
    assert found.of_frontend("bytes_in_total") == 522
    assert found("lb_request_errors_total", server="b1") == 1
    assert found("lb_request_duration_seconds_count", server="b1") == 2
    assert world.status.status()["responses"]["none"] == 2


def test_an_id_may_have_any_character_that_the_configuration_allows():
    names = ['a"b', "back\\slash", "{x}", "ü,=", "\\n"]
    world = World(*(server(name, 8001 + place) for place, name in enumerate(names)))
    found = scrape(world)
    assert [found.of_server("weight", name) for name in names] == [1] * len(names)


SERVER = re.findall(
    r"\w+",
    """status weight current_sessions sessions_total bytes_in_total bytes_out_total connection_errors_total
    response_errors_total retry_warnings_total redispatch_warnings_total check_failures_total check_up_down_total
    check_last_change_seconds downtime_seconds_total http_responses_total current_queue queue_limit limit_sessions""",
)
FRONTEND = re.findall(
    r"\w+",
    """current_sessions connections_total http_requests_total http_responses_total bytes_in_total bytes_out_total
    denied_connections_total request_errors_total""",
)
PROMISED = {
    *(f"haproxy_server_{name}" for name in SERVER),
    *(f"haproxy_backend_{name}" for name in (*SERVER, "active_servers", "backup_servers")),
    *(f"haproxy_frontend_{name}" for name in FRONTEND),
    *(f"haproxy_process_{name}" for name in ("uptime_seconds", "start_time_seconds", "build_info")),
    "lb_request_duration_seconds",
}


def test_every_family_that_is_promised_is_there_once_and_explained(world):
    """CONVENTIONS.md, "Metrics". What ends in _total is a counter, and nothing else is; names are Prometheus's."""
    text = world.status.prometheus()
    types = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    names = [name for name, _ in types]
    assert set(names) >= PROMISED
    assert len(names) == len(set(names))
    for name, kind in types:
        expected = "counter" if name.endswith("_total") else "histogram" if "duration" in name else "gauge"
        assert kind == expected, name
        assert re.fullmatch(r"(haproxy|lb)_[a-z0-9_]+", name)
        assert re.search(rf"^# HELP {name} \S.{{5,}}$", text, re.MULTILINE), name
    found = Scrape(text)
    assert found.count == len(found.samples)
    assert {family.type for family in found.families} == {"counter", "gauge", "histogram"}


def test_everything_can_be_read_while_backends_come_go_and_count(world):
    """Other threads write all this without asking: a reader may be one behind, and nothing worse."""
    ended = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for round_ in range(150):
                names = [f"b{number}" for number in range(1, 3 + round_ % 5)]
                world.pool.replace([server(name, 8000 + place) for place, name in enumerate(names)])
                for backend in world.pool.backends:
                    world.pool.report(backend, round_ % 3 > 0, "a test")
                    backend.idle.append(round_)
                leased = [world.pool.lease("127.0.0.1") for _ in range(5)]
                for backend in filter(None, leased):
                    backend.tally.add(200, 1, 1, 0.01)
                    world.pool.release(backend)
                world.now += 1.0
                world.status.sample()
                world.status.backend_changed()
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    worker = threading.Thread(target=work, name="writer")
    worker.start()
    total = 0
    try:
        while not ended.is_set():
            text = world.status.prometheus()
            samples = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
            assert len(samples) == len(set(samples))
            told = world.status.status()
            json.dumps(told)
            assert told["requests_total"] >= total
            total = told["requests_total"]
    finally:
        worker.join(PATIENCE)
        sys.setswitchinterval(interval)
    assert failures == []
    found = re.search(r"^haproxy_backend_sessions_total\S* (\d+)$", world.status.prometheus(), re.MULTILINE)
    assert int(found[1]) == world.status.status()["requests_total"]


def test_a_thousand_backends_are_told_of_quickly():
    """The reactor shares the interpreter with it; measured: 20 ms each."""
    world = World(*(server(f"b{number}", 1024 + number) for number in range(1000)))
    for backend in world.pool.backends:
        backend.tally.add(200, 10, 100, 0.03)
    world.pass_time(6)

    def cost(work) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    assert min(cost(world.status.prometheus) for _ in range(3)) < 0.5
    assert min(cost(world.status.status) for _ in range(3)) < 0.5
