"""The authority's own certificate, below its own small CA; its key lives in memory only and changes with it."""

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

_LIFE = timedelta(hours=24)
_RENEW_AFTER = _LIFE * 2 / 3


class ServingCertificate:
    """Renewed at two thirds of its life and with each new signer; new handshakes get the new one, old connections go on."""

    def __init__(self, names: Names, metrics: AuthorityMetrics, clock: Callable[[], datetime] = utc_now) -> None:
        self._names = names
        self._metrics = metrics
        self._clock = clock
        self._issuer: x509.Certificate | None = None
        self._renew_at = clock()
        self._configuration: grpc.ServerCertificateConfiguration | None = None
        self._taken: grpc.ServerCertificateConfiguration | None = None

    def refresh(self, signer: CAKeyPair) -> grpc.ServerCertificateConfiguration:
        """Makes a new key and certificate where that is due; the current ones are returned."""
        now = self._clock()
        if self._configuration is not None and now < self._renew_at and signer.certificate == self._issuer:
            return self._configuration
        key = generate_key(KeyType.EC_P256)
        certificate = sign_leaf(Leaf(key.public_key(), self._names, _LIFE, (Usage.SERVER,)), signer, now)
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
        """Credentials that show the certificate which is current at each handshake."""
        self._taken = self.refresh(signer)
        return grpc.dynamic_ssl_server_credentials(
            self._taken,
            self._fetch,  # type: ignore[arg-type]  # the stub forgets None, which stands for no change
            require_client_authentication=False,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC at each handshake, on a thread of its own; None says that nothing changed."""
        current = self._configuration
        if current is self._taken:
            return None
        self._taken = current
        return current
