"""The administrator's policy file: read with care, watched, and never replaced by a worse one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from pathlib import Path

import structlog

from csi_driver.authority.config.located_yaml import MAX_BYTES, read_yaml
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import Policy
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

_CHECK_S = 2.0
"""A ConfigMap reaches its volume within a minute or so; next to that, two seconds are nothing."""


def read_policy(content: bytes, *, trust_domain: str, cluster_domain: str) -> Policy:
    """Takes the content of a policy file (YAML); an empty one is the default policy.

    Raises:
        CertmountError: InvalidPolicy, with all that is wrong.
    """
    located = read_yaml(content, "policy file", Reason.INVALID_POLICY)
    return parse_policy(
        located.data,
        trust_domain=trust_domain,
        cluster_domain=cluster_domain,
        revision=hashlib.sha256(content).hexdigest()[:16],
        lines=located.lines,
    )


class PolicyFile:
    """The policy in force: that of the file's last content that was valid. ``on_change`` gets the revision of each."""

    def __init__(
        self,
        file: Path,
        metrics: AuthorityMetrics,
        *,
        trust_domain: str,
        cluster_domain: str,
        on_change: Callable[[str], None] | None = None,
    ) -> None:
        self._file = file
        self._metrics = metrics
        self._trust_domain = trust_domain
        self._cluster_domain = cluster_domain
        self._on_change = on_change
        self._seen: str | None = None
        self._policy: Policy | None = None

    @property
    def loaded(self) -> bool:
        """True once a valid content has been read."""
        return self._policy is not None

    @property
    def current(self) -> Policy:
        """The policy in force; raises CertmountError IssuerUnavailable before the first one is read."""
        if self._policy is None:
            raise CertmountError(Reason.ISSUER_UNAVAILABLE, "the policy is not loaded yet")
        return self._policy

    async def load(self) -> None:
        """Reads the file if its content is new; raises CertmountError InvalidPolicy, once for each content, and keeps the policy before."""
        content, problem = await asyncio.to_thread(self._read)
        seen = problem or hashlib.sha256(content).hexdigest()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._policy = await asyncio.to_thread(self._parse, content, problem)
        except CertmountError:
            self._metrics.policy_valid.set(0)
            self._metrics.policy_reload_failures.inc()
            raise
        self._metrics.policy_valid.set(1)
        revision = self._policy.revision
        log.info("policy loaded", file=str(self._file), rules=len(self._policy.rules), revision=revision)
        if self._on_change is not None:
            self._on_change(revision)

    async def run(self) -> None:
        """Follows the file for ever."""
        while True:
            await asyncio.sleep(_CHECK_S)
            try:
                await self.load()
            except CertmountError as error:
                log.error("policy refused; the one before stays in force", reason=error.reason.word, error=str(error))  # noqa: TRY400  # the text says all

    def _parse(self, content: bytes, problem: str) -> Policy:
        if problem:
            raise CertmountError(Reason.INVALID_POLICY, Fault(str(self._file), problem, "see --policy"))
        return read_policy(content, trust_domain=self._trust_domain, cluster_domain=self._cluster_domain)

    def _read(self) -> tuple[bytes, str]:
        """The content, or why there is none. By content and not by time, as volumes swap whole folders under a path."""
        try:
            with self._file.open("rb") as file:
                return file.read(MAX_BYTES + 1), ""
        except OSError as error:
            return b"", f"cannot be read: {error.strerror}"
