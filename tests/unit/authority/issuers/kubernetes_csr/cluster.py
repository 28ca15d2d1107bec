"""A fake API server that stores CertificateSigningRequests and notifies watches."""

from __future__ import annotations

import asyncio
import base64
import copy
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from csi_driver.core.cluster.csr import ClusterCSR, CSRCondition, CSRDraft
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.kube.csr.cache import CSRCache
from tests.support.api_objects import csr_of
from tests.unit.core import pki

ACCOUNT = "system:serviceaccount:certmount:certmount-authority"
Json = dict[str, Any]


@dataclass
class Watch:
    """A watch that is notified immediately."""

    cluster: FakeRequests
    sink: CSRCache
    labels: str

    async def run(self) -> None:
        self.cluster.sinks.append(self)
        for name in self.cluster.objects:
            self.notify(name)
        self.sink.retain(set(self.cluster.objects))
        try:
            await asyncio.Event().wait()
        finally:
            self.cluster.sinks.remove(self)

    def notify(self, name: str) -> None:
        key, _, value = self.labels.partition("=")
        item = copy.deepcopy(self.cluster.objects[name])
        if not key or item["metadata"]["labels"].get(key) == value:
            self.sink.put(csr_of(item))


@dataclass
class FakeRequests:
    """CertificateSigningRequests, which a test can change as another client."""

    objects: dict[str, Json] = field(default_factory=dict)
    sinks: list[Watch] = field(default_factory=list)
    username: str = ACCOUNT
    forbidden: set[tuple[str, str]] = field(default_factory=set)
    broken: str = ""  # The error of every call; empty if calls succeed
    undecidable: str = ""  # The error of approvals and denials; empty if they succeed
    now: datetime = pki.NOW
    made: int = 0
    answers: int = 0
    drafts: list[CSRDraft] = field(default_factory=list)

    def put(self, item: Json) -> str:
        self.made += 1
        metadata = item["metadata"]
        name = metadata.setdefault("name", f"csr-{self.made}")
        defaults = {"uid": f"uid-{name}", "labels": {}, "creationTimestamp": self.now.isoformat()}
        item["metadata"] = defaults | metadata
        self.objects[name] = item
        self._notify(name)
        return str(name)

    def change(self, name: str, **status: Any) -> None:
        self.objects[name]["status"] = {**self.objects[name].get("status", {}), **status}
        self._notify(name)

    def sign(self, name: str, pem: bytes) -> None:
        self.change(name, certificate=base64.b64encode(pem).decode())

    def remove(self, name: str) -> None:
        item = self.objects.pop(name)
        for watch in self.sinks:
            watch.sink.remove(csr_of(item))

    def find(self, name: str) -> ClusterCSR:
        return csr_of(self.objects[name])

    def _notify(self, name: str) -> None:
        for watch in self.sinks:
            watch.notify(name)

    async def _call(self) -> None:
        await asyncio.sleep(0)
        if self.broken:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, self.broken)

    async def own_username(self) -> str:
        await self._call()
        return self.username

    async def create(self, draft: CSRDraft) -> ClusterCSR:
        await self._call()
        self.drafts.append(draft)
        spec = {
            "signerName": draft.signer, "request": base64.b64encode(draft.request).decode(),
            "usages": list(draft.usages), "expirationSeconds": draft.expiration_s, "username": self.username,
        }  # fmt: skip
        name = f"{draft.name_prefix}{self.made + 1}"
        return self.find(self.put({"metadata": {"name": name, "labels": dict(draft.labels)}, "spec": spec}))

    async def decide(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        await self._call()
        if self.undecidable:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, self.undecidable)
        if not self.find(csr.name).conditions:
            self.change(csr.name, conditions=[_json(condition)])
        return self.find(csr.name)

    async def set_certificate(self, csr: ClusterCSR, certificate: bytes) -> ClusterCSR:
        await self._call()
        self.answers += 1
        self.sign(csr.name, certificate)
        return self.find(csr.name)

    async def fail(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        await self._call()
        self.change(csr.name, conditions=[*self.objects[csr.name]["status"]["conditions"], _json(condition)])
        return self.find(csr.name)

    async def delete(self, csr: ClusterCSR) -> None:
        await self._call()
        if csr.name in self.objects:
            self.remove(csr.name)

    async def is_permitted(self, verb: str, resource: str, name: str = "") -> bool:
        await self._call()
        return not {(verb, resource), (verb, name)} & self.forbidden

    def watch(self, sink: CSRCache, *, signer: str = "", labels: str = "") -> Watch:
        del signer  # the caller must not rely on this filter
        return Watch(self, sink, labels)


def _json(condition: CSRCondition) -> Json:
    return {"type": condition.kind, "reason": condition.reason, "message": condition.message}
