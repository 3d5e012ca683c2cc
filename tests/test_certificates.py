"""Certificates: which one a client is shown and how strongly, and one line for each way in which a file is not right.

The files are in tests/data/certificates, whose make.sh says what each is for. Connections are made in memory.
"""

from __future__ import annotations

import os
import select
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from balancer.certificates import WARN_AHEAD, BadCertificate, Certificates, backend_context, server_name, state
from balancer.config import BackendTls, Certificate, Tls
from conftest import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "certificates"
KEYS = {"rsa": "rsa", "weak": "weak", "self_signed": "self_signed"}  # of the others it is ec.key
END = 4891363200.0  # 2125-01-01, when most of them end
FAR = 10**11  # seconds: later than all of them
TLS_1_2, TLS_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


def pair(name: str) -> Certificate:
    return Certificate(str(DATA / f"{name}.pem"), str(DATA / f"{KEYS.get(name, 'ec')}.key"))


def certificates(*names: str, min_version: str = "1.2", http: bool = True) -> Certificates:
    return Certificates(Tls(tuple(map(pair, names)), min_version), http=http)


def load(cert: Path | str, key: Path | str, clock: Callable[[], float] = time.time) -> Certificates:
    return Certificates(Tls((Certificate(str(cert), str(key)),)), http=True, clock=clock)


def refusal(cert: Path | str, key: Path | str = DATA / "ec.key", clock: Callable[[], float] = time.time) -> str:
    """What is said of files that are not right, which is one line."""
    with pytest.raises(BadCertificate) as caught:
        load(cert, key, clock)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def blocks(name: str) -> list[str]:
    """The certificates in a file, each as the lines that it has there."""
    end = "-----END CERTIFICATE-----\n"
    return [block + end for block in (DATA / name).read_text().split(end)[:-1]]


def der(name: str) -> bytes:
    return ssl.PEM_cert_to_DER_cert(blocks(f"{name}.pem")[0])


def a_client(**settings: Any) -> ssl.SSLContext:
    """A client that takes every certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for name, value in settings.items():
        setattr(context, name, value)
    return context


class Link:
    """Both ends of a connection, in memory, when their handshake is through."""

    def __init__(
        self,
        server: ssl.SSLContext,
        client: ssl.SSLContext,
        name: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self.to_server, self.to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client.wrap_bio(self.to_client, self.to_server, server_hostname=name, session=session)
        self.server = server.wrap_bio(self.to_server, self.to_client, server_side=True)
        for end in (self.client, self.server) * 3:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
        self.server.write(b"hello")  # the client reads the tickets of TLS 1.3 before it
        assert self.client.read() == b"hello"

    @property
    def shown(self) -> bytes | None:
        return self.client.getpeercert(binary_form=True)


# Which one is shown -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked_for", "shown"),
    [
        (None, "site"),
        ("site.test", "site"),
        ("www.site.test", "site"),
        ("WWW.Site.TEST", "site"),
        ("unknown.test", "site"),
        ("test", "site"),
        ("a.wild.test", "wildcard"),
        ("A.WILD.test.", "wildcard"),
        ("wild.test", "site"),
        ("a.b.wild.test", "site"),
        ("foo.odd.test", "site"),
        ("mixed.test", "mixed"),
        ("mixed.test.", "mixed"),
        ("bücher.test", "mixed"),
        ("XN--Bcher-KVA.test", "mixed"),
        ("localhost", "local"),
        ("127.0.0.1", "site"),
        ("nameless.test", "nameless"),
        ("a" * 63 + ".test", "site"),
    ],
)
def test_the_certificate_shown_is_the_one_for_the_name_asked_for(asked_for, shown):
    """RFC 6066, section 3, and RFC 9525, section 6.3: an asterisk is one whole label. Addresses are not asked for."""
    link = Link(certificates("site", "wildcard", "mixed", "local", "nameless").context, a_client(), asked_for)
    assert link.shown == der(shown)


def test_an_exact_name_goes_before_an_asterisk_and_the_earlier_certificate_before_the_later(tmp_path):
    both = certificates("wildcard", "local", "site", "rsa", "site")
    assert Link(both.context, a_client(), "site.test").shown == der("site")
    assert Link(both.context, a_client(), "else.test").shown == der("wildcard")


def test_of_two_certificates_for_the_same_names_each_client_is_shown_the_one_it_can_verify():
    """A certificate of each kind of key, as with nginx and HAProxy: some clients know only one of them."""
    shown = certificates("local", "site", "rsa")
    for kind, name in (("ECDSA", "site"), ("RSA", "rsa")):
        client = a_client(maximum_version=TLS_1_2)
        client.set_ciphers(f"ECDHE-{kind}-AES128-GCM-SHA256")
        client.load_verify_locations(DATA / "root.pem")
        client.verify_mode = ssl.CERT_REQUIRED  # so the chain of each was sent too
        assert Link(shown.context, client, "www.site.test").shown == der(name)
    assert shown.warnings == ()


def test_a_certificate_that_is_never_shown_is_warned_of():
    warnings = certificates("site", "site").warnings
    assert warnings == (f"{DATA}/site.pem: is never shown, as earlier ones have all of its names; remove it",)


@pytest.mark.parametrize("name", ["site", "rsa", "local", "self_signed"])
def test_a_client_that_trusts_the_root_verifies_the_chain(name):
    client = ssl.create_default_context(cafile=str(DATA / ("self_signed.pem" if name == "self_signed" else "root.pem")))
    host = {"local": "127.0.0.1", "self_signed": "self.test"}.get(name, "www.site.test")
    assert Link(certificates(name).context, client, host).shown == der(name)
    assert certificates(name).warnings == ()


def test_a_name_that_is_no_text_ends_that_connection_alone(monkeypatch):
    """The ssl module wants ASCII there, and tells sys.unraisablehook of what is not before we are asked."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: reported.append((args.exc_type, args.object)))
    shown = certificates("site", "wildcard")
    hello, to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        a_client().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="a.wild.test").do_handshake()
    to_server.write(hello.read().replace(b"a.wild.test", b"\xff.wild.test"))
    with pytest.raises(ssl.SSLError, match="CALLBACK_FAILED"):
        shown.context.wrap_bio(to_server, to_client, server_side=True).do_handshake()
    assert reported == [(UnicodeDecodeError, b"\xff.wild.test")]
    assert Link(shown.context, a_client(), "a.wild.test").shown == der("wildcard")


# How strongly -----------------------------------------------------------------------------------------------------

both_kinds = pytest.mark.parametrize("name", ["site.test", "a.wild.test"], ids=["default", "chosen"])
"""Connections with the context of the first certificate, and those with one that their name has chosen."""


@both_kinds
@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
def test_tls_1_2_and_1_3_are_spoken(version, name):
    client = a_client(minimum_version=version, maximum_version=version)
    assert Link(certificates("site", "wildcard").context, client, name).client.version() == version.name.replace(
        "_", "."
    )


@both_kinds
def test_with_min_version_1_3_a_client_of_1_2_is_refused(name):
    server = certificates("site", "wildcard", min_version="1.3").context
    assert Link(server, a_client(), name).client.version() == "TLSv1.3"
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        refused(server, a_client(maximum_version=TLS_1_2), name)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
def test_a_client_of_an_older_version_is_refused(version):
    """RFC 8996."""
    client = a_client(minimum_version=ssl.TLSVersion[version], maximum_version=ssl.TLSVersion[version])
    client.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        refused(certificates("rsa").context, client)


@pytest.mark.parametrize(
    "cipher",
    [
        "ECDHE-RSA-AES128-SHA",  # CBC, SHA-1: Lucky Thirteen
        "ECDHE-RSA-AES256-SHA384",  # CBC
        "AES256-GCM-SHA384",  # no forward secrecy
        "AES128-SHA",  # neither
        "DHE-RSA-AES256-GCM-SHA384",  # finite fields
        "AECDH-AES128-SHA",  # no certificate
        "NULL-SHA256",
    ],
)
def test_a_client_with_a_weak_cipher_alone_is_refused(cipher):
    """What sslyze and testssl call weak, or Mozilla's "intermediate" settings leave out; RFC 9325, section 4."""
    client = a_client(maximum_version=TLS_1_2)
    client.set_ciphers(f"{cipher}:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match="NO_SHARED_CIPHER"):
        refused(certificates("rsa").context, client)


def refused(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None = None) -> None:
    """Have the server read what a client begins with. Raises what it says to that."""
    hello, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        client.wrap_bio(ssl.MemoryBIO(), hello, server_hostname=name).do_handshake()
    to_server.write(hello.read())
    server.wrap_bio(to_server, ssl.MemoryBIO(), server_side=True).do_handshake()


def test_every_cipher_has_forward_secrecy_and_authenticated_encryption():
    ciphers = certificates("site").context.get_ciphers()
    assert {cipher["name"] for cipher in ciphers} == {
        *("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256", "TLS_AES_128_GCM_SHA256"),
        *("ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305"),
        *("ECDHE-RSA-AES256-GCM-SHA384", "ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-CHACHA20-POLY1305"),
    }


def test_there_is_no_compression_and_no_renegotiation():
    """CVE-2012-4929, and a client that has the server compute without end."""
    options = certificates("site").context.options
    for option in (ssl.OP_NO_COMPRESSION, ssl.OP_NO_RENEGOTIATION, ssl.OP_CIPHER_SERVER_PREFERENCE):
        assert option & options


@pytest.mark.parametrize(
    ("offered", "agreed"),
    [
        ("ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-AES256-GCM-SHA384"),
        ("ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"),
        ("ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES256-GCM-SHA384"),
    ],
)
def test_the_order_of_ciphers_is_ours_except_for_who_wants_chacha_first(offered, agreed):
    client = a_client(maximum_version=TLS_1_2)
    client.set_ciphers(offered)
    cipher = Link(certificates("site").context, client).client.cipher()
    assert cipher
    assert cipher[0] == agreed


@both_kinds
@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
def test_a_session_is_resumed_by_its_ticket(version, name):
    server = certificates("site", "wildcard").context
    client = a_client(minimum_version=version, maximum_version=version)
    first = Link(server, client, name)
    assert not first.client.session_reused
    assert first.client.session
    assert first.client.session.has_ticket
    assert Link(server, client, name, first.client.session).client.session_reused


@both_kinds
@pytest.mark.parametrize(
    ("http", "offered", "agreed"),
    [
        (True, ["h2", "http/1.1"], "http/1.1"),
        (True, ["h2"], None),
        (True, [], None),
        (False, ["h2", "http/1.1"], None),
    ],
)
def test_http_1_1_is_agreed_on_in_http_mode_alone(http, offered, agreed, name):
    """RFC 7301."""
    client = a_client()
    if offered:
        client.set_alpn_protocols(offered)
    link = Link(certificates("site", "wildcard", http=http).context, client, name)
    assert link.client.selected_alpn_protocol() == agreed
    assert link.server.selected_alpn_protocol() == agreed


@both_kinds
def test_a_stream_that_ends_without_a_close_is_told_from_one_that_is_closed(name):
    """RFC 8446, section 6.1: without close_notify it may have been cut."""
    server, client = certificates("site", "wildcard").context, backend_context(BackendTls(verify=False), http=True)
    cut_above, cut_below = Link(server, client, name), Link(server, client, name)
    for end, incoming in ((cut_above.server, cut_above.to_server), (cut_below.client, cut_below.to_client)):
        incoming.write_eof()
        with pytest.raises(ssl.SSLEOFError):
            end.read()
    closed = Link(server, client, name)
    with pytest.raises(ssl.SSLWantReadError):
        closed.client.unwrap()
    closed.to_server.write_eof()
    assert closed.server.read() == b""


# Files that are not right -----------------------------------------------------------------------------------------


def file(directory: Path, content: str | bytes, name: str = "this.pem") -> Path:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_certificate_that_has_expired_is_refused():
    mend = "expired on 2024-01-01 00:00 UTC; renew it"
    assert refusal(DATA / "expired.pem") == f"{DATA}/expired.pem: {mend}"


def test_a_certificate_that_is_not_valid_yet_is_refused():
    said = refusal(DATA / "future.pem", clock=lambda: 0.0)
    assert said.startswith(f"{DATA}/future.pem: is not valid before 2100-01-01 00:00 UTC; ")
    assert said.endswith("set this machine's clock, which says 1970-01-01 00:00 UTC")


def test_a_certificate_is_valid_to_its_last_second():
    assert load(DATA / "site.pem", DATA / "ec.key", clock=lambda: END).warnings == ()
    assert "expired" in refusal(DATA / "site.pem", clock=lambda: END + 1)


@pytest.mark.parametrize(("name", "key"), [("site", "self_signed"), ("rsa", "weak"), ("site", "rsa"), ("rsa", "ec")])
def test_a_key_of_another_certificate_is_refused(name, key):
    cert, key = DATA / f"{name}.pem", DATA / f"{key}.key"
    mend = "name the key that it was issued for; the server's own certificate comes first in its file"
    assert refusal(cert, key) == f"{cert}: is not for the key in {key}; {mend}"


def test_a_chain_in_the_wrong_order_is_refused(tmp_path):
    cert = file(tmp_path, "".join(reversed(blocks("site.pem"))))
    assert refusal(cert).startswith(f"{cert}: is not for the key in {DATA}/ec.key; ")


@pytest.mark.parametrize("name", ["encrypted.key", "encrypted_old.key"])
def test_an_encrypted_key_is_refused(name):
    key = DATA / name
    mend = f"decrypt it: `openssl pkey -in {name} -out plain.key`"
    assert refusal(DATA / "site.pem", key) == f"{key}: is encrypted, and nobody is asked for its password; {mend}"


def test_nobody_is_asked_for_a_password_on_the_terminal(tmp_path):
    """OpenSSL opens the controlling terminal for that, whatever standard input is, and waits.

    It would also ask for that of a certificate, of which nobody thinks that it might be encrypted.
    """
    begin = "-----BEGIN CERTIFICATE-----\n"
    encryption = "Proc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,E23118D802A4CCBA0A36B5D1E272ED51\n\n"
    site, key = DATA / "site.pem", DATA / "ec.key"
    encrypted = file(tmp_path, site.read_text().replace(begin, begin + encryption))
    script = """if True:
        import fcntl, sys, termios
        from balancer.certificates import BadCertificate, Certificates, backend_context
        from balancer.config import BackendTls, Certificate, Tls
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for cert, key in zip(sys.argv[1::2], sys.argv[2::2]):
            try:
                Certificates(Tls((Certificate(cert, key),)), http=True)
            except BadCertificate as error:
                print(error)
        try:
            backend_context(BackendTls(ca=cert), http=True)
        except BadCertificate as error:
            print(error)
    """
    files = (site, DATA / "encrypted.key", site, DATA / "encrypted_old.key", encrypted, key)
    master, slave = os.openpty()
    try:
        ended = subprocess.run(
            [sys.executable, "-c", script, *files],
            stdin=slave,
            capture_output=True,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            timeout=PATIENCE,
            check=True,
        )
        assert select.select([master], [], [], 0)[0] == []
    finally:
        os.close(master)
        os.close(slave)
    assert ended.stderr == ""
    first, second, third, fourth = ended.stdout.splitlines()
    assert first.startswith(f"{DATA}/encrypted.key: is encrypted")
    assert second.startswith(f"{DATA}/encrypted_old.key: is encrypted")
    assert third.startswith(f"{encrypted}: certificate 1 of 2 in it is damaged")
    assert fourth == third


@pytest.mark.parametrize("which", [0, 1], ids=["cert", "key"])
class TestFile:
    """What may be wrong with either of the two files."""

    @staticmethod
    def refusal(path: Path, which: int) -> str:
        said = refusal(path) if which == 0 else refusal(DATA / "site.pem", path)
        assert said.startswith(f"{path}: ")
        return said.removeprefix(f"{path}: ")

    def test_is_not_there(self, which, tmp_path):
        assert self.refusal(tmp_path / "none.pem", which) == "cannot be read: No such file or directory"

    def test_may_not_be_read(self, which, tmp_path):
        path = file(tmp_path, "x")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root may read everything")
        assert self.refusal(path, which) == "cannot be read: Permission denied"

    def test_is_a_link_to_itself(self, which, tmp_path):
        (tmp_path / "loop.pem").symlink_to("loop.pem")
        assert self.refusal(tmp_path / "loop.pem", which).startswith("cannot be read: ")

    def test_is_a_directory(self, which, tmp_path):
        assert self.refusal(tmp_path, which) == "is a directory; name a file in PEM form"

    def test_is_a_pipe(self, which, tmp_path):
        """It would be waited for, and can be read once only."""
        os.mkfifo(tmp_path / "pipe.pem")
        assert self.refusal(tmp_path / "pipe.pem", which) == "is no regular file; name a file in PEM form"

    def test_is_empty(self, which, tmp_path):
        assert self.refusal(file(tmp_path, ""), which) == "is empty"

    def test_is_huge(self, which, tmp_path):
        path = file(tmp_path, "")
        os.truncate(path, 10**9)
        assert self.refusal(path, which) == "is larger than 4194304 octets; name a file in PEM form"

    def test_is_some_text(self, which, tmp_path):
        wanted = ("certificate", "private key")[which]
        assert self.refusal(file(tmp_path, "hello\n"), which) == f"has no {wanted} in PEM form in it"

    @pytest.mark.parametrize("content", [der("site"), bytes(range(256))], ids=["DER", "garbage"])
    def test_is_binary(self, which, content, tmp_path):
        command = ("openssl x509 -inform der", "openssl pkey -inform der")[which]
        mend = f"convert it with `{command}`, or `openssl pkcs12` if it is a .pfx"
        assert self.refusal(file(tmp_path, content), which) == f"is binary and not in PEM form; {mend}"

    @pytest.mark.parametrize("kind", ["CERTIFICATE REQUEST", "PUBLIC KEY", "EC PARAMETERS"])
    def test_has_something_else(self, which, kind, tmp_path):
        path = file(tmp_path, f"-----BEGIN {kind}-----\nAAAA\n-----END {kind}-----\n")
        assert self.refusal(path, which).endswith(f"in PEM form in it, but {kind}; name the file that has one")


def test_certificate_and_key_the_wrong_way_round_are_refused():
    said = refusal(DATA / "ec.key", DATA / "site.pem")
    assert said == f"{DATA}/ec.key: has no certificate in PEM form in it, but PRIVATE KEY; name the file that has one"
    assert "has no private key" in refusal(DATA / "site.pem", DATA / "root.pem")


@pytest.mark.parametrize(
    ("damage", "which"),
    [
        (lambda text: text[:400], "the certificate"),
        (lambda text: text[:-400], "certificate 2 of 2"),
        (lambda text: text.replace("\nMII", "\nAAA", 1), "certificate 1 of 2"),
        (lambda text: text.replace("\nMII", "\nM*I", 1), "certificate 1 of 2"),
        (lambda text: text.replace("\n", "\n\n"), "certificate 1 of 2"),
        (lambda text: text + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "certificate 3 of 3"),
        (lambda text: text + "-----BEGIN CERTIFICATE-----\n", "certificate 3 of 3"),
        (lambda text: text.replace("-----END", "-----end", 1), "certificate 1 of 2"),
        (lambda text: text.replace("\n-----END", "A\n-----END", 1), "certificate 1 of 2"),
    ],
)
def test_a_damaged_certificate_is_refused(damage, which, tmp_path):
    cert = file(tmp_path, damage((DATA / "site.pem").read_text()))
    assert refusal(cert) == f"{cert}: {which} in it is damaged; copy the file again from where it was issued"


@pytest.mark.parametrize("body", ["AAAA\n", "", "!!!\n"])
def test_a_damaged_key_is_refused(body, tmp_path):
    begin, end = "-----BEGIN PRIVATE KEY-----\n", "-----END PRIVATE KEY-----\n"
    mend = "copy it again from where it was made"
    for key in (file(tmp_path, begin + body + end, "this.key"), file(tmp_path, begin + body, "cut.key")):
        said = refusal(DATA / "site.pem", key)
        assert said == f"{key}: the private key in it is damaged, or none that TLS has; {mend}"


def test_a_certificate_that_is_not_for_servers_is_refused():
    said = refusal(DATA / "client.pem")
    assert said.startswith(
        f"{DATA}/client.pem: is not fit for a server: unsuitable certificate purpose; have one issued"
    )


def test_a_key_that_is_too_short_is_refused():
    said = refusal(DATA / "weak.pem", DATA / "weak.key")
    assert said.startswith(f"{DATA}/weak.pem: is not fit for a server: ee key too small; have one issued")


def test_a_name_that_is_no_text_in_a_certificate_is_refused(tmp_path):
    cert = file(tmp_path, ssl.DER_cert_to_PEM_cert(der("mixed").replace(b"MIXED.Test", b"\xffIXED.Test")))
    assert refusal(cert).startswith(f"{cert}: is not fit for a server: ")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: f"subject=/CN=Größe\n{text}\nthe end",
        lambda text: text + (DATA / "ec.key").read_text(),
        lambda text: (DATA / "ec.key").read_text() + text,
        lambda text: text + (DATA / "root.pem").read_text() + (DATA / "self_signed.pem").read_text(),
    ],
    ids=["CRLF", "BOM", "comments", "key behind it", "key before it", "more certificates"],
)
def test_a_file_may_have_more_in_it(change, tmp_path):
    cert = file(tmp_path, change((DATA / "site.pem").read_text()))
    made = load(cert, cert if "PRIVATE KEY" in cert.read_text() else DATA / "ec.key")
    assert made.warnings == ()
    client = ssl.create_default_context(cafile=str(DATA / "root.pem"))
    assert Link(made.context, client, "site.test").shown == der("site")


def test_a_chain_without_the_issuer_is_warned_of(tmp_path):
    cert = file(tmp_path, blocks("site.pem")[0])
    issuer = "does not have the certificate of its issuer, Test Intermediate, after its own"
    [warning] = load(cert, DATA / "ec.key").warnings
    assert warning == f"{cert}: {issuer}, and clients that do not know that issuer refuse it; append it"


def test_an_issuer_that_the_system_trusts_need_not_be_in_the_chain(tmp_path, monkeypatch):
    """Such as that of an authority of one's own, which all clients have been given."""
    known = file(tmp_path, (DATA / "root.pem").read_text() + (DATA / "intermediate.pem").read_text(), "known.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(known))
    assert load(file(tmp_path, blocks("site.pem")[0]), DATA / "ec.key").warnings == ()


def test_a_certificate_with_its_name_in_the_subject_alone_is_warned_of():
    [warning] = certificates("nameless").warnings
    assert warning == f"{DATA}/nameless.pem: has no subjectAltName, and browsers refuse it; have one issued with it"


# The end of a certificate, and another in its place -----------------------------------------------------------------


def test_the_ends_are_told_the_soonest_first(tmp_path):
    late = file(tmp_path, (DATA / "local.pem").read_text(), "a.pem")
    tls = Tls((Certificate(str(late), str(DATA / "ec.key")), pair("future")))
    assert Certificates(tls, http=True, clock=lambda: 4.12e9).expires() == [
        (f"{DATA}/future.pem", ("future.test",), 4133980800.0),
        (str(late), ("localhost", "127.0.0.1", "0:0:0:0:0:0:0:1"), END),
    ]


def test_thirty_days_before_its_end_a_certificate_is_told_of():
    shown = certificates("site", "rsa")
    assert WARN_AHEAD == 30 * 24 * 3600
    assert shown.expiring(END - WARN_AHEAD - 1) == []
    assert shown.expiring(END - WARN_AHEAD) == shown.expires()
    assert shown.expiring(FAR) == shown.expires()
    assert shown.expiring(END - 61, within=60) == []


@pytest.fixture
def copies(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate and a key that a test may change."""
    return shutil.copy(DATA / "site.pem", tmp_path / "site.pem"), shutil.copy(DATA / "ec.key", tmp_path / "site.key")


def rewrite_with_the_old_times(path: Path) -> None:
    status = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("which", [0, 1], ids=["cert", "key"])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.replace(shutil.copy(path, f"{path}.next"), path),
        lambda path: path.write_text("else"),
        rewrite_with_the_old_times,
        os.unlink,
        lambda path: path.chmod(0o600 if path.stat().st_mode & 0o077 else 0o644),
    ],
    ids=["replaced", "rewritten", "rewritten with the old times", "removed", "mode"],
)
def test_a_file_that_is_changed_is_noticed(change, which, copies):
    made = load(*copies)
    assert not made.changed()
    change(copies[which])
    assert made.changed()


def test_a_link_that_is_switched_is_noticed(tmp_path):
    """As certbot and Kubernetes do, who do not write to a file in use; the latter switch a directory above it."""
    for number in (1, 2):
        (tmp_path / f"v{number}").mkdir()
        shutil.copy(DATA / "site.pem", tmp_path / f"v{number}")
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "site.pem").symlink_to("data/site.pem")
    made = load(tmp_path / "site.pem", DATA / "ec.key")
    assert not made.changed()
    (tmp_path / "next").symlink_to("v2")
    (tmp_path / "next").replace(tmp_path / "data")
    assert made.changed()
    assert not load(tmp_path / "site.pem", DATA / "ec.key").changed()


def test_a_change_while_the_files_are_read_is_noticed(copies):
    cert, key = copies
    made = load(cert, key, clock=lambda: os.utime(cert) or time.time())
    assert made.changed()


def test_files_that_are_refused_have_a_state_like_all_others(copies):
    cert, key = copies
    before = state([str(cert), str(key)])
    assert state([str(cert), str(key)]) == before
    key.unlink()
    assert state([str(cert), str(key)]) == (before[0], ())


def test_the_old_one_serves_on_when_the_new_one_is_refused(copies):
    cert, key = copies
    made = load(cert, key)
    cert.write_text("else")
    refusal(cert, key)
    assert Link(made.context, a_client()).shown == der("site")


# To backends ------------------------------------------------------------------------------------------------------


def to_backend(host: str, tls: BackendTls, shown: str = "local") -> Link:
    return Link(certificates(shown).context, backend_context(tls, http=True), server_name(tls, host))


def trusted(name: str = "root", **settings: Any) -> BackendTls:
    return BackendTls(ca=str(DATA / f"{name}.pem"), **settings)


@pytest.mark.parametrize(
    ("host", "tls", "shown"),
    [
        ("localhost", trusted(), "local"),
        ("localhost.", trusted(), "local"),
        ("127.0.0.1", trusted(), "local"),
        ("::1", trusted(), "local"),
        ("::1%lo", trusted(), "local"),
        ("a.wild.test", trusted(), "wildcard"),
        ("10.0.0.1", trusted(server_name="site.test"), "site"),
        ("10.0.0.1", trusted(server_name="127.0.0.1"), "local"),
        ("localhost", trusted("intermediate"), "local"),
        ("localhost", trusted("local"), "local"),
        ("self.test", trusted("self_signed"), "self_signed"),
        ("else.test", BackendTls(verify=False), "local"),
        ("10.0.0.1", BackendTls(verify=False), "self_signed"),
    ],
)
def test_a_backend_that_is_the_one_meant_is_accepted(host, tls, shown):
    link = to_backend(host, tls, shown)
    assert link.shown == der(shown)
    assert link.client.selected_alpn_protocol() == "http/1.1"


@pytest.mark.parametrize(
    ("host", "tls", "why"),
    [
        ("else.test", trusted(), "Hostname mismatch"),
        ("10.0.0.1", trusted(), "IP address mismatch"),
        ("::2", trusted(), "IP address mismatch"),
        ("localhost", trusted(server_name="else.test"), "Hostname mismatch"),
        ("localhost", trusted("self_signed"), "unable to get local issuer certificate"),
        ("localhost", BackendTls(), "unable to get local issuer certificate"),
    ],
)
def test_a_backend_that_is_not_the_one_meant_is_refused(host, tls, why):
    with pytest.raises(ssl.SSLCertVerificationError, match=why):
        to_backend(host, tls)


def test_the_authorities_of_the_system_are_trusted_when_none_are_named(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(DATA / "root.pem"))
    assert to_backend("localhost", BackendTls()).shown == der("local")


def test_a_backend_in_tcp_mode_is_offered_no_protocol():
    context = backend_context(BackendTls(verify=False), http=False)
    assert Link(certificates("local").context, context).server.selected_alpn_protocol() is None


def test_a_file_of_authorities_that_is_not_right_is_refused(tmp_path):
    for path, wrong in (
        (tmp_path / "none.pem", "cannot be read: No such file or directory"),
        (tmp_path, "is a directory; name a file in PEM form"),
        (DATA / "ec.key", "has no certificate in PEM form in it, but PRIVATE KEY; name the file that has one"),
        (file(tmp_path, der("root")), "is binary and not in PEM form; convert it with `openssl x509 -inform der`"),
    ):
        with pytest.raises(BadCertificate) as caught:
            backend_context(BackendTls(ca=str(path)), http=True)
        assert str(caught.value).startswith(f"{path}: {wrong}")
