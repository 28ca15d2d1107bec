"""An order in step-ca's words, and what step-ca is known not to sign."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from csi_driver.authority.issuers import IssuerRequest
from csi_driver.authority.issuers.step_ca.config import StepCAConfiguration
from csi_driver.authority.issuers.step_ca.provisioner_key import Claims
from csi_driver.authority.issuers.step_ca.provisioners import Lives
from csi_driver.core.durations import format_duration
from csi_driver.core.errors import Fault
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.names import Names
from csi_driver.core.spec import Usage

_PURPOSES = {Usage.SERVER: "serverAuth", Usage.CLIENT: "clientAuth"}
_MAX_COMMON_NAME = 64
"""RFC 5280 appendix A.1, ub-common-name."""


def order_faults(order: IssuerRequest, lives: Lives) -> list[Fault]:
    """Why step-ca won't sign it, told before it is asked, as it would say less."""
    faults: list[Fault] = []
    if not isinstance(
        order.request.public_key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
    ):
        faults.append(Fault("key-type", "step-ca signs RSA, EC and Ed25519 keys only"))
    if problem := lives.problem(order.grant.duration):
        faults.append(Fault("duration", f"{format_duration(order.grant.duration)} {problem}"))
    asked, granted = set(order.request.names.uris), set(order.grant.names.uris)
    if asked and asked != granted:
        # It takes a request that names all URIs of the token or none, and the node has put in what the pod asked for.
        missing = ", ".join(sorted(str(uri) for uri in granted - asked))
        hint = f"add {missing} to the volume's uri-sans"
        faults.append(
            Fault("uri-sans", "step-ca wants a request that names URIs to name all of the certificate's", hint)
        )
    return faults


def claims_of(order: IssuerRequest, configuration: StepCAConfiguration, nonce: str) -> Claims:
    """What a token for the order is to say."""
    return Claims(
        issuer=configuration.provisioner,
        audience=f"{configuration.url}/1.0/sign",
        subject=_subject(order.grant.names, order.identity.service_account),
        sans=[str(name) for name in order.grant.names],
        purposes=[_PURPOSES[usage] for usage in order.grant.usages],
        csr=order.request.der,
        nonce=nonce,
    )


def _subject(names: Names, account: ServiceAccount) -> str:
    """The common name, which step-ca won't leave empty: a DNS name, else words with a slash, which no verifier takes for one."""
    if names.dns and len(names.dns[0].text) <= _MAX_COMMON_NAME:
        return names.dns[0].text
    return str(account)[:_MAX_COMMON_NAME]
