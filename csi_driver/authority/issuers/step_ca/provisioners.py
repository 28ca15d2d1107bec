"""The provisioners that step-ca publishes, and what they sign."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from csi_driver.authority.issuers import Finding, IssuerRequest
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.provisioner_key import ProvisionerKey, thumbprint
from csi_driver.core.durations import format_duration, parse_duration
from csi_driver.core.errors import Fault
from csi_driver.core.identity import Principal
from csi_driver.core.names import Names
from csi_driver.core.secret import Secret
from csi_driver.core.spec import Usage

MAX_LISTED = 10
_MAX_TEXT = 200
_USAGES = {Usage.SERVER: "serverAuth", Usage.CLIENT: "clientAuth"}
_MAX_COMMON_NAME = 64  # RFC 5280 appendix A.1, ub-common-name


@dataclass(frozen=True, slots=True)
class LifetimeLimits:
    """The lifetimes that a provisioner allows; None for a limit of the whole CA, which step-ca does not publish."""

    minimum: timedelta | None = None
    maximum: timedelta | None = None

    def problem(self, lifetime: timedelta) -> str | None:
        """Return why the provisioner won't sign this lifetime, in words that follow it; None if no limit is known."""
        if (self.minimum is not None and lifetime < self.minimum) or (
            self.maximum is not None and lifetime > self.maximum
        ):
            return f"is outside the limits of the provisioner, {self}"
        return None

    def __str__(self) -> str:
        if self.minimum is None and self.maximum is None:
            return "the limits of the whole CA (step-ca's default: 5m to 24h)"
        minimum = "the CA's minimum" if self.minimum is None else format_duration(self.minimum)
        maximum = "the CA's maximum" if self.maximum is None else format_duration(self.maximum)
        return f"{minimum} to {maximum}"


@dataclass(frozen=True, slots=True)
class Provisioner:
    """One provisioner; the key attributes are empty if its type is not JWK."""

    name: str
    type: str
    kid: str
    thumbprint: str
    encrypted_key: Secret[bytes] | None  # A JWE, which step-ca publishes: only its password protects it
    limits: LifetimeLimits


def select_provisioner(provisioners: Sequence[Provisioner], name: str) -> tuple[Provisioner | None, Finding]:
    named = [one for one in provisioners if one.name == name]
    usable = [one for one in named if one.type == "JWK" and one.thumbprint]
    if usable:
        return usable[0], Finding("provisioner", True, f"{name} is a JWK provisioner with kid {usable[0].kid}")
    if named:
        text = f"{name} has type {named[0].type}; expected JWK; run `step ca provisioner add NAME --type JWK`"
        return None, Finding("provisioner", False, text)
    known = [f"{one.name} ({one.type})" for one in provisioners]
    more = " and others" if len(known) > MAX_LISTED else ""
    available = f"it has {', '.join(known[:MAX_LISTED])}{more}" if known else "it has no provisioners"
    return None, Finding("provisioner", False, f"step-ca has no provisioner {name}; {available}")


def check_key(provisioner: Provisioner, key: ProvisionerKey) -> Finding:
    if key.thumbprint == provisioner.thumbprint and key.kid == provisioner.kid:
        return Finding("key", True, "matches the provisioner")
    if key.thumbprint == provisioner.thumbprint:
        text = f"matches the provisioner, but its kid is {key.kid}, not {provisioner.kid}; correct the kid"
    elif key.kid == provisioner.kid:
        text = f"has the provisioner's kid, {key.kid}, but is another key; use the provisioner's private JWK"
    else:
        text = f"is another key: its kid is {key.kid}, not {provisioner.kid}; use the provisioner's private JWK"
    return Finding("key", False, text)


def parse_provisioners(document: Mapping[str, Any]) -> Iterator[Provisioner]:
    """Return the provisioners in a response of step-ca; skip invalid entries."""
    entries = document.get("provisioners")
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        key = entry.get("key") if entry.get("type") == "JWK" else None
        encrypted = entry.get("encryptedKey")
        yield Provisioner(
            name=_text(entry.get("name")),
            type=_text(entry.get("type")),
            kid=_text(key.get("kid")) if isinstance(key, dict) else "",
            thumbprint=thumbprint(key) or "",
            encrypted_key=Secret(encrypted.encode()) if isinstance(encrypted, str) and encrypted else None,
            limits=_parse_limits(entry.get("claims")),
        )


def _text(value: object) -> str:
    return value[:_MAX_TEXT] if isinstance(value, str) and value.isprintable() else ""


def _parse_limits(claims: object) -> LifetimeLimits:
    values = claims if isinstance(claims, dict) else {}
    return LifetimeLimits(*(_parse_duration(values.get(f"{name}TLSCertDuration")) for name in ("min", "max")))


def _parse_duration(text: object) -> timedelta | None:
    try:
        return parse_duration(text) if isinstance(text, str) else None
    except ValueError:
        return None


def request_faults(request: IssuerRequest, limits: LifetimeLimits) -> list[Fault]:
    faults: list[Fault] = []
    if not isinstance(request.csr.public_key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
        faults.append(Fault("key-type", "step-ca signs only RSA, EC and Ed25519 keys"))
    if problem := limits.problem(request.grant.duration):
        faults.append(Fault("duration", f"{format_duration(request.grant.duration)} {problem}"))
    requested, granted = set(request.csr.names.uris), set(request.grant.names.uris)
    if requested and requested != granted:
        # step-ca accepts a CSR that contains all URIs of the token or none; the node's CSR contains what the pod requested.
        missing = ", ".join(sorted(str(uri) for uri in granted - requested))
        problem = "step-ca requires a request with URIs to contain all URIs of the certificate"
        faults.append(Fault("uri-sans", problem, f"add {missing} to the volume's uri-sans"))
    return faults


def token_claims(request: IssuerRequest, configuration: StepCAConfiguration, nonce: str) -> dict[str, object]:
    return {
        "iss": configuration.provisioner,
        "aud": f"{configuration.url}/1.0/sign",
        "sub": _subject(request.grant.names, request.identity.principal),
        "sans": [str(name) for name in request.grant.names],
        "extKeyUsage": [_USAGES[usage] for usage in request.grant.usages],  # for templates: `.Token.extKeyUsage`
        "jti": nonce,
    }


def _subject(names: Names, owner: Principal) -> str:
    """Return the common name that step-ca requires: a DNS name, or a text with a slash, which no verifier accepts as one."""
    if names.dns and len(names.dns[0].text) <= _MAX_COMMON_NAME:
        return names.dns[0].text
    return f"{owner.namespace}/{owner.name}"[:_MAX_COMMON_NAME]
