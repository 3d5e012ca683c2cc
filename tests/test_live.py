"""A balancer whose configuration changes while it works: what is open is not disturbed, and no request fails."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from conftest import PATIENCE, eventually
from faults import Load, Stand
from mixture import UPGRADE
from programs import LB, ROOT, Program, free_ports, run, write_settings

TOKEN = "a-token-for-tests"
CLIENTS = 32
SOCKETS = 20
HELLO = b"\x81\x85\0\0\0\0hello"  # a text frame, masked by zeros
HELLO_BACK = b"\x81\x05hello"
pytestmark = pytest.mark.program


class Operator:
    """Whoever has the token, at the operator's port of a program that was started with `--admin 127.0.0.1:0`."""

    def __init__(self, program: Program) -> None:
        eventually(lambda: "status page" in program.out and program.out.endswith("\n"), "the line with its address")
        self.address = program.out.split("status page http://", 1)[1].split("/", 1)[0]

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        host, port = self.address.rsplit(":", 1)
        with closing(http.client.HTTPConnection(host, int(port), timeout=PATIENCE)) as connection:
            fields = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body is not None else None, fields)
            answer = connection.getresponse()
            found = json.loads(answer.read())
            assert answer.status < 300, found
            return found

    def backends(self) -> dict[str, Any]:
        return {backend["id"]: backend for backend in self.ask("GET", "/api/backends")["backends"]}

    def is_up(self, backend_id: str) -> bool:
        return self.backends()[backend_id]["state"] == "UP"


class Observed(Stand):
    """Three backends, a spare one, and a balancer with an operator's port."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        monkeypatch.setenv("LB_ADMIN_TOKEN", TOKEN)
        self.settings = {"health_check": {"path": "/health", "interval": 0.2}, "listen": {"port": 0}, **settings}
        super().__init__(directory, admin={"address": "127.0.0.1:0"}, **settings)
        self.operator = Operator(self.balancer)
        self.spare_port = free_ports(1)[0]
        self.backends.append(
            Program((ROOT / "backend_server.py", "--port", self.spare_port, "--id", 4), directory),
        )
        assert self.backends[3].first_line

    def rewrite(self, spare: bool = False, **keys: Any) -> None:
        """Write another servers.json, with or without the spare backend."""
        ports = [*self.ports, self.spare_port] if spare else self.ports
        rows = [{"id": place, "host": "127.0.0.1", "port": port} for place, port in enumerate(ports, 1)]
        write_settings(self.directory, {"servers": rows, "admin": {"address": "127.0.0.1:0"}, **self.settings, **keys})


def websocket(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    sock.sendall(UPGRADE)
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        piece = sock.recv(1)
        assert piece, answer
        answer += piece
    assert answer.startswith(b"HTTP/1.1 101 "), answer
    return sock


def says_hello(sock: socket.socket) -> bool:
    sock.sendall(HELLO)
    answer = b""
    while len(answer) < len(HELLO_BACK) and (piece := sock.recv(64)):
        answer += piece
    return answer == HELLO_BACK


def test_100_reloads_under_load_disturb_nothing(tmp_path, monkeypatch):
    """Issue 4: 0 failed requests, 0 dropped sockets, round robin's counts within one of even."""
    with Observed(tmp_path, monkeypatch) as stand, ExitStack() as stack:
        sockets = [stack.enter_context(websocket(stand.port)) for _ in range(SOCKETS)]
        with Load(stand.port, clients=CLIENTS) as load:
            load.more(100)
            changes = 0
            for number in range(100):
                stand.rewrite(
                    spare=bool(number % 2),
                    timeouts={"server": 30 + number},
                    retries=number % 5,
                    limits={"queue": 500 + number, "head_bytes": 65536 + number},
                    log={"level": "info" if number % 3 else "debug"},
                )
                changes += len(stand.operator.ask("POST", "/api/reload")["changed"])
                if number % 10 == 0:
                    load.more(50)
                    assert all(map(says_hello, sockets[:3]))
            load.more(100)
        assert all(map(says_hello, sockets))
        backends = stand.operator.backends()
        counts = [backends[name]["sessions_total"] for name in "123"]
        codes = stand.codes()
    assert changes > 400
    assert (load.failed, load.stats.errors, codes) == (0, Counter(), Counter())
    assert max(counts) - min(counts) <= 1, counts


def test_adding_draining_and_removing_through_the_api_costs_no_request(tmp_path, monkeypatch):
    with Observed(tmp_path, monkeypatch) as stand, Load(stand.port, clients=CLIENTS) as load:
        operator = stand.operator
        for _ in range(10):
            added = operator.ask("POST", "/api/backends", {"host": "127.0.0.1", "port": stand.spare_port})
            assert added["id"] == "4"
            eventually(lambda: operator.is_up("4"), "its first probe has passed")
            load.more(60)
            assert operator.ask("PATCH", "/api/backends/4", {"state": "drain"})["state"] == "DRAIN"
            eventually(lambda: not operator.backends()["4"]["active"], "it has nothing in hand")
            drained = operator.backends()["4"]["sessions_total"]
            load.more(60)
            assert operator.backends()["4"]["sessions_total"] == drained > 0
            operator.ask("PATCH", "/api/backends/4", {"state": "ready"})
            load.more(60)
            assert operator.ask("DELETE", "/api/backends/4") == {"removed": "4"}
            eventually(lambda: "4" not in operator.backends(), "it has gone")
        status = operator.ask("GET", "/api/status")
    assert (load.failed, stand.codes()) == (0, Counter())
    assert status["requests_total"] >= 10 * 180, "what those have counted that went is in the sums"


def test_the_metrics_agree_with_the_true_counts_of_a_known_load(tmp_path, monkeypatch):
    """Read by a parser that is not ours; the counts are those of the clients and of the backends' own answers."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    with Observed(tmp_path, monkeypatch) as stand:
        for number in range(90):
            with closing(http.client.HTTPConnection("127.0.0.1", stand.port, timeout=PATIENCE)) as connection:
                connection.request("GET", "/status/404" if number % 9 == 0 else "/bytes/1000")
                answer = connection.getresponse()
                assert answer.status == (404 if number % 9 == 0 else 200)
                answer.read()
        host, port = stand.operator.address.rsplit(":", 1)
        with closing(http.client.HTTPConnection(host, int(port), timeout=PATIENCE)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()

    def total(name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in parser.text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    assert total("haproxy_frontend_http_requests_total") == 90
    assert total("haproxy_frontend_connections_total") == 90
    assert total("haproxy_server_http_responses_total", code="2xx") == 80
    assert total("haproxy_server_http_responses_total", code="4xx") == 10
    assert [total("haproxy_server_sessions_total", server=name) for name in "123"] == [30, 30, 30]
    assert total("lb_request_duration_seconds_count") == 90
    assert total("haproxy_backend_active_servers") == 3
    assert total("haproxy_server_status", state="UP") == 3


# What the watch on the file brings ----------------------------------------------------------------------------------


def log(directory: Path) -> str:
    return (directory / "load_balancer.log").read_text()


def test_a_changed_file_is_in_force_within_moments(tmp_path, monkeypatch):
    with Observed(tmp_path, monkeypatch) as stand:
        stand.rewrite(spare=True)
        eventually(lambda: stand.operator.backends().get("4", {}).get("state") == "UP", "the one that was added serves")
        line = f"servers.json: added backend 4 at 127.0.0.1:{stand.spare_port}"
        eventually(lambda: line in log(tmp_path), "it is in the log")
        stand.rewrite(spare=False)
        eventually(lambda: "4" not in stand.operator.backends(), "it has gone")
    assert f"backend 4 127.0.0.1:{stand.spare_port} is gone: it has nothing in hand any more" in log(tmp_path)


def test_a_bad_file_changes_nothing_and_is_told_until_it_is_mended(tmp_path, monkeypatch):
    with Observed(tmp_path, monkeypatch) as stand, Load(stand.port, clients=2) as load:
        (tmp_path / "servers.json").write_text('{"servers": [{"host": "127.0.0.1", "port": 99999}]}')
        line = "servers.json: servers[0].port: must be 1 to 65535, not 99999"
        eventually(lambda: stand.operator.ask("GET", "/api/status")["config_error"] == line, "the page tells")
        load.more(50)
        stand.rewrite()
        eventually(lambda: stand.operator.ask("GET", "/api/status")["config_error"] is None, "it is mended")
    assert load.failed == 0
    assert log(tmp_path).count(line) == 1


def test_what_takes_a_restart_is_said_and_the_rest_is_done(tmp_path, monkeypatch):
    with Observed(tmp_path, monkeypatch) as stand:
        stand.rewrite(listen={"port": 1}, retries=1)
        eventually(lambda: stand.operator.ask("GET", "/api/status")["restart_needed"], "it is said")
        status = stand.operator.ask("GET", "/api/status")
        assert status["restart_needed"] == ["listen 127.0.0.1:0 -> 127.0.0.1:1: takes effect at the next start"]
        assert stand.operator.ask("GET", "/api/config")["retries"] == 1
        with Load(stand.port, clients=1) as load:
            load.more(10)
        assert load.failed == 0


def test_hangup_reads_the_file_again_and_usr1_opens_the_log_anew(tmp_path, monkeypatch):
    with Observed(tmp_path, monkeypatch) as stand:
        stand.balancer.process.send_signal(signal.SIGHUP)
        stand.rewrite(retries=2)
        eventually(lambda: "servers.json: retries 3 -> 2" in log(tmp_path), "it is in force")
        os.rename(tmp_path / "load_balancer.log", tmp_path / "old.log")
        stand.balancer.process.send_signal(signal.SIGUSR1)
        eventually((tmp_path / "load_balancer.log").exists, "a new log")
        assert stand.balancer.process.poll() is None


def test_what_is_persisted_is_in_the_file_and_what_is_not_is_not(tmp_path, monkeypatch):
    with Observed(tmp_path, monkeypatch) as stand:
        operator = stand.operator
        operator.ask("PATCH", "/api/backends/1", {"weight": 7})
        operator.ask("PATCH", "/api/backends/2?persist=1", {"weight": 5, "state": "drain"})
        operator.ask("POST", "/api/backends?persist=1", {"id": "x", "host": "127.0.0.1", "port": stand.spare_port})
        operator.ask("DELETE", "/api/backends/3?persist=1")
        servers = json.loads((tmp_path / "servers.json").read_text())["servers"]
        assert [(server["id"], server.get("weight")) for server in servers] == [(1, None), (2, 5), ("x", None)]
        eventually(lambda: operator.is_up("x"), "it serves")
        backends = operator.backends()
        assert {name: backend["weight"] for name, backend in backends.items()} == {"1": 7, "2": 5, "x": 1}
        assert backends["2"]["state"] == "DRAIN"
        assert "by admin 127.0.0.1:" in log(tmp_path)


# A stop that is announced ---------------------------------------------------------------------------------------------


def test_healthz_says_so_before_the_balancer_stops_serving(tmp_path, monkeypatch):
    with Observed(tmp_path, monkeypatch, timeouts={"drain_delay": PATIENCE}) as stand:
        host, port = stand.operator.address.rsplit(":", 1)

        def healthz() -> tuple[int, bytes]:
            with closing(http.client.HTTPConnection(host, int(port), timeout=PATIENCE)) as connection:
                connection.request("GET", "/healthz")
                answer = connection.getresponse()
                return answer.status, answer.read()

        assert healthz() == (200, b"ok\n")
        stand.balancer.process.send_signal(signal.SIGTERM)
        eventually(lambda: healthz()[0] == 503, "it says that it goes away")
        with Load(stand.port, clients=2) as load:
            load.more(20)
        assert load.failed == 0
        assert stand.operator.ask("GET", "/api/status")["state"] == "draining"
        assert stand.balancer.stop() == 0, "a second signal ends the delay"


# Explain --------------------------------------------------------------------------------------------------------------


def test_a_refusal_can_be_explained_by_its_id(tmp_path, monkeypatch):
    with Observed(tmp_path, monkeypatch, timeouts={"server": 0.2}, retries=1) as stand:
        stand.operator.ask("PATCH", "/api/backends/3", {"state": "maint"})
        with closing(http.client.HTTPConnection("127.0.0.1", stand.port, timeout=PATIENCE)) as connection:
            connection.request("GET", "/slow/5")
            answer = connection.getresponse()
            request_id = answer.headers["X-Request-Id"]
            assert (answer.status, request_id in answer.read().decode()) == (504, True)
        found = stand.operator.ask("GET", f"/api/requests/{request_id}")
        assert (found["code"], found["tries"], found["request"]) == ("sH", 2, "GET /slow/5 HTTP/1.1")
        assert [step["backend"] for step in found["steps"]] == ["1", "2"]
        assert [one["passed_over"] for one in found["steps"][0]["backends"]] == [
            "tried already", None, "set to maint by an operator",
        ]  # fmt: skip
        assert stand.operator.ask("GET", "/api/requests")["requests"][0]["id"] == request_id
        shown = run(LB, "--explain", request_id, "--admin", stand.operator.address, directory=tmp_path)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "backend 3: set to maint by an operator" in shown.stdout
        unknown = run(LB, "--explain", "nonsense", "--admin", stand.operator.address, directory=tmp_path)
        assert (unknown.returncode, unknown.stdout) == (1, "")
        assert unknown.stderr.startswith("lb: no request nonsense is kept at 127.0.0.1:")


def test_check_shows_what_a_reload_would_change(tmp_path, monkeypatch):
    with Observed(tmp_path, monkeypatch, log={"level": "info"}) as stand:
        former = tmp_path / "former.json"
        former.write_text((tmp_path / "servers.json").read_text())
        result = run(LB, "--check", "--admin", stand.operator.address, directory=tmp_path)
        assert result.stdout.endswith(f"against {stand.operator.address}:\n  no difference\n")
    stand.rewrite(spare=True, retries=1)
    result = run(LB, "--check", "--diff", former, directory=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    changes = result.stdout.split(f"against {former}:\n")[1].splitlines()
    assert changes[:2] == [f"  added backend 4 at 127.0.0.1:{stand.spare_port}", "  retries 3 -> 1"]


def test_without_a_running_balancer_or_an_id_that_is_known_it_says_so(tmp_path):
    write_settings(tmp_path, [{"host": "127.0.0.1", "port": 1}])
    [port] = free_ports(1)
    result = run(LB, "--explain", "abc", "--admin", f"127.0.0.1:{port}", directory=tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"lb: no balancer answers at 127.0.0.1:{port}: Connection refused\n"
