"""Sample records for the tests of rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from csi_driver.authority.issuers.acme.state import (
    ChallengeRecord,
    NamesBackoff,
    OrderRecord,
    TrackedCertificate,
    names_id,
)

NOW = 1_800_000_000.0
NAMES = ("shop.example.test",)
CHALLENGE = ChallengeRecord("dns-01", NAMES[0], "token", "value", "_acme-challenge.shop.example.test.", "example.test.")


REQUESTER = "service account web/edge"
_T = TypeVar("_T", OrderRecord, NamesBackoff, TrackedCertificate)


def order(**changes: Any) -> OrderRecord:
    return _changed(OrderRecord("a" * 32, NAMES, b"csr", NOW, NOW, requester=REQUESTER), changes)


def backoff(**changes: Any) -> NamesBackoff:
    known = NamesBackoff(names_id(NAMES), NOW + 60, 1, "IssuerUnavailable", "no such record", REQUESTER)
    return _changed(known, changes)


def certificate(**changes: Any) -> TrackedCertificate:
    not_after = NOW + 90 * 86400
    tracked = TrackedCertificate(
        "a" * 32, names_id(NAMES), "b" * 64, "c.d", not_after, NOW + 86400, NOW + 3600, REQUESTER
    )
    return _changed(tracked, changes)


def _changed(record: _T, changes: dict[str, Any]) -> _T:
    """Return the record with the changes; ``account`` is the service account that requested it."""
    if account := changes.pop("account", ""):
        changes["requester"] = f"service account {account}"
    return replace(record, **changes)
