"""The README is true: its tour is taken, and its tables are compared with what the programs themselves say."""

from __future__ import annotations

import doctest
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

import backend_server
import client
import health_checker
import lb
from balancer import LoadBalancer
from balancer.api import ROUTES
from balancer.backend import Admin, Backend
from balancer.config import POLICIES, AdminPort, Config, ConfigError, parse
from balancer.log_formats import FORMATS
from balancer.pickers import make_picker
from balancer.pool import Pool
from balancer.remote import explanation
from conftest import PATIENCE, eventually
from programs import ROOT, checkout, free_ports, run
from test_floors import FLOOR

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(README) if name == language]


def section(heading: str) -> str:
    """The text under a heading, as far as the next one."""
    return re.split(r"^#+ ", README.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def rows(heading: str) -> list[list[str]]:
    """The rows of the tables under a heading, without their heads."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rules = [number for number, row in enumerate(cells) if set("".join(row)) == {"-"}]
    return [row for number, row in enumerate(cells) if number not in rules and number + 1 not in rules]


def code(cell: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`]*)`", cell)


# The tour ---------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    command: str
    shown: str

    @property
    def serves(self) -> bool:
        """It goes on until Ctrl-C."""
        return re.match(r"(\w+=\S+ )*python lb\.py ", f"{self.command} ") is not None

    @property
    def leaves_something_running(self) -> bool:
        return self.serves or "& " in self.command

    @property
    def reads_log(self) -> bool:
        """What it prints is there a moment after it happened."""
        return self.command.startswith(("grep ", "tail "))


def steps() -> list[Step]:
    """Each command of the console blocks with the output that is shown for it, in order."""
    return [
        Step(*re.split(r"(?<!\\)\n", text, maxsplit=1))
        for block in blocks("console")
        for text in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    ]


MASKS = [  # what differs from one run to the next
    (r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}", "WHEN"),
    (r"(INFO|admin) 127\.0\.0\.1:\d+", r"\1 CLIENT"),
    (r"DOWN: .*, ", "DOWN: REASON, "),
    (r"process \d+", "process PID"),
    (r"started: \S+ ", "started: PYTHON "),
    (r"\d+\.\d+ms", "N ms"),
    (r"in \d+ ms", "in N ms"),
    (r"(after|in) \d+\.\d+ s", r"\1 N s"),
    (r'(" \d{3}) \d+', r"\1 N"),
    (r"(?m)^\d+ requests to", "N requests to"),
    (r"(?m)^\d+ requests/s.*", "N requests/s"),
    (r"(?m)^  (\S+) +\d+ +[\d.]+%", r"  \1 N"),
    (r"(p50|p90|p99|max) [\d.]+", r"\1 N"),
]


def masked(text: str) -> str:
    for pattern, name in MASKS:
        text = re.sub(pattern, name, text)
    return text


class Tour:
    """Takes the tour in `directory`, with free ports for those that are printed and real processes for their ids."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        typed = set(re.findall(r"\b\d{4}\b", " ".join(step.command for step in steps())))
        self._names = dict(zip(typed, map(str, free_ports(len(typed))), strict=True))
        self._names.update(zip(configured_ports(ROOT), configured_ports(directory), strict=True))
        self._environment = {**os.environ, "PATH": f"{self._python()}{os.pathsep}{os.environ['PATH']}"}
        self._terminals: list[subprocess.Popen[bytes]] = []
        self._serving: subprocess.Popen[bytes] | None = None
        self._commands = 0
        self._output = Path(os.devnull)  # of the last one

    def _python(self) -> Path:
        """A directory in which `python` is the interpreter that runs this test."""
        directory = self._directory / "bin"
        directory.mkdir()
        (directory / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        (directory / "python").chmod(0o755)
        return directory

    def take(self, step: Step) -> None:
        """Type the command, and compare what it prints with what is shown."""
        if step.serves:
            self.interrupt()
        self._type(step)
        try:
            if step.shown:
                patience = PATIENCE if step.serves or step.reads_log else 0
                eventually(lambda: self._compare(step), f"what is shown for `{step.command}`", within=patience)
        finally:
            print(f"$ {step.command}\n{self._output.read_text()}", end="")
        for ports in re.findall(r"\bfor port in ([\d ]+);", self._here(step.command)):
            for port in map(int, ports.split()):
                eventually(lambda port=port: listens(port), f"somebody at port {port}")

    def _here(self, text: str) -> str:
        """The text with the ports and process ids of this run."""
        return re.sub(r"\d+", lambda match: self._names.get(match[0], match[0]), text)

    def _type(self, step: Step) -> None:
        command = self._here(step.command)
        if step.serves:
            ports = f"--port {self._names['8080']} --admin {self._names['8404']}"
            command = command.replace("python lb.py", f"python lb.py {ports}")
        # What takes seconds to be watched is over in a third of them.
        command = re.sub(r"(sleep|--duration) (\d+)", lambda took: f"{took[1]} {int(took[2]) / 3:.2f}", command)
        # Each has a file of its own, for what runs on in the background goes on writing to it.
        self._commands += 1
        self._output = self._directory / f"output-{self._commands}"
        with self._output.open("wb") as output:
            terminal = subprocess.Popen(
                ["bash", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env=self._environment,
                start_new_session=True,
            )
        if step.leaves_something_running:
            self._terminals.append(terminal)
        if step.serves:
            self._serving = terminal
        elif terminal.wait(2 * PATIENCE) != 0:
            assert step.reads_log, f"`{step.command}` failed: {self._output.read_text()}"

    def _compare(self, step: Step) -> bool:
        if step.reads_log:
            self._type(step)
        got = self._output.read_text()
        shown = self._here(step.shown)
        if step.command.startswith("grep "):  # what happens at the same moment is logged in either order
            shown, got = sort_by_meaning(shown), sort_by_meaning(got)
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if not doctest.OutputChecker().check_output(masked(shown), masked(got), flags):
            assert step.serves or step.reads_log, f"$ {step.command}\n--- shown:\n{step.shown}--- got:\n{got}"
            return False
        process = re.compile(r"process (\d+) started")
        self._names.update(zip(process.findall(step.shown), process.findall(self._output.read_text()), strict=True))
        return True

    def interrupt(self) -> None:
        """Ctrl-C in the terminal in which something serves."""
        if self._serving:
            os.killpg(self._serving.pid, signal.SIGINT)
            assert self._serving.wait(PATIENCE) == 0
            self._serving = None

    def close(self) -> None:
        """Close every terminal."""
        for terminal in self._terminals:
            try:
                os.killpg(terminal.pid, signal.SIGTERM)  # a hangup is ignored by all that `nohup` has started
            except ProcessLookupError:
                continue  # nothing was left running in it
        if self._serving:
            self._serving.wait(PATIENCE)


def configured_ports(directory: Path) -> list[str]:
    settings = json.loads((directory / "servers.json").read_text())
    return [str(server["port"]) for server in settings["servers"]]


def sort_by_meaning(lines: str) -> str:
    return "".join(sorted(lines.splitlines(keepends=True), key=masked))


def listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), PATIENCE):
            return True
    except ConnectionRefusedError:
        return False


@contextmanager
def touring(directory: Path) -> Iterator[Tour]:
    tour = Tour(directory)
    try:
        yield tour
        tour.interrupt()
    finally:
        tour.close()


@pytest.mark.program
@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="the tour is taken with bash and curl")
def test_the_tour_shows_what_it_says(tmp_path):
    shutil.copy(ROOT / "LICENSE", checkout(tmp_path))
    with touring(tmp_path) as tour:
        for step in steps():
            tour.take(step)


def test_it_begins_with_one_sentence_and_the_two_commands():
    title, sentence, rest = README.split("\n\n", 2)
    assert title.startswith("# ")
    assert sentence.count(". ") == 0
    assert sentence.endswith(".")
    first = BLOCK.match(rest)
    assert first
    commands = [line.split("  ")[0] for line in first[2].splitlines()]
    assert commands == ["python lb.py", "pip install -r requirements.txt && python -m pytest"]


def test_every_link_leads_somewhere():
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", README), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.removeprefix("#") in anchors if target.startswith("#") else (ROOT / target).exists(), target


# What the tables say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [lb, health_checker, client, backend_server], ids=lambda module: module.__name__)
def test_each_flag_of_a_program_is_named_and_no_other(program: ModuleType, capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    flag = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
    flags = set(flag.findall(capsys.readouterr().out)) - {"-h", "--help"}
    table = " ".join(" ".join(code(row[0])) for row in rows(f"`{program.__name__}.py`"))
    assert set(flag.findall(table)) == flags


SERVER = {"host": "127.0.0.1", "port": 8001}
SCALING = {"command": ["{python}", "app.py", "{port}"], "ports": "9001-9100"}


def settings(text: dict[str, Any]) -> Config:
    """What such a file amounts to, relative paths starting here."""
    config = parse(json.dumps({"servers": [SERVER], **text}), "servers.json", Path.cwd())
    log = replace(config.log, file=os.path.abspath(config.log.file))
    return replace(config, log=log, admin=replace(config.admin, asked_for=False))


SWITCHES = ("sticky", "servers[].tls")  # keys that are true or false, or an object


def documented() -> dict[str, str]:
    """Key -> its default as it is printed, "" where it has none."""
    return {code(key)[0]: "".join(code(default)) for key, default, _ in rows("Configuration")}


def keys(place: str, document: object) -> set[str]:
    """The keys that the configuration itself names when it is given a wrong one."""
    with pytest.raises(ConfigError) as error:
        parse(json.dumps(document), "", Path())
    names = re.search(r"the keys here are (.*)", str(error.value))
    assert names
    return {f"{place}{name}" for name in re.split(r", | and ", names[1])}


def test_each_key_of_the_configuration_is_in_the_table_and_no_other():
    wrong = {"?": 0}
    top = keys("", {"servers": [SERVER], **wrong})
    known = keys("servers[].", {"servers": [{**SERVER, **wrong}]})
    known |= keys("servers[].tls.", {"servers": [{**SERVER, "tls": wrong}]})
    for name in top:
        if name in documented():
            known.add(name)
        if name not in documented() or name in SWITCHES:
            known |= keys(f"{name}.", {"servers": [SERVER], name: wrong})
    assert set(documented()) == known


def test_each_default_of_a_switch_is_what_true_stands_for():
    for switch in SWITCHES:
        *path, name = switch.split(".")
        inner = {
            key.rpartition(".")[2]: json.loads(default)
            for key, default in documented().items()
            if key.startswith(f"{switch}.") and default
        }

        def document(value: object, name: str = name, path: list[str] = path) -> dict[str, Any]:
            return {"servers": [{**SERVER, name: value}]} if path else {name: value}

        assert settings(document(inner)) == settings(document(True))
        assert settings(document(True)) != settings({})


def test_each_default_in_the_table_is_the_true_one():
    """A file in which all of them are written out means the same as one that has none of them."""
    spelled: dict[str, Any] = {}
    server = dict(SERVER)
    without = set()
    for key, default in documented().items():
        *path, name = key.split(".")
        if default in ("", "mode"):
            without.add(key)
        elif ".".join(path) in (*SWITCHES, "tls"):
            continue
        elif path == ["servers[]"]:
            server[name] = json.loads(default)
        else:
            (spelled.setdefault(path[0], {}) if path else spelled)[name] = json.loads(default)
    assert without == {
        "servers", "servers[].id", "servers[].host", "servers[].port", "servers[].command",
        "health_check.type", "health_check_url", "health_check_interval", "scaling.command", "scaling.ports",
        "tls.certificates", "servers[].tls.server_name",
    }  # fmt: skip
    spelled["scaling"] |= SCALING
    assert settings({**spelled, "servers": [server]}) == settings({"scaling": SCALING})


def test_the_mistake_that_is_shown_is_told_in_these_words():
    (shown,) = [line for block in blocks("") for line in block.splitlines() if line.startswith("lb: ")]
    with pytest.raises(ConfigError) as error:
        parse(json.dumps({"servers": [SERVER], "health_check": {"intervall": 2}}), "servers.json", Path())
    assert shown == f"lb: {error.value}"


def test_each_example_of_a_file_is_one():
    first, encrypted, *rest = [parse(block, "README.md", Path()) for block in blocks("json")]
    assert [server.id for server in first.servers] == ["blue", "green"]
    assert encrypted.tls
    assert rest
    assert all(config.scaling for config in rest)


def test_each_policy_is_in_the_table_and_no_other():
    assert [code(row[0])[0] for row in rows("Policies")] == list(POLICIES)


def test_the_policy_of_ones_own_does_what_it_says(tmp_path):
    policy, _ = blocks("python")
    assert len(policy.splitlines()) <= 10
    (tmp_path / "my_policy.py").write_text(policy)
    servers = parse(json.dumps([SERVER, {**SERVER, "port": 8002}]), "", Path()).servers
    complaints: list[str] = []
    picker = make_picker("my_policy.py", tmp_path, complaints.append)
    pool = Pool([Backend(server) for server in servers], picker)
    leased = [pool.lease("192.0.2.1") for _ in range(20)]
    assert [backend.id for backend in leased if backend] == ["1"] * 10 + ["2"] * 10
    pool.release(pool.backends[1])
    assert pool.lease("192.0.2.1") is pool.backends[1]
    assert complaints == []


def test_each_path_of_the_operators_port_is_in_the_table_and_no_other():
    listed = {("GET", "/")}
    for cell, _ in rows("The operator's port"):
        first, *others = code(cell)
        method, path = first.split()
        listed |= {(method, each) for each in (path, *others)}
    assert listed == {(route.method, route.path) for route in ROUTES}


def test_the_formats_of_the_log_look_like_the_lines_that_are_shown():
    """But for time, host and process."""
    record = (
        1795208400.0, "127.0.0.1:51244", b"GET /status/404 HTTP/1.1", 404, 22, "1",
        0.0, 0.0, 0.0002, 0.0008, 0.0009, "--", 1, "", 0, 1, 1, 1, 0,
    )  # fmt: skip
    elsewhere = re.compile(r"^(\w+ +\d+ )?[\d:. -]+|\S+ haproxy\[\d+\]|\[\d.*?\]|[\d-]+T[\d:.]+Z")
    shown = section("The log").split("```\n")[1].splitlines()
    written = [format.exchange(record) for format in FORMATS.values()]
    assert [elsewhere.sub("", line) for line in shown] == [elsewhere.sub("", line) for line in written]


def test_a_refusal_is_explained_as_is_shown():
    """But for times, the client's port and the id."""
    varying = re.compile(r"[\da-f]{8}-[\da-f]+|[\d-]{10} [\d:]{8}|[\d.]+ ms|127\.0\.0\.1:\d+")
    with ExitStack() as stack:
        ports = [stack.enter_context(backend_server.serving(backend_server.Backend())).port for _ in range(3)]
        servers = [
            {"id": name, "host": "127.0.0.1", "port": port, "max_connections": int(name == "blue")}
            for name, port in zip(("blue", "green", "red"), ports, strict=True)
        ]
        keys = {"timeouts": {"queue": 0.1}, "health_check": {"fall": 1}, "admin": {"address": "127.0.0.1:0"}}
        balancer = stack.enter_context(LoadBalancer(servers, **keys))
        blue, _, red = balancer.pool.backends
        balancer.fail("green")
        balancer.pool.set_admin(red, Admin.DRAIN, "the test")
        eventually(lambda: balancer.states == {"blue": "UP", "green": "DOWN", "red": "DRAIN"}, "they stand as is shown")
        client = stack.enter_context(socket.create_connection((balancer.host, balancer.port), PATIENCE))
        client.sendall(b"GET /slow/60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        eventually(lambda: blue.active == 1, "it has its one request in hand")
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(balancer.url, timeout=PATIENCE)
        refusal.value.close()
        port = urlsplit(balancer.admin_url).port
        found = explanation(AdminPort(port=port or 0), refusal.value.headers["X-Request-Id"])
    (shown,) = [block for block in blocks("") if block.startswith("request ")]
    assert varying.sub("*", shown) == varying.sub("*", found)


@pytest.mark.program
def test_the_example_for_a_test_suite_passes(tmp_path):
    _, example = blocks("python")
    for port, free in zip(("9301", "9302"), free_ports(2), strict=True):
        assert port in example
        example = example.replace(port, str(free))
    (checkout(tmp_path) / "test_example.py").write_text(example)
    ended = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "test_example.py", directory=tmp_path)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.splitlines()[-1].startswith("2 passed")


def test_each_module_is_in_the_list_at_its_floor():
    listed = {
        name.removesuffix(".py"): int(floor)
        for floor, names, _ in rows("Where to read the code")
        for name in code(names)
    }
    modules = {path.stem for path in (ROOT / "balancer").glob("*.py")} - {"__init__"}
    assert set(listed) == modules
    lowest = FLOOR["balancer.config"]
    assert listed == {name: FLOOR[f"balancer.{name}"] - lowest for name in modules}
