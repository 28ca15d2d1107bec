"""Events on pods (events.k8s.io/v1; KEP-383). All replicas increase the count of one Event object."""

from __future__ import annotations

from datetime import UTC, datetime

from kubernetes.aio import client

from csi_driver.core.cluster.objects import EventRejected, PodEvent, RecordedEvent
from csi_driver.core.errors import Reason
from csi_driver.kube.client import ApiError, Conflict, call_api, invalid_response
from csi_driver.kube.json_requests import MERGE_PATCH, request_json
from csi_driver.kube.metadata import Json

_CONTROLLER = "certmount.dev/authority"
_ACTION = "IssueCertificate"
_MAX_CONFLICTS = 5
_FINAL = (400, 403, 404, 405, 413, 422)
"""Permanent errors: an invalid event, a namespace that is being deleted, or (403) a missing permission."""


class EventClient:
    """Needs the verbs create and patch on events."""

    def __init__(self, api: client.ApiClient, instance: str) -> None:
        """``instance`` is the name of the authority's pod."""
        self._api = api
        self._instance = instance[:128] or "unknown"

    async def create(self, event: PodEvent) -> RecordedEvent:
        """Create the event, or increase its count if another replica created it.

        Raises EventRejected for a permanent error, CertmountError TokenReviewUnavailable for a temporary one.
        """
        try:
            return _recorded(await self._send("POST", event, "", self._body(event)))
        except Conflict:
            return await self.repeat(event, await self._read(event), 1, event.first_at)

    async def repeat(self, event: PodEvent, known: RecordedEvent, more: int, last_at: float) -> RecordedEvent:
        """Increase the count by ``more``; ``last_at`` is in Unix seconds. Raises as :meth:`create`."""
        for _ in range(_MAX_CONFLICTS):
            try:
                return await self._increase(event, known, more, last_at)
            except Conflict:
                known = await self._read(event)
        return await self._increase(event, known, more, last_at)

    async def _increase(self, event: PodEvent, known: RecordedEvent, more: int, last_at: float) -> RecordedEvent:
        series = {"count": known.count + more, "lastObservedTime": _micro_time(last_at)}
        body = {"metadata": {"resourceVersion": known.version}, "series": series}
        return _recorded(await self._send("PATCH", event, f"/{event.name}", body))

    async def _read(self, event: PodEvent) -> RecordedEvent:
        """Send an empty patch, which needs no permission to read events."""
        return _recorded(await self._send("PATCH", event, f"/{event.name}", {}))

    async def _send(self, method: str, event: PodEvent, suffix: str, body: Json) -> Json:
        path = f"/apis/events.k8s.io/v1/namespaces/{event.namespace}/events{suffix}"
        headers = {"Content-Type": MERGE_PATCH} if method == "PATCH" else {}
        try:
            call = request_json(self._api, method, path, body=body, headers=headers)
            return await call_api(call, Reason.TOKEN_REVIEW_UNAVAILABLE, f"Event in namespace {event.namespace}")
        except ApiError as error:
            if error.status in _FINAL:
                raise EventRejected(str(error)) from None
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


def _recorded(found: Json) -> RecordedEvent:
    """Return the event's state; an event without a series occurred once."""
    try:
        version, series = str(found["metadata"]["resourceVersion"]), found.get("series") or {}
        return RecordedEvent(version, int(series.get("count", 1)))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise invalid_response(Reason.TOKEN_REVIEW_UNAVAILABLE, "Event") from None


def _micro_time(seconds: float) -> str:
    """Return a MicroTime (meta.k8s.io/v1): RFC 3339 with six digits after the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
