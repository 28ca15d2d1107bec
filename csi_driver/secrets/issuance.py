"""Obtain a certificate for a Secret. The key exists only in memory until it is written to the Secret."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

from cryptography import x509

from csi_driver.core.certificates.csr import build_csr
from csi_driver.core.certificates.keys import PrivateKey, generate_key, is_expensive, key_type_of
from csi_driver.core.certificates.verification import ExpectedCertificate, verify_certificate
from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.formats.pem import encode_certificates
from csi_driver.core.names import Names
from csi_driver.core.spec import KeyType
from csi_driver.rpc.authority_messages import IssuanceResponse
from csi_driver.secrets.conditions import utc
from csi_driver.secrets.requests import DesiredSecret


class Authority(Protocol):
    """Issues certificates."""

    async def issue(self, csr: bytes, desired: DesiredSecret) -> IssuanceResponse: ...


@dataclass(frozen=True, slots=True)
class SecretCertificate:
    """A key and its verified certificate."""

    key: PrivateKey = field(repr=False)
    chain: tuple[x509.Certificate, ...]
    roots: bytes  # PEM


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A request that is not finished: a retry uses the same key and CSR, so that the issuer continues its order."""

    desired: DesiredSecret
    key: PrivateKey = field(repr=False)
    csr: bytes


@dataclass(eq=False)
class SecretIssuance:
    """Requests and verifies certificates. RSA keys are generated one at a time in ``executor``, and others at once."""

    authority: Authority
    executor: Executor

    async def prepare(self, desired: DesiredSecret, key: PrivateKey | None) -> PendingRequest:
        """Return a request with this key, if it has the right type, or with a new one."""
        key_type = desired.options.key_type or KeyType.EC_P256
        if key is None or key_type_of(key.public_key()) is not key_type:
            if is_expensive(key_type):
                key = await asyncio.get_running_loop().run_in_executor(self.executor, generate_key, key_type)
            else:
                key = generate_key(key_type)
        return PendingRequest(desired, key, build_csr(key, Names.of(dns=desired.names)))

    async def obtain(self, pending: PendingRequest) -> SecretCertificate:
        """Return the certificate; raises CertmountError: the authority's reason or InvalidResponse."""
        response = await self.authority.issue(pending.csr, pending.desired)
        signer = pending.desired.options.issuer
        if signer not in response.trust:
            fault = Fault("response of the authority", f"does not contain the roots of {signer}")
            raise CertmountError(Reason.INVALID_RESPONSE, fault)
        names = Names.of(dns=pending.desired.names)
        expected = ExpectedCertificate(pending.key.public_key(), names, "", "", identity_optional=True, spiffe=False)
        verified = verify_certificate(response.chain, response.trust[signer].roots, expected, utc(time.time()))
        return SecretCertificate(pending.key, verified.chain, encode_certificates(verified.roots))
