"""When a certificate is to be renewed: as the CA says (ARI, RFC 9773), else in time before its end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from acme import messages
from cryptography import x509
from josepy.errors import Error as JoseError

from csi_driver.authority.issuers.acme.client import CaProblem, Connection, retry_after_s

_LEAD = timedelta(days=30)
_LOOK_S = 6 * 3600.0
"""Between two questions where the CA names no time (RFC 9773 section 4.3)."""
_LEAST_LOOK_S, _MOST_LOOK_S = 60.0, 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Window:
    """When the CA wants a certificate renewed, and when it wants to be asked again. Unix seconds."""

    start: float
    end: float
    look_at: float

    def moment(self, jitter: float, planned: float | None = None) -> float:
        """A moment in the window (RFC 9773 section 4.2): the one that was planned while it still lies there, else by ``rng`` (0 to 1)."""
        if planned is not None and self.start <= planned <= self.end:
            return planned
        return self.start + jitter * max(self.end - self.start, 0.0)


def renewal_without_advice(leaf: x509.Certificate) -> float:
    """30 days before the end, or a third of the life where that is shorter. Unix seconds."""
    life = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    return (leaf.not_valid_after_utc - min(_LEAD, life / 3)).timestamp()


def ask_window(connection: Connection, certificate_id: str, now: float) -> Window | None:
    """The CA's advice; None where it gives none. Raises CaProblem or CertmountError."""
    base = connection.directory.to_partial_json().get("renewalInfo")
    if not base or not certificate_id:
        return None
    answer = connection.fetch(f"{base.rstrip('/')}/{certificate_id}")
    try:
        suggested = messages.RenewalInfo.from_json(answer.json()).suggested_window
        start, end = suggested.start.timestamp(), suggested.end.timestamp()
    except (JoseError, ValueError, AttributeError):
        raise CaProblem("", "answers with renewal information that cannot be read") from None
    pause = retry_after_s(answer)
    return Window(start, end, now + min(max(_LOOK_S if pause is None else pause, _LEAST_LOOK_S), _MOST_LOOK_S))


def next_look(now: float) -> float:
    """When to ask again where the last question brought no answer."""
    return now + _LOOK_S
