"""The program health_checker.py, as an operator uses it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import health_checker
from balancer.backend import Admin, Backend
from balancer.config import Server
from balancer.pickers import RoundRobin
from conftest import PATIENCE, eventually
from fakes import Connection, FakeBackend

PROGRAM = Path(health_checker.__file__).resolve()
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
FAILING = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def configuration(directory: Path, *backends: FakeBackend, **settings) -> Path:
    path = directory / "servers.json"
    servers = [{"id": f"web-{n}", "host": fake.host, "port": fake.port} for n, fake in enumerate(backends, 1)]
    path.write_text(json.dumps({"servers": servers, **settings}))
    return path


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, check=False)


@contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def without_times(text: str) -> list[str]:
    return [re.sub(r"in \d+ ms", "in N ms", re.sub(f"^{STAMP} ", "", line)) for line in text.splitlines()]


@pytest.mark.program
def test_once_prints_a_table_and_tells_whether_all_are_up(tmp_path):
    with FakeBackend(OK) as good, FakeBackend(OK, host="127.0.0.1") as other, FakeBackend(FAILING) as bad:
        result = run("--once", "--config", configuration(tmp_path, good, other))
        assert (result.returncode, result.stderr) == (0, "")
        result = run("--once", "--config", configuration(tmp_path, good, bad))
        assert (result.returncode, result.stderr) == (1, "")
        width = max(len(good.address), len(bad.address))
        assert without_times(result.stdout) == [
            f"ID     {'ADDRESS':{width}}  STATE  CHECK",
            f"web-1  {good.address:{width}}  UP     L7OK 200 in N ms",
            f"web-2  {bad.address:{width}}  DOWN   L7STS 503",
        ]
        assert good.accepted == 2
        assert bad.accepted == 1


@pytest.mark.program
def test_without_a_flag_it_reads_servers_json_here_and_writes_nothing(tmp_path):
    with FakeBackend(OK) as fake:
        configuration(tmp_path, fake, health_check_url="/alive")
        assert run("--once", cwd=tmp_path).returncode == 0
        assert fake.requests[0].startswith(b"GET /alive HTTP/1.1\r\n")
    assert os.listdir(tmp_path) == ["servers.json"]


@pytest.mark.program
def test_it_tells_the_first_states_and_then_each_change_on_screen_and_in_the_log(tmp_path):
    """The answers are the script: up, then failing three times, then well again."""
    with FakeBackend([OK, OK, FAILING, FAILING, FAILING, OK]) as fake, FakeBackend(FAILING) as down:
        log = tmp_path / "health.log"
        settings = configuration(tmp_path, fake, down)
        with running("--config", settings, "--interval", "0.01", "--log-file", log) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(4)]
            process.send_signal(signal.SIGTERM)
            rest, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, rest, errors) == (0, "", "")
        assert all(re.match(f"{STAMP} backend web-", line) for line in lines)
        told = without_times("".join(lines))
        assert sorted(told[:2]) == [
            f"backend web-1 {fake.address} UP: L7OK 200 in N ms",
            f"backend web-2 {down.address} DOWN: L7STS 503, 1st failure",
        ]
        assert told[2:] == [
            f"backend web-1 {fake.address} DOWN: L7STS 503, 3rd failure",
            f"backend web-1 {fake.address} UP: L7OK 200 in N ms",
        ]
        logged = without_times(re.sub(r"(?m)^(\S+ \S+)\.\d+ (INFO|WARNING)", r"\1", log.read_text()))
        assert logged == told


@pytest.mark.program
@pytest.mark.parametrize(("flags", "status"), [(["--once"], 1), ([], 0)], ids=["once", "watching"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["int", "term"])
def test_a_signal_ends_it_at_once_while_a_probe_hangs(tmp_path, flags, status, number):
    """With --once the states are not known by then, so it cannot say that all are up."""

    def hang(connection: Connection) -> None:
        connection.read_request()
        connection.file.read()

    with FakeBackend(hang) as fake:
        settings = configuration(tmp_path, fake, health_check={"timeout": 1000})
        with running("--config", settings, *flags) as process:
            eventually(lambda: fake.requests, "a probe that hangs")
            process.send_signal(number)
            output, errors = process.communicate(timeout=PATIENCE / 5)
        assert (process.returncode, output, errors) == (status, "", "")


@pytest.mark.program
def test_a_reader_that_has_gone_is_no_traceback(tmp_path):
    with FakeBackend(OK) as fake, running("--config", configuration(tmp_path, fake)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(PATIENCE) == 1


# Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text", "line"),
    [
        (["--config", "nowhere.json"], "", 'health_checker.py: --config: there is no file "nowhere.json"'),
        ([], "[{]", "health_checker.py: servers.json: line 1, column 3: not JSON: "),
        ([], '[{"host": "h"}]', 'health_checker.py: servers.json: servers[0]: "port" is missing'),
        (["--interval", "often"], None, "health_checker.py: --interval: must be a number of seconds, not the string"),
        (["--interval", "0"], None, "health_checker.py: --interval: must be "),
        (["--twice"], None, "health_checker.py: unrecognized arguments: --twice"),
        (["--interval"], None, "health_checker.py: argument --interval: expected one argument"),
    ],
    ids=["no-file", "json", "key", "text", "zero", "flag", "value"],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, text, line):
    monkeypatch.chdir(tmp_path)
    Path("servers.json").write_text('[{"host": "127.0.0.1", "port": 9}]' if text is None else text)
    try:
        status = health_checker.main(arguments)
    except SystemExit as end:
        status = end.code
    output, errors = capsys.readouterr()
    assert (status, output) == (2, "")
    assert errors.startswith(line)
    assert errors.count("\n") == 1


@pytest.mark.program
def test_a_log_that_cannot_be_written_is_one_line_and_status_2(tmp_path):
    with FakeBackend(OK) as fake:
        result = run("--config", configuration(tmp_path, fake), "--log-file", tmp_path / "no" / "such.log")
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"health_checker.py: --log-file: {tmp_path}/no/such.log cannot be opened: ")
        assert result.stderr.count("\n") == 1


def test_a_pool_that_is_watched_tells_each_first_result_once():
    told = []
    good, bad = (Backend(Server(name, "127.0.0.1", 9)) for name in ("good", "bad"))
    pool = health_checker.WatchedPool(
        [good, bad], RoundRobin(), on_change=lambda one, reason: told.append((one.id, reason))
    )
    for _ in range(2):
        pool.report(good, True, "L4OK in 0 ms")
        pool.report(bad, False, "L4CON refused")
    pool.set_admin(good, Admin.DRAIN, "a test")
    assert told == [("good", "L4OK in 0 ms"), ("bad", "L4CON refused, 1st failure"), ("good", "set to drain by a test")]
