"""The administrator's policy file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import structlog

from csi_driver.authority.config.watched_file import Contents, WatchedFile, read_file
from csi_driver.config.located_yaml import MAX_BYTES, read_yaml
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import Policy
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

_CHECK_S = 2.0  # short compared with the minute that the kubelet needs to update a mounted ConfigMap


def read_policy(content: bytes, *, trust_domain: str, cluster_domain: str) -> Policy:
    """Parse a policy file (YAML), an empty one to the default policy; raises CertmountError InvalidPolicy with all faults."""
    located = read_yaml(content, "policy file", Reason.INVALID_POLICY)
    return parse_policy(
        located.data,
        trust_domain=trust_domain,
        cluster_domain=cluster_domain,
        revision=hashlib.sha256(content).hexdigest()[:16],
        lines=located.lines,
    )


class PolicyFile:
    """Provides the policy in force: the newest valid content of the file. ``on_change`` gets the revision of a new policy."""

    def __init__(
        self,
        file: Path,
        metrics: AuthorityMetrics,
        *,
        trust_domain: str,
        cluster_domain: str,
        on_change: Callable[[str], None] = lambda _revision: None,
    ) -> None:
        self._file, self._metrics, self._on_change = file, metrics, on_change

        def read() -> Contents:
            return {file.name: read_file(file, MAX_BYTES, Reason.INVALID_POLICY, "see --policy")}

        def parse(contents: Contents) -> Policy:
            return read_policy(contents[file.name], trust_domain=trust_domain, cluster_domain=cluster_domain)

        self._watched = WatchedFile("policy", read, parse, on_change=self._use, on_rejected=self._reject)

    @property
    def loaded(self) -> bool:
        return self._watched.value is not None

    @property
    def current(self) -> Policy:
        """The policy in force; raises CertmountError IssuerUnavailable before the first policy is loaded."""
        if self._watched.value is None:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the policy is not loaded yet")
        return self._watched.value

    async def load(self) -> None:
        await self._watched.load()

    async def run(self) -> None:
        await self._watched.run(_CHECK_S)

    def _use(self, policy: Policy) -> None:
        self._metrics.policy_valid.set(1)
        log.info("policy loaded", file=str(self._file), rules=len(policy.rules), revision=policy.revision)
        if policy.warnings:
            log.warning("policy has warnings", count=len(policy.warnings), first=policy.warnings[0])
        self._on_change(policy.revision)

    def _reject(self) -> None:
        self._metrics.policy_valid.set(0)
        self._metrics.policy_reload_failures.inc()
