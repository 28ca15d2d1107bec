"""Valid responses of an authority, and parts for invalid ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.x509.oid import ObjectIdentifier

from csi_driver.core.certificates.verification import ExpectedCertificate, VerifiedCertificate, verify_certificate
from csi_driver.core.names import Names
from csi_driver.core.spec import KeyType
from tests.unit.core import pki
from tests.unit.core.pki import CA_USAGE, HOUR, NOW, SPIFFE, Signer, Validity, der, key_of

SECOND = timedelta(seconds=1)
KEY, OTHER_KEY = key_of(KeyType.EC_P256), key_of(KeyType.EC_P256, 1)
ROOT = pki.authority("root", key=key_of(KeyType.EC_P256, 2))
MIDDLE = pki.authority("middle", ROOT, key=key_of(KeyType.EC_P256, 3))
LOWER = pki.authority("lower", MIDDLE, key=key_of(KeyType.EC_P256, 4))
STRANGER = pki.authority("root", key=key_of(KeyType.EC_P256, 5))
IMPOSTOR = pki.authority("middle", STRANGER, key=key_of(KeyType.EC_P256, 6))
REQUESTED = pki.names("www.example.com")
NAMES = pki.names("www.example.com", SPIFFE)
ADDRESSES = ("10.0.0.1", "fd00::1", "Shop@example.com")
NO_CERT_SIGN = pki.key_usage("digital_signature")
UNKNOWN = x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
# A type of name that cryptography cannot parse: x400Address ([3], RFC 5280 section 4.2.1.6).
X400 = x509.UnrecognizedExtension(ObjectIdentifier("2.5.29.17"), b"\x30\x02\xa3\x00")


@dataclasses.dataclass(frozen=True)
class Response:
    """A chain and roots, the requested names, and the time of the verification."""

    chain: Sequence[bytes]
    roots: Sequence[bytes] = tuple(der(ROOT.certificate))
    requested: Names = REQUESTED
    now: datetime = NOW

    def check(self) -> VerifiedCertificate:
        expected = ExpectedCertificate(KEY.public_key(), self.requested, "web", "edge")
        return verify_certificate(self.chain, self.roots, expected, self.now)


def leaf(
    issuer: Signer = MIDDLE,
    names: Names = NAMES,
    *,
    end: timedelta = HOUR,
    extensions: Sequence[x509.ExtensionType] = (),
) -> x509.Certificate:
    return pki.leaf(issuer, KEY, names, validity=Validity(end=end), extensions=extensions)


def under(*signers: Signer) -> list[bytes]:
    """Return a chain: a leaf of the first signer, and all signers."""
    return der(leaf(signers[0]), *(signer.certificate for signer in signers))


def middle(*extensions: x509.ExtensionType, **changes: int | bool | Validity | None) -> Signer:
    return pki.authority("middle", ROOT, key=MIDDLE.key, extensions=extensions or (CA_USAGE,), **changes)  # type: ignore[arg-type]  # each by its name


@functools.cache
def root_above(path_length: int) -> Signer:
    return pki.authority("root", key=ROOT.key, path_length=path_length)


def sent(certificate: x509.Certificate, requested: Names = REQUESTED) -> Response:
    """Return a response with this leaf of MIDDLE."""
    return Response(der(certificate, MIDDLE.certificate), requested=requested)


EXPIRED_ROOT = pki.authority("root", key=ROOT.key, validity=Validity(end=-SECOND)).certificate
SERVICES = pki.names(SPIFFE, "shop.web.svc", "shop.web.svc.cluster.local")
GOOD = {
    "leaf under an intermediate": Response(under(MIDDLE)),
    "leaf under the root": Response(der(leaf(ROOT))),
    "leaf with CA flag false": sent(leaf(extensions=[x509.BasicConstraints(ca=False, path_length=None)])),
    "two intermediates": Response(under(LOWER, MIDDLE)),
    "chain includes the root": Response(under(MIDDLE, ROOT)),
    "one of several roots": Response(under(MIDDLE), der(STRANGER.certificate, ROOT.certificate)),
    "roots of many federations": Response(under(MIDDLE), der(*[STRANGER.certificate] * 99, ROOT.certificate)),
    "requested addresses": sent(leaf(names=pki.names(SPIFFE, *ADDRESSES)), pki.names(*ADDRESSES)),
    "names of Services for a request without names": sent(leaf(names=SERVICES), Names()),
    "expired root and a valid one": Response(under(MIDDLE), der(EXPIRED_ROOT, ROOT.certificate)),
    "sufficient path length": Response(under(middle(path_length=0))),
    "sufficient path length of the root": Response(under(MIDDLE), der(root_above(1).certificate)),
    "sufficient path length, chain with root": Response(under(MIDDLE, root_above(1)), der(root_above(1).certificate)),
    "unknown extension that is not critical": sent(pki.leaf(MIDDLE, KEY, NAMES, extensions=[UNKNOWN], critical=False)),
    "only the SPIFFE ID": sent(leaf(names=pki.names(SPIFFE)), Names()),
    "requested SPIFFE ID": sent(leaf(), NAMES),
    "another trust domain": sent(leaf(names=pki.names("spiffe://other.example/ns/web/sa/edge")), Names()),
    "first valid second": Response(under(MIDDLE), now=NOW - HOUR),
    "last valid second": Response(under(MIDDLE), now=NOW + HOUR - SECOND),
}
