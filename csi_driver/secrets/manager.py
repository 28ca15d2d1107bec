"""Keep one Secret as its sources request it: read it, judge it, and write a new certificate if it needs one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog
from cryptography import x509

from csi_driver.core.backoff import Backoff
from csi_driver.core.certificates.keys import encode_key
from csi_driver.core.cluster.objects import EventTarget
from csi_driver.core.errors import CertmountError, FailureKind, Fault, Reason, Retry
from csi_driver.core.formats.pem import encode_certificates, encode_der_certificates
from csi_driver.core.renewal import overdue_time
from csi_driver.core.secret import Secret
from csi_driver.core.texts import timestamp
from csi_driver.kube.client import ObjectName
from csi_driver.kube.tls_secrets.secret_client import (
    ADOPT,
    CHAIN,
    KEY,
    ROOTS,
    TLS_TYPE,
    SecretClient,
    SecretContents,
    SecretMetadata,
    SecretUpdate,
)
from csi_driver.rpc.authority_messages import TrustBundle
from csi_driver.secrets.conditions import (
    Condition,
    CurrentCertificate,
    FoundCondition,
    find_condition,
    has_other_names,
    longest_wait,
    parse_current,
    renewal_time,
    utc,
)
from csi_driver.secrets.issuance import PendingRequest, SecretCertificate, SecretIssuance
from csi_driver.secrets.requests import DesiredSecret, SecretName, UnreadSources
from csi_driver.telemetry.expiry_metrics import CertificateTimes
from csi_driver.telemetry.secrets_metrics import SecretsMetrics

log = structlog.get_logger(__name__)

RECHECK_S = 3600.0
"""Secrets are not watched, which would need the permission to list all of them. So each is read again about once an hour."""
MIN_ISSUE_INTERVAL_S = 30.0
"""The shortest time between two new certificates of a Secret, however often its source changes."""
SETTLE_S = 600.0
"""How long after its start the controller waits for unread sources before it replaces a certificate by one with fewer names."""
SPREAD_S = 10.0  # Secrets that a change affects together are not worked on together
READY = "Ready"
_RECHECK_JITTER = 0.2
_MAX_EVENTS = 10  # objects that get an event about one Secret
_MAX_CONDITION = 512  # bytes
_PENDING = Backoff(2.0, 30.0, jitter=0.25)
_RETRY = Backoff(2.0, 120.0, jitter=0.25)
_SLOW_RETRY = Backoff(5.0, 300.0, jitter=0.25)  # a person must act first
_RETRIED_ON_CHANGE = (Retry.SLOW, Retry.ON_POLICY_CHANGE)


RecordEvent = Callable[[EventTarget, bool, str, str], None]
"""Takes the object, whether it is a warning, the reason and the message."""


@dataclass(slots=True, eq=False)
class _State:
    """What the controller knows of a Secret. Everything can be read again, except the key of a pending request."""

    failures: int = 0
    reason: Reason | None = None
    trust: TrustBundle = field(default_factory=lambda: TrustBundle({}, ""))  # of the last check
    seen: SecretMetadata | None = None
    metadata: SecretMetadata | None = None  # at the last check of the contents
    checked: tuple[object, ...] = ()  # what it was checked against
    renew_at: float = 0.0  # Unix seconds
    not_after: float = 0.0
    found: CertificateTimes | None = None  # of the certificate that the last check has read
    fingerprint: str = ""
    issued_at: float = float("-inf")  # monotonic
    pending: PendingRequest | None = None
    obtained: SecretCertificate | None = None  # not written yet
    obtained_annotations: Mapping[str, str] = field(default_factory=dict)  # as the Secret would have them
    waiting: bool = False  # for sources that have not been read


@dataclass(eq=False)
class SecretManager:
    """``schedule`` asks for a call of :meth:`work` after a delay; ``may_log`` limits the log lines about failures of a namespace."""

    secrets: SecretClient
    issuance: SecretIssuance
    desired: Callable[[SecretName], DesiredSecret | None]
    schedule: Callable[[SecretName, float], None]
    record: RecordEvent
    metrics: SecretsMetrics
    unread: Callable[[SecretName], UnreadSources]
    may_log: Callable[[str], bool]
    trust: TrustBundle | None = None
    _states: dict[SecretName, _State] = field(default_factory=dict)
    _waiting: dict[SecretName, tuple[DesiredSecret, str]] = field(default_factory=dict)  # with the annotation source

    def __post_init__(self) -> None:
        self._settled_at = time.monotonic() + SETTLE_S

    def __contains__(self, name: SecretName) -> bool:
        """Return whether the Secret has been worked on since a source requests it."""
        return name in self._states

    def update_trust(self, trust: TrustBundle) -> None:
        """Use a new trust bundle, and work on the Secrets that it affects."""
        known, self.trust = self.trust, trust
        changed = {
            name
            for name in trust.sets.keys() | trust.environments.keys()
            if known is None
            or trust.sets.get(name) != known.sets.get(name)
            or trust.environments.get(name) != known.environments.get(name)
        }
        for name, state in self._states.items():
            desired = self.desired(name)
            failing = state.reason is not None and state.reason.kind.retry in _RETRIED_ON_CHANGE
            if state.fingerprint in trust.renew_now or failing or (desired and desired.options.issuer in changed):
                self.schedule(name, SPREAD_S * _jitter())

    def retry_unavailable(self) -> None:
        """Work on the Secrets that failed because the authority was unavailable: it is available again."""
        for name, state in self._states.items():
            if state.reason is not None and state.reason.kind is FailureKind.UNAVAILABLE:
                self.schedule(name, SPREAD_S * _jitter())

    def retry_waiting(self) -> None:
        """Work on the Secrets whose sources have been read meanwhile."""
        for name, (desired, source) in list(self._waiting.items()):
            if not self.unread(name).of(desired, source):
                del self._waiting[name]
                self.schedule(name, SPREAD_S * _jitter())

    async def work(self, name: SecretName) -> None:
        """Check the Secret and renew it if needed; never raises."""
        # Both at the same time: a source that is read during the check is not in ``desired``.
        desired, unread = self.desired(name), self.unread(name)
        self._waiting.pop(name, None)
        if desired is None:
            self._states.pop(name, None)
            self.metrics.forget(str(name))
            return
        state = self._states.setdefault(name, _State())
        try:
            delay_s = await self._check(state, desired, unread)
        except CertmountError as error:
            await self._fail(state, desired, error)
        except Exception as defect:  # one Secret must not stop the others
            log.error("work on a Secret failed", secret=str(name), exc_info=defect)  # noqa: TRY400  # JSON logs need the value
            await self._fail(state, desired, CertmountError(Reason.INTERNAL, type(defect).__name__))
        else:
            self.schedule(name, delay_s)

    async def _check(self, state: _State, desired: DesiredSecret, unread: UnreadSources) -> float:
        """Return after how many seconds to check the Secret again."""
        state.found = None
        name, trust = _object_name(desired.secret), self._trust()
        # A later bundle leads to another check, even if it arrives before this one ends.
        state.trust = trust
        metadata = state.seen = await self.secrets.metadata(name)
        if metadata is None:
            return await self._renew(state, desired, FoundCondition(Condition.MISSING), None)
        _is_adoption(name, metadata)  # before the data are read
        against = _against(desired, trust)
        unchanged = metadata == state.metadata and against == state.checked
        if unchanged and time.time() < state.renew_at and state.fingerprint not in trust.renew_now:
            return self._succeed(state, desired)
        contents = await self.secrets.read(name)
        state.seen = contents.metadata
        adopt = _is_adoption(name, contents.metadata)  # again: it can be another Secret than before
        if contents.type != TLS_TYPE:
            raise wrong_type(name, f"has the type {contents.type}, which cannot be changed; expected {TLS_TYPE}")
        if contents.immutable:  # before a certificate is requested that cannot be written
            raise wrong_type(name, "is immutable, so its certificate cannot be renewed")
        current = parse_current(_data(contents, CHAIN).reveal(), _data(contents, KEY))
        if current is None:
            return await self._renew(state, desired, FoundCondition(Condition.NOT_PARSABLE), contents)
        state.found = _times(renewal_time(current.leaf).timestamp(), current.leaf.not_valid_after_utc.timestamp())
        annotations = contents.metadata.annotations
        resources, now = unread.of(desired, annotations.get("source", "")), utc(time.time())
        finding = find_condition(current, annotations, desired, trust, now, complete=not resources)
        if resources and has_other_names(current.leaf, desired):
            settled_at = utc(time.time() + self._settled_at - time.monotonic())
            if (latest := longest_wait(finding, current.leaf, settled_at)) > now:
                self._wait(state, desired, contents.metadata, current, resources)
                delay_s = self._succeed(state, desired)
                return delay_s if finding is None else min((latest - now).total_seconds(), RECHECK_S)
        state.waiting = False
        if finding:
            return await self._renew(state, desired, finding, contents)
        # The response to the last write can have been lost, so its key must not be used again.
        state.pending = state.obtained = None
        await self._keep(state, desired, contents, current)
        if adopt:
            self._tell(desired, False, "SecretAdopted", "certmount manages this Secret now; its certificate is valid")
        return self._succeed(state, desired)

    def _wait(
        self,
        state: _State,
        desired: DesiredSecret,
        metadata: SecretMetadata,
        current: CurrentCertificate,
        resources: Sequence[str],
    ) -> None:
        """Leave the Secret alone: an unread source can request the names that a new certificate would not have."""
        self._remember(state, desired, metadata, current)
        state.checked = ()  # the next check reads the Secret again
        self._waiting[desired.secret] = desired, metadata.annotations.get("source", "")
        if not state.waiting:
            log.info("names kept until all sources are read", secret=str(desired.secret), unread=resources)
        state.waiting = True

    async def _keep(
        self, state: _State, desired: DesiredSecret, contents: SecretContents, current: CurrentCertificate
    ) -> None:
        """Keep the key and the certificate; correct the label, the annotations and the roots if they differ."""
        trust, issuer = state.trust, desired.options.issuer
        roots = (
            encode_der_certificates(trust.sets[issuer].roots)
            if issuer in trust.sets
            else _data(contents, ROOTS).reveal()
        )
        annotations = _annotations(desired, current.leaf, trust)
        metadata = contents.metadata
        outdated = not annotations.items() <= metadata.annotations.items()
        if not metadata.managed or outdated or roots != _data(contents, ROOTS).reveal():
            update = SecretUpdate(_data(contents, CHAIN).reveal(), _data(contents, KEY), roots, annotations)
            metadata = await self.secrets.apply(_object_name(desired.secret), update, contents)
        self._remember(state, desired, metadata, current)

    async def _renew(
        self, state: _State, desired: DesiredSecret, finding: FoundCondition, contents: SecretContents | None
    ) -> float:
        """Obtain a certificate and write it. Return after how many seconds to check the Secret again."""
        wait_s = state.issued_at + MIN_ISSUE_INTERVAL_S - time.monotonic()
        if wait_s > 0:
            return wait_s
        if state.obtained is not None and (outdated := self._find_outdated(state, state.obtained, desired)):
            log.info("certificate not written", secret=str(desired.secret), condition=str(outdated))
            state.pending = state.obtained = None
        if state.pending is None or state.pending.desired != desired:
            log.info("certificate requested", secret=str(desired.secret), condition=str(finding))
            known = state.pending.key if state.pending else None
            state.pending, state.obtained = await self.issuance.prepare(desired, known), None
        if state.obtained is None:
            state.obtained = await self.issuance.obtain(state.pending)
            state.obtained_annotations = _annotations(desired, state.obtained.chain[0], state.trust)
        obtained = state.obtained
        await self._write(state, desired, obtained, contents)
        state.pending, state.obtained, state.issued_at = None, None, time.monotonic()
        leaf = obtained.chain[0]
        self.metrics.issued()
        expiry = timestamp(leaf.not_valid_after_utc)
        log.info(
            "certificate issued",
            secret=str(desired.secret),
            serial=f"{leaf.serial_number:x}",
            issuer=desired.options.issuer,
            not_after=expiry,
        )
        text = f"issued a certificate of {desired.options.issuer}, valid until {expiry} ({finding})"
        self._tell(desired, False, "CertificateIssued", text)
        return self._succeed(state, desired)

    def _find_outdated(
        self, state: _State, obtained: SecretCertificate, desired: DesiredSecret
    ) -> FoundCondition | None:
        """Return why a certificate that could not be written would be replaced at once if it was in the Secret."""
        current = CurrentCertificate(obtained.key, obtained.chain)
        return find_condition(current, state.obtained_annotations, desired, state.trust, utc(time.time()))

    async def _write(
        self, state: _State, desired: DesiredSecret, obtained: SecretCertificate, contents: SecretContents | None
    ) -> None:
        name, leaf = _object_name(desired.secret), obtained.chain[0]
        annotations = _annotations(desired, leaf, state.trust)
        chain, key = encode_certificates(obtained.chain), encode_key(obtained.key)
        update = SecretUpdate(chain, key, obtained.roots, annotations)
        if contents is None:
            metadata = await self.secrets.create(name, update)
        else:
            metadata = await self.secrets.apply(name, update, contents)
        self._remember(state, desired, metadata, CurrentCertificate(obtained.key, obtained.chain))

    def _remember(
        self, state: _State, desired: DesiredSecret, metadata: SecretMetadata, current: CurrentCertificate
    ) -> None:
        state.metadata, state.checked = metadata, _against(desired, state.trust)
        state.fingerprint = current.fingerprint
        state.renew_at = renewal_time(current.leaf).timestamp()
        state.not_after = current.leaf.not_valid_after_utc.timestamp()

    def _succeed(self, state: _State, desired: DesiredSecret) -> float:
        state.failures, state.reason = 0, None
        self.metrics.ready(str(desired.secret), _times(state.renew_at, state.not_after))
        recheck = RECHECK_S * (1 + _RECHECK_JITTER * (2 * _jitter() - 1))
        return max(min(state.renew_at - time.time(), recheck), 1.0)

    async def _fail(self, state: _State, desired: DesiredSecret, error: CertmountError) -> None:
        kind, pending = error.reason.kind, error.reason.kind is FailureKind.PENDING
        state.failures, state.reason = state.failures + 1, error.reason
        if state.found is not None:  # a certificate that this replica has not renewed yet expires, too
            self.metrics.ready(str(desired.secret), state.found)
        self.metrics.failed(str(desired.secret), error.reason, pending=pending)
        if not pending and self.may_log(desired.secret.namespace):
            log.warning("certificate not issued", secret=str(desired.secret), error=str(error))
        self._tell(desired, not pending, error.reason.word, error.text)
        backoff = _PENDING if pending else _RETRY if kind.retry is Retry.BACKOFF else _SLOW_RETRY
        self.schedule(desired.secret, backoff.delay_s(state.failures, _jitter()))
        await self._mark(state, desired, error)

    async def _mark(self, state: _State, desired: DesiredSecret, error: CertmountError) -> None:
        """Write the failure to the Secret if certmount manages it, and if its text has changed."""
        metadata = state.seen
        if metadata is None or not metadata.managed or error.reason is Reason.SECRET_ACCESS_DENIED:
            return
        text = str(error).encode()[:_MAX_CONDITION].decode(errors="ignore")
        if metadata.annotations.get("condition") == text:
            return
        try:
            await self.secrets.annotate(_object_name(desired.secret), {"condition": text}, metadata)
        except CertmountError as problem:
            log.info("condition not written", secret=str(desired.secret), error=str(problem))

    def _trust(self) -> TrustBundle:
        if self.trust is None:
            raise CertmountError(Reason.AUTHORITY_UNAVAILABLE, "the authority has not sent its roots yet")
        return self.trust

    def _tell(self, desired: DesiredSecret, warning: bool, reason: str, text: str) -> None:
        for target in desired.targets[:_MAX_EVENTS]:
            self.record(target, warning, reason, f"Secret {desired.secret}: {text}")


def _annotations(desired: DesiredSecret, leaf: x509.Certificate, trust: TrustBundle) -> dict[str, str]:
    issuer, target = desired.options.issuer, desired.targets[0]
    environment = trust.environments.get(issuer, "")
    return {
        "serial": f"{leaf.serial_number:x}",
        "not-after": timestamp(leaf.not_valid_after_utc),
        "issuer": issuer,
        "source": f"{target.kind}/{target.namespace}/{target.name}",
        "condition": READY,
        **({"environment": environment} if environment else {}),
    }


def _against(desired: DesiredSecret, trust: TrustBundle) -> tuple[object, ...]:
    """Return what a Secret is checked against: while it stays the same, the result does too."""
    issuer = desired.options.issuer
    return desired, desired.targets[:1], trust.sets.get(issuer), trust.environments.get(issuer)


def _times(renew_at: float, not_after: float) -> CertificateTimes:
    return CertificateTimes(overdue_time(renew_at, not_after), not_after)


def _jitter() -> float:
    return random.random()  # noqa: S311  # not a secret


def _object_name(secret: SecretName) -> ObjectName:
    return ObjectName("Secret", secret.namespace, secret.name)


def _data(contents: SecretContents, key: str) -> Secret[bytes]:
    return contents.data.get(key) or Secret(b"")


def _is_adoption(name: ObjectName, metadata: SecretMetadata) -> bool:
    """Return whether certmount begins to manage the Secret; raises CertmountError if its owner does not allow this."""
    if not metadata.managed and metadata.annotations.get("adopt") != "true":
        raise not_managed(name)
    return not metadata.managed


def not_managed(name: ObjectName) -> CertmountError:
    hint = f'annotate it with {ADOPT}: "true" to let certmount replace its contents, or use another name'
    return CertmountError(Reason.SECRET_NOT_MANAGED, Fault(str(name), "exists, and certmount did not create it", hint))


def wrong_type(name: ObjectName, problem: str) -> CertmountError:
    return CertmountError(Reason.INVALID_SECRET_TYPE, Fault(str(name), problem, "delete it, or use another name"))
