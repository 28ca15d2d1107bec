"""If clocks differ, the error says between whom, by how much, and what to do."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import KeyType
from csi_driver.node.authority_client import AuthorityClient
from csi_driver.rpc import errors
from tests.integration.node.world import Node, failure_of
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import ScriptedAuthority

pytestmark = pytest.mark.asyncio(loop_scope="module")

CLOCKS = "the clocks of node {} and the authority differ by about {}; synchronize them"


def shift(authority: ScriptedAuthority, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(errors, "time", SimpleNamespace(time=lambda: time.time() + seconds))
    monkeypatch.setattr(authority.ca, "ahead", timedelta(seconds=seconds))


@pytest.mark.parametrize(
    "seconds, duration, difference, problem",
    [
        (90, "1h", "90 s", "is not valid before"),
        (7200, "24h", "2 h", "is not valid before"),
        (-90, "60s", "90 s", "expired at"),
        (-15, "10s", "15 s", "expired at"),
        (-7200, "1h", "2 h", "expired at"),
        (-150_000, "1h", "42 h", "expired at"),
    ],
)
async def test_certificate_that_the_clocks_make_invalid(
    node: Node, monkeypatch: pytest.MonkeyPatch, seconds: float, duration: str, difference: str, problem: str
) -> None:
    shift(node.authority, monkeypatch, seconds)
    pod = FakePod()
    failure = await failure_of(node.publish(node.request(pod, {"duration": duration})))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "ClockSkew")
    expected = CLOCKS.format(r"\S+", difference)
    assert re.match(rf"ClockSkew: {expected} \(certificate from the authority: chain\[0\] {problem} ", failure.text)


@pytest.mark.parametrize("seconds", [50, -50])
async def test_small_differences_have_no_effect(node: Node, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    shift(node.authority, monkeypatch, seconds)
    await node.published(attributes={"duration": "2m"})


async def test_rejected_token_names_the_difference(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    shift(node.authority, monkeypatch, 90)
    monkeypatch.setattr(node.script, "failure", CertmountError(Reason.TOKEN_EXPIRED, "pod token: has expired"))
    failure = await failure_of(node.publish(node.request()))
    clocks = CLOCKS.format(r"\S+ ?\S*", "90 s")
    assert re.fullmatch(f"TokenExpired: pod token: has expired; {clocks}", failure.text)


@pytest.mark.parametrize(
    "seconds, words",
    [
        (90, r"(90|8\d) s or more; synchronize them \(the authority's certificate is valid from "),
        (7200, r"2 h or more; synchronize them \(the authority's certificate is valid from "),
        (-46_800, r"5 h or more; synchronize them \(the authority's certificate expired at "),
    ],
)
async def test_serving_certificate_that_is_invalid_at_the_nodes_time(
    tmp_path: Path, seconds: float, words: str
) -> None:
    """The times of the certificate, which is as old as it can be, show a lower bound."""
    authority = ScriptedAuthority(tmp_path)
    authority.ca.ahead = timedelta(seconds=seconds)
    csr = build_csr(generate_key(KeyType.EC_P256), Names())
    async with authority:
        client = AuthorityClient(authority.address, authority.root_file, authority.token_file, "node n1")
        try:
            with pytest.raises(CertmountError) as failure:
                await client.issue(csr, Secret("token"), CertificateSpec())
        finally:
            await client.close()
    assert failure.value.reason is Reason.CLOCK_SKEW
    assert re.match(f"ClockSkew: the clocks of node n1 and the authority differ by about {words}", str(failure.value))
    assert not authority.script.tokens


async def test_untrusted_serving_certificate_is_no_clock_problem(tmp_path: Path) -> None:
    authority, other = ScriptedAuthority(tmp_path), ScriptedAuthority(tmp_path)
    authority.ca.ahead = timedelta(hours=2)
    csr = build_csr(generate_key(KeyType.EC_P256), Names())
    async with authority:
        authority.root_file.write_bytes(other.ca.pem)
        client = AuthorityClient(authority.address, authority.root_file, authority.token_file)
        try:
            with pytest.raises(CertmountError, match="failed to connect to all addresses") as failure:
                await client.issue(csr, Secret("token"), CertificateSpec())
        finally:
            await client.close()
    assert failure.value.reason is Reason.AUTHORITY_UNAVAILABLE
