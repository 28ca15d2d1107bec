"""The audit log: one entry for each request, with the requester, the names and the decision."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

import structlog
from cryptography import x509

from csi_driver.core.certificates.csr import ParsedCSR
from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity
from csi_driver.core.policy.engine import Grant

_log = structlog.get_logger("audit")

_Step: TypeAlias = Literal["authentication_ms", "policy_ms", "sign_ms"]


@dataclass(slots=True)
class AuditRecord:
    """What is known about a request: each step fills in its fields, and those that are None are not logged."""

    # "none": the caller cancelled the request, or the authority will retry it.
    decision: Literal["issued", "rejected", "none"] = "none"
    csr: str | None = None  # the name of the CertificateSigningRequest
    requester: str | None = None  # the user name that created it
    node: str | None = None
    namespace: str | None = None
    service_account: str | None = None
    pod: str | None = None
    pod_uid: str | None = None
    issuer: str | None = None
    requested_names: list[str] | None = None
    key_sha256: str | None = None
    names: list[str] | None = None
    rules: Sequence[str] | None = None
    interim: bool | None = None
    pending: str | None = None
    serial: str | None = None
    not_after: str | None = None
    reason: str | None = None
    error: str | None = None
    authentication_ms: float | None = None
    policy_ms: float | None = None
    sign_ms: float | None = None
    identity: PodIdentity | None = field(default=None, metadata={"logged": False})

    def set_pod(self, pod: PodIdentity) -> None:
        self.identity = pod
        self.node, self.pod, self.pod_uid = pod.node_name, pod.pod_name, pod.pod_uid
        self.namespace, self.service_account = pod.service_account.namespace, pod.service_account.name

    def set_request(self, csr: ParsedCSR) -> None:
        self.requested_names = [name.text for name in csr.names]
        self.key_sha256 = key_fingerprint(csr.public_key)

    def set_grant(self, grant: Grant) -> None:
        self.names, self.rules = [name.text for name in grant.names], grant.rules

    def set_certificate(self, certificate: bytes) -> None:
        leaf = x509.load_der_x509_certificate(certificate)
        self.serial, self.not_after = f"{leaf.serial_number:x}", f"{leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"

    def set_error(self, error: CertmountError) -> None:
        self.reason, self.error = error.reason.word, str(error)

    def timed(self, step: _Step) -> _StepTimer:
        return _StepTimer(self, step)


class _StepTimer:
    """A class, because it is faster than a generator and runs several times for each certificate."""

    __slots__ = ("_record", "_started", "_step")

    def __init__(self, record: AuditRecord, step: _Step) -> None:
        self._record, self._step = record, step

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_error: object) -> None:
        total = (getattr(self._record, self._step) or 0.0) + _milliseconds(self._started)
        setattr(self._record, self._step, round(total, 2))


_FIELDS = tuple(each.name for each in fields(AuditRecord) if each.metadata.get("logged", True))


@contextlib.contextmanager
def audited() -> Iterator[AuditRecord]:
    """Write one entry to the audit log when the block ends, fails or is cancelled. A CertmountError is a rejection."""
    record = AuditRecord()
    started = time.perf_counter()
    try:
        yield record
    except CertmountError as error:
        record.decision = "rejected"
        record.set_error(error)
        raise
    except Exception:
        record.reason = Reason.INTERNAL.word
        raise
    finally:
        known = {name: value for name in _FIELDS if (value := getattr(record, name)) is not None}
        _log.info("certificate", duration_ms=_milliseconds(started), **known)


def _milliseconds(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 2)
