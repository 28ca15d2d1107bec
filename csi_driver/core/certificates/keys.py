"""Generate, encode and load private keys, and check the keys of CAs."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
    load_pem_private_key,
)

from csi_driver.core.certificates.der_bounds import UnsupportedKeyType, check_private_key
from csi_driver.core.certificates.parsing import PARSE_ERRORS
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType

_MLDSAPrivateKey = mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey
_MLDSAPublicKey = mldsa.MLDSA44PublicKey | mldsa.MLDSA65PublicKey | mldsa.MLDSA87PublicKey
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | _MLDSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey | _MLDSAPublicKey

_RSA_BITS = {KeyType.RSA_2048: 2048, KeyType.RSA_3072: 3072, KeyType.RSA_4096: 4096}
_CURVES: dict[KeyType, ec.EllipticCurve] = {
    KeyType.EC_P256: ec.SECP256R1(),
    KeyType.EC_P384: ec.SECP384R1(),
    KeyType.EC_P521: ec.SECP521R1(),
}
_ML_DSA: dict[KeyType, tuple[type[_MLDSAPrivateKey], type[_MLDSAPublicKey]]] = {
    KeyType.ML_DSA_44: (mldsa.MLDSA44PrivateKey, mldsa.MLDSA44PublicKey),
    KeyType.ML_DSA_65: (mldsa.MLDSA65PrivateKey, mldsa.MLDSA65PublicKey),
    KeyType.ML_DSA_87: (mldsa.MLDSA87PrivateKey, mldsa.MLDSA87PublicKey),
}
_PEM_KEY = re.compile(rb"-----BEGIN (?:RSA |EC )?PRIVATE KEY-----([A-Za-z0-9+/=\s]+)-----END ")
_MIN_RSA_BITS = 2048
_AUTHORITY_CURVES = frozenset(curve.name for curve in _CURVES.values())
_UNSUPPORTED_KEY = "an unsupported key; use RSA (2048 bits or more), EC P-256, P-384 or P-521, Ed25519 or ML-DSA"


def is_expensive(key_type: KeyType) -> bool:
    """Return True for RSA: a key of 4096 bits needs about half a second of CPU time. All other types need less than 1 ms."""
    return key_type in _RSA_BITS


def generate_key(key_type: KeyType) -> PrivateKey:
    """Generate a key. Don't call this in the event loop for one that :func:`is_expensive`."""
    if key_type is KeyType.ED25519:
        return ed25519.Ed25519PrivateKey.generate()
    if key_type in _RSA_BITS:
        return rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS[key_type])
    if key_type in _ML_DSA:
        return _ML_DSA[key_type][0].generate()
    return ec.generate_private_key(_CURVES[key_type])


def key_type_of(key: object) -> KeyType | None:
    """Return the type of a public key, or None if certmount doesn't sign keys of that type."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        return KeyType.ED25519
    if isinstance(key, rsa.RSAPublicKey):
        return next(
            (kind for kind, bits in _RSA_BITS.items() if bits == key.key_size and key.public_numbers().e == 65537), None
        )
    if isinstance(key, ec.EllipticCurvePublicKey):
        return next((kind for kind, curve in _CURVES.items() if curve.name == key.curve.name), None)
    return next((kind for kind, (_, public) in _ML_DSA.items() if isinstance(key, public)), None)


def encode_key(key: PrivateKey) -> Secret[bytes]:
    """Return unencrypted PKCS#8 in PEM format (RFC 5958)."""
    return Secret(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def load_key(pem: Secret[bytes]) -> PrivateKey:
    """Load PKCS#8, PKCS#1 (RSA) or SEC1 (EC) in PEM format; raise ValueError, which never contains the input.

    The parts of an RSA key can contradict each other. The validation takes 0.2 s and blocks all threads.
    """
    block = _PEM_KEY.search(pem.reveal())
    try:
        der = base64.b64decode(block[1]) if block else b""
        check_private_key(der)
        key: object = load_der_private_key(der, password=None, unsafe_skip_rsa_key_validation=True)
    except UnsupportedKeyType:
        key = None
    except PARSE_ERRORS:
        raise ValueError("not an unencrypted private key in PEM format") from None
    if not isinstance(key, PrivateKey) or key_type_of(key.public_key()) is None:
        raise ValueError("a private key of a type that certmount doesn't support")
    return key


@dataclass(frozen=True, slots=True)
class AuthorityKey:
    """The private key of an administrator's CA, and whether its file is encrypted."""

    key: PrivateKey
    encrypted: bool


def load_authority_key(pem: Secret[bytes], password: Secret[bytes] | None = None) -> AuthorityKey:
    """Load PKCS#8, PKCS#1 (RSA) or SEC1 (EC) in PEM format. Only encrypted keys need the password.

    Raises ValueError in words that follow "is", if there is no supported key or the password is wrong.
    """
    encrypted = b"ENCRYPTED" in pem.reveal()
    if encrypted and (password is None or not password.reveal()):
        raise ValueError("encrypted, and no password is configured")
    try:
        key = load_pem_private_key(pem.reveal(), password.reveal() if encrypted and password is not None else None)
    except PARSE_ERRORS:
        if encrypted:  # a wrong password sometimes decrypts to random bytes without an error
            raise ValueError("encrypted with a different password, or damaged") from None
        raise ValueError("not a private key in PEM format (PKCS#8, PKCS#1 or SEC1)") from None
    if not isinstance(key, PrivateKey):
        raise ValueError(_UNSUPPORTED_KEY)
    if problem := authority_key_problem(key.public_key()):
        raise ValueError(problem)
    return AuthorityKey(key, encrypted)


def authority_key_problem(key: object) -> str | None:
    """Return why a CA can't use a public key, in words that follow "is", or None."""
    curve = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else None
    bits = key.key_size if isinstance(key, rsa.RSAPublicKey) else None
    if bits is not None and bits < _MIN_RSA_BITS:
        return f"an RSA key of {bits} bits; use at least {_MIN_RSA_BITS} bits"
    if not isinstance(key, PublicKey) or (curve is not None and curve not in _AUTHORITY_CURVES):
        return _UNSUPPORTED_KEY
    return None


def generate_key_like(key: PublicKey) -> PrivateKey:
    """Generate a key of the same algorithm and size. RSA is slow, so don't call this in the event loop."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        return ec.generate_private_key(key.curve)
    if isinstance(key, rsa.RSAPublicKey):
        return rsa.generate_private_key(public_exponent=65537, key_size=key.key_size)
    return generate_key(next(kind for kind in KeyType if kind is key_type_of(key)))


def key_fingerprint(key: PublicKey) -> str:
    """Return the SHA-256 (hexadecimal) of :func:`public_bytes`, which identifies a key in logs and RPCs."""
    return hashlib.sha256(public_bytes(key)).hexdigest()


def public_bytes(key: PublicKey) -> bytes:
    """Return the SubjectPublicKeyInfo in DER (RFC 5280 section 4.1.2.7), which is equal for equal keys."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
