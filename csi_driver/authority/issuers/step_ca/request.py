"""Translates a request into the terms of step-ca, and finds what step-ca is known not to sign."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.provisioners import LifetimeLimits
from csi_driver.core.durations import format_duration
from csi_driver.core.errors import Fault
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.names import Names
from csi_driver.core.spec import Usage

_USAGES = {Usage.SERVER: "serverAuth", Usage.CLIENT: "clientAuth"}
_MAX_COMMON_NAME = 64  # RFC 5280 appendix A.1, ub-common-name


def request_faults(request: IssuerRequest, limits: LifetimeLimits) -> list[Fault]:
    """Return why step-ca won't sign the request. Its own errors say less."""
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
        "sub": _subject(request.grant.names, request.identity.service_account),
        "sans": [str(name) for name in request.grant.names],
        "extKeyUsage": [_USAGES[usage] for usage in request.grant.usages],  # for templates: `.Token.extKeyUsage`
        "jti": nonce,
    }


def _subject(names: Names, account: ServiceAccount) -> str:
    """Return the common name, which step-ca requires.

    It is a DNS name of the certificate, or else contains a slash, so that no verifier accepts it as a DNS name.
    """
    if names.dns and len(names.dns[0].text) <= _MAX_COMMON_NAME:
        return names.dns[0].text
    return str(account)[:_MAX_COMMON_NAME]
