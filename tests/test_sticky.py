"""The cookie that keeps a client where it was: what it says, what it hides, and how it is found again."""

from __future__ import annotations

from http.cookies import SimpleCookie
from typing import NamedTuple

import pytest

from balancer.sticky import Sticky, cookie_values

SECRET = b"sixteen octets at least"


class Named(NamedTuple):
    id: str
    address: str


WEB1 = Named("web-1", "10.1.2.3:8080")
WEB2 = Named("web-2", "10.1.2.4:8080")


def sticky(name: str = "lb", secret: bytes = SECRET, **options) -> Sticky:
    return Sticky(name, secret, **options)


def block(*fields: str) -> bytes:
    """As they stand in a head."""
    return "".join(f"\r\n{field}" for field in fields).encode("latin-1") + b"\r\n"


# What it says -----------------------------------------------------------------------------------------------------


def test_with_the_same_secret_another_run_gives_the_same_value():
    """Pinned: a release that made other ones would send every client elsewhere."""
    assert sticky().value(WEB1) == "6Md_GAOPnzzbHo_5VkLezw"
    assert sticky().value(Named(*WEB1)) == sticky().value(WEB1)


@pytest.mark.parametrize(
    "other",
    [
        sticky().value(WEB2),
        sticky().value(Named("web-1", WEB2.address)),
        sticky().value(Named("web-2", WEB1.address)),
        sticky(secret=b"another secret of that length").value(WEB1),
        sticky("other").value(WEB1),
    ],
    ids=["backend", "address", "id", "secret", "name"],
)
def test_another_backend_secret_or_name_gives_another_value(other):
    assert other != sticky().value(WEB1)


def test_id_and_address_do_not_run_into_each_other():
    assert sticky().value(Named("1", "h:80")) != sticky().value(Named("", "h:801"))


def test_the_value_can_be_told_from_nothing_but_a_table():
    """It names no address, not even one that could be found by trying all of them: the secret takes part."""
    values = {sticky().value(Named(str(number), f"10.0.0.{number}:80")) for number in range(200)}
    assert len(values) == 200
    assert {len(value) for value in values} == {22}


def test_an_id_may_be_of_any_letters():
    value = sticky().value(Named("büro \ud800", "h:1"))
    assert sticky().find(block(f"Cookie: lb={value}")) == value


def test_a_secret_that_can_be_guessed_is_refused():
    with pytest.raises(ValueError, match="the secret has 15 octets; it takes at least 16"):
        sticky(secret=b"x" * 15)


@pytest.mark.parametrize("name", ["", "a b", "a=b", "a;b", 'a"b', "a\r\nb", "ä", "a\n"])
def test_a_name_that_is_no_cookie_name_is_refused(name):
    """RFC 6265 section 4.1.1: a token."""
    with pytest.raises(ValueError, match="cannot be the name of a cookie"):
        sticky(name)


# Set-Cookie -------------------------------------------------------------------------------------------------------


def test_the_line_for_the_client():
    value = sticky().value(WEB1).encode()
    assert sticky().set_cookie(WEB1) == b"Set-Cookie: lb=" + value + b"; Path=/; HttpOnly; SameSite=Lax\r\n"
    assert sticky(secure=True).set_cookie(WEB1).endswith(b"; Path=/; HttpOnly; SameSite=Lax; Secure\r\n")


def test_others_read_the_line_as_it_is_meant():
    morsel = SimpleCookie(sticky(secure=True).set_cookie(WEB1).decode().partition(": ")[2].strip())["lb"]
    assert morsel.value == sticky().value(WEB1)
    assert (morsel["path"], morsel["httponly"], morsel["samesite"], morsel["secure"]) == ("/", True, "Lax", True)
    assert (morsel["domain"], morsel["max-age"], morsel["expires"]) == ("", "", "")


# Finding it -------------------------------------------------------------------------------------------------------

OURS = sticky().value(WEB1)
THEIRS = sticky().value(WEB2)


@pytest.mark.parametrize(
    "fields",
    [
        [f"Cookie: lb={OURS}"],
        [f"cookie:lb={OURS}"],
        [f"COOKIE: \t lb={OURS} \t"],
        ["Host: x", f"Cookie: a=b; lb={OURS}; c=d", "Accept: */*"],
        [f"Cookie: a=b;lb={OURS};c=d"],
        [f"Cookie: ;; ; lb={OURS} ;"],
        ["Cookie: a=b", f"Cookie: lb={OURS}"],
        [f"Cookie: lb={OURS}; lb={THEIRS}"],
        [f"Cookie: lb=; lb=app; lb={OURS}"],
        [f'Cookie: a="x; lb={OURS}'],
        [f"Cookie: xlb={THEIRS}; lb={OURS}"],
        [f"Cookie: a=lb={THEIRS}; lb={OURS}"],
        [f"Cookie: a=x lb={THEIRS}; lb={OURS}"],
        [f"X-Cookie: lb={THEIRS}", f"Cookie: lb={OURS}"],
        [f"X: Cookie: lb={THEIRS}", f"Cookie: lb={OURS}"],
        [f"Cookie2: lb={THEIRS}", f"Cookie: lb={OURS}"],
    ],
)
def test_the_value_is_found(fields):
    """RFC 6265 section 4.2.1, and what clients make of it."""
    assert sticky().find(block(*fields)) == OURS


@pytest.mark.parametrize(
    "fields",
    [
        [],
        ["Host: x"],
        ["Cookie:"],
        ["Cookie: lb"],
        ["Cookie: lb="],
        [f"Cookie: LB={OURS}"],
        [f"Cookie: lb ={OURS}"],
        [f"Cookie: lb= {OURS[:-1]}"],
        [f'Cookie: lb="{OURS}"'],
        [f"Cookie: lb={OURS}x"],
        [f"Cookie: lb={OURS[:-1]}"],
        [f"Cookie: lb={OURS[:-1]}="],
        [f"Cookie: lb={OURS[:-1]}\xe9"],
        [f"Cookie: lb={OURS}, lb={OURS}"],
        [f"Cookie: xlb={OURS}"],
        [f"Cookie: l.b={OURS}"],
        [f"Set-Cookie: lb={OURS}"],
        [f"X: lb={OURS}"],
    ],
)
def test_what_cannot_be_ours_is_none(fields):
    assert sticky().find(block(*fields)) is None


def test_signs_of_a_name_mean_themselves():
    assert sticky("l.b").find(block(f"Cookie: lxb={THEIRS}; l.b={OURS}")) == OURS
    assert sticky("$^*").find(block(f"Cookie: $^*={OURS}")) == OURS


@pytest.mark.parametrize(
    "cookies",
    [
        b";" * 60_000,
        b" " * 60_000,
        b"; " * 30_000,
        b";lb" * 20_000,
        b"; lb=" * 12_000,
        b"; lb=x" * 10_000,
        b"lb=" * 20_000,
        b";" + b" " * 59_000 + b"lb",
        (b";" + b" " * 500) * 120 + b"lb=",
        bytes(range(128, 256)) * 400 + b"lb=",
    ],
    ids=["semicolons", "blanks", "both", "names", "empty", "short", "one-value", "far", "runs", "binary"],
)
def test_a_hostile_cookie_is_read_once_and_yields_nothing(cookies):
    """60 KB that make a careless pattern try every beginning with every end."""
    fields = b"\r\nCookie: " + cookies + b"\r\n"
    assert sticky().find(fields) is None
    assert sticky().find(b"\r\nA: b" + fields[:-2] + b"; lb=" + OURS.encode() + b"\r\n") == OURS


def test_all_values_of_any_cookie_in_their_order():
    fields = block("Cookie: a=1; b=2; a=3", "X: a=4", "Cookie: a=5; a=\xff=; A=6; a")
    assert list(cookie_values(fields, b"a")) == [b"1", b"3", b"5", b"\xff="]
    assert list(cookie_values(fields, b"b")) == [b"2"]
    assert list(cookie_values(fields, b"c")) == []
