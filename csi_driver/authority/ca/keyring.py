"""The internal CA's keys and certificates: roots that are trusted, and an intermediate that signs leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from csi_driver.authority.ca.key_pairs import CAKeyPair, make_intermediate, make_root, renew_intermediate
from csi_driver.core.certificates.keys import PrivateKey, encode_key, generate_key, key_type_of
from csi_driver.core.certificates.name_constraints import NameConstraintSet
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType

ROOT, ROOT_KEY, INTERMEDIATE, INTERMEDIATE_KEY = "root.crt", "root.key", "intermediate.crt", "intermediate.key"
KEYRING_FILES = (ROOT, ROOT_KEY, INTERMEDIATE, INTERMEDIATE_KEY)
"""The values of a keyring in a store."""
AUTHORITY_KEY_TYPES = tuple(key_type for key_type in KeyType if key_type is not KeyType.RSA_2048)
"""For a CA that is made here; RSA of 2048 bits is not to be believed for ten years."""
_RENEW_AT = 2 / 3
"""Of an intermediate's life; the third that is left is far longer than any leaf's life."""
_MOST_NOTICE = timedelta(days=90)


@dataclass(frozen=True, slots=True)
class CAProfile:
    """How a CA is made. ``path_length`` is the root's: how many intermediates one below the other it allows, at least 1."""

    key_type: KeyType | None = None
    """Of root and intermediate; None: EC P-384 for the root, EC P-256 for the intermediate that signs all day."""
    permitted: tuple[x509.GeneralName, ...] = ()
    """Name constraints (RFC 5280 section 4.2.1.10); none: any name."""
    excluded: tuple[x509.GeneralName, ...] = ()
    """Likewise; nobody writes them, but a CA that someone brought may have them."""
    path_length: int = 1

    @property
    def constraints(self) -> x509.NameConstraints | None:
        """As certificates hold them."""
        if not self.permitted and not self.excluded:
            return None
        return x509.NameConstraints(self.permitted or None, self.excluded or None)


DEFAULT_PROFILE = CAProfile()


@dataclass(frozen=True, slots=True)
class ExpiringCertificate:
    """A certificate of the CA that nobody renews but its owner."""

    name: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Keyring:
    """A whole CA."""

    roots: tuple[x509.Certificate, ...]
    """What is trusted; the first is the one that the intermediate's chain leads to."""
    root_key: PrivateKey | None
    """The first root's; None where it is kept offline."""
    intermediate: CAKeyPair
    chain: tuple[x509.Certificate, ...] = ()
    """Further intermediates from the signing one's issuer on; the root is not among them."""
    encrypted: bool = False
    """True where a key lay encrypted."""
    source: Mapping[str, Secret[bytes]] = field(default_factory=dict, repr=False, compare=False)
    """The values that it was read from, without a prefix; none for one that was made here."""

    @property
    def root(self) -> x509.Certificate:
        """The root that the intermediate's chain leads to."""
        return self.roots[0]

    @property
    def renewable(self) -> bool:
        """True where a new intermediate can be signed here and saved.

        Not where the root's key is elsewhere; nor below further intermediates, whose keys are not here; nor where a
        key is encrypted, as the new one would lie beside it in clear.
        """
        return self.root_key is not None and not self.chain and not self.encrypted

    def intermediate_due(self, now: datetime) -> bool:
        """True when the intermediate is past two thirds of its life, and can be renewed here."""
        certificate = self.intermediate.certificate
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        return self.renewable and now >= certificate.not_valid_before_utc + life * _RENEW_AT

    def renew_intermediate(self, now: datetime) -> Keyring:
        """The same root over a new intermediate. Leaves of the old one stay valid, as each brings its own chain.

        Raises:
            ValueError: where the keyring is not :attr:`renewable`.
        """
        if self.root_key is None or not self.renewable:
            raise ValueError("this keyring's intermediate is renewed by its owner")
        former = self.intermediate.certificate
        return Keyring(self.roots, self.root_key, renew_intermediate(CAKeyPair(self.root, self.root_key), former, now))

    def expiring(self, now: datetime) -> tuple[ExpiringCertificate, ...]:
        """The certificates that their owner must replace soon: in the last third of their life, at most 90 days before the end."""
        own = [(ROOT, self.root), *((INTERMEDIATE, certificate) for certificate in self.chain)]
        if not self.renewable:
            own.append((INTERMEDIATE, self.intermediate.certificate))
        return tuple(
            ExpiringCertificate(name, certificate.not_valid_after_utc)
            for name, certificate in own
            if certificate.not_valid_after_utc - now < _notice(certificate)
        )

    @property
    def intermediates(self) -> tuple[x509.Certificate, ...]:
        """What a leaf travels with, in the order that TLS servers send (RFC 8446 section 4.4.2)."""
        return (self.intermediate.certificate, *self.chain)

    @property
    def roots_der(self) -> tuple[bytes, ...]:
        """The trusted certificates, X.509 DER."""
        return tuple(root.public_bytes(Encoding.DER) for root in self.roots)

    @property
    def roots_pem(self) -> bytes:
        """The trusted certificates, PEM."""
        return encode_certificates(self.roots)


def make_keyring(now: datetime, design: CAProfile = DEFAULT_PROFILE) -> Keyring:
    """Makes a new CA: a root of ten years and an intermediate of one.

    Name constraints stand in both certificates: in the root, so that whoever has its key gets no further; in the
    intermediate, as verifiers need not look at what a trusted root says of itself (RFC 5280 section 6.1).
    """
    root_type, type_below = design.key_type or KeyType.EC_P384, design.key_type or KeyType.EC_P256
    extra = [design.constraints] if design.constraints else []
    root = make_root("root", generate_key(root_type), now, path_length=design.path_length, extra=extra)
    return Keyring((root.certificate,), root.key, make_intermediate(root, generate_key(type_below), now, extra))


def profile_of(keyring: Keyring) -> CAProfile:
    """How a CA is made that takes this one's place: with keys of the same kind and for the same names."""
    kinds = {key_type_of(certificate.public_key()) for certificate in (keyring.root, keyring.intermediate.certificate)}
    kind = kinds.pop() if len(kinds) == 1 else None
    permitted: dict[type[x509.GeneralName], list[x509.GeneralName]] = {}
    excluded: list[x509.GeneralName] = []
    for constraints in NameConstraintSet.of((*keyring.intermediates, keyring.root)).constraints:
        trees = constraints.permitted_subtrees or []
        # Of a kind that several certificates constrain the lowest counts, as it is within the others.
        for other in dict.fromkeys(type(tree) for tree in trees if type(tree) not in permitted):
            permitted[other] = [tree for tree in trees if type(tree) is other]
        excluded += constraints.excluded_subtrees or []
    length = keyring.root.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
    return CAProfile(
        kind if kind in AUTHORITY_KEY_TYPES else None,
        tuple(tree for trees in permitted.values() for tree in trees),
        tuple(dict.fromkeys(excluded)),
        max(length or 1, 1),
    )


def encode_keyring(keyring: Keyring, prefix: str = "") -> Mapping[str, Secret[bytes]]:
    """The values for a store, PEM; :func:`csi_driver.authority.ca.keyring_loader.load_keyring` reads them back.

    What was read from a store goes back as it was, so an encrypted key stays encrypted.
    """
    values = dict(keyring.source) or {
        ROOT: Secret(keyring.roots_pem),
        INTERMEDIATE: Secret(encode_certificates(keyring.intermediates)),
        INTERMEDIATE_KEY: encode_key(keyring.intermediate.key),
    }
    if not keyring.source and keyring.root_key is not None:
        values[ROOT_KEY] = encode_key(keyring.root_key)
    return {prefix + name: value for name, value in values.items()}


def _notice(certificate: x509.Certificate) -> timedelta:
    return min((certificate.not_valid_after_utc - certificate.not_valid_before_utc) / 3, _MOST_NOTICE)
