"""The node's issuance requests share one stream, and lost, draining or unknown streams fail no request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from csi_driver.core.attributes import CertificateSpec
from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import generate_key
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.names import Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import DEFAULT_ISSUER, KeyType
from csi_driver.node.authority_client import AuthorityClient
from csi_driver.rpc import issue_stream_client
from csi_driver.rpc.issuance_messages import MAX_STREAM_REQUESTS
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import ScriptedAuthority
from tests.support.waiting import until


class Client:
    """A node's client, and its authority."""

    def __init__(self, authority: ScriptedAuthority) -> None:
        self.authority = authority
        self.calls = AuthorityClient(authority.address, authority.root_file, authority.token_file)
        self._csr = build_csr(generate_key(KeyType.EC_P256), Names())
        self._pod = FakePod()

    async def issue(self, issuer: str = DEFAULT_ISSUER) -> None:
        spec = CertificateSpec(Names(), issuer=issuer)
        response = await self.calls.issue(self._csr, Secret(self._pod.token()), spec)
        assert len(response.chain) == 1

    @property
    def streams(self) -> int:
        return len(self.calls._internal._streams) + len(self.calls._external._streams)

    @property
    def methods(self) -> list[str]:
        return self.authority.methods


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with ScriptedAuthority(tmp_path) as authority:
        client = Client(authority)
        yield client
        await client.calls.close()
        await until(lambda: client.streams == 0, "the end of the streams")


async def test_requests_share_a_stream(client: Client) -> None:
    await client.issue()
    await asyncio.gather(*(client.issue() for _ in range(50)))
    assert client.methods == ["IssueStream"]
    client.authority.script.failure = CertmountError(Reason.NAME_NOT_ALLOWED, "a.example: no rule allows it")
    with pytest.raises(CertmountError, match=r"^NameNotAllowed: a.example: no rule allows it$"):
        await client.issue()
    client.authority.script.failure = None
    await client.issue()
    assert client.methods == ["IssueStream"]


async def test_new_token_needs_a_new_stream(client: Client) -> None:
    await client.issue()
    client.authority.script.gate = gate = asyncio.Event()
    waiting = asyncio.create_task(client.issue())
    await until(lambda: client.authority.script.calls == 2, "the request")
    client.authority.token_file.write_text("renewed-node-token")
    another = asyncio.create_task(client.issue())
    await until(lambda: client.authority.script.calls == 3, "the request on the new stream")
    assert (client.methods, client.streams) == (["IssueStream"] * 2, 2)
    gate.set()
    await asyncio.gather(waiting, another)
    await until(lambda: client.streams == 1, "the end of the old stream")


async def test_idle_stream_ends(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issue_stream_client, "_IDLE_S", 0.05)
    await client.issue()
    await until(lambda: client.streams == 0, "the end of the stream")
    await client.issue()
    assert client.methods == ["IssueStream"] * 2


async def test_draining_stream_fails_no_request(client: Client) -> None:
    await client.issue()
    client.authority.script.gate = gate = asyncio.Event()
    waiting = [asyncio.create_task(client.issue()) for _ in range(5)]
    await until(lambda: client.authority.script.calls == 6, "the requests")
    client.authority.drain()
    await until(lambda: not any(one.open for one in client.calls._internal._streams), "the notice")
    gate.set()
    await asyncio.gather(client.issue(), *waiting)
    assert client.methods == ["IssueStream"] * 2


async def test_lost_stream_fails_no_request(client: Client) -> None:
    await client.issue()
    client.authority.script.gate = asyncio.Event()
    waiting = [asyncio.create_task(client.issue()) for _ in range(5)]
    await until(lambda: client.authority.script.calls == 6, "the requests")
    await client.authority.stop()
    client.authority.script.gate = None
    await client.authority.start()
    await asyncio.gather(*waiting)


async def test_authority_without_streams_gets_a_call_for_each_request(client: Client) -> None:
    client.authority.knows_streams = False
    await client.issue()
    await client.issue()
    assert client.methods == ["IssueStream", "Issue", "Issue"]
    client.authority.knows_streams = True
    client.calls._internal._unary_until = 0.0  # as after a minute
    await client.issue()
    assert client.methods[3:] == ["IssueStream"]


async def test_request_without_an_answer_ends_in_time(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issue_stream_client, "ISSUE_TIMEOUT_S", 0.1)
    client.authority.script.gate = asyncio.Event()
    with pytest.raises(CertmountError, match="AuthorityUnavailable: the authority has not replied: DEADLINE_EXCEEDED"):
        await client.issue()
    client.authority.script.gate = None
    await client.issue()
    assert client.methods == ["IssueStream"]


async def test_slow_external_issuer_does_not_delay_the_internal_ca(client: Client) -> None:
    await client.authority.add_external_issuer("slow", shared=False)
    client.authority.script.external_gate = gate = asyncio.Event()
    slow = [asyncio.create_task(client.issue("slow")) for _ in range(MAX_STREAM_REQUESTS + 10)]
    await until(lambda: client.authority.script.calls == MAX_STREAM_REQUESTS, "a full stream")
    await client.issue()
    assert client.authority.script.calls == MAX_STREAM_REQUESTS + 1
    gate.set()
    await asyncio.gather(*slow)
