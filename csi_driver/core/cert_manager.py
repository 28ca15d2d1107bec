"""Translate the volume attributes of cert-manager's csi-driver, so that its volumes work with certmount unchanged.

The result has the defaults of that driver where they decide what the application finds: the names of the files, and the
type and encoding of the key. What certmount cannot do is a fault. The list is that of csi-driver 0.16, see
docs/from-cert-manager-csi-driver.md.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from csi_driver.core.errors import Fault
from csi_driver.core.spec import KeyType
from csi_driver.core.texts import quoted

PREFIX = "csi.cert-manager.io/"
_MAX_LENGTH = 1024  # characters, as many as a subject can have
_MAX_LIST_LENGTH = 32 * 1024  # the same as for certmount's own attributes
_LISTS = ("dns-names", "ip-sans", "uri-sans")
_MAX_VARIABLES = 1000  # in a list of names; each takes 1 µs
_MAX_USAGES = 32  # more than the usages that cert-manager has
_REMOVE = "remove it"

_SAME = {
    "issuer-name": "issuer",
    "common-name": "common-name",
    "literal-subject": "subject",
    "dns-names": "dns-names",
    "ip-sans": "ip-sans",
    "uri-sans": "uri-sans",
    "duration": "duration",
    "renew-before": "renew-before",
    "certificate-file": "certificate-file",
    "privatekey-file": "key-file",
    "ca-file": "ca-file",
    "fs-group": "fs-group",
}
"""Attributes whose values certmount understands."""
_WITH_VARIABLES = ("common-name", "literal-subject", "dns-names", "uri-sans")
_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)", re.ASCII)  # they can be without braces, as in Go's os.Expand
# In the order of RFC 4514, which is the reverse of that in the certificate.
_SUBJECT = {
    "serialnumber": "2.5.4.5",
    "postalcodes": "2.5.4.17",
    "streetaddresses": "STREET",
    "provinces": "ST",
    "localities": "L",
    "organizationalunits": "OU",
    "organizations": "O",
    "countries": "C",
}
_ESCAPED = re.compile(r'[\\,+"<>;=]|^[ #]|(?<!^) $')
_SIZES = {"RSA": ("2048", "3072", "4096"), "ECDSA": ("256", "384", "521"), "Ed25519": ("",)}
_KEY_TYPES = {"RSA": "RSA-{}", "ECDSA": "EC-P{}", "Ed25519": "Ed25519"}
_ENCODINGS = {"PKCS1": "pkcs1", "PKCS8": "pkcs8"}
_KEY_STORE = "keystore.p12"
_USAGES = {"server auth": "server", "client auth": "client"}
_KEY_USAGES = ("digital signature", "signing", "key encipherment", "key agreement")
"""The certificate's key usages follow from the type of the key; these are what TLS needs."""
_PLAIN_PASSWORD = "is readable for everyone who can read the pod"  # a message


@dataclass
class Translation:
    """certmount's own attributes, and the attribute of the user from which each one comes."""

    attributes: dict[str, str]
    origins: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def fault(self, name: str, problem: str, hint: str) -> None:
        self.faults.append(Fault(f"volumeAttributes.{PREFIX}{name}", problem, hint))

    def add(self, origin: str, name: str, value: str) -> None:
        """Set an attribute, unless the user has set it too."""
        if name in self.attributes:
            self.fault(origin, f"is set together with {name}, which means the same", "set one of them")
        else:
            self.attributes[name], self.origins[name] = value, PREFIX + origin

    def default(self, name: str, value: str) -> None:
        self.attributes.setdefault(name, value)


def translate(attributes: Mapping[str, str]) -> Translation:
    """Return the attributes without those of cert-manager's driver.

    Unknown attributes are unchanged. Empty values count as missing, as in that driver.
    """
    theirs = {key[len(PREFIX) :]: value for key, value in attributes.items() if key.startswith(PREFIX)}
    translation = Translation({key: value for key, value in attributes.items() if not key.startswith(PREFIX)})
    if not theirs:
        return translation
    for name, value in theirs.items():
        if name not in _KNOWN:
            translation.attributes[PREFIX + name] = value
    values = {
        name: value for name, value in theirs.items() if value and name in _KNOWN and _fits(name, value, translation)
    }
    for name, target in _SAME.items():
        if name in values:
            translation.add(name, target, _with_braces(values[name]) if name in _WITH_VARIABLES else values[name])
    if "uri-sans" in values:
        translation.default("spiffe", "false")  # a certificate with the SPIFFE ID has no other URI
    for translate_some in _TRANSLATORS:
        translate_some(values, translation)
    translation.default("files", "kubernetes")
    return translation


def _fits(name: str, value: str, translation: Translation) -> bool:
    """Return False, and add a fault, if a value is longer than any valid one: its translation would take long."""
    longest = _MAX_LIST_LENGTH if name in _LISTS else _MAX_LENGTH
    if len(value) > longest:
        translation.fault(name, f"is {len(value)} characters long", f"use at most {longest}")
    elif (variables := value.count("$")) > _MAX_VARIABLES:
        translation.fault(name, f"has {variables} variables", f"use at most {_MAX_VARIABLES}")
    else:
        return True
    return False


def _with_braces(text: str) -> str:
    return _VARIABLE.sub(r"${\1}", text)


def _translate_subject(values: Mapping[str, str], translation: Translation) -> None:
    parts = []
    for name, kind in _SUBJECT.items():
        text = _with_braces(values.get(name, ""))
        try:
            items = _split_csv(text) if name != "serialnumber" else [text]
        except ValueError as problem:
            translation.fault(name, f"{quoted(text)} {problem}", 'write a comma in a value as "Example, Inc."')
            continue
        parts += [f"{kind}={_ESCAPED.sub(_escape, item.strip())}" for item in reversed(items) if item]
    if parts and "literal-subject" in values:
        translation.fault("literal-subject", "is set together with parts of the subject", "set one of them")
    elif parts:
        first = next(name for name in _SUBJECT if name in values)
        translation.add(first, "subject", ",".join(parts))


def _split_csv(text: str) -> list[str]:
    """Return the values in one line of CSV, as that driver reads them; raises ValueError."""
    try:
        (row,) = csv.reader([text], strict=True)
    except csv.Error:
        raise ValueError("is not one line of CSV") from None
    return row


def _escape(match: re.Match[str]) -> str:
    return "\\" + match[0]


def _translate_issuer(values: Mapping[str, str], translation: Translation) -> None:
    declare = "declare an issuer of certmount in the issuers file, and set issuer to its name"
    kind, group = values.get("issuer-kind", "Issuer"), values.get("issuer-group", "cert-manager.io")
    if kind not in ("Issuer", "ClusterIssuer"):
        translation.fault("issuer-kind", f"{quoted(kind)} is not an issuer of cert-manager itself", declare)
    if group != "cert-manager.io":
        problem = f"{quoted(group)} is a controller that certmount does not use"
        translation.fault("issuer-group", problem, declare)
    if values.get("is-ca", "false") != "false":
        problem = "certmount never issues CA certificates to pods"
        translation.fault("is-ca", problem, 'remove it, or write "false"')


def _translate_key(values: Mapping[str, str], translation: Translation) -> None:
    algorithm = _known_word(values.get("key-algorithm", "RSA"), _SIZES)
    encoding = _known_word(values.get("key-encoding", ""), _ENCODINGS)
    if algorithm not in _SIZES:
        translation.fault("key-algorithm", f"{quoted(algorithm)} is unknown", f"use one of {', '.join(_SIZES)}")
        return
    sizes = _SIZES[algorithm]
    size = values.get("key-size", sizes[0])
    if size not in sizes:
        hint = f"use one of {', '.join(sizes)}" if sizes[0] else _REMOVE
        translation.fault("key-size", f"{quoted(size)} is not a size of {algorithm} keys", hint)
        return
    key_type = _KEY_TYPES[algorithm].format(size)
    if origin := next((name for name in ("key-size", "key-algorithm") if name in values), ""):
        translation.add(origin, "key-type", key_type)
    else:
        translation.default("key-type", key_type)
    _translate_encoding(encoding, translation)


def _translate_encoding(encoding: str, translation: Translation) -> None:
    """The default of that driver is PKCS#1 for RSA keys, and PKCS#8 for all others, which have no PKCS#1."""
    key_type = translation.attributes["key-type"]
    is_rsa = key_type.upper().startswith("RSA")
    has_other = any(key_type.lower() == kind.value.lower() for kind in KeyType) and not is_rsa
    if encoding and encoding not in _ENCODINGS:
        translation.fault("key-encoding", f"{quoted(encoding)} is unknown", f"use one of {', '.join(_ENCODINGS)}")
    elif encoding == "PKCS1" and has_other:
        problem = f"{quoted(encoding)} is not an encoding of {key_type} keys"
        other = translation.origins.get("key-type", "key-type")
        translation.fault("key-encoding", problem, f"use PKCS8, or another {other}")
    elif encoding:
        translation.add("key-encoding", "key-encoding", _ENCODINGS[encoding])
    elif is_rsa:
        translation.default("key-encoding", "pkcs1")


def _known_word(text: str, known: Iterable[str]) -> str:
    """Return the word with the known spelling: that driver ignores the case."""
    return next((word for word in known if word.lower() == text.lower()), text)


def _translate_usages(values: Mapping[str, str], translation: Translation) -> None:
    usages = [usage.strip() for usage in values["key-usages"].split(",")] if "key-usages" in values else []
    if len(usages) > _MAX_USAGES:
        translation.fault("key-usages", f"has {len(usages)} usages", f"use at most {_MAX_USAGES}")
        return
    for usage in usages:
        if usage not in (*_USAGES, *_KEY_USAGES):
            allowed = ", ".join((*_USAGES, *_KEY_USAGES))
            translation.fault("key-usages", f"{quoted(usage)} is not a usage of TLS", f"use some of {allowed}")
    if extended := [_USAGES[usage] for usage in usages if usage in _USAGES]:
        translation.add("key-usages", "usages", ", ".join(extended))


def _translate_reuse(values: Mapping[str, str], translation: Translation) -> None:
    reuse = values.get("reuse-private-key", "false")
    if reuse not in ("true", "false"):
        translation.fault("reuse-private-key", f"{quoted(reuse)} is not a boolean", 'write "true" or "false"')
    elif reuse == "true":
        translation.add("reuse-private-key", "reuse-key", reuse)


def _translate_store(values: Mapping[str, str], translation: Translation) -> None:
    enable = values.get("pkcs12-enable", "")
    if enable not in ("", "true", "false"):
        translation.fault("pkcs12-enable", f"{quoted(enable)} is not a boolean", 'write "true" or "false"')
    for name in ("pkcs12-filename", "pkcs12-password"):
        if name in values and not enable:
            translation.fault(name, "is set, but pkcs12-enable is not", 'set pkcs12-enable: "true", or remove it')
    if enable != "true":
        return
    origin = "pkcs12-filename" if "pkcs12-filename" in values else "pkcs12-enable"
    translation.add(origin, "keystore-file", values.get("pkcs12-filename", _KEY_STORE))
    if "pkcs12-password" in values:
        hint = "remove it, and set nodePublishSecretRef to a Secret with the key password"
        translation.fault("pkcs12-password", _PLAIN_PASSWORD, hint)


_TRANSLATORS: tuple[Callable[[Mapping[str, str], Translation], None], ...] = (
    _translate_subject,
    _translate_issuer,
    _translate_key,
    _translate_usages,
    _translate_reuse,
    _translate_store,
)
_OTHER = (
    "issuer-kind",
    "issuer-group",
    "is-ca",
    "key-algorithm",
    "key-size",
    "key-encoding",
    "key-usages",
    "reuse-private-key",
    "pkcs12-enable",
    "pkcs12-filename",
    "pkcs12-password",
)
_KNOWN = frozenset((*_SAME, *_SUBJECT, *_OTHER))
