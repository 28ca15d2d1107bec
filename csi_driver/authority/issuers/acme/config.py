"""The configuration of an ACME issuer in the issuers file. Parsing it does not need the ACME libraries."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.config.issuers import CredentialSource, parse_file_name, parse_secret_name, parse_source
from csi_driver.core.durations import parse_duration
from csi_driver.core.names import EmailAddress
from csi_driver.core.spec import DEFAULT_ISSUER

STAGING = "https://acme-staging-v02.api.letsencrypt.org/directory"
"""Let's Encrypt's test environment: untrusted certificates and high rate limits."""
PRODUCTION = "https://acme-v02.api.letsencrypt.org/directory"
"""Let's Encrypt, the only CA whose roots need no configuration."""
DNS_PATIENCE = timedelta(minutes=2)
HTTP_PATIENCE = timedelta(minutes=1)
_KEYS = (
    "account", "directory", "email", "terms_agreed", "eab", "dns01", "http01", "ca", "roots", "profile",
    "preferred_chain", "while_pending",
)  # fmt: skip
_MAX_SERVERS = 10
_DIRECTORY = re.compile(r"https://[A-Za-z0-9._:\[\]-]+(?:/[!-~]*)?", re.ASCII)
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?", re.ASCII)
_ZONE = re.compile(r"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*", re.ASCII)
_LINE = re.compile(r"(?=.*[!-~])[ -~]{1,200}", re.ASCII)
_WORD = re.compile(r"[!-~]{1,100}", re.ASCII)


@dataclass(frozen=True, slots=True)
class AccountStorage:
    """Where the account and the orders are stored: in a Secret that all replicas share, or in a directory of one replica."""

    namespace: str = ""
    name: str = ""
    folder: str = ""
    """Empty if it is a Secret."""


@dataclass(frozen=True, slots=True)
class ExternalAccount:
    """An existing account at the CA to which the ACME account is bound (RFC 8555 section 7.3.4)."""

    key_id: str
    key: CredentialSource
    """The MAC key in base64url, as CAs provide it."""


@dataclass(frozen=True, slots=True)
class Dns01:
    """How to solve DNS-01 challenges (RFC 8555 section 8.4) with DNS UPDATE (RFC 2136)."""

    server: str
    """The server that accepts updates, ``ADDRESS`` or ``ADDRESS:PORT``: the primary of the zone."""
    key: CredentialSource | None = None
    """The TSIG key in the format of :class:`.credentials.TsigKey`. None if the server authorizes by address, which is unsafe."""
    zone: str | None = None
    """The zone for the records; None to ask ``server`` for the zone of each name."""
    resolvers: tuple[str, ...] = ()
    """Resolvers for CNAMEs and server addresses, for split horizons; empty for those of the system."""
    nameservers: tuple[str, ...] = ()
    """The servers that must serve a record before the CA validates it; empty for those in the zone's NS records."""
    patience: timedelta = DNS_PATIENCE
    """How long these servers may take. With NOTIFY (RFC 1996) secondaries take seconds, otherwise up to their refresh interval."""


@dataclass(frozen=True, slots=True)
class Http01:
    """How to solve HTTP-01 challenges (RFC 8555 section 8.3). The authority responds; a route must lead the CA to it."""

    self_test: str | None = None
    """``ADDRESS:PORT`` to which the self-test connects; None for port 80 of the name.

    Set it in clusters that can't reach their own load balancer from inside.
    """
    ingress_class: str | None = None
    """The class of the Ingress to create for each challenge; None if a route exists."""
    patience: timedelta = HTTP_PATIENCE
    """How long a route may take to work: load balancers and ingress controllers need time for a new route."""


@dataclass(frozen=True, slots=True)
class AcmeConfiguration:
    """One account at one CA, and how to solve challenges."""

    account: AccountStorage
    email: str | None = None
    """The contact address. Each address has an account of its own."""
    directory: str = STAGING
    terms_agreed: bool = False
    """True if the administrator agrees to the CA's terms of service."""
    dns01: Dns01 | None = None
    """Has precedence over http01, because it also supports wildcards."""
    http01: Http01 | None = None
    external_account: ExternalAccount | None = None
    ca_file: str | None = None
    """PEM of the roots of the directory's own TLS certificate; None for public CAs."""
    roots_file: str | None = None
    """PEM of the roots that pods trust, and at which every chain must end. None is possible for :data:`PRODUCTION` only."""
    profile: str | None = None
    """A certificate profile of the CA; None for the CA's default."""
    preferred_chain: str | None = None
    """Common name of the root of the preferred chain, if the CA offers several."""
    while_pending: str | None = None
    """The issuer of interim certificates; None if pods wait for the CA."""


def parse_acme(reader: DocumentReader, path: Path, value: object) -> AcmeConfiguration | None:
    """Parse the value of ``acme``; see :data:`csi_driver.core.config.issuers.Parse`."""
    entry = _Section(reader, path, value, _KEYS, required=("account",))
    if not entry.values:
        return None
    if entry.values.get("dns01") is None and entry.values.get("http01") is None:
        reader.fault(path, "has no challenge solver", "set dns01, http01 or both")
    if "roots" not in entry.values and entry.values.get("directory") != PRODUCTION:
        hint = (
            "set {file: PATH} with the CA's root certificates; only Let's Encrypt's production environment needs none"
        )
        reader.fault((*path, "roots"), "is missing", hint)
    dns01, http01, external = entry.nested("dns01"), entry.nested("http01"), entry.nested("eab")
    return AcmeConfiguration(
        _parse_account(entry.nested("account")),
        email=entry.text("email", lambda text: EmailAddress.parse(text).text),
        directory=entry.text("directory", _matching(_DIRECTORY, f"is not an ACME directory, such as {STAGING}"))
        or STAGING,
        terms_agreed=entry.boolean("terms_agreed"),
        dns01=_parse_dns01(dns01) if dns01 is not None else None,
        http01=_parse_http01(http01) if http01 is not None else None,
        external_account=_parse_external_account(external) if external is not None else None,
        ca_file=_parse_file(entry.nested("ca")),
        roots_file=_parse_file(entry.nested("roots")),
        profile=entry.text("profile", _matching(_WORD, "is not the name of a profile")),
        preferred_chain=entry.text("preferred_chain", _matching(_LINE, "is not the common name of a root")),
        while_pending=entry.text("while_pending", _parse_while_pending),
    )


class _Section:
    """A mapping in the file; reports empty values."""

    def __init__(
        self,
        reader: DocumentReader,
        path: Path,
        value: object,
        allowed: tuple[str, ...],
        required: tuple[str, ...] = (),
    ) -> None:
        self.reader = reader
        self.path = path
        self.values = reader.mapping(path, value, allowed=allowed, required=required)
        for key in allowed:
            if key in self.values and self.values[key] is None and key not in required:
                reader.fault((*path, key), "is empty", "set a value or omit it")

    def nested(self, key: str) -> _Nested | None:
        """Return the arguments of another section for the value, or None if there is none."""
        value = self.values.get(key)
        return None if value is None else (self.reader, (*self.path, key), value)

    def text(self, key: str, parse: Callable[[str], str]) -> str | None:
        return self.reader.text((*self.path, key), self.values.get(key), parse)

    def boolean(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.reader.fault((*self.path, key), "is not true or false")
        return value is True

    def duration(self, key: str, default: timedelta) -> timedelta:
        return self.reader.text((*self.path, key), self.values.get(key), parse_duration) or default

    def addresses(self, key: str) -> tuple[str, ...]:
        value, path = self.values.get(key), (*self.path, key)
        if value == []:
            self.reader.fault(path, "is empty", "set a value or omit it")
        return self.reader.each(path, value, self._address, _MAX_SERVERS)

    def _address(self, path: Path, value: object) -> str | None:
        if value is None:
            self.reader.fault(path, "is empty")
        return self.reader.text(path, value, _parse_address)


_Nested = tuple[DocumentReader, Path, object]


def _parse_account(nested: _Nested | None) -> AccountStorage:
    if nested is None:  # already reported as missing
        return AccountStorage()
    section = _Section(*nested, ("secret", "folder"))
    if ("secret" in section.values) == ("folder" in section.values):
        hint = "set {secret: NAMESPACE/NAME}, or {folder: PATH} for an authority with one replica"
        section.reader.fault(section.path, "does not set where the account and the orders are stored", hint)
    secret = section.reader.text((*section.path, "secret"), section.values.get("secret"), parse_secret_name)
    return AccountStorage(*(secret or ("", "")), folder=section.text("folder", parse_file_name) or "")


def _parse_dns01(nested: _Nested) -> Dns01:
    keys = ("server", "tsig", "zone", "resolvers", "nameservers", "patience")
    section = _Section(*nested, keys, required=("server",))
    return Dns01(
        section.text("server", _parse_address) or "",
        parse_source(section.reader, (*section.path, "tsig"), section.values.get("tsig")),
        section.text("zone", _matching(_ZONE, "is not the name of a zone, such as acme.example.com")),
        section.addresses("resolvers"),
        section.addresses("nameservers"),
        section.duration("patience", DNS_PATIENCE),
    )


def _parse_http01(nested: _Nested) -> Http01:
    section = _Section(*nested, ("self_test", "ingress_class", "patience"))
    return Http01(
        section.text("self_test", _parse_address),
        section.text("ingress_class", _matching(_WORD, "is not the name of an IngressClass")),
        section.duration("patience", HTTP_PATIENCE),
    )


def _parse_external_account(nested: _Nested) -> ExternalAccount | None:
    section = _Section(*nested, ("key_id", "key"), required=("key_id", "key"))
    key_id = section.text("key_id", _matching(_WORD, "is not a key id"))
    key = parse_source(section.reader, (*section.path, "key"), section.values.get("key"))
    return ExternalAccount(key_id, key) if key_id is not None and key is not None else None


def _parse_file(nested: _Nested | None) -> str | None:
    return None if nested is None else _Section(*nested, ("file",), required=("file",)).text("file", parse_file_name)


def _parse_address(text: str) -> str:
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match["port"] or "53") < 65536:
        raise ValueError("is not ADDRESS or ADDRESS:PORT; write IPv6 addresses in brackets")
    return text


def _parse_while_pending(text: str) -> str:
    if text != DEFAULT_ISSUER:
        raise ValueError(f"is not {DEFAULT_ISSUER}, the only issuer that signs immediately")
    return text


def _matching(pattern: re.Pattern[str], problem: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(problem)
        return text

    return parse
