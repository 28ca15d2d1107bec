"""No token, no private key and no password is in any log, record, error, metric or probe, at debug level."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import partial
from pathlib import Path

import grpc
import pytest

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.host.generations import PRIVATE
from tests.integration.node.test_bad_input import ATTRIBUTES, BAD_TOKENS, SHAPES, TOKENS, change
from tests.integration.node.world import Node, Request, running_node
from tests.support.kubelet import FakePod
from tests.support.scripted_authority import TestCA, name_not_allowed, response_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

_MARK = "CanaryCanaryCanary"
_NODE_TOKEN = "CanaryNodeTokenCanaryNodeToken"  # not a real token
_ANY_KEY = re.compile(rb"PRIVATE KEY|MIGHAgEAMBMGByqGSM49AgEG")
"""A PEM label, or the start of each base64 PKCS#8 key on P-256."""
_KEY_FILES = {"site.key", "site.pem"}


class _Canary:
    """Collects the secrets, and everything that the driver outputs."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.secrets: set[bytes] = {_NODE_TOKEN.encode(), _MARK.encode()}
        self.output: list[str] = []

    def token(self, pod: FakePod, **claims: object) -> str:
        """Return a token of the pod. Each of its parts is a secret."""
        token = pod.token(canary=_MARK, **claims)
        self.secrets.update(part.encode() for part in (token, *token.split(".")[1:]))
        return token

    async def publish(self, request: Request, timeout: float = 20.0) -> None:  # noqa: ASYNC109  # the call's own deadline
        try:
            await self.node.publish(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            self.output.append(f"{error!r} {error.trailing_metadata()!r}")

    def note_key(self, request: Request) -> int:
        """Add the lines of the current key to the secrets. Return the serial number of the certificate."""
        shown = self.node.shown(request)
        self.secrets.update(shown.key.splitlines()[1:-1])
        return shown.serial

    async def collect(self, request: Request) -> None:
        self.output += [text for _, text in map(self.node.driver.get, ("/metrics", "/readyz", "/healthz", "/"))]
        self.output += [message for _, _, message in await self.node.health(request)]
        proc = Path("/proc", str(self.node.driver.pid))
        self.output += [(proc / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ")]

    def leaks(self) -> list[str]:
        places = {f"output {number}": text.encode() for number, text in enumerate(self.output)}
        places["log"] = self.node.driver.log_text().encode()
        for path in self.node.kubelet.root.rglob("*"):
            if path.is_file() and path.name not in _KEY_FILES and path.parent.name != PRIVATE:
                places[str(path)] = path.read_bytes()
        assert any(place.endswith("record.json") for place in places), "no record was searched"
        return [
            f"{place}: {secret!r}"
            for place, content in places.items()
            for secret in [*self.secrets, *_ANY_KEY.findall(content)]
            if secret in content
        ]


async def _failing_publishes(canary: _Canary) -> None:
    node = canary.node
    for attributes, _ in ATTRIBUTES:
        pod = FakePod()
        await canary.publish(node.request(pod, attributes, token=canary.token(pod)))
    for fields, _ in SHAPES.values():
        pod = FakePod()
        await canary.publish(change(node.request(pod, token=canary.token(pod)), **fields))
    for bad in BAD_TOKENS.values():
        request = node.request(FakePod())
        request.volume_context[TOKENS] = bad.make(FakePod())
        await canary.publish(request)
    for garbage in (f"{_MARK}.{_MARK}.{_MARK}", _MARK, f'{{"certmount": {{"token": "{_MARK}"}}}}', f'{{"{_MARK}": 1}}'):
        for text in (garbage, f'{{"certmount": {{"token": "{garbage}"}}}}'):
            request = node.request(FakePod(), tokens_in_secrets=True)
            request.secrets[TOKENS] = text
            await canary.publish(request)


async def _failing_authority(canary: _Canary) -> None:
    node = canary.node
    failures: dict[str, CertmountError | None] = {
        "NameNotAllowed": name_not_allowed("shop.example.com"),
        "TokenRejected": CertmountError(Reason.TOKEN_REJECTED, "pod token: is not signed by this cluster"),
        "InvalidResponse": None,
        "AuthorityUnavailable": None,
    }
    for reason, failure in failures.items():
        live, fresh = FakePod(), FakePod()
        request = node.request(live, token=canary.token(live))
        await canary.publish(request)
        canary.note_key(request)
        node.script.failure = failure
        if reason == "InvalidResponse":
            node.script.tamper = lambda _: response_of([b"x"], [b"y"])
        if reason == "AuthorityUnavailable":
            await node.authority.stop()
        await canary.publish(node.request(fresh, token=canary.token(fresh)))
        await canary.publish(node.kubelet.publish_request(live, token=canary.token(live)))
        await until(partial(node.metric, "certmount_node_volumes_unhealthy", reason=reason), f"no renewal: {reason}")
        await canary.collect(request)
        node.script.failure, node.script.tamper = None, lambda answer: answer
    await node.authority.start()


async def _passwords(canary: _Canary) -> None:
    """Passwords of key stores: valid ones, a changed one, and those that are rejected."""
    node, pod = canary.node, FakePod()
    for key, password in (("password", _MARK), ("password", f"{_MARK}2"), ("password", f"{_MARK}\n"), ("other", _MARK)):
        for each in (pod, FakePod()):
            request = node.request(each, {"files": "java"}, token=canary.token(each))
            request.secrets[key] = password
            await canary.publish(request)


async def test_no_secret_leaks() -> None:
    async with running_node() as node:
        node.authority.token_file.write_text(_NODE_TOKEN)
        canary, pod = _Canary(node), FakePod()
        node.script.renew_after = timedelta(seconds=1)
        request = node.request(pod, {"name": "shop.example.com"}, token=canary.token(pod))
        await canary.publish(request)
        serial = canary.note_key(request)
        await _failing_publishes(canary)
        await _passwords(canary)
        await _failing_authority(canary)
        await until(lambda: node.shown(request).serial != serial, "the renewal")
        canary.note_key(request)
        slow = FakePod()
        node.script.delay_s = 1.0
        await canary.publish(node.request(slow, token=canary.token(slow)), timeout=0.2)
        node.script.delay_s = 0.0
        await node.restart()
        await canary.publish(node.kubelet.publish_request(pod, token=canary.token(pod, exp=1)))
        await canary.collect(request)
        await node.authority.trust(node.authority.ca.der, TestCA("another").der)
        await until(lambda: len(node.shown(request).roots) == 2, "the new roots")
        node.authority.token_file.write_text(f"{_NODE_TOKEN}\n{_NODE_TOKEN}")
        await canary.publish(node.request(token=canary.token(FakePod())))
        await node.authority.stop()
        await node.authority.start()
        await until(lambda: node.driver.events("trust stream failed"), "the trust stream fails because of the token")
        canary.note_key(request)
        await canary.collect(request)
        assert canary.leaks() == []
        assert "<redacted>" not in node.driver.log_text(), "the log contained a secret before redaction"
        canary.output.append(f"... {canary.token(pod)} ...")
        assert len(canary.leaks()) > 1, "the test does not detect a leak"
        await node.driver.stop()
        assert "Traceback" not in node.driver.log_text()
