"""Who may have which name, by single cases; that the whole is right is said in ``test_policy_reference.py``."""

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
from tests.unit.core.policy.policies import POD, asked, decide, everyone, pods, policy, requests, subject
from tests.unit.core.policy.reference import HOUR, Entry, Pod, Wish

OWN = "spiffe://td.example/ns/web/sa/edge"
DAY = timedelta(hours=24)
SHOP = Pod("web", "edge", "edge-0", (("team", "a"),), ("shop", "api"))


def refusal(rules_and_wish: Grant | CertmountError) -> str:
    assert isinstance(rules_and_wish, CertmountError)
    assert rules_and_wish.reason is Reason.NAME_NOT_ALLOWED
    assert not rules_and_wish.retryable
    return str(rules_and_wish)


@given(pods)
def test_without_rules_a_pod_has_its_spiffe_id_and_its_services_names(pod: Pod) -> None:
    """All of them if it names nothing; for a day, for both ends, with any key."""
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


def test_who_asks_for_its_spiffe_id_gets_nothing_else() -> None:
    """What a pod names is what it gets."""
    assert policy().decide(subject(SHOP), RequestedCertificate(names(OWN))).names == names(OWN)


def test_a_service_that_does_not_select_the_pod_is_refused() -> None:
    """However near its name is."""
    for name in ("bank.web.svc", "shop.other.svc", "*.web.svc", "shop.web.svc.other.local", "shop.web", "shop"):
        assert isinstance(decide(policy(), name, pod=SHOP), CertmountError)


def test_what_is_implied_is_left_away_where_it_is_not_allowed() -> None:
    """A pod that names nothing is not refused for a Service's name that it didn't ask for."""
    rules = policy(everyone(hours=48), Entry(names=("api.web.svc",), most=48 * HOUR))
    grant = rules.decide(subject(SHOP), RequestedCertificate(duration=timedelta(hours=48)))
    assert grant.names == names(OWN, "api.web.svc")
    assert grant.rules == ("policy[0]", "policy[1]")


def test_a_services_name_that_is_too_long_is_left_away() -> None:
    """A cluster's domain may make a name that no certificate can hold."""
    rules = policy()
    object.__setattr__(rules, "cluster_domain", ".".join(["a" * 60] * 4))
    assert rules.decide(subject(SHOP), RequestedCertificate()).names == names(OWN, "api.web.svc", "shop.web.svc")


@given(requests())
def test_the_own_spiffe_id_is_always_granted(request: tuple[list[Entry], Pod, Wish]) -> None:
    """Under any rules, asked for or not, a pod gets its service account's SPIFFE ID, for a day."""
    entries, pod, _ = request
    own = URI.parse(f"spiffe://td.example/ns/{pod.namespace}/sa/{pod.account}")
    for wanted in (Names(), Names.of(uris=[own])):
        grant = policy(*entries).decide(subject(pod), RequestedCertificate(wanted))
        assert own in grant.names.uris
        assert (grant.duration, grant.usages) == (DAY, ALL_USAGES)


@given(pods, pods)
def test_the_spiffe_id_of_another_account_is_refused_by_default(pod: Pod, other: Pod) -> None:
    """Without rules no pod gets the identity of another service account."""
    assume((pod.namespace, pod.account) != (other.namespace, other.account))
    result = decide(policy(), f"spiffe://td.example/ns/{other.namespace}/sa/{other.account}", pod=pod)
    assert "no policy rule allows this name" in refusal(result)


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
def test_labels_of_the_namespace_decide(labels: tuple[tuple[str, str], ...], granted: bool) -> None:
    """A rule with labels is for namespaces that have all of them, with values that the globs fit."""
    rules = policy(Entry(labels=(("team", "pay*s"),), names=("x.example",)))
    assert isinstance(decide(rules, "x.example", pod=Pod("web", "edge", "edge-0", labels)), Grant) == granted


def test_a_change_of_labels_is_seen() -> None:
    """What is remembered of a pod's rules holds for its namespace's labels of that moment only."""
    rules = policy(Entry(labels=(("team", "a"),), names=("x.example",)))
    for labels, granted in ((("team", "a"), True), (("team", "b"), False), (("team", "a"), True)):
        assert isinstance(decide(rules, "x.example", pod=Pod("web", "edge", "e", (labels,))), Grant) == granted


def test_what_is_cache_has_a_bound() -> None:
    """Who makes namespaces and service accounts without end doesn't fill the authority's memory."""
    rules = policy()
    for number in range(10_000):
        rules.decide(subject(Pod("web", f"a{number}", "p")), RequestedCertificate())
    assert len(rules._cache) <= 4096


@pytest.mark.parametrize(
    "hours, asked_hours, granted",
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
def test_a_rule_limits_the_life_of_its_names(hours: int | None, asked_hours: int | None, granted: int | None) -> None:
    """Not asked for: a day or the limit if that is less; asked for: as asked up to the limit, never silently less."""
    result = decide(policy(everyone("x.example", hours=hours)), "x.example", hours=asked_hours)
    if isinstance(result, Grant):
        assert result.duration == timedelta(hours=granted or 0)
    else:
        assert granted is None
        assert f"only with duration 10s to {hours or 24}h, not {asked_hours}h" in refusal(result)


def test_a_least_life_is_kept() -> None:
    """A rule for long-lived certificates is not one for short-lived ones; the life nearest to a day is given unasked."""
    rules = policy(Entry(names=("x.example",), least=48 * HOUR, most=72 * HOUR))
    assert "duration 48h to 72h, not 24h" in refusal(decide(rules, "x.example", hours=24))
    result = decide(rules, "x.example")
    assert isinstance(result, Grant)
    assert result.duration == timedelta(hours=48)


@pytest.mark.parametrize("hours", [(1, 12), (12, 1), (1, 12, 2)])
def test_the_longest_life_of_the_rules_that_allow_a_name_counts(hours: tuple[int, ...]) -> None:
    """Each name lives as long as its most generous rule says, all of them together as long as the least of these."""
    rules = policy(*(everyone("x.example", hours=limit) for limit in hours), everyone("y.example", hours=2))
    for wanted, granted in ((("x.example",), 12), (("x.example", "y.example"), 2)):
        result = decide(rules, *wanted)
        assert isinstance(result, Grant)
        assert result.duration == timedelta(hours=granted)


@given(st.timedeltas(max_value=MIN_DURATION - timedelta(milliseconds=1), min_value=timedelta(days=-400)))
def test_a_life_too_short_to_renew_is_refused(duration: timedelta) -> None:
    """Zero and negative lives too, whoever sends them; the least life itself is granted."""
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
def test_usages_are_those_asked_for_or_all_that_are_allowed(
    allowed: tuple[str, ...] | None, wanted: tuple[str, ...], granted: tuple[Usage, ...] | None
) -> None:
    """Both before the server's before the client's, where nothing is asked for."""
    rules = policy(Entry(names=("x.example",), usages=allowed))
    result = outcome(lambda: rules.decide(subject(), asked(Wish(("x.example",), usages=wanted))), CertmountError)
    if granted is None:
        assert "allows it only with usages server, not client" in refusal(result)
    else:
        assert isinstance(result, Grant)
        assert result.usages == granted


def test_a_server_comes_before_a_client() -> None:
    """Where two rules allow one usage each, the server's is given."""
    rules = policy(Entry(names=("x.example",), usages=("client",)), Entry(names=("x.example",), usages=("server",)))
    result = decide(rules, "x.example")
    assert isinstance(result, Grant)
    assert result.usages == (Usage.SERVER,)


def test_key_types_and_issuers_are_kept() -> None:
    """A rule without a word on issuers is for the internal one; the refusal says all that is in the way."""
    rules = policy(Entry(names=("x.example",), key_types=("EC-P256", "ML-DSA-65")), Entry(issuers=("acme",)))
    ask = RequestedCertificate(names("x.example"), KeyType.RSA_2048, issuer="acme")
    text = refusal(outcome(lambda: rules.decide(subject(), ask), CertmountError))
    assert (
        "policy[0] allows it only with key-type EC-P256 or ML-DSA-65, not RSA-2048 and issuer internal, not acme"
        in text
    )
    granted = rules.decide(subject(), RequestedCertificate(names("x.example"), KeyType.ML_DSA_65))
    assert granted.rules == ("policy[0]", "built-in")
    assert rules.decide(subject(), RequestedCertificate(issuer="acme")).names == names(OWN)
    nothing = refusal(outcome(lambda: policy().decide(subject(), RequestedCertificate(issuer="acme")), CertmountError))
    assert (
        f"{OWN}: is not allowed with the requested attributes: built-in allows it only with issuer internal, not acme"
        in nothing
    )


def test_names_that_have_no_life_in_common_are_refused_together() -> None:
    """Each could be had by itself; the refusal says with what, and what to do."""
    rules = policy(everyone("x.example", hours=1), Entry(names=("y.example",), least=2 * HOUR, usages=("server",)))
    text = refusal(decide(rules, "x.example", "y.example"))
    assert "x.example: is not allowed together with the other names: policy[0] allows it only with usages server, client and duration 10s to 1h" in text  # fmt: skip
    assert "policy[1] allows it only with usages server and duration 2h to 24h; request a duration" in text
    assert OWN not in text


def test_every_refused_name_is_told_at_once() -> None:
    """The answer lists each name with the service account, so that an administrator can write one rule for all."""
    result = decide(
        policy(everyone("x.example")), "x.example", "y.example", "https://z.example/", "10.0.0.1", "a@b.example"
    )
    text = refusal(result)
    for name in ("y.example", "https://z.example/", "10.0.0.1", "a@b.example"):
        assert f"{name}: no policy rule allows this name for service account web/edge; ask an administrator" in text
    assert " x.example" not in text
    assert OWN not in text


def test_a_flood_of_rules_is_not_told() -> None:
    """The first few tell what to do; the number of the others is said."""
    text = refusal(decide(policy(*[everyone("x.example", hours=1)] * 9), "x.example", hours=2))
    assert text.count("allows it only") == 3
    assert "; 6 more rules have similar limits" in text


def test_the_deny_list_goes_before_everything() -> None:
    """The reason is the administrator's, for the pod's owner to read; others are not touched."""
    rules = policy(everyone("x.example"), deny=(("web", "ed*"),))
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


def test_the_rules_behind_a_grant_are_named() -> None:
    """For the audit log: each rule that a name was granted by, once, in the order of the names."""
    rules = policy(everyone("x.example"), everyone("unused.example"), everyone("y.example", "z.example"))
    result = decide(rules, "z.example", "y.example", "x.example")
    assert isinstance(result, Grant)
    assert result.rules == ("policy[2]", "policy[0]", "built-in")


def test_a_subject_has_no_labels_and_services_unless_said() -> None:
    """Outside a cluster there are none."""
    assert PolicySubject(subject(POD).identity) == subject(POD)
