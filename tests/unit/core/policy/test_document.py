"""Parsing of the policy file, and errors with all faults."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.errors import CertmountError, Fault, Reason
from csi_driver.core.policy.document import parse_policy
from csi_driver.core.policy.engine import Policy
from csi_driver.core.policy.rules import DenyListEntry, RuleLimits, RuleMatch
from csi_driver.core.spec import KeyType, Usage
from tests.unit.core.outcomes import outcome
from tests.unit.core.strategies import hostile_texts

GOOD: dict[str, Any] = {
    "match": {
        "namespaces": ["web", "team-*"],
        "serviceAccounts": ["*"],
        "namespaceLabels": {"team": "pay*", "a.example/b": ""},
    },
    "allow": {
        "dns": ["*.{namespace}.svc.{cluster_domain}"],
        "uris": ["spiffe://{trust_domain}/ns/{namespace}/app/*"],
        "ips": ["10.0.0.0/8", "fd00::1"],
        "emails": ["{service_account}@{cluster_domain}"],
        "key_types": ["EC-P256", "ml-dsa-65"],
        "usages": ["server"],
        "min_duration": "5m",
        "max_duration": "48h",
        "issuers": ["internal", "acme"],
    },
}
MATCH = {"namespaces": ["*"], "serviceAccounts": ["*"]}


def read(document: object) -> Policy:
    return parse_policy(document, trust_domain="td.example", cluster_domain="cluster.local")


def rule(**changes: object) -> dict[str, list[Any]]:
    """Return a file with one rule; ``match_x`` and ``allow_x`` replace a key, ``match`` and ``allow`` a section."""
    parts: dict[str, Any] = {"match": dict(GOOD["match"]), "allow": dict(GOOD["allow"])}
    for key, value in changes.items():
        part, _, field = key.partition("_")
        if field:
            parts[part][field] = value
        else:
            parts[part] = value
    return {"policy": [parts]}


def faults_of(document: object) -> dict[str, str]:
    with pytest.raises(CertmountError) as raised:
        read(document)
    assert raised.value.reason is Reason.INVALID_POLICY
    return {fault.field: str(fault) for fault in raised.value.faults if isinstance(fault, Fault)}


@pytest.mark.parametrize("document", [None, {}, {"policy": None}, {"policy": []}])
def test_empty_file_is_the_default_policy(document: object) -> None:
    assert read(document) == Policy("td.example", "cluster.local")


def test_rule_is_parsed_with_domains() -> None:
    (made,) = read({"policy": [GOOD]}).rules
    assert made.match == RuleMatch(("web", "team-*"), ("*",), (("team", "pay*"), ("a.example/b", "")))
    assert [str(pattern) for pattern in made.dns] == ["*.{namespace}.svc.cluster.local"]
    assert [str(pattern) for pattern in made.uris] == ["spiffe://td.example/ns/{namespace}/app/*"]
    assert [str(known) for known in made.ips] == ["10.0.0.0/8", "fd00::1"]
    assert [str(pattern) for pattern in made.emails] == ["{service_account}@cluster.local"]
    assert made.limits == RuleLimits(
        (KeyType.EC_P256, KeyType.ML_DSA_65),
        (Usage.SERVER,),
        timedelta(minutes=5),
        timedelta(hours=48),
        ("internal", "acme"),
    )
    assert made.label == "policy[0]"
    (made,) = read(rule(allow={"dns": ["a.example"]}, match={"namespaces": ["*"], "serviceAccounts": ["*"]})).rules
    assert (made.uris, made.ips, made.emails, made.match.namespace_labels) == ((),) * 4
    assert made.limits == RuleLimits()


def test_deny_list_is_parsed() -> None:
    match = {"namespaces": ["web"], "serviceAccounts": ["*"]}
    assert read({"deny": [{"match": match, "reason": "key stolen on 3 May"}]}).denials == (
        DenyListEntry(RuleMatch(("web",), ("*",)), "key stolen on 3 May", "deny[0]"),
    )


def test_usages_are_ordered() -> None:
    assert read(rule(allow_usages=["client", "server"])).rules[0].limits.usages == (Usage.SERVER, Usage.CLIENT)


def test_rule_label_contains_the_line() -> None:
    made = parse_policy(
        {"policy": [GOOD, GOOD]},
        trust_domain="td.example",
        cluster_domain="cluster.local",
        lines={("policy",): 1, ("policy", 0): 2, ("policy", 1): 14},
    )
    assert [made_rule.label for made_rule in made.rules] == ["policy[0] (line 2)", "policy[1] (line 14)"]


@pytest.mark.parametrize(
    "document, field, words",
    [
        ("text", "policy file", "is not a mapping"),
        ([], "policy file", "is not a mapping"),
        ({"rules": []}, "rules", "is unknown; known keys: policy, deny"),
        ({"polcy": []}, "polcy", "is unknown; did you mean policy?"),
        ({1: []}, "1", "is unknown; known keys: policy, deny"),
        ({"policy": [GOOD] * 1001}, "policy", "has 1001 items; use at most 1000"),
        ({"deny": [{"match": MATCH}]}, "deny[0].reason", "is missing"),
        ({"deny": [{"match": MATCH, "reason": ""}]}, "deny[0].reason", "is not one line of 1 to 200 characters"),
        ({"deny": [{"match": MATCH, "reason": "a\nb"}]}, "deny[0].reason", "is not one line of 1 to 200 characters"),
        ({"deny": [{"match": MATCH, "reason": "x" * 201}]}, "deny[0].reason", "is not one line of 1 to 200 characters"),
        ({"deny": [{"match": MATCH, "reason": 7}]}, "deny[0].reason", "is not one line of 1 to 200 characters"),
        ({"deny": [{"reason": "x"}]}, "deny[0].match", "is missing"),
        (
            {"deny": [{"match": {**MATCH, "namespaceLabels": {}}, "reason": "x"}]},
            "deny[0].match.namespaceLabels",
            "is unknown; did you mean namespaces?",
        ),
        ({"policy": {}}, "policy", "is not a list"),
        ({"policy": ""}, "policy", "is not a list"),
        ({"policy": 0}, "policy", "is not a list"),
        ({"policy": ["x"]}, "policy[0]", "is not a mapping; use the keys match, allow"),
        (
            rule(match_pods=["x"]),
            "policy[0].match.pods",
            "is unknown; known keys: namespaces, serviceAccounts, namespaceLabels",
        ),
        (rule(match_namespace=["x"]), "policy[0].match.namespace", "is unknown; did you mean namespaces?"),
        (rule(match_namespaceLabels=["x"]), "policy[0].match.namespaceLabels", "is not a mapping of labels to"),
        (rule(match_namespaceLabels={"a b": "x"}), "policy[0].match.namespaceLabels.a b", "is not a label key"),
        (
            rule(match_namespaceLabels={"a": True}),
            "policy[0].match.namespaceLabels.a",
            "True is not a string; put it in",
        ),
        (rule(match_namespaceLabels={"a": "x y"}), "policy[0].match.namespaceLabels.a", "'x y' is not a label value"),
        (
            rule(match_namespaceLabels={f"l{number}": "x" for number in range(1001)}),
            "policy[0].match.namespaceLabels",
            "has 1001 labels; use at most 1000",
        ),
        (rule(allow_ips=["10.0.0.1/8"]), "policy[0].allow.ips[0]", "use 10.0.0.0/8 for that range"),
        (rule(allow_emails=["x"]), "policy[0].allow.emails[0]", "'x' does not have the form name@domain"),
        (rule(allow_usages=["both"]), "policy[0].allow.usages[0]", "'both' is not a usage; use server, client"),
        (rule(allow_usages=[]), "policy[0].allow.usages", "is empty, so the rule allows nothing"),
        (rule(allow_usages="server"), "policy[0].allow.usages", "is not a list"),
        (
            rule(allow_key_types=["RSA"]),
            "policy[0].allow.key_types[0]",
            "'RSA' is not a key type; use one of EC-P256",
        ),
        (rule(allow_issuers=["Let's"]), "policy[0].allow.issuers[0]", "is not a name; use 1 to 63 lower-case letters"),
        (rule(allow_keytypes=["RSA"]), "policy[0].allow.keytypes", "is unknown; did you mean key_types?"),
        (
            rule(allow_min_duration="49h"),
            "policy[0].allow.min_duration",
            "49h is longer than max_duration, which is 48h",
        ),
        (rule(allow={"min_duration": "25h"}), "policy[0].allow.min_duration", "longer than max_duration, which is 24h"),
        (rule(allow_min_duration="1s"), "policy[0].allow.min_duration", "'1s' is not a duration of 10s or more"),
        (rule(allow_dns=["x.example"] * 1001), "policy[0].allow.dns", "has 1001 items; use at most 1000"),
        (rule(match={"namespaces": ["*"]}), "policy[0].match.serviceAccounts", "is missing"),
        (rule(match_namespaces="web"), "policy[0].match.namespaces", "is not a list"),
        (rule(match_namespaces=[7]), "policy[0].match.namespaces[0]", "7 is not a string; put it in quotes"),
        (rule(match_namespaces=["we b"]), "policy[0].match.namespaces[0]", "'we b' is not a name or a glob"),
        (
            rule(match_namespaces=["Web"]),
            "policy[0].match.namespaces[0]",
            "'Web' is not a name or a glob; use lower-case",
        ),
        (rule(match_namespaces=[""]), "policy[0].match.namespaces[0]", "is not a name or a glob"),
        (rule(allow_hosts=["x"]), "policy[0].allow.hosts", "is unknown; known keys: dns, uris, ips, emails"),
        (
            rule(allow_dns=["{sevice}.x"]),
            "policy[0].allow.dns[0]",
            "unknown placeholder {sevice}; use {namespace}",
        ),
        (rule(allow_uris=["*://x/"]), "policy[0].allow.uris[0]", "with a literal scheme and host"),
        (rule(allow_max_duration="1d"), "policy[0].allow.max_duration", "'1d' is not a duration"),
        (rule(allow_max_duration="-1h"), "policy[0].allow.max_duration", "'-1h' is negative"),
        (rule(allow_max_duration="9s"), "policy[0].allow.max_duration", "'9s' is not a duration of 10s or more"),
        (rule(allow_max_duration=3600), "policy[0].allow.max_duration", "3600 is not a string; put it in quotes"),
    ],
)
def test_fault_has_path_problem_and_hint(document: object, field: str, words: str) -> None:
    faults = faults_of(document)
    assert list(faults) == [field]
    assert words in faults[field]


def test_all_faults_are_reported_together() -> None:
    (first,) = rule(allow_dns=["**"], match_namespaces=["A"])["policy"]
    faults = faults_of({"policy": [first, GOOD, {"allow": {"uris": ["x"]}}, 7]})
    assert list(faults) == [
        "policy[0].match.namespaces[0]",
        "policy[0].allow.dns[0]",
        "policy[2].match",
        "policy[2].allow.uris[0]",
        "policy[3]",
    ]


def test_number_of_reported_faults_is_limited() -> None:
    with pytest.raises(CertmountError) as raised:
        read({"policy": [7] * 1000})
    assert str(raised.value).endswith("(51) and 950 more faults")


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), hostile_texts, st.dates()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(
                    [
                        "policy",
                        "deny",
                        "match",
                        "allow",
                        "reason",
                        "namespaceLabels",
                        "dns",
                        "ips",
                        "usages",
                        "max_duration",
                    ]
                ),
                st.integers(),
            ),
            inner,
        ),
    ),
    max_leaves=8,
)


@given(
    st.one_of(
        plain,
        plain.map(lambda inner: {"policy": [inner]}),
        plain.map(lambda inner: rule(allow=inner)),
        plain.map(lambda inner: rule(match=inner)),
    )
)
def test_any_data_is_a_policy_or_invalid_policy(document: object) -> None:
    result = outcome(lambda: read(document), CertmountError)
    if isinstance(result, CertmountError):
        assert result.reason is Reason.INVALID_POLICY
        assert result.faults
    else:
        assert result.trust_domain == "td.example"


@given(hostile_texts)
def test_glob_matches_only_kubernetes_names(text: str) -> None:
    result = outcome(lambda: read(rule(match_namespaces=[text])), CertmountError)
    assert isinstance(result, Policy) == (bool(text) and not set(text) - set("abcdefghijklmnopqrstuvwxyz0123456789.-*"))
