"""The volume attributes a pod writes, read once: a :class:`CertificateSpec`, or one error that lists every fault."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

from csi_driver.core.durations import format_duration, parse_duration
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import URI, DNSName, EmailAddress, InvalidName, IPAddress, Names, parse_dns_label
from csi_driver.core.spec import (
    DEFAULT_ISSUER,
    MAX_FEDERATIONS,
    MAX_NAMES,
    MIN_DURATION,
    CertificateSpec,
    KeyType,
    Usage,
    parse_key_type,
    parse_usage,
)

KNOWN = (
    "name",
    "dns-names",
    "uri-sans",
    "ip-sans",
    "email-sans",
    "duration",
    "renew-before",
    "key-type",
    "usages",
    "issuer",
    "federations",
    "fs-group",
)
_MAX_VALUE_LENGTH = 32 * 1024
_MAX_GROUP_ID = 2**31 - 1
_MAX_FAULTS = 20
_T = TypeVar("_T")


def parse_attributes(attributes: Mapping[str, str]) -> CertificateSpec:
    """Reads ``csi.volumeAttributes`` of a pod's volume.

    Raises:
        CertmountError: InvalidAttributes, with one fault for everything that is wrong.
    """
    reader = _Reader(attributes)
    reader.check_unknown()
    name = reader.read("name", DNSName.parse)
    dns = reader.read_list("dns-names", DNSName.parse)
    uris = reader.read_list("uri-sans", URI.parse)
    ips = reader.read_list("ip-sans", IPAddress.parse)
    emails = reader.read_list("email-sans", EmailAddress.parse)
    duration = reader.read("duration", parse_duration)
    renew_before = reader.read("renew-before", parse_duration)
    key_type = reader.read("key-type", parse_key_type)
    usages = reader.read_list("usages", parse_usage)
    issuer = reader.read("issuer", parse_dns_label)
    federations = reader.read_list("federations", parse_dns_label, MAX_FEDERATIONS, "sets of roots")
    fs_group = reader.read("fs-group", parse_group_id)
    reader.check_times(duration, renew_before)
    names = Names.of((name, *dns) if name else dns, uris, ips, emails)
    if len(names) > MAX_NAMES:
        lists = {"dns-names": dns, "uri-sans": uris, "ip-sans": ips, "email-sans": emails}
        longest = max(lists, key=lambda key: len(lists[key]))
        reader.fault(longest, f"{len(names)} names asked for in all", f"a certificate has at most {MAX_NAMES}")
    reader.finish()
    return CertificateSpec(
        names=names,
        duration=duration,
        renew_before=renew_before,
        key_type=key_type or KeyType.EC_P256,
        usages=tuple(usage for usage in Usage if usage in usages),
        issuer=issuer or DEFAULT_ISSUER,
        federations=tuple(dict.fromkeys(federations)),
        fs_group=fs_group,
    )


def parse_group_id(text: str) -> int:
    """Takes a numeric group id of 0 to 2147483647, or raises ValueError."""
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _MAX_GROUP_ID):
        raise ValueError(f"is not a group id; write a whole number from 0 to {_MAX_GROUP_ID}")
    return int(text)


class _Reader:
    """Collects faults while the attributes are read, so that the user hears of all of them at once."""

    def __init__(self, attributes: Mapping[str, str]) -> None:
        self._attributes = attributes
        self._faults: list[Fault] = []

    def fault(self, key: str, problem: str, hint: str = "") -> None:
        self._faults.append(Fault(f"volumeAttributes.{key}", problem, hint))

    def read(self, key: str, parse: Callable[[str], _T]) -> _T | None:
        text = self._text(key)
        return None if text is None else self._parsed(key, text, parse)

    def read_list(
        self, key: str, parse: Callable[[str], _T], most: int = MAX_NAMES, what: str = "names"
    ) -> tuple[_T, ...]:
        text = self._text(key)
        if text is None:
            return ()
        items = [item.strip(" ") for item in text.split(",")]
        if len(items) > most:
            self.fault(key, f"{len(items)} {what}", f"at most {most}")
            return ()
        parsed = [self._parsed(key, item, parse) for item in items]
        return tuple(item for item in parsed if item is not None)

    def _text(self, key: str) -> str | None:
        text = self._attributes.get(key)
        if text is None:
            return None
        if not text.strip():
            self.fault(key, "is empty", "give it a value or leave it away")
            return None
        if len(text) > _MAX_VALUE_LENGTH:
            self.fault(key, f"is {len(text)} characters long", f"at most {_MAX_VALUE_LENGTH} are read")
            return None
        return text

    def _parsed(self, key: str, text: str, parse: Callable[[str], _T]) -> _T | None:
        try:
            return parse(text)
        except (InvalidName, ValueError) as problem:
            self.fault(key, f"{_shown(text)} {problem}")
            return None

    def check_unknown(self) -> None:
        for key in sorted(self._attributes.keys() - set(KNOWN)):
            # Other drivers prefix theirs with a domain; a prefix must not hide the slip.
            near = difflib.get_close_matches(key.rpartition("/")[2].lower(), KNOWN, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(KNOWN)
            self._faults.append(Fault(f"volumeAttributes.{_shown(key)[1:-1]}", "is not known", hint))

    def check_times(self, duration: timedelta | None, renew_before: timedelta | None) -> None:
        if duration is not None and duration < MIN_DURATION:
            self.fault("duration", f"is {format_duration(duration)}", f"the least is {format_duration(MIN_DURATION)}")
        if renew_before is not None and renew_before <= timedelta():
            self.fault("renew-before", "is zero", "write how long before its end the certificate is to be renewed")
        if duration is not None and renew_before is not None and renew_before >= duration:
            self.fault(
                "renew-before",
                f"{format_duration(renew_before)} is not shorter than the certificate's life of {format_duration(duration)}",
                "leave it away to renew at two thirds of the life",
            )

    def finish(self) -> None:
        if self._faults:
            more = len(self._faults) - _MAX_FAULTS
            shown: list[Fault | str] = list(self._faults[:_MAX_FAULTS])
            raise CertmountError(Reason.INVALID_ATTRIBUTES, *shown, *([f"and {more} more faults"] if more > 0 else []))


def _shown(text: str) -> str:
    """The text as the user wrote it, control characters made visible, cut where it is long."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
