"""Which kinds of issuers there are: how each is read from the issuers' file, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from csi_driver.authority.issuers.external import ExternalIssuer
from csi_driver.authority.issuers.secrets import Secrets
from csi_driver.authority.issuers.step_ca.document import parse_step_ca
from csi_driver.authority.issuers.step_ca.issuer import StepCA
from csi_driver.authority.located_yaml import read_yaml
from csi_driver.core.errors import Reason
from csi_driver.core.issuers_document import Declared, Parse, parse_issuers


@dataclass(frozen=True, slots=True)
class Tools:
    """What issuers are made with."""

    secrets: Secrets


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of issuer."""

    parse: Parse
    make: Callable[[str, Any, Tools], ExternalIssuer]
    """Takes the issuer's name and the value that ``parse`` made. It does no I/O: that begins with the issuer's ``run``."""


KINDS: Mapping[str, Kind] = {
    "step_ca": Kind(parse_step_ca, lambda name, configuration, tools: StepCA(name, configuration, tools.secrets)),
}


def read_issuers(content: bytes, kinds: Mapping[str, Kind] = KINDS) -> tuple[Declared, ...]:
    """Takes the content of an issuers' file (YAML); an empty one declares none.

    Raises:
        CertmountError: InvalidIssuers, with all that is wrong.
    """
    located = read_yaml(content, "issuers file", Reason.INVALID_ISSUERS)
    return parse_issuers(located.data, {name: kind.parse for name, kind in kinds.items()}, located.lines)


def make_issuer(declared: Declared, tools: Tools, kinds: Mapping[str, Kind] = KINDS) -> ExternalIssuer:
    """The issuer that is declared."""
    return kinds[declared.kind].make(declared.name, declared.configuration, tools)
