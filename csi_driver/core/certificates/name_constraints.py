"""Name constraints (RFC 5280 section 4.2.1.10): parse them, and find the names that a certificate must not contain.

Verifiers treat edge cases differently. A name passes here only if every verifier accepts it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cryptography import x509

from csi_driver.core.certificates.csr import rfc822_name, san_extension
from csi_driver.core.names import DNSName, EmailAddress, InvalidName, Names, parse_trust_domain

_SUPPORTED = (x509.DNSName, x509.UniformResourceIdentifier, x509.IPAddress, x509.RFC822Name, x509.DirectoryName)
_EXAMPLES = "use dns:example.com, uri:cluster.local, ip:10.0.0.0/8 or email:example.com"


def parse_constraint(text: str) -> x509.GeneralName:
    """Parse ``dns:``, ``uri:``, ``ip:`` or ``email:``, followed by the permitted subtree.

    A DNS domain permits itself and all names below it. The host of a URI or of an email address must match exactly, or
    all hosts below it match if it begins with a dot.
    Raises InvalidName in words that follow the text.
    """
    prefix, colon, base = text.partition(":")
    parse = _PARSERS.get(prefix.lower())
    if not colon or parse is None:
        raise InvalidName(f"is not a name constraint; {_EXAMPLES}")
    if not base:
        raise InvalidName(f"permits nothing; {_EXAMPLES}")
    return parse(base)


def _dns(base: str) -> x509.GeneralName:
    if base.startswith("."):
        raise InvalidName("starts with a dot; remove it, a DNS domain permits all names below it")
    name = DNSName.parse(base)
    if name.is_wildcard:
        raise InvalidName("has a wildcard; remove it, a DNS domain permits all names below it")
    return x509.DNSName(name.text)


def _uri(base: str) -> x509.GeneralName:
    if "/" in base or ":" in base:
        raise InvalidName("contains more than a host; only the host of a URI can be constrained: uri:cluster.local")
    return x509.UniformResourceIdentifier(_host(base, parse_trust_domain))


def _email(base: str) -> x509.GeneralName:
    if "@" in base:
        return rfc822_name(EmailAddress.parse(base).text)
    return rfc822_name(_host(base, lambda text: DNSName.parse(text).text))


def _ip(base: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_network(base))
    except ValueError as error:
        raise InvalidName(f"is not a range of IP addresses: {error}") from None


def _host(base: str, parse: Callable[[str], str]) -> str:
    dot = "." if base.startswith(".") else ""
    host = parse(base.removeprefix(".").lower())
    if "*" in host:
        raise InvalidName("has a wildcard; begin with a dot to permit all hosts below it")
    return dot + host


_PARSERS: dict[str, Callable[[str], x509.GeneralName]] = {"dns": _dns, "uri": _uri, "ip": _ip, "email": _email}
_PREFIXES: dict[type[x509.GeneralName], str] = {
    x509.DNSName: "dns",
    x509.UniformResourceIdentifier: "uri",
    x509.IPAddress: "ip",
    x509.RFC822Name: "email",
    x509.DirectoryName: "directory",
}


def format_constraint(constraint: x509.GeneralName) -> str:
    """Return the text that :func:`parse_constraint` parses, or text for people for other types."""
    value = constraint.value
    shown = value.rfc4514_string() if isinstance(value, x509.Name) else str(value)
    return f"{_PREFIXES.get(type(constraint), type(constraint).__name__)}:{shown}"


def unsupported_kinds(constraints: x509.NameConstraints) -> list[str]:
    """Return the types of constrained names that :class:`NameConstraintSet` can't check."""
    return sorted({type(subtree).__name__ for subtree in _subtrees(constraints) if not isinstance(subtree, _SUPPORTED)})


@dataclass(frozen=True, slots=True)
class NameConstraintSet:
    """The name constraints of all certificates in a chain. A certificate below it must satisfy all of them."""

    constraints: tuple[x509.NameConstraints, ...] = ()

    @classmethod
    def of(cls, chain: Iterable[x509.Certificate]) -> NameConstraintSet:
        """Return the constraints of a chain, including its root: some verifiers apply the root's constraints."""
        values = (extension.value for certificate in chain for extension in certificate.extensions)
        return cls(tuple(value for value in values if isinstance(value, x509.NameConstraints)))

    @property
    def constrains_subjects(self) -> bool:
        """True if directory names are constrained. Then verifiers may reject any subject that is not empty."""
        return any(isinstance(tree, x509.DirectoryName) for each in self.constraints for tree in _subtrees(each))

    def violations(self, names: Names) -> list[tuple[str, str]]:
        """Return the names that a certificate must not contain, each with the reason."""
        if not self.constraints:
            return []
        found = ((name, _problem(name, constraint)) for name in san_extension(names) for constraint in self.constraints)
        return list({str(name.value): problem for name, problem in found if problem}.items())


def _subtrees(constraints: x509.NameConstraints) -> list[x509.GeneralName]:
    return [*(constraints.permitted_subtrees or ()), *(constraints.excluded_subtrees or ())]


def _problem(name: x509.GeneralName, constraint: x509.NameConstraints) -> str | None:
    for subtree in _of_type(name, constraint.excluded_subtrees):
        if _is_within(name, subtree, strict=False):
            return f"the CA's certificate excludes {format_constraint(subtree)}"
    permitted = _of_type(name, constraint.permitted_subtrees)
    if permitted and not any(_is_within(name, subtree, strict=True) for subtree in permitted):
        return "the CA's certificate permits only " + ", ".join(format_constraint(subtree) for subtree in permitted)
    if isinstance(name, x509.UniformResourceIdentifier) and _is_address(_host_of(name)):
        # The RFC defines no constraint for such a URI. Go rejects it if the CA has any constraint, of any type.
        return "the CA's certificate has name constraints, and Go then rejects a URI whose host is an IP address"
    return None


def _of_type(name: x509.GeneralName, subtrees: Sequence[x509.GeneralName] | None) -> list[x509.GeneralName]:
    return [subtree for subtree in subtrees or () if type(subtree) is type(name)]


def _is_within(name: x509.GeneralName, subtree: x509.GeneralName, *, strict: bool) -> bool:
    """Return True if the name is in the subtree: for every verifier if ``strict``, otherwise for at least one."""
    if isinstance(name, x509.IPAddress):
        return name.value in subtree.value
    text, base = str(name.value), str(subtree.value)
    if isinstance(name, x509.DNSName):
        return _is_below(text, base) or (not strict and _wildcard_covers(text, base))
    if isinstance(name, x509.RFC822Name):
        if "@" in base:
            local, _, host = text.rpartition("@")
            return (local, host.lower()) == (base.rpartition("@")[0], base.rpartition("@")[2].lower())
        return _host_is_within(text.rpartition("@")[2], base, strict=strict)
    return _host_is_within(_host_of(name), base, strict=strict)


def _host_of(uri: x509.GeneralName) -> str:
    return str(uri.value).partition("://")[2].partition("/")[0]


def _host_is_within(host: str, base: str, *, strict: bool) -> bool:
    return host.lower() == base.lower() if strict and not base.startswith(".") else _is_below(host, base)


def _is_below(text: str, base: str) -> bool:
    text, base = text.lower(), base.lower()
    if base.startswith("."):
        return text.endswith(base)
    return not base or text == base or text.endswith("." + base)


def _wildcard_covers(text: str, base: str) -> bool:
    """Return True if ``text`` is ``*.example.com`` and matches the excluded ``base``, for example ``a.example.com``."""
    return text.startswith("*.") and base.lower().partition(".")[2] == text[2:].lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
