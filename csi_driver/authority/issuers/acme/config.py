"""An ACME issuer as the issuers' file declares it. The libraries of ACME are not needed for that."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta

from csi_driver.authority.issuers.acme.settings import (
    DNS_PATIENCE,
    HTTP_PATIENCE,
    PRODUCTION,
    STAGING,
    AcmeSettings,
    Dns01,
    ExternalAccount,
    Http01,
    StorePlace,
)
from csi_driver.core.config.document_reader import DocumentReader, Path
from csi_driver.core.config.issuers import parse_file_name, parse_secret_name, parse_source
from csi_driver.core.durations import parse_duration
from csi_driver.core.names import EmailAddress
from csi_driver.core.spec import DEFAULT_ISSUER

_KEYS = (
    "account", "directory", "email", "terms_agreed", "eab", "dns01", "http01", "ca", "roots", "profile",
    "preferred_chain", "while_pending",
)  # fmt: skip
_MOST_SERVERS = 10
_DIRECTORY = re.compile(r"https://[A-Za-z0-9._:\[\]-]+(?:/[!-~]*)?", re.ASCII)
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?", re.ASCII)
_ZONE = re.compile(r"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*", re.ASCII)
_LINE = re.compile(r"(?=.*[!-~])[ -~]{1,200}", re.ASCII)
_WORD = re.compile(r"[!-~]{1,100}", re.ASCII)


def parse_acme(reader: DocumentReader, path: Path, value: object) -> AcmeSettings | None:
    """Reads what stands below ``acme``; see :data:`csi_driver.core.config.issuers.Parse`."""
    entry = _Entry(reader, path, value, _KEYS, required=("account",))
    if not entry.top:
        return None
    if entry.top.get("dns01") is None and entry.top.get("http01") is None:
        reader.fault(path, "has no way to prove names to the CA", "give dns01, http01 or both")
    if "roots" not in entry.top and entry.top.get("directory") != PRODUCTION:
        hint = "give {file: PATH} with the CA's root certificates; those of Let's Encrypt's production alone are known"
        reader.fault((*path, "roots"), "is missing", hint)
    dns01, http01, external = entry.below("dns01"), entry.below("http01"), entry.below("eab")
    return AcmeSettings(
        _account(entry.below("account")),
        email=entry.text("email", lambda text: EmailAddress.parse(text).text),
        directory=entry.text("directory", _matching(_DIRECTORY, f"is not an ACME directory, such as {STAGING}"))
        or STAGING,
        terms_agreed=entry.boolean("terms_agreed"),
        dns01=_dns01(dns01) if dns01 is not None else None,
        http01=_http01(http01) if http01 is not None else None,
        external_account=_external(external) if external is not None else None,
        ca_file=_file(entry.below("ca")),
        roots_file=_file(entry.below("roots")),
        profile=entry.text("profile", _matching(_WORD, "is not the name of a profile")),
        preferred_chain=entry.text("preferred_chain", _matching(_LINE, "is not the common name of a root")),
        while_pending=entry.text("while_pending", _internal),
    )


class _Entry:
    """A mapping of the file; what is empty in it has been noted."""

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
        self.top = reader.mapping(path, value, allowed=allowed, required=required)
        for word in allowed:
            if word in self.top and self.top[word] is None and word not in required:
                reader.fault((*path, word), "is empty", "leave it away, or say what it is")

    def below(self, word: str) -> tuple[DocumentReader, Path, object] | None:
        """What stands there, for another reader; None where nothing does."""
        value = self.top.get(word)
        return None if value is None else (self.reader, (*self.path, word), value)

    def text(self, word: str, parse: Callable[[str], str]) -> str | None:
        return self.reader.text((*self.path, word), self.top.get(word), parse)

    def boolean(self, word: str) -> bool:
        value = self.top.get(word)
        if value is not None and not isinstance(value, bool):
            self.reader.fault((*self.path, word), "is not true or false")
        return value is True

    def duration(self, word: str, default: timedelta) -> timedelta:
        return self.reader.text((*self.path, word), self.top.get(word), parse_duration) or default

    def addresses(self, word: str) -> tuple[str, ...]:
        value, path = self.top.get(word), (*self.path, word)
        if value == []:
            self.reader.fault(path, "is empty", "leave it away, or say what it is")
        return self.reader.each(path, value, self._address, _MOST_SERVERS)

    def _address(self, path: Path, value: object) -> str | None:
        if value is None:
            self.reader.fault(path, "is empty")
        return self.reader.text(path, value, _address)


_Below = tuple[DocumentReader, Path, object]


def _account(below: _Below | None) -> StorePlace:
    if below is None:  # noted as missing
        return StorePlace()
    entry = _Entry(*below, ("secret", "folder"))
    if ("secret" in entry.top) == ("folder" in entry.top):
        hint = "write {secret: NAMESPACE/NAME}, or {folder: PATH} for an authority of one replica"
        entry.reader.fault(entry.path, "says not where account and orders are kept", hint)
    secret = entry.reader.text((*entry.path, "secret"), entry.top.get("secret"), parse_secret_name)
    folder = entry.text("folder", parse_file_name)
    return StorePlace(*(secret or ("", "")), folder=folder or "")


def _dns01(below: _Below) -> Dns01:
    keys = ("server", "tsig", "zone", "resolvers", "nameservers", "patience")
    entry = _Entry(*below, keys, required=("server",))
    return Dns01(
        entry.text("server", _address) or "",
        parse_source(entry.reader, (*entry.path, "tsig"), entry.top.get("tsig")),
        entry.text("zone", _matching(_ZONE, "is not the name of a zone, such as acme.example.com")),
        entry.addresses("resolvers"),
        entry.addresses("nameservers"),
        entry.duration("patience", DNS_PATIENCE),
    )


def _http01(below: _Below) -> Http01:
    entry = _Entry(*below, ("self_test", "ingress_class", "patience"))
    return Http01(
        entry.text("self_test", _address),
        entry.text("ingress_class", _matching(_WORD, "is not the name of an IngressClass")),
        entry.duration("patience", HTTP_PATIENCE),
    )


def _external(below: _Below) -> ExternalAccount | None:
    entry = _Entry(*below, ("key_id", "key"), required=("key_id", "key"))
    key_id = entry.text("key_id", _matching(_WORD, "is not a key id"))
    key = parse_source(entry.reader, (*entry.path, "key"), entry.top.get("key"))
    return ExternalAccount(key_id, key) if key_id is not None and key is not None else None


def _file(below: _Below | None) -> str | None:
    if below is None:
        return None
    return _Entry(*below, ("file",), required=("file",)).text("file", parse_file_name)


def _address(text: str) -> str:
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match["port"] or "53") < 65536:
        raise ValueError("is not ADDRESS or ADDRESS:PORT, an IPv6 address in brackets")
    return text


def _internal(text: str) -> str:
    if text != DEFAULT_ISSUER:
        raise ValueError(f"is not {DEFAULT_ISSUER}, the only issuer that answers at once")
    return text


def _matching(pattern: re.Pattern[str], problem: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(problem)
        return text

    return parse
