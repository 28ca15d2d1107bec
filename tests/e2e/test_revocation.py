"""Taking a pod's certificates away: nothing is published, no one has to look anything up, they just are not renewed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.e2e.kubectl import CERTMOUNT, apply, find, get, kubectl, make_namespace, wait_for, wait_until, warnings_of
from tests.e2e.logs import LogKeeper
from tests.e2e.pods import Pod, manifest

NAMESPACE = "e2e-revocation"
STOLEN = Pod(NAMESPACE, "stolen")
"""Its certificate is renewed about every 40 seconds."""
NEXT = Pod(NAMESPACE, "next")
WHY = "its key was in a bug report"


def _set_policy(change: Any) -> None:
    policy = yaml.safe_load(get("configmap", "certmount-policy")["data"]["policy.yaml"]) or {}
    change(policy)
    patch = {"data": {"policy.yaml": json.dumps(policy)}}
    kubectl("-n", CERTMOUNT, "patch", "configmap", "certmount-policy", "--type=merge", "-p", json.dumps(patch))


@pytest.fixture(scope="module", autouse=True)
def scene() -> Iterator[None]:
    """A pod whose service account is to be denied."""
    make_namespace(NAMESPACE)
    apply(manifest(STOLEN, {"duration": "60s"}))
    wait_for("Ready", f"pod/{STOLEN.name}", namespace=NAMESPACE)
    yield
    _set_policy(lambda policy: policy.pop("deny", None))
    kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def _event(reason: str) -> str:
    """The text of the authority's event on the pod; empty while there is none."""
    events = find(
        "events", "--field-selector", f"involvedObject.name={STOLEN.name},reason={reason}", namespace=NAMESPACE
    )
    return events[0]["message"] if events else ""


@pytest.mark.timeout(300)
def test_a_denied_account_gets_nothing_more_until_it_is_allowed_again(logs: LogKeeper) -> None:
    """Its renewals and its new pods are refused, each with the administrator's reason; lifted, both go on by themselves."""
    uid, denied = STOLEN.uid, {"match": {"namespaces": [NAMESPACE], "serviceAccounts": ["default"]}, "reason": WHY}
    _set_policy(lambda policy: policy.update(deny=[denied]))
    said = wait_until(
        lambda: _event("ServiceAccountDenied"), seconds=150, what="the event ServiceAccountDenied on the running pod"
    )
    assert WHY in said
    held, issued = STOLEN.read("site.crt"), logs.issued(uid)

    apply(manifest(NEXT, {}))
    (refused, *_) = wait_until(lambda: warnings_of(NEXT.name, NAMESPACE), seconds=60, what="a FailedMount event")
    assert "ServiceAccountDenied" in refused
    assert WHY in refused
    # The pod keeps what it has: what ends it is the certificate's own end.
    assert (STOLEN.read("site.crt"), logs.issued(uid)) == (held, issued)

    _set_policy(lambda policy: policy.pop("deny"))
    wait_until(lambda: STOLEN.read("site.crt") != held, seconds=150, what="renewed once it is allowed again")
    wait_for("Ready", f"pod/{NEXT.name}", namespace=NAMESPACE, seconds=150)
    assert (STOLEN.uid, STOLEN.restarts()) == (uid, 0)
