"""A rotation over the wire: what a node hears, confirms and gets, phase by phase."""

from __future__ import annotations

from datetime import timedelta

from cryptography import x509

from csi_driver._proto import authority_pb2
from csi_driver.authority.ca.authority import utc_now
from csi_driver.authority.ca.keyring import make_keyring
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.core.spec import DEFAULT_ISSUER
from tests.integration.authority.world import Caller, World


class Time:
    """The CA's clock, which a test pushes; then the authority reads its store, as it does every five seconds."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ahead = timedelta()
        world.server._ca._clock = lambda: utc_now() + self._ahead

    async def go_by(self, step: timedelta = timedelta()) -> None:
        self._ahead += step
        for _ in range(3):
            await self._world.server._load_ca()


async def test_a_node_hears_confirms_and_gets(world: World, caller: Caller) -> None:
    """Both roots before the new CA signs; it signs once this node has confirmed, twice; the former root goes when all it signed has ended."""
    time, phase, day = Time(world), timedelta(seconds=41), timedelta(days=1)
    stream = caller.watch()
    first = (await stream.read()).sets[DEFAULT_ISSUER]
    await confirm(caller, first.generation)
    old = issuer_of(await caller.issue(duration=timedelta(hours=1)))
    following = make_keyring(utc_now())
    store = world.server._surroundings.store
    await StoredCA(store).change(utc_now(), lambda held: held.begin_rotation(following, int(utc_now().timestamp())))
    await time.go_by()
    both = (await stream.read()).sets[DEFAULT_ISSUER]
    assert list(both.roots) == [*first.roots, *following.roots_der]
    await confirm(caller, both.generation)
    await time.go_by(phase)
    again = (await stream.read()).sets[DEFAULT_ISSUER]
    assert (list(again.roots), again.generation > both.generation) == (list(both.roots), True)
    assert issuer_of(await caller.issue(duration=timedelta(hours=1))) == old
    await confirm(caller, again.generation)
    await time.go_by()
    answer = await caller.issue(duration=timedelta(hours=1))
    assert issuer_of(answer) == following.intermediate.certificate.subject
    assert list(answer.trust[DEFAULT_ISSUER].roots) == list(both.roots)
    await time.go_by(phase)
    assert list((await caller.issue(duration=timedelta(hours=1))).trust[DEFAULT_ISSUER].roots) == list(both.roots)
    await time.go_by(day)
    last = (await stream.read()).sets[DEFAULT_ISSUER]
    assert list(last.roots) == list(following.roots_der)
    assert (world.ca / "root.crt").read_bytes() == following.roots_pem


async def confirm(caller: Caller, generation: int) -> None:
    request = authority_pb2.ConfirmTrustRequest(set=DEFAULT_ISSUER, generation=generation)
    await caller._stub.ConfirmTrust(request, metadata=caller.bearer(), timeout=10)


def issuer_of(answer: authority_pb2.IssueResponse) -> x509.Name:
    return x509.load_der_x509_certificate(answer.chain[0]).issuer
