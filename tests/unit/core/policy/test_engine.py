"""Evaluation of a policy by examples; ``test_reference.py`` compares it with a second implementation."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.core.identity import ServiceAccount
from csi_driver.core.names import URI, Names
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import Grant, PolicySubject, RequestedCertificate
from csi_driver.core.policy.rules import ALL_USAGES
from csi_driver.core.spec import MIN_DURATION, KeyType, Usage
from csi_driver.core.subject import Subject
from tests.unit.core.outcomes import outcome
from tests.unit.core.pki import names
from tests.unit.core.policy.policies import POD, decide, pods, policy, requested, requests, rule_for_all, subject
from tests.unit.core.policy.reference import HOUR, Entry, Pod, Request

OWN = "spiffe://td.example/ns/web/sa/edge"
DAY = timedelta(hours=24)
SHOP = Pod("web", "edge", "edge-0", (("team", "a"),), ("shop", "api"))


def granted_by(result: Grant | CertmountError) -> Grant:
    assert isinstance(result, Grant), result
    return result


def rejection(result: Grant | CertmountError) -> str:
    assert isinstance(result, CertmountError)
    assert result.reason is Reason.NAME_NOT_ALLOWED
    assert not result.retryable
    return str(result)


@given(pods)
def test_default_policy_allows_spiffe_id_and_service_names(pod: Pod) -> None:
    own = f"spiffe://td.example/ns/{pod.namespace}/sa/{pod.account}"
    domains = ("", ".cluster.local")
    services = [f"{service}.{pod.namespace}.svc{domain}" for service in sorted(pod.services) for domain in domains]
    grant = policy().decide(subject(pod), RequestedCertificate())
    assert grant == Grant(names(own, *services), DAY, ALL_USAGES, ("built-in",))
    for name in services:
        assert policy().decide(subject(pod), RequestedCertificate(names(name))).names == names(own, name)


def test_requested_spiffe_id_adds_no_implied_names() -> None:
    assert policy().decide(subject(SHOP), RequestedCertificate(names(OWN))).names == names(OWN)


def test_name_of_another_service_is_not_allowed() -> None:
    for name in ("bank.web.svc", "shop.other.svc", "*.web.svc", "shop.web.svc.other.local", "shop.web", "shop"):
        assert isinstance(decide(policy(), name, pod=SHOP), CertmountError)


def test_pod_has_its_own_name_below_its_governing_service() -> None:
    """As DNS serves it for the pods of a StatefulSet. No pod has the name of another one."""
    governed = replace(SHOP, governing="shop")
    for name in ("edge-0.shop.web.svc", "edge-0.shop.web.svc.cluster.local"):
        assert granted_by(decide(policy(), name, pod=governed)).names == names(OWN, name)
        assert isinstance(decide(policy(), name, pod=SHOP), CertmountError)
    for name in (
        "edge-0.api.web.svc",
        "edge-1.shop.web.svc",
        "*.shop.web.svc",
        "edge-0.bank.web.svc",
        "edge-0.web.svc",
        "x.edge-0.shop.web.svc",
    ):
        assert isinstance(decide(policy(), name, pod=governed), CertmountError)
    dotted = Pod("web", "edge", "edge.0", (), ("shop",), "shop")
    assert isinstance(decide(policy(), "edge.0.shop.web.svc", pod=dotted), CertmountError)


def test_error_about_the_name_of_a_pod_says_when_dns_publishes_it() -> None:
    expected = "no policy rule allows this name for service account web/edge; "
    rule = "ask an administrator to add a rule to the policy"
    for name in ("edge-0.shop.web.svc", "edge-0.shop.web.svc.cluster.local"):
        hint = f"use the pod of a StatefulSet with this headless Service as its serviceName, or {rule}"
        assert rejection(decide(policy(), name, pod=SHOP)) == f"NameNotAllowed: {name}: {expected}{hint}"
    for name in ("edge-1.shop.web.svc", "edge-0.shop.bank.svc", "edge-0.shop", "edge-0"):
        assert rejection(decide(policy(), name, pod=SHOP)) == f"NameNotAllowed: {name}: {expected}{rule}"


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
        ({"team": "payments"}, True),
        ({"team": "payments", "other": "x"}, True),
        ({"team": "payment"}, False),
        ({"team": ""}, False),
        ({"Team": "payments"}, False),
        ({}, False),
    ],
)
def test_rule_requires_all_namespace_labels(labels: dict[str, str], granted: bool) -> None:
    rules = policy(Entry(labels=(("team", "pay*s"),), names=("x.example",)))
    pod = Pod("web", "edge", "edge-0", tuple(labels.items()))
    assert isinstance(decide(rules, "x.example", pod=pod), Grant) == granted


def test_cached_rules_depend_on_namespace_labels() -> None:
    rules = policy(Entry(labels=(("team", "a"),), names=("x.example",)))
    for labels, granted in ((("team", "a"), True), (("team", "b"), False), (("team", "a"), True)):
        assert isinstance(decide(rules, "x.example", pod=Pod("web", "edge", "e", (labels,))), Grant) == granted


DURATIONS = [(None, None, 24), (None, 24, 24), (None, 25, None), (1, None, 1), (1, 2, None), (1, 1, 1)]


@pytest.mark.parametrize("hours, requested_hours, granted", [*DURATIONS, (48, None, 24), (48, 48, 48), (48, 49, None)])
def test_rule_limits_the_duration(hours: int | None, requested_hours: int | None, granted: int | None) -> None:
    result = decide(policy(rule_for_all("x.example", hours=hours)), "x.example", hours=requested_hours)
    if isinstance(result, Grant):
        assert result.duration == timedelta(hours=granted or 0)
    else:
        assert granted is None
        bound = hours or 24
        assert rejection(result) == (
            f"NameNotAllowed: volumeAttributes.duration: {requested_hours}h is longer than the {bound}h that policy[0] allows "
            f"for x.example; use at most {bound}h, or ask an administrator to change the policy"
        )


def test_rule_has_a_minimum_duration() -> None:
    rules = policy(Entry(names=("x.example",), shortest=48 * HOUR, longest=72 * HOUR))
    assert rejection(decide(rules, "x.example", hours=24)) == (
        "NameNotAllowed: volumeAttributes.duration: 24h is shorter than the 48h that policy[0] allows for x.example; "
        "use at least 48h, or ask an administrator to change the policy"
    )
    assert granted_by(decide(rules, "x.example")).duration == timedelta(hours=48)


@pytest.mark.parametrize("hours", [(1, 12), (12, 1), (1, 12, 2)])
def test_longest_duration_of_the_matching_rules_applies(hours: tuple[int, ...]) -> None:
    rules = policy(*(rule_for_all("x.example", hours=limit) for limit in hours), rule_for_all("y.example", hours=2))
    for wanted, granted in ((("x.example",), 12), (("x.example", "y.example"), 2)):
        assert granted_by(decide(rules, *wanted)).duration == timedelta(hours=granted)


@given(st.timedeltas(max_value=MIN_DURATION - timedelta(milliseconds=1), min_value=timedelta(days=-400)))
def test_too_short_duration_is_not_allowed(duration: timedelta) -> None:
    assert policy().decide(subject(), RequestedCertificate(duration=MIN_DURATION)).duration == MIN_DURATION
    for short in (duration, timedelta()):
        with pytest.raises(CertmountError, match="is shorter than the 10s that the built-in rule allows"):
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
        assert rejection(result) == (
            "NameNotAllowed: volumeAttributes.usages: client is not a usage that policy[0] allows for x.example; "
            "use server, or ask an administrator to change the policy"
        )
    else:
        assert granted_by(result).usages == granted


def test_server_is_preferred_over_client() -> None:
    rules = policy(Entry(names=("x.example",), usages=("client",)), Entry(names=("x.example",), usages=("server",)))
    assert granted_by(decide(rules, "x.example")).usages == (Usage.SERVER,)


def test_rule_limits_key_types_and_issuers() -> None:
    rules = policy(Entry(names=("x.example",), key_types=("EC-P256", "ML-DSA-65")), Entry(issuers=("acme",)))
    ask = RequestedCertificate(names("x.example"), KeyType.RSA_2048, issuer="acme")
    text = rejection(outcome(lambda: rules.decide(subject(), ask), CertmountError))
    assert text == (
        "NameNotAllowed: (1) volumeAttributes.key-type: RSA-2048 is not a key type that policy[0] allows for x.example; "
        "use EC-P256 or ML-DSA-65, or ask an administrator to change the policy "
        "(2) volumeAttributes.issuer: acme is not an issuer that policy[0] allows for x.example; "
        "use internal, or ask an administrator to change the policy"
    )
    granted = rules.decide(subject(), RequestedCertificate(names("x.example"), KeyType.ML_DSA_65))
    assert granted.rules == ("policy[0]", "built-in")
    assert rules.decide(subject(), RequestedCertificate(issuer="acme")).names == names(OWN)
    text = rejection(outcome(lambda: policy().decide(subject(), RequestedCertificate(issuer="acme")), CertmountError))
    assert text == (
        "NameNotAllowed: volumeAttributes.issuer: acme is not an issuer that the built-in rule allows; "
        "use internal, or ask an administrator to change the policy"
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


def test_limit_of_the_nearest_rule_is_reported() -> None:
    """The nearest rule has the fewest violated limits, and among these the nearest duration."""
    rules = policy(
        Entry(names=("*.example",), longest=12 * HOUR, key_types=("RSA-2048",)),
        *(rule_for_all("*.example", hours=hours) for hours in (1, 12, 3)),
    )
    text = rejection(decide(rules, *(f"{letter}.example" for letter in "abcde"), "other.test", hours=48))
    assert text == (
        "NameNotAllowed: (1) other.test: no policy rule allows this name for service account web/edge; "
        "ask an administrator to add a rule to the policy "
        "(2) volumeAttributes.duration: 48h is longer than the 12h that policy[2] allows "
        "for a.example, b.example, c.example and 2 more names; use at most 12h, or ask an administrator to change the policy"
    )


def test_number_of_reported_rules_is_limited() -> None:
    rules = policy(*[rule_for_all("x.example", hours=1)] * 9, Entry(names=("y.example",), shortest=2 * HOUR))
    text = rejection(decide(rules, "x.example", "y.example"))
    assert text.count("allows it only") == 4
    assert "; 6 more rules have similar limits" in text


SHOP_URI = "https://example.com/shop"
CONFLICT = "cannot be used with the pod's SPIFFE ID spiffe://td.example/ns/web/sa/edge, because a certificate with a SPIFFE ID has no other URI (X509-SVID section 2)"  # fmt: skip
FIX = 'remove it, or set volumeAttributes.spiffe to "false" if no peer verifies the SPIFFE ID of the pod'


@pytest.mark.parametrize("uri", [SHOP_URI, "spiffe://td.example/app/shop", "spiffe://other.example/ns/web/sa/edge"])
def test_uri_in_addition_to_the_spiffe_id_is_rejected(uri: str) -> None:
    """X509-SVID section 2: such a certificate is not a valid SVID."""
    rules = policy(Entry(names=(uri,)))
    for texts in ((uri,), (OWN, uri)):
        result = outcome(lambda texts=texts: rules.decide(subject(), requested(Request(texts))), CertmountError)  # type: ignore[misc]
        assert isinstance(result, CertmountError)
        assert str(result) == f"InvalidAttributes: volumeAttributes.uri-sans: {uri} {CONFLICT}; {FIX}"


def test_certificate_without_spiffe_id_needs_a_rule_that_permits_it() -> None:
    ask = requested(Request((SHOP_URI, "https://example.com/api"), spiffe=False))
    patterns = ("https://example.com/*",)
    grant = policy(Entry(names=patterns, without_spiffe_id=True)).decide(subject(), ask)
    assert grant.names == names(SHOP_URI, "https://example.com/api")
    assert rejection(outcome(lambda: policy(Entry(names=patterns)).decide(subject(), ask), CertmountError)) == (
        f'NameNotAllowed: volumeAttributes.spiffe: "false" is not a value that policy[0] allows for {SHOP_URI}, '
        "https://example.com/api; omit the attribute, or ask an administrator to set without_spiffe_id in the policy"
    )


def test_certificate_without_the_spiffe_id_of_the_pod_is_still_valid() -> None:
    rules = policy(Entry(names=("spiffe://td.example/app/*", SHOP_URI), without_spiffe_id=True))

    def result(*texts: str) -> Grant | CertmountError:
        return outcome(lambda: rules.decide(subject(), requested(Request(texts, spiffe=False))), CertmountError)

    assert granted_by(result("spiffe://td.example/app/shop")).names == names("spiffe://td.example/app/shop")
    assert str(result("spiffe://td.example/app/shop", SHOP_URI)) == (
        f"InvalidAttributes: volumeAttributes.uri-sans: {SHOP_URI} cannot be used with the SPIFFE ID "
        "spiffe://td.example/app/shop, because a certificate with a SPIFFE ID has no other URI (X509-SVID section 2); remove it"
    )
    assert str(result()) == (
        "InvalidAttributes: volumeAttributes.spiffe: leaves a certificate without a name; set name or dns-names too"
    )


def test_deny_list_takes_precedence() -> None:
    rules = policy(rule_for_all("x.example"), deny=(("web", "ed*"),))
    for wanted in ((), ("x.example",), (OWN,)):
        result = decide(rules, *wanted)
        assert isinstance(result, CertmountError)
        assert result.reason is Reason.SERVICE_ACCOUNT_DENIED
        assert not result.retryable
        words = "service account web/edge: is denied: stolen; ask an administrator to remove deny[0] from the deny list"
        assert words in str(result)
    assert rules.denial(ServiceAccount("web", "edge")) == "stolen"
    assert rules.denial(ServiceAccount("web", "edg")) == "stolen"
    assert rules.denial(ServiceAccount("web", "other")) is None
    assert isinstance(decide(rules, "x.example", pod=Pod("web", "other", "p")), Grant)


def test_grant_contains_the_deciding_rules() -> None:
    rules = policy(rule_for_all("x.example"), rule_for_all("unused.example"), rule_for_all("y.example", "z.example"))
    grant = granted_by(decide(rules, "z.example", "y.example", "x.example"))
    assert grant.rules == ("policy[2]", "policy[0]", "built-in")


def test_subject_without_cluster_data() -> None:
    assert PolicySubject(subject(POD).identity) == subject(POD)


@pytest.mark.parametrize(
    "subject_, allowed",
    [
        ("CN=shop.web.svc", True),  # a name of the certificate
        ("CN=edge,O=Example GmbH", True),
        ("CN=edge", True),
        ("CN=edge,O=Example GmbH,OU=Shop", False),
        ("CN=admin", False),
        ("O=Other", False),
        ("CN=Example GmbH", False),
    ],
)
def test_subject_needs_a_rule_that_allows_all_its_attributes(subject_: str, allowed: bool) -> None:
    rule = {"dns": ["shop.web.svc"], "subjects": ["CN={service_account}", "O=Example *"]}
    document = {"policy": [{"match": {"namespaces": ["*"], "serviceAccounts": ["*"]}, "allow": rule}]}
    loaded = parse_policy(document, trust_domain="td.example", cluster_domain="cluster.local")
    request = RequestedCertificate(names("shop.web.svc"), subject=Subject.parse(subject_))
    result = outcome(lambda: loaded.decide(subject(SHOP), request), CertmountError)
    assert isinstance(result, Grant) == allowed
    if not allowed:
        assert "use CN={service_account} or O=Example *" in rejection(result)


def test_without_a_rule_only_a_dns_name_is_a_common_name() -> None:
    request = RequestedCertificate(names("shop.web.svc"), subject=Subject.parse("CN=edge"))
    result = outcome(lambda: policy().decide(subject(SHOP), request), CertmountError)
    assert "CN=edge" in rejection(result)
    assert "add it to subjects in the policy" in rejection(result)
    request = RequestedCertificate(names("shop.web.svc"), subject=Subject.parse("CN=shop.web.svc"))
    assert granted_by(policy().decide(subject(SHOP), request)).names == names(OWN, "shop.web.svc")
