"""Names proven by DNS: pebble in its strict mode, and bind9 that takes updates signed with TSIG."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.core.bundle import parse_certificates
from tests.peers.acme import at_work, dns_names, order_for, site

pytestmark = pytest.mark.peers("pebble", "named", "openssl")


async def test_a_single_name(tmp_path: Path) -> None:
    """A pod's one name is proven and signed for the pod's own key; nothing is left in DNS."""
    async with site(tmp_path) as one:
        issuer = one.issuer()
        async with at_work(issuer):
            order = order_for("shop.example.test")
            issued = await issuer.issue(order)
        assert dns_names(issued.chain) == {"shop.example.test"}
        certificates = parse_certificates(issued.chain, "chain")
        assert certificates[0].public_key() == order.request.public_key
        (root,) = parse_certificates(issued.roots, "roots")
        certificates[-1].verify_directly_issued_by(root)
        assert not issued.identity_included
        assert issued.renew_after is not None
        assert await one.dns.texts("_acme-challenge.shop.example.test") == set()
        assert len(one.ca.orders) == 1
