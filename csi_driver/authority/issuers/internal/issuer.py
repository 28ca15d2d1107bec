"""The internal CA as an issuer. It signs on the event loop: 60 microseconds, of which a hop to a thread would make 170."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.ca.authority import CertificateAuthority, utc_now
from csi_driver.authority.ca.keyring import Keyring
from csi_driver.authority.ca.leaf import Leaf, sign_leaf
from csi_driver.authority.issuers import IssuedCertificate, IssuerRequest
from csi_driver.core.certificates.name_constraints import NameConstraintSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import Names

_HINT = "ask for names within them, or have an administrator change the CA"


class InternalIssuer:
    """Signs with the current intermediate what the name constraints of its chain permit: verifiers would refuse the rest."""

    def __init__(self, ca: CertificateAuthority, clock: Callable[[], datetime] = utc_now) -> None:
        self._ca = ca
        self._clock = clock
        self._known: Keyring | None = None
        self._bounds = NameConstraintSet()
        self._above: tuple[bytes, ...] = ()
        self._roots: tuple[bytes, ...] = ()

    async def issue(self, order: IssuerRequest) -> IssuedCertificate:
        """See :class:`csi_driver.authority.issuers.Issuer`."""
        # From here on nothing is waited for: a keyring that was retired meanwhile must not sign.
        keyring, grant = await self._ca.record_lifetime(order.grant.duration), order.grant
        bounds = self._bounds_of(keyring)
        names = _within(bounds, order)
        leaf = Leaf(order.request.public_key, names, grant.duration, grant.usages, subject=not bounds.constrains_subjects)
        certificate = sign_leaf(leaf, keyring.intermediate, self._clock())
        return IssuedCertificate(
            chain=(certificate.public_bytes(Encoding.DER), *self._above),
            roots=self._roots,
        )

    def _bounds_of(self, keyring: Keyring) -> NameConstraintSet:
        """Those of the keyring; found anew only where it is another one."""
        if keyring is not self._known:
            self._known, self._bounds = keyring, NameConstraintSet.of((*keyring.intermediates, keyring.root))
            self._above = tuple(one.public_bytes(Encoding.DER) for one in keyring.intermediates)
            self._roots = keyring.roots_der
        return self._bounds


def _within(bounds: NameConstraintSet, order: IssuerRequest) -> Names:
    """The names to sign; raises CertmountError NameNotAllowed for one that was asked for and is out of bounds."""
    refused, names = bounds.refused(order.grant.names), order.grant.names
    if refused and not len(order.request.names):
        # Nobody asked for its Services' names, so the pod does without those that this CA may not sign.
        outside = {name for name, _ in refused}
        names = replace(names, dns=tuple(name for name in names.dns if name.text not in outside))
        refused = bounds.refused(names)
    if refused:
        raise CertmountError(Reason.NAME_NOT_ALLOWED, *(Fault(name, problem, _HINT) for name, problem in refused))
    return names
