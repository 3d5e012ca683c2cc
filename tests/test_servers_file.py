"""servers.json written: a document says what its configuration says, and an edit does what it was asked for alone."""

from __future__ import annotations

import json
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from balancer import servers_file
from balancer.config import Config, ConfigError, Server, from_addresses, override, parse

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "servers.json"
SCALING = {"command": ["app", "{port}"], "ports": "9001-9100"}


def config_of(document: object, base: Path = Path("/nowhere")) -> Config:
    return parse(document if isinstance(document, str) else json.dumps(document), SOURCE, base)


# A configuration as a document -------------------------------------------------------------------------------------

ONE = {"host": "127.0.0.1", "port": 8001}
EVERYTHING: dict[str, Any] = {
    "servers": [
        {
            "id": 7,
            "host": "Web_1.test.",
            "port": 65534,
            "weight": 255,
            "backup": True,
            "max_connections": 5,
            "command": ["{python}", "-c", 'print("größe\\n")', "", "awk '{print $1}'"],
            "tls": {"ca": "ca.pem", "server_name": "web.test", "verify": False},
            "send_proxy": "v2",
        },
        {"host": "::1", "port": 1},
    ],
    "mode": "tcp",
    "algorithm": "mine.py",
    "hash_on": "header:X-User",
    "hash_balance": 1.5,
    "sticky": {"cookie": "where", "secret_file": "run/secret"},
    "retries": 0,
    "listen": {"host": "::", "port": 0},
    "health_check": {"path": "/a?b=c", "interval": 0.1, "timeout": 0.5, "rise": 1, "fall": 4, "expect": "200,2xx-404"},
    "timeouts": {
        "connect": 1,
        "handshake": 8,
        "request_head": 2,
        "client_idle": 3,
        "client": 4,
        "server": 5.125,
        "tunnel": 6,
        "queue": 0,
        "no_backend": 1,
        "drain_delay": 7,
        "drain": 0.25,
    },
    "limits": {
        "connections": 1,
        "head_bytes": 2048,
        "fields": 3,
        "request_line_bytes": 100,
        "queue": 0,
        "body_bytes": 5,
        "client_connections": 6,
        "client_rate": 0.5,
        "client_burst": 7,
    },
    "log": {"file": "logs/a.log", "format": "json", "level": "error", "slow": 2, "max_bytes": 1000, "backups": 0},
    "admin": {"address": "[::1]:8405", "token_file": "run/token"},
    "scaling": {
        "command": ["app", "{port}", "{id}"],
        "ports": "1-65534",
        "min": 0,
        "max": 2,
        "target_active": 0.5,
        "idle_stop": 60,
        "pause": 0.5,
        "start_timeout": 3,
        "host": "Apps.test",
    },
    "tls": {
        "certificates": [{"cert": "a.pem", "key": "a.key"}, {"cert": "/b.pem", "key": "/b.key"}],
        "min_version": "1.3",
        "redirect_from": "[::1]:80",
    },
    "trusted_proxies": ["10.0.0.0/8", "::1"],
    "proxy_protocol_from": ["10.0.0.1"],
    "allow": ["2001:DB8::/32"],
    "deny": ["0.0.0.0/0", "192.0.2.7"],
    "forwarded": True,
}
CERTIFICATES = [{"cert": "/a.pem", "key": "/a.key"}]


def again(config: Config) -> Config:
    """The configuration after a way through its document."""
    return parse(json.dumps(servers_file.document(config)), config.source, config.base)


@pytest.mark.parametrize(
    "document",
    [
        EVERYTHING,
        {"scaling": SCALING},
        [ONE, {"host": "web.test", "port": 80}],
        {"servers": [ONE], "mode": "tcp"},
        *({"servers": [ONE], key: value} for key, value in EVERYTHING.items() if key not in ("servers", "algorithm")),
        *({"servers": [ONE], "health_check": {"type": kind}} for kind in ("http", "tcp")),
        *(
            {"servers": [ONE], "health_check": {"expect": expect}}
            for expect in (204, "2xx-3xx", "200-399", "2XX, 404", "5xx,1xx,5xx")
        ),
        *(
            {"servers": [ONE], "admin": {"address": address}}
            for address in ("off", "127.0.0.1:8404", "0", "localhost:1", "[fe80::1%eth0]:8404", "0.0.0.0:9")
        ),
        {"servers": [ONE], "admin": {"token_file": "/run/token"}},
        {"servers": [ONE], "log": {"file": ""}},
        {"servers": [ONE], "log": {"file": "load_balancer.log"}},
        {"servers": [ONE], "log": {"file": "../../über alles.log"}},
        {"servers": [ONE], "timeouts": {"connect": 0.001, "tunnel": 1e6, "server": 0.1 + 0.2}},
        *({"servers": [ONE], "sticky": sticky} for sticky in (True, False, {}, {"cookie": "a"}, {"secret_file": "b"})),
        *({"servers": [ONE | {"tls": tls}]} for tls in (True, False, {}, {"verify": False}, {"ca": "ca.pem"})),
        {"servers": [ONE], "tls": {"certificates": CERTIFICATES}},
        {"servers": [ONE | {"send_proxy": "v1"}], "hash_on": "cookie:!#$%&'*+.^_`|~", "algorithm": "hash"},
    ],
)
def test_a_document_reads_as_the_configuration_it_was_made_of(document: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    config = config_of(document, tmp_path)
    assert again(config) == config


@pytest.mark.parametrize("mode", ["http", "tcp"])
@pytest.mark.parametrize("health_check", [{}, {"type": "http"}, {"type": "tcp"}])
def test_probes_that_follow_the_mode_still_do(mode: str, health_check: dict[str, str]) -> None:
    """`type` is not compared where it follows; a --mode given later tells the two apart."""
    config = config_of({"servers": [ONE], "mode": mode, "health_check": health_check})
    for later in ("http", "tcp"):
        assert override(again(config), mode=later) == override(config, mode=later)


def test_flags_and_addresses_of_the_command_line_are_in_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = override(from_addresses(["8001", "web.test:80"]), port=9000, interval="0.5", log_file="a.log", admin="off")
    assert servers_file.document(config) == {
        "servers": [{"id": "1", "host": "127.0.0.1", "port": 8001}, {"id": "2", "host": "web.test", "port": 80}],
        "listen": {"port": 9000},
        "health_check": {"interval": 0.5},
        "log": {"file": str(tmp_path / "a.log")},
        "admin": {"address": "off"},
    }
    assert again(config) == config


def test_what_is_default_is_left_out() -> None:
    assert servers_file.document(config_of([ONE])) == {"servers": [{"id": "1", **ONE}]}
    assert servers_file.document(config_of({"scaling": SCALING})) == {"servers": [], "scaling": SCALING}
    encrypted = {"servers": [ONE | {"id": "1", "tls": True}], "tls": {"certificates": CERTIFICATES}, "sticky": True}
    assert servers_file.document(config_of(encrypted)) == encrypted
    off = {"servers": [ONE | {"tls": False, "send_proxy": ""}], "sticky": False, "allow": [], "hash_on": ""}
    assert servers_file.document(config_of(off)) == servers_file.document(config_of([ONE]))
    timeouts = {"servers": [ONE], "timeouts": {"server": 60, "client": 30.0}}
    assert servers_file.document(config_of(timeouts))["timeouts"] == {"client": 30}


def test_the_shipped_file_comes_back() -> None:
    config = parse((ROOT / "servers.json").read_text(), SOURCE, ROOT)
    assert again(config) == config


TOLD_BY_THE_READER = {"source", "base", "follows_mode", "asked_for"}  # and by no key


def one_by_one(old: Any, new: Any) -> Iterator[tuple[str, Any]]:
    """The old dataclass with one field at a time as the new has it, also in dataclasses within; and that name."""
    for name in [field.name for field in fields(old) if field.name not in TOLD_BY_THE_READER]:
        was, now = getattr(old, name), getattr(new, name)
        assert was != now, f"{name} is the same in both"
        if is_dataclass(was):
            yield from ((f"{name}.{key}", replace(old, **{name: changed})) for key, changed in one_by_one(was, now))
        elif is_dataclass(was[0] if isinstance(was, tuple) and was else None):
            yield from ((f"{name}.{key}", replace(old, **{name: (one,)})) for key, one in one_by_one(was[0], now[0]))
        else:
            yield name, replace(old, **{name: now})


def plain_and_changed(base: Path) -> tuple[Config, Config]:
    """Two configurations that have no field alike."""
    (base / "mine.py").touch()
    plain = {
        "servers": [{"host": "a", "port": 9, "tls": True}],
        "health_check": {"type": "http"},
        "scaling": SCALING,
        "sticky": True,
        "tls": {"certificates": CERTIFICATES},
    }
    changed = EVERYTHING | {"health_check": EVERYTHING["health_check"] | {"type": "tcp"}}
    return config_of(plain | {"admin": {"address": "127.0.0.1:8404"}}, base), config_of(changed, base)


def test_no_field_of_the_configuration_is_forgotten(tmp_path: Path) -> None:
    """A field that `document` or `settings` lacks would be lost by a way through them."""
    plain, changed = plain_and_changed(tmp_path)
    configs = dict(one_by_one(plain, changed))
    assert {"port", "health_check.expect", "timeouts.drain_delay", "scaling.max", "sticky.cookie"} < configs.keys()
    assert {"servers.weight", "servers.tls.verify", "tls.min_version", "tls.certificates.key"} < configs.keys()
    for name, config in configs.items():
        assert again(config) == config != plain, name
        assert servers_file.settings(config) != servers_file.settings(plain), name


# The text of a file: examples --------------------------------------------------------------------------------------

LINES = """\
{
  "algorithm": "random",
  "servers": [
    {"host": "a", "port": 1},
    {"host": "b", "port": 2, "weight": 3},

    {"host": "c", "port": 3}
  ],
  "retries": 1
}
"""
BLOCKS = """\
[
\t{
\t\t"id": 1,
\t\t"host": "a",
\t\t"port": 1,
\t\t"command": [
\t\t\t"x"
\t\t]
\t},
\t{
\t\t"port": 2,
\t\t"host": "b"
\t}
]
"""
COMPACT = '[{"host":"a","port":1},{"host":"b","port":2}]'
INLINE = '{"servers": [{"host": "a", "port": 1}], "mode": "tcp"}\n'
COMMA_FIRST = """\
[ { "host" : "a"
  , "port" : 1
  }
, { "host" : "b"
  , "port" : 2
  }
]"""
PAIRS = """\
[{"host": "a", "port": 1}, {"host": "b", "port": 2},
 {"host": "c", "port": 3}, {"host": "d", "port": 4}]
"""
NEW = {"host": "z", "port": 9, "weight": 2}

EXAMPLES = [
    # of lines
    (LINES, {"add": [NEW]}, '"port": 3}\n', '"port": 3},\n\n    {"host": "z", "port": 9, "weight": 2}\n'),
    (LINES, {"change": {"1": {"weight": 5}}}, '"port": 1}', '"port": 1, "weight": 5}'),
    (LINES, {"change": {"2": {"weight": 5}}}, '"weight": 3', '"weight": 5'),
    (
        LINES,
        {"change": {"3": {"id": "x", "backup": True}}},
        '{"host": "c", "port": 3}',
        '{"id": "x", "host": "c", "port": 3, "backup": true}',
    ),
    (
        LINES,
        {"remove": ["3"]},
        '"weight": 3},\n\n    {"host": "c", "port": 3}\n',
        '"weight": 3}\n',
    ),
    (
        LINES,
        {"remove": ["2"]},
        '    {"host": "b", "port": 2, "weight": 3},\n\n    {"host": "c"',
        '\n    {"id": 3, "host": "c"',
    ),
    (
        LINES,
        {"remove": ["1"]},
        LINES[LINES.index('{"host": "a"') : LINES.index(', "port": 3}')],
        '{"id": 2, "host": "b", "port": 2, "weight": 3},\n\n    {"id": 3, "host": "c"',
    ),
    # of blocks
    (
        BLOCKS,
        {"add": [NEW | {"id": "n"}]},
        '"b"\n\t}\n',
        '"b"\n\t},\n\t{\n\t\t"id": "n",\n\t\t"port": 9,\n\t\t"host": "z",\n\t\t"weight": 2\n\t}\n',
    ),
    (
        BLOCKS,
        {"change": {"1": {"command": ["x"], "max_connections": 3}}},
        "\t\t]\n\t},",
        '\t\t],\n\t\t"max_connections": 3\n\t},',
    ),
    (BLOCKS, {"remove": ["1"]}, BLOCKS[2 : BLOCKS.index('"port": 2')], '\t{\n\t\t"id": 2,\n\t\t'),
    (BLOCKS, {"remove": ["2"]}, ',\n\t{\n\t\t"port": 2,\n\t\t"host": "b"\n\t}', ""),
    # on one line
    (
        COMPACT,
        {"add": [NEW | {"command": ["é", "b"]}]},
        "2}]",
        '2},{"host":"z","port":9,"weight":2,"command":["é","b"]}]',
    ),
    (COMPACT, {"change": {"2": {"weight": 9}}}, '"port":2}', '"port":2,"weight":9}'),
    (COMPACT, {"remove": ["1"]}, '{"host":"a","port":1},{', '{"id":2,'),
    (INLINE, {"add": [NEW]}, "1}]", '1}, {"host": "z", "port": 9, "weight": 2}]'),
    # with commas at the beginning
    (COMMA_FIRST, {"change": {"1": {"weight": 4}}}, ": 1\n", ': 1\n  , "weight" : 4\n'),
    (COMMA_FIRST, {"add": [NEW]}, "2\n  }\n", '2\n  }\n, { "host" : "z"\n  , "port" : 9\n  , "weight" : 2\n  }\n'),
    # of rows
    (PAIRS, {"add": [{"host": "e", "port": 5}]}, "4}]", '4}, {"host": "e", "port": 5}]'),
    (PAIRS, {"remove": ["4"]}, ', {"host": "d", "port": 4}', ""),
]


@pytest.mark.parametrize(("text", "edit", "old", "new"), EXAMPLES)
def test_an_edit_takes_after_its_neighbours(text: str, edit: dict[str, Any], old: str, new: str) -> None:
    assert text.count(old) == 1
    expected = text.replace(old, new)
    assert servers_file.edited(text, **edit) == expected
    carriage_returns = text.replace("\n", "\r\n")
    assert servers_file.edited(carriage_returns, **edit) == expected.replace("\n", "\r\n")
    assert servers_file.edited("\ufeff" + text, **edit) == "\ufeff" + expected


@pytest.mark.parametrize(
    ("gone", "rest"),
    [
        ("a", '[{"id": "b"},\n {"id": "c"}, {"id": "d"}]'),
        ("b", '[{"id": "a"},\n {"id": "c"}, {"id": "d"}]'),
        ("c", '[{"id": "a"}, {"id": "b"},\n {"id": "d"}]'),
        ("d", '[{"id": "a"}, {"id": "b"},\n {"id": "c"}]'),
    ],
)
def test_rows_stay_rows(gone: str, rest: str) -> None:
    text = '[{"id": "a"}, {"id": "b"},\n {"id": "c"}, {"id": "d"}]'
    for blanks in (" ", 9 * " "):
        wide = [part.replace("}, {", f"}},{blanks}{{") for part in (text, rest)]
        assert servers_file.edited(wide[0], remove=[gone]) == wide[1]


def test_a_lone_entry_of_several_lines_is_followed_by_one_like_it() -> None:
    text = '[\n  {\n    "host": "a",\n    "port": 1\n  }\n]\n'
    assert servers_file.edited(text, add=[{"host": "b", "port": 2}]) == (
        '[\n  {\n    "host": "a",\n    "port": 1\n  },\n  {\n    "host": "b",\n    "port": 2\n  }\n]\n'
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"scaling": {}}', '{"scaling": {}, "servers": [{"host": "a", "port": 1}]}'),
        ('{"scaling":{}}', '{"scaling":{},"servers":[{"host":"a","port":1}]}'),
        ('{"servers": [], "scaling": {}}', '{"servers": [{"host": "a", "port": 1}], "scaling": {}}'),
        (
            '{\n  "scaling": {}\n}\n',
            '{\n  "scaling": {},\n  "servers": [\n    {"host": "a", "port": 1}\n  ]\n}\n',
        ),
        (
            '{\r\n\t"servers": [\r\n\t],\r\n\t"scaling": {}\r\n}',
            '{\r\n\t"servers": [\r\n\t\t{"host": "a", "port": 1}\r\n\t],\r\n\t"scaling": {}\r\n}',
        ),
    ],
)
def test_the_first_server_beside_scaling_makes_the_list(before: str, after: str) -> None:
    scaling = json.dumps(SCALING)
    before, after = before.replace("{}", scaling), after.replace("{}", scaling)
    config_of(before)
    assert servers_file.edited(before, add=[{"host": "a", "port": 1}]) == after


def test_the_last_server_beside_scaling_leaves_an_empty_list() -> None:
    text = f'{{\n  "servers": [\n    {{"host": "a", "port": 1}}\n  ],\n  "scaling": {json.dumps(SCALING)}\n}}\n'
    emptied = servers_file.edited(text, remove=["1"])
    assert config_of(emptied).servers == ()
    assert '"servers": [],' in emptied


@pytest.mark.parametrize("text", [LINES, json.dumps({"scaling": SCALING})])
def test_an_id_that_is_not_there_is_a_key_error(text: str) -> None:
    for edit in ({"remove": ["4"]}, {"change": {"4": {"weight": 1}}}):
        with pytest.raises(KeyError) as caught:
            servers_file.edited(text, **edit)
        assert caught.value.args == ("4",)


def test_one_edit_after_another() -> None:
    changes = {"2": {"id": 20, "weight": 7}, "3": {"port": 33}}
    text = servers_file.edited(LINES, remove=["1"], change=changes, add=[NEW | {"id": "n"}, NEW | {"port": 10}])
    assert config_of(text).servers == (
        Server("20", "b", 2, weight=7),
        Server("3", "c", 33),
        Server("n", "z", 9, weight=2),
        Server("4", "z", 10, weight=2),
    )


# The text of a file: any -------------------------------------------------------------------------------------------


def spaced(value: Any, chance: random.Random, space: Callable[[], str]) -> str:
    """JSON with white space wherever it may stand, and now and then an escape where a letter would do."""
    if isinstance(value, (dict, list)):
        items = [spaced(item, chance, space) for item in value]
        if isinstance(value, dict):
            items = [
                f"{key}{space()}:{space()}{spaced(value[name], chance, space)}"
                for key, name in zip(items, value, strict=True)
            ]
        inside = ",".join(f"{space()}{item}{space()}" for item in items) or space()
        return f"{{{inside}}}" if isinstance(value, dict) else f"[{inside}]"
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    return text.replace("o", "\\u006f") if isinstance(value, str) and chance.random() < 0.2 else text


def random_text(chance: random.Random) -> str:
    servers = []
    for number in range(1, chance.randint(2, 6)):
        entry: dict[str, Any] = {"host": f"host-{number}", "port": 1000 + number}
        ids = [None, number, str(number), f"é]}}{number}", f'\\"{{[,:{number}']
        if (name := chance.choice(ids)) is not None:
            entry["id"] = name
        if chance.random() < 0.4:
            entry["weight"] = chance.randint(1, 9)
        if chance.random() < 0.4:
            entry["command"] = ["a", ']}"\\', "größe", '{"servers": [']
        servers.append(shuffled(entry, chance))
    document: Any = servers
    if chance.random() < 0.6:
        document = {"servers": servers, "mode": "tcp", "retries": 1, "log": {"file": '"servers": ['}}
        if chance.random() < 0.4:
            document["scaling"] = SCALING
            document["servers"] = servers[: chance.randint(0, len(servers))]
        document = shuffled(document, chance)
    end = chance.choice(["\n", "\r\n"])
    spaces = chance.choice([[""], ["", " "], ["", " ", "\t", end, f"{end}  ", f"{end}{end}\t"]])
    text = spaced(document, chance, lambda: chance.choice(spaces))
    return chance.choice(["", "\ufeff"]) + chance.choice(["", " ", end]) + text + chance.choice(["", " ", end])


def shuffled(entry: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    return dict(chance.sample(list(entry.items()), len(entry)))


def common_start(one: str, other: str) -> int:
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other))


def is_longer_by_one_piece(longer: str, shorter: str) -> bool:
    """Whether one text is the other with something put in at one place."""
    start = common_start(longer, shorter)
    return len(longer) > len(shorter) and shorter[start:] == longer[len(longer) - len(shorter) + start :]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_text_an_edit_does_what_it_says_and_nothing_else(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(150):
        text = random_text(chance)
        before = config_of(text)
        servers = list(before.servers)

        entry = shuffled({"id": "new", "host": "z", "port": 9, "command": ["}", "é"]}, chance)
        added = servers_file.edited(text, add=[entry])
        new = Server("new", "z", 9, command=("}", "é"))
        assert config_of(added) == replace(before, servers=(*servers, new))
        if not servers:
            continue
        assert is_longer_by_one_piece(added, text)
        assert servers_file.edited(added, remove=["new"]) == text

        place = chance.randrange(len(servers))
        one = servers[place]
        for key, value in (("weight", 77), ("max_connections", 5), ("id", "new"), ("port", 9), ("backup", True)):
            changed = servers_file.edited(text, change={one.id: {key: value}})
            servers[place] = replace(one, **{key: value})
            assert config_of(changed) == replace(before, servers=tuple(servers))
            if key == "backup":
                assert is_longer_by_one_piece(changed, text)
        assert servers_file.edited(text, change={one.id: {"port": one.port, "host": one.host}}) == text

        del servers[place]
        entries = json.loads(text.removeprefix("\ufeff"))
        behind = (entries if isinstance(entries, list) else entries["servers"])[place + 1 :]
        removed = servers_file.edited(text, remove=[one.id])
        if servers or before.scaling:
            assert config_of(removed) == replace(before, servers=tuple(servers))
        if all("id" in entry for entry in behind):
            assert is_longer_by_one_piece(text, removed)


# The file ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / SOURCE
    path.write_text(LINES, encoding="utf-8")
    return path


def test_a_rewritten_file_keeps_its_octets_its_mode_and_its_name_alone(file: Path) -> None:
    data = b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").replace('"a"', '"a", "command": ["gr\u00f6\u00dfe"]').encode()
    file.write_bytes(data)
    file.chmod(0o640)
    servers_file.rewrite(file, change={"2": {"weight": 9}})
    assert file.read_bytes() == data.replace(b'"weight": 3', b'"weight": 9')
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert os.listdir(file.parent) == [SOURCE]


def test_the_owner_stays(file: Path) -> None:
    try:
        os.chown(file, 12345, 54321)
    except PermissionError:
        pytest.skip("only root gives files away")
    file.chmod(0o6750)
    servers_file.write(file, "[]")
    status = file.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12345, 54321, 0o6750)


def test_an_owner_that_may_not_be_given_is_let_go(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(descriptor: int, user: int, group: int) -> None:
        asked.append((user, group))
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    file.chmod(0o604)
    status = file.stat()
    servers_file.write(file, "[]")
    assert asked == [(status.st_uid, status.st_gid), (-1, status.st_gid)]
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("[]", 0o604)


def test_a_reader_has_the_old_text_or_this_one_whole(file: Path) -> None:
    """The name is given to another file; who has the old one open reads it on."""
    with file.open() as reader:
        inode = file.stat().st_ino
        servers_file.write(file, "[]")
        assert (reader.read(), file.read_text()) == (LINES, "[]")
    assert file.stat().st_ino != inode


def test_a_link_stays_and_its_target_is_written(file: Path, tmp_path: Path) -> None:
    directory = tmp_path / "elsewhere"
    directory.mkdir()
    target = directory / "real.json"
    file.rename(target)
    file.symlink_to(Path("middle"))
    (tmp_path / "middle").symlink_to(Path("elsewhere/real.json"))
    servers_file.rewrite(file, remove=["3"])
    assert file.is_symlink()
    assert not target.is_symlink()
    assert target.read_text() == servers_file.edited(LINES, remove=["3"])
    assert os.listdir(directory) == ["real.json"]


def failing(error: OSError) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("call", ["replace", "fsync", "fchmod"])
def test_a_write_that_fails_leaves_all_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """EBUSY is what a file says that is mounted by itself into a container."""
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(OSError(16, "Device or resource busy")))
        with pytest.raises(OSError) as caught:
            servers_file.write(file, "[]")
    assert str(caught.value) == f"{file}: cannot be written: Device or resource busy"
    assert (file.read_text(), os.listdir(file.parent)) == (LINES, [SOURCE])


def test_a_file_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        servers_file.write(tmp_path / "none.json", "[]")
    assert str(caught.value) == f"{tmp_path / 'none.json'}: cannot be written: No such file or directory"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError) as caught:
            servers_file.write(path, "[]")
        assert str(caught.value) == f"{path}: cannot be written: it is no regular file"


def test_a_directory_that_may_not_be_written_says_so(file: Path) -> None:
    file.parent.chmod(0o500)
    if os.access(file.parent, os.W_OK):
        pytest.skip("root may write anywhere")
    with pytest.raises(OSError) as caught:
        servers_file.write(file, "[]")
    file.parent.chmod(0o700)
    assert str(caught.value) == f"{file}: cannot be written: Permission denied"


def test_a_directory_that_cannot_be_synced_is_no_failure(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def refuse_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_directories)
    servers_file.write(file, "[]")
    assert file.read_text() == "[]"


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        ({"change": {"2": {"weight": 0}}}, "servers[1].weight: must be 1 to 256, not 0"),
        ({"add": [{"host": "a", "port": 1}]}, 'servers[3]: the address "a:1" is that of servers[0] too'),
        ({"add": [{"host": "x"}]}, 'servers[3]: "port" is missing'),
        ({"remove": ["1", "2", "3"]}, "servers: must not be empty"),
    ],
)
def test_an_edit_that_would_break_the_file_is_not_made(file: Path, edit: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        servers_file.rewrite(file, **edit)
    assert str(caught.value).startswith(f"{file}: {line}")
    assert file.read_text() == LINES


def test_a_file_that_is_broken_already_is_left_alone(file: Path) -> None:
    file.write_text("[,]")
    with pytest.raises(ConfigError) as caught:
        servers_file.rewrite(file, add=[NEW])
    assert str(caught.value).startswith(f"{file}: line 1, column 2: not JSON")
    file.unlink()
    with pytest.raises(ConfigError) as caught:
        servers_file.rewrite(file, add=[NEW])
    assert str(caught.value) == f"{file}: cannot be read: No such file or directory"


def test_relative_paths_of_the_file_start_at_its_link(file: Path, tmp_path: Path) -> None:
    """As they do when it is loaded."""
    (tmp_path / "mine.py").touch()
    target = tmp_path / "deep" / "real.json"
    target.parent.mkdir()
    file.unlink()
    file.symlink_to(target)
    target.write_text('{"algorithm": "mine.py", "servers": [{"host": "a", "port": 1}]}')
    servers_file.rewrite(file, add=[NEW])
    assert len(config_of(target.read_text(), tmp_path).servers) == 2
