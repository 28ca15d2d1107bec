"""The authority's figures for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from csi_driver.core.errors import Reason

_CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class AuthorityMetrics:
    """All of them in one registry, made at once, so that each is there from the first scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = Counter(
            "certmount_authority_calls",
            "Calls that ended, by reason (Ok, or why not).",
            ("method", "reason"),
            registry=registry,
        )
        self._call_seconds = Histogram(
            "certmount_authority_call_seconds",
            "How long Issue took.",
            ("method",),
            buckets=_CALL_BUCKETS,
            registry=registry,
        )
        self._issuer_calls = Counter(
            "certmount_issuer_calls",
            "Orders that an issuer answered, by reason (Ok, or why it did not sign).",
            ("issuer", "reason"),
            registry=registry,
        )
        self._issuer_seconds = Histogram(
            "certmount_issuer_seconds",
            "How long issuers took.",
            ("issuer",),
            buckets=_CALL_BUCKETS,
            registry=registry,
        )
        self.in_flight = Gauge("certmount_authority_issues_in_flight", "Issue calls under way.", registry=registry)
        self.watchers = Gauge("certmount_authority_trust_watchers", "WatchTrust streams open.", registry=registry)
        self.review_seconds = Histogram(
            "certmount_token_review_seconds", "How long TokenReviews took.", buckets=_CALL_BUCKETS, registry=registry
        )
        self.proof_failures = Counter(
            "certmount_token_proof_failures",
            "TokenReviews or key sets that could not be had.",
            ("proof",),
            registry=registry,
        )
        for proof in ("review", "keys"):
            self.proof_failures.labels(proof)
        self.policy_valid = Gauge(
            "certmount_policy_valid", "1 while the policy file is the policy in force.", registry=registry
        )
        self.policy_reload_failures = Counter(
            "certmount_policy_reload_failures", "New contents of the policy file that were refused.", registry=registry
        )
        self.issuers_valid = Gauge(
            "certmount_issuers_valid", "1 while the issuers' file is what is in force.", registry=registry
        )
        self.issuers_reload_failures = Counter(
            "certmount_issuers_reload_failures",
            "New contents of the issuers' file that were refused.",
            registry=registry,
        )
        self.ca_expiry = Gauge(
            "certmount_ca_expiry_timestamp_seconds",
            "When the CA's certificates expire.",
            ("certificate",),
            registry=registry,
        )
        self.ca_refresh_failures = Counter(
            "certmount_ca_refresh_failures",
            "Times that the CA could not be read, renewed or published.",
            registry=registry,
        )
        self.ca_rotation = Gauge(
            "certmount_ca_rotation",
            "1 for the phase that the rotation of the CA is in, 0 for the others.",
            ("phase",),
            registry=registry,
        )
        self.unconfirmed = Gauge(
            "certmount_ca_rotation_unconfirmed_nodes",
            "Nodes that a rotation of the CA waits for; 0 while it waits for none.",
            registry=registry,
        )
        self.federation_failures = Counter(
            "certmount_federation_reload_failures",
            "New contents of the federation folder that were refused.",
            registry=registry,
        )
        self.serving_expiry = Gauge(
            "certmount_serving_certificate_expiry_timestamp_seconds",
            "When the authority's own certificate expires.",
            registry=registry,
        )

    def issuer_called(self, issuer: str, seconds: float, reason: Reason | None) -> None:
        """Counts one order; ``issuer`` is one that the administrator named, so there are few."""
        self._issuer_calls.labels(issuer, _word(reason)).inc()
        self._issuer_seconds.labels(issuer).observe(seconds)

    def issuers_loaded(self, taken: bool) -> None:
        """A new content of the issuers' file was taken, or refused."""
        self.issuers_valid.set(taken)
        if not taken:
            self.issuers_reload_failures.inc()

    def call_ended(self, method: str, seconds: float, reason: Reason | None) -> None:
        """Counts a call; streams are open by design, so their length tells nothing."""
        self._calls.labels(method, _word(reason)).inc()
        if method == "Issue":
            self._call_seconds.labels(method).observe(seconds)


def _word(reason: Reason | None) -> str:
    return "Ok" if reason is None else reason.word
