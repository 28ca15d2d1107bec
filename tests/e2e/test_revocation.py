"""The deny list: certmount stops to issue and to renew certificates of a denied service account."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.kubectl import (
    apply,
    change_policy,
    create_namespace,
    delete_namespace,
    events_of,
    wait_for_mount_failure,
    wait_until,
)
from tests.e2e.logs import LogCollector
from tests.e2e.pods import Pod, manifest

NAMESPACE = "e2e-revocation"
COMPROMISED = Pod(NAMESPACE, "compromised")
"""The driver renews its certificate about every 40 seconds."""
NEW = Pod(NAMESPACE, "new")
REASON = "its key was in a bug report"


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    """A running pod of the account that the test denies."""
    create_namespace(NAMESPACE)
    apply(manifest(COMPROMISED, {"duration": "60s"}))
    COMPROMISED.wait_until_ready()
    yield
    change_policy(lambda policy: policy.pop("deny", None))
    delete_namespace(NAMESPACE)


@pytest.mark.timeout(300)
def test_denied_account_gets_no_certificate_until_it_is_allowed_again(logs: LogCollector) -> None:
    """Renewals and new pods fail with the administrator's reason. After the entry is removed, both succeed without a restart."""
    uid = COMPROMISED.uid
    entry = {"match": {"namespaces": [NAMESPACE], "serviceAccounts": ["default"]}, "reason": REASON}
    change_policy(lambda policy: policy.update(deny=[entry]))
    (event, *_) = wait_until(
        lambda: events_of(COMPROMISED.name, NAMESPACE, reason="ServiceAccountDenied"),
        seconds=150,
        what="the event ServiceAccountDenied on the running pod",
    )
    assert REASON in event["message"]
    certificate, issued = COMPROMISED.read("site.crt"), len(logs.issued(uid))

    apply(manifest(NEW, {}))
    message = wait_for_mount_failure(NEW.name, NAMESPACE, seconds=60)
    assert "ServiceAccountDenied" in message
    assert REASON in message
    # The running pod keeps its certificate, which ends with its lifetime.
    assert (COMPROMISED.read("site.crt"), len(logs.issued(uid))) == (certificate, issued)

    change_policy(lambda policy: policy.pop("deny"))
    wait_until(lambda: COMPROMISED.read("site.crt") != certificate, seconds=150, what="a renewal once it is allowed")
    NEW.wait_until_ready(150)
    assert (COMPROMISED.uid, COMPROMISED.restarts()) == (uid, 0)
