"""Names that the authority refuses over gRPC, whatever the node has checked."""

from __future__ import annotations

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from tests.integration.authority.world import NAME, Caller, World


async def test_certificate_without_spiffe_id_needs_a_rule_that_permits_it(idle_world: World) -> None:
    """Also in a request without any name, which no rule can permit."""
    world = idle_world
    world.policy.write_text(world.policy.read_text().replace("without_spiffe_id: true", "without_spiffe_id: false"))
    async with world.running(), world.channel() as channel:
        caller = Caller(world, channel)
        failure = await caller.rejected(without_spiffe_id=True)
        assert (failure.code, failure.reason) == (grpc.StatusCode.PERMISSION_DENIED, "NameNotAllowed")
        problem = 'volumeAttributes.spiffe: "false" is not a value that policy[0] (line 3) allows'
        hint = "omit the attribute, or ask an administrator to set without_spiffe_id in the policy"
        assert failure.text == f"NameNotAllowed: {problem} for {NAME}; {hint}"
        nameless = await caller.rejected(csr=world.csr(), without_spiffe_id=True)
        assert (nameless.reason, "leaves a certificate without a name" in nameless.text) == ("InvalidAttributes", True)


@pytest.mark.parametrize("name", ["xn--a.example.com", "w*.default.svc.cluster.local", "*.com"])
async def test_names_that_no_certificate_can_have_are_rejected_in_a_csr(
    name: str, caller: Caller, world: World
) -> None:
    """A node that does not check them."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    san = x509.SubjectAlternativeName([x509.DNSName(name)])
    csr = builder.add_extension(san, critical=False).sign(world.key, SHA256())
    failure = await caller.rejected(csr=csr.public_bytes(Encoding.DER))
    assert failure.reason == "InvalidCSR"
