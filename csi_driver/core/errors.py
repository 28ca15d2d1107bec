"""Every failure that certmount reports, and what each component does about it.

A failure has a :class:`Reason`: a CamelCase word that is the same in events, logs, metrics, volume health and the
documentation. A reason has a :class:`FailureKind`. The kind alone decides what happens next: the gRPC status, whether and
when the node retries, and what the failure means for other requests to the same issuer. docs/reasons.md shows the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, unique


@unique
class Retry(Enum):
    """When the node driver retries a renewal that failed."""

    BACKOFF = "with exponential backoff, at most 30 s apart"
    SLOW = "with exponential backoff, at most 5 min apart, and when the policy changes"
    ON_TOKEN = "when the kubelet sends a new token, at the latest after 5 min"
    ON_POLICY_CHANGE = "when the policy changes"


@unique
class Scope(Enum):
    """Which other requests to the same issuer would fail in the same way."""

    REQUEST = "only this request"
    POD = "all requests of this pod"
    CALLER = "requests of this pod, its service account, namespace or node until its limit allows more; others are not affected"
    LOAD = "requests beyond what the issuer can handle now: the node slows down"
    ISSUER = "all requests to the issuer: the node sends one probe at a time until one succeeds"


@unique
class FailureKind(Enum):
    """What is done about a failure: who must act, the gRPC status, when the node retries, and what else is affected.

    The kubelet treats the statuses UNAVAILABLE, RESOURCE_EXHAUSTED and ABORTED as retryable and all others as final.
    """

    INVALID = ("the author of the request must change it", "INVALID_ARGUMENT", Retry.SLOW, Scope.REQUEST)
    NOT_ALLOWED = ("an administrator must allow it", "PERMISSION_DENIED", Retry.SLOW, Scope.POD)
    DENIED = (
        "an administrator must remove the service account or Secret from the deny list",
        "PERMISSION_DENIED",
        Retry.ON_POLICY_CHANGE,
        Scope.POD,
    )
    NOT_AUTHENTICATED = (
        "the token does not prove the identity of the pod or node",
        "PERMISSION_DENIED",
        Retry.SLOW,
        Scope.POD,
    )
    NOT_CONFIGURED = (
        "the author must change the name, or an administrator must configure it",
        "PERMISSION_DENIED",
        Retry.SLOW,
        Scope.REQUEST,
    )
    MISCONFIGURED = (
        "an administrator must fix the node or the cluster",
        "FAILED_PRECONDITION",
        Retry.SLOW,
        Scope.REQUEST,
    )
    NOT_FOUND = ("the volume does not exist", "NOT_FOUND", Retry.SLOW, Scope.REQUEST)
    TOKEN_NEEDED = ("the kubelet must send a new token", "UNAVAILABLE", Retry.ON_TOKEN, Scope.POD)
    POD_UNKNOWN = (
        "the API server has not reported the pod to the authority yet",
        "UNAVAILABLE",
        Retry.BACKOFF,
        Scope.POD,
    )
    TRANSIENT = ("a retry can succeed", "UNAVAILABLE", Retry.BACKOFF, Scope.REQUEST)
    PENDING = ("the issuer is still working on the certificate", "UNAVAILABLE", Retry.BACKOFF, Scope.REQUEST)
    UNAVAILABLE = ("a component that every request needs is unavailable", "UNAVAILABLE", Retry.BACKOFF, Scope.ISSUER)
    OVERLOADED = ("a component has reached its capacity", "RESOURCE_EXHAUSTED", Retry.BACKOFF, Scope.LOAD)
    RATE_LIMITED = (
        "the caller has reached its rate limit or its share of a resource",
        "RESOURCE_EXHAUSTED",
        Retry.BACKOFF,
        Scope.CALLER,
    )
    NO_SPACE = ("a file system on the node is full", "RESOURCE_EXHAUSTED", Retry.BACKOFF, Scope.REQUEST)
    ABORTED = ("the volume changed during the request", "ABORTED", Retry.BACKOFF, Scope.REQUEST)

    def __init__(self, meaning: str, status: str, retry: Retry, scope: Scope) -> None:
        self.meaning = meaning
        self.status = status  # the name of the gRPC status code
        self.retry = retry
        self.scope = scope

    @property
    def retryable(self) -> bool:
        """True if the same request can succeed later without a change by a user or administrator."""
        return self.status in ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED")


@unique
class Reason(Enum):
    """Why a request failed: the word that users search for, and its kind."""

    INVALID_ATTRIBUTES = ("InvalidAttributes", FailureKind.INVALID)
    INVALID_REQUEST = ("InvalidRequest", FailureKind.INVALID)
    INVALID_CSR = ("InvalidCSR", FailureKind.INVALID)
    INVALID_POLICY = ("InvalidPolicy", FailureKind.INVALID)
    INVALID_ISSUERS = ("InvalidIssuers", FailureKind.INVALID)
    INVALID_SOURCE = ("InvalidSource", FailureKind.INVALID)
    NAME_NOT_ALLOWED = ("NameNotAllowed", FailureKind.NOT_ALLOWED)
    TOKEN_REJECTED = ("TokenRejected", FailureKind.NOT_AUTHENTICATED)
    RELOAD_NOT_ALLOWED = ("ReloadNotAllowed", FailureKind.NOT_ALLOWED)
    SERVICE_ACCOUNT_DENIED = ("ServiceAccountDenied", FailureKind.DENIED)
    SECRET_DENIED = ("SecretDenied", FailureKind.DENIED)
    ISSUER_NOT_FOUND = ("IssuerNotFound", FailureKind.NOT_CONFIGURED)
    FEDERATION_NOT_FOUND = ("FederationNotFound", FailureKind.NOT_CONFIGURED)
    SECRET_NOT_MANAGED = ("SecretNotManaged", FailureKind.NOT_CONFIGURED)
    INVALID_SECRET_TYPE = ("InvalidSecretType", FailureKind.NOT_CONFIGURED)
    SECRET_ACCESS_DENIED = ("SecretAccessDenied", FailureKind.MISCONFIGURED)
    INVALID_KUBELET_DIRECTORY = ("InvalidKubeletDirectory", FailureKind.MISCONFIGURED)
    INVALID_TARGET_PATH = ("InvalidTargetPath", FailureKind.MISCONFIGURED)
    CLUSTER_NOT_SUPPORTED = ("ClusterNotSupported", FailureKind.MISCONFIGURED)
    INVALID_CA = ("InvalidCA", FailureKind.MISCONFIGURED)
    VOLUME_NOT_FOUND = ("VolumeNotFound", FailureKind.NOT_FOUND)
    TOKEN_MISSING = ("TokenMissing", FailureKind.TOKEN_NEEDED)
    TOKEN_EXPIRED = ("TokenExpired", FailureKind.TOKEN_NEEDED)
    NODE_TOKEN_MISSING = ("NodeTokenMissing", FailureKind.UNAVAILABLE)
    SECRETS_TOKEN_MISSING = ("SecretsTokenMissing", FailureKind.UNAVAILABLE)
    ROOT_CERTIFICATE_MISSING = ("RootCertificateMissing", FailureKind.UNAVAILABLE)
    AUTHORITY_UNAVAILABLE = ("AuthorityUnavailable", FailureKind.UNAVAILABLE)
    CLOCK_SKEW = ("ClockSkew", FailureKind.UNAVAILABLE)
    API_SERVER_UNAVAILABLE = ("APIServerUnavailable", FailureKind.UNAVAILABLE)
    TOKEN_REVIEW_UNAVAILABLE = ("TokenReviewUnavailable", FailureKind.UNAVAILABLE)
    POD_NOT_FOUND = ("PodNotFound", FailureKind.POD_UNKNOWN)
    ISSUER_UNAVAILABLE = ("IssuerUnavailable", FailureKind.UNAVAILABLE)
    ISSUANCE_PENDING = ("IssuancePending", FailureKind.PENDING)
    INVALID_RESPONSE = ("InvalidResponse", FailureKind.TRANSIENT)
    RELOAD_FAILED = ("ReloadFailed", FailureKind.TRANSIENT)
    MOUNT_FAILED = ("MountFailed", FailureKind.TRANSIENT)
    NO_SPACE = ("NoSpace", FailureKind.NO_SPACE)
    AUTHORITY_OVERLOADED = ("AuthorityOverloaded", FailureKind.OVERLOADED)
    TOO_MANY_REQUESTS = ("TooManyRequests", FailureKind.RATE_LIMITED)
    SHARE_EXCEEDED = ("ShareExceeded", FailureKind.RATE_LIMITED)
    REQUEST_TIMEOUT = ("RequestTimeout", FailureKind.TRANSIENT)
    VOLUME_REMOVED = ("VolumeRemoved", FailureKind.ABORTED)
    INTERNAL = ("InternalError", FailureKind.TRANSIENT)

    def __init__(self, word: str, kind: FailureKind) -> None:
        self.word = word
        self.kind = kind

    def __str__(self) -> str:
        return self.word


REASONS = {reason.word: reason for reason in Reason}


def printable(text: str) -> str:
    """Escape the characters that would break a line, control a terminal or change the direction of text."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


@dataclass(frozen=True)
class Fault:
    """A field with a problem, as the user wrote it, and a hint what to do."""

    field: str
    problem: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.field}: {self.problem}"
        return printable(f"{text}; {self.hint}" if self.hint else text)


class CertmountError(Exception):
    """A failure with a reason. Its text never contains a token or a key."""

    def __init__(self, reason: Reason, *faults: Fault | str) -> None:
        self.reason = reason
        self.faults = faults
        super().__init__(printable(_joined([str(fault) for fault in faults])) or reason.kind.meaning)

    @property
    def retryable(self) -> bool:
        return self.reason.kind.retryable

    @property
    def text(self) -> str:
        """The text without the reason."""
        return super().__str__()

    def __str__(self) -> str:
        return f"{self.reason}: {self.text}"


def _joined(texts: list[str]) -> str:
    """Return one text unchanged, or several texts in one line with numbers."""
    return texts[0] if len(texts) == 1 else " ".join(f"({number}) {text}" for number, text in enumerate(texts, start=1))


def first_faults(faults: Sequence[Fault], maximum: int) -> list[Fault | str]:
    """Return the first faults, and how many more there are."""
    more = len(faults) - maximum
    return [*faults[:maximum], *([f"and {more} more faults"] if more > 0 else [])]
