"""Volume attributes: the table that declares them, and the :class:`CertificateSpec` that they describe.

To add an attribute, add a field and a row of the table here. If it reaches the CA, the field belongs to
:class:`IssuanceOptions`; add it to authority.proto and csi_driver/rpc/issuance_messages.py too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from csi_driver.core.attribute_hints import hint_for
from csi_driver.core.cert_manager import Translation, translate
from csi_driver.core.durations import Percentage, format_duration, parse_duration, parse_duration_or_percentage
from csi_driver.core.errors import CertmountError, Fault, Reason, first_faults
from csi_driver.core.formats.file_format import FileOptions, KeyEncoding, PKCS12Encryption
from csi_driver.core.formats.layout import FileLayout, layout_of, parse_file_name, parse_preset
from csi_driver.core.formats.pem import ROOTS
from csi_driver.core.formats.pkcs12 import KEY_STORE, PASSWORD, TRUST_STORE
from csi_driver.core.formats.registry import DEFAULT_PRESET, FORMATS
from csi_driver.core.names import (
    URI,
    DNSName,
    EmailAddress,
    InvalidName,
    IPAddress,
    Names,
    internationalized_problem,
    parse_dns_label,
)
from csi_driver.core.reload import Reload, parse_reload
from csi_driver.core.spec import (
    DEFAULT_ISSUER,
    DEFAULT_KEY_TYPE,
    MAX_FEDERATIONS,
    MAX_NAMES,
    MAX_NAMES_BYTES,
    MIN_DURATION,
    KeyType,
    Usage,
    parse_key_type,
    parse_usage,
)
from csi_driver.core.subject import COMMON_NAME, Subject
from csi_driver.core.texts import quoted
from csi_driver.core.variables import substitute

_MAX_VALUE_LENGTH = 32 * 1024
_MAX_ID = 2**31 - 1
_KEY_MODES = ("0400", "0440", "0600", "0640")
_OPEN_MODE = re.compile("0?[0-7][0-7][1-7]")
KEY_TYPE = "key-type"
ROOT_ONLY = "root-only"
_KEY_ENCODING = "key-encoding"
_ENCODED_TYPES = {KeyEncoding.PKCS8: "", KeyEncoding.PKCS1: "RSA", KeyEncoding.SEC1: "EC"}
"""What the names of the key types start with that an encoding can represent."""
_MAX_FAULTS = 20
_MAX_HINTS = 8  # for unknown attributes: each comparison with the known ones takes 0.1 ms
_LAYOUT = "layout"


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuanceOptions:
    """The attributes that reach the CA, except the names and the key type, which are in the CSR."""

    duration: timedelta | None = None  # None: the authority's default
    usages: tuple[Usage, ...] = ()  # empty: all that the policy allows
    issuer: str = DEFAULT_ISSUER  # the issuer that signs, and whose roots the pod trusts
    federations: tuple[str, ...] = ()  # the names of additional root sets that the pod trusts
    spiffe: bool = True  # the certificate contains the pod's SPIFFE ID, and so no other URI
    subject: Subject = Subject()  # empty: the authority chooses, usually the first DNS name as common name


@dataclass(frozen=True, slots=True)
class CertificateSpec(IssuanceOptions):
    """The certificate that a pod requests for a volume; :func:`parse_attributes` guarantees valid values."""

    names: Names = Names()
    renew_before: timedelta | Percentage | None = None
    """The time before the expiry when the certificate is renewed; None: a third of the lifetime."""
    key_type: KeyType = DEFAULT_KEY_TYPE
    reuse_key: bool = False  # renewals keep the key
    layout: FileLayout = field(default_factory=FileLayout)
    root_only: bool = False  # the volume contains only roots; the driver requests no certificate
    reload: Reload | None = None  # the processes to signal after the files were replaced
    uid: int | None = None  # the user that owns the private files; None: root
    fs_group: int | None = None  # the group that can read the private files; None: the pod's fsGroup
    key_mode: int | None = None  # the mode of the private files; None: see FileAccess


@dataclass(frozen=True, slots=True)
class Attribute:
    """A row of the table. Its texts, and those of docs/volume-attributes.md, are tested against each other."""

    name: str
    field: str  # the field of :class:`CertificateSpec`, or a field of :class:`Names`, or "layout" for all attributes of files
    parse: Callable[[str], Any]  # parses the value or, if ``max_items`` is set, an item; raises ValueError
    example: str
    max_items: int = 0  # the largest number of items of a list, separated by commas; 0 for a single value
    items: str = "names"
    variables: bool = False  # the value can contain variables, see :mod:`csi_driver.core.variables`


def parse_group_id(text: str) -> int:
    """Return a group ID from 0 to 2147483647; raises ValueError."""
    return _parse_id(text, "a group ID")


def parse_user_id(text: str) -> int:
    """Return a user ID from 0 to 2147483647; raises ValueError."""
    return _parse_id(text, "a user ID")


def _parse_id(text: str, kind: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _MAX_ID):
        raise ValueError(f"is not {kind}; use a whole number from 0 to {_MAX_ID}")
    return int(text)


def parse_key_mode(text: str) -> int:
    """Return the mode of a file that only its owner or its group can read; raises ValueError."""
    if text not in _KEY_MODES:
        problem = "gives other users access to the key" if _OPEN_MODE.fullmatch(text) else "is not a mode for a key"
        raise ValueError(f"{problem}; use 0400, 0440, 0600 or 0640")
    return int(text, 8)


def parse_boolean(text: str) -> bool:
    """Return the value of ``true`` or ``false``; raises ValueError."""
    if text not in ("true", "false"):
        raise ValueError('is not "true" or "false"')
    return text == "true"


def parse_key_encoding(text: str) -> KeyEncoding:
    """Return the encoding of private keys; raises ValueError."""
    if text not in [encoding.value for encoding in KeyEncoding]:
        raise ValueError("is not an encoding of keys; use pkcs8, pkcs1 for RSA keys, or sec1 for EC keys")
    return KeyEncoding(text)


def parse_pkcs12_encryption(text: str) -> PKCS12Encryption:
    """Return the encryption of key stores and trust stores; raises ValueError."""
    if text not in [encryption.value for encryption in PKCS12Encryption]:
        raise ValueError("is not an encryption; use modern or legacy")
    return PKCS12Encryption(text)


ATTRIBUTES = (
    Attribute("name", "dns", DNSName.parse, "shop.web.svc", variables=True),
    Attribute("dns-names", "dns", DNSName.parse, "shop.web.svc, *.example.com", MAX_NAMES, variables=True),
    Attribute("uri-sans", "uris", URI.parse, "https://example.com/shop", MAX_NAMES, variables=True),
    Attribute("ip-sans", "ips", IPAddress.parse, "10.0.0.1, fd00::1", MAX_NAMES, variables=True),
    Attribute("email-sans", "emails", EmailAddress.parse, "shop@example.com", MAX_NAMES, variables=True),
    Attribute("common-name", "subject", Subject.of_common_name, "shop", variables=True),
    Attribute("subject", "subject", Subject.parse, "O=Example,OU=Shop", variables=True),
    Attribute("duration", "duration", parse_duration, "1h30m"),
    Attribute("renew-before", "renew_before", parse_duration_or_percentage, "20m"),
    Attribute(KEY_TYPE, "key_type", parse_key_type, "EC-P384"),
    Attribute("reuse-key", "reuse_key", parse_boolean, "true"),
    Attribute("usages", "usages", parse_usage, "server", MAX_NAMES, "usages"),
    Attribute("issuer", "issuer", parse_dns_label, "internal"),
    Attribute("federations", "federations", parse_dns_label, "partner, legacy", MAX_FEDERATIONS, "root sets"),
    Attribute("spiffe", "spiffe", parse_boolean, "false"),
    Attribute(ROOT_ONLY, "root_only", parse_boolean, "true"),
    Attribute("files", _LAYOUT, parse_preset, "kubernetes"),
    *(Attribute(file_format.attribute, _LAYOUT, parse_file_name, file_format.example) for file_format in FORMATS),
    Attribute(_KEY_ENCODING, _LAYOUT, parse_key_encoding, "pkcs8"),
    Attribute("pkcs12-encryption", _LAYOUT, parse_pkcs12_encryption, "legacy"),
    Attribute("reload", "reload", parse_reload, "signal=HUP,process=nginx"),
    Attribute("uid", "uid", parse_user_id, "999"),
    Attribute("gid", "fs_group", parse_group_id, "999"),
    Attribute("fs-group", "fs_group", parse_group_id, "2000"),
    Attribute("key-mode", "key_mode", parse_key_mode, "0600"),
)
"""All volume attributes, in the order of the documentation."""
_FOR_PASSWORDS = frozenset(("uid", "gid", "fs-group", "key-mode"))
_FOR_ROOTS = _FOR_PASSWORDS | {ROOT_ONLY, "issuer", "federations", "files", "pkcs12-encryption", "reload"}
_FOR_ROOTS |= {file_format.attribute for file_format in FORMATS if not file_format.certificate}
"""What a volume with only roots can set; the owner and the mode of private files only if it has a store with a password."""
_KNOWN = tuple(attribute.name for attribute in ATTRIBUTES)
_NO_VALUES: Mapping[str, str] = MappingProxyType({})
_NAME_FIELDS = {field.name for field in dataclasses.fields(Names)}


def parse_attributes(attributes: Mapping[str, str], variables: Mapping[str, str] = _NO_VALUES) -> CertificateSpec:
    """Parse ``csi.volumeAttributes`` of a volume. ``variables`` contains the values of :data:`VARIABLES` for its pod.

    Attributes of cert-manager's csi-driver are translated first; errors name them as the user wrote them.

    Raises:
        CertmountError: InvalidAttributes with all faults.
    """
    reader = _Reader(translate(attributes), variables)
    reader.check_unknown()
    values = {attribute: reader.read(attribute) for attribute in ATTRIBUTES}
    options: dict[str, Any] = {
        attribute.field: items if attribute.max_items else items[0]
        for attribute, items in values.items()
        if items and attribute.field not in _NAME_FIELDS and attribute.field != _LAYOUT
    }
    names = {attribute: items for attribute, items in values.items() if attribute.field in _NAME_FIELDS}
    reader.check_times(options.get("duration"), options.get("renew_before"))
    reader.check_group()
    options["subject"] = reader.join_subject(
        [items[0] for attribute, items in values.items() if items and attribute.field == "subject"]
    )
    options["names"] = reader.join_names(names)
    root_only = options.get("root_only", False)
    options["layout"] = reader.join_layout(
        {attribute.name: items[0] for attribute, items in values.items() if items and attribute.field == _LAYOUT},
        None if root_only else options.get("key_type", None if KEY_TYPE in reader.given else DEFAULT_KEY_TYPE),
        root_only=root_only,
    )
    if root_only:
        reader.check_root_only(attributes, options["layout"])
    options["usages"] = tuple(usage for usage in Usage if usage in options.get("usages", ()))
    reader.finish()
    return CertificateSpec(**options)


class _Reader:
    """Collects all faults of the attributes."""

    def __init__(self, translation: Translation, variables: Mapping[str, str]) -> None:
        self._attributes, self._origins = translation.attributes, translation.origins
        self._variables = variables
        self._faults = list(translation.faults)

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
        values = [(item, self._substitute(attribute, item)) for item in items]
        if too_many := internationalized_problem(value for _, value in values if value is not None):
            self._fault(name, too_many, "use fewer names")
            return ()
        parsed: dict[Any, None] = {}
        for item, value in values:
            if value is None:
                continue
            try:
                parsed[attribute.parse(value)] = None
            except (InvalidName, ValueError) as problem:
                shown = quoted(item) if value == item else f"{quoted(item)}, which is {quoted(value)} for this pod,"
                self._fault(name, f"{shown} {problem}")
        return tuple(parsed)

    def _substitute(self, attribute: Attribute, item: str) -> str | None:
        """Return the item with the values of its variables, or None after a fault."""
        try:
            return substitute(item, self._variables) if attribute.variables else item
        except InvalidName as problem:
            self._fault(attribute.name, f"{quoted(item)} {problem}")
            return None

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
        sizes = {attribute: sum(len(name.text) for name in items) for attribute, items in values.items()}
        if (size := sum(sizes.values())) > MAX_NAMES_BYTES:  # variables can make short attributes long
            largest = max(sizes, key=lambda attribute: sizes[attribute])
            problem = f"the attributes contain {size} bytes of names in total"
            self._fault(largest.name, problem, f"a certificate has at most {MAX_NAMES_BYTES}")
        return names

    @property
    def given(self) -> AbstractSet[str]:
        """The attributes of the volume, also those with faults."""
        return self._attributes.keys()

    def join_layout(self, values: Mapping[str, Any], key_type: KeyType | None, *, root_only: bool) -> FileLayout:
        """Return the files that the attributes declare. ``key_type`` is None if the volume's has a fault, or if it has none."""
        encryption = values.get("pkcs12-encryption", PKCS12Encryption.MODERN)
        formats = [format_.attribute for format_ in FORMATS if not (root_only and format_.certificate)]
        names = {attribute: values[attribute] for attribute in formats if attribute in values}
        encoding = values.get(_KEY_ENCODING, KeyEncoding.PKCS8)
        layout = layout_of(values.get("files", DEFAULT_PRESET), names, FileOptions(encryption, encoding))
        if root_only:
            layout = layout.only_roots
        if key_type is not None:
            self._check_key_files(key_type, layout)
        for problem in layout.problems():
            self._fault(*problem)
        if "pkcs12-encryption" in values and not layout.has_stores:
            self._fault(
                "pkcs12-encryption", "is set, but the volume has no key store or trust store", "set files: java"
            )
        return layout

    def _check_key_files(self, key_type: KeyType, layout: FileLayout) -> None:
        kind, encoding = f"{key_type.value} keys", layout.options.key_encoding
        if KEY_STORE.attribute in layout.names and key_type.value.startswith("ML-DSA"):
            self._fault(KEY_TYPE, f"{kind} cannot be in PKCS#12", f"omit {KEY_STORE.attribute} or files: java")
        if not key_type.value.startswith(_ENCODED_TYPES[encoding]):
            problem = f"{quoted(encoding.value)} is not an encoding of {kind}"
            self._fault(_KEY_ENCODING, problem, f"use pkcs8, or another {self._origins.get(KEY_TYPE, KEY_TYPE)}")

    def check_root_only(self, attributes: Mapping[str, str], layout: FileLayout) -> None:
        """Check the attributes that the user wrote, and the files, of a volume with only roots."""
        allowed = _FOR_ROOTS if layout.has_stores else _FOR_ROOTS - _FOR_PASSWORDS
        written = [name for name in _KNOWN if name in attributes or name in self._origins]
        if others := ", ".join(self._origins.get(name, name) for name in written if name not in allowed):
            problem = f"cannot be combined with {others}, because the volume has no certificate and no key"
            self._fault(ROOT_ONLY, problem, f"omit {ROOT_ONLY}, or the other attributes")
        if layout.names.keys() <= {PASSWORD.attribute}:
            self._fault("files", "selects no file with roots", f"add {ROOTS.attribute} or {TRUST_STORE.attribute}")

    def check_unknown(self) -> None:
        known = "known attributes: " + ", ".join(_KNOWN)
        for key in sorted(self._attributes.keys() - set(_KNOWN)):
            hint = hint_for(self._origins.get(key, key), _KNOWN) if len(self._faults) < _MAX_HINTS else None
            self._fault(quoted(key)[1:-1], "is unknown", known if hint is None else hint)
            known = known if hint is not None else ""  # once is enough

    def check_times(self, duration: timedelta | None, renew_before: timedelta | Percentage | None) -> None:
        if duration is not None and duration < MIN_DURATION:
            self._fault("duration", f"is {format_duration(duration)}", f"use at least {format_duration(MIN_DURATION)}")
        if not isinstance(renew_before, timedelta):
            return
        if renew_before <= timedelta():
            self._fault("renew-before", "is zero", "set how long before its expiry to renew the certificate")
        if duration is not None and renew_before >= duration:
            before, lifetime = format_duration(renew_before), format_duration(duration)
            problem = f"{before} is not shorter than the certificate's lifetime of {lifetime}"
            self._fault("renew-before", problem, "omit it to renew after two thirds of the lifetime")

    def check_group(self) -> None:
        if {"gid", "fs-group"} <= self._attributes.keys():
            self._fault("gid", "is set together with fs-group, which means the same", "set one of them")

    def join_subject(self, parts: Sequence[Subject]) -> Subject:
        """Return the common name and the other attributes in one subject."""
        subject = Subject(tuple(attribute for part in parts for attribute in part.attributes))
        if [attribute.type for attribute in subject.attributes].count(COMMON_NAME) > 1:
            self._fault("common-name", "is set together with a common name in subject", "set it in one of them")
        elif subject:
            try:
                Subject.parse(str(subject))  # as the authority does
            except InvalidName as problem:
                self._fault("subject", f"{'together with common-name, ' if len(parts) > 1 else ''}{problem}")
        return subject

    def finish(self) -> None:
        """Raise CertmountError if there is a fault."""
        if self._faults:
            raise CertmountError(Reason.INVALID_ATTRIBUTES, *first_faults(self._faults, _MAX_FAULTS))

    def _fault(self, name: str, problem: str, hint: str = "") -> None:
        self._faults.append(Fault(f"volumeAttributes.{self._origins.get(name, name)}", problem, hint))
