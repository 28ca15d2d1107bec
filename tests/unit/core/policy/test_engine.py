"""Evaluation of a policy by examples; ``test_reference.py`` compares it with a second implementation."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.names import URI, Names
from csi_driver.core.policy.engine import Grant, PolicySubject, RequestedCertificate
from csi_driver.core.policy.rules import ALL_USAGES
from csi_driver.core.spec import MIN_DURATION, KeyType, Usage
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import names
from tests.unit.core.policy.policies import POD, decide, pods, policy, requested, requests, rule_for_all, subject
from tests.unit.core.policy.reference import HOUR, Entry, Pod, Request

OWN = "spiffe://td.example/ns/web/sa/edge"
DAY = timedelta(hours=24)
SHOP = Pod("web", "edge", "edge-0", (("team", "a"),), ("shop", "api"))


def rejection(result: Grant | CertmountError) -> str:
    assert isinstance(result, CertmountError)
    assert result.reason is Reason.NAME_NOT_ALLOWED
    assert not result.retryable
    return str(result)


@given(pods)
def test_default_policy_allows_spiffe_id_and_service_names(pod: Pod) -> None:
    own = f"spiffe://td.example/ns/{pod.namespace}/sa/{pod.account}"
    services = [
        f"{service}.{pod.namespace}.svc{domain}"
        for service in sorted(pod.services)
        for domain in ("", ".cluster.local")
    ]
    grant = policy().decide(subject(pod), RequestedCertificate())
    assert grant == Grant(names(own, *services), DAY, ALL_USAGES, ("built-in",))
    for name in services:
        assert policy().decide(subject(pod), RequestedCertificate(names(name))).names == names(own, name)


def test_requested_spiffe_id_adds_no_implied_names() -> None:
    assert policy().decide(subject(SHOP), RequestedCertificate(names(OWN))).names == names(OWN)


def test_name_of_another_service_is_not_allowed() -> None:
    for name in ("bank.web.svc", "shop.other.svc", "*.web.svc", "shop.web.svc.other.local", "shop.web", "shop"):
        assert isinstance(decide(policy(), name, pod=SHOP), CertmountError)


def test_implied_name_is_omitted_if_it_is_not_allowed() -> None:
    rules = policy(rule_for_all(hours=48), Entry(names=("api.web.svc",), longest=48 * HOUR))
    grant = rules.decide(subject(SHOP), RequestedCertificate(duration=timedelta(hours=48)))
    assert grant.names == names(OWN, "api.web.svc")
    assert grant.rules == ("policy[0]", "policy[1]")


def test_too_long_service_name_is_omitted() -> None:
    """The cluster domain can be long."""
    rules = policy()
    object.__setattr__(rules, "cluster_domain", ".".join(["a" * 60] * 4))
    assert rules.decide(subject(SHOP), RequestedCertificate()).names == names(OWN, "api.web.svc", "shop.web.svc")


@given(requests())
def test_own_spiffe_id_is_always_allowed(request: tuple[list[Entry], Pod, Request]) -> None:
    entries, pod, _ = request
    own = URI.parse(f"spiffe://td.example/ns/{pod.namespace}/sa/{pod.account}")
    for wanted in (Names(), Names.of(uris=[own])):
        grant = policy(*entries).decide(subject(pod), RequestedCertificate(wanted))
        assert own in grant.names.uris
        assert (grant.duration, grant.usages) == (DAY, ALL_USAGES)


@given(pods, pods)
def test_spiffe_id_of_another_account_is_not_allowed_by_default(pod: Pod, other: Pod) -> None:
    assume((pod.namespace, pod.account) != (other.namespace, other.account))
    result = decide(policy(), f"spiffe://td.example/ns/{other.namespace}/sa/{other.account}", pod=pod)
    assert "no policy rule allows this name" in rejection(result)


@pytest.mark.parametrize(
    "labels, granted",
    [
        ((("team", "payments"),), True),
        ((("team", "payments"), ("other", "x")), True),
        ((("team", "payment"),), False),
        ((("team", ""),), False),
        ((("Team", "payments"),), False),
        ((), False),
    ],
)
def test_rule_requires_all_namespace_labels(labels: tuple[tuple[str, str], ...], granted: bool) -> None:
    rules = policy(Entry(labels=(("team", "pay*s"),), names=("x.example",)))
    assert isinstance(decide(rules, "x.example", pod=Pod("web", "edge", "edge-0", labels)), Grant) == granted


def test_cached_rules_depend_on_namespace_labels() -> None:
    rules = policy(Entry(labels=(("team", "a"),), names=("x.example",)))
    for labels, granted in ((("team", "a"), True), (("team", "b"), False), (("team", "a"), True)):
        assert isinstance(decide(rules, "x.example", pod=Pod("web", "edge", "e", (labels,))), Grant) == granted


def test_rule_cache_is_limited() -> None:
    """A user who creates many service accounts cannot exhaust the memory of the authority."""
    rules = policy()
    for number in range(10_000):
        rules.decide(subject(Pod("web", f"a{number}", "p")), RequestedCertificate())
    assert len(rules._cache) <= 4096


@pytest.mark.parametrize(
    "hours, requested_hours, granted",
    [
        (None, None, 24),
        (None, 24, 24),
        (None, 25, None),
        (1, None, 1),
        (1, 2, None),
        (1, 1, 1),
        (48, None, 24),
        (48, 48, 48),
        (48, 49, None),
    ],
)
def test_rule_limits_the_duration(hours: int | None, requested_hours: int | None, granted: int | None) -> None:
    """Without a requested duration, the grant has a day or the maximum. A requested duration is never shortened."""
    result = decide(policy(rule_for_all("x.example", hours=hours)), "x.example", hours=requested_hours)
    if isinstance(result, Grant):
        assert result.duration == timedelta(hours=granted or 0)
    else:
        assert granted is None
        assert f"only with duration 10s to {hours or 24}h, not {requested_hours}h" in rejection(result)


def test_rule_has_a_minimum_duration() -> None:
    rules = policy(Entry(names=("x.example",), shortest=48 * HOUR, longest=72 * HOUR))
    assert "duration 48h to 72h, not 24h" in rejection(decide(rules, "x.example", hours=24))
    result = decide(rules, "x.example")
    assert isinstance(result, Grant)
    assert result.duration == timedelta(hours=48)


@pytest.mark.parametrize("hours", [(1, 12), (12, 1), (1, 12, 2)])
def test_longest_duration_of_the_matching_rules_applies(hours: tuple[int, ...]) -> None:
    """For several names, the shortest of these."""
    rules = policy(*(rule_for_all("x.example", hours=limit) for limit in hours), rule_for_all("y.example", hours=2))
    for wanted, granted in ((("x.example",), 12), (("x.example", "y.example"), 2)):
        result = decide(rules, *wanted)
        assert isinstance(result, Grant)
        assert result.duration == timedelta(hours=granted)


@given(st.timedeltas(max_value=MIN_DURATION - timedelta(milliseconds=1), min_value=timedelta(days=-400)))
def test_too_short_duration_is_not_allowed(duration: timedelta) -> None:
    assert policy().decide(subject(), RequestedCertificate(duration=MIN_DURATION)).duration == MIN_DURATION
    for short in (duration, timedelta()):
        with pytest.raises(CertmountError, match="only with duration 10s to 24h, not"):
            policy().decide(subject(), RequestedCertificate(duration=short))


@pytest.mark.parametrize(
    "allowed, wanted, granted",
    [
        (None, (), ALL_USAGES),
        (("server",), (), (Usage.SERVER,)),
        (("client",), (), (Usage.CLIENT,)),
        (None, ("client",), (Usage.CLIENT,)),
        (("server",), ("server",), (Usage.SERVER,)),
        (("server",), ("client",), None),
        (("server",), ("server", "client"), None),
    ],
)
def test_usages_are_the_requested_or_all_allowed_ones(
    allowed: tuple[str, ...] | None, wanted: tuple[str, ...], granted: tuple[Usage, ...] | None
) -> None:
    rules = policy(Entry(names=("x.example",), usages=allowed))
    result = outcome(lambda: rules.decide(subject(), requested(Request(("x.example",), usages=wanted))), CertmountError)
    if granted is None:
        assert "allows it only with usages server, not client" in rejection(result)
    else:
        assert isinstance(result, Grant)
        assert result.usages == granted


def test_server_is_preferred_over_client() -> None:
    rules = policy(Entry(names=("x.example",), usages=("client",)), Entry(names=("x.example",), usages=("server",)))
    result = decide(rules, "x.example")
    assert isinstance(result, Grant)
    assert result.usages == (Usage.SERVER,)


def test_rule_limits_key_types_and_issuers() -> None:
    rules = policy(Entry(names=("x.example",), key_types=("EC-P256", "ML-DSA-65")), Entry(issuers=("acme",)))
    ask = RequestedCertificate(names("x.example"), KeyType.RSA_2048, issuer="acme")
    text = rejection(outcome(lambda: rules.decide(subject(), ask), CertmountError))
    assert (
        "policy[0] allows it only with key-type EC-P256 or ML-DSA-65, not RSA-2048 and issuer internal, not acme"
        in text
    )
    granted = rules.decide(subject(), RequestedCertificate(names("x.example"), KeyType.ML_DSA_65))
    assert granted.rules == ("policy[0]", "built-in")
    assert rules.decide(subject(), RequestedCertificate(issuer="acme")).names == names(OWN)
    nothing = rejection(
        outcome(lambda: policy().decide(subject(), RequestedCertificate(issuer="acme")), CertmountError)
    )
    assert (
        f"{OWN}: is not allowed with the requested attributes: built-in allows it only with issuer internal, not acme"
        in nothing
    )


def test_names_without_a_common_duration_are_incompatible() -> None:
    rules = policy(
        rule_for_all("x.example", hours=1), Entry(names=("y.example",), shortest=2 * HOUR, usages=("server",))
    )
    text = rejection(decide(rules, "x.example", "y.example"))
    assert "x.example: is not allowed together with the other names: policy[0] allows it only with usages server, client and duration 10s to 1h" in text  # fmt: skip
    assert "policy[1] allows it only with usages server and duration 2h to 24h; request a duration" in text
    assert OWN not in text


def test_all_names_that_are_not_allowed_are_reported() -> None:
    result = decide(
        policy(rule_for_all("x.example")), "x.example", "y.example", "https://z.example/", "10.0.0.1", "a@b.example"
    )
    text = rejection(result)
    for name in ("y.example", "https://z.example/", "10.0.0.1", "a@b.example"):
        assert f"{name}: no policy rule allows this name for service account web/edge; ask an administrator" in text
    assert " x.example" not in text
    assert OWN not in text


def test_number_of_reported_rules_is_limited() -> None:
    text = rejection(decide(policy(*[rule_for_all("x.example", hours=1)] * 9), "x.example", hours=2))
    assert text.count("allows it only") == 3
    assert "; 6 more rules have similar limits" in text


def test_deny_list_takes_precedence() -> None:
    rules = policy(rule_for_all("x.example"), deny=(("web", "ed*"),))
    for wanted in ((), ("x.example",), (OWN,)):
        result = decide(rules, *wanted)
        assert isinstance(result, CertmountError)
        assert result.reason is Reason.SERVICE_ACCOUNT_DENIED
        assert not result.retryable
        assert (
            "service account web/edge: is denied: stolen; ask an administrator to remove deny[0] from the deny list"
            in str(result)
        )
    assert rules.denial(ServiceAccount("web", "edge")) == "stolen"
    assert rules.denial(ServiceAccount("web", "edg")) == "stolen"
    assert rules.denial(ServiceAccount("web", "other")) is None
    assert isinstance(decide(rules, "x.example", pod=Pod("web", "other", "p")), Grant)


def test_grant_contains_the_deciding_rules() -> None:
    """Each once, in the order of the names, for the audit log."""
    rules = policy(rule_for_all("x.example"), rule_for_all("unused.example"), rule_for_all("y.example", "z.example"))
    result = decide(rules, "z.example", "y.example", "x.example")
    assert isinstance(result, Grant)
    assert result.rules == ("policy[2]", "policy[0]", "built-in")


def test_subject_without_cluster_data() -> None:
    assert PolicySubject(subject(POD).identity) == subject(POD)
