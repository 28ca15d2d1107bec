"""What a volume requests, and the certificate that it obtains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.keys import PrivateKey
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.certificates.verification import VerifiedCertificate
from csi_driver.core.formats.file_format import StorePassword, VolumeContents
from csi_driver.core.names import Name
from csi_driver.core.spec import KeyType, Usage
from csi_driver.core.subject import Subject
from csi_driver.node.pods import Pod, PodToken, account_owners
from csi_driver.node.volumes.volume_files import parse_roots


@dataclass(frozen=True, slots=True)
class CertificateRequest:
    """A request for a certificate of one volume."""

    volume_id: str
    pod: Pod
    spec: CertificateSpec
    token: PodToken | None
    late_s: float = math.inf
    """The delay relative to the planned renewal time; infinity for the first certificate of a volume."""

    @property
    def is_renewal(self) -> bool:
        return math.isfinite(self.late_s)


@dataclass(frozen=True, slots=True)
class RequestKey:
    """Identifies requests that one certificate can answer. Without a volume ID, they come from all volumes that share it."""

    namespace: str
    service_account: str
    names: frozenset[Name]
    key_type: KeyType
    usages: frozenset[Usage]
    duration: timedelta | None
    issuer: str
    spiffe: bool
    subject: Subject = Subject()
    volume_id: str = ""

    @classmethod
    def of(cls, pod: Pod, spec: CertificateSpec, volume_id: str = "") -> RequestKey:
        return cls(
            namespace=pod.namespace,
            service_account=pod.service_account,
            names=frozenset(spec.names),
            key_type=spec.key_type,
            usages=frozenset(spec.usages),
            duration=spec.duration,
            issuer=spec.issuer,
            spiffe=spec.spiffe,
            subject=spec.subject,
            volume_id=volume_id,
        )

    @property
    def owners(self) -> tuple[str, ...]:
        return account_owners(self.namespace, self.service_account)


@dataclass(frozen=True, slots=True)
class ObtainedCertificate:
    """A private key, its verified certificate, and the root sets that the volume trusts. Times are unix seconds."""

    key: PrivateKey = field(repr=False)
    verified: VerifiedCertificate
    root_sets: Mapping[str, RootSet]
    issued_at: float
    renew_at: float
    not_after: float
    interim: bool = False  # the certificate is an interim certificate of the internal CA

    def contents(self, roots: Sequence[bytes], password: StorePassword | None = None) -> VolumeContents:
        """Return what the files of a volume with this certificate and these roots (X.509 DER) represent."""
        chain = tuple(self.verified.chain)
        return VolumeContents(self.key, chain, parse_roots(roots), password, self.renew_at)
