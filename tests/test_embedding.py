"""A balancer inside another program: what a test suite makes of it."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import ExitStack, closing

import pytest

from backend_server import Backend, serving
from balancer import LoadBalancer
from balancer.config import ConfigError
from balancer.embedding import Served
from conftest import PATIENCE, eventually

FAST = {"health_check": {"path": "/health", "interval": 0.05, "timeout": 1, "rise": 1, "fall": 1}}


@pytest.fixture
def three():
    with ExitStack() as stack:
        yield [stack.enter_context(serving(Backend(name=name))) for name in ("b1", "b2", "b3")]


def entries(backends) -> list[dict]:
    return [{"id": f"b{n}", "host": "127.0.0.1", "port": one.port} for n, one in enumerate(backends, 1)]


def get(lb: LoadBalancer, path: str = "/") -> tuple[int, str]:
    """The status, and who has answered."""
    with closing(http.client.HTTPConnection(lb.host, lb.port, timeout=PATIENCE)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return answer.status, answer.headers.get("X-Backend", "-")


def test_it_serves_from_entering_to_leaving(three):
    with LoadBalancer([f"127.0.0.1:{one.port}" for one in three]) as lb:
        with urllib.request.urlopen(lb.url, timeout=PATIENCE) as answer:
            assert answer.status == 200
        assert lb.states == {"1": "UP", "2": "UP", "3": "UP"}
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(lb.url, timeout=PATIENCE)


def test_it_remembers_what_it_has_served(three):
    with LoadBalancer(entries(three)) as lb:
        for path in ("/status/404", "/?a=b"):
            get(lb, path)
        served = lb.requests
    assert [(one.method, one.path, one.status, one.backend, one.code, one.tries) for one in served] == [
        ("GET", "/status/404", 404, "b1", "--", 1),
        ("GET", "/?a=b", 200, "b2", "--", 1),
    ]
    assert all(isinstance(one, Served) and one.seconds < PATIENCE for one in served)


def test_one_that_fails_is_refused_connections_and_nobody_notices(three):
    with LoadBalancer(entries(three), **FAST) as lb:
        get(lb)
        lb.fail("b2")
        answers = [get(lb) for _ in range(20)]
        assert {status for status, _ in answers} == {200}
        assert "b2" not in {backend for _, backend in answers}
        eventually(lambda: lb.states["b2"] == "DOWN", "its probes fail too")
        lb.recover("b2")
        eventually(lambda: lb.states["b2"] == "UP", "they pass again")
        eventually(lambda: get(lb)[1] == "b2", "it is given work again")
    assert max(one.tries for one in lb.requests) <= 2


def test_all_that_fail_are_a_503(three):
    with LoadBalancer(entries(three)) as lb:
        for name in ("b1", "b2", "b3"):
            lb.fail(name)
        assert get(lb)[0] == 503
    assert lb.requests[-1].code == "SC"


def test_one_that_is_delayed_answers_later_each_time_and_the_others_do_not(three):
    slow = 0.3
    with LoadBalancer(entries(three[:2])) as lb:
        lb.delay("b2", slow)
        with closing(http.client.HTTPConnection(lb.host, lb.port, timeout=PATIENCE)) as connection:
            for _ in range(6):
                connection.request("GET", "/")
                connection.getresponse().read()
        seconds = {name: [one.seconds for one in lb.requests if one.backend == name] for name in ("b1", "b2")}
        assert Counter(one.backend for one in lb.requests) == {"b1": 3, "b2": 3}
        assert min(seconds["b2"]) >= slow
        assert max(seconds["b1"]) < slow
        lb.recover("b2")
        began = time.monotonic()
        assert [get(lb)[0] for _ in range(4)] == [200] * 4
        assert time.monotonic() - began < 4 * slow
        assert {one.code for one in lb.requests} == {"--"}


def test_a_delay_beyond_the_timeout_is_a_504(three):
    with LoadBalancer(entries(three[:1]), timeouts={"server": 0.2}, retries=0) as lb:
        lb.delay("b1", PATIENCE)
        assert get(lb)[0] == 504
        assert lb.requests[-1].code == "sH"


def test_a_long_body_passes_a_delayed_backend_both_ways(three):
    body = bytes(range(256)) * 4000
    with LoadBalancer(entries(three[:1])) as lb:
        lb.delay("b1", 0.01)
        request = urllib.request.Request(f"{lb.url}/echo", data=body, method="POST")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            assert answer.read() == body


def test_a_name_can_fail_too(three):
    with LoadBalancer([{"id": "b1", "host": "localhost", "port": three[0].port}], **FAST) as lb:
        assert get(lb) == (200, "b1")
        lb.fail("b1")
        assert get(lb)[0] == 503
        eventually(lambda: lb.states["b1"] == "DOWN", "its probes fail")
        lb.recover("b1")
        eventually(lambda: lb.states["b1"] == "UP", "they pass again")
        assert get(lb) == (200, "b1")


def test_several_in_one_process_know_nothing_of_each_other(three):
    with LoadBalancer(entries(three)) as one, LoadBalancer(entries(three)) as other:
        one.fail("b1")
        assert {get(one)[1] for _ in range(6)} == {"b2", "b3"}
        assert {get(other)[1] for _ in range(6)} == {"b1", "b2", "b3"}
        assert (len(one.requests), len(other.requests)) == (6, 6)


def test_keys_are_those_of_the_file(three, tmp_path):
    log = tmp_path / "lb.log"
    with LoadBalancer(entries(three), algorithm="least_connections", log={"file": str(log)}) as lb:
        get(lb, "/status/404")
    assert '"GET /status/404 HTTP/1.1" 404' in log.read_text()


@pytest.mark.parametrize(
    ("servers", "keys", "line"),
    [
        ([], {}, "LoadBalancer: servers: must not be empty"),
        (["127.0.0.1"], {}, 'command line: "127.0.0.1": must be HOST:PORT'),
        (["127.0.0.1:1"], {"algorithms": "random"}, 'LoadBalancer: algorithms: unknown key; did you mean "algorithm"?'),
        ([{"id": "a", "host": "127.0.0.1"}], {}, 'LoadBalancer: servers[0]: "port" is missing'),
    ],
)
def test_a_mistake_is_told_as_in_a_file(servers, keys, line):
    with pytest.raises(ConfigError) as caught:
        LoadBalancer(servers, **keys)
    assert str(caught.value).startswith(line)


def test_an_id_that_is_not_known_is_named_with_those_that_are(three):
    with LoadBalancer(entries(three)) as lb, pytest.raises(KeyError, match="no backend 'b9'; there are b1, b2, b3"):
        lb.fail("b9")


def test_in_tcp_mode_connections_are_what_it_remembers(three):
    with LoadBalancer(entries(three), mode="tcp") as lb:
        assert lb.url.startswith("tcp://")
        get(lb)
        eventually(lambda: lb.requests, "the connection has ended")
        assert lb.requests == [Served("", "", 0, "b1", lb.requests[0].seconds, 1, "--")]
