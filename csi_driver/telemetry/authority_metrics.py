"""Prometheus metrics of the authority."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from csi_driver.core.errors import Reason
from csi_driver.telemetry.outcomes import outcome

_MAX_SERIES = 1024  # that are found without a lookup of their labels
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class AuthorityMetrics:
    """The metrics of requests, issuers, policy and CA. They exist from the first scrape on."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = functools.partial(Counter, namespace="certmount", registry=registry)
        gauge = functools.partial(Gauge, namespace="certmount", registry=registry)
        histogram = functools.partial(Histogram, namespace="certmount", registry=registry, buckets=_SECONDS)
        # Returns the series of a metric. Labels come from the code and the configuration, so there are few.
        self._child = functools.lru_cache(_MAX_SERIES)(_child)
        self._calls = counter(
            "authority_calls", "Number of completed calls by method and reason.", ("method", "reason")
        )
        self._call_seconds = histogram(
            "authority_call_duration_seconds", "Duration of Issue calls in seconds by method.", ("method",)
        )
        self._issuer_calls = counter(
            "issuer_calls", "Number of issuance requests by issuer and reason.", ("issuer", "reason")
        )
        self._issuer_seconds = histogram(
            "issuer_call_duration_seconds", "Duration of issuance requests in seconds by issuer.", ("issuer",)
        )
        self._acme_orders = counter(
            "acme_orders",
            "Number of attempts of ACME orders by issuer and result (issued or failed).",
            ("issuer", "result"),
        )
        self.in_flight = gauge("authority_issues_in_flight", "Number of Issue calls in progress.")
        self.watchers = gauge("authority_trust_watchers", "Number of open WatchTrust streams.")
        self.review_seconds = histogram("token_review_duration_seconds", "Duration of TokenReviews in seconds.")
        self.token_verification_failures = counter(
            "token_verification_failures",
            "Number of failed TokenReviews (source review) and failed refreshes of the token keys (source keys).",
            ("source",),
        )
        for source in ("review", "keys"):
            self.token_verification_failures.labels(source)
        self.policy_valid = gauge("policy_valid", "1 if the content of the policy file is in force, otherwise 0.")
        self.policy_reload_failures = counter("policy_reload_failures", "Number of rejected policy files.")
        self.issuers_valid = gauge("issuers_valid", "1 if the content of the issuers file is in force, otherwise 0.")
        self.issuers_reload_failures = counter("issuers_reload_failures", "Number of rejected issuers files.")
        self.ca_expiry = gauge(
            "ca_expiry_timestamp_seconds", "Expiry time of the CA's certificates in Unix seconds.", ("certificate",)
        )
        self.ca_valid = gauge("ca_valid", "1 if the content of the CA's Secret or files is in force, otherwise 0.")
        self.ca_refresh_failures = counter(
            "ca_refresh_failures", "Number of failures to read, renew or publish the CA."
        )
        self.ca_rotation = gauge("ca_rotation", "1 for the current phase of the CA rotation, otherwise 0.", ("phase",))
        self.unacknowledged_nodes = gauge(
            "ca_rotation_unacknowledged_nodes",
            "Number of nodes whose acknowledgement the CA rotation waits for. Its ClusterTrustBundle counts as a node.",
        )
        self.federation_failures = counter(
            "federation_reload_failures", "Number of rejected contents of the federation directory."
        )
        self.serving_expiry = gauge(
            "serving_certificate_expiry_timestamp_seconds",
            "Expiry time of the authority's serving certificate in Unix seconds.",
        )

    def issuer_called(self, issuer: str, seconds: float, reason: Reason | None) -> None:
        """Count one issuance request. Issuer names come from the configuration, so there are few."""
        self._child(self._issuer_calls, issuer, outcome(reason)).inc()
        self._child(self._issuer_seconds, issuer).observe(seconds)

    def acme_order_counter(self, issuer: str) -> Callable[[str], None]:
        """Return what counts an order of the issuer by its result. Alerts see the first failure, because both begin at zero."""
        for result in ("issued", "failed"):
            self._acme_orders.labels(issuer, result)
        return lambda result: self._acme_orders.labels(issuer, result).inc()

    def call_ended(self, method: str, seconds: float, reason: Reason | None, *, cancelled: bool = False) -> None:
        """Count a call. Only the duration of Issue is observed: streams stay open by design."""
        self._child(self._calls, method, outcome(reason, cancelled=cancelled)).inc()
        if method.endswith("Issue"):
            self._child(self._call_seconds, method).observe(seconds)


def _child(metric: Counter | Histogram, *labels: str) -> Any:
    return metric.labels(*labels)


class ClusterMetrics(Collector):
    """Counters of pod events, and the seconds of failing watches by resource, which another thread reads at each scrape."""

    def __init__(self, registry: CollectorRegistry, failing_s: Callable[[], Mapping[str, float]]) -> None:
        self._failing_s = failing_s
        self.events_written = Counter(
            "certmount_events_written", "Number of pod events written, including repeats.", registry=registry
        )
        self.events_dropped = Counter(
            "certmount_events_dropped",
            "Number of pod events not written by cause: object (too many of one pod), share (too many of one "
            "namespace or service account), "
            "rejected (by the API server) or late.",
            ("cause",),
            registry=registry,
        )
        for cause in ("object", "share", "rejected", "late"):
            self.events_dropped.labels(cause)
        registry.register(self)

    def event_written(self) -> None:
        self.events_written.inc()

    def event_dropped(self, cause: str) -> None:
        self.events_dropped.labels(cause).inc()

    def collect(self) -> Iterable[Metric]:
        text = "Seconds for which a resource could not be watched. Beyond 60 seconds no certificates are issued."
        family = GaugeMetricFamily("certmount_watch_failing_seconds", text, labels=["resource"])
        for resource, seconds in self._failing_s().items():
            family.add_metric([resource], seconds)
        yield family
