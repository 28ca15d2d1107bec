"""The provisioners of a step-ca as it lists them to anyone, and whether the authority's key is one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import quote

from csi_driver.authority.issuers.external import Finding
from csi_driver.authority.issuers.step_ca.client import Client, Unreachable
from csi_driver.authority.issuers.step_ca.provisioner_key import ProvisionerKey, thumbprint
from csi_driver.core.durations import format_duration, parse_duration
from csi_driver.core.secret import Secret

_MOST_PAGES = 50
"""Of a hundred provisioners each, which is step-ca's own limit for a page."""
_MOST_NAMED = 10


@dataclass(frozen=True, slots=True)
class Lives:
    """How long a certificate may live; None where the provisioner leaves it to the whole CA, whose limits step-ca doesn't tell."""

    shortest: timedelta | None = None
    longest: timedelta | None = None

    def problem(self, life: timedelta) -> str | None:
        """Why a certificate of this life won't be had, in words that follow the life; None where nothing is known against it."""
        if (self.shortest is not None and life < self.shortest) or (self.longest is not None and life > self.longest):
            return f"is not within what the provisioner signs, {self}"
        return None

    def __str__(self) -> str:
        if self.shortest is None and self.longest is None:
            return "what step-ca's configuration says as a whole: 5m to 24h, unless changed there"
        least = "what the CA allows" if self.shortest is None else format_duration(self.shortest)
        most = "what the CA allows" if self.longest is None else format_duration(self.longest)
        return f"{least} to {most}"


@dataclass(frozen=True, slots=True)
class Provisioner:
    """One provisioner; the key's parts are empty for other types than JWK."""

    name: str
    type: str
    kid: str
    thumbprint: str
    encrypted_key: Secret[bytes] | None
    """A JWE of the private key, which step-ca hands to anyone: its password is all that protects it."""
    lives: Lives


async def list_provisioners(client: Client) -> tuple[Provisioner, ...]:
    """All of them; raises Unreachable."""
    found: list[Provisioner] = []
    cursor = ""
    for _ in range(_MOST_PAGES):
        answer = await client.get(f"/provisioners?limit=100&cursor={quote(cursor)}")
        if answer.status != 200:
            raise Unreachable(
                "provisioner", f"it answers HTTP {answer.status} to /provisioners {answer.message}".rstrip()
            )
        found += _read(answer.document)
        cursor = str(answer.document.get("nextCursor") or "")
        if not cursor:
            break
    return tuple(found)


def choose(provisioners: Sequence[Provisioner], name: str) -> tuple[Provisioner | None, Finding]:
    """The JWK provisioner of a name, and what there is to say of it."""
    named = [one for one in provisioners if one.name == name]
    usable = [one for one in named if one.type == "JWK" and one.thumbprint]
    if usable:
        return usable[0], Finding("provisioner", True, f"{name} is a JWK provisioner with kid {usable[0].kid}")
    if named:
        text = (
            f"{name} is of type {named[0].type}; a JWK provisioner is needed: `step ca provisioner add NAME --type JWK`"
        )
        return None, Finding("provisioner", False, text)
    known = [f"{one.name} ({one.type})" for one in provisioners]
    more = f" and {len(known) - _MOST_NAMED} more" if len(known) > _MOST_NAMED else ""
    there = f"it has {', '.join(known[:_MOST_NAMED])}{more}" if known else "it has none"
    return None, Finding("provisioner", False, f"step-ca has no provisioner by the name {name}; {there}")


def judge_key(provisioner: Provisioner, key: ProvisionerKey) -> Finding:
    """Whether the private key is that provisioner's."""
    if key.thumbprint == provisioner.thumbprint and key.kid == provisioner.kid:
        return Finding("key", True, "it is the provisioner's")
    if key.thumbprint == provisioner.thumbprint:
        text = f"it is the provisioner's, but its kid is {key.kid} and step-ca knows it as {provisioner.kid}; correct the kid"
    elif key.kid == provisioner.kid:
        text = f"it has the provisioner's kid, {key.kid}, but is another key; take the private JWK that belongs to it"
    else:
        text = f"it is another one: its kid is {key.kid}, the provisioner's is {provisioner.kid}; take the private JWK of this provisioner"
    return Finding("key", False, text)


def _read(document: Mapping[str, Any]) -> Iterator[Provisioner]:
    entries = document.get("provisioners")
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        key = entry.get("key") if entry.get("type") == "JWK" else None
        encrypted = entry.get("encryptedKey")
        yield Provisioner(
            name=str(entry.get("name", "")),
            type=str(entry.get("type", "")),
            kid=str(key.get("kid", "")) if isinstance(key, dict) else "",
            thumbprint=thumbprint(key) or "",
            encrypted_key=Secret(encrypted.encode()) if isinstance(encrypted, str) and encrypted else None,
            lives=_lives(entry.get("claims")),
        )


def _lives(claims: object) -> Lives:
    told = claims if isinstance(claims, dict) else {}
    return Lives(_duration(told.get("minTLSCertDuration")), _duration(told.get("maxTLSCertDuration")))


def _duration(text: object) -> timedelta | None:
    try:
        return parse_duration(text) if isinstance(text, str) else None
    except ValueError:
        return None
