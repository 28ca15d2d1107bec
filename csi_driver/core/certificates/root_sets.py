"""Named sets of root certificates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.spec import DEFAULT_ISSUER


@dataclass(frozen=True, slots=True)
class RootSet:
    """The roots (X.509 DER) of an issuer or a federation. A higher ``generation`` is a newer version of the same set."""

    roots: tuple[bytes, ...]
    generation: int


def trusted_root_set_names(spec: CertificateSpec, *, interim: bool = False) -> tuple[str, ...]:
    """Return the names of the root sets that a volume trusts, its issuer's first.

    A volume with an interim certificate also trusts the internal CA.
    """
    return tuple(dict.fromkeys((spec.issuer, *spec.federations, *((DEFAULT_ISSUER,) if interim else ()))))


def select_root_sets(sets: Mapping[str, RootSet], issuer: str, federations: Sequence[str]) -> dict[str, RootSet]:
    """Return the root sets that a pod with this issuer and these federations trusts. ``sets`` are those of the authority.

    Raises CertmountError: FederationNotFound, or IssuerUnavailable while the issuer's own roots are unknown.
    """
    if issuer not in sets:
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, f"the roots of issuer {issuer} are not known yet")
    if unknown := [name for name in federations if name not in sets]:
        hint = f"use one of {', '.join(sorted(sets))}"
        faults = [Fault("federations", f"the authority has no root set named {name}", hint) for name in unknown]
        raise CertmountError(Reason.FEDERATION_NOT_FOUND, *faults)
    return {name: sets[name] for name in (issuer, *federations)}


def newest_root_sets(one: Mapping[str, RootSet], other: Mapping[str, RootSet]) -> dict[str, RootSet]:
    """Merge two mappings by name. Keep the newer version of each set, or the first one's if both are equal."""
    kept = {
        name: roots for name, roots in one.items() if name not in other or roots.generation >= other[name].generation
    }
    return {**other, **kept}


def merge_roots(sets: Mapping[str, RootSet], names: Iterable[str]) -> tuple[bytes, ...]:
    """Return the roots of the named sets in the order of the names, without duplicates. Ignore names that are not in ``sets``."""
    return tuple(dict.fromkeys(root for name in names if name in sets for root in sets[name].roots))
