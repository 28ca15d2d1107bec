"""Decisions about Secrets: the engine with rules for them."""

from __future__ import annotations

from typing import Any

from csi_driver.core.errors import CertmountError
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import Grant, Policy
from tests.unit.core.outcomes import outcome
from tests.unit.core.policy.policies import decide, policy, requested, rule_for_all, subject
from tests.unit.core.policy.reference import Entry, Pod, Request
from tests.unit.core.policy.test_engine import granted_by

SECRET = Pod("web", "", "", secret="edge-tls")  # a name


def for_secret(rules: Policy, *texts: str, **changes: Any) -> Grant | CertmountError:
    request = Request(texts, spiffe=False, **changes)
    return outcome(lambda: rules.decide(subject(SECRET), requested(request)), CertmountError)


def test_rules_for_pods_and_the_built_in_rule_never_match_a_secret() -> None:
    rules = policy(rule_for_all("x.example", "*.web.svc"), Entry(names=("y.example",), secrets=("*",)))
    assert granted_by(for_secret(rules, "y.example")).rules == ("policy[1]",)
    for name in ("x.example", "edge.web.svc"):
        text = f"NameNotAllowed: {name}: no policy rule allows this name for secret web/edge-tls; ask an administrator to add a rule to the policy"
        assert str(for_secret(rules, name)) == text
    assert "y.example: no policy rule allows this name for service account web/edge" in str(decide(rules, "y.example"))


def test_account_and_secret_with_one_name_do_not_share_cached_rules() -> None:
    rules = policy(rule_for_all("x.example"), Entry(names=("y.example",), secrets=("edge",)))
    secret = Pod("web", "", "", secret="edge")  # a name
    for _ in range(2):
        assert isinstance(decide(rules, "x.example"), Grant)
        wanted = requested(Request(("x.example",), spiffe=False))
        assert isinstance(outcome(lambda: rules.decide(subject(secret), wanted), CertmountError), CertmountError)  # noqa: B023


def test_secret_can_use_only_allowed_acme_accounts() -> None:
    rules = policy(
        Entry(names=("*.example",), secrets=("*",), acme_emails=("*@{namespace}.example",)),
        Entry(names=("x.test",), secrets=("*",)),
    )
    assert isinstance(for_secret(rules, "a.example"), Grant)
    assert isinstance(for_secret(rules, "a.example", acme_email="ops@web.example"), Grant)
    assert str(for_secret(rules, "a.example", acme_email="ops@bank.example")) == (
        "NameNotAllowed: volumeAttributes.email: ops@bank.example is not the address of an ACME account that policy[0] allows for "
        "a.example; use *@{namespace}.example, or ask an administrator to add it to acme_emails in the policy"
    )
    assert "that policy[1] allows for x.test; omit it, or ask" in str(
        for_secret(rules, "x.test", acme_email="ops@web.example")
    )


def test_secret_can_be_denied() -> None:
    deny = {"match": {"namespaces": ["web"], "secrets": ["edge-*"]}, "reason": "stolen"}
    document = {"policy": [Entry(names=("x.example",), secrets=("*",)).document()], "deny": [deny]}
    rules = parse_policy(document, trust_domain="td.example", cluster_domain="cluster.local")
    text = "SecretDenied: secret web/edge-tls: is denied: stolen; ask an administrator to remove deny[0] from the deny list"
    assert str(for_secret(rules, "x.example")) == text
    assert rules.denial(ServiceAccount("web", "edge-tls")) is None
