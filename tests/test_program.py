"""lb.py and what comes with it, started as a user starts them."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

import lb
from backend_server import make_server, serving
from balancer.version import __version__
from conftest import PATIENCE, eventually, processes
from fakes import Answer, Connection, FakeBackend, read_response
from programs import LB, ROOT, Program, checkout, free_ports, run, started, write_settings

GET = b"GET / HTTP/1.1\r\nHost: lb.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BACKEND, CLIENT = ROOT / "backend_server.py", ROOT / "client.py"

pytestmark = pytest.mark.program


def connect(program: Program) -> socket.socket:
    return socket.create_connection(("127.0.0.1", program.port), timeout=PATIENCE)


def get(program: Program) -> Answer:
    """The answer to a request on a connection of its own."""
    with connect(program) as sock:
        sock.sendall(GET)
        return read_response(sock)


def settings_for(*ports: int, **keys: Any) -> dict[str, Any]:
    """Quick probes, so that a test sees what a user sees after seconds."""
    servers = [{"id": number, "host": "127.0.0.1", "port": port} for number, port in enumerate(ports, 1)]
    return {"servers": servers, "health_check_interval": 0.1, "listen": {"port": 0}, **keys}


def log(directory: Path) -> str:
    return (directory / "load_balancer.log").read_text()


# Start ------------------------------------------------------------------------------------------------------------


def test_a_clone_runs_by_itself_and_answers_1_2_3_1_2_3(tmp_path):
    """From another directory, with its own servers.json and the three demo backends that this starts."""
    clone, elsewhere = tmp_path / "clone", tmp_path / "elsewhere"
    clone.mkdir()
    elsewhere.mkdir()
    with started(checkout(clone) / "lb.py", "--port", 0, directory=elsewhere) as program:
        assert re.fullmatch(r"lb: listening on http://127\.0\.0\.1:[0-9]+", program.first_line)
        answers = [get(program) for _ in range(6)]
        assert [answer.headers["X-Backend"] for answer in answers] == ["1", "2", "3", "1", "2", "3"]
        assert [answer.body[:9] for answer in answers[:3]] == [b"backend 1", b"backend 2", b"backend 3"]
    assert "stop: done" in log(elsewhere)
    assert program.err == ""


def test_the_first_line_is_the_address_alone_in_each_mode(tmp_path):
    """It is a promise: scripts read the port from it."""
    (port,) = free_ports(1)
    for mode in ("http", "tcp"):
        with started(LB, "--mode", mode, "--port", 0, f"127.0.0.1:{port}", directory=tmp_path) as program:
            assert re.fullmatch(rf"lb: listening on {mode}://127\.0\.0\.1:[0-9]+", program.first_line)
            with connect(program):
                pass


def test_the_port_of_a_flag_wins_over_the_files(tmp_path):
    asked, other = free_ports(2)
    write_settings(tmp_path, settings_for(other, listen={"port": other}))
    with started(LB, "--port", asked, directory=tmp_path) as program:
        assert program.first_line == f"lb: listening on http://127.0.0.1:{asked}"


def test_a_name_that_does_not_resolve_is_a_backend_that_is_down(tmp_path):
    with serving(make_server(name="real")) as backend:
        servers = [{"host": "no-such-host.invalid", "port": 80}, {"host": "127.0.0.1", "port": backend.port}]
        write_settings(tmp_path, servers)
        with started(LB, "--port", 0, directory=tmp_path) as program:
            assert [get(program).headers["X-Backend"] for _ in range(4)] == ["real"] * 4
            eventually(lambda: "backend 1 no-such-host.invalid:80 DOWN: DNS" in log(tmp_path), "the log to say so")


# Mistakes ---------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_line_and_status_1(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run(checkout(tmp_path) / "lb.py", "--port", port, directory=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"lb: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def test_a_log_that_cannot_be_opened_is_one_line_that_says_so(tmp_path):
    log_file = tmp_path / "absent" / "lb.log"
    result = run(LB, "--port", 0, "--log-file", log_file, "127.0.0.1:1", directory=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(rf"lb: [^\[]*{re.escape(str(log_file))}[^\[]*: No such file or directory\n", result.stderr)


def test_a_backend_that_is_the_balancer_itself_is_refused(tmp_path):
    """Each request would go round until its head is too large."""
    backends = ["127.0.0.1:9000", "localhost:9001", "127.0.0.1:9001"]
    result = run(LB, "--port", 9001, "--check", *backends, directory=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "lb: command line: backend 3 at 127.0.0.1:9001 is the balancer itself; give one of the two another port\n"
    )


def test_without_any_configuration_it_says_what_to_give(tmp_path):
    (checkout(tmp_path) / "servers.json").unlink()
    result = run(tmp_path / "lb.py", directory=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"lb: servers.json: not found in {tmp_path}; give --config FILE, or backends as HOST:PORT\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prot", "1"], "--prot"),
        (["--port", "99999"], "--port: must be 0 to 65535, not 99999"),
        (["--port", "web"], '--port: must be a whole number, not the string "web"'),
        (["--mode", "udp"], '--mode: must be "http" or "tcp", not "udp"'),
        (["--algorithm", "round_robbin"], 'did you mean "round_robin"?'),
        (["--algorithm", "absent.py"], "there is no file"),
        (["--algorithm", "broken.py"], "broken.py: cannot be loaded: SyntaxError"),
        (["--algorithm", "empty.py"], "must have a function select_server(backends, client)"),
        (["--interval", "0"], "--interval: "),
        (["--log-level", "loud"], '"loud"'),
        (["--config", "absent.json"], '--config: there is no file "absent.json"'),
        (["--config", "cut.json"], "cut.json: line 1, column 2: not JSON: the text ends too early"),
        (["--config", "key.json"], 'key.json: algoritm: unknown key; did you mean "algorithm"?'),
        (["--config", "twice.json"], "twice.json: servers[1]: the address "),
        (["--config", "key.json", "127.0.0.1:1"], "--config: backends on the command line need no file"),
        (["127.0.0.1"], "must be HOST:PORT"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    good = {"host": "127.0.0.1", "port": 1}
    write_settings(tmp_path, [good])
    Path("cut.json").write_text("[")
    Path("key.json").write_text(json.dumps({"servers": [good], "algoritm": "random"}))
    Path("twice.json").write_text(json.dumps([good, good]))
    Path("broken.py").write_text("def select_server(")
    Path("empty.py").write_text("")
    for extra in ([], ["--check"]):
        try:
            status = lb.main([*flags, *extra])
        except SystemExit as end:  # argparse's own way
            status = end.code
        out, err = capsys.readouterr()
        assert (status, out) == (2, "")
        assert err.startswith("lb")
        assert err.count("\n") == 1
        assert message in err
    assert not Path("load_balancer.log").exists()


def test_a_mistake_is_no_traceback_in_the_real_program_either(tmp_path):
    write_settings(tmp_path, {"servers": []})
    result = run(LB, directory=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"lb: servers\.json: servers: must not be empty; .*\n", result.stderr)


def test_check_prints_what_would_run_and_runs_nothing(tmp_path):
    before = set(os.listdir(checkout(tmp_path)))
    result = run(tmp_path / "lb.py", "--check", "--algorithm", "least_time", directory=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "algorithm      least_time, 3 retries" in result.stdout
    assert result.stdout.count("{python} backend_server.py") == 3
    assert set(os.listdir(tmp_path)) - before <= {"__pycache__"}


def test_version_is_the_packages(tmp_path):
    result = run(LB, "--version", directory=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"lb {__version__}\n", "")


# Stop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_an_idle_balancer_ends_at_once_with_status_0_and_hangs_up_on_those_that_rest(tmp_path, number):
    """The drain that is allowed, 30 s, is longer than this test waits."""
    with serving(make_server()) as backend, ExitStack() as stack:
        program = stack.enter_context(started(LB, "--port", 0, f"127.0.0.1:{backend.port}", directory=tmp_path))
        resting = [stack.enter_context(connect(program)) for _ in range(20)]
        for sock in resting[:10]:
            sock.sendall(GET)
            assert read_response(sock).status == 200
        assert program.stop(number) == 0
        assert [sock.recv(1) for sock in resting] == [b""] * 20
        assert program.err == ""
    assert log(tmp_path).splitlines()[-1].endswith(" INFO stop: done")


class Held:
    """A handler that answers when it is told to."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, connection: Connection) -> None:
        if connection.read_request():
            self.arrived.set()
            assert self.go_on.wait(PATIENCE)
            connection.send(OK)


@pytest.fixture
def in_flight(tmp_path) -> Iterator[tuple[Program, socket.socket, Held]]:
    """A balancer that was told to stop while a request is at its backend, and accepts no more connections."""
    held = Held()
    with FakeBackend(held) as fake, ExitStack() as stack:
        write_settings(tmp_path, settings_for(fake.port, health_check={"type": "tcp"}))
        program = stack.enter_context(started(LB, directory=tmp_path))
        sock = stack.enter_context(connect(program))
        sock.sendall(GET)
        assert held.arrived.wait(PATIENCE)
        program.process.send_signal(signal.SIGTERM)
        eventually(lambda: refused(program.port), "no more connections accepted")
        assert program.process.poll() is None
        try:
            yield program, sock, held
        finally:
            held.go_on.set()


def refused(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), PATIENCE):
            return False
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        return False  # it stood in the backlog just when that was closed


def test_a_request_in_flight_is_answered_before_the_end(in_flight):
    program, sock, held = in_flight
    held.go_on.set()
    answer = read_response(sock)
    assert (answer.status, answer.headers["Connection"], answer.body) == (200, "close", b"ok")
    sock.close()
    assert (program.wait(), program.err) == (0, "")


def test_a_second_signal_cuts_what_is_in_flight(in_flight, tmp_path):
    program, sock, _ = in_flight
    assert program.stop() == 0
    assert sock.recv(1) == b""
    assert re.fullmatch(r"lb: stopped, 1 connections? cut\n", program.err)
    assert re.search(r'"GET / HTTP/1.1" - 0 backend=1 [\d.]+ms code=KH tries=1 id=\S+\n', log(tmp_path))


def test_the_drain_has_an_end(tmp_path):
    held = Held()
    with FakeBackend(held) as fake:
        settings = settings_for(fake.port, health_check={"type": "tcp"}, timeouts={"drain": 0.1})
        write_settings(tmp_path, settings)
        with started(LB, directory=tmp_path) as program, connect(program) as sock:
            sock.sendall(GET)
            assert held.arrived.wait(PATIENCE)
            assert program.stop() == 0
            assert sock.recv(1) == b""
        held.go_on.set()


def test_the_demo_backends_end_with_it_and_their_ports_are_free_again(tmp_path):
    with started(checkout(tmp_path) / "lb.py", "--port", 0, directory=tmp_path) as program:
        get(program)
        children = program.children()
        assert sum("backend_server.py" in command for command in children.values()) == 3
        assert program.stop() == 0
    assert not {pid for pid, _, _ in processes()} & set(children)
    for server in json.loads((tmp_path / "servers.json").read_text())["servers"]:
        assert refused(server["port"])


def test_the_demo_backends_end_even_when_it_is_killed(tmp_path):
    """`kill -9` leaves it no time to stop them."""
    with started(checkout(tmp_path) / "lb.py", "--port", 0, directory=tmp_path) as program:
        get(program)
        children = program.children()
        assert program.stop(signal.SIGKILL) == -signal.SIGKILL
        eventually(lambda: not running_of(children), "the end of its children")


def running_of(children: dict[int, str]) -> set[int]:
    """Those that run still under their command; who waits for an orphan's status is not ours to say."""
    return {pid for pid, _, command in processes() if children.get(pid) == command}


# Backends that die ------------------------------------------------------------------------------------------------


def test_a_demo_backend_that_is_killed_comes_back_and_nobody_notices(tmp_path):
    with (
        started(checkout(tmp_path) / "lb.py", "--port", 0, directory=tmp_path) as program,
        closing(http.client.HTTPConnection("127.0.0.1", program.port, timeout=PATIENCE)) as connection,
    ):

        def second() -> int:
            return next((pid for pid, command in program.children().items() if command.endswith("--id 2")), 0)

        def who() -> str:
            connection.request("GET", "/")
            with connection.getresponse() as answer:
                assert answer.status == 200
                answer.read()
                return str(answer.headers["X-Backend"])

        assert {who() for _ in range(3)} == {"1", "2", "3"}
        killed = second()
        os.kill(killed, signal.SIGKILL)
        assert "2" not in {who() for _ in range(6)}
        eventually(lambda: who() == "2", "backend 2 again")
        assert second() not in (0, killed)
    told = log(tmp_path)
    assert f"backend 2: process {killed} was ended by SIGKILL after " in told
    assert re.search(r"backend 2 127\.0\.0\.1:\d+ DOWN: .*, 3rd failure\n", told)
    assert re.search(r"backend 2 127\.0\.0\.1:\d+ UP: L7OK 200 in \d+ ms\n", told)


def test_of_1000_requests_none_fails_when_a_backend_dies_for_good_and_all_do_when_all_have(tmp_path):
    """And when one is started again, requests are answered again, without a word to the balancer."""
    with ExitStack() as stack:
        backends = [
            stack.enter_context(started(BACKEND, "--port", 0, "--id", n, "--delay", 0.01, directory=tmp_path))
            for n in "123"
        ]
        ports = [backend.port for backend in backends]
        write_settings(tmp_path, settings_for(*ports))
        program = stack.enter_context(started(LB, directory=tmp_path))

        url = f"http://127.0.0.1:{program.port}"
        client = stack.enter_context(started(CLIENT, url, "-n", 1000, "-c", 20, "--json", directory=tmp_path))
        eventually(lambda: log(tmp_path).count(" 200 ") > 300, "300 answers")
        assert backends[1].stop(signal.SIGKILL) == -signal.SIGKILL
        assert client.wait() == 0, client.out
        found = json.loads(client.out)
        assert (found["requests"], found["failed"], found["errors"]) == (1000, 0, {})
        assert set(found["answered_by"]) == {"1", "2", "3"}

        for backend in (backends[0], backends[2]):
            backend.stop(signal.SIGKILL)
        answer = eventually(lambda: (found := get(program)).status == 503 and found, "503")
        assert answer.headers["Retry-After"] == "1"
        assert answer.body.startswith(b"503 Service Unavailable: no backend ")

        stack.enter_context(started(BACKEND, "--port", ports[2], "--id", "3", directory=tmp_path)).first_line  # noqa: B018
        eventually(lambda: get(program).status == 200, "200 again")
        assert get(program).headers["X-Backend"] == "3"


# Other people's backends ------------------------------------------------------------------------------------------


def test_three_http_servers_of_the_standard_library_in_a_list(tmp_path):
    """They speak HTTP/1.0 and close after each answer; the file is a plain list."""
    server = ["-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    (tmp_path / "hello.txt").write_text("hello\n")
    with ExitStack() as stack:
        backends = [stack.enter_context(started(*server, directory=tmp_path, ends=-signal.SIGTERM)) for _ in range(3)]
        servers = [{"id": n, "host": "127.0.0.1", "port": backend.port} for n, backend in enumerate(backends, 1)]
        write_settings(tmp_path, servers)
        program = stack.enter_context(started(LB, "--port", 0, directory=tmp_path))
        url = f"http://127.0.0.1:{program.port}/hello.txt"
        result = run(CLIENT, url, "-n", 30, "-c", 3, "--json", directory=tmp_path)
        assert result.returncode == 0, result.stdout
        assert json.loads(result.stdout)["received_bytes"] == 30 * len("hello\n")
        program.stop()
    answered = [
        re.sub(r".* backend=(\d) .*", r"\1", line) for line in log(tmp_path).splitlines() if "hello.txt" in line
    ]
    assert sorted(answered) == ["1"] * 10 + ["2"] * 10 + ["3"] * 10


def test_three_raw_tcp_servers_in_tcp_mode(tmp_path):
    with ExitStack() as stack:
        backends = [stack.enter_context(serving(make_server(tcp=True))) for _ in range(3)]
        addresses = [f"127.0.0.1:{backend.port}" for backend in backends]
        program = stack.enter_context(started(LB, "--mode", "tcp", "--port", 0, *addresses, directory=tmp_path))
        url = f"tcp://127.0.0.1:{program.port}"
        flags = ["--tcp", "--new-connections", "-n", 30, "-c", 3, "--body-size", 100_000, "--json"]
        result = run(CLIENT, url, *flags, directory=tmp_path)
        assert result.returncode == 0, result.stdout
        assert json.loads(result.stdout)["received_bytes"] == 3_000_000
        program.stop()
    lines = [line for line in log(tmp_path).splitlines() if " tcp " in line]
    assert len(lines) == 30
    for n in "123":
        assert sum(f" tcp 100000/100000 backend={n} " in line and " code=-- tries=1" in line for line in lines) == 10


# The log ----------------------------------------------------------------------------------------------------------


def test_the_log_is_complete_after_a_stop(tmp_path):
    with (
        serving(make_server()) as backend,
        started(LB, "--port", 0, f"127.0.0.1:{backend.port}", directory=tmp_path) as program,
    ):
        with closing(http.client.HTTPConnection("127.0.0.1", program.port, timeout=PATIENCE)) as connection:
            for number in range(500):
                connection.request("GET", f"/status/200?{number}")
                connection.getresponse().read()
        assert program.stop() == 0
    lines = log(tmp_path).splitlines()
    asked = [int(match[1]) for line in lines if (match := re.search(r'"GET /status/200\?(\d+) HTTP/1\.1" 200 ', line))]
    assert asked == list(range(500))
    assert " INFO start: " in lines[0]
    assert " INFO stop: " in lines[-1]


def test_a_log_that_was_moved_away_is_opened_again_and_no_line_is_lost(tmp_path):
    """As logrotate does it."""
    current, old = tmp_path / "load_balancer.log", tmp_path / "old.log"
    with (
        serving(make_server()) as backend,
        started(LB, "--port", 0, f"127.0.0.1:{backend.port}", directory=tmp_path) as program,
    ):
        get(program)
        eventually(lambda: " 200 " in log(tmp_path), "the first line")
        current.rename(old)
        count = 1

        def written_to_a_new_file() -> bool:
            nonlocal count
            assert get(program).status == 200
            count += 1
            return current.exists() and " 200 " in log(tmp_path)

        eventually(written_to_a_new_file)
        assert program.stop() == 0
    assert old.read_text().count(" 200 ") + log(tmp_path).count(" 200 ") == count
