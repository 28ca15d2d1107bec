"""What sources request: Secrets with the names and options of their certificates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

from csi_driver.core.cluster.objects import EventTarget
from csi_driver.core.errors import Fault
from csi_driver.core.names import DNSName
from csi_driver.core.spec import KeyType


@dataclass(frozen=True, slots=True, order=True)
class SecretName:
    """The namespace and name of a Secret."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class CertificateOptions:
    """What a source requests, except the names."""

    issuer: str
    key_type: KeyType | None = None  # None: any in an existing Secret, EC-P256 for a new key
    duration: timedelta | None = None
    email: str = ""  # of the ACME account; empty: the issuer's own account
    tsig_secret: str = ""  # NAMESPACE/NAME; empty: the issuer's own key


@dataclass(frozen=True, slots=True)
class SourceRequest:
    """One entry of a source."""

    secret: SecretName
    names: tuple[DNSName, ...]
    options: CertificateOptions
    path: str  # of the entry in the source, such as spec.tls[0]


@dataclass(frozen=True, slots=True)
class Source:
    """An object with its valid requests and the faults of the others, which are of the Secrets ``faulty``; None: of any."""

    target: EventTarget
    requests: Sequence[SourceRequest] = ()
    faults: Sequence[Fault] = ()
    faulty: frozenset[SecretName] | None = frozenset()

    @property
    def order(self) -> tuple[bool, str, str, str]:
        """Of several sources that request one Secret with different options, the first one decides; a list before all others."""
        return self.target.kind != "ConfigMap", self.target.kind, self.target.namespace, self.target.name

    def with_earlier(self, known: Source | None) -> Source:
        """Return the source with what the same object requested before for the Secrets whose requests are not valid now.

        Otherwise a typing error would end the renewals of a Secret, and leave the Secret to other sources. The result has no
        ``faulty``, which would take memory.
        """
        valid = {request.secret for request in self.requests}
        earlier = known.requests if known is not None and self.faults and known.target == self.target else ()
        faulty = (one for one in earlier if self.faulty is None or one.secret in self.faulty)
        requests = (*self.requests, *(one for one in faulty if one.secret not in valid))
        return replace(self, requests=requests, faulty=frozenset())


@dataclass(frozen=True, slots=True)
class DesiredSecret:
    """A Secret as its sources together request it."""

    secret: SecretName
    names: tuple[DNSName, ...]
    options: CertificateOptions
    targets: tuple[EventTarget, ...] = field(compare=False)  # the sources, the one that decides first


@dataclass(frozen=True, slots=True)
class UnreadSources:
    """What has not been read of the sources that can request a Secret."""

    watches: Sequence[str] = ()  # of the Secret's namespace
    lists: Sequence[str] = ()  # KIND/NAMESPACE/NAME

    def of(self, desired: DesiredSecret, source: str) -> Sequence[str]:
        """Return those that can request more names of the Secret, which has this annotation ``source``.

        A list is never united with other sources. So it matters only for the Secrets that it requested, and for these, no
        other source does.
        """
        watches = () if desired.targets[0].kind == "ConfigMap" else self.watches
        return (*watches, *(name for name in self.lists if name == source))
