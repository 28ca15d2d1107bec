"""The authority's serving certificate. Its key changes with each renewal and exists only in memory."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import grpc
import structlog
from cryptography import x509

from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.ca.key_pairs import CAKeyPair
from csi_driver.authority.ca.leaf import Leaf, sign_leaf
from csi_driver.core.certificates.keys import encode_key, generate_key
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.names import Names
from csi_driver.core.spec import KeyType, Usage
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

_LIFETIME = timedelta(hours=24)
_RENEW_AFTER = _LIFETIME * 2 / 3


class ServingCertificate:
    """Renewed after two thirds of its lifetime and when the signer changes. Established connections are not affected."""

    def __init__(self, names: Names, metrics: AuthorityMetrics, clock: Callable[[], datetime] = utc_now) -> None:
        self._names = names
        self._metrics = metrics
        self._clock = clock
        self._issuer: x509.Certificate | None = None
        self._renew_at = clock()
        self._configuration: grpc.ServerCertificateConfiguration | None = None
        self._fetched: grpc.ServerCertificateConfiguration | None = None

    def refresh(self, signer: CAKeyPair) -> grpc.ServerCertificateConfiguration:
        """Return the current key and certificate; first renew them if that is due."""
        now = self._clock()
        if self._configuration is not None and now < self._renew_at and signer.certificate == self._issuer:
            return self._configuration
        key = generate_key(KeyType.EC_P256)
        certificate = sign_leaf(Leaf(key.public_key(), self._names, _LIFETIME, (Usage.SERVER,)), signer, now)
        chain = encode_certificates([certificate, signer.certificate])
        self._configuration = grpc.ssl_server_certificate_configuration([(encode_key(key).reveal(), chain)])
        self._issuer, self._renew_at = signer.certificate, now + _RENEW_AFTER
        self._metrics.serving_expiry.set(certificate.not_valid_after_utc.timestamp())
        log.info(
            "serving certificate issued",
            names=str(self._names),
            not_after=f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
        )
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
