"""What the authority does to CertificateSigningRequests: makes, decides, answers, deletes and follows them."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable
from datetime import UTC, datetime

from kubernetes.aio import client

from csi_driver.core.cluster.csr import ClusterCSR, CSRCondition, CSRDraft
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.client import ApiError, Conflict, answered
from csi_driver.kube.csrs import CSRs, read_csr
from csi_driver.kube.metadata import BadObject, Json
from csi_driver.kube.permissions import Permission, has_permission
from csi_driver.kube.requests import ask
from csi_driver.kube.watching import Pace, Reflector, Resource

_PATH = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
_SELF = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
_MAX_TEXT = 1024
"""Of a condition's message; the API takes more, but people read it in a terminal."""
_TRIES = 3


class ClusterCSRs:
    """By plain requests; each raises CertmountError IssuerUnavailable, ApiError where the API server answers with an error."""

    def __init__(self, api: client.ApiClient, watches: client.ApiClient, pace: Pace | None = None) -> None:
        """``watches`` has connections of its own, as a watch never lets go of one."""
        self._api = api
        self._watches = watches
        self._pace = pace

    async def own_username(self) -> str:
        """Whom the API server takes the authority for; it stamps that on what the authority makes."""
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        answer = await self._ask("POST", _SELF, "the authority's own account", body)
        try:
            username = answer["status"]["userInfo"]["username"]
        except (KeyError, TypeError):
            username = None
        if not isinstance(username, str) or not username:
            raise _strange("the authority's own account")
        return username

    async def create(self, draft: CSRDraft) -> ClusterCSR:
        """Makes it under a name of the API server's choice."""
        metadata = {
            "generateName": draft.name_prefix,
            "labels": dict(draft.labels),
            "annotations": dict(draft.annotations),
        }
        spec = {
            "signerName": draft.signer,
            "request": base64.b64encode(draft.request).decode("ascii"),
            "usages": list(draft.usages),
            "expirationSeconds": draft.life_s,
        }
        body = {**_head(), "metadata": metadata, "spec": spec}
        return _read(await self._ask("POST", _PATH, "CertificateSigningRequest", body))

    async def decide(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        """Approves or denies it, unless someone has done either; gives what there is then."""

        def change(status: Json, now: ClusterCSR) -> bool:
            if now.conditions:
                return False
            status["conditions"] = [_condition(condition)]
            return True

        return await self._change(csr, "approval", change)

    async def answer(self, csr: ClusterCSR, certificate: bytes) -> ClusterCSR:
        """Writes the certificate (PEM, leaf first), unless it is finished otherwise by now."""

        def change(status: Json, now: ClusterCSR) -> bool:
            status["certificate"] = base64.b64encode(certificate).decode("ascii")
            return not now.finished

        return await self._change(csr, "status", change)

    async def fail(self, csr: ClusterCSR, condition: CSRCondition) -> ClusterCSR:
        """Says that it won't be signed though it was approved, unless it is finished by now."""

        def change(status: Json, now: ClusterCSR) -> bool:
            status["conditions"] = [*(status.get("conditions") or ()), _condition(condition)]
            return not now.finished

        return await self._change(csr, "status", change)

    async def delete(self, csr: ClusterCSR) -> None:
        """Removes this very one; also where it is gone already."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": csr.uid}}
        with contextlib.suppress(Conflict):  # another one by its name is not ours to delete
            try:
                await self._ask("DELETE", f"{_PATH}/{csr.name}", _named(csr), body)
            except ApiError as error:
                if error.status != 404:
                    raise

    async def may(self, verb: str, resource: str, name: str = "") -> bool:
        """Whether the authority's account has a permission in the group certificates.k8s.io."""
        return await has_permission(self._api, Permission(verb, "certificates.k8s.io", resource, name=name))

    def follow(self, sink: CSRs, *, signer: str = "", labels: str = "") -> Reflector:
        """Keeps the sink up to date with those of a signer, or with these labels (``key=value``), once it runs."""
        fields = f"spec.signerName={signer}" if signer else ""
        resource = Resource("certificatesigningrequests", _PATH, field_selector=fields, label_selector=labels)
        return Reflector(self._watches, resource, sink, pace=self._pace)

    async def _change(self, csr: ClusterCSR, part: str, change: Callable[[Json, ClusterCSR], bool]) -> ClusterCSR:
        """Writes one part as ``change`` makes it of the present status; nothing where that is false."""
        for last in range(_TRIES):
            item = await self._ask("GET", f"{_PATH}/{csr.name}", _named(csr))
            now = _read(item)
            if now.uid != csr.uid:
                raise CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(_named(csr), "was made anew meanwhile"))
            status = item.get("status") or {}
            if not change(status, now):
                return now
            # Lists leave these out of their items; the API server asks for them.
            body = {**item, **_head(), "status": status}
            try:
                return _read(await self._ask("PUT", f"{_PATH}/{csr.name}/{part}", _named(csr), body))
            except Conflict:
                if last == _TRIES - 1:
                    raise
        raise AssertionError("the last try returns or raises")

    async def _ask(self, method: str, path: str, what: str, body: Json | None = None) -> Json:
        return await answered(ask(self._api, method, path, body=body), Reason.ISSUER_UNAVAILABLE, what)


def _read(item: Json) -> ClusterCSR:
    try:
        return read_csr(item)
    except BadObject:
        raise _strange("CertificateSigningRequest") from None


def _strange(what: str) -> CertmountError:
    return CertmountError(Reason.ISSUER_UNAVAILABLE, Fault(what, "the API server's answer is strange"))


def _named(csr: ClusterCSR) -> str:
    return f"CertificateSigningRequest {csr.name}"


def _head() -> Json:
    return {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest"}


def _condition(condition: CSRCondition) -> Json:
    return {
        "type": condition.kind,
        "status": "True",
        "reason": condition.reason,
        "message": condition.message[:_MAX_TEXT],
        "lastUpdateTime": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }
