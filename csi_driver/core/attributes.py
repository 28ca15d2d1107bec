"""Volume attributes: the table that declares them, and the :class:`CertificateSpec` that they describe.

To add an attribute, add a field and a row of the table here. If it reaches the CA, the field belongs to
:class:`IssuanceOptions`; add it to authority.proto and csi_driver/rpc/issuance_messages.py too.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from csi_driver.core.durations import format_duration, parse_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import URI, DNSName, EmailAddress, InvalidName, IPAddress, Names, parse_dns_label
from csi_driver.core.spec import (
    DEFAULT_ISSUER,
    MAX_FEDERATIONS,
    MAX_NAMES,
    MIN_DURATION,
    KeyType,
    Usage,
    parse_key_type,
    parse_usage,
)

_MAX_VALUE_LENGTH = 32 * 1024
_MAX_GROUP_ID = 2**31 - 1
_MAX_FAULTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuanceOptions:
    """The attributes that reach the CA, except the names and the key type, which are in the CSR."""

    duration: timedelta | None = None  # None: the authority's default
    usages: tuple[Usage, ...] = ()  # empty: all that the policy allows
    issuer: str = DEFAULT_ISSUER  # the issuer that signs, and whose roots the pod trusts
    federations: tuple[str, ...] = ()  # the names of additional root sets that the pod trusts


@dataclass(frozen=True, slots=True)
class CertificateSpec(IssuanceOptions):
    """The certificate that a pod requests for a volume; :func:`parse_attributes` guarantees valid values."""

    names: Names = Names()
    renew_before: timedelta | None = None
    """The time before the expiry when the certificate is renewed; None: a third of the lifetime."""
    key_type: KeyType = KeyType.EC_P256
    fs_group: int | None = None  # the group that can read the key; None: the pod's fsGroup


@dataclass(frozen=True, slots=True)
class Attribute:
    """A row of the table. Its texts, and those of docs/volume-attributes.md, are tested against each other."""

    name: str
    field: str  # the field of :class:`CertificateSpec`, or a field of :class:`Names`
    parse: Callable[[str], Any]  # parses the value or, if ``max_items`` is set, an item; raises ValueError
    example: str
    max_items: int = 0  # the largest number of items of a list, separated by commas; 0 for a single value
    items: str = "names"

    @property
    def reaches_ca(self) -> bool:
        """True if the node sends the attribute to the authority as an option of the request."""
        return self.field in {field.name for field in dataclasses.fields(IssuanceOptions)}


def parse_group_id(text: str) -> int:
    """Return a group ID from 0 to 2147483647; raises ValueError."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _MAX_GROUP_ID):
        raise ValueError(f"is not a group ID; use a whole number from 0 to {_MAX_GROUP_ID}")
    return int(text)


ATTRIBUTES = (
    Attribute("name", "dns", DNSName.parse, "shop.web.svc"),
    Attribute("dns-names", "dns", DNSName.parse, "shop.web.svc, *.example.com", MAX_NAMES),
    Attribute("uri-sans", "uris", URI.parse, "spiffe://cluster.local/app/shop", MAX_NAMES),
    Attribute("ip-sans", "ips", IPAddress.parse, "10.0.0.1, fd00::1", MAX_NAMES),
    Attribute("email-sans", "emails", EmailAddress.parse, "shop@example.com", MAX_NAMES),
    Attribute("duration", "duration", parse_duration, "1h30m"),
    Attribute("renew-before", "renew_before", parse_duration, "20m"),
    Attribute("key-type", "key_type", parse_key_type, "EC-P384"),
    Attribute("usages", "usages", parse_usage, "server", MAX_NAMES, "usages"),
    Attribute("issuer", "issuer", parse_dns_label, "internal"),
    Attribute("federations", "federations", parse_dns_label, "partner, legacy", MAX_FEDERATIONS, "root sets"),
    Attribute("fs-group", "fs_group", parse_group_id, "2000"),
)
"""All volume attributes, in the order of the documentation."""
_KNOWN = tuple(attribute.name for attribute in ATTRIBUTES)
_NAME_FIELDS = {field.name for field in dataclasses.fields(Names)}


def parse_attributes(attributes: Mapping[str, str]) -> CertificateSpec:
    """Parse ``csi.volumeAttributes`` of a volume.

    Raises:
        CertmountError: InvalidAttributes with all faults.
    """
    reader = _Reader(attributes)
    reader.check_unknown()
    values = {attribute: reader.read(attribute) for attribute in ATTRIBUTES}
    options: dict[str, Any] = {
        attribute.field: items if attribute.max_items else items[0]
        for attribute, items in values.items()
        if items and attribute.field not in _NAME_FIELDS
    }
    names = {attribute: items for attribute, items in values.items() if attribute.field in _NAME_FIELDS}
    reader.check_times(options.get("duration"), options.get("renew_before"))
    options["names"] = reader.join_names(names)
    options["usages"] = tuple(usage for usage in Usage if usage in options.get("usages", ()))
    reader.finish()
    return CertificateSpec(**options)


class _Reader:
    """Collects all faults of the attributes."""

    def __init__(self, attributes: Mapping[str, str]) -> None:
        self._attributes = attributes
        self._faults: list[Fault] = []

    def read(self, attribute: Attribute) -> tuple[Any, ...]:
        """Return the parsed items, each once, or the single value; empty if the attribute is missing or invalid."""
        text, name = self._attributes.get(attribute.name), attribute.name
        if text is None:
            return ()
        if not text.strip():
            self._fault(name, "is empty", "set a value or omit the attribute")
            return ()
        if len(text) > _MAX_VALUE_LENGTH:
            self._fault(name, f"is {len(text)} characters long", f"use at most {_MAX_VALUE_LENGTH}")
            return ()
        items = [item.strip(" ") for item in text.split(",")] if attribute.max_items else [text]
        if attribute.max_items and len(items) > attribute.max_items:
            self._fault(name, f"has {len(items)} {attribute.items}", f"use at most {attribute.max_items}")
            return ()
        parsed: dict[Any, None] = {}
        for item in items:
            try:
                parsed[attribute.parse(item)] = None
            except (InvalidName, ValueError) as problem:
                self._fault(name, f"{_quoted(item)} {problem}")
        return tuple(parsed)

    def join_names(self, values: Mapping[Attribute, tuple[Any, ...]]) -> Names:
        """Return all names in the order of the table."""
        fields: dict[str, tuple[Any, ...]] = {}
        for attribute, items in values.items():
            fields[attribute.field] = (*fields.get(attribute.field, ()), *items)
        names = Names.of(**fields)
        if len(names) > MAX_NAMES:
            longest = max(values, key=lambda attribute: len(values[attribute]))
            problem = f"the attributes contain {len(names)} names in total"
            self._fault(longest.name, problem, f"a certificate has at most {MAX_NAMES}")
        return names

    def check_unknown(self) -> None:
        for key in sorted(self._attributes.keys() - set(_KNOWN)):
            # Other drivers prefix their attributes with a domain. Compare without it.
            near = difflib.get_close_matches(key.rpartition("/")[2].lower(), _KNOWN, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "known attributes: " + ", ".join(_KNOWN)
            self._fault(_quoted(key)[1:-1], "is unknown", hint)

    def check_times(self, duration: timedelta | None, renew_before: timedelta | None) -> None:
        if duration is not None and duration < MIN_DURATION:
            self._fault("duration", f"is {format_duration(duration)}", f"use at least {format_duration(MIN_DURATION)}")
        if renew_before is not None and renew_before <= timedelta():
            self._fault("renew-before", "is zero", "set how long before its expiry to renew the certificate")
        if duration is not None and renew_before is not None and renew_before >= duration:
            before, lifetime = format_duration(renew_before), format_duration(duration)
            problem = f"{before} is not shorter than the certificate's lifetime of {lifetime}"
            self._fault("renew-before", problem, "omit it to renew after two thirds of the lifetime")

    def finish(self) -> None:
        """Raise CertmountError if there is a fault."""
        if self._faults:
            more = len(self._faults) - _MAX_FAULTS
            suffix = [f"and {more} more faults"] if more > 0 else []
            raise CertmountError(Reason.INVALID_ATTRIBUTES, *self._faults[:_MAX_FAULTS], *suffix)

    def _fault(self, name: str, problem: str, hint: str = "") -> None:
        self._faults.append(Fault(f"volumeAttributes.{name}", problem, hint))


def _quoted(text: str) -> str:
    """Return the user's text in quotes, with control characters escaped, and truncated if it is long."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
