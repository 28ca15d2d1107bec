"""What an ACME issuer remembers between calls and replicas: values, and their one form in a store."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from csi_driver.core.errors import CertmountError, Fault, Reason

MOST_ORDERS = 200
"""Open and finished ones: with their requests and chains some 3 KB each, beside the megabyte that a Secret may hold."""
MOST_BYTES = 600 * 1024
_MOST_LIVE = 1000
"""Certificates whose renewal is watched: 200 bytes each."""
_MOST_BLOCKS = 500


@dataclass(frozen=True, slots=True)
class Proof:
    """What is shown to the CA for one name: written down before it is shown, struck out after it is removed."""

    kind: str
    """``dns-01`` or ``http-01``."""
    name: str
    token: str
    value: str
    """The TXT record's text, or the key authorization (RFC 8555 section 8.1)."""
    place: str = ""
    """Where the TXT record stands, CNAMEs followed."""
    zone: str = ""


@dataclass(frozen=True, slots=True)
class OrderRecord:
    """One certificate on its way. Times are unix seconds; 0 for what has not happened."""

    id: str
    names: tuple[str, ...]
    csr: bytes
    created_at: float
    asked_at: float
    """When a pod last asked for it, roughly: what nobody asks for is given up."""
    url: str = ""
    """The order at the CA; empty before there is one."""
    replaces: str = ""
    """The certificate that it renews, by the CA's identifier (RFC 9773 section 5)."""
    holder: str = ""
    """The replica that works on it, until ``lease_until``."""
    lease_until: float = 0.0
    retry_at: float = 0.0
    attempts: int = 0
    """Failures in a row."""
    trouble: str = ""
    """The last failure, for people."""
    proofs: tuple[Proof, ...] = ()
    chain: tuple[bytes, ...] = ()
    """X.509 DER, leaf first; there when it is finished."""
    finished_at: float = 0.0
    given_up: bool = False
    """Only its proofs are left to remove."""

    @property
    def is_open(self) -> bool:
        """True while there is a certificate to be had."""
        return not self.finished_at and not self.given_up


@dataclass(frozen=True, slots=True)
class Block:
    """Names that the CA is not asked about before ``until``, because of what it said last."""

    names_id: str
    until: float
    failures: int
    reason: str
    """A word of :class:`csi_driver.core.errors.Reason`."""
    text: str


@dataclass(frozen=True, slots=True)
class LiveCertificate:
    """A certificate that was given out, by what decides on its renewal."""

    order_id: str
    names_id: str
    key_sha256: str
    certificate_id: str
    """RFC 9773 section 4.1."""
    not_after: float
    renew_at: float
    look_at: float
    """When to ask the CA again about its renewal."""


@dataclass(frozen=True, slots=True)
class State:
    """All of it."""

    orders: tuple[OrderRecord, ...] = ()
    blocks: tuple[Block, ...] = ()
    live: tuple[LiveCertificate, ...] = ()

    def order(self, order_id: str) -> OrderRecord | None:
        return next((order for order in self.orders if order.id == order_id), None)

    def block(self, names: Iterable[str], now: float) -> Block | None:
        """What stands against these names at the moment."""
        wanted = names_id(names)
        return next((block for block in self.blocks if block.names_id == wanted and block.until > now), None)

    def failures(self, names: Iterable[str]) -> int:
        """How often in a row the CA has refused these names."""
        wanted = names_id(names)
        return next((block.failures for block in self.blocks if block.names_id == wanted), 0)

    def live_certificate(self, order_id: str) -> LiveCertificate | None:
        return next((one for one in self.live if one.order_id == order_id), None)

    def with_order(self, order: OrderRecord) -> State:
        """With this order in the place of the one of its id, or added."""
        others = tuple(one for one in self.orders if one.id != order.id)
        return dataclasses.replace(self, orders=(*others, order))

    def without_order(self, order_id: str) -> State:
        return dataclasses.replace(self, orders=tuple(one for one in self.orders if one.id != order_id))

    def with_block(self, block: Block) -> State:
        others = tuple(one for one in self.blocks if one.names_id != block.names_id)
        return dataclasses.replace(self, blocks=(*others, block)[-_MOST_BLOCKS:])

    def without_block(self, names: Iterable[str]) -> State:
        wanted = names_id(names)
        return dataclasses.replace(self, blocks=tuple(one for one in self.blocks if one.names_id != wanted))

    def with_live(self, certificate: LiveCertificate) -> State:
        others = tuple(one for one in self.live if one.order_id != certificate.order_id)
        return dataclasses.replace(self, live=(*others, certificate)[-_MOST_LIVE:])

    def without_live(self, certificate_id: str) -> State:
        return dataclasses.replace(self, live=tuple(one for one in self.live if one.certificate_id != certificate_id))


def names_id(names: Iterable[str]) -> str:
    """The same for the same names in any order."""
    return hashlib.sha256("\n".join(sorted(set(names))).encode()).hexdigest()[:32]


def order_id(names: Iterable[str], public_key: bytes) -> str:
    """The same for the same names and key (SubjectPublicKeyInfo, DER)."""
    return hashlib.sha256(f"{names_id(names)} {hashlib.sha256(public_key).hexdigest()}".encode()).hexdigest()[:32]


def encode(state: State) -> bytes:
    """As it lies in the store: JSON; intermediates, which most chains share, stand in it once."""
    pool: dict[bytes, int] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return pool.setdefault(value, len(pool))
        if isinstance(value, tuple):
            return [plain(one) for one in value]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return value

    document = plain(state)
    document["pool"] = [base64.b64encode(value).decode("ascii") for value in pool]
    return json.dumps(document, separators=(",", ":")).encode("ascii")


def decode(content: bytes, where: str) -> State:
    """Reads what :func:`encode` wrote; raises CertmountError IssuerUnavailable where it is something else."""
    try:
        document = json.loads(content)
        pool = [base64.b64decode(text, validate=True) for text in document["pool"]]
        return State(
            tuple(_order(one, pool) for one in document["orders"]),
            tuple(Block(**one) for one in document["blocks"]),
            tuple(LiveCertificate(**one) for one in document["live"]),
        )
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        fault = Fault(where, "holds orders that cannot be read", "remove its value orders.json; open orders begin anew")
        raise CertmountError(Reason.ISSUER_UNAVAILABLE, fault) from None


def _order(document: dict[str, Any], pool: list[bytes]) -> OrderRecord:
    return OrderRecord(
        **{
            **document,
            "names": tuple(document["names"]),
            "csr": pool[document["csr"]],
            "chain": tuple(pool[index] for index in document["chain"]),
            "proofs": tuple(Proof(**proof) for proof in document["proofs"]),
        }
    )
