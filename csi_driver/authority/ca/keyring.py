"""The keyring of the internal CA: trusted roots, and an intermediate that signs leaf certificates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.ca.certificates import CAKeyPair, make_intermediate, make_root, renew_intermediate
from csi_driver.core.certificates.keys import PrivateKey, encode_key, generate_key, key_type_of
from csi_driver.core.certificates.name_constraints import NameConstraintSet
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType

ROOT, ROOT_KEY, INTERMEDIATE, INTERMEDIATE_KEY = "root.crt", "root.key", "intermediate.crt", "intermediate.key"
KEYRING_FILES = (ROOT, ROOT_KEY, INTERMEDIATE, INTERMEDIATE_KEY)
AUTHORITY_KEY_TYPES = tuple(key_type for key_type in KeyType if key_type is not KeyType.RSA_2048)
"""The key types of a new CA. RSA with 2048 bits is too weak for a root that lives ten years."""
_RENEWAL_FRACTION = 2 / 3
"""The remaining third of an intermediate's lifetime is far longer than the lifetime of any leaf certificate."""
_MAX_NOTICE = timedelta(days=90)


@dataclass(frozen=True, slots=True)
class CAProfile:
    """The properties of a new CA."""

    key_type: KeyType | None = None
    """Of root and intermediate. None means EC P-384 for the root and the faster EC P-256 for the intermediate."""
    permitted: tuple[x509.GeneralName, ...] = ()
    """Name constraints (RFC 5280 section 4.2.1.10). Without any, the CA can sign every name."""
    excluded: tuple[x509.GeneralName, ...] = ()
    """Taken from the current CA only: no option sets it, but an administrator's own CA can have excluded names."""
    path_length: int = 1  # of the root: how many intermediates it allows in a chain, at least 1

    @property
    def constraints(self) -> x509.NameConstraints | None:
        if not self.permitted and not self.excluded:
            return None
        return x509.NameConstraints(self.permitted or None, self.excluded or None)


DEFAULT_PROFILE = CAProfile()


@dataclass(frozen=True, slots=True)
class ExpiringCertificate:
    """A certificate of the CA that certmount can't renew and that expires soon."""

    name: str
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Keyring:
    """All keys and certificates of a CA."""

    roots: tuple[x509.Certificate, ...]  # The trusted roots. The chain of the intermediate ends at the first root.
    root_key: PrivateKey | None  # the key of the first root; None if it is kept offline
    intermediate: CAKeyPair
    chain: tuple[x509.Certificate, ...] = ()
    """Other intermediates between the signing intermediate and the root, from its issuer upwards."""
    encrypted: bool = False  # true if a key was read from an encrypted file
    source: Mapping[str, Secret[bytes]] = field(default_factory=dict, repr=False, compare=False)
    """The values that the keyring was read from, without a prefix; empty for a new keyring."""

    @property
    def root(self) -> x509.Certificate:
        return self.roots[0]

    @property
    def valid_from(self) -> datetime:
        """When all certificates between a leaf certificate and its root are valid."""
        return max(each.not_valid_before_utc for each in (self.root, *self.intermediates))

    @property
    def valid_until(self) -> datetime:
        """When the first certificate between a leaf certificate and its root expires."""
        return min(each.not_valid_after_utc for each in (self.root, *self.intermediates))

    @property
    def renewable(self) -> bool:
        """True if certmount can sign a new intermediate and store it.

        False if the root key is kept offline, if the issuer's key is missing because there are further intermediates,
        or if a key is encrypted, because the new key would be stored unencrypted.
        """
        return self.root_key is not None and not self.chain and not self.encrypted

    def intermediate_due(self, now: datetime) -> bool:
        """Return True if two thirds of the intermediate's lifetime have passed and certmount can renew it.

        An intermediate that is valid as long as the root is never due, because a new one would not be valid longer.
        """
        certificate = self.intermediate.certificate
        if certificate.not_valid_after_utc >= self.root.not_valid_after_utc:
            return False
        lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        return self.renewable and now >= certificate.not_valid_before_utc + lifetime * _RENEWAL_FRACTION

    def renew_intermediate(self, now: datetime) -> Keyring:
        """Return a keyring with a new intermediate. Earlier leaf certificates stay valid: each comes with its chain.

        Raises ValueError if the keyring is not :attr:`renewable`.
        """
        if self.root_key is None or not self.renewable:
            raise ValueError("certmount can't renew the intermediate of this keyring")
        former = self.intermediate.certificate
        return Keyring(self.roots, self.root_key, renew_intermediate(CAKeyPair(self.root, self.root_key), former, now))

    def expiring(self, now: datetime) -> tuple[ExpiringCertificate, ...]:
        """Return the certificates that an administrator must replace soon: in the last third of their lifetime, at most 90 days."""
        certificates = [(ROOT, self.root), *((INTERMEDIATE, certificate) for certificate in self.chain)]
        if not self.renewable:
            certificates.append((INTERMEDIATE, self.intermediate.certificate))
        return tuple(
            ExpiringCertificate(name, each.not_valid_after_utc)
            for name, each in certificates
            if each.not_valid_after_utc - now
            < min((each.not_valid_after_utc - each.not_valid_before_utc) / 3, _MAX_NOTICE)
        )

    @property
    def intermediates(self) -> tuple[x509.Certificate, ...]:
        """The chain of a leaf certificate in the order of a TLS server's Certificate message (RFC 8446 section 4.4.2)."""
        return (self.intermediate.certificate, *self.chain)

    @property
    def roots_der(self) -> tuple[bytes, ...]:
        return tuple(root.public_bytes(Encoding.DER) for root in self.roots)

    @property
    def roots_pem(self) -> bytes:
        return encode_certificates(self.roots)


def make_keyring(now: datetime, profile: CAProfile = DEFAULT_PROFILE) -> Keyring:
    """Create a CA with a root for ten years and an intermediate for one year.

    Both certificates contain the name constraints: the root so that a stolen root key is constrained too, and the
    intermediate because verifiers may ignore the constraints of a trusted root (RFC 5280 section 6.1).
    """
    root_type, intermediate_type = profile.key_type or KeyType.EC_P384, profile.key_type or KeyType.EC_P256
    extra = [profile.constraints] if profile.constraints else []
    root = make_root("root", generate_key(root_type), now, path_length=profile.path_length, extra=extra)
    return Keyring((root.certificate,), root.key, make_intermediate(root, generate_key(intermediate_type), now, extra))


def profile_of(keyring: Keyring) -> CAProfile:
    """Return the profile for a successor with keys of the same type and the same name constraints."""
    types = {key_type_of(certificate.public_key()) for certificate in (keyring.root, keyring.intermediate.certificate)}
    key_type = types.pop() if len(types) == 1 else None
    permitted: dict[type[x509.GeneralName], list[x509.GeneralName]] = {}
    excluded: list[x509.GeneralName] = []
    for constraints in NameConstraintSet.of((*keyring.intermediates, keyring.root)).constraints:
        subtrees = constraints.permitted_subtrees or []
        # If several certificates constrain a type of name, the lowest is the narrowest.
        for name_type in dict.fromkeys(type(subtree) for subtree in subtrees if type(subtree) not in permitted):
            permitted[name_type] = [subtree for subtree in subtrees if type(subtree) is name_type]
        excluded += constraints.excluded_subtrees or []
    path_length = keyring.root.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
    return CAProfile(
        key_type if key_type in AUTHORITY_KEY_TYPES else None,
        tuple(subtree for subtrees in permitted.values() for subtree in subtrees),
        tuple(dict.fromkeys(excluded)),
        max(path_length or 1, 1),
    )


def encode_keyring(keyring: Keyring, prefix: str = "") -> Mapping[str, Secret[bytes]]:
    """Return the values for a store (PEM); :func:`~csi_driver.authority.ca.keyring_loader.load_keyring` reads them.

    Values that came from a store are returned unchanged, so an encrypted key stays encrypted.
    """
    values = dict(keyring.source) or {
        ROOT: Secret(keyring.roots_pem),
        INTERMEDIATE: Secret(encode_certificates(keyring.intermediates)),
        INTERMEDIATE_KEY: encode_key(keyring.intermediate.key),
    }
    if not keyring.source and keyring.root_key is not None:
        values[ROOT_KEY] = encode_key(keyring.root_key)
    return {prefix + name: value for name, value in values.items()}
