"""Events on pods (events.k8s.io/v1; KEP-383): made once, then counted, by however many replicas."""

from __future__ import annotations

from datetime import UTC, datetime

from kubernetes.aio import client

from csi_driver.core.cluster.event import EventRefused, PodEvent, RecordedEvent
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.kube.client import ApiError, Conflict, answered
from csi_driver.kube.metadata import Json
from csi_driver.kube.requests import MERGE_PATCH, ask

_CONTROLLER = "certmount.dev/authority"
_ACTION = "IssueCertificate"
_MOST_CONFLICTS = 5
_FINAL = (400, 403, 404, 405, 413, 422)
"""Answers that stay the same: invalid, or of a namespace that ends; 403 may also be a permission that is missing."""


class ClusterEvents:
    """Writes events; create and patch are all that it needs."""

    def __init__(self, api: client.ApiClient, instance: str) -> None:
        """``instance`` is the name of the authority's own pod."""
        self._api = api
        self._instance = instance[:128] or "unknown"

    async def create(self, event: PodEvent) -> RecordedEvent:
        """Makes it, or counts it once more where another replica has made it.

        Raises:
            EventRefused: for good.
            CertmountError: TokenReviewUnavailable for what may pass.
        """
        try:
            return _written(await self._send("POST", event, "", self._body(event)))
        except Conflict:
            return await self.repeat(event, await self._read(event), 1, event.first_at)

    async def repeat(self, event: PodEvent, known: RecordedEvent, more: int, last_at: float) -> RecordedEvent:
        """It has been said ``more`` times, at last at ``last_at`` (unix seconds); raises as :meth:`create`."""
        for _ in range(_MOST_CONFLICTS):
            try:
                return await self._count(event, known, more, last_at)
            except Conflict:
                # Another replica has counted since: they say the same things at the same moments.
                known = await self._read(event)
        return await self._count(event, known, more, last_at)

    async def _count(self, event: PodEvent, known: RecordedEvent, more: int, last_at: float) -> RecordedEvent:
        series = {"count": known.count + more, "lastObservedTime": _micro_time(last_at)}
        body = {"metadata": {"resourceVersion": known.version}, "series": series}
        return _written(await self._send("PATCH", event, f"/{event.name}", body))

    async def _read(self, event: PodEvent) -> RecordedEvent:
        """By a patch that changes nothing, so that no permission to read events is needed."""
        return _written(await self._send("PATCH", event, f"/{event.name}", {}))

    async def _send(self, method: str, event: PodEvent, suffix: str, body: Json) -> Json:
        path = f"/apis/events.k8s.io/v1/namespaces/{event.namespace}/events{suffix}"
        headers = {"Content-Type": MERGE_PATCH} if method == "PATCH" else {}
        try:
            sending = ask(self._api, method, path, body=body, headers=headers)
            return await answered(sending, Reason.TOKEN_REVIEW_UNAVAILABLE, f"Event in namespace {event.namespace}")
        except ApiError as error:
            if error.status in _FINAL:
                raise EventRefused(str(error)) from None
            raise

    def _body(self, event: PodEvent) -> Json:
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": event.name, "namespace": event.namespace},
            "eventTime": _micro_time(event.first_at),
            "reportingController": _CONTROLLER,
            "reportingInstance": self._instance,
            "action": _ACTION,
            "reason": event.reason,
            "type": "Warning" if event.warning else "Normal",
            "note": event.message,
            "regarding": {
                "apiVersion": "v1",
                "kind": "Pod",
                "namespace": event.namespace,
                "name": event.pod_name,
                "uid": event.pod_uid,
            },
        }


def _written(found: Json) -> RecordedEvent:
    """What the API server has now; an event without a series was said once."""
    try:
        version, series = str(found["metadata"]["resourceVersion"]), found.get("series") or {}
        return RecordedEvent(version, int(series.get("count", 1)))
    except (KeyError, TypeError, ValueError, AttributeError):
        problem = "the API server's answer is strange (no event)"
        raise CertmountError(Reason.TOKEN_REVIEW_UNAVAILABLE, Fault("Event", problem)) from None


def _micro_time(seconds: float) -> str:
    """meta.k8s.io/v1 MicroTime: RFC 3339 with exactly six digits of a second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
