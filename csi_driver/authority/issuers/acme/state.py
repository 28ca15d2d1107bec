"""The state of an ACME issuer, which all replicas share: immutable values, and their JSON form."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from csi_driver.authority.issuers import issuer_unavailable
from csi_driver.core.bounded_json import loads_bounded

MAX_BYTES = 750 * 1024
"""Of the encoded state; a Secret can hold 1 MiB."""
_MAX_VALUES = 100_000
_RECORD_BYTES = 350  # The encoded fields of fixed length, and their names
_CHALLENGE_BYTES = 350
_CHAIN_BYTES = 1200  # The leaf, which certificates of public CAs rarely exceed; most chains share the intermediates


@dataclass(frozen=True, slots=True)
class ChallengeRecord:
    """The response to one challenge. It is stored before it is published, and removed after it is unpublished."""

    kind: str  # `dns-01` or `http-01`
    name: str
    token: str
    value: str  # The text of the TXT record, or the key authorization (RFC 8555 section 8.1)
    record_name: str = ""  # The name of the TXT record, after following CNAMEs
    zone: str = ""

    @property
    def published(self) -> str:
        """What is published, for people."""
        if self.record_name:
            return f"{self.record_name} TXT {self.value}"
        return f"http://{self.name}/.well-known/acme-challenge/{self.token}"


@dataclass(frozen=True, slots=True)
class OrderRecord:
    """One order. Times are Unix seconds; 0 if something has not happened."""

    id: str
    names: tuple[str, ...]
    csr: bytes
    created_at: float
    requested_at: float  # When a pod last requested it, to some minutes; abandoned if nothing requests it
    url: str = ""  # The order at the CA; empty before it exists
    replaces: str = ""  # The identifier of the certificate that it renews (RFC 9773 section 5)
    holder: str = ""  # The replica that processes it until `lease_until`
    lease_until: float = 0.0
    retry_at: float = 0.0
    failures: int = 0  # Consecutive failures
    problem: str = ""  # The last failure, for people
    challenges: tuple[ChallengeRecord, ...] = ()
    chain: tuple[bytes, ...] = ()  # X.509 DER, leaf first; set when the order is finished
    finished_at: float = 0.0
    abandoned: bool = False  # Only its challenges remain to be removed
    requester: str = ""  # Who first requested it: `service account NAMESPACE/NAME`, or `secret NAMESPACE/NAME`
    email: str = ""  # Of the account that orders it; empty: the issuer's own account
    tsig_secret: str = ""  # NAMESPACE/NAME of the Secret whose key changes DNS; empty: the issuer's own key

    @property
    def owners(self) -> tuple[str, str]:
        return owners(self.requester)

    @property
    def size(self) -> int:
        """About the bytes of the encoded record, with its challenges; those of an open order include its certificate."""
        names = sum((len(name) + 4) * (1 if self.finished_at else 4) for name in self.names)
        challenges = _CHALLENGE_BYTES * (len(self.challenges) if self.finished_at else len(self.names))
        leaf = len(self.chain[0]) if self.chain else _CHAIN_BYTES + len(self.csr)
        texts = sum(map(len, (self.url, self.requester, self.problem, self.email, self.tsig_secret)))
        return _RECORD_BYTES + 200 + names + challenges + (len(self.csr) + leaf) * 4 // 3 + texts

    @property
    def is_open(self) -> bool:
        return not self.finished_at and not self.abandoned

    @property
    def is_unfinished(self) -> bool:
        """True if a replica must still process it: it is open, or its challenges remain to be removed."""
        return self.is_open or bool(self.challenges)

    def with_challenges(self, added: Iterable[ChallengeRecord]) -> OrderRecord:
        return replace(self, challenges=tuple(dict.fromkeys((*self.challenges, *added))))

    def without_challenge(self, removed: ChallengeRecord) -> OrderRecord:
        return replace(self, challenges=tuple(one for one in self.challenges if one != removed))


@dataclass(frozen=True, slots=True)
class NamesBackoff:
    """Names for which the issuer creates no order before ``until``, because the CA rejected the last one."""

    names_id: str
    until: float
    failures: int
    reason: str  # A word of :class:`csi_driver.core.errors.Reason`
    text: str
    requester: str = ""  # As :attr:`OrderRecord.requester`
    failed_at: float = 0.0  # When the CA last rejected an order for a reason that counts as a failure

    @property
    def owners(self) -> tuple[str, str]:
        return owners(self.requester)

    @property
    def size(self) -> int:
        return _RECORD_BYTES + len(self.text) + len(self.requester)


@dataclass(frozen=True, slots=True)
class TrackedCertificate:
    """An issued certificate, and when to renew it."""

    order_id: str
    names_id: str
    key_sha256: str
    certificate_id: str  # RFC 9773 section 4.1
    not_after: float
    renew_at: float
    check_at: float  # When to fetch renewal information again
    requester: str = ""  # As :attr:`OrderRecord.requester`
    email: str = ""  # As :attr:`OrderRecord.email`
    early: bool = False  # the CA has moved the renewal forward: it may have revoked the certificate

    @property
    def owners(self) -> tuple[str, str]:
        return owners(self.requester)

    @property
    def size(self) -> int:
        return _RECORD_BYTES - 35 + len(self.certificate_id) + len(self.requester) + len(self.email)


@dataclass(frozen=True, slots=True)
class AcmeState:
    """The whole state."""

    orders: tuple[OrderRecord, ...] = ()
    backoffs: tuple[NamesBackoff, ...] = ()
    certificates: tuple[TrackedCertificate, ...] = ()

    def order(self, order_id: str) -> OrderRecord | None:
        return next((order for order in self.orders if order.id == order_id), None)

    def backoff(self, names: Iterable[str], now: float) -> NamesBackoff | None:
        key = names_id(names)
        return next((one for one in self.backoffs if one.names_id == key and one.until > now), None)

    def failures(self, names: Iterable[str]) -> int:
        key = names_id(names)
        return next((one.failures for one in self.backoffs if one.names_id == key), 0)

    def certificate(self, order_id: str) -> TrackedCertificate | None:
        return next((one for one in self.certificates if one.order_id == order_id), None)

    def with_order(self, order: OrderRecord) -> AcmeState:
        return replace(self, orders=(*self.without_order(order.id).orders, order))

    def without_order(self, order_id: str) -> AcmeState:
        return replace(self, orders=tuple(one for one in self.orders if one.id != order_id))

    def with_backoff(self, backoff: NamesBackoff) -> AcmeState:
        others = (one for one in self.backoffs if one.names_id != backoff.names_id)
        return replace(self, backoffs=(*others, backoff))

    def without_backoff(self, names: Iterable[str]) -> AcmeState:
        key = names_id(names)
        return replace(self, backoffs=tuple(one for one in self.backoffs if one.names_id != key))

    def with_certificate(self, certificate: TrackedCertificate) -> AcmeState:
        others = (one for one in self.certificates if one.order_id != certificate.order_id)
        return replace(self, certificates=(*others, certificate))

    def without_certificate(self, certificate_id: str) -> AcmeState:
        kept = tuple(one for one in self.certificates if one.certificate_id != certificate_id)
        return replace(self, certificates=kept)


def owners(requester: str) -> tuple[str, str]:
    """Return the owners of a record for :class:`csi_driver.core.shares.FairShares`, the largest first."""
    return f"namespace {requester.partition('/')[0].rpartition(' ')[2]}", requester


def names_id(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(set(names))).encode()).hexdigest()[:32]


def order_id(names: Iterable[str], public_key: bytes, email: str = "", tsig_secret: str = "") -> str:
    """Return an identifier of a set of names, a key (SubjectPublicKeyInfo, DER), an account and a TSIG key."""
    parts = names_id(names), hashlib.sha256(public_key).hexdigest(), email, tsig_secret
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]


def encode(state: AcmeState) -> bytes:
    """Return JSON that contains equal byte strings once, because most chains share their intermediates."""
    pool: dict[bytes, int] = {}
    dump = functools.partial(json.dumps, separators=(",", ":"), default=lambda value: pool.setdefault(value, len(pool)))
    document = dump(dataclasses.asdict(state))  # replaces byte strings with their index in the pool
    texts = dump([base64.b64encode(value).decode("ascii") for value in pool])
    return f'{{"state":{document},"pool":{texts}}}'.encode("ascii")


def decode(content: bytes, store: str) -> AcmeState:
    """Decode the result of :func:`encode`; raise CertmountError IssuerUnavailable for other content."""
    try:
        document = loads_bounded(content, max_bytes=MAX_BYTES, max_values=_MAX_VALUES)
        pool, state = [base64.b64decode(text, validate=True) for text in document["pool"]], document["state"]
        return AcmeState(
            tuple(_decode_order(one, pool) for one in state["orders"]),
            tuple(NamesBackoff(**one) for one in state["backoffs"]),
            tuple(TrackedCertificate(**one) for one in state["certificates"]),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        hint = "remove the value orders.json to start all open orders again"
        raise issuer_unavailable(store, "contains orders that cannot be parsed", hint) from None


def _decode_order(document: dict[str, Any], pool: list[bytes]) -> OrderRecord:
    return OrderRecord(
        **{
            **document,
            "names": tuple(document["names"]),
            "csr": pool[document["csr"]],
            "chain": tuple(pool[index] for index in document["chain"]),
            "challenges": tuple(ChallengeRecord(**one) for one in document["challenges"]),
        }
    )
