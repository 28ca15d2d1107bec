"""What is asked for, and what came of it: the values that requests, shared certificates and volumes have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from csi_driver.core.certificates.keys import PrivateKey
from csi_driver.core.certificates.root_sets import RootSet
from csi_driver.core.certificates.verification import VerifiedCertificate
from csi_driver.core.names import Name
from csi_driver.core.spec import CertificateSpec, KeyType, Usage
from csi_driver.node.pods import Pod


@dataclass(frozen=True, slots=True)
class Wanted:
    """A certificate as it is asked for, and for whom: equal where one certificate answers both."""

    namespace: str
    service_account: str
    names: frozenset[Name]
    key_type: KeyType
    usages: frozenset[Usage]
    duration: timedelta | None
    issuer: str
    volume_id: str = ""
    """Whose it is alone; empty where all volumes with the rest in common share it."""

    @classmethod
    def of(cls, pod: Pod, spec: CertificateSpec, volume_id: str = "") -> Wanted:
        """What a volume of a pod asks for; without its id, what it has in common with others."""
        return cls(
            pod.namespace,
            pod.service_account,
            frozenset(spec.names),
            spec.key_type,
            frozenset(spec.usages),
            spec.duration,
            spec.issuer,
            volume_id,
        )


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A key with a certificate that fits, and the sets that came with it for the pod to trust; times in unix seconds."""

    key: PrivateKey = field(repr=False)
    bundle: VerifiedCertificate
    trust: Mapping[str, RootSet]
    issued_at: float
    renew_at: float
    not_after: float
    interim: bool = False
    """The certificate is the internal CA's, and stands in until the one that was asked for is there."""
