"""``certmount authority --check``: everything that an authority needs is looked at, and nothing is changed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from csi_driver.authority.authn.token_keys import parse_keys
from csi_driver.authority.ca.ca_files import CAFiles
from csi_driver.authority.ca.keyring import Keyring
from csi_driver.authority.ca.sources import StoredCA
from csi_driver.authority.issuers.kinds import read_issuers
from csi_driver.authority.issuers.external import Finding
from csi_driver.authority.policy.policy_file import PolicyFile
from csi_driver.authority.storage import Store
from csi_driver.core.cluster.token_review import PublishedKeys
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import fingerprint

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at. ``look`` gives what it found, in words, or raises CertmountError."""

    what: str
    look: Callable[[], Awaitable[str]]


async def check(checks: Sequence[Check]) -> list[Finding]:
    """Does all of them, whatever the others come to; the findings are in the same order."""
    return list(await asyncio.gather(*(_find(each) for each in checks)))


async def _find(each: Check) -> Finding:
    try:
        return Finding(each.what, True, await each.look())
    except CertmountError as error:
        return Finding(each.what, False, str(error))


def policy_check(policy: PolicyFile) -> Check:
    """The policy file, as the authority would read it."""

    async def look() -> str:
        await policy.load()
        rules = len(policy.current.rules)
        return f"{rules} rule{'' if rules == 1 else 's'} beside the built-in one, revision {policy.current.revision}"

    return Check("policy", look)


def ca_check(source: Store | CAFiles) -> Check:
    """The CA, read and verified, never made. A store without one is in order: an authority makes it at its first start."""

    async def look() -> str:
        now = datetime.now(UTC).replace(microsecond=0)
        if isinstance(source, CAFiles):
            return _described(await source.refresh(now))
        if not (await source.load()).values:
            return f"{source.name} keeps none yet; an authority makes one when it first starts"
        return _described((await StoredCA(source).look_up(now)).keyring)

    return Check("certificate authority", look)


def token_keys_check(fetch: Callable[[], Awaitable[PublishedKeys]]) -> Check:
    """The keys that service-account tokens are signed with."""

    async def look() -> str:
        keys = parse_keys(await fetch())
        return f"{len(keys.keys)} of issuer {keys.issuer}"

    return Check("token keys", look)


def issuers_check(file: Path) -> Check:
    """The file that declares issuers; what it refers to is looked at by ``certmount issuer check``."""

    async def look() -> str:
        try:
            content = await asyncio.to_thread(file.read_bytes)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            raise CertmountError(Reason.INVALID_ISSUERS, Fault(str(file), problem, "see --issuers")) from None
        names = ", ".join(declared.name for declared in read_issuers(content))
        return f"{names}; certmount issuer check looks at them" if names else "none beside the internal CA"

    return Check("issuers", look)


def permission_checks(permissions: Iterable[_T], has: Callable[[_T], Awaitable[bool]]) -> list[Check]:
    """One for each permission, whose text says what it is; ``has`` asks the API server."""
    return [_permission_check(permission, has) for permission in permissions]


def _permission_check(permission: _T, has: Callable[[_T], Awaitable[bool]]) -> Check:
    async def look() -> str:
        if not await has(permission):
            hint = "the roles certmount-authority of deploy/base/authority.yaml give it; apply them anew"
            raise CertmountError(Reason.INVALID_REQUEST, Fault(str(permission), "is not permitted", hint))
        return "permitted"

    return Check(f"permission to {permission}", look)


def _described(keyring: Keyring) -> str:
    ends = f"{keyring.intermediate.certificate.not_valid_after_utc:%Y-%m-%d}"
    return f"root {fingerprint(keyring.root)}, its intermediate ends on {ends}"
