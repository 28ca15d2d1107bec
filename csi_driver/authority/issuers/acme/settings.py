"""What an administrator says about an ACME issuer, as values; credentials by where they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from csi_driver.core.config.issuers import Source

STAGING = "https://acme-staging-v02.api.letsencrypt.org/directory"
"""Let's Encrypt's for trying things out: its certificates are trusted by no one, its limits are wide."""
PRODUCTION = "https://acme-v02.api.letsencrypt.org/directory"
"""Let's Encrypt's own, the one CA whose roots are known without being told."""
DNS_PATIENCE = timedelta(minutes=2)
HTTP_PATIENCE = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class StorePlace:
    """Where account and orders are kept: a Secret that all replicas share, or a folder of a single one."""

    namespace: str = ""
    name: str = ""
    folder: str = ""
    """Where it is no Secret."""


@dataclass(frozen=True, slots=True)
class ExternalAccount:
    """An account that the CA knows by other means (RFC 8555 section 7.3.4)."""

    key_id: str
    key: Source
    """The MAC key as CAs hand it out: base64url."""


@dataclass(frozen=True, slots=True)
class Dns01:
    """How names are proven by DNS (RFC 8555 section 8.4), with records set by DNS UPDATE (RFC 2136)."""

    server: str
    """The server that takes updates, ``ADDRESS`` or ``ADDRESS:PORT``; the primary of the zone."""
    key: Source | None = None
    """The TSIG key, as :class:`.tsig.TsigKey` is written. None: the server goes by addresses, which its manual calls a bad idea."""
    zone: str | None = None
    """The zone that records go to; None: the one that ``server`` says a name is in."""
    resolvers: tuple[str, ...] = ()
    """Where CNAMEs and servers' addresses are looked up; none: as the system does. For split horizons."""
    nameservers: tuple[str, ...] = ()
    """The servers that must show a record before the CA is told; none: those of the zone's NS records."""
    patience: timedelta = DNS_PATIENCE
    """How long they may take. Secondaries are notified (RFC 1996) and follow in seconds; without that at their refresh."""


@dataclass(frozen=True, slots=True)
class Http01:
    """How names are proven by HTTP (RFC 8555 section 8.3): the authority answers, someone has to lead the CA there."""

    self_test: str | None = None
    """``ADDRESS:PORT`` that the self-test connects to, with each name as Host; None: to port 80 of the name. For clusters
    that can't reach their own load balancer from inside."""
    ingress_class: str | None = None
    """The class of an Ingress that is made for each challenge and removed after it; None: the route is there already."""
    patience: timedelta = HTTP_PATIENCE
    """How long the way to the authority may take to work: load balancers and ingress controllers need a while for a new route."""


@dataclass(frozen=True, slots=True)
class AcmeSettings:
    """One account at one CA, and how names are proven to it."""

    account: StorePlace
    email: str | None = None
    """Whom the CA writes to; part of which account it is."""
    directory: str = STAGING
    terms_agreed: bool = False
    """That the administrator has read and agrees to the CA's terms of service. Nobody else can say so."""
    dns01: Dns01 | None = None
    """Wins over http01 where both are there: it is the one that knows wildcards."""
    http01: Http01 | None = None
    external_account: ExternalAccount | None = None
    ca_file: str | None = None
    """PEM of what the TLS certificate of the directory itself leads to; None: the public CAs."""
    roots_file: str | None = None
    """PEM of what pods are to trust, and what every chain must end at; None for :data:`PRODUCTION` only."""
    profile: str | None = None
    """One of the CA's certificate profiles; None: the CA's default."""
    preferred_chain: str | None = None
    """Common name of the root to choose a chain by, where the CA offers several."""
    while_pending: str | None = None
    """The issuer whose certificate a pod starts with while the CA takes its time; None: the pod waits."""
