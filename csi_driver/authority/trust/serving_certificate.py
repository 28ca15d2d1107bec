"""The authority's serving certificate, and the root that signs only this certificate. Nodes pin the root.

The root is separate from the internal CA, so nodes can reach the authority whatever happens to that CA: a rotation, name
constraints, or a key type that TLS libraries don't support yet. The key of the serving certificate changes with each
renewal and exists only in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import grpc
import structlog
from cryptography import x509

from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.ca.certificates import CAKeyPair, Leaf, make_root, sign_leaf
from csi_driver.authority.ca.keyring_loader import CertificateReader
from csi_driver.authority.storage import Store, Values, serving_part, update
from csi_driver.core.certificates.keys import encode_key, generate_key
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.names import Names
from csi_driver.core.secret import Secret, StoredSecrets
from csi_driver.core.spec import KeyType, Usage
from csi_driver.core.texts import timestamp
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

_LIFETIME = timedelta(hours=24)
_RENEW_AFTER = _LIFETIME * 2 / 3


class ServingCertificate:
    """Renewed after two thirds of its lifetime, and when the signer changes or the clock was set back. Established connections are not affected."""

    def __init__(self, names: Names, metrics: AuthorityMetrics, clock: Callable[[], datetime] = utc_now) -> None:
        self._names = names
        self._metrics = metrics
        self._clock = clock
        self._issuer: x509.Certificate | None = None
        self._issued_at = self._renew_at = clock()
        self._configuration: grpc.ServerCertificateConfiguration | None = None
        self._fetched: grpc.ServerCertificateConfiguration | None = None

    def refresh(self, signer: CAKeyPair) -> grpc.ServerCertificateConfiguration:
        """Return the current key and certificate; first renew them if that is due."""
        now = self._clock()
        # If the clock has been set back, the certificate is not valid yet for nodes whose clocks are right.
        if self._configuration and self._issued_at <= now < self._renew_at and signer.certificate == self._issuer:
            return self._configuration
        key = generate_key(KeyType.EC_P256)
        certificate = sign_leaf(Leaf(key.public_key(), self._names, _LIFETIME, (Usage.SERVER,)), signer, now)
        chain = encode_certificates([certificate, signer.certificate])
        self._configuration = grpc.ssl_server_certificate_configuration([(encode_key(key).reveal(), chain)])
        self._issuer, self._issued_at, self._renew_at = signer.certificate, now, now + _RENEW_AFTER
        self._metrics.serving_expiry.set(certificate.not_valid_after_utc.timestamp())
        not_after = timestamp(certificate.not_valid_after_utc)
        log.info("serving certificate issued", names=str(self._names), not_after=not_after)
        return self._configuration

    def credentials(self, signer: CAKeyPair) -> grpc.ServerCredentials:
        """Return credentials that use the current certificate at each handshake."""
        self._fetched = self.refresh(signer)
        return grpc.dynamic_ssl_server_credentials(
            self._fetched,
            self._fetch,  # type: ignore[arg-type]  # the stub lacks None, which means unchanged
            require_client_authentication=False,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the certificate if it changed, otherwise None. gRPC calls this in its own threads at each handshake."""
        current = self._configuration
        if current is self._fetched:
            return None
        self._fetched = current
        return current


SERVING, SERVING_KEY = "serving.crt", "serving.key"  # the values in the store of the CA
_HINT = "restore the correct value, or delete serving.crt and serving.key to create new ones"


def make_serving_root(now: datetime) -> CAKeyPair:
    """Create a self-signed EC P-256 certificate for ten years. Its subject tells people what it is."""
    return make_root("authority", generate_key(KeyType.EC_P256), now, path_length=0)


def encode_serving_root(root: CAKeyPair) -> Values:
    return {SERVING: Secret(encode_certificates([root.certificate])), SERVING_KEY: encode_key(root.key)}


def load_serving_root(values: Values, now: datetime, *, where: str) -> CAKeyPair | None:
    """Return the root in the values of a store, which ``where`` names in errors; None if neither value exists.

    Raises CertmountError InvalidCA, with all faults.
    """
    reader = CertificateReader(values, f"{where} ", _HINT)
    if not reader.has(SERVING) and not reader.has(SERVING_KEY):
        return None
    certificates, key = reader.certificates(SERVING), reader.key(SERVING_KEY, None)
    if len(certificates) > 1:
        reader.fault(SERVING, f"contains {len(certificates)} certificates; expected one")
    reader.check_self_signed(SERVING, certificates)
    reader.check_key(SERVING_KEY, key, certificates, SERVING)
    for certificate in certificates:
        reader.check_validity(SERVING, certificate, now)
    if reader.faults or key is None:
        raise CertmountError(Reason.INVALID_CA, *reader.faults)
    return CAKeyPair(certificates[0], key.key)


async def current_serving_root(store: Store, now: datetime) -> CAKeyPair:
    """Return the root that all replicas share; create it if the store has none.

    Raises CertmountError InvalidCA for invalid values, or what the store raises.
    """

    async def step(stored: StoredSecrets) -> tuple[Values | None, CAKeyPair]:
        if root := load_serving_root(stored.values, now, where=store.name):
            return None, root
        root = make_serving_root(now)
        return encode_serving_root(root), root

    return await update(serving_part(store), step)
