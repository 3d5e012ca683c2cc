"""Another configuration while the balancer runs: what differs, and how a changed file is noticed."""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from balancer import config as configuration
from balancer import servers_file
from balancer.config import Config, ConfigError, override
from balancer.reload import ABSENCE, PERIOD, RETRY, Difference, Watcher, applicable, difference
from conftest import PATIENCE, eventually
from test_servers_file import one_by_one, plain_and_changed

# What differs -------------------------------------------------------------------------------------------------------


def of(*entries: dict[str, Any], **keys: Any) -> Config:
    servers = [{"host": "127.0.0.1", **entry} for entry in entries]
    return configuration.parse(json.dumps({"servers": servers, **keys}), "servers.json", Path("/nowhere"))


ONE, TWO, THREE = ({"id": number, "port": 8000 + number} for number in (1, 2, 3))
SCALING = {"command": ["app", "--port", "{port}"], "ports": "9001-9100"}
SCALED = (
    "command app --port '{port}', ports 9001-9100, min 1, max 8, target_active 10, idle_stop 300, pause 5, "
    "start_timeout 30, host 127.0.0.1"
)
CERTIFICATES = [{"cert": "/a.pem", "key": "/a.key"}]
TLS = {"certificates": CERTIFICATES}

CHANGES: list[tuple[Config, Config, list[str]]] = [
    (of(ONE, TWO), of(ONE, TWO), []),
    (of(ONE, TWO), of(TWO, ONE), []),  # round robin goes by turns that backends keep, not by places
    (of(ONE), of(ONE, THREE), ["added backend 3 at 127.0.0.1:8003"]),
    (of(ONE, TWO), of(TWO), ["removed backend 1 at 127.0.0.1:8001"]),
    (
        of(ONE, TWO, TWO | {"id": "gone", "port": 1}),
        of(TWO | {"weight": 3}, THREE, {"id": 4, "host": "::1", "port": 8}),
        [
            "removed backend 1 at 127.0.0.1:8001",
            "removed backend gone at 127.0.0.1:1",
            "added backend 3 at 127.0.0.1:8003",
            "added backend 4 at [::1]:8",
            "backend 2: weight 1 -> 3",
        ],
    ),
    (
        of(ONE | {"command": ["a"]}),
        of(ONE | {"backup": True, "max_connections": 9, "command": ["a", "b c", "\n"]}),
        [
            "backend 1: backup false -> true",
            "backend 1: max_connections 0 -> 9",
            "backend 1: command a -> \"a 'b c' '\\n'\"",
        ],
    ),
    (of(ONE | {"command": ["a"]}), of(ONE), ["backend 1: command a -> none"]),
    (
        of(ONE, TWO),
        of(ONE, TWO | {"id": "b", "weight": 2}),
        ["backend at 127.0.0.1:8002: id 2 -> b", "backend b: weight 1 -> 2"],
    ),
    (  # another host in the same place is another backend
        of(ONE),
        of(ONE | {"host": "127.0.0.2"}),
        ["removed backend 1 at 127.0.0.1:8001", "added backend 1 at 127.0.0.2:8001"],
    ),
    (of(ONE), of(ONE, algorithm="ip_hash", retries=1), ["algorithm round_robin -> ip_hash", "retries 3 -> 1"]),
    (of(ONE), of(ONE, timeouts={"server": 30, "queue": 0.5}), ["timeouts.server 60 -> 30", "timeouts.queue 5 -> 0.5"]),
    (of(ONE), of(ONE, health_check={"expect": "2xx,404"}), ["health_check.expect 200-399 -> 200-299,404"]),
    (of(ONE), of(ONE, health_check={"type": "tcp"}), ["health_check.type http -> tcp"]),
    (of(ONE), of(ONE, log={"file": "", "slow": 0.25}), ["log.file load_balancer.log -> none", "log.slow 1 -> 0.25"]),
    (of(ONE), of(ONE, scaling=SCALING), [f"added scaling: {SCALED}"]),
    (of(ONE, scaling=SCALING), of(ONE), ["removed scaling"]),
    (of(ONE, scaling=SCALING), of(ONE, scaling=SCALING | {"max": 9}), ["scaling.max 8 -> 9"]),
    (
        of(ONE),
        of(ONE | {"tls": True, "send_proxy": "v2"}),
        ["backend 1: added tls: ca none, server_name none, verify true", "backend 1: send_proxy none -> v2"],
    ),
    (of(ONE | {"tls": True}), of(ONE | {"tls": {"verify": False}}), ["backend 1: tls.verify true -> false"]),
    (of(ONE | {"tls": True}), of(ONE), ["backend 1: removed tls"]),
    (of(ONE), of(ONE, sticky=True), ["added sticky: cookie lb, secret_file none"]),
    (of(ONE, sticky=True), of(ONE, sticky={"cookie": "a"}), ["sticky.cookie lb -> a"]),
    (of(ONE, sticky=True), of(ONE), ["removed sticky"]),
    (of(ONE, tls=TLS), of(ONE), ["removed tls"]),
    (of(ONE), of(ONE, tls=TLS), ["added tls: certificates /a.pem /a.key, min_version 1.2, redirect_from none"]),
    (
        of(ONE, tls=TLS),
        of(ONE, tls={"certificates": [*CERTIFICATES, {"cert": "/b c.pem", "key": "/b.key"}], "min_version": "1.3"}),
        ["tls.certificates /a.pem /a.key -> /a.pem /a.key '/b c.pem' /b.key", "tls.min_version 1.2 -> 1.3"],
    ),
    (
        of(ONE, algorithm="hash", hash_on="path", allow=["::1", "10.0.0.0/8"]),
        of(ONE, algorithm="hash", hash_on="query:a", hash_balance=2, allow=["::1"], deny=["::2"], forwarded=True),
        [
            "hash_on path -> query:a",
            "hash_balance 1.25 -> 2",
            "allow ::1/128 10.0.0.0/8 -> ::1/128",
            "deny none -> ::2/128",
            "forwarded false -> true",
        ],
    ),
    (of(ONE), of(ONE, limits={"client_rate": 0.5}), ["limits.client_rate 0 -> 0.5"]),
]


@pytest.mark.parametrize(("old", "new", "lines"), CHANGES, ids=["; ".join(lines) or "none" for _, _, lines in CHANGES])
def test_a_difference_is_told_in_lines(old: Config, new: Config, lines: list[str]) -> None:
    found = difference(old, new)
    assert list(found.lines) == lines
    assert str(found) == "\n".join(lines)
    assert bool(found) is bool(lines)
    assert found.restart_needed == ()
    assert applicable(old, new) == new


def test_the_lines_are_of_four_kinds() -> None:
    found = difference(of(ONE), of(TWO, retries=1, mode="tcp", health_check={"type": "http"}))
    assert found == Difference(
        removed=("removed backend 1 at 127.0.0.1:8001",),
        added=("added backend 2 at 127.0.0.1:8002",),
        changed=("retries 3 -> 1",),
        restart_needed=("mode http -> tcp: takes effect at the next start",),
    )
    assert found.lines == found.removed + found.added + found.changed + found.restart_needed


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ({"listen": {"port": 9090}}, ["listen 127.0.0.1:8080 -> 127.0.0.1:9090"]),
        ({"listen": {"host": "::", "port": 0}}, ["listen 127.0.0.1:8080 -> [::]:0"]),
        ({"mode": "tcp"}, ["mode http -> tcp", "health_check.type http -> tcp"]),
        ({"mode": "tcp", "health_check": {"type": "http"}}, ["mode http -> tcp"]),
        ({"admin": {"address": "off"}}, ["admin.address 127.0.0.1:8404 -> off"]),
        ({"admin": {"token_file": "/run/token"}}, ["admin.token_file none -> /run/token"]),
    ],
)
def test_what_cannot_change_while_running_is_said_to_wait(keys: dict[str, Any], lines: list[str]) -> None:
    old, new = of(ONE), of(ONE, **keys)
    found = difference(old, new)
    assert found.lines == found.restart_needed == tuple(f"{line}: takes effect at the next start" for line in lines)
    assert applicable(old, new) == old
    assert difference(applicable(old, new), new) == found, "it is said at each later reload, too"


def test_the_port_that_redirects_waits_and_all_else_of_tls_does_not() -> None:
    plain, encrypted = of(ONE), of(ONE, tls=TLS)
    redirecting = of(ONE, tls=TLS | {"redirect_from": "127.0.0.1:80"})
    waits = ("tls.redirect_from none -> 127.0.0.1:80: takes effect at the next start",)
    assert difference(encrypted, redirecting) == Difference(restart_needed=waits)
    assert applicable(encrypted, redirecting) == encrypted
    found = difference(plain, redirecting)
    assert found.changed == ("added tls: certificates /a.pem /a.key, min_version 1.2, redirect_from none",)
    assert found.restart_needed == waits
    assert applicable(plain, redirecting) == encrypted


def test_tls_stays_while_there_is_a_port_that_redirects_to_it() -> None:
    redirecting = of(ONE, tls=TLS | {"redirect_from": "127.0.0.1:80"})
    assert difference(redirecting, of(ONE)) == Difference(
        restart_needed=("removed tls: takes effect at the next start",)
    )
    assert applicable(redirecting, of(ONE, retries=1)) == replace(redirecting, retries=1)
    other = of(ONE, tls={"certificates": CERTIFICATES, "min_version": "1.3"})
    assert difference(redirecting, other).changed == ("tls.min_version 1.2 -> 1.3",)


def test_probes_that_are_asked_for_change_even_if_the_mode_must_wait() -> None:
    old, new = of(ONE), of(ONE, mode="tcp", health_check={"type": "tcp", "rise": 1})
    assert difference(old, new).changed == ("health_check.rise 2 -> 1", "health_check.type http -> tcp")
    assert applicable(old, new) == replace(new, mode="http")


def test_no_field_of_the_configuration_is_forgotten(tmp_path: Path) -> None:
    """Whatever changes is told, and either applies or waits for a restart."""
    plain, changed = plain_and_changed(tmp_path)
    waiting = set()
    for name, config in one_by_one(plain, changed):
        found = difference(plain, config)
        assert found, name
        assert (applicable(plain, config) == config) is not bool(found.restart_needed), name
        if found.restart_needed:
            waiting.add(name)
    assert waiting == {"host", "port", "mode", "admin.host", "admin.port", "admin.token_file", "tls.redirect_from"}


# Noticing it --------------------------------------------------------------------------------------------------------

GOOD = '[{"host": "127.0.0.1", "port": 8001}]'
OTHER = '[{"host": "127.0.0.1", "port": 8001}, {"host": "127.0.0.1", "port": 8002}]'
THIRD = '[{"host": "127.0.0.1", "port": 8001, "weight": 3}]'
BROKEN = '[{"host": "127.0.0.1", "port": 80x1}]'


RENEWED = "renewed"


class Watch:
    """A watcher of a real file with a clock in the hand; what it told is taken from it by `told`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 1000.0
        self.others = (1,)  # what is seen of a certificate
        self.reads = 0
        self.events: list[Config | str] = []
        self.bugs: list[tuple[str, Exception]] = []
        self.on_read: Callable[[], object] = lambda: None
        self.on_apply: Callable[[], object] = lambda: None
        self.watcher = Watcher(
            path,
            self.load(),
            self.load,
            self.apply,
            self.events.append,
            lambda where, error: self.bugs.append((where, error)),
            lambda: self.now,
            lambda: self.others,
            self.renew,
        )

    def load(self) -> Config:
        self.reads += 1
        try:
            return override(configuration.load(self.path), port=9000)
        finally:
            self.on_read()

    def apply(self, config: Config) -> None:
        self.on_apply()
        self.events.append(config)

    def renew(self) -> None:
        self.on_apply()
        self.events.append(RENEWED)

    def look(self, times: int = 2) -> None:
        """So many looks; two are what a change takes."""
        for _ in range(times):
            self.now += PERIOD
            self.watcher.look()

    def told(self) -> list[Config | str]:
        told = list(self.events)
        self.events.clear()
        return told


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "servers.json"
    path.write_text(GOOD)
    return path


@pytest.fixture
def watch(path: Path) -> Watch:
    """It has looked already, and found what it knew."""
    watch = Watch(path)
    watch.look()
    assert watch.told() == []
    return watch


def config_in(path: Path, text: str) -> Config:
    return override(configuration.parse(text, str(path), path.parent), port=9000)


def outlive_tick(path: Path) -> None:
    """Until a file that changes is given another time than this one has: that clock goes in steps of milliseconds."""
    other = path.with_name("clock")

    def is_later() -> bool:
        other.touch()
        return other.stat().st_ctime_ns > path.stat().st_ctime_ns

    eventually(is_later)


def test_a_file_that_stays_the_same_is_not_read_again(watch: Watch) -> None:
    reads = watch.reads
    watch.look(100)
    assert (watch.reads, watch.told()) == (reads, [])


def test_a_change_from_before_the_watch_is_noticed(path: Path) -> None:
    """Commands are started, and logs opened, between the reading of the file and the first look."""
    watch = Watch(path)
    path.write_text(OTHER)
    watch.look()
    assert watch.told() == [config_in(path, OTHER)]


def test_a_file_written_in_place_is_applied_once_it_rests(watch: Watch) -> None:
    watch.path.write_text(OTHER)
    watch.look(1)
    assert watch.told() == []
    watch.look(1)
    assert watch.told() == [config_in(watch.path, OTHER)]
    watch.look(10)
    assert watch.told() == []


def test_a_file_that_is_truncated_first_is_no_alarm(watch: Watch) -> None:
    watch.path.write_text("")
    watch.look(int(ABSENCE / PERIOD))
    assert watch.told() == []
    watch.path.write_text(OTHER)
    watch.look()
    assert watch.told() == [config_in(watch.path, OTHER)]


def test_a_file_that_grows_from_look_to_look_is_not_read(watch: Watch) -> None:
    reads = watch.reads
    with watch.path.open("w") as file:
        for letter in OTHER:
            file.write(letter)
            file.flush()
            watch.look(1)
    assert (watch.reads, watch.told()) == (reads, [])
    watch.look(1)
    assert watch.told() == [config_in(watch.path, OTHER)]


def test_a_file_that_is_left_half_written_is_an_error_until_it_is_whole(watch: Watch) -> None:
    watch.path.write_text(OTHER[:50])
    watch.look(10)
    [line] = watch.told()
    assert str(line).startswith(f"{watch.path}: line 1, column ")
    with watch.path.open("a") as file:
        file.write(OTHER[50:])
    watch.look()
    assert watch.told() == [config_in(watch.path, OTHER)]


def test_a_file_that_is_replaced_is_noticed(watch: Watch) -> None:
    """Most editors do: a temporary file is renamed over it."""
    for text in (OTHER, GOOD, THIRD):
        temporary = watch.path.with_suffix(".swp")
        temporary.write_text(text)
        temporary.replace(watch.path)
        watch.look()
        assert watch.told() == [config_in(watch.path, text)]


def test_a_file_that_is_away_for_a_moment_is_no_alarm(watch: Watch) -> None:
    """Others move it to a backup and write another, or the same one, in its place."""
    backup = watch.path.with_suffix(".bak")
    watch.path.rename(backup)
    watch.look(int(ABSENCE / PERIOD))
    backup.rename(watch.path)
    watch.look()
    assert watch.told() == []
    watch.path.rename(backup)
    watch.look()
    watch.path.write_text(OTHER)
    watch.look()
    assert watch.told() == [config_in(watch.path, OTHER)]


@pytest.mark.parametrize(
    ("lose", "line"),
    [
        (Path.unlink, "cannot be read: No such file or directory"),
        (lambda path: path.write_text(""), "is empty; the least there can be is"),
    ],
    ids=["gone", "empty"],
)
def test_a_file_that_stays_away_is_an_error_told_once(watch: Watch, lose: Callable[[Path], object], line: str) -> None:
    lose(watch.path)
    watch.look(int(ABSENCE / PERIOD))
    assert watch.told() == []
    watch.look(1)
    [told] = watch.told()
    assert str(told).startswith(f"{watch.path}: {line}")
    watch.look(100)
    assert watch.told() == []
    watch.path.write_text(GOOD)
    watch.look()
    assert watch.told() == [RENEWED], "it is what runs already: the error is over, and nothing else"


def test_a_link_whose_target_changes_is_noticed(tmp_path: Path) -> None:
    """A Kubernetes ConfigMap: the file is a link through "..data", and that is replaced by one to another directory."""
    for version, text in enumerate((GOOD, OTHER), 1):
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "servers.json").write_text(text)
    (tmp_path / "..data").symlink_to("..1")
    path = tmp_path / "servers.json"
    path.symlink_to("..data/servers.json")
    watch = Watch(path)
    watch.look()
    (tmp_path / "..data_tmp").symlink_to("..2")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    shutil.rmtree(tmp_path / "..1")
    watch.look()
    assert watch.told() == [config_in(path, OTHER)]


def test_a_touch_is_read_and_changes_nothing(watch: Watch) -> None:
    reads = watch.reads
    os.utime(watch.path, ns=(1, 1))
    watch.look()
    assert (watch.reads, watch.told()) == (reads + 1, [])


def test_a_file_of_the_same_length_and_time_is_noticed(watch: Watch) -> None:
    """rsync -t and cp -p set the time back."""
    status = watch.path.stat()
    outlive_tick(watch.path)
    with watch.path.open("r+") as file:
        file.write(GOOD.replace("8001", "8009"))
    os.utime(watch.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    watch.look()
    assert watch.told() == [config_in(watch.path, GOOD.replace("8001", "8009"))]


def test_a_file_that_may_not_be_read_is_an_error_until_it_may(watch: Watch) -> None:
    outlive_tick(watch.path)
    watch.path.chmod(0)
    if os.access(watch.path, os.R_OK):
        pytest.skip("root may read anything")
    watch.look()
    assert watch.told() == [f"{watch.path}: cannot be read: Permission denied"]
    outlive_tick(watch.path)
    watch.path.chmod(0o600)
    watch.look()
    assert watch.told() == [config_in(watch.path, GOOD)]


def test_one_error_is_told_once_and_another_again(watch: Watch) -> None:
    watch.path.write_text(BROKEN)
    watch.look(10)
    [first] = watch.told()
    watch.path.write_text(BROKEN + "\n")
    watch.look(10)
    assert watch.told() == [], "the text is another, and the error the same"
    watch.path.write_text("[]")
    watch.look()
    [second] = watch.told()
    assert first != second
    watch.path.write_text(GOOD)
    watch.look()
    assert watch.told() == [RENEWED]
    watch.path.write_text("[]")
    watch.look()
    assert watch.told() == [second], "it was mended in between"


def test_a_file_that_is_written_while_it_is_read_is_read_again(watch: Watch) -> None:
    watch.path.write_text(BROKEN)
    watch.on_read = lambda: watch.path.write_text(OTHER)
    watch.look()
    watch.on_read = lambda: None
    assert watch.told() == []
    watch.look()
    assert watch.told() == [config_in(watch.path, OTHER)]


def test_who_asks_has_the_file_read_though_it_is_the_same(watch: Watch) -> None:
    watch.watcher.notice_now()
    watch.look(1)
    assert watch.told() == [config_in(watch.path, GOOD)]
    watch.look(10)
    assert watch.told() == []


def test_who_asks_right_after_writing_need_not_ask_again(watch: Watch) -> None:
    watch.path.write_text("")
    watch.watcher.notice_now()
    watch.look()
    assert watch.told() == []
    watch.path.write_text(GOOD)
    watch.look()
    assert watch.told() == [config_in(watch.path, GOOD)]


def test_who_asks_while_the_file_is_being_written_need_not_ask_again(watch: Watch) -> None:
    watch.watcher.notice_now()
    watch.on_read = lambda: watch.path.write_text(GOOD + "\n")
    watch.look(1)
    watch.on_read = lambda: None
    assert watch.told() == []
    watch.look()
    assert watch.told() == [config_in(watch.path, GOOD)]


def test_who_asks_is_told_an_error_again(watch: Watch) -> None:
    watch.path.write_text(BROKEN)
    watch.look()
    [line] = watch.told()
    watch.watcher.notice_now()
    watch.look(1)
    assert watch.told() == [line]


def test_an_error_whose_cause_is_elsewhere_is_over_when_that_is_mended(watch: Watch) -> None:
    """The file names a policy that is copied to its place only afterwards."""
    text = f'{{"servers": {GOOD}, "algorithm": "mine.py"}}'
    watch.path.write_text(text)
    watch.look()
    [line] = watch.told()
    assert f"there is no file {watch.path.parent / 'mine.py'}" in str(line)
    watch.now += RETRY
    watch.look(1)
    assert watch.told() == []
    (watch.path.parent / "mine.py").touch()
    watch.look(1)
    assert watch.told() == []
    watch.now += RETRY
    watch.look(1)
    assert watch.told() == [config_in(watch.path, text)]


@pytest.mark.parametrize("error", [ConfigError("algorithm: is of no use"), OSError("cannot open the log x")])
def test_what_cannot_be_applied_is_an_error_like_others(watch: Watch, error: Exception) -> None:
    def fail() -> None:
        raise error

    watch.on_apply = fail
    watch.path.write_text(OTHER)
    watch.look(10)
    assert watch.told() == [str(error)]
    watch.now += RETRY
    watch.look(1)
    assert watch.told() == []
    watch.on_apply = lambda: None
    watch.now += RETRY
    watch.look(1)
    assert watch.told() == [config_in(watch.path, OTHER)]


def test_what_the_balancer_wrote_itself_is_not_applied_again(watch: Watch) -> None:
    servers_file.rewrite(watch.path, add=[{"id": "new", "host": "127.0.0.1", "port": 8002}])
    watch.watcher.known(watch.load())
    watch.look()
    assert watch.told() == []
    watch.path.write_text(GOOD)
    watch.look()
    assert watch.told() == [config_in(watch.path, GOOD)]


def test_another_file_of_the_configuration_that_changes_is_applied_once_it_rests(watch: Watch) -> None:
    """A certificate was renewed: the configuration is the same, and what it names is not."""
    watch.others = (2,)
    watch.look(1)
    watch.others = (3,)
    watch.look(1)
    assert watch.told() == []
    watch.look(1)
    assert watch.told() == [RENEWED]
    watch.look(10)
    assert watch.told() == []


def test_another_file_that_is_of_no_use_is_an_error_told_once_and_over_when_it_is_mended(watch: Watch) -> None:
    def fail() -> None:
        raise ConfigError("tls: the key does not match")

    watch.on_apply, watch.others = fail, (2,)
    watch.look(10)
    assert watch.told() == ["tls: the key does not match"]
    watch.others = (3,)  # touched, and still wrong
    watch.look(10)
    assert watch.told() == []
    watch.on_apply, watch.others = (lambda: None), (4,)
    watch.look()
    assert watch.told() == [RENEWED]
    watch.now += RETRY
    watch.look()
    assert watch.told() == []


def test_both_files_may_change_at_once(watch: Watch) -> None:
    watch.path.write_text(OTHER)
    watch.others = (2,)
    watch.look(10)
    assert watch.told() == [config_in(watch.path, OTHER)]


# The thread ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def told() -> queue.SimpleQueue[Any]:
    return queue.SimpleQueue()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that looks so often that no test waits for it."""
    monkeypatch.setattr("balancer.reload.PERIOD", 0.01)


@pytest.fixture
def running(path: Path, told: queue.SimpleQueue[Any], often: None) -> Iterator[Watcher]:
    def load() -> Config:
        return configuration.load(path)

    watcher = Watcher(path, load(), load, told.put, told.put, lambda *bug: told.put(bug))
    watcher.start()
    yield watcher
    watcher.stop()
    assert "reload" not in [thread.name for thread in threading.enumerate()]


def test_a_change_is_noticed_by_the_thread(path: Path, running: Watcher, told: queue.SimpleQueue[Any]) -> None:
    path.write_text(OTHER)
    assert len(told.get(timeout=PATIENCE).servers) == 2
    path.write_text(BROKEN)
    assert "not JSON" in told.get(timeout=PATIENCE)


def test_who_asks_does_not_wait_for_the_next_look(
    path: Path, told: queue.SimpleQueue[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("balancer.reload.PERIOD", 100 * PATIENCE)
    looked = threading.Event()
    config = configuration.load(path)

    def load() -> Config:
        looked.set()
        return config

    watcher = Watcher(path, config, load, told.put, told.put, lambda *bug: told.put(bug))
    watcher.look()
    watcher.start()
    try:
        assert looked.wait(PATIENCE)
        watcher.notice_now()
        assert told.get(timeout=PATIENCE) is config
    finally:
        watcher.stop()


def test_a_bug_in_who_applies_ends_no_watch(path: Path, told: queue.SimpleQueue[Any], often: None) -> None:
    def load() -> Config:
        return configuration.load(path)

    def fail_once(config: Config) -> None:
        if len(config.servers) == 2:
            raise RuntimeError("bug")
        told.put(config)

    watcher = Watcher(path, load(), load, fail_once, told.put, lambda *bug: told.put(bug))
    watcher.start()
    try:
        path.write_text(OTHER)
        where, error = told.get(timeout=PATIENCE)
        assert (where, str(error)) == ("reload", "bug")
        path.write_text(THIRD)
        assert told.get(timeout=PATIENCE).servers[0].weight == 3
    finally:
        watcher.stop()


def test_a_watch_that_never_began_can_be_stopped(watch: Watch) -> None:
    watch.watcher.stop()
    watch.watcher.stop()
