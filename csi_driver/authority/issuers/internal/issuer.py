"""Signs with the internal CA, in the event loop: a signature takes 60 microseconds, and a thread makes that 170."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.ca.authority import CertificateAuthority, utc_now
from csi_driver.authority.ca.certificates import Leaf
from csi_driver.authority.ca.keyring import Keyring
from csi_driver.authority.ca.leaf_encoder import sign_leaf_der
from csi_driver.authority.issuers import IssuedCertificate, Issuer, IssuerRequest
from csi_driver.core.certificates.name_constraints import NameConstraintSet
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.names import Names
from csi_driver.core.spec import DEFAULT_ISSUER
from csi_driver.core.subject import Subject

_HINT = "request names that the CA permits, or ask an administrator to change the CA"


class InternalIssuer(Issuer):
    """Signs with the current intermediate. Verifiers reject names that the name constraints of its chain exclude."""

    needs_names_in_csr = False

    def __init__(self, ca: CertificateAuthority, clock: Callable[[], datetime] = utc_now) -> None:
        self._ca = ca
        self._clock = clock
        self._keyring: Keyring | None = None
        self._constraints = NameConstraintSet()
        self._intermediates: tuple[bytes, ...] = ()
        self._roots: tuple[bytes, ...] = ()
        self._valid_until = datetime.min.replace(tzinfo=UTC)

    @property
    def environment(self) -> str:
        return DEFAULT_ISSUER

    @property
    def roots(self) -> tuple[bytes, ...]:
        return self._ca.root_set.roots

    async def issue(self, request: IssuerRequest) -> IssuedCertificate:
        grant = request.grant
        keyring = await self._ca.record_lifetime(grant.duration)
        # Nothing below waits: a keyring that is replaced in the meantime must not sign.
        self._use(keyring)
        names = _permitted(self._constraints, request)
        subject = _subject(self._constraints, request)
        now = self._clock()
        # Nodes renew by the expiry of the leaf, so it must not be later than that of any certificate above it.
        lifetime = min(grant.duration, self._valid_until - now)
        leaf = Leaf(request.csr.public_key, names, lifetime, grant.usages, subject=subject)
        certificate = sign_leaf_der(leaf, keyring.intermediate, now)
        return IssuedCertificate((certificate, *self._intermediates), self._roots)

    def _use(self, keyring: Keyring) -> None:
        if keyring is not self._keyring:
            self._keyring = keyring
            self._constraints = NameConstraintSet.of((*keyring.intermediates, keyring.root))
            self._intermediates = tuple(one.public_bytes(Encoding.DER) for one in keyring.intermediates)
            self._roots = keyring.roots_der
            self._valid_until = keyring.valid_until


def _subject(constraints: NameConstraintSet, request: IssuerRequest) -> x509.Name | None:
    """Return the subject, or None for the default; raise CertmountError NameNotAllowed if the CA's constraints exclude it."""
    requested = request.requested.subject if request.requested else Subject()
    if not constraints.constrains_subjects:
        return requested.name if requested else None
    if requested:
        problem = "the name constraints of the CA exclude subjects"
        raise CertmountError(Reason.NAME_NOT_ALLOWED, Fault(f"subject {requested}", problem, _HINT))
    return x509.Name([])


def _permitted(constraints: NameConstraintSet, request: IssuerRequest) -> Names:
    """Return the names to sign; raise CertmountError NameNotAllowed if the CA doesn't permit a requested name."""
    names = request.grant.names
    violations = constraints.violations(names)
    if violations and not len(request.csr.names):
        # The pod requested no names, so the policy granted those of its Services: omit the ones that the CA can't sign.
        excluded = {name for name, _ in violations}
        names = replace(names, dns=tuple(name for name in names.dns if name.text not in excluded))
        violations = constraints.violations(names)
    if violations:
        raise CertmountError(Reason.NAME_NOT_ALLOWED, *(Fault(name, problem, _HINT) for name, problem in violations))
    return names
