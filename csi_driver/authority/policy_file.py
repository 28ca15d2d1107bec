"""The administrator's policy file: read with care, watched, and never replaced by a worse one."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import structlog
import yaml

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.policy import Policy
from csi_driver.core.policy_document import parse_policy
from csi_driver.telemetry.authority_metrics import AuthorityMetrics

log = structlog.get_logger(__name__)

_MAX_BYTES = 1024 * 1024
_MOST_NESTING = 20
_CHECK_S = 2.0
"""A ConfigMap reaches its volume within a minute or so; next to that, two seconds are nothing."""
# libyaml where PyYAML was built with it: a megabyte takes the pure parser many seconds.
_Base: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]  # one of two loaders, by how PyYAML was built
    """Plain data only; a key that stands twice in a mapping is a mistake, not the last one's victory (YAML 1.2 section 3.2.1.3)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, Hashable) else None)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def read_policy(content: bytes, *, trust_domain: str, cluster_domain: str) -> Policy:
    """Takes the content of a policy file (YAML); an empty one is the default policy.

    Raises:
        CertmountError: InvalidPolicy, with all that is wrong.
    """
    if len(content) > _MAX_BYTES:
        raise _invalid(f"is longer than {_MAX_BYTES} bytes")
    try:
        text = content.decode("utf-8")
        _check_shape(text)
        document = yaml.load(text, Loader=_Loader)  # noqa: S506  # _Loader is a safe loader
    except UnicodeDecodeError:
        raise _invalid("is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise _invalid(f"is not YAML{where}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _invalid(f"is not YAML that can be read ({type(error).__name__})") from None
    return parse_policy(document, trust_domain=trust_domain, cluster_domain=cluster_domain)


def _check_shape(text: str) -> None:
    """Refuses, before anything is built, what a few bytes can make huge or slow, and what no policy needs."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise _invalid("has an alias (*name)", "write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MOST_NESTING:
            raise _invalid(f"is nested more than {_MOST_NESTING} deep")


def _invalid(problem: str, hint: str = "") -> CertmountError:
    return CertmountError(Reason.INVALID_POLICY, Fault("policy file", problem, hint))


class PolicyFile:
    """The policy in force: that of the file's last content that was valid."""

    def __init__(self, file: Path, metrics: AuthorityMetrics, *, trust_domain: str, cluster_domain: str) -> None:
        self._file = file
        self._metrics = metrics
        self._trust_domain = trust_domain
        self._cluster_domain = cluster_domain
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
        log.info("policy loaded", file=str(self._file), rules=len(self._policy.rules))

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
                return file.read(_MAX_BYTES + 1), ""
        except OSError as error:
            return b"", f"cannot be read: {error.strerror}"
