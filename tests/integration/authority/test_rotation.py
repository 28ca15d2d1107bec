"""CA rotation over gRPC: what a node receives and acknowledges in each phase."""

from __future__ import annotations

from datetime import timedelta

from cryptography import x509

from csi_driver._proto import authority_pb2
from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.core.spec import DEFAULT_ISSUER
from tests.integration.authority.world import Caller, World


class CAClock:
    """The clock of the CA. After each step the authority reads its store, as it does every five seconds."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ahead = timedelta()
        world.server._ca._clock = lambda: utc_now() + self._ahead

    async def advance(self, step: timedelta = timedelta()) -> None:
        self._ahead += step
        for _ in range(3):
            await self._world.server._load_ca()


async def test_rotation_waits_for_the_nodes_acknowledgements(world: World, caller: Caller) -> None:
    """The node gets both roots first. The new CA signs after the node has acknowledged them twice. The former root is
    removed when all its certificates have expired.
    """
    clock, phase, day = CAClock(world), timedelta(seconds=41), timedelta(days=1)
    stream = caller.watch()
    first = (await stream.read()).sets[DEFAULT_ISSUER]
    await acknowledge(caller, first.generation)
    old = issuer_of(await caller.issue(duration=timedelta(hours=1)))
    following = make_keyring(utc_now())
    store = world.server._environment.ca_store
    await StoredCA(store).change(utc_now(), lambda held: held.begin_rotation(following, int(utc_now().timestamp())))
    await clock.advance()
    both = (await stream.read()).sets[DEFAULT_ISSUER]
    assert list(both.roots) == [*first.roots, *following.roots_der]
    await acknowledge(caller, both.generation)
    await clock.advance(phase)
    again = (await stream.read()).sets[DEFAULT_ISSUER]
    assert (list(again.roots), again.generation > both.generation) == (list(both.roots), True)
    assert issuer_of(await caller.issue(duration=timedelta(hours=1))) == old
    await acknowledge(caller, again.generation)
    await clock.advance()
    answer = await caller.issue(duration=timedelta(hours=1))
    assert issuer_of(answer) == following.intermediate.certificate.subject
    assert list(answer.trust[DEFAULT_ISSUER].roots) == list(both.roots)
    await clock.advance(phase)
    assert list((await caller.issue(duration=timedelta(hours=1))).trust[DEFAULT_ISSUER].roots) == list(both.roots)
    await clock.advance(day)
    last = (await stream.read()).sets[DEFAULT_ISSUER]
    assert list(last.roots) == list(following.roots_der)
    assert (world.ca / "root.crt").read_bytes() == following.roots_pem


async def acknowledge(caller: Caller, generation: int) -> None:
    request = authority_pb2.ConfirmTrustRequest(set=DEFAULT_ISSUER, generation=generation)
    await caller._stub.ConfirmTrust(request, metadata=caller.bearer(), timeout=10)


def issuer_of(answer: authority_pb2.IssueResponse) -> x509.Name:
    return x509.load_der_x509_certificate(answer.chain[0]).issuer
