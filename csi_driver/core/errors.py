"""Every failure certmount can tell a person about, and whether trying again can help.

A failure has a :class:`Reason`, a CamelCase word that is the same in events, metrics, volume health
and the documentation. The reason alone decides the :class:`Kind`, and the kind alone decides what
the kubelet and the renewal clock do about it; nothing else in the code base does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique


@unique
class Kind(Enum):
    """What may be done about a failure. Final for the kubelet are INVALID, REFUSED, FAILED and NOT_FOUND."""

    INVALID = "the request must be changed by whoever wrote it"
    REFUSED = "an administrator must allow it first"
    FAILED = "the node must be put right first"
    NOT_FOUND = "there is no such volume"
    UNAVAILABLE = "another component is down; try again"
    EXHAUSTED = "a limit is reached; try again later"
    ABORTED = "something changed in between; try again"

    @property
    def retryable(self) -> bool:
        """True when the same request may succeed later without anyone changing anything."""
        return self in (Kind.UNAVAILABLE, Kind.EXHAUSTED, Kind.ABORTED)


@unique
class Reason(Enum):
    """Why a request failed: the word people search for, and its kind."""

    INVALID_ATTRIBUTES = ("InvalidAttributes", Kind.INVALID)
    INVALID_REQUEST = ("InvalidRequest", Kind.INVALID)
    INVALID_CSR = ("InvalidCSR", Kind.INVALID)
    INVALID_POLICY = ("InvalidPolicy", Kind.INVALID)
    INVALID_ISSUERS = ("InvalidIssuers", Kind.INVALID)
    NAME_REFUSED = ("NameRefused", Kind.REFUSED)
    IDENTITY_REFUSED = ("IdentityRefused", Kind.REFUSED)
    IDENTITY_DENIED = ("IdentityDenied", Kind.REFUSED)
    ISSUER_UNKNOWN = ("IssuerUnknown", Kind.REFUSED)
    FEDERATION_UNKNOWN = ("FederationUnknown", Kind.REFUSED)
    KUBELET_DIRECTORY_WRONG = ("KubeletDirectoryWrong", Kind.FAILED)
    TARGET_UNUSABLE = ("TargetUnusable", Kind.FAILED)
    CLUSTER_UNSUPPORTED = ("ClusterUnsupported", Kind.FAILED)
    INVALID_CA = ("InvalidCA", Kind.FAILED)
    VOLUME_NOT_FOUND = ("VolumeNotFound", Kind.NOT_FOUND)
    TOKEN_MISSING = ("TokenMissing", Kind.UNAVAILABLE)
    TOKEN_EXPIRED = ("TokenExpired", Kind.UNAVAILABLE)
    TRUST_MISSING = ("TrustMissing", Kind.UNAVAILABLE)
    AUTHORITY_UNAVAILABLE = ("AuthorityUnavailable", Kind.UNAVAILABLE)
    PROOF_UNAVAILABLE = ("ProofUnavailable", Kind.UNAVAILABLE)
    POD_UNKNOWN = ("PodUnknown", Kind.UNAVAILABLE)
    ISSUER_UNAVAILABLE = ("IssuerUnavailable", Kind.UNAVAILABLE)
    ISSUANCE_PENDING = ("IssuancePending", Kind.UNAVAILABLE)
    ANSWER_INVALID = ("AnswerInvalid", Kind.UNAVAILABLE)
    MOUNT_FAILED = ("MountFailed", Kind.UNAVAILABLE)
    NO_SPACE = ("NoSpace", Kind.EXHAUSTED)
    OVERLOADED = ("Overloaded", Kind.EXHAUSTED)
    TOO_MANY_REQUESTS = ("TooManyRequests", Kind.EXHAUSTED)
    VOLUME_REMOVED = ("VolumeRemoved", Kind.ABORTED)
    INTERNAL = ("InternalError", Kind.UNAVAILABLE)

    def __init__(self, word: str, kind: Kind) -> None:
        self.word = word
        self.kind = kind

    def __str__(self) -> str:
        return self.word


REASONS = {reason.word: reason for reason in Reason}


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: the field as the user wrote it, what is wrong, and what to do about it."""

    field: str
    problem: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.field}: {self.problem}"
        return f"{text}; {self.hint}" if self.hint else text


class CertmountError(Exception):
    """A failure with a reason. Its text is for people and never holds a token or a key."""

    def __init__(self, reason: Reason, *faults: Fault | str) -> None:
        self.reason = reason
        self.faults = faults
        super().__init__(_joined([str(fault) for fault in faults]) or reason.kind.value)

    @property
    def retryable(self) -> bool:
        """True when the same request may succeed later without anyone changing anything."""
        return self.reason.kind.retryable

    def __str__(self) -> str:
        return f"{self.reason}: {super().__str__()}"


def _joined(texts: list[str]) -> str:
    """One text as it is; several numbered, so that each can be found in the one line of an event."""
    return texts[0] if len(texts) == 1 else " ".join(f"({number}) {text}" for number, text in enumerate(texts, start=1))
