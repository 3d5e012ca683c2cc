"""The TLS settings of a configuration as contexts of the ssl module, or one line that says what is not right with them.

What shapes this file:
- Nobody may be asked for a password: OpenSSL would do so on the terminal, and the balancer would wait there for ever.
- `load_cert_chain` takes both files at once, and of what is wrong tells hardly more than "PEM lib". So the files are
  read here first, and what OpenSSL refuses after that is the key's fault, or that of the pair.
- What a certificate says is not to be had from the ssl module but by way of a connection that verified it. So each has
  its first connection with a client of ours, in memory, which trusts that certificate itself and does not look at the
  clock. That client also finds what any other one would refuse.
- A context is not changed once it is in use. For other files there is another `Certificates`, and whoever has the old
  one keeps it when those are not right.
- Names are compared as RFC 9525 has it: without case, as A-labels, an asterisk for the whole of the first label only.
"""

from __future__ import annotations

import base64
import codecs
import os
import re
import ssl
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from balancer.config import BackendTls, Certificate, Tls

WARN_AHEAD = 30 * 86400.0
"""Seconds before its end from which on a certificate is to be warned of."""
LARGEST_FILE = 4 * 1024 * 1024  # octets; a system's bundle of authorities has a quarter of a million

# Forward secrecy and authenticated encryption only, keys and signatures of 112 bits of security or more. The suites of
# TLS 1.3 all are of this kind, and always there.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:@SECLEVEL=2"

_VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

# Of OpenSSL, and without a name in the ssl module:
_OP_PRIORITIZE_CHACHA = 0x200000  # our order, but for clients that want ChaCha20 first, as they have no AES in hardware
_V_FLAG_NO_CHECK_TIME = 0x200000

_MISMATCHES = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}
_ISSUE_ANOTHER = "have one issued for servers, with SHA-256 and a key of 2048 bits of RSA or on P-256"


class BadCertificate(ValueError):
    """A file that cannot be used; its text is one line: the file, what is wrong and how to mend it."""


class Expiry(NamedTuple):
    """When a certificate ends."""

    file: str
    names: tuple[str, ...]  # host names and IP addresses that it is for
    at: float  # seconds since the epoch


class Certificates:
    """What a listener shows its clients: a context for `Handshaker`, made of all certificates that are configured.

    The first certificate is for clients that name no host, or one that no certificate is for. When two have the same
    names, one with an RSA and one with an ECDSA key, a client is shown the one that it can verify. Otherwise the
    earlier wins. Thread-safe, as nothing changes after it is made.

    http: offer HTTP/1.1 by ALPN; else none, as what is in the connection is not known.
    clock: seconds since the epoch. Raises BadCertificate.
    """

    def __init__(self, tls: Tls, *, http: bool, clock: Callable[[], float] = time.time) -> None:
        self._files = [file for pair in tls.certificates for file in (pair.cert, pair.key)]
        self._state = state(self._files)  # before they are read: a change meanwhile is noticed later
        self._identities: list[_Identity] = []
        self._by_name: dict[str, ssl.SSLContext] = {}
        warnings: list[str] = []
        for pair in tls.certificates:
            identity = _identity(pair, http, clock())
            warnings += identity.warnings
            if not self._add(identity, pair):
                warnings.append(f"{pair.cert}: is never shown, as earlier ones have all of its names; remove it")
        self.warnings = tuple(warnings)  # lines for people about what works, but perhaps not for all clients
        self.context = self._identities[0].context
        # A connection keeps the versions, options and tickets of this context also when its name chooses another.
        self.context.minimum_version = _VERSIONS[tls.min_version]
        if len(self._identities) > 1:
            self.context.sni_callback = self._choose

    def expires(self) -> list[Expiry]:
        """The ends of all certificates, the soonest first."""
        found = (Expiry(identity.file, identity.names, identity.not_after) for identity in self._identities)
        return sorted(found, key=lambda expiry: expiry.at)

    def expiring(self, now: float, within: float = WARN_AHEAD) -> list[Expiry]:
        """Those that end within so many seconds, or have ended."""
        return [expiry for expiry in self.expires() if expiry.at - now <= within]

    def changed(self) -> bool:
        """Whether a file is another than it was, and it is worth to make another of these."""
        return state(self._files) != self._state

    def _add(self, identity: _Identity, pair: Certificate) -> bool:
        """Have it shown. Says whether it ever will be."""
        alike = [other for other in self._identities if set(other.names) == set(identity.names)]
        shown = not self._identities
        if alike and identity.key_kind not in {other.key_kind for other in alike}:
            _load_pair(alike[0].context, pair)
            shown = True
        for name in identity.names:
            shown |= self._by_name.setdefault(name, identity.context) is identity.context
        self._identities.append(identity)
        return shown

    def _choose(self, connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        """Answer the name that a client asked for (RFC 6066, section 3). Called within its handshake."""
        if name is None:
            return
        name = name.lower().removesuffix(".")  # RFC 6066 has no dot at the end, and some clients have
        context = self._by_name.get(name) or self._by_name.get("*." + name.partition(".")[2])
        if context:
            connection.context = context


class _Identity(NamedTuple):
    """A certificate with its key, and what it says."""

    file: str
    names: tuple[str, ...]
    not_after: float
    key_kind: str  # "RSA" or "ECDSA"
    context: ssl.SSLContext  # that shows it
    warnings: list[str]


def _identity(pair: Certificate, http: bool, now: float) -> _Identity:
    chain = _certificates(pair.cert)
    _check_key(pair.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | _OP_PRIORITIZE_CHACHA
    if http:
        context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, pair)
    shown, cipher = _look(context, pair.cert, chain[0])
    not_before, not_after = (float(ssl.cert_time_to_seconds(shown[key])) for key in ("notBefore", "notAfter"))
    if now > not_after:
        raise BadCertificate(f"{pair.cert}: expired on {_date(not_after)}; renew it")
    if now < not_before:
        mend = f"use another until then, or set this machine's clock, which says {_date(now)}"
        raise BadCertificate(f"{pair.cert}: is not valid before {_date(not_before)}; {mend}")
    warnings = []
    if "subjectAltName" not in shown:
        warnings.append(f"{pair.cert}: has no subjectAltName, and browsers refuse it; have one issued with it")
    if not _is_complete(shown, chain, context):
        issuer = _common_name(shown["issuer"])
        missing = f"does not have the certificate of its issuer, {issuer}, after its own"
        warnings.append(f"{pair.cert}: {missing}, and clients that do not know that issuer refuse it; append it")
    kind = "ECDSA" if "ECDSA" in cipher else "RSA"
    return _Identity(pair.cert, _names(shown), not_after, kind, context, warnings)


def backend_context(tls: BackendTls, *, http: bool) -> ssl.SSLContext:
    """For connections to backends; one serves all that have the same settings. `server_name` has what to ask for.

    To make it takes some 50 ms where the system's authorities are loaded. Raises BadCertificate for the `ca` file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.options |= ssl.OP_NO_RENEGOTIATION  # which a connection that two threads use could not go along with
    if http:
        context.set_alpn_protocols(["http/1.1"])
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif tls.ca:
        context.load_verify_locations(cadata=b"".join(_certificates(tls.ca)))
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # whatever is in the file is trusted, also when no root
    else:
        context.load_default_certs()
    return context


def server_name(tls: BackendTls, host: str) -> str:
    """The name or IP address that a backend's certificate must have: that of the settings, or else its host."""
    return (tls.server_name or host).removesuffix(".").partition("%")[0]


def state(files: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Something else whenever one of the files is another, also where the target of a link is; () for no file."""
    return tuple(map(_state, files))


def _state(file: str) -> tuple[int, ...]:
    try:
        status = os.stat(file)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# Files ------------------------------------------------------------------------------------------------------------

_LABEL = re.compile(r"^-----BEGIN ([A-Z0-9 ]+)-----", re.MULTILINE)
_LINE_END = r"[ \t]*\r?\n"
_CERTIFICATE = re.compile(  # as strict as OpenSSL, which does not say which of them it refused
    f"-----BEGIN CERTIFICATE-----{_LINE_END}((?:[A-Za-z0-9+/]+{_LINE_END})*[A-Za-z0-9+/]*={{0,2}}{_LINE_END})"
    "-----END CERTIFICATE-----"
)


def _text(file: str, conversion: str) -> str:
    """What is in a PEM file. `conversion` is the command that makes one of a DER file."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise BadCertificate(f"{file}: is {kind}; name a file in PEM form")
        with open(file, "rb") as opened:
            data = opened.read(LARGEST_FILE + 1)
    except OSError as error:
        raise BadCertificate(f"{file}: cannot be read: {error.strerror}") from None
    if not data:
        raise BadCertificate(f"{file}: is empty")
    if len(data) > LARGEST_FILE:
        raise BadCertificate(f"{file}: is larger than {LARGEST_FILE} octets; name a file in PEM form")
    text = data.removeprefix(codecs.BOM_UTF8).decode("latin-1")  # the comments may be in any encoding
    if not data.isascii() and not _labels(text):
        mend = f"convert it with `{conversion}`, or `openssl pkcs12` if it is a .pfx"
        raise BadCertificate(f"{file}: is binary and not in PEM form; {mend}")
    return text


def _labels(text: str) -> list[str]:
    """What is in a PEM file: `CERTIFICATE`, `EC PRIVATE KEY`."""
    return _LABEL.findall(text)


def _but(labels: Iterable[str]) -> str:
    kinds = " and ".join(dict.fromkeys(labels))
    return f", but {kinds}; name the file that has one" if kinds else ""


def _certificates(file: str) -> list[bytes]:
    """The certificates in a PEM file, each in DER form and well-formed; at least one."""
    text = _text(file, "openssl x509 -inform der")
    starts = [match.start() for match in _LABEL.finditer(text) if match[1] == "CERTIFICATE"]
    if not starts:
        raise BadCertificate(f"{file}: has no certificate in PEM form in it{_but(_labels(text))}")
    found = []
    for number, start in enumerate(starts, 1):
        try:
            match = _CERTIFICATE.match(text, start)
            data = base64.b64decode(match[1]) if match else b""
            # In DER form nothing can be encrypted, and so nobody be asked for a password.
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data)
        except (ssl.SSLError, ValueError):
            which = f"certificate {number} of {len(starts)} in it" if len(starts) > 1 else "the certificate in it"
            raise BadCertificate(f"{file}: {which} is damaged; copy the file again from where it was issued") from None
        found.append(data)
    return found


def _check_key(file: str) -> None:
    labels = _labels(_text(file, "openssl pkey -inform der"))
    if not any(label.endswith("PRIVATE KEY") for label in labels):
        raise BadCertificate(f"{file}: has no private key in PEM form in it{_but(labels)}")


def _load_pair(context: ssl.SSLContext, pair: Certificate) -> None:
    def refuse() -> NoReturn:
        plain = f"openssl pkey -in {os.path.basename(pair.key)} -out plain.key"
        raise BadCertificate(f"{pair.key}: is encrypted, and nobody is asked for its password; decrypt it: `{plain}`")

    try:
        context.load_cert_chain(pair.cert, pair.key, password=refuse)
    except ssl.SSLError as error:
        if error.reason in _MISMATCHES:
            mend = "name the key that it was issued for; the server's own certificate comes first in its file"
            raise BadCertificate(f"{pair.cert}: is not for the key in {pair.key}; {mend}") from None
        if error.reason:
            raise _unfit(pair.cert, error) from None
        mend = "copy it again from where it was made"
        raise BadCertificate(f"{pair.key}: the private key in it is damaged, or none that TLS has; {mend}") from None
    except OSError as error:
        raise BadCertificate(f"{pair.cert} or {pair.key}: cannot be read: {error.strerror}") from None


def _unfit(file: str, error: ssl.SSLError | UnicodeDecodeError) -> BadCertificate:
    reason = (getattr(error, "verify_message", error.reason) or str(error)).lower().replace("_", " ")
    return BadCertificate(f"{file}: is not fit for a server: {reason}; {_ISSUE_ANOTHER}")


# What is in a certificate -----------------------------------------------------------------------------------------


def _look(context: ssl.SSLContext, file: str, certificate: bytes) -> tuple[dict[str, Any], str]:
    """What a client sees that trusts this certificate, and the cipher of TLS 1.2, whose name has the key's kind."""
    client = _client(certificate)
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _V_FLAG_NO_CHECK_TIME
    client.set_ciphers("ALL:@SECLEVEL=0")
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        connection = _handshake(client, context)
        shown, cipher = connection.getpeercert(), connection.cipher()
    except (ssl.SSLError, UnicodeDecodeError) as error:  # the latter where a name in it is no text
        raise _unfit(file, error) from None
    assert shown
    assert cipher
    return shown, cipher[0]


def _client(*trusted: bytes) -> ssl.SSLContext:
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    if trusted:
        client.load_verify_locations(cadata=b"".join(trusted))
    return client


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> ssl.SSLObject:
    """The client's end of a connection, in memory. Raises ssl.SSLError."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)
    for _ in range(3):  # flights there and back, of which TLS has two
        for end in ends:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[0]


def _is_complete(shown: dict[str, Any], chain: list[bytes], context: ssl.SSLContext) -> bool:
    """Whether clients can be expected to find the way from this certificate to one that they trust."""
    issuer = shown["issuer"]
    authorities = _client(*chain[1:]).get_ca_certs()
    if issuer in (shown["subject"], *(authority["subject"] for authority in authorities)):
        return True
    client = _client()
    client.load_default_certs()
    try:
        _handshake(client, context)
    except ssl.SSLError:
        return False
    return True


def _names(shown: dict[str, Any]) -> tuple[str, ...]:
    """The host names and addresses that a certificate is for; that of its subject counts where there is no other."""
    names = [name.lower() for kind, name in shown.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    if "subjectAltName" not in shown:
        names = [name.lower() for name in [_common_name(shown["subject"])] if name]
    return tuple(dict.fromkeys(names))


def _common_name(distinguished: tuple[tuple[tuple[str, str], ...], ...]) -> str:
    """The most particular part of a distinguished name: its common name, or else what it has."""
    parts = {key: value for relative in distinguished for key, value in relative}
    return parts.get("commonName") or next(reversed(parts.values()), "")


def _date(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))
