"""``certmount authority --check``: check everything that an authority needs, and change nothing."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from csi_driver.authority.authn.token_keys import parse_keys
from csi_driver.authority.ca.sources import CASource
from csi_driver.authority.config.watched_file import read_file
from csi_driver.authority.issuers import Finding
from csi_driver.authority.issuers.kinds import read_issuers
from csi_driver.authority.policy.policy_file import PolicyFile
from csi_driver.core.cluster.objects import PublishedKeys
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import fingerprint
from csi_driver.core.texts import count

_T = TypeVar("_T")
_MAX_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class DiagnosticCheck:
    """One thing to check. ``run`` returns what it found, or raises CertmountError."""

    subject: str
    run: Callable[[], Awaitable[str]]


async def run_checks(checks: Sequence[DiagnosticCheck]) -> list[Finding]:
    """Run all checks, even if some fail; return the findings in the order of the checks."""

    async def find(check: DiagnosticCheck) -> Finding:
        try:
            return Finding(check.subject, True, await check.run())
        except CertmountError as error:
            return Finding(check.subject, False, str(error))

    return list(await asyncio.gather(*map(find, checks)))


def policy_check(policy: PolicyFile) -> DiagnosticCheck:
    async def run() -> str:
        await policy.load()
        rules = count(len(policy.current.rules), "rule")
        return f"{rules} and the built-in rule, revision {policy.current.revision}"

    return DiagnosticCheck("policy", run)


def ca_check(source: CASource) -> DiagnosticCheck:
    async def run() -> str:
        state = await source.read(datetime.now(UTC).replace(microsecond=0))
        if state is None:  # not a failure
            return f"{source.name} contains no CA yet; the authority creates one when it first starts"
        expiry = state.keyring.intermediate.certificate.not_valid_after_utc
        return f"root {fingerprint(state.keyring.root)}, its intermediate expires on {expiry:%Y-%m-%d}"

    return DiagnosticCheck("certificate authority", run)


def token_keys_check(fetch: Callable[[], Awaitable[PublishedKeys]]) -> DiagnosticCheck:
    async def run() -> str:
        keys = parse_keys(await fetch())
        return f"{len(keys.keys)} of issuer {keys.issuer}"

    return DiagnosticCheck("token keys", run)


def issuers_check(file: Path) -> DiagnosticCheck:
    """Check that the issuers file is valid. ``certmount issuer check`` checks the issuers themselves."""

    async def run() -> str:
        content = await asyncio.to_thread(read_file, file, _MAX_BYTES, Reason.INVALID_ISSUERS, "see --issuers")
        names = ", ".join(declared.name for declared in read_issuers(content))
        return f"{names}; run `certmount issuer check` to check them" if names else "only the internal CA"

    return DiagnosticCheck("issuers", run)


def permission_checks(
    permissions: Iterable[_T],
    has_permission: Callable[[_T], Awaitable[bool]],
    hint: str = "apply the roles certmount-authority of deploy/base/authority.yaml",
) -> list[DiagnosticCheck]:
    """Return a check for each permission, whose text describes it."""

    async def run(permission: _T) -> str:
        if not await has_permission(permission):
            raise CertmountError(Reason.INVALID_REQUEST, Fault(str(permission), "is not permitted", hint))
        return "permitted"

    return [DiagnosticCheck(f"permission to {each}", functools.partial(run, each)) for each in permissions]
