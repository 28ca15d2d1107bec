"""Process one signing request of the Kubernetes API: its audit record, its metric, and whether it must be retried."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import structlog

from csi_driver.authority.issuance.audit import AuditRecord, audited
from csi_driver.core.errors import CertmountError, Reason

log = structlog.get_logger(__name__)

Issue = Callable[[AuditRecord], Awaitable[tuple[bool, Reason | None]]]
"""Returns whether the request is finished, and the reason if there is no certificate; raises CertmountError to retry it."""


async def process_once(
    issue: Issue,
    *,
    may_log_failure: Callable[[], bool],
    on_processed: Callable[[float, Reason | None], None],
    defect: str,
    **labels: str,
) -> bool:
    """Return False if the request must be retried. Never raises, because other requests must still be processed.

    ``on_processed`` gets the seconds and the reason. An exception is logged as ``defect`` with ``labels``.
    """
    started = time.perf_counter()
    reason: Reason | None = Reason.INTERNAL
    try:
        with audited(may_log_failure) as record:
            try:
                finished, reason = await issue(record)
            except CertmountError as error:  # not a rejection, as it is retried
                record.set_error(error)
                reason = error.reason
                return False
            return finished
    except Exception:
        log.exception(defect, **labels)
        return False
    finally:
        on_processed(time.perf_counter() - started, reason)
