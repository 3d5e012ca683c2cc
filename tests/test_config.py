"""servers.json and flags: every mistake has its own line, and every value that passes is right."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from balancer import config as configuration
from balancer.config import (
    AdminPort,
    BackendTls,
    Certificate,
    Config,
    ConfigError,
    HealthCheck,
    Limits,
    Log,
    Scaling,
    Server,
    Sticky,
    Timeouts,
    Tls,
)

ONE = {"host": "127.0.0.1", "port": 8001}
TWO = {"host": "127.0.0.1", "port": 8002}
SCALED = {"command": ["{python}", "app.py", "--port", "{port}"], "ports": "9001-9100"}
POLICIES = '"round_robin", "least_connections", "random", "ip_hash", "power_of_two", "least_time", "hash" or a .py file'
SITE = {"cert": "site.pem", "key": "site.key"}


def parse(document: object, base: Path = Path("/nowhere")) -> Config:
    text = document if isinstance(document, str) else json.dumps(document)
    return configuration.parse(text, "servers.json", base)


def mistake(document: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(document)
    return str(caught.value)


def server(**keys: object) -> dict[str, Any]:
    return {"servers": [ONE | keys]}


def top(**keys: object) -> dict[str, Any]:
    return {"servers": [ONE], **keys}


def tls(**keys: object) -> dict[str, Any]:
    return top(tls={"certificates": [SITE], **keys})


def scaling(**keys: object) -> dict[str, Any]:
    return {"scaling": SCALED | keys}


# --- mistakes -------------------------------------------------------------------------------------------------------

BROKEN_TEXT = [
    ("", 'is empty; the least there can be is [{"host": "127.0.0.1", "port": 8001}]'),
    (" \n\t", 'is empty; the least there can be is [{"host": "127.0.0.1", "port": 8001}]'),
    ("{\n  servers: []}", "line 2, column 3: not JSON: expecting property name enclosed in double quotes"),
    ("{'servers': []}", 'line 1, column 2: not JSON: JSON wants double quotes, not "\'"'),
    ('[{"port": 1 "host": 2}]', "line 1, column 13: not JSON: expecting ',' delimiter"),
    ('[\n  {"port": 1},\n]', "line 2, column 14: not JSON: a comma before the closing bracket; remove it"),
    ('[{"port": 1 , }]', "line 1, column 13: not JSON: a comma before the closing bracket; remove it"),
    ("[ // mine\n]", "line 1, column 3: not JSON: JSON has no comments; remove it"),
    ("# mine\n[]", "line 1, column 1: not JSON: JSON has no comments; remove it"),
    ('[{"host"', "line 1, column 9: not JSON: the text ends too early; a bracket or a quote is not closed"),
    ('["a', "line 1, column 2: not JSON: unterminated string"),
    ('["a\nb"]', "line 1, column 4: not JSON: invalid control character"),
    ("[] []", "line 1, column 4: not JSON: extra data"),
    ("[" * 200_000, "is nested too deeply"),
    ('{"a":' * 200_000, "is nested too deeply"),
    ('{"servers": [], "servers": []}', "servers: the key stands here twice; keep one"),
    ('[{"host": "a", "port": 1, "port": 2}]', "servers[0].port: the key stands here twice; keep one"),
    ('{"log": {"level": "info", "level": "info"}, "servers": []}', "log.level: the key stands here twice; keep one"),
    ("5", "must be a list of servers or an object, not the number 5"),
    ('"x"', 'must be a list of servers or an object, not the string "x"'),
    ("null", "must be a list of servers or an object, not null"),
    ("NaN", "must be a list of servers or an object, not the number NaN"),
]


@pytest.mark.parametrize(("text", "line"), BROKEN_TEXT, ids=[line for _, line in BROKEN_TEXT])
def test_a_broken_text_says_where(text: str, line: str) -> None:
    assert mistake(text) == f"servers.json: {line}"


WRONG_VALUES = [
    # keys
    (top(sever=[]), 'sever: unknown key; did you mean "servers"?'),
    (server(wieght=2), 'servers[0].wieght: unknown key; did you mean "weight"?'),
    (
        server(colour=2),
        "servers[0].colour: unknown key; the keys here are id, host, port, weight, backup, max_connections, command, "
        "tls and send_proxy",
    ),
    (top(health_check={"intervall": 1}), 'health_check.intervall: unknown key; did you mean "interval"?'),
    (top(timeouts={"Connect": 1}), 'timeouts.Connect: unknown key; did you mean "connect"?'),
    (top(limits={"que": 1}), 'limits.que: unknown key; did you mean "queue"?'),
    (top(log={"": 1}), 'log."": unknown key; the keys here are file, format, level, slow, max_bytes and backups'),
    (top(listen={"a\nb": 1}), 'listen."a\\nb": unknown key; the keys here are host and port'),
    (top(listen={"x" * 99: 1}), f'listen."{"x" * 56}...: unknown key; the keys here are host and port'),
    (top(admin={"adress": "off"}), 'admin.adress: unknown key; did you mean "address"?'),
    (scaling(maximum=2), 'scaling.maximum: unknown key; did you mean "max"?'),
    (server(tls={"sni": "a"}), "servers[0].tls.sni: unknown key; the keys here are ca, server_name and verify"),
    (tls(minversion="1.2"), 'tls.minversion: unknown key; did you mean "min_version"?'),
    (
        tls(certificates=[SITE | {"chain": "c"}]),
        "tls.certificates[0].chain: unknown key; the keys here are cert and key",
    ),
    (top(sticky={"name": "a"}), "sticky.name: unknown key; the keys here are cookie and secret_file"),
    (top(limits={"client_rates": 1}), 'limits.client_rates: unknown key; did you mean "client_rate"?'),
    (top(trusted_proxy=[]), 'trusted_proxy: unknown key; did you mean "trusted_proxies"?'),
    (top(tls={}), 'tls: "certificates" is missing'),
    (tls(certificates=[SITE, {"cert": "a"}]), 'tls.certificates[1]: "key" is missing'),
    (tls(certificates=[{"key": "a"}]), 'tls.certificates[0]: "cert" is missing'),
    ({}, "servers: the key is missing"),
    ({"admin": {}}, "servers: the key is missing"),
    ({"scaling": {"ports": "1-9"}}, 'scaling: "command" is missing'),
    ({"scaling": {"command": ["a", "{port}"]}}, 'scaling: "ports" is missing'),
    ([{"port": 8001}], 'servers[0]: "host" is missing'),
    ([ONE, {"host": "b"}], 'servers[1]: "port" is missing'),
    (
        top(health_check_url="/a", health_check={"path": "/a"}),
        "health_check_url: health_check.path says the same; keep one of them",
    ),
    (
        top(health_check_interval=1, health_check={"interval": 1}),
        "health_check_interval: health_check.interval says the same; keep one of them",
    ),
    # servers
    (
        [],
        'servers: must not be empty; name at least one server, such as {"host": "127.0.0.1", "port": 8001}',
    ),
    ({"servers": {"a": 1}}, "servers: must be a list, not an object"),
    ({"servers": "127.0.0.1:1"}, 'servers: must be a list, not the string "127.0.0.1:1"'),
    (["127.0.0.1:1"], 'servers[0]: must be an object, not the string "127.0.0.1:1"'),
    ([[]], "servers[0]: must be an object, not a list"),
    ([ONE, ONE], 'servers[1]: the address "127.0.0.1:8001" is that of servers[0] too; give each its own'),
    (
        [{"host": "Web.test", "port": 1}, {"host": "web.TEST", "port": 1}],
        'servers[1]: the address "web.test:1" is that of servers[0] too; give each its own',
    ),
    (
        [{"host": "::1", "port": 1}, {"host": "0:0:0:0:0:0:0:1", "port": 1}],
        'servers[1]: the address "[::1]:1" is that of servers[0] too; give each its own',
    ),
    ([ONE | {"id": 7}, TWO | {"id": "7"}], 'servers[1]: the id "7" is that of servers[0] too; give each its own'),
    ([ONE | {"id": 2}, TWO], 'servers[1]: the id "2" is that of servers[0] too; give each its own'),
    *(
        (
            server(id=wrong),
            f"servers[0].id: must be a whole number or 1 to 64 characters without white space, not {found}",
        )
        for wrong, found in [
            (1.5, "the number 1.5"),
            (True, "true"),
            (None, "null"),
            ([], "a list"),
            ("", 'the string ""'),
            ("a b", 'the string "a b"'),
            ("a\x1b", 'the string "a\\u001b"'),
            ("a\u2028", 'the string "a\\u2028"'),
            ("\ud800", 'the string "\\ud800"'),
            ("x" * 65, f'the string "{"x" * 56}...'),
            (10**400, f"the number 1{'0' * 56}..."),
        ]
    ),
    *(
        (server(host=wrong), f"servers[0].host: must be a host name or an IP address and nothing else, not {found}")
        for wrong, found in [
            ("", '""'),
            ("a b", '"a b"'),
            ("a..b", '"a..b"'),
            ("-a", '"-a"'),
            ("größe", '"größe"'),
            ("a\n", '"a\\n"'),
            ("127.0.0.1:8001", '"127.0.0.1:8001"'),
            ("http://a", '"http://a"'),
            ("[::1]", '"[::1]"'),
            ("::1%a b", '"::1%a b"'),
            (":::1", '":::1"'),
            ("256.1.1.1", '"256.1.1.1"'),
            ("1.2.3", '"1.2.3"'),
            ("80", '"80"'),
            ("x" * 64, f'"{"x" * 56}...'),
            ("x." * 127, f'"{"x." * 28}...'),
        ]
    ),
    (server(host=1), "servers[0].host: must be a string, not the number 1"),
    ([ONE, TWO | {"port": 99999}], "servers[1].port: must be 1 to 65535, not 99999"),
    (server(port=0), "servers[0].port: must be 1 to 65535, not 0"),
    (server(port=-1), "servers[0].port: must be 1 to 65535, not -1"),
    (server(port=10**400), f"servers[0].port: must be 1 to 65535, not 1{'0' * 56}..."),
    (server(port="8001"), 'servers[0].port: must be a whole number, not the string "8001"'),
    (server(port=8001.0), "servers[0].port: must be a whole number, not the number 8001.0"),
    (server(port=True), "servers[0].port: must be a whole number, not true"),
    (server(weight=0), "servers[0].weight: must be 1 to 256, not 0"),
    (server(weight=-3), "servers[0].weight: must be 1 to 256, not -3"),
    (server(weight=257), "servers[0].weight: must be 1 to 256, not 257"),
    (server(weight=1.5), "servers[0].weight: must be a whole number, not the number 1.5"),
    (server(weight=float("nan")), "servers[0].weight: must be a whole number, not the number NaN"),
    (server(backup=1), "servers[0].backup: must be true or false, not the number 1"),
    (server(max_connections=-1), "servers[0].max_connections: must be 0 to 1000000, not -1"),
    (
        server(command="python x.py"),
        'servers[0].command: must be a list of words such as ["{python}", "server.py"], not the string "python x.py"',
    ),
    (server(command=[]), "servers[0].command: is empty; its first word must be a program"),
    (server(command=[""]), "servers[0].command: is empty; its first word must be a program"),
    (server(command=["a", 8001]), "servers[0].command[1]: must be a string, not the number 8001"),
    (server(command=["a", "b\0"]), 'servers[0].command[1]: must have no NUL and no lone surrogate, not "b\\u0000"'),
    (
        server(command=["a", "-p{prt}"]),
        'servers[0].command[1]: unknown placeholder "prt"; there are {python}, {port}, {host} and {id}',
    ),
    # top
    (top(mode="htp"), 'mode: must be "http" or "tcp", not "htp"; did you mean "http"?'),
    (top(mode="udp/ip"), 'mode: must be "http" or "tcp", not "udp/ip"'),
    (top(mode=None), "mode: must be a string, not null"),
    (
        top(algorithm="Round-Robin"),
        f'algorithm: must be {POLICIES}, not "Round-Robin"; did you mean "round_robin"?',
    ),
    (top(algorithm="best"), f'algorithm: must be {POLICIES}, not "best"'),
    (
        top(algorithm="my_policy.py"),
        "algorithm: there is no file /nowhere/my_policy.py; a relative path starts at /nowhere",
    ),
    (
        top(algorithm="a\0.py"),
        'algorithm: must be at most 4096 printable characters, not "a\\u0000.py"',
    ),
    (top(retries=-1), "retries: must be 0 to 100, not -1"),
    (top(listen=8080), "listen: must be an object, not the number 8080"),
    (top(listen={"port": 65536}), "listen.port: must be 0 to 65535, not 65536"),
    (top(listen={"host": "*"}), 'listen.host: must be a host name or an IP address and nothing else, not "*"'),
    (top(algorithm="hsh"), f'algorithm: must be {POLICIES}, not "hsh"; did you mean "hash"?'),
    *(
        (top(hash_on=wrong), f'hash_on: must be "header:NAME", "cookie:NAME", "query:NAME" or "path", not "{wrong}"')
        for wrong in ("Path", "header", "header:", "header:X Y", "cookie:a;b", "query:", "query:ä b", "path:a")
    ),
    (top(hash_on=None), "hash_on: must be a string, not null"),
    (top(hash_on=0), "hash_on: must be a string, not the number 0"),
    (top(hash_on=["path"]), "hash_on: must be a string, not a list"),
    (top(hash_balance=0.99), "hash_balance: must be 1 to 1000, not 0.99"),
    (top(hash_balance=1001), "hash_balance: must be 1 to 1000, not 1001"),
    (top(hash_balance="1.25"), 'hash_balance: must be a number, not the string "1.25"'),
    (top(sticky=None), "sticky: must be true, false or an object, not null"),
    (top(sticky="lb"), 'sticky: must be true, false or an object, not the string "lb"'),
    *(
        (top(sticky={"cookie": wrong}), f'sticky.cookie: must be a name such as "lb", not {json.dumps(wrong)}')
        for wrong in ("", "a b", "a=b", "a;", '"a"', "\n")
    ),
    (top(sticky={"cookie": 5}), "sticky.cookie: must be a string, not the number 5"),
    (top(sticky={"secret_file": False}), "sticky.secret_file: must be a string, not false"),
    # TLS
    (top(tls=True), "tls: must be an object, not true"),
    *(
        (tls(certificates=wrong), f"tls.certificates: must be a list such as {json.dumps([SITE])}, not {found}")
        for wrong, found in [({}, "an object"), ("site.pem", 'the string "site.pem"'), (None, "null")]
    ),
    (tls(certificates=["site.pem"]), 'tls.certificates[0]: must be an object, not the string "site.pem"'),
    (tls(certificates=[SITE | {"cert": ""}]), "tls.certificates[0].cert: must name a file"),
    (tls(certificates=[SITE | {"key": 1}]), "tls.certificates[0].key: must be a string, not the number 1"),
    (
        tls(certificates=[SITE | {"key": "a\0b"}]),
        'tls.certificates[0].key: must be at most 4096 printable characters, not "a\\u0000b"',
    ),
    (tls(min_version="TLSv1.2"), 'tls.min_version: must be "1.2" or "1.3", not "TLSv1.2"; did you mean "1.2"?'),
    (tls(min_version=1.2), "tls.min_version: must be a string, not the number 1.2"),
    *(
        (
            tls(redirect_from=wrong),
            f"tls.redirect_from: must be HOST:PORT, [IPV6]:PORT or PORT, not {json.dumps(wrong)}",
        )
        for wrong in ("off", "localhost", "::1:80", "http://a:80")
    ),
    (tls(redirect_from=80), "tls.redirect_from: must be a string, not the number 80"),
    (tls(redirect_from="1.2.3.4:65536"), "tls.redirect_from: must be 0 to 65535, not 65536"),
    (server(tls="yes"), 'servers[0].tls: must be true, false or an object, not the string "yes"'),
    (server(tls=None), "servers[0].tls: must be true, false or an object, not null"),
    (server(tls={"verify": "no"}), 'servers[0].tls.verify: must be true or false, not the string "no"'),
    (server(tls={"ca": 1}), "servers[0].tls.ca: must be a string, not the number 1"),
    (
        server(tls={"server_name": "https://a"}),
        'servers[0].tls.server_name: must be a host name or an IP address and nothing else, not "https://a"',
    ),
    # who the client is, and what it may do
    (server(send_proxy="V1"), 'servers[0].send_proxy: must be "", "v1" or "v2", not "V1"; did you mean "v1"?'),
    (server(send_proxy="3"), 'servers[0].send_proxy: must be "", "v1" or "v2", not "3"'),
    (server(send_proxy=True), "servers[0].send_proxy: must be a string, not true"),
    *(
        row
        for key in ("trusted_proxies", "proxy_protocol_from", "allow", "deny")
        for row in [
            (
                top(**{key: "10.0.0.0/8"}),
                f'{key}: must be a list of networks such as ["10.0.0.0/8", "::1"], not the string "10.0.0.0/8"',
            ),
            (top(**{key: ["::1", 5]}), f"{key}[1]: must be a string, not the number 5"),
            (
                top(**{key: ["10.0.0.1/8"]}),
                f'{key}[0]: "10.0.0.1/8" is an address within a network; did you mean "10.0.0.0/8"?',
            ),
        ]
    ),
    (
        top(allow=["::1", "fe80::1/10"]),
        'allow[1]: "fe80::1/10" is an address within a network; did you mean "fe80::/10"?',
    ),
    *(
        (top(deny=[wrong]), f'deny[0]: must be a network such as "10.0.0.0/8" or an address, not {json.dumps(wrong)}')
        for wrong in ("", "*", "localhost", "10.0.0.1/33", "::1/129", "10.0.0", "010.0.0.1", "10.0.0.1-9", "[::1]")
    ),
    (top(forwarded=1), "forwarded: must be true or false, not the number 1"),
    # health check
    (top(health_check_url="health"), 'health_check_url: must start with a slash, not "health"'),
    (
        top(health_check_url="HTTP://a:1/x"),
        'health_check_url: must be a path such as "/health", not the full URL "HTTP://a:1/x"; "servers" has the hosts',
    ),
    (
        top(health_check={"path": "/a b"}),
        'health_check.path: must be visible ASCII characters, percent-encode the others, not "/a b"',
    ),
    (top(health_check_url=None), "health_check_url: must be a string, not null"),
    (top(health_check_interval=0), "health_check_interval: must be 0.001 to 1000000 seconds, not 0"),
    (top(health_check={"timeout": "2s"}), 'health_check.timeout: must be a number of seconds, not the string "2s"'),
    (top(health_check={"rise": 0}), "health_check.rise: must be 1 to 100, not 0"),
    (top(health_check={"fall": 2.5}), "health_check.fall: must be a whole number, not the number 2.5"),
    (
        top(health_check={"type": "https"}),
        'health_check.type: must be "http" or "tcp", not "https"; did you mean "http"?',
    ),
    *(
        (
            top(health_check={"expect": wrong}),
            'health_check.expect: must be statuses such as "200", "200-204", "2xx-3xx" or "2xx,404", '
            f"not {json.dumps(wrong)}",
        )
        for wrong in ("", "ok", "2x", "200-", "299-200", "3xx-2xx", "200,,201", "600", "099", 20, "2xx;3xx")
    ),
    (top(health_check={"expect": [200]}), "health_check.expect: must be a string, not a list"),
    # timeouts, limits, log
    (top(timeouts={"connect": -1}), "timeouts.connect: must be 0.001 to 1000000 seconds, not -1"),
    (top(timeouts={"connect": True}), "timeouts.connect: must be a number of seconds, not true"),
    (top(timeouts={"drain": 0}), "timeouts.drain: must be 0.001 to 1000000 seconds, not 0"),
    (top(timeouts={"queue": -0.5}), "timeouts.queue: must be 0 to 1000000 seconds, not -0.5"),
    (top(timeouts={"drain_delay": -1}), "timeouts.drain_delay: must be 0 to 1000000 seconds, not -1"),
    (top(timeouts={"no_backend": float("nan")}), "timeouts.no_backend: must be 0 to 1000000 seconds, not NaN"),
    (top(timeouts={"tunnel": float("inf")}), "timeouts.tunnel: must be 0.001 to 1000000 seconds, not Infinity"),
    (top(timeouts={"tunnel": 10**400}), f"timeouts.tunnel: must be 0.001 to 1000000 seconds, not 1{'0' * 56}..."),
    (top(timeouts=5), "timeouts: must be an object, not the number 5"),
    (top(limits={"head_bytes": 0}), "limits.head_bytes: must be 1024 to 16777216, not 0"),
    (top(limits={"fields": "many"}), 'limits.fields: must be a whole number, not the string "many"'),
    (top(limits={"body_bytes": -1}), "limits.body_bytes: must be 0 to 1125899906842624, not -1"),
    (top(limits={"body_bytes": "1M"}), 'limits.body_bytes: must be a whole number, not the string "1M"'),
    (top(limits={"client_connections": -1}), "limits.client_connections: must be 0 to 1000000, not -1"),
    (top(limits={"client_rate": -0.5}), "limits.client_rate: must be 0 to 1000000, not -0.5"),
    (top(limits={"client_rate": float("nan")}), "limits.client_rate: must be 0 to 1000000, not NaN"),
    (top(limits={"client_rate": True}), "limits.client_rate: must be a number, not true"),
    (top(limits={"client_burst": 1.5}), "limits.client_burst: must be a whole number, not the number 1.5"),
    (top(timeouts={"handshake": 0}), "timeouts.handshake: must be 0.001 to 1000000 seconds, not 0"),
    (
        top(log={"level": "warn"}),
        'log.level: must be "debug", "info", "warning" or "error", not "warn"; did you mean "warning"?',
    ),
    (
        top(log={"format": "jsn"}),
        'log.format: must be "text", "haproxy" or "json", not "jsn"; did you mean "json"?',
    ),
    (top(log={"slow": 0}), "log.slow: must be 0.001 to 1000000 seconds, not 0"),
    (top(log={"slow": "1s"}), 'log.slow: must be a number of seconds, not the string "1s"'),
    (top(log={"file": False}), "log.file: must be a string, not false"),
    (top(log={"file": "a\nb"}), 'log.file: must be at most 4096 printable characters, not "a\\nb"'),
    (top(log={"max_bytes": 1}), "log.max_bytes: must be 1000 to 1000000000000, not 1"),
    (top(log={"backups": -1}), "log.backups: must be 0 to 1000, not -1"),
    # the operator's port
    (top(admin="off"), 'admin: must be an object, not the string "off"'),
    (top(admin={"address": 8404}), "admin.address: must be a string, not the number 8404"),
    (top(admin={"address": False}), "admin.address: must be a string, not false"),
    *(
        (
            top(admin={"address": wrong}),
            f'admin.address: must be HOST:PORT, [IPV6]:PORT, PORT or "off", not {json.dumps(wrong)}',
        )
        for wrong in ("", "Off", "localhost", "localhost:", "::1:8404", "127.0.0.1:-1", "http://127.0.0.1:8404")
    ),
    (top(admin={"address": "127.0.0.1:65536"}), "admin.address: must be 0 to 65535, not 65536"),
    (
        top(admin={"address": "*:8404"}),
        'admin.address: must be a host name or an IP address and nothing else, not "*"',
    ),
    (top(admin={"token_file": None}), "admin.token_file: must be a string, not null"),
    # scaling
    ({"scaling": None}, "scaling: must be an object, not null"),
    (scaling(command=[]), "scaling.command: is empty; its first word must be a program"),
    (
        scaling(command=["app", "--port", "9001"]),
        'scaling.command: must have the word "{port}", or all instances would listen on the same port',
    ),
    (
        scaling(command=["app", "{port}", "{prot}"]),
        'scaling.command[2]: unknown placeholder "prot"; there are {python}, {port}, {host} and {id}',
    ),
    *(
        (scaling(ports=wrong), f'scaling.ports: must be a range of ports such as "9001-9100", not {json.dumps(wrong)}')
        for wrong in ("", "9001", "9001-", "0-10", "9100-9001", "9001-65536", "9001-9100 ", "9001,9100", "9001-9100-2")
    ),
    (scaling(ports=9001), "scaling.ports: must be a string, not the number 9001"),
    (scaling(ports="9001-9007"), "scaling.ports: has room for 7 instances, and max is 8; widen the range"),
    (scaling(min=-1), "scaling.min: must be 0 to 1000, not -1"),
    (scaling(min=1.0), "scaling.min: must be a whole number, not the number 1.0"),
    (scaling(min=9), "scaling.min: must be at most max, which is 8, not 9"),
    (scaling(max=0), "scaling.max: must be 1 to 1000, not 0"),
    (scaling(target_active=0), "scaling.target_active: must be 0.01 to 1000000, not 0"),
    (scaling(target_active="10"), 'scaling.target_active: must be a number, not the string "10"'),
    (scaling(idle_stop=0), "scaling.idle_stop: must be 0.001 to 1000000 seconds, not 0"),
    (scaling(pause=True), "scaling.pause: must be a number of seconds, not true"),
    (scaling(start_timeout=0), "scaling.start_timeout: must be 0.001 to 1000000 seconds, not 0"),
    (
        scaling(host="127.0.0.1:9001"),
        'scaling.host: must be a host name or an IP address and nothing else, not "127.0.0.1:9001"',
    ),
]


@pytest.mark.parametrize(("document", "line"), WRONG_VALUES, ids=[line for _, line in WRONG_VALUES])
def test_a_wrong_value_is_named_by_its_path(document: object, line: str) -> None:
    assert mistake(document) == f"servers.json: {line}"


def test_an_integer_longer_than_python_converts_is_refused() -> None:
    """int() of more than 4300 digits raises a bare ValueError (CVE-2020-10735), also in json.loads."""
    assert mistake('[{"host": "a", "port": ' + "9" * 5000 + "}]") == (
        "servers.json: servers[0].port: must be a whole number, not the number Infinity"
    )


def mutated(value: Any, chance: random.Random) -> Any:
    """The value with one place in it replaced, dropped, doubled or renamed."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        others = {name: item for name, item in value.items() if name != key}
        return chance.choice([others, value | {key: mutated(value[key], chance)}, others | {key[1:]: value[key]}])
    if isinstance(value, list) and value and chance.random() < 0.8:
        index = chance.randrange(len(value))
        return [
            *value[:index],
            *chance.choice([[], [value[index]] * 2, [mutated(value[index], chance)]]),
            *value[index + 1 :],
        ]
    strange = [None, True, 0, -1, 1.5, 10**400, float("nan"), float("inf"), "", "\0", "\ud800", " ", "x.py", [], {}]
    return chance.choice([*strange, [value], {"id": value}, "x" * 5000, [[]], [{}], "[::1]:80", "{port}{prt}", "2xx"])


def test_no_mutation_of_a_good_file_gets_past_or_breaks_the_checks() -> None:
    good = {
        "servers": [
            ONE | {"id": 1, "weight": 2, "backup": True, "max_connections": 9, "command": ["a", "{id}"]},
            TWO | {"tls": {"ca": "ca.pem", "server_name": "b.test", "verify": False}, "send_proxy": "v2"},
        ],
        "mode": "http",
        "algorithm": "hash",
        "hash_on": "query:id",
        "hash_balance": 1.5,
        "sticky": {"cookie": "lb", "secret_file": "secret"},
        "tls": {"certificates": [SITE], "min_version": "1.3", "redirect_from": "[::1]:80"},
        "trusted_proxies": ["10.0.0.0/8", "::1"],
        "proxy_protocol_from": ["127.0.0.1"],
        "allow": ["0.0.0.0/0"],
        "deny": ["192.0.2.1"],
        "forwarded": True,
        "retries": 1,
        "listen": {"host": "::1", "port": 0},
        "health_check_url": "/h",
        "health_check": {"interval": 1, "timeout": 1, "rise": 1, "fall": 1, "expect": "2xx", "type": "tcp"},
        "timeouts": {"connect": 1, "queue": 0},
        "limits": {"connections": 5, "fields": 5, "body_bytes": 5, "client_rate": 1.5, "client_burst": 3},
        "log": {"file": "", "format": "haproxy", "level": "debug", "slow": 2, "max_bytes": 5000, "backups": 0},
        "admin": {"address": "[::1]:0", "token_file": "token"},
        "scaling": SCALED | {"min": 0, "max": 4, "target_active": 0.5, "idle_stop": 9, "pause": 1, "host": "127.0.0.1"},
    }
    parse(good)
    chance, refusals = random.Random(2), []
    for _ in range(3000):
        text = json.dumps(mutated(good, chance))
        if chance.random() < 0.3:
            start = chance.randrange(len(text))
            text = text[:start] + chance.choice(["", ",", "}", '"', "\n", "\0", "[", "é", "\\u"]) + text[start + 1 :]
        try:
            assert configuration.describe(parse(text)).endswith("\n")
        except ConfigError as error:
            refusals.append(str(error))
    assert 1000 < len(refusals) < 3000
    assert all(line.startswith("servers.json: ") and line.isprintable() and len(line) < 400 for line in refusals)


# --- good files -----------------------------------------------------------------------------------------------------


def test_a_list_of_servers_is_a_whole_configuration() -> None:
    config = parse([ONE, TWO | {"id": "b"}])
    assert config == Config(
        servers=(Server("1", "127.0.0.1", 8001), Server("b", "127.0.0.1", 8002)),
        source="servers.json",
        base=Path("/nowhere"),
    )
    assert config.health_check == HealthCheck("/", 2.0, 2.0, 2, 3, ((200, 399),), "http")
    assert config.timeouts == Timeouts(5, 10, 10, 60, 60, 60, 3600, 5, 0, 0, 30)
    assert config.limits == Limits(0, 65536, 128, 16384, 1024, 0, 0, 0.0, 0)
    assert config.log == Log("load_balancer.log", "text", "info", 1.0, 50_000_000, 3)
    assert config.admin == AdminPort("127.0.0.1", 8404, "", asked_for=False)
    assert (config.scaling, config.sticky, config.tls) == (None, None, None)
    assert (config.hash_on, config.hash_balance, config.forwarded) == ("", 1.25, False)
    assert (config.trusted_proxies, config.proxy_protocol_from, config.allow, config.deny) == ((), (), (), ())
    assert (config.host, config.port, config.mode, config.algorithm, config.retries) == (
        "127.0.0.1",
        8080,
        "http",
        "round_robin",
        3,
    )


def test_every_key_reaches_its_field(tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    document = {
        "servers": [
            {
                "id": 7,
                "host": "Web_1.test.",
                "port": 65535,
                "weight": 256,
                "backup": True,
                "max_connections": 5,
                "command": ["{python}", "-c", "print({'a': 1}, {})", "", "awk '{print $1}'", "{host}:{port}:{id}"],
                "tls": {"ca": "ca.pem", "server_name": "Web.test", "verify": False},
                "send_proxy": "v2",
            }
        ],
        "mode": "tcp",
        "algorithm": "mine.py",
        "hash_on": "header:X-User",
        "hash_balance": 2,
        "sticky": {"cookie": "where", "secret_file": "run/secret"},
        "tls": {
            "certificates": [{"cert": "a.pem", "key": "/keys/a"}, {"cert": "b.pem", "key": "b.key"}],
            "min_version": "1.3",
            "redirect_from": ":80",
        },
        "trusted_proxies": ["10.0.0.0/8", "::1"],
        "proxy_protocol_from": ["10.0.0.1"],
        "allow": ["2001:DB8:0::/32"],
        "deny": ["0.0.0.0/0"],
        "forwarded": True,
        "retries": 0,
        "listen": {"host": "::", "port": 0},
        "health_check": {"path": "/a?b=c", "interval": 1, "timeout": 0.5, "rise": 1, "fall": 4, "expect": "200"},
        "timeouts": {
            "connect": 1,
            "handshake": 1.5,
            "request_head": 2,
            "client_idle": 3,
            "client": 4,
            "server": 5,
            "tunnel": 6,
            "queue": 0,
            "no_backend": 0,
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
            "client_rate": 7,
            "client_burst": 8,
        },
        "log": {"file": "logs/a.log", "format": "json", "level": "error", "slow": 2, "max_bytes": 1000, "backups": 0},
        "admin": {"address": "[::1]:8405", "token_file": "run/token"},
        "scaling": {
            "command": ["app", "{port}"],
            "ports": "1-65535",
            "min": 0,
            "max": 2,
            "target_active": 0.5,
            "idle_stop": 60,
            "pause": 0.5,
            "start_timeout": 3,
            "host": "Apps.test",
        },
    }
    command = tuple(document["servers"][0]["command"])  # type: ignore[index]
    encrypted = BackendTls(str(tmp_path / "ca.pem"), "web.test", verify=False)
    certificates = (
        Certificate(str(tmp_path / "a.pem"), "/keys/a"),
        Certificate(str(tmp_path / "b.pem"), str(tmp_path / "b.key")),
    )
    assert parse(document, tmp_path) == Config(
        servers=(Server("7", "web_1.test.", 65535, 256, True, 5, command, encrypted, "v2"),),
        host="::",
        port=0,
        mode="tcp",
        algorithm=str(tmp_path / "mine.py"),
        hash_on="header:X-User",
        hash_balance=2.0,
        sticky=Sticky("where", str(tmp_path / "run/secret")),
        retries=0,
        health_check=HealthCheck("/a?b=c", 1.0, 0.5, 1, 4, ((200, 200),), "tcp"),
        timeouts=Timeouts(1, 1.5, 2, 3, 4, 5, 6, 0, 0, 7, 0.25),
        limits=Limits(1, 2048, 3, 100, 0, 5, 6, 7.0, 8),
        log=Log(str(tmp_path / "logs/a.log"), "json", "error", 2.0, 1000, 0),
        admin=AdminPort("::1", 8405, str(tmp_path / "run/token"), asked_for=True),
        scaling=Scaling(("app", "{port}"), (1, 65535), 0, 2, 0.5, 60.0, 0.5, 3.0, "apps.test"),
        tls=Tls(certificates, "1.3", "127.0.0.1:80"),
        trusted_proxies=("10.0.0.0/8", "::1/128"),
        proxy_protocol_from=("10.0.0.1/32",),
        allow=("2001:db8::/32",),
        deny=("0.0.0.0/0",),
        forwarded=True,
        source="servers.json",
        base=tmp_path,
    )


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("8405", ("127.0.0.1", 8405)),
        (":8405", ("127.0.0.1", 8405)),
        ("[::]:8405", ("::", 8405)),
        ("Ops.test:8405", ("ops.test", 8405)),
        ("off", ("", 0)),
    ],
)
def test_the_operators_port_is_an_address_or_off(address: str, place: tuple[str, int]) -> None:
    admin = parse(top(admin={"address": address})).admin
    assert (admin.host, admin.port, admin.asked_for) == (*place, True)


def test_a_token_file_alone_does_not_ask_for_the_operators_port(tmp_path: Path) -> None:
    admin = parse(top(admin={"token_file": "token"}), tmp_path).admin
    assert admin == AdminPort(token_file=str(tmp_path / "token"))
    assert not admin.asked_for


@pytest.mark.parametrize(("value", "found"), [(False, None), (True, BackendTls()), ({}, BackendTls())])
def test_a_backends_tls_is_on_or_off_or_told_in_full(value: object, found: BackendTls | None) -> None:
    assert parse(server(tls=value)).servers[0].tls == found


@pytest.mark.parametrize(("value", "found"), [(False, None), (True, Sticky()), ({}, Sticky())])
def test_sticky_is_on_or_off_or_told_in_full(value: object, found: Sticky | None) -> None:
    assert parse(top(sticky=value)).sticky == found


@pytest.mark.parametrize("off", [("send_proxy", ""), ("tls", False)])
def test_what_a_server_may_have_can_be_written_down_as_off(off: tuple[str, object]) -> None:
    assert parse(server(**dict([off]))) == parse([ONE])


@pytest.mark.parametrize(
    "hash_on", ["", "path", "header:X-User", "header:!#$%&'*+.^_`|~", "cookie:session", "query:id", "query:a[]"]
)
def test_what_a_request_is_hashed_on(hash_on: str) -> None:
    assert parse(top(hash_on=hash_on)).hash_on == hash_on


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("192.0.2.1", "192.0.2.1/32"),
        ("192.0.2.0/255.255.255.0", "192.0.2.0/24"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("2001:DB8::0:1", "2001:db8::1/128"),
        ("::/0", "::/0"),
    ],
)
def test_an_address_is_a_network_of_one(text: str, network: str) -> None:
    assert parse(top(deny=[text])).deny == (network,)


@pytest.mark.parametrize(
    ("text", "address"),
    [("80", "127.0.0.1:80"), (":80", "127.0.0.1:80"), ("[::]:0", "[::]:0"), ("Web.test:80", "web.test:80"), ("", "")],
)
def test_redirection_is_from_an_address_or_from_none(text: str, address: str) -> None:
    config = parse(tls(redirect_from=text))
    assert config.tls is not None
    assert config.tls.redirect_from == address


@pytest.mark.parametrize("servers", [{}, {"servers": []}])
def test_scaling_alone_needs_no_servers(servers: dict[str, Any]) -> None:
    config = parse(scaling() | servers)
    assert config.servers == ()
    assert config.scaling == Scaling(tuple(SCALED["command"]), (9001, 9100), 1, 8, 10.0, 300.0, 5.0, 30.0, "127.0.0.1")


def test_every_placeholder_may_stand_in_an_instances_command() -> None:
    command = ["{python}", "-m", "app", "--at={host}:{port}", "--id", "{id}", "awk '{print $1}'"]
    scaled = parse(scaling(command=command)).scaling
    assert scaled is not None
    assert scaled.command == tuple(command)


@pytest.mark.parametrize(
    ("expect", "ranges"),
    [
        ("2xx-3xx", ((200, 399),)),
        ("200", ((200, 200),)),
        (204, ((204, 204),)),
        ("200-204", ((200, 204),)),
        ("2XX, 404", ((200, 299), (404, 404))),
        ("200-2xx", ((200, 299),)),
    ],
)
def test_expected_statuses_become_ranges(expect: object, ranges: object) -> None:
    assert parse(top(health_check={"expect": expect})).health_check.expect == ranges


def test_short_forms_and_health_check_complete_each_other() -> None:
    config = parse(top(health_check_url="/up", health_check_interval=0.5, health_check={"fall": 9}))
    assert config.health_check == HealthCheck(path="/up", interval=0.5, fall=9)


@pytest.mark.parametrize(
    "host", ["localhost", "a", "web-1.example.com", "my_service", "10.0.0.1", "::1", "fe80::1%eth0"]
)
def test_host_names_and_addresses_of_both_families_pass(host: str) -> None:
    assert parse(server(host=host)).servers[0].host == host


def test_an_ipv6_address_is_in_brackets() -> None:
    assert Server("1", "::1", 9000).address == "[::1]:9000"
    assert Server("1", "web", 9000).address == "web:9000"


def test_all_backends_may_be_backups() -> None:
    assert all(one.backup for one in parse([ONE | {"backup": True}, TWO | {"backup": True}]).servers)


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_file_says_its_name_and_directory(tmp_path: Path) -> None:
    path = tmp_path / "servers.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([ONE]).encode())
    config = configuration.load(path)
    assert (config.source, config.base) == (str(path), tmp_path)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b'[\n"\xff"]', "line 2: octet 0xff is not UTF-8; save the file as UTF-8"),
        ("[]".encode("utf-16"), "line 1: octet 0xff is not UTF-8; save the file as UTF-8"),
        (b"", 'is empty; the least there can be is [{"host": "127.0.0.1", "port": 8001}]'),
        (b"\xef\xbb\xbf", 'is empty; the least there can be is [{"host": "127.0.0.1", "port": 8001}]'),
    ],
)
def test_a_file_that_is_no_text_says_so(tmp_path: Path, data: bytes, line: str) -> None:
    path = tmp_path / "servers.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        configuration.load(path)
    assert str(caught.value) == f"{path}: {line}"


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        configuration.load(Path("none.json"))
    assert str(caught.value) == "none.json: cannot be read: No such file or directory"
    with pytest.raises(ConfigError) as caught:
        configuration.load(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory"


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.load(Path("/dev/zero"))
    assert str(caught.value) == "/dev/zero: is larger than 16777216 octets"


def test_find_prefers_the_flag_then_the_working_directory_then_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, program = tmp_path / "here", tmp_path / "program"
    here.mkdir()
    program.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(ConfigError) as caught:
        configuration.find(None, program)
    assert str(caught.value) == (
        f"servers.json: not found in {here} or {program}; give --config FILE, or backends as HOST:PORT"
    )
    (program / "servers.json").touch()
    assert configuration.find(None, program) == program / "servers.json"
    (here / "servers.json").touch()
    assert configuration.find(None, program) == Path("servers.json")
    (tmp_path / "my.json").touch()
    assert configuration.find("../my.json", program) == Path("../my.json")
    with pytest.raises(ConfigError) as caught:
        configuration.find("mine.json", program)
    assert str(caught.value) == '--config: there is no file "mine.json"'


def test_the_shipped_file_starts_three_demo_backends() -> None:
    config = configuration.load(Path(__file__).parent.parent / "servers.json")
    command = ("{python}", "backend_server.py", "--port", "{port}", "--id", "{id}")
    assert config.servers == tuple(Server(str(n), "127.0.0.1", 8000 + n, command=command) for n in (1, 2, 3))
    assert (config.algorithm, config.mode, config.port) == ("round_robin", "http", 8080)
    assert config.health_check == HealthCheck(path="/health", interval=2.0)


# --- the command line -----------------------------------------------------------------------------------------------


def test_addresses_are_servers_numbered_from_one() -> None:
    config = configuration.from_addresses(["web.test:9000", "[::1]:9000", ":9001", "9002", "10.0.0.1:80"])
    assert [(one.id, one.address) for one in config.servers] == [
        ("1", "web.test:9000"),
        ("2", "[::1]:9000"),
        ("3", "127.0.0.1:9001"),
        ("4", "127.0.0.1:9002"),
        ("5", "10.0.0.1:80"),
    ]
    assert config == Config(config.servers, source="command line", base=Path.cwd())


@pytest.mark.parametrize(
    ("addresses", "line"),
    [
        (["web"], '"web": must be HOST:PORT, [IPV6]:PORT or PORT'),
        (["web:"], '"web:": must be HOST:PORT, [IPV6]:PORT or PORT'),
        ([""], '"": must be HOST:PORT, [IPV6]:PORT or PORT'),
        (["::1:9000"], '"::1:9000": must be HOST:PORT, [IPV6]:PORT or PORT'),
        (["http://web:80"], '"http://web:80": must be HOST:PORT, [IPV6]:PORT or PORT'),
        (["web:+80"], '"web:+80": must be HOST:PORT, [IPV6]:PORT or PORT'),
        (["web:0"], 'port in "web:0": must be 1 to 65535, not 0'),
        (["web:99999"], 'port in "web:99999": must be 1 to 65535, not 99999'),
        (["a b:80"], 'host in "a b:80": must be a host name or an IP address and nothing else, not "a b"'),
        (["[::x]:80"], 'host in "[::x]:80": must be a host name or an IP address and nothing else, not "::x"'),
        (["9000", ":9000"], '":9000": the address "127.0.0.1:9000" is that of "9000" too; give each its own'),
        ([], 'must not be empty; name at least one server, such as {"host": "127.0.0.1", "port": 8001}'),
    ],
)
def test_a_wrong_address_is_named(addresses: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.from_addresses(addresses)
    assert str(caught.value) == f"command line: {line}"


def test_flags_win_over_the_file_and_others_keep_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    config = parse(top(listen={"host": "::1", "port": 1}, log={"backups": 9}, health_check={"rise": 9}))
    changed = configuration.override(
        config,
        host="0.0.0.0",
        port=0,
        mode=None,
        algorithm="mine.py",
        interval="0.5",
        log_file="a.log",
        log_level="debug",
        log_format="json",
        admin="[::1]:8405",
    )
    assert changed == replace(
        config,
        host="0.0.0.0",
        port=0,
        algorithm=str(tmp_path / "mine.py"),
        health_check=replace(config.health_check, interval=0.5),
        log=replace(config.log, file=str(tmp_path / "a.log"), level="debug", format="json"),
        admin=AdminPort("::1", 8405, asked_for=True),
    )
    assert configuration.override(config, log_file="").log.file == ""
    assert configuration.override(config, port="8081").port == 8081
    assert configuration.override(config, host=None, port=None) == config


def test_the_flag_of_the_operators_port_leaves_its_token_alone() -> None:
    config = parse(top(admin={"address": "8405", "token_file": "token"}))
    token_file = config.admin.token_file
    for flag, place in (("off", ("", 0)), ("127.0.0.1:0", ("127.0.0.1", 0))):
        assert configuration.override(config, admin=flag).admin == AdminPort(*place, token_file, asked_for=True)


def test_the_flags_of_tls_are_its_only_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = (Certificate(str(tmp_path / "a.pem"), "/keys/a"),)
    for former, found in [
        (parse([ONE]), Tls(own)),
        (parse(tls(min_version="1.3", redirect_from="80")), Tls(own, "1.3", "127.0.0.1:80")),
    ]:
        assert configuration.override(former, tls_cert="a.pem", tls_key="/keys/a", port=8443) == replace(
            former, tls=found, port=8443
        )
        assert configuration.override(former, tls_cert=None, tls_key=None) == former


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"tls_cert": "a.pem"}, "--tls-key: is missing; a certificate and its key go together"),
        ({"tls_key": "a.key", "tls_cert": None}, "--tls-cert: is missing; a certificate and its key go together"),
        ({"tls_cert": "", "tls_key": "a.key"}, "--tls-cert: must name a file"),
        (
            {"tls_cert": "a.pem", "tls_key": "a\n"},
            '--tls-key: must be at most 4096 printable characters, not "a\\n"',
        ),
        ({"port": 70000}, "--port: must be 0 to 65535, not 70000"),
        ({"port": "-1"}, "--port: must be 0 to 65535, not -1"),
        ({"port": "http"}, '--port: must be a whole number, not the string "http"'),
        ({"host": ""}, '--host: must be a host name or an IP address and nothing else, not ""'),
        ({"mode": "tpc"}, '--mode: must be "http" or "tcp", not "tpc"; did you mean "tcp"?'),
        ({"algorithm": "randm"}, f'--algorithm: must be {POLICIES}, not "randm"; did you mean "random"?'),
        ({"interval": 0}, "--interval: must be 0.001 to 1000000 seconds, not 0"),
        ({"interval": "nan"}, '--interval: must be a number of seconds, not the string "nan"'),
        ({"log_file": "\0"}, '--log-file: must be at most 4096 printable characters, not "\\u0000"'),
        (
            {"log_level": "inf"},
            '--log-level: must be "debug", "info", "warning" or "error", not "inf"; did you mean "info"?',
        ),
        (
            {"log_format": "HAProxy"},
            '--log-format: must be "text", "haproxy" or "json", not "HAProxy"; did you mean "haproxy"?',
        ),
        ({"admin": "no"}, '--admin: must be HOST:PORT, [IPV6]:PORT, PORT or "off", not "no"'),
        ({"admin": "0.0.0.0:70000"}, "--admin: must be 0 to 65535, not 70000"),
    ],
)
def test_a_wrong_flag_is_named(flags: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.override(parse([ONE]), **flags)
    assert str(caught.value) == line


def test_a_missing_policy_file_of_a_flag_is_looked_for_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        configuration.override(parse([ONE]), algorithm="mine.py")
    assert str(caught.value) == (
        f"--algorithm: there is no file {tmp_path}/mine.py; a relative path starts at {tmp_path}"
    )


@pytest.mark.parametrize(
    ("in_file", "flag", "probes"),
    [
        ({}, None, "http"),
        ({}, "tcp", "tcp"),
        ({"mode": "tcp"}, None, "tcp"),
        ({"mode": "tcp"}, "http", "http"),
        ({"health_check": {"type": "http"}}, "tcp", "http"),
        ({"health_check": {"type": "tcp"}}, "http", "tcp"),
        ({"mode": "tcp", "health_check": {"type": "http"}}, None, "http"),
    ],
)
def test_probes_follow_the_mode_unless_the_file_says_otherwise(
    in_file: dict[str, Any], flag: str | None, probes: str
) -> None:
    assert configuration.override(parse(top(**in_file)), mode=flag).health_check.type == probes


# --- two at one address ---------------------------------------------------------------------------------------------

CLASHES = [
    (
        [ONE, TWO | {"id": "b", "port": 8080}],
        "backend b at 127.0.0.1:8080 is the balancer itself; give one of the two another port",
    ),
    (
        top(listen={"host": "0.0.0.0", "port": 8001}),
        "backend 1 at 127.0.0.1:8001 is the balancer itself; give one of the two another port",
    ),
    (
        {"servers": [{"host": "web.test", "port": 80}], "listen": {"host": "web.test", "port": 80}},
        "backend 1 at web.test:80 is the balancer itself; give one of the two another port",
    ),
    (
        {"servers": [{"host": "::1", "port": 8404}], "admin": {"address": "[::]:8404"}},
        "backend 1 at [::1]:8404 is the operator's port (admin.address); give one of the two another port",
    ),
    (
        [{"host": "127.0.0.1", "port": 8404}],
        "backend 1 at 127.0.0.1:8404 is the operator's port (admin.address); give one of the two another port",
    ),
    *(
        (
            top(listen={"host": host, "port": 8404}, admin={"address": admin}),
            f'admin.address: {admin} is where clients connect; give one of the two another port, or "off" here',
        )
        for host, admin in [
            ("127.0.0.1", "127.0.0.1:8404"),
            ("0.0.0.0", "127.0.0.1:8404"),
            ("127.0.0.1", "0.0.0.0:8404"),
            ("::", "127.0.0.1:8404"),
            ("::", "0.0.0.0:8404"),
        ]
    ),
    *(
        (scaling(ports=ports) | keys, f"scaling.ports: {ports} has port {line}; choose a range without it")
        for ports, keys, line in [
            ("8000-8080", {}, "8080 in it, where the balancer itself is"),
            ("8081-8500", {}, "8404 in it, where the operator's port (admin.address) is"),
            ("8001-8010", {"servers": [ONE]}, "8001 in it, where backend 1 is"),
            (
                "8081-8100",
                {"listen": {"host": "0.0.0.0", "port": 8090}},
                "8090 in it, where the balancer itself is",
            ),
        ]
    ),
]


@pytest.mark.parametrize(("document", "line"), CLASHES, ids=[line for _, line in CLASHES])
def test_two_at_one_address_are_refused(document: object, line: str) -> None:
    config = parse(document)
    with pytest.raises(ConfigError) as caught:
        configuration.refuse_contradictions(config)
    assert str(caught.value) == f"servers.json: {line}"


@pytest.mark.parametrize(
    "document",
    [
        top(listen={"port": 0}, admin={"address": "127.0.0.1:0"}),
        top(listen={"port": 8404}, admin={"address": "off"}),
        top(listen={"host": "::1", "port": 8001}, admin={"address": "127.0.0.2:8001"}),
        top(listen={"host": "0.0.0.0", "port": 8404}, admin={"address": "[::1]:8404"}),
        {"servers": [{"host": "10.0.0.5", "port": 8080}], "listen": {"host": "0.0.0.0"}},  # another machine, mostly
        {"servers": [{"host": "localhost", "port": 8080}], "listen": {"host": "::"}},  # to know, one would look it up
        scaling(ports="8000-8500", host="127.0.0.2"),
        scaling(ports="8000-8500", host="127.0.0.2", command=["app", "{port}"]) | {"servers": [ONE]},
        scaling(ports="1-100") | {"listen": {"port": 0}, "admin": {"address": "off"}},
    ],
)
def test_the_same_port_elsewhere_is_no_clash(document: object) -> None:
    configuration.refuse_contradictions(parse(document))


def test_a_flag_mends_a_clash_of_the_file() -> None:
    config = parse([{"host": "127.0.0.1", "port": 8080}])
    configuration.refuse_contradictions(configuration.override(config, port="9000"))


# --- what cannot both be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (
            top(algorithm="hash"),
            'hash_on: is missing; "hash" goes by something such as "header:X-User", or by "path"',
        ),
        *(
            (top(mode="tcp", **{key: value}), f'{key}: needs to read requests, which mode "tcp" does not; remove it')
            for key, value in [("hash_on", "path"), ("sticky", True), ("forwarded", True)]
        ),
        (
            top(mode="tcp", algorithm="hash", hash_on="path"),
            'algorithm: "hash" needs to read requests, which mode "tcp" does not; "ip_hash" does not',
        ),
        (
            tls(redirect_from="80") | {"mode": "tcp"},
            'tls.redirect_from: is for requests, which mode "tcp" does not read; remove it',
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(document: object, line: str) -> None:
    config = parse(document)
    with pytest.raises(ConfigError) as caught:
        configuration.refuse_contradictions(config)
    assert str(caught.value) == f"servers.json: {line}"


@pytest.mark.parametrize(
    "document",
    [
        top(algorithm="hash", hash_on="path"),
        top(hash_on="path"),  # at hand for when the policy is changed to it
        top(sticky=True, forwarded=True),
        tls(redirect_from="80"),
        tls() | {"mode": "tcp", "proxy_protocol_from": ["::1"], "deny": ["::2"], "limits": {"client_rate": 1}},
    ],
)
def test_settings_that_go_together_are_not(document: object) -> None:
    configuration.refuse_contradictions(parse(document))


def test_flags_mend_a_contradiction_and_cause_one() -> None:
    config = parse(top(mode="tcp", sticky=True))
    configuration.refuse_contradictions(configuration.override(config, mode="http"))
    config = parse([ONE])
    with pytest.raises(ConfigError):
        configuration.refuse_contradictions(configuration.override(config, algorithm="hash"))


# --- what --check prints --------------------------------------------------------------------------------------------


def test_describe_shows_what_would_run() -> None:
    config = parse(
        {
            "servers": [
                ONE | {"command": ["{python}", "a.py"]},
                {"id": "spare", "host": "::1", "port": 1, "backup": True},
            ],
            "health_check": {"expect": "2xx,404", "path": "/up"},
        }
    )
    assert configuration.describe(config) == (
        """\
configuration  servers.json
listens on     127.0.0.1:8080, mode http
algorithm      round_robin, 3 retries
backends       2
  id     address         weight  limit  role    command
  1      127.0.0.1:8001  1       -      active  "{python} a.py"
  spare  [::1]:1         1       -      backup  -
health check   GET /up wants 200-299, 404, every 2 s, timeout 2 s, up after 2, down after 3
timeouts in s  connect 5, handshake 10, request_head 10, client_idle 60, client 60, server 60, tunnel 3600, \
queue 5, no_backend 0, drain_delay 0, drain 30
log            load_balancer.log (text, info)
admin          127.0.0.1:8404
"""
    )


def test_describe_tells_of_tls_and_of_who_may_come() -> None:
    config = parse(
        tls(certificates=[{"cert": "/a.pem", "key": "/a.key"}, {"cert": "/b.pem", "key": "/b.key"}], redirect_from="80")
        | {
            "trusted_proxies": ["10.0.0.0/8", "::1"],
            "proxy_protocol_from": ["10.0.0.1"],
            "allow": ["192.0.2.0/24"],
            "deny": ["192.0.2.7", "192.0.2.8"],
        }
    )
    lines = [" ".join(line.split()) for line in configuration.describe(config).splitlines()]
    assert {
        "tls /a.pem, /b.pem; 1.2 or later, plain HTTP is redirected from 127.0.0.1:80",
        "trusted proxies 10.0.0.0/8, ::1/128",
        "proxy protocol from 10.0.0.1/32",
        "allow 192.0.2.0/24",
        "deny 192.0.2.7/32, 192.0.2.8/32",
    } < set(lines)


def test_describe_of_tcp_mode_without_a_log() -> None:
    text = configuration.describe(parse(top(mode="tcp", log={"file": ""})))
    assert "TCP connect, every 2 s" in text
    assert "\nlog            none\n" in text


def test_describe_of_scaling_alone_has_no_table_of_backends() -> None:
    config = parse(scaling(min=0, target_active=2.5) | {"admin": {"address": "[::1]:8405", "token_file": "/run/token"}})
    text = configuration.describe(config)
    assert (
        """
backends       0
scaling        0 to 8 of "{python} app.py --port {port}" on 127.0.0.1, ports 9001-9100, 2.5 requests each, \
a step every 5 s, 30 s to start, stopped after 300 s idle
health check """
        in text
    )
    assert text.endswith("\nadmin          [::1]:8405, token in /run/token\n")
    assert configuration.describe(configuration.override(config, admin="off")).endswith("\nadmin          off\n")
