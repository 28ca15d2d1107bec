"""The deny list: certmount stops to issue and to renew certificates of a denied service account."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e import cluster
from tests.e2e.logs import LogCollector
from tests.e2e.pods import Pod, manifest, pod_to_deny

NAMESPACE = "e2e-revocation"
COMPROMISED = Pod(NAMESPACE, "compromised")  # the driver renews its certificate about every 40 seconds
NEW = Pod(NAMESPACE, "new")
REASON = "its key was in a bug report"


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    """A running pod of the account that the test denies."""
    with pod_to_deny(COMPROMISED):
        yield


@pytest.mark.timeout(300)
def test_denied_account_gets_no_certificate_until_it_is_allowed_again(logs: LogCollector) -> None:
    """Renewals and new pods fail with the administrator's reason. After the entry is removed, both succeed without a restart."""
    uid = COMPROMISED.uid
    entry = {"match": {"namespaces": [NAMESPACE], "serviceAccounts": ["default"]}, "reason": REASON}
    cluster.change_policy(lambda policy: policy.update(deny=[entry]))
    (event, *_) = cluster.wait_until(
        lambda: cluster.events_of(COMPROMISED.name, NAMESPACE, reason="ServiceAccountDenied"),
        seconds=150,
        what="the event ServiceAccountDenied on the running pod",
    )
    assert REASON in event["message"]
    certificate, issued = COMPROMISED.read("site.crt"), len(logs.issued(uid))

    cluster.apply(manifest(NEW, {}))
    message = cluster.wait_for_mount_failure(NEW.name, NAMESPACE, seconds=60)
    assert "ServiceAccountDenied" in message
    assert REASON in message
    # The running pod keeps its certificate, which ends with its lifetime.
    assert (COMPROMISED.read("site.crt"), len(logs.issued(uid))) == (certificate, issued)

    cluster.change_policy(lambda policy: policy.pop("deny"))
    cluster.wait_until(
        lambda: COMPROMISED.read("site.crt") != certificate, seconds=150, what="a renewal once it is allowed"
    )
    NEW.wait_until_ready(150)
    assert (COMPROMISED.uid, COMPROMISED.restarts()) == (uid, 0)
