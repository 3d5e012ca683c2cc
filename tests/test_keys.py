"""The other files of a configuration: read before anything changes, and taken over where they did not."""

from __future__ import annotations

import json
import os
import shutil
import ssl
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from balancer.config import Config, ConfigError, parse
from balancer.keys import Keys
from test_certificates import DATA

SITE = {"cert": str(DATA / "site.pem"), "key": str(DATA / "ec.key")}
OTHER = {"cert": str(DATA / "rsa.pem"), "key": str(DATA / "rsa.key")}
SERVER = {"id": "web", "host": "127.0.0.1", "port": 8001}
ROOT = str(DATA / "root.pem")
SECRET = "sixteen octets at least"


class Named(NamedTuple):
    id: str = "web"
    address: str = "127.0.0.1:8001"


def config(base: Path = Path("/nowhere"), server: dict[str, Any] | None = None, **keys: Any) -> Config:
    return parse(json.dumps({"servers": [SERVER | (server or {})], **keys}), "servers.json", base)


def encrypted(*certificates: dict[str, str], **keys: Any) -> Config:
    return config(tls={"certificates": list(certificates or (SITE,))}, **keys)


def refusal(config: Config, former: Keys | None = None) -> str:
    """What is said of files that are not right, which is one line."""
    with pytest.raises(ConfigError) as caught:
        Keys(config, former)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def value(keys: Keys) -> str:
    """The cookie for the backend."""
    assert keys.sticky is not None
    return keys.sticky.value(Named())


def line(keys: Keys) -> bytes:
    assert keys.sticky is not None
    return keys.sticky.set_cookie(Named())


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    return path


# Nothing, and mistakes --------------------------------------------------------------------------------------------


def test_most_configurations_have_no_other_files() -> None:
    keys = Keys(config())
    assert (keys.context, keys.certificates, keys.sticky) == (None, None, None)
    assert keys.backend_context(config().servers[0]) is None
    assert keys.warnings == []
    assert keys.state() == ()


def test_a_certificate_that_is_not_right_names_the_file_and_the_setting(tmp_path: Path) -> None:
    assert refusal(encrypted({"cert": SITE["cert"], "key": str(tmp_path / "none.key")})).startswith(
        f"servers.json: tls: {tmp_path}/none.key"
    )
    assert refusal(encrypted(SITE, SITE | {"key": OTHER["key"]})).startswith("servers.json: tls: ")


def test_authorities_that_are_not_there_name_the_file_and_the_setting(tmp_path: Path) -> None:
    line = refusal(config(server={"tls": {"ca": str(tmp_path / "none.pem")}}))
    assert line.startswith(f"servers.json: servers[].tls.ca: {tmp_path}/none.pem")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "sticky.secret_file: {path}: No such file or directory"),
        (b"", "sticky: the secret has 0 octets"),
        (b"fifteen octets!\n", "sticky: the secret has 15 octets"),
        (b" \n\t" * 100, "sticky: the secret has 0 octets"),
    ],
)
def test_a_secret_that_is_none_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    assert refusal(config(sticky={"secret_file": str(path)})).startswith(f"servers.json: {words.format(path=path)}")


def test_a_secret_may_be_any_octets_and_the_end_of_its_line_is_none_of_it(secret: Path) -> None:
    settings = config(sticky={"secret_file": str(secret)})
    expected = value(Keys(settings))
    secret.write_text(f"{SECRET}\n")
    assert value(Keys(settings)) == expected
    secret.write_bytes(bytes(range(256)))
    assert value(Keys(settings)) != expected


def test_a_secret_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    assert refusal(config(sticky={"secret_file": str(tmp_path)})).endswith("Is a directory")


# What is made of them ---------------------------------------------------------------------------------------------


def test_clients_are_shown_the_certificates_and_backends_are_verified() -> None:
    settings = encrypted(
        servers=[
            SERVER | {"tls": {"ca": ROOT}},
            {"host": "b", "port": 2},
            {"host": "c", "port": 3, "tls": {"ca": ROOT}},
            {"host": "d", "port": 4, "tls": {"ca": ROOT, "verify": False}},
        ]
    )
    keys = Keys(settings)
    assert keys.context is not None
    first, second, third, fourth = map(keys.backend_context, settings.servers)
    assert second is None
    assert first is third is not None
    assert first.verify_mode is ssl.CERT_REQUIRED
    assert fourth is not None
    assert fourth.verify_mode is ssl.CERT_NONE


def test_a_backend_that_is_not_verified_is_warned_of_by_name() -> None:
    [warning] = Keys(config(server={"tls": {"verify": False}})).warnings
    assert warning.startswith("backend web 127.0.0.1:8001: its certificate is NOT verified")
    assert Keys(config(server={"tls": True})).warnings == []


def test_cookies_are_secure_where_clients_come_over_tls() -> None:
    assert b"; Secure" not in line(Keys(config(sticky=True)))
    assert line(Keys(encrypted(sticky=True))).endswith(b"; Secure\r\n")
    assert line(Keys(config(sticky={"cookie": "where"}))).startswith(b"Set-Cookie: where=")


def test_each_run_makes_up_a_secret_of_its_own() -> None:
    assert value(Keys(config(sticky=True))) != value(Keys(config(sticky=True)))


def test_a_secret_file_makes_the_cookie_the_same_in_every_run(secret: Path) -> None:
    settings = config(sticky={"secret_file": str(secret)})
    assert value(Keys(settings)) == value(Keys(settings))


# Another configuration --------------------------------------------------------------------------------------------


def test_what_did_not_change_is_taken_over(secret: Path) -> None:
    settings = encrypted(server={"tls": {"ca": ROOT}}, sticky={"secret_file": str(secret)})
    former = Keys(settings)
    keys = Keys(
        encrypted(server={"tls": {"ca": ROOT}, "weight": 9}, sticky={"secret_file": str(secret)}, retries=1), former
    )
    assert keys.certificates is former.certificates
    assert value(keys) == value(former)
    assert keys.backend_context(settings.servers[0]) is former.backend_context(settings.servers[0])


@pytest.mark.parametrize(
    "other",
    [
        config(sticky=True),
        config(sticky=True, server={"tls": {"ca": ROOT}}),
        config(sticky={"secret_file": ""}, server={"tls": True}),
        encrypted(sticky=True),
        encrypted(sticky=True, server={"tls": {"ca": ROOT, "verify": False}}),
    ],
    ids=["nothing", "authorities", "system's authorities", "certificate", "both"],
)
def test_a_secret_that_was_made_up_lasts_as_long_as_the_balancer(other: Config) -> None:
    """Clients stay where they are, whatever else is changed while it runs."""
    former = Keys(config(sticky=True))
    keys = Keys(other, former)
    assert value(keys) == value(former)
    assert value(Keys(config(sticky=True), keys)) == value(former)


def test_a_secret_that_was_made_up_outlives_a_change_of_another_file(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    shutil.copy(ROOT, ca)
    settings = config(sticky=True, server={"tls": {"ca": str(ca)}})
    former = Keys(settings)
    ca.write_text(ca.read_text() + "\n")
    assert value(Keys(settings, former)) == value(former)


def test_a_secret_file_that_changes_makes_other_cookies(secret: Path) -> None:
    settings = config(sticky={"secret_file": str(secret)})
    former = Keys(settings)
    before = former.state()
    secret.write_text("another secret of that length")
    assert former.state() != before
    keys = Keys(settings, former)
    assert value(keys) != value(former)
    assert keys.state() == former.state()


def test_another_name_of_the_cookie_is_another_cookie(secret: Path) -> None:
    former = Keys(config(sticky={"secret_file": str(secret)}))
    keys = Keys(config(sticky={"secret_file": str(secret), "cookie": "b"}), former)
    assert line(keys).startswith(b"Set-Cookie: b=")


def test_a_certificate_that_is_renewed_is_read_again(tmp_path: Path) -> None:
    pair = {"cert": str(tmp_path / "site.pem"), "key": str(tmp_path / "site.key")}
    shutil.copy(SITE["cert"], pair["cert"])
    shutil.copy(SITE["key"], pair["key"])
    settings = encrypted(pair, server={"tls": {"ca": ROOT}})
    former = Keys(settings)
    before = former.state()
    shutil.copy(OTHER["cert"], pair["cert"])
    shutil.copy(OTHER["key"], pair["key"])
    assert former.state() != before
    keys = Keys(settings, former)
    assert keys.certificates is not former.certificates
    assert keys.backend_context(settings.servers[0]) is former.backend_context(settings.servers[0])


def test_authorities_that_change_are_read_again(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    shutil.copy(ROOT, ca)
    settings = config(server={"tls": {"ca": str(ca)}})
    former = Keys(settings)
    shutil.copy(DATA / "self_signed.pem", ca)
    assert former.state() != Keys(config()).state()
    assert Keys(settings, former).backend_context(settings.servers[0]) is not former.backend_context(
        settings.servers[0]
    )


def test_files_that_are_not_right_leave_the_former_as_they_were(secret: Path) -> None:
    settings = encrypted(server={"tls": {"ca": ROOT}}, sticky={"secret_file": str(secret)})
    former = Keys(settings)
    expected = value(former)
    secret.write_text("short")
    assert "the secret has 5 octets" in refusal(settings, former)
    os.unlink(secret)
    assert "No such file or directory" in refusal(settings, former)
    assert value(former) == expected
    assert former.context is not None


def test_files_that_are_named_no_longer_are_not_watched(secret: Path) -> None:
    former = Keys(encrypted(sticky={"secret_file": str(secret)}))
    assert len(former.state()) == 3
    assert Keys(config(), former).state() == ()
