"""When a Secret needs a new certificate. Pure: the time is an argument."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum, unique

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.core import renewal
from csi_driver.core.certificates.csr import MAX_CSR_BYTES, names_of
from csi_driver.core.certificates.keys import PrivateKey, key_fingerprint, key_type_of, load_key, public_bytes
from csi_driver.core.certificates.parsing import PARSE_ERRORS
from csi_driver.core.certificates.verification import chain_problems
from csi_driver.core.formats.pem import decode_certificates
from csi_driver.core.secret import Secret
from csi_driver.core.texts import timestamp
from csi_driver.rpc.authority_messages import TrustBundle
from csi_driver.secrets.requests import DesiredSecret

RENEW_BEFORE = timedelta(days=30)
_LAST_PART = 3  # a certificate is renewed in the last third of its lifetime, if that is later
_JITTER = 0.1  # of the time from the renewal to the expiry, so that certificates of one day are not renewed together
MAX_CHAIN = 10
MAX_CHAIN_BYTES = 4 * MAX_CSR_BYTES
MAX_KEY_BYTES = 16 * 1024  # twice the longest key of a supported type


@unique
class Condition(Enum):
    """Why a certificate is requested."""

    MISSING = "the Secret does not exist"
    NOT_PARSABLE = "the Secret contains no certificate or no key that can be parsed"
    KEY_MISMATCH = "the key does not belong to the certificate"
    NAMES_DIFFER = "the names of the certificate differ"
    EXPIRES_SOON = "the certificate expires soon"
    RENEWAL_SUGGESTED = "the CA suggests to renew the certificate now"
    OTHER_ENVIRONMENT = "the certificate is from another environment of the issuer"
    OTHER_ISSUER = "the certificate is from another issuer"
    OTHER_KEY_TYPE = "the key has another type"


@dataclass(frozen=True, slots=True)
class FoundCondition:
    """A condition and its details for people."""

    condition: Condition
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.condition.value}: {self.detail}" if self.detail else self.condition.value


@dataclass(frozen=True, slots=True)
class CurrentCertificate:
    """The key and the chain in a Secret."""

    key: PrivateKey
    chain: tuple[x509.Certificate, ...]

    @property
    def leaf(self) -> x509.Certificate:
        return self.chain[0]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the key, as in the trust bundle."""
        return key_fingerprint(self.key.public_key())


def parse_current(chain: bytes, key: Secret[bytes]) -> CurrentCertificate | None:
    """Return the contents of a Secret; None if they cannot be parsed. The owner of the namespace can write anything there."""
    too_long = len(chain) > MAX_CHAIN_BYTES or len(key.reveal()) > MAX_KEY_BYTES
    if too_long or chain.count(b"-----BEGIN") > MAX_CHAIN:
        return None
    try:
        return CurrentCertificate(load_key(key), tuple(decode_certificates(chain)))
    except (ValueError, *PARSE_ERRORS):
        return None


def renewal_time(leaf: x509.Certificate) -> datetime:
    """Return when to renew a certificate: 30 days before it expires, or in the last third of its lifetime if that is later.

    The jitter depends only on the certificate, so that a restart does not change the time.
    """
    lifetime = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    before = min(RENEW_BEFORE, lifetime / _LAST_PART)
    jitter = int.from_bytes(hashlib.sha256(leaf.public_bytes(Encoding.DER)).digest()[:4], "big") / 2**32
    return leaf.not_valid_after_utc - before * (1 + _JITTER * jitter)


def overdue_time(leaf: x509.Certificate) -> datetime:
    """Return when the renewal of a certificate is late."""
    return utc(renewal.overdue_time(renewal_time(leaf).timestamp(), leaf.not_valid_after_utc.timestamp()))


def find_condition(
    current: CurrentCertificate,
    annotations: Mapping[str, str],
    desired: DesiredSecret,
    trust: TrustBundle,
    now: datetime,
    *,
    complete: bool = True,
) -> FoundCondition | None:
    """Return why a Secret needs a new certificate; None if its certificate is as desired.

    ``annotations`` are those of the Secret. A Secret of another tool has none; its certificate is kept if it is valid.
    ``complete`` is False if a source has not been read. It can request names that the certificate has in addition, so
    these alone are no condition then.
    """
    return (
        _key_finding(current, desired)
        or _names_finding(current.leaf, desired, complete)
        or _expiry_finding(current, trust, now)
        or _issuer_finding(current, annotations, desired, trust, now)
    )


def _key_finding(current: CurrentCertificate, desired: DesiredSecret) -> FoundCondition | None:
    try:
        certified = current.leaf.public_key()
        key_type = key_type_of(certified)
        if key_type is None or public_bytes(certified) != public_bytes(current.key.public_key()):  # type: ignore[arg-type]  # key_type_of admits PublicKey only
            return FoundCondition(Condition.KEY_MISMATCH)
    except PARSE_ERRORS:
        return FoundCondition(Condition.NOT_PARSABLE)
    if isinstance(current.key, rsa.RSAPrivateKey) and not _is_consistent(current.key):
        return FoundCondition(Condition.KEY_MISMATCH, "the parts of the RSA key contradict each other")
    wanted = desired.options.key_type
    if wanted not in (None, key_type):
        return FoundCondition(Condition.OTHER_KEY_TYPE, f"{key_type.value} in place of {wanted.value}")
    return None


def _is_consistent(key: rsa.RSAPrivateKey) -> bool:
    """Return whether all parts of the key fit (RFC 8017 section 3.2). It was loaded without this check.

    OpenSSL's own check also tests whether the factors are prime, which takes 0.2 s. They are those of a certified modulus.
    """
    numbers = key.private_numbers()
    p, q, d, e = numbers.p, numbers.q, numbers.d, numbers.public_numbers.e
    return (
        min(p, q) > 2
        and p * q == numbers.public_numbers.n
        and d * e % (p - 1) == d * e % (q - 1) == 1
        and (numbers.dmp1, numbers.dmq1) == (d % (p - 1), d % (q - 1))
        and numbers.iqmp * q % p == 1
    )


def has_other_names(leaf: x509.Certificate, desired: DesiredSecret) -> bool:
    """Return whether the certificate has names that a new one would not have."""
    try:
        return not set(names_of(leaf.extensions)) <= set(desired.names)
    except PARSE_ERRORS:
        return False


def longest_wait(finding: FoundCondition | None, leaf: x509.Certificate, settled_at: datetime) -> datetime:
    """Return until when a renewal that would remove names can wait for unread sources, which is before the certificate expires.

    An expiring certificate waits longer than ``settled_at``. An unusable one does not wait.
    """
    if finding is None:
        return datetime.max.replace(tzinfo=UTC)
    if finding.condition in (Condition.NOT_PARSABLE, Condition.KEY_MISMATCH):
        return datetime.min.replace(tzinfo=UTC)
    overdue = overdue_time(leaf)
    return overdue if finding.condition is Condition.EXPIRES_SOON else min(overdue, settled_at)


def _names_finding(leaf: x509.Certificate, desired: DesiredSecret, complete: bool) -> FoundCondition | None:
    try:
        found = set(names_of(leaf.extensions))
    except PARSE_ERRORS:
        return FoundCondition(Condition.NOT_PARSABLE)
    wanted = set(desired.names)
    if not complete and wanted <= found:
        return None
    parts = [
        f"{text} {', '.join(sorted(str(name) for name in names)[:10])}"
        for text, names in (("without", wanted - found), ("in addition", found - wanted))
        if names
    ]
    return FoundCondition(Condition.NAMES_DIFFER, "; ".join(parts)) if parts else None


def _expiry_finding(current: CurrentCertificate, trust: TrustBundle, now: datetime) -> FoundCondition | None:
    if now >= renewal_time(current.leaf):
        return FoundCondition(Condition.EXPIRES_SOON, timestamp(current.leaf.not_valid_after_utc))
    return FoundCondition(Condition.RENEWAL_SUGGESTED) if current.fingerprint in trust.renew_now else None


def _issuer_finding(
    current: CurrentCertificate,
    annotations: Mapping[str, str],
    desired: DesiredSecret,
    trust: TrustBundle,
    now: datetime,
) -> FoundCondition | None:
    issuer = desired.options.issuer
    if annotations.get("issuer", issuer) != issuer:
        return FoundCondition(Condition.OTHER_ISSUER, f"{annotations['issuer']} in place of {issuer}")
    environment = trust.environments.get(issuer, "")
    if environment and annotations.get("environment", environment) != environment:
        return FoundCondition(Condition.OTHER_ENVIRONMENT, f"{annotations['environment']} in place of {environment}")
    if issuer not in trust.sets:
        return None  # its certificates cannot be judged, and the authority would not issue one
    roots = tuple(x509.load_der_x509_certificate(root) for root in trust.sets[issuer].roots)
    if problems := chain_problems(current.chain, roots, now):
        return FoundCondition(Condition.OTHER_ISSUER, "; ".join(problems))
    return None


def utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
