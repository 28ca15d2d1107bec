"""Sample records for the tests of rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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


def order(**changes: Any) -> OrderRecord:
    return replace(OrderRecord("a" * 32, NAMES, b"csr", NOW, NOW), **changes)


def backoff(**changes: Any) -> NamesBackoff:
    return replace(NamesBackoff(names_id(NAMES), NOW + 60, 1, "IssuerUnavailable", "no such record"), **changes)


def certificate(**changes: Any) -> TrackedCertificate:
    not_after = NOW + 90 * 86400
    tracked = TrackedCertificate("a" * 32, names_id(NAMES), "b" * 64, "c.d", not_after, NOW + 86400, NOW + 3600)
    return replace(tracked, **changes)
