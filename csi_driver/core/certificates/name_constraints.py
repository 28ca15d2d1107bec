"""Name constraints (RFC 5280 section 4.2.1.10): how people write them, and which names they leave to a certificate.

Verifiers differ at the edges, so a name passes here only where each of them lets it pass.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cryptography import x509

from csi_driver.core.certificates.csr import san_extension
from csi_driver.core.names import DNSName, EmailAddress, NameProblem, Names, parse_trust_domain

_KINDS = (x509.DNSName, x509.UniformResourceIdentifier, x509.IPAddress, x509.RFC822Name, x509.DirectoryName)
_EXAMPLE = "dns:example.com, uri:cluster.local, ip:10.0.0.0/8 or email:example.com"


def parse_constraint(text: str) -> x509.GeneralName:
    """Reads ``dns:``, ``uri:``, ``ip:`` or ``email:`` with what is permitted after it.

    A DNS domain permits itself and all below it. The host of a URI and that of a mail address are meant exactly; with a
    dot before them, all hosts below it.

    Raises:
        NameProblem: in words that follow the text.
    """
    kind, colon, base = text.partition(":")
    parse = _PARSERS.get(kind.lower())
    if not colon or parse is None:
        raise NameProblem(f"is not a name constraint; write {_EXAMPLE}")
    if not base:
        raise NameProblem(f"permits nothing; write {_EXAMPLE}")
    return parse(base)


def _dns(base: str) -> x509.GeneralName:
    if base.startswith("."):
        raise NameProblem("starts with a dot; a DNS domain permits all names below it without")
    name = DNSName.parse(base)
    if name.is_wildcard:
        raise NameProblem("has a wildcard; a DNS domain permits all names below it without")
    return x509.DNSName(name.text)


def _uri(base: str) -> x509.GeneralName:
    if "/" in base or ":" in base:
        raise NameProblem("is more than a host; of a URI only the host can be constrained, such as uri:cluster.local")
    return x509.UniformResourceIdentifier(_host(base, parse_trust_domain))


def _email(base: str) -> x509.GeneralName:
    if "@" in base:
        return x509.RFC822Name(EmailAddress.parse(base).text)
    return x509.RFC822Name(_host(base, lambda text: DNSName.parse(text).text))


def _ip(base: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_network(base))
    except ValueError as error:
        raise NameProblem(f"is not a range of IP addresses: {error}") from None


def _host(base: str, parse: Callable[[str], str]) -> str:
    dot = "." if base.startswith(".") else ""
    host = parse(base.removeprefix(".").lower())
    if "*" in host:
        raise NameProblem("has a wildcard; a dot before a host permits all hosts below it")
    return dot + host


_PARSERS: dict[str, Callable[[str], x509.GeneralName]] = {"dns": _dns, "uri": _uri, "ip": _ip, "email": _email}
_WORDS: dict[type[x509.GeneralName], str] = {
    x509.DNSName: "dns",
    x509.UniformResourceIdentifier: "uri",
    x509.IPAddress: "ip",
    x509.RFC822Name: "email",
    x509.DirectoryName: "directory",
}


def format_constraint(constraint: x509.GeneralName) -> str:
    """The text that :func:`parse_constraint` reads; for other kinds, text for people."""
    value = constraint.value
    shown = value.rfc4514_string() if isinstance(value, x509.Name) else str(value)
    return f"{_WORDS.get(type(constraint), type(constraint).__name__)}:{shown}"


def unsupported_kinds(constraints: x509.NameConstraints) -> list[str]:
    """The kinds of names that are constrained and can't be checked by :class:`NameConstraintSet`."""
    subtrees = [*(constraints.permitted_subtrees or ()), *(constraints.excluded_subtrees or ())]
    return sorted({type(tree).__name__ for tree in subtrees if not isinstance(tree, _KINDS)})


@dataclass(frozen=True, slots=True)
class NameConstraintSet:
    """The name constraints of a chain: a certificate below it must keep to those of every certificate in it."""

    constraints: tuple[x509.NameConstraints, ...] = ()

    @classmethod
    def of(cls, chain: Iterable[x509.Certificate]) -> NameConstraintSet:
        """Those of the certificates of a chain, its root included, as verifiers differ in whether they heed it."""
        values = (extension.value for certificate in chain for extension in certificate.extensions)
        return cls(tuple(value for value in values if isinstance(value, x509.NameConstraints)))

    @property
    def constrains_subjects(self) -> bool:
        """True where directory names are constrained: only an empty subject is then sure to be believed."""
        trees = (
            tree
            for constraint in self.constraints
            for tree in (*(constraint.permitted_subtrees or ()), *(constraint.excluded_subtrees or ()))
        )
        return any(isinstance(tree, x509.DirectoryName) for tree in trees)

    def refused(self, names: Names) -> list[tuple[str, str]]:
        """The names that may not stand in a certificate, each with the reason in words."""
        if not self.constraints:
            return []
        found = ((name, _problem(name, constraint)) for name in san_extension(names) for constraint in self.constraints)
        return list({str(name.value): problem for name, problem in found if problem}.items())


def _problem(name: x509.GeneralName, constraint: x509.NameConstraints) -> str | None:
    excluded = _of_kind(name, constraint.excluded_subtrees)
    for tree in excluded:
        if _within(name, tree, strict=False):
            return f"the CA's certificate excludes {format_constraint(tree)}"
    permitted = _of_kind(name, constraint.permitted_subtrees)
    if permitted and not any(_within(name, tree, strict=True) for tree in permitted):
        return "the CA's certificate permits " + ", ".join(format_constraint(tree) for tree in permitted) + " only"
    return None


def _of_kind(name: x509.GeneralName, trees: Sequence[x509.GeneralName] | None) -> list[x509.GeneralName]:
    return [tree for tree in trees or () if type(tree) is type(name)]


def _within(name: x509.GeneralName, tree: x509.GeneralName, *, strict: bool) -> bool:
    """True where the name is in the subtree; where verifiers differ, only a strict question is answered with no."""
    if isinstance(name, x509.IPAddress):
        return name.value in tree.value
    text, base = str(name.value), str(tree.value)
    if isinstance(name, x509.DNSName):
        return _below(text, base) or (not strict and _wildcard_covers(text, base))
    if isinstance(name, x509.RFC822Name):
        if "@" in base:
            local, _, host = text.rpartition("@")
            return (local, host.lower()) == (base.rpartition("@")[0], base.rpartition("@")[2].lower())
        return _host_within(text.rpartition("@")[2], base, strict=strict)
    host = text.partition("://")[2].partition("/")[0]
    # The RFC knows no subtree for a URI whose host is an address; Go refuses such a certificate.
    return (_is_address(host) and not strict) or _host_within(host, base, strict=strict)


def _host_within(host: str, base: str, *, strict: bool) -> bool:
    return host.lower() == base.lower() if strict and not base.startswith(".") else _below(host, base)


def _below(text: str, base: str) -> bool:
    text, base = text.lower(), base.lower()
    if base.startswith("."):
        return text.endswith(base)
    return not base or text == base or text.endswith("." + base)


def _wildcard_covers(text: str, base: str) -> bool:
    """True where ``*.example.com`` could be shown for an excluded ``a.example.com``."""
    return text.startswith("*.") and base.lower().partition(".")[2] == text[2:].lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
