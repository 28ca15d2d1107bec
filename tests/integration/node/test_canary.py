"""No token and no private key in any log, record, error, metric or probe, whatever goes wrong, at debug level."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import partial
from pathlib import Path

import grpc
import pytest

from csi_driver.core.errors import CertmountError, Reason
from tests.integration.node.bad_input import ATTRIBUTES, BAD_TOKENS, SHAPES, TOKENS, change
from tests.integration.node.world import Node, Request, running_node
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import TestCA, answer_of, refused
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

_MARK = "CanaryCanaryCanary"
_NODE_TOKEN = "CanaryNodeTokenCanaryNodeToken"  # the bait
_ANY_KEY = re.compile(rb"PRIVATE KEY|MIGHAgEAMBMGByqGSM49AgEG")
"""A PEM label, or how the base64 of every PKCS#8 key on P-256 begins."""
_KEY_FILES = {"site.key", "site.pem"}


class _Cage:
    """Collects what must stay secret, and what the driver told anybody."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.secrets: set[bytes] = {_NODE_TOKEN.encode(), _MARK.encode()}
        self.told: list[str] = []

    def token(self, pod: FakePod, **claims: object) -> str:
        """A token of the pod whose every part is watched for."""
        token = pod.token(canary=_MARK, **claims)
        self.secrets.update(part.encode() for part in (token, *token.split(".")[1:]))
        return token

    async def publish(self, request: Request, timeout: float = 20.0) -> None:  # noqa: ASYNC109  # the call's own deadline
        try:
            await self.node.publish(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            self.told.append(f"{error!r} {error.trailing_metadata()!r}")

    def note_key(self, request: Request) -> int:
        """Watches for the lines of the volume's present key; gives the certificate's serial."""
        shown = self.node.shown(request)
        self.secrets.update(shown.key.splitlines()[1:-1])
        return shown.serial

    async def look_around(self, request: Request) -> None:
        """Asks for everything that the driver tells of itself."""
        self.told += [text for _, text in map(self.node.driver.get, ("/metrics", "/readyz", "/healthz", "/"))]
        self.told += [message for _, _, message in await self.node.health(request)]
        proc = Path("/proc", str(self.node.driver.pid))
        self.told += [(proc / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ")]

    def leaks(self) -> list[str]:
        """Where a secret is found."""
        places = {f"answer {number}": text.encode() for number, text in enumerate(self.told)}
        places["log"] = self.node.driver.log_text().encode()
        for path in self.node.kubelet.root.rglob("*"):
            if path.is_file() and path.name not in _KEY_FILES:
                places[str(path)] = path.read_bytes()
        assert any(place.endswith("record.json") for place in places), "the records were looked at"
        return [
            f"{place}: {secret!r}"
            for place, content in places.items()
            for secret in [*self.secrets, *_ANY_KEY.findall(content)]
            if secret in content
        ]


async def _failing_publishes(cage: _Cage) -> None:
    node = cage.node
    for attributes, _ in ATTRIBUTES:
        pod = FakePod()
        await cage.publish(node.request(pod, attributes, token=cage.token(pod)))
    for fields, _ in SHAPES.values():
        pod = FakePod()
        await cage.publish(change(node.request(pod, token=cage.token(pod)), **fields))
    for bad in BAD_TOKENS.values():
        request = node.request(FakePod())
        request.volume_context[TOKENS] = bad.make(FakePod())
        await cage.publish(request)
    for garbage in (f"{_MARK}.{_MARK}.{_MARK}", _MARK, f'{{"certmount": {{"token": "{_MARK}"}}}}', f'{{"{_MARK}": 1}}'):
        for text in (garbage, f'{{"certmount": {{"token": "{garbage}"}}}}'):
            request = node.request(FakePod(), tokens_in_secrets=True)
            request.secrets[TOKENS] = text
            await cage.publish(request)


async def _failing_authority(cage: _Cage) -> None:
    """Each failure meets a first publish, a republish and a renewal."""
    node = cage.node
    failures: dict[str, CertmountError | None] = {
        "NameNotAllowed": refused("shop.example.com"),
        "TokenRejected": CertmountError(Reason.TOKEN_REJECTED, "pod token: is not signed by this cluster"),
        "InvalidResponse": None,
        "AuthorityUnavailable": None,
    }
    for reason, failure in failures.items():
        live, fresh = FakePod(), FakePod()
        request = node.request(live, token=cage.token(live))
        await cage.publish(request)
        cage.note_key(request)
        node.script.failure = failure
        if reason == "InvalidResponse":
            node.script.tamper = lambda _: answer_of([b"x"], [b"y"])
        if reason == "AuthorityUnavailable":
            await node.authority.stop()
        await cage.publish(node.request(fresh, token=cage.token(fresh)))
        await cage.publish(node.kubelet.publish_request(live, token=cage.token(live)))
        await until(partial(node.metric, "certmount_node_volumes_unhealthy", reason=reason), f"no renewal: {reason}")
        await cage.look_around(request)
        node.script.failure, node.script.tamper = None, lambda answer: answer
    await node.authority.start()


async def test_nothing_secret_is_told() -> None:
    """All that can fail fails, volumes live, rotate, survive restarts and end: not one secret is anywhere it should not be."""
    async with running_node() as node:
        node.authority.token_file.write_text(_NODE_TOKEN)
        cage, pod = _Cage(node), FakePod()
        node.script.renew_after = timedelta(seconds=1)
        request = node.request(pod, {"name": "shop.example.com"}, token=cage.token(pod))
        await cage.publish(request)
        serial = cage.note_key(request)
        await _failing_publishes(cage)
        await _failing_authority(cage)
        await until(lambda: node.shown(request).serial != serial, "healed")
        cage.note_key(request)
        slow = FakePod()
        node.script.delay_s = 1.0
        await cage.publish(node.request(slow, token=cage.token(slow)), timeout=0.2)
        node.script.delay_s = 0.0
        await node.restart()
        await cage.publish(node.kubelet.publish_request(pod, token=cage.token(pod, exp=1)))
        await cage.look_around(request)
        await node.authority.trust(node.authority.ca.der, TestCA("another").der)
        await until(lambda: len(node.shown(request).roots) == 2, "other roots")
        node.authority.token_file.write_text(f"{_NODE_TOKEN}\n{_NODE_TOKEN}")
        await cage.publish(node.request(token=cage.token(FakePod())))
        await node.authority.stop()
        await node.authority.start()
        await until(lambda: node.driver.events("roots not followed"), "the trust stream fails by the token")
        cage.note_key(request)
        await cage.look_around(request)
        assert cage.leaks() == []
        assert "<redacted>" not in node.driver.log_text(), "the log's second belt had to hold"
        cage.told.append(f"... {cage.token(pod)} ...")
        assert len(cage.leaks()) > 1, "the look-out sees a leak"
        await node.driver.stop()
        assert "Traceback" not in node.driver.log_text()
