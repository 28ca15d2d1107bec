"""What an ACME CA can't sign is rejected before an order is created."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.acme.config import AccountStorage, AcmeConfiguration, Dns01, Http01
from csi_driver.authority.issuers.acme.order_rules import order_names
from csi_driver.core.certificates.csr import build_csr, parse_csr
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, ServiceAccount
from csi_driver.core.names import URI, DNSName, EmailAddress, IPAddress, Names, spiffe_id
from csi_driver.core.policy.engine import Grant, RequestedCertificate
from csi_driver.core.spec import KeyType, Usage

DNS = AcmeConfiguration(AccountStorage(directory="/x"), dns01=Dns01("127.0.0.1"))
HTTP = AcmeConfiguration(AccountStorage(directory="/x"), http01=Http01())
POD = PodIdentity(ServiceAccount("web", "edge"), "", "edge-0", "", "", "", 0)
ALL = (Usage.SERVER, Usage.CLIENT)
KEY = ec.generate_private_key(ec.SECP256R1())


def _request(
    names: Names, usages: tuple[Usage, ...] = ALL, requested: RequestedCertificate | None = None
) -> IssuerRequest:
    granted = replace(names, uris=(*names.uris, spiffe_id("cluster.local", "web", "edge")))
    grant = Grant(granted, timedelta(days=1), usages, ())
    return IssuerRequest(parse_csr(build_csr(KEY, names)), grant, POD, requested)


def _dns(*names: str) -> Names:
    return Names.of([DNSName.parse(name) for name in names])


def test_requested_dns_names_are_ordered_without_the_spiffe_id() -> None:
    assert order_names(_request(_dns("b.example.test", "*.example.test")), DNS) == ("*.example.test", "b.example.test")


def test_all_unsupported_parts_are_reported_together() -> None:
    """Other kinds of names, client usages, a lifetime, and wildcards without DNS-01."""
    names = Names.of(
        [DNSName.parse("*.example.test")],
        [URI.parse("spiffe://x/y")],
        [IPAddress.parse("192.0.2.1")],
        [EmailAddress.parse("a@example.test")],
    )
    requested = RequestedCertificate(names, usages=(Usage.CLIENT,), duration=timedelta(hours=1))
    with pytest.raises(CertmountError) as failure:
        order_names(_request(names, requested=requested), HTTP)
    assert failure.value.reason is Reason.NAME_NOT_ALLOWED
    fields = [str(fault).split(":")[0] for fault in failure.value.faults]
    assert fields == ["spiffe", "192.0.2.1", "a@example.test", "usages", "duration", "*.example.test"]


def test_names_of_services_do_not_replace_requested_names() -> None:
    request = _request(Names())
    granted = replace(request.grant, names=_dns("shop.web.svc"))
    with pytest.raises(CertmountError, match="no DNS name is requested"):
        order_names(replace(request, grant=granted), DNS)


def test_client_only_certificates_are_rejected() -> None:
    with pytest.raises(CertmountError, match="public CAs no longer sign client certificates"):
        order_names(_request(_dns("a.example.test"), usages=(Usage.CLIENT,)), DNS)


def test_post_quantum_keys_are_rejected() -> None:
    request = _request(_dns("a.example.test"))
    post_quantum = replace(request, csr=replace(request.csr, key_type=KeyType.ML_DSA_65))
    with pytest.raises(CertmountError, match="do not sign ML-DSA-65 keys yet"):
        order_names(post_quantum, DNS)
