"""Events (events.k8s.io/v1; KEP-383). All replicas increase the count of one Event object."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import UTC, datetime

from csi_driver.core.cluster.objects import ClusterEvent, EventRejected, RecordedEvent
from csi_driver.core.errors import Reason
from csi_driver.kube.client import ApiError, Conflict, InvalidResponse, call_api
from csi_driver.kube.connection import Api
from csi_driver.kube.json_requests import MERGE_PATCH, request_json
from csi_driver.kube.metadata import Json

AUTHORITY, SECRETS = "certmount.dev/authority", "certmount.dev/secrets"  # reporting controllers
_ACTION = "IssueCertificate"
_MAX_CONFLICTS = 5
_FINAL = (400, 403, 404, 405, 413, 422)
"""Permanent errors: an invalid event, a namespace that is being deleted, or (403) a missing permission."""


class EventClient:
    """Needs the verbs create and patch on events."""

    def __init__(self, api: Api, instance: str, controller: str = AUTHORITY) -> None:
        """``instance`` is the name of the reporting pod."""
        self._api = api
        self._instance = instance[:128] or "unknown"
        self._controller = controller

    async def create(self, event: ClusterEvent) -> RecordedEvent:
        """Create the event, or increase its count if another replica created it.

        Raises EventRejected for a permanent error, CertmountError TokenReviewUnavailable for a temporary one.
        """
        try:
            return _recorded(event, await self._send("POST", event, "", self._body(event)))
        except Conflict:
            return await self.repeat(event, None, 1, event.first_at)

    async def repeat(
        self, event: ClusterEvent, known: RecordedEvent | None, more: int, last_at: float
    ) -> RecordedEvent:
        """Increase the count by ``more``; ``last_at`` is in Unix seconds. Raises as :meth:`create`."""
        for _ in range(_MAX_CONFLICTS):
            try:
                return await self._increase(event, known or await self._read(event), more, last_at)
            except Conflict:
                known = None
        # The owner of the namespace can change the Event all the time, which must not delay other events.
        raise _rejected(event, "other clients change it all the time")

    async def _increase(self, event: ClusterEvent, known: RecordedEvent, more: int, last_at: float) -> RecordedEvent:
        series = {"count": known.count + more, "lastObservedTime": _micro_time(last_at)}
        body = {"metadata": {"resourceVersion": known.version}, "series": series}
        return _recorded(event, await self._send("PATCH", event, f"/{event.name}", body))

    async def _read(self, event: ClusterEvent) -> RecordedEvent:
        """Send an empty patch, which needs no permission to read events."""
        return _recorded(event, await self._send("PATCH", event, f"/{event.name}", {}))

    async def _send(self, method: str, event: ClusterEvent, suffix: str, body: Json) -> Json:
        path = f"/apis/events.k8s.io/v1/namespaces/{event.namespace}/events{suffix}"
        headers = {"Content-Type": MERGE_PATCH} if method == "PATCH" else {}
        target = f"Event {event.namespace}/{event.name}"
        try:
            call = request_json(self._api, method, path, body=body, headers=headers)
            return await call_api(_unless_invalid(call, event), Reason.TOKEN_REVIEW_UNAVAILABLE, target)
        except ApiError as error:
            if error.status in _FINAL:
                raise EventRejected(str(error)) from None
            raise

    def _body(self, event: ClusterEvent) -> Json:
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": event.name, "namespace": event.namespace},
            "eventTime": _micro_time(event.first_at),
            "reportingController": self._controller,
            "reportingInstance": self._instance,
            "action": _ACTION,
            "reason": event.reason,
            "type": "Warning" if event.warning else "Normal",
            "note": event.message,
            "regarding": {
                "apiVersion": event.target.api_version,
                "kind": event.target.kind,
                "namespace": event.target.namespace,
                "name": event.target.name,
                "uid": event.target.uid,
            },
        }


async def _unless_invalid(call: Awaitable[Json], event: ClusterEvent) -> Json:
    """Return the response. The owner of the namespace can create the Event with any content, also with megabytes."""
    try:
        return await call
    except (InvalidResponse, ValueError):
        raise _rejected(event, "the response is too large or invalid") from None


def _recorded(event: ClusterEvent, found: Json) -> RecordedEvent:
    """Return the event's state; an event without a series occurred once."""
    try:
        version, series = str(found["metadata"]["resourceVersion"]), found.get("series") or {}
        return RecordedEvent(version, int(series.get("count", 1)))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _rejected(event, "it has no resource version, or its series is invalid") from None


def _rejected(event: ClusterEvent, problem: str) -> EventRejected:
    return EventRejected(f"Event {event.namespace}/{event.name}: {problem}")


def _micro_time(seconds: float) -> str:
    """Return a MicroTime (meta.k8s.io/v1): RFC 3339 with six digits after the second."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
