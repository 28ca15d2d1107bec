"""CertificateSigningRequests of the fake API server, with subresources and conflicts."""

from __future__ import annotations

import copy
from typing import Any

from aiohttp import web

from tests.support.api_objects import encode, envelope
from tests.unit.kube.collection import Collection, status_response

Json = dict[str, Any]
ACCOUNT = "system:serviceaccount:certmount:certmount-authority"


class CSRApi:
    """Records the requester, updates subresources, and deletes by UID."""

    path = "/apis/certificates.k8s.io/v1/certificatesigningrequests"

    def __init__(self) -> None:
        self.collection = Collection("CertificateSigningRequest")
        self.conflicts = 0  # the number of updates that fail because another client changed the object
        self.created = 0

    def object(self, name: str) -> Json:
        found: Json = self.collection.objects[f"/{name}"]
        return found

    def change(self, name: str, **status: Any) -> None:
        found = copy.deepcopy(self.object(name))
        found["status"] = {**found.get("status", {}), **status}
        self.collection.put(found)

    async def answer(self, request: web.Request, body: Json | None) -> web.StreamResponse:
        name, _, part = request.path.removeprefix(self.path).removeprefix("/").partition("/")
        if not name and request.method == "GET":
            return await self.collection.answer(request)
        if not name and body is not None:
            return self._response(self._create(body), 201)
        if f"/{name}" not in self.collection.objects:
            return status_response(404, f'certificatesigningrequests.certificates.k8s.io "{name}" not found')
        if request.method == "PUT" and body is not None:
            return self._update(name, part, body)
        if request.method == "DELETE":
            return self._delete(name, body or {})
        return self._response(self.object(name))

    def _create(self, body: Json) -> Json:
        self.created += 1
        name = f"{body['metadata'].pop('generateName')}{self.created}"
        metadata = {**body["metadata"], "name": name, "creationTimestamp": "2026-11-22T10:00:00Z"}
        spec = {**body["spec"], "username": ACCOUNT, "extra": {}}
        self.collection.put({**body, "metadata": metadata, "spec": spec, "status": {}})
        return self.object(name)

    def _update(self, name: str, part: str, body: Json) -> web.Response:
        if self.conflicts:
            self.conflicts -= 1
            self.change(name)
        now = copy.deepcopy(self.object(name))
        if body["metadata"]["resourceVersion"] != now["metadata"]["resourceVersion"]:
            return status_response(409, "the object has been modified")
        conditions = body["status"].get("conditions", [])
        if part == "approval":
            now["status"]["conditions"] = conditions
        else:
            now["status"] = body["status"]
        self.collection.put(now)
        return self._response(self.object(name))

    def _delete(self, name: str, body: Json) -> web.Response:
        if body.get("preconditions", {}).get("uid") != self.object(name)["metadata"]["uid"]:
            return status_response(409, "the UID in the precondition does not match")
        self.collection.remove(f"/{name}")
        return web.Response(body=envelope(b"", "Status"))

    @staticmethod
    def _response(item: Json, status: int = 200) -> web.Response:
        return web.Response(body=envelope(encode(item, "CertificateSigningRequest")), status=status)
