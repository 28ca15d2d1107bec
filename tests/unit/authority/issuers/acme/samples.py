"""Orders for the tests of rules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from csi_driver.authority.issuers.acme.state import Block, LiveCertificate, OrderRecord, Proof, names_id

NOW = 1_800_000_000.0
NAMES = ("shop.example.test",)
PROOF = Proof("dns-01", NAMES[0], "token", "value", "_acme-challenge.shop.example.test.", "example.test.")


def record(**changes: Any) -> OrderRecord:
    return replace(OrderRecord("a" * 32, NAMES, b"csr", NOW, NOW), **changes)


def block(**changes: Any) -> Block:
    return replace(Block(names_id(NAMES), NOW + 60, 1, "IssuerUnavailable", "no such record"), **changes)


def live(**changes: Any) -> LiveCertificate:
    ended = NOW + 90 * 86400
    return replace(
        LiveCertificate("a" * 32, names_id(NAMES), "b" * 64, "c.d", ended, NOW + 86400, NOW + 3600), **changes
    )
