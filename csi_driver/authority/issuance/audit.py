"""The audit log: one entry for each request, with the requester, the names and the decision."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

import structlog

from csi_driver.core.certificates.csr import ParsedCSR
from csi_driver.core.certificates.keys import key_fingerprint
from csi_driver.core.certificates.lint import LeafFields
from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import PodIdentity, SecretIdentity
from csi_driver.core.policy.engine import Grant

_log = structlog.get_logger("audit")

_MAX_TEXT = 4096
"""Characters of the requested names and of the error. The names of an issued certificate are always complete."""
_Step: TypeAlias = Literal["authentication_ms", "policy_ms", "sign_ms"]


@dataclass(slots=True)
class AuditRecord:
    """What is known about a request: each step fills in its fields, and those that are None are not logged."""

    # "none": the caller cancelled the request, or the authority will retry it.
    decision: Literal["issued", "checked", "rejected", "none"] = "none"
    csr: str | None = None  # the name of the CertificateSigningRequest
    pod_certificate_request: str | None = None  # the namespace and name of the PodCertificateRequest
    requester: str | None = None  # the user name that created it, or the Secret
    node: str | None = None
    namespace: str | None = None
    service_account: str | None = None
    pod: str | None = None
    pod_uid: str | None = None
    issuer: str | None = None
    acme_email: str | None = None  # of the ACME account, if it is not the issuer's own
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

    def set_secret(self, secret: SecretIdentity) -> None:
        self.requester, self.namespace = str(secret), secret.namespace

    def set_request(self, csr: ParsedCSR) -> None:
        names = [name.text for name in csr.names]
        fit = sum(size <= _MAX_TEXT for size in itertools.accumulate(map(len, names)))
        self.requested_names = names if fit == len(names) else [*names[:fit], f"and {len(names) - fit} more"]
        self.key_sha256 = key_fingerprint(csr.public_key)

    def set_grant(self, grant: Grant) -> None:
        self.names, self.rules = [name.text for name in grant.names], grant.rules

    def set_leaf(self, leaf: LeafFields) -> None:
        self.serial, self.not_after = leaf.serial_hex, leaf.not_after_text

    def set_error(self, error: CertmountError) -> None:
        self.reason, self.error = error.reason.word, str(error)[:_MAX_TEXT]

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
def audited(may_log_failure: Callable[[], bool]) -> Iterator[AuditRecord]:
    """Write one entry to the audit log when the block ends, fails or is cancelled. A CertmountError is a rejection.

    Every issued certificate has an entry, and a rejection has one if ``may_log_failure`` returns True. A check that
    succeeds has none.
    """
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
        if record.decision == "issued" or (record.decision != "checked" and may_log_failure()):
            known = {name: value for name in _FIELDS if (value := getattr(record, name)) is not None}
            _log.info("certificate", duration_ms=_milliseconds(started), **known)


def _milliseconds(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 2)
